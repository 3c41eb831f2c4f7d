//! Values of sequences, which the log does not have: the target's are always ahead of what rows were given.

use serde_json::json;

use crate::common::{PATIENCE, Rig, TARGET, config, list};

/// Sequences of every kind: alone, of a column, of an identity, backwards, in a circle, and nearly at its end.
const SCHEMA: &str = "CREATE SCHEMA app; CREATE SEQUENCE app.alone; \
    CREATE TABLE app.t (id serial PRIMARY KEY, v text); \
    CREATE TABLE app.\"I d\" (\"The Id\" bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v text); \
    CREATE SEQUENCE app.down INCREMENT -5 CACHE 3; CREATE SEQUENCE app.round MAXVALUE 20 CYCLE; \
    CREATE SEQUENCE app.narrow MAXVALUE 100; CREATE SEQUENCE app.unused; CREATE SCHEMA other; CREATE SEQUENCE other.s";
const USE: &str = "INSERT INTO app.t (v) SELECT 'v' FROM generate_series(1, 40); \
    INSERT INTO app.\"I d\" (v) SELECT 'v' FROM generate_series(1, 30); \
    SELECT nextval('app.alone') FROM generate_series(1, 50); SELECT nextval('app.down') FROM generate_series(1, 7); \
    SELECT nextval('app.round') FROM generate_series(1, 33); SELECT nextval('app.narrow') FROM generate_series(1, 90); \
    SELECT nextval('other.s')";

/// The last value of a sequence of the target; what was never used has none.
async fn last(rig: &Rig, name: &str) -> Option<i64> {
    let sql = format!("SELECT COALESCE(pg_sequence_last_value(pg_catalog.to_regclass('{name}'))::text, '-')");
    list(&rig.target, TARGET, &sql).await[0].parse().ok()
}

