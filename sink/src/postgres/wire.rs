//! The byte stream of a session, which the driver and the pipeline use in turns.
//!
//! The driver has a server answer each statement by itself. Where many statements belong together that wakes both ends
//! once for each of them, so [`super::pipeline`] sends those by itself; for everything else there is the driver.
//!
//! ```text
//!   Client ──► driver ──► DriverEnd ─┐
//!                                    ├─► stream      one at a time: while somebody has a Turn, the driver waits
//!   pipeline ──────────► Turn ───────┘
//! ```
//!
//! Who waited for a socket last is woken by what comes next. The driver reads before it looks for requests, so a request does
//! not always make it wait again: whoever ends a turn waits in the driver's name. So it also hears when the server goes.
//!
//! A turn begins between messages and ends between messages. Whoever lets go of it elsewhere, as a task that is
//! cancelled, leaves a stream that nobody uses again.

use std::future::{Ready, ready};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::{Buf, BytesMut};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::tls::{ChannelBinding, TlsConnect, TlsStream};

/// Type byte and length of a message of the server.
const HEAD: usize = 5;
/// Bytes of what a server may say unasked that are read at a time.
const UNASKED: usize = 512;

/// A stream to a server, encrypted or not.
pub(super) trait Io: TlsStream + Send + Unpin {}
impl<T: TlsStream + Send + Unpin> Io for T {}

/// A stream without TLS.
pub(super) struct Plain<S>(pub(super) S);

impl<S: AsyncRead + Unpin> AsyncRead for Plain<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, into)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Plain<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> TlsStream for Plain<S> {
    fn channel_binding(&self) -> ChannelBinding {
        ChannelBinding::none()
    }
}

/// Where in the server's messages the driver is.
#[derive(Default)]
struct Place {
    head: [u8; HEAD],
    /// Bytes of the head that have come.
    known: usize,
    /// Bytes behind the head that have not.
    missing: usize,
}

impl Place {
    /// Steps over bytes.
    fn advance(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.missing > 0 {
                let here = self.missing.min(bytes.len());
                self.missing -= here;
                bytes.advance(here);
                continue;
            }
            let here = (HEAD - self.known).min(bytes.len());
            let (head, rest) = bytes.split_at(here);
            self.head[self.known..self.known + here].copy_from_slice(head);
            self.known += here;
            bytes = rest;
            if self.known == HEAD {
                let [_, a, b, c, d] = self.head;
                // The length counts itself.
                self.missing = (u32::from_be_bytes([a, b, c, d]) as usize).saturating_sub(4);
                self.known = 0;
            }
        }
    }

    fn is_between_messages(&self) -> bool {
        self.known == 0 && self.missing == 0
    }
}

struct State {
    stream: Box<dyn Io>,
    place: Place,
    /// Somebody has a turn.
    taken: bool,
    /// Somebody let go of a turn in the middle of it.
    torn: bool,
    /// What a turn has read beyond its end.
    left: BytesMut,
    /// The driver's task, since it has first waited.
    driver: Option<Waker>,
    /// It wants to be woken at the end of the turn.
    asked: bool,
}

impl State {
    /// Whether the driver may use the stream; if not now, it is woken when it may.
    fn admit(&mut self, cx: &Context<'_>) -> Poll<io::Result<()>> {
        if self.torn {
            return Poll::Ready(Err(torn()));
        }
        if self.taken {
            self.driver = Some(cx.waker().clone());
            self.asked = true;
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }

    /// Waits for what comes next in the name of the driver. Answers whom to wake at once.
    fn wait_for_driver(&mut self) -> Option<Waker> {
        let driver = self.driver.clone()?;
        if std::mem::take(&mut self.asked) || self.torn || !self.left.is_empty() {
            return Some(driver);
        }
        let mut bytes = [0; UNASKED];
        let mut into = ReadBuf::new(&mut bytes);
        match Pin::new(&mut *self.stream).poll_read(&mut Context::from_waker(&driver), &mut into) {
            Poll::Pending => None,
            // The end of the stream, or an error, is there for the driver as well.
            Poll::Ready(_) => {
                self.left.extend_from_slice(into.filled());
                Some(driver)
            }
        }
    }
}

fn torn() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "an exchange with the server was given up")
}

/// See the module.
#[derive(Clone)]
pub(super) struct Wire(Arc<Mutex<State>>);

