//! One TCP port for people and for nodes: HTTP/1, HTTP/2 and gRPC, with TLS or without (coordinator §4.1).
//!
//! ```text
//! accept --> TLS handshake --> first bytes --+-- HTTP/2 preface --> gRPC service, or the HTTP API by content type
//!            (10 s)            (10 s)        |
//!                                            +-- anything else --> wait for one of 1000 places --> HTTP API
//!
//! stop --> no more accepts; each connection ends with its present request --> 10 s --> what is left is cut
//! ```

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use axum::http::{Request, Response, header};
use bytes::{Buf, Bytes, BytesMut};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use messaging::grpc::tls::PeerIdentity;
use messaging::grpc::{CONNECTION_WINDOW, STREAM_WINDOW};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tower::Service as _;

use crate::tls::Tls;

/// What an HTTP/2 connection begins with.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// After an accept that failed: a process without file descriptors must not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What connections may take.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Limits {
    /// HTTP/1 connections at one time; more of them wait.
    pub http_connections: usize,
    /// An HTTP/1 connection on which nothing moves for this long is closed.
    pub idle: Duration,
    /// From the accept to the first bytes of a request, the TLS handshake included, each.
    pub greeting: Duration,
    /// How long requests may go on after the stop.
    pub close: Duration,
    /// An HTTP/2 connection is asked this often whether somebody is there, and has this long to answer.
    pub keep_alive: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            http_connections: 1000,
            idle: Duration::from_secs(600),
            greeting: Duration::from_secs(10),
            close: Duration::from_secs(10),
            keep_alive: Duration::from_secs(60),
        }
    }
}

/// What is served on one port.
pub struct Server {
    /// The port.
    pub listener: TcpListener,
    /// The HTTP API.
    pub http: Router,
    /// gRPC services (`tonic::service::Routes::into_axum_router`): what has the content type `application/grpc`.
    pub grpc: Option<Router>,
    /// Certificates; without them connections are in clear.
    pub tls: Option<Arc<Tls>>,
    /// What connections may take.
    pub limits: Limits,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("tls", &self.tls).field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl Server {
    /// A server with the usual limits.
    #[must_use]
    pub fn new(listener: TcpListener, http: Router) -> Self {
        Self { listener, http, grpc: None, tls: None, limits: Limits::default() }
    }

    /// Serves until `stop`, then lets requests end for as long as the limits say.
    pub async fn run(self, stop: CancellationToken) {
        let Self { listener, http, grpc, tls, limits } = self;
        let shared = Arc::new(Shared {
            http,
            grpc,
            places: Arc::new(Semaphore::new(limits.http_connections)),
            limits,
            stop: stop.clone(),
        });
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                Some(_) = connections.join_next(), if !connections.is_empty() => continue,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => {
                    let acceptor = tls.as_ref().map(|tls| TlsAcceptor::from(tls.server()));
                    connections.spawn(Arc::clone(&shared).connection(stream, peer, acceptor));
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        drop(listener);
        let rest = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(shared.limits.close, rest).await.is_err() {
            tracing::warn!(left = connections.len(), "connections did not end in time and are cut");
        }
    }
}

/// Who is at the other end.
#[derive(Clone)]
struct From {
    peer: SocketAddr,
    /// The certificate that was shown.
    identity: Option<PeerIdentity>,
}

/// What all connections use.
struct Shared {
    http: Router,
    grpc: Option<Router>,
    places: Arc<Semaphore>,
    limits: Limits,
    stop: CancellationToken,
}

impl Shared {
    async fn connection(self: Arc<Self>, stream: TcpStream, peer: SocketAddr, acceptor: Option<TlsAcceptor>) {
        if let Err(error) = messaging::grpc::tcp::tune(&stream) {
            tracing::debug!(%peer, %error, "a connection cannot be tuned");
        }
        let Some(acceptor) = acceptor else { return self.greet(stream, peer, None).await };
        let handshake = tokio::select! {
            biased;
            () = self.stop.cancelled() => return,
            handshake = tokio::time::timeout(self.limits.greeting, acceptor.accept(stream)) => handshake,
        };
        match handshake {
            Ok(Ok(stream)) => {
                let identity = PeerIdentity::of(stream.get_ref().1);
                self.greet(stream, peer, identity).await;
            }
            Ok(Err(error)) => tracing::info!(%peer, %error, "a TLS handshake failed"),
            Err(_) => tracing::debug!(%peer, "a TLS handshake took too long"),
        }
    }

    async fn greet<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
        self: Arc<Self>,
        mut stream: S,
        peer: SocketAddr,
        identity: Option<PeerIdentity>,
    ) {
        let from = From { peer, identity };
        let first = tokio::select! {
            biased;
            () = self.stop.cancelled() => return,
            first = first_bytes(&mut stream, self.limits.idle) => first,
        };
        match first {
            Ok((first, true)) => self.http2(Guarded::new(stream, first, None), from).await,
            Ok((first, false)) if first.is_empty() => {}
            Ok((first, false)) => self.http1(stream, first, from).await,
            Err(error) => tracing::debug!(%peer, %error, "a connection ended before its first request"),
        }
    }

    async fn http1<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
        self: Arc<Self>,
        stream: S,
        first: Bytes,
        from: From,
    ) {
        let peer = from.peer;
        let place = tokio::select! {
            biased;
            () = self.stop.cancelled() => return,
            place = Arc::clone(&self.places).acquire_owned() => place,
        };
        let stream = Guarded::new(stream, first, Some(self.limits.idle));
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.idle)
            .serve_connection(TokioIo::new(stream), self.service(from));
        tokio::pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = self.stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        drop(place);
        if let Err(error) = ended {
            tracing::debug!(%peer, %error, "an HTTP connection ended early");
        }
    }

    async fn http2<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
        self: Arc<Self>,
        stream: Guarded<S>,
        from: From,
    ) {
        let peer = from.peer;
        let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(self.limits.keep_alive)
            .keep_alive_timeout(self.limits.keep_alive)
            // A stream of rows between two nodes must not wait for acknowledgements of a window.
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(FRAME)
            .serve_connection(TokioIo::new(stream), self.service(from));
        tokio::pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = self.stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%peer, %error, "an HTTP/2 connection ended early");
        }
    }

    /// Whoever the content type names: gRPC, or the HTTP API.
    fn service(
        self: &Arc<Self>,
        from: From,
    ) -> impl hyper::service::Service<
        Request<Incoming>,
        Response = Response<Body>,
        Error = Infallible,
        Future = impl Future<Output = Result<Response<Body>, Infallible>> + Send + use<>,
    > + Clone
    + Send
    + use<> {
        let shared = Arc::clone(self);
        hyper::service::service_fn(move |request: Request<Incoming>| {
            let (shared, from) = (Arc::clone(&shared), from.clone());
            async move {
                let mut request = request.map(Body::new);
                request.extensions_mut().insert(ConnectInfo(from.peer));
                // The bus compares it with who speaks.
                from.identity.map(|identity| request.extensions_mut().insert(identity));
                let router = match &shared.grpc {
                    Some(grpc) if is_grpc(&request) => grpc,
                    Some(_) | None => &shared.http,
                };
                router.clone().call(request).await
            }
        })
    }
}

