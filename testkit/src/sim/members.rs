//! How a process joins the cluster and follows who else is in it: a registration in the metadata store under its lease,
//! and the project's [`Membership`], fed with what the store shows.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use coordinator::backend::{
    KeyValue, LeaseId, Op, Revision, Session, Snapshot, Store, StoreError, Txn, Watch, WatchEvent,
};
use coordinator::membership::Membership;
use coordinator::{Layout, Members};
use heartbeatpb::NodeId;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::store::NodeStore;

/// Between two attempts at a store that does not answer.
const AGAIN: Duration = Duration::from_millis(200);
/// A registration that disappeared is waited for so long.
const DELAY: Duration = Duration::from_millis(500);
/// Time to live of a process's lease.
pub(super) const LEASE: Duration = Duration::from_secs(3);

/// What a process sees of the others.
#[derive(Clone)]
pub(super) struct Views {
    pub(super) members: watch::Receiver<Members>,
    pub(super) nodes: watch::Receiver<BTreeSet<NodeId>>,
    /// Up to which revision of the store.
    pub(super) known: watch::Receiver<Revision>,
}

/// Follows the registrations.
pub(super) struct Follower {
    store: NodeStore,
    prefix: String,
    own: NodeId,
    membership: Membership,
    applied: Revision,
    members: watch::Sender<Members>,
    nodes: watch::Sender<BTreeSet<NodeId>>,
    known: watch::Sender<Revision>,
}

impl Follower {
    /// Knows nobody but its own process.
    pub(super) fn new(store: NodeStore, layout: &Layout) -> (Self, Views) {
        let own = store.node.clone();
        let first = BTreeMap::from([(own.clone(), address(&own))]);
        let (members, members_view) = watch::channel(Arc::new(first));
        let (nodes, nodes_view) = watch::channel(BTreeSet::from([own.clone()]));
        let (known, known_view) = watch::channel(0);
        let follower = Self {
            store,
            prefix: layout.capture_prefix(),
            own,
            membership: Membership::new(DELAY),
            applied: 0,
            members,
            nodes,
            known,
        };
        (follower, Views { members: members_view, nodes: nodes_view, known: known_view })
    }

    /// Follows them as long as the process lives. While the store cannot be read everything stays as it was.
    pub(super) async fn run(mut self) {
        loop {
            let all = match self.store.scan(&self.prefix).await {
                Ok(all) => all,
                Err(_) => {
                    tokio::time::sleep(AGAIN).await;
                    continue;
                }
            };
            let from = all.revision + 1;
            self.on_all(&all);
            match self.store.watch(&self.prefix, from).await {
                Ok(mut changes) => self.follow(changes.as_mut()).await,
                Err(_) => tokio::time::sleep(AGAIN).await,
            }
        }
    }

    /// Until something was missed, or a fresh look is needed: only the store can say that a node is still away.
    async fn follow(&mut self, changes: &mut dyn Watch) {
        loop {
            let wakeup = self.membership.next_wakeup().map(tokio::time::Instant::from_std);
            tokio::select! {
                biased;
                next = changes.next() => match next {
                    Ok(events) => self.on_events(&events),
                    Err(_) => return,
                },
                () = until(wakeup) => return,
            }
        }
    }

    fn on_all(&mut self, all: &Snapshot<Vec<KeyValue>>) {
        if all.revision < self.applied {
            return;
        }
        let mut registered = BTreeMap::new();
        for kv in &all.found {
            match self.read(kv) {
                Some((node, true)) => drop(self.membership.on_goodbye(&node)),
                Some((node, false)) => drop(registered.insert(node.clone(), address(&node))),
                None => {}
            }
        }
        self.membership.on_read(&registered, now());
        self.applied = all.revision;
        self.publish();
    }

