//! Opens a byte stream to a server, as the driver itself would: hosts in their order, TLS as far as the URI and the server
//! want it. The driver would do this by itself, but then nobody else could use the stream ([`super::wire`]).

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use bytes::BytesMut;
use postgres_protocol::message::frontend;
use rand::seq::SliceRandom;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio_postgres::Config;
use tokio_postgres::config::{Host, LoadBalanceHosts, SslMode, SslNegotiation};
use tokio_postgres::tls::{MakeTlsConnect, TlsConnect, TlsStream};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::config::PgConfig;
use super::wire::{Io, Plain};
use crate::Error;

const DEFAULT_PORT: u16 = 5432;
const CONNECTING: &str = "error connecting to server";

/// One server of a URI, as it is to be reached.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Server {
    /// A name or an address, a port, and the name that its certificate is to have, where there is one.
    Tcp { host: String, port: u16, name: Option<String> },
    /// The path of a socket.
    Unix(PathBuf),
}

/// Why a server was not reached: the step that failed, never a password.
#[derive(Debug, thiserror::Error)]
#[error("{step} ({cause})")]
pub(super) struct Unreached {
    step: &'static str,
    cause: io::Error,
}

impl Unreached {
    /// It took too long.
    pub(super) fn timed_out() -> Self {
        Self { step: CONNECTING, cause: io::Error::new(io::ErrorKind::TimedOut, "connection timed out") }
    }
}

fn failed(step: &'static str) -> impl Fn(io::Error) -> Unreached {
    move |cause| Unreached { step, cause }
}

/// The servers of a configuration in the order in which they are tried.
pub(super) fn servers(driver: &Config) -> Result<Vec<Server>, Error> {
    let (hosts, addresses, ports) = (driver.get_hosts(), driver.get_hostaddrs(), driver.get_ports());
    let count = hosts.len().max(addresses.len());
    let fits = |many: usize| many == 0 || many == count;
    if !fits(hosts.len()) || !fits(addresses.len()) {
        return Err(Error::Config(
            "host and hostaddr in the sink URI name different numbers of servers".into(),
        ));
    }
    if ports.len() > 1 && ports.len() != count {
        return Err(Error::Config("the sink URI names one port, or one for each server".into()));
    }
    let server = |at: usize| {
        let port = ports.get(at).or(ports.first()).copied().unwrap_or(DEFAULT_PORT);
        match (hosts.get(at), addresses.get(at)) {
            (Some(Host::Unix(directory)), None) => Some(Server::Unix(socket(directory, port))),
            (Some(Host::Tcp(name)), address) => {
                let host = address.map_or_else(|| name.clone(), ToString::to_string);
                Some(Server::Tcp { host, port, name: Some(name.clone()) })
            }
            (Some(Host::Unix(_)) | None, Some(address)) => {
                Some(Server::Tcp { host: address.to_string(), port, name: None })
            }
            (None, None) => None,
        }
    };
    let mut servers: Vec<Server> = (0..count).filter_map(server).collect();
    if driver.get_load_balance_hosts() == LoadBalanceHosts::Random {
        servers.shuffle(&mut rand::rng());
    }
    Ok(servers)
}

/// The socket that a server has in a directory (PostgreSQL manual, `unix_socket_directories`).
fn socket(directory: &Path, port: u16) -> PathBuf {
    directory.join(format!(".s.PGSQL.{port}"))
}

/// Where a server is.
#[derive(Clone, Debug)]
pub(super) enum Address {
    /// And the name that its certificate is to have, where there is one.
    Tcp(SocketAddr, Option<String>),
    /// The path of a socket.
    Unix(PathBuf),
}

/// The addresses of a server.
pub(super) async fn resolve(driver: &Config, server: Server) -> Result<Vec<Address>, Unreached> {
    let (host, port, name) = match server {
        Server::Unix(path) => return Ok(vec![Address::Unix(path)]),
        Server::Tcp { host, port, name } => (host, port, name),
    };
    let found = tokio::net::lookup_host((host, port)).await.map_err(failed(CONNECTING))?;
    let mut found: Vec<Address> = found.map(|address| Address::Tcp(address, name.clone())).collect();
    if driver.get_load_balance_hosts() == LoadBalanceHosts::Random {
        found.shuffle(&mut rand::rng());
    }
    Ok(found)
}

