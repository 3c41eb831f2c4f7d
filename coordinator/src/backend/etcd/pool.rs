//! The members of an etcd cluster that are known, and how one request finds one that answers.
//!
//! ```text
//!   request ---> the current endpoint ---- answer ------------------------------------------> done
//!                 ^        |
//!                 |        +---- refused by the cluster ------------------------------------> error
//!                 |        +---- answer lost, and the request must not be repeated ----------> Uncertain
//!                 |        +---- not taken, or lost and repeatable
//!                 |                       v
//!                 +---- the next endpoint becomes current; when all were tried: wait 0.5 s, 1 s, 2 s, …
//!                                         +---- no time left: Unavailable
//! ```
//!
//! An endpoint is *silent* when a keep-alive got its answer from another one first (see `session.rs`): then nobody
//! waits for it any longer, so that a member that is frozen costs less than a second and not the time limit of a call.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;

use super::config::{EtcdConfig, TlsFiles};
use super::failure::{self, Failure};
use super::wire::{Answer, AuthenticateRequest, Client, Header, Request};
use crate::backend::StoreError;

/// The first wait after every endpoint was tried in vain; doubles each time
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// up to this.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// How often all endpoints are tried.
const ROUNDS: usize = 12;
/// Longest wait for one answer that another endpoint could give as well.
const QUESTION_LIMIT: Duration = Duration::from_secs(3);
/// Longest wait for the answer to a change. etcd itself gives up after 5 seconds and two elections; whoever waits
/// longer learns nothing better than "uncertain".
const CHANGE_LIMIT: Duration = Duration::from_secs(5);

/// A way to one member.
pub(super) struct Endpoint {
    pub(super) url: String,
    /// Named by the configuration: kept whatever the list of members says.
    pub(super) named: bool,
    channel: Mutex<Option<Channel>>,
    /// Held while the server is asked for it, so that one request asks and the others wait.
    token: tokio::sync::Mutex<Option<MetadataValue<Ascii>>>,
    /// Answers for another cluster.
    foreign: AtomicBool,
    silent: watch::Sender<()>,
}

impl Endpoint {
    pub(super) fn new(url: String, named: bool) -> Arc<Self> {
        Arc::new(Self {
            url,
            named,
            channel: Mutex::default(),
            token: tokio::sync::Mutex::default(),
            foreign: AtomicBool::new(false),
            silent: watch::Sender::new(()),
        })
    }

    /// The client, introduced to the server. When this fails the caller's request was not sent, whatever the reason.
    pub(super) async fn client(&self, pool: &Pool) -> Result<Client, Failure> {
        let channel = self.channel(pool).map_err(Failure::Final)?;
        let Some(credentials) = &pool.config.credentials else { return Ok(Client::new(channel, None)) };
        let mut token = self.token.lock().await;
        if token.is_none() {
            let request = AuthenticateRequest {
                name: credentials.user.clone(),
                password: credentials.password.clone(),
            };
            let answer = Client::new(channel.clone(), None).ask(request).await;
            let answer = answer.map_err(|status| match Failure::of(&self.url, &status) {
                Failure::Lost(what) => Failure::NotTaken(what),
                other @ (Failure::NotTaken(_) | Failure::Stranger(_) | Failure::Final(_)) => other,
            })?;
            pool.check(self, answer.header(), None)?;
            let new = answer.token.parse();
            *token =
                Some(new.map_err(|_| Failure::NotTaken(format!("{}: its token is not text", self.url)))?);
        }
        Ok(Client::new(channel, token.clone()))
    }

    fn channel(&self, pool: &Pool) -> Result<Channel, StoreError> {
        let mut held = self.channel.lock();
        if let Some(channel) = &*held {
            return Ok(channel.clone());
        }
        let channel = pool.config.channel(&self.url, pool.tls.lock().as_ref())?;
        *held = Some(channel.clone());
        Ok(channel)
    }

    /// Renewed certificates are used from now on.
    fn forget_channel(&self) {
        *self.channel.lock() = None;
    }

    /// Whether it answered for another cluster.
    pub(super) fn is_foreign(&self) -> bool {
        self.foreign.load(Ordering::Relaxed)
    }

    /// The next request introduces us again.
    pub(super) async fn forget_token(&self) {
        *self.token.lock().await = None;
    }

    /// Nobody has to wait for it any longer.
    pub(super) fn found_silent(&self) {
        self.silent.send_replace(());
    }

    /// Told when the endpoint is found silent from now on.
    pub(super) fn silence(&self) -> watch::Receiver<()> {
        self.silent.subscribe()
    }
}

