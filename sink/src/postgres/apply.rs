//! One downstream transaction: its progress, its statements, and what their row counts must be.

use std::sync::Arc;
use std::time::Instant;

use event::RowOp;
use futures_util::{SinkExt, pin_mut};
use heartbeatpb::{TableId, WritePermit};
use tokio_postgres::types::ToSql;

use super::config::OnExistingRows;
use super::connection::Connection;
use super::failure::{Cause, Failure, classify, classify_values};
use super::keys;
use super::pieces::Range;
use super::pipeline::{Call, Stopped};
use super::plan::{self, Group, Kind, Leave, Mode};
use super::progress::{self, Advance, Copied, Join};
use super::registration::Registration;
use super::route::{Change, Holds};
use super::sql::TextArray;
use super::stage::{self, STAGED_BYTES};
use super::target::Target;
use crate::Error;
use crate::metrics::{RowType, TxnMetrics};

/// What every transaction of a sink needs.
pub(crate) struct Writer<'s> {
    pub(crate) own_schema: &'s str,
    pub(crate) changefeed: &'s str,
    pub(crate) registration: &'s Registration,
    /// The statement that moves the progress.
    pub(crate) advance: &'s str,
    pub(crate) permit: &'s WritePermit,
    pub(crate) on_existing_rows: OnExistingRows,
    pub(crate) metrics: &'s TxnMetrics,
}

/// The changes of one table that are still to be applied, in order.
pub(crate) struct TableChanges<'b, B> {
    pub(crate) target: Arc<Target>,
    pub(crate) changes: Vec<&'b Change<B>>,
    /// For a change of the table as a whole: the keys that it concerns.
    pub(crate) clear: Vec<Range>,
    /// The table was found to lack rows that are to be updated.
    pub(crate) lacking: bool,
}

/// How a transaction moves the progress of its queues.
type Moves<'p> = (&'p [Advance], &'p [Join]);

/// A group of rows, and how they reach the server.
struct Step<'p, 'b, B> {
    target: &'p Target,
    group: &'p Group<'b, B>,
    way: Way,
}

/// How the rows of a statement reach the server.
enum Way {
    /// As its parameters.
    Params(Arc<str>, Vec<TextArray>),
    /// As the data of a `COPY` into the table.
    Copy(Arc<str>),
    /// As the rows of the staging table.
    Stage,
}

fn row_type(kind: &Kind) -> RowType {
    match kind {
        Kind::Copy | Kind::Insert | Kind::Upsert => RowType::Insert,
        Kind::Update(_) => RowType::Update,
        Kind::Delete => RowType::Delete,
    }
}

fn writing(target: &Target) -> String {
    format!("writing to table {}", target.name)
}

