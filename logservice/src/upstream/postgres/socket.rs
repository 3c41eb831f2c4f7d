//! A socket that the runtime polls only while somebody waits for it.
//!
//! A server sends every change of its log by itself. A socket that stays registered with the runtime's poller wakes
//! a thread for each of them, whether somebody waits for it or not, and that costs more than the change. So a
//! socket here is registered when a read or a write has to wait, and [`Socket::set_lazy`] lets go of it again.

use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, BufReader, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::client::TlsStream;

use super::window::{self, Window};

/// Most bytes of one read.
const READ: usize = 64 * 1024;

/// A byte stream over a [`Socket`].
pub(super) trait Io: AsyncRead + AsyncWrite + Send + Unpin {
    /// The socket below.
    fn socket(&mut self) -> &mut Socket;
}

impl Io for Socket {
    fn socket(&mut self) -> &mut Socket {
        self
    }
}

impl Io for TlsStream<BufReader<Socket>> {
    fn socket(&mut self) -> &mut Socket {
        self.get_mut().0.get_mut()
    }
}

/// A registration with the poller, on a handle of its own.
trait Watched: AsyncRead + AsyncWrite + Send + Sync + Unpin {}
impl Watched for TcpStream {}
impl Watched for UnixStream {}

#[derive(Debug)]
enum Stream {
    Tcp(std::net::TcpStream),
    Unix(std::os::unix::net::UnixStream),
}

impl Stream {
    fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => (&mut &*stream).read(into),
            Self::Unix(stream) => (&mut &*stream).read(into),
        }
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => (&mut &*stream).write(bytes),
            Self::Unix(stream) => (&mut &*stream).write(bytes),
        }
    }

    fn watch(&self) -> io::Result<Box<dyn Watched>> {
        Ok(match self {
            Self::Tcp(stream) => Box::new(TcpStream::from_std(stream.try_clone()?)?),
            Self::Unix(stream) => Box::new(UnixStream::from_std(stream.try_clone()?)?),
        })
    }
}

/// See the module.
pub(super) struct Socket {
    /// Does not block.
    stream: Stream,
    watched: Option<Box<dyn Watched>>,
    lazy: bool,
    /// The peer is on this machine.
    near: bool,
}

impl Socket {
    /// Connects.
    pub(super) async fn connect(host: &str, port: u16, window: Window) -> io::Result<Self> {
        Self::tcp(window::connect(host, port, window).await?)
    }

    /// Takes a connected stream away from the poller.
    fn tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let near = stream.peer_addr().is_ok_and(|peer| peer.ip().is_loopback());
        Ok(Self { stream: Stream::Tcp(stream.into_std()?), watched: None, lazy: false, near })
    }

    /// As [`Socket::tcp`].
    pub(super) fn unix(stream: UnixStream) -> io::Result<Self> {
        Ok(Self { stream: Stream::Unix(stream.into_std()?), watched: None, lazy: false, near: false })
    }

    /// Whether it goes through the loopback interface.
    pub(super) fn is_near(&self) -> bool {
        self.near
    }

    /// While lazy, a read of a dry socket is pending and nobody will be woken: for a caller that looks again by
    /// itself. Ends the registration with the poller.
    pub(super) fn set_lazy(&mut self, lazy: bool) {
        self.lazy = lazy;
        if lazy {
            self.watched = None;
        }
    }
}

/// `None` where the operation would have to wait.
fn attempt<T>(mut operation: impl FnMut() -> io::Result<T>) -> Option<io::Result<T>> {
    loop {
        match operation() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            done => return Some(done),
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.watched.is_none() {
            let room = into.remaining().min(READ);
            if let Some(done) = attempt(|| self.stream.read(into.initialize_unfilled_to(room))) {
                return Poll::Ready(done.map(|count| into.advance(count)));
            }
            if self.lazy {
                return Poll::Pending;
            }
            self.watched = Some(self.stream.watch()?);
        }
        match &mut self.watched {
            Some(watched) => Pin::new(watched).poll_read(cx, into),
            None => Poll::Pending,
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.watched.is_none() {
            if let Some(done) = attempt(|| self.stream.write(bytes)) {
                return Poll::Ready(done);
            }
            self.watched = Some(self.stream.watch()?);
        }
        match &mut self.watched {
            Some(watched) => Pin::new(watched).poll_write(cx, bytes),
            None => Poll::Pending,
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(match &self.stream {
            Stream::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Stream::Unix(stream) => stream.shutdown(Shutdown::Write),
        })
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    async fn pair() -> (Socket, Socket) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        let (one, other) = tokio::join!(TcpStream::connect(to), listener.accept());
        (Socket::tcp(one.unwrap()).unwrap(), Socket::tcp(other.unwrap().0).unwrap())
    }

    #[tokio::test]
    async fn more_than_any_buffer_holds_arrives_in_order_both_ways() {
        let (mut one, mut other) = pair().await;
        let bytes: Vec<u8> = (0..8 << 20).map(|i: u32| i.to_le_bytes()[1] ^ i.to_le_bytes()[0]).collect();
        let expected = bytes.clone();
        let echo = tokio::spawn(async move {
            let mut got = vec![0; expected.len()];
            other.read_exact(&mut got).await.unwrap();
            assert!(got == expected);
            other.write_all(&got).await.unwrap();
            other.shutdown().await.unwrap();
        });
        one.write_all(&bytes).await.unwrap();
        let mut back = Vec::new();
        one.read_to_end(&mut back).await.unwrap();
        assert!(back == bytes);
        echo.await.unwrap();
    }

    #[tokio::test]
    async fn a_server_of_this_machine_is_near() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(Socket::connect("127.0.0.1", port, Window::System).await.unwrap().is_near());
        drop(listener);
        assert!(Socket::connect("127.0.0.1", port, Window::System).await.is_err());
    }

    #[tokio::test]
    async fn after_a_lazy_look_a_wait_hears_what_came_before_and_after_it() {
        let (mut one, mut other) = pair().await;
        let mut buffer = [0; 4];
        for round in 0..100_u8 {
            one.set_lazy(true);
            let look = std::future::poll_fn(|cx| {
                let mut into = ReadBuf::new(&mut buffer);
                Poll::Ready(Pin::new(&mut one).poll_read(cx, &mut into).is_pending())
            });
            assert!(look.await, "nothing was sent yet");
            one.set_lazy(false);
            if round % 2 == 0 {
                other.write_all(&[round]).await.unwrap();
                assert_eq!(one.read_u8().await.unwrap(), round);
            } else {
                let (read, sent) = tokio::join!(one.read_u8(), async {
                    tokio::task::yield_now().await;
                    other.write_all(&[round]).await
                });
                sent.unwrap();
                assert_eq!(read.unwrap(), round);
            }
        }
    }
}
