//! The command line.

use serde_json::Value;
use testkit::{Millrace, PgServer};

use super::{Complaints, SECRET, millrace};

/// An address at which nobody listens.
const NOBODY: &str = "http://127.0.0.1:1";

#[test]
fn commands_that_cannot_be_understood_are_refused_with_what_is_wrong() {
    let mut complaints = Complaints::default();
    let dir = tempfile::tempdir().unwrap();
    let cases: &[(&[&str], &[&str])] = &[
        (&["nonsense"], &["nonsense"]),
        (&["cli"], &["Usage"]),
        (&["cli", "changefeed"], &["Usage"]),
        (&["cli", "changefeed", "explode"], &["explode"]),
        (&["cli", "changefeed", "create"], &["--upstream-uri", "--sink-uri"]),
        (&["cli", "changefeed", "create", "--upstream-uri", "generator://bank"], &["--sink-uri"]),
        (&["cli", "changefeed", "query"], &["--changefeed-id"]),
        (&["cli", "changefeed", "pause"], &["--changefeed-id"]),
        (&["cli", "changefeed", "resume"], &["--changefeed-id"]),
        (&["cli", "changefeed", "remove"], &["--changefeed-id"]),
        (&["cli", "changefeed", "query", "-c", "a", "--loud"], &["--loud"]),
        (&["cli", "changefeed", "list", "extra"], &["extra"]),
        (&["cli", "changefeed", "resume", "-c", "a", "--overwrite-checkpoint-ts", "soon"], &["soon"]),
        (&["cli", "changefeed", "update"], &["--changefeed-id"]),
        (&["cli", "changefeed", "update", "-c", "a", "--target-ts", "late"], &["late"]),
        (
            &["cli", "changefeed", "update", "-c", "a", "--config", "missing.toml"],
            &["missing.toml", "No such file"],
        ),
        (&["cli", "changefeed", "statistics", "-c", "a", "-I", "0"], &["0", "interval"]),
        (&["cli", "changefeed", "tables"], &["--changefeed-id"]),
        (&["cli", "changefeed", "dispatcher-count", "-c", "a b"], &["letters"]),
        (&["cli", "changefeed", "move-table", "-c", "a"], &["--table-id", "--target-node-id"]),
        (&["cli", "changefeed", "move-table", "-c", "a", "-t", "one", "-d", "n"], &["one"]),
        (&["cli", "changefeed", "move-table", "-c", "a", "-t", "1", "-d", "a/b"], &["capture list"]),
        (
            &["cli", "changefeed", "move-table", "-c", "a", "-t", "1", "-d", "n", "--wait", "maybe"],
            &["maybe"],
        ),
        (&["cli", "changefeed", "move-split-table", "-c", "a", "-t", "1"], &["--target-node-id"]),
        (&["cli", "changefeed", "split-table-by-region-count", "-c", "a"], &["--table-id"]),
        (&["cli", "changefeed", "merge-table", "-c", "a", "-t", "1", "--mode", "2"], &["2"]),
        (
            &["cli", "tso", "query", "--upstream-uri", "generator://bank", "--upstream-name", "a"],
            &["--upstream-name"],
        ),
        (&["cli", "unsafe", "reset", "--data-dir", "nowhere", "--no-confirm"], &["no store", "nowhere"]),
        (&["cli", "unsafe", "reset", "--data-dir", "a", "--store", "http://b:1"], &["--store"]),
        (&["cli", "unsafe", "reset", "--cluster-id", "a/b", "--no-confirm"], &["cluster-id"]),
        (&["server", "--pd", "http://127.0.0.1:2379"], &["--store"]),
        (&["cli", "capture"], &["Usage"]),
        (&["cli", "capture", "drain"], &["--capture-id"]),
        (&["cli", "capture", "drain", "--capture-id", "a/b"], &["capture list"]),
        (&["cli", "capture", "drain", "--capture-id", ""], &["capture list"]),
        (&["cli", "capture", "drain", "--capture-id", "n", "--timeout", "soon"], &["soon", "20s"]),
        (&["cli", "capture", "drain", "--capture-id", "n", "--cancel", "--timeout", "1s"], &["--cancel"]),
        (&["cli", "--server", "ftp://x", "status"], &["ftp://x", "http://127.0.0.1:8300"]),
        (&["cli", "--server", "", "status"], &["server address"]),
        (&["cli", "--server", "127.0.0.1:8300", "status"], &["http://127.0.0.1:8300"]),
        (&["quickstart", "--duration", "long"], &["long", "20s"]),
        (&["quickstart", "--duration"], &["--duration"]),
        (&["quickstart", "--addr", "nowhere", "--data-dir", "q1"], &["addr", "nowhere", "host:port"]),
        (
            &["quickstart", "--log-level", "millrace=loud", "--data-dir", "q2"],
            &["log-level", "millrace=loud"],
        ),
        (&["version", "extra"], &["extra"]),
    ];
    for (arguments, words) in cases {
        complaints.refuses(dir.path(), arguments, words);
    }
    complaints.none();
}

