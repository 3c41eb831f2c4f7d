//! Endpoints about where the tables of a changefeed are, served by the node of its maintainer (api-cli-config §4.3).

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use heartbeatpb::{NodeId, TableId, codes};
use maintainer::PlacementError;
use serde::Deserialize;
use serde_json::{Value, json};

use super::capture::node_id;
use super::forward::Maintained;
use super::{ApiFailure, Shared, parse_body};

type Answer = Result<Json<Value>, ApiFailure>;

impl From<PlacementError> for ApiFailure {
    fn from(error: PlacementError) -> Self {
        let code = match &error {
            PlacementError::NoSuchChangefeed => codes::MAINTAINER_NOT_FOUND,
            PlacementError::NotReady
            | PlacementError::Leaving
            | PlacementError::Busy
            | PlacementError::Ended => codes::NOT_INITIALIZED,
            PlacementError::UnknownTable(_) => codes::API_INVALID_PARAM,
            PlacementError::NotMovable
            | PlacementError::NodeNotReady(_)
            | PlacementError::Divided { .. }
            | PlacementError::Occupied { .. }
            | PlacementError::WholeOnly
            | PlacementError::NotDivisible(_)
            | PlacementError::Upstream(_)
            | PlacementError::Interrupted
            | PlacementError::Timeout => codes::SCHEDULER_REQUEST_FAILED,
            // Of a later version of the maintainer.
            _ => codes::SCHEDULER_REQUEST_FAILED,
        };
        ApiFailure::new(code, error.to_string())
    }
}

/// Parameters of all these endpoints; each uses some.
#[derive(Deserialize, Default)]
#[serde(default)]
pub(super) struct TableQuery {
    #[serde(rename = "tableID")]
    table: Option<String>,
    #[serde(rename = "targetNodeID")]
    target: Option<String>,
    mode: Option<String>,
    wait: Option<String>,
}

impl TableQuery {
    fn table(&self) -> Result<TableId, ApiFailure> {
        let text = self.table.as_deref().unwrap_or_default();
        text.parse().map(TableId).map_err(|_| {
            ApiFailure::invalid("tableID is missing or no number; the list of tables shows the ids")
        })
    }

    fn target(&self) -> Result<NodeId, ApiFailure> {
        let text = self.target.as_deref().unwrap_or_default();
        node_id(text).map_err(|_| ApiFailure::invalid("targetNodeID is missing or is no node's id"))
    }

    fn wait(&self) -> Result<bool, ApiFailure> {
        match self.wait.as_deref() {
            None | Some("" | "true" | "1") => Ok(true),
            Some("false" | "0") => Ok(false),
            Some(_) => Err(ApiFailure::invalid("wait must be true or false")),
        }
    }

    /// The second pipeline, of redo logs, which has no tables as long as nothing writes redo logs.
    fn is_redo(&self) -> bool {
        self.mode.as_deref() == Some("1")
    }
}

impl TableQuery {
    /// Asks the maintainer for a change; there is nothing to change where nothing writes redo logs.
    async fn change(&self, change: impl Future<Output = Result<(), PlacementError>>) -> Answer {
        if !self.is_redo() {
            change.await?;
        }
        Ok(Json(json!({})))
    }
}

pub(super) async fn move_table(
    State(state): State<Shared>,
    Query(query): Query<TableQuery>,
    maintained: Maintained,
) -> Answer {
    let (table, target, wait) = (query.table()?, query.target()?, query.wait()?);
    let id = maintained.id()?;
    query.change(state.placements.move_table(&id, table, target, wait)).await
}

pub(super) async fn move_split_table(
    State(state): State<Shared>,
    Query(query): Query<TableQuery>,
    maintained: Maintained,
) -> Answer {
    let (table, target, wait) = (query.table()?, query.target()?, query.wait()?);
    let id = maintained.id()?;
    query.change(state.placements.move_split_table(&id, table, target, wait)).await
}

pub(super) async fn split_table(
    State(state): State<Shared>,
    Query(query): Query<TableQuery>,
    maintained: Maintained,
) -> Answer {
    let table = query.table()?;
    let id = maintained.id()?;
    query.change(state.placements.split_table(&id, table, None)).await
}

pub(super) async fn merge_table(
    State(state): State<Shared>,
    Query(query): Query<TableQuery>,
    maintained: Maintained,
) -> Answer {
    let table = query.table()?;
    let id = maintained.id()?;
    query.change(state.placements.merge_table(&id, table)).await
}

pub(super) async fn dispatcher_count(
    State(state): State<Shared>,
    Query(query): Query<TableQuery>,
    maintained: Maintained,
) -> Answer {
    let id = maintained.id()?;
    let count = if query.is_redo() { 0 } else { state.placements.dispatcher_count(&id).await? };
    Ok(Json(json!({ "count": count })))
}

pub(super) async fn tables(
    State(state): State<Shared>,
    Query(query): Query<TableQuery>,
    maintained: Maintained,
) -> Answer {
    let id = maintained.id()?;
    let tables = if query.is_redo() { Default::default() } else { state.placements.tables(&id).await? };
    let items: Vec<Value> = tables
        .iter()
        .map(|(node, tables)| json!({ "node_id": node.as_str(), "table_ids": tables }))
        .collect();
    Ok(Json(json!({ "total": items.len(), "items": items })))
}

pub(super) async fn move_table_v1(
    State(state): State<Shared>,
    maintained: Maintained,
    body: Bytes,
) -> Result<(StatusCode, Json<Value>), ApiFailure> {
    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Body {
        table_id: Option<i64>,
        capture_id: String,
    }
    let body: Body = parse_body(&body)?;
    let table = body.table_id.ok_or_else(|| ApiFailure::invalid("table_id is missing"))?;
    let target = node_id(&body.capture_id)?;
    let id = maintained.id()?;
    state.placements.move_table(&id, TableId(table), target, true).await?;
    Ok((StatusCode::ACCEPTED, Json(json!({}))))
}
