//! Statements of every kind, from one that concerns a table to one that concerns all of them: both ends have the same
//! schemas, tables and rows, each statement was executed once and in order, and nothing is left of what is gone.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use heartbeatpb::Ts;
use logservice::upstream::generator::{expected_schemas, expected_state, statements};
use serde_json::json;
use testkit::{Api, Millrace, PgServer, Random};

use crate::common::{
    PATIENCE, TARGET, assert_same, checkpoint, expected, files_say, in_database, in_files, server, target,
    until,
};

const TRANSACTIONS: u64 = 1_500;
/// Each kind comes several times.
const DDL_EVERY: u64 = 20;
/// Notes every statement that changes the catalog, as it was sent.
const NOTES: &str = "CREATE TABLE notes (at serial, query text); \
    CREATE FUNCTION note() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER AS \
    $$ BEGIN INSERT INTO public.notes (query) VALUES (current_query()); END $$; \
    CREATE EVENT TRIGGER note ON ddl_command_end EXECUTE FUNCTION note(); \
    ALTER EVENT TRIGGER note ENABLE ALWAYS";

fn from(kinds: &str, seed: u64, rate: u64) -> String {
    format!(
        "generator://bank?seed={seed}&rate={rate}&tables=2&accounts=20&cards=5&history=100\
         &transactions={TRANSACTIONS}&ddl={kinds}&ddl-every={DDL_EVERY}"
    )
}

fn end() -> Ts {
    Ts((TRANSACTIONS + 1) * 16)
}

/// Schemas and tables of the target, without what belongs to the server, the sink and the test.
async fn catalog(target: &PgServer) -> (BTreeSet<String>, BTreeSet<String>) {
    let client = target.client(TARGET).await.unwrap();
    let schemas = "SELECT nspname::text FROM pg_namespace WHERE nspname LIKE 'stage%'";
    let tables = "SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                  WHERE c.relkind = 'r' AND (n.nspname LIKE 'stage%' OR n.nspname = 'bank')";
    let read = async |sql: &str| {
        let rows = client.query(sql, &[]).await.unwrap();
        rows.iter().map(|row| row.get(0)).collect::<BTreeSet<String>>()
    };
    (read(schemas).await, read(tables).await)
}

/// Statements that leave a note. Those on the columns of one table go by themselves; the others are in order.
async fn check_statements(target: &PgServer, uri: &str) {
    let alters = |query: &String| query.contains(" COLUMN ");
    let noted = |query: &String| !query.starts_with("TRUNCATE");
    let wanted: Vec<String> =
        statements(uri, end()).unwrap().into_iter().map(|(_, query)| query).filter(noted).collect();
    let known: BTreeSet<&String> = wanted.iter().collect();
    let client = target.client(TARGET).await.unwrap();
    let rows = client.query("SELECT query FROM notes ORDER BY at", &[]).await.unwrap();
    let found: Vec<String> =
        rows.iter().map(|row| row.get(0)).filter(|query| known.contains(query)).collect();
    let split = |all: &[String]| -> (Vec<String>, Vec<String>) { all.iter().cloned().partition(alters) };
    let ((mut alone, ordered), (mut wanted_alone, wanted_ordered)) = (split(&found), split(&wanted));
    let differs = ordered.iter().zip(&wanted_ordered).find(|(found, wanted)| found != wanted);
    assert!(differs.is_none(), "executed and wanted: {differs:?}");
    assert_eq!(ordered.len(), wanted_ordered.len(), "each once");
    alone.sort();
    wanted_alone.sort();
    assert_eq!(alone, wanted_alone, "each once");
}

