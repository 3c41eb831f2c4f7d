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

/// The configuration of these tests with policies.
fn with(policies: &[(&str, &str)]) -> serde_json::Value {
    let mut config = config();
    policies.iter().for_each(|(kind, policy)| config["ddl"][kind] = json!(policy));
    config
}

/// Numbers of a table at the target.
async fn ids(rig: &Rig, table: &str) -> String {
    list(&rig.target, TARGET, &format!("SELECT id::text FROM {table} ORDER BY id")).await.join(" ")
}

// behaviour: dataplane-12
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_policy_ignores_or_refuses_a_kind_of_change() {
    let mut rig = with_table().await;
    rig.run("CREATE SCHEMA app3; CREATE VIEW app.w AS SELECT 1 AS one").await;
    rig.target
        .sql(TARGET, "CREATE SCHEMA app3; CREATE SCHEMA app; CREATE VIEW app.w AS SELECT 1 AS one")
        .await
        .unwrap();
    let ignored = ["create_schema", "drop_schema", "create_table", "drop_table", "alter_table", "other"];
    let policies: Vec<_> = ignored.into_iter().map(|kind| (kind, "ignore")).collect();
    let config_of_both = with(&[&policies[..], &[("rename_table", "fail")]].concat());
    rig.feed(config_of_both.clone()).await;
    // Somebody else has done there what the rows need.
    let by_hand = "CREATE TABLE app.u (id int PRIMARY KEY, own text DEFAULT 'own'); ALTER TABLE app.t ADD COLUMN more int DEFAULT 7";
    rig.target.sql(TARGET, by_hand).await.unwrap();
    for sql in [
        "CREATE SCHEMA app2; DROP SCHEMA app3",
        "CREATE TABLE app.u (id int PRIMARY KEY); INSERT INTO app.u VALUES (1)",
        "ALTER TABLE app.t ADD COLUMN more int; CREATE INDEX i ON app.t (v); INSERT INTO app.t VALUES (2, 'b', 3)",
        "DROP TABLE app.u; DROP VIEW app.w",
    ] {
        rig.run(sql).await;
    }
    rig.caught_up("changes that are ignored").await;
    let there = "SELECT nspname || ' ' || to_regclass('app.w') || ' ' || (to_regclass('app.i') IS NULL) FROM pg_namespace \
        WHERE nspname LIKE 'app%' ORDER BY 1";
    assert_eq!(list(&rig.target, TARGET, there).await, ["app app.w true", "app3 app.w true"]);
    let rows = "SELECT t::text FROM app.t UNION ALL SELECT u::text FROM app.u ORDER BY 1";
    assert_eq!(list(&rig.target, TARGET, rows).await, ["(1,a,7)", "(1,own)", "(2,b,3)"]);
    // A pause stores the checkpoint: what was ignored is not met again under another policy.
    rig.goes_on(&config_of_both).await;

    rig.run("BEGIN; INSERT INTO app.t VALUES (3, 'c'); ALTER TABLE app.t RENAME TO renamed; COMMIT").await;
    rig.run("CREATE INDEX j ON app.renamed (v); INSERT INTO app.renamed VALUES (4, 'd')").await;
    rig.fails(UNSUPPORTED, &["app.t ", "ddl.rename-table is"]).await;
    assert_eq!(ids(&rig, "app.t").await, "1 2", "nothing of its transaction, nor behind it");
    // Each failure is met by its key alone, and what was refused is executed once that allows it.
    rig.goes_on(&with(&[("alter_table", "fail")])).await;
    rig.fails(UNSUPPORTED, &["app.renamed ", "ddl.alter-table is"]).await;
    rig.goes_on(&with(&[("create_table", "fail")])).await;
    rig.run("CREATE TABLE app.late (id int PRIMARY KEY); INSERT INTO app.late VALUES (1)").await;
    rig.fails(UNSUPPORTED, &["app.late ", "ddl.create-table is"]).await;
    rig.goes_on(&with(&[("create_schema", "fail")])).await;
    rig.run("CREATE SCHEMA app4").await;
    rig.fails(UNSUPPORTED, &["app4 ", "ddl.create-schema is"]).await;
    rig.goes_on(&with(&[("drop_schema", "fail")])).await;
    rig.run("DROP SCHEMA app4").await;
    rig.fails(UNSUPPORTED, &["app4 ", "ddl.drop-schema is"]).await;
    rig.goes_on(&config()).await;
    rig.caught_up("everything is allowed").await;
    assert_eq!((ids(&rig, "app.renamed").await, ids(&rig, "app.late").await), ("1 2 3 4".into(), "1".into()));
    let there = "SELECT nspname || ' ' || to_regclass('app.j') FROM pg_namespace WHERE nspname LIKE 'app%' ORDER BY 1";
    assert_eq!(list(&rig.target, TARGET, there).await, ["app app.j", "app3 app.j"]);
    rig.millrace.stop().await.unwrap();
}

