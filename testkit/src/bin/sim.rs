//! Searches seeds for histories that break a promise of the control plane.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use clap::Parser;
use heartbeatpb::Rule;
use testkit::sim::{Outcome, Plan, run, scenarios, shrink};

/// Simulates clusters under faults and checks what must always hold.
#[derive(Parser)]
struct Args {
    /// How many seeds to run.
    #[arg(long, default_value_t = 2000)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Run one seed and print its history.
    #[arg(long)]
    seed: Option<u64>,
    /// With --seed: the plan as it is, not made smaller.
    #[arg(long)]
    whole: bool,
    /// Switch the rules of the control plane off one by one: each has to be noticed within the seeds. A rule that stands
    /// behind another one is switched off together with it, on seeds that pass without that one.
    #[arg(long)]
    mutants: bool,
    /// Also the situations in which such control planes are known to have failed, each with 20 seeds.
    #[arg(long)]
    scenarios: bool,
    /// With --seed: without this rule and the one that it stands behind. With --scenarios: which of them break without it.
    /// With --mutants: only this one.
    #[arg(long)]
    without: Option<String>,
    /// With --seed: also what the processes log, at this level and above.
    #[arg(long)]
    log: Option<tracing::Level>,
    /// Threads.
    #[arg(long)]
    threads: Option<usize>,
    /// Every so many seeds one is run twice, and both runs have to be the same.
    #[arg(long, default_value_t = 40)]
    twice: u64,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    if let Some(seed) = args.seed {
        return one(seed, &args);
    }
    if args.mutants {
        return mutants(&args);
    }
    if args.scenarios {
        if let Some(rule) = args.without.as_deref().map(rule).transpose()? {
            broken_without(rule);
            return Ok(());
        }
        situations()?;
    }
    search(&args)
}

/// Seeds of each situation.
const VARIATIONS: u64 = 20;

fn situations() -> anyhow::Result<()> {
    let mut failed = 0;
    for scenario in scenarios() {
        let started = Instant::now();
        let found =
            (0..VARIATIONS).find_map(|seed| Some((seed, run(&scenario.plan(seed), false).violation?)));
        let took = started.elapsed().as_secs_f64();
        match found {
            None => println!("ok: {} ({VARIATIONS} seeds, {took:.1} s)", scenario.name),
            Some((seed, violation)) => {
                failed += 1;
                eprintln!("{} (seed {seed}): {violation}", scenario.name);
                if let Some((plan, outcome)) = shrink(&scenario.plan(seed)) {
                    tell(&plan, &outcome);
                }
            }
        }
    }
    anyhow::ensure!(failed == 0, "{failed} situations are not survived");
    Ok(())
}

/// Which situations are not survived without a rule, and the one that it stands behind.
fn broken_without(rule: Rule) {
    let without = [Some(rule), rule.behind()];
    for scenario in scenarios() {
        let fails = |seed| run(&Plan { without, ..scenario.plan(seed) }, false).violation;
        match (0..VARIATIONS).find_map(|seed| Some((seed, fails(seed)?))) {
            None => println!("survived: {}", scenario.name),
            Some((seed, violation)) => println!("broken: {} (seed {seed}): {violation:.100}", scenario.name),
        }
    }
}

fn tell(plan: &Plan, outcome: &Outcome) {
    println!("{plan:?}");
    for (at, what) in &outcome.history {
        println!("{at:>9.3} {what}");
    }
    summary(outcome);
}

/// Log lines carry the time of the simulation.
struct SimulatedTime;

impl tracing_subscriber::fmt::time::FormatTime for SimulatedTime {
    fn format_time(&self, out: &mut tracing_subscriber::fmt::format::Writer<'_>) -> std::fmt::Result {
        write!(out, "{:>9.3}", testkit::sim::elapsed())
    }
}

fn rule(name: &str) -> anyhow::Result<Rule> {
    let found = Rule::ALL.into_iter().find(|rule| format!("{rule:?}").eq_ignore_ascii_case(name));
    found.ok_or_else(|| anyhow::anyhow!("no rule is called {name}; there are {:?}", Rule::ALL))
}

