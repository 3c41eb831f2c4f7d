//! The way through the event store: each table by one connection, its rows at the snapshot's position, in order.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use event::{CopyFormat, CopyPart};
use parking_lot::Mutex;
use tokio::task::JoinSet;

use super::super::conn::Connection;
use super::super::server_error::ServerError;
use super::super::shape::Shape;
use super::super::sql::qualified;
use super::lines::LineDecoder;
use super::{Copied, CopyPlan, SILENCE, Snapshot, parts, silent};
use crate::Error;
use crate::event_store::{CopyWriter, StoreWriter};
use crate::upstream::{ReaderProgress, TableCopy};

/// Bytes between two looks at the store's room.
const ROOM_EVERY: usize = 256 * 1024;
/// Rows between two updates of the progress counter.
const COUNT_EVERY: u64 = 1024;

/// A table in the queue of the workers.
struct Job {
    sql: String,
    shape: Arc<Shape>,
    writer: CopyWriter,
    copy: Arc<TableCopy>,
}

/// Copies every table. `None`: told to stop before the end.
pub(super) async fn run(plan: &CopyPlan<'_>, writer: &StoreWriter) -> Result<Option<Copied>, Error> {
    let Some(Snapshot { position, time, connections }) = super::snapshot(plan, plan.tables.len()).await?
    else {
        return Ok(None);
    };
    let mut jobs = Vec::with_capacity(plan.tables.len());
    let board = super::begin_board(plan);
    for ((table, shape), copy) in plan.tables.iter().zip(board) {
        let rows = writer.copy_writer(Arc::clone(&table.info), position, position.before(), time);
        let sql = parts::statement(table, shape, &CopyPart::default(), CopyFormat::Text);
        let sql = sql.ok_or_else(|| Error::protocol("a whole table has no bounds"))?;
        jobs.push((table.pages, Job { sql, shape: Arc::clone(shape), writer: rows, copy }));
    }
    // Largest first, so that no worker ends long after the others.
    jobs.sort_by_key(|(pages, _)| std::cmp::Reverse(*pages));
    let queue: Arc<Mutex<VecDeque<Job>>> =
        Arc::new(Mutex::new(jobs.into_iter().map(|(_, job)| job).collect()));

    let mut workers = JoinSet::new();
    for conn in connections {
        workers.spawn(work(conn, Arc::clone(&queue), Arc::clone(plan.progress)));
    }
    let ended = super::join(plan, workers).await?;
    Ok(ended.then_some(Copied { from: position, time, until: position }))
}

async fn work(
    mut conn: Connection,
    queue: Arc<Mutex<VecDeque<Job>>>,
    progress: Arc<ReaderProgress>,
) -> Result<(), Error> {
    loop {
        let job = queue.lock().pop_front();
        let Some(job) = job else { break };
        let copy = Arc::clone(&job.copy);
        copy.begin(None, 1, (0, 0, 0));
        copy_table(&mut conn, job, &progress).await?;
        copy.part_done();
        copy.finish();
        progress.copy_tables_done.fetch_add(1, Ordering::Relaxed);
    }
    conn.close().await;
    Ok(())
}

async fn copy_table(conn: &mut Connection, job: Job, progress: &ReaderProgress) -> Result<(), Error> {
    let Job { sql, shape, mut writer, copy } = job;
    let action = format!("copy table {}", qualified(&shape.info.schema, &shape.info.name));
    conn.start_copy(&action, &sql).await?;
    let mut line = LineDecoder::default();
    let (mut rows, mut bytes, mut unasked, mut failure) = (0, 0, 0, None);
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
                bytes += total as u64;
                unasked += total;
            }
            b'E' => failure = Some(ServerError::parse(conn.body(total)).into_error(&action)),
            b'c' | b'C' | b'N' | b'S' => {}
            b'Z' => {
                conn.advance(total);
                break;
            }
            _ => return Err(Error::protocol(format_args!("message {:?} in a copy", char::from(tag)))),
        }
        conn.advance(total);
        if rows == COUNT_EVERY {
            progress.copied(&copy, std::mem::take(&mut rows), std::mem::take(&mut bytes));
        }
        if unasked >= ROOM_EVERY {
            unasked = 0;
            writer.room().await?;
        }
    }
    progress.copied(&copy, rows, bytes);
    if let Some(error) = failure {
        return Err(error);
    }
    writer.finish();
    Ok(())
}
