//! `cargo xtask examples`: every crate has an example program, and every one of them runs.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// How long an example may run: they are written to end by themselves within seconds.
const LIMIT: Duration = Duration::from_secs(120);
/// Crates that nobody uses alone.
const WITHOUT: [&str; 2] = ["testkit", "xtask"];
/// Arguments that make an example small; what measures by default measures little here.
const ARGUMENTS: [(&str, &[&str]); 8] = [
    ("apply", &["blackhole://", "20000"]),
    ("bus_throughput", &["0.02"]),
    ("drain", &["20000"]),
    ("embed", &["2"]),
    ("fence", &["8", "1", "50"]),
    ("floor", &["50000"]),
    ("generate", &["generator://bank?rate=0", "1"]),
    ("throughput", &["50", "20000"]),
];

struct Example {
    package: String,
    name: String,
}

/// Builds and runs the examples of every crate, or of one.
pub(crate) fn run(root: &Path, only: Option<&str>) -> Result<()> {
    match only {
        Some(package) => crate::run(root, "cargo", &["build", "--quiet", "-p", package, "--examples"], &[])?,
        None => crate::run(root, "cargo", &["build", "--quiet", "--workspace", "--examples"], &[])?,
    }
    run_all(root, &crate::built(root)?, only)
}

/// Runs the examples that are built in the folder of programs.
pub(crate) fn run_all(root: &Path, programs: &Path, only: Option<&str>) -> Result<()> {
    let metadata = crate::metadata(root, &["--no-deps"])?;
    let examples = all(&metadata, only);
    if let Some(package) = missing(&metadata, only, &examples).first() {
        bail!("crate {package} has no example");
    }
    for example in &examples {
        let started = Instant::now();
        run_one(root, &programs.join("examples").join(&example.name), &example.name)
            .with_context(|| format!("example {} of {}", example.name, example.package))?;
        eprintln!(
            "ok: {} --example {}, {:.1} s",
            example.package,
            example.name,
            started.elapsed().as_secs_f64()
        );
    }
    Ok(())
}

fn all(metadata: &Value, only: Option<&str>) -> Vec<Example> {
    let mut examples = Vec::new();
    for package in packages(metadata, only) {
        for target in package["targets"].as_array().into_iter().flatten() {
            if target["kind"].as_array().is_some_and(|kinds| kinds.iter().any(|kind| kind == "example")) {
                let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                examples.push(Example { package: text(&package["name"]), name: text(&target["name"]) });
            }
        }
    }
    examples.sort_by(|one, other| (&one.package, &one.name).cmp(&(&other.package, &other.name)));
    examples
}

fn packages<'a>(metadata: &'a Value, only: Option<&'a str>) -> impl Iterator<Item = &'a Value> {
    let all = metadata["packages"].as_array().into_iter().flatten();
    all.filter(move |package| only.is_none_or(|only| package["name"] == only))
}

fn missing(metadata: &Value, only: Option<&str>, examples: &[Example]) -> Vec<String> {
    packages(metadata, only)
        .filter_map(|package| package["name"].as_str())
        .filter(|name| !WITHOUT.contains(name))
        .filter(|name| examples.iter().all(|example| example.package != *name))
        .map(str::to_owned)
        .collect()
}

/// Runs a program to its end. Its output is shown when it fails.
fn run_one(root: &Path, program: &Path, name: &str) -> Result<()> {
    let arguments = ARGUMENTS.iter().find(|(example, _)| *example == name).map_or(&[][..], |(_, list)| list);
    let log = root.join("target").join(format!("example-{name}.log"));
    let output = std::fs::File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let deadline = Instant::now() + LIMIT;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            break None;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let shown = || std::fs::read_to_string(&log).unwrap_or_default();
    match status {
        Some(status) if status.success() => Ok(()),
        Some(status) => bail!("{status}\n{}", shown()),
        None => bail!("did not end within {LIMIT:?}\n{}", shown()),
    }
}
