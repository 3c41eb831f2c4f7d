//! A small JSON client of the HTTP API.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, StatusCode, Uri};
use rustls::ClientConfig;
use serde_json::Value;
use tokio::sync::OnceCell;

use crate::connect::{self, ConnectError};

/// A call may wait for a changefeed to stop; a person interrupts earlier if she wants to.
const CALL_TIMEOUT: Duration = Duration::from_secs(120);
/// So many times as long may a POST take: the creation of a changefeed notes the shapes of tens of thousands of tables.
const POST_TIMES: u32 = 5;

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
    /// The server is of another major version.
    #[error("the server is of version {0:?}, and this client of {own}: use a client of its major version", own = env!("CARGO_PKG_VERSION"))]
    Version(String),
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
            ApiError::Address(_) | ApiError::Unreachable { .. } | ApiError::Version(_) => "",
        }
    }
}

/// Who asks, and how the connection is made safe.
#[derive(Clone, Default)]
pub(super) struct Credentials {
    /// User and password.
    pub(super) login: Option<(String, String)>,
    /// TLS, when the server has it.
    pub(super) tls: Option<Arc<ClientConfig>>,
}

/// A client of one server.
pub struct Client {
    base: String,
    address: String,
    tls: Option<Arc<ClientConfig>>,
    authorization: Option<HeaderValue>,
    /// Whether the server's version was looked at; `None` when it does not matter.
    version: Option<OnceCell<()>>,
    /// How long a call may take that is no POST.
    patience: Duration,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("base", &self.base).finish_non_exhaustive()
    }
}

impl Client {
    /// A client of `server`, an `http://host:port` address.
    ///
    /// # Errors
    /// When the address has another form.
    pub fn new(server: &str) -> Result<Self, ApiError> {
        Self::with(server, Credentials::default())
    }

    /// A client with credentials. Without a scheme the address is `https` when there is TLS to speak it.
    ///
    /// # Errors
    /// When the address is none, has a path, a query or a user, or is `https` without TLS.
    pub(super) fn with(server: &str, credentials: Credentials) -> Result<Self, ApiError> {
        // It may hold a password by mistake.
        let refused = || ApiError::Address(server.rsplit('@').next().unwrap_or_default().to_owned());
        let Credentials { login, tls } = credentials;
        let scheme = if tls.is_some() { "https" } else { "http" };
        let base = server.strip_suffix('/').unwrap_or(server);
        let base = if base.contains("://") { base.to_owned() } else { format!("{scheme}://{base}") };
        let uri: Uri = base.parse().map_err(|_| refused())?;
        let authority = uri.authority().ok_or_else(refused)?;
        let plain = authority.host() != "" && !authority.as_str().contains('@');
        let plain = plain && !authority.as_str().ends_with(':');
        if !plain || uri.path() != "/" || uri.query().is_some() {
            return Err(refused());
        }
        let (tls, default) = match uri.scheme_str() {
            Some("http") => (None, 80),
            Some("https") if tls.is_some() => (tls, 443),
            Some(_) | None => return Err(refused()),
        };
        let address = match authority.port_u16() {
            Some(_) => authority.as_str().to_owned(),
            None => format!("{}:{default}", authority.host()),
        };
        let authorization = login.map(|(user, password)| {
            let encoded = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
            // Base64 has only characters that a header may have.
            let mut value =
                HeaderValue::try_from(format!("Basic {encoded}")).unwrap_or(HeaderValue::from_static(""));
            value.set_sensitive(true);
            value
        });
        Ok(Self { base, address, tls, authorization, version: None, patience: CALL_TIMEOUT })
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

    /// Looks at the server's version before the first call.
    pub(super) fn checking_version(self) -> Self {
        Self { version: Some(OnceCell::new()), ..self }
    }

    async fn check_version(&self) -> Result<(), ApiError> {
        let status = self.send(Method::GET, "/api/v2/status", None).await?;
        let theirs = status["version"].as_str().unwrap_or_default();
        if major(theirs) == major(env!("CARGO_PKG_VERSION")) {
            return Ok(());
        }
        Err(ApiError::Version(theirs.chars().take(64).collect()))
    }

    async fn call(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value, ApiError> {
        if let Some(version) = &self.version {
            version.get_or_try_init(|| self.check_version()).await?;
        }
        self.send(method, path, body).await
    }

    async fn send(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value, ApiError> {
        let patience = if method == Method::POST { self.patience * POST_TIMES } else { self.patience };
        let unreachable = |what: String| ApiError::Unreachable { server: self.base.clone(), what };
        let payload = body.map_or_else(Bytes::new, |body| Bytes::from(body.to_string()));
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(CONTENT_TYPE, "application/json")
            .header(ACCEPT, "application/json")
            .header("x-client-version", env!("CARGO_PKG_VERSION"))
            .body(Full::new(payload))
            .map_err(|_| ApiError::Address(self.base.clone()))?;
        if let Some(authorization) = &self.authorization {
            request.headers_mut().insert(AUTHORIZATION, authorization.clone());
        }
        let asked = async {
            let answer = connect::send(&self.address, self.tls.clone(), request).await?;
            let status = answer.status();
            Ok::<_, ConnectError>((status, answer.into_body().collect().await?.to_bytes()))
        };
        let (status, bytes) = tokio::time::timeout(patience, asked)
            .await
            .map_err(|_| unreachable(format!("timed out after {} s", patience.as_secs_f64())))?
            .map_err(|error| unreachable(root_cause(&error)))?;
        let read = serde_json::from_slice::<Value>(&bytes);
        if status == StatusCode::OK || status == StatusCode::ACCEPTED {
            let what = if bytes.is_empty() { "an empty answer" } else { "an answer that is not JSON" };
            return read.map_err(|_| ApiError::Refused {
                status: status.as_u16(),
                code: String::new(),
                message: format!("the server gave {what} with status {status}; is it a millrace server?"),
            });
        }
        let value = read.unwrap_or(Value::Null);
        let text = |key: &str| value[key].as_str().unwrap_or_default().to_owned();
        let message = match text("error_msg") {
            empty if empty.is_empty() => format!("the server answered {status}"),
            message => message,
        };
        Err(ApiError::Refused { status: status.as_u16(), code: text("error_code"), message })
    }
}

/// `v1.2.3` is 1.
fn major(version: &str) -> Option<u64> {
    version.trim_start_matches('v').split('.').next()?.parse().ok()
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests;
