//! One changefeed's spans on one node make progress.
