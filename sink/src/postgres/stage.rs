//! Rows that are too large for parameters: their values are streamed into a temporary table, from which the statement
//! reads them.
//!
//! A parameter is copied twice on its way through the driver, as a whole, and the driver's buffers stay as large as the
//! largest was. The data of a `COPY` leaves piece by piece.

use bytes::{BufMut, BytesMut};
use event::Datum;
use futures_util::{SinkExt, pin_mut};

use super::connection::Connection;
use super::failure::{Failure, classify};
use super::plan::{self, Group, Source};
use super::route::Holds;
use super::target::Target;

/// Bytes of rows from which they are staged: more than the rows of a transaction have, unless one is large by itself.
pub(crate) const STAGED_BYTES: usize = 8 << 20;
/// The staging table of a transaction: one row for each value, since not every row fits a page as text.
const STAGE: &str = "pg_temp.millrace_values";
/// Bytes that are given to the driver at a time.
const PIECE: usize = 256 << 10;
/// Signature, flags and length of the extension of `COPY` in binary form.
const HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";

/// The staged values as a relation of so many rows and columns.
pub(super) fn relation(rows: u64, columns: usize) -> String {
    let value = |at| format!("(SELECT s.value FROM {STAGE} AS s WHERE s.line = r.line AND s.place = {at})");
    let values: Vec<String> = (0..columns).map(value).collect();
    format!("(SELECT {} FROM generate_series(1, {rows}) AS r(line))", values.join(", "))
}

impl Connection {
    /// Whether its user may create temporary tables: everybody may, unless somebody has revoked it.
    pub(super) async fn may_stage(&mut self) -> Result<bool, Failure> {
        if let Some(known) = self.may_stage {
            return Ok(known);
        }
        let sql = "SELECT has_database_privilege(current_database(), 'TEMPORARY')";
        let row = self.client().query_one(sql, &[]).await;
        let may: bool = row.map_err(|e| classify(e, "looking for the privilege TEMPORARY"))?.get(0);
        if !may {
            tracing::warn!(
                "without the privilege TEMPORARY in the target, a large row takes several times its size of memory"
            );
        }
        self.may_stage = Some(may);
        Ok(may)
    }
}

/// Sends the rows of a group ahead and executes its statement; answers how many rows that has changed.
pub(super) async fn execute<B: Holds>(
    connection: &Connection,
    target: &Target,
    group: &Group<'_, B>,
) -> Result<u64, tokio_postgres::Error> {
    let client = connection.client();
    // The texts may be anything: to compress them would only take time.
    let create = format!(
        "CREATE TEMPORARY TABLE millrace_values (line int, place int, value text, PRIMARY KEY (line, place)) ON COMMIT \
         DROP; ALTER TABLE {STAGE} ALTER COLUMN value SET STORAGE EXTERNAL"
    );
    client.batch_execute(&create).await?;
    let sink = client.copy_in(&format!("COPY {STAGE} FROM STDIN (FORMAT binary)")).await?;
    pin_mut!(sink);
    let mut out = BytesMut::with_capacity(2 * PIECE);
    out.put_slice(HEADER);
    let rows: Vec<Vec<Datum<'_>>> = plan::values(target, group).collect();
    for (line, row) in (1..).zip(&rows) {
        for (place, value) in (0..).zip(row) {
            let Datum::Text(text) = *value else { continue };
            put_head(&mut out, line, place, text.len());
            for piece in text.chunks(PIECE) {
                out.put_slice(piece);
                if out.len() >= PIECE {
                    sink.send(out.split().freeze()).await?;
                }
            }
        }
    }
    out.put_i16(-1);
    sink.send(out.freeze()).await?;
    sink.finish().await?;
    let sql = plan::sql(target, &group.kind, Source::Staged(group.rows()));
    let changed = client.execute(&sql, &[]).await?;
    client.batch_execute(&format!("DROP TABLE {STAGE}")).await?;
    Ok(changed)
}

/// A row of the staging table up to its value.
fn put_head(out: &mut BytesMut, line: i32, place: i32, len: usize) {
    out.put_i16(3);
    for number in [line, place] {
        out.put_i32(4);
        out.put_i32(number);
    }
    // A value is at most 1 GiB: PostgreSQL's limit, which decoders enforce.
    out.put_i32(i32::try_from(len).unwrap_or(i32::MAX));
}
