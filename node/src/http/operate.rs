//! The way of a request that changes a changefeed: stored before it is carried out, carried out to its end whether or not
//! its asker stays, and answered once for each key (api-cli-config §2, §14).

use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use coordinator::CoordinatorHandle;
use coordinator::operations::{Asked, Begin, End, OperationDoc, OperationState};
use heartbeatpb::{Gid, WallTime, codes};
use serde_json::{Value, json};
use tokio::sync::oneshot;
use xxhash_rust::xxh3::xxh3_128;

use super::changefeed::{self, KEYSPACE};
use super::operations::{self, Note, Operations, short};
use super::{ApiFailure, Shared, forward, leader};

/// What is asked for, and by whom.
#[derive(Clone, Debug)]
pub(super) struct Wish {
    /// `create`, `pause`, ….
    pub(super) operation: &'static str,
    /// Name of the changefeed; empty when the body has it.
    pub(super) changefeed: String,
    pub(super) user: String,
}

impl Wish {
    /// As it is remembered.
    pub(super) fn asked(&self) -> Asked {
        Asked {
            operation: self.operation,
            keyspace: KEYSPACE.to_owned(),
            changefeed: short(&self.changefeed),
            user: self.user.clone(),
            now_ms: WallTime::now().millis(),
            ..Asked::default()
        }
    }
}

/// Whether the asker does not wait, and the key under which the answer is kept.
fn wishes(headers: &HeaderMap) -> Result<(bool, Option<String>), ApiFailure> {
    let wants = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let later = wants("prefer").is_some_and(|prefer| {
        prefer.split([',', ';']).any(|word| word.trim().eq_ignore_ascii_case("respond-async"))
    });
    let Some(key) = headers.get("idempotency-key") else { return Ok((later, None)) };
    let key = key.to_str().ok().filter(|key| (1..=operations::LONGEST_KEY).contains(&key.len()));
    let words = format!("Idempotency-Key has 1 to {} visible ASCII characters", operations::LONGEST_KEY);
    Ok((later, Some(key.ok_or_else(|| ApiFailure::invalid(words))?.to_owned())))
}

/// Reads the body of a request.
async fn opened(request: Request) -> Result<(Request, Bytes), ApiFailure> {
    let (parts, body) = request.into_parts();
    let bytes = forward::read(body).await?;
    Ok((Request::from_parts(parts, Body::from(bytes.clone())), bytes))
}

/// The name that a creation asks for, if its body can be read.
fn name_of_new(body: &[u8]) -> Option<String> {
    let body: Value = serde_json::from_slice(body).ok()?;
    body["changefeed_id"].as_str().map(str::to_owned)
}

