//! The file sink is killed while it writes; every file is complete, and reading back gives a prefix.

mod support;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use heartbeatpb::config::SinkConfig;
use heartbeatpb::{ChangefeedId, DispatcherId, Gid, Ts};
use sink::{FileConfig, FileSink, Flushed, Sink, replay};
use support::{Rows, notes};
use tokio_util::sync::CancellationToken;

const DIR: &str = "MILLRACE_TEST_CRASH_DIR";
const PARAMS: &str = "MILLRACE_TEST_CRASH_PARAMS";
const BATCH: u64 = 10;

fn config(dir: &Path, params: &str) -> FileConfig {
    let uri = format!("file://{}?file-size=2048&worker-count=1&{params}", dir.display());
    FileConfig::new(&uri, &SinkConfig::default()).expect("a valid URI")
}

/// Commit `n` inserts row `n`, deletes row `n - 5`, and changes the key of row `n - 3`.
fn commit(rows: Rows, n: u64) -> Rows {
    let id = |n: u64| n.to_string();
    let mut rows = rows.at(1000 + n * 8, 0).insert(&[&id(n), "inserted"]);
    if n > 5 {
        rows = rows.delete(&[&id(n - 5), "\\U"]);
    }
    if n > 3 && n.is_multiple_of(7) {
        rows = rows.update(Some(&[&id(n - 3), "\\U"]), &[&id(1_000_000 + n), "\\U"]);
    }
    rows
}

fn expected(up_to: u64) -> Vec<u64> {
    let mut rows = std::collections::BTreeSet::new();
    for n in 1..=up_to {
        rows.insert(n);
        if n > 5 {
            rows.remove(&(n - 5));
        }
        if n > 3 && n.is_multiple_of(7) && rows.remove(&(n - 3)) {
            rows.insert(1_000_000 + n);
        }
    }
    rows.into_iter().collect()
}

/// The child: writes from the checkpoint on until it is killed. Does nothing in an ordinary test run.
#[tokio::test]
async fn child_writes_until_it_is_killed() {
    let (Some(dir), Ok(params)) = (std::env::var_os(DIR), std::env::var(PARAMS)) else { return };
    let config = config(Path::new(&dir), &params);
    let mut feed = ChangefeedId::fresh("crash");
    feed.gid = Gid::new(1, 1);
    let start =
        replay(&config.root, &config.encode, None).map_or(1000, |replay| replay.checkpoint.0.max(1000));
    let sink = Arc::new(FileSink::open(config, &feed).await.expect("opened"));
    let running = Arc::clone(&sink);
    let task = tokio::spawn(async move { running.run(CancellationToken::new()).await });
    let (shape, dispatcher) = (notes(1, 1000), DispatcherId::random());
    sink.open_dispatcher(dispatcher, &heartbeatpb::TableSpan::whole(shape.id), Ts(start))
        .await
        .expect("opened");
    sink.open_table(dispatcher, &shape).await.expect("opened");
    let flushed = Arc::new(AtomicU64::new(start));
    let mut n = (start - 1000) / 8 + 1;
    while !task.is_finished() {
        let batch = (n..n + BATCH).fold(Rows::of(&shape), commit).build();
        n += BATCH;
        let (done, last) = (Arc::clone(&flushed), 1000 + (n - 1) * 8);
        sink.write_rows(
            dispatcher,
            batch,
            Flushed::new(move || {
                done.fetch_max(last, Ordering::AcqRel);
            }),
        );
        // Waits for the disk now and then, so that the queue stays short.
        if n % 100 == 1 {
            sink.flush_before_block(dispatcher).await.expect("flushed");
        }
        tell(Path::new(&dir), flushed.load(Ordering::Acquire));
    }
}

/// Publishes what the sink reported as durable, at once and for a reader: the sink would wait two seconds.
fn tell(dir: &Path, checkpoint: u64) {
    let temporary = dir.join(".metadata.tmp");
    std::fs::write(&temporary, format!("{{\"checkpoint-ts\":{checkpoint}}}")).expect("written");
    std::fs::rename(&temporary, dir.join("metadata")).expect("renamed");
}

fn told(dir: &Path) -> Ts {
    let text = std::fs::read_to_string(dir.join("metadata")).unwrap_or_default();
    Ts(text.trim_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or_default())
}

fn spawn(dir: &Path, params: &str) -> Child {
    Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "child_writes_until_it_is_killed", "--nocapture"])
        .env(DIR, dir)
        .env(PARAMS, params)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("started")
}

fn data_files(dir: &Path) -> usize {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    entries
        .filter_map(Result::ok)
        .map(|entry| match entry.path() {
            path if path.is_dir() => data_files(&path),
            path => {
                usize::from(path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("CDC0")))
            }
        })
        .sum()
}

#[test]
// behaviour: dataplane-2
// behaviour: dataplane-8
fn a_killed_writer_leaves_complete_files_and_its_successor_loses_and_repeats_nothing() {
    for params in [
        "protocol=canal-json",
        "protocol=debezium",
        "protocol=csv&include-commit-ts=true&output-old-value=true",
    ] {
        let dir = tempfile::tempdir().expect("a directory");
        let config = config(dir.path(), params);
        let mut checkpoint = Ts(1000);
        for round in 0..4usize {
            let before = data_files(dir.path());
            let mut child = spawn(dir.path(), params);
            let deadline = Instant::now() + Duration::from_secs(60);
            // Killed at another moment in each round.
            while data_files(dir.path()) < before + 20 + round * 3 || told(dir.path()) <= checkpoint {
                assert!(Instant::now() < deadline, "the child writes nothing");
                assert!(child.try_wait().expect("asked").is_none(), "the child ended by itself");
                std::thread::sleep(Duration::from_millis(1));
            }
            child.kill().expect("killed");
            child.wait().expect("gone");
            let read = replay(&config.root, &config.encode, None).expect("every file is complete");
            assert!(read.checkpoint > checkpoint, "{params}, round {round}: nothing became durable");
            checkpoint = read.checkpoint;
            let table = &read.tables[&("app".to_owned(), "notes1".to_owned())];
            let mut ids: Vec<u64> = table
                .rows
                .values()
                .map(|row| row[0].as_deref().expect("a key").parse().expect("a number"))
                .collect();
            ids.sort_unstable();
            assert_eq!(ids, expected((read.checkpoint.0 - 1000) / 8), "{params}, round {round}");
            assert!(table.rows.values().all(|row| row[1].as_deref() == Some("inserted")));
            assert_eq!(table.duplicates, 0, "{params}: a successor writes nothing twice");
        }
    }
}
