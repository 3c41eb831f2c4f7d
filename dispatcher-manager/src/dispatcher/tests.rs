//! Histories of one dispatcher.

mod alone;
mod barrier;
mod rows;
