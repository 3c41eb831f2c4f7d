//! Values of sequences. The log does not have them, so the upstream is asked, and what changed is written into its log:
//! there it comes behind the rows that used the values, and the target sets it at that place, once.
//!
//! ```text
//!  every `interval`, and when rows have come and come no longer
//!      │ values that are not those of the last look, and room for what is used until the next one
//!      ▼
//!  pg_logical_emit_message ──▶ the log ──▶ the reader, like a schema change ──▶ setval at the target
//! ```
//!
//! Whoever fails over goes on with the target's sequences: they are ahead of the last look by as many steps as were used
//! between two looks, twice, and by a configured number at least, but never by more than half of what a sequence has left.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::message::PREFIX;
use super::statement::do_block;
use crate::Error;
use crate::upstream::postgres::admin;
use crate::upstream::postgres::conn::Connection;
use crate::upstream::postgres::names::Names;
use crate::upstream::postgres::options::ConnectOptions;
use crate::upstream::postgres::sql::{literal, qualified};
use crate::upstream::{FeedSpec, ReaderPhase, ReaderProgress};

/// Between two moments at which it is decided whether to look.
const TICK: Duration = Duration::from_secs(1);
/// A look that took long is followed by a pause of so many times its length: it takes a hundredth of one connection.
const COST: u32 = 100;
/// Values in one message: it is executed in one statement.
const BATCH: usize = 500;

/// A sequence and what it is set to.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct SequenceValue {
    pub(crate) schema: String,
    pub(crate) name: String,
    /// Quoted name of the table whose column it belongs to.
    pub(crate) table: Option<String>,
    /// That column.
    pub(crate) column: Option<String>,
    pub(crate) value: i64,
}

/// What a message about sequences holds, beside what all messages do.
#[derive(Serialize)]
struct Message<'a> {
    version: u32,
    class: &'a str,
    object: u32,
    tag: &'a str,
    slot: &'a str,
    values: &'a [SequenceValue],
}

/// A sequence of the upstream.
#[derive(Clone, Debug)]
struct Sequence {
    last: i64,
    increment: i64,
    min: i64,
    max: i64,
}

impl Sequence {
    /// Where it is set at the target. `before` is what it was at the last look.
    fn carried(&self, before: Option<i64>, ahead: u32) -> i64 {
        let (last, step) = (i128::from(self.last), i128::from(self.increment));
        if ahead == 0 || step == 0 {
            return self.last;
        }
        let used = before.map_or(0, |before| ((last - i128::from(before)) / step).max(0));
        let end = i128::from(if step > 0 { self.max } else { self.min });
        let room = ((end - last) / step).max(0);
        let steps = i128::from(ahead).max(2 * used).min(room / 2);
        i64::try_from(last + step * steps).unwrap_or(self.last)
    }
}

/// Looks at the sequences that a changefeed wants, for as long as its reader runs.
pub(crate) struct Watch {
    pub(crate) options: ConnectOptions,
    pub(crate) spec: FeedSpec,
    pub(crate) names: Names,
    pub(crate) progress: std::sync::Arc<ReaderProgress>,
    pub(crate) shutdown: CancellationToken,
}

/// What is remembered between two looks.
struct Memory {
    conn: Option<Connection>,
    /// Values by the sequences' ids.
    seen: BTreeMap<u32, i64>,
    looked: Instant,
    /// How long the next look is to be put off at least.
    pause: Duration,
    /// Rows that the reader had read at the last look, and at the last tick.
    rows: (u64, u64),
}

