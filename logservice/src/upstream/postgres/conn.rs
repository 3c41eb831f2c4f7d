//! One connection to a PostgreSQL server: start-up, log-in, simple queries, COPY in both directions.
//!
//! Ordinary and replication connections are the same thing here. Received bytes lie in one buffer; the hot
//! paths look at complete messages in place ([`Connection::peek`], [`Connection::body`]) and step over them.

use std::io;
use std::pin::pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio_rustls::TlsConnector;

use super::options::{ConnectOptions, Endpoint, SslMode};
use super::server_error::ServerError;
use super::socket::{Io, Socket};
use super::tls;
use super::window::Window;
use crate::Error;

/// Least free space of a read: large reads keep the number of system calls small.
const READ_CHUNK: usize = 256 * 1024;
/// A buffer that one huge row has grown beyond this is given back when it is empty.
const KEEP_BUFFER: usize = 8 * 1024 * 1024;
/// PostgreSQL builds a message in at most 1 GiB.
const MAX_MESSAGE: usize = (1 << 30) + 1024;
/// Type byte and length of a message.
const HEAD: usize = 5;
/// Microseconds between the Unix epoch and PostgreSQL's, 2000-01-01.
pub(crate) const PG_EPOCH_MICROS: i64 = 946_684_800_000_000;

/// What a connection is for; decides its session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Purpose {
    /// Short statements, which must not hang behind somebody's lock.
    Admin,
    /// Reading tables for as long as it takes.
    Copy,
    /// `replication=database`.
    Replication,
}

impl Purpose {
    /// Only what comes as a stream of small messages is to gather at its sender.
    fn window(self) -> Window {
        match self {
            Self::Admin | Self::Copy => Window::System,
            Self::Replication => Window::NarrowIfNear,
        }
    }
}

/// How far the data of a COPY was taken.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct CopyData {
    /// Bytes of the current message that are still to come.
    left: usize,
    /// Messages that have begun: the server sends one for each row.
    pub(crate) messages: u64,
}

impl CopyData {
    /// Whether a message has begun and not ended.
    pub(crate) fn is_inside(&self) -> bool {
        self.left > 0
    }
}

/// What [`Connection::take_copy`] has come to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum CopyStep {
    /// There is as much as was asked for.
    Enough,
    /// More has to arrive first.
    Wait,
    /// A message of another kind, complete: type and total length.
    Other(u8, usize),
}

/// Result rows of a simple query, in text form.
pub(crate) struct Row(Vec<Option<String>>);

impl Row {
    /// A value that may be NULL.
    pub(crate) fn opt(&self, column: usize) -> Option<&str> {
        self.0.get(column).and_then(Option::as_deref)
    }

    /// A value; empty for NULL.
    pub(crate) fn text(&self, column: usize) -> &str {
        self.opt(column).unwrap_or_default()
    }

    /// A boolean; false for NULL.
    pub(crate) fn flag(&self, column: usize) -> bool {
        self.opt(column) == Some("t")
    }

    /// A number.
    pub(crate) fn number<T: std::str::FromStr>(&self, column: usize) -> Result<T, Error> {
        let text = self.text(column);
        text.parse().map_err(|_| Error::protocol(format_args!("{text:?} where a number was expected")))
    }
}

/// A live connection.
pub(crate) struct Connection {
    io: Box<dyn Io>,
    read: BytesMut,
    write: BytesMut,
    address: String,
    endpoint: Endpoint,
    backend: (i32, i32),
    version: u32,
    /// Replays another server's log.
    standby: bool,
    last_read: Instant,
    received: u64,
}

