//! Indexes of tables that the initial copy creates: made when the rows are there, each once, also when it is killed.

use std::path::Path;

use serde_json::json;
use testkit::{Millrace, PgServer};

use crate::common::{TARGET, assert_same, eventually, process_caught_up, servers};

/// Tables with indexes of every kind.
const TABLES: &str = "\
    CREATE TYPE mood AS ENUM ('glad', 'sad'); \
    CREATE TABLE many (id int PRIMARY KEY, a int, b text COLLATE \"C\", j jsonb, m mood, u int UNIQUE); \
    CREATE UNIQUE INDEX many_pair ON many (a, b DESC NULLS LAST); \
    CREATE UNIQUE INDEX many_some ON many (a) WHERE a > 100; \
    CREATE INDEX many_lower ON many (lower(b)) INCLUDE (a); \
    CREATE INDEX many_json ON many USING gin (j jsonb_path_ops); \
    CREATE INDEX \"Many \"\"Moods\"\"\" ON many (m, a DESC); \
    CREATE INDEX many_when ON many USING brin (id) WITH (pages_per_range = 4) WHERE m = 'sad'; \
    INSERT INTO many SELECT i, i, md5(i::text), jsonb_build_object('i', i), 'sad', -i FROM generate_series(1, 9000) i; \
    CREATE TABLE pages (id uuid PRIMARY KEY, v int); CREATE INDEX pages_v ON pages (v); \
    INSERT INTO pages SELECT gen_random_uuid(), i FROM generate_series(1, 9000) i; \
    CREATE TABLE parted (id int, v int, PRIMARY KEY (id)) PARTITION BY RANGE (id); CREATE INDEX parted_v ON parted (v); \
    CREATE TABLE parted_a PARTITION OF parted FOR VALUES FROM (MINVALUE) TO (300); \
    CREATE TABLE parted_b PARTITION OF parted FOR VALUES FROM (300) TO (MAXVALUE); \
    INSERT INTO parted SELECT i, i FROM generate_series(1, 900) i; \
    CREATE TABLE found (k int NOT NULL UNIQUE, w int); CREATE INDEX found_w ON found (w); \
    ALTER TABLE found REPLICA IDENTITY USING INDEX found_k_key; INSERT INTO found SELECT i, i FROM generate_series(1, 900) i; \
    CREATE TABLE theirs (id int PRIMARY KEY, v int); CREATE INDEX theirs_v ON theirs (v); \
    INSERT INTO theirs SELECT i, i FROM generate_series(1, 900) i; \
    CREATE FUNCTION only_here(int) RETURNS int IMMUTABLE LANGUAGE sql AS 'SELECT $1'; \
    CREATE INDEX theirs_here ON parted (only_here(v)); ANALYZE";

/// Keeps how many rows were ever written into two tables, and whether they had another index than their primary key then;
/// lets each new index wait for a lock, and keeps its name.
const WATCH: &str = "\
    CREATE TABLE theirs (id int PRIMARY KEY, v int); CREATE INDEX parted_v ON theirs (id, v); \
    CREATE TABLE seen (name text, rows bigint, indexes bigint); CREATE TABLE built (name text); \
    CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
        INSERT INTO public.seen SELECT tg_relid::regclass::text, (SELECT count(*) FROM new_rows), \
            (SELECT count(*) FROM pg_catalog.pg_index WHERE indrelid = tg_relid AND NOT indisprimary); RETURN NULL; END $$; \
    CREATE FUNCTION arm() RETURNS event_trigger LANGUAGE plpgsql AS $$ DECLARE made record; BEGIN \
        FOR made IN SELECT object_identity AS name FROM pg_catalog.pg_event_trigger_ddl_commands() \
            WHERE object_type = 'table' AND object_identity IN ('public.many', 'public.pages') LOOP \
            EXECUTE pg_catalog.format('CREATE TRIGGER see AFTER INSERT ON %s REFERENCING NEW TABLE AS new_rows \
                FOR EACH STATEMENT EXECUTE FUNCTION public.see(); ALTER TABLE %s ENABLE ALWAYS TRIGGER see', \
                made.name, made.name); \
        END LOOP; END $$; \
    CREATE EVENT TRIGGER arm ON ddl_command_end WHEN TAG IN ('CREATE TABLE') EXECUTE FUNCTION arm(); \
    ALTER EVENT TRIGGER arm ENABLE ALWAYS; \
    CREATE FUNCTION wait() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN \
        PERFORM pg_catalog.pg_advisory_xact_lock_shared(4243); \
        INSERT INTO public.built SELECT object_identity FROM pg_catalog.pg_event_trigger_ddl_commands(); END $$; \
    CREATE EVENT TRIGGER wait ON ddl_command_end WHEN TAG IN ('CREATE INDEX') EXECUTE FUNCTION wait(); \
    ALTER EVENT TRIGGER wait ENABLE ALWAYS";

