//! What only the node of a maintainer knows of its changefeed: how far the log is read, when positions were committed,
//! what holds the checkpoint. The node that leads asks for it, so that every answer is whole.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, header};
use coordinator::{ChangefeedView, UpstreamClock};
use heartbeatpb::{ChangefeedId, Gid, NodeId, Ts, WallTime};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::status::local_held;
use super::{ApiFailure, ApiState, Shared, forward};

/// Where nodes ask each other.
pub(super) const PATH: &str = "/api/v2/internal/facts";
/// How long another node may take; without its answer times are unknown.
const PATIENCE: Duration = Duration::from_secs(2);
/// Changefeeds in one question.
const MOST: usize = 100_000;

/// A question about one changefeed.
#[derive(Serialize, Deserialize)]
struct Question {
    low: u64,
    high: u64,
    name: String,
    keyspace: String,
    /// Positions whose times are wanted.
    at: Vec<u64>,
}

/// A question to a node.
#[derive(Serialize, Deserialize)]
struct Questions {
    feeds: Vec<Question>,
    /// Whether the reader and what holds the checkpoint are wanted too.
    detail: bool,
}

/// What is known of one changefeed.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Facts {
    /// Newest complete position that was read.
    resolved: Option<u64>,
    /// Microseconds since 1970 by position.
    times: BTreeMap<u64, i64>,
    /// Numbers of the log reader; `null` when they were not asked for or are unknown.
    pub(super) reader: Value,
    /// What the checkpoint stands at.
    pub(super) held: Option<Value>,
}

impl Facts {
    /// Newest complete position that was read, the checkpoint at least.
    pub(super) fn resolved(&self, checkpoint: Ts) -> Ts {
        self.resolved.map_or(checkpoint, Ts).max(checkpoint)
    }

    /// When a position was committed, if that is known.
    pub(super) fn time_of(&self, ts: Ts) -> Option<WallTime> {
        self.times.get(&ts.0).copied().map(WallTime)
    }
}

/// What this node knows.
async fn local(state: &ApiState, id: &ChangefeedId, at: impl Iterator<Item = Ts>, detail: bool) -> Facts {
    let resolved = state.upstreams.resolved(id);
    let times =
        at.chain(resolved).filter_map(|ts| Some((ts.0, state.upstreams.time_of(id, ts)?.0))).collect();
    let (reader, held) = if detail {
        let reader = state.upstreams.progress(id);
        let held = local_held(state, id, &reader).await;
        (reader, held)
    } else {
        (Value::Null, None)
    };
    Facts { resolved: resolved.map(|ts| ts.0), times, reader, held }
}

/// Answers another node.
pub(super) async fn answer(
    State(state): State<Shared>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<Vec<Facts>>, ApiFailure> {
    let questions: Questions = super::parse_body(&body)?;
    if questions.detail {
        state.access.gate.admit(&headers).await?;
    }
    if questions.feeds.len() > MOST {
        return Err(ApiFailure::invalid("too many changefeeds in one question"));
    }
    let mut all = Vec::with_capacity(questions.feeds.len());
    for feed in questions.feeds {
        let gid = Gid { low: feed.low, high: feed.high };
        let id = ChangefeedId { gid, name: feed.name.into(), keyspace: feed.keyspace.into() };
        all.push(local(&state, &id, feed.at.into_iter().map(Ts), questions.detail).await);
    }
    Ok(Json(all))
}

/// The positions of which a view tells the time.
fn positions(feed: &ChangefeedView) -> [Ts; 2] {
    [feed.checkpoint, feed.last_synced]
}

/// What is known of one changefeed, wherever its maintainer is, in detail.
pub(super) async fn of(state: &ApiState, feed: &ChangefeedView, headers: &HeaderMap) -> Facts {
    let credentials = headers.get(header::AUTHORIZATION);
    of_all(state, std::slice::from_ref(feed), credentials, true).await.pop().unwrap_or_default()
}

/// What is known of changefeeds, in their order. Each node is asked once, all at the same time.
pub(super) async fn of_all(
    state: &ApiState,
    feeds: &[ChangefeedView],
    credentials: Option<&HeaderValue>,
    detail: bool,
) -> Vec<Facts> {
    let mut all = vec![Facts::default(); feeds.len()];
    let mut elsewhere: BTreeMap<&NodeId, Vec<usize>> = BTreeMap::new();
    for (index, feed) in feeds.iter().enumerate() {
        match &feed.node {
            Some(node) if *node != state.node => elsewhere.entry(node).or_default().push(index),
            Some(_) | None => {
                all[index] = local(state, &feed.info.id, positions(feed).into_iter(), detail).await;
            }
        }
    }
    let asked = elsewhere.into_iter().map(async |(node, indices)| {
        let about: Vec<&ChangefeedView> = indices.iter().map(|index| &feeds[*index]).collect();
        let facts = ask(state, node, &about, credentials, detail).await;
        indices.into_iter().zip(facts).collect::<Vec<_>>()
    });
    for (index, facts) in futures_util::future::join_all(asked).await.into_iter().flatten() {
        all[index] = facts;
    }
    all
}

async fn ask(
    state: &ApiState,
    node: &NodeId,
    feeds: &[&ChangefeedView],
    credentials: Option<&HeaderValue>,
    detail: bool,
) -> Vec<Facts> {
    let question = |feed: &&ChangefeedView| Question {
        low: feed.info.id.gid.low,
        high: feed.info.id.gid.high,
        name: feed.info.id.name.to_string(),
        keyspace: feed.info.id.keyspace.to_string(),
        at: positions(feed).map(|ts| ts.0).to_vec(),
    };
    let questions = Questions { feeds: feeds.iter().map(question).collect(), detail };
    let Ok(body) = serde_json::to_vec(&questions) else { return Vec::new() };
    match forward::ask(state, node, PATH, credentials, body, PATIENCE).await {
        Some(bytes) => serde_json::from_slice(&bytes).unwrap_or_default(),
        None => Vec::new(),
    }
}
