//! The programs of `testkit`: `crash` and the benchmarks against a release build, `dev` for people.

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, anyhow};

use crate::servers;

/// Builds everything optimised and runs one program with the arguments of the caller.
pub(crate) fn run(root: &Path, name: &str, rest: &[String]) -> Result<()> {
    servers::ensure()?;
    crate::run(root, "cargo", &["build", "--release", "-p", "node", "-p", "testkit"], &[])?;
    let mut arguments = vec!["run", "--quiet", "--release", "-p", "testkit", "--bin", name, "--"];
    arguments.extend(rest.iter().map(String::as_str));
    crate::run(root, "cargo", &arguments, &[])
}

/// Builds without optimisation, which is quick, and becomes the program: a Ctrl-C is its own affair then, and the
/// terminal waits until it has cleaned up.
pub(crate) fn become_dev(root: &Path, rest: &[String]) -> Result<()> {
    servers::ensure()?;
    crate::run(root, "cargo", &["build", "-p", "node", "-p", "testkit"], &[])?;
    let error = Command::new("cargo")
        .args(["run", "--quiet", "-p", "testkit", "--bin", "dev", "--"])
        .args(rest)
        .current_dir(root)
        .exec();
    Err(anyhow!(error).context("cannot start cargo"))
}
