//! A sink that counts and forgets, for measuring everything in front of it.

use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use event::{BlockEvent, RowBatch, TableInfo};
use heartbeatpb::{DispatcherId, TableSpan, Ts, WallTime};
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::metrics::SinkMetrics;
use crate::{Error, Flushed, Sink, SinkOptions, TableStart};

/// Accepts everything and is durable at once.
#[derive(Debug)]
pub struct BlackholeSink {
    /// Whether each row is decoded, so that the cost of reading it shows.
    check: bool,
    rows: AtomicU64,
    values: AtomicU64,
    metrics: SinkMetrics,
}

impl BlackholeSink {
    /// A black hole; `?check=true` decodes every row before dropping it.
    ///
    /// # Errors
    /// When the URI has an unknown parameter.
    pub fn new(url: &Url, options: &SinkOptions) -> Result<Self, Error> {
        let mut check = false;
        for (key, value) in url.query_pairs() {
            match (key.as_ref(), value.as_ref()) {
                ("check", "true" | "1" | "") => check = true,
                ("check", "false" | "0") => check = false,
                ("check", _) => {
                    return Err(Error::Config("check of a blackhole sink is true or false".into()));
                }
                _ => {
                    return Err(Error::Config(format!(
                        "a blackhole sink has no parameter {:?}",
                        key.chars().take(32).collect::<String>()
                    )));
                }
            }
        }
        let metrics = SinkMetrics::new(&options.changefeed, "sink");
        Ok(Self { check, rows: AtomicU64::new(0), values: AtomicU64::new(0), metrics })
    }

    /// Rows taken so far.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.rows.load(Ordering::Relaxed)
    }

    /// Values decoded so far; stays 0 without `check=true`.
    #[must_use]
    pub fn values(&self) -> u64 {
        self.values.load(Ordering::Relaxed)
    }
}

#[async_trait]
impl Sink for BlackholeSink {
    async fn run(&self, shutdown: CancellationToken) -> Result<(), Error> {
        shutdown.cancelled().await;
        Ok(())
    }

    fn healthy(&self) -> bool {
        true
    }

    async fn open_dispatcher(
        &self,
        _dispatcher: DispatcherId,
        _span: &TableSpan,
        start_ts: Ts,
    ) -> Result<TableStart, Error> {
        Ok(TableStart { start_ts, skip_dml_at_start: false })
    }

    async fn open_table(&self, _dispatcher: DispatcherId, _table: &TableInfo) -> Result<(), Error> {
        Ok(())
    }

    fn write_rows(&self, _dispatcher: DispatcherId, batch: RowBatch, flushed: Flushed) {
        let rows = batch.row_count();
        if self.check {
            let images = batch.iter().flat_map(|row| [row.old, row.new]).flatten();
            let values: usize = images.map(|image| std::hint::black_box(image.iter()).count()).sum();
            self.values.fetch_add(values as u64, Ordering::Relaxed);
        }
        self.rows.fetch_add(rows, Ordering::Relaxed);
        self.metrics.flushed(rows, batch.bytes());
        flushed.done();
    }

    async fn flush_before_block(&self, _dispatcher: DispatcherId) -> Result<(), Error> {
        Ok(())
    }

    async fn write_block_event(&self, _event: &BlockEvent) -> Result<(), Error> {
        Ok(())
    }

    fn publish_checkpoint(&self, _checkpoint: Ts, _time: WallTime) {}

    fn close_dispatcher(&self, _dispatcher: DispatcherId) {}

    async fn forget_changefeed(&self) -> Result<(), Error> {
        Ok(())
    }

    fn wants_checkpoints(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use heartbeatpb::ChangefeedId;

    use super::*;
    use crate::testing::{BatchBuilder, table};

    fn sink(uri: &str) -> Result<BlackholeSink, Error> {
        let options = SinkOptions::new(ChangefeedId::fresh("test"), "unused");
        BlackholeSink::new(&Url::parse(uri).expect("a URI"), &options)
    }

    fn write_two_rows(sink: &BlackholeSink) -> bool {
        let batch = BatchBuilder::new(&table(7, 2)).insert(10, &["1", "a"]).insert(10, &["2", "b"]).build();
        let flushed = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&flushed);
        sink.write_rows(
            DispatcherId::new(0, 1),
            batch,
            Flushed::new(move || seen.store(true, Ordering::Release)),
        );
        flushed.load(Ordering::Acquire)
    }

    #[test]
    fn rows_are_flushed_at_once_and_not_touched() {
        let sink = sink("blackhole://").expect("valid");
        assert!(write_two_rows(&sink));
        assert_eq!((sink.rows(), sink.values()), (2, 0));
    }

    #[test]
    fn check_decodes_every_value() {
        let sink = sink("blackhole://?check=true").expect("valid");
        assert!(write_two_rows(&sink));
        assert_eq!((sink.rows(), sink.values()), (2, 4));
    }

    #[test]
    fn an_unknown_parameter_is_refused() {
        assert!(sink("blackhole://?chekc=true").is_err());
        assert!(sink("blackhole://?check=maybe").is_err());
    }
}
