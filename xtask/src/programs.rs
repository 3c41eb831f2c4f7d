//! The programs of `testkit` that run against a release build: `crash` and the benchmarks.

use std::path::Path;

use anyhow::Result;

use crate::servers;

/// Builds everything optimised and runs one program with the arguments of the caller.
pub(crate) fn run(root: &Path, name: &str, rest: &[String]) -> Result<()> {
    servers::ensure()?;
    crate::run(root, "cargo", &["build", "--release", "-p", "node", "-p", "testkit"], &[])?;
    let mut arguments = vec!["run", "--quiet", "--release", "-p", "testkit", "--bin", name, "--"];
    arguments.extend(rest.iter().map(String::as_str));
    crate::run(root, "cargo", &arguments, &[])
}
