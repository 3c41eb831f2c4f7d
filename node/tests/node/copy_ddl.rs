//! Tables that are altered, renamed and dropped while their initial copy runs, and while it is cut off.

use std::path::Path;

use serde_json::{Value, json};
use testkit::{Api, Millrace, PgServer};

use crate::common::{TARGET, assert_same, content, eventually, process_caught_up, servers};

/// Key of the lock for which copies wait.
const HELD: i64 = 4242;

/// Every statement that copies into a table of the target waits for a lock, also into tables that are created later.
const HOLD: &str = "\
    CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS \
    $$ BEGIN PERFORM pg_catalog.pg_advisory_xact_lock_shared(4242); RETURN NULL; END $$; \
    CREATE FUNCTION arm() RETURNS event_trigger LANGUAGE plpgsql AS $$ DECLARE made record; BEGIN \
        FOR made IN SELECT object_identity AS name FROM pg_catalog.pg_event_trigger_ddl_commands() \
            WHERE object_type = 'table' AND schema_name = 'public' LOOP \
            EXECUTE format('CREATE TRIGGER hold BEFORE INSERT ON %s FOR EACH STATEMENT EXECUTE FUNCTION public.hold(); \
                ALTER TABLE %s ENABLE ALWAYS TRIGGER hold', made.name, made.name); \
        END LOOP; END $$; \
    CREATE EVENT TRIGGER arm ON ddl_command_end WHEN TAG IN ('CREATE TABLE') EXECUTE FUNCTION arm(); \
    ALTER EVENT TRIGGER arm ENABLE ALWAYS";

/// Two servers, a program between them, and a lock that holds every copy.
struct Rig {
    source: PgServer,
    target: PgServer,
    millrace: Millrace,
    api: Api,
    holder: tokio_postgres::Client,
    _dir: tempfile::TempDir,
}

impl Rig {
    async fn start(tables: &str) -> Self {
        let (source, target) = servers().await;
        source.sql("postgres", tables).await.unwrap();
        target.sql(TARGET, HOLD).await.unwrap();
        let holder = target.client(TARGET).await.unwrap();
        holder.execute("SELECT pg_advisory_lock($1)", &[&HELD]).await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut millrace = Millrace::new(Path::new(env!("CARGO_BIN_EXE_millrace")), dir.path()).unwrap();
        millrace.start().await.unwrap();
        let api = millrace.api();
        Self { source, target, millrace, api, holder, _dir: dir }
    }

    async fn create(&self, config: &Value) {
        self.api.create("f", &self.source.uri("postgres"), &self.target.uri(TARGET), config).await.unwrap();
    }

    /// Waits until so many copies are held.
    async fn held(&self, copies: i64) {
        let sql =
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 4242 AND NOT granted";
        let what = format!("{copies} copies are held");
        eventually(&what, async || self.holder.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) >= copies)
            .await;
    }

    async fn release(&self) {
        self.holder.execute("SELECT pg_advisory_unlock($1)", &[&HELD]).await.unwrap();
    }

    async fn feed(&self) -> Value {
        self.api.get("/api/v2/changefeeds/f").await.unwrap_or(Value::Null)
    }

    async fn tables(&self) -> Vec<String> {
        let sql = "SELECT relname::text FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' \
                   ORDER BY 1";
        let rows = self.target.client(TARGET).await.unwrap().query(sql, &[]).await.unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    }
}

const TABLES: &str = "\
    CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT i, md5(i::text) FROM generate_series(1, 3000) i; \
    CREATE TABLE moved (id int PRIMARY KEY, v text); INSERT INTO moved SELECT i, 'm' FROM generate_series(1, 2000) i; \
    CREATE TABLE dropped (id int PRIMARY KEY); INSERT INTO dropped SELECT generate_series(1, 1000); \
    CREATE TABLE same (id int PRIMARY KEY); INSERT INTO same SELECT generate_series(1, 500); ANALYZE";

