//! What people ask for (coordinator §19).

use std::time::Instant;

use heartbeatpb::config::{ChangefeedInfo, ChangefeedState, SinkKind, is_valid_keyspace, is_valid_name};
use heartbeatpb::{ChangefeedId, MaintainerEpoch, NodeId, Ts};

use super::{Action, ChangefeedView, Core, DrainView, OpId, Write, key_of};
use crate::changefeed::Group;
use crate::error::Error;

/// A request of a person.
#[derive(Clone, PartialEq, Debug)]
pub enum Command {
    /// A new changefeed. Its description was validated against upstream and downstream.
    Create {
        /// The description; its epoch is replaced.
        info: Box<ChangefeedInfo>,
        /// Lower bound of its first epoch.
        candidate: u64,
    },
    /// Stop it and keep it.
    Pause {
        /// Keyspace.
        keyspace: String,
        /// Name.
        name: String,
    },
    /// Run it again, from `overwrite` or from where it is.
    Resume {
        /// Keyspace.
        keyspace: String,
        /// Name.
        name: String,
        /// A new checkpoint.
        overwrite: Option<Ts>,
    },
    /// Stop it and forget it.
    Remove {
        /// Keyspace.
        keyspace: String,
        /// Name.
        name: String,
    },
    /// Replace its description.
    Update {
        /// The description, with the identity of the changefeed.
        info: Box<ChangefeedInfo>,
    },
    /// One changefeed.
    Get {
        /// Keyspace.
        keyspace: String,
        /// Name.
        name: String,
    },
    /// Empty a node. Asked again until nothing remains.
    Drain {
        /// The node.
        node: NodeId,
        /// Nanoseconds since 1970, if the clock is usable: epochs of drains are not smaller.
        clock: Option<u64>,
    },
    /// How far the drain under way is.
    DrainProgress,
    /// Take a drain back.
    CancelDrain {
        /// The node.
        node: NodeId,
    },
    /// All changefeeds.
    List {
        /// Of one keyspace only.
        keyspace: Option<String>,
    },
}

/// The answer to a [`Command`].
#[derive(Clone, Debug)]
pub enum Reply {
    /// The description as it is stored.
    Info(Box<ChangefeedInfo>),
    /// The checkpoint at which it happened.
    Checkpoint(Ts),
    /// One changefeed.
    One(Box<ChangefeedView>),
    /// Several changefeeds, by keyspace and name.
    Many(Vec<ChangefeedView>),
    /// How far a drain is.
    Drain(Box<DrainView>),
    /// It is done, or there is nothing to tell.
    Done,
}

/// Why a resume is refused.
pub(super) const NOT_RESUMABLE: &str = "only a stopped, failed or finished changefeed can be resumed";

impl Core {
    /// A person asks for something; the answer comes as [`Action::Reply`], now or when it is done.
    pub fn on_command(&mut self, op: OpId, command: Command, now: Instant) -> Vec<Action> {
        match self.try_command(op, command, now) {
            Ok(Some(reply)) => self.out.push(Action::Reply { op, result: Ok(reply) }),
            Ok(None) => {}
            Err(error) => self.out.push(Action::Reply { op, result: Err(error) }),
        }
        self.schedule(now);
        std::mem::take(&mut self.out)
    }