/// A stream to a server, before anybody has logged in.
pub(super) async fn dial(config: &PgConfig, address: &Address) -> Result<Box<dyn Io>, Unreached> {
    match address {
        // Nobody can listen in on it: as in libpq, `sslmode` does not matter.
        Address::Unix(path) => {
            let stream = UnixStream::connect(path).await.map_err(failed(CONNECTING))?;
            Ok(Box::new(Plain(stream)))
        }
        Address::Tcp(address, name) => {
            let stream = TcpStream::connect(address).await.map_err(failed(CONNECTING))?;
            prepare(&stream, &config.driver).map_err(failed(CONNECTING))?;
            let secured = secure(stream, &config.driver, &config.tls, name.as_deref()).await;
            secured.map_err(failed("error performing TLS handshake"))
        }
    }
}

fn prepare(stream: &TcpStream, driver: &Config) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_tcp_user_timeout(driver.get_tcp_user_timeout().copied())?;
    if !driver.get_keepalives() {
        return Ok(());
    }
    let mut keepalive = TcpKeepalive::new().with_time(driver.get_keepalives_idle());
    if let Some(interval) = driver.get_keepalives_interval() {
        keepalive = keepalive.with_interval(interval);
    }
    if let Some(retries) = driver.get_keepalives_retries() {
        keepalive = keepalive.with_retries(retries);
    }
    socket.set_tcp_keepalive(&keepalive)
}

/// Asks for TLS (PostgreSQL manual, "SSL Session Encryption").
async fn secure(
    mut stream: TcpStream,
    driver: &Config,
    tls: &MakeRustlsConnect,
    name: Option<&str>,
) -> io::Result<Box<dyn Io>> {
    let mode = driver.get_ssl_mode();
    if mode == SslMode::Disable {
        return Ok(Box::new(Plain(stream)));
    }
    if driver.get_ssl_negotiation() == SslNegotiation::Postgres && !offers_tls(&mut stream).await? {
        if mode == SslMode::Require {
            return Err(io::Error::other("server does not support TLS"));
        }
        return Ok(Box::new(Plain(stream)));
    }
    let name = name.ok_or_else(|| io::Error::other("no hostname provided for TLS handshake"))?;
    shake_hands(stream, tls.clone(), name).await
}

/// Asks a server whether it goes on with TLS. Not more than its answer is read: what else came was sent before there was
/// encryption, and breaks the handshake.
async fn offers_tls(stream: &mut TcpStream) -> io::Result<bool> {
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    stream.write_all(&request).await?;
    Ok(stream.read_u8().await? == b'S')
}

async fn shake_hands<M>(stream: TcpStream, mut tls: M, name: &str) -> io::Result<Box<dyn Io>>
where
    M: MakeTlsConnect<TcpStream>,
    M::Stream: AsyncRead + AsyncWrite + TlsStream + Send + 'static,
{
    let connect = tls.make_tls_connect(name).map_err(io::Error::other)?;
    Ok(Box::new(connect.connect(stream).await.map_err(io::Error::other)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn servers_of(uri: &str) -> Result<Vec<Server>, Error> {
        servers(&uri.parse().unwrap())
    }

    fn tcp(host: &str, port: u16, name: Option<&str>) -> Server {
        Server::Tcp { host: host.into(), port, name: name.map(str::to_owned) }
    }

    #[test]
    fn servers_come_in_order_with_their_ports() {
        assert_eq!(servers_of("postgres://u@a/d").unwrap(), [tcp("a", 5432, Some("a"))]);
        assert_eq!(
            servers_of("postgres://u@a:1,b:2/d").unwrap(),
            [tcp("a", 1, Some("a")), tcp("b", 2, Some("b"))]
        );
        assert_eq!(
            servers_of("host=a,b port=7 user=u").unwrap(),
            [tcp("a", 7, Some("a")), tcp("b", 7, Some("b"))]
        );
        assert_eq!(
            servers_of("host=/run/pg user=u port=6").unwrap(),
            [Server::Unix("/run/pg/.s.PGSQL.6".into())]
        );
    }

    #[test]
    fn an_address_is_dialled_and_the_name_is_that_of_the_certificate() {
        assert_eq!(
            servers_of("host=a hostaddr=10.0.0.1 user=u").unwrap(),
            [tcp("10.0.0.1", 5432, Some("a"))]
        );
        assert_eq!(servers_of("hostaddr=10.0.0.1 user=u").unwrap(), [tcp("10.0.0.1", 5432, None)]);
    }

    #[test]
    fn lists_that_do_not_fit_together_are_named() {
        let error = |uri| servers_of(uri).unwrap_err().to_string();
        assert!(error("host=a,b hostaddr=10.0.0.1 user=u").contains("hostaddr"));
        assert!(error("host=a,b port=1,2,3 user=u").contains("port"));
    }
}