/// The indexes of a table, primary keys aside.
const INDEXES: &str = "SELECT pg_get_indexdef(indexrelid) FROM pg_index \
    WHERE indrelid = $1::text::regclass AND NOT indisprimary ORDER BY 1";

async fn indexes(server: &PgServer, database: &str, table: &str) -> Vec<String> {
    let rows = server.client(database).await.unwrap().query(INDEXES, &[&table]).await.unwrap();
    rows.iter().map(|row| row.get::<_, String>(0).replace(" ON ONLY ", " ON ")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn indexes_are_made_when_the_rows_are_there_and_once_also_when_the_copy_is_killed_among_them() {
    let (source, target) = servers().await;
    source.sql("postgres", TABLES).await.unwrap();
    target.sql(TARGET, WATCH).await.unwrap();
    let holder = target.client(TARGET).await.unwrap();
    holder.execute("SELECT pg_advisory_lock(4243)", &[]).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut millrace = Millrace::new(Path::new(env!("CARGO_BIN_EXE_millrace")), dir.path()).unwrap();
    millrace.start().await.unwrap();
    let api = millrace.api();
    let config = json!({ "force_replicate": true, "initial_copy": { "parallel": 2, "part_bytes": 65536 } });
    api.create("f", &source.uri("postgres"), &target.uri(TARGET), &config).await.unwrap();
    let waiting = async |least: i64| {
        let sql =
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 4243 AND NOT granted";
        eventually("indexes are being made", async || {
            holder.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) >= least
        })
        .await;
    };
    waiting(2).await;
    let progress = api.get("/api/v2/changefeeds/f/progress").await.unwrap();
    let states: Vec<&str> =
        progress["copy"]["tables"].as_array().unwrap().iter().filter_map(|t| t["state"].as_str()).collect();
    assert!(states.contains(&"indexing"), "{progress}");
    millrace.kill().unwrap();
    // What was being made is rolled back: nobody has committed it.
    holder.execute("SELECT pg_advisory_unlock(4243)", &[]).await.unwrap();
    holder.execute("SELECT pg_advisory_lock(4243)", &[]).await.unwrap();
    millrace.start().await.unwrap();
    waiting(2).await;
    holder.execute("SELECT pg_advisory_unlock(4243)", &[]).await.unwrap();
    process_caught_up(&millrace, &source).await;
    for table in ["many", "pages", "found"] {
        assert_eq!(
            indexes(&source, "postgres", table).await,
            indexes(&target, TARGET, table).await,
            "{table}"
        );
    }
    let parted = indexes(&target, TARGET, "parted").await;
    assert_eq!(
        parted,
        ["CREATE INDEX parted_v_idx ON public.parted USING btree (v)"],
        "its name was taken, and one function is missing"
    );
    assert_eq!(
        indexes(&target, TARGET, "theirs").await,
        ["CREATE INDEX parted_v ON public.theirs USING btree (id, v)"],
        "somebody else's table is left alone"
    );
    let constraint = "SELECT count(*) FROM pg_constraint WHERE conname = 'many_u_key' AND contype = 'u'";
    assert_eq!(holder.query_one(constraint, &[]).await.unwrap().get::<_, i64>(0), 1);
    let built = "SELECT count(*) - count(DISTINCT name) FROM built WHERE name <> 'public.theirs'";
    assert_eq!(holder.query_one(built, &[]).await.unwrap().get::<_, i64>(0), 0, "each index is made once");
    let seen = "SELECT sum(rows)::bigint, max(indexes) FROM seen WHERE name LIKE '%' || $1 || '%'";
    for table in ["many", "pages"] {
        let row = holder.query_one(seen, &[&table]).await.unwrap();
        let (rows, with) = (row.get::<_, Option<i64>>(0), row.get::<_, Option<i64>>(1));
        assert_eq!(
            (rows, with),
            (Some(9000), Some(0)),
            "{table}: rows are written once, and without indexes"
        );
    }
    // The stream goes on with all of them.
    let change = "UPDATE many SET a = a + 20000, u = u - 20000 WHERE id % 3 = 0; UPDATE found SET w = 0 WHERE k < 10; \
                  DELETE FROM pages WHERE v > 5000; DROP INDEX many_json; ALTER INDEX many_lower RENAME TO many_small; \
                  ALTER TABLE many DROP CONSTRAINT many_u_key; UPDATE many SET u = 1 WHERE id < 10";
    source.sql("postgres", change).await.unwrap();
    process_caught_up(&millrace, &source).await;
    for table in ["many", "pages", "parted", "found", "theirs"] {
        assert_same(&source, &target, table, "changed").await;
    }
    assert_eq!(indexes(&source, "postgres", "many").await, indexes(&target, TARGET, "many").await);
    millrace.stop().await.unwrap();
}
