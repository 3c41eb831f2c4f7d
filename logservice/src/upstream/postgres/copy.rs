//! The initial copy: existing rows of every table, as of one snapshot, over parallel connections.
//!
//! The snapshot is exported by a temporary slot, so its position S in the log is exact: the copy holds what was
//! committed before S, and streaming from S on continues it without a gap or an overlap.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use event::{Datum, TupleWriter};
use heartbeatpb::{Ts, WallTime};
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::catalog::CatalogTable;
use super::conn::{Connection, Purpose};
use super::names::Names;
use super::options::ConnectOptions;
use super::server_error::ServerError;
use super::shape::Shape;
use super::sql::{ident, literal, parse_lsn};
use crate::Error;
use crate::event_store::{CopyWriter, StoreWriter};
use crate::upstream::ReaderProgress;

/// A table that sends nothing for so long is stuck behind a dead connection.
const SILENCE: Duration = Duration::from_secs(300);
/// A snapshot normally takes milliseconds; after this a person should know why it takes longer.
const SNAPSHOT_PATIENCE: Duration = Duration::from_secs(5);
/// Bytes between two looks at the store's room.
const ROOM_EVERY: usize = 256 * 1024;
/// Rows between two updates of the progress counter.
const COUNT_EVERY: u64 = 1024;

/// What a copy needs.
pub(crate) struct CopyPlan<'a> {
    pub(crate) options: &'a ConnectOptions,
    pub(crate) names: &'a Names,
    pub(crate) application: &'a str,
    pub(crate) tables: &'a [(CatalogTable, Arc<Shape>)],
    pub(crate) parallel: usize,
    pub(crate) progress: &'a Arc<ReaderProgress>,
    pub(crate) shutdown: &'a CancellationToken,
}

/// A table in the queue of the workers.
struct Job {
    sql: String,
    shape: Arc<Shape>,
    writer: CopyWriter,
}

/// Copies every table. `None`: told to stop before the end.
pub(crate) async fn run(plan: &CopyPlan<'_>, writer: &StoreWriter) -> Result<Option<(Ts, WallTime)>, Error> {
    plan.progress.copy_tables_total.store(plan.tables.len() as u64, Ordering::Relaxed);
    plan.progress.copy_tables_done.store(0, Ordering::Relaxed);
    plan.progress.copy_rows.store(0, Ordering::Relaxed);
    let mut exporter = Connection::connect(plan.options, Purpose::Replication, plan.application).await?;
    let Some(snapshot) = export(plan, &mut exporter).await? else { return Ok(None) };
    tracing::info!(position = %snapshot.position, tables = plan.tables.len(), "initial copy begins");

    let mut connections = Vec::new();
    for _ in 0..plan.parallel.clamp(1, plan.tables.len().max(1)) {
        connections.push(import(plan, &snapshot.name).await?);
    }
    // The snapshot lives on in the workers' transactions; the temporary slot need not hold the log any longer.
    exporter.close().await;

    let mut jobs = Vec::with_capacity(plan.tables.len());
    for (table, shape) in plan.tables {
        let rows = writer.copy_writer(
            Arc::clone(&table.info),
            snapshot.position,
            snapshot.position.before(),
            snapshot.time,
        );
        jobs.push((
            table.pages,
            Job { sql: statement(table, shape), shape: Arc::clone(shape), writer: rows },
        ));
    }
    // Largest first, so that no worker ends long after the others.
    jobs.sort_by_key(|(pages, _)| std::cmp::Reverse(*pages));
    let queue: Arc<Mutex<VecDeque<Job>>> =
        Arc::new(Mutex::new(jobs.into_iter().map(|(_, job)| job).collect()));

    let mut workers = JoinSet::new();
    for conn in connections {
        workers.spawn(work(conn, Arc::clone(&queue), Arc::clone(plan.progress)));
    }
    let outcome = loop {
        let joined = tokio::select! {
            biased;
            () = plan.shutdown.cancelled() => break Ok(None),
            joined = workers.join_next() => joined,
        };
        match joined {
            None => break Ok(Some((snapshot.position, snapshot.time))),
            Some(Ok(Ok(()))) => {}
            Some(Ok(Err(error))) => break Err(error),
            Some(Err(_)) => break Err(Error::Closed { what: "a copy worker" }),
        }
    };
    // Nobody may go on writing rows of this snapshot after we return.
    workers.shutdown().await;
    outcome
}

struct Snapshot {
    name: String,
    position: Ts,
    time: WallTime,
}

