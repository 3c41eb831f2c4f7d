//! One HTTP/2 connection to a peer, as the side that dials.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::client::conn::http2::{Builder, SendRequest};
use hyper::rt::Executor;
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response, Uri};
use tonic::codegen::{Service, StdError};

use super::address::Address;
use super::tcp;
use super::tls::PeerTls;
use crate::{SendError, SendErrorKind};

/// For each step of connecting: TCP, TLS.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Silence after which the dialling side pings. A peer that is not ours takes more frequent pings for abuse.
pub const PING_EVERY: Duration = Duration::from_secs(20);
/// A ping that is not answered for this long ends the connection.
pub const PING_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of one stream that may be on their way to this node: enough for row events over a few milliseconds of
/// distance; what a receiver that stands still costs.
pub const STREAM_WINDOW: u32 = 1 << 20;
/// Bytes of both streams that may be on their way to this node.
pub const CONNECTION_WINDOW: u32 = 8 << 20;
/// Bytes of one stream that are copied to the connection before the peer has room for them.
const SEND_BUFFER: usize = 256 << 10;

/// A connection; dropping it closes both streams.
pub(crate) struct Connection {
    requests: SendRequest<Body>,
    /// What requests are addressed to.
    origin: Uri,
    tasks: Tasks,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.tasks.0.lock().abort_all();
    }
}

/// Everything that runs for a connection. Left alone it would go on until the last stream has ended by itself.
#[derive(Clone, Default)]
struct Tasks(Arc<Mutex<JoinSet<()>>>);

impl<F> Executor<F> for Tasks
where
    F: Future + Send + 'static,
{
    fn execute(&self, future: F) {
        let mut tasks = self.0.lock();
        while tasks.try_join_next().is_some() {}
        tasks.spawn(async move {
            future.await;
        });
    }
}

impl Connection {
    /// Connects to a peer.
    ///
    /// # Errors
    /// Why not, without anything secret.
    pub(crate) async fn open(address: &Address, tls: Option<&PeerTls>) -> Result<Self, SendError> {
        let failed = |what: &str| {
            SendError::new(SendErrorKind::ConnectionFailed, format!("{}: {what}", address.as_str()))
        };
        let (host, port) = address.host_port()?;
        if address.wants_tls() && tls.is_none() {
            return Err(failed("speaks TLS, and this node has no certificates"));
        }
        let stream = timeout(CONNECT_TIMEOUT, TcpStream::connect((host, port)))
            .await
            .map_err(|_| failed("does not answer"))?
            .map_err(|error| failed(&error.to_string()))?;
        if let Err(error) = tcp::tune(&stream) {
            tracing::debug!(%error, "options of a connection cannot be set");
        }
        let scheme = if tls.is_some() { "https" } else { "http" };
        let origin = Uri::builder()
            .scheme(scheme)
            .authority(address.as_str())
            .path_and_query("/")
            .build()
            .map_err(|_| failed("is no address of HTTP"))?;
        let (requests, tasks) = match tls {
            None => drive(stream).await,
            Some(tls) => {
                let secured = timeout(CONNECT_TIMEOUT, tls.connect(host, stream));
                let secured = secured.await.map_err(|_| failed("does not answer to TLS"))?;
                drive(secured.map_err(|error| failed(&error.to_string()))?).await
            }
        }
        .map_err(|error| failed(&error.to_string()))?;
        Ok(Self { requests, origin, tasks })
    }

    /// Whether the connection is over.
    pub(crate) fn is_closed(&self) -> bool {
        self.requests.is_closed()
    }

    /// A way to open a stream.
    pub(crate) fn channel(&self) -> (Channel, Uri) {
        (Channel(self.requests.clone()), self.origin.clone())
    }
}

async fn drive<T>(io: T) -> Result<(SendRequest<Body>, Tasks), hyper::Error>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let tasks = Tasks::default();
    let (requests, connection) = Builder::new(tasks.clone())
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true)
        .max_send_buf_size(SEND_BUFFER)
        .handshake(TokioIo::new(io))
        .await?;
    tasks.execute(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection to a peer ended");
        }
    });
    Ok((requests, tasks))
}

/// A connection as tonic wants it.
pub(crate) struct Channel(SendRequest<Body>);

impl Service<Request<Body>> for Channel {
    type Response = Response<hyper::body::Incoming>;
    type Error = StdError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let response = self.0.send_request(request);
        Box::pin(async move { response.await.map_err(Into::into) })
    }
}
