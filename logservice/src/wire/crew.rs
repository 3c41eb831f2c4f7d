//! Byte forms of orders to write parts of a copy, and of the reports about them.

use bytes::{BufMut, Bytes};
use event::{Blocks, CopyFormat, CopyPart, CopyRight};
use heartbeatpb::{Ts, WallTime};

use super::{Reader, put_bytes, put_changefeed, put_table};
use crate::crew::{CopyOrder, CopyReport, OrderId, OrderState};

/// Type number of [`CopyOrder`].
pub(crate) const COPY_ORDER: i32 = 1002;
/// Type number of [`CopyReport`].
pub(crate) const COPY_REPORT: i32 = 1003;

fn put_id(id: OrderId, out: &mut Vec<u8>) {
    out.put_u64(id.run);
    out.put_u64(id.number);
}

fn get_id(r: &mut Reader<'_>) -> Option<OrderId> {
    Some(OrderId { run: r.u64()?, number: r.u64()? })
}

fn put_part(part: &CopyPart, out: &mut Vec<u8>) {
    put_bytes(&part.start, out);
    put_bytes(&part.end, out);
    out.put_u8(u8::from(part.blocks.is_some()));
    let Blocks { from, to } = part.blocks.unwrap_or(Blocks { from: 0, to: 0 });
    out.put_u32(from);
    out.put_u32(to);
}

fn get_part(r: &mut Reader<'_>) -> Option<CopyPart> {
    let (start, end) = (r.bytes()?.to_vec(), r.bytes()?.to_vec());
    let is_of_pages = r.u8()? != 0;
    let blocks = Blocks { from: r.u32()?, to: r.u32()? };
    Some(CopyPart { start, end, blocks: is_of_pages.then_some(blocks) })
}

pub(crate) fn put_order(order: &CopyOrder, out: &mut Vec<u8>) {
    put_changefeed(&order.changefeed, out);
    put_id(order.id, out);
    put_bytes(&order.feed, out);
    out.put_i64(order.right.0);
    put_table(&order.table, out);
    put_part(&order.part, out);
    out.put_u8(u8::from(order.format == CopyFormat::Binary));
    out.put_u64(order.at.0);
    out.put_i64(order.time.0);
    for text in [&order.snapshot, &order.application, &order.statement] {
        put_bytes(text.as_bytes(), out);
    }
}

pub(crate) fn get_order(bytes: &[u8]) -> Option<CopyOrder> {
    let mut r = Reader(bytes);
    let order = CopyOrder {
        changefeed: r.changefeed()?,
        id: get_id(&mut r)?,
        feed: Bytes::copy_from_slice(r.bytes()?),
        right: CopyRight(r.i64()?),
        table: r.table()?,
        part: get_part(&mut r)?,
        format: if r.u8()? == 0 { CopyFormat::Text } else { CopyFormat::Binary },
        at: Ts(r.u64()?),
        time: WallTime(r.i64()?),
        snapshot: r.text()?.to_owned(),
        application: r.text()?.to_owned(),
        statement: r.text()?.to_owned(),
    };
    r.finish(order)
}

pub(crate) fn put_report(report: &CopyReport, out: &mut Vec<u8>) {
    put_id(report.id, out);
    match &report.state {
        OrderState::Running => out.put_u8(1),
        OrderState::Written { rows, bytes } => {
            out.put_u8(2);
            out.put_u64(*rows);
            out.put_u64(*bytes);
        }
        OrderState::Failed { code, message } => {
            out.put_u8(3);
            put_bytes(code.as_bytes(), out);
            put_bytes(message.as_bytes(), out);
        }
    }
}

pub(crate) fn get_report(bytes: &[u8]) -> Option<CopyReport> {
    let mut r = Reader(bytes);
    let id = get_id(&mut r)?;
    let state = match r.u8()? {
        1 => OrderState::Running,
        2 => OrderState::Written { rows: r.u64()?, bytes: r.u64()? },
        3 => OrderState::Failed { code: r.text()?.to_owned(), message: r.text()?.to_owned() },
        _ => return None,
    };
    r.finish(CopyReport { id, state })
}
