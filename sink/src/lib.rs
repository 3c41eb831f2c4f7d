//! Downstreams: PostgreSQL, files, and a black hole for measuring.
//!
//! A dispatcher manager owns one [`Sink`] per changefeed and hands it row batches and block events; the
//! sink calls back when they are durable. Start reading at `sink.rs`; then `postgres.rs`, whose order of
//! execution is decided by `causality.rs`.
//!
//! - **SK-1** A batch is reported flushed only when all of it is durable downstream.
//! - **SK-2** Rows of one dispatcher that share a unique key are applied in commit order.
//! - **SK-3** No error text and no log line holds a row value or a password.
//! - **SK-4** PostgreSQL: progress is written in the transaction of the rows it speaks of, and only from the
//!   position that this sink has seen; so a row change is applied exactly once, whoever replays it.
//! - **SK-5** PostgreSQL: after [`fence()`] has answered, no transaction of the sinks that were meant commits, neither
//!   one in flight nor a later one; a fenced sink ends with [`Error::Fenced`] and never writes again.
//!
//! - **SK-6** PostgreSQL: a part of a copy past the stream is durable together with the note of its snapshot, or not at all.
//!
//! - **SK-7** Nothing takes effect downstream while [`SinkOptions::permit`] does not hold: neither a transaction nor a file begins
//!   or is completed. What was taken waits.
//!
//! How a sink that lost its place is kept from writing is told in `postgres/registration.rs`. Files need no fence:
//! each dispatcher writes files of its own, and a late one holds rows that its successor writes too, under their
//! commit ts. A black hole keeps nothing.

mod blackhole;
mod causality;
pub mod encode;
mod error;
mod fence;
mod file;
pub mod metrics;
mod open;
mod postgres;
mod sink;
#[cfg(test)]
mod testing;

pub use blackhole::BlackholeSink;
pub use causality::{Causality, SHARDS, Shard};
pub use error::Error;
pub use fence::{FenceRequest, Fenced, Whom, fence, has_fence};
pub use file::{
    FileConfig, FileSink, Replay, ReplayError, ReplayedTable, Rows, metrics as file_metrics, replay,
};
pub use open::{DownstreamIdentity, SinkCheck, SinkOptions, check, copies, downstream_identity, open};
pub use postgres::{PostgresSink, connect_postgres};
pub use sink::{Flushed, Sink, TableStart};
