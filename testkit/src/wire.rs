//! The network between the processes: every address that a node is told leads through here, and may be cut.
//!
//! One listener for each destination. Who called is found out from `/proc`, so that one address can be cut for one
//! caller and stay open for another, as when a cable is pulled. What is cut is silent: bytes, and the end of a
//! connection, wait until it is mended, or for ever; nobody is told. Needs no privileges. Unlike a cable, a new
//! connection is accepted at once, and only then nothing is heard.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// How long it is looked for the process behind a connection, and how often: it is there before the connection is.
const LOOKS: usize = 5;
const LOOK: Duration = Duration::from_millis(10);
/// Bytes that are carried at once.
const PIECE: usize = 64 << 10;

/// An end of a connection.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Place {
    /// A Millrace node.
    Node(usize),
    /// A member of the metadata store.
    Store(usize),
    /// The upstream.
    Source,
    /// The downstream.
    Target,
    /// Whoever is none of these.
    Outside,
}

/// What cannot get from its first to its second place.
type Cuts = BTreeSet<(Place, Place)>;

/// A port that is not known yet; until then nobody is reached.
#[derive(Debug, Default)]
pub struct Later(Arc<AtomicU16>);

impl Later {
    /// From now on the process is reached there.
    pub fn is_at(&self, port: u16) {
        self.0.store(port, Ordering::Relaxed);
    }
}

/// The network.
#[derive(Clone, Debug)]
pub struct Wires {
    cuts: watch::Sender<Cuts>,
    processes: Arc<Mutex<BTreeMap<u32, Place>>>,
}

impl Default for Wires {
    fn default() -> Self {
        Self::new()
    }
}

impl Wires {
    /// A network in which everybody reaches everybody.
    pub fn new() -> Self {
        let own = BTreeMap::from([(std::process::id(), Place::Outside)]);
        Self { cuts: watch::Sender::new(Cuts::new()), processes: Arc::new(Mutex::new(own)) }
    }

    /// Opens an address for a place whose process listens at a port of this machine.
    pub async fn open(&self, place: Place, port: u16) -> Result<u16> {
        let (address, later) = self.open_early(place).await?;
        later.is_at(port);
        Ok(address)
    }

    /// Opens an address for a place whose process is told the address before it says its port.
    pub async fn open_early(&self, place: Place) -> Result<(u16, Later)> {
        let later = Later::default();
        let port = Arc::clone(&later.0);
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.context("open an address")?;
        let address = listener.local_addr()?;
        let wires = self.clone();
        tokio::spawn(async move {
            // An accept fails when the process is out of descriptors; then later ones go on.
            loop {
                match listener.accept().await {
                    Ok((stream, peer)) => {
                        let wires = wires.clone();
                        let port = port.load(Ordering::Relaxed);
                        tokio::spawn(async move { wires.carry(stream, peer, address, place, port).await });
                    }
                    Err(_) => tokio::time::sleep(LOOK).await,
                }
            }
        });
        Ok((address.port(), later))
    }

    /// From now on the connections of this process are those of the place.
    pub fn is_at(&self, pid: u32, place: Place) {
        let mut processes = self.processes.lock().unwrap_or_else(PoisonError::into_inner);
        processes.retain(|_, known| *known != place);
        processes.insert(pid, place);
    }

    /// Cuts both directions between two places.
    pub fn cut(&self, one: Place, other: Place) {
        self.cuts.send_modify(|cuts| cuts.extend([(one, other), (other, one)]));
    }

    /// Cuts one direction.
    pub fn cut_one_way(&self, from: Place, to: Place) {
        self.cuts.send_modify(|cuts| cuts.extend([(from, to)]));
    }

    /// Mends everything; what waited goes on.
    pub fn mend(&self) {
        self.cuts.send_modify(Cuts::clear);
    }

    async fn carry(&self, inbound: TcpStream, peer: SocketAddr, own: SocketAddr, place: Place, port: u16) {
        let caller = self.caller(peer, own).await;
        let Ok(outbound) = TcpStream::connect(("127.0.0.1", port)).await else { return };
        // Small requests and answers take turns.
        let _ = inbound.set_nodelay(true);
        let _ = outbound.set_nodelay(true);
        let ((from_caller, to_caller), (from_place, to_place)) =
            (inbound.into_split(), outbound.into_split());
        let cuts = || self.cuts.subscribe();
        tokio::join!(
            pump(from_caller, to_place, cuts(), (caller, place)),
            pump(from_place, to_caller, cuts(), (place, caller)),
        );
    }

