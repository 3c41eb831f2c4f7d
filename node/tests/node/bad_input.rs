//! What people may do wrong, on the command line, in requests, in the server's configuration: each mistake is
//! refused with words that name it, without secrets, and leaves nothing behind.

mod cli;
mod http;
mod server;

use std::io::{Read, Seek};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A password that must not be found in any answer.
const SECRET: &str = "s3cr3t-canary";

/// A program that was not refused may run for ever: after this time it is killed, and the test says so.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs the program to its end.
fn millrace(dir: &Path, arguments: &[&str]) -> Output {
    let [mut out, mut err] = [(); 2].map(|()| tempfile::tempfile().unwrap());
    let mut child = Command::new(env!("CARGO_BIN_EXE_millrace"))
        .args(arguments)
        .current_dir(dir)
        .env_remove("MILLRACE_SERVER")
        .env_remove("MILLRACE_UPSTREAM_URI")
        .env_remove("MILLRACE_SINK_URI")
        // Nobody's own credentials.
        .env("HOME", dir)
        .stdin(Stdio::null())
        .stdout(out.try_clone().unwrap())
        .stderr(err.try_clone().unwrap())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let [stdout, stderr] = [&mut out, &mut err].map(|file| {
        let mut bytes = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    });
    Output { status, stdout, stderr }
}

/// What was wrong with refusals; all of it is told at the end.
#[derive(Default)]
struct Complaints(Vec<String>);

impl Complaints {
    fn unless(&mut self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.0.push(what());
        }
    }

    /// The program refuses: a code that is not zero, nothing on standard output, and the words on standard error.
    fn refuses(&mut self, dir: &Path, arguments: &[&str], words: &[&str]) {
        let output = millrace(dir, arguments);
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        let case = format!("millrace {}\n  {}{err}", arguments.join(" "), output.status);
        self.unless(!output.status.success(), || format!("was accepted: {case}"));
        self.unless(output.status.code().is_some(), || format!("was killed: {case}"));
        self.unless(out.is_empty(), || format!("standard output is for results: {out}, {case}"));
        for word in words {
            self.unless(err.contains(word), || format!("{word:?} is missing: {case}"));
        }
        self.unless(!err.contains("panicked"), || format!("panicked: {case}"));
        self.unless(!err.contains(SECRET), || format!("has a secret: {case}"));
    }

    fn none(self) {
        assert!(self.0.is_empty(), "{}", self.0.join("\n"));
    }
}
