//! The command line against a server that remembers what it was asked: what is sent, what is asked of the person, what is
//! printed, and how the program ends.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use serde_json::{Value, json};

/// A server with prepared answers by method and path; what it does not know is refused as unknown.
#[derive(Clone, Default)]
struct Fake {
    answers: Arc<Mutex<BTreeMap<String, (u16, Value)>>>,
    asked: Arc<Mutex<Vec<(String, Value)>>>,
}

impl Fake {
    async fn start(self) -> String {
        let app = Router::new().fallback(async move |request: Request| self.answer(request).await);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move { axum::serve(listener, app).await });
        address
    }

    async fn answer(&self, request: Request) -> axum::response::Response {
        let (parts, body) = request.into_parts();
        let target = parts.uri.path_and_query().map_or("/", |target| target.as_str());
        let key = format!("{} {target}", parts.method);
        let body = axum::body::to_bytes(body, 1 << 20).await.unwrap();
        if target == "/api/v2/status" {
            return axum::Json(json!({ "version": concat!("v", env!("CARGO_PKG_VERSION")) })).into_response();
        }
        self.asked.lock().unwrap().push((key.clone(), serde_json::from_slice(&body).unwrap_or(Value::Null)));
        let unknown = json!({ "error_msg": "there is none", "error_code": "CDC:ErrChangeFeedNotExists" });
        let (status, body) = self.answers.lock().unwrap().get(&key).cloned().unwrap_or((400, unknown));
        (StatusCode::from_u16(status).unwrap(), axum::Json(body)).into_response()
    }

    fn says(&self, what: &str, answer: Value) {
        self.answers.lock().unwrap().insert(what.to_owned(), (200, answer));
    }

    /// What was asked since the last time, without mere looks.
    fn changes(&self) -> Vec<(String, Value)> {
        let asked = std::mem::take(&mut *self.asked.lock().unwrap());
        asked.into_iter().filter(|(key, _)| !key.starts_with("GET ")).collect()
    }
}

/// A way to run commands: in a directory, against a server.
struct Person<'a> {
    dir: &'a Path,
    server: String,
}

impl Person<'_> {
    fn runs(&self, arguments: &[&str], typed: &str) -> Output {
        let mut child = Command::new(env!("CARGO_BIN_EXE_millrace"))
            .args(["cli", "--server", &self.server])
            .args(arguments)
            .current_dir(self.dir)
            .env_clear()
            .env("HOME", self.dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // The program may end before it reads anything.
        let _ = std::io::Write::write_all(&mut child.stdin.take().unwrap(), typed.as_bytes());
        child.wait_with_output().unwrap()
    }

    /// Exit code, standard output, standard error.
    fn tells(&self, arguments: &[&str], typed: &str) -> (i32, String, String) {
        let output = self.runs(arguments, typed);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
    }
}

const FEED: &str = "/api/v2/changefeeds/f";

fn feed(state: &str, checkpoint_time: &str) -> Value {
    json!({
        "id": "f", "state": state, "checkpoint_ts": 7, "checkpoint_time": checkpoint_time, "sink_uri": "blackhole://",
        "target_ts": 0, "config": { "memory_quota": 1, "filter": { "rules": ["*.*"] } },
    })
}

