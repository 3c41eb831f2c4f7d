//! Kills Millrace again and again under load, and compares both databases at the end.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use serde_json::json;
use testkit::{Api, Comparison, Load, Millrace, PgServer, Random, compare, load};

/// The changefeed's name.
const FEED: &str = "crash";
/// Database at the upstream.
const FROM: &str = "postgres";
/// Database at the downstream. Servers that were copied from one template look like one server, so it must
/// have another name.
const TO: &str = "mirror";
/// How long everything may take to arrive after the load has ended.
const CATCH_UP_LIMIT: Duration = Duration::from_secs(300);
/// How long the program waits for a moment in which it wants to kill.
const MOMENT_LIMIT: Duration = Duration::from_secs(20);
/// How often a state is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// Lines of the server's log that are shown after a failure.
const LOG_LINES: usize = 50;

/// Kills Millrace again and again under load, and compares both databases at the end.
#[derive(Parser, Debug)]
#[command(name = "crash")]
struct Arguments {
    /// The program; by default the one that was built beside this one.
    #[arg(long)]
    millrace: Option<PathBuf>,
    /// How often it is killed.
    #[arg(long, default_value_t = 20)]
    kills: u64,
    /// Seed of the load and of the moments.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Shortest and longest life in seconds, such as `1..4`.
    #[arg(long, default_value = "1..4", value_parser = parse_span)]
    seconds_between: (f64, f64),
    /// How many of the kills come while the initial copy runs.
    #[arg(long, default_value_t = 3)]
    copy_kills: u64,
    /// How long the load runs when nothing is killed.
    #[arg(long, default_value_t = 15)]
    seconds: u64,
    /// Rows before the changefeed is created.
    #[arg(long, default_value_t = 50_000)]
    rows: u64,
    /// Connections of the load.
    #[arg(long, default_value_t = 4)]
    connections: u64,
    /// Transactions per second over all connections.
    #[arg(long, default_value_t = 400)]
    rate: u64,
    /// Replicate nothing, and expect that the comparison finds it.
    #[arg(long)]
    dry: bool,
}

