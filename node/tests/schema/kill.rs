//! Schema changes while the node is killed again and again: each is executed once, at its place.

use std::time::Duration;

use serde_json::json;
use testkit::Random;

use crate::common::{Rig, TARGET, config, list};

/// Notes each statement that changes a table at the target.
const NOTES: &str = "CREATE TABLE notes (at serial, what text); \
    CREATE FUNCTION note() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER AS \
    $$ BEGIN INSERT INTO public.notes (what) SELECT tg_tag FROM pg_event_trigger_ddl_commands() \
        WHERE object_identity LIKE 'app.%'; END $$; \
    CREATE EVENT TRIGGER note ON ddl_command_end WHEN TAG IN ('ALTER TABLE') EXECUTE FUNCTION note(); \
    ALTER EVENT TRIGGER note ENABLE ALWAYS";

const ROUNDS: u32 = 12;

/// Rows, changes, rows, in one transaction; the number makes each round different.
fn round(number: u32) -> String {
    format!(
        "BEGIN; INSERT INTO app.t (id, v) VALUES ({number} * 10, 'before'); \
         ALTER TABLE app.t ADD COLUMN c{number} int DEFAULT {number}; \
         INSERT INTO app.t (id, v, c{number}) VALUES ({number} * 10 + 1, 'between', -1); \
         ALTER TABLE app.t RENAME COLUMN c{number} TO d{number}; \
         UPDATE app.t SET d{number} = 77 WHERE id = {number} * 10; \
         CREATE TABLE app.n{number} (id int PRIMARY KEY); INSERT INTO app.n{number} VALUES ({number}); \
         COMMIT"
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_killed_at_schema_changes_executes_each_once_and_at_its_place() {
    let mut rig = Rig::start().await;
    rig.target.sql(TARGET, NOTES).await.unwrap();
    rig.run("CREATE SCHEMA app; CREATE TABLE app.t (id int PRIMARY KEY, v text); INSERT INTO app.t VALUES (1, 'old')")
        .await;
    rig.feed(json!({ "filter": { "rules": ["app.*"] } })).await;
    let mut random = Random::new(11, 0);
    for number in 1..=ROUNDS {
        rig.run(&round(number)).await;
        tokio::time::sleep(Duration::from_millis(random.between(0, 400))).await;
        if number % 3 == 0 {
            rig.millrace.kill().unwrap();
            // What is changed while it is away is behind its checkpoint too.
            rig.run(&format!("ALTER TABLE app.t ADD COLUMN away{number} text; DROP TABLE app.n{number}"))
                .await;
            rig.millrace.start().await.unwrap();
        }
    }
    rig.caught_up("the last round").await;
    let columns = "SELECT string_agg(attname || ' ' || attnum, ', ' ORDER BY attnum) FROM pg_attribute \
                   WHERE attrelid = 'app.t'::regclass AND attnum > 0 AND NOT attisdropped";
    let rows = "SELECT t::text FROM app.t ORDER BY 1";
    let tables = "SELECT relname::text FROM pg_class WHERE relnamespace = 'app'::regnamespace AND relkind = 'r' ORDER BY 1";
    for sql in [columns, rows, tables] {
        let (here, there) = (list(&rig.source, "postgres", sql).await, list(&rig.target, TARGET, sql).await);
        assert_eq!(here, there, "{sql}");
    }
    // Each round has two changes of the table, and each third one a third.
    let notes = list(&rig.target, TARGET, "SELECT count(*)::text FROM public.notes").await;
    let expected = ROUNDS * 2 + ROUNDS / 3;
    // The default of a column that rows got is set by one statement, and what it says from then on by another.
    assert_eq!(notes, [expected.to_string()], "every change was executed once");
    rig.millrace.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changefeed_that_was_paused_behind_changes_reads_rows_in_the_shape_that_they_had() {
    let mut rig = Rig::start().await;
    rig.run("CREATE SCHEMA app; CREATE TABLE app.t (id int PRIMARY KEY, v text); CREATE TABLE app.gone (id int PRIMARY KEY)")
        .await;
    rig.feed(config()).await;
    rig.api.pause("f").await.unwrap();
    rig.until("it is paused", |feed| feed["state"] == "stopped").await;
    for sql in [
        "INSERT INTO app.t VALUES (1, 'first shape'); INSERT INTO app.gone VALUES (1)",
        "ALTER TABLE app.t ADD COLUMN n int; INSERT INTO app.t VALUES (2, 'second', 2)",
        "ALTER TABLE app.t DROP COLUMN v; INSERT INTO app.t VALUES (3, 3)",
        "ALTER TABLE app.t RENAME TO u; ALTER TABLE app.u ALTER COLUMN n TYPE text USING 'n' || n",
        "INSERT INTO app.u VALUES (4, 'four'); DROP TABLE app.gone; CREATE TABLE app.t (other uuid PRIMARY KEY)",
        "INSERT INTO app.t VALUES ('00000000-0000-0000-0000-000000000001'); UPDATE app.u SET n = 'x' WHERE id = 1",
    ] {
        for part in sql.split("; ") {
            rig.run(part).await;
        }
    }
    rig.api.resume("f").await.unwrap();
    rig.until("it runs", |feed| feed["state"] == "normal").await;
    rig.caught_up("all changes").await;
    rig.assert_same("all changes").await;
    rig.millrace.stop().await.unwrap();
}
