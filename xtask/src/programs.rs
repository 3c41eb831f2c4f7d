//! The programs of `testkit`: `crash` and the benchmarks against a release build, `chaos` against clusters, `dev` for
//! people.

use std::os::unix::process::CommandExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail};

use crate::servers;

/// What the programs of `testkit` are made of beside what tests need.
pub(crate) const FEATURES: &str = "testkit/sim,testkit/control";
/// What is looked at by the lints beside that: the programs that only people start.
pub(crate) const ALL_FEATURES: &str = "testkit/sim,testkit/control,testkit/programs";
/// The program that counts allocations has an allocator of its own: nothing else is built with it.
const CONTROL: [&str; 6] = ["-p", "testkit", "--features", "control", "--bin", "control"];

/// The arguments of a step, and behind them those of the caller.
fn with<'a>(fixed: &[&'a str], rest: &'a [String]) -> Vec<&'a str> {
    fixed.iter().copied().chain(rest.iter().map(String::as_str)).collect()
}

/// Builds everything optimised and runs one program with the arguments of the caller.
pub(crate) fn run(root: &Path, name: &str, rest: &[String]) -> Result<()> {
    servers::ensure()?;
    let build = ["build", "--release", "-p", "node", "-p", "testkit", "--features", "testkit/programs"];
    crate::run(root, "cargo", &build, &[])?;
    let program =
        ["run", "--quiet", "--release", "-p", "testkit", "--features", "programs", "--bin", name, "--"];
    crate::run(root, "cargo", &with(&program, rest), &[])
}

/// The costs of the control plane, of an optimised build; needs no server.
pub(crate) fn control(root: &Path, rest: &[String]) -> Result<()> {
    let program = [&["run", "--quiet", "--release"], &CONTROL[..], &["--"]].concat();
    crate::run(root, "cargo", &with(&program, rest), &[])
}

/// The costs of the stages of the data path, which run inside of the program.
pub(crate) fn scale(root: &Path, rest: &[String]) -> Result<()> {
    servers::ensure()?;
    let program = [
        "run",
        "--quiet",
        "--release",
        "-p",
        "testkit",
        "--features",
        "programs,sim",
        "--bin",
        "scale",
        "--",
    ];
    crate::run(root, "cargo", &with(&program, rest), &[])
}

/// The same of an unoptimised build and with few spans: whether costs grow as they may, within seconds.
pub(crate) fn control_growth(root: &Path, programs: &Path) -> Result<()> {
    let arguments = ["--quick", "--check", "--spans", "10000,40000", "--changefeeds", "90"];
    built(root, programs, "control", &arguments)
}

/// The simulated cluster of the build of the tests, for a number of seeds that takes minutes; it lets everybody else go
/// first. What it says is shown when it has ended.
pub(crate) fn sim_built(root: &Path, programs: &Path, arguments: &[&str]) -> Result<()> {
    let program = programs.join("sim");
    eprintln!("> {} {}", program.display(), arguments.join(" "));
    let output = crate::in_background(&program)
        .args(arguments)
        .current_dir(root)
        .output()
        .with_context(|| format!("cannot start {}", program.display()))?;
    eprint!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if !output.status.success() {
        bail!("the simulated clusters failed");
    }
    Ok(())
}

/// Clusters under faults, of an unoptimised build.
pub(crate) fn chaos_built(root: &Path, programs: &Path, arguments: &[&str]) -> Result<()> {
    built(root, programs, "chaos", arguments)
}

/// Runs a program that is there already.
fn built(root: &Path, programs: &Path, name: &str, arguments: &[&str]) -> Result<()> {
    let program = programs.join(name);
    crate::run(root, program.to_str().context("the target folder's name is not UTF-8")?, arguments, &[])
}

/// The simulated cluster, of a build that is optimised a little; needs no server.
pub(crate) fn sim(root: &Path, rest: &[String]) -> Result<()> {
    let build = ["--profile", "sim", "-p", "testkit", "--features", "sim", "--bin", "sim"];
    let program = [&["run", "--quiet"], &build[..], &["--"]].concat();
    crate::run(root, "cargo", &with(&program, rest), &[])
}

/// Clusters under faults: an unoptimised build, which is quick to make, unless the arguments say `--release`.
pub(crate) fn chaos(root: &Path, rest: &[String]) -> Result<()> {
    servers::ensure()?;
    let optimised = rest.iter().any(|argument| argument == "--release");
    let mut build = vec!["build", "-p", "node", "-p", "testkit", "--bin", "millrace", "--bin", "chaos"];
    let mut run = vec!["run", "--quiet", "-p", "testkit", "--bin", "chaos"];
    if optimised {
        build.push("--release");
        run.push("--release");
    }
    crate::run(root, "cargo", &build, &[])?;
    run.push("--");
    run.extend(rest.iter().map(String::as_str).filter(|argument| *argument != "--release"));
    crate::run(root, "cargo", &run, &[])
}

/// Builds without optimisation, which is quick, and becomes the program: a Ctrl-C is its own affair then, and the
/// terminal waits until it has cleaned up.
pub(crate) fn become_dev(root: &Path, rest: &[String]) -> Result<()> {
    servers::ensure()?;
    let build = ["build", "-p", "node", "-p", "testkit", "--features", "testkit/programs"];
    crate::run(root, "cargo", &build, &[])?;
    let error = crate::program("cargo")
        .args(["run", "--quiet", "-p", "testkit", "--features", "programs", "--bin", "dev", "--"])
        .args(rest)
        .current_dir(root)
        .exec();
    Err(anyhow!(error).context("cannot start cargo"))
}