    fn on_events(&mut self, events: &[WatchEvent]) {
        let applied = self.applied;
        for event in events.iter().filter(|event| event.revision() > applied) {
            match event {
                WatchEvent::Put(kv) => match self.read(kv) {
                    Some((node, true)) => drop(self.membership.on_goodbye(&node)),
                    Some((node, false)) => drop(self.membership.on_registered(&node, &address(&node))),
                    None => {}
                },
                WatchEvent::Delete { key, .. } => {
                    if let Some(id) = key.strip_prefix(&self.prefix) {
                        self.membership.on_disappeared(&NodeId::from(id), now());
                    }
                }
            }
        }
        self.applied = events.last().map_or(0, WatchEvent::revision).max(applied);
        self.publish();
    }

    /// A registration: whose, and whether it is a goodbye.
    fn read(&self, kv: &KeyValue) -> Option<(NodeId, bool)> {
        let id = kv.key.strip_prefix(&self.prefix)?;
        let value: Value = serde_json::from_slice(&kv.value).ok()?;
        Some((NodeId::from(id), value.get("leaving").and_then(Value::as_bool).unwrap_or(false)))
    }

    fn publish(&self) {
        let mut members = self.membership.members();
        members.insert(self.own.clone(), address(&self.own));
        let nodes: BTreeSet<NodeId> = members.keys().cloned().collect();
        self.members.send_if_modified(|known| {
            let news = **known != members;
            if news {
                *known = Arc::new(members);
            }
            news
        });
        self.nodes.send_if_modified(|known| {
            let news = *known != nodes;
            *known = nodes;
            news
        });
        self.known.send_replace(self.applied);
    }
}

/// A process's place in the cluster.
#[derive(Clone)]
pub(super) struct Entry {
    pub(super) store: NodeStore,
    layout: Layout,
    registered: Arc<AtomicBool>,
}

impl Entry {
    /// A process that has not joined.
    pub(super) fn new(store: NodeStore, layout: Layout) -> Self {
        Self { store, layout, registered: Arc::default() }
    }

    /// Opens a session, tells it to `opened`, and registers the process; returns when the process sees itself.
    ///
    /// # Errors
    /// When the lease was lost meanwhile.
    pub(super) async fn join(
        &self,
        mut known: watch::Receiver<Revision>,
        opened: impl FnOnce(Session),
    ) -> Result<Session, StoreError> {
        let session = loop {
            match self.store.session(LEASE).await {
                Ok(session) => break session,
                Err(_) => tokio::time::sleep(AGAIN).await,
            }
        };
        opened(session.clone());
        let at = loop {
            match self.put(session.lease, false).await {
                Ok(at) => break at,
                Err(error) if error.is_retryable() => tokio::time::sleep(AGAIN).await,
                Err(error) => return Err(error),
            }
        };
        self.registered.store(true, Ordering::Release);
        drop(known.wait_for(|known| *known >= at).await);
        Ok(session)
    }

    /// Whether the store has the registration under the lease. Before there is one nobody knows the process, and none is
    /// to be there.
    ///
    /// # Errors
    /// When the store does not answer.
    pub(super) async fn is_registered(&self, lease: LeaseId) -> Result<bool, StoreError> {
        if !self.registered.load(Ordering::Acquire) {
            return Ok(true);
        }
        let found = self.store.get(&self.layout.capture(&self.store.node)).await?.found;
        Ok(found.is_some_and(|kv| kv.lease == Some(lease)))
    }

    /// Takes the registration back. To be called only when nothing of the process can write any more.
    pub(super) async fn leave(&self, lease: LeaseId) {
        // Whoever does not hear of it waits until the lease has ended.
        drop(self.put(lease, true).await);
        drop(self.store.revoke(lease).await);
    }

    async fn put(&self, lease: LeaseId, leaving: bool) -> Result<Revision, StoreError> {
        let value = json!({ "id": self.store.node.as_str(), "leaving": leaving }).to_string().into_bytes();
        let put = Op::Put { key: self.layout.capture(&self.store.node), value, lease: Some(lease) };
        Ok(self.store.txn(Txn { then: vec![put], ..Txn::default() }).await?.revision)
    }
}

fn address(node: &NodeId) -> String {
    format!("{node}:8300")
}

async fn until(wakeup: Option<tokio::time::Instant>) {
    match wakeup {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// The clock of the process.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
