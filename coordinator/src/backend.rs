//! What the control plane needs from a metadata store (coordinator §2), and its bindings: embedded ([`redb`], and
//! [`memory`] for tests), and with the feature `etcd` a cluster of etcd servers.
//!
//! Keys are text in a total order; a transaction applies all of its operations at one revision or none.
//! Nothing above this file knows which database is below it.

#[cfg(feature = "etcd")]
pub mod etcd;
mod image;
mod local;
pub mod memory;
mod permitted;
pub mod redb;
mod session;

use std::time::Duration;

use async_trait::async_trait;

pub use local::LocalStore;
pub use permitted::PermittedStore;
pub use session::{Confirmations, Session};

/// Most comparisons, and most operations, of one transaction.
pub const MAX_TXN_OPS: usize = 128;
/// Most bytes of keys and values in one transaction.
pub const MAX_TXN_BYTES: usize = 1280 * 1024;

/// Where the store is in its history: grows with each transaction that changes something, by one where nobody else
/// writes to the same store.
pub type Revision = u64;

/// A lease: keys attached to it vanish together with it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct LeaseId(pub u64);

/// One key with its value and history.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyValue {
    /// The key.
    pub key: String,
    /// Its value.
    pub value: Vec<u8>,
    /// When the key came to be.
    pub create_revision: Revision,
    /// When it was written last.
    pub mod_revision: Revision,
    /// The lease it is attached to.
    pub lease: Option<LeaseId>,
}

impl std::fmt::Debug for KeyValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Values may hold credentials.
        write!(f, "{}@{} ({} bytes)", self.key, self.mod_revision, self.value.len())
    }
}

/// What a read found, and when.
#[derive(Clone, Debug)]
pub struct Snapshot<T> {
    /// What was found.
    pub found: T,
    /// The revision at which the read was evaluated.
    pub revision: Revision,
}

/// A condition of a transaction.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Compare {
    /// The key does not exist.
    Absent {
        /// The key.
        key: String,
    },
    /// The key was written last at this revision.
    ModRevision {
        /// The key.
        key: String,
        /// The revision.
        revision: Revision,
    },
    /// The key has this value.
    Value {
        /// The key.
        key: String,
        /// The value.
        value: Vec<u8>,
    },
}

impl Compare {
    fn bytes(&self) -> usize {
        match self {
            Self::Absent { key } | Self::ModRevision { key, .. } => key.len(),
            Self::Value { key, value } => key.len() + value.len(),
        }
    }
}

/// A change of a transaction. A transaction names no key twice.
#[derive(Clone, PartialEq, Eq)]
pub enum Op {
    /// Write a key.
    Put {
        /// The key.
        key: String,
        /// Its new value.
        value: Vec<u8>,
        /// The lease it is attached to.
        lease: Option<LeaseId>,
    },
    /// Delete a key; absent is fine.
    Delete {
        /// The key.
        key: String,
    },
}

impl Op {
    /// Writes a key without a lease.
    #[must_use]
    pub fn put(key: impl Into<String>, value: Vec<u8>) -> Self {
        Self::Put { key: key.into(), value, lease: None }
    }

    /// Deletes a key.
    #[must_use]
    pub fn delete(key: impl Into<String>) -> Self {
        Self::Delete { key: key.into() }
    }

    fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Put { key, value, .. } => key.len() + value.len(),
            Self::Delete { key } => key.len(),
        }
    }
}

impl std::fmt::Debug for Op {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Put { key, value, lease } => write!(f, "put {key} ({} bytes, {lease:?})", value.len()),
            Self::Delete { key } => write!(f, "delete {key}"),
        }
    }
}

/// If all of `when` hold then `then`, else `or_else`, at one revision.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Txn {
    /// The conditions.
    pub when: Vec<Compare>,
    /// Changes when all conditions hold.
    pub then: Vec<Op>,
    /// Changes when one of them does not.
    pub or_else: Vec<Op>,
}

