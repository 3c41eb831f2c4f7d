//! A network that can be disturbed: a TCP proxy in front of a node.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use crate::support::listen;

/// What the network does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Weather {
    /// Carries everything.
    Fine,
    /// Carries everything later.
    Slow(Duration),
    /// Takes nothing and says nothing; connections stay.
    Still,
    /// Ends every connection, also new ones.
    Cut,
    /// Ends one direction of each connection: what the dialling side sends, or what it hears.
    Half { of_dialler: bool },
}

pub(crate) struct Proxy {
    pub(crate) address: String,
    weather: Arc<watch::Sender<Weather>>,
    _task: AbortOnDropHandle<()>,
}

impl Proxy {
    /// A proxy in front of `target`.
    pub(crate) async fn new(target: &str) -> Self {
        let (listener, address) = listen().await;
        let weather = Arc::new(watch::Sender::new(Weather::Fine));
        let task = tokio::spawn(run(listener, target.to_owned(), Arc::clone(&weather)));
        Self { address, weather, _task: AbortOnDropHandle::new(task) }
    }

    pub(crate) fn set(&self, weather: Weather) {
        self.weather.send_replace(weather);
    }
}

async fn run(listener: TcpListener, target: String, weather: Arc<watch::Sender<Weather>>) {
    let mut connections = JoinSet::new();
    loop {
        let (near, _) = listener.accept().await.unwrap();
        while connections.try_join_next().is_some() {}
        if *weather.borrow() == Weather::Cut {
            continue;
        }
        // The node may be away.
        let Ok(far) = TcpStream::connect(&target).await else { continue };
        connections.spawn(carry(near, far, weather.subscribe()));
    }
}

async fn carry(near: TcpStream, far: TcpStream, mut weather: watch::Receiver<Weather>) {
    near.set_nodelay(true).unwrap();
    far.set_nodelay(true).unwrap();
    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
    let there = pump(near_in, far_out, weather.clone(), true);
    let back = pump(far_in, near_out, weather.clone(), false);
    let cut = weather.wait_for(|weather| *weather == Weather::Cut);
    tokio::select! {
        ((), ()) = async { tokio::join!(there, back) } => {}
        _ = cut => {}
    }
}

async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut weather: watch::Receiver<Weather>,
    of_dialler: bool,
) {
    let mut bytes = vec![0; 16 << 10];
    let half = Weather::Half { of_dialler };
    loop {
        let now = *weather.borrow_and_update();
        if now == half {
            let _ = to.shutdown().await;
            return;
        }
        if now == Weather::Still {
            if weather.changed().await.is_err() {
                return;
            }
            continue;
        }
        let count = tokio::select! {
            changed = weather.changed() => if changed.is_err() { return } else { continue },
            count = from.read(&mut bytes) => count.unwrap_or(0),
        };
        if let Weather::Slow(delay) = now {
            tokio::time::sleep(delay).await;
        }
        if count == 0 || to.write_all(&bytes[..count]).await.is_err() {
            let _ = to.shutdown().await;
            return;
        }
    }
}
