//! The file sink against a real directory: layout, restarts, truncations, and reading back.

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use event::{BlockEvent, DdlEvent, DdlKind, RowBatch, TableInfo, TypeKind};
use heartbeatpb::config::SinkConfig;
use heartbeatpb::{ChangefeedId, DispatcherId, SchemaId, TableId, Ts, WallTime, WritePermit};
use sink::{Error, FileConfig, FileSink, Flushed, Replay, Sink, replay};
use support::{Rows, column, notes, table};
use tokio_util::sync::CancellationToken;

const DISPATCHER: DispatcherId = DispatcherId::new(1, 1);
const FORMATS: [&str; 3] =
    ["protocol=canal-json", "protocol=debezium", "protocol=csv&include-commit-ts=true"];

/// A running sink.
struct Run {
    sink: Arc<FileSink>,
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<Result<(), Error>>,
    flushed: Arc<AtomicUsize>,
}

fn config(dir: &Path, params: &str) -> FileConfig {
    let uri = format!("file://{}?date-separator=none&worker-count=2&{params}", dir.display());
    FileConfig::new(&uri, &SinkConfig::default()).expect("a valid URI")
}

impl Run {
    async fn start(config: FileConfig, feed: &ChangefeedId) -> Self {
        Self::start_permitted(config, feed, WritePermit::always()).await
    }

    async fn start_permitted(config: FileConfig, feed: &ChangefeedId, permit: WritePermit) -> Self {
        let sink = Arc::new(FileSink::open_permitted(config, feed, permit).await.expect("opened"));
        let shutdown = CancellationToken::new();
        let (running, token) = (Arc::clone(&sink), shutdown.clone());
        let task = tokio::spawn(async move { running.run(token).await });
        Self { sink, shutdown, task, flushed: Arc::default() }
    }

    async fn open(&self, shape: &TableInfo, start: u64) {
        self.sink
            .open_dispatcher(DISPATCHER, &heartbeatpb::TableSpan::whole(shape.id), Ts(start))
            .await
            .expect("opened");
        self.sink.open_table(DISPATCHER, shape).await.expect("opened");
    }

    fn write(&self, batch: RowBatch) {
        let flushed = Arc::clone(&self.flushed);
        self.sink.write_rows(
            DISPATCHER,
            batch,
            Flushed::new(move || {
                flushed.fetch_add(1, Ordering::AcqRel);
            }),
        );
    }

    async fn flush(&self) {
        self.sink.flush_before_block(DISPATCHER).await.expect("flushed");
    }

    fn flushed(&self) -> usize {
        self.flushed.load(Ordering::Acquire)
    }

    async fn stop(self) -> Result<(), Error> {
        self.shutdown.cancel();
        self.task.await.expect("no panic")
    }

    /// Publishes a checkpoint, stops, and reads the directory back.
    async fn read_back(self, config: &FileConfig, checkpoint: u64) -> Replay {
        self.sink.publish_checkpoint(Ts(checkpoint), WallTime(0));
        self.stop().await.expect("stopped");
        replay(&config.root, &config.encode, None).expect("readable")
    }
}

async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn feed() -> ChangefeedId {
    ChangefeedId::fresh("files")
}

fn rows(replay: &Replay, name: &str) -> Vec<Vec<String>> {
    let table = &replay.tables[&("app".to_owned(), name.to_owned())];
    let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "NULL".into());
    table.rows.values().map(|row| row.iter().map(text).collect()).collect()
}

/// Names of files below a directory, without temporary ones.
fn files(dir: &Path) -> Vec<String> {
    fn walk(root: &Path, dir: &Path, out: &mut Vec<String>) {
        for entry in std::fs::read_dir(dir).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                walk(root, &path, out);
            } else {
                out.push(path.strip_prefix(root).expect("below").display().to_string());
            }
        }
    }
    let mut out = Vec::new();
    walk(dir, dir, &mut out);
    out.sort();
    out
}

