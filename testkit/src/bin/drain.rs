//! Measures how fast Millrace reads a backlog of changes, next to `pg_recvlogical` on the same backlog.

use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use serde_json::json;
use testkit::figures::{load, median};
use testkit::pair;
use testkit::plot::{self, Bar};
use testkit::postgres::{PASSWORD, program};
use testkit::process::tree_cpu_seconds;
use testkit::{Millrace, PgServer, Usage};
use tokio_postgres::Client;

/// Publication that `pg_recvlogical` reads; Millrace makes its own, over the same tables.
const PUBLICATION: &str = "drain";
/// Row changes of one transaction of the backlog: three updates and an insert.
const CHANGES_PER_TRANSACTION: u64 = 4;
/// How long one reader may take for the whole backlog.
const DRAIN_LIMIT: Duration = Duration::from_secs(1800);
/// How often a state is looked at; also the precision of the times.
const LOOK: Duration = Duration::from_millis(10);
/// Lines of the server's log that are shown after a failure.
const LOG_LINES: usize = 50;

/// Measures how fast Millrace reads a backlog of changes, next to `pg_recvlogical` on the same backlog.
#[derive(Parser, Debug)]
#[command(name = "drain")]
struct Arguments {
    /// The program; by default the one that was built beside this one.
    #[arg(long)]
    millrace: Option<PathBuf>,
    /// Row changes of the backlog.
    #[arg(long, default_value_t = 5_000_000)]
    changes: u64,
    /// How often each reader reads the backlog.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=9))]
    rounds: u64,
    /// Connections that make the backlog.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=32))]
    connections: u64,
    /// Size of the tables: 100,000 accounts each, or 10,000 wide rows.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=1000))]
    scale: u64,
    /// Rows of which shape; of wide and mixed ones a fifth as many are changed.
    #[arg(long, value_enum)]
    rows: Option<Rows>,
    /// Measure `pg_recvlogical` alone.
    #[arg(long)]
    dry: bool,
    /// Draws the rates into a file, as SVG.
    #[arg(long)]
    plot: Option<PathBuf>,
}

/// What is changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Rows {
    /// The tables of `pgbench`, with its transactions.
    Pgbench,
    /// A table of fourteen columns with 0.9 kB in a row, as many changes in a transaction.
    Wide,
    /// The same table, with a value of 1 B to 64 KiB in a row, as many of each power of two.
    Mixed,
}

impl Rows {
    const fn name(self) -> &'static str {
        match self {
            Self::Pgbench => "pgbench",
            Self::Wide => "wide",
            Self::Mixed => "mixed",
        }
    }

    /// Row changes of a backlog of which so many are asked for.
    const fn changes(self, asked: u64) -> u64 {
        match self {
            Self::Pgbench => asked,
            Self::Wide | Self::Mixed => asked / 5,
        }
    }
}

/// Columns of the wide table.
const WIDE: &str = "id bigint PRIMARY KEY, a text, b text, n1 numeric, n2 numeric, f1 float8, f2 float8, j jsonb, u uuid, \
    t1 timestamptz, t2 timestamptz, d date, raw bytea, l int[]";
/// Values of a wide row after its key, by a number `i`.
const WIDE_VALUES: &str = "repeat(md5(i::text), 10), repeat('wide ', 40), i / 7.0, -i::numeric, i / 3.0, random(), \
    jsonb_build_object('i', i, 'name', md5(i::text)), gen_random_uuid(), now(), now() - i * interval '1 s', \
    '2000-01-01'::date + (i % 9000)::int, decode(repeat(md5(i::text), 4), 'hex'), ARRAY[i, i + 1]::int[]";

