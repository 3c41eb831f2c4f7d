//! Endpoints about changefeeds.

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use coordinator::{ChangefeedView, UpstreamClock};
use heartbeatpb::config::{ChangefeedInfo, ChangefeedState, ReplicaConfig, UpstreamInfo, mask_uri};
use heartbeatpb::{ChangefeedId, RunningError, Ts, WallTime};
use logservice::upstream::{CheckReport, SourceTable, Upstream};
use serde::Deserialize;
use serde_json::{Value, json};

use super::models::{PositionArg, check_name, position_text, time_text};
use super::{ApiFailure, ApiState, Shared, leader, parse_body};

type Answer = Result<Json<Value>, ApiFailure>;

impl From<coordinator::Error> for ApiFailure {
    fn from(error: coordinator::Error) -> Self {
        ApiFailure::new(error.code(), crate::wiring::error_chain(&error))
    }
}

/// Namespace of every changefeed: namespaces are not enabled.
const KEYSPACE: &str = "default";

/// Body of create, update and verify (api-cli-config §7.2). Unknown fields are ignored.
#[derive(Deserialize, Default)]
#[serde(default)]
struct FeedBody {
    keyspace: Option<String>,
    changefeed_id: Option<String>,
    start_ts: PositionArg,
    target_ts: PositionArg,
    sink_uri: String,
    replica_config: Option<Value>,
    upstream: Option<UpstreamBody>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct UpstreamBody {
    uri: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
pub(super) struct ListQuery {
    state: Option<String>,
}

pub(super) async fn list(State(state): State<Shared>, Query(query): Query<ListQuery>) -> Answer {
    let wanted: Box<dyn Fn(ChangefeedState) -> bool + Send> = match query.state.as_deref() {
        Some("all") => Box::new(|_| true),
        None | Some("") => Box::new(|s| !matches!(s, ChangefeedState::Finished | ChangefeedState::Removed)),
        Some(name) => {
            let state = ChangefeedState::parse(name).ok_or_else(|| {
                ApiFailure::invalid(format!(
                    "{name:?} is no state; use all, normal, warning, failed, stopped or finished"
                ))
            })?;
            Box::new(move |s| s == state)
        }
    };
    let feeds = leader(&state)?.list(Some(KEYSPACE)).await?;
    let items: Vec<Value> =
        feeds.iter().filter(|feed| wanted(feed.info.state)).map(|feed| common_info(&state, feed)).collect();
    Ok(Json(json!({ "total": items.len(), "items": items })))
}

fn common_info(state: &ApiState, feed: &ChangefeedView) -> Value {
    json!({
        "upstream_id": feed.info.upstream_id,
        "id": &*feed.info.id.name,
        "keyspace": &*feed.info.id.keyspace,
        "state": feed.info.state.shown().name(),
        "checkpoint_tso": feed.checkpoint,
        "checkpoint_time": time_text(state.upstreams.time_of(&feed.info.id, feed.checkpoint)),
        "error": feed.info.error.as_ref().or(feed.info.warning.as_ref()).map(error_value),
    })
}

pub(super) fn error_value(error: &RunningError) -> Value {
    json!({ "time": error.time, "addr": error.node, "code": error.code, "message": error.message })
}

fn feed_value(state: &ApiState, feed: &ChangefeedView) -> Value {
    let info = &feed.info;
    let upstream_uri = info.upstream_info.as_ref().map_or("", |upstream| upstream.uri.as_str());
    let shown_error = match info.state {
        ChangefeedState::Warning | ChangefeedState::Failed | ChangefeedState::Pending => info.error.as_ref(),
        ChangefeedState::Normal
        | ChangefeedState::Stopped
        | ChangefeedState::Finished
        | ChangefeedState::Removed
        | ChangefeedState::Uninitialized => None,
    };
    let resolved = state.upstreams.resolved(&info.id).unwrap_or(feed.checkpoint).max(feed.checkpoint);
    let mut value = json!({
        "upstream_id": info.upstream_id,
        "id": &*info.id.name,
        "keyspace": &*info.id.keyspace,
        "sink_uri": mask_uri(&info.sink_uri),
        "upstream": { "uri": mask_uri(upstream_uri) },
        "create_time": info.create_time,
        "start_ts": info.start_ts,
        "target_ts": info.target_ts,
        "admin_job_type": info.admin_job_type,
        "config": info.config.to_api(),
        "state": info.state.shown().name(),
        "creator_version": info.creator_version,
        "resolved_ts": resolved,
        "checkpoint_ts": feed.checkpoint,
        "checkpoint_ts_text": position_text(upstream_uri, feed.checkpoint),
        "checkpoint_time": time_text(state.upstreams.time_of(&info.id, feed.checkpoint)),
        "task_status": [],
        "gid": { "low": info.id.gid.low, "high": info.id.gid.high },
    });
    if let Some(error) = shown_error {
        value["error"] = error_value(error);
    }
    if let Some(address) = feed.node.as_ref().and_then(|node| state.members.borrow().get(node).cloned()) {
        value["maintainer_addr"] = json!(address);
    }
    value
}

pub(super) async fn find(state: &ApiState, name: &str) -> Result<ChangefeedView, ApiFailure> {
    check_name(name)?;
    Ok(leader(state)?.get(KEYSPACE, name).await?)
}

pub(super) async fn get(State(state): State<Shared>, Path(name): Path<String>) -> Answer {
    let feed = find(&state, &name).await?;
    Ok(Json(feed_value(&state, &feed)))
}

/// Ours: what a live view shows.
pub(super) async fn progress(State(state): State<Shared>, Path(name): Path<String>) -> Answer {
    let feed = find(&state, &name).await?;
    let id = &feed.info.id;
    let mut value = state.upstreams.progress(id);
    let time = state.upstreams.time_of(id, feed.checkpoint);
    value["state"] = json!(feed.info.state.shown().name());
    value["checkpoint_ts"] = json!(feed.checkpoint);
    value["lag_seconds"] = json!(time.map(|time| time.seconds_until(WallTime::now()).max(0.0)));
    value["error"] = json!(feed.info.error.as_ref().map(error_value));
    Ok(Json(value))
}

/// Whether everything that the upstream has is downstream (§8.6).
pub(super) async fn synced(State(state): State<Shared>, Path(name): Path<String>) -> Answer {
    let feed = find(&state, &name).await?;
    let id = &feed.info.id;
    let config = &feed.info.config.synced_status;
    let now = WallTime::now();
    let at = |ts: Ts| state.upstreams.time_of(id, ts);
    let resolved = state.upstreams.resolved(id).unwrap_or(feed.checkpoint);
    let (checkpoint, last_synced, puller) = (at(feed.checkpoint), at(feed.last_synced), at(resolved));
    let seconds =
        |from: Option<WallTime>, to: WallTime| from.map_or(f64::INFINITY, |from| from.seconds_until(to));
    #[expect(clippy::cast_precision_loss, reason = "intervals of minutes")]
    let (quiet_after, fresh_within) =
        (config.synced_check_interval as f64, config.checkpoint_interval as f64);
    let quiet = seconds(last_synced, now) > quiet_after;
    let (synced, text) = if quiet && seconds(checkpoint, now) < fresh_within {
        (true, "The data syncing is finished")
    } else if quiet && puller.is_some_and(|puller| seconds(checkpoint, puller) < fresh_within) {
        (
            false,
            "Check that the upstream is reachable; if it is not, the data syncing is finished, otherwise wait",
        )
    } else {
        (false, "The data syncing is not finished, please wait")
    };
    Ok(Json(json!({
        "synced": synced,
        "sink_checkpoint_ts": time_text(checkpoint),
        "puller_resolved_ts": time_text(puller),
        "last_synced_ts": time_text(last_synced),
        "now_ts": time_text(Some(now)),
        "info": text,
    })))
}

/// A body that was checked as far as its own words go.
struct Request {
    config: ReplicaConfig,
    upstream_uri: String,
    warnings: Vec<String>,
}

impl Request {
    fn info(&self, id: ChangefeedId) -> ChangefeedInfo {
        let upstream = UpstreamInfo {
            kind: scheme_of(&self.upstream_uri),
            uri: self.upstream_uri.clone(),
            ..UpstreamInfo::default()
        };
        ChangefeedInfo::new(id, upstream, "", self.config.clone(), Ts::ZERO)
    }

    fn spec(&self, id: ChangefeedId) -> Result<logservice::upstream::FeedSpec, ApiFailure> {
        Ok(crate::upstream::feed_spec(&self.info(id), None)?)
    }
}

fn check_request(body: &FeedBody) -> Result<Request, ApiFailure> {
    if body.keyspace.as_deref().is_some_and(|keyspace| keyspace != "default") {
        return Err(ApiFailure::invalid(
            "keyspaces are not enabled; leave keyspace out or write \"default\"",
        ));
    }
    let upstream_uri = body.upstream.as_ref().map(|upstream| upstream.uri.clone()).unwrap_or_default();
    if upstream_uri.is_empty() {
        return Err(ApiFailure::invalid(
            "upstream.uri is missing; for example {\"upstream\":{\"uri\":\"postgres://…\"}}",
        ));
    }
    if body.sink_uri.is_empty() {
        return Err(ApiFailure::new("CDC:ErrSinkURIInvalid", "sink_uri is missing"));
    }
    let failed = |e: heartbeatpb::config::ConfigError| ApiFailure::new(e.code(), e.to_string());
    let (mut config, mut warnings) = match &body.replica_config {
        None | Some(Value::Null) => (ReplicaConfig::default(), Vec::new()),
        Some(value) => ReplicaConfig::from_api(value.clone()).map_err(|e| ill_typed(value, &e))?,
    };
    warnings.extend(config.validate_and_adjust(&body.sink_uri).map_err(failed)?);
    Ok(Request { config, upstream_uri, warnings })
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

fn check_tables(config: &ReplicaConfig, report: &CheckReport) -> Result<(), ApiFailure> {
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

pub(super) async fn verify_table(State(state): State<Shared>, body: Bytes) -> Answer {
    let body: FeedBody = parse_body(&body)?;
    let request = check_request(&body)?;
    let spec = request.spec(ChangefeedId::fresh("verify"))?;
    let report = state.upstreams.check(&spec).await?;
    Ok(Json(tables_value(&report)))
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

/// Creates a changefeed, in the order of api-cli-config §8.1.
pub(super) async fn create(State(state): State<Shared>, body: Bytes) -> Answer {
    let body: FeedBody = parse_body(&body)?;
    let name = body.changefeed_id.clone().unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
    check_name(&name)?;
    let taken = leader(&state)?.list(Some(KEYSPACE)).await?.iter().any(|feed| *feed.info.id.name == *name);
    if taken {
        return Err(ApiFailure::new(
            "CDC:ErrChangeFeedAlreadyExists",
            format!("changefeed {name} exists already"),
        ));
    }
    let mut request = check_request(&body)?;
    let id = ChangefeedId::fresh(&name);
    let spec = request.spec(id.clone())?;
    let upstream = state.upstreams.open(&spec.upstream_uri)?;
    let report = upstream.check(&spec).await?;
    check_tables(&request.config, &report)?;
    request.warnings.extend(report.warnings.iter().cloned());
    let upstream_id = check_ends(&state, &*upstream, &id, &body.sink_uri, &request.config).await?;
    let at = (body.start_ts.0 != Ts::ZERO).then_some(body.start_ts.0);
    check_target(&body, at)?;
    if at.is_some() && request.config.initial_copy.enabled {
        // The copy holds the rows of another moment: what was committed between the two would be missing.
        return Err(ApiFailure::invalid(
            "start_ts is where changes begin, and the initial copy brings rows as of now; set \
             initial_copy.enabled to false (--no-initial-copy), or leave start_ts out",
        ));
    }
    let point = upstream.create_retention(&spec, at).await?;
    let mut info = request.info(id.clone());
    info.sink_uri.clone_from(&body.sink_uri);
    info.start_ts = point.start_ts;
    info.target_ts = body.target_ts.0;
    info.upstream_id = upstream_id;
    info.create_time = crate::wiring::rfc3339_now();
    info.creator_version = concat!("v", env!("CARGO_PKG_VERSION")).to_owned();
    if let Err(error) = leader(&state)?.create(info).await {
        // Nobody else knows of this incarnation, so what was made for it is ours to remove.
        if let Err(undo) = upstream.drop_retention(&id).await {
            tracing::warn!(changefeedID = %id, error = %undo.chain(), "cannot drop what was created upstream for a refused changefeed");
        }
        return Err(error.into());
    }
    let feed = find(&state, &name).await?;
    let mut value = feed_value(&state, &feed);
    value["warnings"] = json!(request.warnings);
    Ok(Json(value))
}

fn scheme_of(uri: &str) -> String {
    uri.split_once("://").map_or(String::new(), |(scheme, _)| scheme.to_owned())
}

fn check_target(body: &FeedBody, start: Option<Ts>) -> Result<(), ApiFailure> {
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
async fn check_ends(
    state: &ApiState,
    upstream: &dyn Upstream,
    id: &ChangefeedId,
    sink_uri: &str,
    config: &ReplicaConfig,
) -> Result<u64, ApiFailure> {
    let options = sink::SinkOptions {
        changefeed: id.clone(),
        data_dir: state.data_dir.clone(),
        replica: config.clone(),
    };
    let downstream = sink::check(sink_uri, &options)
        .await
        .map_err(|e| ApiFailure::new(e.code(), crate::wiring::error_chain(&e)))?;
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

pub(super) async fn pause(State(state): State<Shared>, Path(name): Path<String>) -> Answer {
    check_name(&name)?;
    leader(&state)?.pause(KEYSPACE, &name).await?;
    Ok(Json(json!({})))
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct ResumeBody {
    overwrite_checkpoint_ts: Option<PositionArg>,
}

pub(super) async fn resume(State(state): State<Shared>, Path(name): Path<String>, body: Bytes) -> Answer {
    check_name(&name)?;
    let body: ResumeBody = if body.is_empty() { ResumeBody::default() } else { parse_body(&body)? };
    let overwrite = body.overwrite_checkpoint_ts.map(|position| position.0);
    if let Some(position) = overwrite {
        let feed = find(&state, &name).await?;
        let uri = feed.info.upstream_info.as_ref().map(|upstream| upstream.uri.clone()).unwrap_or_default();
        let now = state.upstreams.current_position(&uri).await?;
        if position == Ts::ZERO || position > now.start_ts {
            return Err(ApiFailure::invalid(format!(
                "overwrite_checkpoint_ts must be between 1 and the upstream's position {}",
                now.start_ts
            )));
        }
    }
    leader(&state)?.resume(KEYSPACE, &name, overwrite).await?;
    Ok(Json(json!({})))
}

/// Changes a stopped or failed changefeed (§8.3).
pub(super) async fn update(State(state): State<Shared>, Path(name): Path<String>, body: Bytes) -> Answer {
    let mut body: FeedBody = parse_body(&body)?;
    let feed = find(&state, &name).await?;
    let refused = |text: &str| ApiFailure::new("CDC:ErrChangefeedUpdateRefused", text);
    if !matches!(feed.info.state, ChangefeedState::Stopped | ChangefeedState::Failed) {
        return Err(refused("a changefeed can be updated only when it is stopped or failed; pause it first"));
    }
    if body.start_ts.0 != Ts::ZERO {
        return Err(ApiFailure::invalid("start_ts cannot be changed"));
    }
    if body.target_ts.0 != Ts::ZERO && body.target_ts.0 <= feed.info.start_ts {
        return Err(refused("target_ts must be larger than start_ts"));
    }
    let mut info = (*feed.info).clone();
    if body.sink_uri.is_empty() {
        body.sink_uri.clone_from(&info.sink_uri);
    }
    if body.replica_config.is_none() {
        body.replica_config = Some(info.config.to_api());
    }
    let stored_uri = info.upstream_info.as_ref().map(|upstream| upstream.uri.clone()).unwrap_or_default();
    if body.upstream.as_ref().is_none_or(|upstream| upstream.uri.is_empty()) {
        body.upstream = Some(UpstreamBody { uri: stored_uri });
    }
    let request = check_request(&body)?;
    let config = request.config.keep_secrets_of(&info.config);
    let spec = request.spec(info.id.clone())?;
    let upstream = state.upstreams.open(&spec.upstream_uri)?;
    check_tables(&config, &upstream.check(&spec).await?)?;
    check_ends(&state, &*upstream, &info.id, &body.sink_uri, &config).await?;
    info.sink_uri = body.sink_uri;
    info.config = config;
    if body.target_ts.0 != Ts::ZERO {
        info.target_ts = body.target_ts.0;
    }
    if let Some(upstream) = &mut info.upstream_info {
        upstream.uri = request.upstream_uri;
    }
    leader(&state)?.update(info).await?;
    let feed = find(&state, &name).await?;
    Ok(Json(feed_value(&state, &feed)))
}

pub(super) async fn remove(State(state): State<Shared>, Path(name): Path<String>) -> Answer {
    check_name(&name)?;
    match leader(&state)?.remove(KEYSPACE, &name).await {
        Ok(_) => Ok(Json(json!({}))),
        Err(error) if error.code() == "CDC:ErrChangeFeedNotExists" => Ok(Json(json!({}))),
        Err(error) => Err(error.into()),
    }
}
