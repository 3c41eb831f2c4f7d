//! A source, a target, a node between them, and what both ends hold.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use testkit::{Api, Millrace, PgServer};

/// How long a state may take to come: the machines that run this are busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);
pub(crate) const TARGET: &str = "target";

/// What a catalog says of tables, without ids, as sorted lines. Both ends must say the same.
const CATALOG: &str = "\
WITH relations AS (\
    SELECT c.oid, c.relkind, c.relpartbound, c.relispartition, n.oid AS schema, n.nspname, c.relname, \
        format('%I.%I', n.nspname, c.relname) AS name \
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
    WHERE c.relkind IN ('r', 'p') AND c.relpersistence = 'p' AND n.nspname !~ '^pg_' \
        AND n.nspname NOT IN ('information_schema', 'millrace', 'millrace_capture')), \
columns AS (\
    SELECT r.name, a.attname, row_number() OVER (PARTITION BY r.oid ORDER BY a.attnum) AS place, \
        format_type(a.atttypid, a.atttypmod) AS type, a.attnotnull, a.attgenerated, a.attidentity, \
        NULLIF(regexp_replace(pg_get_expr(d.adbin, d.adrelid), '^nextval.*', ''), '') AS value, a.attcollation::regcollation::text AS sorting \
    FROM relations r JOIN pg_attribute a ON a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped \
        LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum) \
SELECT 'schema ' || nspname FROM pg_namespace \
    WHERE nspname !~ '^pg_' AND nspname NOT IN ('information_schema', 'millrace', 'millrace_capture') \
UNION ALL SELECT concat_ws(' ', 'table', name, relkind, CASE WHEN relkind = 'p' THEN pg_get_partkeydef(oid) END, \
    pg_get_expr(relpartbound, oid)) FROM relations \
UNION ALL SELECT concat_ws(' ', 'column', name, place, attname, type, attnotnull, attgenerated, attidentity, value, \
    sorting) FROM columns \
UNION ALL SELECT concat_ws(' ', 'constraint', r.name, k.conname, pg_get_constraintdef(k.oid), k.convalidated) \
    FROM relations r JOIN pg_constraint k ON k.conrelid = r.oid WHERE k.contype IN ('p', 'u', 'c', 'f', 'x') \
UNION ALL SELECT concat_ws(' ', 'view', format('%I.%I', schemaname, viewname), definition) FROM pg_views \
    WHERE schemaname LIKE 'app%' \
UNION ALL SELECT concat_ws(' ', 'sequence', format('%I.%I', schemaname, sequencename), start_value, min_value, max_value, \
    increment_by, cycle, data_type) FROM pg_sequences WHERE schemaname LIKE 'app%' AND NOT EXISTS (SELECT FROM pg_depend \
    WHERE objid = format('%I.%I', schemaname, sequencename)::regclass AND deptype = 'i') \
UNION ALL SELECT concat_ws(' ', 'type', t.oid::regtype, t.typtype, format_type(t.typbasetype, t.typtypmod), \
    (SELECT string_agg(enumlabel, ',' ORDER BY enumsortorder) FROM pg_enum WHERE enumtypid = t.oid), \
    (SELECT string_agg(conname || ' ' || pg_get_constraintdef(oid), ',' ORDER BY conname) FROM pg_constraint \
        WHERE contypid = t.oid), (SELECT string_agg(attname || ' ' || format_type(atttypid, atttypmod), ',' ORDER BY attnum) \
        FROM pg_attribute WHERE attrelid = t.typrelid AND NOT attisdropped), t.typdefault) \
    FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace LEFT JOIN pg_class c ON c.oid = t.typrelid \
    WHERE n.nspname LIKE 'app%' AND t.typtype IN ('e', 'd', 'c') AND (t.typrelid = 0 OR c.relkind = 'c') \
UNION ALL SELECT concat_ws(' ', 'index', pg_get_indexdef(i.indexrelid)) \
    FROM relations r JOIN pg_index i ON i.indrelid = r.oid \
ORDER BY 1";

/// The tables of a catalog.
const TABLES: &str = "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n \
    ON n.oid = c.relnamespace WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relpersistence = 'p' \
    AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'millrace', 'millrace_capture') ORDER BY 1";

/// A source, a target, and a node between them.
pub(crate) struct Rig {
    pub(crate) source: PgServer,
    pub(crate) target: PgServer,
    pub(crate) millrace: Millrace,
    pub(crate) api: Api,
    _dir: tempfile::TempDir,
}

impl Rig {
    /// Both databases are empty and nothing replicates yet.
    pub(crate) async fn start() -> Self {
        let (source, target) = tokio::try_join!(PgServer::start(), PgServer::start()).unwrap();
        target.sql("postgres", &format!("CREATE DATABASE {TARGET}")).await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut millrace = Millrace::new(Path::new(env!("CARGO_BIN_EXE_millrace")), dir.path()).unwrap();
        millrace.start().await.unwrap();
        let api = millrace.api();
        Self { source, target, millrace, api, _dir: dir }
    }

