//! Endpoints about tables that are copied again while the others go on, served by the node of the maintainer.

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Query, State};
use event::{Resync, ResyncChange};
use heartbeatpb::{ChangefeedId, TableId, codes};
use serde::Deserialize;
use serde_json::{Value, json};

use super::forward::Maintained;
use super::{ApiFailure, Shared, parse_body};

type Answer = Result<Json<Value>, ApiFailure>;

/// Which table, as the endpoints of placement have it.
#[derive(Deserialize, Default)]
#[serde(default)]
pub(super) struct ResyncQuery {
    #[serde(rename = "tableID")]
    id: Option<String>,
}

/// Which table.
#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
struct ResyncBody {
    /// Schema and name with a point between them, or its id.
    table: Option<String>,
}

/// A table by its name or its id, as somebody has written it.
struct Named(String);

impl Named {
    fn new(query: ResyncQuery, body: &Bytes) -> Result<Self, ApiFailure> {
        let body: ResyncBody = if body.is_empty() { ResyncBody::default() } else { parse_body(body)? };
        let text = body.table.or(query.id).filter(|text| !text.is_empty());
        let missing =
            || ApiFailure::invalid("table is missing: a name such as shop.orders, or the id of a table");
        text.map(Self).ok_or_else(missing)
    }

    /// The request that is meant.
    fn find<'r>(&self, all: &'r [Resync]) -> Result<&'r Resync, ApiFailure> {
        let text = self.0.as_str();
        let id = text.parse().map(TableId).ok();
        let found = all.iter().rev().find(|one| one.name == text || Some(one.table) == id);
        found.ok_or_else(|| {
            ApiFailure::invalid(format!(
                "nobody has asked for table {text} to be copied again; the list of resyncs shows what was asked for"
            ))
        })
    }
}

/// What was asked for, oldest first.
pub(super) async fn list(State(state): State<Shared>, maintained: Maintained) -> Answer {
    let (resyncs, _) = state.upstreams.resyncs(&running(maintained)?)?;
    let items: Vec<Value> = resyncs.all().await?.iter().map(|one| resyncs.shown(one)).collect();
    Ok(Json(json!({ "total": items.len(), "items": items })))
}

/// A table is to be copied again.
pub(super) async fn ask(
    State(state): State<Shared>,
    Query(query): Query<ResyncQuery>,
    maintained: Maintained,
    body: Bytes,
) -> Answer {
    let named = Named::new(query, &body)?;
    let text = named.0.as_str();
    let id = running(maintained)?;
    let (resyncs, gate) = state.upstreams.resyncs(&id)?;
    let info = match text.parse() {
        Ok(table) => gate.table(TableId(table)),
        Err(_) => gate.table_named(text),
    };
    let placed = state.placements.tables(&id).await?;
    let is_ours = |table: TableId| placed.values().any(|tables| tables.contains(&table));
    let info = info.filter(|info| is_ours(info.id)).ok_or_else(|| {
        ApiFailure::invalid(format!(
            "changefeed {} does not replicate a table {text}; write schema.name as in the source, with capitals and \
             without quotes. If its filter does not want the table, pause the changefeed, update its filter, and resume it",
            id.name
        ))
    })?;
    // Where that cannot be, this says so.
    resyncs.all().await?;
    let name = format!("{}.{}", info.schema, info.name);
    if !resyncs.change(info.id, &ResyncChange::Ask { name: name.clone(), entering: false }).await? {
        return Err(ApiFailure::new(
            codes::SCHEDULER_REQUEST_FAILED,
            format!(
                "table {name} is being copied again already; the list of resyncs tells how far it is, and cancelling \
                 that one lets it begin anew"
            ),
        ));
    }
    // Whoever reads the log by now carries it out.
    if let Ok((now, _)) = state.upstreams.resyncs(&id) {
        now.look();
    }
    told(&state, &id, info.id).await
}

/// A request is to rest.
pub(super) async fn pause(
    state: State<Shared>,
    query: Query<ResyncQuery>,
    maintained: Maintained,
    body: Bytes,
) -> Answer {
    change(
        state,
        Named::new(query.0, &body)?,
        maintained,
        ResyncChange::Pause,
        "is not waiting and is not being copied",
    )
    .await
}

/// It goes on.
pub(super) async fn resume(
    state: State<Shared>,
    query: Query<ResyncQuery>,
    maintained: Maintained,
    body: Bytes,
) -> Answer {
    change(state, Named::new(query.0, &body)?, maintained, ResyncChange::Resume, "is not paused").await
}

/// It is withdrawn.
pub(super) async fn cancel(
    state: State<Shared>,
    query: Query<ResyncQuery>,
    maintained: Maintained,
    body: Bytes,
) -> Answer {
    change(state, Named::new(query.0, &body)?, maintained, ResyncChange::Cancel, "is gone already").await
}

async fn change(
    State(state): State<Shared>,
    named: Named,
    maintained: Maintained,
    change: ResyncChange,
    otherwise: &str,
) -> Answer {
    let id = running(maintained)?;
    let (resyncs, _) = state.upstreams.resyncs(&id)?;
    let all = resyncs.all().await?;
    let one = named.find(&all)?;
    if !resyncs.change(one.table, &change).await? {
        let words = format!("the request for table {} {otherwise}", one.name);
        return Err(ApiFailure::new(codes::SCHEDULER_REQUEST_FAILED, words));
    }
    match change {
        ResyncChange::Cancel => Ok(Json(json!({}))),
        ResyncChange::Pause
        | ResyncChange::Resume
        | ResyncChange::Ask { .. }
        | ResyncChange::LeaveOut { .. }
        | ResyncChange::Fail { .. } => told(&state, &id, one.table).await,
    }
}

/// The request of a table, as it is now.
async fn told(state: &Shared, id: &ChangefeedId, table: TableId) -> Answer {
    let (resyncs, _) = state.upstreams.resyncs(id)?;
    let all = resyncs.all().await?;
    let one = all.iter().find(|one| one.table == table);
    Ok(Json(one.map_or(json!({}), |one| resyncs.shown(one))))
}

/// The changefeed, if somebody maintains it.
fn running(maintained: Maintained) -> Result<ChangefeedId, ApiFailure> {
    maintained.id().map_err(|failure| {
        let advice = "a table is copied again while its changefeed runs: resume the changefeed first";
        failure.advised(codes::MAINTAINER_NOT_FOUND, advice)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resync::tests::waiting;

    #[test]
    fn a_request_is_found_by_the_name_or_the_id_of_its_table_and_the_newest_of_a_name_counts() {
        let all = [waiting(7, "s.t"), waiting(8, "s.u"), waiting(9, "s.t")];
        let find = |text: &str| Named(text.to_owned()).find(&all).ok().map(|one| one.table.0);
        assert_eq!((find("s.t"), find("s.u"), find("7"), find("8")), (Some(9), Some(8), Some(7), Some(8)));
        assert_eq!((find("s.v"), find("10"), find("")), (None, None, None));
    }
}
