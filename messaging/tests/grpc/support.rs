//! Nodes, and messages for them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use heartbeatpb::{ChangefeedId, CheckpointTsMessage, DecodeError, NodeId, Ts};
use messaging::grpc::tls::PeerTls;
use messaging::grpc::{GrpcTransport, PeerReport, serve};
use messaging::{
    HeartbeatCollectorTopic, Inbox, MessageCenter, MessagingConfig, SendError, StreamClass,
    ToHeartbeatCollector, Topic, WireMessage,
};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// Long enough for a busy machine; nothing waits for it when all is well.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

pub(crate) type List = BTreeMap<NodeId, String>;

/// A topic of row events.
#[derive(Debug)]
pub(crate) enum Events {}

#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Event(pub(crate) u64, pub(crate) Vec<u8>);

impl Topic for Events {
    const NAME: &'static str = "test-events";
    const CLASS: StreamClass = StreamClass::Event;
    type Message = Event;
}

impl WireMessage for Event {
    fn io_type(&self) -> i32 {
        2000
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.0.to_be_bytes());
        out.extend_from_slice(&self.1);
    }

    fn decode(io_type: i32, bytes: &[u8]) -> Result<Self, DecodeError> {
        if io_type != 2000 {
            return Err(DecodeError::UnknownType(io_type));
        }
        let (number, rest) = bytes.split_first_chunk().ok_or(DecodeError::Malformed { message: "Event" })?;
        Ok(Self(u64::from_be_bytes(*number), rest.to_vec()))
    }
}

pub(crate) fn command(number: u64) -> ToHeartbeatCollector {
    ToHeartbeatCollector::CheckpointTs(CheckpointTsMessage {
        changefeed: ChangefeedId::fresh("feed"),
        checkpoint: Ts(number),
    })
}

pub(crate) fn number(message: &ToHeartbeatCollector) -> u64 {
    match message {
        ToHeartbeatCollector::CheckpointTs(message) => message.checkpoint.0,
        ToHeartbeatCollector::HeartBeatResponse(_)
        | ToHeartbeatCollector::Schedule(_)
        | ToHeartbeatCollector::Merge(_) => panic!("only checkpoints are sent here"),
    }
}

/// The next command's sender and number.
pub(crate) async fn next(inbox: &mut Inbox<HeartbeatCollectorTopic>) -> (String, u64) {
    let inbound = timeout(DEADLINE, inbox.recv()).await.expect("a command in time").unwrap();
    (inbound.from.as_str().to_owned(), number(&inbound.message))
}

/// Polls until something holds.
pub(crate) async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) async fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

/// A node of a cluster.
pub(crate) struct Node {
    pub(crate) id: NodeId,
    /// Where others find it.
    pub(crate) address: String,
    /// Where it listens.
    pub(crate) listens: String,
    pub(crate) center: MessageCenter,
    pub(crate) transport: GrpcTransport,
    pub(crate) tls: bool,
    /// Its view of the cluster.
    pub(crate) list: watch::Sender<Arc<List>>,
    pub(crate) stop: CancellationToken,
    serving: Option<AbortOnDropHandle<()>>,
    running: Option<AbortOnDropHandle<()>>,
}

impl Node {
    /// A node that listens, and knows nobody yet.
    pub(crate) async fn start(id: &str) -> Self {
        let (listener, address) = listen().await;
        Self::on(id, listener, &address, None)
    }

    pub(crate) fn on(id: &str, listener: TcpListener, address: &str, tls: Option<PeerTls>) -> Self {
        let listens = listener.local_addr().unwrap().to_string();
        let center = MessageCenter::new(id.into(), MessagingConfig::default());
        let (list, peers) = watch::channel(Arc::default());
        let transport = GrpcTransport::new(center.clone(), address, tls.clone(), peers);
        center.connect(transport.handle());
        let (certificates, tls) = (tls.clone(), tls.is_some());
        let stop = CancellationToken::new();
        let running = tokio::spawn(transport.clone().run(stop.clone()));
        let serving = tokio::spawn({
            let transport = transport.clone();
            async move {
                serve(listener, &transport, certificates.as_ref(), CancellationToken::new()).await.unwrap()
            }
        });
        Self {
            id: id.into(),
            address: address.to_owned(),
            listens,
            tls,
            center,
            transport,
            list,
            stop,
            serving: Some(AbortOnDropHandle::new(serving)),
            running: Some(AbortOnDropHandle::new(running)),
        }
    }

    pub(crate) fn knows(&self, list: &List) {
        self.list.send_replace(Arc::new(list.clone()));
    }

    pub(crate) fn command(&self, to: &NodeId, number: u64) -> Result<(), SendError> {
        self.center.send::<HeartbeatCollectorTopic>(to, command(number))
    }

    pub(crate) fn event(&self, to: &NodeId, event: Event) -> Result<(), SendError> {
        self.center.send::<Events>(to, event)
    }

    pub(crate) fn inbox(&self, capacity: usize) -> Inbox<HeartbeatCollectorTopic> {
        self.center.register::<HeartbeatCollectorTopic>(capacity)
    }

    pub(crate) fn peer(&self, id: &NodeId) -> Option<PeerReport> {
        self.transport.report().into_iter().find(|peer| peer.node == *id)
    }

    pub(crate) fn is_connected(&self, to: &NodeId) -> bool {
        self.peer(to).is_some_and(|peer| peer.event.ready && peer.command.ready)
    }

    /// Ends without a word, as a process that is killed.
    pub(crate) fn kill(&mut self) {
        self.serving = None;
        self.running = None;
    }

    /// Ends as it should.
    pub(crate) async fn close(&mut self) {
        self.stop.cancel();
        timeout(DEADLINE, self.running.take().unwrap()).await.expect("stops").unwrap();
        self.serving = None;
    }
}

pub(crate) fn list_of(nodes: &[&Node]) -> List {
    nodes.iter().map(|node| (node.id.clone(), node.address.clone())).collect()
}

/// Makes nodes known to each other and waits until all are connected.
pub(crate) async fn join(nodes: &[&Node]) {
    let list = list_of(nodes);
    nodes.iter().for_each(|node| node.knows(&list));
    connected(nodes).await;
}

pub(crate) async fn connected(nodes: &[&Node]) {
    for node in nodes {
        for other in nodes.iter().filter(|other| other.id != node.id) {
            until(&format!("{} and {} connected", node.id, other.id), || node.is_connected(&other.id)).await;
        }
    }
}