impl Watch {
    /// Runs until shutdown. What goes wrong is tried again: rows go on without it.
    pub(crate) async fn run(self) {
        let mut memory = Memory {
            conn: None,
            seen: BTreeMap::new(),
            looked: Instant::now(),
            pause: Duration::ZERO,
            rows: (u64::MAX, 0),
        };
        let mut failed = false;
        loop {
            tokio::select! {
                () = self.shutdown.cancelled() => break,
                () = tokio::time::sleep(TICK) => {}
            }
            if !self.is_due(&mut memory) {
                continue;
            }
            let begun = Instant::now();
            let result = tokio::select! {
                () = self.shutdown.cancelled() => break,
                result = self.look(&mut memory) => result,
            };
            (memory.looked, memory.pause) = (Instant::now(), begun.elapsed() * COST);
            match result {
                Ok(()) => failed = false,
                // Said once: whoever waits for the upstream says it again and again.
                Err(error) if !failed => {
                    failed = true;
                    tracing::warn!(changefeed = %self.spec.changefeed, errorCode = error.code(),
                        error = error.chain(), "cannot look at sequences, trying again");
                }
                Err(error) => tracing::debug!(error = error.chain(), "cannot look at sequences"),
            }
        }
        if let Some(conn) = memory.conn {
            conn.close().await;
        }
    }

    /// Whether it is time, or rows came and come no longer: then nothing may come any more before a fail-over.
    fn is_due(&self, memory: &mut Memory) -> bool {
        if self.progress.phase() != ReaderPhase::Streaming {
            return false;
        }
        let (at_look, before) = memory.rows;
        let now = self.progress.log_rows.load(Ordering::Relaxed);
        memory.rows.1 = now;
        let since = memory.looked.elapsed();
        let quiet = now != at_look && now == before;
        let due = since >= memory.pause && (quiet || since >= self.spec.ddl.sequence_interval.0);
        if due {
            memory.rows.0 = now;
        }
        due
    }

    /// Writes what changed into the log.
    async fn look(&self, memory: &mut Memory) -> Result<(), Error> {
        let mut conn = match memory.conn.take() {
            Some(conn) => conn,
            None => admin::connect(&self.options).await?,
        };
        let mut seen = BTreeMap::new();
        let mut values = Vec::new();
        for row in conn.query("look at sequences", SEQUENCES).await? {
            let (schema, name) = (row.text(1), row.text(2));
            let owner = row.opt(3).zip(row.opt(4));
            let wanted = self.spec.filter.matches(schema, name)
                || owner.is_some_and(|(schema, table)| self.spec.filter.matches(schema, table));
            if !wanted {
                continue;
            }
            let object: u32 = row.number(0)?;
            let sequence = Sequence {
                last: row.number(6)?,
                increment: row.number(7)?,
                min: row.number(8)?,
                max: row.number(9)?,
            };
            let before = memory.seen.get(&object).copied();
            seen.insert(object, sequence.last);
            if before == Some(sequence.last) {
                continue;
            }
            values.push(SequenceValue {
                schema: schema.to_owned(),
                name: name.to_owned(),
                table: owner.map(|(schema, table)| qualified(schema, table)),
                column: row.opt(5).map(ToOwned::to_owned),
                value: sequence.carried(before, self.spec.ddl.sequence_ahead),
            });
        }
        for values in values.chunks(BATCH) {
            let message = Message {
                version: 1,
                class: "sequences",
                object: 0,
                tag: "nextval",
                slot: &self.names.slot,
                values,
            };
            let text = serde_json::to_string(&message).map_err(|_| Error::protocol("names of sequences"))?;
            let emit =
                format!("SELECT pg_logical_emit_message(true, {}, {})", literal(PREFIX), literal(&text));
            conn.query("write the values of sequences into the log", &emit).await?;
        }
        memory.seen = seen;
        // An error closes it instead.
        memory.conn = Some(conn);
        Ok(())
    }
}