/// What one reader needed for the backlog.
#[derive(Clone, Copy, Debug, Default)]
struct Measure {
    wall_seconds: f64,
    cpu_seconds: f64,
    /// Processor time of the server meanwhile, all of its processes.
    server_seconds: f64,
    peak_bytes: u64,
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(&Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: &Arguments) -> Result<()> {
    let mut bars = Vec::new();
    for rows in [Rows::Pgbench, Rows::Wide, Rows::Mixed] {
        if arguments.rows.is_none_or(|only| only == rows) {
            bars.extend(of_shape(arguments, rows).await.with_context(|| format!("{} rows", rows.name()))?);
        }
    }
    if let Some(path) = &arguments.plot {
        plot::save(path, plot::bars("Row changes a second that are read of a backlog", &bars))?;
    }
    Ok(())
}

async fn of_shape(arguments: &Arguments, rows: Rows) -> Result<Vec<Bar>> {
    let server = PgServer::builder()
        .setting("max_wal_size", "16GB")
        .setting("shared_buffers", "256MB")
        .setting("synchronous_commit", "off")
        .setting("autovacuum", "off")
        .start()
        .await?;
    let client = server.client("postgres").await?;
    prepare(arguments, rows, &server, &client).await.context("prepare the tables")?;
    let work = tempfile::Builder::new().prefix("millrace-drain-").tempdir()?;
    let mut millrace = match arguments.dry {
        true => None,
        false => {
            let program = arguments.millrace.clone().unwrap_or_else(Millrace::default_program);
            Some(Millrace::new(&program, work.path())?)
        }
    };
    let bench =
        Bench { arguments, rows, server: &server, client: &client, script: work.path().join("load.sql") };
    let outcome = bench.measure(millrace.as_mut()).await;
    if let (Err(_), Some(millrace)) = (&outcome, &millrace) {
        println!("the last lines of millrace's log:\n{}", millrace.log_tail(LOG_LINES));
    }
    outcome
}

async fn prepare(arguments: &Arguments, rows: Rows, server: &PgServer, client: &Client) -> Result<()> {
    let publish = match rows {
        Rows::Pgbench => {
            let scale = arguments.scale.to_string();
            pair::pgbench(server, "postgres", &["-i", "-q", "-s", &scale]).await?;
            // The one table of pgbench without a key only gets inserts; with this every table is eligible.
            client.batch_execute("ALTER TABLE pgbench_history REPLICA IDENTITY FULL").await?;
            "pgbench_accounts, pgbench_branches, pgbench_tellers, pgbench_history"
        }
        Rows::Wide | Rows::Mixed => {
            let many = arguments.scale * 10_000;
            let fill = format!(
                "CREATE TABLE wide ({WIDE}); \
                 INSERT INTO wide SELECT i, {WIDE_VALUES} FROM generate_series(1, {many}::bigint) AS i; \
                 CREATE SEQUENCE wide_id START {}",
                many + 1
            );
            client.batch_execute(&fill).await?;
            "wide"
        }
    };
    client.batch_execute(&format!("CREATE PUBLICATION {PUBLICATION} FOR TABLE {publish}")).await?;
    for round in 1..=arguments.rounds {
        let query = "SELECT 1 FROM pg_create_logical_replication_slot($1, 'pgoutput')";
        client.query(query, &[&slot(round)]).await?;
    }
    Ok(())
}

/// A transaction of the wide table as a script of `pgbench`; `None` for `pgbench`'s own.
fn script(rows: Rows, scale: u64) -> Option<String> {
    match rows {
        Rows::Pgbench => None,
        Rows::Wide => Some(wide_script(scale)),
        Rows::Mixed => Some(mixed_script()),
    }
}

/// Three updates and an insert, as `pgbench` has.
fn wide_script(scale: u64) -> String {
    let each = scale * 10_000 / 3;
    let mut script = String::from("BEGIN;\n");
    for part in 0..3 {
        // Each statement in a part of its own, so that transactions do not wait for each other in a circle.
        script.push_str(&format!(
            "\\set id random({}, {})\nUPDATE wide SET a = repeat(md5(:id::text || random()), 10), n1 = n1 + 1, f2 = random() \
             WHERE id = :id;\n",
            part * each + 1,
            (part + 1) * each
        ));
    }
    script
        .push_str(&format!("INSERT INTO wide SELECT i, {WIDE_VALUES} FROM nextval('wide_id') AS i;\nEND;\n"));
    script
}

/// As many inserts.
fn mixed_script() -> String {
    let insert =
        "INSERT INTO wide (id, a) VALUES (nextval('wide_id'), repeat('m', (2 ^ (16 * random()))::int));\n";
    let inserts: String = (0..CHANGES_PER_TRANSACTION).map(|_| insert).collect();
    format!("BEGIN;\n{inserts}END;\n")
}

fn slot(round: u64) -> String {
    format!("drain_{round}")
}

fn feed(round: u64) -> String {
    format!("drain-{round}")
}

/// A server with tables of a shape.
struct Bench<'a> {
    arguments: &'a Arguments,
    rows: Rows,
    server: &'a PgServer,
    client: &'a Client,
    script: PathBuf,
}

