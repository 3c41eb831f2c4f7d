//! Several changefeeds of one database share what captures its changes, and a role that may not install it goes without.

use serde_json::json;

use crate::common::{Rig, TARGET, config, list};

const INSTALLED: &str = "SELECT evtname::text FROM pg_event_trigger WHERE evtname LIKE 'millrace%' \
    UNION ALL SELECT nspname::text FROM pg_namespace WHERE nspname = 'millrace_capture' ORDER BY 1";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_installed_is_shared_and_goes_with_the_last_changefeed() {
    let mut rig = Rig::start().await;
    rig.target.sql("postgres", "CREATE DATABASE second").await.unwrap();
    rig.run("CREATE SCHEMA app; CREATE TABLE app.t (id int PRIMARY KEY)").await;
    rig.feed(config()).await;
    let to = rig.target.uri("second");
    let other = json!({ "filter": { "rules": ["app.t", "app.only_here"] }, "ddl": { "capture": "on" } });
    // A change that the first one has not passed when the second one begins.
    rig.api.pause("f").await.unwrap();
    rig.run("ALTER TABLE app.t ADD COLUMN v text").await;
    rig.api.create("g", &rig.source.uri("postgres"), &to, &other).await.unwrap();
    copied(&rig, "g").await;
    rig.run("INSERT INTO app.t VALUES (1, 'one'); CREATE TABLE app.not_there (id int PRIMARY KEY)").await;
    rig.run("CREATE TABLE app.only_here (id int PRIMARY KEY); INSERT INTO app.only_here VALUES (3)").await;
    rig.api.resume("f").await.unwrap();
    rig.run("ALTER TABLE app.t RENAME COLUMN v TO w; UPDATE app.t SET w = 'two'").await;
    rig.caught_up("both run").await;
    rig.assert_same("both run").await;
    let sql = "SELECT w FROM app.t UNION ALL SELECT id::text FROM app.only_here ORDER BY 1";
    let deadline = std::time::Instant::now() + crate::common::PATIENCE;
    loop {
        let client = rig.target.client("second").await.unwrap();
        let rows = client.query(sql, &[]).await.unwrap_or_default();
        let rows: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        if rows == ["3", "two"] {
            break;
        }
        let feed = rig.api.get("/api/v2/changefeeds/g").await;
        assert!(std::time::Instant::now() < deadline, "{rows:?} {feed:?}\n{}", rig.millrace.log_tail(30));
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let tables = "SELECT relname::text FROM pg_class WHERE relnamespace = 'app'::regnamespace AND relkind = 'r' ORDER BY 1";
    assert_eq!(list(&rig.target, "second", tables).await, ["only_here", "t"]);
    assert_eq!(list(&rig.source, "postgres", INSTALLED).await.len(), 4);
    remove(&rig, "g").await;
    assert_eq!(list(&rig.source, "postgres", INSTALLED).await.len(), 4, "the other one needs it");
    rig.run("CREATE TABLE app.later (id int PRIMARY KEY); INSERT INTO app.later VALUES (1)").await;
    rig.caught_up("the other one is gone").await;
    rig.assert_same("the other one is gone").await;
    remove(&rig, "f").await;
    assert!(list(&rig.source, "postgres", INSTALLED).await.is_empty());
    rig.run("CREATE TABLE app.free (id int)").await;
    rig.millrace.stop().await.unwrap();
}

/// Waits until the initial copy of a changefeed is known to be complete.
async fn copied(rig: &Rig, name: &str) {
    let deadline = std::time::Instant::now() + crate::common::PATIENCE;
    loop {
        let feed = rig.api.get(&format!("/api/v2/changefeeds/{name}")).await.unwrap();
        if feed["checkpoint_ts"].as_u64() > feed["start_ts"].as_u64() {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "{name}: {feed}\n{}", rig.millrace.log_tail(30));
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

/// Removes a changefeed and waits until its slot is gone.
async fn remove(rig: &Rig, name: &str) {
    let before =
        list(&rig.source, "postgres", "SELECT slot_name::text FROM pg_replication_slots").await.len();
    let client = node::cli::Client::new(&rig.api.base()).unwrap();
    client.delete(&format!("/api/v2/changefeeds/{name}")).await.unwrap();
    let deadline = std::time::Instant::now() + crate::common::PATIENCE;
    loop {
        let slots =
            list(&rig.source, "postgres", "SELECT slot_name::text FROM pg_replication_slots").await.len();
        let feeds = list(&rig.source, "postgres", "SELECT pubname::text FROM pg_publication").await.len();
        if slots < before && feeds == slots {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "{name} stays\n{}", rig.millrace.log_tail(30));
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_that_may_not_install_goes_without_or_is_refused() {
    let mut rig = Rig::start().await;
    rig.run(
        "CREATE ROLE plain LOGIN REPLICATION PASSWORD 'p'; GRANT CREATE ON DATABASE postgres TO plain; \
         CREATE SCHEMA app AUTHORIZATION plain; SET ROLE plain; CREATE TABLE app.t (id int PRIMARY KEY)",
    )
    .await;
    let from = rig.source.uri_as("plain", "p", "postgres");
    let refused = rig.api.create("f", &from, &rig.target.uri(TARGET), &config()).await.unwrap_err();
    assert!(format!("{refused:?}").contains("CDC:ErrUpstreamPrivilege"), "{refused:?}");
    assert!(list(&rig.source, "postgres", INSTALLED).await.is_empty());
    let auto = json!({ "filter": { "rules": ["app.*"] } });
    let made = rig.api.create("f", &from, &rig.target.uri(TARGET), &auto).await.unwrap();
    assert!(made["warnings"].to_string().contains("no superuser"), "{made}");
    rig.until("the initial copy is complete", |feed| {
        feed["checkpoint_ts"].as_u64() > feed["start_ts"].as_u64()
    })
    .await;
    assert!(list(&rig.source, "postgres", INSTALLED).await.is_empty());
    rig.run("ALTER TABLE app.t ADD COLUMN n int; INSERT INTO app.t VALUES (1, 1)").await;
    rig.fails("CDC:ErrSchemaChangeUnsupported", &["app.t", "\"n\" is new"]).await;
    rig.millrace.stop().await.unwrap();
}
