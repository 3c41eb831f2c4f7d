//! What this node knows, for people who look for a fault: the configuration, and everything at one moment as text.

use std::fmt::Write as _;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::IntoResponse;
use coordinator::ChangefeedView;
use serde_json::Value;

use super::{ApiState, Shared, facts};

/// The configuration that is in effect, defaults included. It has no secrets.
pub(super) async fn config(State(state): State<Shared>) -> Json<Value> {
    Json(state.config.clone())
}

pub(super) async fn info(State(state): State<Shared>, headers: HeaderMap) -> impl IntoResponse {
    let mut text = String::new();
    let own = node(&state, &mut text);
    let rest = match own {
        Ok(()) => cluster(&state, headers.get(header::AUTHORIZATION), &mut text).await,
        Err(error) => Err(error),
    };
    // Writing to a string does not fail.
    debug_assert!(rest.is_ok());
    ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], text)
}

fn node(state: &ApiState, out: &mut String) -> std::fmt::Result {
    writeln!(out, "node {} of cluster {}", state.node, state.cluster_id)?;
    writeln!(out, "  version v{}", env!("CARGO_PKG_VERSION"))?;
    writeln!(out, "  liveness {:?}", state.liveness.get())?;
    if let Some(trouble) = state.lease.trouble() {
        writeln!(out, "  writing {trouble}")?;
    }
    writeln!(out, "  up for {} s", state.started.elapsed().as_secs())
}

async fn cluster(state: &ApiState, credentials: Option<&HeaderValue>, out: &mut String) -> std::fmt::Result {
    for (node, address) in &**state.members.borrow() {
        let reached = if state.unreached.borrow().contains(node) { ", not reached from here" } else { "" };
        writeln!(out, "member {node} at {address}{reached}")?;
    }
    let Some(leader) = state.leader() else {
        let leading = state.leading.borrow().clone();
        return writeln!(
            out,
            "coordinator: {}",
            leading.map_or("nobody".to_owned(), |node| node.to_string())
        );
    };
    writeln!(out, "coordinator: here, version {}", leader.version())?;
    match leader.drain_progress().await {
        Ok(Some(drain)) => writeln!(out, "drain {drain:?}")?,
        Ok(None) => writeln!(out, "drain: none")?,
        Err(error) => writeln!(out, "drain: {error}")?,
    }
    match leader.list(None).await {
        Ok(feeds) => {
            let facts = facts::of_all(state, &feeds, credentials, true).await;
            for (feed, facts) in feeds.iter().zip(&facts) {
                changefeed(feed, facts.held.as_ref(), out)?;
            }
            Ok(())
        }
        Err(error) => writeln!(out, "changefeeds: {error}"),
    }
}

fn changefeed(feed: &ChangefeedView, held: Option<&Value>, out: &mut String) -> std::fmt::Result {
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
    let reported = feed.errors.iter().filter(|error| info.error.as_ref() != Some(error));
    for error in info.error.iter().chain(reported) {
        writeln!(out, "  error {} of {} at {}: {}", error.code, error.node, error.time, error.message)?;
    }
    Ok(())
}
