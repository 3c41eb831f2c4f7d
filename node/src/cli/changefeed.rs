//! `millrace cli changefeed …`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use heartbeatpb::config::{ConfigError, ReplicaConfig};
use serde_json::{Map, Value, json};

use super::{ApiError, CliError, Session, items, print_json, resume, resync, say, table, update};
use crate::config::nearest;

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
    Resume(resume::ResumeArgs),
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
    /// Copy a table again while the others go on, when its rows at the target are not those of the source.
    ResyncTable(resync::ResyncArgs),
    /// Which tables are copied again, how far they are, and what came of it, as JSON.
    Resyncs(IdArg),
    /// Let a table that is being copied again rest; what was written of it is rolled back.
    PauseResync(resync::TableArgs),
    /// Copy a table again whose copy rests.
    ResumeResync(resync::TableArgs),
    /// Withdraw the request for a table, or forget what came of it; the table stays as it is.
    CancelResync(resync::TableArgs),
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
    #[arg(
        long,
        env = "MILLRACE_UPSTREAM_URI",
        hide_env_values = true,
        required_unless_present = "upstream_name"
    )]
    upstream_uri: Option<String>,
    /// In place of a URI: one of the server's configuration, where [upstreams.NAME] has its URI.
    #[arg(long, conflicts_with = "upstream_uri")]
    upstream_name: Option<String>,
    /// Where changes go: postgres://…, file:///dir?protocol=canal-json, blackhole://.
    #[arg(long, env = "MILLRACE_SINK_URI", hide_env_values = true)]
    sink_uri: String,
    /// Start at this position, a number or for example pg:16/B374D848; 0 is now.
    #[arg(long, default_value = "0")]
    start_ts: String,
    /// Stop at this position; 0 is never.
    #[arg(long, default_value = "0")]
    target_ts: String,
    /// Replica configuration, TOML.
    #[arg(long)]
    config: Option<PathBuf>,
    /// Do not copy the rows that exist already; only changes from now on.
    #[arg(long)]
    no_initial_copy: bool,
    /// Whether the upstream gets event triggers that capture schema changes: auto (where the role may), true or false.
    #[arg(long, value_name = "auto|true|false", num_args = 0..=1, default_missing_value = "true")]
    install_ddl_capture: Option<InstallCapture>,
    /// Do not ask questions: accept that some tables cannot be replicated.
    #[arg(long)]
    no_confirm: bool,
    /// Print the names of the tables.
    #[arg(short, long)]
    verbose: bool,
    #[command(flatten)]
    old: OldArgs,
}

/// Values of `--install-ddl-capture`.
#[derive(Clone, Copy, clap::ValueEnum, Debug)]
enum InstallCapture {
    /// Where the role may.
    Auto,
    /// Always; a role that may not is refused.
    True,
    /// Never.
    False,
}

/// Flags of older scripts that mean nothing here.
#[derive(Args, Debug)]
pub(super) struct OldArgs {
    #[arg(long, hide = true)]
    tz: Option<String>,
    #[arg(long, hide = true)]
    sort_engine: Option<String>,
    #[arg(long, hide = true, value_parser = refuse_sort_dir)]
    sort_dir: Option<String>,
    #[arg(long, hide = true)]
    disable_gc_check: bool,
    #[arg(long, hide = true, value_parser = refuse_registry)]
    schema_registry: Option<String>,
    #[arg(long, hide = true)]
    upstream_pd: Option<String>,
    #[arg(long, hide = true)]
    upstream_ca: Option<String>,
    #[arg(long, hide = true)]
    upstream_cert: Option<String>,
    #[arg(long, hide = true)]
    upstream_key: Option<String>,
}

fn refuse_sort_dir(_: &str) -> Result<String, String> {
    Err("the directory is that of the server: set its data-dir".to_owned())
}

fn refuse_registry(_: &str) -> Result<String, String> {
    Err("no sink of this version uses a schema registry; leave it out".to_owned())
}

pub(super) async fn run(client: &Session, command: ChangefeedCommand) -> Result<(), CliError> {
    match command {
        ChangefeedCommand::Create(args) => create(client, *args).await,
        ChangefeedCommand::List { all } => list(client, all).await,
        ChangefeedCommand::Query { id, simple } => query(client, &id.changefeed_id, simple).await,
        ChangefeedCommand::Pause(id) => {
            client.post(&path(&id.changefeed_id, "/pause"), &json!({})).await?;
            let words = format!("Pause changefeed successfully!\nID: {}", id.changefeed_id);
            client.tell(&words, &json!({ "id": id.changefeed_id, "state": "stopped" }))
        }
        ChangefeedCommand::Resume(args) => resume::resume(client, &args).await,
        ChangefeedCommand::Remove(id) => remove(client, &id.changefeed_id).await,
        ChangefeedCommand::Update(args) => update::update(client, &args).await,
        ChangefeedCommand::Statistics(args) => update::statistics(client, &args).await,
        ChangefeedCommand::Tables(id) => table::tables(client, &id.changefeed_id).await,
        ChangefeedCommand::DispatcherCount(id) => table::dispatcher_count(client, &id.changefeed_id).await,
        ChangefeedCommand::MoveTable(args) => table::move_table(client, "move_table", &args).await,
        ChangefeedCommand::MoveSplitTable(args) => table::move_table(client, "move_split_table", &args).await,
        ChangefeedCommand::SplitTableByRegionCount(args) => table::split(client, &args).await,
        ChangefeedCommand::MergeTable(args) => table::merge(client, &args).await,
        ChangefeedCommand::ResyncTable(args) => resync::ask(client, &args).await,
        ChangefeedCommand::Resyncs(id) => resync::list(client, &id.changefeed_id).await,
        ChangefeedCommand::PauseResync(args) => resync::change(client, "pause_resync", &args).await,
        ChangefeedCommand::ResumeResync(args) => resync::change(client, "resume_resync", &args).await,
        ChangefeedCommand::CancelResync(args) => resync::change(client, "cancel_resync", &args).await,
    }
}

