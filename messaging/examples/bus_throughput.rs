//! How much a bus carries: inside a process, between two nodes over the loopback, in clear and over TLS, and how
//! much a plain TCP connection carries in the same moment.
//!
//! ```sh
//! cargo run -p messaging --example bus_throughput -- [seconds per line]
//! ```

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use heartbeatpb::{DecodeError, NodeId};
use messaging::grpc::tls::{PeerTls, TlsFiles};
use messaging::grpc::{GrpcTransport, serve};
use messaging::{Inbox, MessageCenter, MessagingConfig, SendErrorKind, StreamClass, Topic, WireMessage};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

type Failure = Box<dyn Error + Send + Sync>;

/// Payloads, bytes: a control message, a small batch of rows, a full batch.
const SIZES: [usize; 3] = [100, 8 << 10, 256 << 10];
/// Messages that a receiver holds.
const ROOM: usize = 4096;

/// Bytes without a meaning.
#[derive(Clone)]
struct Load(Arc<[u8]>);

impl WireMessage for Load {
    fn io_type(&self) -> i32 {
        2000
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.0);
    }

    fn decode(_: i32, bytes: &[u8]) -> Result<Self, DecodeError> {
        Ok(Self(bytes.into()))
    }
}

/// Control messages: encoded for the own node too.
enum Commands {}

impl Topic for Commands {
    const NAME: &'static str = "commands";
    const CLASS: StreamClass = StreamClass::Command;
    type Message = Load;
}

/// Row events: the own node gets them by reference.
enum Events {}

impl Topic for Events {
    const NAME: &'static str = "events";
    const CLASS: StreamClass = StreamClass::Event;
    type Message = Load;
}

struct Node {
    center: MessageCenter,
    transport: GrpcTransport,
    address: String,
    list: watch::Sender<Arc<BTreeMap<NodeId, String>>>,
}

async fn node(id: &str, tls: Option<PeerTls>) -> Result<Node, Failure> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?.to_string();
    let center = MessageCenter::new(id.into(), MessagingConfig::default());
    let (list, peers) = watch::channel(Arc::default());
    let transport = GrpcTransport::new(center.clone(), &address, tls.clone(), peers);
    center.connect(transport.handle());
    tokio::spawn(transport.clone().run(CancellationToken::new()));
    let served = transport.clone();
    tokio::spawn(async move { serve(listener, &served, tls.as_ref(), CancellationToken::new()).await });
    Ok(Node { center, transport, address, list })
}

/// Two nodes that are connected.
async fn pair(tls: Option<PeerTls>) -> Result<(Node, Node), Failure> {
    let (a, b) = (node("a", tls.clone()).await?, node("b", tls).await?);
    let list = Arc::new(BTreeMap::from([
        (a.center.node().clone(), a.address.clone()),
        (b.center.node().clone(), b.address.clone()),
    ]));
    a.list.send_replace(Arc::clone(&list));
    b.list.send_replace(list);
    for node in [&a, &b] {
        while !node.transport.report().iter().any(|peer| peer.event.ready && peer.command.ready) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    Ok((a, b))
}

/// Counts what arrives for a while, after a moment in which everything fills.
async fn measure<T: Topic<Message = Load>>(
    from: &MessageCenter,
    to: &MessageCenter,
    size: usize,
    time: Duration,
) -> Result<f64, Failure> {
    let mut inbox: Inbox<T> = to.register::<T>(ROOM);
    let load = Load(vec![7; size].into());
    let (center, receiver) = (from.clone(), to.node().clone());
    let sender = tokio::spawn(async move {
        loop {
            match center.send::<T>(&receiver, load.clone()) {
                Ok(()) => {}
                Err(error) if error.kind == SendErrorKind::MessageCongested => {
                    tokio::time::sleep(Duration::from_micros(200)).await;
                }
                Err(error) => return error,
            }
            tokio::task::coop::consume_budget().await;
        }
    });
    let mut rate = 0.0;
    for lap in [time / 4, time] {
        let (start, mut count) = (Instant::now(), 0u32);
        while start.elapsed() < lap {
            inbox.recv().await.ok_or("the topic was taken over")?;
            count += 1;
        }
        rate = f64::from(count) / start.elapsed().as_secs_f64();
    }
    if sender.is_finished() {
        return Err(sender.await?.into());
    }
    sender.abort();
    let _ = sender.await;
    // What is still on its way belongs to nobody.
    while tokio::time::timeout(Duration::from_millis(100), inbox.recv()).await.is_ok() {}
    Ok(rate)
}

/// Blocks per second that a plain connection carries.
async fn plain_tcp(size: usize, time: Duration) -> Result<f64, Failure> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let mut near = TcpStream::connect(listener.local_addr()?).await?;
    let (mut far, _) = listener.accept().await?;
    let writer = tokio::spawn(async move {
        // As many small ones at a time as a frame of the bus holds.
        let block = vec![7; size.max(16 << 10)];
        while near.write_all(&block).await.is_ok() {}
    });
    let (start, mut bytes, mut buffer) = (Instant::now(), 0.0, vec![0; 64 << 10]);
    while start.elapsed() < time {
        #[expect(clippy::cast_precision_loss, reason = "at most 64 KiB")]
        {
            bytes += far.read(&mut buffer).await? as f64;
        }
    }
    writer.abort();
    #[expect(clippy::cast_precision_loss, reason = "at most 256 KiB")]
    let size = size as f64;
    Ok(bytes / size / start.elapsed().as_secs_f64())
}

fn print(what: &str, size: usize, rate: f64) {
    #[expect(clippy::cast_precision_loss, reason = "at most 256 KiB")]
    let megabytes = rate * size as f64 / 1e6;
    println!("{what:<34} {size:>7} B {rate:>12.0} messages/s {megabytes:>9.1} MB/s");
}

/// Certificates that both nodes share.
fn certificates(dir: &std::path::Path) -> Result<PeerTls, Failure> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    let key = KeyPair::generate()?;
    let cert = CertificateParams::new(vec!["127.0.0.1".to_owned()])?.signed_by(&key, &authority)?;
    let files = TlsFiles {
        ca: dir.join("ca.pem"),
        cert: dir.join("cert.pem"),
        key: dir.join("key.pem"),
        allowed_names: Vec::new(),
        client_required: true,
    };
    std::fs::write(&files.ca, authority.pem())?;
    std::fs::write(&files.cert, cert.pem())?;
    std::fs::write(&files.key, key.serialize_pem())?;
    Ok(PeerTls::load(files)?)
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let seconds = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(0.2);
    let time = Duration::from_secs_f64(seconds);
    let dir = tempfile::tempdir()?;
    let (a, b) = pair(None).await?;
    let (secure_a, secure_b) = pair(Some(certificates(dir.path())?)).await?;
    for size in SIZES {
        print("plain TCP", size, plain_tcp(size, time).await?);
        print(
            "own node, events by reference",
            size,
            measure::<Events>(&a.center, &a.center, size, time).await?,
        );
        print(
            "own node, commands through codec",
            size,
            measure::<Commands>(&a.center, &a.center, size, time).await?,
        );
        print("gRPC, events", size, measure::<Events>(&a.center, &b.center, size, time).await?);
        print("gRPC, commands", size, measure::<Commands>(&a.center, &b.center, size, time).await?);
        let rate = measure::<Events>(&secure_a.center, &secure_b.center, size, time).await?;
        print("gRPC over TLS, events", size, rate);
    }
    Ok(())
}