fn data_files(dir: &Path) -> Vec<PathBuf> {
    let data = |name: &String| name.rsplit('/').next().is_some_and(|n| n.starts_with("CDC0"));
    files(dir).into_iter().filter(data).map(|name| dir.join(name)).collect()
}

#[tokio::test]
async fn rows_written_in_every_format_read_back_as_they_were() {
    for format in FORMATS {
        let dir = tempfile::tempdir().expect("a directory");
        let config = config(dir.path(), format);
        let run = Run::start(config.clone(), &feed()).await;
        let shape = notes(1, 10);
        run.open(&shape, 10).await;
        run.write(
            Rows::of(&shape)
                .at(20, 0)
                .insert(&["1", "one"])
                .insert(&["2", "\\N"])
                .insert(&["3", "gone"])
                .at(30, 0)
                .update(None, &["1", "uno,\"\r\n"])
                .update(Some(&["2", "\\U"]), &["4", "\\U"])
                .delete(&["3", "\\U"])
                .at(40, 0)
                .update(None, &["1", "\\U"])
                .at(50, 0)
                .insert(&["9", "behind the checkpoint"])
                .build(),
        );
        run.flush().await;
        assert_eq!(run.flushed(), 1);
        let read = run.read_back(&config, 45).await;
        assert_eq!(read.checkpoint, Ts(45));
        assert_eq!(rows(&read, "notes1"), [["1", "uno,\"\r\n"], ["4", "NULL"]], "{format}");
    }
}

#[tokio::test]
async fn a_moved_key_keeps_a_value_that_was_not_sent() {
    for format in FORMATS {
        let dir = tempfile::tempdir().expect("a directory");
        let config = config(dir.path(), format);
        let run = Run::start(config.clone(), &feed()).await;
        let shape = notes(1, 10);
        run.open(&shape, 10).await;
        let moved = Rows::of(&shape)
            .at(20, 0)
            .insert(&["1", "large"])
            .at(30, 0)
            .update(Some(&["1", "\\U"]), &["7", "\\U"]);
        run.write(moved.build());
        run.flush().await;
        let read = run.read_back(&config, 30).await;
        assert_eq!(rows(&read, "notes1"), [["7", "large"]], "{format}");
    }
}

#[tokio::test]
async fn a_table_without_a_key_keeps_its_duplicates() {
    for format in FORMATS {
        let dir = tempfile::tempdir().expect("a directory");
        let config = config(dir.path(), format);
        let run = Run::start(config.clone(), &feed()).await;
        let shape = table(5, "log", 10, vec![column("line", TypeKind::Text, "text", true)], &[]);
        run.open(&shape, 10).await;
        run.write(
            Rows::of(&shape)
                .at(20, 0)
                .insert(&["a"])
                .insert(&["a"])
                .insert(&["a"])
                .insert(&["b"])
                .at(30, 0)
                .delete(&["a"])
                .update(Some(&["b"]), &["c"])
                .build(),
        );
        run.flush().await;
        let read = run.read_back(&config, 30).await;
        assert_eq!(rows(&read, "log"), [["a"], ["a"], ["c"]], "{format}");
    }
}