/// A time so many hours ago, as the server writes it.
fn hours_ago(hours: i64) -> String {
    let format = time::macros::format_description!("[year]-[month]-[day] [hour]:[minute]:[second].000");
    (time::OffsetDateTime::now_utc() - time::Duration::hours(hours)).format(&format).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
// behaviour: api-L-4
// behaviour: api-L-5
async fn a_resume_asks_when_much_would_be_read_or_left_out_and_knows_what_cannot_be() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::default();
    let person = Person { dir: dir.path(), server: fake.clone().start().await };
    fake.says(&format!("POST {FEED}/resume"), json!({}));
    let at = |state: &str, hours| fake.says(&format!("GET {FEED}"), feed(state, &hours_ago(hours)));
    let resume = |more: &[&str], typed: &str| {
        person.tells(&[&["changefeed", "resume", "-c", "f"][..], more].concat(), typed)
    };
    let sent = || fake.changes().into_iter().map(|(_, body)| body).collect::<Vec<_>>();
    at("stopped", 23);
    let (code, out, _) = resume(&[], "");
    assert_eq!((code, sent()), (0, vec![json!({})]), "less than a day asks nothing");
    assert!(out.contains("Resume changefeed successfully!\nID: f"), "{out}");
    at("failed", 30);
    for (typed, code, count) in [("y\n", 0, 1), ("Y\n", 0, 1), ("n\n", 2, 0), ("", 2, 0), ("yes\n", 2, 0)] {
        let (is, _, err) = resume(&[], typed);
        assert_eq!((is, sent().len()), (code, count), "{typed:?}: {err}");
        assert!(err.contains("30 hours behind"), "{err}");
    }
    assert_eq!((resume(&["--no-confirm"], "").0, sent().len()), (0, 1));
    for (position, body) in [("now", json!("now")), ("42", json!(42)), ("pg:0/7", json!("pg:0/7"))] {
        let (code, _, err) = resume(&["--overwrite-checkpoint-ts", position], "y\n");
        assert_eq!((code, sent()), (0, vec![json!({ "overwrite_checkpoint_ts": body })]), "{err}");
        assert!(err.contains("checkpoint 7 will be replaced"), "{err}");
        assert_eq!((resume(&["--overwrite-checkpoint-ts", position], "n\n").0, sent().len()), (2, 0));
    }
    for bad in ["0", "soon", "-1"] {
        let (code, _, err) = resume(&["--overwrite-checkpoint-ts", bad, "--no-confirm"], "");
        assert!(code == 1 && err.contains("ErrCliInvalidCheckpointTs") || bad == "-1", "{bad}: {err}");
        assert!(sent().is_empty());
    }
    let future = json!({ "error_msg": "[CDC:ErrAPIInvalidParam]must be at most 41", "error_code": "CDC:ErrAPIInvalidParam" });
    fake.answers.lock().unwrap().insert(format!("POST {FEED}/resume"), (400, future));
    let (code, _, err) = resume(&["--overwrite-checkpoint-ts", "43", "--no-confirm"], "");
    assert!(code == 1 && err.contains("at most 41"), "{err}");
    sent();
    for state in ["normal", "warning", "removed"] {
        at(state, 0);
        let (code, _, err) = resume(&["--no-confirm"], "");
        assert!(code == 1 && err.contains(state) && err.contains("ErrChangefeedUpdateRefused"), "{err}");
        assert!(sent().is_empty(), "{state}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
// behaviour: api-L-6
async fn an_update_sends_what_was_given_and_differs_and_only_after_a_yes() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::default();
    let person = Person { dir: dir.path(), server: fake.clone().start().await };
    fake.says(&format!("GET {FEED}"), feed("stopped", &hours_ago(0)));
    fake.says(&format!("PUT {FEED}"), json!({ "id": "f" }));
    std::fs::write(dir.path().join("same.toml"), "memory-quota = 1\n").unwrap();
    std::fs::write(dir.path().join("other.toml"), "memory-quota = 2\n").unwrap();
    std::fs::write(dir.path().join("wrong.toml"), "memory-quote = 2\n").unwrap();
    let update = |more: &[&str], typed: &str| {
        person.tells(&[&["changefeed", "update", "-c", "f"][..], more].concat(), typed)
    };
    let (code, out, _) = update(&["--config", "same.toml"], "");
    assert!(code == 0 && out.contains("do nothing") && fake.changes().is_empty(), "{out}");
    for no in ["n\n", ""] {
        assert_eq!((update(&["--config", "other.toml"], no).0, fake.changes().len()), (2, 0));
    }
    let (code, _, err) = update(&["--config", "other.toml"], "y\n");
    let config = json!({ "memory_quota": 2, "filter": { "rules": ["*.*"] } });
    assert_eq!((code, &fake.changes()[0].1), (0, &json!({ "replica_config": config })));
    assert!(err.contains("config.memory_quota: 1 -> 2"), "{err}");
    let (code, out, _) = update(&["--target-ts", "9", "--no-confirm", "--json"], "");
    assert_eq!((code, &fake.changes()[0].1), (0, &json!({ "target_ts": 9 })));
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap(), json!({ "id": "f" }));
    let (code, _, err) = update(&["--config", "wrong.toml"], "y\n");
    assert!(code == 1 && err.contains("memory-quote (did you mean memory-quota?)"), "{err}");
    assert!(fake.changes().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
// behaviour: api-L-3
// behaviour: api-L-8
async fn a_creation_asks_about_tables_that_cannot_be_replicated_and_names_wrong_keys() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::default();
    let person = Person { dir: dir.path(), server: fake.clone().start().await };
    let table = |name: &str| json!({ "database_name": "shop", "table_name": name });
    fake.says(
        "POST /api/v2/verify_table",
        json!({ "eligible_tables": [table("a")], "ineligible_tables": [table("b")], "all_tables": [table("a"), table("b")] }),
    );
    fake.says("POST /api/v2/changefeeds", json!({ "id": "f", "warnings": ["mind this"] }));
    let base = [
        "changefeed",
        "create",
        "-c",
        "f",
        "--upstream-uri",
        "generator://bank",
        "--sink-uri",
        "blackhole://",
    ];
    let create = |more: &[&str], typed: &str| person.tells(&[&base[..], more].concat(), typed);
    let created = || {
        let sent = fake.changes().into_iter().filter(|(key, _)| key == "POST /api/v2/changefeeds");
        sent.map(|(_, body)| body).collect::<Vec<_>>()
    };
    for no in ["n\n", ""] {
        let (code, _, err) = create(&[], no);
        assert!(code == 2 && err.contains("shop.b") && created().is_empty(), "{err}");
    }
    let (code, out, err) = create(&["-v"], "y\n");
    assert_eq!((code, &created()[0]["replica_config"]["ignore-ineligible-table"]), (0, &json!(true)));
    assert!(err.contains("warning: mind this"), "{err}");
    for words in [
        "Create changefeed successfully!\nID: f",
        "IneligibleTablesCount: 1\n  [shop.b]",
        "AllTablesCount: 2\n  [shop.a, shop.b]",
    ] {
        assert!(out.contains(words), "{words}: {out}");
    }
    assert_eq!((create(&["--no-confirm"], "").0, created().len()), (0, 1));
    // A secret of the file reaches the server as it is.
    std::fs::write(
        dir.path().join("force.toml"),
        "force-replicate = true\n[consistent]\nstorage = \"s3://b/p?secret-access-key=k\"\n",
    )
    .unwrap();
    assert_eq!(create(&["--config", "force.toml", "--tz", "UTC", "--start-ts", "pg:0/7"], "").0, 0);
    let body = created().remove(0);
    assert_eq!(body["replica_config"]["consistent"]["storage"], "s3://b/p?secret-access-key=k");
    assert_eq!(body["start_ts"], "pg:0/7");
    fake.says("POST /api/v2/verify_table", json!({}));
    assert!(create(&["-v"], "").1.contains("EligibleTablesCount: 0\n  []"));
    created();
    std::fs::write(dir.path().join("wrong.toml"), "[filter]\nrulez = [\"*.*\"]\n").unwrap();
    for (more, words) in [
        (&["--config", "wrong.toml"][..], "filter.rulez (did you mean filter.rules?)"),
        (&["--sort-dir", "/tmp"], "data-dir"),
        (&["-k", "other"], "keyspaces are not enabled"),
        (&["--pd", "http://x"], "no PD"),
    ] {
        let (code, _, err) = create(more, "y\n");
        assert!(code == 1 && err.contains(words) && created().is_empty(), "{words}: {err}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
// behaviour: api-L-7
async fn lists_queries_pauses_and_removals_are_told_as_words_or_json() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::default();
    let person = Person { dir: dir.path(), server: fake.clone().start().await };
    let line = |id: &str, state: &str| json!({ "id": id, "keyspace": "default", "state": state, "checkpoint_tso": 7 });
    fake.says("GET /api/v2/changefeeds", json!({ "items": [line("f", "normal")] }));
    fake.says(
        "GET /api/v2/changefeeds?state=all",
        json!({ "items": [line("f", "normal"), line("g", "finished")] }),
    );
    let ids = |out: &str| {
        let rows: Value = serde_json::from_str(out).unwrap();
        rows.as_array().unwrap().iter().map(|row| row["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(ids(&person.tells(&["changefeed", "list"], "").1), ["f"]);
    assert_eq!(ids(&person.tells(&["changefeed", "list", "--all"], "").1), ["f", "g"]);
    fake.says(&format!("GET {FEED}"), feed("stopped", ""));
    fake.says(&format!("GET {FEED}/status"), json!({ "state": "stopped", "checkpoint_ts": 7 }));
    let query = |more: &[&str]| person.tells(&[&["changefeed", "query"][..], more].concat(), "");
    assert_eq!(serde_json::from_str::<Value>(&query(&["-c", "f"]).1).unwrap(), feed("stopped", ""));
    assert!(!query(&["-c", "f", "-s"]).1.contains("config"));
    let (code, out, err) = query(&["-c", "none"]);
    assert!(code == 1 && out.is_empty() && err.contains("there is none"), "{out} {err}");
    fake.says(&format!("POST {FEED}/pause"), json!({}));
    let (code, out, _) = person.tells(&["changefeed", "pause", "-c", "f"], "");
    assert_eq!((code, out.as_str()), (0, "Pause changefeed successfully!\nID: f\n"));
    let (_, out, _) = person.tells(&["changefeed", "pause", "-c", "f", "--json"], "");
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["id"], "f");

    let remove = || person.tells(&["changefeed", "remove", "-c", "f"], "");
    let (code, _, err) = remove();
    assert!(code == 1 && err.contains("there is none"), "the removal fails: {err}");
    fake.says(&format!("DELETE {FEED}"), json!({}));
    let (code, _, err) = remove();
    assert!(code == 1 && err.contains("ErrChangeFeedDeletionUnfinished"), "it is still there: {err}");
    fake.answers.lock().unwrap().remove(&format!("GET {FEED}"));
    let (code, out, _) = remove();
    assert_eq!((code, out.as_str()), (0, "Changefeed not found.\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
// behaviour: api-L-10
// behaviour: api-L-13
async fn what_only_helps_to_find_a_fault_asks_first_and_a_drain_is_watched_to_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::default();
    let person = Person { dir: dir.path(), server: fake.clone().start().await };
    fake.says(
        "GET /api/v2/unsafe/metadata?raw=false",
        json!([{ "key": "/a", "value": "1" }, { "key": "/b", "value": "" }]),
    );
    assert_eq!(person.tells(&["unsafe", "show-metadata"], "n\n").0, 2);
    assert!(fake.asked.lock().unwrap().is_empty());
    let (code, out, _) = person.tells(&["unsafe", "show-metadata"], "y\n");
    assert_eq!((code, out.as_str()), (0, "Key: /a, Value: 1\nKey: /b, Value: \nShow 2 KVs\n"));
    let gone = json!({ "error_msg": "[CDC:ErrAPIGone]not here", "error_code": "CDC:ErrAPIGone" });
    for (what, command) in [
        ("DELETE /api/v2/unsafe/service_gc_safepoint", "delete-service-gc-safepoint"),
        ("POST /api/v2/unsafe/resolve_lock", "resolve-lock"),
    ] {
        fake.answers.lock().unwrap().insert(what.to_owned(), (410, gone.clone()));
        assert_eq!(person.tells(&["unsafe", command], "n\n").0, 2);
        let (code, _, err) = person.tells(&["unsafe", command, "--no-confirm"], "");
        assert!(code == 1 && err.contains("not here"), "{err}");
    }

    let drain = ["capture", "drain", "--capture-id", "n1", "--interval", "50ms"];
    let put = "PUT /api/v2/captures/n1/drain";
    fake.says(put, json!({ "current_table_count": 4, "dispatchers": 4 }));
    let (code, _, err) = person.tells(&[&drain[..], &["--timeout", "1s"]].concat(), "");
    assert!(
        code == 1 && err.contains("remaining: 4 (4 dispatchers)") && err.contains("4 remaining"),
        "{err}"
    );
    let later = fake.clone();
    let watcher = tokio::task::spawn_blocking({
        let (dir, server) = (dir.path().to_owned(), person.server.clone());
        move || Person { dir: &dir, server }.tells(&drain, "")
    });
    fake.asked.lock().unwrap().clear();
    while later.asked.lock().unwrap().len() < 3 {
        tokio::task::yield_now().await;
    }
    later.says(put, json!({ "current_table_count": 1, "dispatchers": 1 }));
    later.asked.lock().unwrap().clear();
    while later.asked.lock().unwrap().len() < 3 {
        tokio::task::yield_now().await;
    }
    later.says(put, json!({ "current_table_count": 0 }));
    let (code, out, err) = watcher.await.unwrap();
    assert_eq!((code, out.as_str()), (0, "Drain capture successfully!\nID: n1\n"), "{err}");
    assert!(err.contains("remaining: 1 (1 dispatchers), about"), "{err}");
    fake.answers.lock().unwrap().remove(put);
    assert_eq!(person.tells(&drain, "").0, 1, "a server that is unknown is an error");
}
