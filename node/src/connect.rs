//! One HTTP/1 request over a connection of its own, with TLS or without: to other nodes, and from the command line.
//!
//! There is no pool: requests between nodes and of people are few, and a connection that was kept may lead to a node
//! that is gone.

use std::sync::Arc;
use std::time::Duration;

use axum::http::{HeaderValue, Request, Response, Uri, header};
use hyper::body::{Body, Incoming};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// Until a connection is there, its TLS included.
const CONNECT: Duration = Duration::from_secs(5);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// The address is none.
    #[error("{0:?} is not host:port")]
    Address(String),
    /// Nobody is there.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// Nobody answers.
    #[error("no connection within {} s", CONNECT.as_secs())]
    Slow,
    /// The connection ended, or what came is not HTTP.
    #[error("{0}")]
    Http(#[from] hyper::Error),
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

/// Sends a request, whose URI has a path and a query only, to `host:port`. The body of the answer follows as it comes.
///
/// # Errors
/// When there is no connection, or no answer on it.
pub(crate) async fn send<B>(
    address: &str,
    tls: Option<Arc<ClientConfig>>,
    mut request: Request<B>,
) -> Result<Response<Incoming>, ConnectError>
where
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let host = HeaderValue::from_str(address).map_err(|_| ConnectError::Address(address.to_owned()))?;
    request.headers_mut().insert(header::HOST, host);
    let stream =
        tokio::time::timeout(CONNECT, open(address, tls)).await.map_err(|_| ConnectError::Slow)??;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // It ends with the answer's body, or when nobody reads that any more.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection to another node ended early");
        }
    });
    Ok(sender.send_request(request).await?)
}

async fn open(address: &str, tls: Option<Arc<ClientConfig>>) -> Result<Box<dyn Stream>, ConnectError> {
    let wrong = || ConnectError::Address(address.to_owned());
    let authority: Uri = address.parse().map_err(|_| wrong())?;
    let host = authority.host().ok_or_else(wrong)?;
    let port = authority.port_u16().ok_or_else(wrong)?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let stream = TcpStream::connect((host, port)).await?;
    let _ = stream.set_nodelay(true);
    let Some(tls) = tls else { return Ok(Box::new(stream)) };
    let name = ServerName::try_from(host.to_owned()).map_err(|_| wrong())?;
    Ok(Box::new(TlsConnector::from(tls).connect(name, stream).await?))
}
