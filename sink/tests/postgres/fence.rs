//! Fences: nothing that a lost sink had begun reaches the target, and nothing that it begins later.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use event::{BlockEvent, DdlEvent, DdlKind, TableInfo};
use heartbeatpb::{
    ChangefeedId, DispatcherId, Gid, InfluencedTables, MaintainerEpoch, NodeId, TableSpan, Ts, codes,
};
use sink::{Error, FenceRequest, Fenced, Flushed, SinkOptions, Whom};
use testkit::StopMode;

use crate::harness::{Rig, Rows, Running, table, until};

/// Names of the environment by which a child learns what to do.
const CHILD: &str = "MILLRACE_TEST_FENCE_URI";
const CHILD_FEED: &str = "MILLRACE_TEST_FENCE_FEED";

fn notes() -> Arc<TableInfo> {
    Arc::new(table(1, "notes", &[("id", "integer"), ("v", "text")], &[0], &[]))
}

fn epoch(number: u64) -> Option<MaintainerEpoch> {
    MaintainerEpoch::from_wire(number)
}

fn node(name: &str) -> NodeId {
    NodeId::from(name)
}

impl Rig {
    async fn sink_of(&self, name: &str, number: u64, params: &str) -> Result<Running, Error> {
        let options = SinkOptions {
            node: node(name),
            epoch: epoch(number),
            ..SinkOptions::new(self.changefeed.clone(), "unused")
        };
        Running::open_with(&self.uri(params), &options).await
    }

    async fn fence(&self, number: u64, whom: Whom) -> Result<Fenced, Error> {
        self.fence_until(number, number, whom).await
    }

    /// A maintainer that has used further numbers fences.
    async fn fence_until(&self, number: u64, newest: u64, whom: Whom) -> Result<Fenced, Error> {
        let (epoch, newest) = (epoch(number), epoch(newest));
        let request = FenceRequest { changefeed: self.changefeed.clone(), epoch, newest, whom };
        sink::fence(&self.uri(""), &request).await
    }

    async fn fence_node(&self, number: u64, name: &str) -> Fenced {
        self.fence(number, Whom::Nodes([node(name)].into())).await.expect("the target answers")
    }

    /// Registered sinks by node, those that are fenced in brackets.
    async fn writers(&self) -> String {
        let sql = "SELECT CASE WHEN fenced IS NULL THEN node ELSE '(' || node || ')' END FROM millrace.writers ORDER BY 1";
        let rows = self.target.query(sql, &[]).await.expect("select");
        rows.iter().map(|row| row.get(0)).collect::<Vec<String>>().join(" ")
    }

    /// Connections of sinks, by what they do.
    async fn sessions(&self, state: &str) -> i64 {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'millrace' AND state = $1";
        self.target.query_one(sql, &[&state]).await.expect("select").get(0)
    }
}

fn rows(table: &Arc<TableInfo>, from: u64, count: u64, text: &str) -> event::RowBatch {
    let mut batch = Rows::of(table);
    for id in from..from + count {
        batch = batch.insert(100 + id, &[&id.to_string(), text]);
    }
    batch.build()
}

#[tokio::test]
async fn a_fenced_sink_ends_once_by_name_and_writes_nothing_any_more() {
    let rig = Rig::new().await;
    let notes = notes();
    let sink = rig.sink_of("a", 5, "worker-count=4").await.expect("opens");
    sink.table(&notes).await.expect("opens");
    sink.write(rows(&notes, 0, 10, "before"));
    sink.flush().await;
    assert_eq!(rig.writers().await, "a");
    assert_eq!(rig.fence_node(5, "a").await, Fenced::default());
    assert_eq!(rig.writers().await, "", "nothing is left of it");
    for from in (10..200).step_by(10) {
        sink.write(rows(&notes, from, 10, "after"));
    }
    let inner = Arc::clone(&sink.sink);
    let dispatcher = sink.dispatcher;
    let error = sink.error().await;
    assert_eq!(error.code(), codes::SINK_FENCED);
    // It stays so, whatever it is asked.
    inner.write_rows(
        dispatcher,
        rows(&notes, 300, 1, "later"),
        Flushed::new(|| panic!("it was not written")),
    );
    let span = TableSpan::whole(notes.id);
    let opened = inner.open_dispatcher(DispatcherId::random(), &span, Ts(1)).await;
    assert_eq!(opened.expect_err("it may not").code(), codes::SINK_FENCED);
    assert_eq!(rig.target_rows("notes").await.len(), 10);
    assert_eq!(rig.fence_node(5, "a").await, Fenced::default(), "again");
}

