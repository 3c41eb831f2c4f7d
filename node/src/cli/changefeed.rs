//! `millrace cli changefeed …`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use super::{ApiError, CliError, Client, items, print_json, say, table, update};

#[derive(Subcommand, Debug)]
pub(super) enum ChangefeedCommand {
    /// Start replicating.
    Create(Box<CreateArgs>),
    /// List changefeeds as JSON.
    List {
        /// Show finished and removed ones too.
        #[arg(short, long)]
        all: bool,
    },
    /// Show one changefeed as JSON.
    Query {
        #[command(flatten)]
        id: IdArg,
        /// Only state and checkpoint.
        #[arg(short, long)]
        simple: bool,
    },
    /// Stop a changefeed; its position is kept.
    Pause(IdArg),
    /// Continue a paused, failed or finished changefeed.
    Resume {
        #[command(flatten)]
        id: IdArg,
        /// Continue from this position instead of the checkpoint.
        #[arg(long)]
        overwrite_checkpoint_ts: Option<u64>,
    },
    /// Remove a changefeed, with its slot and publication.
    Remove(IdArg),
    /// Change a stopped or failed changefeed.
    Update(update::UpdateArgs),
    /// How far a changefeed is behind, again and again, as JSON.
    Statistics(update::StatisticsArgs),
    /// Which tables each server replicates, as JSON.
    Tables(IdArg),
    /// How many dispatchers the changefeed has on all servers.
    DispatcherCount(IdArg),
    /// Move a table to a server.
    MoveTable(table::MoveArgs),
    /// Move all parts of a divided table to a server.
    MoveSplitTable(table::MoveArgs),
    /// Divide a table into key ranges, about one for each server.
    SplitTableByRegionCount(table::TableArg),
    /// Join two neighbouring parts of a divided table.
    MergeTable(table::TableArg),
}

#[derive(Args, Debug)]
pub(super) struct IdArg {
    /// Name of the changefeed.
    #[arg(short, long, value_parser = parse_name)]
    pub(super) changefeed_id: String,
}

/// A name goes into a path, so what is not one must not reach it.
fn parse_name(text: &str) -> Result<String, String> {
    if heartbeatpb::config::is_valid_name(text) {
        return Ok(text.to_owned());
    }
    Err("a changefeed id has letters, digits and single hyphens between them, at most 128 bytes".to_owned())
}

#[derive(Args, Debug)]
pub(super) struct CreateArgs {
    /// Name of the changefeed; a random one by default.
    #[arg(short, long)]
    changefeed_id: Option<String>,
    /// Where changes come from: postgres://user:password@host:port/db or generator://bank.
    #[arg(long, env = "MILLRACE_UPSTREAM_URI", hide_env_values = true)]
    upstream_uri: String,
    /// Where changes go: postgres://…, file:///dir?protocol=canal-json, blackhole://.
    #[arg(long, env = "MILLRACE_SINK_URI", hide_env_values = true)]
    sink_uri: String,
    /// Start at this position; 0 is now.
    #[arg(long, default_value_t = 0)]
    start_ts: u64,
    /// Stop at this position; 0 is never.
    #[arg(long, default_value_t = 0)]
    target_ts: u64,
    /// Replica configuration, TOML.
    #[arg(long)]
    config: Option<PathBuf>,
    /// Do not copy the rows that exist already; only changes from now on.
    #[arg(long)]
    no_initial_copy: bool,
    /// Do not ask questions: accept that some tables cannot be replicated.
    #[arg(long)]
    no_confirm: bool,
    /// Print the names of the tables.
    #[arg(short, long)]
    verbose: bool,
}

pub(super) async fn run(client: &Client, command: ChangefeedCommand) -> Result<(), CliError> {
    match command {
        ChangefeedCommand::Create(args) => create(client, *args).await,
        ChangefeedCommand::List { all } => list(client, all).await,
        ChangefeedCommand::Query { id, simple } => query(client, &id.changefeed_id, simple).await,
        ChangefeedCommand::Pause(id) => {
            client.post(&path(&id.changefeed_id, "/pause"), &json!({})).await?;
            say(&format_args!("Pause changefeed successfully!\nID: {}", id.changefeed_id))
        }
        ChangefeedCommand::Resume { id, overwrite_checkpoint_ts } => {
            let body = overwrite_checkpoint_ts
                .map_or_else(|| json!({}), |ts| json!({ "overwrite_checkpoint_ts": ts }));
            client.post(&path(&id.changefeed_id, "/resume"), &body).await?;
            say(&format_args!("Resume changefeed successfully!\nID: {}", id.changefeed_id))
        }
        ChangefeedCommand::Remove(id) => remove(client, &id.changefeed_id).await,
        ChangefeedCommand::Update(args) => update::update(client, &args).await,
        ChangefeedCommand::Statistics(args) => update::statistics(client, &args).await,
        ChangefeedCommand::Tables(id) => table::tables(client, &id.changefeed_id).await,
        ChangefeedCommand::DispatcherCount(id) => table::dispatcher_count(client, &id.changefeed_id).await,
        ChangefeedCommand::MoveTable(args) => table::move_table(client, "move_table", &args).await,
        ChangefeedCommand::MoveSplitTable(args) => table::move_table(client, "move_split_table", &args).await,
        ChangefeedCommand::SplitTableByRegionCount(args) => table::split(client, &args).await,
        ChangefeedCommand::MergeTable(args) => table::merge(client, &args).await,
    }
}

