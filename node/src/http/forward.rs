//! Requests that another node has to answer (api-cli-config §2, §4.3): the one that leads, or that of a maintainer.
//!
//! ```text
//! request --> leads this node? --no--> to the leader --------+
//!               | yes                                        | TiCDC-ForwardTimes: at most 2,
//!               v                                            | then 503
//!   about tables, and the maintainer is elsewhere? --yes--> to that node, with the incarnation of the changefeed
//!               | no                                         |
//!               v                                            v
//!            handler                                  status, headers and body come back as they are;
//!                                                     503 when that node leaves the cluster before it answers
//! ```

use std::net::SocketAddr;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{ConnectInfo, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::Response;
use coordinator::ChangefeedView;
use heartbeatpb::{ChangefeedId, Gid, NodeId, codes};
use http_body_util::{BodyExt as _, Full};

use super::{ApiFailure, ApiState, changefeed};
use crate::connect;

/// Names the node that forwarded a request.
pub(super) const FROM: HeaderName = HeaderName::from_static("ticdc-forwardfrom");
/// How often a request was forwarded.
pub(super) const TIMES: HeaderName = HeaderName::from_static("ticdc-forwardtimes");
/// The incarnation of the changefeed, `low-high`: the coordinator has resolved the name already.
const INCARNATION: HeaderName = HeaderName::from_static("millrace-changefeed-gid");
/// Who asked at first.
const CLIENTS: HeaderName = HeaderName::from_static("x-forwarded-for");
/// The cluster cannot answer now.
const UNHEALTHY: &str = "CDC:ErrClusterIsUnhealthy";
/// A request passes so many nodes at most.
const MOST_TIMES: u32 = 2;
/// How long another node may take to answer: a pause waits until everything has stopped.
const PATIENCE: Duration = Duration::from_secs(600);
/// Headers that concern one connection only.
const OF_CONNECTION: [HeaderName; 8] = [
    header::CONNECTION,
    header::HOST,
    header::CONTENT_LENGTH,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::TE,
    header::TRAILER,
    header::EXPECT,
];

/// A changefeed whose maintainer is on this node, or why there is none. The handler looks at its parameters first.
#[derive(Clone, Debug)]
pub(super) struct Maintained(Result<ChangefeedId, ApiFailure>);

impl Maintained {
    /// The changefeed.
    ///
    /// # Errors
    /// When there is no such changefeed, or nobody maintains it.
    pub(super) fn id(self) -> Result<ChangefeedId, ApiFailure> {
        self.0
    }
}

impl<S: Sync> FromRequestParts<S> for Maintained {
    type Rejection = ApiFailure;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiFailure> {
        let resolved = parts.extensions.get::<Self>().cloned();
        resolved.ok_or_else(|| {
            ApiFailure::new(codes::MAINTAINER_NOT_FOUND, "nobody has looked for the maintainer")
        })
    }
}

/// Who answers.
pub(super) enum Whose {
    /// This node.
    Ours(Request),
    /// Another one has.
    Theirs(Response),
}

/// Sends what the coordinator has to answer to it, if that is another node.
pub(super) async fn to_coordinator(state: &ApiState, request: Request) -> Result<Whose, ApiFailure> {
    if state.leader().is_some() {
        return Ok(Whose::Ours(request));
    }
    let unknown = |words: &str| Err(ApiFailure::new("CDC:ErrOwnerNotFound", words));
    let Some(leading) = state.leading.borrow().clone() else {
        return unknown("no node coordinates the cluster now; ask again in a moment");
    };
    if leading == state.node {
        return unknown("the coordinator is starting; ask again in a moment");
    }
    send(state, request, &leading, None).await.map(Whose::Theirs)
}

/// Sends what the node of a maintainer has to answer to it, and marks what is for this one.
pub(super) async fn to_maintainer(state: &ApiState, mut request: Request) -> Result<Whose, ApiFailure> {
    let name = name_in(request.uri().path()).to_owned();
    if let Some(gid) = request.headers().get(&INCARNATION) {
        let gid =
            parse_gid(gid).ok_or_else(|| ApiFailure::invalid("the changefeed's incarnation is none"))?;
        super::models::check_name(&name)?;
        let id = ChangefeedId { gid, ..ChangefeedId::fresh(&name) };
        request.extensions_mut().insert(Maintained(Ok(id)));
        return Ok(Whose::Ours(request));
    }
    let mut request = match to_coordinator(state, request).await? {
        Whose::Ours(request) => request,
        theirs @ Whose::Theirs(_) => return Ok(theirs),
    };
    let found = match changefeed::find(state, &name).await {
        Ok(feed) => match &feed.node {
            Some(node) if *node != state.node => {
                return send(state, request, node, Some(feed.info.id.gid)).await.map(Whose::Theirs);
            }
            Some(_) => Ok(feed.info.id.clone()),
            None => Err(unmaintained(&feed)),
        },
        Err(failure) => Err(failure),
    };
    request.extensions_mut().insert(Maintained(found));
    Ok(Whose::Ours(request))
}

/// Why nobody can be asked about the tables of a changefeed.
fn unmaintained(feed: &ChangefeedView) -> ApiFailure {
    let why = feed.waiting_for.as_ref().map_or_else(String::new, |what| format!("; it waits for {what}"));
    let (name, state) = (&feed.info.id.name, feed.info.state.shown());
    let words = format!("changefeed {name} has no maintainer, its state is {state}{why}");
    ApiFailure::new(codes::MAINTAINER_NOT_FOUND, words)
}

/// The name in `/api/v2/changefeeds/{name}/…`.
fn name_in(path: &str) -> &str {
    path.split('/').nth(4).unwrap_or_default()
}

fn parse_gid(text: &HeaderValue) -> Option<Gid> {
    let (low, high) = text.to_str().ok()?.split_once('-')?;
    Some(Gid { low: low.parse().ok()?, high: high.parse().ok()? })
}

/// How often a request was forwarded already.
///
/// # Errors
/// When the header is no number.
fn times(headers: &HeaderMap) -> Result<u32, ApiFailure> {
    let Some(value) = headers.get(TIMES) else { return Ok(0) };
    let number = value.to_str().ok().and_then(|text| text.parse().ok());
    number.ok_or_else(|| ApiFailure::invalid("the header TiCDC-ForwardTimes is not a number"))
}

async fn send(
    state: &ApiState,
    request: Request,
    node: &NodeId,
    gid: Option<Gid>,
) -> Result<Response, ApiFailure> {
    let times = times(request.headers())?;
    if times >= MOST_TIMES {
        let words = "the request was forwarded twice and found nobody to answer it: the nodes do not agree on who \
                     coordinates; ask again in a moment";
        return Err(ApiFailure::new(UNHEALTHY, words));
    }
    let address = state.members.borrow().get(node).cloned().ok_or_else(|| {
        ApiFailure::new(
            "CDC:ErrOwnerNotFound",
            format!(
                "node {node} has to answer this and is not a member of the cluster now; ask again in a moment"
            ),
        )
    })?;
    let request = outgoing(state, request, times, gid).await?;
    let tls = state.tls.as_ref().map(|tls| tls.client());
    let failed = |what: String| {
        ApiFailure::new(
            UNHEALTHY,
            format!("node {node} at {address} has to answer this, and does not: {what}"),
        )
    };
    let mut members = state.members.clone();
    let answer = tokio::select! {
        answer = tokio::time::timeout(PATIENCE, connect::send(&address, tls, request)) => answer
            .map_err(|_| failed(format!("nothing came for {} s", PATIENCE.as_secs())))?
            .map_err(|error| failed(error.to_string()))?,
        // It may stand still with its connections open. A change that it has begun is known by its key.
        _ = members.wait_for(|members| !members.contains_key(node)) => {
            return Err(failed("it has left the cluster meanwhile; ask again".to_owned()));
        }
    };
    let (mut parts, body) = answer.into_parts();
    strip(&mut parts.headers);
    Ok(Response::from_parts(parts, Body::new(body)))
}

/// Reads a body.
///
/// # Errors
/// When it is too large, or ends early.
pub(super) async fn read(body: Body) -> Result<Bytes, ApiFailure> {
    let body = http_body_util::Limited::new(body, super::MAX_BODY_BYTES).collect().await;
    let body = body.map_err(|error| {
        if error.is::<http_body_util::LengthLimitError>() {
            ApiFailure::too_large()
        } else {
            ApiFailure::invalid("the request body ended early")
        }
    })?;
    Ok(body.to_bytes())
}

/// The same request, as another node is to get it. A body that is too large is refused here.
async fn outgoing(
    state: &ApiState,
    request: Request,
    times: u32,
    gid: Option<Gid>,
) -> Result<axum::http::Request<Full<Bytes>>, ApiFailure> {
    let (mut parts, body) = request.into_parts();
    let body = read(body).await?;
    strip(&mut parts.headers);
    let headers = &mut parts.headers;
    let text = |text: &str| HeaderValue::from_str(text).unwrap_or(HeaderValue::from_static("unknown"));
    headers.insert(FROM, text(state.node.as_str()));
    headers.insert(TIMES, HeaderValue::from(times + 1));
    if let Some(ConnectInfo(peer)) = parts.extensions.get::<ConnectInfo<SocketAddr>>() {
        let before = headers.get(CLIENTS).and_then(|value| value.to_str().ok());
        let clients =
            before.map_or_else(|| peer.ip().to_string(), |before| format!("{before}, {}", peer.ip()));
        headers.insert(CLIENTS, text(&clients));
    }
    if let Some(gid) = gid {
        headers.insert(INCARNATION, text(&format!("{}-{}", gid.low, gid.high)));
    }
    let target = parts.uri.path_and_query().map_or("/", |target| target.as_str());
    let mut out = axum::http::Request::new(Full::new(body));
    *out.method_mut() = parts.method;
    *out.uri_mut() = target.parse().map_err(|_| ApiFailure::invalid("the path of the request is none"))?;
    *out.headers_mut() = parts.headers;
    Ok(out)
}

/// Takes away what concerns one connection only, and what the connection names as such.
fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().chain(&OF_CONNECTION) {
        headers.remove(name);
    }
    headers.remove("keep-alive");
}

