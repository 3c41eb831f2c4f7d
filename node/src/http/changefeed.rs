//! Endpoints about changefeeds: what is shown of them. What changes them is in `change`, what is checked before in `request`.

mod change;
mod request;
mod synced;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use coordinator::ChangefeedView;
use heartbeatpb::config::{ChangefeedState, mask_uri};
use heartbeatpb::{RunningError, WallTime};
use serde::Deserialize;
use serde_json::{Value, json};

use super::facts::{self, Facts};
use super::models::{check_name, position_text, time_text};
use super::{ApiFailure, ApiState, Shared, leader};

pub(super) use change::{create, patch, pause, remove, resume, update};
pub(super) use request::{all_tables, verify_table};
pub(super) use synced::synced;

type Answer = Result<Json<Value>, ApiFailure>;

impl From<coordinator::Error> for ApiFailure {
    fn from(error: coordinator::Error) -> Self {
        ApiFailure::new(error.code(), heartbeatpb::error_chain(&error))
    }
}

/// Namespace of every changefeed: namespaces are not enabled.
pub(crate) const KEYSPACE: &str = "default";

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
        "start_ts_text": position_text(upstream_uri, info.start_ts),
        "resolved_ts_text": position_text(upstream_uri, facts.resolved(feed.checkpoint)),
        "checkpoint_time": time_text(facts.time_of(feed.checkpoint)),
        "task_status": [],
        "gid": { "low": info.id.gid.low, "high": info.id.gid.high },
    });
    if info.target_ts != heartbeatpb::Ts::ZERO {
        value["target_ts_text"] = json!(position_text(upstream_uri, info.target_ts));
    }
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
pub(super) async fn shown(state: &ApiState, name: &str) -> Result<Value, ApiFailure> {
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

#[cfg(test)]
mod tests;
