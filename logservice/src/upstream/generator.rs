//! An upstream that needs nothing: a stream of transactions computed from a seed.
//!
//! `generator://bank?seed=1&rate=1000&accounts=100&tables=4`, `generator://wide`, `generator://skewed`,
//! `generator://tables?tables=1000000`. `rate` is in transactions per second (0: as fast as possible),
//! `transactions` ends the stream. Start reading at `generator/workload.rs`.
//!
//! The n-th transaction and its commit ts depend on nothing but the parameters, so that a reader that starts
//! again at a checkpoint continues the very same stream, and [`expected_state`] knows what a downstream must
//! hold. Wall times are those of the emission, so that lag means something.
//!
//! `generator://bank?ddl=all&ddl-every=50` has tables and schemas that come and go; each statement at a commit ts of its
//! own, which is what the event store demands of every upstream.
//!
//! Positions: transaction n, from 1, commits at `16 (n + 1)`; the tables get their first rows at 24, by an
//! initial copy or as a transaction; a schema change before transaction n commits at `16 (n + 1) - 4`. The
//! start of a changefeed that names none is 16.

mod bank;
mod catalog;
mod change;
mod many;
mod params;
mod reader;
mod skewed;
mod state;
mod wide;
mod workload;

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use event::{Datum, KeyCodec, KeyForm};
use heartbeatpb::{ChangefeedId, TableId, TableSpan, Ts};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use self::params::{Kind, Params};
use self::reader::{Reader, now};
pub use self::state::{ExpectedTable, Row, Rows};
use self::workload::{Workload, shapes};
use super::split::Sample;
use super::{
    CheckReport, FeedSpec, ReaderProgress, ReaderStart, SourceTable, SplitPoints, StartPoint, TablePart,
    Upstream, UpstreamIdentity,
};
use crate::Error;
use crate::event_store::StoreWriter;

/// Distance between two transactions.
const STEP: u64 = 16;
/// Position before everything.
const BEGINNING: Ts = Ts(STEP);
/// Where the tables have their first rows.
const POPULATED: Ts = Ts(STEP + STEP / 2);
/// Rows of a table that are looked at to divide it.
const SAMPLE: u64 = 4096;
/// How far before its transaction a schema change commits.
const DDL_AHEAD: u64 = 4;