async fn export(plan: &CopyPlan<'_>, exporter: &mut Connection) -> Result<Option<Snapshot>, Error> {
    // The time comes first: another statement after the export would end the snapshot.
    let sql = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint";
    let rows = exporter.query("tell the time", sql).await?;
    let time = WallTime(rows.first().ok_or_else(|| Error::protocol("no time"))?.number(0)?);
    let cancel = exporter.cancel_token();
    let sql = format!(
        "CREATE_REPLICATION_SLOT {} TEMPORARY LOGICAL pgoutput EXPORT_SNAPSHOT",
        ident(&plan.names.copy_slot(rand::random()))
    );
    let mut create = pin!(exporter.query("create a temporary slot", &sql));
    let rows = loop {
        tokio::select! {
            rows = &mut create => break rows?,
            () = plan.shutdown.cancelled() => {
                cancel.cancel(plan.options).await;
                return Ok(None);
            }
            () = tokio::time::sleep(SNAPSHOT_PATIENCE) => {
                let wait = "the initial copy waits for the transactions that are running on the upstream to end";
                plan.progress.set_last_error(Some(wait.to_owned()));
                tracing::warn!("{wait}");
            }
        }
    };
    plan.progress.set_last_error(None);
    let row = rows.first().ok_or_else(|| Error::protocol("no slot was described"))?;
    let position = parse_lsn(row.text(1)).ok_or_else(|| Error::protocol("a slot has no position"))?;
    Ok(Some(Snapshot { name: row.text(2).to_owned(), position: Ts(position), time }))
}

async fn import(plan: &CopyPlan<'_>, snapshot: &str) -> Result<Connection, Error> {
    let mut conn = Connection::connect(plan.options, Purpose::Copy, plan.application).await?;
    let sql = format!(
        "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY; SET TRANSACTION SNAPSHOT {}",
        literal(snapshot)
    );
    conn.query("import a snapshot", &sql).await?;
    Ok(conn)
}

fn statement(table: &CatalogTable, shape: &Shape) -> String {
    let columns = shape.wire_names().map(ident).collect::<Vec<_>>().join(", ");
    let name = table.sql_name();
    if table.partitioned {
        format!("COPY (SELECT {columns} FROM {name}) TO STDOUT")
    } else if columns.is_empty() {
        format!("COPY (SELECT FROM ONLY {name}) TO STDOUT")
    } else {
        // Without a query, COPY reads the table itself and not its children.
        format!("COPY {name} ({columns}) TO STDOUT")
    }
}

async fn work(
    mut conn: Connection,
    queue: Arc<Mutex<VecDeque<Job>>>,
    progress: Arc<ReaderProgress>,
) -> Result<(), Error> {
    loop {
        let job = queue.lock().pop_front();
        let Some(job) = job else { break };
        copy_table(&mut conn, job, &progress).await?;
        progress.copy_tables_done.fetch_add(1, Ordering::Relaxed);
    }
    conn.close().await;
    Ok(())
}

async fn copy_table(conn: &mut Connection, job: Job, progress: &ReaderProgress) -> Result<(), Error> {
    const ACTION: &str = "copy a table";
    let Job { sql, shape, mut writer } = job;
    conn.start_copy(ACTION, &sql).await?;
    let mut line = LineDecoder::default();
    let (mut rows, mut bytes, mut failure) = (0, 0, None);
    loop {
        let Some((tag, total)) = conn.peek()? else {
            match tokio::time::timeout(SILENCE, conn.fill()).await {
                Ok(filled) => filled?,
                Err(_) => return Err(silent(conn)),
            }
            continue;
        };
        match tag {
            b'd' => {
                line.copy_row(conn.body(total), &shape, &mut writer)?;
                rows += 1;
                bytes += total;
            }
            b'E' => failure = Some(ServerError::parse(conn.body(total)).into_error(ACTION)),
            b'c' | b'C' | b'N' | b'S' => {}
            b'Z' => {
                conn.advance(total);
                break;
            }
            _ => return Err(Error::protocol(format_args!("message {:?} in a copy", char::from(tag)))),
        }
        conn.advance(total);
        if rows == COUNT_EVERY {
            progress.copy_rows.fetch_add(rows, Ordering::Relaxed);
            rows = 0;
        }
        if bytes >= ROOM_EVERY {
            progress.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
            bytes = 0;
            writer.room().await?;
        }
    }
    progress.copy_rows.fetch_add(rows, Ordering::Relaxed);
    progress.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    if let Some(error) = failure {
        return Err(error);
    }
    writer.finish();
    Ok(())
}

fn silent(conn: &Connection) -> Error {
    Error::UpstreamUnreachable {
        address: conn.address().to_owned(),
        source: Box::new(std::io::Error::new(
            std::io::ErrorKind::TimedOut,
            format!("nothing came for {} seconds", SILENCE.as_secs()),
        )),
    }
}

/// Decodes lines of COPY's text format; keeps its scratch space between lines.
#[derive(Default)]
struct LineDecoder {
    /// Unescaped values, one after the other.
    scratch: Vec<u8>,
    /// Fields of the line.
    fields: Vec<Field>,
}

#[derive(Clone, Copy)]
enum Field {
    Null,
    /// Range of the line itself.
    Plain(usize, usize),
    /// Range of the scratch space.
    Unescaped(usize, usize),
}

