//! Several dispatchers of one table: divided and put together at any checkpoint, on one node and on two.

use std::collections::BTreeMap;
use std::sync::Arc;

use event::{ColumnType, KeyCodec, Picker, RowBatch, RowOp, TableInfo, TypeKind};
use heartbeatpb::{DispatcherId, TableSpan, Ts};

use crate::harness::{Rig, Rows, Running, table};

const KEYS: u64 = 24;

/// A sequence that looks random and is the same every time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

/// One transaction a batch, with the table after it.
struct History {
    table: Arc<TableInfo>,
    batches: Vec<RowBatch>,
    states: Vec<BTreeMap<u64, String>>,
}

impl History {
    fn new(dice: &mut Dice, len: u64) -> Self {
        let table = Arc::new(table(1, "t", &[("id", "integer"), ("v", "text")], &[0], &[]));
        let (mut rows, mut batches, mut states) = (BTreeMap::new(), Vec::new(), Vec::new());
        let mut next = 0;
        for n in 0..len {
            let ts = 10 + n;
            let mut batch = Rows::of(&table);
            for _ in 0..=dice.roll(4) {
                next += 1;
                let (id, to, value) = (dice.roll(KEYS), dice.roll(KEYS), format!("v{next}"));
                let (id_text, to_text) = (id.to_string(), to.to_string());
                batch = match dice.roll(20) {
                    0..8 if rows.insert(id, value.clone()).is_none() => batch.insert(ts, &[&id_text, &value]),
                    0..8 => batch.update(ts, &[&id_text, &value]),
                    8..12 if rows.remove(&id).is_some() => batch.delete(ts, &[&id_text, "\\U"]),
                    12..19 if rows.contains_key(&id) && !rows.contains_key(&to) => {
                        rows.remove(&id);
                        rows.insert(to, value.clone());
                        batch.update_from(ts, &[&id_text, "\\U"], &[&to_text, &value])
                    }
                    19 if dice.roll(3) == 0 => {
                        rows.clear();
                        batch.op(ts, RowOp::Truncate, None, None)
                    }
                    _ => batch,
                };
            }
            batches.push(batch.build());
            states.push(rows.clone());
        }
        Self { table, batches, states }
    }

    fn span(&self, start: Option<u64>, end: Option<u64>) -> TableSpan {
        let codec = KeyCodec::new(&self.table).expect("divisible");
        let key = |bound: u64| codec.encode_values(&[&bound.to_string()]).expect("a key");
        let bound = |bound: Option<u64>| bound.map(key).unwrap_or_default();
        TableSpan { start: bound(start), end: bound(end), ..TableSpan::whole(self.table.id) }
    }

    /// The transactions of a span after `from` and before `to`.
    fn part(&self, span: &TableSpan, from: usize, to: usize) -> Vec<RowBatch> {
        let codec = KeyCodec::new(&self.table).expect("divisible");
        let mut picker = Picker::default();
        let part = |batch: &RowBatch| match span.is_whole() {
            true => Some(batch.clone()).filter(|batch| batch.row_count() > 0),
            false => batch.within(&codec, span, &mut picker).expect("complete"),
        };
        self.batches[from..to].iter().filter_map(part).collect()
    }
}

async fn opened(sink: &Running, info: &TableInfo, span: &TableSpan, start: u64) -> DispatcherId {
    let id = DispatcherId::random();
    sink.sink.open_dispatcher(id, span, Ts(start)).await.expect("opens");
    sink.sink.open_table(id, info).await.expect("opens");
    id
}

/// Target rows that tell when a change is applied twice: every value that is written is noted, once.
const NOTES: &str = "CREATE TABLE t (id integer PRIMARY KEY, v text); CREATE TABLE notes (v text PRIMARY KEY); \
    CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS \
        'BEGIN INSERT INTO public.notes VALUES (NEW.v); RETURN NEW; END'; \
    CREATE TRIGGER note AFTER INSERT OR UPDATE ON t FOR EACH ROW EXECUTE FUNCTION note(); \
    ALTER TABLE t ENABLE ALWAYS TRIGGER note";