/// Every way to the cluster.
pub(super) struct Pool {
    pub(super) config: EtcdConfig,
    tls: Mutex<Option<TlsFiles>>,
    endpoints: RwLock<Vec<Arc<Endpoint>>>,
    current: Mutex<Arc<Endpoint>>,
    /// The cluster that answered first; zero before.
    cluster: AtomicU64,
    /// The largest revision that the cluster agreed upon.
    revision: AtomicU64,
    /// The store cannot be used by this process any more,
    pub(super) broken: CancellationToken,
    /// for this reason.
    reason: OnceLock<String>,
}

impl Pool {
    pub(super) fn new(config: EtcdConfig) -> Result<Self, StoreError> {
        let endpoints: Vec<_> =
            config.normal_endpoints()?.into_iter().map(|url| Endpoint::new(url, true)).collect();
        let first = endpoints.first().map(Arc::clone);
        let current = first.ok_or(StoreError::Invalid("an etcd store needs an endpoint"))?;
        Ok(Self {
            tls: Mutex::new(config.read_tls()?),
            config,
            endpoints: RwLock::new(endpoints),
            current: Mutex::new(current),
            cluster: AtomicU64::new(0),
            revision: AtomicU64::new(0),
            broken: CancellationToken::new(),
            reason: OnceLock::new(),
        })
    }

    pub(super) fn usable(&self) -> Result<(), StoreError> {
        if self.broken.is_cancelled() {
            return Err(StoreError::Broken(self.reason.get().cloned().unwrap_or_default()));
        }
        Ok(())
    }

    fn give_up(&self, reason: String) -> StoreError {
        tracing::error!(reason, "the metadata store cannot be used any more");
        // Whoever comes second found the same.
        let _ = self.reason.set(reason.clone());
        self.broken.cancel();
        StoreError::Broken(reason)
    }

    /// Number of the cluster; zero before anybody answered.
    pub(super) fn cluster(&self) -> u64 {
        self.cluster.load(Ordering::Relaxed)
    }

    pub(super) fn current(&self) -> Arc<Endpoint> {
        Arc::clone(&self.current.lock())
    }

    pub(super) fn endpoints(&self) -> Vec<Arc<Endpoint>> {
        self.endpoints.read().clone()
    }

    /// All endpoints, the current one first and those of other clusters last.
    pub(super) fn rotation(&self) -> Vec<Arc<Endpoint>> {
        let mut endpoints = self.endpoints();
        let current = self.current();
        if let Some(at) = endpoints.iter().position(|endpoint| Arc::ptr_eq(endpoint, &current)) {
            endpoints.rotate_left(at);
        }
        endpoints.sort_by_key(|endpoint| endpoint.is_foreign());
        endpoints
    }

    /// Goes on to the next endpoint, unless somebody else did so before.
    pub(super) fn leave(&self, endpoint: &Arc<Endpoint>) {
        let rotation = self.rotation();
        let Some(at) = rotation.iter().position(|other| Arc::ptr_eq(other, endpoint)) else {
            return;
        };
        let mut current = self.current.lock();
        if Arc::ptr_eq(&current, endpoint)
            && let Some(next) = rotation.get((at + 1) % rotation.len())
        {
            *current = Arc::clone(next);
        }
    }

    /// From now on this endpoint is asked first.
    pub(super) fn prefer(&self, endpoint: &Arc<Endpoint>) {
        let mut current = self.current.lock();
        if !Arc::ptr_eq(&current, endpoint) {
            tracing::info!(from = current.url, to = endpoint.url, "another member of etcd is asked");
            *current = Arc::clone(endpoint);
        }
    }

    /// Adds members that were found and forgets found ones that are gone.
    pub(super) fn set_found(&self, listed: &[String], found: Vec<Arc<Endpoint>>) {
        {
            let mut endpoints = self.endpoints.write();
            endpoints.retain(|endpoint| endpoint.named || listed.contains(&endpoint.url));
            endpoints.extend(found);
        }
        let (endpoints, mut current) = (self.endpoints.read(), self.current.lock());
        if !endpoints.iter().any(|endpoint| Arc::ptr_eq(endpoint, &current))
            && let Some(first) = endpoints.first()
        {
            *current = Arc::clone(first);
        }
    }

    /// Reads the files of TLS again. Connections made from now on use them.
    pub(super) fn renew_tls(&self) -> Result<(), StoreError> {
        let files = self.config.read_tls()?;
        if files == *self.tls.lock() {
            return Ok(());
        }
        *self.tls.lock() = files;
        for endpoint in self.endpoints() {
            endpoint.forget_channel();
        }
        tracing::info!("the certificates for the metadata store were read again");
        Ok(())
    }

