//! What CI runs: what takes seconds first, then what is built once and run, with lints and documentation beside it.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Result, anyhow};

use crate::{behaviours, codegen, examples, programs, servers, tests, tidy};

/// Runs one step and says how long it took.
pub(crate) fn run_step(name: &str, step: impl FnOnce() -> Result<()>) -> Result<()> {
    let started = Instant::now();
    step()?;
    eprintln!("ok: {name}, {:.0} s", started.elapsed().as_secs_f64());
    Ok(())
}

/// Every check and every test. What is run is built once: a build of one package picks other features for what it
/// stands on, and most of the workspace would be made again.
pub(crate) fn run(root: &Path) -> Result<()> {
    run_step("servers", servers::ensure)?;
    run_step("formatting", || crate::run(root, "cargo", &["fmt", "--all", "--check"], &[]))?;
    run_step("generated code", || codegen::run(root, true))?;
    run_step("tidy", || tidy::run(root))?;
    run_step("tests of the chores", || chores(root))?;
    run_step("behaviours", || behaviours::run(root, false))?;
    // Tests wait for much of their time; what only compiles has the processors meanwhile.
    run_step("tests", || {
        tests::run(root, &["--features", programs::FEATURES], || {
            run_step("lints", || lint(root))?;
            run_step("documentation", || document(root))
        })
    })?;
    let programs = crate::built(root)?;
    run_step("costs of the control plane", || programs::control_growth(root, &programs))?;
    // Real clusters mostly wait, simulated ones never do; they have what the real ones leave.
    std::thread::scope(|scope| {
        let simulated = scope.spawn(|| {
            run_step("examples", || examples::run_all(root, &programs, None))?;
            run_step("simulated clusters", || {
                programs::sim_built(root, &programs, &["--scenarios", "--seeds", "2000"])
            })
        });
        let real = run_step("clusters under faults", || programs::chaos_built(root, &programs, &["--ci"]));
        let simulated = simulated.join().map_err(|_| anyhow!("the simulated clusters ended abnormally"))?;
        real.and(simulated)
    })
}

/// The rules of the workspace, for everything that is compiled in it.
fn lint(root: &Path) -> Result<()> {
    let everything = ["clippy", "--workspace", "--all-targets", "--quiet", "--features", programs::FEATURES];
    in_background(root, &[&everything[..], &["--", "-D", "warnings"]].concat(), &[])
}

/// The pages of every crate, without a warning.
fn document(root: &Path) -> Result<()> {
    in_background(root, &["doc", "--workspace", "--no-deps", "--quiet"], &[("RUSTDOCFLAGS", "-D warnings")])
}

/// Cargo, with the processors that nobody else wants. A compiler that is only nice finishes its turn before a server that
/// has just got a message goes on; one in the idle class gives way at once.
fn in_background(root: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Result<()> {
    let idle = ["chrt", "--idle", "0"];
    let knows = Command::new(idle[0]).args(&idle[1..]).arg("true").stderr(Stdio::null()).status();
    let first = if knows.is_ok_and(|status| status.success()) { &idle[..] } else { &["nice", "-n", "19"] };
    crate::run(root, first[0], &[&first[1..], &["cargo"], arguments].concat(), environment)
}

/// The tests alone; with arguments those that cargo picks by them.
pub(crate) fn test(root: &Path, rest: &[String]) -> Result<()> {
    if rest.is_empty() {
        return chores(root).and_then(|()| tests::run(root, &[], || Ok(())));
    }
    let rest: Vec<&str> = rest.iter().map(String::as_str).collect();
    crate::run(root, "cargo", &[&["test", "--workspace"], &rest[..]].concat(), &[])
}

/// The tests of these chores, which stand on what the chores were built from: see the profile in Cargo.toml.
fn chores(root: &Path) -> Result<()> {
    crate::run(root, "cargo", &["test", "--quiet", "--profile", "xtask", "--package", "xtask"], &[])
}
