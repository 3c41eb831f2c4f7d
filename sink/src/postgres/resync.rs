//! Tables that are copied again while the stream goes on: the requests, and how one transaction takes the place of a table's
//! rows.
//!
//! ```text
//!   the stream of the table stands still, everything before it is applied
//!   BEGIN, sharing the lock of the registration
//!   note the progress of the table: p                       nothing is locked, nobody waits
//!   DELETE all rows; COPY those of the snapshot at S ≥ p
//!   lock the progress: whoever is about to write waits      from here on it takes milliseconds
//!   the progress is not p any more: ROLLBACK, and again     somebody wrote meanwhile, as a successor that does not know
//!   progress := S; the request is done; COMMIT              who waited finds it moved, and leaves out what S held
//! ```
//!
//! Of a table that has come with rows, what nobody waits for any more is left out of its stream ([`ResyncChange::LeaveOut`]):
//! noted first, in the row that a replacement answers, so that one with an older snapshot finds that it is too late.
//!
//! Every change of a table's rows moves its progress in the same transaction, or notes a schema change. So one that saw
//! neither move has replaced exactly what the stream had made, whoever thought that he was alone.

use event::{CopiedPart, Resync, ResyncChange, ResyncState};
use heartbeatpb::{TableId, Ts, WallTime};
use tokio_postgres::{Client, Row};

use super::config::PgConfig;
use super::failure::{Failure, classify};
use super::pieces::{Piece, Range};
use super::progress::{CREATE_LOCK, parse_ts};
use super::registration;
use super::route::Position;
use super::{copied, ddl};
use crate::Error;

/// Longest text of an error that is kept. In bytes.
const MOST_TEXT: usize = 4096;

fn failed(error: tokio_postgres::Error) -> Failure {
    classify(error, "keeping the requests for tables that are copied again")
}

/// Whether nothing of its kind was created yet, so that there is nothing.
fn is_missing(error: &tokio_postgres::Error) -> bool {
    error.code().is_some_and(|code| matches!(code.code(), "42P01" | "3F000"))
}

/// Creates the table of requests where it is missing. The sink's schema exists.
pub(crate) async fn prepare(client: &Client, config: &PgConfig) -> Result<(), Failure> {
    let schema = &config.own_schema;
    let exists = "SELECT EXISTS (SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n \
                  ON n.oid = c.relnamespace JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid \
                  WHERE n.nspname = $1 AND c.relname = 'resyncs' AND a.attname = 'left_out' AND NOT a.attisdropped)";
    let row = client.query_one(exists, &[&config.own_schema_name]).await.map_err(failed)?;
    if row.get(0) {
        return Ok(());
    }
    let sql = format!(
        "BEGIN; {CREATE_LOCK}; \
         CREATE TABLE IF NOT EXISTS {schema}.resyncs (changefeed text NOT NULL, table_id bigint NOT NULL, \
             name text NOT NULL, state text NOT NULL, asked bigint NOT NULL, ended bigint, \
             row_count bigint NOT NULL DEFAULT 0, error_code text, error_message text, \
             PRIMARY KEY (changefeed, table_id)); \
         ALTER TABLE {schema}.resyncs ADD COLUMN IF NOT EXISTS entering boolean NOT NULL DEFAULT false, \
             ADD COLUMN IF NOT EXISTS left_out numeric(20) NOT NULL DEFAULT 0; COMMIT"
    );
    let result = client.batch_execute(&sql).await;
    if result.is_err() {
        // The connection may be used again; a failed rollback shows at its next use.
        let _ = client.batch_execute("ROLLBACK").await;
    }
    result.map_err(failed)
}

/// All requests of a changefeed, oldest first.
pub(crate) async fn list(client: &Client, own: &str, changefeed: &str) -> Result<Vec<Resync>, Failure> {
    let sql = format!(
        "SELECT table_id, name, state, asked, ended, row_count, error_code, error_message, \
             COALESCE((to_jsonb(r) ->> 'entering')::boolean, false) \
         FROM {own}.resyncs r WHERE changefeed = $1 ORDER BY asked, table_id"
    );
    match client.query(&sql, &[&changefeed]).await {
        Ok(rows) => rows.iter().map(of_row).collect(),
        Err(error) if is_missing(&error) => Ok(Vec::new()),
        Err(error) => Err(failed(error)),
    }
}

