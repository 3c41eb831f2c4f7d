//! Byte forms of the data plane's messages between nodes: big-endian numbers, texts and byte strings behind
//! a u32 length, options behind a u8. Every length is checked against what is left.

use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes};
use event::{DdlEvent, DdlKind, RowBatch, TableInfo, TxnMark};
use heartbeatpb::{
    AddedTable, ChangefeedId, DispatcherId, Gid, InfluencedTables, SchemaChange, SchemaId, TableId,
    TableSpan, Ts, WallTime,
};

use crate::event_store::Position;
use crate::topic::{DispatcherProgress, EventHead, SharedBatch, ToEventCollector, ToEventService};

pub(crate) mod crew;

/// Type number of [`ToEventService`].
pub(crate) const TO_EVENT_SERVICE: i32 = 1000;
/// Type number of [`ToEventCollector`].
pub(crate) const TO_EVENT_COLLECTOR: i32 = 1001;

pub(crate) fn put_bytes(bytes: &[u8], out: &mut Vec<u8>) {
    out.put_u32(u32::try_from(bytes.len()).expect("messages are far below 4 GiB"));
    out.put_slice(bytes);
}

fn put_dispatcher(id: DispatcherId, out: &mut Vec<u8>) {
    out.put_u64(id.high);
    out.put_u64(id.low);
}

fn put_gid(id: Gid, out: &mut Vec<u8>) {
    out.put_u64(id.high);
    out.put_u64(id.low);
}

fn put_changefeed(id: &ChangefeedId, out: &mut Vec<u8>) {
    put_gid(id.gid, out);
    put_bytes(id.name.as_bytes(), out);
    put_bytes(id.keyspace.as_bytes(), out);
}

fn put_copied(copied: Option<Position>, out: &mut Vec<u8>) {
    out.put_u8(u8::from(copied.is_some()));
    let copied = copied.unwrap_or_default();
    out.put_u64(copied.commit_ts.0);
    out.put_u64(copied.rows);
}

fn put_head(head: &EventHead, out: &mut Vec<u8>) {
    put_gid(head.changefeed, out);
    put_dispatcher(head.dispatcher, out);
    out.put_u64(head.epoch);
    out.put_u64(head.seq);
}

/// A cursor whose every step may find that the message is too short.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn u8(&mut self) -> Option<u8> {
        (!self.0.is_empty()).then(|| self.0.get_u8())
    }

    fn u32(&mut self) -> Option<u32> {
        (self.0.len() >= 4).then(|| self.0.get_u32())
    }

    fn u64(&mut self) -> Option<u64> {
        (self.0.len() >= 8).then(|| self.0.get_u64())
    }

    fn i64(&mut self) -> Option<i64> {
        (self.0.len() >= 8).then(|| self.0.get_i64())
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let len = self.u32()? as usize;
        let bytes = self.0.get(..len)?;
        self.0 = &self.0[len..];
        Some(bytes)
    }

    fn text(&mut self) -> Option<&'a str> {
        std::str::from_utf8(self.bytes()?).ok()
    }

    /// A count of items of which each takes at least `least` bytes.
    fn count(&mut self, least: usize) -> Option<usize> {
        let count = self.u32()? as usize;
        (count.checked_mul(least)? <= self.0.len()).then_some(count)
    }

    fn numbers(&mut self) -> Option<Vec<u64>> {
        let count = self.count(8)?;
        (0..count).map(|_| self.u64()).collect()
    }

    fn gid(&mut self) -> Option<Gid> {
        Some(Gid::new(self.u64()?, self.u64()?))
    }

    fn dispatcher(&mut self) -> Option<DispatcherId> {
        let id = DispatcherId::new(self.u64()?, self.u64()?);
        (!id.is_zero()).then_some(id)
    }

    fn changefeed(&mut self) -> Option<ChangefeedId> {
        Some(ChangefeedId { gid: self.gid()?, name: self.text()?.into(), keyspace: self.text()?.into() })
    }

    fn head(&mut self) -> Option<EventHead> {
        Some(EventHead {
            changefeed: self.gid()?,
            dispatcher: self.dispatcher()?,
            epoch: self.u64()?,
            seq: self.u64()?,
        })
    }

    fn copied(&mut self) -> Option<Option<Position>> {
        let copying = self.u8()? != 0;
        let copied = Position { commit_ts: Ts(self.u64()?), rows: self.u64()? };
        Some(copying.then_some(copied))
    }

    fn table(&mut self) -> Option<Arc<TableInfo>> {
        serde_json::from_slice(self.bytes()?).ok().map(Arc::new)
    }

    fn finish<T>(self, value: T) -> Option<T> {
        self.0.is_empty().then_some(value)
    }
}