/// Largest HTTP/2 frame.
const FRAME: u32 = 1 << 20;

fn is_grpc(request: &Request<Body>) -> bool {
    let kind = request.headers().get(header::CONTENT_TYPE);
    kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

/// Reads until it is clear whether this is HTTP/2: what was read, and whether it is. Empty when the peer went away.
async fn first_bytes<S: AsyncRead + Unpin>(
    stream: &mut S,
    patience: Duration,
) -> std::io::Result<(Bytes, bool)> {
    let read = async {
        let mut first = BytesMut::with_capacity(1024);
        loop {
            if stream.read_buf(&mut first).await? == 0 {
                return Ok((first.freeze(), false));
            }
            let known = first.len().min(PREFACE.len());
            if first[..known] != PREFACE[..known] {
                return Ok((first.freeze(), false));
            }
            if known == PREFACE.len() {
                return Ok((first.freeze(), true));
            }
        }
    };
    tokio::time::timeout(patience, read).await.map_err(|_| std::io::ErrorKind::TimedOut)?
}

/// A connection whose first bytes were read already, and that ends when nothing moves on it for too long.
struct Guarded<S> {
    inner: S,
    first: Bytes,
    idle: Option<(Duration, Pin<Box<Sleep>>)>,
}

impl<S> Guarded<S> {
    fn new(inner: S, first: Bytes, idle: Option<Duration>) -> Self {
        let idle = idle.map(|idle| (idle, Box::pin(tokio::time::sleep(idle))));
        Self { inner, first, idle }
    }

    /// Something moved, or it is asked whether nothing did for too long.
    fn guard<T>(&mut self, cx: &mut Context<'_>, poll: Poll<std::io::Result<T>>) -> Poll<std::io::Result<T>> {
        let Some((limit, sleep)) = &mut self.idle else { return poll };
        if poll.is_ready() {
            sleep.as_mut().reset(Instant::now() + *limit);
            return poll;
        }
        match sleep.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(std::io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        if !self.first.is_empty() {
            let count = self.first.len().min(buf.remaining());
            buf.put_slice(&self.first[..count]);
            self.first.advance(count);
            return Poll::Ready(Ok(()));
        }
        let poll = Pin::new(&mut self.inner).poll_read(cx, buf);
        self.guard(cx, poll)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        let poll = Pin::new(&mut self.inner).poll_write(cx, buf);
        self.guard(cx, poll)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        let poll = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        self.guard(cx, poll)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

#[cfg(test)]
mod tests;
