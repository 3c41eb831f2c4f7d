//! A small JSON client of the HTTP API.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request, StatusCode, Uri};
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;

/// A call may wait for a changefeed to stop; a person interrupts earlier if she wants to.
const CALL_TIMEOUT: Duration = Duration::from_secs(120);

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApiError {
    /// The server address cannot be used.
    #[error("{0:?} is not a server address; write for example http://127.0.0.1:8300")]
    Address(String),
    /// No answer.
    #[error("no answer from {server}: {what}; is `millrace server` running there?")]
    Unreachable {
        /// The server.
        server: String,
        /// What went wrong.
        what: String,
    },
    /// The server answered with an error.
    #[error("{message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// Stable code; empty when the server gave none.
        code: String,
        /// Text for people.
        message: String,
    },
}

impl ApiError {
    /// The server's stable error code, if it gave one.
    #[must_use]
    pub fn code(&self) -> &str {
        match self {
            ApiError::Refused { code, .. } => code,
            ApiError::Address(_) | ApiError::Unreachable { .. } => "",
        }
    }
}

/// A client of one server.
#[derive(Debug)]
pub struct Client {
    base: String,
    http: HttpClient<HttpConnector, Full<Bytes>>,
}

impl Client {
    /// A client of `server`, an `http://host:port` address.
    ///
    /// # Errors
    /// When the address has another form.
    pub fn new(server: &str) -> Result<Self, ApiError> {
        let base = server.trim_end_matches('/').to_owned();
        let valid = base.parse::<Uri>().is_ok_and(|uri| {
            uri.scheme_str() == Some("http") && uri.authority().is_some_and(|a| a.host() != "")
        });
        if !valid {
            return Err(ApiError::Address(server.to_owned()));
        }
        Ok(Self { base, http: HttpClient::builder(TokioExecutor::new()).build_http() })
    }

    /// GET.
    ///
    /// # Errors
    /// When there is no answer or it is an error.
    pub async fn get(&self, path: &str) -> Result<Value, ApiError> {
        self.call(Method::GET, path, None).await
    }

    /// POST with a JSON body.
    ///
    /// # Errors
    /// When there is no answer or it is an error.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Value, ApiError> {
        self.call(Method::POST, path, Some(body)).await
    }

    /// PUT with a JSON body.
    ///
    /// # Errors
    /// When there is no answer or it is an error.
    pub async fn put(&self, path: &str, body: &Value) -> Result<Value, ApiError> {
        self.call(Method::PUT, path, Some(body)).await
    }

    /// DELETE.
    ///
    /// # Errors
    /// When there is no answer or it is an error.
    pub async fn delete(&self, path: &str) -> Result<Value, ApiError> {
        self.call(Method::DELETE, path, None).await
    }

    async fn call(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value, ApiError> {
        let unreachable = |what: String| ApiError::Unreachable { server: self.base.clone(), what };
        let payload = body.map_or_else(Bytes::new, |body| Bytes::from(body.to_string()));
        let request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header("content-type", "application/json")
            .header("x-client-version", env!("CARGO_PKG_VERSION"))
            .body(Full::new(payload))
            .map_err(|_| ApiError::Address(self.base.clone()))?;
        let answer = tokio::time::timeout(CALL_TIMEOUT, self.http.request(request))
            .await
            .map_err(|_| unreachable(format!("timed out after {} s", CALL_TIMEOUT.as_secs())))?
            .map_err(|e| unreachable(root_cause(&e)))?;
        let status = answer.status();
        let bytes = answer.into_body().collect().await.map_err(|e| unreachable(e.to_string()))?.to_bytes();
        let value: Value = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
        if status == StatusCode::OK || status == StatusCode::ACCEPTED {
            return Ok(value);
        }
        let text = |key: &str| value[key].as_str().unwrap_or_default().to_owned();
        let message = match text("error_msg") {
            empty if empty.is_empty() => format!("the server answered {status}"),
            message => message,
        };
        Err(ApiError::Refused { status: status.as_u16(), code: text("error_code"), message })
    }
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}
