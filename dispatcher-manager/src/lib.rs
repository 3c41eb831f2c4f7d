//! draft
mod arrival;
mod block_status;
mod core;
mod dispatcher;
mod error;
mod heartbeat;
mod journal;
mod progress;
mod table;
mod timeline;
mod sinks;
mod source;
mod metrics;
pub use error::{Error, Fault};