#[tokio::test]
async fn a_fenced_node_writes_again_under_a_newer_number_of_the_same_maintainer_only() {
    let rig = Rig::new().await;
    let notes = notes();
    let nodes = || Whom::Nodes([node("a")].into());
    let before = rig.sink_of("a", 5, "").await.expect("opens");
    rig.fence_node(5, "a").await;
    let refused = |result: Result<Running, Error>| result.err().expect("it may not").code();
    assert_eq!(refused(rig.sink_of("a", 5, "").await), codes::SINK_FENCED);
    let again = rig.sink_of("a", 7, "").await.expect("a newer number");
    again.table(&notes).await.expect("opens");
    again.write(rows(&notes, 0, 10, "again"));
    again.flush().await;
    // A fence of before that comes late does not mean it.
    rig.fence_until(5, 5, nodes()).await.expect("the target answers");
    assert_eq!(refused(rig.sink_of("a", 5, "").await), codes::SINK_FENCED);
    again.write(rows(&notes, 10, 10, "and on"));
    again.flush().await;
    assert_eq!(rig.target_rows("notes").await.len(), 20);
    // The node is lost once more.
    assert_eq!(rig.fence_until(5, 7, nodes()).await.expect("the target answers"), Fenced::default());
    again.write(rows(&notes, 20, 1, "too late"));
    assert_eq!(again.error().await.code(), codes::SINK_FENCED);
    for number in [5, 6, 7] {
        assert_eq!(refused(rig.sink_of("a", number, "").await), codes::SINK_FENCED, "{number}");
    }
    let third = rig.sink_of("a", 9, "").await.expect("a newer number");
    // Whoever follows has numbers beyond all of these, and learns who can write.
    let other = rig.sink_of("b", 5, "").await.expect("opens");
    let others = Whom::AllBut([node("b"), node("c")].into());
    let swept = rig.fence(2000, others).await.expect("the target answers");
    assert_eq!(swept, Fenced { busy: BTreeMap::new(), writers: Some([node("b")].into()) });
    assert_eq!(refused(rig.sink_of("a", 1028, "").await), codes::SINK_FENCED);
    assert_eq!(rig.target_rows("notes").await.len(), 20);
    drop((before, third, other));
}

#[tokio::test]
async fn an_idle_fenced_sink_finds_out_when_it_opens_a_table_or_changes_one() {
    let rig = Rig::new().await;
    let notes = notes();
    for what in 0..3 {
        let name = format!("n{what}");
        let sink = rig.sink_of(&name, 5, "").await.expect("opens");
        sink.table(&notes).await.expect("opens");
        rig.fence_node(5, &name).await;
        let error = match what {
            0 => {
                let span = TableSpan::whole(notes.id);
                sink.sink.open_dispatcher(DispatcherId::random(), &span, Ts(1)).await.map(|_| ())
            }
            1 => {
                let other = table(9, "other", &[("id", "integer")], &[0], &[]);
                sink.sink.open_table(sink.dispatcher, &other).await
            }
            _ => sink.sink.write_block_event(&BlockEvent::Ddl(Arc::new(alter(&notes, 500)))).await,
        };
        assert_eq!(error.expect_err("it may not").code(), codes::SINK_FENCED, "{what}");
        assert_eq!(sink.error().await.code(), codes::SINK_FENCED);
    }
    let made: i64 = rig
        .target
        .query_one(
            "SELECT count(*) FROM pg_class WHERE relname = 'other' UNION ALL \
             SELECT count(*) FROM pg_attribute WHERE attrelid = 'notes'::regclass AND attname = 'more' ORDER BY 1 DESC LIMIT 1",
            &[],
        )
        .await
        .expect("select")
        .get(0);
    assert_eq!(made, 0);
}