impl Writer<'_> {
    /// Applies changes of one queue and moves its progress, all or nothing. The caller rolls back on failure.
    pub(crate) async fn write<B: Holds>(
        &self,
        connection: &mut Connection,
        steps: Moves<'_>,
        tables: &[TableChanges<'_, B>],
        mode: Mode,
    ) -> Result<(), Failure> {
        if let [table] = tables
            && let [change] = table.changes[..]
            && change.is_for_table()
        {
            return self.barrier(connection, steps, table, change).await;
        }
        let mut plans = Vec::with_capacity(tables.len());
        for table in tables {
            let copy = self.on_existing_rows != OnExistingRows::Append;
            let leave = Leave { copy, update: !table.lacking };
            let groups = plan::plan(&table.target, table.changes.iter().copied(), mode, leave)?;
            plans.push((table.target.as_ref(), groups));
        }
        let mut prepared = Vec::new();
        for (target, groups) in &plans {
            for group in groups {
                prepared.push(prepare(connection, target, group).await?);
            }
        }
        let deferrable = tables.iter().any(|table| table.target.deferrable);
        let counts = match mode {
            Mode::Batched => {
                // The first statements leave together with the beginning: one round trip less.
                let mut counts = self.begin(connection, deferrable, steps, &prepared).await?;
                run_batched(connection, &prepared[counts.len()..], &mut counts).await?;
                counts
            }
            Mode::Singles => {
                self.begin::<B>(connection, deferrable, steps, &[]).await?;
                run_singly(connection, &prepared).await?
            }
        };
        let commit = Instant::now();
        self.commit(connection, tables).await?;
        self.metrics.commit.record(commit.elapsed().as_secs_f64());
        for (step, actual) in prepared.iter().zip(counts) {
            self.metrics.affected(row_type(&step.group.kind), step.group.rows(), actual);
        }
        Ok(())
    }

    /// Begins the transaction and moves the progress, which also locks out any other writer of the queue, and of a
    /// sink that is fenced moves nothing. Sends the first of the statements behind it at once where nothing has to be
    /// looked at before; answers what they counted.
    async fn begin<B: Holds>(
        &self,
        connection: &mut Connection,
        deferrable: bool,
        (steps, joins): Moves<'_>,
        behind: &[Step<'_, '_, B>],
    ) -> Result<Vec<u64>, Failure> {
        self.check_permit()?;
        let params = progress::advance_params(self.changefeed, steps);
        let mut calls = vec![Call::plain("BEGIN"), Call::plain(self.registration.lock())];
        if deferrable {
            calls.push(Call::plain("SET CONSTRAINTS ALL DEFERRED"));
        }
        let advance = calls.len();
        calls.push(Call { sql: self.advance, params: &params });
        let alone = steps.is_empty() || !joins.is_empty();
        let behind = if alone { &[] } else { with_params(behind) };
        calls.extend(behind.iter().filter_map(Step::call));
        let result = connection.run(&calls).await;
        let done = result.as_ref().unwrap_or_else(|stopped| &stopped.done);
        if done.get(advance).is_some_and(|advanced| *advanced != steps.len() as u64) {
            // Somebody else moved them, or this sink is fenced: whoever reads them again finds out.
            return Err(Failure::Overtaken);
        }
        let counts = match result {
            Ok(mut counts) => counts.split_off(advance + 1),
            Err(Stopped { done, cause }) => {
                return Err(match done.len().checked_sub(advance + 1).and_then(|at| behind.get(at)) {
                    Some(step) => step.failed(cause),
                    None if done.len() == advance => classify(cause, "writing progress"),
                    None => classify(cause, "beginning a transaction"),
                });
            }
        };
        check(behind, &counts)?;
        if steps.is_empty() {
            self.registration.check(connection.client()).await?;
        }
        for join in joins {
            progress::join(connection.client(), self.own_schema, self.changefeed, join).await?;
        }
        Ok(counts)
    }

    /// `TRUNCATE` or the beginning of an initial copy, in a transaction of its own.
    async fn barrier<B: Holds>(
        &self,
        connection: &mut Connection,
        steps: Moves<'_>,
        TableChanges { target, clear: ranges, .. }: &TableChanges<'_, B>,
        change: &Change<B>,
    ) -> Result<(), Failure> {
        self.begin::<B>(connection, target.deferrable, steps, &[]).await?;
        // All queues move: a writer that was overtaken must not put rows behind the barrier.
        let (own, table) = (self.own_schema, target.info.id);
        for range in ranges {
            progress::pass(connection.client(), own, self.changefeed, table, range, change.at).await?;
            if change.op == RowOp::Truncate {
                clear(connection, target, range).await?;
            } else {
                self.begin_copy(connection, target, range, change).await?;
            }
        }
        self.commit::<B>(connection, &[]).await
    }

    /// Commits, if this process may still write.
    async fn commit<B>(
        &self,
        connection: &mut Connection,
        tables: &[TableChanges<'_, B>],
    ) -> Result<(), Failure> {
        self.check_permit()?;
        let Err(stopped) = connection.run(&[Call::plain("COMMIT")]).await else { return Ok(()) };
        // Constraints that are deferred are looked at now.
        let named = |table: &&TableChanges<'_, B>| stopped.cause.table() == Some(&table.target.info.name);
        let table = tables.iter().find(named).map(|table| table.target.info.id);
        Err(classify(stopped.cause, "committing").of(table))
    }

    fn check_permit(&self) -> Result<(), Failure> {
        if self.permit.holds() { Ok(()) } else { Err(Failure::Suspended) }
    }

    /// Makes the keys ready for the rows of a copy. What an earlier copy of this changefeed left behind is
    /// removed; rows of anyone else only when the user said so.
    async fn begin_copy<B: Holds>(
        &self,
        connection: &Connection,
        target: &Target,
        range: &Range,
        change: &Change<B>,
    ) -> Result<(), Failure> {
        let (client, own, feed) = (connection.client(), self.own_schema, self.changefeed);
        let table: TableId = target.info.id;
        let snapshot = change.at.commit_ts;
        match progress::copy_marker(client, own, feed, table, range, snapshot).await? {
            Copied::This => return Ok(()),
            Copied::Before if self.on_existing_rows == OnExistingRows::Append && target.key.is_empty() => {
                return Err(Failure::Fatal(Error::Rejected {
                    code: "CDC:ErrTargetNotEmpty",
                    what: format!(
                        "the initial copy of {} was interrupted; the table has no key by which its rows could be told \
                         from those that were there before, so remove the copied ones by hand, or use \
                         on-existing-rows=truncate",
                        target.name
                    ),
                }));
            }
            Copied::Before if self.on_existing_rows == OnExistingRows::Append => {}
            Copied::Before => clear(connection, target, range).await?,
            Copied::No => match self.on_existing_rows {
                OnExistingRows::Append => {}
                OnExistingRows::Truncate => clear(connection, target, range).await?,
                OnExistingRows::Error => require_empty(connection, target, range).await?,
            },
        }
        progress::set_copy_marker(client, own, feed, table, range, snapshot).await
    }
}

fn text_refs(params: &[String]) -> Vec<&(dyn ToSql + Sync)> {
    params.iter().map(|text| text as &(dyn ToSql + Sync)).collect()
}

/// Fails when a key range has rows.
pub(crate) async fn require_empty(
    connection: &Connection,
    target: &Target,
    range: &Range,
) -> Result<(), Failure> {
    let keys::Condition { sql, params } = keys::condition(target, range)?;
    let sql = format!("SELECT EXISTS (SELECT FROM {} AS t{sql})", target.name);
    let row = connection
        .client()
        .query_one(&sql, &text_refs(&params))
        .await
        .map_err(|e| classify(e, &writing(target)))?;
    if row.get(0) {
        return Err(Failure::Fatal(Error::Rejected {
            code: "CDC:ErrTargetNotEmpty",
            what: format!(
                "table {} in the target already has rows; empty it, or add on-existing-rows=append or \
                 on-existing-rows=truncate to the sink URI",
                target.name
            ),
        }));
    }
    Ok(())
}

/// Removes the rows of a key range.
pub(crate) async fn clear(connection: &Connection, target: &Target, range: &Range) -> Result<(), Failure> {
    if !range.is_all() {
        let keys::Condition { sql, params } = keys::condition(target, range)?;
        let sql = format!("DELETE FROM {} AS t{sql}", target.name);
        let deleted = connection.client().execute(&sql, &text_refs(&params)).await;
        return deleted.map(|_| ()).map_err(|e| classify(e, &writing(target)));
    }
    // A table that foreign keys refer to cannot be truncated alone.
    let sql = if target.truncatable { "TRUNCATE ONLY" } else { "DELETE FROM" };
    let sql = match (target.truncatable, target.partitioned) {
        (true, true) => format!("TRUNCATE {}", target.name),
        (true, false) | (false, _) => format!("{sql} {}", target.name),
    };
    connection.client().batch_execute(&sql).await.map_err(|e| classify(e, &writing(target)))
}

/// Gets everything ready that can be before the transaction begins.
async fn prepare<'p, 'b, B: Holds>(
    connection: &mut Connection,
    target: &'p Target,
    group: &'p Group<'b, B>,
) -> Result<Step<'p, 'b, B>, Failure> {
    let way = if group.bytes() >= STAGED_BYTES && connection.may_stage().await? {
        Way::Stage
    } else {
        let sql = plan::text(target, &group.kind);
        if group.kind == Kind::Copy { Way::Copy(sql) } else { Way::Params(sql, plan::params(target, group)) }
    };
    Ok(Step { target, group, way })
}

/// The first statements, up to one whose rows do not come as parameters.
fn with_params<'s, 'p, 'b, B>(steps: &'s [Step<'p, 'b, B>]) -> &'s [Step<'p, 'b, B>] {
    let end = steps.iter().position(|step| !matches!(step.way, Way::Params(..)));
    &steps[..end.unwrap_or(steps.len())]
}

