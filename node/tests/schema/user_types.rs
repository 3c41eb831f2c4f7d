//! Types of a user that the target has otherwise.

use crate::common::{Rig, TARGET, config, list};

const TYPES: &str = "CREATE SCHEMA app; CREATE TYPE app.mood AS ENUM ('bad', 'good'); \
    CREATE TYPE app.pair AS (a int, b text); CREATE DOMAIN app.small AS int CHECK (VALUE < 10); \
    CREATE TABLE app.t (id int PRIMARY KEY, m app.mood, p app.pair, s app.small)";

async fn rows(rig: &Rig, after: &str) {
    let sql = "SELECT t::text FROM app.t t ORDER BY 1";
    let (here, there) = (list(&rig.source, "postgres", sql).await, list(&rig.target, TARGET, sql).await);
    assert_eq!(here, there, "{after}\n{}", rig.millrace.log_tail(20));
}

/// The changefeed says what is wrong with the target; a person mends it, and it goes on with the row that it stood at.
async fn until_mended(rig: &Rig, row: &str, code: &str, words: &[&str], mend: &str) {
    rig.run(&format!("INSERT INTO app.t VALUES {row}")).await;
    let told = rig
        .until(&format!("it says {code}"), |feed| {
            feed["error"]["code"] == code
                || feed["last_error"]["code"] == code
                || feed["last_warning"]["code"] == code
        })
        .await
        .to_string();
    for word in words {
        assert!(told.contains(word), "{word} is missing in {told}");
    }
    rig.target.sql(TARGET, mend).await.unwrap();
    if rig.state().await["state"] == "failed" {
        rig.api.resume("f").await.unwrap();
    }
    rig.until("it runs", |feed| feed["state"] == "normal").await;
    rig.caught_up(row).await;
    rows(rig, row).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_value_that_the_targets_type_does_not_have_stops_the_changefeed_until_it_is_mended() {
    let mut rig = Rig::start().await;
    rig.run(TYPES).await;
    rig.target
        .sql(
            TARGET,
            "CREATE SCHEMA app; CREATE TYPE app.mood AS ENUM ('awful', 'bad'); CREATE TYPE app.pair AS (a int); \
             CREATE DOMAIN app.small AS int CHECK (VALUE < 5); \
             CREATE TABLE app.t (id int PRIMARY KEY, m app.mood, p app.pair, s app.small)",
        )
        .await
        .unwrap();
    rig.run("INSERT INTO app.t VALUES (1, 'bad', NULL, 1)").await;
    rig.feed(config()).await;
    rows(&rig, "the copy").await;
    let code = "CDC:ErrSinkData";
    until_mended(
        &rig,
        "(2, 'good', NULL, 1)",
        code,
        &["22P02", "type app.mood"],
        "ALTER TYPE app.mood ADD VALUE 'good'",
    )
    .await;
    until_mended(
        &rig,
        "(3, 'bad', '(1,x)', 1)",
        code,
        &["22P02", "app.pair"],
        "ALTER TYPE app.pair ADD ATTRIBUTE b text",
    )
    .await;
    until_mended(
        &rig,
        "(4, 'bad', '(1,x)', 7)",
        "CDC:ErrSinkConstraint",
        &["23514"],
        "ALTER DOMAIN app.small DROP CONSTRAINT small_check",
    )
    .await;
    rig.millrace.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_of_types_that_the_target_has_otherwise_are_followed_as_far_as_they_go() {
    let mut rig = Rig::start().await;
    rig.run(TYPES).await;
    // Other labels beside them, one that comes later there already, and a field that comes later too.
    rig.target
        .sql(
            TARGET,
            "CREATE SCHEMA app; CREATE TYPE app.mood AS ENUM ('fair', 'good', 'bad'); \
             CREATE TYPE app.pair AS (a int, b text, more int); CREATE DOMAIN app.small AS bigint; \
             CREATE TABLE app.t (id int PRIMARY KEY, m app.mood, p app.pair, s app.small)",
        )
        .await
        .unwrap();
    rig.feed(config()).await;
    rig.run("ALTER TYPE app.mood ADD VALUE 'fair' AFTER 'bad'").await;
    rig.run("ALTER TYPE app.mood ADD VALUE 'best' AFTER 'fair'; ALTER TYPE app.pair ADD ATTRIBUTE more int")
        .await;
    rig.run("ALTER DOMAIN app.small ADD CONSTRAINT odd CHECK (VALUE % 2 = 1); ALTER DOMAIN app.small DROP CONSTRAINT small_check")
        .await;
    rig.run("INSERT INTO app.t VALUES (1, 'best', '(1,x,3)', 11), (2, 'fair', NULL, NULL)").await;
    rig.caught_up("types").await;
    rows(&rig, "types").await;
    // A label that the target has under both names.
    rig.target.sql(TARGET, "ALTER TYPE app.mood ADD VALUE 'great'").await.unwrap();
    rig.run("ALTER TYPE app.mood RENAME VALUE 'best' TO 'great'").await;
    rig.fails("CDC:ErrDDLUnsupported", &["app", "mood", "best", "great", "resume"]).await;
    rig.target.sql(TARGET, "ALTER TYPE app.mood RENAME VALUE 'great' TO 'nobody has it'").await.unwrap();
    rig.api.resume("f").await.unwrap();
    rig.until("it runs", |feed| feed["state"] == "normal").await;
    rig.run("INSERT INTO app.t (id, m) VALUES (3, 'great')").await;
    rig.caught_up("it is mended").await;
    rows(&rig, "it is mended").await;
    rig.millrace.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn types_follow_their_tables_wherever_they_are() {
    let mut rig = Rig::start().await;
    rig.run("CREATE SCHEMA app").await;
    rig.feed(config()).await;
    for sql in [
        "CREATE SCHEMA elsewhere; CREATE TYPE elsewhere.e AS ENUM ('a'); CREATE TYPE elsewhere.c AS (l elsewhere.e[])",
        "CREATE DOMAIN elsewhere.d AS elsewhere.c; CREATE TABLE app.t (id int PRIMARY KEY, c elsewhere.d)",
        "ALTER TYPE elsewhere.e ADD VALUE 'b'",
        "INSERT INTO app.t VALUES (1, '(\"{a,b}\")')",
        "ALTER TYPE elsewhere.e RENAME TO e2; ALTER TYPE elsewhere.e2 ADD VALUE 'c'",
        "ALTER TYPE elsewhere.c ADD ATTRIBUTE n int",
        "INSERT INTO app.t VALUES (2, '({c},2)')",
    ] {
        rig.run(sql).await;
    }
    rig.caught_up("types of another schema").await;
    rows(&rig, "types of another schema").await;
    rig.assert_same("types of another schema").await;
    rig.millrace.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_of_a_type_gets_its_new_fields() {
    let mut rig = Rig::start().await;
    rig.run("CREATE SCHEMA app").await;
    rig.feed(config()).await;
    rig.run("CREATE TYPE app.row AS (id int, v text); CREATE TABLE app.t OF app.row (PRIMARY KEY (id))")
        .await;
    rig.run("INSERT INTO app.t VALUES (1, 'v')").await;
    rig.run("ALTER TYPE app.row ADD ATTRIBUTE more int CASCADE; INSERT INTO app.t VALUES (2, 'w', 2)").await;
    rig.run("ALTER TYPE app.row RENAME ATTRIBUTE v TO w CASCADE; UPDATE app.t SET w = 'x' WHERE id = 1")
        .await;
    rig.caught_up("its type has other fields").await;
    rows(&rig, "its type has other fields").await;
    rig.millrace.stop().await.unwrap();
}
