//! Measures how fast a backlog of changes is applied to a second server, next to PostgreSQL's own logical replication
//! of the same backlog at the same durability.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use testkit::figures::{load, median};
use testkit::pair::{self, Tables, Times, feed_name};
use testkit::plot::{self, Bar};
use testkit::process::private_bytes;
use testkit::{Load, Millrace, Pair};

/// Rows of the tables of the mixed load for each unit of `--scale`.
const MIXED_ROWS: u64 = 2_000;
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
    /// What the backlog is made of.
    #[arg(long, value_enum, default_value_t = Kind::Pgbench)]
    load: Kind,
    /// Transactions of the backlog.
    #[arg(long, default_value_t = 250_000)]
    transactions: u64,
    /// How often each way applies the backlog.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=9))]
    rounds: u64,
    /// Connections that make the backlog.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=32))]
    connections: u64,
    /// Size of the tables: 100,000 accounts of pgbench each, or 2,000 rows of the mixed load.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=1000))]
    scale: u64,
    /// `synchronous_commit` of the target, for both ways; by default one after the other.
    #[arg(long, value_parser = ["on", "off"])]
    synchronous_commit: Option<String>,
    /// Which way.
    #[arg(long, value_enum, default_value_t = Ways::Both)]
    only: Ways,
    /// Is appended to the sink URI, such as `?worker-count=2`.
    #[arg(long, default_value = "")]
    sink_query: String,
    /// Draws the rates into a file, as SVG.
    #[arg(long)]
    plot: Option<PathBuf>,
    /// A small backlog, once: whether the program works.
    #[arg(long)]
    quick: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Kind {
    /// Three updates and an insert in each transaction.
    Pgbench,
    /// What is hard to apply: changed keys, unique values that change hands, rows without a key, values out of line, TRUNCATE.
    Mixed,
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
    /// Changes of rows.
    changes: u64,
    /// Until the last transaction was committed in the target, as its log tells of both ways.
    wall_seconds: f64,
    /// Until this was told: the last row can be read, the checkpoint has passed.
    told_seconds: f64,
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
    let mut bars = Vec::new();
    for durable in ["on", "off"] {
        if arguments.synchronous_commit.as_deref().is_none_or(|only| only == durable) {
            bars.extend(at_durability(arguments, durable).await?);
        }
    }
    if let Some(path) = &arguments.plot {
        plot::save(path, plot::bars("Row changes a second, by synchronous_commit of the target", &bars))?;
    }
    Ok(())
}

async fn at_durability(arguments: &Arguments, durable: &str) -> Result<Vec<Bar>> {
    let tables = match arguments.load {
        Kind::Pgbench => Tables::Pgbench(arguments.scale),
        Kind::Mixed => Tables::Mixed(arguments.scale * MIXED_ROWS),
    };
    let pair = Pair::start(tables, durable).await?;
    let work = tempfile::Builder::new().prefix("millrace-apply-").tempdir()?;
    let program = arguments.millrace.clone().unwrap_or_else(Millrace::default_program);
    let mut millrace = Millrace::new(&program, work.path())?;
    let outcome = measure(arguments, &pair, &mut millrace).await;
    let Ok((their, own)) = outcome else {
        println!("the last lines of millrace's log:\n{}", millrace.log_tail(LOG_LINES));
        return outcome.map(|_| Vec::new());
    };
    let mut bars = Vec::new();
    for (colour, (name, measured)) in [("subscription", their), ("millrace", own)].into_iter().enumerate() {
        let Some(measured) = measured else { continue };
        print_measure(&format!("{durable}: median {name}"), measured);
        let (value, cpu) = (measured.rate(), measured.micros());
        let text = format!("{value:.0}, {cpu:.0} µs of processor time each");
        bars.push(Bar { name: format!("{durable}: {name}"), value, text, colour });
    }
    if let (Some(their), Some(own)) = (their, own) {
        println!(
            "synchronous_commit = {durable}: rate of millrace / rate of native replication: {:.2}",
            their.wall_seconds / own.wall_seconds
        );
    }
    Ok(bars)
}

fn native(round: u64) -> String {
    format!("native_{round}")
}

fn own(round: u64) -> String {
    format!("own_{round}")
}

/// The medians of both ways.
async fn measure(
    arguments: &Arguments,
    pair: &Pair,
    millrace: &mut Millrace,
) -> Result<(Option<Measure>, Option<Measure>)> {
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
    let backlog = backlog(arguments, pair).await?;
    let (mut theirs, mut ours) = (Vec::new(), Vec::new());
    for round in 1..=arguments.rounds {
        if arguments.only != Ways::Millrace {
            pair.target.sql("postgres", "CHECKPOINT").await?;
            let measured = subscription(pair, &native(round), backlog).await.context("native replication")?;
            print_measure(&format!("round {round} native"), measured);
            pair.require_equal(&native(round)).await?;
            pair.remove(&native(round)).await?;
            theirs.push(measured);
        }
        if arguments.only != Ways::Native {
            pair.target.sql("postgres", "CHECKPOINT").await?;
            let measured = changefeed(pair, millrace, &own(round), backlog).await?;
            print_measure(&format!("round {round} millrace"), measured);
            pair.require_equal(&own(round)).await?;
            pair.remove(&own(round)).await?;
            ours.push(measured);
        }
    }
    let middle = |all: &[Measure]| (!all.is_empty()).then(|| median(all, |measure| measure.wall_seconds));
    Ok((middle(&theirs), middle(&ours)))
}

