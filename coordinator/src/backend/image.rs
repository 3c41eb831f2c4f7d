//! The content of an embedded store in memory: evaluates transactions and remembers recent changes.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::{Compare, KeyValue, LeaseId, Op, Revision, Txn, WatchEvent};

/// Changes kept for watches. A watch that is further behind loads again.
const KEPT_EVENTS: usize = 4096;

/// What one transaction changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) revision: Revision,
    pub(super) puts: Vec<KeyValue>,
    pub(super) deletes: Vec<String>,
}

/// Keys, leases and recent history.
#[derive(Debug, Default)]
pub(super) struct Image {
    pub(super) revision: Revision,
    entries: BTreeMap<String, KeyValue>,
    leases: BTreeSet<LeaseId>,
    history: VecDeque<WatchEvent>,
    /// Changes at or before it are not kept any more.
    forgotten: Revision,
}

impl Image {
    /// The content that was stored up to `revision`.
    pub(super) fn new(revision: Revision, entries: Vec<KeyValue>) -> Self {
        Self {
            revision,
            entries: entries.into_iter().map(|kv| (kv.key.clone(), kv)).collect(),
            leases: BTreeSet::new(),
            history: VecDeque::new(),
            forgotten: revision,
        }
    }

    pub(super) fn get(&self, key: &str) -> Option<&KeyValue> {
        self.entries.get(key)
    }

    pub(super) fn scan<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a KeyValue> {
        self.entries
            .range(prefix.to_owned()..)
            .map(|(_, kv)| kv)
            .take_while(move |kv| kv.key.starts_with(prefix))
    }

    pub(super) fn add_lease(&mut self, lease: LeaseId) {
        self.leases.insert(lease);
    }

    pub(super) fn has_lease(&self, lease: LeaseId) -> bool {
        self.leases.contains(&lease)
    }

    pub(super) fn drop_lease(&mut self, lease: LeaseId) {
        self.leases.remove(&lease);
    }

    /// The change that deletes the keys attached to leases that `gone` accepts.
    pub(super) fn expire(&self, gone: impl Fn(LeaseId) -> bool) -> Option<Change> {
        let deletes: Vec<String> =
            self.entries.values().filter(|kv| kv.lease.is_some_and(&gone)).map(|kv| kv.key.clone()).collect();
        (!deletes.is_empty()).then(|| Change { revision: self.revision + 1, puts: Vec::new(), deletes })
    }

    /// Whether the conditions hold, and what the transaction then changes, if anything.
    pub(super) fn evaluate(&self, txn: &Txn) -> (bool, Option<Change>) {
        let holds = txn.when.iter().all(|compare| match compare {
            Compare::Absent { key } => !self.entries.contains_key(key),
            Compare::ModRevision { key, revision } => {
                self.entries.get(key).is_some_and(|kv| kv.mod_revision == *revision)
            }
            Compare::Value { key, value } => self.entries.get(key).is_some_and(|kv| kv.value == *value),
        });
        let revision = self.revision + 1;
        let mut change = Change { revision, puts: Vec::new(), deletes: Vec::new() };
        for op in if holds { &txn.then } else { &txn.or_else } {
            match op {
                Op::Put { key, value, lease } => {
                    let create_revision = self.entries.get(key).map_or(revision, |old| old.create_revision);
                    change.puts.push(KeyValue {
                        key: key.clone(),
                        value: value.clone(),
                        create_revision,
                        mod_revision: revision,
                        lease: *lease,
                    });
                }
                Op::Delete { key } if self.entries.contains_key(key) => change.deletes.push(key.clone()),
                Op::Delete { .. } => {}
            }
        }
        let changes = !change.puts.is_empty() || !change.deletes.is_empty();
        (holds, changes.then_some(change))
    }

    pub(super) fn apply(&mut self, change: Change) {
        self.revision = change.revision;
        for key in change.deletes {
            self.entries.remove(&key);
            self.history.push_back(WatchEvent::Delete { key, revision: change.revision });
        }
        for kv in change.puts {
            self.history.push_back(WatchEvent::Put(kv.clone()));
            self.entries.insert(kv.key.clone(), kv);
        }
        while self.history.len() > KEPT_EVENTS {
            let Some(revision) = self.history.front().map(WatchEvent::revision) else { break };
            // A revision is forgotten as a whole, so that a watch never sees a part of a transaction.
            while self.history.front().is_some_and(|event| event.revision() == revision) {
                self.history.pop_front();
            }
            self.forgotten = revision;
        }
    }

    /// The changes under `prefix` after `seen`; `None` when some of them are not kept any more.
    pub(super) fn changes_after(&self, prefix: &str, seen: Revision) -> Option<Vec<WatchEvent>> {
        if seen < self.forgotten {
            return None;
        }
        let start = self.history.partition_point(|event| event.revision() <= seen);
        let under = |event: &&WatchEvent| match event {
            WatchEvent::Put(kv) => kv.key.starts_with(prefix),
            WatchEvent::Delete { key, .. } => key.starts_with(prefix),
        };
        Some(self.history.range(start..).filter(under).cloned().collect())
    }
}
