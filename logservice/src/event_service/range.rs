//! Dispatchers of a part of a table: which rows are theirs, and whether all parts of a table are read.

use std::sync::Arc;

use event::{KeyCodec, KeyError, Picker, RowBatch, TableInfo};
use heartbeatpb::TableSpan;

use crate::Error;

/// Picks the rows of one key range.
#[derive(Default)]
pub(super) struct RangeFilter {
    /// The last shape, with its keys.
    shape: Option<(Arc<TableInfo>, KeyCodec)>,
    picker: Picker,
}

impl RangeFilter {
    /// The rows of `batch` whose keys lie in `span`; `None` when there are none.
    ///
    /// # Errors
    /// When the table cannot be divided, or a row of it.
    pub(super) fn pick(&mut self, span: &TableSpan, batch: &RowBatch) -> Result<Option<RowBatch>, Error> {
        let table = &batch.table;
        let known = self.shape.take().filter(|(shape, _)| Arc::ptr_eq(shape, table) || **shape == **table);
        let codec = match known {
            Some((_, codec)) => codec,
            None => KeyCodec::new(table).ok_or_else(|| Error::indivisible(table, None))?,
        };
        let (_, codec) = self.shape.insert((Arc::clone(table), codec));
        batch.within(codec, span, &mut self.picker).map_err(|error| match error {
            KeyError::Incomplete => Error::SplitRowIncomplete { table: full_name(table) },
            KeyError::Missing | KeyError::Malformed { .. } => Error::indivisible(table, Some(error)),
        })
    }
}

fn full_name(table: &TableInfo) -> String {
    format!("{}.{}", table.schema, table.name)
}

impl Error {
    fn indivisible(table: &TableInfo, source: Option<KeyError>) -> Self {
        Error::TableIndivisible { table: full_name(table), source }
    }
}

/// Whether key ranges of one table leave no key out.
pub(super) fn cover<'a>(spans: impl IntoIterator<Item = &'a TableSpan>) -> bool {
    let mut spans: Vec<&TableSpan> = spans.into_iter().collect();
    if spans.iter().any(|span| span.is_whole()) {
        return true;
    }
    spans.sort_unstable_by(|one, other| one.start.cmp(&other.start));
    let mut end: &[u8] = &[];
    for (at, span) in spans.iter().enumerate() {
        if (at == 0 && !span.start.is_empty()) || span.start.as_slice() > end {
            return false;
        }
        if span.end.is_empty() {
            return true;
        }
        end = end.max(&span.end);
    }
    false
}

#[cfg(test)]
mod tests {
    use heartbeatpb::TableId;

    use super::*;

    fn covered(spans: &[(&str, &str)]) -> bool {
        let span = |(start, end): &(&str, &str)| TableSpan {
            start: start.as_bytes().to_vec(),
            end: end.as_bytes().to_vec(),
            ..TableSpan::whole(TableId(1))
        };
        cover(&spans.iter().map(span).collect::<Vec<_>>())
    }

    #[test]
    fn ranges_cover_a_table_when_no_key_is_left_out() {
        assert!(covered(&[("", "")]));
        assert!(covered(&[("m", ""), ("", "m")]));
        assert!(covered(&[("", "m"), ("g", "t"), ("t", "")]));
        assert!(covered(&[("", "t"), ("g", "m"), ("t", "")]), "one lies in another");
        for gap in [&[][..], &[("", "m")], &[("m", "")], &[("", "g"), ("m", "")], &[("", "g"), ("g", "m")]] {
            assert!(!covered(gap), "{gap:?}");
        }
    }
}