fn put_table(table: &TableInfo, out: &mut Vec<u8>) {
    put_bytes(&serde_json::to_vec(table).expect("a table's shape has string keys only"), out);
}

pub(crate) fn put_to_event_service(message: &ToEventService, out: &mut Vec<u8>) {
    match message {
        ToEventService::Register { changefeed, dispatcher, span, start_ts } => {
            out.put_u8(1);
            put_changefeed(changefeed, out);
            put_dispatcher(*dispatcher, out);
            out.put_u32(span.keyspace_id);
            out.put_i64(span.table.0);
            put_bytes(&span.start, out);
            put_bytes(&span.end, out);
            out.put_u64(start_ts.0);
        }
        ToEventService::Reset { changefeed, dispatcher, epoch, start_ts, copied } => {
            out.put_u8(2);
            put_changefeed(changefeed, out);
            put_dispatcher(*dispatcher, out);
            out.put_u64(*epoch);
            out.put_u64(start_ts.0);
            put_copied(*copied, out);
        }
        ToEventService::Remove { changefeed, dispatcher } => {
            out.put_u8(3);
            put_changefeed(changefeed, out);
            put_dispatcher(*dispatcher, out);
        }
        ToEventService::Heartbeat { changefeed, progress } => {
            out.put_u8(4);
            put_changefeed(changefeed, out);
            out.put_u32(u32::try_from(progress.len()).expect("a node has fewer dispatchers"));
            for entry in progress {
                put_dispatcher(entry.dispatcher, out);
                out.put_u64(entry.epoch);
                out.put_u64(entry.checkpoint.0);
                put_copied(entry.copied, out);
            }
        }
        ToEventService::Credit { changefeed, opening, received, freed, window } => {
            out.put_u8(5);
            put_changefeed(changefeed, out);
            for number in [opening, received, freed, window] {
                out.put_u64(*number);
            }
        }
    }
}

pub(crate) fn get_to_event_service(bytes: &[u8]) -> Option<ToEventService> {
    let mut r = Reader(bytes);
    let message = match r.u8()? {
        1 => ToEventService::Register {
            changefeed: r.changefeed()?,
            dispatcher: r.dispatcher()?,
            span: TableSpan {
                keyspace_id: r.u32()?,
                table: TableId(r.i64()?),
                start: r.bytes()?.to_vec(),
                end: r.bytes()?.to_vec(),
            },
            start_ts: Ts(r.u64()?),
        },
        2 => ToEventService::Reset {
            changefeed: r.changefeed()?,
            dispatcher: r.dispatcher()?,
            epoch: r.u64()?,
            start_ts: Ts(r.u64()?),
            copied: r.copied()?,
        },
        3 => ToEventService::Remove { changefeed: r.changefeed()?, dispatcher: r.dispatcher()? },
        4 => {
            let changefeed = r.changefeed()?;
            let count = r.count(49)?;
            let mut progress = Vec::with_capacity(count);
            for _ in 0..count {
                let (dispatcher, epoch, checkpoint) = (r.dispatcher()?, r.u64()?, Ts(r.u64()?));
                let copied = r.copied()?;
                progress.push(DispatcherProgress { dispatcher, epoch, checkpoint, copied });
            }
            ToEventService::Heartbeat { changefeed, progress }
        }
        5 => ToEventService::Credit {
            changefeed: r.changefeed()?,
            opening: r.u64()?,
            received: r.u64()?,
            freed: r.u64()?,
            window: r.u64()?,
        },
        _ => return None,
    };
    r.finish(message)
}

