//! The metadata store of clusters: an etcd cluster, version 3.4 or later.
//!
//! * Reads are linearizable. Large scans come in pages of one revision.
//! * A transaction is sent again only when it is certain that it was not applied; when the answer is lost the caller
//!   learns [`StoreError::Uncertain`], reads, and decides.
//! * Every call ends within [`EtcdConfig::call_limit`], also when etcd has no quorum.
//! * Each endpoint has a client of its own, so that a frozen member can be left: see `pool.rs`.
//! * The leader of an election is the candidate with the smallest create revision. A candidacy is written once and
//!   never again, so its revision is also its create revision, and each leader's revision is larger than those of all
//!   leaders before it.
//! * Answers of another cluster are not believed. When the cluster goes back to an earlier revision, as after a
//!   restored backup, the store is broken for this process: what it knows may never have happened.

mod config;
mod failure;
mod members;
mod pool;
mod session;
mod watch;
mod wire;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use heartbeatpb::Gid;
use parking_lot::Mutex;
use tokio_util::sync::{CancellationToken, DropGuard};

pub use config::{DEFAULT_CALL_LIMIT, EtcdConfig, EtcdCredentials, EtcdTls};

use self::failure::LEASE_EXISTS;
use self::pool::Pool;
use self::wire::{
    Answer, CompareTarget, DeleteRequest, GrantRequest, OneOp, PutRequest, RangeRequest, ReadOp, ReadRequest,
    RequestOp, RevokeRequest, TimeToLiveRequest, TxnRequest, range_of,
};
use super::{
    Compare, Confirmations, KeyValue, Leadership, LeaseId, MAX_TXN_OPS, Op, Revision, Session, Snapshot,
    Store, StoreError, Txn, TxnOutcome, Watch, candidate_key,
};

/// Keys of one page of a scan.
const PAGE: i64 = 128;
/// Times that a scan begins anew because its revision was compacted meanwhile.
const SCANS: usize = 5;

/// An etcd cluster. Cheap to clone; leases are kept alive and watches go on as long as one clone lives.
#[derive(Clone)]
pub struct EtcdStore {
    shared: Arc<Shared>,
}

struct Shared {
    pool: Arc<Pool>,
    keys: Keys,
    sessions: Mutex<BTreeMap<LeaseId, CancellationToken>>,
    closed: CancellationToken,
    _close: DropGuard,
}

impl std::fmt::Debug for EtcdStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let endpoints: Vec<_> =
            self.shared.pool.endpoints().iter().map(|endpoint| endpoint.url.clone()).collect();
        f.debug_struct("EtcdStore").field("endpoints", &endpoints).finish_non_exhaustive()
    }
}

/// Connects to an etcd cluster. Has to be called within a runtime that lives as long as the store is needed, the time
/// after a shutdown has begun included.
///
/// # Errors
/// [`StoreError::Misconfigured`] for wrong settings, unreadable files, or endpoints of different clusters;
/// [`StoreError::Refused`] for a wrong user or password; [`StoreError::Unavailable`] when no endpoint answers within
/// ten seconds.
pub async fn connect(config: EtcdConfig) -> Result<EtcdStore, StoreError> {
    let keys = Keys { prefix: Arc::from(config.prefix.as_str()) };
    let pool = Arc::new(Pool::new(config)?);
    members::meet(&pool).await?;
    let closed = CancellationToken::new();
    tokio::spawn(members::patrol(Arc::clone(&pool), closed.clone()));
    let close = closed.clone().drop_guard();
    let shared = Shared { pool, keys, sessions: Mutex::default(), closed, _close: close };
    Ok(EtcdStore { shared: Arc::new(shared) })
}

/// Keys as we name them, and as etcd does.
#[derive(Clone)]
struct Keys {
    prefix: Arc<str>,
}