    fn try_command(&mut self, op: OpId, command: Command, now: Instant) -> Result<Option<Reply>, Error> {
        // A drain is answered also while the coordinator starts: something remains.
        if let Command::Drain { node, clock } = &command {
            return self.drain_node(op, node, *clock, now);
        }
        if !self.initialized {
            return Err(Error::NotInitialized);
        }
        match command {
            Command::Drain { node, clock } => self.drain_node(op, &node, clock, now),
            Command::DrainProgress => {
                let view = self.drain_view(now);
                Ok(Some(view.map_or(Reply::Done, |view| Reply::Drain(Box::new(view)))))
            }
            Command::CancelDrain { node } => self.cancel_drain(op, &node, now).map(|()| None),
            Command::Create { info, candidate } => self.create(op, *info, candidate).map(|()| None),
            Command::Pause { keyspace, name } => {
                let id = self.find(&keyspace, &name)?;
                let feed = self.feeds.get_mut(&id).ok_or_else(|| Error::NotExists(id.to_string()))?;
                let idle = feed.slot.is_none() && feed.writing.is_none() && feed.queue.is_empty();
                if feed.changefeed.info.state == ChangefeedState::Stopped && idle {
                    return Ok(Some(Reply::Checkpoint(feed.changefeed.last_saved)));
                }
                self.want(&id, Write::Pause { op }, now);
                Ok(None)
            }
            Command::Resume { keyspace, name, overwrite } => {
                let id = self.find(&keyspace, &name)?;
                let info = self.info(&id)?;
                if !info.state.is_resumable() {
                    return Err(refused(info, NOT_RESUMABLE));
                }
                SinkKind::of(&info.sink_uri)?;
                let known = info.epoch;
                self.want(&id, Write::Resume { op, overwrite, known }, now);
                Ok(None)
            }
            Command::Remove { keyspace, name } => {
                // Another removal may be under way: this one waits for the same end.
                let missing = || Error::NotExists(format!("{keyspace}/{name}"));
                let id = self.lookup(&keyspace, &name).ok_or_else(missing)?;
                let feed = self.feeds.get_mut(&id).ok_or_else(missing)?;
                if feed.removing {
                    feed.removals.push(op);
                } else {
                    self.want(&id, Write::Removing { op }, now);
                }
                Ok(None)
            }
            Command::Update { info } => {
                let id = self.find(&info.id.keyspace, &info.id.name)?;
                let current = self.info(&id)?;
                if !matches!(current.state, ChangefeedState::Stopped | ChangefeedState::Failed) {
                    return Err(refused(
                        current,
                        "only a stopped or failed changefeed can be updated; pause it first",
                    ));
                }
                SinkKind::of(&info.sink_uri)?;
                let info = ChangefeedInfo { id: id.clone(), ..*info };
                self.want(&id, Write::Update { op, info: Box::new(info) }, now);
                Ok(None)
            }
            Command::Get { keyspace, name } => {
                let id = self.find(&keyspace, &name)?;
                self.view(&id, now).map(|view| Some(Reply::One(Box::new(view)))).ok_or(Error::NotExists(name))
            }
            Command::List { keyspace } => Ok(Some(Reply::Many(self.views(keyspace.as_deref(), now)))),
        }
    }

    fn create(&mut self, op: OpId, mut info: ChangefeedInfo, candidate: u64) -> Result<(), Error> {
        let id = info.id.clone();
        if !is_valid_name(&id.name) {
            return Err(Error::InvalidName(id.name.chars().take(128).collect()));
        }
        if !is_valid_keyspace(&id.keyspace) || id.keyspace.is_empty() {
            return Err(Error::InvalidName(id.keyspace.chars().take(128).collect()));
        }
        SinkKind::of(&info.sink_uri)?;
        if let Some(existing) = self.lookup(&id.keyspace, &id.name) {
            let removing = self.feeds.get(&existing).is_some_and(|feed| feed.removing);
            let name = id.to_string();
            return Err(if self.creating.contains_key(&existing) {
                // Whoever is told that it exists stops asking, and this coordinator may end before it is stored.
                Error::CreationUnfinished(name)
            } else if removing {
                Error::DeletionUnfinished(name)
            } else {
                Error::AlreadyExists(name)
            });
        }
        info.epoch = MaintainerEpoch::next(None, candidate);
        info.state = ChangefeedState::Normal;
        info.error = None;
        self.names.insert(key_of(&id), id.clone());
        self.creating.insert(id.clone(), (op, Box::new(info.clone())));
        self.out.push(Action::Write { id, write: Write::Create { info: Box::new(info) } });
        Ok(())
    }

    fn lookup(&self, keyspace: &str, name: &str) -> Option<ChangefeedId> {
        self.names.get(&(keyspace.into(), name.into())).cloned()
    }

    /// A changefeed that people may see.
    fn find(&self, keyspace: &str, name: &str) -> Result<ChangefeedId, Error> {
        self.lookup(keyspace, name)
            .filter(|id| self.feeds.get(id).is_some_and(|feed| !feed.removing))
            .ok_or_else(|| Error::NotExists(format!("{keyspace}/{name}")))
    }

    fn info(&self, id: &ChangefeedId) -> Result<&ChangefeedInfo, Error> {
        let feed = self.feeds.get(id).ok_or_else(|| Error::NotExists(id.to_string()))?;
        debug_assert!(
            !feed.changefeed.info.state.is_resumable() || feed.changefeed.group() == Group::Stopped,
            "a changefeed that is not to run is in no scheduling group"
        );
        Ok(&feed.changefeed.info)
    }
}

pub(super) fn refused(info: &ChangefeedInfo, what: &'static str) -> Error {
    Error::UpdateRefused { name: info.id.to_string(), state: info.state.shown().to_string(), what }
}
