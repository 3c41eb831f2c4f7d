//! `millrace verify`: compares both ends of a changefeed while rows flow.

use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use serde_json::{Value, json};
use verify::{Outcome, Report};

use super::changefeed::{IdArg, path};
use super::{CliError, Session, print_json, say};

/// How often the server is asked how far it is.
const LOOK: Duration = Duration::from_millis(300);

/// What to compare.
#[derive(Args, Debug)]
pub(super) struct What {
    #[command(flatten)]
    id: IdArg,
    /// Only this table, as schema.table; may be repeated.
    #[arg(short, long = "table", value_name = "TABLE")]
    tables: Vec<String>,
    /// Rows that are read at each end in a second at most, in the mean.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    rows_per_second: Option<u32>,
}

/// What the server says of a comparison.
#[derive(Deserialize)]
struct Comparison {
    report: Report,
    #[serde(default)]
    error: Option<String>,
    ended: Option<String>,
}

fn read(value: Value) -> Result<Comparison, CliError> {
    serde_json::from_value(value)
        .map_err(|error| CliError::Usage(format!("the server's answer is not understood: {error}")))
}

/// Begins a comparison, shows how far it is, and tells what came of it.
pub(super) async fn verify(client: &Session, args: &What) -> Result<(), CliError> {
    let path = path(&args.id.changefeed_id, "/verify");
    let body = json!({ "tables": args.tables, "rows_per_second": args.rows_per_second });
    let mut value = client.post(&path, &body).await?;
    let style = ProgressStyle::with_template("{bar:30} {pos} of about {len} rows, {per_sec}, {msg}");
    let bar = ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let state = loop {
        let state = read(value.clone())?;
        if state.ended.is_some() {
            break state;
        }
        let (done, expected) = state.report.progress();
        let finished = state.report.tables.iter().filter(|table| table.outcome != Outcome::Running).count();
        bar.set_length(expected);
        bar.set_position(done);
        bar.set_message(format!("{finished} of {} tables", state.report.tables.len()));
        tokio::time::sleep(LOOK).await;
        value = client.get(&path).await?;
    };
    bar.finish_and_clear();
    if client.json {
        print_json(&value)?;
    } else {
        say(&state.report.to_string().trim_end())?;
    }
    verdict(state.report.outcome, state.error)
}

/// What the program says by its exit code: 0, 3 and 4.
fn verdict(outcome: Outcome, error: Option<String>) -> Result<(), CliError> {
    match (outcome, error) {
        (Outcome::Equal, None) => Ok(()),
        (Outcome::Different, _) => Err(CliError::Different),
        (Outcome::Equal | Outcome::Running | Outcome::Undecided, Some(error)) => {
            Err(CliError::Undecided(error))
        }
        (Outcome::Running | Outcome::Undecided, None) => {
            Err(CliError::Undecided("not everything could be compared; the lines above say what".to_owned()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_compared_to_its_end_is_equal() {
        let code = |outcome, error: Option<&str>| {
            verdict(outcome, error.map(str::to_owned)).map_or_else(|error| error.exit_code(), |()| 0)
        };
        assert_eq!(code(Outcome::Equal, None), 0);
        for error in [None, Some("the changefeed stands")] {
            assert_eq!(code(Outcome::Different, error), 3, "what differs differs, whatever came later");
            assert_eq!(code(Outcome::Undecided, error), 4);
            assert_eq!(code(Outcome::Running, error), 4);
        }
        assert_eq!(code(Outcome::Equal, Some("the changefeed stands")), 4);
    }
}
