//! What happens to a request before its handler and after it (api-cli-config §2): log, forwarding, record of the
//! operation, authentication; and which routes want what.

use std::net::SocketAddr;
use std::time::Instant;

use axum::extract::{ConnectInfo, MatchedPath, Request, State};
use axum::http::{HeaderMap, Method, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use heartbeatpb::config::Uri as MaskedUri;
use parking_lot::Mutex;

use super::auth::Gate;
use super::forward::{self, Whose};
use super::operate::{Wish, operate};
use super::operations::Operations;
use super::{ApiFailure, Shared};
use crate::config::{RedactMode, SecuritySection};

/// What the way of a request to its handler needs to remember.
pub(crate) struct Access {
    pub(super) gate: Gate,
    pub(super) operations: Operations,
    /// What log lines may show of values.
    pub(super) redact: Mutex<RedactMode>,
}

impl Access {
    /// What the configuration says.
    ///
    /// # Errors
    /// When the file of passwords cannot be used.
    pub(crate) fn new(section: &SecuritySection) -> Result<Self, String> {
        Ok(Self {
            gate: Gate::new(section)?,
            operations: Operations::default(),
            redact: Mutex::new(section.redact_info_log),
        })
    }
}

/// Who can answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum At {
    /// Every node, about itself.
    Here,
    /// The node that leads.
    Coordinator,
    /// The node of the changefeed's maintainer.
    Maintainer,
}

/// What a route wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Rule {
    at: At,
    /// Whether a user is asked for, when users are.
    auth: bool,
    /// The name under which it is recorded.
    operation: Option<&'static str>,
}

impl Rule {
    /// Whether a user is asked for, when users are.
    #[cfg(test)]
    pub(super) fn asks_for_a_user(self) -> bool {
        self.auth
    }
}

const fn rule(at: At, auth: bool) -> Rule {
    Rule { at, auth, operation: None }
}

const fn recorded(operation: &'static str) -> Rule {
    Rule { at: At::Coordinator, auth: true, operation: Some(operation) }
}

/// Everybody may ask any node.
const OPEN: Rule = rule(At::Here, false);
/// A user may ask any node.
const OWN: Rule = rule(At::Here, true);
/// Everybody may ask the coordinator.
const SHOWN: Rule = rule(At::Coordinator, false);
/// A user may ask the coordinator.
const LED: Rule = rule(At::Coordinator, true);
/// Everybody may ask the maintainer's node.
const PLACED: Rule = rule(At::Maintainer, false);
/// A user may ask the maintainer's node.
const PLACING: Rule = rule(At::Maintainer, true);

