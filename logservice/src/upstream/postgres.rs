//! PostgreSQL (14 to 18) as an upstream: logical replication with `pgoutput`.
//!
//! A changefeed owns one slot and one publication of the same name. The publication lists its tables and
//! reports a partitioned table under the root's name. Connections are our own (`conn.rs`): one kind serves
//! questions, the copy and the stream. Start reading at `reader.rs`.
//!
//! A table is divided into key ranges only if nothing but its primary key keeps rows apart, and if the database's
//! equality of keys is that of their bytes (`catalog.rs`, [`event::KeyCodec`]); `split.rs` finds the ranges in a sample
//! of pages. An update that takes a row to another range must bring the whole row: without `REPLICA IDENTITY FULL` an
//! out-of-line (TOAST) value that the statement leaves alone is not logged. Such an update ends the streams of both
//! ranges with an error of its own before either half is written; the changefeed starts again with the table undivided,
//! and there the update is one statement.
//!
//! Changes of the schema come through event triggers (`ddl.rs`), where our role may install them. Without them a changed
//! table is an error, and a table created after the changefeed is not part of the publication and is reported with a
//! warning.
//!
//! Where a person wants only some columns or rows of a table (`filter.publish`), the publication has its column list and its
//! row filter (`partial.rs`), the catalog describes the table with these columns alone, and everything that reads its rows
//! reads those that the filter takes.
//!
//! Before a reader asks for a position, and beside the stream, it makes sure that this position means what it meant:
//!
//! ```text
//!  connect ──► standby? ──► publication ──► history ──► slot ──► stream ──► look at the publication, every 2 to 30 s
//!                │ next       │ altered       │ promoted  │ lost     │            │ altered
//!                ▼ endpoint   ▼ (`publication`)▼ (`origin`)▼ (`slot`) ▼ broken     ▼
//!              wait, again   fail            fail, or     fail, or  wait, again  fail
//!                                            go on        wait for
//!                                                         its reader
//! ```
//!
//! What cannot be seen in this log without event triggers: a TRUNCATE of a single partition. Values of generated columns are
//! not logged; their place in a row holds [`event::Datum::Unchanged`].

mod admin;
mod apply;
mod backoff;
mod bounds;
mod catalog;
mod conn;
mod copy;
mod ddl;
mod names;
mod options;
mod origin;
mod partial;
mod pgoutput;
mod publication;
mod reader;
mod server_error;
mod shape;
mod slot;
mod socket;
mod split;
mod sql;
mod tls;
mod types;
mod window;

use std::sync::Arc;

use async_trait::async_trait;
use event::PartWriter;
use heartbeatpb::{ChangefeedId, TableId, TableSpan, Ts};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use self::names::Names;
use self::options::ConnectOptions;
use self::reader::Reader;
use super::{
    CheckReport, FeedSpec, ReaderProgress, ReaderStart, SourceTable, SplitPoints, StartPoint, Upstream,
    UpstreamIdentity,
};
use crate::Error;
use crate::crew::CopyOrder;
use crate::event_store::{Gate, StoreWriter};

/// A PostgreSQL database.
#[derive(Debug)]
pub struct Postgres {
    options: ConnectOptions,
}

impl Postgres {
    /// Reads the URI; nothing is connected yet.
    ///
    /// # Errors
    /// When the URI is wrong.
    pub fn new(uri: &str) -> Result<Self, Error> {
        Ok(Self { options: ConnectOptions::parse(uri)? })
    }
}

#[async_trait]
impl Upstream for Postgres {
    async fn check(&self, spec: &FeedSpec) -> Result<CheckReport, Error> {
        admin::check(&self.options, spec).await
    }

    async fn create_retention(&self, spec: &FeedSpec, at: Option<Ts>) -> Result<StartPoint, Error> {
        admin::create_retention(&self.options, spec, at).await
    }

    async fn drop_retention(&self, changefeed: &ChangefeedId) -> Result<(), Error> {
        admin::drop_retention(&self.options, changefeed).await
    }

    async fn current_position(&self) -> Result<StartPoint, Error> {
        admin::current_position(&self.options).await
    }

    async fn identity(&self) -> Result<UpstreamIdentity, Error> {
        admin::identity(&self.options).await
    }

    async fn tables(&self, spec: &FeedSpec) -> Result<Vec<SourceTable>, Error> {
        admin::tables(&self.options, spec).await
    }

    async fn split_points(
        &self,
        spec: &FeedSpec,
        span: &TableSpan,
        pieces: usize,
    ) -> Result<SplitPoints, Error> {
        split::points(&self.options, spec, span, pieces).await
    }

    async fn resync(
        &self,
        spec: &FeedSpec,
        table: TableId,
        gate: &Gate,
        progress: &Arc<ReaderProgress>,
        shutdown: &CancellationToken,
    ) -> Result<(), Error> {
        copy::again::run(&self.options, spec, table, gate, progress, shutdown).await
    }

    async fn copy_part(&self, order: &CopyOrder, writer: Box<dyn PartWriter>) -> Result<(u64, u64), Error> {
        copy::away::carry_out(&self.options, order, writer).await
    }

    async fn run_reader(
        &self,
        spec: FeedSpec,
        start: ReaderStart,
        writer: StoreWriter,
        persisted: watch::Receiver<Ts>,
        progress: Arc<ReaderProgress>,
        shutdown: CancellationToken,
    ) -> Result<(), Error> {
        // The shapes of the first tables are valid from the changefeed's start on.
        let spec = FeedSpec { start_ts: start.start_ts, ..spec };
        let carried = spec.ddl.sequence_values.then(|| ddl::sequences::Watch {
            options: self.options.clone(),
            spec: spec.clone(),
            names: Names::of(&spec.changefeed),
            progress: Arc::clone(&progress),
            shutdown: shutdown.clone(),
        });
        let reader =
            Reader { options: self.options.clone(), spec, start, writer, persisted, progress, shutdown };
        let mut reader = Box::pin(reader.run());
        if let Some(watch) = carried {
            tokio::select! {
                result = &mut reader => return result,
                () = Box::pin(watch.run()) => {}
            }
        }
        reader.await
    }
}
