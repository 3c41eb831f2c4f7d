//! The file sink while its directory cannot be written: it tells so, goes on trying, and has lost nothing when it can.

mod support;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use heartbeatpb::config::SinkConfig;
use heartbeatpb::{ChangefeedId, DispatcherId, TableSpan, Ts, WallTime};
use sink::{Error, FileConfig, FileSink, Flushed, Sink, replay};
use support::{Rows, notes};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Where a small file system is mounted, for the child.
const SMALL: &str = "MILLRACE_TEST_SMALL_DISK";
/// How long a state may take to come.
const PATIENCE: Duration = Duration::from_secs(120);

/// A sink that runs, with a dispatcher of one table.
struct Running {
    config: FileConfig,
    sink: Arc<FileSink>,
    dispatcher: DispatcherId,
    flushed: Arc<AtomicU64>,
    stop: CancellationToken,
    task: JoinHandle<Result<(), Error>>,
}

impl Running {
    async fn at(dir: &Path) -> Self {
        let uri = format!(
            "file://{}?file-size=1024&worker-count=2&flush-interval=2s&protocol=canal-json",
            dir.display()
        );
        let config = FileConfig::new(&uri, &SinkConfig::default()).expect("a valid URI");
        let sink = FileSink::open(config.clone(), &ChangefeedId::fresh("absent")).await.expect("opened");
        let (sink, stop) = (Arc::new(sink), CancellationToken::new());
        let (running, token) = (Arc::clone(&sink), stop.clone());
        let task = tokio::spawn(async move { running.run(token).await });
        let (dispatcher, shape) = (DispatcherId::random(), notes(1, 1));
        sink.open_dispatcher(dispatcher, &TableSpan::whole(shape.id), Ts(1)).await.expect("opened");
        sink.open_table(dispatcher, &shape).await.expect("opened");
        Self { config, sink, dispatcher, flushed: Arc::default(), stop, task }
    }

    /// Inserts rows, each of which is large enough for a file.
    fn write(&self, ids: std::ops::Range<u64>) {
        for id in ids {
            let value = format!("{id} {}", "x".repeat(1024));
            let rows = Rows::of(&notes(1, 1)).at(10 + id, 0).insert(&[&id.to_string(), &value]);
            let flushed = Arc::clone(&self.flushed);
            let done = Flushed::new(move || {
                flushed.fetch_add(1, Ordering::AcqRel);
            });
            self.sink.write_rows(self.dispatcher, rows.build(), done);
        }
    }

    async fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !holds(self) {
            assert!(!self.task.is_finished() && self.sink.healthy(), "it ended: {what}");
            assert!(Instant::now() < deadline, "never came true: {what}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn flushed(&self, rows: u64) {
        self.until(&format!("{rows} rows are durable"), |it| it.flushed.load(Ordering::Acquire) == rows)
            .await;
    }

    fn told(&self) -> String {
        self.sink.trouble().map(|error| error.to_string()).unwrap_or_default()
    }

    /// Everything is there once, and nobody is told anything any more.
    async fn ends_whole(self, rows: u64) {
        self.flushed(rows).await;
        self.sink.publish_checkpoint(Ts(10 + rows), WallTime(0));
        self.until("the trouble is over", |it| it.told().is_empty()).await;
        self.stop.cancel();
        self.task.await.expect("no panic").expect("stopped");
        let replay = replay(&self.config.root, &self.config.encode, None).expect("readable");
        let found = &replay.tables[&("app".to_owned(), "notes1".to_owned())];
        assert_eq!((found.rows.len() as u64, replay.checkpoint), (rows, Ts(10 + rows)));
    }
}

#[tokio::test]
async fn a_directory_that_is_gone_is_told_and_written_again_when_it_is_back() {
    let dir = tempfile::tempdir().expect("a directory");
    let (out, away) = (dir.path().join("out"), dir.path().join("away"));
    let running = Running::at(&out).await;
    running.write(0..5);
    running.flushed(5).await;
    std::fs::rename(&out, &away).expect("moved");
    running.write(5..10);
    running.sink.publish_checkpoint(Ts(12), WallTime(0));
    running.until("people are told", |it| !it.told().is_empty()).await;
    let told = running.told();
    assert!(told.contains("file system is mounted") && told.contains("tried again"), "{told}");
    assert!(!out.exists(), "nothing is written in its place");
    std::fs::rename(&away, &out).expect("moved back");
    running.ends_whole(10).await;
}

#[tokio::test]
async fn a_sink_whose_directory_is_gone_stops_when_it_is_told_to() {
    let dir = tempfile::tempdir().expect("a directory");
    let out = dir.path().join("out");
    let running = Running::at(&out).await;
    std::fs::rename(&out, dir.path().join("away")).expect("moved");
    running.write(0..5);
    running.until("people are told", |it| !it.told().is_empty()).await;
    running.stop.cancel();
    running.task.await.expect("no panic").expect("stopped");
    assert!(!out.exists() && running.flushed.load(Ordering::Acquire) == 0);
}

/// A namespace of its own, in which a file system can be mounted without a privilege.
fn namespace() -> Command {
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount"]);
    command
}

#[test]
fn a_full_disk_is_told_and_written_on_when_there_is_room() {
    if !namespace().arg("true").status().is_ok_and(|status| status.success()) {
        eprintln!("not looked at: this machine lets nobody mount a small file system");
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let program = std::env::current_exe().expect("this test");
    let child = "mount -t tmpfs -o size=512k small \"$1\" && shift && exec \"$@\"";
    let output = namespace()
        .args(["sh", "-c", child, "sh"])
        .arg(dir.path())
        .arg(program)
        .args(["--exact", "child_on_a_small_disk", "--nocapture"])
        .env(SMALL, dir.path())
        .output()
        .expect("it runs");
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("the disk was full"), "{said}");
}

/// The child. Does nothing in an ordinary test run.
#[tokio::test]
async fn child_on_a_small_disk() {
    let Some(dir) = std::env::var_os(SMALL) else { return };
    let ballast = Path::new(&dir).join("ballast");
    let running = Running::at(&Path::new(&dir).join("out")).await;
    running.write(0..5);
    running.flushed(5).await;
    // What is left is less than the rows need.
    std::fs::write(&ballast, vec![1; 400 << 10]).expect("written");
    running.write(5..40);
    running.until("people are told", |it| !it.told().is_empty()).await;
    let told = running.told();
    assert!(told.contains("the disk is full") && told.contains("tried again"), "{told}");
    println!("the disk was full: {told}");
    running.write(40..41);
    std::fs::remove_file(&ballast).expect("removed");
    running.flushed(41).await;
    running.ends_whole(41).await;
}
