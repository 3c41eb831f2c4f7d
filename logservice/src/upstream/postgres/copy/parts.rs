//! How a table is divided for a copy: pure.
//!
//! By key where the primary key's index has the order of [`KeyCodec`] and the rows lie about in that order on disk: then a
//! part reads pages of its own, and a copy that is cut off goes on with the parts that are missing. By pages of the file
//! otherwise, which every table has; such a table begins again when its copy is cut off, since a row may change its page.

use event::{Blocks, CopiedPart, CopyFormat, CopyPart, KeyCodec, KeyForm, TableInfo};

use super::super::catalog::CatalogTable;
use super::super::shape::Shape;
use super::super::sql::{ident, literal};

/// Most parts of a table: what has to be kept about them, here and downstream.
pub(crate) const MOST_PARTS: u64 = 1024;
/// Below it, neighbours in the order of the key lie on different pages.
const IN_ORDER: f64 = 0.5;

/// How large a table is, and in which order its rows lie.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub(crate) struct Facts {
    /// Of its files, out-of-line values included.
    pub(crate) bytes: u64,
    /// Of the file, or of the longest file of a partition.
    pub(crate) pages: u64,
    /// How the pages follow the first column of the primary key, from -1 to 1, if anybody has looked.
    pub(crate) correlation: Option<f64>,
}

/// How a table is divided.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Division {
    /// It is one part.
    Whole,
    /// Into so many key ranges.
    Keys(usize),
    /// Into so many ranges of pages.
    Pages(u64),
}

/// How to divide a table into parts of about `part_bytes`.
pub(crate) fn division(codec: Option<&KeyCodec>, facts: &Facts, part_bytes: u64) -> Division {
    let parts = facts.bytes.div_ceil(part_bytes.max(1)).min(MOST_PARTS);
    if parts < 2 {
        return Division::Whole;
    }
    match codec.filter(|codec| reads_in_order(codec, facts.correlation)) {
        Some(_) => Division::Keys(usize::try_from(parts).unwrap_or(1)),
        None if facts.pages < 2 => Division::Whole,
        None => Division::Pages(parts.min(facts.pages)),
    }
}

fn reads_in_order(codec: &KeyCodec, correlation: Option<f64>) -> bool {
    let ordered = codec.parts().iter().all(|(_, form)| match form {
        KeyForm::Bool
        | KeyForm::Int
        | KeyForm::Numeric
        | KeyForm::Date
        | KeyForm::Time
        | KeyForm::Timestamp
        | KeyForm::TimestampTz
        | KeyForm::Uuid
        | KeyForm::Bytes => true,
        // The index has the order of the column's collation.
        KeyForm::Text | KeyForm::Padded => false,
    });
    let scattered = match (correlation, codec.parts().first()) {
        (Some(correlation), _) => correlation.abs() < IN_ORDER,
        // Numbers and times are mostly given in their order, these are mostly random.
        (None, Some((_, KeyForm::Uuid | KeyForm::Bytes))) => true,
        (None, _) => false,
    };
    ordered && !scattered
}

/// The key ranges that no part covers, in order.
pub(crate) fn gaps(parts: &[CopyPart]) -> Vec<CopyPart> {
    let mut sorted: Vec<&CopyPart> = parts.iter().collect();
    sorted.sort_unstable();
    let (mut gaps, mut open) = (Vec::new(), Some(Vec::new()));
    for part in sorted {
        let Some(from) = &open else { break };
        if part.start > *from {
            gaps.push(CopyPart { start: from.clone(), end: part.start.clone(), blocks: None });
        }
        open = match part.end.is_empty() {
            true => None,
            false => Some(part.end.clone().max(from.clone())),
        };
    }
    gaps.extend(open.map(|start| CopyPart { start, end: Vec::new(), blocks: None }));
    gaps
}

/// Whether parts of one snapshot make a whole table.
pub(crate) fn is_whole(parts: &[CopiedPart]) -> bool {
    let Some(first) = parts.first() else { return false };
    if parts.iter().any(|part| part.at != first.at) {
        return false;
    }
    let all: Vec<CopyPart> = parts.iter().map(|part| part.part.clone()).collect();
    if all.iter().all(|part| part.blocks.is_none()) {
        return gaps(&all).is_empty();
    }
    let mut blocks: Vec<Blocks> = all.iter().filter_map(|part| part.blocks).collect();
    blocks.sort_unstable();
    let end = blocks.iter().try_fold(0, |next, blocks| (blocks.from == next).then_some(blocks.to));
    blocks.len() == all.len() && end == Some(u32::MAX)
}

/// Key ranges, cut at those of the keys that lie inside.
pub(crate) fn cut(ranges: &[CopyPart], keys: &[Vec<u8>]) -> Vec<CopyPart> {
    let mut parts = Vec::new();
    for range in ranges {
        let mut start = range.start.clone();
        let inside = |key: &&Vec<u8>| **key > range.start && (range.end.is_empty() || **key < range.end);
        for key in keys.iter().filter(inside) {
            parts.push(CopyPart {
                start: std::mem::replace(&mut start, key.clone()),
                end: key.clone(),
                blocks: None,
            });
        }
        parts.push(CopyPart { start, end: range.end.clone(), blocks: None });
    }
    parts
}

