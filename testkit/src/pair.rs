//! A source and a target server with the tables of `pgbench`, and the two ways to replicate between them that the
//! benchmarks put side by side: PostgreSQL's own logical replication, and Millrace.

use std::collections::BTreeMap;
use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;
use tokio_postgres::Client;

use crate::postgres::{PASSWORD, program};
use crate::{Millrace, PgServer, compare};

/// Tables of `pgbench`, and one whose row says that everything before it has arrived.
pub const TABLES: [&str; 5] =
    ["pgbench_accounts", "pgbench_branches", "pgbench_tellers", "pgbench_history", "finish"];
/// Publication of the native subscriptions.
const PUBLICATION: &str = "native";
/// A database of the target from which the others are made.
const FRESH: &str = "fresh";
/// Unit of the times in `/proc/PID/stat`.
const TICKS_PER_SECOND: f64 = 100.0;
/// How often a state is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// Processor time of a process, its living descendants, and those of its children that have ended, in seconds.
///
/// # Errors
/// When there is no such process.
pub fn tree_cpu_seconds(root: u32) -> Result<f64> {
    let mut processes: BTreeMap<u32, (u32, f64)> = BTreeMap::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        // It may have ended since it was listed.
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        processes.extend(parent_and_time(&stat).map(|found| (pid, found)));
    }
    if !processes.contains_key(&root) {
        bail!("process {root} is gone");
    }
    let mut total = 0.0;
    for &pid in processes.keys() {
        let mut at = pid;
        // Bounded: a process id that was used again could close a circle.
        for _ in 0..64 {
            if at == root {
                total += processes.get(&pid).map_or(0.0, |(_, seconds)| *seconds);
                break;
            }
            match processes.get(&at) {
                Some((parent, _)) if *parent > 0 => at = *parent,
                Some(_) | None => break,
            }
        }
    }
    Ok(total)
}

/// The parent of a process, and the seconds that it and its reaped children have used.
fn parent_and_time(stat: &str) -> Option<(u32, f64)> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let mut ticks = 0.0;
    for at in 11..=14 {
        ticks += fields.get(at)?.parse::<f64>().ok()?;
    }
    Some((fields.get(1)?.parse().ok()?, ticks / TICKS_PER_SECOND))
}

/// Memory of a process that it shares with nobody, in bytes; 0 when it is gone.
#[must_use]
pub fn private_bytes(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kilobytes = line.and_then(|text| text.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kilobytes.unwrap_or_default() * 1024
}

/// Processes that want the processor now and over the last minute, for people.
#[must_use]
pub fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().unwrap_or("?").to_owned()
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
    /// Changed by `pgbench`, in the database `postgres`.
    pub source: PgServer,
    /// Has a database for each run.
    pub target: PgServer,
    /// `synchronous_commit` of the target, of both ways.
    synchronous_commit: String,
}

impl Pair {
    /// Starts both with `pgbench`'s tables of a size (100,000 accounts each). The target writes as one in service does: `fsync`
    /// and full pages; the source, which is the same for both ways, does not.
    ///
    /// # Errors
    /// When a server does not start.
    pub async fn start(scale: u64, synchronous_commit: &str) -> Result<Self> {
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
        let source = builder().setting("synchronous_commit", "off");
        let (source, target) = tokio::try_join!(source.start(), target.start())?;
        let pair = Self { source, target, synchronous_commit: synchronous_commit.to_owned() };
        pair.target.sql("postgres", &format!("CREATE DATABASE {FRESH}")).await?;
        let scale = scale.to_string();
        for (server, database) in [(&pair.source, "postgres"), (&pair.target, FRESH)] {
            pgbench(server, database, &["-i", "-q", "-s", &scale]).await?;
            let finish = "CREATE TABLE finish (id int PRIMARY KEY); \
                          ALTER TABLE pgbench_history REPLICA IDENTITY FULL, ALTER mtime TYPE timestamptz";
            server.sql(database, finish).await?;
        }
        let publish = format!("CREATE PUBLICATION {PUBLICATION} FOR TABLE {}", TABLES.join(", "));
        pair.source.sql("postgres", &publish).await?;
        Ok(pair)
    }

    /// Processor time of everybody until now.
    ///
    /// # Errors
    /// When a server does not run.
    pub fn times(&self, millrace: Option<&Millrace>) -> Result<Times> {
        Ok(Times {
            source: tree_cpu_seconds(self.source.pid()?)?,
            target: tree_cpu_seconds(self.target.pid()?)?,
            millrace: millrace.map_or(Ok(0.0), |millrace| millrace.usage().map(|usage| usage.cpu_seconds))?,
        })
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
        while client.query_one(active, &[&database]).await?.get::<_, i64>(0) > 0 {
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
        let name = database.replace('_', "-");
        millrace.api().create(&name, &self.source.uri("postgres"), &to, &config).await?;
        millrace.api().pause(&name).await
    }

    /// Ends what was written to the source: a position behind everything, and a row in `finish` that comes last.
    ///
    /// # Errors
    /// When the source refuses it.
    pub async fn finish(&self, number: i32) -> Result<u64> {
        let client = self.source.client("postgres").await?;
        client.batch_execute("SET synchronous_commit = on").await?;
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

    /// Fails unless a database of the target has the rows of the source.
    ///
    /// # Errors
    /// When they differ.
    pub async fn require_equal(&self, database: &str) -> Result<()> {
        let (source, target) =
            tokio::try_join!(self.source.client("postgres"), self.target.client(database))?;
        let comparison = compare(&source, &target, &TABLES[..4]).await?;
        if !comparison.equal() {
            bail!("the ends differ:\n{comparison}");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_process_has_that_of_its_children() {
        let stat = "42 (odd ) name) S 7 2 3 4 5 6 7 8 9 10 100 50 25 25 20 0";
        assert_eq!(
            parent_and_time(stat).map(|(parent, time)| (parent, time.to_bits())),
            Some((7, 2f64.to_bits()))
        );
        assert!(tree_cpu_seconds(std::process::id()).is_ok());
        assert!(private_bytes(std::process::id()) > 0);
    }
}