    /// Whose end of a connection it is.
    async fn caller(&self, peer: SocketAddr, own: SocketAddr) -> Place {
        for _ in 0..LOOKS {
            if let Some(inode) = fs::read_to_string("/proc/net/tcp").ok().and_then(|t| inode(&t, peer, own)) {
                let processes = self.processes.lock().unwrap_or_else(PoisonError::into_inner).clone();
                let holder = processes.iter().find(|(pid, _)| holds(**pid, inode));
                if let Some((_, place)) = holder {
                    return *place;
                }
            }
            tokio::time::sleep(LOOK).await;
        }
        Place::Outside
    }
}

/// Carries bytes in one direction while it is not cut.
async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut cuts: watch::Receiver<Cuts>,
    way: (Place, Place),
) {
    let mut piece = vec![0; PIECE];
    loop {
        // A broken connection ends as a closed one does.
        let length = from.read(&mut piece).await.unwrap_or(0);
        if cuts.wait_for(|cuts| !cuts.contains(&way)).await.is_err() {
            return;
        }
        if length == 0 {
            // The other end may be gone already.
            let _ = to.shutdown().await;
            return;
        }
        if to.write_all(&piece[..length]).await.is_err() {
            return;
        }
    }
}

/// The socket of a connection from one address to another, in the form of `/proc/net/tcp`.
fn inode(table: &str, from: SocketAddr, to: SocketAddr) -> Option<u64> {
    let (from, to) = (kernel_form(from)?, kernel_form(to)?);
    table.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let is_it = fields.get(1) == Some(&from.as_str()) && fields.get(2) == Some(&to.as_str());
        is_it.then(|| fields.get(9)?.parse().ok()).flatten()
    })
}

/// The four bytes of the address as the machine keeps them, and the port.
fn kernel_form(address: SocketAddr) -> Option<String> {
    match address {
        SocketAddr::V4(v4) => Some(format!("{:08X}:{:04X}", u32::from_ne_bytes(v4.ip().octets()), v4.port())),
        SocketAddr::V6(_) => None,
    }
}

/// Whether a process has the socket open.
fn holds(pid: u32, inode: u64) -> bool {
    let wanted = format!("socket:[{inode}]");
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    entries.flatten().any(|entry| fs::read_link(entry.path()).is_ok_and(|link| link.as_os_str() == &*wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A place that answers every byte, with its port.
    async fn echo() -> u16 {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut read, mut write) = stream.split();
                    tokio::io::copy(&mut read, &mut write).await
                });
            }
        });
        port
    }

    async fn answer(stream: &mut TcpStream, byte: u8) -> Option<u8> {
        stream.write_all(&[byte]).await.unwrap();
        tokio::time::timeout(Duration::from_millis(300), stream.read_u8()).await.ok().map(Result::unwrap)
    }

    #[tokio::test]
    async fn a_cut_is_silent_for_its_caller_alone_and_what_waited_arrives_when_it_is_mended() {
        let wires = Wires::new();
        let port = wires.open(Place::Node(1), echo().await).await.unwrap();
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        assert_eq!(answer(&mut stream, 1).await, Some(1));
        wires.cut(Place::Node(0), Place::Node(1));
        assert_eq!(answer(&mut stream, 2).await, Some(2), "somebody else's cut");

        wires.is_at(std::process::id(), Place::Node(0));
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        assert_eq!(answer(&mut stream, 3).await, None, "the caller is found out");
        wires.mend();
        assert_eq!(stream.read_u8().await.unwrap(), 3);
        wires.cut_one_way(Place::Node(1), Place::Node(0));
        assert_eq!(answer(&mut stream, 4).await, None, "an established connection");
        wires.mend();
        assert_eq!(stream.read_u8().await.unwrap(), 4);
    }

    #[tokio::test]
    async fn the_end_of_a_connection_is_not_heard_while_it_is_cut() {
        let wires = Wires::new();
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = wires.open(Place::Target, listener.local_addr().unwrap().port()).await.unwrap();
        let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let (mut far, _) = listener.accept().await.unwrap();
        wires.cut(Place::Outside, Place::Target);
        drop(stream);
        let mut byte = [0];
        let heard = tokio::time::timeout(Duration::from_millis(300), far.read(&mut byte)).await;
        assert!(heard.is_err(), "{heard:?}");
        wires.mend();
        assert_eq!(far.read(&mut byte).await.unwrap(), 0);
    }
}