impl Wire {
    /// A stream on which nothing was sent or received yet.
    pub(super) fn new(stream: Box<dyn Io>) -> Self {
        Self(Arc::new(Mutex::new(State {
            stream,
            place: Place::default(),
            taken: false,
            torn: false,
            left: BytesMut::new(),
            driver: None,
            asked: false,
        })))
    }

    /// The end that the driver has.
    pub(super) fn driver_end(&self) -> DriverEnd {
        DriverEnd(self.clone())
    }

    /// Takes the stream. The driver must have nothing under way: every answer to its requests must have come.
    ///
    /// # Errors
    /// When the stream is not usable any more.
    pub(super) fn turn(&self) -> io::Result<Turn<'_>> {
        let mut state = self.0.lock();
        if state.torn || state.taken || !state.place.is_between_messages() || !state.left.is_empty() {
            return Err(torn());
        }
        state.taken = true;
        Ok(Turn { wire: self, over: false })
    }

    /// Whether there is something that only the driver can read.
    pub(super) fn is_for_driver(&self) -> bool {
        let state = self.0.lock();
        !state.left.is_empty() || !state.place.is_between_messages()
    }
}

/// The right to use the stream.
pub(super) struct Turn<'w> {
    wire: &'w Wire,
    over: bool,
}

impl Turn<'_> {
    /// Sends some of the bytes.
    pub(super) fn poll_write(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.wire.0.lock().stream).poll_write(cx, bytes)
    }

    /// Makes sure that everything is sent.
    pub(super) fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.wire.0.lock().stream).poll_flush(cx)
    }

    /// Receives bytes; none: the server has closed the stream.
    pub(super) fn poll_read(&self, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.wire.0.lock().stream).poll_read(cx, into)
    }

    /// Ends the turn behind a whole message. What was read beyond it is the driver's.
    pub(super) fn end(mut self, left: BytesMut) {
        self.wire.0.lock().left = left;
        self.over = true;
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.wire.0.lock();
        state.taken = false;
        state.torn |= !self.over;
        let driver = state.wait_for_driver();
        drop(state);
        if let Some(driver) = driver {
            driver.wake();
        }
    }
}

/// The stream as the driver sees it: a TLS stream that is ready.
pub(super) struct DriverEnd(Wire);

impl AsyncRead for DriverEnd {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut state = self.0.0.lock();
        std::task::ready!(state.admit(cx))?;
        let before = into.filled().len();
        let state = &mut *state;
        if state.left.is_empty() {
            state.driver = Some(cx.waker().clone());
            std::task::ready!(Pin::new(&mut *state.stream).poll_read(cx, into))?;
        } else {
            let here = state.left.len().min(into.remaining());
            into.put_slice(&state.left.split_to(here));
        }
        state.place.advance(&into.filled()[before..]);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for DriverEnd {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut state = self.0.0.lock();
        std::task::ready!(state.admit(cx))?;
        Pin::new(&mut *state.stream).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.0.0.lock();
        std::task::ready!(state.admit(cx))?;
        Pin::new(&mut *state.stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.0.lock().stream).poll_shutdown(cx)
    }
}

impl TlsStream for DriverEnd {
    fn channel_binding(&self) -> ChannelBinding {
        self.0.0.lock().stream.channel_binding()
    }
}

/// Tells the driver that there is nothing to do about TLS.
pub(super) struct Secured;

impl TlsConnect<DriverEnd> for Secured {
    type Stream = DriverEnd;
    type Error = io::Error;
    type Future = Ready<io::Result<DriverEnd>>;