impl Connection {
    /// Connects and logs in; tries the endpoints in their order.
    pub(crate) async fn connect(
        options: &ConnectOptions,
        purpose: Purpose,
        application: &str,
    ) -> Result<Self, Error> {
        let mut last = Error::protocol("no endpoint");
        for endpoint in &options.endpoints {
            let attempt = Self::connect_to(options, endpoint, purpose, application);
            let error = match tokio::time::timeout(options.connect_timeout, attempt).await {
                Ok(Ok(connection)) => return Ok(connection),
                Ok(Err(error)) => error,
                Err(_) => unreachable(endpoint, io::ErrorKind::TimedOut.into()),
            };
            if !error.is_retryable() {
                return Err(error);
            }
            // A standby that waits for its promotion says more than a primary that is gone.
            let says_less = matches!(error, Error::UpstreamUnreachable { .. });
            if !(says_less && matches!(last, Error::UpstreamUnavailable { .. })) {
                last = error;
            }
        }
        Err(last)
    }

    async fn connect_to(
        options: &ConnectOptions,
        endpoint: &Endpoint,
        purpose: Purpose,
        application: &str,
    ) -> Result<Self, Error> {
        let mut connection = Self {
            io: open(options, endpoint, purpose.window()).await?,
            read: BytesMut::new(),
            write: BytesMut::new(),
            address: endpoint.to_string(),
            endpoint: endpoint.clone(),
            backend: (0, 0),
            version: 0,
            standby: false,
            last_read: Instant::now(),
            received: 0,
        };
        connection.log_in(options, purpose, application).await?;
        if connection.standby {
            // Another endpoint may be the primary, and this one may become it.
            let what = format!(
                "the server at {endpoint} is a standby; replication goes on when it is promoted, or when the URI names \
                 the primary"
            );
            return Err(Error::UpstreamUnavailable { message: what });
        }
        if purpose == Purpose::Copy && connection.version >= 17 {
            connection.query("open a session", "SET transaction_timeout = 0").await?;
        }
        Ok(connection)
    }

    async fn log_in(
        &mut self,
        options: &ConnectOptions,
        purpose: Purpose,
        application: &str,
    ) -> Result<(), Error> {
        // The session decides how values are written; every connection of ours must write them alike.
        let mut parameters = vec![
            ("user", options.user.as_str()),
            ("database", options.database.as_str()),
            ("application_name", application),
            ("client_encoding", "UTF8"),
            ("DateStyle", "ISO, MDY"),
            ("IntervalStyle", "postgres"),
            ("TimeZone", "UTC"),
            ("extra_float_digits", "3"),
            ("bytea_output", "hex"),
            ("xmlbinary", "base64"),
            ("lc_monetary", "C"),
            ("search_path", ""),
            ("quote_all_identifiers", "off"),
            ("row_security", "off"),
            ("default_transaction_read_only", "off"),
            ("default_transaction_isolation", "read committed"),
            ("idle_in_transaction_session_timeout", "0"),
            ("idle_session_timeout", "0"),
            // Questions to the catalogs look dearer than they are; what compiles them takes longer than they do.
            ("jit", "off"),
        ];
        match purpose {
            Purpose::Admin => parameters.extend([("statement_timeout", "60s"), ("lock_timeout", "15s")]),
            Purpose::Copy => parameters.extend([("statement_timeout", "0"), ("lock_timeout", "60s")]),
            Purpose::Replication => {
                parameters.extend([
                    ("replication", "database"),
                    ("statement_timeout", "0"),
                    ("lock_timeout", "0"),
                ]);
            }
        }
        frontend::startup_message(parameters, &mut self.write).map_err(Error::protocol)?;
        self.flush().await?;
        let mut scram = None;
        loop {
            let (tag, body) = self.message().await?;
            match tag {
                b'R' => self.authenticate(options, &body, &mut scram).await?,
                b'K' if body.len() >= 8 => {
                    let mut body = &body[..];
                    self.backend = (body.get_i32(), body.get_i32());
                }
                b'S' => self.on_parameter(&body),
                b'E' => return Err(ServerError::parse(&body).into_login_error(options, purpose)),
                b'N' | b'v' => {}
                b'Z' => return Ok(()),
                _ => return Err(unexpected(tag, "log in")),
            }
        }
    }

