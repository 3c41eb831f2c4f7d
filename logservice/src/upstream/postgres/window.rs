//! How far a server may send ahead of its reader.
//!
//! A walsender sends every change by itself. While the receive window of its reader is open each becomes a packet, which costs
//! the server as much as decoding it; while the window is closed changes gather at the sender and leave by tens of kilobytes.
//! So the window of a reader that is [near](super::reader::pace) is narrow: it fills soon after each look.
//!
//! `TCP_WINDOW_CLAMP` (tcp(7)) is what makes it so. It has to be set before the connection is made: a sender cuts segments to at
//! most half of the widest window that it was ever promised, and waits as long as the window has no room for one. The receive
//! buffer stays the system's to size, so that it holds any number of small packets that fit into the window; with a fixed one
//! (`SO_RCVBUF`) Linux promises a window by the lengths of the packets that came and drops what does not fit when others come.
//! Either mistake costs 200 ms a segment, again and again. When Linux finds that a reader keeps up, it may widen the window by
//! itself: then it is as wide as that of any other connection.

use std::io;
use std::net::SocketAddr;

use tokio::net::{TcpStream, lookup_host};

/// Width of a window that is narrow, in bytes: what some hundreds of small changes take. Below 64 KiB it needs no scale.
#[cfg(target_os = "linux")]
const NARROW: u32 = 48 << 10;

/// See the module.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Window {
    /// What the system finds best.
    System,
    /// Little, if the server is on this machine.
    NarrowIfNear,
}

/// Connects to the first address of a host that answers.
///
/// # Errors
/// The last address's; that of the system's resolver.
pub(super) async fn connect(host: &str, port: u16, window: Window) -> io::Result<TcpStream> {
    let mut last = None;
    for address in lookup_host((host, port)).await? {
        let connected = match window {
            #[cfg(target_os = "linux")]
            Window::NarrowIfNear if address.ip().is_loopback() => narrow(address).await,
            Window::NarrowIfNear | Window::System => TcpStream::connect(address).await,
        };
        match connected {
            Ok(stream) => return Ok(stream),
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the host has no address")))
}

#[cfg(target_os = "linux")]
async fn narrow(address: SocketAddr) -> io::Result<TcpStream> {
    use tokio::net::TcpSocket;

    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if let Err(error) = nix::sys::socket::setsockopt(&socket, linux::WindowClamp, &NARROW) {
        tracing::debug!(%error, "the receive window of the log reader stays as wide as the system makes it");
    }
    socket.connect(address).await
}

#[cfg(target_os = "linux")]
mod linux {
    use nix::sys::socket::sockopt::SetStruct;

    #[derive(Clone, Copy, Debug)]
    pub(super) struct WindowClamp;

    nix::setsockopt_impl!(WindowClamp, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, u32, SetStruct<'_, u32>);

    #[cfg(test)]
    nix::getsockopt_impl!(
        WindowClamp,
        libc::IPPROTO_TCP,
        libc::TCP_WINDOW_CLAMP,
        u32,
        nix::sys::socket::sockopt::GetStruct<u32>
    );
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::io::Write as _;
    use std::net::TcpListener;
    use std::pin::Pin;
    use std::task::Poll;
    use std::time::Duration;

    use tokio::io::{AsyncRead, ReadBuf};

    use super::super::socket::Socket;
    use super::*;

    #[tokio::test]
    async fn the_window_of_a_near_server_is_narrow_where_that_is_wanted() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let clamp = |stream: TcpStream| nix::sys::socket::getsockopt(&stream, linux::WindowClamp).unwrap();
        assert_eq!(clamp(connect("127.0.0.1", port, Window::NarrowIfNear).await.unwrap()), NARROW);
        assert!(clamp(connect("127.0.0.1", port, Window::System).await.unwrap()) > NARROW);
        drop(listener);
        assert!(connect("127.0.0.1", port, Window::NarrowIfNear).await.is_err());
    }

    /// Sends messages of many widths one by one, as a walsender does; answers how many bytes that were.
    fn send(stream: &mut std::net::TcpStream, total: usize) -> usize {
        const WIDTHS: [usize; 12] = [30, 130, 60, 130, 900, 90, 7_000, 130, 20_000, 40, 300_000, 1_500];
        stream.set_nodelay(true).expect("a socket has the option");
        let message = vec![7; 300_000];
        let mut sent = 0;
        for turn in 0_usize.. {
            // Phases of one width between the mixed ones, so that each width follows each.
            let width = if turn % 6_000 < 3_000 { WIDTHS[turn / 6_000 % 12] } else { WIDTHS[turn % 12] };
            stream.write_all(&message[..width]).expect("the other end reads");
            sent += width;
            if sent >= total {
                break;
            }
        }
        sent
    }

    /// One that stops 200 ms at each segment would take hours: with a fixed receive buffer of 16 KiB in place of the clamp,
    /// this comes to no end.
    #[tokio::test]
    async fn messages_of_all_widths_come_through_a_narrow_window_without_a_stop() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let sender = std::thread::spawn(move || send(&mut listener.accept().unwrap().0, 512 << 20));
        let mut socket = Socket::connect("127.0.0.1", port, Window::NarrowIfNear).await.unwrap();
        socket.set_lazy(true);
        let mut buffer = vec![0; 64 << 10];
        let read = async {
            let mut received = 0;
            loop {
                let mut into = ReadBuf::new(&mut buffer);
                let look =
                    std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut socket).poll_read(cx, &mut into)));
                match look.await {
                    Poll::Ready(done) => done.unwrap(),
                    Poll::Pending => {
                        tokio::time::sleep(Duration::from_millis(8)).await;
                        continue;
                    }
                }
                if into.filled().is_empty() {
                    return received;
                }
                received += into.filled().len();
            }
        };
        let received =
            tokio::time::timeout(Duration::from_secs(60), read).await.expect("the stream stands still");
        assert_eq!(received, sender.join().unwrap());
    }
}