/// The byte form of rows up to the rows themselves, which are its end.
pub(crate) fn put_rows(head: &EventHead, batch: &RowBatch, out: &mut Vec<u8>) -> Bytes {
    let (rows, numbers) = batch.packed();
    out.put_u8(if numbers.is_none() { 4 } else { 8 });
    put_head(head, out);
    put_table(&batch.table, out);
    out.put_u32(u32::try_from(batch.txns().len()).expect("a batch is at most a few hundred KiB, or one row"));
    for txn in batch.txns() {
        out.put_u64(txn.commit_ts.0);
        out.put_u64(txn.start_ts.0);
        out.put_i64(txn.commit_time.0);
        out.put_u32(txn.rows);
        out.put_u64(txn.first_row);
    }
    if let Some(numbers) = numbers {
        out.put_u32(u32::try_from(numbers.len()).expect("as many as there are rows"));
        numbers.iter().for_each(|number| out.put_u64(*number));
    }
    out.put_u32(u32::try_from(rows.len()).expect("a row is at most a message of the server"));
    rows
}

/// Reads the byte form of rows; the batch shares its bytes.
pub(crate) fn get_rows(bytes: &Bytes) -> Option<(EventHead, RowBatch)> {
    let mut r = Reader(bytes);
    let kind = r.u8()?;
    let rows = rows(&mut r, kind, |rows| bytes.slice_ref(rows))?;
    r.finish(rows)
}

fn rows(r: &mut Reader<'_>, kind: u8, keep: impl FnOnce(&[u8]) -> Bytes) -> Option<(EventHead, RowBatch)> {
    if !matches!(kind, 4 | 8) {
        return None;
    }
    let (head, table) = (r.head()?, r.table()?);
    let count = r.count(36)?;
    let mut txns = Vec::with_capacity(count);
    for _ in 0..count {
        txns.push(TxnMark {
            commit_ts: Ts(r.u64()?),
            start_ts: Ts(r.u64()?),
            commit_time: WallTime(r.i64()?),
            rows: r.u32()?,
            first_row: r.u64()?,
        });
    }
    let numbers = if kind == 8 { Some(r.numbers()?) } else { None };
    let rows = keep(r.bytes()?);
    let batch = match numbers {
        None => RowBatch::new(table, txns, rows),
        Some(numbers) => RowBatch::numbered(table, txns, rows, &numbers),
    };
    Some((head, batch.ok()?))
}

