//! What CI runs: what takes seconds first, then what is built once and run, with lints and documentation beside it.

use std::path::Path;
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
    let everything =
        ["clippy", "--workspace", "--all-targets", "--quiet", "--features", programs::ALL_FEATURES];
    let strict = [&everything[..], &["--", "-D", "warnings"]].concat();
    crate::finish(crate::in_background("cargo"), root, &strict, &[])
}

/// The pages of every crate, without a warning.
fn document(root: &Path) -> Result<()> {
    // With the features of the lints, whose view of what others wrote is there already.
    let arguments = ["doc", "--workspace", "--no-deps", "--quiet", "--features", programs::ALL_FEATURES];
    crate::finish(crate::in_background("cargo"), root, &arguments, &[("RUSTDOCFLAGS", "-D warnings")])
}

/// The tests alone; with arguments those that cargo picks by them.
pub(crate) fn test(root: &Path, rest: &[String]) -> Result<()> {
    if rest.is_empty() {
        return chores(root).and_then(|()| tests::run(root, &[], || Ok(())));
    }
    let rest: Vec<&str> = rest.iter().map(String::as_str).collect();
    crate::run(root, "cargo", &[&["test", "--workspace"], &rest[..]].concat(), &[])
}

/// The tests of these chores, which stand on what the chores were built from.
fn chores(root: &Path) -> Result<()> {
    crate::run(root, "cargo", &["test", "--quiet", "--package", "xtask"], &[])
}
