//! Downstreams: PostgreSQL, files, and a black hole for measuring.
//!
//! A dispatcher manager owns one [`Sink`] per changefeed and hands it row batches and block events; the
//! sink calls back when they are durable. Start reading at `sink.rs`.
//!
//! - **SK-1** A batch is reported flushed only when all of it is durable downstream.
//! - **SK-2** Rows of one dispatcher that share a unique key are applied in commit order.
//! - **SK-3** No error text and no log line holds a row value or a password.

mod error;
mod sink;

pub use error::Error;
pub use sink::{Flushed, Sink, TableStart};
