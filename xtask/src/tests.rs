//! `cargo xtask test`: every test of the workspace, two programs of tests at a time.
//!
//! Most of the time of a test with real servers is waiting, for a lease to end or a server to start, and cargo runs one
//! program of tests after the other. Comments hold no tests (`cargo xtask tidy`): examples are programs.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow, bail};
use serde_json::Value;

/// How many programs run at a time. Each has a thread per core for its tests.
const AT_A_TIME: usize = 2;
/// So many tests that failed are run once more; more than that are no accident.
const MOST_AGAIN: usize = 4;
/// Programs that take longest, which begin, so that none of them is left for the end.
const LONGEST: [(&str, &str); 6] = [
    ("node", "node"),
    ("node", "cluster"),
    ("node", "schema"),
    ("sink", "postgres"),
    ("coordinator", "store"),
    ("node", "ddl"),
];

/// One program of tests.
struct Program {
    package: String,
    /// The name of its target, with the kind where a package's library or program may have the same one.
    name: String,
    executable: PathBuf,
    /// Where it runs, as with cargo.
    folder: PathBuf,
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.package, self.name)
    }
}

impl Program {
    fn log(&self, logs: &Path) -> PathBuf {
        logs.join(format!("test-{}-{}.log", self.package, self.name))
    }

    /// The programs that take longest come first.
    fn turn(&self) -> usize {
        let place =
            LONGEST.iter().position(|longest| *longest == (self.package.as_str(), self.name.as_str()));
        place.unwrap_or(LONGEST.len())
    }
}

/// Builds the tests of the workspace with what cargo is told, and runs them. What is to be done `beside` them begins when
/// they are built.
pub(crate) fn run(root: &Path, cargo: &[&str], beside: impl FnOnce() -> Result<()> + Send) -> Result<()> {
    let started = Instant::now();
    let mut queue: Vec<Program> = build(root, cargo)?;
    queue.sort_by_key(Program::turn);
    let count = queue.len();
    eprintln!("ok: {count} programs of tests are built, {:.0} s", started.elapsed().as_secs_f64());
    let logs = crate::built(root)?;
    let (queue, failed) = (Mutex::new(VecDeque::from(queue)), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        let beside = scope.spawn(beside);
        for _ in 0..AT_A_TIME {
            scope.spawn(|| worker(&queue, &failed, &logs));
        }
        beside.join().unwrap_or_else(|_| Err(anyhow!("what ran beside the tests ended abnormally")))
    })?;
    judge(failed.into_inner().unwrap_or_default(), count, &logs)
}

/// Takes one program after the other until there is none.
fn worker(queue: &Mutex<VecDeque<Program>>, failed: &Mutex<Vec<Failure>>, logs: &Path) {
    loop {
        let next = queue.lock().ok().and_then(|mut queue| queue.pop_front());
        let Some(program) = next else { return };
        if let Err(error) = run_one(&program, &[], logs) {
            eprintln!("FAILED: {program}: {error:#}");
            if let Ok(mut failed) = failed.lock() {
                failed.push(Failure { tests: failed_tests(&program, logs), program });
            }
        }
    }
}

/// A program that failed, and which of its tests did, as far as it said so.
struct Failure {
    program: Program,
    tests: Vec<String>,
}

/// A few tests that failed while others had the machine run once more, alone. That they failed is told either way: a
/// test that passes only alone is a defect of the test or of what it tests.
fn judge(failed: Vec<Failure>, count: usize, logs: &Path) -> Result<()> {
    let tests: usize = failed.iter().map(|failure| failure.tests.len().max(1)).sum();
    let (mut broken, mut unsteady) = (Vec::new(), Vec::new());
    for Failure { program, tests: names } in failed {
        let what =
            format!("{program} ({})", if names.is_empty() { "all".to_owned() } else { names.join(", ") });
        if tests > MOST_AGAIN {
            broken.push(what);
            continue;
        }
        eprintln!("once more, alone: {what}");
        match run_one(&program, &names, logs) {
            Ok(()) => unsteady.push(what),
            Err(error) => {
                eprintln!("FAILED again: {program}: {error:#}");
                broken.push(what);
            }
        }
    }
    for what in &unsteady {
        eprintln!("UNSTEADY: {what}: failed, and passed when it was run once more, alone");
    }
    if !broken.is_empty() {
        bail!("{} of {count} programs of tests failed: {}", broken.len(), broken.join("; "));
    }
    Ok(())
}

/// The names below the last `failures:` of a program's log.
fn failed_tests(program: &Program, logs: &Path) -> Vec<String> {
    let text = std::fs::read(program.log(logs)).unwrap_or_default();
    names_of_failed(&String::from_utf8_lossy(&text))
}

fn names_of_failed(text: &str) -> Vec<String> {
    let Some((_, list)) = text.rsplit_once("\nfailures:\n") else { return Vec::new() };
    list.lines().map_while(|line| line.strip_prefix("    ")).map(str::to_owned).collect()
}

/// Runs a program, or only some of its tests. What it says goes into a file, so that one that hangs can be looked at. It
/// is shown after a failure.
fn run_one(program: &Program, tests: &[String], logs: &Path) -> Result<()> {
    let started = Instant::now();
    let log = program.log(logs);
    eprintln!("> {program} ({})", log.display());
    let output = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let exact = (!tests.is_empty()).then_some("--exact");
    let status = Command::new(&program.executable)
        .args(exact)
        .args(tests)
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
    eprintln!("ok: {program}: {passed}, {:.1} s", started.elapsed().as_secs_f64());
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
    let output = crate::program("cargo")
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

#[cfg(test)]
mod names {
    use super::*;

    #[test]
    fn the_tests_that_failed_are_read_from_what_a_program_said() {
        let said = "running 3 tests\ntest a ... ok\ntest b::c ... FAILED\ntest d ... FAILED\n\nfailures:\n\n\
                    ---- b::c stdout ----\nfailures:\n    not this\n\n\nfailures:\n    b::c\n    d\n\n\
                    test result: FAILED. 1 passed; 2 failed; 0 ignored\n";
        assert_eq!(names_of_failed(said), ["b::c", "d"]);
        assert!(names_of_failed("running 1 test\n").is_empty(), "it ended abnormally");
    }
}
