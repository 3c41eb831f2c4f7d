//! Errors of the HTTP API: one body, one table from code to status (api-cli-config §3).

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use heartbeatpb::codes;
use serde_json::json;

/// An error answer. Its text holds no secret.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct ApiFailure {
    /// Stable code such as `CDC:ErrAPIInvalidParam`.
    pub(crate) code: String,
    /// Text for people.
    pub(crate) message: String,
    /// When it does not follow from the code.
    status: Option<StatusCode>,
}

/// Codes that are the caller's to mend, beside those that need a person.
const BAD_REQUEST: [&str; 31] = [
    "CDC:ErrAPIInvalidParam",
    "CDC:ErrSinkURIInvalid",
    "CDC:ErrStartTsBeforeGC",
    "CDC:ErrChangeFeedNotExists",
    "CDC:ErrChangeFeedAlreadyExists",
    "CDC:ErrTargetTsBeforeStartTs",
    "CDC:ErrTableIneligible",
    "CDC:ErrFilterRuleInvalid",
    "CDC:ErrChangefeedUpdateRefused",
    "CDC:ErrMySQLConnectionError",
    "CDC:ErrMySQLInvalidConfig",
    "CDC:ErrStorageSinkInvalidConfig",
    "CDC:ErrSinkUnknownProtocol",
    "CDC:ErrCaptureNotExist",
    "CDC:ErrSchedulerRequestFailed",
    "CDC:ErrActiveActiveTSOIndexIncompatible",
    "CDC:ErrInvalidReplicaConfig",
    "CDC:ErrSameUpstreamDownstream",
    "CDC:ErrUpstreamURIInvalid",
    "CDC:ErrUpstreamUnreachable",
    "CDC:ErrUpstreamUnavailable",
    "CDC:ErrUpstreamAuthFailed",
    "CDC:ErrUpstreamDatabaseNotExists",
    "CDC:ErrUpstreamTLSFailed",
    "CDC:ErrUpstreamPrivilege",
    "CDC:ErrUpstreamPrerequisite",
    "CDC:ErrUpstreamSlotConflict",
    "CDC:ErrSinkUnavailable",
    "CDC:ErrSinkPermission",
    "CDC:ErrSinkAuth",
    "CDC:ErrTargetNotEmpty",
];

/// Codes that mean "ask again in a moment".
const UNAVAILABLE: [&str; 7] = [
    "CDC:ErrChangeFeedCreationUnfinished",
    "CDC:ErrOwnerNotFound",
    "CDC:ErrClusterIsUnhealthy",
    "CDC:ErrNotInitialized",
    "CDC:ErrServerIsNotReady",
    "CDC:ErrCaptureNotInitialized",
    "CDC:ErrNotOwner",
];

impl ApiFailure {
    /// An error with a code.
    pub(crate) fn new(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code: code.into(), message: message.into(), status: None }
    }

    /// A request that cannot be understood or is not allowed.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new("CDC:ErrAPIInvalidParam", message)
    }

    /// The same with what to do, if it is the failure of this code.
    pub(crate) fn advised(mut self, code: &str, words: &str) -> Self {
        if self.code == code {
            self.message.push_str("; ");
            self.message.push_str(words);
        }
        self
    }

    /// A body over the limit.
    pub(crate) fn too_large() -> Self {
        let words = format!("the request body is too large: at most {} bytes", super::MAX_BODY_BYTES);
        Self { status: Some(StatusCode::PAYLOAD_TOO_LARGE), ..Self::invalid(words) }
    }

    fn status(&self) -> StatusCode {
        if let Some(status) = self.status {
            return status;
        }
        match self.code.as_str() {
            super::auth::NOT_FOUND | super::auth::UNAUTHORIZED => return StatusCode::UNAUTHORIZED,
            "CDC:ErrAPINotFound" => return StatusCode::NOT_FOUND,
            codes::API_GONE => return StatusCode::GONE,
            codes::API_NOT_SUPPORTED => return StatusCode::NOT_IMPLEMENTED,
            codes::API_TOO_MANY => return StatusCode::TOO_MANY_REQUESTS,
            _ => {}
        }
        if BAD_REQUEST.contains(&self.code.as_str()) || codes::needs_person(&self.code) {
            StatusCode::BAD_REQUEST
        } else if UNAVAILABLE.contains(&self.code.as_str()) {
            StatusCode::SERVICE_UNAVAILABLE
        } else {
            StatusCode::INTERNAL_SERVER_ERROR
        }
    }
}

/// Most of a refusal of the web framework that is repeated, in bytes.
const FRAMEWORK_WORDS: usize = 4096;

/// Refusals of the web framework, of a path, a query or a body, in the form of all others.
pub(crate) async fn in_json(response: Response) -> Response {
    let status = response.status();
    let json_already =
        response.headers().get(header::CONTENT_TYPE).is_some_and(|kind| kind == "application/json");
    if !status.is_client_error() || json_already {
        return response;
    }
    if status == StatusCode::PAYLOAD_TOO_LARGE {
        return ApiFailure::too_large().into_response();
    }
    let words = axum::body::to_bytes(response.into_body(), FRAMEWORK_WORDS).await.unwrap_or_default();
    let words = String::from_utf8_lossy(&words).into_owned();
    ApiFailure { status: Some(status), ..ApiFailure::invalid(words) }.into_response()
}

impl IntoResponse for ApiFailure {
    fn into_response(self) -> Response {
        let status = self.status();
        let text = if self.code.is_empty() {
            self.message.clone()
        } else {
            format!("[{}]{}", self.code, self.message)
        };
        let mut response =
            (status, Json(json!({ "error_msg": text, "error_code": self.code }))).into_response();
        let headers = response.headers_mut();
        if status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"millrace\""));
        }
        // For the log and the record of the operation.
        response.extensions_mut().insert(self);
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    // behaviour: api-M-4
    // behaviour: api-M-9
    fn the_status_follows_from_the_code_and_from_nothing_else() {
        for (code, status) in [
            ("CDC:ErrAPIInvalidParam", 400),
            ("CDC:ErrInvalidReplicaConfig", 400),
            ("CDC:ErrChangeFeedNotExists", 400),
            ("CDC:ErrCredentialNotFound", 401),
            ("CDC:ErrUnauthorized", 401),
            ("CDC:ErrAPINotFound", 404),
            ("CDC:ErrAPIGone", 410),
            ("CDC:ErrAPITooManyRequests", 429),
            ("CDC:ErrAPINotSupported", 501),
            ("CDC:ErrOwnerNotFound", 503),
            ("CDC:ErrClusterIsUnhealthy", 503),
            ("CDC:ErrMaintainerNotFounded", 500),
            ("CDC:ErrInternal", 500),
            ("", 500),
        ] {
            // Codes in the text are words like others.
            let failure = ApiFailure::new(code, "after CDC:ErrAPIInvalidParam came CDC:ErrOwnerNotFound");
            let response = failure.into_response();
            assert_eq!(response.status().as_u16(), status, "{code}");
            assert_eq!(response.headers().contains_key(header::RETRY_AFTER), status == 503, "{code}");
            assert_eq!(response.headers().contains_key(header::WWW_AUTHENTICATE), status == 401, "{code}");
        }
        assert_eq!(ApiFailure::too_large().into_response().status().as_u16(), 413);
    }
}