pub(crate) fn put_to_event_collector(message: &ToEventCollector, out: &mut Vec<u8>) {
    match message {
        ToEventCollector::Ready { changefeed, dispatcher } => {
            out.put_u8(1);
            put_gid(*changefeed, out);
            put_dispatcher(*dispatcher, out);
        }
        ToEventCollector::NotRegistered { changefeed, dispatcher } => {
            out.put_u8(2);
            put_gid(*changefeed, out);
            put_dispatcher(*dispatcher, out);
        }
        ToEventCollector::Handshake { head, start_ts, table } => {
            out.put_u8(3);
            put_head(head, out);
            out.put_u64(start_ts.0);
            out.put_u8(u8::from(table.is_some()));
            if let Some(table) = table {
                put_table(table, out);
            }
        }
        ToEventCollector::Rows { head, batch: SharedBatch(batch) } => {
            let rows = put_rows(head, batch, out);
            out.put_slice(&rows);
        }
        ToEventCollector::Piece { head, total, offset, bytes } => {
            out.put_u8(9);
            put_head(head, out);
            out.put_u64(*total);
            out.put_u64(*offset);
            put_bytes(bytes, out);
        }
        ToEventCollector::Ddl { head, ddl } => {
            out.put_u8(5);
            put_head(head, out);
            put_ddl(ddl, out);
        }
        ToEventCollector::Resolved { entries, time } => {
            out.put_u8(6);
            out.put_i64(time.0);
            out.put_u32(u32::try_from(entries.len()).expect("a node has fewer dispatchers"));
            for (head, ts) in entries.iter() {
                put_head(head, out);
                out.put_u64(ts.0);
            }
        }
        ToEventCollector::Failed { changefeed, dispatcher, code, message } => {
            out.put_u8(7);
            put_gid(*changefeed, out);
            put_dispatcher(*dispatcher, out);
            put_bytes(code.as_bytes(), out);
            put_bytes(message.as_bytes(), out);
        }
    }
}

pub(crate) fn get_to_event_collector(bytes: &[u8]) -> Option<ToEventCollector> {
    let mut r = Reader(bytes);
    let message = match r.u8()? {
        1 => ToEventCollector::Ready { changefeed: r.gid()?, dispatcher: r.dispatcher()? },
        2 => ToEventCollector::NotRegistered { changefeed: r.gid()?, dispatcher: r.dispatcher()? },
        3 => {
            let (head, start_ts) = (r.head()?, Ts(r.u64()?));
            let table = if r.u8()? == 0 { None } else { Some(r.table()?) };
            ToEventCollector::Handshake { head, start_ts, table }
        }
        kind @ (4 | 8) => {
            let (head, batch) = rows(&mut r, kind, Bytes::copy_from_slice)?;
            ToEventCollector::Rows { head, batch: SharedBatch(batch) }
        }
        9 => ToEventCollector::Piece {
            head: r.head()?,
            total: r.u64()?,
            offset: r.u64()?,
            bytes: Bytes::copy_from_slice(r.bytes()?),
        },
        5 => ToEventCollector::Ddl { head: r.head()?, ddl: Arc::new(get_ddl(&mut r)?) },
        6 => {
            let time = WallTime(r.i64()?);
            let count = r.count(56)?;
            let entries = (0..count).map(|_| Some((r.head()?, Ts(r.u64()?)))).collect::<Option<Vec<_>>>()?;
            ToEventCollector::Resolved { entries: entries.into(), time }
        }
        7 => ToEventCollector::Failed {
            changefeed: r.gid()?,
            dispatcher: r.dispatcher()?,
            code: r.text()?.to_owned(),
            message: r.text()?.to_owned(),
        },
        _ => return None,
    };
    r.finish(message)
}

const DDL_KINDS: [DdlKind; 8] = [
    DdlKind::CreateSchema,
    DdlKind::DropSchema,
    DdlKind::CreateTable,
    DdlKind::DropTable,
    DdlKind::RenameTable,
    DdlKind::AlterTable,
    DdlKind::Other,
    DdlKind::TruncateTable,
];

fn put_influenced(tables: Option<&InfluencedTables>, out: &mut Vec<u8>) {
    match tables {
        None => out.put_u8(0),
        Some(InfluencedTables::All) => out.put_u8(1),
        Some(InfluencedTables::Schema(schema)) => {
            out.put_u8(2);
            out.put_i64(schema.0);
        }
        Some(InfluencedTables::Normal(tables)) => {
            out.put_u8(3);
            out.put_u32(u32::try_from(tables.len()).expect("a DDL touches fewer tables"));
            for table in tables {
                out.put_i64(table.0);
            }
        }
    }
}