fn one(seed: u64, args: &Args) -> anyhow::Result<()> {
    let without = args.without.as_deref().map(rule).transpose()?;
    let plan = Plan { without: [without, without.and_then(Rule::behind)], ..Plan::of(seed) };
    let found = if args.whole { None } else { shrink(&plan) };
    let (plan, outcome) = found.unwrap_or_else(|| {
        let outcome = run(&plan, false);
        (plan, outcome)
    });
    println!("{plan:?}");
    match args.log {
        Some(level) => {
            tracing_subscriber::fmt()
                .with_timer(SimulatedTime)
                .with_max_level(level)
                .with_writer(std::io::stdout)
                .with_ansi(false)
                .init();
            drop(run(&plan, true));
        }
        None => {
            for (at, what) in &outcome.history {
                println!("{at:>9.3} {what}");
            }
        }
    }
    summary(&outcome);
    if let Some(violation) = outcome.violation {
        eprintln!("seed {seed}: {violation}");
        std::process::exit(1);
    }
    Ok(())
}

fn summary(outcome: &Outcome) {
    println!(
        "{:.1} s simulated, {} rows, {} schema changes, {} messages, right again after {:.1} s",
        outcome.simulated as f64 / 1000.0,
        outcome.rows,
        outcome.ddls,
        outcome.messages,
        outcome.converged as f64 / 1000.0
    );
}

fn mutants(args: &Args) -> anyhow::Result<()> {
    let started = Instant::now();
    let only = args.without.as_deref().map(rule).transpose()?;
    let rules: Vec<Rule> =
        Rule::ALL.into_iter().filter(|rule| only.is_none_or(|only| only == *rule)).collect();
    let mut missed = Vec::new();
    for rule in &rules {
        let behind = rule.behind().map_or(String::new(), |first| format!(" (behind {first:?})"));
        match noticed(*rule, args) {
            Some((seed, violation)) => {
                let short: String = violation.chars().take(100).collect();
                println!("{:<20} noticed by seed {seed:>4}{behind}: {short}", format!("{rule:?}"));
            }
            None => {
                println!("{:<20} NOT NOTICED within {} seeds{behind}", format!("{rule:?}"), args.seeds);
                missed.push(*rule);
            }
        }
    }
    println!(
        "{} of {} rules in {:.1} s",
        rules.len() - missed.len(),
        rules.len(),
        started.elapsed().as_secs_f64()
    );
    anyhow::ensure!(missed.is_empty(), "nobody notices the absence of {missed:?}");
    Ok(())
}

/// The first seed that breaks a promise without a rule, and keeps all of them with it.
fn noticed(rule: Rule, args: &Args) -> Option<(u64, String)> {
    let next = AtomicU64::new(args.from);
    let found = parking_lot::Mutex::new(None::<(u64, String)>);
    std::thread::scope(|scope| {
        for _ in 0..threads(args) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    let is_later = found.lock().as_ref().is_some_and(|(first, _)| *first < seed);
                    if seed >= args.from + args.seeds || is_later {
                        return;
                    }
                    let fails = |without| run(&Plan { without, ..Plan::of(seed) }, false).violation;
                    let Some(violation) = fails([Some(rule), rule.behind()]) else { continue };
                    // What fails with the rule in force says nothing about it.
                    if fails([None, rule.behind()]).is_none() {
                        let mut found = found.lock();
                        if found.as_ref().is_none_or(|(first, _)| seed < *first) {
                            *found = Some((seed, violation));
                        }
                        return;
                    }
                }
            });
        }
    });
    found.into_inner()
}

fn threads(args: &Args) -> usize {
    args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
}

fn search(args: &Args) -> anyhow::Result<()> {
    let next = AtomicU64::new(args.from);
    let end = args.from + args.seeds;
    let started = Instant::now();
    let failures = parking_lot::Mutex::new(Vec::new());
    let simulated = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads(args) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        return;
                    }
                    let outcome = run(&Plan::of(seed), false);
                    simulated.fetch_add(outcome.simulated, Ordering::Relaxed);
                    let again = seed.is_multiple_of(args.twice.max(1)).then(|| run(&Plan::of(seed), false));
                    if again.is_some_and(|again| again != outcome) {
                        eprintln!("seed {seed}: a second run is not as the first one");
                        failures.lock().push(seed);
                    } else if let Some(violation) = outcome.violation {
                        eprintln!("seed {seed}: {violation}");
                        failures.lock().push(seed);
                    }
                }
            });
        }
    });
    let took = started.elapsed().as_secs_f64();
    let failures = failures.into_inner();
    println!(
        "{} seeds, {} failed, {:.0} s simulated in {took:.1} s",
        args.seeds,
        failures.len(),
        simulated.into_inner() as f64 / 1000.0
    );
    anyhow::ensure!(failures.is_empty(), "cargo xtask sim --seed {} shows the first", failures[0]);
    Ok(())
}
