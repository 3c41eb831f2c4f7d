//! What a node tells about itself: metrics over HTTP, health, status, and a log without secrets.

use std::collections::BTreeMap;
use std::path::Path;

use http_body_util::{BodyExt, Empty};
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};
use testkit::{PgServer, StopMode};

use crate::common::{TARGET, eventually, same, servers, start, state};

/// One scrape, parsed.
#[derive(Default)]
struct Scrape {
    /// Type of each family.
    kinds: BTreeMap<String, String>,
    /// Families that have words.
    helped: Vec<String>,
    /// Samples by name and labels, as they were written.
    samples: BTreeMap<(String, String), f64>,
}

/// Fetches and parses; every line must be what the text format allows.
async fn scrape(address: std::net::SocketAddr) -> Scrape {
    let client: HttpClient<_, Empty<bytes::Bytes>> = HttpClient::builder(TokioExecutor::new()).build_http();
    let answer = client.get(format!("http://{address}/metrics").parse().unwrap()).await.unwrap();
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.headers()["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    let bytes = answer.into_body().collect().await.unwrap().to_bytes();
    let text = std::str::from_utf8(&bytes).unwrap();
    let mut scrape = Scrape::default();
    for line in text.lines().filter(|line| !line.is_empty()) {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, words) = rest.split_once(' ').unwrap();
            assert!(!words.is_empty(), "{line}");
            scrape.helped.push(name.to_owned());
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert!(scrape.kinds.insert(name.to_owned(), kind.to_owned()).is_none(), "twice: {line}");
        } else {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
            assert!(labels.ends_with('}'), "{line}");
            let value: f64 = value.parse().unwrap();
            let family = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
            let known = scrape.kinds.contains_key(name)
                || family.is_some_and(|name| scrape.kinds.get(name).is_some_and(|kind| kind == "histogram"));
            assert!(known, "a sample without a type: {line}");
            let old =
                scrape.samples.insert((name.to_owned(), labels.trim_end_matches('}').to_owned()), value);
            assert!(old.is_none(), "twice: {line}");
        }
    }
    scrape
}

impl Scrape {
    /// Values of the series of a name whose labels contain all of these.
    fn values(&self, name: &str, labels: &[&str]) -> Vec<f64> {
        self.samples
            .iter()
            .filter(|((series, has), _)| series == name && labels.iter().all(|label| has.contains(label)))
            .map(|(_, value)| *value)
            .collect()
    }

    fn sum(&self, name: &str, labels: &[&str]) -> f64 {
        self.values(name, labels).iter().sum()
    }

    fn one(&self, name: &str, labels: &[&str]) -> f64 {
        let values = self.values(name, labels);
        assert_eq!(values.len(), 1, "{name} {labels:?}: {values:?}");
        values[0]
    }
}

/// Metrics of the page that need what this test does not do, and which test shows them.
const ELSEWHERE: &[&str] = &[
    // `an_error_is_a_series_while_it_lasts`, below.
    "ticdc_owner_changefeed_error_info",
    // The unit tests of the crates' metrics.
    "ticdc_coordinator_drain_remaining",
    "ticdc_maintainer_checkpoint_stalled_seconds",
    "ticdc_maintainer_stale_message_count",
    // `node/tests/verify`.
    "ticdc_verify_",
    // The bus's own tests.
    "ticdc_messaging_slow_handle_counter",
    // Of a lease of etcd: that of the built-in store lasts. `node/tests/cluster/lease.rs`.
    "ticdc_metastore_lease_remaining_seconds",
    // The tests with Prometheus, whose nodes are two and have log files.
    "ticdc_messaging_stream_gauge",
    "ticdc_logger_file_size_bytes",
    "ticdc_logger_total_size_bytes",
    "ticdc_logger_disk_",
];

/// Name and type of every metric of the page.
fn documented() -> Vec<(String, String)> {
    let page =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md")).unwrap();
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.map(|row| {
        let (name, rest) = row.split_once('`').unwrap();
        (name.to_owned(), rest.split('|').nth(1).unwrap().trim().to_owned())
    })
    .collect()
}

// The recorder is shared by the tests of this process: the name tells this changefeed from theirs.
const FEED: &str = "changefeed=\"observed\"";