impl Txn {
    /// Refuses what a store would refuse, before anything is sent.
    ///
    /// # Errors
    /// When the transaction is too big or names a key twice.
    pub fn check(&self) -> Result<(), StoreError> {
        // The whole request travels, whichever branch applies.
        let bytes = self.when.iter().map(Compare::bytes).sum::<usize>()
            + self.then.iter().chain(&self.or_else).map(Op::bytes).sum::<usize>();
        if bytes > MAX_TXN_BYTES {
            return Err(StoreError::TooLarge { bytes });
        }
        for ops in [&self.then, &self.or_else] {
            if ops.len() > MAX_TXN_OPS || self.when.len() > MAX_TXN_OPS {
                return Err(StoreError::TooManyOps { ops: ops.len().max(self.when.len()) });
            }
            let mut keys: Vec<&str> = ops.iter().map(Op::key).collect();
            keys.sort_unstable();
            if keys.windows(2).any(|pair| pair[0] == pair[1]) {
                return Err(StoreError::Invalid("a transaction names a key twice"));
            }
        }
        Ok(())
    }
}

/// How a transaction went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TxnOutcome {
    /// Whether the conditions held.
    pub succeeded: bool,
    /// The revision of its changes, or the current one when it changed nothing.
    pub revision: Revision,
}

/// A change seen by a watch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum WatchEvent {
    /// A key was written.
    Put(KeyValue),
    /// A key was deleted.
    Delete {
        /// The key.
        key: String,
        /// When.
        revision: Revision,
    },
}

impl WatchEvent {
    /// When it happened.
    #[must_use]
    pub fn revision(&self) -> Revision {
        match self {
            Self::Put(kv) => kv.mod_revision,
            Self::Delete { revision, .. } => *revision,
        }
    }
}

/// Changes under a prefix, in order and without gaps.
#[async_trait]
pub trait Watch: Send {
    /// The next changes, all of one revision or more; waits until there are some.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] when the watch fell so far behind that changes are gone: load again.
    async fn next(&mut self) -> Result<Vec<WatchEvent>, StoreError>;

    /// Everything up to this revision was returned by [`Watch::next`] or does not concern the prefix.
    fn progress(&self) -> Revision;
}

/// A won election.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Leadership {
    /// The winning key.
    pub key: String,
    /// Its revision; strictly larger than that of every earlier winner.
    pub revision: Revision,
}

/// A metadata store.
///
/// Reads are linearizable. Calls may fail with [`StoreError::is_retryable`]; of a transaction that fails so
/// with [`StoreError::may_have_applied`] it is unknown whether it applied, and the caller reads again.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Reads one key.
    async fn get(&self, key: &str) -> Result<Snapshot<Option<KeyValue>>, StoreError>;

    /// Reads several keys, at most [`MAX_TXN_OPS`]; what was found stands in their order. A store that is far away
    /// takes one question for all of them.
    async fn get_many(&self, keys: &[String]) -> Result<Vec<Option<KeyValue>>, StoreError> {
        if keys.len() > MAX_TXN_OPS {
            return Err(StoreError::TooManyOps { ops: keys.len() });
        }
        let mut found = Vec::with_capacity(keys.len());
        for key in keys {
            found.push(self.get(key).await?.found);
        }
        Ok(found)
    }

    /// Reads every key that starts with `prefix`, in order.
    async fn scan(&self, prefix: &str) -> Result<Snapshot<Vec<KeyValue>>, StoreError>;

    /// Runs a transaction. When it returns, its changes are durable.
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError>;

    /// A new lease.
    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError>;

    /// Renews a lease.
    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError>;

    /// Ends a lease; its keys are deleted, and the `done` of its session is raised. Ended already is fine.
    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError>;

    /// Time that a lease has left; `None` when it is gone.
    async fn time_to_live(&self, lease: LeaseId) -> Result<Option<Duration>, StoreError>;

    /// A lease that is kept alive until its `done` is raised.
    async fn session(&self, ttl: Duration) -> Result<Session, StoreError>;

    /// Stands for election under `prefix` and returns once won. Dropping the call withdraws nothing:
    /// the candidacy lasts as long as the lease, or until [`Store::resign`].
    async fn campaign(&self, prefix: &str, lease: LeaseId, value: &str) -> Result<Leadership, StoreError>;

    /// Gives up a candidacy or a leadership.
    async fn resign(&self, prefix: &str, lease: LeaseId) -> Result<(), StoreError>;

    /// The leading key.
    async fn leader(&self, prefix: &str) -> Result<Option<KeyValue>, StoreError>;

    /// Changes under `prefix` at `from` or later.
    async fn watch(&self, prefix: &str, from: Revision) -> Result<Box<dyn Watch>, StoreError>;

    /// Stable number of this store, never zero.
    async fn identity(&self) -> Result<u64, StoreError>;
}

