//! The state of one changefeed, and what keeps it from getting on.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::HeaderMap;
use coordinator::ChangefeedView;
use heartbeatpb::config::ChangefeedState;
use heartbeatpb::{ChangefeedId, RunningError, WallTime};
use maintainer::{Holder, Standstill};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::changefeed::{error_value, find};
use super::{ApiFailure, ApiState, Shared, facts};

/// Of a node that holds a changefeed and is not heard.
const UNREACHED: &str = "that node is a member of the cluster and is not reached from here; its tables stay with it until \
    the target refuses what it writes, or, where a target cannot do that, until its lease ends";

pub(super) async fn status(
    State(state): State<Shared>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Result<Json<Value>, ApiFailure> {
    let feed = find(&state, &name).await?;
    let facts = facts::of(&state, &feed, &headers).await;
    let mut value = json!({
        "state": feed.info.state.shown().name(),
        "resolved_ts": facts.resolved(feed.checkpoint),
        "checkpoint_ts": feed.checkpoint,
    });
    if let Some((key, error)) = last_error(&feed, facts.time_of(feed.checkpoint)) {
        value[key] = error_value(error);
    }
    if let Some(waits) = &feed.waiting_for {
        value["waiting_for"] = json!(waits);
    }
    if let Some(held) = facts.held {
        value["held_by"] = held;
    }
    Ok(Json(value))
}

/// The error behind the state, unless the changefeed has got past it since.
fn last_error(feed: &ChangefeedView, checkpoint: Option<WallTime>) -> Option<(&'static str, &RunningError)> {
    let key = match feed.info.state {
        ChangefeedState::Failed => "last_error",
        ChangefeedState::Warning | ChangefeedState::Pending => "last_warning",
        ChangefeedState::Normal
        | ChangefeedState::Stopped
        | ChangefeedState::Finished
        | ChangefeedState::Removed
        | ChangefeedState::Uninitialized => return None,
    };
    let error = feed.info.error.as_ref()?;
    let passed = checkpoint.is_some_and(|at| time_of(error).is_some_and(|error| error < at.0));
    (!passed).then_some((key, error))
}

/// Microseconds since 1970, if the error says so.
fn time_of(error: &RunningError) -> Option<i64> {
    let time = OffsetDateTime::parse(&error.time, &Rfc3339).ok()?;
    i64::try_from(time.unix_timestamp_nanos() / 1000).ok()
}

/// What the checkpoint stands at, by its maintainer, if that is here and the changefeed is to run.
pub(super) async fn local_held(state: &ApiState, id: &ChangefeedId, reader: &Value) -> Option<Value> {
    let standstill = state.placements.standstill(id).await.ok()??;
    let mut held = held_value(&standstill, reader);
    if standstill.holder.node().is_some_and(|node| state.unreached.borrow().contains(node)) {
        held["by"] = json!(format!("{}; {UNREACHED}", standstill.holder));
    }
    Some(held)
}

/// A node that gets no further because nothing is read says so itself.
fn held_value(standstill: &Standstill, reader: &Value) -> Value {
    let mut value = json!({
        "seconds": standstill.lasts.as_secs(),
        "kind": standstill.holder.kind(),
        "by": standstill.holder.to_string(),
    });
    if let Some(place) = standstill.holder.place() {
        value["table_id"] = json!(place.table);
        value["dispatcher_id"] = json!(place.dispatcher.to_string());
    }
    if let Holder::Node { node, .. } = &standstill.holder {
        value["node_id"] = json!(node.as_str());
        let problem = reader["reader_problem"].as_str();
        let place = standstill.holder.place();
        if place.is_some_and(|place| reader["resync"]["table_id"] == json!(place.table)) {
            value["kind"] = json!("resync");
            value["by"] = json!(format!("{}: the table is being copied again", standstill.holder));
        } else if place.is_some_and(|place| is_among(&reader["entering"], place.table)) {
            value["kind"] = json!("resync");
            value["by"] = json!(format!(
                "{}: the table has come with rows that are not copied yet; `changefeed resyncs` tells why",
                standstill.holder
            ));
        }
        if reader["connected"] == false || problem.is_some() {
            let problem = problem.unwrap_or("it is not connected");
            value["kind"] = json!("reader");
            value["by"] = json!(format!("the log reader does not read the upstream: {problem}"));
        }
    }
    value
}

fn is_among(tables: &Value, table: heartbeatpb::TableId) -> bool {
    tables.as_array().is_some_and(|tables| tables.contains(&json!(table)))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use heartbeatpb::{DispatcherId, TableId, Ts};

    use super::*;

    fn standstill(holder: Holder) -> Standstill {
        Standstill { checkpoint: Ts(7), lasts: Duration::from_secs(40), holder }
    }

    #[test]
    fn a_node_is_not_blamed_for_a_log_that_nobody_reads() {
        let node = Holder::Node { node: "n1".into(), slowest: None, waits_at: None };
        let value =
            held_value(&standstill(node.clone()), &json!({ "connected": true, "reader_problem": null }));
        assert_eq!(
            value,
            json!({ "seconds": 40, "kind": "node", "by": "node n1 has got no further", "node_id": "n1" })
        );
        let down = json!({ "connected": false, "reader_problem": "connection refused" });
        let value = held_value(&standstill(node), &down);
        assert_eq!((&value["kind"], &value["seconds"]), (&json!("reader"), &json!(40)));
        assert!(value["by"].as_str().unwrap().ends_with("connection refused"), "{value}");
        let value = held_value(&standstill(Holder::Upstream), &down);
        assert_eq!(value["kind"], "upstream", "what the maintainer knows itself stays");
    }

    #[test]
    fn a_table_that_is_copied_again_is_what_holds_and_no_other_one_is() {
        let place = maintainer::Place { dispatcher: DispatcherId::new(1, 2), table: TableId(7) };
        let held = |table: i64| {
            let node = Holder::Node { node: "n1".into(), slowest: Some(place), waits_at: None };
            held_value(&standstill(node), &json!({ "connected": true, "resync": { "table_id": table } }))
        };
        let value = held(7);
        assert_eq!((&value["kind"], &value["table_id"]), (&json!("resync"), &json!(7)));
        assert!(value["by"].as_str().unwrap().ends_with("is being copied again"), "{value}");
        assert_eq!(held(8)["kind"], "node");
        let node = Holder::Node { node: "n1".into(), slowest: Some(place), waits_at: None };
        let value =
            held_value(&standstill(node), &json!({ "connected": true, "resync": null, "entering": [5, 7] }));
        assert_eq!((&value["kind"], &value["table_id"]), (&json!("resync"), &json!(7)));
        assert!(value["by"].as_str().unwrap().contains("not copied yet"), "{value}");
        let nobody = Holder::Node { node: "n1".into(), slowest: None, waits_at: None };
        assert_eq!(held_value(&standstill(nobody), &json!({ "connected": true }))["kind"], "node");
    }
}