fn of_row(row: &Row) -> Result<Resync, Failure> {
    let state = ResyncState::of_name(row.get(2)).ok_or_else(|| {
        Failure::Fatal(Error::Rejected {
            code: "CDC:ErrSinkProgress",
            what: "the sink's own tables in the target hold a request in a state that this version does not know"
                .into(),
        })
    })?;
    let error: (Option<String>, Option<String>) = (row.get(6), row.get(7));
    Ok(Resync {
        table: TableId(row.get(0)),
        name: row.get(1),
        state,
        asked: WallTime(row.get(3)),
        ended: row.get::<_, Option<i64>>(4).map(WallTime),
        rows: u64::try_from(row.get::<_, i64>(5)).unwrap_or_default(),
        error: error.0.zip(error.1),
        entering: row.get(8),
    })
}

/// Changes the request of a table. False: there is none in a state that allows it.
pub(crate) async fn change(
    client: &Client,
    config: &PgConfig,
    (changefeed, table): (&str, TableId),
    change: &ResyncChange,
    now: WallTime,
) -> Result<bool, Failure> {
    let own = &config.own_schema;
    let (waiting, paused, own_rows) =
        (ResyncState::Waiting.name(), ResyncState::Paused.name(), "changefeed = $1 AND table_id = $2");
    let changed = match change {
        ResyncChange::Ask { name, entering } => {
            let sql = format!(
                "INSERT INTO {own}.resyncs AS r (changefeed, table_id, name, state, asked, entering) \
                 VALUES ($1, $2, $3, '{waiting}', $4, $5) ON CONFLICT (changefeed, table_id) DO UPDATE SET \
                     name = EXCLUDED.name, state = EXCLUDED.state, asked = EXCLUDED.asked, ended = NULL, row_count = 0, \
                     error_code = NULL, error_message = NULL, entering = r.entering OR EXCLUDED.entering \
                     WHERE r.state NOT IN ('{waiting}', '{paused}') OR EXCLUDED.entering AND NOT r.entering"
            );
            client.execute(&sql, &[&changefeed, &table.0, name, &now.0, entering]).await
        }
        ResyncChange::Pause | ResyncChange::Resume => {
            let (from, to) =
                if *change == ResyncChange::Pause { (waiting, paused) } else { (paused, waiting) };
            let sql =
                format!("UPDATE {own}.resyncs SET state = '{to}' WHERE {own_rows} AND state = '{from}'");
            client.execute(&sql, &[&changefeed, &table.0]).await
        }
        ResyncChange::Cancel => {
            let sql = format!("DELETE FROM {own}.resyncs WHERE {own_rows}");
            client.execute(&sql, &[&changefeed, &table.0]).await
        }
        ResyncChange::LeaveOut { until } => {
            let sql = format!(
                "UPDATE {own}.resyncs SET left_out = GREATEST(left_out, $3::text::numeric) WHERE {own_rows} AND entering"
            );
            client.execute(&sql, &[&changefeed, &table.0, &until.0.to_string()]).await
        }
        ResyncChange::Fail { code, message } => {
            let failed = ResyncState::Failed.name();
            let sql = format!(
                "UPDATE {own}.resyncs SET state = '{failed}', ended = $3, error_code = $4, error_message = $5 \
                 WHERE {own_rows} AND state = '{waiting}'"
            );
            let message = &message[..message.floor_char_boundary(MOST_TEXT)];
            client.execute(&sql, &[&changefeed, &table.0, &now.0, code, &message]).await
        }
    };
    match changed {
        Ok(changed) => Ok(changed == 1),
        Err(error) if is_missing(&error) => Ok(false),
        Err(error) => Err(failed(error)),
    }
}

/// How far a table was when its replacement began.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Before {
    /// The different positions of each queue. Where a queue is divided may change meanwhile; that moves nothing.
    queues: Vec<(i16, Ts, i64)>,
    /// The last schema change that the table took part in.
    last_ddl: Option<Ts>,
}

impl Before {
    /// No row of the stream was ever applied to it.
    pub(crate) fn is_nothing(&self) -> bool {
        self.queues.iter().all(|(_, at, _)| *at == Ts::ZERO)
    }

    /// The furthest position.
    pub(crate) fn furthest(&self) -> Ts {
        let queues = self.queues.iter().map(|(_, at, _)| *at).max();
        queues.into_iter().chain(self.last_ddl).max().unwrap_or(Ts::ZERO)
    }
}

