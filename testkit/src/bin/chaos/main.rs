//! Breaks a cluster under load in every way that is known to happen, and counts what did not arrive as it was made.
//!
//! `world.rs` starts databases, metadata store and nodes, and connects them through a network that can be cut
//! (`testkit::wire`). `load.rs` and `schema.rs` change tables whose triggers (`tables.rs`) keep the history of every row at both ends;
//! `history.rs` compares them. `lag.rs` measures from outside how old the target is. `fault.rs` lists what can go wrong,
//! `round.rs` lets it happen once, `report.rs` and `plot.rs` tell. `selfcheck.rs` shows that the counting works.

mod fault;
mod history;
mod lag;
mod load;
mod plot;
mod report;
mod round;
mod schema;
mod selfcheck;
mod tables;
mod world;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use serde_json::json;
use testkit::{Millrace, Random};
use tokio::signal::unix::{SignalKind, signal};

use fault::{FAULTS, Fault};
use report::Series;
use tables::Tables;
use world::{Plan, World};

/// Lines of each node's log that are shown after a failure.
const LOG_LINES: usize = 12;
/// How long it is waited for writes that come late.
const LATE: Duration = Duration::from_secs(3);
/// Size of each data directory's file system where it is to become full.
const DISK_MIB: u32 = 256;

/// Breaks a cluster under load in every way that is known to happen, and counts what did not arrive as it was made.
#[derive(Parser, Debug)]
#[command(name = "chaos")]
struct Arguments {
    /// The program; by default the one that was built beside this one.
    #[arg(long)]
    millrace: Option<PathBuf>,
    /// How often each fault happens.
    #[arg(long, default_value_t = 10)]
    times: usize,
    /// Only these faults, by name.
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    only: Vec<String>,
    /// Lists the faults.
    #[arg(long)]
    list: bool,
    /// Millrace nodes.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=5))]
    nodes: u8,
    /// Members of etcd; 0: the store that is built in, which is for one node.
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..=5))]
    stores: Option<u8>,
    /// etcd's election timeout in milliseconds; its own default is 1000, and docs/operations.md says why not that.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u16).range(100..=10_000))]
    election: u16,
    /// Tables with a key.
    #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u16).range(3..=99))]
    tables: u16,
    /// Accounts in each table.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u16).range(10..))]
    accounts: u16,
    /// Transactions per second over all connections.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    rate: u32,
    /// Schema changes per second, with rows that belong to them; by default none, and one with `--ci`.
    #[arg(long, value_parser = clap::value_parser!(u32).range(0..=100))]
    schema_changes: Option<u32>,
    /// Connections of the load.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=32))]
    connections: u8,
    /// Seed of the load and of the moments.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The most important faults, once each and in short, after the most important part of the self-check.
    #[arg(long)]
    ci: bool,
    /// Loses, doubles and reorders rows at the target on purpose, and fails unless all of it is counted.
    #[arg(long)]
    self_check: bool,
    /// The result as JSON on the standard output; what people read goes to the standard error then.
    #[arg(long)]
    json: bool,
    /// Writes a picture of the lag for each fault into a directory.
    #[arg(long, value_name = "DIRECTORY", num_args = 0..=1, default_missing_value = "docs/plots")]
    plot: Option<PathBuf>,
    /// Keeps data and logs also when nothing was wrong.
    #[arg(long)]
    keep: bool,
    /// Goes on after a fault that broke the promises, in a world of its own.
    #[arg(long)]
    keep_going: bool,
}

impl Arguments {
    fn say(&self, text: &str) {
        if self.json {
            eprintln!("{text}");
        } else {
            println!("{text}");
        }
    }

    fn plan(&self, program: &Path, disk: bool) -> Plan {
        let nodes = if self.self_check { 1 } else { usize::from(self.nodes) };
        let stores = self.stores.map_or(if nodes == 1 { 0 } else { 3 }, usize::from);
        Plan {
            program: program.to_owned(),
            nodes,
            stores,
            tables: Tables { keyed: i32::from(self.tables), accounts: i64::from(self.accounts) },
            seed: self.seed,
            connections: usize::from(self.connections),
            rate: self.rate,
            schema_rate: self.schema_changes.unwrap_or(u32::from(self.ci)),
            election: Duration::from_millis(u64::from(self.election)),
            short: self.ci,
            disk_mib: disk.then_some(DISK_MIB),
        }
    }

