//! What people asked to be changed: the last hundred, those that go on behind an answer, and answers that are kept
//! (api-cli-config §2, §14). They are in the metadata store: [`coordinator::operations`] tells why and how.

mod keeper;

use std::cell::RefCell;

use axum::Json;
use axum::extract::{Path, State};
use coordinator::CoordinatorHandle;
use coordinator::operations::{OperationDoc, OperationLog, OperationState};
use heartbeatpb::Gid;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{ApiFailure, Shared, leader as leader_of};

pub(crate) use keeper::Operations;

/// Longest text of a record, in characters.
const LONGEST: usize = 256;
/// Longest key of an idempotent request.
pub(super) const LONGEST_KEY: usize = 256;

tokio::task_local! {
    /// The operation that the handler of this request carries out.
    static CURRENT: Current;
}

/// An operation that is carried out.
struct Current {
    /// Under which it was begun: another coordinator, the next one of this process included, must not carry it on.
    leader: CoordinatorHandle,
    doc: OperationDoc,
    note: RefCell<Note>,
}

/// What a handler tells of an operation. It has no secrets.
#[derive(Clone, Debug, Default)]
pub(super) struct Note {
    pub(super) changefeed: Option<String>,
    pub(super) details: String,
    /// The incarnations for which something may be there upstream that nobody needs.
    pub(super) leftover: Vec<Gid>,
}

/// Tells what the operation of this request is about; nothing outside of one.
pub(super) fn note(changefeed: &str, details: impl Into<String>) {
    let _ = CURRENT.try_with(|current| {
        let mut note = current.note.borrow_mut();
        note.changefeed = Some(changefeed.to_owned());
        note.details = details.into();
    });
}

/// Tells that something is about to be made upstream for an incarnation: if nobody says otherwise, it is left behind when
/// this operation fails.
pub(super) fn makes(gid: Gid) {
    let _ = CURRENT.try_with(|current| {
        let mut note = current.note.borrow_mut();
        if !note.leftover.contains(&gid) {
            note.leftover.push(gid);
        }
    });
}

/// Tells that nothing is there upstream any more for an incarnation.
pub(super) fn cleared(gid: Gid) {
    let _ = CURRENT.try_with(|current| current.note.borrow_mut().leftover.retain(|left| *left != gid));
}

/// The coordinator under which the operation of this request was begun; none outside of one.
pub(super) fn leader() -> Option<CoordinatorHandle> {
    CURRENT.try_with(|current| current.leader.clone()).ok()
}

/// What the operation of this request is; none outside of one.
pub(super) fn current() -> Option<OperationDoc> {
    CURRENT.try_with(|current| current.doc.clone()).ok()
}

/// Runs the handler of an operation and returns what it told beside its answer.
pub(super) async fn carried_out<T>(
    leader: &CoordinatorHandle,
    doc: &OperationDoc,
    run: impl Future<Output = T>,
) -> (T, Note) {
    let leader = leader.for_operation(doc.clone());
    let note = Note { leftover: doc.leftover.clone(), ..Note::default() };
    let current = Current { leader, doc: doc.clone(), note: RefCell::new(note) };
    CURRENT
        .scope(current, async {
            let out = run.await;
            (out, CURRENT.with(|current| current.note.borrow().clone()))
        })
        .await
}

/// One line of at most 256 characters.
pub(super) fn short(text: &str) -> String {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if text.chars().count() <= LONGEST {
        return text;
    }
    text.chars().take(LONGEST - 3).chain("...".chars()).collect()
}

/// How far an operation is, in a word.
fn state_of(log: &OperationLog, doc: &OperationDoc) -> &'static str {
    match doc.state {
        OperationState::Success => "success",
        OperationState::Failed => "failed",
        OperationState::Unknown => "unknown",
        OperationState::Running | OperationState::Applied if log.is_under_way(doc) => "running",
        // The coordinator that had begun it was replaced: what it had stored is done, what it had not is not.
        OperationState::Running => "interrupted",
        OperationState::Applied => "success",
    }
}

fn time_of(doc: &OperationDoc) -> String {
    let millis = if doc.ended_ms == 0 { doc.begun_ms } else { doc.ended_ms };
    let time = OffsetDateTime::from_unix_timestamp_nanos(i128::from(millis) * 1_000_000);
    time.ok().and_then(|time| time.format(&Rfc3339).ok()).unwrap_or_default()
}

/// An operation in the list.
fn line(log: &OperationLog, doc: &OperationDoc) -> Value {
    json!({
        "id": doc.id, "event": doc.event, "time": time_of(doc), "operation": doc.operation,
        "keyspace": doc.keyspace, "changefeed": doc.changefeed, "user": doc.user,
        "result": state_of(log, doc), "details": doc.details, "error": doc.error,
    })
}

/// The last operations, the newest first; those that were refused for want of a user among them.
pub(super) async fn list(State(state): State<Shared>) -> Result<Json<Value>, ApiFailure> {
    let leader = leader_of(&state)?;
    let items = state.access.operations.last(&leader, line).await?;
    Ok(Json(json!({ "total": items.len(), "items": items })))
}

/// One operation, with its answer when somebody may ask for it.
pub(super) async fn get(
    State(state): State<Shared>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiFailure> {
    let leader = leader_of(&state)?;
    let found = state.access.operations.find(&leader, &id, |log, doc| {
        let mut value = line(log, doc);
        value["state"] = value["result"].take();
        if let Some(fields) = value.as_object_mut() {
            fields.remove("result");
        }
        if doc.has_ended() {
            value["status"] = json!(doc.status);
            let answer = doc.answer.as_deref().and_then(|answer| serde_json::from_str(answer).ok());
            value["result"] = answer.unwrap_or(Value::Null);
        }
        value
    });
    found.await?.map(Json).ok_or_else(|| {
        ApiFailure::new("CDC:ErrAPINotFound", "there is no such operation, or it is older than a day")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_one_line_of_at_most_256_characters() {
        assert_eq!(short("start_ts=1\n target_ts=2"), "start_ts=1 target_ts=2");
        let cut = short(&"ä ".repeat(400));
        assert!(cut.chars().count() == 256 && cut.ends_with("..."), "{cut}");
        assert_eq!(short(&"ä".repeat(256)).chars().count(), 256);
    }

    #[test]
    fn what_a_replaced_coordinator_left_is_told_as_done_or_interrupted() {
        let doc = OperationDoc { id: "a".to_owned(), event: 1, coordinator: 7, ..OperationDoc::default() };
        let log = OperationLog::new(9, Vec::new(), Vec::new());
        assert_eq!(state_of(&log, &doc), "interrupted");
        assert_eq!(state_of(&log, &doc.applied()), "success");
        let own = OperationDoc { coordinator: 9, ..doc };
        assert_eq!(state_of(&log, &own), "running");
        assert_eq!(state_of(&log, &own.applied()), "running", "its asker has no answer yet");
    }
}
