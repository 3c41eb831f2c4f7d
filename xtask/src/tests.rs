//! `cargo xtask test`: every test of the workspace, two programs of tests at a time.
//!
//! Most of the time of a test with real servers is waiting, for a lease to end or a server to start, and cargo runs one
//! program of tests after the other. Documentation's examples are left to cargo.

use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// How many programs run at a time. Each has a thread per core for its tests.
const AT_A_TIME: usize = 2;
/// Programs that take longest, which begin, so that none of them is left for the end.
const LONGEST: [(&str, &str); 5] =
    [("node", "node"), ("sink", "postgres"), ("coordinator", "store"), ("node", "cluster"), ("node", "ddl")];

/// One program of tests.
struct Program {
    package: String,
    /// The name of its target, with the kind where a package's library or program may have the same one.
    name: String,
    executable: PathBuf,
    /// Where it runs, as with cargo.
    folder: PathBuf,
}

impl Program {
    /// The programs that take longest come first.
    fn turn(&self) -> usize {
        let place =
            LONGEST.iter().position(|longest| *longest == (self.package.as_str(), self.name.as_str()));
        place.unwrap_or(LONGEST.len())
    }
}

/// Builds the tests of the workspace with what cargo is told beside, and runs them.
pub(crate) fn run(root: &Path, cargo: &[&str]) -> Result<()> {
    let started = Instant::now();
    let mut queue: Vec<Program> = build(root, cargo)?;
    queue.sort_by_key(Program::turn);
    let count = queue.len();
    eprintln!("ok: {count} programs of tests are built, {:.0} s", started.elapsed().as_secs_f64());
    let logs = crate::built(root)?;
    let (queue, failed) = (Mutex::new(VecDeque::from(queue)), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..AT_A_TIME {
            scope.spawn(|| worker(&queue, &failed, &logs));
        }
    });
    let failed = failed.into_inner().unwrap_or_default();
    if !failed.is_empty() {
        bail!("{} of {count} programs of tests failed: {}", failed.len(), failed.join(", "));
    }
    let examples = ["test", "--quiet", "--workspace", "--exclude", "xtask", "--doc"];
    crate::run(root, "cargo", &[&examples[..], cargo].concat(), &[])
}

/// Takes one program after the other until there is none.
fn worker(queue: &Mutex<VecDeque<Program>>, failed: &Mutex<Vec<String>>, logs: &Path) {
    loop {
        let next = queue.lock().ok().and_then(|mut queue| queue.pop_front());
        let Some(program) = next else { return };
        let name = format!("{} {}", program.package, program.name);
        if let Err(error) = run_one(&program, &name, logs) {
            eprintln!("FAILED: {name}: {error:#}");
            if let Ok(mut failed) = failed.lock() {
                failed.push(name);
            }
        }
    }
}

/// What a program says goes into a file, so that one that hangs can be looked at. It is shown after a failure.
fn run_one(program: &Program, name: &str, logs: &Path) -> Result<()> {
    let started = Instant::now();
    let log = logs.join(format!("test-{}-{}.log", program.package, program.name));
    eprintln!("> {name} ({})", log.display());
    let output = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let status = Command::new(&program.executable)
        .current_dir(&program.folder)
        .env("CARGO_MANIFEST_DIR", &program.folder)
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .status()
        .with_context(|| format!("cannot start {}", program.executable.display()))?;
    let text = String::from_utf8_lossy(&std::fs::read(&log)?).into_owned();
    if !status.success() {
        eprintln!("{text}");
        bail!("{status}");
    }
    let passed =
        text.lines().rev().find_map(|line| line.strip_prefix("test result: ok. ")).unwrap_or_default();
    let passed = passed.split(';').next().unwrap_or_default();
    eprintln!("ok: {name}: {passed}, {:.1} s", started.elapsed().as_secs_f64());
    Ok(())
}

/// Cargo builds, and tells where the programs are.
fn build(root: &Path, arguments: &[&str]) -> Result<Vec<Program>> {
    let all = [
        "test",
        "--workspace",
        "--exclude",
        "xtask",
        "--no-run",
        "--message-format",
        "json-render-diagnostics",
    ];
    eprintln!("> cargo test --workspace --exclude xtask --no-run {}", arguments.join(" "));
    let output = Command::new("cargo")
        .args(all)
        .args(arguments)
        .current_dir(root)
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    if !output.status.success() {
        bail!("the tests do not build");
    }
    let lines = String::from_utf8(output.stdout).context("cargo's messages are not UTF-8")?;
    Ok(lines
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .filter_map(|line| program(&line))
        .collect())
}

/// The program that one of cargo's messages is about.
fn program(message: &Value) -> Option<Program> {
    let is_test = message["reason"] == "compiler-artifact" && message["profile"]["test"] == true;
    let executable = PathBuf::from(message["executable"].as_str().filter(|_| is_test)?);
    let folder = Path::new(message["manifest_path"].as_str()?).parent()?.to_owned();
    let package = folder.file_name()?.to_str()?.to_owned();
    let target = message["target"]["name"].as_str()?;
    let name = match message["target"]["kind"][0].as_str()? {
        "test" => target.to_owned(),
        kind => format!("{kind}-{target}"),
    };
    Some(Program { package, name, executable, folder })
}