/// What statements have counted must be what they should have.
fn check<B: Holds>(steps: &[Step<'_, '_, B>], counts: &[u64]) -> Result<(), Failure> {
    steps.iter().zip(counts).try_for_each(|(step, count)| step.check(*count))
}

/// Sends the statements in order, without waiting in between where their rows come as parameters.
async fn run_batched<B: Holds>(
    connection: &mut Connection,
    steps: &[Step<'_, '_, B>],
    counts: &mut Vec<u64>,
) -> Result<(), Failure> {
    let mut rest = steps;
    while let Some(first) = rest.first() {
        let together = with_params(rest);
        let done = if together.is_empty() {
            vec![first.execute(connection).await?]
        } else {
            let calls: Vec<_> = together.iter().filter_map(Step::call).collect();
            let stopped = |Stopped { done, cause }| together.get(done.len()).unwrap_or(first).failed(cause);
            connection.run(&calls).await.map_err(stopped)?
        };
        let (ran, left) = rest.split_at(done.len());
        check(ran, &done)?;
        counts.extend(done);
        rest = left;
    }
    Ok(())
}

impl<B: Holds> Step<'_, '_, B> {
    /// Its statement, if its rows come as parameters.
    fn call(&self) -> Option<Call<'_>> {
        match &self.way {
            Way::Params(sql, params) => Some(Call { sql, params }),
            Way::Copy(_) | Way::Stage => None,
        }
    }

    fn failed(&self, cause: impl Into<Cause>) -> Failure {
        classify_values(cause, &writing(self.target), &self.target.info).of(Some(self.target.info.id))
    }

    /// Whether it has changed as many rows as it should have.
    fn check(&self, count: u64) -> Result<(), Failure> {
        match &self.group.kind {
            Kind::Update(set) if count != self.group.rows() => {
                let whole = plan::is_whole_row(self.target, set);
                Err(if whole { Failure::Absent(self.target.info.id) } else { Failure::Missing })
            }
            Kind::Insert | Kind::Upsert | Kind::Update(_) | Kind::Delete | Kind::Copy => Ok(()),
        }
    }

    /// Executes it, whatever the way of its rows; answers how many it has changed.
    async fn execute(&self, connection: &mut Connection) -> Result<u64, Failure> {
        match &self.way {
            Way::Params(sql, params) => {
                let counts = connection.run(&[Call { sql, params }]).await;
                let counts = counts.map_err(|stopped| self.failed(stopped.cause))?;
                Ok(counts.into_iter().sum())
            }
            Way::Copy(sql) => self.copy(connection, sql).await.map_err(|e| self.failed(e)),
            Way::Stage => {
                stage::execute(connection, self.target, self.group).await.map_err(|e| self.failed(e))
            }
        }
    }

    async fn copy(&self, connection: &Connection, sql: &str) -> Result<u64, tokio_postgres::Error> {
        let sink = connection.client().copy_in(sql).await?;
        pin_mut!(sink);
        sink.send(plan::copy_text(self.target, self.group)).await?;
        sink.finish().await
    }
}

/// One statement after the other; a row that an update does not find is inserted when it is known as a whole.
async fn run_singly<B: Holds>(
    connection: &mut Connection,
    steps: &[Step<'_, '_, B>],
) -> Result<Vec<u64>, Failure> {
    let mut counts = Vec::with_capacity(steps.len());
    for step in steps {
        let count = step.execute(connection).await?;
        counts.push(count);
        if count > 0 || !matches!(step.group.kind, Kind::Update(_)) {
            continue;
        }
        let target = step.target;
        if step.group.changes().any(|change| !plan::is_complete(target, change)) {
            return Err(Failure::Fatal(Error::Rejected {
                code: "CDC:ErrTargetRowMissing",
                what: format!(
                    "table {}: a row to update does not exist in the target, and the upstream did not send all of its \
                     values, so it cannot be inserted; the target was changed by someone else or the initial copy is \
                     missing",
                    target.name
                ),
            }));
        }
        let kind = if target.key.is_empty() { Kind::Insert } else { Kind::Upsert };
        let whole = step.group.with_kind(kind);
        prepare(connection, target, &whole).await?.execute(connection).await?;
    }
    Ok(counts)
}