impl LineDecoder {
    /// Decodes one CopyData message, which is one line, into a row.
    fn copy_row(&mut self, line: &[u8], shape: &Shape, writer: &mut CopyWriter) -> Result<(), Error> {
        self.parse(line)?;
        // A table without columns has empty lines.
        if self.fields.len() != shape.wire_columns() && !(shape.wire_columns() == 0 && line == b"\n") {
            return Err(Error::protocol(format_args!(
                "copied row of {} columns instead of {}",
                self.fields.len(),
                shape.wire_columns()
            )));
        }
        writer.row(&mut |out| {
            let mut tuple = TupleWriter::new(out);
            shape.put_values(self.values(line), &mut tuple);
            tuple.finish();
        });
        Ok(())
    }

    fn values<'a>(&'a self, line: &'a [u8]) -> impl Iterator<Item = Datum<'a>> {
        self.fields.iter().map(move |field| match *field {
            Field::Null => Datum::Null,
            Field::Plain(from, to) => Datum::Text(&line[from..to]),
            Field::Unescaped(from, to) => Datum::Text(&self.scratch[from..to]),
        })
    }

    fn parse(&mut self, line: &[u8]) -> Result<(), Error> {
        let Some((b'\n', content)) = line.split_last() else {
            return Err(Error::protocol("a copied row has no end of line"));
        };
        self.scratch.clear();
        self.fields.clear();
        let mut from = 0;
        loop {
            let to = memchr::memchr(b'\t', &content[from..]).map_or(content.len(), |at| from + at);
            self.push_field(content, from, to)?;
            if to == content.len() {
                return Ok(());
            }
            from = to + 1;
        }
    }

    fn push_field(&mut self, content: &[u8], from: usize, to: usize) -> Result<(), Error> {
        let raw = &content[from..to];
        if raw == b"\\N" {
            self.fields.push(Field::Null);
            return Ok(());
        }
        let mut escapes = memchr::memchr_iter(b'\\', raw).peekable();
        if escapes.peek().is_none() {
            self.fields.push(Field::Plain(from, to));
            return Ok(());
        }
        let start = self.scratch.len();
        let mut done = 0;
        for at in escapes {
            // The second of two backslashes is part of the first one's escape.
            if at < done {
                continue;
            }
            self.scratch.extend_from_slice(&raw[done..at]);
            let escaped = *raw.get(at + 1).ok_or_else(|| Error::protocol("a copied value ends with \\"))?;
            self.scratch.push(match escaped {
                b'b' => 8,
                b'f' => 12,
                b'n' => b'\n',
                b'r' => b'\r',
                b't' => b'\t',
                b'v' => 11,
                other => other,
            });
            done = at + 2;
        }
        self.scratch.extend_from_slice(&raw[done..]);
        self.fields.push(Field::Unescaped(start, self.scratch.len()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(line: &[u8]) -> Result<Vec<Option<Vec<u8>>>, Error> {
        let mut decoder = LineDecoder::default();
        decoder.parse(line)?;
        let values = decoder.values(line).map(|value| match value {
            Datum::Text(text) => Some(text.to_vec()),
            Datum::Null | Datum::Unchanged => None,
        });
        Ok(values.collect())
    }

    fn encode(values: &[Option<Vec<u8>>]) -> Vec<u8> {
        let fields: Vec<Vec<u8>> = values
            .iter()
            .map(|value| match value {
                None => b"\\N".to_vec(),
                Some(text) => text
                    .iter()
                    .flat_map(|&b| match b {
                        8 => b"\\b".to_vec(),
                        12 => b"\\f".to_vec(),
                        b'\n' => b"\\n".to_vec(),
                        b'\r' => b"\\r".to_vec(),
                        b'\t' => b"\\t".to_vec(),
                        11 => b"\\v".to_vec(),
                        b'\\' => b"\\\\".to_vec(),
                        other => vec![other],
                    })
                    .collect(),
            })
            .collect();
        let mut line = fields.join(&b'\t');
        line.push(b'\n');
        line
    }

    #[test]
    fn nulls_empty_values_and_escapes_are_told_apart() {
        let values = decode(b"1\t\\N\t\t\\\\N\ta\\tb\\n\\\\\\\\c\n").expect("decode");
        let text = |text: &[u8]| Some(text.to_vec());
        assert_eq!(values, [text(b"1"), None, text(b""), text(b"\\N"), text(b"a\tb\n\\\\c")]);
        assert!(decode(b"1").is_err());
        assert!(decode(b"a\\\n").is_err());
    }

    proptest! {
        #[test]
        fn what_a_server_writes_is_read_back(
            values in prop::collection::vec(prop::option::of(prop::collection::vec(1u8..=255, 0..12)), 1..6),
        ) {
            prop_assert_eq!(decode(&encode(&values)).expect("decode"), values);
        }

        #[test]
        fn random_lines_never_panic(line in prop::collection::vec(any::<u8>(), 0..40)) {
            drop(decode(&line));
        }
    }
}