/// Divides the table anew again and again, on two nodes, each time from a checkpoint that is behind what was written.
async fn divide_and_put_together(seed: u64) {
    let mut dice = Dice(seed);
    let history = History::new(&mut dice, 150);
    let rig = Rig::new().await;
    rig.exec(NOTES).await;
    let params = format!("worker-count=4&max-txn-row={}", 1 + dice.roll(5));
    let nodes = [rig.sink(&params).await, rig.sink(&params).await];
    let mut checkpoint = 0;
    let mut before: Vec<(usize, DispatcherId)> = Vec::new();
    while checkpoint < history.batches.len() {
        let mut bounds: Vec<u64> = (0..dice.roll(4)).map(|_| 1 + dice.roll(KEYS - 1)).collect();
        bounds.sort_unstable();
        bounds.dedup();
        let last = dice.roll(4) == 0;
        if last {
            bounds.clear();
        }
        let edges: Vec<Option<u64>> =
            [None].into_iter().chain(bounds.into_iter().map(Some)).chain([None]).collect();
        let mut now = Vec::new();
        let mut ends = Vec::new();
        for pair in edges.windows(2) {
            let span = history.span(pair[0], pair[1]);
            let node = usize::try_from(dice.roll(2)).expect("small");
            let id = opened(&nodes[node], &history.table, &span, 9 + checkpoint as u64).await;
            let left = (history.batches.len() - checkpoint) as u64;
            let end = checkpoint + usize::try_from(1 + dice.roll(left.min(40))).expect("small");
            for batch in history.part(&span, checkpoint, end) {
                nodes[node].write_as(id, batch);
            }
            now.push((node, id));
            ends.push(end);
        }
        // Those before may still be writing: they are the taken-over ones.
        let all_done = dice.roll(2) == 0;
        for (node, id) in before.drain(..) {
            nodes[node].sink.flush_before_block(id).await.expect("healthy");
            nodes[node].sink.close_dispatcher(id);
        }
        if all_done {
            for (node, id) in &now {
                nodes[*node].sink.flush_before_block(*id).await.expect("healthy");
            }
            let slowest = ends.into_iter().min().expect("a dispatcher");
            let step = 1 + dice.roll((slowest - checkpoint) as u64);
            checkpoint += usize::try_from(step).expect("small");
        }
        before = now;
    }
    // At the end everything is written, whoever comes.
    let whole = opened(&nodes[0], &history.table, &TableSpan::whole(history.table.id), 9).await;
    for batch in history.part(&TableSpan::whole(history.table.id), 0, history.batches.len()) {
        nodes[0].write_as(whole, batch);
    }
    for (node, id) in before.into_iter().chain([(0, whole)]) {
        nodes[node].sink.flush_before_block(id).await.expect("healthy");
    }
    let expected: Vec<String> =
        history.states.last().expect("a state").iter().map(|(id, v)| format!("{id}|{v}")).collect();
    let expected: Vec<&str> = expected.iter().map(String::as_str).collect();
    rig.expect("t", &expected).await;
    // What comes next in every queue makes one piece of all that the queue has.
    let mut later = Rows::of(&history.table);
    for id in 1000..1400 {
        later = later.insert(1000, &[&id.to_string(), &format!("later {id}")]);
    }
    nodes[0].write_as(whole, later.build());
    nodes[0].sink.flush_before_block(whole).await.expect("healthy");
    assert_eq!(rig.target_rows("millrace.progress").await.len(), 16, "seed {seed}");
    for node in nodes {
        node.stop().await.expect("no error");
    }
}

// behaviour: dataplane-5
#[tokio::test]
async fn every_change_is_applied_once_however_a_table_is_divided_and_put_together() {
    for seed in 1..=6 {
        divide_and_put_together(seed).await;
    }
}