    fn faults(&self) -> Result<Vec<Fault>> {
        if let Some(unknown) = self.only.iter().find(|name| FAULTS.iter().all(|fault| fault.name != **name)) {
            bail!("there is no fault {unknown:?}; --list shows them");
        }
        let wanted = |fault: &Fault| match (self.only.is_empty(), self.ci) {
            (false, _) => self.only.iter().any(|name| name == fault.name),
            (true, ci) => !ci || fault.in_ci,
        };
        Ok(FAULTS.iter().filter(|fault| wanted(fault)).copied().collect())
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = tokio::select! {
        result = run(&arguments) => result,
        // What was started ends when it is dropped.
        signal = interrupted() => signal.and_then(|()| bail!("interrupted")),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn interrupted() -> Result<()> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    Ok(())
}

async fn run(arguments: &Arguments) -> Result<bool> {
    if arguments.list {
        FAULTS.iter().for_each(|fault| println!("{:18} {}", fault.name, fault.what));
        return Ok(true);
    }
    let faults = arguments.faults()?;
    // Somebody may build while this runs.
    let own = tempfile::Builder::new().prefix("millrace-chaos-program-").tempdir()?;
    let built = arguments.millrace.clone().unwrap_or_else(Millrace::default_program);
    let program = own.path().join("millrace");
    std::fs::copy(&built, &program).with_context(|| {
        format!("{} does not exist; build it with `cargo build -p node`", built.display())
    })?;
    if arguments.self_check {
        let mut world = World::start(arguments.plan(&program, false)).await?;
        return selfcheck::run(&mut world, false, &|text| arguments.say(text)).await;
    }
    let plan = arguments.plan(&program, false);
    arguments.say(&format!(
        "{} nodes, {} members of etcd, {} tables, {} transactions and {} schema changes a second, seed {}",
        plan.nodes, plan.stores, arguments.tables, plan.rate, plan.schema_rate, plan.seed
    ));
    let all = every_fault(arguments, &program, &faults).await?;
    arguments.say(&format!("\n{}", report::table(&all)));
    if arguments.json {
        let world = json!({
            "nodes": plan.nodes, "stores": plan.stores, "tables": arguments.tables,
            "rate": plan.rate, "schema_changes": plan.schema_rate, "seed": plan.seed, "times": arguments.times,
        });
        println!("{}", report::json(&all, world));
    }
    if let Some(directory) = &arguments.plot {
        draw(directory, &all)?;
    }
    Ok(all.iter().all(Series::ok))
}

/// One world for all faults; another one where a fault needs small disks, or after one has broken it.
async fn every_fault(arguments: &Arguments, program: &Path, faults: &[Fault]) -> Result<Vec<Series>> {
    let started = Instant::now();
    let mut all: Vec<Series> = Vec::new();
    let mut world: Option<World> = None;
    for (number, fault) in faults.iter().enumerate() {
        let disk = fault.kind == fault::Kind::DiskFull;
        let plan = arguments.plan(program, disk);
        let mut series = Series { fault: *fault, rounds: Vec::new(), skipped: None, broken: None };
        series.skipped = fault.cannot(plan.nodes, plan.stores, is_root());
        if let Some(why) = &series.skipped {
            arguments.say(&format!("{:18} skipped: {why}", fault.name));
            all.push(series);
            continue;
        }
        if world.as_ref().is_none_or(|world| world.plan.disk_mib.is_some() != disk) {
            end(arguments, world.take(), &mut all).await?;
            let mut fresh = World::start(plan).await?;
            if arguments.ci && !selfcheck::run(&mut fresh, true, &|text| arguments.say(text)).await? {
                bail!("what was lost, doubled or reordered on purpose was not seen");
            }
            world = Some(fresh);
        }
        let Some(current) = &mut world else { bail!("there is no world") };
        let mut random = Random::new(arguments.seed, 1000 + number as u64);
        rounds(arguments, current, &mut series, &mut random).await;
        let failed = !series.ok();
        all.push(series);
        if failed && let Some(broken) = world.take() {
            arguments.say(&broken.last_words(LOG_LINES));
            arguments.say(&format!("data and logs are kept in {}", broken.keep().display()));
            if !arguments.keep_going {
                arguments.say("the other faults are left out; --keep-going runs them");
                break;
            }
        }
    }
    end(arguments, world, &mut all).await?;
    arguments.say(&format!("{:.0} s in all", started.elapsed().as_secs_f64()));
    Ok(all)
}

/// Compares once more, so that what came late after the last fault is seen too.
async fn end(arguments: &Arguments, world: Option<World>, all: &mut [Series]) -> Result<()> {
    let Some(mut world) = world else { return Ok(()) };
    tokio::time::sleep(LATE).await;
    let unfinished = world.sent_unfinished().await?;
    arguments.say(&format!("{unfinished} transactions were sent before they ended"));
    if unfinished == 0 {
        bail!("no transaction was sent before it ended: the load has none that is large enough");
    }
    let verdict = world.verify().await?;
    if !verdict.clean()
        && let Some(series) = all.iter_mut().rfind(|series| series.skipped.is_none())
    {
        let what = format!("after the last round: {}", round::describe(&verdict));
        arguments.say(&what);
        series.broken = Some(what);
    }
    arguments.say(&format!("{} transactions were made", world.load.transactions()));
    if arguments.keep {
        arguments.say(&format!("data and logs are kept in {}", world.keep().display()));
    }
    Ok(())
}

async fn rounds(arguments: &Arguments, world: &mut World, series: &mut Series, random: &mut Random) {
    let times = if arguments.ci { 1 } else { arguments.times };
    for number in 1..=times {
        match round::run(world, series.fault, random).await {
            Ok(round) => {
                arguments.say(&report::line(series.fault.name, number, times, &round));
                let failed = !round.problems.is_empty();
                let equal = round.verdict.equal;
                series.rounds.push(round);
                // After rows were lost the ends stay different, and every later round would fail for this.
                if failed && !equal {
                    return;
                }
            }
            Err(error) => {
                arguments.say(&format!("{:18} {number:2}/{times:<2} broken: {error:#}", series.fault.name));
                series.broken = Some(format!("{error:#}"));
                return;
            }
        }
    }
}

fn draw(directory: &Path, all: &[Series]) -> Result<()> {
    std::fs::create_dir_all(directory)?;
    for series in all {
        if let Some(picture) = plot::svg(series) {
            testkit::plot::save(&directory.join(format!("chaos-{}.svg", series.fault.name)), picture)?;
        }
    }
    Ok(())
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|meta| std::os::unix::fs::MetadataExt::uid(&meta) == 0)
}