impl Keys {
    fn full(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// What etcd holds under one of our keys; `None` for a key that none of us has written.
    fn read(&self, kv: &wire::KeyValue) -> Option<KeyValue> {
        let key = std::str::from_utf8(&kv.key).ok()?.strip_prefix(&*self.prefix)?;
        Some(KeyValue {
            key: key.to_owned(),
            value: kv.value.clone(),
            create_revision: unsigned(kv.create_revision),
            mod_revision: unsigned(kv.mod_revision),
            lease: (kv.lease != 0).then(|| LeaseId(unsigned(kv.lease))),
        })
    }

    fn compare(&self, compare: &Compare) -> wire::Compare {
        let (target, key, to) = match compare {
            Compare::Absent { key } => (wire::CREATE, key, CompareTarget::CreateRevision(0)),
            Compare::ModRevision { key, revision } => {
                (wire::MOD, key, CompareTarget::ModRevision(signed(*revision)))
            }
            Compare::Value { key, value } => (wire::VALUE, key, CompareTarget::Value(value.clone())),
        };
        wire::Compare { target, key: self.full(key).into_bytes(), to: Some(to) }
    }

    fn op(&self, op: &Op) -> RequestOp {
        let op = match op {
            Op::Put { key, value, lease } => OneOp::Put(PutRequest {
                key: self.full(key).into_bytes(),
                value: value.clone(),
                lease: lease.map_or(0, |lease| signed(lease.0)),
            }),
            Op::Delete { key } => OneOp::Delete(DeleteRequest { key: self.full(key).into_bytes() }),
        };
        RequestOp { op: Some(op) }
    }

    fn txn(&self, txn: &Txn) -> TxnRequest {
        TxnRequest {
            compare: txn.when.iter().map(|compare| self.compare(compare)).collect(),
            success: txn.then.iter().map(|op| self.op(op)).collect(),
            failure: txn.or_else.iter().map(|op| self.op(op)).collect(),
        }
    }
}

fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or_default()
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn revision(answer: &impl Answer) -> Revision {
    answer.header().map(|header| unsigned(header.revision)).unwrap_or_default()
}

/// One page of a scan.
struct Page {
    found: Vec<KeyValue>,
    /// The key to go on from, when there is more.
    next: Option<Vec<u8>>,
    /// The revision of the first page.
    at: Revision,
}

impl EtcdStore {
    /// Reads keys from `start`, or from the first one, to the end of `prefix`: as they were at `at`, or as they are.
    async fn page(
        &self,
        prefix: &str,
        start: Option<Vec<u8>>,
        at: Option<Revision>,
    ) -> Result<Page, StoreError> {
        let (first, range_end) = range_of(&self.shared.keys.full(prefix));
        let request = RangeRequest {
            key: start.unwrap_or(first),
            range_end,
            limit: PAGE,
            revision: at.map_or(0, signed),
        };
        let answer = self.shared.pool.ask(&request).await?;
        let next = answer.kvs.last().filter(|_| answer.more).map(|last| [&*last.key, &[0]].concat());
        let found = answer.kvs.iter().filter_map(|kv| self.shared.keys.read(kv)).collect();
        Ok(Page { found, next, at: at.unwrap_or_else(|| revision(&answer)) })
    }

    async fn scan_once(&self, prefix: &str) -> Result<Snapshot<Vec<KeyValue>>, StoreError> {
        let mut page = self.page(prefix, None, None).await?;
        let (mut found, at) = (page.found, page.at);
        while let Some(next) = page.next {
            page = self.page(prefix, Some(next), Some(at)).await?;
            found.append(&mut page.found);
        }
        Ok(Snapshot { found, revision: at })
    }

    /// Writes a candidacy, unless it exists.
    async fn stand(&self, key: &str, lease: LeaseId, value: &str) -> Result<(), StoreError> {
        let txn = Txn {
            when: vec![Compare::Absent { key: key.to_owned() }],
            then: vec![Op::Put { key: key.to_owned(), value: value.as_bytes().to_vec(), lease: Some(lease) }],
            or_else: Vec::new(),
        };
        match self.txn(txn).await {
            Ok(_) => Ok(()),
            // Written under our lease it is ours, whichever attempt wrote it.
            Err(error) if error.may_have_applied() => {
                if self.get(key).await?.found.is_some() {
                    Ok(())
                } else {
                    Err(error)
                }
            }
            Err(error) => Err(error),
        }
    }
}

#[async_trait]
impl Store for EtcdStore {
    async fn get(&self, key: &str) -> Result<Snapshot<Option<KeyValue>>, StoreError> {
        let key = self.shared.keys.full(key).into_bytes();
        let answer = self.shared.pool.ask(&RangeRequest { key, ..RangeRequest::default() }).await?;
        let found = answer.kvs.first().and_then(|kv| self.shared.keys.read(kv));
        Ok(Snapshot { found, revision: revision(&answer) })
    }

    async fn get_many(&self, keys: &[String]) -> Result<Vec<Option<KeyValue>>, StoreError> {
        if keys.len() > MAX_TXN_OPS {
            return Err(StoreError::TooManyOps { ops: keys.len() });
        }
        let range = |key: &String| {
            let key = self.shared.keys.full(key).into_bytes();
            ReadOp { range: Some(RangeRequest { key, ..RangeRequest::default() }) }
        };
        let answer = self.shared.pool.ask(&ReadRequest { reads: keys.iter().map(range).collect() }).await?;
        let found = |at: usize| {
            let kv = answer.found.get(at)?.range.as_ref()?.kvs.first()?;
            self.shared.keys.read(kv)
        };
        Ok((0..keys.len()).map(found).collect())
    }

