//! What people asked to be changed: the last hundred, and those that go on behind an answer (api-cli-config §2, §14).

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use heartbeatpb::WallTime;
use metrics::{Gauge, gauge};
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::{ApiFailure, Shared};

/// How many finished operations are kept for looking at.
const KEPT: usize = 100;
/// How many answers are kept for whoever asks later.
const MOST_ANSWERS: usize = 1000;
/// How long they are kept.
const ANSWER_KEPT: Duration = Duration::from_secs(24 * 3600);
/// Longest text of a record, in characters.
const LONGEST: usize = 256;
/// Longest key of an idempotent request.
pub(super) const LONGEST_KEY: usize = 256;

tokio::task_local! {
    /// What the handler of this request tells about it.
    static NOTE: RefCell<Note>;
}

/// What a handler tells of an operation. It has no secrets.
#[derive(Clone, Debug, Default)]
pub(super) struct Note {
    pub(super) changefeed: Option<String>,
    pub(super) details: String,
}

/// Tells what the operation of this request is about; nothing outside of one.
pub(super) fn note(changefeed: &str, details: impl Into<String>) {
    let _ = NOTE.try_with(|note| {
        *note.borrow_mut() = Note { changefeed: Some(changefeed.to_owned()), details: details.into() };
    });
}

/// Runs a handler and returns what it told beside its answer.
pub(super) async fn noted<T>(run: impl Future<Output = T>) -> (T, Note) {
    NOTE.scope(RefCell::new(Note::default()), async {
        let out = run.await;
        (out, NOTE.with(|note| note.borrow().clone()))
    })
    .await
}

/// One finished operation.
#[derive(Clone, Debug)]
pub(super) struct Record {
    pub(super) operation: &'static str,
    pub(super) changefeed: String,
    pub(super) user: String,
    pub(super) status: StatusCode,
    pub(super) details: String,
    pub(super) error: String,
}

/// An answer that is kept.
#[derive(Clone, Debug)]
enum Kept {
    Running,
    Done { status: StatusCode, body: Bytes },
}

/// Operations of this process.
#[derive(Default)]
pub(crate) struct Operations {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    events: u64,
    last: VecDeque<Value>,
    /// Their series, in the same order.
    shown: VecDeque<Gauge>,
    answers: BTreeMap<String, (Instant, Kept)>,
    keys: BTreeMap<String, (Instant, String)>,
}

/// What is known of an idempotent request.
pub(super) enum Seen {
    /// Nothing: it is to be done, as this operation.
    New(String),
    /// It was asked for before, as this operation.
    Before(String),
}

/// One line of at most 256 characters.
fn short(text: &str) -> String {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if text.chars().count() <= LONGEST {
        return text;
    }
    text.chars().take(LONGEST - 3).chain("...".chars()).collect()
}

/// Shows when an operation ended, as long as its handle is kept.
#[expect(clippy::cast_precision_loss, reason = "milliseconds fit a float until the year 287396")]
fn shown(record: &Record, [result, details, error]: [&str; 3], event: u64) -> Gauge {
    let gauge = gauge!(crate::metrics::OPERATION_TIME, "namespace" => "default",
        "changefeed" => short(&record.changefeed), "operation" => record.operation, "result" => result.to_owned(),
        "username" => short(&record.user), "details" => details.to_owned(), "error" => error.to_owned(),
        "event_id" => event.to_string());
    gauge.set(WallTime::now().millis() as f64);
    gauge
}

impl Operations {
    /// Keeps a record, the oldest goes.
    pub(super) fn record(&self, record: &Record) {
        let succeeded = record.status.as_u16() < 400;
        let result = if succeeded { "success" } else { "failed" };
        let (details, error) = (short(&record.details), short(&record.error));
        let mut inner = self.inner.lock();
        inner.events += 1;
        let event = inner.events;
        tracing::info!(
            operation = record.operation,
            changefeed = record.changefeed,
            user = record.user,
            result,
            details,
            error,
            event,
            "operation"
        );
        if inner.last.len() == KEPT {
            inner.last.pop_front();
            inner.shown.pop_front();
        }
        inner.shown.push_back(shown(record, [result, &details, &error], event));
        inner.last.push_back(json!({
            "event": event, "time": crate::wiring::rfc3339_now(), "operation": record.operation,
            "keyspace": "default", "changefeed": short(&record.changefeed), "user": short(&record.user),
            "result": result, "details": details, "error": error,
        }));
    }

    /// A new operation whose answer is kept. With a key of its asker, the same one for the same key.
    pub(super) fn begin(&self, key: Option<String>) -> Seen {
        let now = Instant::now();
        let mut inner = self.inner.lock();
        inner.forget(now);
        if let Some(key) = &key
            && let Some((_, id)) = inner.keys.get(key)
        {
            return Seen::Before(id.clone());
        }
        let id = uuid::Uuid::new_v4().to_string();
        if let Some(key) = key {
            inner.keys.insert(key, (now, id.clone()));
        }
        inner.answers.insert(id.clone(), (now, Kept::Running));
        Seen::New(id)
    }

