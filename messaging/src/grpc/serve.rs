//! A server for the bus alone: for programs that are no node, and for tests. A node serves the bus beside its API.

use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http2::Builder;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tonic::codegen::Service as _;
use tonic::codegen::http::Request;

use super::http2::{CONNECTION_WINDOW, STREAM_WINDOW};
use super::tls::{ALPN_H2, PeerIdentity, PeerTls, TlsError};
use super::{GrpcTransport, MessageService, tcp};

/// Silence after which the accepting side pings, and how long it waits for an answer.
const PING: Duration = Duration::from_secs(60);
/// How long a connection may take for its TLS handshake.
const GREETING: Duration = Duration::from_secs(10);
/// After an accept that failed: a process without file descriptors must not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves the bus on a port until `stop`, with TLS or without.
///
/// # Errors
/// When TLS cannot be set up.
pub async fn serve(
    listener: TcpListener,
    transport: &GrpcTransport,
    tls: Option<&PeerTls>,
    stop: CancellationToken,
) -> Result<(), TlsError> {
    let acceptor = match tls {
        Some(tls) => Some(TlsAcceptor::from(Arc::new(tls.server_config(&[ALPN_H2])?))),
        None => None,
    };
    // Connections end with this future.
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                connections.spawn(connection(stream, transport.service(), acceptor.clone()));
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    connections.shutdown().await;
    Ok(())
}

async fn connection(stream: TcpStream, service: MessageService, acceptor: Option<TlsAcceptor>) {
    if let Err(error) = tcp::tune(&stream) {
        tracing::debug!(%error, "options of a connection cannot be set");
    }
    let Some(acceptor) = acceptor else { return speak(stream, service, None).await };
    match tokio::time::timeout(GREETING, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => {
            let identity = PeerIdentity::of(stream.get_ref().1);
            speak(stream, service, identity).await;
        }
        Ok(Err(error)) => tracing::warn!(%error, "a connection of a peer is refused"),
        Err(_) => tracing::debug!("a connection did not greet"),
    }
}

async fn speak<T>(io: T, service: MessageService, identity: Option<PeerIdentity>)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |mut request: Request<hyper::body::Incoming>| {
        if let Some(identity) = &identity {
            request.extensions_mut().insert(identity.clone());
        }
        service.clone().call(request)
    });
    let served = Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .keep_alive_interval(PING)
        .keep_alive_timeout(PING)
        .serve_connection(TokioIo::new(io), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a connection of a peer ended");
    }
}
