//! A source and a target server with the tables of `pgbench` or of [`load`], and the two ways to replicate between them
//! that the benchmarks put side by side: PostgreSQL's own logical replication, and Millrace.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;
use tokio_postgres::Client;

use crate::postgres::{PASSWORD, program};
use crate::process::tree_cpu_seconds;
use crate::{Millrace, PgServer, compare, load};

/// The tables of a pair.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tables {
    /// Those of `pgbench`, in its unit: 100,000 accounts.
    Pgbench(u64),
    /// Those of [`load`], with about so many rows.
    Mixed(u64),
}

impl Tables {
    /// Their names, as in SQL.
    #[must_use]
    pub fn names(self) -> &'static [&'static str] {
        match self {
            Self::Pgbench(_) => {
                &["pgbench_accounts", "pgbench_branches", "pgbench_tellers", "pgbench_history"]
            }
            Self::Mixed(_) => &load::TABLES,
        }
    }

    /// Makes them and fills them.
    async fn make(self, server: &PgServer, database: &str) -> Result<()> {
        match self {
            Self::Pgbench(scale) => {
                pgbench(server, database, &["-i", "-q", "-s", &scale.to_string()]).await?;
                let history =
                    "ALTER TABLE pgbench_history REPLICA IDENTITY FULL, ALTER mtime TYPE timestamptz";
                server.sql(database, history).await
            }
            Self::Mixed(rows) => load::prepare(&server.client(database).await?, rows).await,
        }
    }
}

/// Makes the table whose row says that everything before it has arrived.
const FINISH: &str = "CREATE TABLE finish (id int PRIMARY KEY)";
/// Publication of the native subscriptions.
const PUBLICATION: &str = "native";
/// A database of the target from which the others are made.
const FRESH: &str = "fresh";
/// How often a state is looked at.
const LOOK: Duration = Duration::from_millis(10);
/// How long a worker may take to let go of its slot.
const LET_GO: Duration = Duration::from_secs(60);

/// Name of the changefeed that writes into a database of the target.
#[must_use]
pub fn feed_name(database: &str) -> String {
    database.replace('_', "-")
}

/// Runs `pgbench` against a database to its end; answers what it printed.
///
/// # Errors
/// When it fails.
pub async fn pgbench(server: &PgServer, database: &str, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(program("pgbench"));
    command.arg("-h").arg(server.socket_dir()).args(["-p", &server.port().to_string(), "-U", "postgres"]);
    command.args(arguments).arg(database).stdin(Stdio::null());
    let output = tokio::task::spawn_blocking(move || command.output()).await?.context("start pgbench")?;
    if !output.status.success() {
        bail!("pgbench: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Processor time that a run took, in seconds.
#[derive(Clone, Copy, Default, Debug)]
pub struct Times {
    /// Of the source server, all of its processes.
    pub source: f64,
    /// Of the target server, all of its processes.
    pub target: f64,
    /// Of Millrace, if it runs.
    pub millrace: f64,
}

impl Times {
    /// Of two servers and Millrace, if it runs, until now.
    ///
    /// # Errors
    /// When one of them is gone.
    pub fn of(source: &PgServer, target: &PgServer, millrace: Option<&Millrace>) -> Result<Self> {
        Ok(Self {
            source: tree_cpu_seconds(source.pid()?)?,
            target: tree_cpu_seconds(target.pid()?)?,
            millrace: millrace.map_or(Ok(0.0), |millrace| millrace.usage().map(|usage| usage.cpu_seconds))?,
        })
    }

    /// What has passed since `before`.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self {
            source: self.source - before.source,
            target: self.target - before.target,
            millrace: self.millrace - before.millrace,
        }
    }
}

impl std::fmt::Display for Times {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { source, target, millrace } = self;
        write!(f, "cpu: source {source:6.2} s, target {target:6.2} s, millrace {millrace:6.2} s")
    }
}

/// A source and a target.
#[derive(Debug)]
pub struct Pair {
    /// Its database `postgres` has the tables that are changed.
    pub source: PgServer,
    /// Has a database for each run.
    pub target: PgServer,
    /// What is replicated.
    pub tables: Tables,
    /// `synchronous_commit` of the target, of both ways.
    synchronous_commit: String,
}

impl Pair {
    /// Starts both with filled tables. The target writes as one in service does: `fsync`
    /// and full pages; the source, which is the same for both ways, does not. But it hands its log to the system at every
    /// commit: with `synchronous_commit = off` there, a commit is sent to nobody before the log writer's next round, a fifth
    /// of a second later.
    ///
    /// # Errors
    /// When a server does not start.
    pub async fn start(tables: Tables, synchronous_commit: &str) -> Result<Self> {
        let builder = || {
            PgServer::builder()
                .setting("max_wal_size", "16GB")
                .setting("checkpoint_timeout", "1h")
                .setting("shared_buffers", "512MB")
                .setting("autovacuum", "off")
                .setting("track_commit_timestamp", "on")
                .setting("max_logical_replication_workers", "8")
        };
        let target = builder()
            .setting("fsync", "on")
            .setting("full_page_writes", "on")
            .setting("synchronous_commit", synchronous_commit);
        let source = builder().setting("synchronous_commit", "on");
        let (source, target) = tokio::try_join!(source.start(), target.start())?;
        let pair = Self { source, target, tables, synchronous_commit: synchronous_commit.to_owned() };
        pair.target.sql("postgres", &format!("CREATE DATABASE {FRESH}")).await?;
        for (server, database) in [(&pair.source, "postgres"), (&pair.target, FRESH)] {
            tables.make(server, database).await?;
            server.sql(database, FINISH).await?;
        }
        let names = tables.names().join(", ");
        let publish = format!("CREATE PUBLICATION {PUBLICATION} FOR TABLE {names}, finish");
        pair.source.sql("postgres", &publish).await?;
        Ok(pair)
    }