/// What became of them.
const CHANGES: [&str; 6] = [
    "ALTER TABLE t RENAME COLUMN v TO w",
    "ALTER TABLE t ADD COLUMN n bigint DEFAULT 7, ALTER COLUMN id TYPE bigint",
    "INSERT INTO t VALUES (5000000000, 'new', 5000000000)",
    "ALTER TABLE moved RENAME TO renamed",
    "DROP TABLE dropped",
    "CREATE TABLE moved (other uuid PRIMARY KEY); INSERT INTO moved SELECT gen_random_uuid() FROM generate_series(1, 9)",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_that_are_altered_while_their_copy_is_cut_off_are_copied_in_their_new_shape() {
    for capture in ["auto", "off"] {
        let mut rig = Rig::start(TABLES).await;
        rig.create(&json!({ "initial_copy": { "parallel": 4 }, "ddl": { "capture": capture } })).await;
        rig.held(4).await;
        rig.millrace.kill().unwrap();
        // Without its capture nobody follows a rename, and no new table.
        let without = ["moved", "RENAME TO"];
        for change in
            CHANGES.iter().filter(|sql| capture == "auto" || !without.iter().any(|w| sql.contains(w)))
        {
            rig.source.sql("postgres", change).await.unwrap();
        }
        rig.release().await;
        rig.millrace.start().await.unwrap();
        process_caught_up(&rig.millrace, &rig.source).await;
        rig.source.sql("postgres", "UPDATE t SET w = 'changed' WHERE id % 10 = 0").await.unwrap();
        process_caught_up(&rig.millrace, &rig.source).await;
        let expected: &[&str] =
            if capture == "auto" { &["moved", "renamed", "same", "t"] } else { &["moved", "same", "t"] };
        assert_eq!(rig.tables().await, expected, "nothing is left of what is gone");
        for table in expected {
            assert_same(&rig.source, &rig.target, table, capture).await;
        }
        rig.millrace.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_that_are_altered_before_their_turn_make_the_copy_begin_again_and_not_fail() {
    for (capture, change) in [
        ("auto", "ALTER TABLE same RENAME COLUMN id TO no"),
        ("off", "ALTER TABLE same RENAME COLUMN id TO no"),
        ("auto", "DROP TABLE same"),
        ("off", "DROP TABLE same"),
        ("auto", "ALTER TABLE same RENAME TO another"),
    ] {
        let mut rig = Rig::start(TABLES).await;
        rig.create(&json!({ "initial_copy": { "parallel": 1 }, "ddl": { "capture": capture } })).await;
        rig.held(1).await;
        rig.source.sql("postgres", change).await.unwrap();
        rig.release().await;
        process_caught_up(&rig.millrace, &rig.source).await;
        for table in ["t", "moved", "dropped", "same", "another"] {
            let want = content(&rig.source, "postgres", table).await;
            let have = content(&rig.target, TARGET, table).await;
            assert_eq!(want, have, "{table} after {change} with capture {capture}");
        }
        rig.millrace.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_somebody_else_has_made_or_written_to_is_never_dropped() {
    let mut rig = Rig::start(
        "CREATE TABLE made (id int PRIMARY KEY, v text); INSERT INTO made SELECT i, 'x' FROM generate_series(1, 900) i; \
         CREATE TABLE written (id int PRIMARY KEY, v text); INSERT INTO written SELECT i, 'x' FROM generate_series(1, 900) i",
    )
    .await;
    rig.target.sql(TARGET, "CREATE TABLE made (id int PRIMARY KEY, v text)").await.unwrap();
    let ids = "SELECT string_agg(relname || oid::text, ' ' ORDER BY relname) FROM pg_class \
               WHERE relname IN ('made', 'written') AND relkind = 'r'";
    rig.create(&json!({ "initial_copy": { "parallel": 2 } })).await;
    rig.held(2).await;
    rig.millrace.kill().unwrap();
    rig.release().await;
    let before: String = rig.holder.query_one(ids, &[]).await.unwrap().get(0);
    rig.target.sql(TARGET, "INSERT INTO written VALUES (-1, 'theirs')").await.unwrap();
    rig.source
        .sql("postgres", "ALTER TABLE made ADD COLUMN n int; ALTER TABLE written ADD COLUMN n int")
        .await
        .unwrap();
    rig.millrace.start().await.unwrap();
    let fails = async |code: &str| {
        eventually("the changefeed fails", async || rig.feed().await["state"] == "failed").await;
        let feed = rig.feed().await;
        assert_eq!(feed["error"]["code"], code, "{}", feed["error"]);
        let after: String = rig.holder.query_one(ids, &[]).await.unwrap().get(0);
        assert_eq!(before, after, "both tables are those that were there");
        let theirs = rig.holder.query_one("SELECT v FROM written WHERE id = -1", &[]).await.unwrap();
        assert_eq!(theirs.get::<_, &str>(0), "theirs");
    };
    fails("CDC:ErrTargetColumnMissing").await;
    rig.target
        .sql(TARGET, "ALTER TABLE made ADD COLUMN n int; ALTER TABLE written ADD COLUMN n int")
        .await
        .unwrap();
    rig.api.resume("f").await.unwrap();
    fails("CDC:ErrTargetNotEmpty").await;
    rig.target.sql(TARGET, "DELETE FROM written").await.unwrap();
    rig.api.resume("f").await.unwrap();
    process_caught_up(&rig.millrace, &rig.source).await;
    for table in ["made", "written"] {
        assert_same(&rig.source, &rig.target, table, "after people have seen to it").await;
    }
    rig.millrace.stop().await.unwrap();
}
