//! What people ask of the coordinator, again and again until it is done.

use std::collections::VecDeque;
use std::sync::Arc;

use coordinator::{CoordinatorHandle, Error};
use heartbeatpb::NodeId;
use heartbeatpb::config::{ChangefeedInfo, ChangefeedState};
use parking_lot::Mutex;

use super::process::Node;
use super::world::Shared;

/// A request that is not answered in this time is made again, to whoever leads then.
const PATIENCE: u64 = 3_000;
/// Between two questions.
const POLL: u64 = 300;
/// An emptied node is watched for this long before it is stopped.
const WATCHED: u64 = 1_500;

#[derive(Clone, Debug)]
enum Wish {
    Create(Box<ChangefeedInfo>),
    Pause(String),
    Resume(String),
    Drain(NodeId, u32),
    CancelDrain(NodeId, u32),
}

/// How a request ended.
#[derive(Debug)]
enum Answer {
    Done,
    Left(u64),
    /// The node is not in the cluster, says somebody who may not have heard for a while.
    Unknown(NodeId),
    Failed(Error),
}

type Slot = Arc<Mutex<Option<Answer>>>;

/// The people.
#[derive(Default)]
pub(super) struct People {
    wishes: VecDeque<Wish>,
    asked: Option<(u64, Slot)>,
    next: u64,
    emptied: Option<(NodeId, u32, u64)>,
    /// A process whose drain was taken back: it is to be started again.
    unwanted: Option<(NodeId, u32)>,
    views: Arc<Mutex<String>>,
    /// Changefeeds that stand still although nobody wants that: a pause that was asked for twice.
    stopped: Arc<Mutex<Vec<String>>>,
    next_view: u64,
    /// Why a request failed last.
    failure: Mutex<String>,
}

impl People {
    pub(super) fn create(&mut self, info: ChangefeedInfo) {
        self.wishes.push_back(Wish::Create(Box::new(info)));
    }

    pub(super) fn pause(&mut self, name: &str) {
        self.wishes.push_back(Wish::Pause(name.to_owned()));
    }

    pub(super) fn resume(&mut self, name: &str) {
        self.wishes.push_back(Wish::Resume(name.to_owned()));
    }

    pub(super) fn drain(&mut self, node: NodeId, machine: u32) {
        self.wishes.push_back(Wish::Drain(node, machine));
    }

