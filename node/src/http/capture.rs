//! Endpoints about the nodes of the cluster: who they are, and emptying one before it stops.

use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use coordinator::drain::NodeState;
use coordinator::{CoordinatorHandle, DrainView};
use heartbeatpb::{NodeId, codes};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{ApiFailure, ApiState, Shared, leader, parse_body};

type Answer = Result<Json<Value>, ApiFailure>;

/// How long a request waits for a drain to be stored.
const PATIENCE: Duration = Duration::from_secs(5);
/// Longest id of a node in a request.
const LONGEST_ID: usize = 128;

/// The members of the cluster as the API shows them.
fn members(state: &ApiState) -> Vec<Value> {
    let members = state.members.borrow();
    let leading = state.leading.borrow().clone();
    let member = |(id, address): (&NodeId, &String)| {
        json!({
            "id": id.as_str(), "is_owner": leading.as_ref() == Some(id),
            "address": address, "cluster_id": state.cluster_id,
        })
    };
    members.iter().map(member).collect()
}

pub(super) async fn list(State(state): State<Shared>) -> Json<Value> {
    let items = members(&state);
    Json(json!({ "total": items.len(), "items": items }))
}

/// The same, as version 1 of the API shows it.
pub(super) async fn list_v1(State(state): State<Shared>) -> Json<Value> {
    Json(Value::Array(members(&state)))
}

/// An id of a node from a request, which is repeated in errors.
pub(super) fn node_id(text: &str) -> Result<NodeId, ApiFailure> {
    let fits = !text.is_empty()
        && text.len() <= LONGEST_ID
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':'));
    if fits {
        return Ok(NodeId::from(text));
    }
    Err(ApiFailure::invalid("a capture id is a node's id, as the list of captures shows it"))
}

/// Begins or continues to empty a node. 0 is a promise, and whatever is waited for counts as at least 1.
///
/// No view: the wish could not be stored yet.
async fn drain_node(
    state: &ApiState,
    node: &NodeId,
) -> Result<(CoordinatorHandle, Option<DrainView>), ApiFailure> {
    let leader = leader(state)?;
    if *node == state.node {
        let alone = state.members.borrow().len() < 2;
        let instead = if alone {
            "no other node could take its work over; stop it"
        } else {
            "let another node lead first (POST /api/v2/owner/resign), then ask that one"
        };
        return Err(ApiFailure::new(
            codes::SCHEDULER_REQUEST_FAILED,
            format!("cannot drain the owner: {instead}"),
        ));
    }
    let view = match tokio::time::timeout(PATIENCE, leader.drain_node(node)).await {
        Ok(view) => Some(view?),
        // It begins once it is stored; whoever polls is to hear that something remains.
        Err(_) => None,
    };
    Ok((leader, view))
}

pub(super) async fn drain(State(state): State<Shared>, Path(id): Path<String>) -> Answer {
    let node = node_id(&id)?;
    let (leader, view) = drain_node(&state, &node).await?;
    let Some(view) = view else {
        let waits = "the metadata store to take note of the drain";
        return Ok(Json(json!({ "current_table_count": 1, "waiting_for": waits })));
    };
    let mut value = drain_value(&view);
    if view.remaining > 0 && view.epoch == 0 {
        value["waiting_for"] = json!(waiting_for(&leader, &node).await);
    }
    Ok(Json(value))
}

/// Why a drain has not begun.
async fn waiting_for(leader: &CoordinatorHandle, node: &NodeId) -> String {
    match leader.drain_progress().await {
        Ok(Some(other)) if other.target != *node => format!("the drain of node {} to end", other.target),
        Ok(_) => {
            "every node to take note of the end of the drain before, or to say what it can do".to_owned()
        }
        Err(_) => "the coordinator to hear from every node".to_owned(),
    }
}

pub(super) async fn drain_v1(
    State(state): State<Shared>,
    body: Bytes,
) -> Result<(StatusCode, Json<Value>), ApiFailure> {
    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Body {
        capture_id: String,
    }
    let body: Body = parse_body(&body)?;
    let (_, view) = drain_node(&state, &node_id(&body.capture_id)?).await?;
    let remaining = view.map_or(1, |view| view.remaining);
    Ok((StatusCode::ACCEPTED, Json(json!({ "current_table_count": remaining }))))
}

/// How far the drain is; changes nothing.
pub(super) async fn progress(State(state): State<Shared>, Path(id): Path<String>) -> Answer {
    let node = node_id(&id)?;
    let view = leader(&state)?.drain_progress().await?.filter(|view| view.target == node);
    let view = view.ok_or_else(|| {
        ApiFailure::new(codes::SCHEDULER_REQUEST_FAILED, format!("no drain of node {node} is under way"))
    })?;
    Ok(Json(drain_value(&view)))
}

pub(super) async fn cancel(State(state): State<Shared>, Path(id): Path<String>) -> Answer {
    let node = node_id(&id)?;
    leader(&state)?.cancel_drain(&node).await?;
    tracing::warn!(%node, "a drain was taken back by a request");
    Ok(Json(json!({})))
}

fn drain_value(view: &DrainView) -> Value {
    json!({
        "current_table_count": view.remaining,
        "maintainers": view.maintainers,
        "operators": view.operators,
        "dispatchers": view.dispatchers,
        "inflight_moves": view.moves,
        "pending_changefeeds": view.pending,
        "state": match view.state {
            NodeState::Alive => "alive",
            NodeState::Draining => "draining",
            NodeState::Stopping => "stopping",
            NodeState::Unknown => "unknown",
        },
    })
}

/// Lets another node lead, or the same again when there is no other.
async fn give_up_leading(state: &ApiState) -> Result<(), ApiFailure> {
    leader(state)?.resign().await;
    tracing::warn!("this node gave up coordinating by a request");
    Ok(())
}

pub(super) async fn resign(State(state): State<Shared>) -> Answer {
    give_up_leading(&state).await?;
    Ok(Json(json!({})))
}

pub(super) async fn resign_v1(State(state): State<Shared>) -> Result<(StatusCode, Json<Value>), ApiFailure> {
    give_up_leading(&state).await?;
    Ok((StatusCode::ACCEPTED, Json(json!({}))))
}
