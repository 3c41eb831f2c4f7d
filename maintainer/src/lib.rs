//! One changefeed converges: places spans, folds progress into its checkpoint.
