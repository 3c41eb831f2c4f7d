//! Measures what the control plane costs with ten thousand, a hundred thousand and a million spans, each cost beside
//! its naive version: with a lock, or with a look at every span.
//!
//! Costs are processor time of the one thread that does the work, so that other programs on the machine change them
//! little. The real cores decide: of the maintainer through its bench rig, of the coordinator directly.

mod checkpoint;
mod clock;
mod feeds;
mod fence;
mod memory;
mod plot;
mod report;
mod rounds;
mod start;
mod world;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;

use crate::report::Report;

/// Measures what the control plane costs with many spans, each cost beside its naive version.
#[derive(Parser, Debug)]
#[command(name = "control")]
struct Arguments {
    /// Numbers of spans to measure at, ascending.
    #[arg(long, value_delimiter = ',', default_values_t = [10_000, 100_000, 1_000_000],
        value_parser = clap::value_parser!(u64).range(1_000..=10_000_000))]
    spans: Vec<u64>,
    /// Changefeeds that are created at once; also a tenth and a third of them.
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(30..=10_000))]
    changefeeds: u64,
    /// Few repetitions, and no limits on absolute times: for an unoptimised build.
    #[arg(long)]
    quick: bool,
    /// End with a failure when a limit is not kept.
    #[arg(long)]
    check: bool,
    /// Print JSON in place of the tables.
    #[arg(long)]
    json: bool,
    /// Write the costs against the number of spans as an SVG picture.
    #[arg(long)]
    plot: Option<PathBuf>,
    /// Only what has this word in its name.
    #[arg(long)]
    only: Option<String>,
}

/// How much is measured.
#[derive(Clone, Debug)]
struct Extent {
    /// Numbers of spans, ascending.
    spans: Vec<u64>,
    /// Changefeeds.
    changefeeds: u64,
    /// Repetitions, of which the cheapest counts.
    rounds: usize,
    /// Calls of something very short.
    calls: u64,
    /// With more spans than this, what looks at all spans for each of them is left out: it would take minutes.
    quadratic: u64,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

type Part = (&'static str, fn(&Extent, &mut Report) -> Result<()>);

const PARTS: [Part; 6] = [
    ("fence", fence::measure),
    ("checkpoint", checkpoint::measure),
    ("bootstrap", start::measure),
    ("rounds", rounds::measure),
    ("memory", memory::measure),
    ("changefeeds", feeds::measure),
];

/// What grew more than it may is measured again before that is believed: somebody else may have had the processors for
/// a moment. What really grows does so each time.
const ATTEMPTS: usize = 3;

fn measure((name, part): Part, extent: &Extent, absolute: bool, mut attempts: usize) -> Result<Report> {
    loop {
        let mut report = Report::new(absolute);
        part(extent, &mut report).with_context(|| format!("measuring {name}"))?;
        attempts -= 1;
        if report.kept() || attempts == 0 {
            eprintln!("measured: {name}");
            return Ok(report);
        }
        eprintln!("{}measuring {name} once more: a limit was not kept", report.text());
    }
}

fn run(arguments: &Arguments) -> Result<bool> {
    let mut spans = arguments.spans.clone();
    spans.sort_unstable();
    spans.dedup();
    let quick = arguments.quick;
    let extent = Extent {
        spans,
        changefeeds: arguments.changefeeds,
        rounds: if quick { 2 } else { 7 },
        calls: if quick { 20_000 } else { 1_000_000 },
        quadratic: if quick { 3_000 } else { 20_000 },
    };
    let attempts = if arguments.check { ATTEMPTS } else { 1 };
    let mut report = Report::new(!quick);
    for part in PARTS {
        if arguments.only.as_deref().is_none_or(|only| part.0.contains(only)) {
            report.add(measure(part, &extent, !quick, attempts)?);
        }
    }
    if arguments.json {
        println!("{:#}", report.json());
    } else {
        print!("{}", report.text());
    }
    if let Some(path) = &arguments.plot {
        testkit::plot::save(path, plot::svg(&report.costs))?;
    }
    Ok(report.kept() || !arguments.check)
}
