//! Plans of hand-made changes.
