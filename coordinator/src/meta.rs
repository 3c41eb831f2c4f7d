//! The stored documents of changefeeds, changed only by compare-and-set under the ownership fence.
//!
//! Every write compares the coordinator's own election key, so a coordinator that was replaced changes
//! nothing (CO-3), and the revisions of the documents it read, so no concurrent change is lost.

mod operations;

use std::sync::Arc;
use std::time::Duration;

use heartbeatpb::config::{ChangefeedInfo, ChangefeedState, ChangefeedStatusDoc, Progress};
use heartbeatpb::{ChangefeedId, MaintainerEpoch, RunningError, Ts};

use crate::backend::{Compare, KeyValue, Leadership, MAX_TXN_OPS, Op, Store, Txn};
use crate::drain::DrainDoc;
use crate::error::Error;
use crate::layout::{ChangefeedKey, Layout};
use crate::operations::OperationDoc;

/// Attempts of a compare-and-set before the caller is told about the conflict.
const CAS_ATTEMPTS: usize = 10;
/// Between two attempts.
const CAS_DELAY: Duration = Duration::from_millis(25);
/// Checkpoints per transaction. One comparison is the fence.
const CHECKPOINTS_PER_TXN: usize = MAX_TXN_OPS - 1;
/// Characters of an error message that are stored: what is wrong and what to do, in full.
const STORED_MESSAGE_CHARS: usize = 1000;

/// A changefeed as it is stored.
#[derive(Clone, PartialEq, Debug)]
pub struct Stored {
    /// Its description.
    pub info: ChangefeedInfo,
    /// Its progress.
    pub status: ChangefeedStatusDoc,
}

/// A checkpoint to store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CheckpointWrite {
    /// The changefeed.
    pub id: ChangefeedId,
    /// Everything at or before it is durable downstream.
    pub checkpoint: Ts,
    /// Epoch of the maintainer that reported it.
    pub epoch: Option<MaintainerEpoch>,
}

/// The documents of one cluster.
#[derive(Clone)]
pub struct Meta {
    store: Arc<dyn Store>,
    layout: Layout,
    fence: Leadership,
    /// Stored in the same transaction as what it is about: the operation that a change belongs to.
    mark: Option<Arc<OperationDoc>>,
}

impl std::fmt::Debug for Meta {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Meta").field("fence", &self.fence).finish_non_exhaustive()
    }
}

/// What one read found, with the conditions under which a write may replace it.
struct Read {
    stored: Stored,
    status_kv: Option<KeyValue>,
    when: Vec<Compare>,
}

impl Meta {
    /// The documents, written in the name of a won election.
    #[must_use]
    pub fn new(store: Arc<dyn Store>, layout: Layout, fence: Leadership) -> Self {
        Self { store, layout, fence, mark: None }
    }

    /// The same documents; whatever changes a changefeed stores that this operation is applied, too.
    #[must_use]
    pub(crate) fn marking(&self, mark: Option<Arc<OperationDoc>>) -> Self {
        Self { mark, ..self.clone() }
    }

    /// Adds to a change that its operation is applied. One that has ended meanwhile must not be any more.
    fn mark(&self, txn: &mut Txn) {
        let Some(doc) = &self.mark else { return };
        let key = self.layout.operation(&doc.id);
        txn.when.push(Compare::Value { key: key.clone(), value: doc.to_json() });
        txn.then.push(Op::put(key, doc.applied().to_json()));
    }

