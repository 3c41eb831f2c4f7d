//! The comparison itself: asks both ends, waits for the changefeed, and counts.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::pin::pin;
use std::time::Duration;

use heartbeatpb::Ts;
use tokio::time::Instant;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row};

use crate::Error;
use crate::catalog::{self, Method};
use crate::pace::Limit;
use crate::part::{Part, RowId, Sums};
use crate::report::{Difference, Outcome, Reading, Report, TableReport};
use crate::sql::{End, POSITION, SETTINGS, Statements, TableName};
use crate::suspects::{Suspects, View, differing, view};

/// How often the changefeed is asked how far it is.
const LOOK: Duration = Duration::from_millis(50);
/// Rows of a bucket, about.
const BUCKET_ROWS: u64 = 1000;
/// Numbers of buckets.
const BUCKETS: (u64, u64) = (16, 16_384);
/// Rows that are watched because they change all the time: a look at them is one short statement.
const MOST_HOT: usize = 100;
/// Looks of one round that are kept, the newest: what the target shows is not older than the last second or so.
const MOST_SAMPLES: usize = 500;
/// Groups of buckets whose rows are looked at; each costs several scans of the table.
const MOST_GROUPS: usize = 64;

/// Says how far a changefeed is: everything that was committed at the source up to there is in the target.
pub trait Checkpoint: Send + Sync {
    /// The checkpoint now; a position of the source's log.
    ///
    /// # Errors
    /// In words, when nobody can say it; the comparison ends.
    fn checkpoint(&self) -> impl Future<Output = Result<Ts, String>> + Send;
}

/// How to compare.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Rows of a part.
    pub part_rows: u32,
    /// Rows that are read at each end in a second at most, in the mean over a comparison; `None`: as fast as both ends answer.
    /// A part by ranges has no more rows than that. A table that is read whole is read in one statement, which nothing slows,
    /// and is rested for.
    pub rows_per_second: Option<u32>,
    /// How long it is waited for the changefeed to get as far as the source was.
    pub patience: Duration,
    /// Differences of a table that are told one by one.
    pub shown: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { part_rows: 10_000, rows_per_second: None, patience: Duration::from_secs(60), shown: 20 }
    }
}

/// A table, and where its rows go. `Debug` hides the condition.
#[derive(Clone, PartialEq, Eq)]
pub struct TablePair {
    /// At the source.
    pub source: TableName,
    /// At the target.
    pub target: TableName,
    /// Only these columns are to be at the target; all when `None`.
    pub columns: Option<Vec<String>>,
    /// Only rows of the source for which this SQL expression is true are to be at the target. It becomes a part of
    /// statements: only what a server has printed may come here.
    pub condition: Option<String>,
}

impl TablePair {
    /// All of a table, under the same name.
    #[must_use]
    pub fn same(table: TableName) -> Self {
        Self { source: table.clone(), target: table, columns: None, condition: None }
    }
}

impl fmt::Debug for TablePair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TablePair")
            .field("source", &self.source)
            .field("target", &self.target)
            .field("columns", &self.columns)
            .finish_non_exhaustive()
    }
}

/// Compares tables of two databases.
pub struct Verifier<C> {
    source: Client,
    target: Client,
    feed: C,
    options: Options,
}

impl<C: Checkpoint> Verifier<C> {
    /// Takes two connections for itself; both get the settings under which values are printed alike.
    ///
    /// # Errors
    /// When a server refuses them.
    pub async fn new(source: Client, target: Client, feed: C, options: Options) -> Result<Self, Error> {
        for (end, client) in [("source", &source), ("target", &target)] {
            let failed =
                |source| Error::Database { end, doing: "take the settings of the comparison", source };
            client.batch_execute(SETTINGS).await.map_err(failed)?;
        }
        Ok(Self { source, target, feed, options })
    }