pub(super) fn path(id: &str, rest: &str) -> String {
    format!("/api/v2/changefeeds/{id}{rest}")
}

async fn create(client: &Session, args: CreateArgs) -> Result<(), CliError> {
    let mut replica = match &args.config {
        None => Map::new(),
        Some(file) => read_config(file)?,
    };
    if args.no_initial_copy {
        replica.entry("initial-copy").or_insert_with(|| json!({}))["enabled"] = json!(false);
    }
    if let Some(capture) = args.install_ddl_capture {
        replica.entry("ddl").or_insert_with(|| json!({}))["capture"] = match capture {
            InstallCapture::Auto => json!("auto"),
            InstallCapture::True => json!("on"),
            InstallCapture::False => json!("off"),
        };
    }
    let mut body = json!({
        "start_ts": args.start_ts, "target_ts": args.target_ts, "sink_uri": args.sink_uri,
        "replica_config": replica,
    });
    match (&args.upstream_name, &args.upstream_uri) {
        (Some(name), _) => body["upstream_name"] = json!(name),
        (None, uri) => body["upstream"] = json!({ "uri": uri }),
    }
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
        body["replica_config"]["ignore-ineligible-table"] = json!(true);
    }
    let info = client.post("/api/v2/changefeeds", &body).await?;
    for warning in info["warnings"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        eprintln!("warning: {warning}");
    }
    if client.json {
        return print_json(&info);
    }
    say(&format_args!(
        "Create changefeed successfully!\nID: {}\nInfo: {info}",
        info["id"].as_str().unwrap_or_default()
    ))?;
    print_tables(&tables, args.verbose)
}

/// How many tables there are of each kind, and which.
fn print_tables(tables: &Value, names: bool) -> Result<(), CliError> {
    for (label, key) in [
        ("IneligibleTablesCount", "ineligible_tables"),
        ("EligibleTablesCount", "eligible_tables"),
        ("AllTablesCount", "all_tables"),
    ] {
        let all = tables[key].as_array().map_or(&[][..], Vec::as_slice);
        say(&format_args!("{label}: {}", all.len()))?;
        if names {
            let names: Vec<String> = all.iter().map(name_of).collect();
            say(&format_args!("  [{}]", names.join(", ")))?;
        }
    }
    Ok(())
}

fn read_config(file: &PathBuf) -> Result<Map<String, Value>, CliError> {
    let usage = |what: String| CliError::Usage(format!("{}: {what}", file.display()));
    let text = std::fs::read_to_string(file).map_err(|e| usage(e.to_string()))?;
    // As it is stored: the API's own form would hide the secrets.
    match parse_config(&text).map_err(usage)?.to_value() {
        Value::Object(map) => Ok(map),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
            Err(usage("is not a table of keys".to_owned()))
        }
    }
}

/// Reads a configuration file strictly; a key that nobody knows is told with the nearest one that is known.
pub(super) fn parse_config(text: &str) -> Result<ReplicaConfig, String> {
    match ReplicaConfig::from_toml(text) {
        Ok(config) => Ok(config),
        Err(ConfigError::UnknownKeys(keys)) => {
            let known = nearest::keys_of(&ReplicaConfig::default().to_value());
            let told: Vec<String> = keys.iter().map(|key| nearest::told(key, &known)).collect();
            Err(format!("unknown keys: {}", told.join(", ")))
        }
        Err(error) => Err(error.to_string()),
    }
}

fn accepts_ineligible(body: &Value) -> bool {
    let config = &body["replica_config"];
    config["force-replicate"] == true || config["ignore-ineligible-table"] == true
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

async fn list(client: &Session, all: bool) -> Result<(), CliError> {
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

async fn query(client: &Session, id: &str, simple: bool) -> Result<(), CliError> {
    if simple {
        print_json(&client.get(&path(id, "/status")).await?)
    } else {
        let mut feed = client.get(&path(id, "")).await?;
        // How far the rows are that were there before; after the copy they are of no interest any more.
        if let Ok(progress) = client.get(&path(id, "/progress")).await
            && progress["copy"]["tables_done"].as_u64() < progress["copy"]["tables_total"].as_u64()
        {
            feed["initial_copy"] = progress["copy"].clone();
        }
        print_json(&feed)
    }
}

async fn remove(client: &Session, id: &str) -> Result<(), CliError> {
    let info = match client.get(&path(id, "")).await {
        Ok(info) => info,
        Err(ApiError::Refused { code, .. }) if code == "CDC:ErrChangeFeedNotExists" => {
            return client.tell(&"Changefeed not found.", &json!({ "id": id, "found": false }));
        }
        Err(e) => return Err(e.into()),
    };
    client.delete(&path(id, "")).await?;
    match client.get(&path(id, "")).await {
        Err(ApiError::Refused { code, .. }) if code == "CDC:ErrChangeFeedNotExists" => {}
        Err(error) => return Err(error.into()),
        Ok(_) => {
            let words = format!("changefeed {id} is still there after its removal; remove it again");
            return Err(CliError::Usage(format!("[CDC:ErrChangeFeedDeletionUnfinished]{words}")));
        }
    }
    let (checkpoint, sink) = (&info["checkpoint_ts"], info["sink_uri"].as_str().unwrap_or_default());
    let words =
        format!("Changefeed remove successfully.\nID: {id}\nCheckpointTs: {checkpoint}\nSinkURI: {sink}");
    client.tell(&words, &json!({ "id": id, "checkpoint_ts": checkpoint, "sink_uri": sink }))
}