fn alter(table: &TableInfo, ts: u64) -> DdlEvent {
    let mut after = table.clone();
    after.version = Ts(ts);
    after.columns.push(crate::harness::column("more", "text"));
    DdlEvent {
        table_id: table.id,
        schema_id: table.schema_id,
        schema: table.schema.clone(),
        table: table.name.clone(),
        query: "ALTER TABLE public.notes ADD COLUMN more text".into(),
        table_info: Some(Arc::new(after)),
        blocked: Some(InfluencedTables::Normal(vec![table.id])),
        ..DdlEvent::new(DdlKind::AlterTable, Ts(ts))
    }
}

/// Locks that keep a sink's transaction from going on, as long as `hold` is not ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_waits_in_the_target_is_ended_by_the_fence() {
    let rig = Rig::new().await;
    let notes = notes();
    // Transactions so small that the rows are more than one of them.
    let sink = rig.sink_of("a", 5, "worker-count=4&max-txn-row=20").await.expect("opens");
    sink.table(&notes).await.expect("opens");
    rig.exec("BEGIN; LOCK TABLE notes IN EXCLUSIVE MODE").await;
    sink.write(rows(&notes, 0, 50, "waits"));
    let other = rig.server.client("dst").await.expect("a client");
    until("transactions wait", || async {
        let sql = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'public.notes'::regclass";
        other.query_one(sql, &[]).await.expect("select").get::<_, i64>(0) > 1
    })
    .await;
    let begun = Instant::now();
    let fenced = rig.fence_node(5, "a").await;
    assert_eq!(fenced, Fenced::default());
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    rig.exec("COMMIT").await;
    assert_eq!(sink.error().await.code(), codes::SINK_FENCED);
    rig.expect("notes", &[]).await;
}

/// A process that was stopped in the middle of a transaction keeps its locks, and its kernel its connections.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_is_stopped_in_the_middle_and_wakes_up_later_has_written_nothing_behind_the_fence() {
    let rig = Rig::new().await;
    let notes = notes();
    let feed = rig.changefeed.gid.to_string();
    let mut child = tokio::process::Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "fence::child_writes_until_it_is_fenced", "--nocapture"])
        .env(CHILD, rig.uri("worker-count=4&max-txn-row=20"))
        .env(CHILD_FEED, &feed)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("starts");
    let pid = child.id().expect("runs");
    let signal = |name: &str| {
        let done = std::process::Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status();
        assert!(done.expect("kill runs").success());
    };
    until("the child writes", || async {
        let there = rig.target.query_opt("SELECT FROM pg_class WHERE relname = 'notes'", &[]).await;
        there.expect("select").is_some() && rig.target_rows("notes").await.len() > 200
    })
    .await;
    // Until it is caught with a transaction open, or several.
    until("the child is stopped in the middle of a transaction", || async {
        signal("STOP");
        // What the backends were doing comes to its end.
        until("the target is quiet", || async { rig.sessions("active").await == 0 }).await;
        let open = rig.sessions("idle in transaction").await > 0;
        if !open {
            signal("CONT");
        }
        open
    })
    .await;
    let begun = Instant::now();
    let gone = rig.fence(6, Whom::AllBut([node("b")].into())).await.expect("the target answers");
    assert_eq!(gone.busy, BTreeMap::new());
    assert!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
    let frozen = rig.target_rows("notes").await;
    let successor = rig.sink_of("b", 6, "worker-count=4").await.expect("opens");
    successor.table(&notes).await.expect("opens");
    signal("CONT");
    let mut text = String::new();
    let mut out = child.stdout.take().expect("piped");
    tokio::io::AsyncReadExt::read_to_string(&mut out, &mut text).await.expect("it ends");
    assert!(child.wait().await.expect("it ends").success(), "{text}");
    assert!(text.contains(codes::SINK_FENCED), "{text}");
    assert_eq!(rig.target_rows("notes").await, frozen, "nothing was written after the fence");
    // The successor goes on exactly there, with the progress that was committed.
    for from in (0..20_000).step_by(500) {
        successor.write(rows(&notes, from, 500, "x"));
    }
    successor.flush().await;
    let sum = "SELECT count(*), count(DISTINCT id), max(id) FROM notes";
    let row = rig.target.query_one(sum, &[]).await.expect("select");
    assert_eq!((row.get(0), row.get(1), row.get(2)), (20_000i64, 20_000i64, 19_999));
    successor.stop().await.expect("no error");
    assert_eq!(rig.writers().await, "");
}

