//! What this node knows, for people who look for a fault: the configuration, everything at one moment as text or JSON, and
//! what the process itself does ([`process`]).

pub(super) mod process;
pub(crate) mod tasks;

use std::fmt::Write as _;

use axum::Json;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use coordinator::{ChangefeedView, DrainView};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::facts::Facts;
use super::{ApiFailure, ApiState, Shared, facts};

/// The configuration that is in effect, defaults included, without its secrets.
pub(super) async fn config(State(state): State<Shared>) -> Json<Value> {
    Json(state.config.clone())
}

#[derive(Deserialize, Default)]
#[serde(default)]
pub(super) struct InfoQuery {
    format: Option<String>,
}

pub(super) async fn info(
    State(state): State<Shared>,
    Query(query): Query<InfoQuery>,
    headers: HeaderMap,
) -> Result<Response, ApiFailure> {
    let credentials = headers.get(header::AUTHORIZATION);
    match query.format.as_deref() {
        None | Some("" | "text") => Ok(plain(info_text(&state, credentials).await)),
        Some("json") => {
            let seen = Seen::now(&state, credentials).await;
            Ok(Json(seen.value(&state)).into_response())
        }
        Some(_) => Err(ApiFailure::invalid("format must be text or json")),
    }
}

/// Which log lines are written now.
pub(super) async fn log_filter() -> Result<Json<Value>, ApiFailure> {
    let filter = crate::telemetry::log_filter();
    let filter = filter.ok_or_else(|| ApiFailure::new("CDC:ErrInternal", "logging was not started"))?;
    Ok(Json(json!({ "filter": filter })))
}

fn plain(text: String) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], text).into_response()
}

/// Everything at one moment, as text.
pub(super) async fn info_text(state: &ApiState, credentials: Option<&HeaderValue>) -> String {
    let mut text = String::new();
    let written = Seen::now(state, credentials).await.write(state, &mut text);
    // Writing to a string does not fail.
    debug_assert!(written.is_ok());
    text
}

/// Writes everything into the log whenever the process gets `SIGUSR1`: for a node whose port does not answer.
pub(crate) async fn dump_on_signal(state: Shared, stop: CancellationToken) {
    let mut signals = match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::user_defined1()) {
        Ok(signals) => signals,
        Err(error) => {
            tracing::warn!(%error, "SIGUSR1 will not be heard");
            return;
        }
    };
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            signal = signals.recv() => if signal.is_none() { return },
        }
        let text = format!("{}{}", state.tasks.text(), info_text(&state, None).await);
        for line in text.lines() {
            tracing::warn!(line, "dump");
        }
    }
}

/// What the coordinator knows, where it is here.
enum Led {
    Elsewhere,
    Here {
        version: u64,
        drain: Result<Option<DrainView>, String>,
        feeds: Result<Vec<(ChangefeedView, Facts)>, String>,
    },
}

/// Everything at one moment.
struct Seen {
    led: Led,
}

impl Seen {
    async fn now(state: &ApiState, credentials: Option<&HeaderValue>) -> Self {
        let Some(leader) = state.leader() else { return Self { led: Led::Elsewhere } };
        let drain = leader.drain_progress().await.map_err(|error| error.to_string());
        let feeds = match leader.list(None).await {
            Ok(feeds) => {
                let facts = facts::of_all(state, &feeds, credentials, true).await;
                Ok(feeds.into_iter().zip(facts).collect())
            }
            Err(error) => Err(error.to_string()),
        };
        Self { led: Led::Here { version: leader.version(), drain, feeds } }
    }

    fn value(&self, state: &ApiState) -> Value {
        let mut value = json!({
            "node": state.node.as_str(),
            "cluster": state.cluster_id,
            "version": concat!("v", env!("CARGO_PKG_VERSION")),
            "liveness": format!("{:?}", state.liveness.get()).to_lowercase(),
            "writing": state.lease.trouble(),
            "uptime_seconds": state.started.elapsed().as_secs(),
            "members": **state.members.borrow(),
            "leader": state.leading.borrow().as_ref().map(heartbeatpb::NodeId::as_str),
        });
        let Led::Here { version, drain, feeds } = &self.led else { return value };
        let drain = match drain {
            Ok(drain) => json!(drain.as_ref().map(|drain| format!("{drain:?}"))),
            Err(error) => json!({ "error": error }),
        };
        let feeds = match feeds {
            Ok(feeds) => feeds.iter().map(|(feed, facts)| feed_value(feed, facts)).collect(),
            Err(error) => json!({ "error": error }),
        };
        value["coordinator"] = json!({ "version": version, "drain": drain, "changefeeds": feeds });
        value
    }