/// A number that depends on all three; the same everywhere and for ever.
fn mix(seed: u64, a: u64, b: u64) -> u64 {
    let scramble = |x: u64| {
        let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    };
    let hash = scramble(seed.wrapping_add(0x9e37_79b9_7f4a_7c15));
    let hash = scramble(hash.wrapping_add(a).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    scramble(hash ^ b.wrapping_mul(0xd6e8_feb8_6659_fd93))
}

/// Positions of a stream.
#[derive(Clone, Copy, Debug)]
struct Feed {
    ddl_every: u64,
}

impl Feed {
    /// Commit ts of transaction `n`; the beginning for 0.
    const fn ts(n: u64) -> Ts {
        Ts(n.saturating_add(1).saturating_mul(STEP))
    }

    /// Identifies the transaction that commits at `commit_ts`.
    const fn start_ts(commit_ts: Ts) -> Ts {
        Ts(commit_ts.0.saturating_sub(2))
    }

    /// Transactions at or before `ts`.
    const fn transactions_at(ts: Ts) -> u64 {
        (ts.0 / STEP).saturating_sub(1)
    }

    /// Commit ts of the schema change before transaction `n`.
    const fn ddl_ts(n: u64) -> Ts {
        Ts(Self::ts(n).0 - DDL_AHEAD)
    }

    /// The schema change before transaction `n`.
    fn ddl_before(self, n: u64) -> Option<u64> {
        (self.ddl_every > 0 && n > 0 && n.is_multiple_of(self.ddl_every)).then(|| n / self.ddl_every)
    }

    /// Schema changes at or before `ts`.
    fn ddls_at(self, ts: Ts) -> u64 {
        let seen = Self::transactions_at(Ts(ts.0.saturating_add(DDL_AHEAD)));
        seen.checked_div(self.ddl_every).unwrap_or_default()
    }

    /// Commit ts of the last schema change at or before `ts`; zero before the first.
    fn shape_since(self, ts: Ts) -> Ts {
        match self.ddls_at(ts) {
            0 => Ts::ZERO,
            ddls => Self::ddl_ts(ddls * self.ddl_every),
        }
    }

    /// A position behind `ts` and before the next transaction and schema change, for a copy.
    fn snapshot_after(ts: Ts) -> Ts {
        let half = Ts(Self::ts(Self::transactions_at(ts)).0 + STEP / 2);
        if half > ts { half } else { ts.after() }
    }
}

/// A generator.
#[derive(Debug)]
pub struct Generator {
    params: Params,
}

fn workload(params: &Params) -> Box<dyn Workload> {
    match params.kind {
        Kind::Bank => Box::new(bank::Bank::new(params)),
        Kind::Wide => Box::new(wide::Wide::new(params)),
        Kind::Skewed => Box::new(skewed::Skewed::new(params)),
        Kind::Tables => Box::new(many::Many::new(params)),
    }
}

impl Generator {
    /// Reads the URI.
    ///
    /// # Errors
    /// When the URI is wrong.
    pub fn new(uri: &str) -> Result<Self, Error> {
        Ok(Self { params: Params::parse(uri)? })
    }

    /// Position behind the last transaction; `None` for an endless stream.
    #[must_use]
    pub fn end(&self) -> Option<Ts> {
        (self.params.transactions < u64::MAX).then(|| Feed::ts(self.params.transactions).max(POPULATED))
    }

    fn source_tables(&self, spec: &FeedSpec) -> Vec<SourceTable> {
        let workload = workload(&self.params);
        let feed = Feed { ddl_every: workload.ddl_every() };
        let version = feed.shape_since(spec.start_ts).max(spec.start_ts);
        let shapes = shapes(workload.as_ref(), feed.ddls_at(spec.start_ts), version);
        let wanted = |table: &Arc<event::TableInfo>| spec.filter.matches(&table.schema, &table.name);
        let mut tables: Vec<_> = shapes.into_iter().flatten().filter(wanted).collect();
        tables.sort_by_key(|table| table.id);
        let source = |info: Arc<event::TableInfo>| SourceTable {
            splittable: self.is_divisible(&info),
            info,
            part: TablePart::default(),
        };
        tables.into_iter().map(source).collect()
    }

    /// The cards of a bank change their keys and leave a value out of the log: a row could not go to another range.
    fn is_divisible(&self, table: &event::TableInfo) -> bool {
        table.is_divisible() && !(self.params.kind == Kind::Bank && table.name == "cards")
    }

    /// Keys of the rows that a table has at the beginning, at equal distances.
    fn sample(&self, spec: &FeedSpec, table: TableId) -> Sample {
        let workload = workload(&self.params);
        let ddls = Feed { ddl_every: workload.ddl_every() }.ddls_at(spec.start_ts);
        let shape = |place: usize| workload.table(place, ddls, spec.start_ts).filter(|info| info.id == table);
        let found = (0..workload.tables()).find_map(|place| Some((place, shape(place)?)));
        let found = found.filter(|(_, info)| self.is_divisible(info));
        let Some((place, info)) = found else { return Sample::default() };
        let Some(codec) = KeyCodec::new(&info) else { return Sample::default() };
        let rows = workload.first_rows(place);
        let mut sample = Sample { rows: (rows > 0).then_some(rows), ..Sample::default() };
        let mut row = workload::RowText::default();
        for number in (0..rows).step_by(usize::try_from(rows / SAMPLE + 1).unwrap_or(usize::MAX)) {
            workload.first_row(place, number, &mut row);
            let values: Vec<Datum<'_>> = row.values().collect();
            let text = |&(column, _): &(usize, KeyForm)| match values.get(column) {
                Some(Datum::Text(text)) => std::str::from_utf8(text).ok(),
                Some(Datum::Null | Datum::Unchanged) | None => None,
            };
            if let Some(key) = codec.parts().iter().map(text).collect::<Option<Vec<&str>>>() {
                sample.add(&codec, &key);
            }
        }
        sample
    }
}

/// The tables of a generator at `ts`, by schema and name: what a downstream must equal. Takes time in
/// proportion to the number of transactions before `ts`.
///
/// # Errors
/// When the URI is wrong.
pub fn expected_state(uri: &str, ts: Ts) -> Result<BTreeMap<(String, String), ExpectedTable>, Error> {
    let (workload, feed, ts) = at(uri, ts)?;
    let rows = state::play(workload.as_ref(), ts);
    let shapes = shapes(workload.as_ref(), feed.ddls_at(ts), feed.shape_since(ts));
    let table = |(info, rows): (Arc<event::TableInfo>, Rows)| {
        ((info.schema.clone(), info.name.clone()), ExpectedTable { info, rows })
    };
    let there = shapes.into_iter().zip(rows).filter_map(|(info, rows)| Some((info?, rows)));
    Ok(there.map(table).collect())
}

/// The schemas of a generator at `ts` that come and go (`ddl=…`).
///
/// # Errors
/// When the URI is wrong.
pub fn expected_schemas(uri: &str, ts: Ts) -> Result<Vec<String>, Error> {
    let (workload, feed, ts) = at(uri, ts)?;
    Ok(workload.schemas(feed.ddls_at(ts)))
}

/// The schema changes of a generator at or before `ts`, as statements with their positions.
///
/// # Errors
/// When the URI is wrong.
pub fn statements(uri: &str, ts: Ts) -> Result<Vec<(Ts, String)>, Error> {
    let (workload, feed, ts) = at(uri, ts)?;
    let statement = |ddl: u64| {
        let step = workload.ddl(ddl)?;
        Some((Feed::ddl_ts(ddl.saturating_mul(feed.ddl_every)), step.query))
    };
    Ok((1..=feed.ddls_at(ts)).filter_map(statement).collect())
}

/// A generator, and `ts` or what is behind its last transaction.
fn at(uri: &str, ts: Ts) -> Result<(Box<dyn Workload>, Feed, Ts), Error> {
    let params = Params::parse(uri)?;
    let workload = workload(&params);
    let feed = Feed { ddl_every: workload.ddl_every() };
    let ts = ts.min(Ts(Feed::ts(params.transactions).0.saturating_add(STEP / 2)));
    Ok((workload, feed, ts))
}

#[async_trait]
impl Upstream for Generator {
    async fn check(&self, spec: &FeedSpec) -> Result<CheckReport, Error> {
        if !spec.publish.is_empty() {
            let what = "only a PostgreSQL source has publications; remove the entries".to_owned();
            return Err(Error::PublishRule { what });
        }
        Ok(CheckReport { eligible: self.source_tables(spec), ..CheckReport::default() })
    }

    async fn create_retention(&self, _spec: &FeedSpec, at: Option<Ts>) -> Result<StartPoint, Error> {
        Ok(StartPoint { start_ts: at.unwrap_or(BEGINNING).max(BEGINNING), time: now() })
    }

    async fn drop_retention(&self, _changefeed: &ChangefeedId) -> Result<(), Error> {
        Ok(())
    }

    /// A generator has no end of its own: every reader makes the stream from where it starts.
    async fn current_position(&self) -> Result<StartPoint, Error> {
        Ok(StartPoint { start_ts: BEGINNING, time: now() })
    }

    async fn identity(&self) -> Result<UpstreamIdentity, Error> {
        Ok(UpstreamIdentity {
            system: self.params.fingerprint(),
            database_oid: 0,
            database: self.params.kind.name().to_owned(),
            version: "generator 1".to_owned(),
        })
    }

    async fn tables(&self, spec: &FeedSpec) -> Result<Vec<SourceTable>, Error> {
        Ok(self.source_tables(spec))
    }

    async fn split_points(
        &self,
        spec: &FeedSpec,
        span: &TableSpan,
        pieces: usize,
    ) -> Result<SplitPoints, Error> {
        Ok(self.sample(spec, span.table).divide(span, pieces))
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
        let workload = workload(&self.params);
        let reader = Reader {
            workload: workload.as_ref(),
            rate: self.params.rate,
            last: self.params.transactions.min(u64::MAX / STEP - 2),
            spec,
            start,
            writer,
            persisted,
            progress,
            shutdown,
        };
        Box::pin(reader.run()).await
    }
}

#[cfg(test)]
mod tests;