/// Ranges of pages that leave none out, also none that comes to the file later.
pub(crate) fn pages(pages: u64, parts: u64) -> Vec<CopyPart> {
    let step = pages.div_ceil(parts.max(1)).max(1);
    let block = |page: u64| u32::try_from(page).unwrap_or(u32::MAX);
    let mut ranges: Vec<CopyPart> = (0..pages.max(1).div_ceil(step))
        .map(|part| Blocks { from: block(part * step), to: block((part + 1) * step) })
        .map(|blocks| CopyPart { blocks: Some(blocks), ..CopyPart::default() })
        .collect();
    if let Some(blocks) = ranges.last_mut().and_then(|part| part.blocks.as_mut()) {
        blocks.to = u32::MAX;
    }
    ranges
}

/// The statement that reads a part; `None` when its bounds are no keys of the table.
pub(crate) fn statement(
    table: &CatalogTable,
    shape: &Shape,
    part: &CopyPart,
    format: CopyFormat,
) -> Option<String> {
    let columns = shape.wire_names().map(ident).collect::<Vec<_>>().join(", ");
    let name = table.sql_name();
    let only = if table.partitioned { "" } else { "ONLY " };
    let condition = condition(&table.info, part, table.part.sql_condition())?;
    let what = if condition.is_empty() && !table.partitioned && !columns.is_empty() {
        // Without a query, COPY reads the table itself and not its children.
        format!("{name} ({columns})")
    } else {
        format!("(SELECT {columns} FROM {only}{name} AS t{condition})")
    };
    Some(match format {
        CopyFormat::Text => format!("COPY {what} TO STDOUT"),
        CopyFormat::Binary => format!("COPY {what} TO STDOUT (FORMAT binary)"),
    })
}

/// `wanted`: the condition that every row of the table has to fulfil.
fn condition(info: &TableInfo, part: &CopyPart, wanted: Option<String>) -> Option<String> {
    let mut all: Vec<String> = wanted.into_iter().collect();
    if let Some(Blocks { from, to }) = part.blocks {
        all.push(format!("t.ctid >= '({from},0)'::tid"));
        if to != u32::MAX {
            all.push(format!("t.ctid < '({to},0)'::tid"));
        }
    }
    for (bound, operator) in [(&part.start, ">="), (&part.end, "<")] {
        if bound.is_empty() {
            continue;
        }
        let codec = KeyCodec::new(info)?;
        let (mut columns, mut values) = (Vec::new(), Vec::new());
        for ((column, _), value) in codec.parts().iter().zip(codec.decode(bound)?) {
            let column = &info.columns[*column];
            columns.push(format!("t.{}", ident(&column.name)));
            values.push(format!("{}::{}", literal(&value), column.ty.sql));
        }
        all.push(format!("ROW({}) {operator} ROW({})", columns.join(", "), values.join(", ")));
    }
    Some(if all.is_empty() { String::new() } else { format!(" WHERE {}", all.join(" AND ")) })
}

#[cfg(test)]
mod tests {
    use event::{Column, ColumnType, IdentityKind, ReplicaIdentity, TypeKind, UniqueKey};
    use heartbeatpb::{SchemaId, TableId, Ts};
    use proptest::prelude::*;

    use super::*;

    fn table(kinds: &[(TypeKind, &str)]) -> TableInfo {
        let column = |(at, (kind, sql)): (usize, &(TypeKind, &str))| Column {
            name: format!("k{at}"),
            ty: ColumnType { kind: kind.clone(), sql: (*sql).to_owned(), oid: 0, definitions: Vec::new() },
            nullable: false,
            generated: None,
            identity: IdentityKind::None,
            default: None,
        };
        let columns: Vec<usize> = (0..kinds.len()).collect();
        TableInfo {
            id: TableId(1),
            schema_id: SchemaId(1),
            schema: "s".to_owned(),
            name: "t".to_owned(),
            version: Ts(1),
            columns: kinds.iter().enumerate().map(column).collect(),
            keys: vec![UniqueKey {
                name: "p".to_owned(),
                columns: columns.clone(),
                primary: true,
                nulls_not_distinct: false,
            }],
            identity: ReplicaIdentity::Key(columns),
        }
    }

    fn codec(kind: TypeKind, sql: &str) -> Option<KeyCodec> {
        KeyCodec::new(&table(&[(kind, sql)]))
    }

