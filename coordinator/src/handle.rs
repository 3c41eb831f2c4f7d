//! How the rest of the process talks to the coordinator.

use std::sync::Arc;
use std::time::Duration;

use heartbeatpb::config::ChangefeedInfo;
use heartbeatpb::{NodeId, Ts, WallTime};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::core::{ChangefeedView, Command, DrainView, Reply};
use crate::error::Error;
use crate::meta::{Meta, Stored};
use crate::operations::OperationDoc;

/// A removal of the same name is waited for this long before a creation is refused.
const REMOVAL_WAIT: Duration = Duration::from_secs(50);
/// Between two looks at such a removal.
const REMOVAL_POLL: Duration = Duration::from_millis(200);

/// A question to the coordinator's task.
pub(crate) struct Request {
    pub(crate) command: Command,
    /// The operation that it is part of.
    pub(crate) mark: Option<Arc<OperationDoc>>,
    pub(crate) reply: oneshot::Sender<Result<Reply, Error>>,
}

/// A cheap handle to a running coordinator. Every call fails with [`Error::Stopped`] once it is gone.
///
/// Dropping a call does not undo what is persisted already; calling again converges.
#[derive(Clone)]
pub struct CoordinatorHandle {
    pub(crate) requests: mpsc::Sender<Request>,
    pub(crate) meta: Arc<Meta>,
    pub(crate) resign: CancellationToken,
    pub(crate) mark: Option<Arc<OperationDoc>>,
}

impl std::fmt::Debug for CoordinatorHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CoordinatorHandle").field("version", &self.meta.version()).finish_non_exhaustive()
    }
}

