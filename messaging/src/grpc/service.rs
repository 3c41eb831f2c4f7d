//! The side that accepts: a gRPC service for the port that the node listens on.
//!
//! ```text
//!   first frame is a handshake? --> for this node? --> sender known? --> does it dial? --> certificate --> attach:
//!     | no, or none in 10 s          | no                | not in 10 s     | no, we do      | not its      the stream
//!     v                              v                   v                 v                v              before ends
//!   InvalidMessage             TargetMismatch     TargetNotFound     TargetMismatch   ConnectionFailed
//! ```

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use heartbeatpb::wire::proto::Message as Envelope;
use tokio::time::timeout;
use tokio_stream::{Stream, StreamExt as _};
use tonic::body::Body;
use tonic::codegen::{Body as HttpBody, Service, StdError, http};
use tonic::server::{Grpc, NamedService, StreamingService};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

use super::handshake::Handshake;
use super::peer::Peer;
use super::stream::{Outbound, receive};
use super::tls::PeerIdentity;
use super::{MAX_MESSAGE_BYTES, PATH, Shared};
use crate::{SendError, SendErrorKind};

/// How long a stream may take to say who opens it.
const GREETING: Duration = Duration::from_secs(10);
/// How long a stream waits until its node is known: it may know of us before we know of it.
const DISCOVERY: Duration = Duration::from_secs(10);

/// The gRPC service `proto.MessageService`. A cheap handle; all clones serve one transport.
#[derive(Clone)]
pub struct MessageService {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for MessageService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MessageService({})", self.shared.center.node())
    }
}

impl MessageService {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }
}

impl NamedService for MessageService {
    const NAME: &'static str = "proto.MessageService";
}

impl<B> Service<http::Request<B>> for MessageService
where
    B: HttpBody + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move {
            if request.uri().path() != PATH {
                return Ok(Status::unimplemented("there is no such method").into_http());
            }
            let codec = ProstCodec::<Envelope, Envelope>::default();
            let mut grpc = Grpc::new(codec).max_decoding_message_size(MAX_MESSAGE_BYTES);
            Ok(grpc.streaming(Acceptor(shared), request).await)
        })
    }
}

/// What the accepting side sends.
type Outgoing = Pin<Box<dyn Stream<Item = Result<Envelope, Status>> + Send>>;

struct Acceptor(Arc<Shared>);

impl StreamingService<Envelope> for Acceptor {
    type Response = Envelope;
    type ResponseStream = Outgoing;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Outgoing>, Status>> + Send>>;

    fn call(&mut self, request: Request<Streaming<Envelope>>) -> Self::Future {
        let shared = Arc::clone(&self.0);
        Box::pin(async move {
            accept(shared, request).await.map_err(|error| {
                tracing::warn!(%error, "a stream of a peer is refused");
                status(&error)
            })
        })
    }
}

/// The steps of messaging §4.3.
async fn accept(
    shared: Arc<Shared>,
    request: Request<Streaming<Envelope>>,
) -> Result<Response<Outgoing>, SendError> {
    if shared.stopped.is_cancelled() {
        return Err(SendError::new(SendErrorKind::Closed, "this node is stopping"));
    }
    let Ok(_place) = shared.greetings.try_acquire() else {
        return Err(SendError::new(SendErrorKind::MessageCongested, "too many streams wait to be accepted"));
    };
    let identity = request.extensions().get::<PeerIdentity>().cloned();
    let mut inbound = request.into_inner();
    let first = timeout(GREETING, inbound.message())
        .await
        .map_err(|_| invalid("a stream did not say who opens it"))?
        .map_err(|status| invalid(&format!("a stream began with an error: {:?}", status.code())))?
        .ok_or_else(|| invalid("a stream ended before its first message"))?;
    let handshake = Handshake::read(&first)?;
    if handshake.to != *shared.center.node() {
        let reason = format!("{} wants to talk to {}, this is another node", handshake.from, handshake.to);
        return Err(SendError::new(SendErrorKind::TargetMismatch, reason));
    }
    let peer = known(&shared, &handshake).await?;
    if peer.dials {
        let reason = format!("it is not {} that opens the streams to this node", handshake.from);
        return Err(SendError::new(SendErrorKind::TargetMismatch, reason));
    }
    if let Some(tls) = &shared.tls {
        tls.may_act_for(identity.as_ref(), peer.address.host()).map_err(|error| {
            SendError::new(SendErrorKind::ConnectionFailed, format!("{}: {error}", handshake.from))
        })?;
    }
    let left = || SendError::new(SendErrorKind::TargetNotFound, format!("{} has left", handshake.from));
    let queue = peer.attach(handshake.class).ok_or_else(left)?;
    let (link, session) = (Arc::clone(&queue.link), queue.session.clone());
    let outbound = Outbound::accepted(queue);
    let center = shared.center.clone();
    shared.streams.spawn(async move {
        let why = receive(&center, &peer, &link, &session, &mut inbound).await;
        tracing::debug!(peer = %peer.id, stream = link.class().as_str(), %why, "a stream of a peer ended");
        if link.detach(&session) {
            peer.broke(link.class());
        }
    });
    Ok(Response::new(Box::pin(outbound.map(Ok))))
}

/// Waits until the node that opens a stream is known.
async fn known(shared: &Shared, handshake: &Handshake) -> Result<Arc<Peer>, SendError> {
    let mut peers = shared.peers.subscribe();
    let found = timeout(DISCOVERY, peers.wait_for(|peers| peers.contains_key(&handshake.from))).await;
    let peer = found.ok().and_then(Result::ok).and_then(|peers| peers.get(&handshake.from).map(Arc::clone));
    peer.ok_or_else(|| {
        SendError::new(SendErrorKind::TargetNotFound, format!("node {} is not known here", handshake.from))
    })
}

fn invalid(reason: &str) -> SendError {
    SendError::new(SendErrorKind::InvalidMessage, reason)
}

/// How a refusal looks on the wire.
fn status(error: &SendError) -> Status {
    let text = error.to_string();
    match error.kind {
        SendErrorKind::InvalidMessage => Status::invalid_argument(text),
        SendErrorKind::TargetMismatch => Status::failed_precondition(text),
        SendErrorKind::TargetNotFound => Status::not_found(text),
        SendErrorKind::ConnectionFailed => Status::permission_denied(text),
        SendErrorKind::MessageCongested => Status::resource_exhausted(text),
        SendErrorKind::Closed
        | SendErrorKind::ConnectionNotFound
        | SendErrorKind::MessageReceiveFailed
        | SendErrorKind::MessageSendFailed => Status::unavailable(text),
    }
}
