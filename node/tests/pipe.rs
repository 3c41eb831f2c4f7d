//! The command line beside other programs.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::process::{Command, Stdio};

#[test]
fn a_reader_that_goes_away_early_is_no_panic() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = Command::new(env!("CARGO_BIN_EXE_millrace"))
        .arg("version")
        .stdout(writer)
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(141), "as if the signal had ended it");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}