    /// Keeps the answer of an operation. One that may go differently the next time is forgotten with its key.
    pub(super) fn end(&self, id: &str, status: StatusCode, body: Bytes) {
        let mut inner = self.inner.lock();
        if status.is_server_error() || status == StatusCode::UNAUTHORIZED {
            inner.keys.retain(|_, (_, of)| of != id);
        }
        if let Some((_, kept)) = inner.answers.get_mut(id) {
            *kept = Kept::Done { status, body };
        }
    }

    /// The answer of an operation, if it has ended: the same as its asker got.
    pub(super) fn answer(&self, id: &str) -> Option<Response> {
        match &self.inner.lock().answers.get(id)?.1 {
            Kept::Running => None,
            Kept::Done { status, body } => {
                let kind = [(axum::http::header::CONTENT_TYPE, "application/json")];
                Some((*status, kind, body.clone()).into_response())
            }
        }
    }

    fn value(&self, id: &str) -> Option<Value> {
        let inner = self.inner.lock();
        Some(match &inner.answers.get(id)?.1 {
            Kept::Running => json!({ "id": id, "state": "running" }),
            Kept::Done { status, body } => json!({
                "id": id, "state": if status.is_success() { "success" } else { "failed" },
                "status": status.as_u16(),
                "result": serde_json::from_slice::<Value>(body).unwrap_or(Value::Null),
            }),
        })
    }
}

impl Inner {
    fn forget(&mut self, now: Instant) {
        let fresh = |at: &Instant| now.duration_since(*at) < ANSWER_KEPT;
        self.answers.retain(|_, (at, _)| fresh(at));
        while self.answers.len() >= MOST_ANSWERS {
            let oldest = self.answers.iter().min_by_key(|(_, (at, _))| *at).map(|(id, _)| id.clone());
            oldest.and_then(|id| self.answers.remove(&id));
        }
        let answers = &self.answers;
        self.keys.retain(|_, (at, id)| fresh(at) && answers.contains_key(id));
    }
}

/// The last operations, the newest first.
pub(super) async fn list(State(state): State<Shared>) -> Json<Value> {
    let items: Vec<Value> = state.access.operations.inner.lock().last.iter().rev().cloned().collect();
    Json(json!({ "total": items.len(), "items": items }))
}

/// One operation that was answered before it had ended.
pub(super) async fn get(
    State(state): State<Shared>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiFailure> {
    let value = state.access.operations.value(&id);
    value.map(Json).ok_or_else(|| {
        ApiFailure::new(
            "CDC:ErrAPINotFound",
            "there is no such operation: it is older than a day, or another node led the cluster then",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(operation: &'static str, status: u16, error: &str) -> Record {
        Record {
            operation,
            changefeed: "a".to_owned(),
            user: "anonymous".to_owned(),
            status: StatusCode::from_u16(status).unwrap(),
            details: "start_ts=1\n target_ts=2".to_owned(),
            error: error.to_owned(),
        }
    }

    #[test]
    // behaviour: api-M-6
    fn every_operation_leaves_one_record_and_the_oldest_goes() {
        let operations = Operations::default();
        operations.record(&record("create", 200, ""));
        operations.record(&record("pause", 400, &"ä ".repeat(400)));
        let last = operations.inner.lock().last.clone();
        assert_eq!(
            (&last[0]["result"], &last[0]["details"], &last[0]["user"]),
            (&json!("success"), &json!("start_ts=1 target_ts=2"), &json!("anonymous"))
        );
        assert_eq!(last[1]["result"], "failed");
        let error = last[1]["error"].as_str().unwrap();
        assert!(error.chars().count() == 256 && error.ends_with("..."), "{error}");
        for _ in 0..99 {
            operations.record(&record("resume", 200, ""));
        }
        let inner = operations.inner.lock();
        assert_eq!(
            (inner.last.len(), inner.shown.len(), &inner.last[0]["event"], &inner.last[99]["event"]),
            (100, 100, &json!(2), &json!(101))
        );
    }

    #[test]
    fn a_key_stands_for_one_operation_until_that_fails_for_a_reason_that_passes() {
        let operations = Operations::default();
        let id = |seen| match seen {
            Seen::New(id) => (true, id),
            Seen::Before(id) => (false, id),
        };
        let (new, first) = id(operations.begin(Some("k".to_owned())));
        assert!(new && operations.answer(&first).is_none());
        assert_eq!(id(operations.begin(Some("k".to_owned()))), (false, first.clone()));
        assert_eq!(operations.value(&first).unwrap()["state"], "running");
        operations.end(&first, StatusCode::OK, Bytes::from_static(b"{\"id\":1}"));
        assert_eq!(operations.value(&first).unwrap()["result"], json!({ "id": 1 }));
        assert_eq!(operations.answer(&first).unwrap().status(), StatusCode::OK);
        assert_eq!(id(operations.begin(Some("k".to_owned()))), (false, first));

        let (_, other) = id(operations.begin(Some("l".to_owned())));
        operations.end(&other, StatusCode::SERVICE_UNAVAILABLE, Bytes::new());
        let (new, again) = id(operations.begin(Some("l".to_owned())));
        assert!(new && again != other, "it is tried again");
        assert!(operations.value("none").is_none());
        for _ in 0..2 * MOST_ANSWERS {
            operations.begin(None);
        }
        assert!(operations.inner.lock().answers.len() <= MOST_ANSWERS);
    }
}