#[tokio::test]
async fn the_layout_is_what_consumers_expect() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = config(dir.path(), "protocol=canal-json");
    let run = Run::start(config.clone(), &feed()).await;
    let shape = notes(1, 10);
    run.open(&shape, 10).await;
    run.write(Rows::of(&shape).at(20, 0).insert(&["1", "x"]).build());
    run.flush().await;
    run.write(Rows::of(&shape).at(21, 0).insert(&["2", "y"]).build());
    run.flush().await;
    run.read_back(&config, 21).await;
    let names = files(dir.path());
    let schema = names.iter().find(|name| name.contains("schema_")).expect("a schema file");
    assert!(schema.starts_with("app/notes1/meta/schema_10_") && schema.ends_with(".json"), "{schema}");
    assert_eq!(
        schema.len(),
        "app/notes1/meta/schema_10_0123456789.json".len(),
        "the checksum has ten digits"
    );
    let expected = [
        "app/notes1/10/CDC00000000000000000001.json",
        "app/notes1/10/CDC00000000000000000002.json",
        "app/notes1/10/meta/CDC.index",
        "app/notes1/10/meta/CDC.progress",
        schema,
        "metadata",
    ];
    assert_eq!(names, expected);
    let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).expect("there");
    assert_eq!(read("app/notes1/10/meta/CDC.index"), "CDC00000000000000000002.json\n");
    assert_eq!(read("metadata"), "{\"checkpoint-ts\":21}");
    let text = read(schema);
    assert!(
        text.starts_with("{\n    \"Table\": \"notes1\",\n    \"Schema\": \"app\",\n    \"Version\": 1,\n"),
        "{text}"
    );
    let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(
        (&json["TableVersion"], &json["Type"], &json["TableColumnsTotal"]),
        (&10.into(), &0.into(), &2.into())
    );
    assert_eq!(
        json["TableColumns"][0],
        serde_json::json!({ "ColumnName": "id", "ColumnType": "BIGINT", "ColumnNullable": "false",
            "ColumnIsPk": "true", "ColumnSourceType": "bigint" })
    );
}

#[tokio::test]
async fn dates_and_table_ids_have_their_place_in_the_path() {
    let dir = tempfile::tempdir().expect("a directory");
    let uri = format!(
        "file://{}?protocol=csv&use-table-id-as-path=true&include-commit-ts=true&file-index-digit=6",
        dir.path().display()
    );
    let config = FileConfig::new(&uri, &SinkConfig::default()).expect("valid");
    let run = Run::start(config.clone(), &feed()).await;
    let shape = notes(77, 10);
    run.open(&shape, 10).await;
    run.write(Rows::of(&shape).at(20, 0).insert(&["1", "x"]).build());
    run.flush().await;
    let read = run.read_back(&config, 20).await;
    let data = data_files(dir.path());
    let name = data[0].strip_prefix(dir.path()).expect("below").display().to_string();
    assert!(
        name.starts_with("77/10/20") && name.ends_with("/CDC000001.csv") && name.matches('/').count() == 3,
        "{name}"
    );
    assert_eq!(rows(&read, "notes77"), [["1", "x"]]);
}

#[tokio::test]
async fn a_restart_continues_behind_the_files_and_repeats_nothing() {
    for format in FORMATS {
        let dir = tempfile::tempdir().expect("a directory");
        let config = config(dir.path(), format);
        let (feed, shape) =
            (feed(), table(5, "log", 10, vec![column("line", TypeKind::Text, "text", true)], &[]));
        let batch =
            |last: &str| Rows::of(&shape).at(20, 0).insert(&["a"]).insert(&["a"]).insert(&[last]).build();
        let run = Run::start(config.clone(), &feed).await;
        run.open(&shape, 10).await;
        run.write(Rows::of(&shape).at(20, 0).insert(&["a"]).insert(&["a"]).build());
        run.flush().await;
        run.stop().await.expect("stopped");

        let run = Run::start(config.clone(), &feed).await;
        run.open(&shape, 10).await;
        run.write(batch("b"));
        run.flush().await;
        assert_eq!(run.flushed(), 1);
        let read = run.read_back(&config, 20).await;
        assert_eq!(rows(&read, "log"), [["a"], ["a"], ["b"]], "{format}");
        assert_eq!(read.tables[&("app".into(), "log".into())].duplicates, 0, "nothing was written twice");
        assert_eq!(data_files(dir.path()).len(), 2);
    }
}

