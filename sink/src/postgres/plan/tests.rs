//! Plans of hand-made changes, printed as one line per statement.

use std::sync::Arc;

use event::{Column, RowBatch};

use super::*;
use crate::postgres::route::Routing;
use crate::postgres::target::{Compare, TargetColumn};
use crate::testing::{BatchBuilder, key, table};

struct Held(RowBatch);
impl Holds for Held {
    fn batch(&self) -> &RowBatch {
        &self.0
    }
}

fn target(change: impl FnOnce(&mut TableInfo)) -> Target {
    let mut info = (*table(1, 3)).clone();
    change(&mut info);
    let info = Arc::new(info);
    let routing = Routing::new(&info);
    let column = |(source, column): (usize, &Column)| TargetColumn {
        source,
        name: format!("\"{}\"", column.name),
        cast: if source == 0 { "integer".into() } else { "text".into() },
        identity_always: false,
        equals: "=".into(),
        compare: if source == 0 { Compare::Equals } else { Compare::Text },
    };
    let key = match &routing.locate {
        Locate::Key(columns) => columns.clone(),
        Locate::FullRow => Vec::new(),
    };
    Target {
        name: "\"public\".\"t1\"".into(),
        columns: info.columns.iter().enumerate().map(column).collect(),
        key,
        deferrable: false,
        truncatable: true,
        partitioned: false,
        texts: Texts::default(),
        routing,
        info,
    }
}

fn show(target: &Target, batch: BatchBuilder, mode: Mode) -> Vec<String> {
    show_with(target, batch, mode, Leave { copy: true, update: false })
}

/// The plan for a table whose rows are known to be there.
fn show_updating(target: &Target, batch: BatchBuilder, mode: Mode) -> Vec<String> {
    show_with(target, batch, mode, Leave { copy: true, update: true })
}

fn show_with(target: &Target, batch: BatchBuilder, mode: Mode, leave: Leave) -> Vec<String> {
    let held = Arc::new(Held(batch.build()));
    let changes: Vec<Change<Held>> =
        held.0.iter().map(|row| target.routing.route(&held, &row, false, &mut Vec::new()).1).collect();
    let groups = plan(target, &changes, mode, leave).expect("plans");
    let name = |group: &Group<'_, Held>| match &group.kind {
        Kind::Copy => "copy".to_owned(),
        Kind::Insert => "insert".to_owned(),
        Kind::Upsert => "upsert".to_owned(),
        Kind::Delete => "delete".to_owned(),
        Kind::Update(set) => {
            format!("update {}", set.iter().map(|set| if *set { 'x' } else { '-' }).collect::<String>())
        }
    };
    groups
        .iter()
        .map(|group| {
            let rows: Vec<String> = group.changes().map(|change| change.at.row_number.to_string()).collect();
            format!("{}: {}", name(group), rows.join(" "))
        })
        .collect()
}

const KEY: [&str; 3] = ["1", "\\U", "\\U"];

#[test]
fn changes_of_different_rows_share_statements_by_kind() {
    let t = target(|_| {});
    let batch = BatchBuilder::new(&t.info)
        .insert(5, &["1", "a", "b"])
        .op(5, RowOp::Delete, Some(&["2", "\\U", "\\U"]), None)
        .op(5, RowOp::Update, None, Some(&["3", "x", "y"]))
        .op(5, RowOp::Update, None, Some(&["4", "x", "\\U"]))
        .op(5, RowOp::Delete, Some(&["5", "\\U", "\\U"]), None)
        .op(5, RowOp::Update, None, Some(&["6", "z", "\\U"]));
    assert_eq!(show(&t, batch, Mode::Batched), ["upsert: 0 2", "delete: 1 4", "update -x-: 3 5"]);
}

