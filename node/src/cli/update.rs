//! `millrace cli changefeed update` and `statistics`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use heartbeatpb::config::mask_uri;
use serde_json::{Map, Value, json};
use time::PrimitiveDateTime;
use time::macros::format_description;

use super::changefeed::{IdArg, confirm, parse_config, path};
use super::{CliError, Session, print_json};

/// Failures in a row after which statistics end.
const PATIENCE: u32 = 3;

#[derive(Args, Debug)]
pub(super) struct UpdateArgs {
    #[command(flatten)]
    id: IdArg,
    /// Stop at this position.
    #[arg(long)]
    target_ts: Option<u64>,
    /// Print the tables of the changefeed too.
    #[arg(short, long)]
    verbose: bool,
    #[command(flatten)]
    old: super::changefeed::OldArgs,
    /// Where changes go from now on.
    #[arg(long, env = "MILLRACE_SINK_URI", hide_env_values = true)]
    sink_uri: Option<String>,
    /// Keys of the replica configuration to change, TOML; the others stay as they are.
    #[arg(long)]
    config: Option<PathBuf>,
    /// Do not ask.
    #[arg(long)]
    no_confirm: bool,
}

/// Shows what would change, asks, and changes it.
pub(super) async fn update(client: &Session, args: &UpdateArgs) -> Result<(), CliError> {
    let id = &args.id.changefeed_id;
    let changes = match &args.config {
        None => json!({}),
        Some(file) => read_changes(file)?,
    };
    let current = client.get(&path(id, "")).await?;
    let mut config = current["config"].clone();
    merge(&mut config, &changes);
    let mut told = Vec::new();
    differences("config", &current["config"], &config, &mut told);
    let mut body = Map::new();
    if !told.is_empty() {
        body.insert("replica_config".to_owned(), config);
    }
    if let Some(target) = args.target_ts.filter(|target| current["target_ts"] != *target) {
        told.push(format!("target_ts: {} -> {target}", current["target_ts"]));
        body.insert("target_ts".to_owned(), json!(target));
    }
    if let Some(uri) = &args.sink_uri {
        // The stored one is shown without its secrets, so whether they differ is not known.
        told.push(format!("sink_uri: {} -> {:?}", current["sink_uri"], mask_uri(uri)));
        body.insert("sink_uri".to_owned(), json!(uri));
    }
    if body.is_empty() {
        return client.tell(
            &"The changefeed is like that already, do nothing.",
            &json!({ "id": id, "changed": false }),
        );
    }
    for line in &told {
        eprintln!("  {line}");
    }
    if !args.no_confirm && !confirm("Change that?")? {
        return Err(CliError::Aborted);
    }
    let info = client.put(&path(id, ""), &Value::Object(body)).await?;
    client.tell(&format_args!("Update changefeed config successfully!\nID: {id}\nInfo: {info}"), &info)?;
    if args.verbose && !client.json {
        super::table::tables(client, id).await?;
    }
    Ok(())
}

/// The keys of a file, as the API names them. Unknown ones and wrong values are refused here.
fn read_changes(file: &PathBuf) -> Result<Value, CliError> {
    let usage = |what: String| CliError::Usage(format!("{}: {what}", file.display()));
    let text = std::fs::read_to_string(file).map_err(|e| usage(e.to_string()))?;
    parse_config(&text).map_err(usage)?;
    let table: toml::Table = toml::from_str(&text).map_err(|e| usage(e.to_string()))?;
    let value = serde_json::to_value(table).map_err(|e| usage(e.to_string()))?;
    let mut changes = api_keys(value);
    // As the server answers them, so that the same is the same.
    heartbeatpb::config::api::number_durations(&mut changes);
    Ok(changes)
}

/// Keys with underscores, as in the API.
fn api_keys(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            map.into_iter().map(|(key, value)| (key.replace('-', "_"), api_keys(value))).collect()
        }
        Value::Array(items) => items.into_iter().map(api_keys).collect(),
        other @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_)) => other,
    }
}