#[tokio::test]
// behaviour: dataplane-8
async fn a_file_without_its_index_is_kept_and_continued_behind() {
    for format in FORMATS {
        let dir = tempfile::tempdir().expect("a directory");
        let config = config(dir.path(), format);
        let (feed, shape) = (feed(), notes(1, 10));
        let run = Run::start(config.clone(), &feed).await;
        run.open(&shape, 10).await;
        run.write(Rows::of(&shape).at(20, 0).insert(&["1", "one"]).build());
        run.flush().await;
        run.stop().await.expect("stopped");
        // As if the process had died before it wrote the index file, and had lost the note.
        let meta = dir.path().join("app/notes1/10/meta");
        std::fs::remove_dir_all(&meta).expect("removed");
        let before = std::fs::read(&data_files(dir.path())[0]).expect("there");

        let run = Run::start(config.clone(), &feed).await;
        run.open(&shape, 10).await;
        run.write(Rows::of(&shape).at(20, 0).insert(&["1", "one"]).at(25, 0).delete(&["1", "\\U"]).build());
        run.flush().await;
        let read = run.read_back(&config, 25).await;
        let data = data_files(dir.path());
        assert_eq!(data.len(), 2);
        assert_eq!(std::fs::read(&data[0]).expect("there"), before, "never overwritten");
        assert!(std::fs::read_to_string(meta.join("CDC.index")).expect("there").contains("0002."));
        assert_eq!(rows(&read, "notes1"), Vec::<Vec<String>>::new(), "{format}");
        // A CSV row has no number: a repetition that begins in the same commit cannot be told from its rest.
        let noticed = u64::from(!format.contains("csv"));
        let duplicates = read.tables[&("app".into(), "notes1".into())].duplicates;
        assert_eq!(duplicates, noticed, "repeated, and dropped by the reader");
    }
}

#[tokio::test]
// behaviour: dataplane-8
async fn two_owners_never_write_the_same_file() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = config(dir.path(), "protocol=canal-json");
    let (feed, shape) = (feed(), notes(1, 10));
    let row = |ts: u64, id: &str| Rows::of(&shape).at(ts, 0).insert(&[id, "x"]).build();
    let (old, new) = (Run::start(config.clone(), &feed).await, Run::start(config.clone(), &feed).await);
    old.open(&shape, 10).await;
    old.write(row(20, "1"));
    old.flush().await;
    new.open(&shape, 10).await;
    new.write(row(20, "1"));
    new.write(row(21, "2"));
    new.flush().await;
    // The old owner does not know yet: its next file would have the name of the new owner's.
    old.write(row(21, "2"));
    old.flush().await;
    new.write(row(22, "3"));
    new.flush().await;
    old.stop().await.expect("stopped");
    let read = new.read_back(&config, 22).await;
    assert_eq!(data_files(dir.path()).len(), 4, "every file has its own name");
    assert_eq!(read.tables[&("app".into(), "notes1".into())].duplicates, 1, "written by both");
    assert_eq!(rows(&read, "notes1"), [["1", "x"], ["2", "x"], ["3", "x"]]);
}

#[tokio::test]
// behaviour: dataplane-6
async fn a_truncation_is_a_new_version_and_replays_into_it() {
    for format in FORMATS {
        let dir = tempfile::tempdir().expect("a directory");
        let config = config(dir.path(), format);
        let (feed, shape) = (feed(), notes(1, 10));
        let history = || {
            Rows::of(&shape)
                .at(20, 0)
                .insert(&["1", "before"])
                .at(30, 0)
                .insert(&["2", "same transaction, before"])
                .truncate()
                .insert(&["3", "between"])
                .truncate()
                .insert(&["4", "after"])
                .at(40, 0)
                .insert(&["5", "later"])
        };
        let run = Run::start(config.clone(), &feed).await;
        run.open(&shape, 10).await;
        run.write(history().build());
        run.flush().await;
        run.stop().await.expect("stopped");
        // The same again after a restart from before the truncations, and something new.
        let run = Run::start(config.clone(), &feed).await;
        run.open(&shape, 15).await;
        run.write(history().at(50, 0).insert(&["6", "new"]).build());
        run.flush().await;
        run.stop().await.expect("stopped");
        // And after one from behind them.
        let run = Run::start(config.clone(), &feed).await;
        run.open(&shape, 30).await;
        run.write(Rows::of(&shape).at(60, 0).insert(&["7", "newer"]).build());
        run.flush().await;
        let read = run.read_back(&config, 60).await;
        let ids: Vec<String> = rows(&read, "notes1").into_iter().map(|row| row[0].clone()).collect();
        assert_eq!(ids, ["4", "5", "6", "7"], "{format}");
        let early = replay(&config.root, &config.encode, Some(Ts(25))).expect("readable");
        assert_eq!(rows(&early, "notes1"), [["1", "before"]], "{format}");
        let names = files(dir.path());
        assert!(names.iter().any(|name| name.starts_with("app/notes1/31/")), "{names:?}");
        let schema =
            names.iter().find(|name| name.starts_with("app/notes1/meta/schema_30_")).expect("a schema file");
        let json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(dir.path().join(schema)).expect("there")).expect("JSON");
        assert_eq!(
            (&json["Type"], &json["Query"]),
            (&11.into(), &"TRUNCATE TABLE \"app\".\"notes1\"".into())
        );
    }
}