    fn connect(self, stream: DriverEnd) -> Self::Future {
        ready(Ok(stream))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    use super::*;

    fn pair() -> (Wire, DuplexStream) {
        let (ours, server) = tokio::io::duplex(1 << 10);
        (Wire::new(Box::new(Plain(ours))), server)
    }

    struct Wakes(std::sync::atomic::AtomicUsize);

    impl Wakes {
        fn count(&self) -> usize {
            self.0.load(std::sync::atomic::Ordering::SeqCst)
        }
    }

    impl std::task::Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        }
    }

    /// The waker of a task, and how often it was woken.
    fn task() -> (Waker, Arc<Wakes>) {
        let wakes = Arc::new(Wakes(0.into()));
        (Arc::clone(&wakes).into(), wakes)
    }

    /// A message of the server.
    fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        let len = u32::try_from(body.len() + 4).unwrap();
        [&[tag], &len.to_be_bytes()[..], body].concat()
    }

    async fn read(turn: &Turn<'_>) -> Vec<u8> {
        let mut bytes = [0; 64];
        let mut into = ReadBuf::new(&mut bytes);
        std::future::poll_fn(|cx| turn.poll_read(cx, &mut into)).await.unwrap();
        into.filled().to_vec()
    }

    #[test]
    fn a_place_is_between_messages_however_they_are_cut() {
        let bytes = [message(b'S', b"TimeZone\0UTC\0"), message(b'1', b""), message(b'Z', b"I")].concat();
        let ends = [18, 23, 29];
        for cut in 0..bytes.len() {
            let mut place = Place::default();
            place.advance(&bytes[..cut]);
            assert_eq!(place.is_between_messages(), cut == 0 || ends.contains(&cut), "cut at {cut}");
            place.advance(&bytes[cut..]);
            assert!(place.is_between_messages());
        }
    }

    #[tokio::test]
    async fn the_driver_waits_for_the_end_of_a_turn_and_gets_what_came_behind_it() {
        let (wire, mut server) = pair();
        let mut end = wire.driver_end();
        let turn = wire.turn().unwrap();
        let waiting = tokio::spawn(async move {
            let mut got = vec![0; 6];
            end.read_exact(&mut got).await.map(|_| got)
        });
        let theirs = message(b'Z', b"I");
        server.write_all(&[message(b'2', b""), theirs.clone()].concat()).await.unwrap();
        let read = read(&turn).await;
        assert!(!waiting.is_finished());
        assert!(wire.turn().is_err(), "one at a time");
        turn.end(BytesMut::from(&read[5..]));
        assert_eq!(waiting.await.unwrap().unwrap(), theirs);
        assert!(wire.turn().is_ok());
    }

    #[tokio::test]
    async fn no_turn_begins_inside_of_a_message() {
        let (wire, mut server) = pair();
        let mut end = wire.driver_end();
        let bytes = message(b'S', b"a\0b\0");
        server.write_all(&bytes).await.unwrap();
        let mut got = vec![0; 7];
        end.read_exact(&mut got).await.unwrap();
        assert!(wire.turn().is_err() && wire.is_for_driver());
        end.read_exact(&mut got[..2]).await.unwrap();
        assert!(wire.turn().is_ok() && !wire.is_for_driver());
    }

    #[tokio::test]
    async fn after_a_turn_that_was_given_up_nobody_uses_the_stream() {
        let (wire, _server) = pair();
        let mut end = wire.driver_end();
        drop(wire.turn().unwrap());
        assert!(wire.turn().is_err());
        let error = end.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
    }

    /// The driver has waited before the turn, and nobody asks it for anything afterwards.
    #[tokio::test]
    async fn after_a_turn_the_driver_waits_as_before_it() {
        let (wire, mut server) = pair();
        let mut end = wire.driver_end();
        let mut got = [0; 6];
        let mut first = std::pin::pin!(end.read_exact(&mut got));
        for round in 0..3 {
            let (driver, wakes) = task();
            assert!(first.as_mut().poll(&mut Context::from_waker(&driver)).is_pending());
            let turn = wire.turn().unwrap();
            let mut nobody = Context::from_waker(Waker::noop());
            assert!(turn.poll_read(&mut nobody, &mut ReadBuf::new(&mut [0; 1])).is_pending());
            server.write_all(&message(b'2', b"")).await.unwrap();
            assert_eq!(read(&turn).await.len(), 5);
            turn.end(BytesMut::new());
            assert_eq!(wakes.count(), 0, "it has nothing to do");
            if round == 2 {
                server.write_all(&message(b'N', b"\0")).await.unwrap();
                assert_eq!(wakes.count(), 1);
                assert!(first.as_mut().poll(&mut Context::from_waker(&driver)).is_ready());
            }
        }
        assert!(wire.turn().is_ok_and(|turn| (turn.end(BytesMut::new()), true).1));
        // Waits again, and hears that the server goes after one more turn.
        let (driver, wakes) = task();
        let mut end = std::pin::pin!(wire.driver_end());
        let mut bytes = [0; 1];
        let mut into = ReadBuf::new(&mut bytes);
        assert!(end.as_mut().poll_read(&mut Context::from_waker(&driver), &mut into).is_pending());
        wire.turn().unwrap().end(BytesMut::new());
        drop(server);
        assert_eq!(wakes.count(), 1);
    }
}