// behaviour: metrics-2
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_metric_of_the_page_is_there_and_means_what_it_says() {
    let (source, target) = servers().await;
    source
        .sql("postgres", "CREATE TABLE a (id int PRIMARY KEY, v text); CREATE TABLE b (id int PRIMARY KEY)")
        .await
        .unwrap();
    source.sql("postgres", "INSERT INTO a SELECT g, 'v' FROM generate_series(1, 500) g").await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    let body = json!({ "changefeed_id": "observed", "sink_uri": target.uri(TARGET), "upstream": { "uri": source.uri("postgres") } });
    client.post("/api/v2/changefeeds", &body).await.unwrap();
    // Schema changes, and files.
    let files =
        format!("file://{}?protocol=canal-json&flush-interval=200ms", dir.path().join("files").display());
    let changing = json!({ "changefeed_id": "changing", "sink_uri": files,
        "upstream": { "uri": "generator://bank?rate=200&accounts=10&tables=2&ddl-every=20&ddl=all" } });
    client.post("/api/v2/changefeeds", &changing).await.unwrap();
    same(&source, &target, "a").await;
    let changes = "INSERT INTO b SELECT generate_series(1, 300); UPDATE a SET v = 'w' WHERE id <= 200; DELETE FROM b WHERE id > 250";
    source.sql("postgres", changes).await.unwrap();
    same(&source, &target, "a").await;
    same(&source, &target, "b").await;
    // The collectors look every five seconds, and some of them not every time.
    let address = node.address();
    eventually("the owner has looked", async || {
        let scrape = scrape(address).await;
        scrape.values("ticdc_owner_checkpoint_ts_lag", &[FEED]).len() == 1
            && scrape.sum("ticdc_sink_dml_event_count", &[FEED]) >= 1050.0
            && scrape.sum("ticdc_sink_cloud_storage_ddl_flush_dml_duration_seconds_count", &[]) > 0.0
            && scrape.sum("ticdc_event_store_subscription_data_gc_lag_count", &[]) > 0.0
            && scrape.sum("ticdc_ddl_execution", &["changefeed=\"changing\""]) > 0.0
            && scrape.sum("ticdc_ddl_handle_duration_count", &["changefeed=\"changing\""]) > 0.0
    })
    .await;
    let first = scrape(address).await;

    let mut missing = Vec::new();
    for (name, kind) in documented() {
        if ELSEWHERE.iter().any(|start| name.starts_with(start)) {
            continue;
        }
        match first.kinds.get(&name) {
            None => missing.push(name),
            Some(found) => {
                assert_eq!(*found, kind, "{name}");
                assert!(first.helped.contains(&name), "{name} has no words");
            }
        }
    }
    assert_eq!(missing, [] as [String; 0]);
    for (name, kind) in [
        ("process_cpu_seconds_total", "counter"),
        ("process_start_time_seconds", "gauge"),
        ("process_open_fds", "gauge"),
        ("go_goroutines", "gauge"),
    ] {
        assert_eq!(first.kinds[name], kind);
        assert!(first.one(name, &[]) > 0.0, "{name}");
    }
    assert!(first.one("process_resident_memory_bytes", &[]) > 1e6);
    assert_eq!(first.sum("ticdc_server_build_info", &["ticdc_arch=\"newarch\""]), 1.0);
    // Every row once: 500 copied, 300 inserted, 200 updated, 50 deleted.
    let rows = first.sum("ticdc_sink_dml_event_count", &[FEED]);
    assert!((1050.0..=1050.0).contains(&rows), "{rows}");
    let affected = |kind: &str| {
        first.sum("ticdc_sink_dml_event_affected_row_count", &[FEED, kind, "row_type=\"total\""])
    };
    assert!(affected("count_type=\"actual\"") >= 550.0);
    // A row that came and went within one batch is deleted in vain.
    assert!(affected("count_type=\"actual\"") <= affected("count_type=\"expected\""));
    assert_eq!(first.one("ticdc_owner_status", &[FEED]), 0.0);
    assert_eq!(first.one("ticdc_scheduler_table_count", &[FEED]), 2.0);
    assert_eq!(first.one("ticdc_changefeed_maintainer_counter", &[FEED]), 1.0);
    assert_eq!(first.one("ticdc_dispatchermanager_table_dispatcher_count", &[FEED]), 2.0);
    assert_eq!(first.one("ticdc_owner_changefeed_downstream_info", &[FEED]), 1.0);
    for lag in [
        "ticdc_owner_checkpoint_ts_lag",
        "ticdc_maintainer_checkpoint_ts_lag",
        "ticdc_maintainer_resolved_ts_lag",
        "ticdc_dispatchermanager_checkpoint_ts_lag",
    ] {
        let seconds = first.one(lag, &[FEED]);
        assert!((0.0..15.0).contains(&seconds), "{lag}: {seconds}");
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    for ts in ["ticdc_owner_checkpoint_ts", "ticdc_maintainer_checkpoint_ts"] {
        let behind = now - first.one(ts, &[FEED]) / 1000.0;
        assert!((-1.0..20.0).contains(&behind), "{ts}: {behind}");
    }
    // What counts bytes and rows has room for them below the last bound.
    for name in ["ticdc_sink_batch_row_count_bucket", "ticdc_sink_batch_write_bytes_bucket"] {
        let bounds = first.values(name, &[FEED]).len();
        assert_eq!(bounds, 19, "{name}");
    }

    client.post("/api/v2/changefeeds/observed/pause", &json!({})).await.unwrap();
    eventually("the status is told", async || {
        scrape(address).await.values("ticdc_owner_status", &[FEED]) == [3.0]
    })
    .await;
    let paused = scrape(address).await;
    assert_eq!(
        paused.values("ticdc_owner_checkpoint_ts_lag", &[FEED]),
        [] as [f64; 0],
        "a lag of what stands is no news"
    );
    assert_eq!(paused.sum("ticdc_dispatchermanager_table_dispatcher_count", &[FEED]), 0.0);
    client.post("/api/v2/changefeeds/observed/resume", &json!({})).await.unwrap();
    source.sql("postgres", "INSERT INTO a VALUES (1000, 'x')").await.unwrap();
    same(&source, &target, "a").await;
    let second = scrape(address).await;
    for ((name, labels), value) in &first.samples {
        // What counts for a changefeed begins anew with it.
        if labels.contains("changefeed=") || labels.contains("area=") {
            continue;
        }
        let family = name
            .strip_suffix("_bucket")
            .or(name.strip_suffix("_count"))
            .filter(|family| first.kinds.contains_key(*family));
        let grows = first
            .kinds
            .get(name)
            .or(first.kinds.get(family.unwrap_or(name)))
            .is_some_and(|kind| kind != "gauge");
        let after = second.samples.get(&(name.clone(), labels.clone()));
        assert!(
            !grows || after.is_some_and(|after| after >= value),
            "{name}{{{labels}}} went from {value} to {after:?}"
        );
    }
    assert!(second.sum("ticdc_sink_dml_event_count", &[FEED]) >= 1.0);

    client.delete("/api/v2/changefeeds/observed").await.unwrap();
    let mut left = Vec::new();
    eventually("nothing tells of the changefeed any more", async || {
        let scrape = scrape(address).await;
        let ours = |labels: &str| {
            labels.contains(FEED) || labels.contains("area=\"observed\"") || labels.contains("/observed\"")
        };
        // What people did to it is history.
        let told = |(name, labels): &(String, String)| {
            ours(labels) && name != "ticdc_owner_changefeed_operation_time"
        };
        left = scrape.samples.into_keys().filter(told).collect();
        left.is_empty()
    })
    .await;
    assert_eq!(left, [] as [(String, String); 0]);
    node.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_error_is_a_series_while_it_lasts() {
    let (source, target) = servers().await;
    source.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)").await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    // The name tells this changefeed from those of tests that share the recorder.
    let body = json!({ "changefeed_id": "ailing", "sink_uri": target.uri(TARGET), "upstream": { "uri": source.uri("postgres") } });
    client.post("/api/v2/changefeeds", &body).await.unwrap();
    same(&source, &target, "t").await;
    target.stop(StopMode::Fast).await.unwrap();
    source.sql("postgres", "INSERT INTO t VALUES (1)").await.unwrap();
    let series = async || {
        scrape(node.address()).await.values(
            "ticdc_owner_changefeed_error_info",
            &["changefeed=\"ailing\"", "code=\"CDC:ErrSinkUnavailable\""],
        )
    };
    eventually("the error is a series", async || series().await == [1.0]).await;
    target.resume().await.unwrap();
    eventually("it is over", async || series().await.is_empty()).await;
    same(&source, &target, "t").await;
    node.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_tells_that_it_lives_is_ready_and_who_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    for path in ["/livez", "/readyz"] {
        // They answer in words.
        let told = client.get(path).await.unwrap_err().to_string();
        assert!(told.contains("not JSON with status 200"), "{path}: {told}");
    }
    assert_eq!(client.get("/api/v2/health").await.unwrap(), json!({}));
    let status = client.get("/api/v2/status").await.unwrap();
    assert_eq!(
        status,
        json!({
            "version": concat!("v", env!("CARGO_PKG_VERSION")), "git_hash": status["git_hash"], "id": status["id"],
            "cluster_id": "default", "pid": std::process::id(), "is_owner": true, "liveness": 0,
            "uptime_seconds": status["uptime_seconds"],
        })
    );
    assert!(status["uptime_seconds"].as_u64().unwrap() < 300);
    assert_eq!(client.get("/status").await.unwrap()["id"], status["id"]);
    let captures = client.get("/api/v2/captures").await.unwrap();
    let me = json!({ "id": status["id"], "is_owner": true, "address": node.address().to_string(), "cluster_id": "default" });
    assert_eq!(captures, json!({ "total": 1, "items": [me] }));
    assert_eq!(client.get("/api/v2/processors").await.unwrap(), json!({ "total": 0, "items": [] }));
    node.stop().await.unwrap();
    assert!(client.get("/livez").await.is_err());
}

/// A word of a password and words of rows that nothing may repeat.
const CANARIES: [&str; 4] = ["canary-password", "canary-value", "canary-key", "canary-bad"];

// behaviour: metrics-9
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_of_a_process_at_its_loudest_has_neither_passwords_nor_values() {
    let (source, target) = servers().await;
    let login = "CREATE ROLE canary SUPERUSER LOGIN PASSWORD 'canary-password'";
    let make = "CREATE TABLE t (id text PRIMARY KEY, v text, n int, big text); ALTER TABLE t ALTER big SET STORAGE EXTERNAL; \
        INSERT INTO t VALUES ('canary-key 1', 'canary-value 1', 1, repeat('canary-value', 1000))";
    source.sql("postgres", &format!("{login}; {make}")).await.unwrap();
    target.sql("postgres", login).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_millrace"))
        .args(["server", "--log-level", "trace", "--addr", &format!("127.0.0.1:{port}"), "--data-dir"])
        .arg(dir.path().join("data"))
        .stdout(std::process::Stdio::null())
        .stderr(std::fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let client = node::cli::Client::new(&format!("http://127.0.0.1:{port}")).unwrap();
    eventually("the process is ready", async || client.get("/api/v2/health").await.is_ok()).await;
    let as_canary = |server: &PgServer, database: &str| server.uri_as("canary", "canary-password", database);
    let feed = |name: &str, from: String, to: String| json!({ "changefeed_id": name, "sink_uri": to, "upstream": { "uri": from } });
    let wrong = as_canary(&source, "absent");
    for (from, to) in [
        (wrong.clone(), "blackhole://".to_owned()),
        (as_canary(&source, "postgres"), wrong),
        ("postgres://u:canary-password@127.0.0.1:1/d".to_owned(), "x://canary-password".to_owned()),
    ] {
        assert!(client.post("/api/v2/changefeeds", &feed("wrong", from, to)).await.is_err());
    }
    client
        .post("/api/v2/changefeeds", &feed("f", as_canary(&source, "postgres"), as_canary(&target, TARGET)))
        .await
        .unwrap();
    same(&source, &target, "t").await;
    let changes = "INSERT INTO t SELECT 'canary-key x' || g, 'canary-value', g, NULL FROM generate_series(1, 50) g; \
        UPDATE t SET v = 'canary-value 2'; UPDATE t SET id = 'canary-key 2' WHERE n = 2; DELETE FROM t WHERE n = 3";
    source.sql("postgres", changes).await.unwrap();
    same(&source, &target, "t").await;
    // Refusals quote values in PostgreSQL's own words: a constraint, a cast, a key that is taken.
    let answers = async |harm: &str, rows: &str, repair: &str| {
        target.sql(TARGET, harm).await.unwrap();
        source.sql("postgres", rows).await.unwrap();
        let mut seen = Value::Null;
        eventually("the changefeed says what is wrong", async || {
            seen = client.get("/api/v2/changefeeds/f").await.unwrap();
            ["warning", "failed"].iter().any(|bad| seen["state"] == *bad)
        })
        .await;
        target.sql(TARGET, repair).await.unwrap();
        if state(&client).await == "failed" {
            client.post("/api/v2/changefeeds/f/resume", &json!({})).await.unwrap();
        }
        same(&source, &target, "t").await;
        eventually("it is well again", async || state(&client).await == "normal").await;
        seen.to_string()
    };
    let mut told = vec![
        answers(
            "ALTER TABLE t ADD CONSTRAINT fine CHECK (v <> 'canary-bad')",
            "INSERT INTO t VALUES ('canary-key 70', 'canary-bad', 0, NULL)",
            "ALTER TABLE t DROP CONSTRAINT fine",
        )
        .await,
        answers(
            "ALTER TABLE t ALTER v TYPE varchar(30)",
            "INSERT INTO t VALUES ('canary-key 71', 'canary-bad that is far too long for its column', 0, NULL)",
            "ALTER TABLE t ALTER v TYPE text",
        )
        .await,
    ];
    told.push(client.get("/api/v2/changefeeds?state=all").await.unwrap().to_string());
    told.push(client.get("/api/v2/changefeeds/f/progress").await.unwrap().to_string());
    let pid = child.id().to_string();
    std::process::Command::new("sh").args(["-c", "kill -TERM \"$0\"", &pid]).status().unwrap();
    let ended = tokio::task::spawn_blocking(move || child.wait()).await.unwrap().unwrap();
    assert!(ended.success());
    told.push(std::fs::read_to_string(&log).unwrap());
    for word in ["DEBUG", "server has stopped"] {
        assert!(told[4].contains(word), "{word}");
    }
    for text in &told {
        for canary in CANARIES {
            let at = text.find(canary);
            let around = at.map(|at| text[at.saturating_sub(300)..].chars().take(500).collect::<String>());
            assert!(at.is_none(), "{canary}: {around:?}");
        }
    }
}