/// The key under which a lease stands for election.
#[must_use]
pub fn candidate_key(prefix: &str, lease: LeaseId) -> String {
    format!("{prefix}/{:x}", lease.0)
}

/// Why a store failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The store did not take the request; nothing happened.
    #[error("the metadata store is not available: {0}")]
    Unavailable(String),
    /// The answer was lost: the request may have been applied.
    #[error("the answer of the metadata store was lost: {0}")]
    Uncertain(String),
    /// The store failed and cannot be used by this process any more.
    #[error("the metadata store is broken: {0}; check the disk and restart")]
    Broken(String),
    /// Another process uses the directory.
    #[error("the data directory {0} is used by another process; stop it or choose another data-dir")]
    Locked(String),
    /// Too many operations for one transaction.
    #[error("a transaction of {ops} operations exceeds the limit of {MAX_TXN_OPS}")]
    TooManyOps {
        /// How many.
        ops: usize,
    },
    /// Too many bytes for one transaction.
    #[error("a transaction of {bytes} bytes exceeds the limit of {MAX_TXN_BYTES}")]
    TooLarge {
        /// How many.
        bytes: usize,
    },
    /// The lease does not exist any more.
    #[error("the lease is gone")]
    LeaseGone,
    /// The changes that a watch asked for are not kept any more.
    #[error("the watched changes are not kept any more")]
    Compacted,
    /// The request can never succeed.
    #[error("{0}")]
    Invalid(&'static str),
    /// The store knows us and does not allow it, or does not know us.
    #[error("the metadata store refused the request: {0}")]
    Refused(String),
    /// The settings of the store are wrong.
    #[error("the metadata store cannot be used: {0}")]
    Misconfigured(String),
}

impl StoreError {
    /// Whether the same call may succeed later.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Unavailable(_) | Self::Uncertain(_) => true,
            Self::Broken(_)
            | Self::Locked(_)
            | Self::TooManyOps { .. }
            | Self::TooLarge { .. }
            | Self::LeaseGone
            | Self::Compacted
            | Self::Invalid(_)
            | Self::Refused(_)
            | Self::Misconfigured(_) => false,
        }
    }

    /// Whether a transaction that failed so may have been applied.
    #[must_use]
    pub fn may_have_applied(&self) -> bool {
        matches!(self, Self::Uncertain(_))
    }

    /// Stable code for the API.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::TooManyOps { .. } => "CDC:ErrEtcdTxnOpsExceed",
            Self::TooLarge { .. } => "CDC:ErrEtcdTxnSizeExceed",
            Self::LeaseGone => "CDC:ErrEtcdSessionDone",
            Self::Unavailable(_)
            | Self::Uncertain(_)
            | Self::Broken(_)
            | Self::Locked(_)
            | Self::Compacted
            | Self::Invalid(_)
            | Self::Refused(_)
            | Self::Misconfigured(_) => "CDC:ErrMetaOpFailed",
        }
    }
}