    /// Processor time of everybody until now.
    ///
    /// # Errors
    /// When a server does not run.
    pub fn times(&self, millrace: Option<&Millrace>) -> Result<Times> {
        Times::of(&self.source, &self.target, millrace)
    }

    /// Makes a database of the target, with the rows that the source has had at first.
    ///
    /// # Errors
    /// When the target refuses it.
    pub async fn database(&self, name: &str) -> Result<()> {
        self.target.sql("postgres", &format!("CREATE DATABASE {name} TEMPLATE {FRESH}")).await
    }

    /// Removes a database of the target.
    ///
    /// # Errors
    /// When the target refuses it.
    pub async fn remove(&self, name: &str) -> Result<()> {
        self.target.sql("postgres", &format!("DROP DATABASE {name} WITH (FORCE)")).await
    }

    /// Makes a subscription that is not running, and its slot: everything from now on will come through it.
    ///
    /// # Errors
    /// When a server refuses it.
    pub async fn subscribe(&self, database: &str) -> Result<()> {
        self.source
            .client("postgres")
            .await?
            .query("SELECT 1 FROM pg_create_logical_replication_slot($1, 'pgoutput')", &[&database])
            .await?;
        let from =
            format!("host=127.0.0.1 port={} user=postgres password=''{PASSWORD}''", self.source.port());
        // Its password has blanks, so it stands in quotes inside of the connection string.
        let sql = format!(
            "CREATE SUBSCRIPTION {database} CONNECTION '{} dbname=postgres' PUBLICATION {PUBLICATION} WITH (\
             create_slot = false, slot_name = '{database}', copy_data = false, enabled = false, \
             synchronous_commit = '{}')",
            from, self.synchronous_commit
        );
        self.target.sql(database, &sql).await
    }

    /// Lets something change the source; answers how many changes of rows it has made.
    ///
    /// # Errors
    /// When it fails, or the source cannot tell.
    pub async fn counted(&self, make: impl Future<Output = Result<()>>) -> Result<u64> {
        let client = self.source.client("postgres").await?;
        client.batch_execute("SELECT pg_create_logical_replication_slot('counted', 'pgoutput')").await?;
        make.await?;
        // A message begins with its kind, here insert, update or delete ("Logical Replication Message Formats").
        let sql = format!(
            "SELECT count(*) FROM pg_logical_slot_get_binary_changes('counted', NULL, NULL, \
             'proto_version', '1', 'publication_names', '{PUBLICATION}') WHERE get_byte(data, 0) IN (73, 85, 68)"
        );
        let row = client.query_one(&sql, &[]).await?;
        client.batch_execute("SELECT pg_drop_replication_slot('counted')").await?;
        Ok(u64::try_from(row.get::<_, i64>(0))?)
    }

    /// Lets a subscription run, or stops it.
    ///
    /// # Errors
    /// When the target refuses it.
    pub async fn enable(&self, database: &str, on: bool) -> Result<()> {
        let word = if on { "ENABLE" } else { "DISABLE" };
        self.target.sql(database, &format!("ALTER SUBSCRIPTION {database} {word}")).await
    }

    /// Removes a subscription that is not running, and its slot.
    ///
    /// # Errors
    /// When a server refuses it, or its worker does not let go of the slot.
    pub async fn unsubscribe(&self, database: &str) -> Result<()> {
        let sql = format!("ALTER SUBSCRIPTION {database} SET (slot_name = NONE)");
        self.target.sql(database, &sql).await?;
        self.target.sql(database, &format!("DROP SUBSCRIPTION {database}")).await?;
        let client = self.source.client("postgres").await?;
        let active = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = $1 AND active";
        let deadline = Instant::now() + LET_GO;
        while client.query_one(active, &[&database]).await?.get::<_, i64>(0) > 0 {
            if Instant::now() > deadline {
                bail!("the slot of {database} is in use {LET_GO:?} after its subscription was removed");
            }
            tokio::time::sleep(LOOK).await;
        }
        client.query("SELECT pg_drop_replication_slot($1)", &[&database]).await?;
        Ok(())
    }

