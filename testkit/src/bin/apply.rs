//! Measures how fast a backlog of changes is applied to a second server, next to PostgreSQL's own logical replication
//! of the same backlog at the same durability.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use testkit::pair::{self, Times, load, private_bytes};
use testkit::{Millrace, Pair};

/// Row changes of one transaction of the backlog: three updates and an insert.
const CHANGES_PER_TRANSACTION: u64 = 4;
/// How long one way may take for the whole backlog.
const LIMIT: Duration = Duration::from_secs(1800);
/// How often a state is looked at; also the precision of the times.
const LOOK: Duration = Duration::from_millis(10);
/// Lines of the log that are shown after a failure.
const LOG_LINES: usize = 50;
/// The row that says that the backlog has arrived.
const FINISH: i32 = 1;

/// Measures how fast a backlog is applied, next to native logical replication.
#[derive(Parser, Debug)]
#[command(name = "apply")]
struct Arguments {
    /// The program; by default the one that was built beside this one.
    #[arg(long)]
    millrace: Option<PathBuf>,
    /// Transactions of the backlog: three updates and an insert each.
    #[arg(long, default_value_t = 250_000)]
    transactions: u64,
    /// How often each way applies the backlog.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=9))]
    rounds: u64,
    /// Connections that make the backlog.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=32))]
    connections: u64,
    /// Size of the tables: 100,000 accounts each.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=1000))]
    scale: u64,
    /// `synchronous_commit` of the target, for both ways.
    #[arg(long, default_value = "on", value_parser = ["on", "off"])]
    synchronous_commit: String,
    /// Which way.
    #[arg(long, value_enum, default_value_t = Ways::Both)]
    only: Ways,
    /// Is appended to the sink URI, such as `?worker-count=2`.
    #[arg(long, default_value = "")]
    sink_query: String,
    /// A small backlog, once: whether the program works.
    #[arg(long)]
    quick: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Ways {
    Both,
    Native,
    Millrace,
}

/// What one way needed for the backlog.
#[derive(Clone, Copy, Debug, Default)]
struct Measure {
    wall_seconds: f64,
    times: Times,
    /// Of Millrace, or of the worker that applies the subscription: memory that it shares with nobody.
    peak_bytes: u64,
}

#[tokio::main]
async fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    if arguments.quick {
        arguments.transactions = 5_000;
        arguments.rounds = 1;
        arguments.scale = 1;
    }
    match run(&arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: &Arguments) -> Result<()> {
    let pair = Pair::start(arguments.scale, &arguments.synchronous_commit).await?;
    let work = tempfile::Builder::new().prefix("millrace-apply-").tempdir()?;
    let program = arguments.millrace.clone().unwrap_or_else(Millrace::default_program);
    let mut millrace = Millrace::new(&program, work.path())?;
    let outcome = measure(arguments, &pair, &mut millrace).await;
    if outcome.is_err() {
        println!("the last lines of millrace's log:\n{}", millrace.log_tail(LOG_LINES));
    }
    outcome
}

fn native(round: u64) -> String {
    format!("native_{round}")
}

fn own(round: u64) -> String {
    format!("own_{round}")
}

async fn measure(arguments: &Arguments, pair: &Pair, millrace: &mut Millrace) -> Result<()> {
    millrace.start().await?;
    for round in 1..=arguments.rounds {
        if arguments.only != Ways::Millrace {
            pair.database(&native(round)).await?;
            pair.subscribe(&native(round)).await?;
        }
        if arguments.only != Ways::Native {
            pair.database(&own(round)).await?;
            pair.feed(millrace, &own(round), &arguments.sink_query).await?;
        }
    }
    millrace.stop().await?;
    let end = backlog(arguments, pair).await?;
    let (mut theirs, mut ours) = (Vec::new(), Vec::new());
    for round in 1..=arguments.rounds {
        if arguments.only != Ways::Millrace {
            pair.target.sql("postgres", "CHECKPOINT").await?;
            let measured = subscription(pair, &native(round)).await.context("native replication")?;
            print_measure(&format!("round {round} native"), arguments, measured);
            pair.require_equal(&native(round)).await?;
            pair.remove(&native(round)).await?;
            theirs.push(measured);
        }
        if arguments.only != Ways::Native {
            pair.target.sql("postgres", "CHECKPOINT").await?;
            let measured = changefeed(pair, millrace, &own(round), end).await?;
            print_measure(&format!("round {round} millrace"), arguments, measured);
            pair.require_equal(&own(round)).await?;
            pair.remove(&own(round)).await?;
            ours.push(measured);
        }
    }
    let (their, own) = (median(&theirs), median(&ours));
    if !theirs.is_empty() {
        print_measure("median native", arguments, their);
    }
    if !ours.is_empty() {
        print_measure("median millrace", arguments, own);
    }
    if !theirs.is_empty() && !ours.is_empty() {
        println!(
            "synchronous_commit = {}: rate of millrace / rate of native replication: {:.2}",
            arguments.synchronous_commit,
            their.wall_seconds / own.wall_seconds
        );
    }
    Ok(())
}

/// Makes the changes. Answers a position that is behind all of them.
async fn backlog(arguments: &Arguments, pair: &Pair) -> Result<u64> {
    let started = Instant::now();
    let each = (arguments.transactions / arguments.connections).max(1).to_string();
    let connections = arguments.connections.to_string();
    let make = ["-n", "-M", "prepared", "-c", &connections, "-j", "2", "-t", &each];
    pair::pgbench(&pair.source, "postgres", &make).await?;
    let end = pair.finish(FINISH).await?;
    pair.source.sql("postgres", "CHECKPOINT").await?;
    println!(
        "backlog: {} transactions, made in {:.0} s",
        arguments.transactions,
        started.elapsed().as_secs_f64()
    );
    Ok(end)
}

async fn subscription(pair: &Pair, database: &str) -> Result<Measure> {
    let client = pair.target.client(database).await?;
    let before = pair.times(None)?;
    let started = Instant::now();
    pair.enable(database, true).await?;
    let mut worker = None;
    let mut peak_bytes = 0;
    while !pair.finished(&client, FINISH).await? {
        if started.elapsed() > LIMIT {
            bail!("the backlog was not applied within {LIMIT:?}");
        }
        if worker.is_none() {
            worker = pair.apply_worker(&client, database).await?;
        }
        peak_bytes = peak_bytes.max(worker.map_or(0, private_bytes));
        tokio::time::sleep(LOOK).await;
    }
    let wall_seconds = started.elapsed().as_secs_f64();
    let times = pair.times(None)?.since(before);
    pair.enable(database, false).await?;
    pair.unsubscribe(database).await?;
    Ok(Measure { wall_seconds, times, peak_bytes })
}

/// Resumes a changefeed in a fresh process, so that each round has its own memory and processor time.
async fn changefeed(pair: &Pair, millrace: &mut Millrace, database: &str, end: u64) -> Result<Measure> {
    let name = database.replace('_', "-");
    millrace.start().await?;
    let pid = millrace.pid().context("the server runs")?;
    let before = pair.times(Some(millrace))?;
    let mut peak_bytes = 0;
    let started = Instant::now();
    millrace.api().resume(&name).await?;
    loop {
        millrace.still_running()?;
        let progress = millrace.api().progress(&name).await?;
        if progress.state == "failed" || progress.state == "warning" {
            bail!("the changefeed has a problem: {}", progress.all["error"]);
        }
        peak_bytes = peak_bytes.max(private_bytes(pid));
        if progress.checkpoint >= end {
            break;
        }
        if started.elapsed() > LIMIT {
            bail!("the backlog was not applied within {LIMIT:?}: {}", progress.all);
        }
        tokio::time::sleep(LOOK).await;
    }
    let wall_seconds = started.elapsed().as_secs_f64();
    let times = pair.times(Some(millrace))?.since(before);
    // The next round's process would read this one's log again.
    millrace.api().pause(&name).await?;
    millrace.stop().await?;
    Ok(Measure { wall_seconds, times, peak_bytes })
}

#[expect(clippy::cast_precision_loss, reason = "rates for people")]
fn print_measure(name: &str, arguments: &Arguments, measure: Measure) {
    let rate = (arguments.transactions * CHANGES_PER_TRANSACTION) as f64 / measure.wall_seconds;
    println!(
        "{name:18} {:7.2} s wall {rate:9.0} changes/s   {}   {:4} MiB peak   load {}",
        measure.wall_seconds,
        measure.times,
        measure.peak_bytes >> 20,
        load()
    );
}

/// The one in the middle by its time.
fn median(measures: &[Measure]) -> Measure {
    let mut sorted = measures.to_vec();
    sorted.sort_by(|one, other| one.wall_seconds.total_cmp(&other.wall_seconds));
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_measure_in_the_middle_by_its_time() {
        let of = |wall_seconds| Measure { wall_seconds, ..Measure::default() };
        assert!((median(&[of(3.0), of(1.0), of(2.0)]).wall_seconds - 2.0).abs() < 1e-9);
        assert!(median(&[]).wall_seconds.abs() < 1e-9);
    }
}
