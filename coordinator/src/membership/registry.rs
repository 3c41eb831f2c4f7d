//! Who is in the cluster and who leads it: follows the registrations and the election in the metadata store.
//!
//! ```text
//!   store --> follow: read, then watch  --(lost, compacted)--> read anew
//!                |
//!                v
//!   registrations: Membership --> whoever is gone for the delay, by a fresh look --> members, nodes
//!   candidates:    the smallest create revision                                  --> leader
//! ```
//!
//! While the store cannot be read everything stays as it was: silence is no reason to take work from anybody.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use heartbeatpb::NodeId;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::registration::NodeInfo;
use super::{Change, Membership};
use crate::backend::{KeyValue, Revision, Snapshot, Store, StoreError, WatchEvent};
use crate::{Layout, Members};

/// What was seen and is not looked at yet.
const SEEN: usize = 64;
/// Between two attempts to read from a store that does not answer.
const AGAIN: Duration = Duration::from_millis(200);
/// A read that takes longer is begun anew.
const READ: Duration = Duration::from_secs(2);

/// What a prefix of the store shows.
enum Seen {
    /// Everything under it.
    All(Snapshot<Vec<KeyValue>>),
    /// What changed.
    Changes(Vec<WatchEvent>),
}

/// Reads a prefix and follows its changes, reading it anew whenever some were missed. Ends with its reader.
async fn follow(store: Arc<dyn Store>, prefix: String, seen: mpsc::Sender<Seen>) {
    let told =
        |error: &StoreError| tracing::debug!(%error, prefix, "the metadata store cannot be followed now");
    loop {
        let all = match tokio::time::timeout(READ, store.scan(&prefix)).await {
            Ok(Ok(all)) => all,
            failed => {
                if let Ok(Err(error)) = failed {
                    told(&error);
                }
                if seen.is_closed() {
                    return;
                }
                tokio::time::sleep(AGAIN).await;
                continue;
            }
        };
        let from = all.revision + 1;
        if seen.send(Seen::All(all)).await.is_err() {
            return;
        }
        let mut changes = match store.watch(&prefix, from).await {
            Ok(changes) => changes,
            Err(error) => {
                told(&error);
                tokio::time::sleep(AGAIN).await;
                continue;
            }
        };
        loop {
            let next = tokio::select! {
                biased;
                () = seen.closed() => return,
                next = changes.next() => next,
            };
            match next {
                Ok(events) => {
                    if seen.send(Seen::Changes(events)).await.is_err() {
                        return;
                    }
                }
                Err(error) => {
                    told(&error);
                    break;
                }
            }
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Follows a prefix in a task of its own, which ends with the receiver.
fn seen(store: &Arc<dyn Store>, prefix: String) -> mpsc::Receiver<Seen> {
    let (sender, receiver) = mpsc::channel(SEEN);
    tokio::spawn(follow(Arc::clone(store), prefix, sender));
    receiver
}

/// What the rest of the process is told.
#[derive(Clone, Debug)]
pub struct Views {
    /// Members with their addresses.
    pub members: watch::Receiver<Members>,
    /// The same without addresses.
    pub nodes: watch::Receiver<BTreeSet<NodeId>>,
    /// Up to where the registrations are known.
    pub known: watch::Receiver<Revision>,
}

/// Keeps the set of members.
pub struct Registry {
    store: Arc<dyn Store>,
    prefix: String,
    /// This node, which is a member as long as it lives.
    own: (NodeId, String),
    membership: Membership,
    applied: Revision,
    members: watch::Sender<Members>,
    nodes: watch::Sender<BTreeSet<NodeId>>,
    known: watch::Sender<Revision>,
}

impl Registry {
    /// Knows nobody but this node yet.
    pub fn new(
        store: Arc<dyn Store>,
        layout: &Layout,
        own: (NodeId, String),
        delay: Duration,
    ) -> (Self, Views) {
        let (members, members_view) = watch::channel(Arc::new(BTreeMap::from([own.clone()])));
        let (nodes, nodes_view) = watch::channel(BTreeSet::from([own.0.clone()]));
        let (known, known_view) = watch::channel(0);
        let registry = Self {
            store,
            prefix: layout.capture_prefix(),
            own,
            membership: Membership::new(delay),
            applied: 0,
            members,
            nodes,
            known,
        };
        (registry, Views { members: members_view, nodes: nodes_view, known: known_view })
    }

    /// Follows the registrations until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut seen = seen(&self.store, self.prefix.clone());
        loop {
            let wakeup = self.membership.next_wakeup();
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                Some(seen) = seen.recv() => self.on_seen(seen),
                () = until(wakeup), if wakeup.is_some() => {
                    // Only the store can say that a node is still away.
                    match tokio::time::timeout(READ, self.store.scan(&self.prefix)).await {
                        Ok(Ok(all)) => self.on_seen(Seen::All(all)),
                        Ok(Err(_)) | Err(_) => tokio::time::sleep(AGAIN).await,
                    }
                }
            }
            self.publish();
        }
    }

    fn on_seen(&mut self, seen: Seen) {
        let now = now();
        let mut changes = Vec::new();
        match seen {
            Seen::All(all) if all.revision >= self.applied => {
                let mut registered = BTreeMap::new();
                for kv in &all.found {
                    match self.read(kv) {
                        Some((node, info)) if info.leaving => {
                            changes.extend(self.membership.on_goodbye(&node))
                        }
                        Some((node, info)) => drop(registered.insert(node, info.address)),
                        None => {}
                    }
                }
                changes.extend(self.membership.on_read(&registered, now));
                self.applied = all.revision;
            }
            // Older than what is known.
            Seen::All(_) => {}
            Seen::Changes(events) => {
                let applied = self.applied;
                for event in events.iter().filter(|event| event.revision() > applied) {
                    changes.extend(self.on_event(event, now));
                }
                self.applied = events.last().map_or(0, WatchEvent::revision).max(applied);
            }
        }
        for change in changes {
            match change {
                Change::Joined(node) => tracing::info!(%node, "a node joined the cluster"),
                Change::Left(node) => tracing::info!(%node, "a node left the cluster"),
                Change::Moved(node) => tracing::info!(%node, "a node has another address"),
            }
        }
    }

    fn on_event(&mut self, event: &WatchEvent, now: Instant) -> Option<Change> {
        match event {
            WatchEvent::Put(kv) => {
                let (node, info) = self.read(kv)?;
                if info.leaving {
                    return self.membership.on_goodbye(&node);
                }
                self.membership.on_registered(&node, &info.address)
            }
            WatchEvent::Delete { key, .. } => {
                if let Some(id) = key.strip_prefix(&self.prefix) {
                    self.membership.on_disappeared(&NodeId::from(id), now);
                }
                None
            }
        }
    }

    fn read(&self, kv: &KeyValue) -> Option<(NodeId, NodeInfo)> {
        let id = kv.key.strip_prefix(&self.prefix)?;
        let info = NodeInfo::read(&kv.value).filter(|info| info.id == id);
        if info.is_none() {
            tracing::warn!(key = kv.key, "a registration that cannot be read is left out");
        }
        Some((NodeId::from(id), info?))
    }

    fn publish(&self) {
        let mut members = self.membership.members();
        members.insert(self.own.0.clone(), self.own.1.clone());
        let nodes: BTreeSet<NodeId> = members.keys().cloned().collect();
        // The addresses first: whoever hears of a node wants to talk to it.
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
        self.known.send_if_modified(|known| std::mem::replace(known, self.applied) != self.applied);
    }
}

/// Follows the election until `stop`: who leads, as far as the store says.
pub async fn follow_leader(
    store: Arc<dyn Store>,
    prefix: String,
    leader: watch::Sender<Option<NodeId>>,
    stop: CancellationToken,
) {
    let mut seen = seen(&store, format!("{prefix}/"));
    let mut candidates: BTreeMap<String, (Revision, NodeId)> = BTreeMap::new();
    let read = |kv: &KeyValue| {
        let node = String::from_utf8_lossy(&kv.value).into_owned();
        (kv.key.clone(), (kv.create_revision, NodeId::from(node)))
    };
    loop {
        let news = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            Some(news) = seen.recv() => news,
        };
        match news {
            Seen::All(all) => candidates = all.found.iter().map(read).collect(),
            Seen::Changes(events) => {
                for event in &events {
                    match event {
                        WatchEvent::Put(kv) => candidates.extend([read(kv)]),
                        WatchEvent::Delete { key, .. } => drop(candidates.remove(key)),
                    }
                }
            }
        }
        let first = candidates.values().min_by_key(|(created, _)| *created).map(|(_, node)| node.clone());
        leader.send_if_modified(|known| {
            let news = *known != first;
            *known = first;
            news
        });
    }
}

async fn until(wakeup: Option<Instant>) {
    match wakeup {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// The clock of the runtime, which tests may hold.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