    /// The process of the worker that applies a subscription, if it runs.
    ///
    /// # Errors
    /// When the target cannot be asked.
    pub async fn apply_worker(&self, client: &Client, database: &str) -> Result<Option<u32>> {
        let sql = "SELECT pid FROM pg_stat_subscription WHERE subname = $1";
        let row = client.query_opt(sql, &[&database]).await?;
        Ok(row.and_then(|row| row.get::<_, Option<i32>>(0)).and_then(|pid| u32::try_from(pid).ok()))
    }

    /// Makes a changefeed that is paused: everything from now on will come through it.
    ///
    /// # Errors
    /// When Millrace refuses it.
    pub async fn feed(&self, millrace: &Millrace, database: &str, query: &str) -> Result<()> {
        let config = json!({ "force_replicate": true, "initial_copy": { "enabled": false } });
        let to = format!("{}{query}", self.target.uri(database));
        let name = feed_name(database);
        millrace.api().create(&name, &self.source.uri("postgres"), &to, &config).await?;
        millrace.api().pause(&name).await
    }

    /// Ends what was written to the source: a position behind everything, and a row in `finish` that comes last.
    ///
    /// # Errors
    /// When the source refuses it.
    pub async fn finish(&self, number: i32) -> Result<u64> {
        let client = self.source.client("postgres").await?;
        client.execute("INSERT INTO finish VALUES ($1)", &[&number]).await?;
        let row = client.query_one("SELECT (pg_current_wal_insert_lsn() - '0/0')::text", &[]).await?;
        let end = row.get::<_, String>(0).parse()?;
        // One more transaction beyond it, so that nobody waits for an idle server's word.
        client.execute("INSERT INTO finish VALUES ($1)", &[&-number]).await?;
        Ok(end)
    }

    /// Whether the row of [`Pair::finish`] has arrived.
    ///
    /// # Errors
    /// When the target cannot be asked.
    pub async fn finished(&self, client: &Client, number: i32) -> Result<bool> {
        Ok(client.query_opt("SELECT 1 FROM finish WHERE id = $1", &[&number]).await?.is_some())
    }

    /// The end of the target's log.
    ///
    /// # Errors
    /// When the target cannot be asked.
    pub async fn target_log(&self) -> Result<String> {
        let client = self.target.client("postgres").await?;
        Ok(client.query_one("SELECT pg_current_wal_insert_lsn()::text", &[]).await?.get(0))
    }

    /// When the transactions behind a position of the target's log committed there, by their ids.
    ///
    /// The log alone knows: of a transaction that a subscription applied, `pg_xact_commit_timestamp` says when it committed
    /// at the source.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub async fn commit_times(&self, from: &str) -> Result<Vec<(i64, String)>> {
        // One more transaction, so that everything before it is in the files.
        let client = self.target.client("postgres").await?;
        let flush = "SET synchronous_commit = on; SELECT pg_logical_emit_message(true, '', '')";
        client.batch_execute(flush).await?;
        let end: String = client.query_one("SELECT pg_current_wal_flush_lsn()::text", &[]).await?.get(0);
        let mut command = Command::new(program("pg_waldump"));
        command.arg("-p").arg(self.target.data().join("pg_wal"));
        command.args(["-r", "Transaction", "-s", from, "-e", &end]).env("TZ", "UTC");
        let output = tokio::task::spawn_blocking(move || command.stdin(Stdio::null()).output()).await?;
        let output = output.context("start pg_waldump")?;
        if !output.status.success() {
            bail!("pg_waldump: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).lines().filter_map(commit_time).collect())
    }

    /// Fails unless a database of the target has the rows of the source.
    ///
    /// # Errors
    /// When they differ.
    pub async fn require_equal(&self, database: &str) -> Result<()> {
        let (source, target) =
            tokio::try_join!(self.source.client("postgres"), self.target.client(database))?;
        let comparison = compare(&source, &target, self.tables.names()).await?;
        if !comparison.equal() {
            bail!("the ends differ:\n{comparison}");
        }
        Ok(())
    }
}

/// Id and time of a commit in a line of `pg_waldump`.
fn commit_time(line: &str) -> Option<(i64, String)> {
    let (head, what) = line.split_once("desc: COMMIT ")?;
    let id = head.split_once("tx:")?.1.split(',').next()?.trim().parse().ok()?;
    Some((id, what.split(';').next()?.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commits_in_the_log_have_an_id_and_the_time_of_the_server_that_applied_them() {
        let native = "rmgr: Transaction len (rec/tot):     65/    65, tx:        755, lsn: 0/0154D0A8, prev 0/0154D068, \
                      desc: COMMIT 2026-01-02 03:04:05.678901 UTC; origin: node 1, lsn 0/1, at 2026-01-02 03:04:05.5 UTC";
        assert_eq!(commit_time(native), Some((755, "2026-01-02 03:04:05.678901 UTC".into())));
        let own = "rmgr: Transaction len (rec/tot):     34/    34, tx:  9, lsn: 0/1, prev 0/0, desc: COMMIT 2026-01-02 03:04:05 UTC";
        assert_eq!(commit_time(own), Some((9, "2026-01-02 03:04:05 UTC".into())));
        assert_eq!(commit_time("rmgr: Transaction, tx: 9, desc: ABORT 2026-01-02 03:04:05 UTC"), None);
    }
}