fn parse_span(text: &str) -> Result<(f64, f64), String> {
    let number = |text: &str| text.trim().parse::<f64>().ok().filter(|n| *n >= 0.0 && *n <= 3600.0);
    let (low, high) = text.split_once("..").unwrap_or((text, text));
    match (number(low), number(high)) {
        (Some(low), Some(high)) if low <= high => Ok((low, high)),
        (_, _) => Err(format!("{text:?} is no span of seconds; write for example 1..4")),
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Both servers and how to reach them.
struct Ends {
    upstream: PgServer,
    downstream: PgServer,
}

impl Ends {
    async fn start(rows: u64) -> Result<Self> {
        let (upstream, downstream) = tokio::try_join!(PgServer::start(), PgServer::start())?;
        downstream.sql("postgres", &format!("CREATE DATABASE {TO}")).await?;
        load::prepare(&upstream.client(FROM).await?, rows).await.context("fill the upstream")?;
        Ok(Self { upstream, downstream })
    }

    async fn compare(&self) -> Result<Comparison> {
        let upstream = self.upstream.client(FROM).await?;
        let downstream = self.downstream.client(TO).await?;
        compare(&upstream, &downstream, &load::TABLES).await
    }

    /// A position that the checkpoint reaches when everything before the call is downstream.
    async fn position(&self) -> Result<u64> {
        let client = self.upstream.client(FROM).await?;
        let row = client.query_one("SELECT (pg_current_wal_lsn() - '0/0')::text", &[]).await?;
        let position = row.get::<_, String>(0).parse()?;
        // A transaction beyond it, so that nothing depends on when an idle server reports its position.
        client.execute("INSERT INTO shop.marker SELECT count(*) FROM shop.marker", &[]).await?;
        Ok(position)
    }
}

async fn run(arguments: &Arguments) -> Result<bool> {
    let ends = Ends::start(arguments.rows).await?;
    if arguments.dry {
        return dry(arguments, &ends).await;
    }
    let program = arguments.millrace.clone().unwrap_or_else(Millrace::default_program);
    let work = tempfile::Builder::new().prefix("millrace-crash-").tempdir()?;
    let mut server = Millrace::new(&program, work.path())?;
    let outcome = crash(arguments, &ends, &mut server).await;
    println!("peak memory of millrace: {} MiB", server.peak_bytes() >> 20);
    if !matches!(outcome, Ok(true)) {
        print_failure(&server, work.keep().as_path());
    }
    outcome
}

fn print_failure(server: &Millrace, kept: &Path) {
    println!("the last lines of {}:", server.log_path().display());
    println!("{}", server.log_tail(LOG_LINES));
    println!("data and log are kept in {}", kept.display());
}

/// Shows that the load and the comparison work: nothing is replicated, so everything differs.
async fn dry(arguments: &Arguments, ends: &Ends) -> Result<bool> {
    load::prepare(&ends.downstream.client(TO).await?, arguments.rows).await?;
    let same = ends.compare().await?;
    println!("after the same preparation:\n{same}");
    let load = start_load(arguments, ends).await?;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let stats = load.stop().await?;
    println!("{} transactions, {} lost a race", stats.transactions, stats.refused);
    let comparison = ends.compare().await?;
    println!("after a load on one of them:\n{comparison}");
    Ok(same.equal() && !comparison.equal())
}

async fn start_load(arguments: &Arguments, ends: &Ends) -> Result<Load> {
    let Arguments { seed, connections, rate, rows, .. } = *arguments;
    Load::start(&ends.upstream, FROM, seed, connections, rate, rows).await
}

async fn crash(arguments: &Arguments, ends: &Ends, server: &mut Millrace) -> Result<bool> {
    server.start().await?;
    let load = start_load(arguments, ends).await?;
    let config = json!({ "force_replicate": true });
    let (from, to) = (ends.upstream.uri(FROM), ends.downstream.uri(TO));
    server.api().create(FEED, &from, &to, &config).await.context("create the changefeed")?;
    let start = server.api().progress(FEED).await?.checkpoint;
    let mut random = Random::new(arguments.seed, u64::MAX);
    let mut in_copy = 0;
    if arguments.kills == 0 {
        tokio::time::sleep(Duration::from_secs(arguments.seconds)).await;
    }
    for number in 1..=arguments.kills {
        let copying = number <= arguments.copy_kills;
        let lived = Instant::now();
        let seen = if copying {
            wait_for_copy(server, &mut random, start).await?
        } else {
            let (low, high) = arguments.seconds_between;
            #[expect(clippy::cast_precision_loss, reason = "a thousandth of a span")]
            let part = random.between(0, 1000) as f64 / 1000.0;
            tokio::time::sleep(Duration::from_secs_f64(low + part * (high - low))).await;
            look(&server.api(), start).await?
        };
        in_copy += u64::from(seen.contains("copying"));
        server.kill()?;
        println!("kill {number} after {:.2} s: {seen}", lived.elapsed().as_secs_f64());
        server.spawn()?;
    }
    println!("{in_copy} of {} kills came while the initial copy ran", arguments.kills);
    server.ready().await?;
    let stats = load.stop().await?;
    println!("load: {} transactions, {} lost a race", stats.transactions, stats.refused);
    let position = ends.position().await?;
    let started = Instant::now();
    catch_up(server, position).await?;
    println!("caught up after {:.1} s", started.elapsed().as_secs_f64());
    let comparison = settle(ends).await?;
    println!("{comparison}");
    Ok(comparison.equal())
}

/// Waits until the initial copy is under way, and a little longer.
async fn wait_for_copy(server: &mut Millrace, random: &mut Random, start: u64) -> Result<String> {
    let deadline = Instant::now() + MOMENT_LIMIT;
    loop {
        server.still_running()?;
        // A server that has just been started does not answer yet.
        if let Ok(progress) = server.api().progress(FEED).await {
            fail_if_failed(&progress.state, &progress.all)?;
            if progress.copy_rows > 0 || progress.rows_read > 0 {
                break;
            }
        }
        if Instant::now() > deadline {
            bail!("the initial copy has not begun after {MOMENT_LIMIT:?}");
        }
        tokio::time::sleep(LOOK).await;
    }
    tokio::time::sleep(Duration::from_millis(random.between(0, 150))).await;
    look(&server.api(), start).await
}

/// One line about where the changefeed is.
async fn look(api: &Api, start: u64) -> Result<String> {
    // The moment may be so early in the life of the process that nobody answers.
    let Ok(progress) = api.progress(FEED).await else { return Ok("no answer yet".to_owned()) };
    fail_if_failed(&progress.state, &progress.all)?;
    // The copy is done when it is downstream, and only then the checkpoint moves.
    let phase = if progress.checkpoint <= start { "copying" } else { "streaming" };
    Ok(format!(
        "{phase}, {} rows copied, {} read, {} written, checkpoint {:X}/{:X}",
        progress.copy_rows,
        progress.rows_read,
        progress.rows_written,
        progress.checkpoint >> 32,
        progress.checkpoint & 0xffff_ffff
    ))
}

fn fail_if_failed(state: &str, all: &serde_json::Value) -> Result<()> {
    if state == "failed" {
        bail!("the changefeed failed: {}", all["error"]);
    }
    Ok(())
}

async fn catch_up(server: &mut Millrace, position: u64) -> Result<()> {
    let deadline = Instant::now() + CATCH_UP_LIMIT;
    loop {
        server.still_running()?;
        let progress = server.api().progress(FEED).await?;
        fail_if_failed(&progress.state, &progress.all)?;
        if progress.checkpoint >= position {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("the checkpoint did not reach {position} within {CATCH_UP_LIMIT:?}: {}", progress.all);
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Compares once the marker, which is beyond the position, has arrived as well.
async fn settle(ends: &Ends) -> Result<Comparison> {
    let marker = |comparison: &Comparison| {
        comparison.tables.iter().any(|table| table.table == "shop.marker" && !table.equal())
    };
    let deadline = Instant::now() + MOMENT_LIMIT;
    loop {
        let comparison = ends.compare().await?;
        if !marker(&comparison) || Instant::now() > deadline {
            return Ok(comparison);
        }
        tokio::time::sleep(LOOK).await;
    }
}
