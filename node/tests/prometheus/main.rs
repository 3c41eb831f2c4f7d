//! A real Prometheus looks at a small cluster under load: every panel of the dashboard shows something, and every
//! alert is an expression that Prometheus takes.

#![expect(clippy::unwrap_used, reason = "a test fails where it cannot go on")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use testkit::etcd::Etcd;
use testkit::prometheus::program;
use testkit::{Millrace, PgServer, Prometheus};

/// How long a state may take to come: the machines that run this are busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// Panels that a cluster without a mishap has nothing for.
const EMPTY: &[&str] = &[
    // Nothing stands still, and nothing has failed.
    "Checkpoint stands still",
    "Errors of changefeeds",
    // Nobody speaks for an epoch that is over.
    "Messages of other epochs",
    // Nobody empties a node.
    "Left to drain",
];
/// Panels that a slow machine may have something for.
const EITHER: &[&str] = &["Slow handlers", "Checkpoint stands still"];

fn dashboards() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../dashboards")
}

fn dashboard() -> Value {
    let text = std::fs::read_to_string(dashboards().join("millrace.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Title and expressions of every panel, with everything selected.
fn panels() -> Vec<(String, Vec<String>)> {
    let dashboard = dashboard();
    let panels = dashboard["panels"].as_array().unwrap().iter().filter(|panel| panel["type"] != "row");
    let expression = |target: &Value| {
        let text = target["expr"].as_str().unwrap().replace("$__rate_interval", "20s");
        ["$namespace", "$changefeed", "$instance"].iter().fold(text, |text, name| text.replace(name, ".*"))
    };
    panels
        .map(|panel| {
            let targets = panel["targets"].as_array().unwrap();
            (panel["title"].as_str().unwrap().to_owned(), targets.iter().map(expression).collect())
        })
        .collect()
}

/// The lines of the alerts that begin with a key.
fn of_alerts(key: &str) -> Vec<String> {
    let text = std::fs::read_to_string(dashboards().join("alerts.yml")).unwrap();
    let lines = text.lines().filter_map(|line| line.trim().trim_start_matches("- ").strip_prefix(key));
    lines.map(|rest| rest.trim_start_matches(':').trim().trim_matches('\'').to_owned()).collect()
}

fn promtool(arguments: &[&str]) {
    let output =
        Command::new(program("promtool")).args(arguments).current_dir(dashboards()).output().unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
}

// behaviour: metrics-8
#[test]
fn alerts_fire_in_the_histories_that_they_are_for_and_not_in_a_healthy_one() {
    promtool(&["check", "rules", "alerts.yml"]);
    promtool(&["test", "rules", "alerts.test.yml"]);
}

#[test]
fn every_alert_says_what_to_do_and_where_to_read_on() {
    let page = std::fs::read_to_string(dashboards().join("../docs/operations.md")).unwrap();
    let anchor = |heading: &str| {
        let kept = heading.to_lowercase();
        let kept = kept.trim().chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect::<String>()
    };
    let headings: Vec<String> = page
        .lines()
        .filter(|line| line.starts_with('#'))
        .map(|line| anchor(line.trim_start_matches('#')))
        .collect();
    let books = of_alerts("runbook");
    for book in &books {
        let at = book.strip_prefix("../docs/operations.md#").unwrap();
        assert!(headings.iter().any(|heading| heading == at), "{book} is not there: {headings:?}");
    }
    let (names, summaries) = (of_alerts("alert"), of_alerts("summary"));
    assert!(names.len() > 20 && names.iter().all(|name| name.starts_with("ticdc_")), "{names:?}");
    assert_eq!((names.len(), names.len()), (books.len(), summaries.len()));
}

/// Two nodes with files of their own for the log, and Prometheus.
struct Watched {
    _etcd: Etcd,
    nodes: Vec<Millrace>,
    prometheus: Prometheus,
    source: PgServer,
    _target: PgServer,
    dir: tempfile::TempDir,
}

impl Watched {
    async fn start() -> Self {
        let (etcd, source, target) = tokio::join!(Etcd::start(), PgServer::start(), PgServer::start());
        let (etcd, source, target) = (etcd.unwrap(), source.unwrap(), target.unwrap());
        target.sql("postgres", "CREATE DATABASE target").await.unwrap();
        let make = "CREATE TABLE a (id int PRIMARY KEY, v text); CREATE TABLE b (id int PRIMARY KEY, v text); \
            INSERT INTO a SELECT g, 'v' FROM generate_series(1, 2000) g";
        source.sql("postgres", make).await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut nodes = Vec::new();
        for at in 0..2 {
            let home = dir.path().join(format!("n{at}"));
            std::fs::create_dir_all(&home).unwrap();
            let log = home.join("node.log").display().to_string();
            let endpoints = etcd.endpoints().join(",");
            let mut node = Millrace::new(Path::new(env!("CARGO_BIN_EXE_millrace")), &home)
                .unwrap()
                .with_arguments(["--store", &endpoints, "--log-file", &log]);
            node.spawn().unwrap();
            nodes.push(node);
        }
        let mut targets = Vec::new();
        for node in &mut nodes {
            node.ready().await.unwrap();
            targets.push(format!("127.0.0.1:{}", node.api().port()));
        }
        let api = nodes[0].api();
        let copy = json!({ "initial_copy": { "enabled": true } });
        api.create("rows", &source.uri("postgres"), &target.uri("target"), &copy).await.unwrap();
        let files =
            format!("file://{}?protocol=canal-json&flush-interval=200ms", dir.path().join("files").display());
        let bank = "generator://bank?rate=100&accounts=10&tables=2&ddl-every=20&ddl=all";
        api.create("files", bank, &files, &json!({})).await.unwrap();
        let prometheus = Prometheus::start(&targets, &dashboards().join("alerts.yml")).await.unwrap();
        Self { _etcd: etcd, nodes, prometheus, source, _target: target, dir }
    }

    /// Some rows at the source.
    async fn change(&self, round: i32) {
        let change = format!(
            "INSERT INTO b SELECT g, 'w' FROM generate_series({round} * 100, {round} * 100 + 99) g; \
             UPDATE a SET v = 'v{round}' WHERE id % 10 = {round} % 10"
        );
        self.source.sql("postgres", &change).await.unwrap();
    }

    /// The panels that show nothing, with the first of their expressions that has no series.
    async fn dark(&self, panels: &[(String, Vec<String>)]) -> Vec<(String, String)> {
        let mut dark = Vec::new();
        for (title, expressions) in panels {
            for expression in expressions {
                if self.prometheus.query(expression).await.unwrap().is_empty() {
                    dark.push((title.clone(), expression.clone()));
                    break;
                }
            }
        }
        dark
    }

    /// Waits until an expression gives what is wanted.
    async fn until(&self, what: &str, expression: &str, wanted: impl Fn(&[Value]) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let series = self.prometheus.query(expression).await.unwrap();
            if wanted(&series) {
                return;
            }
            assert!(Instant::now() < deadline, "never came true: {what}: {series:#?}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// The leading node gives the role up: nobody shows changefeeds but its successor.
    async fn another_leads(&self) {
        let of_owner =
            "count by (instance) ({__name__=~\"ticdc_owner_status|ticdc_owner_checkpoint_ts_lag\"})";
        let before = self.prometheus.query(of_owner).await.unwrap();
        assert_eq!(before.len(), 1, "{before:?}");
        let leader = before[0]["metric"]["instance"].as_str().unwrap();
        let leads = |node: &&Millrace| leader.ends_with(&format!(":{}", node.api().port()));
        let api = self.nodes.iter().find(leads).unwrap().api();
        api.post("/api/v2/owner/resign", &json!({})).await.unwrap();
        self.until("another one shows changefeeds, alone", of_owner, |series| {
            series.len() == 1 && series[0]["metric"]["instance"] != leader
        })
        .await;
        let rate = "sum(rate(ticdc_owner_ownership_counter[20s]))";
        self.until("one node leads", rate, |series| {
            let rate: f64 = series[0]["value"][1].as_str().unwrap().parse().unwrap();
            (0.6..1.4).contains(&rate)
        })
        .await;
    }

    fn logs(&self) -> String {
        let tail = |at: usize| {
            let text =
                std::fs::read_to_string(self.dir.path().join(format!("n{at}/node.log"))).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(20)..].join("\n")
        };
        (0..self.nodes.len()).map(|at| format!("--- node {at}\n{}\n", tail(at))).collect()
    }
}

// behaviour: metrics-1, metrics-3, metrics-4, metrics-6
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_panel_shows_a_cluster_under_load_and_nothing_is_shown_of_what_is_gone() {
    let watched = Watched::start().await;
    let panels = panels();
    let deadline = Instant::now() + PATIENCE;
    let mut round = 0;
    loop {
        round += 1;
        watched.change(round).await;
        let mut dark = watched.dark(&panels).await;
        let expected = |title: &str| EMPTY.contains(&title) || EITHER.contains(&title);
        dark.retain(|(title, _)| !expected(title));
        if dark.is_empty() {
            break;
        }
        assert!(Instant::now() < deadline, "nothing is shown by {dark:#?}\n{}", watched.logs());
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    // What is excused is really empty.
    let dark = watched.dark(&panels).await;
    for title in EMPTY.iter().filter(|title| !EITHER.contains(title)) {
        assert!(dark.iter().any(|(empty, _)| empty == title), "{title} is not empty: excuse it no longer");
    }
    for expression in of_alerts("expr") {
        watched.prometheus.query(&expression).await.unwrap_or_else(|error| panic!("{expression}: {error}"));
    }
    // The dump that coverage of another dashboard is looked up in.
    if let Some(folder) = std::env::var_os("MILLRACE_TEST_METRICS_DIR") {
        for node in &watched.nodes {
            let port = node.api().port();
            let text = scrape(port).await;
            std::fs::write(Path::new(&folder).join(format!("{port}.txt")), text).unwrap();
        }
    }
    watched.another_leads().await;
    let client = node::cli::Client::new(&watched.nodes[0].api().base()).unwrap();
    client.delete("/api/v2/changefeeds/files").await.unwrap();
    let left = "topk(3, count by (__name__) ({changefeed=\"files\", __name__!~\".*_operation_time\"}))";
    watched.until("nothing tells of the changefeed", left, |series| series.is_empty()).await;
    let left = "topk(3, count by (__name__) ({area=~\"(.*/)?files\"}))";
    watched.until("no queue tells of the changefeed", left, |series| series.is_empty()).await;
}

/// What a node serves at `/metrics`.
async fn scrape(port: u16) -> String {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n").await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text.split_once("\r\n\r\n").unwrap().1.to_owned()
}
