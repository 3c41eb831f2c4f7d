//! Measures how fast Millrace reads a backlog of changes, next to `pg_recvlogical` on the same backlog.

use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use serde_json::json;
use testkit::postgres::{PASSWORD, program};
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
    /// Size of the tables: 100,000 accounts each.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=1000))]
    scale: u64,
    /// Measure `pg_recvlogical` alone.
    #[arg(long)]
    dry: bool,
}

/// What one reader needed for the backlog.
#[derive(Clone, Copy, Debug, Default)]
struct Measure {
    wall_seconds: f64,
    cpu_seconds: f64,
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
    let server = PgServer::builder()
        .setting("max_wal_size", "16GB")
        .setting("shared_buffers", "256MB")
        .setting("synchronous_commit", "off")
        .setting("autovacuum", "off")
        .start()
        .await?;
    let client = server.client("postgres").await?;
    prepare(arguments, &server, &client).await.context("prepare the tables")?;
    let work = tempfile::Builder::new().prefix("millrace-drain-").tempdir()?;
    let mut millrace = match arguments.dry {
        true => None,
        false => {
            let program = arguments.millrace.clone().unwrap_or_else(Millrace::default_program);
            Some(Millrace::new(&program, work.path())?)
        }
    };
    let outcome = measure(arguments, &server, &client, millrace.as_mut()).await;
    if let (Err(_), Some(millrace)) = (&outcome, &millrace) {
        println!("the last lines of millrace's log:\n{}", millrace.log_tail(LOG_LINES));
    }
    outcome
}

async fn prepare(arguments: &Arguments, server: &PgServer, client: &Client) -> Result<()> {
    pgbench(server, &["-i", "-q", "-s", &arguments.scale.to_string()]).await?;
    // The one table of pgbench without a key only gets inserts; with this every table is eligible.
    client
        .batch_execute(&format!(
            "ALTER TABLE pgbench_history REPLICA IDENTITY FULL; CREATE PUBLICATION {PUBLICATION} FOR TABLE \
             pgbench_accounts, pgbench_branches, pgbench_tellers, pgbench_history"
        ))
        .await?;
    for round in 1..=arguments.rounds {
        let query = "SELECT 1 FROM pg_create_logical_replication_slot($1, 'pgoutput')";
        client.query(query, &[&slot(round)]).await?;
    }
    Ok(())
}

fn slot(round: u64) -> String {
    format!("drain_{round}")
}

fn feed(round: u64) -> String {
    format!("drain-{round}")
}

