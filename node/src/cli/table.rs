//! `millrace cli changefeed move-table` and its like: where the tables of a changefeed are.

use clap::Args;
use serde_json::{Value, json};

use super::changefeed::{IdArg, path};
use super::{ApiError, CliError, Session, items, print_json, say};

/// A table of a changefeed.
#[derive(Args, Debug)]
pub(super) struct TableArg {
    #[command(flatten)]
    id: IdArg,
    /// Id of the table, as `changefeed tables` shows it.
    #[arg(short, long)]
    table_id: i64,
    /// 0: the tables themselves. 1: their redo logs, of which there are none.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=1))]
    mode: u8,
}

/// A table, and where it is to go.
#[derive(Args, Debug)]
pub(super) struct MoveArgs {
    #[command(flatten)]
    table: TableArg,
    /// Id of the server, as `capture list` shows it.
    #[arg(short = 'd', long, value_parser = super::capture::parse_id)]
    target_node_id: String,
    /// Wait until the table runs there.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    wait: bool,
}

/// `{"success": …, "error": …}`; a failure is a result too, and makes the exit code 1.
pub(super) fn tell(result: Result<Value, ApiError>) -> Result<(), CliError> {
    match result {
        Ok(_) => print_json(&json!({ "success": true, "error": "" })),
        Err(error) => {
            print_json(&json!({ "success": false, "error": error.to_string() }))?;
            Err(error.into())
        }
    }
}

async fn ask(client: &Session, what: &str, table: &TableArg, more: &str) -> Result<(), CliError> {
    let query = format!("/{what}?tableID={}&mode={}{more}", table.table_id, table.mode);
    tell(client.post(&path(&table.id.changefeed_id, &query), &json!({})).await)
}

/// `move_table` moves a table that is whole, `move_split_table` all parts of one that is divided.
pub(super) async fn move_table(client: &Session, what: &str, args: &MoveArgs) -> Result<(), CliError> {
    let more = format!("&targetNodeID={}&wait={}", args.target_node_id, args.wait);
    ask(client, what, &args.table, &more).await
}

pub(super) async fn split(client: &Session, table: &TableArg) -> Result<(), CliError> {
    ask(client, "split_table_by_region_count", table, "").await
}

pub(super) async fn merge(client: &Session, table: &TableArg) -> Result<(), CliError> {
    ask(client, "merge_table", table, "").await
}

pub(super) async fn tables(client: &Session, id: &str) -> Result<(), CliError> {
    let answer = client.get(&path(id, "/tables")).await?;
    print_json(&Value::Array(items(&answer).cloned().collect()))
}

pub(super) async fn dispatcher_count(client: &Session, id: &str) -> Result<(), CliError> {
    let answer = client.get(&path(id, "/get_dispatcher_count")).await?;
    say(&answer["count"])
}