#[tokio::test]
async fn a_copy_that_starts_again_replaces_what_an_earlier_one_left() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = config(dir.path(), "protocol=canal-json");
    let (feed, shape) = (feed(), notes(1, 10));
    let run = Run::start(config.clone(), &feed).await;
    run.open(&shape, 10).await;
    run.write(
        Rows::of(&shape)
            .at(20, 0)
            .copy_start()
            .insert(&["1", "copied"])
            .insert(&["2", "deleted since"])
            .build(),
    );
    run.flush().await;
    run.stop().await.expect("stopped");
    assert!(!files(dir.path()).iter().any(|name| name.contains("/20/")), "the first copy needs no version");

    let run = Run::start(config.clone(), &feed).await;
    run.open(&shape, 10).await;
    run.write(Rows::of(&shape).at(33, 0).copy_start().insert(&["1", "copied again"]).build());
    run.flush().await;
    let read = run.read_back(&config, 33).await;
    assert_eq!(rows(&read, "notes1"), [["1", "copied again"]]);
}

#[tokio::test]
async fn a_new_shape_is_a_new_version_and_rows_keep_their_columns() {
    for format in FORMATS {
        let dir = tempfile::tempdir().expect("a directory");
        let config = config(dir.path(), format);
        let run = Run::start(config.clone(), &feed()).await;
        let old = notes(1, 10);
        run.open(&old, 10).await;
        run.write(Rows::of(&old).at(20, 0).insert(&["1", "one"]).build());
        let mut columns = old.columns.clone();
        columns.push(column("extra", TypeKind::Int32, "integer", true));
        let new = table(1, "notes1", 30, columns, &[0]);
        run.flush().await;
        let ddl = DdlEvent {
            schema_id: SchemaId(1),
            table_id: TableId(1),
            schema: "app".into(),
            table: "notes1".into(),
            query: "ALTER TABLE app.notes1 ADD COLUMN extra integer".into(),
            table_info: Some(Arc::clone(&new)),
            ..DdlEvent::new(DdlKind::AlterTable, Ts(30))
        };
        run.sink.write_block_event(&BlockEvent::Ddl(Arc::new(ddl))).await.expect("written");
        run.sink.open_table(DISPATCHER, &new).await.expect("opened");
        run.write(
            Rows::of(&new).at(40, 0).insert(&["2", "two", "7"]).update(None, &["1", "\\U", "5"]).build(),
        );
        run.flush().await;
        let read = run.read_back(&config, 40).await;
        assert_eq!(rows(&read, "notes1"), [["1", "one", "5"], ["2", "two", "7"]], "{format}");
        let early = replay(&config.root, &config.encode, Some(Ts(29))).expect("readable");
        assert_eq!(early.tables[&("app".into(), "notes1".into())].rows.len(), 1);
    }
}

