//! The task of one peer: keeps its streams up when it is this node that dials, and tidies its queues.
//!
//! ```text
//!   connect --ok--> both streams, each: open --accepted--> carry messages --broken--+
//!      ^  |failed                        ^       | refused                          |
//!      |  v                              |       v                                  |
//!     pause                              +---- pause <------ connection still up? --+
//!      ^                                                          | no, or neither stream works
//!      +----------------------------------------------------------+
//! ```

use std::sync::Arc;
use std::time::Duration;

use heartbeatpb::wire::proto::Message as Envelope;
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, sleep};
use tonic::Request;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic_prost::ProstCodec;

use super::backoff::Backoff;
use super::handshake::Handshake;
use super::http2::Connection;
use super::peer::Peer;
use super::stream::{Outbound, receive, refused};
use super::{MAX_MESSAGE_BYTES, PATH, Shared};
use crate::{SendError, SendErrorKind, StreamClass};

/// How often queues of broken streams are looked at.
const TIDY: Duration = Duration::from_secs(1);
/// A stream that lasted this long was a good one: the next pause is short.
const LASTED: Duration = Duration::from_secs(5);
/// Attempts at a stream, about four seconds, after which the connection is the suspect if the other stream does not
/// work either.
const ATTEMPTS: u32 = 5;

/// Runs until the peer is gone.
pub(crate) async fn run(shared: Arc<Shared>, peer: Arc<Peer>) {
    let tidy = async {
        let mut tick = interval(TIDY);
        loop {
            tick.tick().await;
            peer.forget_stale();
        }
    };
    let keep_up = async {
        if peer.dials {
            dial(&shared, &peer).await;
        } else {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        biased;
        () = peer.gone.cancelled() => {}
        () = tidy => {}
        () = keep_up => {}
    }
}

async fn dial(shared: &Arc<Shared>, peer: &Arc<Peer>) {
    let mut backoff = Backoff::new();
    let mut told = Told::default();
    loop {
        match Connection::open(&peer.address, shared.tls.as_ref()).await {
            Ok(connection) => {
                let since = Instant::now();
                // Tasks of their own, so that heavy data never delays control.
                let connection = Arc::new(connection);
                let mut streams = JoinSet::new();
                for class in [StreamClass::Command, StreamClass::Event] {
                    let (shared, peer) = (Arc::clone(shared), Arc::clone(peer));
                    streams.spawn(keep_stream(shared, peer, Arc::clone(&connection), class));
                }
                if let Some(Err(error)) = streams.join_next().await {
                    tracing::error!(peer = %peer.id, %error, "the task of a stream ended abnormally");
                }
                drop(streams);
                told.forget();
                if since.elapsed() >= LASTED {
                    backoff.reset();
                }
            }
            Err(error) => told.tell(peer, "a peer cannot be reached", &error),
        }
        sleep(backoff.pause()).await;
    }
}

/// Keeps one stream of a connection up until there is no point in it.
async fn keep_stream(shared: Arc<Shared>, peer: Arc<Peer>, connection: Arc<Connection>, class: StreamClass) {
    let (mut backoff, mut attempts, mut told) = (Backoff::new(), 0, Told::default());
    loop {
        let since = Instant::now();
        let error = carry(&shared, &peer, &connection, class).await;
        if connection.is_closed() || peer.gone.is_cancelled() {
            return;
        }
        told.tell(&peer, "a stream to a peer broke", &error);
        if since.elapsed() >= LASTED {
            backoff.reset();
            told.forget();
            attempts = 0;
        }
        attempts += 1;
        let other = match class {
            StreamClass::Event => StreamClass::Command,
            StreamClass::Command => StreamClass::Event,
        };
        if attempts >= ATTEMPTS && !peer.links.of(other).look().0 {
            return;
        }
        sleep(backoff.pause()).await;
    }
}

/// Opens a stream and carries messages until it ends; says why it did.
async fn carry(shared: &Shared, peer: &Arc<Peer>, connection: &Connection, class: StreamClass) -> SendError {
    let Some(queue) = peer.attach(class) else {
        return SendError::new(SendErrorKind::Closed, "the peer has left");
    };
    let (link, session) = (Arc::clone(&queue.link), queue.session.clone());
    let ended = session.ended.clone();
    let handshake = Handshake { from: shared.center.node().clone(), to: peer.id.clone(), class }.envelope();
    let (outbound, accept) = Outbound::dialled(handshake, queue);
    let (channel, origin) = connection.channel();
    let mut grpc = Grpc::with_origin(channel, origin)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(usize::MAX);
    let codec = ProstCodec::<Envelope, Envelope>::default();
    let opening = async {
        grpc.ready()
            .await
            .map_err(|_| SendError::new(SendErrorKind::ConnectionFailed, "the connection is closed"))?;
        let path = PathAndQuery::from_static(PATH);
        grpc.streaming(Request::new(outbound), path, codec).await.map_err(|status| refused(&status))
    };
    let response = tokio::select! {
        biased;
        () = ended.cancelled() => {
            return SendError::new(SendErrorKind::MessageSendFailed, "the stream was ended");
        }
        response = opening => response,
    };
    let why = match response {
        Ok(response) => {
            // Before anything is handed over, so that it can be answered.
            if let Some(number) = link.ready(&session) {
                peer.opened(class, number);
            }
            // The stream may be gone again; then nothing is to be told.
            let _ = accept.send(());
            receive(&shared.center, peer, &link, &session, &mut response.into_inner()).await
        }
        Err(error) => error,
    };
    // The sending half may live on in the connection until it notices.
    if link.detach(&session) {
        peer.broke(class);
    }
    why
}

/// Tells what is wrong with a peer once, until it changes or something works in between.
#[derive(Default)]
struct Told(Option<SendError>);

impl Told {
    fn tell(&mut self, peer: &Peer, what: &'static str, error: &SendError) {
        if self.0.as_ref() == Some(error) {
            return tracing::debug!(peer = %peer.id, address = peer.address.as_str(), %error, "{what}");
        }
        tracing::warn!(peer = %peer.id, address = peer.address.as_str(), %error, "{what}");
        self.0 = Some(error.clone());
    }

    fn forget(&mut self) {
        self.0 = None;
    }
}
