//! Changes of one table's columns.

use std::time::{Duration, Instant};

use heartbeatpb::Ts;
use serde_json::json;
use testkit::{PgServer, Random};

use crate::common::{
    PATIENCE, TARGET, assert_same, checkpoint, expected, files_say, in_database, in_files, server, target,
    until,
};

/// Transactions of a stream, and between two schema changes: the last one leaves the column there.
const TRANSACTIONS: u64 = 1990;
const DDL_EVERY: u64 = 50;
const DDLS: i64 = 39;
/// Notes each statement that changes a table; rows of it are what was really executed.
const NOTES: &str = "CREATE TABLE notes (at serial, what text); \
    CREATE FUNCTION note() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER AS \
    $$ BEGIN INSERT INTO public.notes (what) VALUES (tg_tag); END $$; \
    CREATE EVENT TRIGGER note ON ddl_command_end WHEN TAG IN ('ALTER TABLE') EXECUTE FUNCTION note(); \
    ALTER EVENT TRIGGER note ENABLE ALWAYS";

fn from(rate: u64) -> String {
    format!(
        "generator://bank?seed=3&rate={rate}&tables=2&accounts=50&transactions={TRANSACTIONS}&ddl-every={DDL_EVERY}"
    )
}

/// Behind the last transaction.
fn end() -> Ts {
    Ts((TRANSACTIONS + 1) * 16)
}

async fn check_database(target: &PgServer, uri: &str) {
    for (table, rows) in expected(uri, end()) {
        let found = in_database(target, &table).await;
        assert_same(&table, &found, &rows);
    }
    let client = target.client(TARGET).await.unwrap();
    let notes: i64 = client.query_one("SELECT count(*) FROM notes", &[]).await.unwrap().get(0);
    assert_eq!(notes, DDLS, "every schema change was executed once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_of_a_table_are_executed_once_between_its_rows() {
    let target = target().await;
    target.sql(TARGET, NOTES).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (mut millrace, api) = server(dir.path()).await;
    let uri = from(0);
    api.create("f", &uri, &target.uri(TARGET), &json!({})).await.unwrap();
    until("the checkpoint reaches the end", &api, &millrace, |feed| checkpoint(feed) >= end().0).await;
    check_database(&target, &uri).await;
    millrace.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_is_killed_at_schema_changes_executes_none_twice() {
    let target = target().await;
    target.sql(TARGET, NOTES).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (mut millrace, api) = server(dir.path()).await;
    let uri = from(400);
    api.create("f", &uri, &target.uri(TARGET), &json!({})).await.unwrap();
    let mut random = Random::new(7, 0);
    let client = target.client(TARGET).await.unwrap();
    for round in 1..=4 {
        // Somewhere behind a few more changes: the checkpoint is behind what was executed.
        let wanted = round * 7;
        let deadline = Instant::now() + PATIENCE;
        while client.query_one("SELECT count(*) FROM notes", &[]).await.unwrap().get::<_, i64>(0) < wanted {
            assert!(Instant::now() < deadline, "stands still\n{}", millrace.log_tail(40));
            tokio::time::sleep(Duration::from_millis(random.between(1, 20))).await;
        }
        millrace.kill().unwrap();
        millrace.start().await.unwrap();
    }
    until("the checkpoint reaches the end", &api, &millrace, |feed| checkpoint(feed) >= end().0).await;
    check_database(&target, &uri).await;
    millrace.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_hold_every_shape_and_the_rows_of_each() {
    let (dir, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (mut millrace, api) = server(dir.path()).await;
    let (from, to) = (
        from(0),
        format!("file://{}?protocol=canal-json&enable-tidb-extension=true", files.path().display()),
    );
    api.create("f", &from, &to, &json!({})).await.unwrap();
    until("the checkpoint reaches the end", &api, &millrace, |feed| checkpoint(feed) >= end().0).await;
    // The files say it a little later.
    files_say(files.path(), end()).await;
    millrace.stop().await.unwrap();
    let found = in_files(files.path(), &to, end());
    for (table, rows) in expected(&from, end()) {
        assert_same(&table, &found[&table], &rows);
    }
    let shapes = std::fs::read_dir(files.path().join("bank/accounts_0/meta")).unwrap().count();
    assert!(shapes >= usize::try_from(DDLS).unwrap(), "{shapes} shapes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_that_the_target_refuses_stops_the_changefeed_and_names_itself() {
    let target = target().await;
    target
        .sql(
            TARGET,
            "CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS \
             $$ BEGIN RAISE insufficient_privilege USING MESSAGE = 'no changes today'; END $$; \
             CREATE EVENT TRIGGER refuse ON ddl_command_start WHEN TAG IN ('ALTER TABLE') \
             EXECUTE FUNCTION refuse(); ALTER EVENT TRIGGER refuse ENABLE ALWAYS",
        )
        .await
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (mut millrace, api) = server(dir.path()).await;
    api.create("f", &from(0), &target.uri(TARGET), &json!({})).await.unwrap();
    let feed = until("the refusal is told", &api, &millrace, |feed| {
        feed["error"]["code"].is_string() && feed["state"] != "normal"
    })
    .await;
    let message = feed["error"]["message"].as_str().unwrap();
    assert_eq!(feed["error"]["code"], "CDC:ErrSinkPermission", "{feed}");
    assert!(message.contains("an ALTER TABLE of"), "{message}");
    let first = (DDL_EVERY + 1) * 16 - 4;
    assert!(checkpoint(&feed) < first, "{feed}");
    target.sql(TARGET, "DROP EVENT TRIGGER refuse").await.unwrap();
    let _ = api.resume("f").await;
    until("the changefeed goes on", &api, &millrace, |feed| checkpoint(feed) >= end().0).await;
    millrace.stop().await.unwrap();
}