    /// Compares the tables one after the other, and tells how far it is. When it is dropped it ends with the connections.
    ///
    /// # Errors
    /// When a server cannot be asked, or the changefeed does not get on. A table that was changed meanwhile is no error
    /// but undecided.
    pub async fn run(
        &self,
        tables: &[TablePair],
        tell: impl FnMut(&Report) + Send + Sync,
    ) -> Result<Report, Error> {
        let limit = Limit::new(self.options.rows_per_second);
        let result = self.compare(&limit, tables, tell).await;
        // Whoever begins again at once, also because this one failed, does not read more for it.
        limit.rest().await;
        result
    }

    async fn compare(
        &self,
        limit: &Limit,
        tables: &[TablePair],
        mut tell: impl FnMut(&Report) + Send + Sync,
    ) -> Result<Report, Error> {
        let mut report = Report::default();
        for pair in tables {
            report.tables.push(TableReport {
                source: pair.source.to_string(),
                target: pair.target.to_string(),
                ..TableReport::default()
            });
        }
        let mut methods = Vec::new();
        for (pair, table) in tables.iter().zip(&mut report.tables) {
            let ends = ((&self.source, &pair.source), (&self.target, &pair.target));
            let part = (pair.columns.as_deref(), pair.condition.as_deref());
            let mut method = catalog::method(ends.0, ends.1, part).await?;
            if method.as_ref().map_or(true, |method| method.lacking) {
                // It may be on its way, as rows may be.
                self.catch_up().await?;
                method = catalog::method(ends.0, ends.1, part).await?;
            }
            match &method {
                Ok(method) => {
                    table.reading = Some(method.reading);
                    table.expected_rows = method.expected_rows;
                    table.lacking = method.lacking;
                    table.notes.clone_from(&method.notes);
                }
                Err(words) => {
                    table.lacking = true;
                    table.notes.push(words.clone());
                }
            }
            methods.push(method.ok());
        }
        tell(&report);
        for (at, (pair, method)) in tables.iter().zip(methods).enumerate() {
            let Some(method) = method else {
                report.tables[at].end(false);
                continue;
            };
            let mut work = Work { pair, method: &method, report: &mut report, at, tell: &mut tell, limit };
            let complete = match self.table(&mut work).await {
                Ok(complete) => complete,
                Err(error) if error.is_other_schema() => {
                    let note = "its shape was changed while it was compared; compare it again".to_owned();
                    report.tables[at].notes.push(note);
                    false
                }
                Err(error) => return Err(error),
            };
            report.tables[at].end(complete);
            tell(&report);
        }
        report.end();
        Ok(report)
    }

    /// Whether everything was compared.
    async fn table(&self, work: &mut Work<'_>) -> Result<bool, Error> {
        match work.method.reading {
            Reading::Ranges => self.ranges(work).await,
            Reading::Scans => self.buckets(work).await,
        }
    }

    async fn ranges(&self, work: &mut Work<'_>) -> Result<bool, Error> {
        let limit = work.limit.part_rows(self.options.part_rows);
        let mut complete = true;
        let mut after: Option<RowId> = None;
        loop {
            work.limit.rest().await;
            let open = Part::Range { after: after.clone(), upto: None };
            let (sums, last) = self.next_range(work, &open, limit).await?;
            let is_last = sums.rows < u64::from(limit);
            let part = Part::Range { after, upto: last.clone().filter(|_| !is_last) };
            let there = self.sums(End::Target, work, &part).await?;
            work.table().rows += sums.rows;
            work.table().target_rows += there.rows;
            if there != sums && !self.is_equal_later(work, &part).await? {
                complete &= self.rows(work, &part).await?;
            }
            work.part_done();
            if is_last {
                return Ok(complete);
            }
            after = last;
        }
    }

    /// Looks again when the target has everything that the source had.
    async fn is_equal_later(&self, work: &Work<'_>, part: &Part) -> Result<bool, Error> {
        work.limit.rest().await;
        let here = self.sums(End::Source, work, part).await?;
        self.catch_up().await?;
        Ok(self.sums(End::Target, work, part).await? == here)
    }