pub(super) fn path(id: &str, rest: &str) -> String {
    format!("/api/v2/changefeeds/{id}{rest}")
}

async fn create(client: &Client, args: CreateArgs) -> Result<(), CliError> {
    let mut replica = match &args.config {
        None => Map::new(),
        Some(file) => read_config(file)?,
    };
    if args.no_initial_copy {
        let copy = replica.entry("initial_copy").or_insert_with(|| json!({}));
        copy["enabled"] = json!(false);
    }
    let mut body = json!({
        "start_ts": args.start_ts, "target_ts": args.target_ts, "sink_uri": args.sink_uri,
        "upstream": { "uri": args.upstream_uri }, "replica_config": replica,
    });
    if let Some(id) = &args.changefeed_id {
        body["changefeed_id"] = json!(id);
    }
    let tables = client.post("/api/v2/verify_table", &body).await?;
    let count = |key: &str| tables[key].as_array().map_or(0, Vec::len);
    if count("ineligible_tables") > 0 && !accepts_ineligible(&body) {
        eprintln!("These tables cannot be replicated:");
        for table in tables["ineligible_tables"].as_array().into_iter().flatten() {
            eprintln!("  {}: {}", name_of(table), table["reason"].as_str().unwrap_or("no usable key"));
        }
        if !args.no_confirm && !confirm("Leave them out and go on?")? {
            return Err(CliError::Aborted);
        }
        body["replica_config"]["ignore_ineligible_table"] = json!(true);
    }
    let info = client.post("/api/v2/changefeeds", &body).await?;
    say(&format_args!(
        "Create changefeed successfully!\nID: {}\nInfo: {info}",
        info["id"].as_str().unwrap_or_default()
    ))?;
    for (label, key) in [
        ("IneligibleTablesCount", "ineligible_tables"),
        ("EligibleTablesCount", "eligible_tables"),
        ("AllTablesCount", "all_tables"),
    ] {
        say(&format_args!("{label}: {}", count(key)))?;
        if args.verbose {
            let names: Vec<String> = tables[key].as_array().into_iter().flatten().map(name_of).collect();
            say(&format_args!("  [{}]", names.join(", ")))?;
        }
    }
    for warning in info["warnings"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        eprintln!("warning: {warning}");
    }
    Ok(())
}

fn read_config(file: &PathBuf) -> Result<Map<String, Value>, CliError> {
    let usage = |what: String| CliError::Usage(format!("{}: {what}", file.display()));
    let text = std::fs::read_to_string(file).map_err(|e| usage(e.to_string()))?;
    let config = heartbeatpb::config::ReplicaConfig::from_toml(&text).map_err(|e| usage(e.to_string()))?;
    match config.to_api() {
        Value::Object(map) => Ok(map),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
            Err(usage("is not a table of keys".to_owned()))
        }
    }
}

fn accepts_ineligible(body: &Value) -> bool {
    let config = &body["replica_config"];
    config["force_replicate"] == true || config["ignore_ineligible_table"] == true
}

fn name_of(table: &Value) -> String {
    let text = |key: &str| table[key].as_str().unwrap_or("?").to_owned();
    format!("{}.{}", text("database_name"), text("table_name"))
}

/// Asks on standard error, reads one word from standard input; anything but `y` is no.
pub(super) fn confirm(question: &str) -> Result<bool, CliError> {
    eprint!("{question} [y/N] ");
    let mut line = String::new();
    std::io::stdin()
        .read_line(&mut line)
        .map_err(|e| CliError::Usage(format!("cannot read the answer: {e}")))?;
    Ok(line.trim().eq_ignore_ascii_case("y"))
}

async fn list(client: &Client, all: bool) -> Result<(), CliError> {
    let answer =
        client.get(if all { "/api/v2/changefeeds?state=all" } else { "/api/v2/changefeeds" }).await?;
    let rows: Vec<Value> = items(&answer)
        .map(|feed| {
            json!({
                "id": feed["id"], "keyspace": feed["keyspace"],
                "summary": {
                    "state": feed["state"], "tso": feed["checkpoint_tso"],
                    "checkpoint": feed["checkpoint_time"], "error": feed["error"],
                },
            })
        })
        .collect();
    print_json(&Value::Array(rows))
}

async fn query(client: &Client, id: &str, simple: bool) -> Result<(), CliError> {
    if simple {
        print_json(&client.get(&path(id, "/status")).await?)
    } else {
        print_json(&client.get(&path(id, "")).await?)
    }
}

async fn remove(client: &Client, id: &str) -> Result<(), CliError> {
    let info = match client.get(&path(id, "")).await {
        Ok(info) => info,
        Err(ApiError::Refused { code, .. }) if code == "CDC:ErrChangeFeedNotExists" => {
            return say(&"Changefeed not found.");
        }
        Err(e) => return Err(e.into()),
    };
    client.delete(&path(id, "")).await?;
    say(&format_args!(
        "Changefeed remove successfully.\nID: {id}\nCheckpointTs: {}\nSinkURI: {}",
        info["checkpoint_ts"],
        info["sink_uri"].as_str().unwrap_or_default()
    ))
}
