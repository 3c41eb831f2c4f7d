//! How a process notices whom it does not reach: greetings over the simulated network, judged by the project's [`Reach`].

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use coordinator::reach::{PERIOD, Reach};
use coordinator::{CoordinatorHandle, Members};
use heartbeatpb::{DecodeError, NodeId};
use messaging::codec::io_type::FIRST_OWN;
use messaging::{Inbox, MessageCenter, StreamClass, Topic, WireMessage};
use tokio::sync::watch;

/// A member that is not heard for so long is given up: what a node does unless it is configured otherwise.
const AFTER: Duration = Duration::from_secs(3);
/// Greetings that wait.
const INBOX: usize = 256;
/// Two processes cannot tell which of them is cut off, so that one of them has to lead on.
const FEWEST_TO_RESIGN: usize = 3;

enum ReachTopic {}

impl Topic for ReachTopic {
    const NAME: &'static str = "reach";
    const CLASS: StreamClass = StreamClass::Command;
    type Message = Greeting;
}

/// A sign of life, with those of whom its sender has had one.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Greeting(Vec<NodeId>);

impl Greeting {
    const TYPE: i32 = FIRST_OWN + 100;
}

impl WireMessage for Greeting {
    fn io_type(&self) -> i32 {
        Self::TYPE
    }

    fn encode(&self, out: &mut Vec<u8>) {
        for node in &self.0 {
            out.extend_from_slice(node.as_str().as_bytes());
            out.push(b'\n');
        }
    }

    fn decode(io_type: i32, bytes: &[u8]) -> Result<Self, DecodeError> {
        if io_type != Self::TYPE {
            return Err(DecodeError::UnknownType(io_type));
        }
        let text = std::str::from_utf8(bytes).map_err(|_| DecodeError::Malformed { message: "Greeting" })?;
        Ok(Self(text.lines().map(NodeId::from).collect()))
    }
}

/// Greets the other members and listens to them.
pub(super) struct Greeter {
    center: MessageCenter,
    inbox: Inbox<ReachTopic>,
    reach: Reach,
    members: watch::Receiver<Members>,
    unreached: watch::Sender<BTreeSet<NodeId>>,
    reached: watch::Sender<Members>,
    /// Since when it has talked to no majority.
    alone: Option<Instant>,
}

impl Greeter {
    /// The greeter, the members that are not reached, and the others.
    pub(super) fn new(
        center: MessageCenter,
        members: watch::Receiver<Members>,
    ) -> (Self, watch::Receiver<BTreeSet<NodeId>>, watch::Receiver<Members>) {
        let (unreached, unreached_view) = watch::channel(BTreeSet::new());
        let (reached, reached_view) = watch::channel(Arc::clone(&members.borrow()));
        let inbox = center.register::<ReachTopic>(INBOX);
        let reach = Reach::new(center.node().clone(), AFTER, now());
        let greeter = Self { center, inbox, reach, members, unreached, reached, alone: None };
        (greeter, unreached_view, reached_view)
    }

    /// Greets as long as the process lives. A leader that reaches no majority lets another one lead.
    pub(super) async fn run(mut self, leader: watch::Receiver<Option<CoordinatorHandle>>) {
        let mut tick = tokio::time::interval(PERIOD);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut members = self.members.clone();
        members.mark_changed();
        loop {
            tokio::select! {
                biased;
                changed = members.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let known: BTreeSet<NodeId> = members.borrow_and_update().keys().cloned().collect();
                    self.reach.on_members(&known);
                    self.publish();
                }
                _ = tick.tick() => self.on_tick(&leader),
                greeting = self.inbox.recv() => match greeting {
                    Some(greeting) => self.reach.on_greeting(&greeting.from, &greeting.message.0, now()),
                    None => return,
                },
            }
        }
    }

    fn on_tick(&mut self, leader: &watch::Receiver<Option<CoordinatorHandle>>) {
        let now = now();
        let members = Arc::clone(&self.members.borrow());
        let greeting = Greeting(self.reach.hears(now));
        for node in members.keys().filter(|node| *node != self.center.node()) {
            // What does not leave is not heard.
            drop(self.center.send::<ReachTopic>(node, greeting.clone()));
        }
        if !self.reach.on_tick(now).is_empty() {
            self.publish();
        }
        if self.reach.has_majority(now) || members.len() < FEWEST_TO_RESIGN {
            self.alone = None;
            return;
        }
        if now.saturating_duration_since(*self.alone.get_or_insert(now)) >= AFTER {
            self.alone = Some(now);
            if let Some(handle) = leader.borrow().clone() {
                tokio::spawn(async move { handle.resign().await });
            }
        }
    }

    /// First who is given up, then who is there: whoever hears of a member that is back may use it.
    fn publish(&self) {
        let unreached = self.reach.unreached();
        let mut reached = (**self.members.borrow()).clone();
        reached.retain(|node, _| !unreached.contains(node));
        self.unreached.send_if_modified(|known| {
            let news = known != unreached;
            known.clone_from(unreached);
            news
        });
        self.reached.send_if_modified(|known| {
            let news = **known != reached;
            if news {
                *known = Arc::new(reached);
            }
            news
        });
    }
}

/// The clock of the process.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