#[test]
fn a_server_that_does_not_answer_is_named_by_every_command() {
    let mut complaints = Complaints::default();
    let dir = tempfile::tempdir().unwrap();
    let create = [
        "create",
        "--upstream-uri",
        "postgres://u:s3cr3t-canary@h/d",
        "--sink-uri",
        "postgres://u:s3cr3t-canary@h/e",
    ];
    let changefeed: &[&[&str]] = &[
        &create,
        &["list"],
        &["list", "--all"],
        &["query", "-c", "a"],
        &["query", "-c", "a", "--simple"],
        &["pause", "-c", "a"],
        &["resume", "-c", "a"],
        &["remove", "-c", "a"],
        &["tables", "-c", "a"],
        &["dispatcher-count", "-c", "a"],
    ];
    for rest in changefeed {
        let arguments = [&["cli", "--server", NOBODY, "changefeed"][..], rest].concat();
        complaints.refuses(dir.path(), &arguments, &[NOBODY, "millrace server"]);
    }
    for rest in [
        &["status"][..],
        &["capture", "list"],
        &["capture", "drain", "--capture-id", "n", "--cancel"],
        &["tso", "query", "--upstream-uri", "generator://bank"],
    ] {
        complaints.refuses(
            dir.path(),
            &[&["cli", "--server", NOBODY][..], rest].concat(),
            &[NOBODY, "millrace server"],
        );
    }
    complaints.none();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_server_refuses_is_told_by_the_command_line_and_leaves_nothing_behind() {
    let source = PgServer::start().await.unwrap();
    source
        .sql("postgres", "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE keyless (v text)")
        .await
        .unwrap();
    let mut complaints = Complaints::default();
    let dir = tempfile::tempdir().unwrap();
    let mut server = Millrace::new(std::path::Path::new(env!("CARGO_BIN_EXE_millrace")), dir.path()).unwrap();
    server.start().await.unwrap();
    let address = format!("http://127.0.0.1:{}", server.api().port());
    std::fs::write(dir.path().join("unknown.toml"), "[filter]\nrulez = [\"*.*\"]\n").unwrap();
    std::fs::write(dir.path().join("typed.toml"), "memory-quota = \"much\"\n").unwrap();
    std::fs::write(dir.path().join("broken.toml"), "[filter\n").unwrap();
    std::fs::write(dir.path().join("rule.toml"), "[filter]\nrules = [\"a.b.c.d[\"]\n").unwrap();

    let uri = source.uri("postgres");
    let wrong = source.uri_as("postgres", SECRET, "postgres");
    let nowhere = "postgres://u:s3cr3t-canary@127.0.0.1:1/d";
    let create = |upstream: &str, sink: &str, rest: &[&str]| {
        let mut all = vec!["changefeed", "create", "--upstream-uri", upstream, "--sink-uri", sink];
        all.extend(rest);
        all.into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let on = |command: &str, id: &str| {
        vec!["changefeed".to_owned(), command.to_owned(), "-c".to_owned(), id.to_owned()]
    };
    let cases: Vec<(Vec<String>, &[&str])> = vec![
        (create("gopher://x", "blackhole://", &[]), &["upstream", "postgres"]),
        (create(&uri, "gopher://x", &["--no-confirm"]), &["sink"]),
        (create(nowhere, "blackhole://", &[]), &["127.0.0.1:1", "cannot be reached"]),
        (create(&wrong, "blackhole://", &[]), &["login", "postgres"]),
        (create(&uri, nowhere, &["--no-confirm"]), &["127.0.0.1:1"]),
        (create(&uri, &wrong, &["--no-confirm"]), &["password"]),
        (create(&source.uri("absent"), "blackhole://", &[]), &["absent", "does not exist"]),
        (create(&uri, &source.uri("absent"), &["--no-confirm"]), &["absent", "does not exist"]),
        (create(&uri, &uri, &["--no-confirm"]), &["another database"]),
        (create(&uri, "blackhole://", &["-c", "a b", "--no-confirm"]), &["letters"]),
        (create(&uri, "blackhole://", &["-c", "", "--no-confirm"]), &["letters"]),
        (
            create(&uri, "blackhole://", &["--start-ts", "9", "--target-ts", "3", "--no-confirm"]),
            &["target_ts 3"],
        ),
        (create(&uri, "blackhole://", &["--config", "missing.toml"]), &["missing.toml", "No such file"]),
        (create(&uri, "blackhole://", &["--config", "unknown.toml"]), &["unknown.toml", "rulez"]),
        (create(&uri, "blackhole://", &["--config", "typed.toml"]), &["typed.toml", "line 1", "u64"]),
        (create(&uri, "blackhole://", &["--config", "broken.toml"]), &["broken.toml"]),
        (create(&uri, "blackhole://", &["--config", "rule.toml"]), &["a.b.c.d["]),
        (create(&uri, "file:///tmp/x?protocol=morse", &["--no-confirm"]), &["morse"]),
        // Nobody is there to say yes.
        (create(&uri, "blackhole://", &[]), &["keyless", "aborted"]),
        (on("query", "none"), &["none", "does not exist"]),
        (on("pause", "none"), &["none", "does not exist"]),
        (on("resume", "none"), &["none", "does not exist"]),
        (on("update", "none"), &["none", "does not exist"]),
        (on("statistics", "none"), &["none", "does not exist"]),
        (
            [on("update", "none"), vec!["--config".to_owned(), "unknown.toml".to_owned()]].concat(),
            &["unknown.toml", "rulez"],
        ),
        (on("tables", "none"), &["none", "does not exist"]),
        (on("dispatcher-count", "none"), &["none", "does not exist"]),
        (on("query", "a b"), &["letters"]),
        (on("query", "../status"), &["letters"]),
        (on("pause", "a?b"), &["letters"]),
        (on("remove", "a/b"), &["letters"]),
        (vec!["tso".to_owned(), "query".to_owned(), "--upstream-uri".to_owned(), wrong.clone()], &["login"]),
        (
            ["capture", "drain", "--capture-id", "none"].map(str::to_owned).to_vec(),
            &["none", "not in the cluster"],
        ),
    ];
    for (arguments, words) in &cases {
        let mut all = vec!["cli", "--server", address.as_str()];
        all.extend(arguments.iter().map(String::as_str));
        complaints.refuses(dir.path(), &all, words);
    }
    let list = millrace(dir.path(), &["cli", "--server", &address, "changefeed", "list", "--all"]);
    assert_eq!(serde_json::from_slice::<Value>(&list.stdout).unwrap(), Value::Array(Vec::new()));
    let client = source.client("postgres").await.unwrap();
    let left = "SELECT (SELECT count(*) FROM pg_replication_slots) + (SELECT count(*) FROM pg_publication)";
    assert_eq!(client.query_one(left, &[]).await.unwrap().get::<_, i64>(0), 0);

    // A removal of what is not there has nothing to do; results are JSON.
    let gone = millrace(dir.path(), &["cli", "--server", &address, "changefeed", "remove", "-c", "none"]);
    assert!(gone.status.success() && String::from_utf8_lossy(&gone.stdout).contains("not found"));
    for command in [&["status"][..], &["capture", "list"], &["changefeed", "list"]] {
        let output = millrace(dir.path(), &[&["cli", "--server", &address][..], command].concat());
        assert!(output.status.success(), "{command:?}");
        serde_json::from_slice::<Value>(&output.stdout).unwrap();
    }
    let made = millrace(
        dir.path(),
        &[
            "cli",
            "--server",
            &address,
            "changefeed",
            "create",
            "-c",
            "f",
            "--no-confirm",
            "--upstream-uri",
            &uri,
            "--sink-uri",
            "blackhole://",
        ],
    );
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    // A changefeed that runs cannot be resumed, and a name is used once.
    let f = |command: &'static str| {
        ["cli", "--server", &address, "changefeed", command, "-c", "f"].map(str::to_owned)
    };
    let resume: Vec<String> = f("resume").to_vec();
    complaints.refuses(
        dir.path(),
        &resume.iter().map(String::as_str).collect::<Vec<_>>(),
        &["normal", "can be resumed"],
    );
    // An update needs a changefeed that does not run, and somebody who says yes.
    let update = |rest: &[&str]| {
        let all = ["cli", "--server", address.as_str(), "changefeed", "update", "-c", "f"];
        all.iter().chain(rest).map(|word| (*word).to_owned()).collect::<Vec<_>>()
    };
    std::fs::write(dir.path().join("quota.toml"), "memory-quota = 104857600\n").unwrap();
    for (rest, words) in [
        (&["--config", "quota.toml"][..], &["config.memory_quota", "104857600", "aborted"][..]),
        (&["--config", "quota.toml", "--no-confirm"], &["pause it first"]),
        (&["--sink-uri", nowhere], &["sink_uri", "aborted"]),
    ] {
        let all = update(rest);
        complaints.refuses(dir.path(), &all.iter().map(String::as_str).collect::<Vec<_>>(), words);
    }
    let pause = f("pause");
    assert!(millrace(dir.path(), &pause.each_ref().map(String::as_str)).status.success());
    for words in ["successfully", "do nothing"] {
        let all = update(&["--config", "quota.toml", "--no-confirm"]);
        let done = millrace(dir.path(), &all.iter().map(String::as_str).collect::<Vec<_>>());
        let told = String::from_utf8_lossy(&done.stdout).into_owned();
        assert!(done.status.success() && told.contains(words), "{words}: {told} {:?}", done.stderr);
    }
    let again = [
        "cli",
        "--server",
        &address,
        "changefeed",
        "create",
        "-c",
        "f",
        "--no-confirm",
        "--upstream-uri",
        &uri,
        "--sink-uri",
        "blackhole://",
    ];
    complaints.refuses(dir.path(), &again, &["f", "exists already"]);
    server.stop().await.unwrap();
    complaints.none();
}