/// Asks another node for JSON; `None` when it does not answer in time. For numbers that may be left out.
pub(super) async fn ask(
    state: &ApiState,
    node: &NodeId,
    path: &'static str,
    credentials: Option<&HeaderValue>,
    body: Vec<u8>,
    patience: Duration,
) -> Option<Bytes> {
    let address = state.members.borrow().get(node).cloned()?;
    let mut request = axum::http::Request::new(Full::new(Bytes::from(body)));
    *request.method_mut() = axum::http::Method::POST;
    *request.uri_mut() = axum::http::Uri::from_static(path);
    if let Some(credentials) = credentials {
        request.headers_mut().insert(header::AUTHORIZATION, credentials.clone());
    }
    let tls = state.tls.as_ref().map(|tls| tls.client());
    let asked = async {
        let answer = connect::send(&address, tls, request).await.map_err(|error| error.to_string())?;
        if answer.status() != StatusCode::OK {
            return Err(format!("status {}", answer.status()));
        }
        let body = http_body_util::Limited::new(answer.into_body(), LONGEST_ANSWER);
        Ok(body.collect().await.map_err(|error| error.to_string())?.to_bytes())
    };
    match tokio::time::timeout(patience, asked).await {
        Ok(Ok(bytes)) => Some(bytes),
        Ok(Err(error)) => {
            tracing::debug!(%node, path, error, "a node does not tell what it knows");
            None
        }
        Err(_) => {
            tracing::debug!(%node, path, "a node takes too long to tell what it knows");
            None
        }
    }
}

/// Longest answer of another node that is read, in bytes.
const LONGEST_ANSWER: usize = 64 << 20;