    fn on_parameter(&mut self, body: &[u8]) {
        let mut parts = body.split(|&b| b == 0);
        let (name, value) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        match name {
            b"server_version" => {
                let text = String::from_utf8_lossy(value).into_owned();
                let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
                self.version = digits.parse().unwrap_or(0);
            }
            b"in_hot_standby" => self.standby = value == b"on",
            _ => {}
        }
    }

    async fn authenticate(
        &mut self,
        options: &ConnectOptions,
        body: &[u8],
        scram: &mut Option<ScramSha256>,
    ) -> Result<(), Error> {
        let refused =
            |message: &str| Error::UpstreamAuth { user: options.user.clone(), message: message.to_owned() };
        let password = || {
            options.password.as_deref().ok_or_else(|| refused("it asks for a password, and the URI has none"))
        };
        let (code, data) =
            body.split_first_chunk::<4>().ok_or_else(|| Error::protocol("short log-in message"))?;
        match u32::from_be_bytes(*code) {
            0 => return Ok(()),
            3 => frontend::password_message(password()?.as_bytes(), &mut self.write)
                .map_err(Error::protocol)?,
            5 => {
                let salt = *data.first_chunk::<4>().ok_or_else(|| Error::protocol("short md5 salt"))?;
                let hash = md5_hash(options.user.as_bytes(), password()?.as_bytes(), salt);
                frontend::password_message(hash.as_bytes(), &mut self.write).map_err(Error::protocol)?;
            }
            10 => {
                if !data.split(|&b| b == 0).any(|name| name == SCRAM_SHA_256.as_bytes()) {
                    return Err(refused("it offers no log-in method that is known here"));
                }
                let client = ScramSha256::new(password()?.as_bytes(), ChannelBinding::unsupported());
                frontend::sasl_initial_response(SCRAM_SHA_256, client.message(), &mut self.write)
                    .map_err(Error::protocol)?;
                *scram = Some(client);
            }
            11 => {
                let client = scram.as_mut().ok_or_else(|| Error::protocol("SASL out of order"))?;
                client.update(data).map_err(|_| refused("the SCRAM exchange does not work out"))?;
                frontend::sasl_response(client.message(), &mut self.write).map_err(Error::protocol)?;
            }
            12 => {
                let client = scram.as_mut().ok_or_else(|| Error::protocol("SASL out of order"))?;
                client
                    .finish(data)
                    .map_err(|_| refused("the server cannot prove that it knows the password"))?;
                return Ok(());
            }
            _ => return Err(refused("it demands a log-in method that is not supported (Kerberos or SSPI)")),
        }
        self.flush().await
    }

    /// Major version of the server.
    pub(crate) fn version(&self) -> u32 {
        self.version
    }

    /// Host and port, for messages.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// When bytes last came in.
    pub(crate) fn last_read(&self) -> Instant {
        self.last_read
    }

    /// Bytes received so far.
    pub(crate) fn received(&self) -> u64 {
        self.received
    }

    /// Whether the server is reached through the loopback interface.
    pub(crate) fn is_near(&mut self) -> bool {
        self.io.socket().is_near()
    }

    /// What is needed to cancel a statement of this connection from another one.
    pub(crate) fn cancel_token(&self) -> CancelToken {
        CancelToken { endpoint: self.endpoint.clone(), backend: self.backend }
    }

    /// Runs statements and returns the rows of the last that returns any. `action` completes
    /// "the upstream refused to …".
    pub(crate) async fn query(&mut self, action: &str, sql: &str) -> Result<Vec<Row>, Error> {
        frontend::query(sql, &mut self.write).map_err(Error::protocol)?;
        self.flush().await?;
        self.answer(action, b"TDCI").await
    }

    /// Has the server read a statement without running it. It must be a single one.
    pub(crate) async fn parse(&mut self, action: &str, sql: &str) -> Result<(), Error> {
        frontend::parse("", sql, std::iter::empty(), &mut self.write).map_err(Error::protocol)?;
        frontend::sync(&mut self.write);
        self.flush().await?;
        self.answer(action, b"1").await.map(drop)
    }