/// What is to be applied.
#[derive(Clone, Copy, Debug)]
struct Backlog {
    /// Changes of rows.
    changes: u64,
    /// A position behind all of them.
    end: u64,
}

/// Makes the changes.
async fn backlog(arguments: &Arguments, pair: &Pair) -> Result<Backlog> {
    let started = Instant::now();
    let &Arguments { transactions, connections, .. } = arguments;
    let changes = pair.counted(async {
        match pair.tables {
            Tables::Pgbench(_) => {
                let (each, connections) =
                    ((transactions / connections).max(1).to_string(), connections.to_string());
                let make = ["-n", "-M", "prepared", "-c", &connections, "-j", "2", "-t", &each];
                pair::pgbench(&pair.source, "postgres", &make).await?;
            }
            Tables::Mixed(rows) => {
                Load::backlog(&pair.source, "postgres", connections, transactions, rows).await?;
            }
        }
        Ok(())
    });
    let changes = changes.await?;
    let end = pair.finish(FINISH).await?;
    pair.source.sql("postgres", "CHECKPOINT").await?;
    let seconds = started.elapsed().as_secs_f64();
    println!("backlog: {transactions} transactions with {changes} changes, made in {seconds:.0} s");
    Ok(Backlog { changes, end })
}

async fn subscription(pair: &Pair, database: &str, backlog: Backlog) -> Result<Measure> {
    let client = pair.target.client(database).await?;
    let before = pair.times(None)?;
    let started = Start::now(pair).await?;
    pair.enable(database, true).await?;
    let mut worker = None;
    let mut peak_bytes = 0;
    while !pair.finished(&client, FINISH).await? {
        if started.at.elapsed() > LIMIT {
            bail!("the backlog was not applied within {LIMIT:?}");
        }
        if worker.is_none() {
            worker = pair.apply_worker(&client, database).await?;
        }
        peak_bytes = peak_bytes.max(worker.map_or(0, private_bytes));
        tokio::time::sleep(LOOK).await;
    }
    let told_seconds = started.at.elapsed().as_secs_f64();
    let times = pair.times(None)?.since(before);
    let wall_seconds = started.committed(pair, told_seconds).await?;
    pair.enable(database, false).await?;
    pair.unsubscribe(database).await?;
    Ok(Measure { changes: backlog.changes, wall_seconds, told_seconds, times, peak_bytes })
}

/// Resumes a changefeed in a fresh process, so that each round has its own memory and processor time.
async fn changefeed(
    pair: &Pair,
    millrace: &mut Millrace,
    database: &str,
    backlog: Backlog,
) -> Result<Measure> {
    let name = feed_name(database);
    millrace.start().await?;
    let pid = millrace.pid().context("the server runs")?;
    let before = pair.times(Some(millrace))?;
    let mut peak_bytes = 0;
    let started = Start::now(pair).await?;
    millrace.api().resume(&name).await?;
    let look = || peak_bytes = peak_bytes.max(private_bytes(pid));
    millrace.reach(&name, backlog.end, LIMIT, look).await?;
    let told_seconds = started.at.elapsed().as_secs_f64();
    let times = pair.times(Some(millrace))?.since(before);
    let wall_seconds = started.committed(pair, told_seconds).await?;
    // The next round's process would read this one's log again.
    millrace.api().pause(&name).await?;
    millrace.stop().await?;
    Ok(Measure { changes: backlog.changes, wall_seconds, told_seconds, times, peak_bytes })
}

/// When a way was set going.
struct Start {
    at: Instant,
    /// As the target's clock has it.
    clock: SystemTime,
    /// Where the target's log ended.
    log: String,
}

impl Start {
    async fn now(pair: &Pair) -> Result<Self> {
        let log = pair.target_log().await?;
        Ok(Self { at: Instant::now(), clock: SystemTime::now(), log })
    }

    /// Seconds until the last transaction of those that the target committed before `told` seconds were over.
    async fn committed(&self, pair: &Pair, told: f64) -> Result<f64> {
        let times: Vec<String> =
            pair.commit_times(&self.log).await?.into_iter().map(|(_, time)| time).collect();
        let client = pair.target.client("postgres").await?;
        let last = "SELECT max(after) FROM (SELECT extract(epoch FROM at::timestamptz - $2)::float8 AS after \
                    FROM unnest($1::text[]) AS at) AS commits WHERE after <= $3";
        let last = client.query_one(last, &[&times, &self.clock, &told]).await?;
        last.get::<_, Option<f64>>(0).context("the target committed nothing")
    }
}

impl Measure {
    /// Row changes a second.
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    fn rate(self) -> f64 {
        self.changes as f64 / self.wall_seconds
    }

    /// Processor time of a change on all sides, in microseconds.
    fn micros(self) -> f64 {
        let Times { source, target, millrace } = self.times;
        (source + target + millrace) * 1e6 / (self.rate() * self.wall_seconds)
    }
}

fn print_measure(name: &str, measure: Measure) {
    println!(
        "{name:24} {:7.2} s wall {:9.0} changes/s, told after {:5.2} s   {}, {:5.1} us each   {:4} MiB peak   load {}",
        measure.wall_seconds,
        measure.rate(),
        measure.told_seconds,
        measure.times,
        measure.micros(),
        measure.peak_bytes >> 20,
        load()
    );
}