impl Bench<'_> {
    async fn measure(&self, mut millrace: Option<&mut Millrace>) -> Result<Vec<Bar>> {
        if let Some(millrace) = millrace.as_deref_mut() {
            create_feeds(self.arguments, self.server, millrace).await?;
        }
        let end = self.backlog().await?;
        let (mut theirs, mut ours) = (Vec::new(), Vec::new());
        for round in 1..=self.arguments.rounds {
            let other = recvlogical(self.server, &slot(round), end).await?;
            self.print(&format!("round {round} pg_recvlogical"), other);
            theirs.push(other);
            if let Some(millrace) = millrace.as_deref_mut() {
                let own = drain(self.server, millrace, &feed(round), end).await?;
                self.print(&format!("round {round} millrace"), own);
                ours.push(own);
            }
        }
        let by = |measure: &Measure| measure.wall_seconds;
        let other = median(&theirs, by);
        self.print("median pg_recvlogical", other);
        let mut bars = vec![self.bar("pg_recvlogical", 0, other)];
        if millrace.is_some() {
            let own = median(&ours, by);
            self.print("median millrace", own);
            bars.push(self.bar("millrace", 1, own));
            let ratio = other.wall_seconds / own.wall_seconds;
            println!("{}: rate of millrace / rate of pg_recvlogical: {ratio:.3}", self.rows.name());
        }
        Ok(bars)
    }

    fn bar(&self, name: &str, colour: usize, measure: Measure) -> Bar {
        let value = self.rate(measure);
        Bar { name: format!("{}: {name}", self.rows.name()), value, text: format!("{value:.0}"), colour }
    }

    #[expect(clippy::cast_precision_loss, reason = "counts of changes")]
    fn rate(&self, measure: Measure) -> f64 {
        self.rows.changes(self.arguments.changes) as f64 / measure.wall_seconds
    }

    /// Makes the changes. Answers a position that is behind all of them.
    async fn backlog(&self) -> Result<u64> {
        let started = Instant::now();
        let Arguments { connections, changes, scale, .. } = self.arguments;
        let changes = self.rows.changes(*changes);
        let each = (changes / CHANGES_PER_TRANSACTION / connections).max(1).to_string();
        let connections = connections.to_string();
        let mut how = vec!["-n", "-M", "prepared", "-c", &connections, "-j", "2", "-t", &each];
        if let Some(script) = script(self.rows, *scale) {
            std::fs::write(&self.script, script).context("write the script of the load")?;
            how.extend(["-f", self.script.to_str().context("the temporary folder's name is not UTF-8")?]);
        }
        pair::pgbench(self.server, "postgres", &how).await?;
        let query = "SELECT (pg_current_wal_insert_lsn() - '0/0')::text";
        let end: u64 = self.client.query_one(query, &[]).await?.get::<_, String>(0).parse()?;
        // One more transaction beyond it: both readers meet it and stop, without waiting for an idle server's word.
        let last = match self.rows {
            Rows::Pgbench => "INSERT INTO pgbench_history VALUES (0, 0, 0, 0, now())",
            Rows::Wide | Rows::Mixed => "INSERT INTO wide (id) VALUES (0)",
        };
        self.client.batch_execute(&format!("SET synchronous_commit = on; {last}; CHECKPOINT")).await?;
        let seconds = started.elapsed().as_secs_f64();
        println!("{}: backlog of {changes} row changes, made in {seconds:.0} s", self.rows.name());
        Ok(end)
    }

    fn print(&self, name: &str, measure: Measure) {
        let Measure { wall_seconds, cpu_seconds, server_seconds, peak_bytes } = measure;
        let rate = self.rate(measure);
        println!(
            "{:8}{name:24} {wall_seconds:8.2} s wall  {cpu_seconds:8.2} s cpu  {server_seconds:8.2} s of the server  \
             {:6} MiB peak  {rate:10.0} changes/s  load {}",
            self.rows.name(),
            peak_bytes >> 20,
            load()
        );
    }
}