    async fn scan(&self, prefix: &str) -> Result<Snapshot<Vec<KeyValue>>, StoreError> {
        for _ in 1..SCANS {
            match self.scan_once(prefix).await {
                Err(StoreError::Compacted) => {}
                scanned => return scanned,
            }
        }
        match self.scan_once(prefix).await {
            Err(StoreError::Compacted) => {
                Err(StoreError::Unavailable("etcd compacts faster than its content can be read".to_owned()))
            }
            scanned => scanned,
        }
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        txn.check()?;
        let answer = self.shared.pool.ask(&self.shared.keys.txn(&txn)).await?;
        Ok(TxnOutcome { succeeded: answer.succeeded, revision: revision(&answer) })
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
        // Our own number: a request whose answer was lost can be repeated.
        let lease = (Gid::random().high >> 1).max(1);
        let request = GrantRequest { ttl: signed(seconds.max(1)), id: signed(lease) };
        match self.shared.pool.ask(&request).await {
            Ok(answer) if !answer.error.is_empty() => {
                Err(StoreError::Unavailable(format!("etcd granted no lease: {}", answer.error)))
            }
            Ok(_) | Err(StoreError::Invalid(LEASE_EXISTS)) => Ok(LeaseId(lease)),
            Err(error) => Err(error),
        }
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        session::keep_alive(&self.shared.pool, lease).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        let revoked = self.shared.pool.ask(&RevokeRequest { id: signed(lease.0) }).await;
        match revoked {
            Ok(_) | Err(StoreError::LeaseGone) => {
                if let Some(done) = self.shared.sessions.lock().remove(&lease) {
                    done.cancel();
                }
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    async fn time_to_live(&self, lease: LeaseId) -> Result<Option<Duration>, StoreError> {
        let answer = self.shared.pool.ask(&TimeToLiveRequest { id: signed(lease.0) }).await?;
        Ok(u64::try_from(answer.ttl).ok().map(Duration::from_secs))
    }

    async fn session(&self, ttl: Duration) -> Result<Session, StoreError> {
        let asked = Instant::now();
        let lease = self.grant(ttl).await?;
        let done = CancellationToken::new();
        let (sender, confirmed) = Confirmations::since(asked);
        self.shared.sessions.lock().insert(lease, done.clone());
        tokio::spawn(session::keep(
            Arc::clone(&self.shared.pool),
            lease,
            ttl,
            sender,
            done.clone(),
            self.shared.closed.clone(),
        ));
        Ok(Session { lease, done, confirmed })
    }

    async fn campaign(&self, prefix: &str, lease: LeaseId, value: &str) -> Result<Leadership, StoreError> {
        let key = candidate_key(prefix, lease);
        self.stand(&key, lease, value).await?;
        let under = format!("{prefix}/");
        loop {
            let candidates = self.scan(&under).await?;
            let own = candidates.found.iter().find(|kv| kv.key == key).ok_or(StoreError::LeaseGone)?;
            let own = (own.create_revision, own.mod_revision);
            // Whoever stood before us has to go first.
            if candidates.found.iter().all(|kv| kv.create_revision >= own.0) {
                return Ok(Leadership { key, revision: own.1 });
            }
            // Our own candidacy may go too, with its lease.
            let mut watch = self.watch(&under, candidates.revision + 1).await?;
            match watch.next().await {
                Ok(_) | Err(StoreError::Compacted) => {}
                Err(error) => return Err(error),
            }
        }
    }

    async fn resign(&self, prefix: &str, lease: LeaseId) -> Result<(), StoreError> {
        let key = candidate_key(prefix, lease);
        let Some(own) = self.get(&key).await?.found else { return Ok(()) };
        // An attempt that arrives late must not delete the next candidacy.
        let when = vec![Compare::ModRevision { key: key.clone(), revision: own.mod_revision }];
        self.txn(Txn { when, then: vec![Op::delete(key)], or_else: Vec::new() }).await.map(|_| ())
    }

    async fn leader(&self, prefix: &str) -> Result<Option<KeyValue>, StoreError> {
        let candidates = self.scan(&format!("{prefix}/")).await?.found;
        Ok(candidates.into_iter().min_by_key(|kv| kv.create_revision))
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<Box<dyn Watch>, StoreError> {
        self.shared.pool.usable()?;
        let pool = Arc::clone(&self.shared.pool);
        let keys = self.shared.keys.clone();
        Ok(Box::new(watch::follow(pool, keys, prefix.to_owned(), from, self.shared.closed.clone())))
    }

    async fn identity(&self) -> Result<u64, StoreError> {
        match self.shared.pool.cluster() {
            0 => Err(StoreError::Unavailable("no member of etcd has answered yet".to_owned())),
            cluster => Ok(cluster),
        }
    }
}
