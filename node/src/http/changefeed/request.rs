//! What a body asks for, checked against itself, its upstream and its downstream (api-cli-config §7.2, §8.1).

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use heartbeatpb::config::{ChangefeedInfo, ReplicaConfig, UpstreamInfo};
use heartbeatpb::{ChangefeedId, Ts};
use logservice::upstream::{CheckReport, SourceTable, Upstream};
use serde::Deserialize;
use serde_json::{Value, json};

use super::Answer;
use crate::http::models::PositionArg;
use crate::http::{ApiFailure, ApiState, Shared, parse_body};

/// Body of create, update and verify (api-cli-config §7.2). Unknown fields are ignored.
#[derive(Deserialize, Default)]
#[serde(default)]
pub(super) struct FeedBody {
    pub(super) keyspace: Option<String>,
    pub(super) changefeed_id: Option<String>,
    pub(super) start_ts: PositionArg,
    pub(super) target_ts: PositionArg,
    pub(super) sink_uri: String,
    pub(super) replica_config: Option<Value>,
    pub(super) upstream: Option<UpstreamBody>,
    /// In place of `upstream`: one of the server's configuration.
    pub(super) upstream_name: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
pub(super) struct UpstreamBody {
    pub(super) uri: String,
}

/// A body that was checked as far as its own words go.
pub(super) struct Request {
    pub(super) config: ReplicaConfig,
    pub(super) upstream_uri: String,
    pub(super) warnings: Vec<String>,
}

impl Request {
    pub(super) fn info(&self, id: ChangefeedId) -> ChangefeedInfo {
        let upstream = UpstreamInfo {
            kind: scheme_of(&self.upstream_uri),
            uri: self.upstream_uri.clone(),
            ..UpstreamInfo::default()
        };
        ChangefeedInfo::new(id, upstream, "", self.config.clone(), Ts::ZERO)
    }

