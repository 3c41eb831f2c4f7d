//! Which node has which span of the tables that are read here, as their dispatchers have said when they came.

use std::collections::BTreeMap;

use heartbeatpb::{DispatcherId, NodeId, TableId, TableSpan};
use parking_lot::Mutex;

/// The dispatchers of a table.
type Spans = BTreeMap<DispatcherId, (TableSpan, NodeId)>;

/// Written by the event service, read by a copy.
#[derive(Debug, Default)]
pub(crate) struct Owners {
    spans: Mutex<BTreeMap<TableId, Spans>>,
}

impl Owners {
    pub(crate) fn add(&self, dispatcher: DispatcherId, span: &TableSpan, node: &NodeId) {
        let mut spans = self.spans.lock();
        spans.entry(span.table).or_default().insert(dispatcher, (span.clone(), node.clone()));
    }

    pub(crate) fn remove(&self, table: TableId, dispatcher: DispatcherId) {
        let mut spans = self.spans.lock();
        if let Some(of_table) = spans.get_mut(&table) {
            of_table.remove(&dispatcher);
            if of_table.is_empty() {
                spans.remove(&table);
            }
        }
    }

    /// Who has a key of a table.
    pub(crate) fn of(&self, table: TableId, key: &[u8]) -> Option<NodeId> {
        let spans = self.spans.lock();
        let (_, node) = spans.get(&table)?.values().find(|(span, _)| span.contains_key(key))?;
        Some(node.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_belongs_to_whom_its_span_belongs() {
        let (owners, table) = (Owners::default(), TableId(7));
        let span = |start: &[u8], end: &[u8]| TableSpan {
            start: start.to_vec(),
            end: end.to_vec(),
            ..TableSpan::whole(table)
        };
        let (one, two) = (DispatcherId::new(1, 1), DispatcherId::new(1, 2));
        assert_eq!(owners.of(table, b""), None);
        owners.add(one, &span(b"", b"m"), &"a".into());
        owners.add(two, &span(b"m", b""), &"b".into());
        let of = |key: &[u8]| owners.of(table, key).map(|node| node.to_string());
        assert_eq!((of(b""), of(b"k"), of(b"m")), (Some("a".into()), Some("a".into()), Some("b".into())));
        // It has moved.
        owners.add(two, &span(b"m", b""), &"c".into());
        assert_eq!(of(b"z"), Some("c".into()));
        owners.remove(table, one);
        assert_eq!((of(b"k"), of(b"z")), (None, Some("c".into())));
        owners.remove(table, two);
        owners.remove(table, two);
        assert_eq!(of(b"z"), None);
    }
}