/// Sequences that gave a value and that our role may read.
const SEQUENCES: &str = "SELECT q.* FROM (SELECT c.oid, n.nspname, c.relname, tn.nspname AS of_schema, t.relname AS of_table, \
       a.attname, CASE WHEN has_sequence_privilege(c.oid, 'USAGE, SELECT') THEN pg_sequence_last_value(c.oid) END AS last, \
       s.seqincrement, s.seqmin, s.seqmax \
     FROM pg_sequence s JOIN pg_class c ON c.oid = s.seqrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
       LEFT JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.objsubid = 0 \
         AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i') \
       LEFT JOIN pg_class t ON t.oid = d.refobjid LEFT JOIN pg_namespace tn ON tn.oid = t.relnamespace \
       LEFT JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid \
     WHERE c.relpersistence = 'p' AND n.nspname !~ '^pg_' \
       AND n.nspname NOT IN ('information_schema', 'millrace', 'millrace_capture')) q \
     WHERE q.last IS NOT NULL ORDER BY q.oid";

/// The statement that sets sequences, where the target has them: the one of the column, or the one of that name. One that
/// the sink's user may not set is left alone, and the target's log says so.
pub(crate) fn set(values: &[SequenceValue]) -> String {
    let items: Vec<serde_json::Value> = values
        .iter()
        .map(|value| {
            serde_json::json!({ "n": qualified(&value.schema, &value.name), "t": value.table, "c": value.column,
                "v": value.value })
        })
        .collect();
    let items = literal(&serde_json::Value::Array(items).to_string());
    let body = format!(
        "FOR item IN SELECT r.n, r.t, r.c, r.v FROM pg_catalog.jsonb_to_recordset({items}) AS r (n text, t text, c text, v bigint) LOOP \
         found_oid := NULL; \
         IF EXISTS (SELECT FROM pg_catalog.pg_attribute a WHERE a.attrelid = pg_catalog.to_regclass(item.t) \
           AND a.attname = item.c AND NOT a.attisdropped) THEN \
           found_oid := pg_catalog.to_regclass(pg_catalog.pg_get_serial_sequence(item.t, item.c)); END IF; \
         IF found_oid IS NULL THEN SELECT c.oid INTO found_oid FROM pg_catalog.pg_class c \
           WHERE c.oid = pg_catalog.to_regclass(item.n) AND c.relkind = 'S'; END IF; \
         IF found_oid IS NULL THEN CONTINUE; END IF; \
         IF NOT pg_catalog.has_sequence_privilege(found_oid, 'UPDATE') THEN \
           RAISE WARNING 'millrace may not set sequence %: GRANT UPDATE on it', item.n; CONTINUE; END IF; \
         PERFORM pg_catalog.setval(found_oid::regclass, GREATEST(LEAST(item.v, s.seqmax), s.seqmin)) \
           FROM pg_catalog.pg_sequence s WHERE s.seqrelid = found_oid; \
         END LOOP;"
    );
    do_block(&format!("DECLARE item record; found_oid oid; BEGIN {body} END;"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(last: i64, increment: i64, min: i64, max: i64) -> Sequence {
        Sequence { last, increment, min, max }
    }

    #[test]
    fn a_sequence_is_carried_ahead_by_what_is_used_and_never_to_its_end() {
        let wide = |last| sequence(last, 1, 1, i64::MAX);
        assert_eq!(wide(5).carried(None, 0), 5, "as it is");
        assert_eq!(wide(5).carried(None, 1000), 1005);
        assert_eq!(wide(5_005).carried(Some(5), 1000), 15_005, "twice what was used");
        assert_eq!(wide(5).carried(Some(5_005), 1000), 1005, "it was set back");
        assert_eq!(sequence(90, 1, 1, 100).carried(None, 1000), 95, "half of what is left");
        assert_eq!(sequence(100, 1, 1, 100).carried(None, 1000), 100);
        assert_eq!(sequence(-10, -5, -1000, -1).carried(None, 10), -60);
        assert_eq!(sequence(i64::MIN + 4, -1, i64::MIN, -1).carried(Some(-1), 1000), i64::MIN + 2);
        assert_eq!(sequence(i64::MAX, 1, 1, i64::MAX).carried(Some(1), 1000), i64::MAX);
    }
}