    fn write(&self, state: &ApiState, out: &mut String) -> std::fmt::Result {
        writeln!(out, "node {} of cluster {}", state.node, state.cluster_id)?;
        writeln!(out, "  version v{}", env!("CARGO_PKG_VERSION"))?;
        writeln!(out, "  liveness {:?}", state.liveness.get())?;
        if let Some(trouble) = state.lease.trouble() {
            writeln!(out, "  writing {trouble}")?;
        }
        writeln!(out, "  up for {} s", state.started.elapsed().as_secs())?;
        for (node, address) in &**state.members.borrow() {
            let reached =
                if state.unreached.borrow().contains(node) { ", not reached from here" } else { "" };
            writeln!(out, "member {node} at {address}{reached}")?;
        }
        let Led::Here { version, drain, feeds } = &self.led else {
            let leading = state.leading.borrow().clone();
            let leading = leading.map_or("nobody".to_owned(), |node| node.to_string());
            return writeln!(out, "coordinator: {leading}");
        };
        writeln!(out, "coordinator: here, version {version}")?;
        match drain {
            Ok(Some(drain)) => writeln!(out, "drain {drain:?}")?,
            Ok(None) => writeln!(out, "drain: none")?,
            Err(error) => writeln!(out, "drain: {error}")?,
        }
        match feeds {
            Ok(feeds) => {
                feeds.iter().try_for_each(|(feed, facts)| write_feed(feed, facts.held.as_ref(), out))
            }
            Err(error) => writeln!(out, "changefeeds: {error}"),
        }
    }
}

fn feed_value(feed: &ChangefeedView, facts: &Facts) -> Value {
    let info = &feed.info;
    json!({
        "changefeed": info.id.to_string(),
        "state": info.state.shown().name(),
        "placement": format!("{:?}", feed.group).to_lowercase(),
        "epoch": info.epoch.map(|epoch| epoch.to_string()),
        "checkpoint_ts": feed.checkpoint,
        "stored_checkpoint_ts": feed.saved_checkpoint,
        "resolved_ts": facts.resolved(feed.checkpoint),
        "maintainer": feed.node.as_ref().map(heartbeatpb::NodeId::as_str),
        "bootstrap_done": feed.bootstrap_done,
        "waiting_for": feed.waiting_for,
        "held_by": facts.held,
        "reader": facts.reader,
        "errors": errors(feed).map(super::changefeed::error_value).collect::<Vec<_>>(),
    })
}

/// The stored error, and what was reported beside it.
fn errors(feed: &ChangefeedView) -> impl Iterator<Item = &heartbeatpb::RunningError> {
    let stored = feed.info.error.as_ref();
    stored.into_iter().chain(feed.errors.iter().filter(move |error| stored != Some(error)))
}

fn write_feed(feed: &ChangefeedView, held: Option<&Value>, out: &mut String) -> std::fmt::Result {
    let info = &feed.info;
    writeln!(out, "changefeed {} ({}), {:?}", info.id, info.state.shown(), feed.group)?;
    writeln!(out, "  epoch {}", info.epoch.map_or_else(|| "none".to_owned(), |epoch| epoch.to_string()))?;
    writeln!(out, "  checkpoint {}, stored {}", feed.checkpoint, feed.saved_checkpoint)?;
    if let Some(node) = &feed.node {
        writeln!(out, "  maintainer on {node}, bootstrap done: {}", feed.bootstrap_done)?;
    }
    if let Some(waits) = &feed.waiting_for {
        writeln!(out, "  waits for {waits}")?;
    }
    if let Some(held) = held {
        writeln!(out, "  held for {} s: {}", held["seconds"], held["by"].as_str().unwrap_or_default())?;
    }
    for error in errors(feed) {
        writeln!(out, "  error {} of {} at {}: {}", error.code, error.node, error.time, error.message)?;
    }
    Ok(())
}
