//! What CI runs, in the order in which a mistake is cheapest to find.

use std::path::Path;
use std::time::Instant;

use anyhow::Result;

use crate::{behaviours, codegen, examples, programs, servers, tidy};

/// Runs one step and says how long it took.
pub(crate) fn run_step(name: &str, step: impl FnOnce() -> Result<()>) -> Result<()> {
    let started = Instant::now();
    step()?;
    eprintln!("ok: {name}, {:.0} s", started.elapsed().as_secs_f64());
    Ok(())
}

/// Every check and every test.
pub(crate) fn run(root: &Path) -> Result<()> {
    run_step("servers", servers::ensure)?;
    run_step("formatting", || crate::run(root, "cargo", &["fmt", "--all", "--check"], &[]))?;
    run_step("generated code", || codegen::run(root, true))?;
    run_step("tidy", || tidy::run(root))?;
    run_step("lints", || {
        crate::run(root, "cargo", &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"], &[])
    })?;
    run_step("documentation", || {
        let arguments = ["doc", "--workspace", "--no-deps", "--quiet"];
        crate::run(root, "cargo", &arguments, &[("RUSTDOCFLAGS", "-D warnings")])
    })?;
    run_step("behaviours", || behaviours::run(root, false))?;
    run_step("tests", || test(root, &[]))?;
    run_step("examples", || examples::run(root, None))?;
    run_step("costs of the control plane", || programs::control_growth(root))?;
    run_step("simulated clusters", || {
        programs::sim(root, &["--scenarios", "--seeds", "2000"].map(str::to_owned))
    })?;
    run_step("clusters under faults", || programs::chaos(root, &["--ci".to_owned()]))
}

/// The tests alone.
pub(crate) fn test(root: &Path, rest: &[String]) -> Result<()> {
    let mut arguments = vec!["test", "--workspace"];
    arguments.extend(rest.iter().map(String::as_str));
    crate::run(root, "cargo", &arguments, &[])
}