    async fn buckets(&self, work: &mut Work<'_>) -> Result<bool, Error> {
        let of = (work.method.expected_rows / BUCKET_ROWS).clamp(BUCKETS.0, BUCKETS.1);
        let of = u32::try_from(of).unwrap_or(u32::MAX);
        let (here, mut different) = self.compare_buckets(work, of).await?;
        if !different.is_empty() {
            self.catch_up().await?;
            let again = self.compare_buckets(work, of).await?.1;
            different.retain(|bucket| again.contains(bucket));
        }
        let mut groups = Groups::new(u64::from(self.options.part_rows));
        for bucket in different {
            groups.add(bucket, here.get(&bucket).map_or(0, |sums| sums.rows));
        }
        let mut complete = true;
        for which in groups.all.iter().take(MOST_GROUPS) {
            complete &= self.rows(work, &Part::Buckets { of, which: which.clone() }).await?;
            work.part_done();
        }
        if groups.all.len() > MOST_GROUPS {
            let note = "more rows differ than could be looked at one by one".to_owned();
            work.table().notes.push(note);
            complete = false;
        }
        Ok(complete)
    }

    /// The source's buckets, and which of them are not the same at the target.
    async fn compare_buckets(
        &self,
        work: &mut Work<'_>,
        of: u32,
    ) -> Result<(BTreeMap<u32, Sums>, Vec<u32>), Error> {
        work.limit.rest().await;
        let here = self.all_buckets(End::Source, work, of).await?;
        let there = self.all_buckets(End::Target, work, of).await?;
        work.table().rows = here.values().map(|sums| sums.rows).sum();
        work.table().target_rows = there.values().map(|sums| sums.rows).sum();
        work.part_done();
        let none = Sums::empty();
        let different = (0..of)
            .filter(|bucket| here.get(bucket).unwrap_or(&none) != there.get(bucket).unwrap_or(&none))
            .collect();
        Ok((here, different))
    }

    /// Finds the rows of a part that differ, and looks at each until it is decided. Whether all rows of the part were looked at.
    async fn rows(&self, work: &mut Work<'_>, part: &Part) -> Result<bool, Error> {
        let limit = self.options.part_rows.saturating_mul(4).max(1);
        work.limit.rest().await;
        let here = self.list(End::Source, work, part, limit).await?;
        let there = self.list(End::Target, work, part, limit).await?;
        let complete = here.len() < limit as usize && there.len() < limit as usize;
        if !complete {
            let note = "some parts hold many more rows at one end; not all of them were looked at".to_owned();
            if !work.table().notes.contains(&note) {
                work.table().notes.push(note);
            }
        }
        let mut suspects = Suspects::new(differing(&here, &there));
        work.table().suspects += suspects.len() as u64;
        while suspects.len() > 0 {
            work.limit.rest().await;
            let open: Vec<RowId> = suspects.open().cloned().collect();
            let hot: Vec<RowId> = suspects.hot().take(MOST_HOT).cloned().collect();
            let before = self.look(End::Source, work, &open).await?;
            let followed = async {
                self.catch_up().await?;
                self.look(End::Target, work, &open).await
            };
            let (target, between) = self.watch(work, &hot, followed).await?;
            let after = self.look(End::Source, work, &open).await?;
            let verdicts = suspects.look(&before, &between, &target, &after);
            let key: Vec<String> = work.method.source.key.iter().map(|key| key.name.clone()).collect();
            let table = work.table();
            table.undecided += verdicts.undecided.len() as u64;
            table.differences += verdicts.different.len() as u64;
            for (id, kind) in verdicts.different {
                if table.shown.len() < self.options.shown {
                    table.shown.push(Difference { key: named(&key, id), kind });
                }
            }
        }
        Ok(complete)
    }