#[tokio::test]
async fn children_that_begin_behind_their_parent_take_up_its_progress() {
    let rig = Rig::new().await;
    rig.exec(NOTES).await;
    let mut dice = Dice(7);
    let history = History::new(&mut dice, 60);
    let sink = rig.sink("worker-count=4").await;
    let whole = opened(&sink, &history.table, &TableSpan::whole(history.table.id), 9).await;
    for batch in history.part(&TableSpan::whole(history.table.id), 0, 50) {
        sink.write_as(whole, batch);
    }
    sink.sink.flush_before_block(whole).await.expect("healthy");
    sink.sink.close_dispatcher(whole);
    for span in [history.span(None, Some(9)), history.span(Some(9), None)] {
        let child = opened(&sink, &history.table, &span, 9).await;
        for batch in history.part(&span, 0, 60) {
            sink.write_as(child, batch);
        }
        sink.sink.flush_before_block(child).await.expect("nothing is applied twice");
    }
    let expected: Vec<String> = history.states[59].iter().map(|(id, v)| format!("{id}|{v}")).collect();
    rig.expect("t", &expected.iter().map(String::as_str).collect::<Vec<_>>()).await;
}

#[tokio::test]
async fn each_part_of_an_initial_copy_clears_what_an_earlier_copy_left_of_its_keys() {
    let rig = Rig::new().await;
    let info = Arc::new(table(1, "t", &[("id", "integer"), ("v", "text")], &[0], &[]));
    let history = History { table: Arc::clone(&info), batches: Vec::new(), states: Vec::new() };
    let sink = rig.sink("").await;
    let whole = opened(&sink, &info, &TableSpan::whole(info.id), 9).await;
    let mut copy = Rows::of(&info).op(10, RowOp::CopyStart, None, None);
    for id in 0..10 {
        copy = copy.insert(10, &[&id.to_string(), "first"]);
    }
    sink.write_as(whole, copy.build());
    sink.sink.flush_before_block(whole).await.expect("healthy");
    sink.sink.close_dispatcher(whole);
    let spans = [history.span(None, Some(5)), history.span(Some(5), None)];
    let mut dispatchers = Vec::new();
    for (span, ids) in spans.iter().zip([[1u64, 2], [6, 7]]) {
        let id = opened(&sink, &info, span, 9).await;
        let mut copy = Rows::of(&info).op(20, RowOp::CopyStart, None, None);
        for id in ids {
            copy = copy.insert(20, &[&id.to_string(), "second"]);
        }
        sink.write_as(id, copy.build());
        sink.sink.flush_before_block(id).await.expect("healthy");
        dispatchers.push(id);
    }
    rig.expect("t", &["1|second", "2|second", "6|second", "7|second"]).await;
    // Put together in the middle of the copy: what it has is not copied again, and not cleared.
    dispatchers.into_iter().for_each(|id| sink.sink.close_dispatcher(id));
    let whole = opened(&sink, &info, &TableSpan::whole(info.id), 9).await;
    let mut copy = Rows::of(&info).op(20, RowOp::CopyStart, None, None);
    for id in ["1", "2", "8", "6", "7"] {
        copy = copy.insert(20, &[id, "second"]);
    }
    sink.write_as(whole, copy.insert(21, &["9", "later"]).build());
    sink.sink.flush_before_block(whole).await.expect("healthy");
    let rows = rig.target_rows("t").await;
    assert!(rows.contains(&"9|later".to_owned()) && rows.contains(&"1|second".to_owned()), "{rows:?}");
}

fn kind(sql: &str) -> TypeKind {
    match sql {
        "smallint" => TypeKind::Int16,
        "integer" => TypeKind::Int32,
        "bigint" | "oid" => TypeKind::Int64,
        "numeric" => TypeKind::Numeric { precision: None, scale: 0 },
        "boolean" => TypeKind::Bool,
        "date" => TypeKind::Date,
        "time" => TypeKind::Time,
        "timestamp" => TypeKind::Timestamp,
        "timestamptz" => TypeKind::TimestampTz,
        "uuid" => TypeKind::Uuid,
        "bytea" => TypeKind::Bytes,
        "character(4)" => TypeKind::Char(Some(4)),
        "bit varying" => TypeKind::Bit(None),
        _ => TypeKind::Text,
    }
}