/// Notes how far a table is, in a transaction of the caller.
pub(crate) async fn look(
    client: &Client,
    own: &str,
    changefeed: &str,
    table: TableId,
) -> Result<Before, Failure> {
    let sql = format!(
        "SELECT DISTINCT shard, commit_ts::text, row_number FROM {own}.progress \
         WHERE changefeed = $1 AND table_id = $2 ORDER BY 1, 2, 3"
    );
    let reading = |e| classify(e, "reading the progress of a table");
    let mut queues = Vec::new();
    for row in client.query(&sql, &[&changefeed, &table.0]).await.map_err(reading)? {
        queues.push((row.get(0), parse_ts(row.get(1))?, row.get(2)));
    }
    let past = ddl::past(client, own, changefeed, table).await?;
    Ok(Before { queues, last_ddl: past.last })
}

/// The rows of the snapshot at `part.at` are in the place of the former ones: moves the progress there and answers the
/// request, in the transaction of the rows, if nobody has changed the table since `before`.
pub(crate) async fn conclude(
    client: &Client,
    own: &str,
    (changefeed, table): (&str, TableId),
    before: &Before,
    part: &CopiedPart,
    condition: &str,
) -> Result<(), Failure> {
    copied::lock_table(client, changefeed, table).await?;
    // Whoever is moving it comes first, and whoever is about to comes after us.
    let lock = format!(
        "SELECT FROM {own}.progress WHERE changefeed = $1 AND table_id = $2 ORDER BY shard, span_start FOR UPDATE"
    );
    client.execute(&lock, &[&changefeed, &table.0]).await.map_err(failed)?;
    if look(client, own, changefeed, table).await? != *before {
        return Err(again("changes of the table were written while it was copied"));
    }
    let at = Position { commit_ts: part.at, row_number: i64::MAX };
    let all = [Piece { range: Range::default(), at }];
    copied::set_progress(client, own, changefeed, table, &all).await?;
    copied::remove(client, own, changefeed, table).await?;
    if !copied::add(client, own, (changefeed, table), part, (condition, true)).await? {
        return Err(Failure::Fatal(registration::fenced()));
    }
    let sql = format!(
        "UPDATE {own}.resyncs SET state = '{}', ended = $3, row_count = $4, entering = false \
         WHERE changefeed = $1 AND table_id = $2 AND state = '{}' AND left_out <= $5::text::numeric",
        ResyncState::Done.name(),
        ResyncState::Waiting.name()
    );
    let rows = i64::try_from(part.rows).unwrap_or(i64::MAX);
    // A later attempt may have left out more of a table that nobody had copied.
    let params: [&(dyn tokio_postgres::types::ToSql + Sync); 5] =
        [&changefeed, &table.0, &WallTime::now().0, &rows, &part.at.0.to_string()];
    match client.execute(&sql, &params).await.map_err(failed)? {
        1 => Ok(()),
        _ => Err(again("it was paused or cancelled, or another copy of it was begun")),
    }
}

/// Whether a table has come with rows that nobody has copied.
pub(crate) async fn is_entering(
    client: &Client,
    own: &str,
    changefeed: &str,
    table: TableId,
) -> Result<bool, Failure> {
    let sql = format!(
        "SELECT EXISTS (SELECT FROM {own}.resyncs WHERE changefeed = $1 AND table_id = $2 AND entering)"
    );
    Ok(client.query_one(&sql, &[&changefeed, &table.0]).await.map_err(failed)?.get(0))
}

/// Nothing is replaced, for this reason, which may have passed when it is tried again.
pub(crate) fn again(why: &str) -> Failure {
    Failure::Again(Error::Unavailable { what: format!("the table is not replaced: {why}"), source: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_furthest_of_a_table_is_a_row_or_a_schema_change() {
        let before = |queues: &[(i16, u64)], last_ddl: Option<u64>| Before {
            queues: queues.iter().map(|(queue, at)| (*queue, Ts(*at), 0)).collect(),
            last_ddl: last_ddl.map(Ts),
        };
        assert_eq!(before(&[], None).furthest(), Ts::ZERO);
        assert_eq!(before(&[(0, 5), (0, 9), (1, 7)], Some(8)).furthest(), Ts(9));
        assert_eq!(before(&[(0, 5)], Some(8)).furthest(), Ts(8));
    }
}
