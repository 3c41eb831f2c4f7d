//! Whether every key of every table is replicated by exactly one dispatcher.

use heartbeatpb::TableSpan;

use super::feed::Feed;
use super::world::World;

/// What is not covered, or covered twice.
pub(super) fn gap(world: &World, feed: &Feed) -> Option<String> {
    // Dispatchers whose node is fenced go when their node hears of it, and replicate nothing.
    let mut spans: Vec<&TableSpan> = world
        .processes
        .iter()
        .filter(|(node, _)| feed.takes_from(node))
        .flat_map(|(_, process)| process.streams.streams.iter())
        .filter(|((gid, _), _)| *gid == feed.id.gid)
        .map(|(_, stream)| &stream.subscription.span)
        .collect();
    spans.sort();
    let tables = feed.tables.values().filter(|table| table.died.is_none()).map(|table| table.id);
    for table in std::iter::once(0).chain(tables) {
        let mut end: Option<&[u8]> = Some(&[]);
        for span in spans.iter().filter(|span| span.table.0 == table) {
            match end {
                Some(end) if end == span.start.as_slice() => {}
                Some(_) | None => {
                    return Some(format!("table {table} is not covered exactly once at {span:?}"));
                }
            }
            end = (!span.end.is_empty()).then_some(span.end.as_slice());
        }
        if end.is_some() {
            return Some(format!("table {table} is not covered to its end"));
        }
    }
    let dead = spans.iter().find(|span| {
        span.table.0 != 0 && feed.tables.get(&span.table.0).is_none_or(|table| table.died.is_some())
    });
    dead.map(|span| format!("{span:?} is of a table that is gone"))
}