fn get_influenced(r: &mut Reader<'_>) -> Option<Option<InfluencedTables>> {
    Some(match r.u8()? {
        0 => None,
        1 => Some(InfluencedTables::All),
        2 => Some(InfluencedTables::Schema(SchemaId(r.i64()?))),
        3 => {
            let count = r.count(8)?;
            Some(InfluencedTables::Normal((0..count).map(|_| r.i64().map(TableId)).collect::<Option<_>>()?))
        }
        _ => return None,
    })
}

fn put_ddl(ddl: &DdlEvent, out: &mut Vec<u8>) {
    out.put_u64(ddl.commit_ts.0);
    out.put_u64(ddl.start_ts.0);
    out.put_i64(ddl.commit_time.0);
    let number = |wanted: DdlKind| DDL_KINDS.iter().position(|kind| *kind == wanted);
    let kind = number(ddl.kind).or_else(|| number(DdlKind::Other)).unwrap_or_default();
    out.put_u8(u8::try_from(kind).unwrap_or(u8::MAX));
    out.put_i64(ddl.schema_id.0);
    out.put_i64(ddl.table_id.0);
    for text in [&ddl.schema, &ddl.table, &ddl.query] {
        put_bytes(text.as_bytes(), out);
    }
    out.put_u8(u8::from(ddl.table_info.is_some()));
    if let Some(info) = &ddl.table_info {
        put_table(info, out);
    }
    put_influenced(ddl.blocked.as_ref(), out);
    put_influenced(ddl.dropped.as_ref(), out);
    out.put_u32(u32::try_from(ddl.added.len()).expect("a DDL adds fewer tables"));
    for table in &ddl.added {
        out.put_i64(table.table.0);
        out.put_i64(table.schema.0);
        out.put_u8(u8::from(table.splittable));
    }
    out.put_u32(u32::try_from(ddl.schema_changes.len()).expect("a DDL moves fewer tables"));
    for change in &ddl.schema_changes {
        for id in [change.table.0, change.old.0, change.new.0] {
            out.put_i64(id);
        }
    }
    out.put_u8(u8::from(ddl.not_sync));
    out.put_u8(u8::from(ddl.error.is_some()));
    put_bytes(ddl.error.as_deref().unwrap_or_default().as_bytes(), out);
}

fn get_ddl(r: &mut Reader<'_>) -> Option<DdlEvent> {
    let (commit_ts, start_ts, commit_time) = (Ts(r.u64()?), Ts(r.u64()?), WallTime(r.i64()?));
    let kind = *DDL_KINDS.get(usize::from(r.u8()?))?;
    let (schema_id, table_id) = (SchemaId(r.i64()?), TableId(r.i64()?));
    let (schema, table, query) = (r.text()?.to_owned(), r.text()?.to_owned(), r.text()?.to_owned());
    let table_info = if r.u8()? == 0 { None } else { Some(r.table()?) };
    let (blocked, dropped) = (get_influenced(r)?, get_influenced(r)?);
    let count = r.count(17)?;
    let added = (0..count)
        .map(|_| {
            Some(AddedTable {
                table: TableId(r.i64()?),
                schema: SchemaId(r.i64()?),
                splittable: r.u8()? != 0,
            })
        })
        .collect::<Option<Vec<_>>>()?;
    let count = r.count(24)?;
    let schema_changes = (0..count)
        .map(|_| {
            Some(SchemaChange { table: TableId(r.i64()?), old: SchemaId(r.i64()?), new: SchemaId(r.i64()?) })
        })
        .collect::<Option<Vec<_>>>()?;
    let not_sync = r.u8()? != 0;
    let failed = r.u8()? != 0;
    let error = r.text()?.to_owned();
    Some(DdlEvent {
        commit_ts,
        start_ts,
        commit_time,
        kind,
        schema_id,
        table_id,
        schema,
        table,
        query,
        table_info,
        blocked,
        dropped,
        added,
        schema_changes,
        not_sync,
        error: failed.then_some(error),
    })
}

#[cfg(test)]
mod tests;