    /// Reads an answer to its end: the rows of the last statement that returned any. It may consist of messages with the
    /// `expected` tags, beside those that every answer may have.
    async fn answer(&mut self, action: &str, expected: &[u8]) -> Result<Vec<Row>, Error> {
        let mut rows = Vec::new();
        let mut failure = None;
        loop {
            let (tag, body) = match self.message().await {
                Ok(message) => message,
                // A fatal error is followed by the end of the connection; the error says more.
                Err(error) => return Err(failure.unwrap_or(error)),
            };
            match tag {
                b'E' => failure = Some(ServerError::parse(&body).into_error(action)),
                b'S' => self.on_parameter(&body),
                b'N' | b'A' => {}
                b'Z' => return failure.map_or(Ok(rows), Err),
                _ if !expected.contains(&tag) => return Err(unexpected(tag, action)),
                b'T' => rows.clear(),
                b'D' => rows.push(parse_row(&body)?),
                _ => {}
            }
        }
    }

    /// Starts `COPY … TO STDOUT` or `START_REPLICATION`: afterwards messages are read with
    /// [`Connection::peek`].
    pub(crate) async fn start_copy(&mut self, action: &str, sql: &str) -> Result<(), Error> {
        frontend::query(sql, &mut self.write).map_err(Error::protocol)?;
        self.flush().await?;
        loop {
            let (tag, body) = self.message().await?;
            match tag {
                b'W' | b'H' => return Ok(()),
                b'E' => return Err(ServerError::parse(&body).into_error(action)),
                b'S' | b'N' => {}
                _ => return Err(unexpected(tag, action)),
            }
        }
    }

    /// Type and total length of the next message if it is complete in the buffer.
    pub(crate) fn peek(&self) -> Result<Option<(u8, usize)>, Error> {
        let Some((tag, total)) = self.head()? else { return Ok(None) };
        Ok((self.read.len() >= total).then_some((tag, total)))
    }

    /// Total length of the next message and what is there of it, when that is not all.
    #[inline]
    pub(crate) fn coming(&self) -> Option<(usize, &[u8])> {
        let (_, total) = self.head().ok()??;
        (self.read.len() < total).then(|| (total, self.read.get(HEAD..).unwrap_or_default()))
    }

    fn head(&self) -> Result<Option<(u8, usize)>, Error> {
        let Some(&[tag, a, b, c, d]) = self.read.first_chunk::<HEAD>() else { return Ok(None) };
        let len = u32::from_be_bytes([a, b, c, d]) as usize;
        if !(4..=MAX_MESSAGE).contains(&len) {
            return Err(Error::protocol(format_args!("message of {len} bytes")));
        }
        Ok(Some((tag, len + 1)))
    }

    /// Content of the message that [`Connection::peek`] has found.
    pub(crate) fn body(&self, total: usize) -> &[u8] {
        self.read.get(HEAD..total).unwrap_or_default()
    }

    /// Steps over the message that [`Connection::peek`] has found. What a huge one has taken is given back at once: who
    /// took its content may hold that for long.
    pub(crate) fn advance(&mut self, total: usize) {
        self.read.advance(total.min(self.read.len()));
        if total > KEEP_BUFFER {
            self.read = BytesMut::from(&self.read[..]);
        }
    }

    /// Waits for more bytes. Loses nothing when it is cancelled.
    pub(crate) async fn fill(&mut self) -> Result<(), Error> {
        let missing = match self.head()? {
            Some((_, total)) => total.saturating_sub(self.read.len()),
            None => 0,
        };
        self.read_more(missing).await
    }

    /// As [`Connection::fill`], in the middle of a message that is not waited for as a whole.
    pub(crate) async fn fill_on(&mut self) -> Result<(), Error> {
        self.read_more(0).await
    }

