//! The two halves of a stream: what leaves, and what arrives.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use heartbeatpb::wire::proto::Message as Envelope;
use tokio::sync::oneshot;
use tokio::time::{Sleep, sleep};
use tokio_stream::Stream;
use tonic::{Code, Status, Streaming};

use super::link::{Link, Session};
use super::peer::Peer;
use crate::{MessageCenter, SendError, SendErrorKind};

/// Who dials waits this long for the peer to accept the stream before it sends. A peer of ours answers at once, or
/// says why not; one that is not ours may answer only when it has something to say.
const ACCEPTANCE: Duration = Duration::from_secs(1);

/// Bytes of a message whose reading would keep a thread from others for milliseconds.
const HUGE: usize = 1 << 20;

/// What leaves on a stream: the handshake if there is one, then what is queued for the peer.
pub(crate) struct Outbound {
    first: Option<Envelope>,
    gate: Option<Gate>,
    queue: Attached,
}

/// Holds messages back until the peer has accepted the stream, or seems to say nothing.
struct Gate {
    accepted: oneshot::Receiver<()>,
    latest: Pin<Box<Sleep>>,
}

/// A stream's hold of a queue; dropping it gives the queue back and ends the other half.
pub(crate) struct Attached {
    pub(crate) peer: Arc<Peer>,
    pub(crate) link: Arc<Link>,
    pub(crate) session: Session,
}

impl Attached {
    /// The stream works.
    pub(crate) fn ready(&self) {
        if let Some(number) = self.link.ready(&self.session) {
            self.peer.opened(self.link.class(), number);
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if self.link.detach(&self.session) {
            self.peer.broke(self.link.class());
        }
    }
}

impl Outbound {
    /// Of the side that dials.
    pub(crate) fn dialled(handshake: Envelope, queue: Attached) -> (Self, oneshot::Sender<()>) {
        let (accept, accepted) = oneshot::channel();
        let gate = Gate { accepted, latest: Box::pin(sleep(ACCEPTANCE)) };
        (Self { first: Some(handshake), gate: Some(gate), queue }, accept)
    }

    /// Of the side that accepts.
    pub(crate) fn accepted(queue: Attached) -> Self {
        queue.ready();
        Self { first: None, gate: None, queue }
    }
}

impl Stream for Outbound {
    type Item = Envelope;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Envelope>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(first));
        }
        if let Some(gate) = &mut self.gate {
            match Pin::new(&mut gate.accepted).poll(cx) {
                Poll::Ready(Ok(())) => {}
                // Whoever waited for the answer gave up.
                Poll::Ready(Err(_)) => return Poll::Ready(None),
                Poll::Pending => match gate.latest.as_mut().poll(cx) {
                    Poll::Ready(()) => {}
                    Poll::Pending => return Poll::Pending,
                },
            }
            self.gate = None;
            self.queue.ready();
        }
        self.queue.link.poll_take(&self.queue.session, cx)
    }
}

/// Hands over what arrives until the stream ends; says why it did. Waits where the receiver has no room, which
/// the peer feels as a stream without room; ends at once when the session does.
pub(crate) async fn receive(
    center: &MessageCenter,
    peer: &Peer,
    link: &Link,
    session: &Session,
    inbound: &mut Streaming<Envelope>,
) -> SendError {
    let ended = session.ended.cancelled();
    tokio::pin!(ended);
    let over = || SendError::new(SendErrorKind::Closed, "the stream was ended");
    // The stream before this one may still be handing a message over.
    let _turn = tokio::select! {
        biased;
        () = &mut ended => return over(),
        turn = link.receiving.lock() => turn,
    };
    loop {
        let message = tokio::select! {
            biased;
            () = &mut ended => return over(),
            message = inbound.message() => message,
        };
        let envelope = match message {
            Ok(Some(envelope)) => envelope,
            Ok(None) => {
                return SendError::new(SendErrorKind::MessageReceiveFailed, "the peer ended the stream");
            }
            Err(status) => return refused(&status),
        };
        if envelope.payload_bytes() > HUGE {
            hand_over_elsewhere(center, peer, link, session, envelope).await;
            continue;
        }
        tokio::select! {
            biased;
            () = &mut ended => return over(),
            () = center.receive(link.class(), &peer.id, &envelope) => {}
        }
        tokio::task::coop::consume_budget().await;
    }
}

/// Like the ordinary way, on a thread that may be held up: reading a large message takes long, and other streams
/// share the thread of this one. Returns when the message is handed over or the session has ended, not earlier.
async fn hand_over_elsewhere(
    center: &MessageCenter,
    peer: &Peer,
    link: &Link,
    session: &Session,
    envelope: Envelope,
) {
    let (center, id, class) = (center.clone(), peer.id.clone(), link.class());
    let ended = session.ended.clone();
    let handed = tokio::task::spawn_blocking(move || {
        tokio::runtime::Handle::current().block_on(async {
            tokio::select! {
                biased;
                () = ended.cancelled() => {}
                () = center.receive(class, &id, &envelope) => {}
            }
        });
    });
    if let Err(error) = handed.await {
        tracing::error!(peer = %peer.id, %error, "handing a message over ended abnormally");
    }
}

/// What a peer's status says to this node.
pub(crate) fn refused(status: &Status) -> SendError {
    let kind = match status.code() {
        Code::FailedPrecondition => SendErrorKind::TargetMismatch,
        Code::NotFound => SendErrorKind::TargetNotFound,
        Code::InvalidArgument => SendErrorKind::InvalidMessage,
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::ResourceExhausted
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss
        | Code::Unauthenticated => SendErrorKind::MessageReceiveFailed,
    };
    SendError::new(kind, format!("{:?}: {}", status.code(), status.message()))
}