    /// Generation of the coordinator.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.fence.revision
    }

    fn fence(&self) -> Compare {
        Compare::ModRevision { key: self.fence.key.clone(), revision: self.fence.revision }
    }

    /// Says why a transaction's conditions did not hold: `Err` when this coordinator was replaced.
    async fn still_owner(&self) -> Result<(), Error> {
        let own = self.store.get(&self.fence.key).await?.found;
        if own.is_some_and(|kv| kv.mod_revision == self.fence.revision) {
            Ok(())
        } else {
            Err(Error::NotOwner)
        }
    }

    /// Reads every changefeed, and the names of those whose description cannot be read. Repairs what older
    /// versions left incomplete: a missing identity and a missing status are written back.
    ///
    /// # Errors
    /// When the store fails or this coordinator was replaced.
    pub async fn get_all(&self) -> Result<(Vec<Stored>, Vec<String>), Error> {
        let found = self.store.scan(&self.layout.base()).await?.found;
        let (mut all, mut unreadable) = (Vec::new(), Vec::new());
        for kv in &found {
            let Some(ChangefeedKey::Info { keyspace, name }) = self.layout.parse(&kv.key) else { continue };
            let (info, assigned) = match ChangefeedInfo::from_json(&kv.value, keyspace, name) {
                Ok(read) => read,
                Err(error) => {
                    tracing::warn!(keyspace, name, %error, "the description of a changefeed cannot be read");
                    unreadable.push(format!("{keyspace}/{name}"));
                    continue;
                }
            };
            let status_key = self.layout.status(keyspace, name);
            let at = found.binary_search_by(|kv| kv.key.cmp(&status_key)).ok();
            let status_kv = at.and_then(|at| found.get(at));
            let status = status_kv.and_then(|kv| ChangefeedStatusDoc::from_json(&kv.value).ok());
            if assigned || status.is_none() {
                match self.repair(info, kv, status, status_kv).await? {
                    Some(stored) => all.push(stored),
                    None => unreadable.push(format!("{keyspace}/{name}")),
                }
            } else if let Some(status) = status {
                all.push(Stored { info, status });
            }
        }
        Ok((all, unreadable))
    }

    /// Reads what is stored about drains. What cannot be read counts as nothing: the person asks again.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn get_drain(&self) -> Result<Option<DrainDoc>, Error> {
        let Some(kv) = self.store.get(&self.layout.drain()).await?.found else { return Ok(None) };
        match serde_json::from_slice(&kv.value) {
            Ok(doc) => Ok(Some(doc)),
            Err(error) => {
                tracing::warn!(%error, "the document of drains cannot be read; a drain has to be asked for again");
                Ok(None)
            }
        }
    }

    /// Stores what is to be known of drains. Only the owner writes it, so the fence is the only condition.
    ///
    /// # Errors
    /// When the store fails or this coordinator was replaced.
    pub async fn put_drain(&self, doc: &DrainDoc) -> Result<(), Error> {
        let value =
            serde_json::to_vec(doc).map_err(|_| Error::Drain("the document of drains cannot be written"))?;
        let txn = Txn {
            when: vec![self.fence()],
            then: vec![Op::put(self.layout.drain(), value)],
            or_else: Vec::new(),
        };
        if self.store.txn(txn).await?.succeeded { Ok(()) } else { Err(Error::NotOwner) }
    }

    async fn repair(
        &self,
        info: ChangefeedInfo,
        info_kv: &KeyValue,
        status: Option<ChangefeedStatusDoc>,
        status_kv: Option<&KeyValue>,
    ) -> Result<Option<Stored>, Error> {
        let status = status.unwrap_or_else(|| ChangefeedStatusDoc::at(info.start_ts, info.epoch));
        let status_key = match self.layout.parse(&info_kv.key) {
            Some(ChangefeedKey::Info { keyspace, name }) => self.layout.status(keyspace, name),
            Some(ChangefeedKey::Status { .. }) | None => return Ok(None),
        };
        let txn = Txn {
            when: vec![
                self.fence(),
                unchanged(&info_kv.key, Some(info_kv)),
                unchanged(&status_key, status_kv),
            ],
            then: vec![Op::put(info_kv.key.clone(), info.to_json()), Op::put(status_key, status.to_json())],
            or_else: Vec::new(),
        };
        if self.store.txn(txn).await?.succeeded {
            return Ok(Some(Stored { info, status }));
        }
        self.still_owner().await?;
        Ok(None)
    }

    /// Reads one changefeed.
    ///
    /// # Errors
    /// [`Error::NotExists`], or when the store fails.
    pub async fn get(&self, keyspace: &str, name: &str) -> Result<Stored, Error> {
        Ok(self.read(keyspace, name).await?.stored)
    }

    async fn read(&self, keyspace: &str, name: &str) -> Result<Read, Error> {
        let missing = || Error::NotExists(format!("{keyspace}/{name}"));
        let (info_key, status_key) = (self.layout.info(keyspace, name), self.layout.status(keyspace, name));
        let mut found = self.store.get_many(&[info_key.clone(), status_key.clone()]).await?.into_iter();
        let info_kv = found.next().flatten().ok_or_else(missing)?;
        let status_kv = found.next().flatten();
        let (info, _) = ChangefeedInfo::from_json(&info_kv.value, keyspace, name)?;
        let status = match status_kv.as_ref().map(|kv| ChangefeedStatusDoc::from_json(&kv.value)) {
            Some(Ok(status)) => status,
            Some(Err(_)) | None => ChangefeedStatusDoc::at(info.start_ts, info.epoch),
        };
        let when = vec![
            self.fence(),
            unchanged(&info_key, Some(&info_kv)),
            unchanged(&status_key, status_kv.as_ref()),
        ];
        Ok(Read { stored: Stored { info, status }, status_kv, when })
    }

    /// Stores a new changefeed: both documents or none.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`], or when the store fails or this coordinator was replaced.
    pub async fn create(&self, stored: &Stored) -> Result<(), Error> {
        let id = &stored.info.id;
        let (info, status) =
            (self.layout.info(&id.keyspace, &id.name), self.layout.status(&id.keyspace, &id.name));
        let mut txn = Txn {
            when: vec![
                self.fence(),
                Compare::Absent { key: info.clone() },
                Compare::Absent { key: status.clone() },
            ],
            then: vec![Op::put(info, stored.info.to_json()), Op::put(status, stored.status.to_json())],
            or_else: Vec::new(),
        };
        self.mark(&mut txn);
        match self.store.txn(txn).await {
            Ok(outcome) if outcome.succeeded => Ok(()),
            // Not the first attempt, or its answer was lost: if what is there is ours, it worked.
            Ok(_) => self.created(id).await,
            Err(error) if error.may_have_applied() => match self.created(id).await {
                Err(Error::NotExists(_)) => Err(error.into()),
                other => other,
            },
            Err(error) => Err(error.into()),
        }
    }

    async fn created(&self, id: &ChangefeedId) -> Result<(), Error> {
        self.still_owner().await?;
        match self.get(&id.keyspace, &id.name).await {
            Ok(found) if found.info.id == *id => Ok(()),
            Ok(_) | Err(Error::Config(_)) => Err(Error::AlreadyExists(id.to_string())),
            Err(other) => Err(other),
        }
    }

    /// Changes the documents of one incarnation of a changefeed; what `change` leaves alone is not written.
    /// The stored epoch never becomes smaller. Returns what is stored afterwards: the store's copy wins over
    /// whatever the caller had.
    ///
    /// # Errors
    /// [`Error::NotExists`] when the incarnation is gone, what `change` returns, [`Error::Conflict`] when
    /// others keep winning, or when the store fails or this coordinator was replaced.
    pub async fn edit(
        &self,
        id: &ChangefeedId,
        change: impl Fn(&mut Stored) -> Result<(), Error> + Send + Sync,
    ) -> Result<Stored, Error> {
        let mut sent: Option<Stored> = None;
        for attempt in 0..CAS_ATTEMPTS {
            if attempt > 0 {
                tokio::time::sleep(CAS_DELAY).await;
            }
            let read = self.read(&id.keyspace, &id.name).await?;
            if read.stored.info.id != *id {
                return Err(Error::NotExists(id.to_string()));
            }
            if sent.as_ref() == Some(&read.stored) {
                // The answer of the attempt before was lost, but it was applied.
                return Ok(read.stored);
            }
            let mut next = read.stored.clone();
            change(&mut next)?;
            shorten(&mut next.info.error);
            shorten(&mut next.info.warning);
            next.info.epoch = next.info.epoch.max(read.stored.info.epoch);
            let mut then = Vec::new();
            if next.info != read.stored.info {
                then.push(Op::put(self.layout.info(&id.keyspace, &id.name), next.info.to_json()));
            }
            if next.status != read.stored.status || read.status_kv.is_none() {
                then.push(Op::put(self.layout.status(&id.keyspace, &id.name), next.status.to_json()));
            }
            if then.is_empty() {
                return Ok(next);
            }
            let mut txn = Txn { when: read.when, then, or_else: Vec::new() };
            self.mark(&mut txn);
            match self.store.txn(txn).await {
                Ok(outcome) if outcome.succeeded => return Ok(next),
                Ok(_) => self.still_owner().await?,
                Err(error) if error.may_have_applied() => sent = Some(next),
                Err(error) => return Err(error.into()),
            }
        }
        Err(Error::Conflict(id.to_string()))
    }

    /// Makes a strictly larger epoch durable, together with what `also` changes.
    ///
    /// # Errors
    /// [`Error::EpochOverflow`], and those of [`Meta::edit`].
    pub async fn bump_epoch(
        &self,
        id: &ChangefeedId,
        candidate: u64,
        also: impl Fn(&mut Stored) -> Result<(), Error> + Send + Sync,
    ) -> Result<Stored, Error> {
        self.edit(id, |stored| {
            bump(&mut stored.info, candidate)?;
            also(stored)
        })
        .await
    }

    /// Makes a resumable changefeed normal at `overwrite`, or where it is, under a larger epoch than `known`, the
    /// one that the caller believes to be stored. Where a larger one is stored already an earlier attempt was
    /// applied without an answer; it is carried out again, whatever the state is by now.
    ///
    /// # Errors
    /// [`Error::UpdateRefused`] when the stored state does not allow it, and those of [`Meta::edit`].
    pub async fn resume(
        &self,
        id: &ChangefeedId,
        candidate: u64,
        known: Option<MaintainerEpoch>,
        overwrite: Option<Ts>,
    ) -> Result<Stored, Error> {
        self.edit(id, |stored| {
            if !stored.info.state.is_resumable() && stored.info.epoch <= known {
                return Err(Error::UpdateRefused {
                    name: id.to_string(),
                    state: stored.info.state.to_string(),
                    what: "only a stopped, failed or finished changefeed can be resumed",
                });
            }
            bump(&mut stored.info, candidate)?;
            stored.info.state = ChangefeedState::Normal;
            stored.info.error = None;
            stored.info.warning = None;
            stored.status.checkpoint_ts = overwrite.unwrap_or(stored.status.checkpoint_ts);
            stored.status.progress = Progress::None;
            // Reports of the generation before must not overwrite the checkpoint set here.
            stored.status.epoch = stored.info.epoch;
            Ok(())
        })
        .await
    }

    /// Stores that a changefeed is paused and that its maintainer has yet to stop.
    ///
    /// # Errors
    /// Those of [`Meta::edit`].
    pub async fn pause(&self, id: &ChangefeedId) -> Result<Stored, Error> {
        self.edit(id, |stored| {
            stored.info.state = ChangefeedState::Stopped;
            set_progress(stored, Progress::Stopping);
            Ok(())
        })
        .await
    }

    /// Stores what is under way. An intent to remove is only taken back by the removal itself.
    ///
    /// # Errors
    /// Those of [`Meta::edit`].
    pub async fn set_progress(&self, id: &ChangefeedId, progress: Progress) -> Result<Stored, Error> {
        self.edit(id, |stored| {
            set_progress(stored, progress);
            Ok(())
        })
        .await
    }

    /// Stores a state with its error, and what is under way.
    ///
    /// # Errors
    /// Those of [`Meta::edit`].
    pub async fn set_state(
        &self,
        id: &ChangefeedId,
        state: ChangefeedState,
        error: Option<&RunningError>,
        progress: Progress,
    ) -> Result<Stored, Error> {
        self.edit(id, |stored| {
            stored.info.state = state;
            stored.info.error = error.cloned();
            set_progress(stored, progress);
            Ok(())
        })
        .await
    }

    /// Stores a new description of a changefeed that does not run. Identity, start, state and errors stay.
    ///
    /// # Errors
    /// [`Error::UpdateRefused`] when the stored state does not allow it, and those of [`Meta::edit`].
    pub async fn update(&self, info: &ChangefeedInfo) -> Result<Stored, Error> {
        self.edit(&info.id, |stored| {
            if !matches!(stored.info.state, ChangefeedState::Stopped | ChangefeedState::Failed) {
                return Err(Error::UpdateRefused {
                    name: info.id.to_string(),
                    state: stored.info.state.to_string(),
                    what: "only a stopped or failed changefeed can be updated; pause it first",
                });
            }
            stored.info.sink_uri.clone_from(&info.sink_uri);
            stored.info.config = info.config.clone();
            stored.info.target_ts = info.target_ts;
            stored.info.upstream_info.clone_from(&info.upstream_info);
            stored.info.upstream_id = info.upstream_id;
            Ok(())
        })
        .await
    }

    /// Deletes one incarnation of a changefeed; absent already is fine.
    ///
    /// # Errors
    /// [`Error::Conflict`] when others keep writing, or when the store fails or this coordinator was replaced.
    pub async fn delete(&self, id: &ChangefeedId) -> Result<(), Error> {
        for attempt in 0..CAS_ATTEMPTS {
            if attempt > 0 {
                tokio::time::sleep(CAS_DELAY).await;
            }
            let read = match self.read(&id.keyspace, &id.name).await {
                Ok(read) if read.stored.info.id == *id => read,
                Ok(_) | Err(Error::NotExists(_)) => return Ok(()),
                Err(other) => return Err(other),
            };
            let then = vec![
                Op::delete(self.layout.info(&id.keyspace, &id.name)),
                Op::delete(self.layout.status(&id.keyspace, &id.name)),
            ];
            match self.store.txn(Txn { when: read.when, then, or_else: Vec::new() }).await {
                Ok(outcome) if outcome.succeeded => return Ok(()),
                Ok(_) => self.still_owner().await?,
                Err(error) if error.may_have_applied() => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(Error::Conflict(id.to_string()))
    }

    /// Stores checkpoints, many in one transaction. One that does not move forward, or that a maintainer
    /// older than the stored one reported, is left out; what is under way is kept. Returns what is durable.
    ///
    /// # Errors
    /// [`Error::Conflict`] when others keep writing, or when the store fails or this coordinator was replaced.
    pub async fn update_checkpoints(
        &self,
        writes: &[CheckpointWrite],
    ) -> Result<Vec<CheckpointWrite>, Error> {
        let mut durable = Vec::with_capacity(writes.len());
        for chunk in writes.chunks(CHECKPOINTS_PER_TXN) {
            durable.extend(self.update_checkpoint_chunk(chunk).await?);
        }
        Ok(durable)
    }

    async fn update_checkpoint_chunk(
        &self,
        writes: &[CheckpointWrite],
    ) -> Result<Vec<CheckpointWrite>, Error> {
        for attempt in 0..CAS_ATTEMPTS {
            if attempt > 0 {
                tokio::time::sleep(CAS_DELAY).await;
            }
            let mut durable = Vec::new();
            let mut txn = Txn { when: vec![self.fence()], ..Txn::default() };
            let keys: Vec<String> =
                writes.iter().map(|write| self.layout.status(&write.id.keyspace, &write.id.name)).collect();
            let found = self.store.get_many(&keys).await?;
            for ((write, key), kv) in writes.iter().zip(keys).zip(found) {
                let Some(kv) = kv else { continue };
                let Ok(mut status) = ChangefeedStatusDoc::from_json(&kv.value) else { continue };
                if write.epoch < status.epoch {
                    continue;
                }
                durable.push(write.clone());
                if write.checkpoint > status.checkpoint_ts {
                    status.checkpoint_ts = write.checkpoint;
                    status.epoch = write.epoch;
                    txn.when.push(unchanged(&key, Some(&kv)));
                    txn.then.push(Op::put(key, status.to_json()));
                }
            }
            if txn.then.is_empty() {
                return Ok(durable);
            }
            match self.store.txn(txn).await {
                Ok(outcome) if outcome.succeeded => return Ok(durable),
                Ok(_) => self.still_owner().await?,
                // If it was applied, the next attempt finds nothing left to write.
                Err(error) if error.may_have_applied() => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(Error::Conflict(writes.first().map_or_else(String::new, |write| write.id.to_string())))
    }
}

/// The document is as it was read.
fn unchanged(key: &str, kv: Option<&KeyValue>) -> Compare {
    match kv {
        Some(kv) => Compare::ModRevision { key: key.to_owned(), revision: kv.mod_revision },
        None => Compare::Absent { key: key.to_owned() },
    }
}

/// Gives a changefeed an epoch beyond every number of the maintainer before.
fn bump(info: &mut ChangefeedInfo, candidate: u64) -> Result<(), Error> {
    let next = MaintainerEpoch::successor(info.epoch, candidate);
    info.epoch = Some(next.ok_or_else(|| Error::EpochOverflow(info.id.to_string()))?);
    Ok(())
}

/// An intent to remove survives everything but the removal (I6).
fn set_progress(stored: &mut Stored, progress: Progress) {
    if stored.status.progress != Progress::Removing {
        stored.status.progress = progress;
    }
}

fn shorten(error: &mut Option<RunningError>) {
    if let Some(error) = error
        && let Some((cut, _)) = error.message.char_indices().nth(STORED_MESSAGE_CHARS)
    {
        // Already cut once: "..." included it is three longer than the limit.
        if error.message.len() != cut + 3 || !error.message.ends_with("...") {
            error.message.truncate(cut);
            error.message.push_str("...");
        }
    }
}
