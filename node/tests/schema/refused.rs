//! What cannot be followed stops the changefeed with a named error, and what a person decides is respected.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::common::{Rig, TARGET, config, list};

const UNSUPPORTED: &str = "CDC:ErrSchemaChangeUnsupported";

async fn with_table() -> Rig {
    let rig = Rig::start().await;
    rig.run("CREATE SCHEMA app; CREATE TABLE app.t (id int PRIMARY KEY, v text); INSERT INTO app.t VALUES (1, 'a')").await;
    rig
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn values_that_the_target_cannot_compute_stop_the_changefeed() {
    let mut rig = with_table().await;
    rig.feed(config()).await;
    rig.run("ALTER TABLE app.t ADD COLUMN r float DEFAULT random()").await;
    rig.fails(UNSUPPORTED, &["app.t", "\"r\"", "UPDATE"]).await;
    rig.millrace.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_type_whose_expression_is_hidden_in_a_function_stops_the_changefeed() {
    let mut rig = with_table().await;
    rig.feed(config()).await;
    rig.run("DO $$ BEGIN ALTER TABLE app.t ALTER COLUMN v TYPE int USING length(v); END $$").await;
    rig.fails(UNSUPPORTED, &["app.t", "new type"]).await;
    rig.millrace.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_table_without_a_key_stops_the_changefeed_until_it_is_mended() {
    let mut rig = with_table().await;
    rig.feed(config()).await;
    rig.run("CREATE TABLE app.log (line text)").await;
    rig.fails("CDC:ErrTableIneligible", &["app.log", "ignore-ineligible-table"]).await;
    rig.run("ALTER TABLE app.log ADD COLUMN id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY").await;
    rig.run("INSERT INTO app.log (line) VALUES ('one')").await;
    rig.api.resume("f").await.unwrap();
    rig.until("it runs", |feed| feed["state"] == "normal").await;
    rig.caught_up("the table is mended").await;
    rig.assert_same("the table is mended").await;
    rig.millrace.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_gets_a_wanted_name_with_rows_is_copied() {
    let mut rig = with_table().await;
    rig.run("CREATE TABLE app.hidden (id int PRIMARY KEY); INSERT INTO app.hidden VALUES (1)").await;
    rig.feed(json!({ "filter": { "rules": ["app.*", "!app.hidden"] } })).await;
    rig.run("ALTER TABLE app.t RENAME TO hidden2; ALTER TABLE app.hidden RENAME TO shown").await;
    rig.run("INSERT INTO app.shown VALUES (2)").await;
    // It comes when the log has been read up to its new name.
    let published = "SELECT 'yes' FROM pg_publication_rel WHERE prrelid = 'app.shown'::regclass";
    let deadline = Instant::now() + Duration::from_secs(90);
    while list(&rig.source, "postgres", published).await.is_empty() {
        assert!(Instant::now() < deadline, "it does not come");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    rig.caught_up("the table has come").await;
    rig.assert_same("the table has come").await;
    rig.millrace.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_gets_an_unwanted_name_is_renamed_and_not_followed_any_more() {
    let mut rig = with_table().await;
    rig.feed(json!({ "filter": { "rules": ["app.*", "!app.hidden"] } })).await;
    rig.run("ALTER TABLE app.t RENAME TO hidden; INSERT INTO app.hidden VALUES (2, 'b'); CREATE TABLE app.t (id int PRIMARY KEY)").await;
    rig.run("INSERT INTO app.t VALUES (7)").await;
    rig.caught_up("the rename").await;
    let rows = list(
        &rig.target,
        TARGET,
        "SELECT id::text FROM app.hidden UNION ALL SELECT id::text FROM app.t ORDER BY 1",
    )
    .await;
    assert_eq!(rows, ["1", "7"]);
    rig.millrace.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_policy_ignores_or_refuses_a_kind_of_change() {
    let mut rig = with_table().await;
    let mut config = config();
    config["ddl"] = json!({ "capture": "on", "drop_table": "ignore", "rename_table": "fail" });
    rig.feed(config).await;
    rig.run("CREATE TABLE app.u (id int PRIMARY KEY); INSERT INTO app.u VALUES (1)").await;
    rig.run("DROP TABLE app.u").await;
    rig.caught_up("the table is dropped").await;
    assert_eq!(
        list(&rig.target, TARGET, "SELECT id::text FROM app.u").await,
        ["1"],
        "it stays at the target"
    );
    rig.run("ALTER TABLE app.t RENAME TO renamed").await;
    rig.fails(UNSUPPORTED, &["app.t", "ddl.rename-table"]).await;
    rig.millrace.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn statements_about_anything_else_change_nothing_at_the_target() {
    let mut rig = with_table().await;
    rig.feed(config()).await;
    for sql in [
        "CREATE FUNCTION app.f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
        "CREATE TRIGGER tr BEFORE INSERT ON app.t FOR EACH ROW EXECUTE FUNCTION app.f(); ALTER TABLE app.t DISABLE TRIGGER tr",
        "CREATE RULE r AS ON DELETE TO app.t DO ALSO NOTIFY deleted",
        "ALTER TABLE app.t ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON app.t USING (true)",
        "CREATE ROLE somebody; GRANT SELECT ON app.t TO somebody; COMMENT ON TABLE app.t IS 'words'",
        "CREATE EXTENSION citext SCHEMA app; DROP EXTENSION citext",
        "CREATE MATERIALIZED VIEW app.m AS SELECT count(*) FROM app.t; REFRESH MATERIALIZED VIEW app.m",
        "ALTER TABLE app.t ALTER COLUMN v SET STORAGE EXTERNAL, ALTER COLUMN v SET STATISTICS 10, SET (fillfactor = 50)",
        "ALTER TABLE app.t OWNER TO somebody",
        "INSERT INTO app.t VALUES (2, 'b')",
    ] {
        rig.run(sql).await;
    }
    rig.caught_up("statements about anything else").await;
    rig.assert_same("statements about anything else").await;
    let there = "SELECT proname::text FROM pg_proc WHERE pronamespace = 'app'::regnamespace \
        UNION ALL SELECT relname::text FROM pg_class WHERE relnamespace = 'app'::regnamespace AND relkind = 'm'";
    assert!(list(&rig.target, TARGET, there).await.is_empty());
    rig.millrace.stop().await.unwrap();
}
