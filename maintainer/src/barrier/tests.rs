//! Histories of barriers.