    /// Looks at hot rows of the source again and again until something else is done, as often as the limit allows.
    async fn watch<T>(
        &self,
        work: &Work<'_>,
        hot: &[RowId],
        done: impl Future<Output = Result<T, Error>>,
    ) -> Result<(T, Vec<View>), Error> {
        let mut between = VecDeque::new();
        let mut done = pin!(done);
        let rows = work.rows_of_look(End::Source, hot.len());
        let mut pause = work.limit.between_looks(rows, Duration::ZERO);
        loop {
            let sample = async {
                if hot.is_empty() {
                    std::future::pending::<()>().await;
                }
                tokio::time::sleep(pause).await;
                let began = Instant::now();
                (self.look(End::Source, work, hot).await, began.elapsed())
            };
            tokio::select! {
                biased;
                done = &mut done => return Ok((done?, between.into())),
                (view, took) = sample => {
                    between.push_back(view?);
                    pause = work.limit.between_looks(rows, took);
                }
            }
            if between.len() > MOST_SAMPLES {
                between.pop_front();
            }
        }
    }

    /// Waits until the target has everything that was visible at the source when this was called.
    async fn catch_up(&self) -> Result<(), Error> {
        let failed =
            |source| Error::Database { end: "source", doing: "tell its position in the log", source };
        let position: i64 = self.source.query_one(POSITION, &[]).await.map_err(failed)?.get(0);
        let wanted = Ts(position.unsigned_abs());
        let deadline = Instant::now() + self.options.patience;
        loop {
            let checkpoint = self.feed.checkpoint().await.map_err(Error::NoCheckpoint)?;
            if checkpoint >= wanted {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Error::Behind { checkpoint, wanted, patience: self.options.patience });
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Whatever is read of a table goes through here, and is counted.
    async fn ask(
        &self,
        end: End,
        work: &Work<'_>,
        text: &str,
        values: &[&(dyn ToSql + Sync)],
        reads: Reads,
    ) -> Result<Vec<Row>, Error> {
        let client = if end == End::Source { &self.source } else { &self.target };
        let at = Instant::now();
        // Before it is answered where that is known: a look may be given up.
        if let Reads::Rows(rows) = reads {
            work.limit.read(end, at, rows);
        }
        let rows = client.query(text, values).await;
        let rows = rows.map_err(|source| end.failed("read rows of a table", source))?;
        if let Reads::Counted(column) = reads {
            let found: u64 = rows.iter().map(|row| number(row, column)).sum();
            work.limit.read(end, at, work.read_for(end, found));
        }
        Ok(rows)
    }

    async fn next_range(
        &self,
        work: &Work<'_>,
        part: &Part,
        limit: u32,
    ) -> Result<(Sums, Option<RowId>), Error> {
        let statements = work.statements(End::Source);
        let (text, values) = statements.next_range(part, limit);
        let rows = self.ask(End::Source, work, &text, &params(&values), Reads::Counted(0)).await?;
        Ok(rows.first().map_or_else(|| (Sums::empty(), None), |row| (sums(row, 0), row.get(3))))
    }

    async fn sums(&self, end: End, work: &Work<'_>, part: &Part) -> Result<Sums, Error> {
        let statements = work.statements(end);
        let (text, values) = statements.sums(part);
        let rows = self.ask(end, work, &text, &params(&values), Reads::Counted(0)).await?;
        Ok(rows.first().map_or_else(Sums::empty, |row| sums(row, 0)))
    }

    async fn all_buckets(&self, end: End, work: &Work<'_>, of: u32) -> Result<BTreeMap<u32, Sums>, Error> {
        let text = work.statements(end).buckets(of);
        let rows = self.ask(end, work, &text, &[], Reads::Counted(1)).await?;
        Ok(rows.iter().map(|row| (row.get::<_, i32>(0).unsigned_abs(), sums(row, 1))).collect())
    }

    async fn list(&self, end: End, work: &Work<'_>, part: &Part, limit: u32) -> Result<View, Error> {
        let statements = work.statements(end);
        let (text, values) = statements.rows(part, limit);
        let reads = match part {
            Part::Range { .. } => Reads::Counted(2),
            Part::Buckets { .. } => Reads::Rows(work.whole(end)),
        };
        Ok(seen(&self.ask(end, work, &text, &params(&values), reads).await?))
    }

    /// The rows of these identities.
    async fn look(&self, end: End, work: &Work<'_>, ids: &[RowId]) -> Result<View, Error> {
        let width = work.method.source.key.len().max(1);
        let arrays: Vec<Vec<&str>> = (0..width)
            .map(|column| ids.iter().map(|id| id.get(column).map_or("", String::as_str)).collect())
            .collect();
        let text = work.statements(end).by_identity();
        let reads = Reads::Rows(work.rows_of_look(end, ids.len()));
        Ok(seen(&self.ask(end, work, &text, &params(&arrays), reads).await?))
    }
}

/// How many rows of its end a statement reads.
enum Reads {
    /// As many as the numbers say that it answers with in this column.
    Counted(usize),
    /// So many, whatever it answers.
    Rows(u64),
}

/// A table while it is compared.
struct Work<'a> {
    pair: &'a TablePair,
    method: &'a Method,
    report: &'a mut Report,
    at: usize,
    tell: &'a mut (dyn FnMut(&Report) + Send + Sync),
    limit: &'a Limit,
}

impl Work<'_> {
    fn table(&mut self) -> &mut TableReport {
        &mut self.report.tables[self.at]
    }