/// Waits until a sequence of the target has a value.
async fn until(rig: &Rig, name: &str, what: &str, probe: impl Fn(Option<i64>) -> bool) -> Option<i64> {
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let value = last(rig, name).await;
        if probe(value) {
            return value;
        }
        let state = rig.state().await;
        assert!(
            std::time::Instant::now() < deadline,
            "{name} never was {what}: {value:?} {state}\n{}",
            rig.millrace.log_tail(30)
        );
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

fn with(ddl: serde_json::Value) -> serde_json::Value {
    let mut config = config();
    for (key, value) in ddl.as_object().unwrap() {
        config["ddl"][key] = value.clone();
    }
    config
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sequences_of_the_target_stand_where_those_of_the_source_do() {
    let mut rig = Rig::start().await;
    rig.run(SCHEMA).await;
    rig.target.sql(TARGET, SCHEMA).await.unwrap();
    // The name of one that belongs to a column does not matter.
    rig.target.sql(TARGET, "ALTER SEQUENCE app.\"I d_The Id_seq\" RENAME TO another").await.unwrap();
    rig.run(USE).await;
    rig.feed(with(json!({ "sequence_ahead": 0, "sequence_interval": "1s" }))).await;
    for (name, value) in [
        ("app.alone", 50),
        ("app.t_id_seq", 40),
        ("app.another", 30),
        ("app.down", -41),
        ("app.round", 13),
        ("app.narrow", 90),
    ] {
        until(&rig, name, "carried", |last| last == Some(value)).await;
    }
    assert_eq!((last(&rig, "app.unused").await, last(&rig, "other.s").await), (None, None));
    rig.run(USE.replace("app.narrow", "app.alone").as_str()).await;
    // What is set back is set back, and what is new is carried when it is there.
    rig.run("SELECT setval('app.narrow', 7); CREATE SEQUENCE app.late; SELECT nextval('app.late')").await;
    until(&rig, "app.late", "carried", |last| last == Some(1)).await;
    until(&rig, "app.alone", "carried", |last| last == Some(190)).await;
    until(&rig, "app.narrow", "set back", |last| last == Some(7)).await;
    until(&rig, "app.round", "carried", |last| last == Some(6)).await;
    rig.caught_up("sequences").await;
    // Somebody else takes over, and nobody is told a number twice.
    rig.millrace.stop().await.unwrap();
    rig.run("SELECT nextval('app.alone')").await;
    rig.millrace.start().await.unwrap();
    until(&rig, "app.alone", "carried", |last| last == Some(191)).await;
    rig.millrace.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_fail_over_the_target_gives_no_number_twice() {
    let mut rig = Rig::start().await;
    rig.run(SCHEMA).await;
    rig.target.sql(TARGET, SCHEMA).await.unwrap();
    rig.run(USE).await;
    // Nothing is said about sequences, and schema changes are not captured.
    rig.feed(json!({ "filter": { "rules": ["app.*"] }, "ddl": { "capture": "off" } })).await;
    until(&rig, "app.t_id_seq", "ahead", |last| last >= Some(1040)).await;
    until(&rig, "app.narrow", "ahead", |last| last == Some(95)).await;
    // Writers do not stop before the source is lost.
    rig.run(USE.replace("app.narrow", "app.alone").as_str()).await;
    rig.caught_up("the last rows").await;
    rig.millrace.kill().unwrap();
    let rows = list(&rig.target, TARGET, "SELECT max(id)::text FROM app.t").await;
    assert_eq!(rows, ["80"]);
    rig.target
        .sql(TARGET, "INSERT INTO app.t (v) VALUES ('after'); INSERT INTO app.\"I d\" (v) VALUES ('after')")
        .await
        .unwrap();
    let new = list(&rig.target, TARGET, "SELECT (min(id) > 80)::text FROM app.t WHERE v = 'after'").await;
    assert_eq!(new, ["true"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sequences_that_nobody_may_set_or_wants_do_not_hold_rows_up() {
    let mut rig = Rig::start().await;
    rig.run(SCHEMA).await;
    rig.target.sql(TARGET, SCHEMA).await.unwrap();
    rig.target
        .sql(
            TARGET,
            &format!(
                "CREATE ROLE writer LOGIN PASSWORD 'w'; GRANT CREATE ON DATABASE {TARGET} TO writer; \
                 GRANT USAGE ON SCHEMA app TO writer; GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON ALL TABLES \
                 IN SCHEMA app TO writer; GRANT UPDATE ON SEQUENCE app.alone TO writer"
            ),
        )
        .await
        .unwrap();
    let to = format!("{}?session-replication-role=origin", rig.target.uri_as("writer", "w", TARGET));
    let config = with(json!({ "sequence_ahead": 0, "sequence_interval": "1s" }));
    rig.api.create("f", &rig.source.uri("postgres"), &to, &config).await.unwrap();
    rig.until("the initial copy is complete", |feed| {
        feed["checkpoint_ts"].as_u64() > feed["start_ts"].as_u64()
    })
    .await;
    rig.run(USE).await;
    until(&rig, "app.alone", "carried", |last| last == Some(50)).await;
    rig.caught_up("sequences").await;
    assert_eq!(last(&rig, "app.round").await, None, "not permitted");
    // What is left alone by choice.
    rig.api.pause("f").await.unwrap();
    rig.until("it is paused", |feed| feed["state"] == "stopped").await;
    let config = with(json!({ "sequence_values": false, "sequence_interval": "1s" }));
    rig.api.put("/api/v2/changefeeds/f", &json!({ "replica_config": config })).await.unwrap();
    rig.api.resume("f").await.unwrap();
    rig.until("it runs", |feed| feed["state"] == "normal").await;
    rig.run("SELECT nextval('app.alone'); INSERT INTO app.t (v) VALUES ('last')").await;
    rig.caught_up("the last row").await;
    assert_eq!(last(&rig, "app.alone").await, Some(50));
    rig.millrace.stop().await.unwrap();
}