    async fn read_more(&mut self, missing: usize) -> Result<(), Error> {
        self.read.reserve(missing.max(READ_CHUNK));
        match self.io.read_buf(&mut self.read).await {
            Ok(0) => {
                Err(self
                    .broken(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection")))
            }
            Ok(n) => {
                self.last_read = Instant::now();
                self.received += n as u64;
                Ok(())
            }
            Err(error) => Err(self.broken(error)),
        }
    }

    /// Moves data of a COPY that has arrived to `out`, until that has `enough` bytes; a message need not be there as a whole.
    pub(crate) fn take_copy(
        &mut self,
        data: &mut CopyData,
        out: &mut BytesMut,
        enough: usize,
    ) -> Result<CopyStep, Error> {
        loop {
            if data.left > 0 {
                let here = data.left.min(self.read.len());
                out.extend_from_slice(self.read.get(..here).unwrap_or_default());
                self.read.advance(here);
                data.left -= here;
            }
            if out.len() >= enough {
                return Ok(CopyStep::Enough);
            }
            if data.left > 0 {
                return Ok(CopyStep::Wait);
            }
            let Some((tag, total)) = self.head()? else { return Ok(CopyStep::Wait) };
            if tag == b'd' {
                data.messages += 1;
                data.left = total - HEAD;
                self.read.advance(HEAD);
            } else if self.read.len() < total {
                return Ok(CopyStep::Wait);
            } else {
                return Ok(CopyStep::Other(tag, total));
            }
        }
    }

    /// Takes more bytes if some are there; false: none. The socket is not watched afterwards, until
    /// [`Connection::fill`] waits for it.
    pub(crate) async fn try_fill(&mut self) -> Result<bool, Error> {
        self.io.socket().set_lazy(true);
        let filled = {
            let mut fill = pin!(self.fill());
            std::future::poll_fn(|cx| Poll::Ready(fill.as_mut().poll(cx))).await
        };
        self.io.socket().set_lazy(false);
        match filled {
            Poll::Ready(result) => result.map(|()| true),
            Poll::Pending => Ok(false),
        }
    }

    /// The next message, taken out of the buffer.
    pub(crate) async fn message(&mut self) -> Result<(u8, Bytes), Error> {
        loop {
            if let Some((tag, total)) = self.peek()? {
                let mut message = self.read.split_to(total);
                message.advance(HEAD);
                return Ok((tag, message.freeze()));
            }
            self.fill().await?;
        }
    }

    /// Sends a standby status update.
    pub(crate) async fn send_status(
        &mut self,
        received: u64,
        flushed: u64,
        ask_reply: bool,
    ) -> Result<(), Error> {
        self.write.put_u8(b'd');
        self.write.put_u32(4 + 34);
        self.write.put_u8(b'r');
        self.write.put_u64(received);
        self.write.put_u64(flushed);
        self.write.put_u64(flushed);
        self.write.put_i64(now_micros() - PG_EPOCH_MICROS);
        self.write.put_u8(u8::from(ask_reply));
        self.flush().await
    }

    /// Says good-bye; errors do not matter any more.
    pub(crate) async fn close(mut self) {
        frontend::terminate(&mut self.write);
        drop(tokio::time::timeout(Duration::from_secs(1), self.flush()).await);
    }

    async fn flush(&mut self) -> Result<(), Error> {
        let sent = async {
            self.io.write_all(&self.write).await?;
            self.io.flush().await
        };
        let result = sent.await;
        self.write.clear();
        result.map_err(|error| self.broken(error))
    }

    fn broken(&self, source: io::Error) -> Error {
        Error::UpstreamUnreachable { address: self.address.clone(), source: Box::new(source) }
    }
}

/// Cancels the running statement of one connection.
#[derive(Clone, Debug)]
pub(crate) struct CancelToken {
    endpoint: Endpoint,
    backend: (i32, i32),
}

impl CancelToken {
    /// Asks the server to cancel; there is no answer.
    pub(crate) async fn cancel(&self, options: &ConnectOptions) {
        let ask = async {
            let mut io = open(options, &self.endpoint, Window::System).await?;
            let mut message = BytesMut::new();
            frontend::cancel_request(self.backend.0, self.backend.1, &mut message);
            io.write_all(&message).await.map_err(|error| unreachable(&self.endpoint, error))?;
            io.flush().await.map_err(|error| unreachable(&self.endpoint, error))
        };
        if let Ok(Err(error)) = tokio::time::timeout(options.connect_timeout, ask).await {
            tracing::debug!(error = error.chain(), "cannot cancel a statement");
        }
    }
}

/// Opens the byte stream, with TLS as far as the options and the server want it.
async fn open(options: &ConnectOptions, endpoint: &Endpoint, window: Window) -> Result<Box<dyn Io>, Error> {
    let host = match endpoint {
        Endpoint::Tcp(host, _) => host,
        Endpoint::Unix(path) => {
            let stream = UnixStream::connect(path).await.and_then(Socket::unix);
            return Ok(Box::new(stream.map_err(|error| unreachable(endpoint, error))?));
        }
    };
    if options.ssl_mode == SslMode::Disable {
        return Ok(Box::new(tcp(endpoint, window).await?));
    }
    let mut stream = tcp(endpoint, window).await?;
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    let answer = async {
        stream.write_all(&request).await?;
        stream.read_u8().await
    };
    match answer.await.map_err(|error| unreachable(endpoint, error))? {
        b'S' => {}
        b'N' if options.ssl_mode == SslMode::Prefer => return Ok(Box::new(stream)),
        b'N' => {
            return Err(Error::UpstreamTls {
                reason: "the server does not offer it; set ssl = on there, or sslmode=disable in the URI"
                    .to_owned(),
                source: None,
            });
        }
        _ => return Err(Error::protocol("the answer to a TLS request is no PostgreSQL server's")),
    }
    let connector = TlsConnector::from(tls::client_config(options)?);
    // The records are small; reading them out of a large buffer saves most of the system calls.
    let buffered = BufReader::with_capacity(READ_CHUNK, stream);
    match connector.connect(tls::server_name(host)?, buffered).await {
        Ok(stream) => Ok(Box::new(stream)),
        Err(error) if options.ssl_mode == SslMode::Prefer => {
            tracing::debug!(%error, "TLS failed and is not demanded");
            Ok(Box::new(tcp(endpoint, window).await?))
        }
        Err(error) => Err(Error::UpstreamTls {
            reason: "the handshake failed; check sslmode and sslrootcert against the server's certificate"
                .to_owned(),
            source: Some(Box::new(error)),
        }),
    }
}

async fn tcp(endpoint: &Endpoint, window: Window) -> Result<Socket, Error> {
    let Endpoint::Tcp(host, port) = endpoint else { return Err(Error::protocol("no TCP endpoint")) };
    let socket = Socket::connect(host, *port, window).await;
    socket.map_err(|error| unreachable(endpoint, error))
}

fn unreachable(endpoint: &Endpoint, source: io::Error) -> Error {
    Error::UpstreamUnreachable { address: endpoint.to_string(), source: Box::new(source) }
}

fn unexpected(tag: u8, action: &str) -> Error {
    Error::protocol(format_args!("message {:?} in answer to: {action}", char::from(tag)))
}

fn parse_row(body: &[u8]) -> Result<Row, Error> {
    let short = || Error::protocol("result row is cut off");
    let (count, mut rest) = body.split_first_chunk::<2>().ok_or_else(short)?;
    let mut values = Vec::with_capacity(usize::from(u16::from_be_bytes(*count)));
    for _ in 0..u16::from_be_bytes(*count) {
        let (len, tail) = rest.split_first_chunk::<4>().ok_or_else(short)?;
        let len = i32::from_be_bytes(*len);
        let Ok(len) = usize::try_from(len) else {
            values.push(None);
            rest = tail;
            continue;
        };
        let (value, tail) = tail.split_at_checked(len).ok_or_else(short)?;
        let text = std::str::from_utf8(value).map_err(|_| Error::protocol("a name is not UTF-8"))?;
        values.push(Some(text.to_owned()));
        rest = tail;
    }
    Ok(Row(values))
}

/// Wall time of this machine in microseconds since the Unix epoch.
pub(crate) fn now_micros() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}
