//! Chores of the project, one command each.

mod behaviours;
mod ci;
mod codegen;
mod errors;
mod examples;
mod licenses;
mod metrics;
mod openapi;
mod programs;
mod servers;
mod tests;
mod tidy;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command as Process, ExitCode, Stdio};

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use serde_json::Value;

/// Chores of the project.
#[derive(Parser, Debug)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Everything that CI runs.
    Ci,
    /// Every test; installs PostgreSQL's server programs where they are missing.
    Test {
        /// Arguments for `cargo test`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// Crate layers, file headers, inherited lints, licences, documented metrics, error codes and routes, links.
    Tidy,
    /// Build and run the example programs of every crate, or of one.
    Examples {
        /// The crate.
        package: Option<String>,
    },
    /// Generate protobuf code.
    Codegen {
        /// Only say whether it is up to date.
        #[arg(long)]
        check: bool,
    },
    /// Write docs/metrics.md from the metrics' constants.
    Metrics,
    /// Write docs/errors.md from the list of error codes.
    Errors,
    /// Behaviours of the catalogue and the tests that show them.
    Behaviours {
        /// Fail when a behaviour is shown by no test, or a test names one that is not listed.
        #[arg(long)]
        strict: bool,
    },
    /// Two databases and a node to play with, until Ctrl-C; see docs/testing.md.
    Dev {
        /// Arguments of the program, such as `--rate 100`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// Kill a release build again and again under load, and compare both ends; see docs/testing.md.
    Crash {
        /// Arguments of the program, such as `--kills 40 --seed 7`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// Break a real cluster under load, measure the lag and count what was lost; see docs/resilience.md.
    Chaos {
        /// Arguments of the program, such as `--only kill-leader --times 3`; `--release` for an optimised build.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// Simulate clusters under faults from seeds, and check what must always hold; see docs/testing.md.
    Sim {
        /// Arguments of the program, such as `--seeds 200000`, `--seed 7` or `--mutants`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// Measure a release build; see docs/testing.md.
    #[command(subcommand)]
    Bench(Bench),
}

#[derive(Subcommand, Debug)]
enum Bench {
    /// How fast a backlog is read, next to `pg_recvlogical`.
    Drain {
        /// Arguments of the program, such as `--changes 1000000 --rounds 5`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// How fast existing rows are copied, next to `COPY TO | COPY FROM`.
    Copy {
        /// Arguments of the program, such as `--rows 1000000 --parallel 2`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// How fast a backlog is applied to a second server, next to native logical replication.
    Apply {
        /// Arguments of the program, such as `--transactions 100000 --synchronous-commit off`, or `--quick`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// How old changes are when they are in a second server, under load, next to native logical replication.
    Lag {
        /// Arguments of the program, such as `--seconds 60 --rounds 1`, or `--quick`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// What each stage of the data path costs a row change.
    Scale {
        /// Arguments of the program, such as `--sink blackhole`, or `--quick`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// What the control plane costs with ten thousand to a million spans, next to naive versions.
    Control {
        /// Arguments of the program, such as `--check --json --plot docs/plots/control.svg`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
}

fn main() -> ExitCode {
    let root = root();
    let result = match Arguments::parse().command {
        Command::Ci => ci::run(&root),
        Command::Test { rest } => servers::ensure().and_then(|()| ci::test(&root, &rest)),
        Command::Tidy => tidy::run(&root),
        Command::Codegen { check } => codegen::run(&root, check),
        Command::Examples { package } => {
            servers::ensure().and_then(|()| examples::run(&root, package.as_deref()))
        }
        Command::Metrics => metrics::run(&root),
        Command::Errors => errors::run(&root),
        Command::Behaviours { strict } => behaviours::run(&root, strict),
        Command::Dev { rest } => programs::become_dev(&root, &rest),
        Command::Crash { rest } => programs::run(&root, "crash", &rest),
        Command::Chaos { rest } => programs::chaos(&root, &rest),
        Command::Sim { rest } => programs::sim(&root, &rest),
        Command::Bench(Bench::Drain { rest }) => programs::run(&root, "drain", &rest),
        Command::Bench(Bench::Copy { rest }) => programs::run(&root, "copy", &rest),
        Command::Bench(Bench::Apply { rest }) => programs::run(&root, "apply", &rest),
        Command::Bench(Bench::Lag { rest }) => programs::run(&root, "lag", &rest),
        Command::Bench(Bench::Scale { rest }) => programs::scale(&root, &rest),
        Command::Bench(Bench::Control { rest }) => programs::control(&root, &rest),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The checkout in which cargo runs this program: two checkouts may share one target folder, so what was compiled in
/// may name the other one.
fn root() -> PathBuf {
    let here = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    here.parent().map_or_else(|| here.clone(), Path::to_owned)
}

/// A program to be run. What cargo told this one about its own package is not passed on: crates that ask for it would be
/// built anew, and all that stands on them, whenever cargo is started from here and then by a person.
fn program(name: impl AsRef<OsStr>) -> Process {
    let mut program = Process::new(name);
    program.env_remove("CARGO_MANIFEST_DIR").env_remove("CARGO_MANIFEST_PATH");
    program
}

/// A program that has the processors which nobody else wants. One that is only nice still finishes its turn before a server
/// that has just got a message goes on; one in the idle class gives way at once.
fn in_background(name: impl AsRef<OsStr>) -> Process {
    let knows = Process::new("chrt").args(["--idle", "0", "true"]).stderr(Stdio::null()).status();
    let (first, arguments) = match knows {
        Ok(status) if status.success() => ("chrt", ["--idle", "0"]),
        _ => ("nice", ["-n", "19"]),
    };
    let mut started = program(first);
    started.args(arguments).arg(name);
    started
}

/// Runs a program in the project's root, showing its output.
fn run(root: &Path, name: &str, arguments: &[&str], variables: &[(&str, &str)]) -> Result<()> {
    finish(program(name), root, arguments, variables)
}

/// Adds arguments and variables to a program and runs it in the project's root, showing its output.
fn finish(mut program: Process, root: &Path, arguments: &[&str], variables: &[(&str, &str)]) -> Result<()> {
    let name = program.get_program().to_string_lossy().into_owned();
    let words = program.get_args().map(|word| word.to_string_lossy().into_owned());
    let words = words.chain(arguments.iter().map(|&word| word.to_owned())).collect::<Vec<_>>().join(" ");
    eprintln!("> {name} {words}");
    let status = program
        .args(arguments)
        .envs(variables.iter().copied())
        .current_dir(root)
        .status()
        .with_context(|| format!("cannot start {name}"))?;
    if !status.success() {
        bail!("{name} {words} failed");
    }
    Ok(())
}

/// The folder of the programs that an unoptimised build makes.
fn built(root: &Path) -> Result<PathBuf> {
    let metadata = metadata(root, &["--no-deps"])?;
    let target = metadata["target_directory"].as_str().context("no target directory")?;
    Ok(Path::new(target).join("debug"))
}

/// What cargo knows about the workspace.
fn metadata(root: &Path, arguments: &[&str]) -> Result<Value> {
    let output = program("cargo")
        .args(["metadata", "--format-version", "1", "--locked"])
        .args(arguments)
        .current_dir(root)
        .output()
        .context("cannot run cargo metadata")?;
    if !output.status.success() {
        bail!("cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    serde_json::from_slice(&output.stdout).context("cargo metadata gave no JSON")
}

/// The platform that the compiler builds for when nobody names another.
fn host(root: &Path) -> Result<String> {
    let output = Process::new("rustc").arg("-vV").current_dir(root).output().context("cannot run rustc")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc names no host")?.to_owned())
}

/// Every Rust source file of the project that a person wrote.
fn sources(root: &Path) -> Result<Vec<PathBuf>> {
    files(root, ".rs")
}

/// Every page of documentation.
fn pages(root: &Path) -> Result<Vec<PathBuf>> {
    files(root, ".md")
}

fn files(root: &Path, ending: &str) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if path.is_dir() {
                if !name.starts_with('.') && name != "target" && name != "generated" {
                    folders.push(path);
                }
            } else if name.ends_with(ending) {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}
