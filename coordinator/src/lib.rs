//! The cluster converges: places maintainers, persists checkpoints and epochs.