impl CoordinatorHandle {
    /// Generation of the coordinator.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.meta.version()
    }

    /// The same coordinator, asked in the name of an operation that is stored: what is changed through this handle says
    /// in the same transaction that the operation is applied.
    #[must_use]
    pub fn for_operation(&self, doc: OperationDoc) -> Self {
        Self { mark: Some(Arc::new(doc)), ..self.clone() }
    }

    /// Reads what people asked to be changed, and the ids of documents that cannot be read.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn operations(&self) -> Result<(Vec<OperationDoc>, Vec<String>), Error> {
        self.meta.get_operations().await
    }

    /// Stores what is known of an operation and deletes others. With `from` only if that is what is stored; returns
    /// whether it was.
    ///
    /// # Errors
    /// When the store fails, or this coordinator was replaced.
    pub async fn put_operation(
        &self,
        doc: &OperationDoc,
        from: Option<&OperationDoc>,
        drop: &[String],
    ) -> Result<bool, Error> {
        self.meta.put_operation(doc, from, drop).await
    }

    async fn ask(&self, command: Command) -> Result<Reply, Error> {
        let (reply, answer) = oneshot::channel();
        let mark = self.mark.clone();
        self.requests.send(Request { command, mark, reply }).await.map_err(|_| Error::Stopped)?;
        answer.await.map_err(|_| Error::Stopped)?
    }

    /// Stores a new changefeed, whose description was validated, and gives it to a node. Returns it as it is
    /// stored. A removal or another creation of the same name that is still under way is waited for.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`], [`Error::CreationUnfinished`], [`Error::DeletionUnfinished`], or when it cannot be stored.
    pub async fn create(&self, info: ChangefeedInfo) -> Result<ChangefeedInfo, Error> {
        let deadline = tokio::time::Instant::now() + REMOVAL_WAIT;
        loop {
            let command = Command::Create { info: Box::new(info.clone()), candidate: epoch_candidate() };
            match self.ask(command).await {
                Err(Error::CreationUnfinished(_) | Error::DeletionUnfinished(_))
                    if tokio::time::Instant::now() < deadline =>
                {
                    tokio::time::sleep(REMOVAL_POLL).await;
                }
                Ok(Reply::Info(info)) => return Ok(*info),
                Ok(Reply::Checkpoint(_) | Reply::One(_) | Reply::Many(_) | Reply::Drain(_) | Reply::Done) => {
                    return Err(Error::Stopped);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Stops a changefeed and forgets it, the log kept for it at the upstream included. Returns its last
    /// persisted checkpoint once all of it is gone.
    ///
    /// # Errors
    /// [`Error::NotExists`], or when the removal cannot be stored.
    pub async fn remove(&self, keyspace: &str, name: &str) -> Result<Ts, Error> {
        self.checkpoint(Command::Remove { keyspace: keyspace.to_owned(), name: name.to_owned() }).await
    }

    /// Stops a changefeed and keeps it. Returns its persisted checkpoint once its maintainer has stopped.
    ///
    /// # Errors
    /// [`Error::NotExists`], or when the pause cannot be stored.
    pub async fn pause(&self, keyspace: &str, name: &str) -> Result<Ts, Error> {
        self.checkpoint(Command::Pause { keyspace: keyspace.to_owned(), name: name.to_owned() }).await
    }

    /// Runs a stopped, failed or finished changefeed again, from `overwrite` or from where it is. Returns the
    /// checkpoint at which it starts, once that is stored.
    ///
    /// # Errors
    /// [`Error::NotExists`], [`Error::UpdateRefused`], or when it cannot be stored.
    pub async fn resume(&self, keyspace: &str, name: &str, overwrite: Option<Ts>) -> Result<Ts, Error> {
        let (keyspace, name) = (keyspace.to_owned(), name.to_owned());
        self.checkpoint(Command::Resume { keyspace, name, overwrite }).await
    }

    async fn checkpoint(&self, command: Command) -> Result<Ts, Error> {
        match self.ask(command).await? {
            Reply::Checkpoint(checkpoint) => Ok(checkpoint),
            Reply::Info(_) | Reply::One(_) | Reply::Many(_) | Reply::Drain(_) | Reply::Done => {
                Err(Error::Stopped)
            }
        }
    }

    /// Replaces sink, configuration, target and upstream of a stopped or failed changefeed.
    ///
    /// # Errors
    /// [`Error::NotExists`], [`Error::UpdateRefused`], or when it cannot be stored.
    pub async fn update(&self, info: ChangefeedInfo) -> Result<ChangefeedInfo, Error> {
        match self.ask(Command::Update { info: Box::new(info) }).await? {
            Reply::Info(info) => Ok(*info),
            Reply::Checkpoint(_) | Reply::One(_) | Reply::Many(_) | Reply::Drain(_) | Reply::Done => {
                Err(Error::Stopped)
            }
        }
    }

    /// One changefeed.
    ///
    /// # Errors
    /// [`Error::NotExists`] or [`Error::NotInitialized`].
    pub async fn get(&self, keyspace: &str, name: &str) -> Result<ChangefeedView, Error> {
        match self.ask(Command::Get { keyspace: keyspace.to_owned(), name: name.to_owned() }).await? {
            Reply::One(view) => Ok(*view),
            Reply::Info(_) | Reply::Checkpoint(_) | Reply::Many(_) | Reply::Drain(_) | Reply::Done => {
                Err(Error::Stopped)
            }
        }
    }

    /// All changefeeds, or those of one keyspace, ordered by keyspace and name.
    ///
    /// # Errors
    /// [`Error::NotInitialized`].
    pub async fn list(&self, keyspace: Option<&str>) -> Result<Vec<ChangefeedView>, Error> {
        match self.ask(Command::List { keyspace: keyspace.map(str::to_owned) }).await? {
            Reply::Many(views) => Ok(views),
            Reply::Info(_) | Reply::Checkpoint(_) | Reply::One(_) | Reply::Drain(_) | Reply::Done => {
                Err(Error::Stopped)
            }
        }
    }

    /// Empties a node, and says what is left. Asked again, about every second, until nothing remains: 0 is a
    /// promise that the node holds nothing, or says that a node of an older version cannot take part.
    ///
    /// # Errors
    /// [`Error::NodeNotExists`], or [`Error::Drain`] when no epoch can be had for the drain.
    pub async fn drain_node(&self, node: &NodeId) -> Result<DrainView, Error> {
        match self.ask(Command::Drain { node: node.clone(), clock: clock_nanos() }).await? {
            Reply::Drain(view) => Ok(*view),
            Reply::Info(_) | Reply::Checkpoint(_) | Reply::One(_) | Reply::Many(_) | Reply::Done => {
                Err(Error::Stopped)
            }
        }
    }

    /// How far the drain under way is; `None` when there is none. Changes nothing.
    ///
    /// # Errors
    /// [`Error::NotInitialized`].
    pub async fn drain_progress(&self) -> Result<Option<DrainView>, Error> {
        match self.ask(Command::DrainProgress).await? {
            Reply::Drain(view) => Ok(Some(*view)),
            Reply::Done => Ok(None),
            Reply::Info(_) | Reply::Checkpoint(_) | Reply::One(_) | Reply::Many(_) => Err(Error::Stopped),
        }
    }

    /// Takes a drain back, once that is stored. The node keeps what it still has and gets nothing new until it
    /// is restarted.
    ///
    /// # Errors
    /// [`Error::Drain`] when no drain of this node is under way, or [`Error::NotInitialized`].
    pub async fn cancel_drain(&self, node: &NodeId) -> Result<(), Error> {
        self.ask(Command::CancelDrain { node: node.clone() }).await.map(|_| ())
    }

    /// Stops the coordinator in order, so that another node can lead; its own stands for election again. Returns
    /// when it has stopped, with the last checkpoints stored.
    pub async fn resign(&self) {
        self.resign.cancel();
        self.requests.closed().await;
    }

    /// A changefeed as it is stored, past everything in memory.
    ///
    /// # Errors
    /// [`Error::NotExists`], or when the store fails.
    pub async fn get_persisted(&self, keyspace: &str, name: &str) -> Result<Stored, Error> {
        self.meta.get(keyspace, name).await
    }
}

/// The time of day in nanoseconds since 1970; `None` when the clock is out of any range.
fn clock_nanos() -> Option<u64> {
    u64::try_from(WallTime::now().0).ok()?.checked_mul(1_000)
}

/// A number that makes epochs fresh across deletion and creation; correctness rests on compare-and-set.
pub(crate) fn epoch_candidate() -> u64 {
    clock_nanos().unwrap_or(1)
}