/// Does something only when the test above runs it, in a process of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn child_writes_until_it_is_fenced() {
    let (Ok(uri), Ok(gid)) = (std::env::var(CHILD), std::env::var(CHILD_FEED)) else { return };
    let half = |digits: &str| u64::from_str_radix(digits, 16).expect("half of a gid");
    let gid = Gid::new(half(&gid[..16]), half(&gid[16..]));
    let changefeed = ChangefeedId { gid, ..ChangefeedId::fresh("test") };
    let options = SinkOptions { node: node("a"), epoch: epoch(5), ..SinkOptions::new(changefeed, "unused") };
    let sink = Running::open_with(&uri, &options).await.expect("opens");
    let notes = notes();
    sink.table(&notes).await.expect("opens");
    for from in (0..20_000).step_by(500) {
        sink.write(rows(&notes, from, 500, "x"));
    }
    println!("{}", sink.error().await.code());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_nodes_that_write_at_once_are_fenced_and_the_others_go_on() {
    let rig = Rig::new().await;
    let tables: Vec<Arc<TableInfo>> = (1..=4)
        .map(|id| Arc::new(table(id, &format!("t{id}"), &[("id", "integer"), ("v", "text")], &[0], &[])))
        .collect();
    let mut sinks = Vec::new();
    for (n, table) in tables.iter().enumerate() {
        let sink = rig.sink_of(&format!("n{n}"), 5, "worker-count=16&max-txn-row=5").await.expect("opens");
        sink.table(table).await.expect("opens");
        for from in (0..16_000).step_by(200) {
            sink.write(rows(table, from, 200, "x"));
        }
        sinks.push(sink);
    }
    until("all of them write", || async {
        let mut writing = true;
        for table in &tables {
            writing &= !rig.target_rows(&table.name).await.is_empty();
        }
        writing
    })
    .await;
    let lost: BTreeSet<NodeId> = [node("n0"), node("n2")].into();
    assert_eq!(rig.fence(5, Whom::Nodes(lost)).await.expect("the target answers"), Fenced::default());
    let frozen = [rig.target_rows("t1").await, rig.target_rows("t3").await];
    assert!(frozen.iter().all(|rows| rows.len() < 16_000), "the test comes too late");
    let mut left = sinks.into_iter();
    for n in 0..4 {
        let sink = left.next().expect("four");
        if n % 2 == 0 {
            assert_eq!(sink.error().await.code(), codes::SINK_FENCED);
        } else {
            sink.flush().await;
            sink.stop().await.expect("no error");
        }
    }
    assert_eq!([rig.target_rows("t1").await, rig.target_rows("t3").await], frozen);
    assert_eq!([rig.target_rows("t2").await.len(), rig.target_rows("t4").await.len()], [16_000, 16_000]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_sink_of_a_node_takes_the_place_of_the_older_one_and_goes_on_where_it_was() {
    let rig = Rig::new().await;
    let notes = notes();
    let old = rig.sink_of("a", 5, "worker-count=3&max-txn-row=9").await.expect("opens");
    old.table(&notes).await.expect("opens");
    for from in (0..5_000).step_by(100) {
        old.write(rows(&notes, from, 100, "x"));
    }
    until("it writes", || async { rig.target_rows("notes").await.len() > 100 }).await;
    let new = rig.sink_of("a", 5, "worker-count=3").await.expect("opens");
    assert_eq!(rig.writers().await, "a", "one of them");
    let frozen = rig.target_rows("notes").await.len();
    assert_eq!(old.error().await.code(), codes::SINK_FENCED);
    assert_eq!(rig.target_rows("notes").await.len(), frozen);
    new.table(&notes).await.expect("opens");
    for from in (0..5_000).step_by(100) {
        new.write(rows(&notes, from, 100, "x"));
    }
    new.flush().await;
    assert_eq!(rig.target_rows("notes").await.len(), 5_000);
    new.stop().await.expect("no error");
    assert_eq!(rig.writers().await, "");
}

#[tokio::test]
async fn whom_a_changefeed_has_gone_on_without_cannot_register_until_a_newer_maintainer_wants_it() {
    let rig = Rig::new().await;
    let fenced = |result: Result<Running, Error>| match result {
        Ok(_) => panic!("it may not"),
        Err(error) => assert_eq!(error.code(), codes::SINK_FENCED, "{error}"),
    };
    rig.fence(5, Whom::AllBut(BTreeSet::new())).await.expect("the target answers");
    fenced(rig.sink_of("a", 4, "").await);
    let a = rig.sink_of("a", 5, "").await.expect("of the maintainer that fenced");
    rig.fence_node(5, "a").await;
    drop(a);
    fenced(rig.sink_of("a", 5, "").await);
    let b = rig.sink_of("b", 5, "").await.expect("another node");
    let a = rig.sink_of("a", 6, "").await.expect("a newer maintainer wants it");
    assert_eq!(rig.writers().await, "a b");
    // A maintainer that was overtaken fences nobody.
    rig.fence(7, Whom::AllBut([node("a"), node("b")].into())).await.expect("the target answers");
    for whom in [Whom::AllBut(BTreeSet::new()), Whom::Nodes([node("a")].into())] {
        let error = rig.fence(6, whom).await.expect_err("a newer one has fenced");
        assert_eq!(error.code(), codes::SINK_FENCE_SUPERSEDED);
    }
    assert_eq!(rig.writers().await, "a b");
    for sink in [a, b] {
        sink.stop().await.expect("no error");
    }
}

#[tokio::test]
async fn nothing_is_left_of_sinks_that_are_gone_and_of_changefeeds_that_are_deleted() {
    let rig = Rig::new().await;
    let closed = rig.sink_of("a", 5, "").await.expect("opens");
    closed.stop().await.expect("no error");
    assert_eq!(rig.writers().await, "", "an orderly end");
    drop(rig.sink_of("b", 5, "").await.expect("opens"));
    drop(rig.sink_of("c", 5, "").await.expect("opens"));
    let kept = rig.sink_of("d", 5, "").await.expect("opens");
    rig.fence_node(5, "b").await;
    rig.fence(6, Whom::AllBut([node("d")].into())).await.expect("the target answers");
    assert_eq!(rig.writers().await, "d");
    let fences = "SELECT count(*) FROM millrace.fences";
    assert_eq!(rig.target.query_one(fences, &[]).await.expect("select").get::<_, i64>(0), 1);
    kept.sink.forget_changefeed().await.expect("forgets");
    assert_eq!(rig.writers().await, "");
    assert_eq!(rig.target.query_one(fences, &[]).await.expect("select").get::<_, i64>(0), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_restarts_in_the_middle_forgets_no_fence() {
    let mut rig = Rig::new().await;
    let notes = notes();
    let old = rig.sink_of("a", 5, "worker-count=2&max-txn-row=5").await.expect("opens");
    let other = rig.sink_of("b", 5, "worker-count=2&max-txn-row=5").await.expect("opens");
    old.table(&notes).await.expect("opens");
    for from in (0..5_000).step_by(100) {
        old.write(rows(&notes, from, 100, "x"));
    }
    until("it writes", || async { rig.target_rows("notes").await.len() > 50 }).await;
    rig.server.stop(StopMode::Immediate).await.expect("stops");
    let down = rig.fence(5, Whom::Nodes([node("a")].into())).await.expect_err("nothing answers");
    assert_eq!(down.code(), codes::SINK_UNAVAILABLE);
    rig.server.resume().await.expect("starts");
    rig.target = rig.server.client("dst").await.expect("a client");
    rig.fence_node(5, "a").await;
    let frozen = rig.target_rows("notes").await;
    rig.server.restart(StopMode::Immediate).await.expect("restarts");
    rig.target = rig.server.client("dst").await.expect("a client");
    assert_eq!(old.error().await.code(), codes::SINK_FENCED);
    assert_eq!(rig.target_rows("notes").await, frozen);
    other.table(&notes).await.expect("opens");
    for from in (0..5_000).step_by(100) {
        other.write(rows(&notes, from, 100, "x"));
    }
    other.flush().await;
    assert_eq!(rig.target_rows("notes").await.len(), 5_000);
}

#[tokio::test]
async fn a_session_that_may_not_be_ended_is_named() {
    let rig = Rig::new().await;
    rig.exec("CREATE ROLE plain LOGIN PASSWORD 'plain'; CREATE SCHEMA millrace AUTHORIZATION plain; GRANT CREATE ON DATABASE dst TO plain")
        .await;
    let feed = rig.changefeed.clone();
    let uri = rig.server.uri_as("plain", "plain", "dst");
    let uri = format!("{uri}?sslmode=disable&session-replication-role=origin");
    let options =
        SinkOptions { node: node("a"), epoch: epoch(5), ..SinkOptions::new(feed.clone(), "unused") };
    let sink = sink::open(&uri, &options).await.expect("opens");
    // The superuser's session stands for one that the sink's user may not end.
    let row = rig.target.query_one("SELECT incarnation FROM millrace.writers", &[]).await.expect("a row");
    let incarnation: i64 = row.get(0);
    rig.exec(&format!("BEGIN; SELECT pg_advisory_xact_lock_shared({incarnation})")).await;
    let request = FenceRequest {
        changefeed: feed,
        epoch: epoch(5),
        newest: epoch(5),
        whom: Whom::Nodes([node("a")].into()),
    };
    let fenced = sink::fence(&uri, &request).await.expect("the target answers");
    let why = fenced.busy.get(&node("a")).expect("it goes on");
    assert!(why.contains("pg_signal_backend"), "{why}");
    rig.exec("COMMIT").await;
    assert_eq!(sink::fence(&uri, &request).await.expect("the target answers"), Fenced::default());
    drop(sink);
}

#[tokio::test]
async fn files_and_black_holes_have_nothing_to_fence() {
    let changefeed = ChangefeedId::fresh("test");
    for uri in ["file:///nowhere", "blackhole://"] {
        assert!(!sink::has_fence(uri));
        let request = FenceRequest {
            changefeed: changefeed.clone(),
            epoch: epoch(5),
            newest: epoch(5),
            whom: Whom::AllBut(BTreeSet::new()),
        };
        assert_eq!(sink::fence(uri, &request).await.expect("at once"), Fenced::default());
    }
    assert!(sink::has_fence("postgres://u@h/d") && !sink::has_fence("nonsense"));
}