#[test]
fn the_last_change_of_a_row_replaces_those_it_makes_superfluous() {
    let t = target(|_| {});
    let batch = BatchBuilder::new(&t.info)
        .insert(5, &["1", "a", "b"])
        .op(5, RowOp::Update, None, Some(&["1", "c", "d"]))
        .op(5, RowOp::Update, None, Some(&["1", "e", "f"]));
    assert_eq!(show(&t, batch, Mode::Batched), ["upsert: 2"]);
    let batch = BatchBuilder::new(&t.info)
        .insert(5, &["1", "a", "b"])
        .op(5, RowOp::Delete, Some(&KEY), None)
        .insert(5, &["2", "a", "b"]);
    assert_eq!(show(&t, batch, Mode::Batched), ["upsert: 2", "delete: 1"]);
}

#[test]
fn whole_rows_that_are_there_are_updated_and_those_that_come_are_inserted_as_they_become() {
    let t = target(|_| {});
    let batch = || {
        BatchBuilder::new(&t.info)
            .insert(5, &["1", "a", "b"])
            .op(5, RowOp::Update, None, Some(&["2", "c", "d"]))
            .op(5, RowOp::Update, None, Some(&["3", "c", "\\U"]))
            .op(5, RowOp::Update, None, Some(&["1", "e", "f"]))
            .op(5, RowOp::Update, None, Some(&["3", "g", "h"]))
            .op(5, RowOp::Update, None, Some(&["2", "i", "j"]))
            .op(5, RowOp::Update, Some(&["4", "\\U", "\\U"]), Some(&["5", "b", "c"]))
    };
    let updating = ["upsert: 3", "update -xx: 5", "update -xx: 4", "update xxx: 6"];
    assert_eq!(show_updating(&t, batch(), Mode::Batched), updating, "never before what they replace");
    assert_eq!(show(&t, batch(), Mode::Batched), ["upsert: 3 5", "upsert: 4", "update xxx: 6"]);
    assert!(show_updating(&t, batch(), Mode::Singles).contains(&"upsert: 5".to_owned()), "not by update");
}

#[test]
fn a_deleted_row_that_comes_again_is_inserted_and_then_updated_in_place() {
    let t = target(|_| {});
    let batch = BatchBuilder::new(&t.info)
        .op(5, RowOp::Update, None, Some(&["1", "a", "b"]))
        .op(5, RowOp::Delete, Some(&KEY), None)
        .insert(5, &["1", "c", "d"])
        .op(5, RowOp::Update, None, Some(&["1", "e", "f"]));
    assert_eq!(show_updating(&t, batch, Mode::Batched), ["upsert: 3"]);
}

#[test]
fn where_the_order_is_kept_whole_rows_share_one_kind_of_statement() {
    let t = target(|t| t.keys.push(key(&[1], false)));
    let batch = BatchBuilder::new(&t.info)
        .insert(5, &["1", "a", "b"])
        .op(5, RowOp::Update, None, Some(&["2", "c", "b"]))
        .insert(5, &["3", "d", "b"]);
    assert_eq!(show_updating(&t, batch, Mode::Batched), ["upsert: 0 1 2"]);
}

#[test]
fn a_partial_update_waits_for_the_row_it_completes() {
    let t = target(|_| {});
    let batch = BatchBuilder::new(&t.info)
        .insert(5, &["1", "a", "b"])
        .op(5, RowOp::Update, None, Some(&["1", "c", "\\U"]))
        .op(5, RowOp::Update, None, Some(&["1", "d", "\\U"]))
        .op(5, RowOp::Update, None, Some(&["1", "\\U", "e"]));
    assert_eq!(show(&t, batch, Mode::Batched), ["upsert: 0", "update -x-: 2", "update --x: 3"]);
}

#[test]
fn a_change_of_the_key_is_ordered_with_both_rows() {
    let t = target(|_| {});
    let batch = BatchBuilder::new(&t.info)
        .op(5, RowOp::Delete, Some(&["2", "\\U", "\\U"]), None)
        .op(5, RowOp::Update, Some(&KEY), Some(&["2", "b", "c"]))
        .insert(5, &["1", "n", "n"])
        .op(5, RowOp::Delete, Some(&["2", "\\U", "\\U"]), None);
    assert_eq!(show(&t, batch, Mode::Batched), ["delete: 0", "update xxx: 1", "upsert: 2", "delete: 3"]);
}