/// The rule of every route. What is not here asks for a user, so that a new route is not open by mistake.
pub(super) fn rule_of(method: &Method, path: &str) -> Option<Rule> {
    let of = |path: &str| {
        Some(match (method.as_str(), path) {
            ("GET", "/health") => SHOWN,
            ("GET", "/status" | "/captures" | "/processors" | "/processors/{id}/{node}") => OPEN,
            ("POST", "/log" | "/log/redact") => OWN,
            ("POST", "/owner/resign") => LED,
            ("PUT", "/captures/drain") => LED,
            ("GET", "/changefeeds" | "/changefeeds/" | "/changefeeds/{id}") => SHOWN,
            ("POST", "/changefeeds" | "/changefeeds/") => recorded("create"),
            ("PUT" | "PATCH", "/changefeeds/{id}") => recorded("update"),
            ("DELETE", "/changefeeds/{id}") => recorded("delete"),
            ("POST", "/changefeeds/{id}/pause") => recorded("pause"),
            ("POST", "/changefeeds/{id}/resume") => recorded("resume"),
            _ => return None,
        })
    };
    if let Some(path) = path.strip_prefix("/api/v1") {
        return of(path).or(match (method.as_str(), path) {
            ("POST", "/changefeeds/{id}/tables/rebalance_table") => Some(LED),
            ("POST", "/changefeeds/{id}/tables/move_table") => Some(PLACING),
            _ => None,
        });
    }
    if let Some(path) = path.strip_prefix("/api/v2") {
        return of(path).or(match (method.as_str(), path) {
            ("POST", "/internal/facts") | ("GET", "/openapi.json") => Some(OPEN),
            ("GET", "/captures/{node}/drain") => Some(SHOWN),
            ("PUT" | "DELETE", "/captures/{node}/drain") => Some(LED),
            // These connect to wherever they are told to.
            ("POST" | "DELETE", "/changefeeds/{id}/verify") => Some(LED),
            ("POST", "/tso" | "/verify_table" | "/get_all_tables") => Some(OWN),
            (
                "GET",
                "/changefeeds/{id}/status"
                | "/changefeeds/{id}/synced"
                | "/changefeeds/{id}/progress"
                | "/changefeeds/{id}/verify",
            ) => Some(LED),
            ("GET", "/changefeeds/{id}/tables" | "/changefeeds/{id}/get_dispatcher_count") => Some(PLACED),
            (
                "POST",
                "/changefeeds/{id}/move_table"
                | "/changefeeds/{id}/move_split_table"
                | "/changefeeds/{id}/split_table_by_region_count"
                | "/changefeeds/{id}/merge_table"
                | "/changefeeds/{id}/resync_table"
                | "/changefeeds/{id}/pause_resync"
                | "/changefeeds/{id}/resume_resync"
                | "/changefeeds/{id}/cancel_resync",
            ) => Some(PLACING),
            // It asks the target.
            ("GET", "/changefeeds/{id}/resyncs") => Some(PLACING),
            ("GET", "/operations" | "/operations/{id}" | "/unsafe/metadata") => Some(LED),
            ("POST", "/unsafe/resolve_lock") | ("DELETE", "/unsafe/service_gc_safepoint") => Some(LED),
            _ => None,
        });
    }
    match (method.as_str(), path) {
        ("GET", "/" | "/status" | "/livez" | "/readyz") | (_, "/metrics") => Some(OPEN),
        ("GET", "/config") => Some(OWN),
        ("GET", path) if path.starts_with("/debug/") => Some(OWN),
        _ => None,
    }
}

/// What every request that has a route passes.
pub(super) async fn pass(State(state): State<Shared>, request: Request, next: Next) -> Response {
    let began = Instant::now();
    let line = Line::of(&request);
    let matched = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let found = matched.as_deref().and_then(|path| {
        // What GET answers, HEAD does without its body.
        let method = if request.method() == Method::HEAD { &Method::GET } else { request.method() };
        rule_of(method, path)
    });
    let mut user = None;
    let response = match (matched, found) {
        (Some(_), Some(rule)) => match arrive(&state, rule, request, next, &mut user).await {
            Ok(response) => response,
            Err(failure) => failure.into_response(),
        },
        // A method that its route does not take, of which the fallback says so, or a route that was forgotten here.
        (Some(_), None) => match state.access.gate.admit(request.headers()).await {
            Ok(_) => next.run(request).await,
            Err(failure) => failure.into_response(),
        },
        // A path without a route.
        (None, _) => next.run(request).await,
    };
    line.write(&response, user.as_deref(), began);
    response
}

