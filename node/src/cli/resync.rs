//! `millrace cli changefeed resync-table` and its like: tables that are copied again while the others go on.

use std::time::Duration;

use clap::Args;
use heartbeatpb::codes;
use serde_json::{Value, json};

use super::changefeed::{IdArg, path};
use super::table::tell;
use super::{ApiError, CliError, Session, items, print_json};

/// How often the server is asked how far a copy is.
const LOOK: Duration = Duration::from_millis(500);
/// Looks between two lines that say how far a copy is.
const LOOKS_PER_LINE: u32 = 10;

/// A table of a changefeed.
#[derive(Args, Debug)]
pub(super) struct TableArgs {
    #[command(flatten)]
    id: IdArg,
    /// Schema and name of the table in the source, such as shop.orders, or its id, as `changefeed tables` shows it.
    #[arg(short, long, value_name = "TABLE")]
    table: String,
}

/// A table that is to be copied again.
#[derive(Args, Debug)]
pub(super) struct ResyncArgs {
    #[command(flatten)]
    table: TableArgs,
    /// Wait until the table is copied. Without it `changefeed resyncs` tells how far it is.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    wait: bool,
}

async fn post(client: &Session, what: &str, args: &TableArgs) -> Result<Value, ApiError> {
    let body = json!({ "table": args.table });
    client.post(&path(&args.id.changefeed_id, &format!("/{what}")), &body).await
}

/// Asks for a table, and follows its copy to the end.
pub(super) async fn ask(client: &Session, args: &ResyncArgs) -> Result<(), CliError> {
    let asked = post(client, "resync_table", &args.table).await;
    let table = match &asked {
        Ok(resync) => resync["table_id"].clone(),
        Err(_) => return tell(asked),
    };
    if args.wait {
        follow(client, args, &table).await?;
    }
    tell(Ok(json!({})))
}

/// Shows how far the copy of a table is until it has ended.
async fn follow(client: &Session, args: &ResyncArgs, table: &Value) -> Result<(), CliError> {
    let ended = |words: &str| Err(CliError::Usage(words.to_owned()));
    for looks in 1_u32.. {
        let Some(resync) = look(client, &args.table.id.changefeed_id, table).await? else {
            return ended("the request was withdrawn; the table stays as it was");
        };
        match resync["state"].as_str().unwrap_or_default() {
            "done" => break,
            "paused" => return ended("the request was paused; resume-resync lets it go on"),
            "failed" => {
                let text = |key: &str| resync["error"][key].as_str().unwrap_or_default().to_owned();
                return ended(&format!("[{}]{}", text("code"), text("message")));
            }
            _ => {}
        }
        if looks.is_multiple_of(LOOKS_PER_LINE) {
            eprintln!("{}", line(&resync));
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

/// The request as it is now. `None`: it is gone. A changefeed that moves or waits after an error is asked again.
async fn look(client: &Session, id: &str, table: &Value) -> Result<Option<Value>, CliError> {
    loop {
        match client.get(&path(id, "/resyncs")).await {
            Ok(list) => return Ok(items(&list).find(|one| one["table_id"] == *table).cloned()),
            Err(error) if [codes::NOT_INITIALIZED, codes::MAINTAINER_NOT_FOUND].contains(&error.code()) => {
                eprintln!("waiting: {error}");
                tokio::time::sleep(LOOK * LOOKS_PER_LINE).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// How far a copy is, in a line.
fn line(resync: &Value) -> String {
    let text = |key: &str| resync[key].as_str().unwrap_or_default().to_owned();
    let mut line = format!("{}: {}", text("table"), text("state"));
    if let Some(rows) = resync["rows"].as_u64().filter(|rows| *rows > 0) {
        line.push_str(&format!(", {rows} of about {} rows", resync["rows_expected"]));
    }
    if let Some(seconds) = resync["remaining_seconds"].as_u64() {
        line.push_str(&format!(", {} a second, {seconds} s left", resync["rows_per_second"]));
    }
    for what in [&resync["waits_for"], &resync["error"]["message"]] {
        if let Some(what) = what.as_str() {
            line.push_str(&format!("; {what}"));
        }
    }
    line
}

pub(super) async fn list(client: &Session, id: &str) -> Result<(), CliError> {
    let answer = client.get(&path(id, "/resyncs")).await?;
    print_json(&Value::Array(items(&answer).cloned().collect()))
}

/// `pause_resync`, `resume_resync` or `cancel_resync`.
pub(super) async fn change(client: &Session, what: &str, args: &TableArgs) -> Result<(), CliError> {
    tell(post(client, what, args).await)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_far_a_copy_is_and_what_it_waits_for() {
        let copying = json!({
            "table": "shop.orders", "state": "copying", "rows": 500, "rows_expected": 2000, "rows_per_second": 100.5,
            "remaining_seconds": 15, "waits_for": null, "error": null,
        });
        assert_eq!(line(&copying), "shop.orders: copying, 500 of about 2000 rows, 100.5 a second, 15 s left");
        let waiting = json!({
            "table": "shop.orders", "state": "waiting", "rows": 0, "error": { "code": "CDC:ErrX", "message": "it is away" },
        });
        assert_eq!(line(&waiting), "shop.orders: waiting; it is away");
    }
}