    pub(super) fn spec(&self, id: ChangefeedId) -> Result<logservice::upstream::FeedSpec, ApiFailure> {
        Ok(crate::upstream::feed_spec(&self.info(id), None)?)
    }
}

pub(super) fn check_request(state: &ApiState, body: &FeedBody) -> Result<Request, ApiFailure> {
    if body.keyspace.as_deref().is_some_and(|keyspace| keyspace != "default") {
        return Err(ApiFailure::invalid(
            "keyspaces are not enabled; leave keyspace out or write \"default\"",
        ));
    }
    let request = Request::read(state, body)?;
    if body.sink_uri.is_empty() {
        return Err(ApiFailure::new("CDC:ErrSinkURIInvalid", "sink_uri is missing"));
    }
    Ok(request)
}

/// The URI of the upstream that a body means.
fn upstream_of(state: &ApiState, body: &FeedBody) -> Result<String, ApiFailure> {
    let given = body.upstream.as_ref().map_or("", |upstream| upstream.uri.as_str());
    match (given, body.upstream_name.as_str()) {
        ("", "") => Err(ApiFailure::invalid(
            "upstream.uri is missing; for example {\"upstream\":{\"uri\":\"postgres://…\"}}",
        )),
        (uri, "") => Ok(uri.to_owned()),
        ("", name) => state.named_upstream(name),
        (_, _) => Err(ApiFailure::invalid("upstream and upstream_name are given; keep one")),
    }
}

impl Request {
    /// Looks at the configuration alone.
    fn read(state: &ApiState, body: &FeedBody) -> Result<Self, ApiFailure> {
        let upstream_uri = upstream_of(state, body)?;
        let failed = |e: heartbeatpb::config::ConfigError| ApiFailure::new(e.code(), e.to_string());
        let (mut config, mut warnings) = match &body.replica_config {
            None | Some(Value::Null) => (ReplicaConfig::default(), Vec::new()),
            Some(value) => ReplicaConfig::from_api(value.clone()).map_err(|e| ill_typed(value, &e))?,
        };
        if !body.sink_uri.is_empty() {
            warnings.extend(config.validate_and_adjust(&body.sink_uri).map_err(failed)?);
        }
        Ok(Self { config, upstream_uri, warnings })
    }
}

/// Names the key of a replica configuration that cannot be read: each is read alone.
fn ill_typed(config: &Value, error: &heartbeatpb::config::ConfigError) -> ApiFailure {
    let keys = config.as_object().into_iter().flatten();
    let wrong = keys
        .filter(|(key, value)| ReplicaConfig::from_api(json!({ *key: value })).is_err())
        .map(|(key, _)| key);
    let at = wrong.take(1).map(|key| format!(".{key}")).collect::<String>();
    ApiFailure::new(error.code(), format!("replica_config{at}: {error}"))
}

pub(super) fn check_tables(config: &ReplicaConfig, report: &CheckReport) -> Result<(), ApiFailure> {
    if config.force_replicate || config.ignore_ineligible_table || report.ineligible.is_empty() {
        return Ok(());
    }
    let shown: Vec<String> = report
        .ineligible
        .iter()
        .take(20)
        .map(|(table, reason)| format!("{}.{} ({reason})", table.info.schema, table.info.name))
        .collect();
    let more = report.ineligible.len().saturating_sub(shown.len());
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    Err(ApiFailure::new(
        "CDC:ErrTableIneligible",
        format!(
            "some tables cannot be replicated: {}{more}; give them a primary key, filter them out, or set \
             ignore_ineligible_table or force_replicate",
            shown.join(", ")
        ),
    ))
}

pub(in crate::http) async fn verify_table(State(state): State<Shared>, body: Bytes) -> Answer {
    let body: FeedBody = parse_body(&body)?;
    let request = check_request(&state, &body)?;
    let spec = request.spec(ChangefeedId::fresh("verify"))?;
    let report = state.upstreams.check(&spec).await?;
    Ok(Json(tables_value(&report)))
}

/// The tables that a filter takes, whatever the sink.
pub(in crate::http) async fn all_tables(State(state): State<Shared>, body: Bytes) -> Answer {
    let body = FeedBody { sink_uri: String::new(), ..parse_body(&body)? };
    let spec = Request::read(&state, &body)?.spec(ChangefeedId::fresh("tables"))?;
    Ok(Json(tables_value(&state.upstreams.check(&spec).await?)))
}

fn tables_value(report: &CheckReport) -> Value {
    let table = |table: &SourceTable| {
        json!({
            "database_name": table.info.schema, "table_name": table.info.name,
            "table_id": table.info.id, "is_partition": false,
        })
    };
    let eligible: Vec<Value> = report.eligible.iter().map(table).collect();
    let ineligible: Vec<Value> = report
        .ineligible
        .iter()
        .map(|(source, reason)| {
            let mut value = table(source);
            value["reason"] = json!(reason);
            value
        })
        .collect();
    let all: Vec<Value> = eligible.iter().chain(&ineligible).cloned().collect();
    let mut value = json!({});
    for (key, list) in [("eligible_tables", eligible), ("ineligible_tables", ineligible), ("all_tables", all)]
    {
        if !list.is_empty() {
            value[key] = Value::Array(list);
        }
    }
    value
}

pub(super) fn scheme_of(uri: &str) -> String {
    uri.split_once("://").map_or(String::new(), |(scheme, _)| scheme.to_owned())
}

pub(super) fn check_target(body: &FeedBody, start: Option<Ts>) -> Result<(), ApiFailure> {
    let target = body.target_ts.0;
    if target != Ts::ZERO && start.is_some_and(|start| target <= start) {
        return Err(ApiFailure::new(
            "CDC:ErrTargetTsBeforeStartTs",
            format!("target_ts {target} must be larger than start_ts {}", body.start_ts.0),
        ));
    }
    Ok(())
}

/// Checks the downstream, and that it is not the upstream itself. Answers the upstream's identity.
pub(super) async fn check_ends(
    state: &ApiState,
    upstream: &dyn Upstream,
    id: &ChangefeedId,
    sink_uri: &str,
    config: &ReplicaConfig,
) -> Result<u64, ApiFailure> {
    let options =
        sink::SinkOptions { replica: config.clone(), ..sink::SinkOptions::new(id.clone(), &state.data_dir) };
    let downstream = sink::check(sink_uri, &options)
        .await
        .map_err(|e| ApiFailure::new(e.code(), heartbeatpb::error_chain(&e)))?;
    let identity = upstream.identity().await?;
    let same = downstream.identity.is_some_and(|downstream| {
        downstream.system_identifier == identity.system.to_string()
            && downstream.database == identity.database
    });
    if same {
        return Err(ApiFailure::new(
            "CDC:ErrSameUpstreamDownstream",
            "the downstream is the upstream's own database; choose another database",
        ));
    }
    Ok(identity.system)
}