/// Puts the keys of `changes` into `config`; a list replaces a list.
fn merge(config: &mut Value, changes: &Value) {
    match (config, changes) {
        (Value::Object(config), Value::Object(changes)) => {
            for (key, value) in changes {
                merge(config.entry(key).or_insert(Value::Null), value);
            }
        }
        (config, changes) => *config = changes.clone(),
    }
}

/// One line for each key that differs.
fn differences(key: &str, old: &Value, new: &Value, out: &mut Vec<String>) {
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => {
            for (name, value) in new {
                let before = old.get(name).unwrap_or(&Value::Null);
                differences(&format!("{key}.{name}"), before, value, out);
            }
        }
        (old, new) if old != new => out.push(format!("{key}: {old} -> {new}")),
        (_, _) => {}
    }
}

#[derive(Args, Debug)]
pub(super) struct StatisticsArgs {
    #[command(flatten)]
    id: IdArg,
    /// Seconds between two lines.
    #[arg(short = 'I', long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    interval: u64,
}

/// Prints how far the target and the whole changefeed are behind, until it is interrupted.
pub(super) async fn statistics(client: &Session, args: &StatisticsArgs) -> Result<(), CliError> {
    let mut failures = 0;
    loop {
        match client.get(&path(&args.id.changefeed_id, "/synced")).await {
            Ok(answer) => {
                failures = 0;
                print_json(&gaps(&answer))?;
            }
            Err(error) => {
                failures += 1;
                if failures >= PATIENCE || matches!(&error, super::ApiError::Refused { status: 400, .. }) {
                    return Err(error.into());
                }
                eprintln!("{error}");
            }
        }
        tokio::time::sleep(Duration::from_secs(args.interval)).await;
    }
}

/// `null` where a time is not known.
fn gaps(answer: &Value) -> Value {
    let time = |key: &str| {
        let format =
            format_description!("[year]-[month]-[day] [hour]:[minute]:[second].[subsecond digits:3]");
        PrimitiveDateTime::parse(answer[key].as_str()?, &format).ok()
    };
    let gap = |from: &str, to: &str| {
        let millis = (time(to)? - time(from)?).whole_milliseconds().max(0);
        Some(format!("{millis}ms"))
    };
    json!({
        "sink_gap": gap("sink_checkpoint_ts", "puller_resolved_ts"),
        "replication_gap": gap("sink_checkpoint_ts", "now_ts"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_keys_of_the_file_change_and_each_is_told() {
        let old = json!({ "filter": { "rules": ["*.*"], "event_filters": [] }, "memory_quota": 7 });
        let mut new = old.clone();
        merge(&mut new, &api_keys(json!({ "memory-quota": 8, "filter": { "rules": ["a.*"] } })));
        assert_eq!(new, json!({ "filter": { "rules": ["a.*"], "event_filters": [] }, "memory_quota": 8 }));
        let mut told = Vec::new();
        differences("config", &old, &new, &mut told);
        assert_eq!(told, ["config.filter.rules: [\"*.*\"] -> [\"a.*\"]", "config.memory_quota: 7 -> 8"]);
        told.clear();
        differences("config", &new, &new, &mut told);
        assert!(told.is_empty());
    }

    #[test]
    fn gaps_are_milliseconds_or_unknown() {
        let answer = json!({
            "sink_checkpoint_ts": "2026-03-01 08:30:00.000", "puller_resolved_ts": "2026-03-01 08:30:00.123",
            "now_ts": "2026-03-01 08:31:00.456",
        });
        assert_eq!(gaps(&answer), json!({ "sink_gap": "123ms", "replication_gap": "60456ms" }));
        assert_eq!(
            gaps(&json!({ "now_ts": "2026-03-01 08:31:00.456" })),
            json!({ "sink_gap": null, "replication_gap": null })
        );
    }
}