    fn statements(&self, end: End) -> Statements<'_> {
        match end {
            End::Source => {
                let condition = self.pair.condition.as_deref();
                Statements::new(&self.pair.source, &self.method.source, condition)
            }
            End::Target => Statements::new(&self.pair.target, &self.method.target, None),
        }
    }

    /// The rows of the table at one end, as the last scan has found.
    fn whole(&self, end: End) -> u64 {
        let table = &self.report.tables[self.at];
        self.read_for(end, if end == End::Source { table.rows } else { table.target_rows })
    }

    /// How many rows are read to find so many, where an end has others that are not wanted.
    fn read_for(&self, end: End, rows: u64) -> u64 {
        if end == End::Source { rows.saturating_mul(self.method.reads_per_row) } else { rows }
    }

    /// What it takes to look at so many rows: all rows, where no index finds them.
    fn rows_of_look(&self, end: End, rows: usize) -> u64 {
        let shape = if end == End::Source { &self.method.source } else { &self.method.target };
        if shape.is_indexed { rows as u64 } else { self.whole(end) }
    }

    fn part_done(&mut self) {
        let table = self.table();
        table.parts += 1;
        table.outcome = Outcome::Running;
        (self.tell)(self.report);
    }
}

/// Buckets whose rows are looked at together.
struct Groups {
    room: u64,
    rows: u64,
    all: Vec<Vec<u32>>,
}

impl Groups {
    fn new(room: u64) -> Self {
        Self { room, rows: 0, all: Vec::new() }
    }

    fn add(&mut self, bucket: u32, rows: u64) {
        match self.all.last_mut() {
            Some(last) if self.rows + rows <= self.room => {
                last.push(bucket);
                self.rows += rows;
            }
            Some(_) | None => {
                self.all.push(vec![bucket]);
                self.rows = rows;
            }
        }
    }
}

fn params<T: ToSql + Sync>(values: &[T]) -> Vec<&(dyn ToSql + Sync)> {
    values.iter().map(|value| value as &(dyn ToSql + Sync)).collect()
}

fn number(row: &Row, column: usize) -> u64 {
    row.get::<_, i64>(column).unsigned_abs()
}

fn sums(row: &Row, from: usize) -> Sums {
    Sums { rows: number(row, from), halves: [row.get(from + 1), row.get(from + 2)] }
}

fn seen(rows: &[Row]) -> View {
    view(rows.iter().map(|row| (row.get(0), row.get(1), number(row, 2))).collect())
}

/// The identity of a row with the names of its columns.
fn named(key: &[String], id: RowId) -> BTreeMap<String, String> {
    if key.is_empty() {
        return id.into_iter().map(|hash| ("hash".to_owned(), hash)).collect();
    }
    key.iter().cloned().zip(id).collect()
}
