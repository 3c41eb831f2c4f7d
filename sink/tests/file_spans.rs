//! The file sink with several dispatchers of one table: each has files of its own, and reading them back gives the table.

mod support;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use event::{KeyCodec, Picker, RowBatch, RowOp, TableInfo};
use heartbeatpb::config::SinkConfig;
use heartbeatpb::{ChangefeedId, DispatcherId, TableSpan, Ts, WallTime};
use sink::{FileConfig, FileSink, Flushed, Sink, replay};
use support::{Rows, notes};
use tokio_util::sync::CancellationToken;

const KEYS: u64 = 20;

fn config(dir: &Path, params: &str) -> FileConfig {
    let uri = format!("file://{}?date-separator=none&worker-count=2&file-size=1024&{params}", dir.display());
    FileConfig::new(&uri, &SinkConfig::default()).expect("a valid URI")
}

/// A sequence that looks random and is the same every time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

/// One commit a batch, and the table at the end.
fn history(dice: &mut Dice, table: &Arc<TableInfo>, len: u64) -> (Vec<RowBatch>, BTreeMap<u64, String>) {
    let (mut rows, mut batches, mut next) = (BTreeMap::new(), Vec::new(), 0);
    for n in 0..len {
        let mut batch = Rows::of(table).at(10 + n, 0);
        for _ in 0..1 + dice.roll(4) {
            next += 1;
            let (id, to, value) = (dice.roll(KEYS), dice.roll(KEYS), format!("v{next}"));
            let (id_text, to_text) = (id.to_string(), to.to_string());
            batch = match dice.roll(20) {
                0..8 if rows.insert(id, value.clone()).is_none() => batch.insert(&[&id_text, &value]),
                0..8 => batch.update(None, &[&id_text, &value]),
                8..12 if rows.remove(&id).is_some() => batch.delete(&[&id_text, "\\U"]),
                12..19 if rows.contains_key(&id) && !rows.contains_key(&to) => {
                    rows.remove(&id);
                    rows.insert(to, value.clone());
                    batch.update(Some(&[&id_text, "\\U"]), &[&to_text, &value])
                }
                19 if dice.roll(4) == 0 => {
                    rows.clear();
                    batch.op(RowOp::Truncate, None, None)
                }
                _ => batch,
            };
        }
        batches.push(batch.build());
    }
    (batches, rows)
}

fn span(table: &TableInfo, start: Option<u64>, end: Option<u64>) -> TableSpan {
    let codec = KeyCodec::new(table).expect("divisible");
    let key = |bound: u64| codec.encode_values(&[&bound.to_string()]).expect("a key");
    let bound = |bound: Option<u64>| bound.map(key).unwrap_or_default();
    TableSpan { start: bound(start), end: bound(end), ..TableSpan::whole(table.id) }
}

async fn divide_and_put_together(seed: u64, params: &str) {
    let mut dice = Dice(seed);
    let table = notes(1, 1);
    let (batches, expected) = history(&mut dice, &table, 40);
    let dir = tempfile::tempdir().expect("a directory");
    let config = config(dir.path(), params);
    let feed = ChangefeedId::fresh("parts");
    let sink = Arc::new(FileSink::open(config.clone(), &feed).await.expect("opened"));
    let shutdown = CancellationToken::new();
    let (running, token) = (Arc::clone(&sink), shutdown.clone());
    let task = tokio::spawn(async move { running.run(token).await });
    let codec = KeyCodec::new(&table).expect("divisible");
    let mut checkpoint = 0;
    while checkpoint < batches.len() {
        let mut bounds: Vec<u64> = (0..dice.roll(4)).map(|_| 1 + dice.roll(KEYS - 1)).collect();
        bounds.sort_unstable();
        bounds.dedup();
        let edges: Vec<Option<u64>> =
            [None].into_iter().chain(bounds.into_iter().map(Some)).chain([None]).collect();
        let mut slowest = batches.len();
        for pair in edges.windows(2) {
            let span = span(&table, pair[0], pair[1]);
            let id = DispatcherId::random();
            sink.open_dispatcher(id, &span, Ts(9 + checkpoint as u64)).await.expect("opened");
            sink.open_table(id, &table).await.expect("opened");
            let left = (batches.len() - checkpoint) as u64;
            let end = checkpoint + usize::try_from(1 + dice.roll(left.min(25))).expect("small");
            for batch in &batches[checkpoint..end] {
                let part = batch.within(&codec, &span, &mut Picker::default()).expect("complete");
                part.into_iter().for_each(|part| sink.write_rows(id, part, Flushed::new(|| ())));
            }
            sink.flush_before_block(id).await.expect("flushed");
            sink.close_dispatcher(id);
            slowest = slowest.min(end);
        }
        checkpoint += usize::try_from(1 + dice.roll((slowest - checkpoint) as u64)).expect("small");
    }
    sink.publish_checkpoint(Ts(9 + batches.len() as u64), WallTime(0));
    shutdown.cancel();
    task.await.expect("no panic").expect("stopped");
    let replay = replay(&config.root, &config.encode, None).expect("readable");
    let found = &replay.tables[&("app".to_owned(), "notes1".to_owned())];
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let found: BTreeMap<u64, String> =
        found.rows.values().map(|row| (text(&row[0]).parse().expect("an id"), text(&row[1]))).collect();
    assert_eq!(found, expected, "seed {seed}, {params}");
}

#[tokio::test]
async fn files_of_a_table_that_is_divided_and_put_together_again_and_again_give_the_table() {
    for params in ["protocol=canal-json", "protocol=debezium", "protocol=csv&include-commit-ts=true"] {
        for seed in 1..=4 {
            divide_and_put_together(seed, params).await;
        }
    }
}

#[tokio::test]
async fn parts_of_an_initial_copy_do_not_empty_each_other() {
    let table = notes(1, 1);
    let dir = tempfile::tempdir().expect("a directory");
    let config = config(dir.path(), "protocol=canal-json");
    let sink = Arc::new(FileSink::open(config.clone(), &ChangefeedId::fresh("parts")).await.expect("opened"));
    let shutdown = CancellationToken::new();
    let (running, token) = (Arc::clone(&sink), shutdown.clone());
    let task = tokio::spawn(async move { running.run(token).await });
    let codec = KeyCodec::new(&table).expect("divisible");
    let mut copy = Rows::of(&table).at(20, 0).op(RowOp::CopyStart, None, None);
    for id in ["1", "6", "2", "7"] {
        copy = copy.insert(&[id, "copied"]);
    }
    let copy = copy.build();
    for span in [span(&table, None, Some(5)), span(&table, Some(5), None)] {
        let id = DispatcherId::random();
        sink.open_dispatcher(id, &span, Ts(9)).await.expect("opened");
        sink.open_table(id, &table).await.expect("opened");
        let part = copy.within(&codec, &span, &mut Picker::default()).expect("keys").expect("rows");
        sink.write_rows(id, part, Flushed::new(|| ()));
        sink.flush_before_block(id).await.expect("flushed");
    }
    sink.publish_checkpoint(Ts(20), WallTime(0));
    shutdown.cancel();
    task.await.expect("no panic").expect("stopped");
    let replay = replay(&config.root, &config.encode, None).expect("readable");
    assert_eq!(replay.tables[&("app".to_owned(), "notes1".to_owned())].rows.len(), 4);
}
