//! Version 1 of the API, for older programs: a thin adapter over version 2 (api-cli-config §5).
//!
//! Mutations answer 202, lists are bare arrays, and a changefeed's configuration is spread over the body.

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::changefeed::{self, ListQuery};
use super::{ApiFailure, Shared, parse_body};

type Answer = Result<Json<Value>, ApiFailure>;
type Accepted = Result<(StatusCode, Json<Value>), ApiFailure>;

fn accepted(answer: Answer) -> Accepted {
    answer.map(|body| (StatusCode::ACCEPTED, body))
}

/// Body of create and update. The time zone is ignored; what version 1 cannot say keeps its default.
#[derive(Deserialize, Default)]
#[serde(default)]
struct FeedBody {
    keyspace: Option<Value>,
    changefeed_id: Option<Value>,
    start_ts: Option<Value>,
    target_ts: Option<Value>,
    sink_uri: Option<Value>,
    /// Ours: where changes come from.
    upstream: Option<Value>,
    force_replicate: Option<bool>,
    ignore_ineligible_table: Option<bool>,
    filter_rules: Option<Vec<String>>,
    ignore_txn_start_ts: Option<Vec<u64>>,
    mounter_worker_num: Option<u64>,
    /// With the keys of the configuration file.
    sink_config: Option<Map<String, Value>>,
}

impl FeedBody {
    /// The body of version 2 that says the same.
    fn into_v2(self) -> Value {
        let mut config = Map::new();
        let mut set = |path: [&str; 2], value: Option<Value>| {
            let Some(value) = value else { return };
            match path {
                [key, ""] => drop(config.insert(key.to_owned(), value)),
                [section, key] => {
                    let section = config.entry(section).or_insert_with(|| json!({}));
                    section[key] = value;
                }
            }
        };
        set(["force_replicate", ""], self.force_replicate.map(Value::from));
        set(["ignore_ineligible_table", ""], self.ignore_ineligible_table.map(Value::from));
        set(["filter", "rules"], self.filter_rules.map(Value::from));
        set(["filter", "ignore_txn_start_ts"], self.ignore_txn_start_ts.map(Value::from));
        set(["mounter", "worker_num"], self.mounter_worker_num.map(Value::from));
        set(["sink", ""], self.sink_config.map(Value::from));
        let mut body = Map::new();
        for (key, value) in [
            ("keyspace", self.keyspace),
            ("changefeed_id", self.changefeed_id),
            ("start_ts", self.start_ts),
            ("target_ts", self.target_ts),
            ("sink_uri", self.sink_uri),
            ("upstream", self.upstream),
            ("replica_config", (!config.is_empty()).then_some(Value::Object(config))),
        ] {
            body.extend(value.map(|value| (key.to_owned(), value)));
        }
        Value::Object(body)
    }
}

fn converted(bytes: &Bytes) -> Result<Bytes, ApiFailure> {
    let body: FeedBody = parse_body(bytes)?;
    Ok(Bytes::from(body.into_v2().to_string()))
}

pub(super) async fn list(state: State<Shared>, query: Query<ListQuery>) -> Answer {
    let Json(mut list) = changefeed::list(state, query).await?;
    Ok(Json(list["items"].take()))
}

pub(super) async fn create(state: State<Shared>, body: Bytes) -> Accepted {
    accepted(changefeed::create(state, converted(&body)?).await)
}

pub(super) async fn update(state: State<Shared>, name: Path<String>, body: Bytes) -> Accepted {
    accepted(changefeed::update(state, name, converted(&body)?).await)
}

pub(super) async fn remove(state: State<Shared>, name: Path<String>) -> Accepted {
    accepted(changefeed::remove(state, name).await)
}

pub(super) async fn pause(state: State<Shared>, name: Path<String>) -> Accepted {
    accepted(changefeed::pause(state, name).await)
}

pub(super) async fn resume(state: State<Shared>, name: Path<String>, body: Bytes) -> Accepted {
    accepted(changefeed::resume(state, name, body).await)
}

/// Rebalancing goes on by itself: there is nothing to ask for.
pub(super) async fn rebalance(Path(name): Path<String>) -> Accepted {
    super::models::check_name(&name)?;
    accepted(Ok(Json(json!({}))))
}

pub(super) async fn no_processors() -> Json<Value> {
    Json(json!([]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_becomes_that_of_version_2_and_what_is_absent_keeps_its_default() {
        let body = json!({
            "changefeed_id": "a", "sink_uri": "blackhole://", "start_ts": 7, "timezone": "UTC",
            "filter_rules": ["shop.*"], "mounter_worker_num": 3, "force_replicate": true,
            "sink_config": { "delete-only-output-handle-key-columns": true },
        });
        let body: FeedBody = parse_body(body.to_string().as_bytes()).unwrap();
        assert_eq!(
            body.into_v2(),
            json!({
                "changefeed_id": "a", "sink_uri": "blackhole://", "start_ts": 7,
                "replica_config": {
                    "force_replicate": true, "filter": { "rules": ["shop.*"] }, "mounter": { "worker_num": 3 },
                    "sink": { "delete-only-output-handle-key-columns": true },
                },
            })
        );
        let empty: FeedBody = parse_body(b"{\"sink_uri\":\"blackhole://\"}").unwrap();
        assert_eq!(
            empty.into_v2(),
            json!({ "sink_uri": "blackhole://" }),
            "an update replaces nothing by defaults"
        );
        let config = json!({ "filter_rules": "shop.*" }).to_string();
        assert!(parse_body::<FeedBody>(config.as_bytes()).err().unwrap().message.contains("filter_rules"));
    }

    #[test]
    fn keys_of_the_configuration_file_are_understood_in_the_sinks_part() {
        let body = json!({ "sink_config": { "delete-only-output-handle-key-columns": true } });
        let body: FeedBody = parse_body(body.to_string().as_bytes()).unwrap();
        let (config, unknown) =
            heartbeatpb::config::ReplicaConfig::from_api(body.into_v2()["replica_config"].clone()).unwrap();
        assert!(unknown.is_empty(), "{unknown:?}");
        assert!(config.to_api()["sink"]["delete_only_output_handle_key_columns"] == true);
    }
}