/// One changefeed per round, paused before the backlog so that its slot holds all of it.
async fn create_feeds(arguments: &Arguments, server: &PgServer, millrace: &mut Millrace) -> Result<()> {
    millrace.start().await?;
    let config = json!({ "force_replicate": true, "initial_copy": { "enabled": false } });
    for round in 1..=arguments.rounds {
        let name = feed(round);
        millrace.api().create(&name, &server.uri("postgres"), "blackhole://", &config).await?;
        millrace.api().pause(&name).await?;
    }
    millrace.stop().await
}

async fn recvlogical(server: &PgServer, slot: &str, end: u64) -> Result<Measure> {
    // Both readers come over TCP, as most do.
    let connection = format!("host=127.0.0.1 port={} user=postgres dbname=postgres", server.port());
    let before = tree_cpu_seconds(server.pid()?)?;
    let started = Instant::now();
    let mut child = Command::new(program("pg_recvlogical"))
        .args([
            "-d",
            &connection,
            "-S",
            slot,
            "--start",
            "--no-loop",
            "-f",
            "/dev/null",
            "-o",
            "proto_version=1",
        ])
        .args(["-o", &format!("publication_names={PUBLICATION}")])
        .args(["--endpos", &format!("{:X}/{:X}", end >> 32, end & 0xffff_ffff)])
        .env("PGPASSWORD", PASSWORD)
        .stdin(Stdio::null())
        .spawn()
        .context("start pg_recvlogical")?;
    let mut peak_bytes = 0;
    loop {
        // A process that has ended keeps its times until it is reaped below.
        let usage = Usage::of(child.id())?;
        peak_bytes = peak_bytes.max(usage.peak_bytes);
        if usage.ended {
            let wall_seconds = started.elapsed().as_secs_f64();
            let status = child.wait()?;
            if !status.success() {
                bail!("pg_recvlogical: {status}");
            }
            let server_seconds = tree_cpu_seconds(server.pid()?)? - before;
            let cpu_seconds = usage.cpu_seconds;
            return Ok(Measure { wall_seconds, cpu_seconds, server_seconds, peak_bytes });
        }
        if started.elapsed() > DRAIN_LIMIT {
            child.kill()?;
            child.wait()?;
            bail!("pg_recvlogical did not reach the end of the backlog within {DRAIN_LIMIT:?}");
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Resumes a changefeed in a fresh process, so that each round has its own memory and processor time.
async fn drain(server: &PgServer, millrace: &mut Millrace, name: &str, end: u64) -> Result<Measure> {
    millrace.start().await?;
    let before = (millrace.usage()?, tree_cpu_seconds(server.pid()?)?);
    let started = Instant::now();
    millrace.api().resume(name).await?;
    millrace.reach(name, end, DRAIN_LIMIT, || ()).await?;
    let wall_seconds = started.elapsed().as_secs_f64();
    let usage = millrace.usage()?;
    let server_seconds = tree_cpu_seconds(server.pid()?)? - before.1;
    let cpu_seconds = usage.cpu_seconds - before.0.cpu_seconds;
    // The next round's process would read this one's log again.
    millrace.api().pause(name).await?;
    millrace.stop().await?;
    Ok(Measure { wall_seconds, cpu_seconds, server_seconds, peak_bytes: usage.peak_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_has_four_changes_of_each_shape() {
        let wide = script(Rows::Wide, 3).unwrap();
        assert_eq!((wide.matches("UPDATE wide").count(), wide.matches("INSERT INTO wide").count()), (3, 1));
        assert!(wide.contains("\\set id random(20001, 30000)\n"));
        assert_eq!(script(Rows::Mixed, 3).unwrap().matches("INSERT INTO wide").count(), 4);
        assert!(script(Rows::Pgbench, 3).is_none());
    }
}