async fn arrive(
    state: &Shared,
    rule: Rule,
    request: Request,
    next: Next,
    user: &mut Option<String>,
) -> Result<Response, ApiFailure> {
    let whose = match rule.at {
        At::Here => Whose::Ours(request),
        At::Coordinator => forward::to_coordinator(state, request).await?,
        At::Maintainer => forward::to_maintainer(state, request).await?,
    };
    let request = match whose {
        Whose::Ours(request) => request,
        Whose::Theirs(response) => return Ok(response),
    };
    let admitted = if rule.auth { state.access.gate.admit(request.headers()).await } else { Ok(None) };
    let Some(operation) = rule.operation else {
        *user = admitted?;
        return Ok(next.run(request).await);
    };
    let wish = Wish {
        operation,
        changefeed: name_in(request.uri()).unwrap_or_default().to_owned(),
        user: admitted.as_ref().ok().and_then(Clone::clone).unwrap_or_else(|| "anonymous".to_owned()),
    };
    match admitted {
        Ok(admitted) => *user = admitted,
        Err(failure) => {
            state.access.operations.refuse(wish.asked(), &failure.message);
            return Err(failure);
        }
    }
    operate(state, wish, request, next).await
}

fn name_in(uri: &Uri) -> Option<&str> {
    uri.path().split('/').nth(4).filter(|name| !name.is_empty())
}

/// What is logged of a request: no body, no credentials.
struct Line {
    method: Method,
    path: String,
    query: String,
    client: String,
    agent: String,
    version: String,
}

impl Line {
    fn of(request: &Request) -> Self {
        let headers = request.headers();
        let peer = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|peer| peer.0.ip().to_string());
        let first = text(headers, "x-forwarded-for").split(',').next().unwrap_or_default().trim().to_owned();
        Self {
            method: request.method().clone(),
            path: request.uri().path().chars().take(LONGEST).collect(),
            query: shown_query(request.uri()),
            client: if first.is_empty() { peer.unwrap_or_default() } else { first },
            agent: text(headers, "user-agent"),
            version: text(headers, "x-client-version"),
        }
    }

    /// What changes something or fails is told; who only looks is not, unless asked for.
    fn write(&self, response: &Response, user: Option<&str>, began: Instant) {
        let Self { method, path, query, client, agent, version } = self;
        let status = response.status();
        let failure = response.extensions().get::<ApiFailure>();
        let error = failure.map_or("", |failure| failure.code.as_str());
        let (status, duration) = (status.as_u16(), began.elapsed());
        let user = user.unwrap_or_default();
        if method == Method::GET && status < 500 {
            tracing::debug!(status, %method, path, query, client, agent, version, user, error, ?duration, "request");
        } else {
            tracing::info!(status, %method, path, query, client, agent, version, user, error, ?duration, "request");
        }
    }
}

/// Longest part of a request that is logged, in characters.
const LONGEST: usize = 256;

fn text(headers: &HeaderMap, name: &str) -> String {
    let value = headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    value.chars().take(LONGEST).collect()
}

/// The query with the values of secret names hidden.
fn shown_query(uri: &Uri) -> String {
    let Some(query) = uri.query() else { return String::new() };
    let shown = MaskedUri::parse(&format!("http://h/?{query}")).map(|uri| uri.masked());
    let shown = shown.ok().and_then(|uri| uri.split_once('?').map(|(_, query)| query.to_owned()));
    shown.unwrap_or_default().chars().take(LONGEST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_ruled_is_not_served_and_what_changes_something_wants_a_user() {
        let of = |method: &str, path: &str| rule_of(&method.parse().unwrap(), path);
        assert_eq!(of("GET", "/api/v2/nothing"), None);
        assert_eq!(of("GET", "/api/v2/captures"), Some(OPEN));
        assert_eq!(of("POST", "/api/v2/tso"), Some(OWN));
        assert_eq!(of("GET", "/api/v1/health"), Some(SHOWN));
        assert_eq!(of("GET", "/api/v1/changefeeds/{id}/status"), None);
        assert_eq!(of("PUT", "/api/v1/captures/drain"), Some(LED));
        assert_eq!(of("DELETE", "/api/v2/changefeeds/{id}"), Some(recorded("delete")));
    }

    #[test]
    fn a_logged_query_has_no_secret() {
        let shown = shown_query(&"/a?state=all&password=s3cr3t".parse().unwrap());
        assert!(shown.contains("state=all") && !shown.contains("s3cr3t"), "{shown}");
    }
}