    fn facts(bytes: u64, correlation: Option<f64>) -> Facts {
        Facts { bytes, pages: bytes / 8192, correlation }
    }

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_table_is_divided_by_key_only_where_a_key_range_lies_together() {
        let (int, uuid, text) =
            (codec(TypeKind::Int32, "integer"), codec(TypeKind::Uuid, "uuid"), codec(TypeKind::Text, "text"));
        let by = |codec: &Option<KeyCodec>, facts: Facts| division(codec.as_ref(), &facts, 64 * MIB);
        assert_eq!(by(&int, facts(64 * MIB, None)), Division::Whole);
        assert_eq!(by(&int, facts(640 * MIB, None)), Division::Keys(10));
        assert_eq!(by(&int, facts(640 * MIB, Some(-0.99))), Division::Keys(10));
        assert_eq!(by(&int, facts(640 * MIB, Some(0.1))), Division::Pages(10));
        assert_eq!(by(&uuid, facts(640 * MIB, None)), Division::Pages(10));
        assert_eq!(by(&uuid, facts(640 * MIB, Some(0.9))), Division::Keys(10));
        assert_eq!(by(&text, facts(640 * MIB, Some(1.0))), Division::Pages(10));
        assert_eq!(by(&None, facts(640 * MIB, None)), Division::Pages(10));
        assert_eq!(by(&int, facts(1 << 50, None)), Division::Keys(1024));
        let outside = Facts { bytes: 640 * MIB, pages: 1, correlation: None };
        assert_eq!(by(&None, outside), Division::Whole, "all is in out-of-line values of one page");
    }

    #[test]
    fn statements_read_exactly_their_part() {
        let info = table(&[(TypeKind::Int64, "bigint"), (TypeKind::Date, "date")]);
        let codec = KeyCodec::new(&info).expect("a key");
        let key = |a: &str, b: &str| codec.encode_values(&[a, b]).expect("encodes");
        let part = CopyPart { start: key("-5", "2020-01-01"), end: key("7", "infinity"), blocks: None };
        assert_eq!(
            condition(&info, &part, None).as_deref(),
            Some(
                r#" WHERE ROW(t."k0", t."k1") >= ROW('-5'::bigint, '2020-01-01'::date) AND ROW(t."k0", t."k1") < ROW('7'::bigint, 'infinity'::date)"#
            )
        );
        assert_eq!(condition(&info, &CopyPart::default(), None).as_deref(), Some(""));
        let first = CopyPart { blocks: Some(Blocks { from: 0, to: 9 }), ..CopyPart::default() };
        assert_eq!(
            condition(&info, &first, None).as_deref(),
            Some(" WHERE t.ctid >= '(0,0)'::tid AND t.ctid < '(9,0)'::tid")
        );
        let last = CopyPart { blocks: Some(Blocks { from: 9, to: u32::MAX }), ..CopyPart::default() };
        assert_eq!(condition(&info, &last, None).as_deref(), Some(" WHERE t.ctid >= '(9,0)'::tid"));
        let wanted = || Some("(a OR b\n)".to_owned());
        assert_eq!(
            condition(&info, &last, wanted()).as_deref(),
            Some(" WHERE (a OR b\n) AND t.ctid >= '(9,0)'::tid")
        );
        assert_eq!(condition(&info, &CopyPart::default(), wanted()).as_deref(), Some(" WHERE (a OR b\n)"));
        let wrong = CopyPart { start: vec![1], ..CopyPart::default() };
        assert_eq!(condition(&info, &wrong, None), None);
    }

    fn contains(part: &CopyPart, key: &[u8]) -> bool {
        key >= part.start.as_slice() && (part.end.is_empty() || key < part.end.as_slice())
    }

    proptest! {
        #[test]
        fn what_is_there_and_what_is_missing_make_a_whole_without_an_overlap(
            bounds in prop::collection::btree_set(1u8..=250, 0..12),
            kept in prop::collection::vec(any::<bool>(), 13),
            keys in prop::collection::btree_set(1u8..=250, 0..12),
        ) {
            let mut edges: Vec<Vec<u8>> = vec![Vec::new()];
            edges.extend(bounds.iter().map(|bound| vec![*bound]));
            edges.push(Vec::new());
            let parts: Vec<CopyPart> = edges
                .windows(2)
                .zip(&kept)
                .filter(|(_, kept)| **kept)
                .map(|(pair, _)| CopyPart { start: pair[0].clone(), end: pair[1].clone(), blocks: None })
                .collect();
            let keys: Vec<Vec<u8>> = keys.iter().map(|key| vec![*key]).collect();
            let missing = cut(&gaps(&parts), &keys);
            for key in 0..=255u8 {
                let of = |parts: &[CopyPart]| parts.iter().filter(|part| contains(part, &[key])).count();
                prop_assert_eq!(of(&parts) + of(&missing), 1, "key {}", key);
            }
            prop_assert!(missing.iter().all(|part| part.end.is_empty() || part.start < part.end));
        }

        #[test]
        fn ranges_of_pages_follow_on_each_other(count in 0u64..5000, parts in 0u64..100) {
            let ranges: Vec<Blocks> = pages(count, parts).iter().filter_map(|part| part.blocks).collect();
            prop_assert!(!ranges.is_empty() && ranges.len() as u64 <= parts.max(1));
            prop_assert_eq!(ranges[0].from, 0);
            prop_assert_eq!(ranges[ranges.len() - 1].to, u32::MAX);
            prop_assert!(ranges.windows(2).all(|pair| pair[0].to == pair[1].from && pair[0].from < pair[0].to));
        }
    }
}