#[tokio::test]
async fn files_are_closed_by_size_by_time_and_when_memory_is_short() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut small = config(dir.path(), "protocol=canal-json&file-size=1024&flush-interval=10m");
    let (feed, shape) = (feed(), notes(1, 10));
    let many = |from: u64, to: u64| {
        let one = |batch: Rows, id: u64| batch.at(100 + id, 0).insert(&[&id.to_string(), "some text"]);
        (from..to).fold(Rows::of(&shape), one).build()
    };
    let run = Run::start(small.clone(), &feed).await;
    run.open(&shape, 10).await;
    run.write(many(0, 22));
    until("several files are there", || data_files(dir.path()).len() >= 4).await;
    assert_eq!(run.flushed(), 0, "the last rows still wait");
    for file in data_files(dir.path()) {
        assert!(std::fs::metadata(file).expect("there").len() < 2048, "a file ends soon behind its size");
    }
    run.stop().await.expect("stopped");

    small.flush_interval = Duration::from_millis(100);
    let run = Run::start(small.clone(), &feed).await;
    // What still waited was not told to be durable, so it comes again; what has its file is not repeated.
    run.open(&shape, 110).await;
    run.write(many(11, 23));
    until("the interval is over", || run.flushed() == 1).await;
    run.stop().await.expect("stopped");

    small.flush_interval = Duration::from_secs(600);
    small.file_size = 64 << 20;
    small.buffer_bytes = 4096;
    let run = Run::start(small.clone(), &feed).await;
    run.open(&shape, 122).await;
    run.write(many(23, 80));
    until("memory is freed", || run.flushed() == 1).await;
    let read = run.read_back(&small, 1000).await;
    assert_eq!(rows(&read, "notes1").len(), 80);
    assert_eq!(read.tables[&("app".into(), "notes1".into())].duplicates, 0);
}

#[tokio::test]
async fn a_closed_dispatcher_is_not_told_that_its_rows_are_durable() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = config(dir.path(), "protocol=canal-json&flush-interval=10m");
    let run = Run::start(config.clone(), &feed()).await;
    let shape = notes(1, 10);
    run.open(&shape, 10).await;
    run.write(Rows::of(&shape).at(20, 0).insert(&["1", "x"]).build());
    run.sink.close_dispatcher(DISPATCHER);
    run.open(&shape, 10).await;
    run.flush().await;
    assert_eq!(run.flushed(), 0);
    assert_eq!(data_files(dir.path()).len(), 0);
    run.stop().await.expect("stopped");
}

#[tokio::test]
async fn a_file_where_a_directory_should_be_ends_the_sink_with_a_named_error() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = config(dir.path(), "protocol=canal-json");
    std::fs::write(dir.path().join("app"), b"in the way").expect("written");
    let run = Run::start(config, &feed()).await;
    let shape = notes(1, 10);
    run.sink
        .open_dispatcher(DISPATCHER, &heartbeatpb::TableSpan::whole(shape.id), Ts(10))
        .await
        .expect("opened");
    assert!(run.sink.open_table(DISPATCHER, &shape).await.is_err());
    let error = run.task.await.expect("no panic").expect_err("the sink failed");
    assert_eq!((error.code(), error.is_retryable()), ("CDC:ErrStorageSinkLayout", false), "{error}");
    assert!(!run.sink.healthy());
}

#[tokio::test]
async fn a_changed_schema_file_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = config(dir.path(), "protocol=canal-json");
    let (feed, shape) = (feed(), notes(1, 10));
    let run = Run::start(config.clone(), &feed).await;
    run.open(&shape, 10).await;
    run.stop().await.expect("stopped");
    let name = files(dir.path()).into_iter().find(|name| name.contains("schema_")).expect("a schema file");
    std::fs::write(dir.path().join(name), b"{}").expect("written");
    let run = Run::start(config, &feed).await;
    run.sink
        .open_dispatcher(DISPATCHER, &heartbeatpb::TableSpan::whole(shape.id), Ts(10))
        .await
        .expect("opened");
    assert!(run.sink.open_table(DISPATCHER, &shape).await.is_err());
    let error = run.task.await.expect("no panic").expect_err("the sink failed");
    assert_eq!(error.code(), "CDC:ErrStorageSinkSchemaFile");
}