// behaviour: dataplane-12
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_truncation_is_ignored_or_refused_with_its_whole_transaction() {
    let mut rig = Rig::start().await;
    // Without a key a row that came twice would be there twice.
    rig.run(
        "CREATE SCHEMA app; CREATE TABLE app.a (id int PRIMARY KEY); CREATE TABLE app.b (id int PRIMARY KEY REFERENCES app.a); \
         CREATE TABLE app.l (id int); ALTER TABLE app.l REPLICA IDENTITY FULL; \
         CREATE TABLE app.p (id int PRIMARY KEY) PARTITION BY RANGE (id); \
         CREATE TABLE app.p1 PARTITION OF app.p FOR VALUES FROM (0) TO (10); CREATE TABLE app.p2 PARTITION OF app.p DEFAULT; \
         INSERT INTO app.a VALUES (1); INSERT INTO app.b VALUES (1); INSERT INTO app.p VALUES (1), (11)",
    )
    .await;
    let policy = |policy: &str| {
        let mut config = with(&[("truncate_table", policy)]);
        config["force_replicate"] = json!(true);
        config
    };
    let held = async |rig: &Rig| {
        [ids(rig, "app.a").await, ids(rig, "app.b").await, ids(rig, "app.l").await, ids(rig, "app.p").await]
    };
    rig.feed(policy("fail")).await;
    // The target divides the table otherwise: there it would be a DELETE.
    for (truncated, named, after) in [
        ("app.a, app.b", "app.a, app.b ", ["", "", "1 2 3", "1 11"]),
        ("app.p1", "app.p1 ", ["", "", "1 1 2 2 3 3", "11"]),
    ] {
        let before = held(&rig).await;
        rig.run(&format!(
            "BEGIN; INSERT INTO app.l VALUES (1); TRUNCATE {truncated}; INSERT INTO app.l VALUES (2); COMMIT"
        ))
        .await;
        rig.run("INSERT INTO app.l VALUES (3)").await;
        rig.fails(UNSUPPORTED, &[named, "ddl.truncate-table is"]).await;
        assert_eq!(held(&rig).await, before, "nothing of its transaction, nor behind it");
        rig.goes_on(&policy("apply")).await;
        rig.caught_up("it is applied").await;
        assert_eq!(held(&rig).await, after, "it is applied");
        // Behind it, it is not refused again.
        rig.goes_on(&policy("fail")).await;
    }
    rig.run("INSERT INTO app.a VALUES (5); INSERT INTO app.b VALUES (5)").await;
    rig.run("TRUNCATE app.a CASCADE").await;
    rig.fails(UNSUPPORTED, &["app.a", "app.b", "ddl.truncate-table is"]).await;
    rig.goes_on(&policy("ignore")).await;
    for sql in
        ["TRUNCATE app.p2", "TRUNCATE app.p", "INSERT INTO app.l VALUES (4); INSERT INTO app.a VALUES (6)"]
    {
        rig.run(sql).await;
    }
    rig.caught_up("truncations are ignored").await;
    assert_eq!(held(&rig).await, ["5 6", "5", "1 1 2 2 3 3 4", "11"]);
    let log = rig.millrace.log_tail(200);
    for tables in ["app.a, app.b", "app.p"] {
        let told = |line: &&str| line.contains("tables were truncated") && line.contains(tables);
        assert!(log.lines().any(|line| told(&line)), "{tables}: {log}");
    }
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