/// The incarnation that a name means now.
async fn meant(leader: &CoordinatorHandle, name: &str) -> Result<Option<Gid>, ApiFailure> {
    match leader.get(KEYSPACE, name).await {
        Ok(feed) => Ok(Some(feed.info.id.gid)),
        Err(coordinator::Error::NotExists(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Carries a change out, whether or not the asker stays: what was begun has to end.
pub(super) async fn operate(
    state: &Shared,
    wish: Wish,
    request: Request,
    next: Next,
) -> Result<Response, ApiFailure> {
    let (later, key) = wishes(request.headers())?;
    let path = request.uri().path().to_owned();
    let (request, body) = if wish.operation == "create" || key.is_some() {
        opened(request).await?
    } else {
        (request, Bytes::new())
    };
    let key = key.map(|key| {
        let name = format!("{} {} {path} {key}", wish.user, request.method());
        // Not for safety: it tells an asker that she used a key twice by mistake.
        (name, format!("{:032x}", xxh3_128(&body)))
    });
    let asked =
        Asked { id: uuid::Uuid::new_v4().to_string(), keeps: later || key.is_some(), key, ..wish.asked() };
    let named = if wish.operation == "create" {
        // One without a name is named as its operation, so that a repetition means the same.
        name_of_new(&body).unwrap_or_else(|| asked.id.clone())
    } else {
        wish.changefeed
    };
    let (tell, begun) = oneshot::channel();
    let old = path.starts_with("/api/v1/");
    let carrying = tokio::spawn(carry(Arc::clone(state), asked, named, old, (request, next), tell));
    // Nothing is told when it is answered without having been begun.
    if later && let Ok(id) = begun.await {
        return Ok(accepted(&id));
    }
    carrying.await.map_err(|error| {
        tracing::error!(%error, "an operation ended abnormally");
        ApiFailure::new("CDC:ErrInternal", "the operation ended abnormally; the log of the node says why")
    })?
}

/// Begins an operation, tells its id, and carries it out; or answers what is known of it.
async fn carry(
    state: Shared,
    asked: Asked,
    named: String,
    old: bool,
    (request, next): (Request, Next),
    tell: oneshot::Sender<String>,
) -> Result<Response, ApiFailure> {
    let leader = leader(&state)?;
    let gid = if asked.operation == "create" { Some(Gid::random()) } else { meant(&leader, &named).await? };
    let asked = Asked { changefeed: short(&named), gid, ..asked };
    let doc = match state.access.operations.begin(&leader, asked).await? {
        Begin::New { doc, .. } | Begin::Again { doc, .. } => doc,
        Begin::Before(doc) if doc.has_ended() => return Ok(told_again(&state, &doc, old).await),
        Begin::Before(doc) => return Ok(accepted(&doc.id)),
        Begin::Applied(doc) => {
            let done = OperationDoc { state: OperationState::Success, ..doc.clone() };
            let answer = told_again(&state, &done, old).await;
            return Ok(end(&state, &leader, doc, Note::default(), answer).await);
        }
        Begin::Gone(doc) => {
            let answer = gone(&doc, old);
            return Ok(end(&state, &leader, doc, Note::default(), answer).await);
        }
        // Errors of `begin`.
        Begin::OtherRequest | Begin::Full => return Err(ApiFailure::invalid("the operation was not begun")),
    };
    // Whoever asked may have left.
    let _ = tell.send(doc.id.clone());
    let (response, note) = operations::carried_out(&leader, &doc, next.run(request)).await;
    Ok(end(&state, &leader, doc, note, response).await)
}

/// Stores an answer before its asker has it.
async fn end(
    state: &Shared,
    leader: &CoordinatorHandle,
    doc: OperationDoc,
    note: Note,
    response: Response,
) -> Response {
    let error = response.extensions().get::<ApiFailure>().map(|failure| failure.message.clone());
    let (parts, body) = response.into_parts();
    let body: Bytes = axum::body::to_bytes(body, super::MAX_BODY_BYTES).await.unwrap_or_default();
    let end = End {
        status: parts.status.as_u16(),
        answer: String::from_utf8_lossy(&body).into_owned(),
        changefeed: note.changefeed.unwrap_or_else(|| doc.changefeed.clone()),
        details: note.details,
        error: error.unwrap_or_default(),
        leftover: note.leftover,
        now_ms: WallTime::now().millis(),
    };
    Operations::end(state, leader, doc, end).await;
    Response::from_parts(parts, Body::from(body))
}

/// The answer of an operation that has ended; the same as its asker got, if that is kept.
async fn told_again(state: &Shared, doc: &OperationDoc, old: bool) -> Response {
    let status = StatusCode::from_u16(doc.status).ok();
    if let (Some(status), Some(answer)) = (status, &doc.answer) {
        let kind = [(header::CONTENT_TYPE, "application/json")];
        return (status, kind, answer.clone()).into_response();
    }
    if doc.state != OperationState::Success {
        return ApiFailure::new("CDC:ErrInternal", format!("the operation had failed: {}", doc.error))
            .into_response();
    }
    let status = status.unwrap_or(if old { StatusCode::ACCEPTED } else { StatusCode::OK });
    let shows = matches!(doc.operation.as_str(), "create" | "update");
    let body = match changefeed::shown(state, &doc.changefeed).await {
        Ok(value) if shows => value,
        Ok(_) => json!({}),
        // Removed since.
        Err(failure) if failure.code == codes::CHANGEFEED_NOT_EXISTS => json!({}),
        // Whoever asks again hears it.
        Err(failure) => return failure.into_response(),
    };
    (status, axum::Json(body)).into_response()
}

/// The answer about a changefeed that was removed before the request could be carried out.
fn gone(doc: &OperationDoc, old: bool) -> Response {
    if doc.operation == "delete" {
        let status = if old { StatusCode::ACCEPTED } else { StatusCode::OK };
        return (status, axum::Json(json!({}))).into_response();
    }
    ApiFailure::new(
        codes::CHANGEFEED_NOT_EXISTS,
        format!("the changefeed {} that was meant has been removed since", doc.changefeed),
    )
    .into_response()
}

fn accepted(id: &str) -> Response {
    let location = [(header::LOCATION, format!("/api/v2/operations/{id}"))];
    (StatusCode::ACCEPTED, location, axum::Json(json!({ "operation_id": id }))).into_response()
}