async fn pgbench(server: &PgServer, arguments: &[&str]) -> Result<()> {
    let mut command = Command::new(program("pgbench"));
    command.arg("-h").arg(server.socket_dir()).args(["-p", &server.port().to_string(), "-U", "postgres"]);
    command.args(arguments).arg("postgres").stdin(Stdio::null());
    let output = tokio::task::spawn_blocking(move || command.output()).await?.context("start pgbench")?;
    if !output.status.success() {
        bail!("pgbench: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

async fn measure(
    arguments: &Arguments,
    server: &PgServer,
    client: &Client,
    mut millrace: Option<&mut Millrace>,
) -> Result<()> {
    if let Some(millrace) = millrace.as_deref_mut() {
        create_feeds(arguments, server, millrace).await?;
    }
    let end = backlog(arguments, server, client).await?;
    let (mut theirs, mut ours) = (Vec::new(), Vec::new());
    let changes = arguments.changes;
    for round in 1..=arguments.rounds {
        let other = recvlogical(server, &slot(round), end).await?;
        print_measure(&format!("round {round} pg_recvlogical"), changes, other);
        theirs.push(other);
        if let Some(millrace) = millrace.as_deref_mut() {
            let own = drain(millrace, &feed(round), end).await?;
            print_measure(&format!("round {round} millrace"), changes, own);
            ours.push(own);
        }
    }
    let other = median(&theirs);
    print_measure("median pg_recvlogical", changes, other);
    if millrace.is_some() {
        let own = median(&ours);
        print_measure("median millrace", changes, own);
        println!("rate of millrace / rate of pg_recvlogical: {:.3}", other.wall_seconds / own.wall_seconds);
    }
    Ok(())
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

/// Makes the changes. Answers a position that is behind all of them.
async fn backlog(arguments: &Arguments, server: &PgServer, client: &Client) -> Result<u64> {
    let started = Instant::now();
    let each = (arguments.changes / CHANGES_PER_TRANSACTION / arguments.connections).max(1).to_string();
    let connections = arguments.connections.to_string();
    pgbench(server, &["-n", "-M", "prepared", "-c", &connections, "-j", "2", "-t", &each]).await?;
    let row = client.query_one("SELECT (pg_current_wal_insert_lsn() - '0/0')::text", &[]).await?;
    let end: u64 = row.get::<_, String>(0).parse()?;
    // One more transaction beyond it: both readers meet it and stop, without waiting for an idle server's word.
    client
        .batch_execute(
            "SET synchronous_commit = on; INSERT INTO pgbench_history VALUES (0, 0, 0, 0, now()); CHECKPOINT",
        )
        .await?;
    let seconds = started.elapsed().as_secs_f64();
    println!("backlog: {} row changes, made in {seconds:.0} s", arguments.changes);
    Ok(end)
}

async fn recvlogical(server: &PgServer, slot: &str, end: u64) -> Result<Measure> {
    // Both readers come over TCP, as most do.
    let connection = format!("host=127.0.0.1 port={} user=postgres dbname=postgres", server.port());
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
            return Ok(Measure { wall_seconds, cpu_seconds: usage.cpu_seconds, peak_bytes });
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
async fn drain(millrace: &mut Millrace, name: &str, end: u64) -> Result<Measure> {
    millrace.start().await?;
    let before = millrace.usage()?;
    let started = Instant::now();
    millrace.api().resume(name).await?;
    loop {
        millrace.still_running()?;
        let progress = millrace.api().progress(name).await?;
        if progress.state == "failed" || progress.state == "warning" {
            bail!("the changefeed has a problem: {}", progress.all["error"]);
        }
        if progress.checkpoint >= end {
            break;
        }
        if started.elapsed() > DRAIN_LIMIT {
            bail!("millrace did not reach the end of the backlog within {DRAIN_LIMIT:?}: {}", progress.all);
        }
        tokio::time::sleep(LOOK).await;
    }
    let wall_seconds = started.elapsed().as_secs_f64();
    let usage = millrace.usage()?;
    let cpu_seconds = usage.cpu_seconds - before.cpu_seconds;
    // The next round's process would read this one's log again.
    millrace.api().pause(name).await?;
    millrace.stop().await?;
    Ok(Measure { wall_seconds, cpu_seconds, peak_bytes: usage.peak_bytes })
}

fn print_measure(name: &str, changes: u64, measure: Measure) {
    let Measure { wall_seconds, cpu_seconds, peak_bytes } = measure;
    #[expect(clippy::cast_precision_loss, reason = "counts of changes")]
    let rate = changes as f64 / wall_seconds;
    println!(
        "{name:24} {wall_seconds:8.2} s wall  {cpu_seconds:8.2} s cpu  {:6} MiB peak  {rate:10.0} changes/s",
        peak_bytes >> 20
    );
}

/// The median of each number by itself.
fn median(measures: &[Measure]) -> Measure {
    let middle = |get: fn(&Measure) -> f64| {
        let mut values: Vec<f64> = measures.iter().map(get).collect();
        values.sort_by(f64::total_cmp);
        let half = values.len() / 2;
        match values.len() % 2 {
            _ if values.is_empty() => 0.0,
            0 => f64::midpoint(values[half - 1], values[half]),
            _ => values[half],
        }
    };
    let mut peaks: Vec<u64> = measures.iter().map(|measure| measure.peak_bytes).collect();
    peaks.sort_unstable();
    Measure {
        wall_seconds: middle(|measure| measure.wall_seconds),
        cpu_seconds: middle(|measure| measure.cpu_seconds),
        peak_bytes: peaks.get(peaks.len() / 2).copied().unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_stands_in_the_middle_or_between_the_two_middle_ones() {
        let of = |walls: &[f64]| {
            let measures: Vec<Measure> =
                walls.iter().map(|&wall_seconds| Measure { wall_seconds, ..Measure::default() }).collect();
            median(&measures).wall_seconds
        };
        assert!((of(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((of(&[4.0, 1.0]) - 2.5).abs() < 1e-9);
    }
}