#[tokio::test]
async fn a_truncation_of_a_part_removes_its_keys_of_every_type_and_no_other() {
    let uuid = |c: &str| format!("{}-0000-0000-0000-000000000000", c.repeat(8));
    let (low, middle, high) = (uuid("0"), uuid("8"), uuid("f"));
    // Keys, the third of which is the bound.
    let cases: &[(&[&str], &[&[&str]])] = &[
        (&["smallint"], &[&["-5"], &["-1"], &["3"], &["4"]]),
        (&["oid"], &[&["1"], &["2"], &["3000000000"], &["4000000000"]]),
        (&["numeric"], &[&["-Infinity"], &["-0.5"], &["1.50"], &["2"], &["NaN"]]),
        (&["boolean"], &[&["f"], &["f"], &["t"]]),
        (&["date"], &[&["-infinity"], &["0044-03-15 BC"], &["2024-02-29"], &["2024-03-01"], &["infinity"]]),
        (&["time"], &[&["00:00:00"], &["10:00:00"], &["10:00:00.000001"], &["24:00:00"]]),
        (
            &["timestamp"],
            &[
                &["0044-03-15 10:00:00 BC"],
                &["1969-01-01 00:00:00"],
                &["2024-01-01 00:00:00.5"],
                &["infinity"],
            ],
        ),
        (
            &["timestamptz"],
            &[
                &["-infinity"],
                &["2024-01-01 00:00:00+00"],
                &["2024-01-01 00:00:00.1+00"],
                &["2025-01-01 00:00:00+00"],
            ],
        ),
        (&["uuid"], &[&[&low], &[&low], &[&middle], &[&high]]),
        (&["bytea"], &[&["\\x"], &["\\x00"], &["\\x0001"], &["\\x0100"], &["\\xff"]]),
        (&["text"], &[&["A"], &["B"], &["a"], &["a b"], &["ä"]]),
        (&["character(4)"], &[&["A   "], &["a   "], &["b   "], &["b  c"]]),
        (&["bit varying"], &[&["0"], &["01"], &["1"], &["10"]]),
        (&["integer", "text"], &[&["1", "z"], &["2", "a"], &["2", "m"], &["2", "z"], &["3", ""]]),
    ];
    let rig = Rig::new().await;
    let sink = rig.sink("").await;
    for (number, (types, keys)) in cases.iter().enumerate() {
        let name = format!("t{number}");
        let columns: Vec<(String, &str)> =
            types.iter().enumerate().map(|(i, sql)| (format!("k{i}"), *sql)).collect();
        let columns: Vec<(&str, &str)> = columns.iter().map(|(name, sql)| (name.as_str(), *sql)).collect();
        let all: Vec<usize> = (0..types.len()).collect();
        let mut info = table(100 + i64::try_from(number).expect("small"), &name, &columns, &all, &[]);
        for (column, sql) in info.columns.iter_mut().zip(types.iter()) {
            column.ty = ColumnType { kind: kind(sql), ..column.ty.clone() };
        }
        let info = Arc::new(info);
        let codec = KeyCodec::new(&info).expect("divisible");
        let bound = codec.encode_values(keys[2]).expect("a key");
        let whole = opened(&sink, &info, &TableSpan::whole(info.id), 1).await;
        let mut rows = Rows::of(&info);
        for key in keys.iter() {
            rows = rows.insert(10, key);
        }
        sink.write_as(whole, rows.build());
        sink.sink.flush_before_block(whole).await.expect("healthy");
        sink.sink.close_dispatcher(whole);
        let part = TableSpan { start: bound.clone(), ..TableSpan::whole(info.id) };
        let high = opened(&sink, &info, &part, 1).await;
        sink.write_as(high, Rows::of(&info).op(20, RowOp::Truncate, None, None).build());
        sink.sink.flush_before_block(high).await.expect("healthy");
        let mut left: Vec<&str> = Vec::new();
        let joined: Vec<String> = keys.iter().map(|key| key.join("|")).collect();
        for (key, text) in keys.iter().zip(&joined) {
            if codec.encode_values(key).expect("a key") < bound && !left.contains(&text.as_str()) {
                left.push(text);
            }
        }
        rig.expect(&name, &left).await;
        assert!(!left.is_empty(), "{types:?}");
    }
}