/// Both ends are equal, and the sink keeps nothing of tables that are gone.
async fn check_database(target: &PgServer, uri: &str) {
    let (schemas, tables) = catalog(target).await;
    let wanted: BTreeSet<String> = expected_schemas(uri, end()).unwrap().into_iter().collect();
    assert_eq!(schemas, wanted);
    let wanted = expected(uri, end());
    assert_eq!(tables, wanted.keys().cloned().collect());
    for (table, rows) in &wanted {
        assert_same(table, &in_database(target, table).await, rows);
    }
    check_statements(target, uri).await;
    let client = target.client(TARGET).await.unwrap();
    let sql =
        "SELECT DISTINCT table_id FROM millrace.progress UNION SELECT DISTINCT table_id FROM millrace.copy";
    let kept: BTreeSet<i64> = client.query(sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect();
    let there: BTreeSet<i64> =
        expected_state(uri, end()).unwrap().values().map(|table| table.info.id.0).collect();
    assert_eq!(kept, there, "progress of the tables that are there and of no other");
    let view: Option<String> =
        client.query_one("SELECT pg_get_viewdef(to_regclass('stage_1.latest'))", &[]).await.unwrap().get(0);
    let last = statements(uri, end()).unwrap().into_iter().rfind(|(_, query)| query.contains(" VIEW "));
    assert_eq!(view.is_some(), last.is_some());
    if let (Some(view), Some((_, query))) = (view, last) {
        let number = query.split("SELECT ").nth(1).and_then(|rest| rest.split("::").next()).unwrap();
        assert!(view.contains(number), "{view} is not {query}");
    }
}

/// One dispatcher for each table, and the table trigger.
async fn check_dispatchers(api: &Api, millrace: &Millrace, uri: &str) {
    let wanted = expected_state(uri, end()).unwrap().len() as u64 + 1;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = api.get("/api/v2/changefeeds/f/get_dispatcher_count").await;
        if answer.as_ref().is_ok_and(|answer| answer["count"] == wanted) {
            return;
        }
        assert!(Instant::now() < deadline, "not {wanted}: {answer:?}\n{}", millrace.log_tail(40));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

// behaviour: dataplane-3
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_follows_every_kind_of_statement() {
    let target = target().await;
    target.sql(TARGET, NOTES).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (mut millrace, api) = server(dir.path()).await;
    let uri = from("all", 3, 0);
    api.create("f", &uri, &target.uri(TARGET), &json!({})).await.unwrap();
    until("the checkpoint reaches the end", &api, &millrace, |feed| checkpoint(feed) >= end().0).await;
    check_database(&target, &uri).await;
    check_dispatchers(&api, &millrace, &uri).await;
    millrace.stop().await.unwrap();
}

/// Kills the node again and again while it is at statements, until the stream has ended.
async fn killed_at_statements(uri: &str, seed: u64) {
    let target = target().await;
    target.sql(TARGET, NOTES).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (mut millrace, api) = server(dir.path()).await;
    api.create("f", uri, &target.uri(TARGET), &json!({})).await.unwrap();
    let mut random = Random::new(seed, 0);
    let client = target.client(TARGET).await.unwrap();
    let last: Ts = statements(uri, end()).unwrap().last().unwrap().0;
    for round in 1..=6 {
        // The log behind the checkpoint has statements that were executed, and one that is being executed.
        let wanted: i64 = client.query_one("SELECT count(*) FROM notes", &[]).await.unwrap().get(0);
        let wanted = wanted + i64::try_from(random.between(1, 12)).unwrap();
        let deadline = Instant::now() + PATIENCE;
        let mut ended = false;
        while !ended
            && client.query_one("SELECT count(*) FROM notes", &[]).await.unwrap().get::<_, i64>(0) < wanted
        {
            assert!(Instant::now() < deadline, "round {round} stands still\n{}", millrace.log_tail(60));
            let feed = api.get("/api/v2/changefeeds/f").await.unwrap_or_default();
            ended = checkpoint(&feed) > last.0;
            tokio::time::sleep(Duration::from_millis(random.between(1, 15))).await;
        }
        millrace.kill().unwrap();
        millrace.start().await.unwrap();
    }
    until("the checkpoint reaches the end", &api, &millrace, |feed| checkpoint(feed) >= end().0).await;
    check_database(&target, uri).await;
    check_dispatchers(&api, &millrace, uri).await;
    millrace.stop().await.unwrap();
}

// behaviour: dataplane-3
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_is_killed_at_statements_of_every_kind_executes_each_once() {
    killed_at_statements(&from("all", 5, 300), 11).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_is_killed_at_statements_on_schemas_brings_nothing_back() {
    killed_at_statements(&from("create,create-schema,drop-schema,view,move", 6, 300), 12).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_is_killed_at_truncations_and_drops_brings_no_row_back() {
    killed_at_statements(&from("create,drop,truncate,rename", 7, 300), 13).await;
}

fn check_files(dir: &std::path::Path, to: &str, uri: &str) {
    let (found, wanted) = (in_files(dir, to, end()), expected(uri, end()));
    assert_eq!(found.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>());
    for (table, rows) in &wanted {
        assert_same(table, &found[table], rows);
    }
    // Each statement is in one schema file.
    let mut said: BTreeMap<String, u64> = BTreeMap::new();
    let mut open = vec![dir.to_owned()];
    while let Some(at) = open.pop() {
        for entry in std::fs::read_dir(at).unwrap().map(Result::unwrap) {
            let path = entry.path();
            let name = entry.file_name().into_string().unwrap();
            if path.is_dir() {
                open.push(path);
            } else if name.starts_with("schema_") {
                let file: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
                let query = file["Query"].as_str().unwrap();
                let key = format!("{} {query}", file["TableVersion"]);
                *said.entry(key).or_default() += u64::from(!query.is_empty());
            }
        }
    }
    let said: BTreeMap<String, u64> = said.into_iter().filter(|(_, times)| *times > 0).collect();
    let wanted = statements(uri, end()).unwrap();
    let wanted: BTreeMap<String, u64> =
        wanted.into_iter().map(|(ts, query)| (format!("{ts} {query}"), 1)).collect();
    assert_eq!(said, wanted);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_follow_every_kind_of_statement_also_through_kills() {
    for kills in [0, 5] {
        let (dir, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (mut millrace, api) = server(dir.path()).await;
        let uri = from("all", 8 + kills, if kills == 0 { 0 } else { 300 });
        let to = format!(
            "file://{}?protocol=canal-json&enable-tidb-extension=true&flush-interval=100ms",
            files.path().display()
        );
        api.create("f", &uri, &to, &json!({})).await.unwrap();
        for kill in 0..kills {
            let passed = (end().0 / 8) * kill;
            until("the checkpoint moves", &api, &millrace, |feed| checkpoint(feed) >= passed).await;
            millrace.kill().unwrap();
            millrace.start().await.unwrap();
        }
        until("the checkpoint reaches the end", &api, &millrace, |feed| checkpoint(feed) >= end().0).await;
        files_say(files.path(), end()).await;
        check_dispatchers(&api, &millrace, &uri).await;
        millrace.stop().await.unwrap();
        check_files(files.path(), &to, &uri);
    }
}