    /// Asks until somebody answers or the time is over; what must not be applied twice is sent again only when it is
    /// certain that it was not applied.
    pub(super) async fn ask<R: Request>(&self, request: &R) -> Result<R::Answer, StoreError> {
        let deadline = Instant::now() + self.config.call_limit;
        let mut wait = FIRST_WAIT;
        let mut introduced = false;
        let mut last = StoreError::Unavailable(String::new());
        for _ in 0..ROUNDS {
            let endpoints = self.endpoints.read().len();
            for _ in 0..endpoints {
                self.usable()?;
                let endpoint = self.current();
                let limit = if R::REPEATABLE { QUESTION_LIMIT } else { CHANGE_LIMIT };
                let limit = limit.min(deadline.saturating_duration_since(Instant::now()));
                let failure = match self.attempt(&endpoint, limit, request).await {
                    Ok(answer) => return Ok(answer),
                    Err(failure) => failure,
                };
                tracing::debug!(endpoint = endpoint.url, ?failure, "a request to the metadata store failed");
                match failure {
                    Failure::Final(error) => return Err(error),
                    Failure::Lost(_) if !R::REPEATABLE => {
                        self.leave(&endpoint);
                        return Err(failure.of_change());
                    }
                    Failure::Stranger(what) if introduced => return Err(StoreError::Refused(what)),
                    Failure::Stranger(what) => {
                        introduced = true;
                        endpoint.forget_token().await;
                        last = StoreError::Refused(what);
                        continue;
                    }
                    Failure::NotTaken(_) | Failure::Lost(_) => last = failure.of_question(),
                }
                self.leave(&endpoint);
                if Instant::now() >= deadline {
                    return Err(last);
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if wait >= left {
                // The wait would outlast the time: say so now rather than then.
                return Err(last);
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(LONGEST_WAIT);
        }
        Err(last)
    }

    /// Asks one endpoint once.
    pub(super) async fn attempt<R: Request>(
        &self,
        endpoint: &Arc<Endpoint>,
        limit: Duration,
        request: &R,
    ) -> Result<R::Answer, Failure> {
        let before = self.revision.load(Ordering::Acquire);
        let sent = AtomicBool::new(false);
        let mut silence = endpoint.silence();
        let work = async {
            let client = endpoint.client(self).await?;
            sent.store(true, Ordering::Relaxed);
            client.ask(request.clone()).await.map_err(|status| Failure::of(&endpoint.url, &status))
        };
        let answer = tokio::select! {
            biased;
            answer = work => answer?,
            _ = silence.changed() => return Err(unsent(failure::silent(&endpoint.url, limit), &sent)),
            () = tokio::time::sleep(limit) => return Err(unsent(failure::silent(&endpoint.url, limit), &sent)),
        };
        self.check(endpoint, answer.header(), R::Answer::AGREED.then_some(before))?;
        Ok(answer)
    }

    /// Whether an answer comes from our cluster and not from its past. `before`: the revision that the cluster had
    /// agreed upon before it was asked, when the answer cannot lie before it.
    pub(super) fn check(
        &self,
        endpoint: &Endpoint,
        head: Option<Header>,
        before: Option<u64>,
    ) -> Result<(), Failure> {
        let Some(head) = head else {
            return Err(Failure::Lost(format!("{}: an answer without a header", endpoint.url)));
        };
        let known = self.cluster.compare_exchange(0, head.cluster_id, Ordering::Relaxed, Ordering::Relaxed);
        if let Err(known) = known
            && known != head.cluster_id
        {
            if !endpoint.foreign.swap(true, Ordering::Relaxed) {
                tracing::error!(
                    endpoint = endpoint.url,
                    "this etcd belongs to another cluster; it is not used"
                );
            }
            return Err(Failure::NotTaken(format!(
                "{}: it belongs to the etcd cluster {:x}, not to {known:x}; correct the list of endpoints",
                endpoint.url, head.cluster_id
            )));
        }
        endpoint.foreign.store(false, Ordering::Relaxed);
        let Some(before) = before else { return Ok(()) };
        let revision = u64::try_from(head.revision).unwrap_or_default();
        if revision < before {
            return Err(Failure::Final(self.give_up(format!(
                "etcd at {} went back from revision {before} to {revision}: it lost data or was restored from a \
                 backup; restart this node",
                endpoint.url
            ))));
        }
        self.revision.fetch_max(revision, Ordering::AcqRel);
        Ok(())
    }
}

/// A request that has not left yet cannot have been applied.
fn unsent(failure: Failure, sent: &AtomicBool) -> Failure {
    match failure {
        Failure::Lost(what) if !sent.load(Ordering::Relaxed) => Failure::NotTaken(what),
        other @ (Failure::Lost(_) | Failure::NotTaken(_) | Failure::Stranger(_) | Failure::Final(_)) => other,
    }
}
