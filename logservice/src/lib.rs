//! Reads an upstream log, stores it, and serves it to dispatchers.

mod error;
mod filter;
pub mod upstream;

pub use error::*;
pub use filter::*;