#[tokio::test]
async fn forgetting_a_changefeed_removes_its_notes_and_no_data() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = config(dir.path(), "protocol=canal-json");
    let run = Run::start(config.clone(), &feed()).await;
    let shape = notes(1, 10);
    run.open(&shape, 10).await;
    run.write(Rows::of(&shape).at(20, 0).insert(&["1", "x"]).build());
    run.flush().await;
    run.sink.forget_changefeed().await.expect("forgotten");
    run.sink.forget_changefeed().await.expect("again");
    let names = files(dir.path());
    assert!(!names.iter().any(|name| name.ends_with("progress")), "{names:?}");
    assert_eq!(data_files(dir.path()).len(), 1);
    run.stop().await.expect("stopped");
}

#[tokio::test]
async fn many_tables_keep_apart() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = config(dir.path(), "protocol=debezium");
    let run = Run::start(config.clone(), &feed()).await;
    let mut expected = BTreeMap::new();
    for id in 1..40i64 {
        let (shape, dispatcher) = (notes(id, 10), DispatcherId::new(7, u64::try_from(id).expect("positive")));
        run.sink
            .open_dispatcher(dispatcher, &heartbeatpb::TableSpan::whole(shape.id), Ts(10))
            .await
            .expect("opened");
        run.sink.open_table(dispatcher, &shape).await.expect("opened");
        let text = format!("of table {id}");
        let batch = Rows::of(&shape).at(20, 0).insert(&["1", &text]).build();
        run.sink.write_rows(dispatcher, batch, Flushed::new(|| {}));
        run.sink.flush_before_block(dispatcher).await.expect("flushed");
        expected.insert(format!("notes{id}"), text);
    }
    let read = run.read_back(&config, 20).await;
    for (name, text) in expected {
        assert_eq!(rows(&read, &name), [["1".to_owned(), text]]);
    }
}

#[tokio::test]
async fn a_checked_directory_is_left_as_it_was() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = config(dir.path(), "protocol=csv");
    assert!(FileSink::check(&config).await.expect("usable").is_empty());
    assert_eq!(files(dir.path()).len(), 0);
    std::fs::write(dir.path().join("metadata"), b"{\"checkpoint-ts\":5}").expect("written");
    assert_eq!(FileSink::check(&config).await.expect("usable").len(), 1, "an earlier output is mentioned");
}

#[tokio::test]
async fn no_file_appears_while_the_process_may_not_write() {
    let dir = tempfile::tempdir().expect("a directory");
    let time = Arc::new(AtomicU64::new(0));
    let clock = Arc::clone(&time);
    let permit = WritePermit::new(move || clock.load(Ordering::SeqCst));
    permit.hold_until(10);
    let config = config(dir.path(), FORMATS[0]);
    let run = Run::start_permitted(config.clone(), &feed(), permit.clone()).await;
    let shape = notes(1, 10);
    run.open(&shape, 10).await;
    let before = files(dir.path());
    time.store(10, Ordering::SeqCst);
    run.write(Rows::of(&shape).at(20, 0).insert(&["1", "a"]).build());
    run.sink.publish_checkpoint(Ts(15), WallTime(0));
    let flushing = {
        let sink = Arc::clone(&run.sink);
        tokio::spawn(async move { sink.flush_before_block(DISPATCHER).await })
    };
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!((files(dir.path()), run.flushed()), (before, 0));
    permit.hold_until(20);
    flushing.await.expect("no panic").expect("flushed");
    assert_eq!(run.flushed(), 1);
    // Its clock stands: the permit holds.
    let read = run.read_back(&config, 20).await;
    assert_eq!(
        (rows(&read, "notes1"), read.checkpoint),
        (vec![vec!["1".to_owned(), "a".to_owned()]], Ts(20))
    );
}
