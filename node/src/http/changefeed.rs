//! Endpoints about changefeeds.

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use coordinator::ChangefeedView;
use heartbeatpb::config::{ChangefeedInfo, ChangefeedState, ReplicaConfig, UpstreamInfo, mask_uri};
use heartbeatpb::{ChangefeedId, RunningError, Ts, WallTime};
use logservice::upstream::{CheckReport, SourceTable, Upstream};
use serde::Deserialize;
use serde_json::{Value, json};

use super::facts::{self, Facts};
use super::models::{PositionArg, check_name, merge, position_text, time_text};
use super::operations::note;
use super::{ApiFailure, ApiState, Shared, leader, parse_body};

type Answer = Result<Json<Value>, ApiFailure>;

impl From<coordinator::Error> for ApiFailure {
    fn from(error: coordinator::Error) -> Self {
        ApiFailure::new(error.code(), heartbeatpb::error_chain(&error))
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
    /// Most items of an answer; all when absent.
    limit: Option<String>,
    /// `next_page_token` of the answer before.
    page_token: Option<String>,
}

impl ListQuery {
    fn limit(&self) -> Result<usize, ApiFailure> {
        match self.limit.as_deref() {
            None | Some("") => Ok(usize::MAX),
            Some(text) => match text.parse() {
                Ok(limit) if limit > 0 => Ok(limit),
                Ok(_) | Err(_) => Err(ApiFailure::invalid("limit must be a number of at least 1")),
            },
        }
    }
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
    let limit = query.limit()?;
    // The list is in the order of names.
    let after = query.page_token.as_deref().unwrap_or_default();
    let mut feeds = leader(&state)?.list(Some(KEYSPACE)).await?;
    feeds.retain(|feed| wanted(feed.info.state));
    let total = feeds.len();
    feeds.retain(|feed| &*feed.info.id.name > after);
    let more = feeds.len() > limit;
    feeds.truncate(limit);
    let facts = facts::of_all(&state, &feeds, None, false).await;
    let items: Vec<Value> = feeds.iter().zip(&facts).map(|(feed, facts)| common_info(feed, facts)).collect();
    let mut answer = json!({ "total": total, "items": items });
    if let Some(last) = feeds.last().filter(|_| more) {
        answer["next_page_token"] = json!(&*last.info.id.name);
    }
    Ok(Json(answer))
}

fn common_info(feed: &ChangefeedView, facts: &Facts) -> Value {
    json!({
        "upstream_id": feed.info.upstream_id,
        "id": &*feed.info.id.name,
        "keyspace": &*feed.info.id.keyspace,
        "state": feed.info.state.shown().name(),
        "checkpoint_tso": feed.checkpoint,
        "checkpoint_time": time_text(facts.time_of(feed.checkpoint)),
        "error": feed.info.error.as_ref().or(feed.info.warning.as_ref()).map(error_value),
    })
}

pub(super) fn error_value(error: &RunningError) -> Value {
    json!({ "time": error.time, "addr": error.node, "code": error.code, "message": error.message })
}

fn feed_value(state: &ApiState, feed: &ChangefeedView, facts: &Facts) -> Value {
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
        "resolved_ts": facts.resolved(feed.checkpoint),
        "checkpoint_ts": feed.checkpoint,
        "checkpoint_ts_text": position_text(upstream_uri, feed.checkpoint),
        "checkpoint_time": time_text(facts.time_of(feed.checkpoint)),
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

/// A changefeed as it is shown, with the times that its maintainer's node knows.
async fn shown(state: &ApiState, name: &str) -> Result<Value, ApiFailure> {
    let feed = [find(state, name).await?];
    let facts = facts::of_all(state, &feed, None, false).await;
    Ok(feed_value(state, &feed[0], &facts[0]))
}

pub(super) async fn get(
    State(state): State<Shared>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ApiFailure> {
    let mut value = shown(&state, &name).await?;
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let kinds = accept.split(',').filter_map(|kind| kind.split(';').next());
    if !kinds.into_iter().any(|kind| kind.trim().eq_ignore_ascii_case("application/toml")) {
        return Ok(Json(value).into_response());
    }
    let feed = find(&state, &name).await?;
    let mut config = feed.info.config.to_value();
    heartbeatpb::config::api::mask_secrets(&mut config);
    value["config"] = config;
    let text = super::models::toml_text(value)?;
    Ok(([(header::CONTENT_TYPE, "application/toml")], text).into_response())
}

/// Ours: what a live view shows.
pub(super) async fn progress(
    State(state): State<Shared>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Answer {
    let feed = find(&state, &name).await?;
    let facts = facts::of(&state, &feed, &headers).await;
    let time = facts.time_of(feed.checkpoint);
    let mut value = match facts.reader {
        reader @ Value::Object(_) => reader,
        // The node of the maintainer does not answer.
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => json!({}),
    };
    value["state"] = json!(feed.info.state.shown().name());
    value["checkpoint_ts"] = json!(feed.checkpoint);
    value["lag_seconds"] = json!(time.map(|time| time.seconds_until(WallTime::now()).max(0.0)));
    value["error"] = json!(feed.info.error.as_ref().map(error_value));
    Ok(Json(value))
}

/// Whether everything that the upstream has is downstream (§8.6).
pub(super) async fn synced(
    State(state): State<Shared>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Answer {
    let feed = find(&state, &name).await?;
    let facts = facts::of(&state, &feed, &headers).await;
    let config = &feed.info.config.synced_status;
    let known = Known {
        now: WallTime::now(),
        checkpoint: facts.time_of(feed.checkpoint),
        last_synced: facts.time_of(feed.last_synced),
        resolved: facts.time_of(facts.resolved(feed.checkpoint)),
    };
    let (synced, text) = known.judge(config.synced_check_interval, config.checkpoint_interval);
    Ok(Json(json!({
        "synced": synced,
        "sink_checkpoint_ts": time_text(known.checkpoint),
        "puller_resolved_ts": time_text(known.resolved),
        "last_synced_ts": time_text(known.last_synced),
        "now_ts": time_text(Some(known.now)),
        "info": text,
    })))
}

/// The times from which follows whether everything is downstream.
struct Known {
    now: WallTime,
    checkpoint: Option<WallTime>,
    last_synced: Option<WallTime>,
    resolved: Option<WallTime>,
}

impl Known {
    /// Intervals in seconds; if one is zero both have their defaults. Times are compared in whole milliseconds, and
    /// what is unknown is long ago.
    fn judge(&self, quiet_after: u64, fresh_within: u64) -> (bool, &'static str) {
        let (quiet_after, fresh_within) =
            if quiet_after == 0 || fresh_within == 0 { (300, 15) } else { (quiet_after, fresh_within) };
        let after = |seconds: u64| i64::try_from(seconds.saturating_mul(1000)).unwrap_or(i64::MAX);
        let millis = |from: Option<WallTime>, to: WallTime| {
            from.map_or(i64::MAX, |from| to.millis().saturating_sub(from.millis()))
        };
        let quiet = millis(self.last_synced, self.now) > after(quiet_after);
        let fresh = |to: WallTime| millis(self.checkpoint, to) < after(fresh_within);
        if quiet && fresh(self.now) {
            (true, "The data syncing is finished")
        } else if quiet && self.resolved.is_some_and(fresh) {
            (
                false,
                "Check that the upstream is reachable; if it is not, the data syncing is finished, otherwise wait",
            )
        } else {
            (false, "The data syncing is not finished, please wait")
        }
    }
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
    let request = Request::read(body)?;
    if body.sink_uri.is_empty() {
        return Err(ApiFailure::new("CDC:ErrSinkURIInvalid", "sink_uri is missing"));
    }
    Ok(request)
}

impl Request {
    /// Looks at the configuration alone.
    fn read(body: &FeedBody) -> Result<Self, ApiFailure> {
        let upstream_uri = body.upstream.as_ref().map(|upstream| upstream.uri.clone()).unwrap_or_default();
        if upstream_uri.is_empty() {
            return Err(ApiFailure::invalid(
                "upstream.uri is missing; for example {\"upstream\":{\"uri\":\"postgres://…\"}}",
            ));
        }
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

/// The tables that a filter takes, whatever the sink.
pub(super) async fn all_tables(State(state): State<Shared>, body: Bytes) -> Answer {
    let body = FeedBody { sink_uri: String::new(), ..parse_body(&body)? };
    let spec = Request::read(&body)?.spec(ChangefeedId::fresh("tables"))?;
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

/// Creates a changefeed, in the order of api-cli-config §8.1.
pub(super) async fn create(State(state): State<Shared>, body: Bytes) -> Answer {
    let body: FeedBody = parse_body(&body)?;
    let name = body.changefeed_id.clone().unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
    note(&name, "");
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
    let (start, target, scheme) = (info.start_ts, info.target_ts, scheme_of(&info.sink_uri));
    note(&name, format!("start_ts={start} target_ts={target} sink_scheme={scheme}"));
    if let Err(error) = leader(&state)?.create(info).await {
        // Nobody else knows of this incarnation, so what was made for it is ours to remove.
        if let Err(undo) = upstream.drop_retention(&id).await {
            tracing::warn!(changefeedID = %id, error = %undo.chain(), "cannot drop what was created upstream for a refused changefeed");
        }
        return Err(error.into());
    }
    let mut value = shown(&state, &name).await?;
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

/// State and checkpoint of a changefeed before it is changed, for the record.
async fn note_before(state: &ApiState, name: &str) {
    if let Ok(feed) = find(state, name).await {
        note(name, format!("state={} checkpoint={}", feed.info.state.shown().name(), feed.checkpoint));
    }
}

pub(super) async fn pause(State(state): State<Shared>, Path(name): Path<String>) -> Answer {
    check_name(&name)?;
    note_before(&state, &name).await;
    leader(&state)?.pause(KEYSPACE, &name).await?;
    Ok(Json(json!({})))
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct ResumeBody {
    overwrite_checkpoint_ts: Option<Overwrite>,
}

/// Where to go on.
#[derive(Clone, Copy, Deserialize)]
#[serde(untagged)]
enum Overwrite {
    Now(Now),
    At(PositionArg),
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Now {
    Now,
}

pub(super) async fn resume(State(state): State<Shared>, Path(name): Path<String>, body: Bytes) -> Answer {
    check_name(&name)?;
    let body: ResumeBody = if body.is_empty() { ResumeBody::default() } else { parse_body(&body)? };
    let mut overwrite = None;
    if let Some(wanted) = body.overwrite_checkpoint_ts {
        let feed = find(&state, &name).await?;
        let uri = feed.info.upstream_info.as_ref().map(|upstream| upstream.uri.clone()).unwrap_or_default();
        let now = state.upstreams.current_position(&uri).await?.start_ts;
        let position = match wanted {
            Overwrite::Now(Now::Now) => now,
            Overwrite::At(position) => position.0,
        };
        if position == Ts::ZERO || position > now {
            return Err(ApiFailure::invalid(format!(
                "overwrite_checkpoint_ts must be between 1 and the upstream's position {now}"
            )));
        }
        overwrite = Some(position);
    }
    let told = overwrite.map_or_else(String::new, |position| format!(" checkpoint={position}"));
    note(&name, format!("overwrite={}{told}", overwrite.is_some()));
    leader(&state)?.resume(KEYSPACE, &name, overwrite).await?;
    Ok(Json(json!({})))
}

/// Changes a stopped or failed changefeed (§8.3).
pub(super) async fn update(State(state): State<Shared>, Path(name): Path<String>, body: Bytes) -> Answer {
    change(&state, &name, parse_body(&body)?, false).await
}

/// As an update, but keys of the configuration that are absent keep their values.
pub(super) async fn patch(State(state): State<Shared>, Path(name): Path<String>, body: Bytes) -> Answer {
    change(&state, &name, parse_body(&body)?, true).await
}

async fn change(state: &ApiState, name: &str, mut body: FeedBody, keeps: bool) -> Answer {
    let changed = [
        ("target", body.target_ts.0 != Ts::ZERO),
        ("sink", !body.sink_uri.is_empty()),
        ("config", body.replica_config.is_some()),
    ];
    let changed: Vec<&str> = changed.into_iter().filter(|(_, is)| *is).map(|(name, _)| name).collect();
    note(name, format!("changed={}", changed.join(",")));
    let feed = find(state, name).await?;
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
    body.replica_config = Some(match body.replica_config.take() {
        None | Some(Value::Null) => info.config.to_api(),
        Some(config) if keeps => merge(info.config.to_api(), config),
        Some(config) => config,
    });
    let stored_uri = info.upstream_info.as_ref().map(|upstream| upstream.uri.clone()).unwrap_or_default();
    if body.upstream.as_ref().is_none_or(|upstream| upstream.uri.is_empty()) {
        body.upstream = Some(UpstreamBody { uri: stored_uri });
    }
    let request = check_request(&body)?;
    let config = request.config.keep_secrets_of(&info.config);
    let spec = request.spec(info.id.clone())?;
    let upstream = state.upstreams.open(&spec.upstream_uri)?;
    check_tables(&config, &upstream.check(&spec).await?)?;
    check_ends(state, &*upstream, &info.id, &body.sink_uri, &config).await?;
    info.sink_uri = body.sink_uri;
    info.config = config;
    if body.target_ts.0 != Ts::ZERO {
        info.target_ts = body.target_ts.0;
    }
    if let Some(upstream) = &mut info.upstream_info {
        upstream.uri = request.upstream_uri;
    }
    leader(state)?.update(info).await?;
    Ok(Json(shown(state, name).await?))
}

pub(super) async fn remove(State(state): State<Shared>, Path(name): Path<String>) -> Answer {
    check_name(&name)?;
    note_before(&state, &name).await;
    match leader(&state)?.remove(KEYSPACE, &name).await {
        Ok(_) => Ok(Json(json!({}))),
        Err(error) if error.code() == "CDC:ErrChangeFeedNotExists" => Ok(Json(json!({}))),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_772_352_000_000;

    fn known(last_synced: i64, checkpoint: i64, resolved: i64) -> Known {
        let at = |millis: i64| Some(WallTime(millis * 1000));
        Known {
            now: WallTime(NOW * 1000),
            checkpoint: at(checkpoint),
            last_synced: at(last_synced),
            resolved: at(resolved),
        }
    }

    #[test]
    // behaviour: api-A-15
    fn a_changefeed_is_synced_when_it_is_quiet_for_longer_and_fresh_for_less_than_the_intervals() {
        let synced = |known: Known| known.judge(300, 15).0;
        assert!(synced(known(NOW - 300_001, NOW - 14_999, NOW)));
        assert!(!synced(known(NOW - 300_000, NOW, NOW)), "equal is not longer");
        assert!(!synced(known(NOW - 300_001, NOW - 15_000, NOW)), "equal is not less");
        // The upstream stands still: nobody can say, and the words say what to do.
        let still = |known: Known| known.judge(300, 15).1.starts_with("Check");
        assert!(still(known(NOW - 400_000, NOW - 60_000, NOW - 45_001)));
        assert!(!still(known(NOW - 400_000, NOW - 60_000, NOW - 45_000)), "equal is not less");
        assert!(!still(known(NOW - 300_000, NOW - 60_000, NOW - 60_000)), "it is not quiet");
        // A zero means both defaults, and what is unknown is long ago.
        assert!(known(NOW - 300_001, NOW - 14_999, NOW).judge(0, 1).0);
        assert!(!known(NOW - 300_000, NOW - 14_999, NOW).judge(1, 0).0);
        assert!(!synced(Known { checkpoint: None, ..known(0, 0, 0) }));
        assert!(!still(Known { resolved: None, ..known(0, 0, 0) }));
    }
}