    /// Takes the drain back that is wished for.
    pub(super) fn cancel_drain(&mut self) {
        for wish in &mut self.wishes {
            if let Wish::Drain(node, machine) = wish {
                *wish = Wish::CancelDrain(node.clone(), *machine);
                return;
            }
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.wishes.is_empty() && self.emptied.is_none()
    }

    pub(super) fn waiting(&self) -> String {
        match self.wishes.front() {
            None => "nothing".to_owned(),
            Some(Wish::Create(info)) => format!("the creation of {}", info.id.name),
            Some(Wish::Pause(name)) => format!("the pause of {name}"),
            Some(Wish::Resume(name)) => format!("the resumption of {name}"),
            Some(Wish::Drain(node, _)) => format!("the drain of {node}"),
            Some(Wish::CancelDrain(node, _)) => format!("the end of the drain of {node}"),
        }
    }

    /// What the coordinator said last about the changefeeds.
    pub(super) fn last_view(&self) -> String {
        format!("{}; the last refusal: {}", self.views.lock(), self.failure.lock())
    }

    /// Asks for the first wish.
    pub(super) fn ask(
        &mut self,
        leader: &CoordinatorHandle,
        host: &Node,
        is_up: impl Fn(&NodeId) -> bool,
        now: u64,
    ) {
        self.look(leader, host, now);
        if let Some((since, slot)) = &self.asked {
            let answer = slot.lock().take();
            match answer {
                None if now < since + PATIENCE => return,
                None => {}
                // A person who sees the node asks again.
                Some(Answer::Unknown(node)) if is_up(&node) => {}
                Some(answer) => self.on_answer(answer, now),
            }
            self.asked = None;
            self.next = now + POLL;
        }
        let Some(wish) = self.wishes.front().cloned().filter(|_| now >= self.next && self.emptied.is_none())
        else {
            return;
        };
        let slot = Slot::default();
        self.asked = Some((now, Arc::clone(&slot)));
        let leader = leader.clone();
        host.spawn(async move {
            let answer = fulfil(&leader, wish).await;
            *slot.lock() = Some(answer);
        });
    }

    fn look(&mut self, leader: &CoordinatorHandle, host: &Node, now: u64) {
        if now < self.next_view {
            return;
        }
        self.next_view = now + 3_000;
        if self.wishes.is_empty() {
            let stopped = std::mem::take(&mut *self.stopped.lock());
            stopped.iter().for_each(|name| self.resume(name));
        }
        let (leader, views, stopped) = (leader.clone(), Arc::clone(&self.views), Arc::clone(&self.stopped));
        host.spawn(async move {
            if let Ok(feeds) = leader.list(None).await {
                let stands =
                    |view: &&coordinator::ChangefeedView| view.info.state == ChangefeedState::Stopped;
                *stopped.lock() =
                    feeds.iter().filter(stands).map(|view| view.info.id.name.to_string()).collect();
                let one = |view: coordinator::ChangefeedView| {
                    format!(
                        "{} is {:?} ({:?}) on {:?}, bootstrapped {}, errors {:?}, waits for {:?}",
                        view.info.id.name,
                        view.info.state,
                        view.group,
                        view.node,
                        view.bootstrap_done,
                        view.errors.iter().map(|e| (&e.code, &e.message)).collect::<Vec<_>>(),
                        view.waiting_for
                    )
                };
                *views.lock() = feeds.into_iter().map(one).collect::<Vec<_>>().join("; ");
            }
        });
    }

    fn on_answer(&mut self, answer: Answer, now: u64) {
        let drained = match self.wishes.front() {
            Some(Wish::Drain(node, machine) | Wish::CancelDrain(node, machine)) => {
                Some((node.clone(), *machine))
            }
            Some(Wish::Create(_) | Wish::Pause(_) | Wish::Resume(_)) | None => None,
        };
        match (answer, drained) {
            (Answer::Left(0), Some((node, machine))) => {
                self.wishes.pop_front();
                self.emptied = Some((node, machine, now));
            }
            (Answer::Left(_), _) => {}
            (Answer::Failed(error), _) => *self.failure.lock() = error.to_string(),
            (Answer::Done | Answer::Unknown(_), drained) => {
                // It takes no work any more until it is started again.
                if let Some(Wish::CancelDrain(..)) = self.wishes.pop_front() {
                    self.unwanted = drained;
                }
            }
        }
    }

    /// A node whose drain was taken back.
    pub(super) fn restarted(&mut self) -> Option<(NodeId, u32)> {
        self.unwanted.take()
    }

    /// A node of which a drain said that nothing is left: first that is checked, and after a while it is
    /// stopped.
    pub(super) fn emptied(&mut self, now: u64, world: &Shared) -> Option<(NodeId, u32)> {
        let (node, machine, since) = self.emptied.clone()?;
        let mut world = world.lock();
        if since == now || !world.emptied.contains(&node) {
            world.note(format!("the drain of {node} is complete"));
            let left: Vec<String> = world.processes.get(&node).map_or(Vec::new(), |process| {
                let show = |((gid, id), stream): (
                    &(heartbeatpb::Gid, heartbeatpb::DispatcherId),
                    &super::streams::Stream,
                )| {
                    format!("{:?} of feed {} ({id:?})", stream.subscription.span, gid.low - 1)
                };
                let writes =
                    |gid: &heartbeatpb::Gid| world.feeds.get(gid).is_some_and(|feed| feed.takes_from(&node));
                process.streams.streams.iter().filter(|((gid, _), _)| writes(gid)).map(show).collect()
            });
            if !left.is_empty() {
                let text = format!("{node} is said to be empty and has {left:?}");
                world.violated("DRAIN-ZERO", &text);
            }
            world.emptied.insert(node.clone());
        }
        if now < since + WATCHED {
            return None;
        }
        self.emptied = None;
        Some((node, machine))
    }
}

async fn fulfil(leader: &CoordinatorHandle, wish: Wish) -> Answer {
    match wish {
        Wish::Create(info) => match leader.create(*info).await {
            Ok(_) | Err(Error::AlreadyExists(_)) => Answer::Done,
            Err(error) => Answer::Failed(error),
        },
        Wish::Pause(name) => match leader.pause("default", &name).await {
            Ok(_) | Err(Error::UpdateRefused { .. }) => Answer::Done,
            Err(error) => Answer::Failed(error),
        },
        Wish::Resume(name) => match leader.resume("default", &name, None).await {
            Ok(_) | Err(Error::UpdateRefused { .. }) => Answer::Done,
            Err(error) => Answer::Failed(error),
        },
        Wish::Drain(node, _) => match leader.drain_node(&node).await {
            Ok(view) => Answer::Left(view.remaining),
            Err(Error::NodeNotExists(_)) => Answer::Unknown(node),
            Err(error) => Answer::Failed(error),
        },
        Wish::CancelDrain(node, _) => match leader.cancel_drain(&node).await {
            Ok(()) | Err(Error::Drain(_)) => Answer::Done,
            Err(Error::NodeNotExists(_)) => Answer::Unknown(node),
            Err(error) => Answer::Failed(error),
        },
    }
}
