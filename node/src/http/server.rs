//! Endpoints about the server itself.

use std::fmt::Write as _;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use heartbeatpb::NodeLiveness;
use serde::Deserialize;
use serde_json::{Value, json};

use super::debug::tasks::STUCK;
use super::models::{millis_of, position_text};
use super::{ApiFailure, Shared, parse_body};
use crate::config::{RedactMode, UpstreamSection};

pub(super) async fn status(State(state): State<Shared>) -> Json<Value> {
    let mut status = json!({
        "version": concat!("v", env!("CARGO_PKG_VERSION")),
        "git_hash": option_env!("MILLRACE_GIT_HASH").unwrap_or(""),
        "id": state.node.as_str(),
        "cluster_id": state.cluster_id,
        "pid": std::process::id(),
        "is_owner": state.leader().is_some(),
        "liveness": liveness_number(state.liveness.get()),
        "uptime_seconds": state.started.elapsed().as_secs(),
    });
    if let Some(trouble) = state.lease.trouble() {
        status["writing"] = json!(trouble);
    }
    Json(status)
}

fn liveness_number(liveness: NodeLiveness) -> u8 {
    match liveness {
        NodeLiveness::Alive => 0,
        NodeLiveness::Draining => 1,
        NodeLiveness::Stopping => 2,
    }
}

pub(super) async fn health(State(state): State<Shared>) -> Result<Json<Value>, ApiFailure> {
    if state.is_initialised().await && state.liveness.get() == NodeLiveness::Alive {
        Ok(Json(json!({})))
    } else {
        Err(ApiFailure::new("CDC:ErrClusterIsUnhealthy", "the coordinator is not ready"))
    }
}

/// Whether the process gets on. Its port may answer while the rest of it does not.
pub(super) async fn livez(State(state): State<Shared>) -> Response {
    let silence = state.tasks.silence();
    if silence < STUCK {
        return "ok\n".into_response();
    }
    let text = format!("the runtime has not got on for {} s\n", silence.as_secs());
    (StatusCode::SERVICE_UNAVAILABLE, text).into_response()
}

/// Whether this node can serve; the coordinator is asked only if it is here.
pub(super) async fn readyz(State(state): State<Shared>) -> Response {
    let mut failing: Vec<String> = Vec::new();
    let mut fails = |check: &str| failing.push(check.to_owned());
    if !state.members.borrow().contains_key(&state.node) {
        fails("node is not a member of the cluster");
    }
    if state.leading.borrow().is_none() {
        fails("no coordinator is known");
    } else if state.leader().is_some() && !state.is_initialised().await {
        fails("coordinator is not initialised");
    }
    if state.liveness.get() != NodeLiveness::Alive {
        fails("node is draining or stopping");
    }
    if let Some(trouble) = state.lease.trouble() {
        fails(&format!("writing is {trouble}"));
    }
    if failing.is_empty() {
        return "ok\n".into_response();
    }
    let text = failing.into_iter().fold(String::new(), |mut out, check| {
        let _ = writeln!(out, "{check}");
        out
    });
    (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "1")], text).into_response()
}

/// Asks nobody: a control plane that is stuck must not hold up the scrape that tells about it.
pub(super) async fn metrics(State(state): State<Shared>) -> impl IntoResponse {
    crate::metrics::collect();
    state.upstreams.measure();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], state.metrics.render())
}

#[derive(Deserialize)]
struct LogLevel {
    #[serde(default = "info_level")]
    log_level: String,
}

fn info_level() -> String {
    "info".to_owned()
}

pub(super) async fn set_log_level(body: Bytes) -> Result<Json<Value>, ApiFailure> {
    let LogLevel { log_level } = parse_body(&body)?;
    crate::telemetry::set_log_level(&log_level).map_err(ApiFailure::invalid)?;
    tracing::warn!(level = log_level, "log level changed");
    Ok(Json(json!({})))
}

/// Hides more of values in the log, never less (api-cli-config §4.1).
pub(super) async fn set_redaction(
    State(state): State<Shared>,
    body: Bytes,
) -> Result<Json<Value>, ApiFailure> {
    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Body {
        redact_info_log: String,
    }
    let body: Body = parse_body(&body)?;
    let wanted = RedactMode::parse(&body.redact_info_log)
        .ok_or_else(|| ApiFailure::invalid("redact_info_log must be off, marker or on"))?;
    let mut current = state.access.redact.lock();
    let previous = *current;
    if wanted < previous {
        return Err(ApiFailure::invalid(format!(
            "redact_info_log is {}, and can be made stricter only until the server is started anew",
            previous.name()
        )));
    }
    *current = wanted;
    Ok(Json(json!({ "previous_mode": previous.name(), "current_mode": wanted.name() })))
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct TsoBody {
    upstream: Option<TsoUpstream>,
    upstream_name: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct TsoUpstream {
    uri: String,
}

/// The position of an upstream now: of the one that is named, or of the only one of the configuration.
pub(super) async fn tso(State(state): State<Shared>, body: Bytes) -> Result<Json<Value>, ApiFailure> {
    let body: TsoBody = parse_body(&body)?;
    let uri = match (body.upstream, body.upstream_name.as_str()) {
        (Some(_), name) if !name.is_empty() => {
            return Err(ApiFailure::invalid("upstream and upstream_name are given; keep one"));
        }
        (Some(upstream), _) => upstream.uri,
        (None, "") => {
            let mut named = state.named.values();
            let only = named.next().filter(|_| named.next().is_none());
            only.map(UpstreamSection::full_uri).ok_or_else(|| {
                ApiFailure::invalid(
                    "name the upstream: {\"upstream\":{\"uri\":\"postgres://…\"}}, or upstream_name",
                )
            })?
        }
        (None, name) => state.named_upstream(name)?,
    };
    let point = state.upstreams.current_position(&uri).await?;
    Ok(Json(json!({
        "timestamp": millis_of(point.time),
        "logic_time": 0,
        "position": point.start_ts,
        "position_text": position_text(&uri, point.start_ts),
    })))
}

pub(super) async fn no_processors() -> Json<Value> {
    Json(json!({ "total": 0, "items": [] }))
}

pub(super) async fn no_tables() -> Json<Value> {
    Json(json!({ "table_ids": null }))
}

pub(super) async fn not_found(uri: Uri) -> Response {
    let body = json!({ "error_msg": format!("there is nothing at {}", uri.path()), "error_code": "CDC:ErrAPINotFound" });
    (StatusCode::NOT_FOUND, Json(body)).into_response()
}

pub(super) async fn wrong_method(method: axum::http::Method, uri: Uri) -> Response {
    let text = format!("{} does not accept {method}", uri.path());
    let body = json!({ "error_msg": text, "error_code": "CDC:ErrAPIInvalidParam" });
    (StatusCode::METHOD_NOT_ALLOWED, Json(body)).into_response()
}