    /// Executes statements at the source.
    pub(crate) async fn run(&self, sql: &str) {
        self.source.sql("postgres", sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    /// Creates the changefeed `f` and waits until its initial copy is known to be complete.
    pub(crate) async fn feed(&self, config: Value) {
        let (from, to) = (self.source.uri("postgres"), self.target.uri(TARGET));
        self.api.create("f", &from, &to, &config).await.unwrap();
        self.until("the initial copy is complete", |feed| {
            feed["checkpoint_ts"].as_u64() > feed["start_ts"].as_u64()
        })
        .await;
    }

    /// State of the changefeed `f`.
    pub(crate) async fn state(&self) -> Value {
        self.api.get("/api/v2/changefeeds/f").await.unwrap_or(Value::Null)
    }

    /// Waits for a state of the changefeed.
    pub(crate) async fn until(&self, what: &str, probe: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let feed = self.state().await;
            if probe(&feed) {
                return feed;
            }
            assert!(
                Instant::now() < deadline,
                "never came true: {what}: {feed}\n{}",
                self.millrace.log_tail(40)
            );
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    }

    /// The changefeed, which runs or has failed, goes on with another configuration.
    pub(crate) async fn goes_on(&self, config: &Value) {
        if self.state().await["state"] != "failed" {
            self.api.pause("f").await.unwrap();
            self.until("it is paused", |feed| feed["state"] == "stopped").await;
        }
        self.api.put("/api/v2/changefeeds/f", &json!({ "replica_config": config })).await.unwrap();
        self.api.resume("f").await.unwrap();
        self.until("it runs", |feed| feed["state"] == "normal").await;
    }

    /// End of the source's log.
    pub(crate) async fn position(&self) -> u64 {
        let client = self.source.client("postgres").await.unwrap();
        let sql = "SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint";
        u64::try_from(client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0)).unwrap()
    }

    /// Waits until everything that the source has committed is at the target.
    pub(crate) async fn caught_up(&self, after: &str) {
        let end = self.position().await;
        let what = format!("the checkpoint passes: {after}");
        let passed = |feed: &Value| {
            assert_ne!(feed["state"], "failed", "{after}: {}", feed["error"]);
            feed["checkpoint_ts"].as_u64().unwrap_or_default() >= end
        };
        self.until(&what, passed).await;
    }

    /// Waits until a table has the same rows at both ends.
    pub(crate) async fn until_same(&self, table: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (source, target) = tokio::join!(plain(&self.source, "postgres"), plain(&self.target, TARGET));
            let sql = format!("SELECT t::text FROM {table} t ORDER BY 1");
            let there = target.query(&sql, &[]).await.unwrap_or_default();
            let there: Vec<String> = there.iter().map(|row| row.get(0)).collect();
            if there == texts(&source, &sql).await {
                return;
            }
            assert!(Instant::now() < deadline, "{table}: {there:?}\n{}", self.millrace.log_tail(40));
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    }

    /// Waits for a failure, which names its code and some words.
    pub(crate) async fn fails(&self, code: &str, words: &[&str]) -> Value {
        let feed = self.until(&format!("it fails with {code}"), |feed| feed["state"] == "failed").await;
        let message = feed["error"]["message"].as_str().unwrap();
        assert_eq!(feed["error"]["code"], code, "{message}");
        for word in words {
            assert!(message.contains(word), "{word} is missing in {message}");
        }
        feed
    }

    /// Both ends hold the same tables and rows.
    pub(crate) async fn assert_same(&self, after: &str) {
        let (source, target) = tokio::join!(plain(&self.source, "postgres"), plain(&self.target, TARGET));
        let (here, there) = tokio::join!(texts(&source, CATALOG), texts(&target, CATALOG));
        assert_eq!(
            only_in(&here, &there),
            only_in(&there, &here),
            "after {after}: left only at the source, right only at the target\n{}",
            self.millrace.log_tail(20)
        );
        for table in texts(&source, TABLES).await {
            let sql = format!("SELECT t::text FROM {table} t ORDER BY 1");
            let (here, there) = tokio::join!(texts(&source, &sql), texts(&target, &sql));
            assert_eq!(here, there, "rows of {table} after {after}");
        }
    }
}

/// The lines of one list that the other one has not.
fn only_in<'a>(one: &'a [String], other: &[String]) -> Vec<&'a String> {
    one.iter().filter(|line| !other.contains(line)).collect()
}

/// A connection on which names are told with their schema.
async fn plain(server: &PgServer, database: &str) -> tokio_postgres::Client {
    let client = server.client(database).await.unwrap();
    client.batch_execute("SET search_path = ''").await.unwrap();
    client
}

/// The first column of a query's rows.
pub(crate) async fn list(server: &PgServer, database: &str, sql: &str) -> Vec<String> {
    texts(&plain(server, database).await, sql).await
}

async fn texts(client: &tokio_postgres::Client, sql: &str) -> Vec<String> {
    let rows = client.query(sql, &[]).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    rows.iter().map(|row| row.get(0)).collect()
}

/// A configuration that replicates the schemas of these tests.
pub(crate) fn config() -> Value {
    json!({ "filter": { "rules": ["app*.*", "public.*"] }, "ddl": { "capture": "on" } })
}