#[test]
fn with_other_unique_keys_only_neighbours_share() {
    let t = target(|t| t.keys.push(key(&[1], false)));
    let batch = BatchBuilder::new(&t.info)
        .insert(5, &["1", "a", "b"])
        .insert(5, &["2", "b", "b"])
        .op(5, RowOp::Delete, Some(&KEY), None)
        .insert(5, &["3", "a", "b"])
        .op(5, RowOp::Update, None, Some(&["3", "c", "b"]));
    assert_eq!(show(&t, batch, Mode::Batched), ["upsert: 0 1", "delete: 2", "upsert: 3", "upsert: 4"]);
}

#[test]
fn rows_without_a_key_are_found_one_at_a_time() {
    let t = target(|t| {
        t.keys.clear();
        t.identity = event::ReplicaIdentity::Full;
    });
    let row = ["1", "a", "b"];
    let batch = BatchBuilder::new(&t.info)
        .insert(5, &row)
        .insert(5, &row)
        .op(5, RowOp::Delete, Some(&row), None)
        .op(5, RowOp::Delete, Some(&row), None);
    assert_eq!(show(&t, batch, Mode::Batched), ["insert: 0 1", "delete: 2", "delete: 3"]);
}

#[test]
fn single_statements_keep_every_change() {
    let t = target(|_| {});
    let batch = BatchBuilder::new(&t.info).insert(5, &["1", "a", "b"]).op(
        5,
        RowOp::Update,
        None,
        Some(&["1", "c", "d"]),
    );
    assert_eq!(show(&t, batch, Mode::Singles), ["upsert: 0", "upsert: 1"]);
}

#[test]
fn an_incomplete_insert_and_a_delete_without_its_key_are_refused() {
    let t = target(|_| {});
    for batch in [
        BatchBuilder::new(&t.info).insert(5, &["1", "\\U", "b"]),
        BatchBuilder::new(&t.info).op(5, RowOp::Delete, Some(&["\\U", "a", "b"]), None),
        BatchBuilder::new(&t.info).op(5, RowOp::Delete, None, None),
    ] {
        let held = Arc::new(Held(batch.build()));
        let row = held.0.iter().next().expect("a row");
        let (_, change) = t.routing.route(&held, &row, false, &mut Vec::new());
        let error = plan(&t, [&change], Mode::Batched, Leave { copy: true, update: false })
            .map(|_| ())
            .expect_err("refused");
        assert_eq!(error.code(), "CDC:ErrSinkRowIncomplete");
    }
}

#[test]
fn statements_cast_text_to_the_types_of_the_target() {
    let t = target(|_| {});
    assert_eq!(
        sql(&t, &Kind::Upsert, Source::Params),
        "INSERT INTO \"public\".\"t1\" (\"c0\", \"c1\", \"c2\") OVERRIDING SYSTEM VALUE SELECT u.c0::integer, u.c1, u.c2 \
         FROM unnest($1::text[], $2::text[], $3::text[]) AS u(c0, c1, c2) ON CONFLICT (\"c0\") DO UPDATE SET \
         \"c1\" = EXCLUDED.\"c1\", \"c2\" = EXCLUDED.\"c2\""
    );
    assert_eq!(
        sql(&t, &Kind::Update([false, true, false].into()), Source::Params),
        "UPDATE \"public\".\"t1\" AS t SET \"c1\" = u.n1 FROM unnest($1::text[], $2::text[]) AS u(k0, n1) \
         WHERE t.\"c0\" = u.k0::integer"
    );
    assert_eq!(
        sql(&t, &Kind::Delete, Source::Params),
        "DELETE FROM \"public\".\"t1\" AS t USING unnest($1::text[]) AS u(k0) WHERE t.\"c0\" = u.k0::integer"
    );
}
