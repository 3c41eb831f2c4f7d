//! Options of a TCP connection between nodes, so that a peer that vanished is noticed.
//!
//! Who notices what, and when: bytes that nobody acknowledges end a connection after [`USER_TIMEOUT`]; a connection
//! on which nothing is said is probed by the kernel after [`KEEPALIVE_IDLE`] and ends [`USER_TIMEOUT`] after the last
//! sign of life, or three probes later. Both find a machine or a cable that is gone. A process that hangs while its
//! kernel goes on acknowledging is found by the ping of HTTP/2, see [`PING_EVERY`](super::PING_EVERY).

use std::io;
use std::time::Duration;

use tokio::net::TcpStream;

/// Bytes may stay unacknowledged for this long.
pub const USER_TIMEOUT: Duration = Duration::from_secs(10);
/// Silence after which the kernel asks whether the other end is there.
pub const KEEPALIVE_IDLE: Duration = Duration::from_secs(5);
/// Between two such questions.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(2);
/// Questions without an answer that end a connection.
const KEEPALIVE_PROBES: u32 = 3;

/// Sets the options of a connection, of either side.
///
/// # Errors
/// When the kernel refuses one; the connection works all the same, it only notices a dead peer later.
pub fn tune(stream: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;

    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_EVERY)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_PROBES)?;
    #[cfg(target_os = "linux")]
    sockopt::set_tcp_user_timeout(stream, u32::try_from(USER_TIMEOUT.as_millis()).unwrap_or(u32::MAX))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::sockopt;

    #[tokio::test]
    async fn a_connection_notices_a_peer_that_vanished() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let stream = TcpStream::connect(listener.local_addr().expect("bound")).await.expect("connected");
        tune(&stream).expect("supported");
        assert!(stream.nodelay().expect("readable"));
        assert!(sockopt::socket_keepalive(&stream).expect("readable"));
        assert_eq!(sockopt::tcp_keepidle(&stream).expect("readable"), KEEPALIVE_IDLE);
        #[cfg(target_os = "linux")]
        assert_eq!(sockopt::tcp_user_timeout(&stream).expect("readable"), 10_000);
    }
}
