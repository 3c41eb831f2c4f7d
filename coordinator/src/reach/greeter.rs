//! Greets the other members and says whom this node does not reach: the shell around [`Reach`].
//!
//! ```text
//!   members (store) --+                    +--> unreached --> maintainer manager: fences them, moves their tables
//!   greetings --------+--> Reach, a task --+--> members without the unreached --> coordinator: moves their maintainers
//!   every half second-+                    +--> no majority while leading: lets another node lead
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use heartbeatpb::{DecodeError, NodeId};
use messaging::codec::io_type::FIRST_OWN;
use messaging::{Inbox, MessageCenter, StreamClass, Topic, WireMessage};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{PERIOD, Reach, ReachChange};
use crate::{CoordinatorHandle, Members};

/// Greetings that wait: some from each member. What does not fit is as good as lost.
const INBOX: usize = 1024;
/// Type number of a greeting; the first numbers of our own are those of rows.
const GREETING: i32 = FIRST_OWN + 100;
/// Two nodes cannot tell which of them is cut off, so that one of them has to lead on.
const FEWEST_TO_RESIGN: usize = 3;

/// Greetings between members.
enum ReachTopic {}

impl Topic for ReachTopic {
    const NAME: &'static str = "reach";
    const CLASS: StreamClass = StreamClass::Command;
    type Message = Greeting;
}

/// A sign of life, with those of whom its sender has had one.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Greeting {
    hears: Vec<NodeId>,
}

impl WireMessage for Greeting {
    fn io_type(&self) -> i32 {
        GREETING
    }

    fn encode(&self, out: &mut Vec<u8>) {
        for (at, node) in self.hears.iter().enumerate() {
            if at > 0 {
                out.push(b'\n');
            }
            out.extend_from_slice(node.as_str().as_bytes());
        }
    }

    fn decode(io_type: i32, bytes: &[u8]) -> Result<Self, DecodeError> {
        if io_type != GREETING {
            return Err(DecodeError::UnknownType(io_type));
        }
        let text = std::str::from_utf8(bytes).map_err(|_| DecodeError::Malformed { message: "Greeting" })?;
        Ok(Self { hears: text.lines().filter(|line| !line.is_empty()).map(NodeId::from).collect() })
    }
}

/// What the rest of the process is told.
#[derive(Clone)]
pub struct ReachViews {
    /// Members that are not reached.
    pub unreached: watch::Receiver<BTreeSet<NodeId>>,
    /// The other members, with their addresses.
    pub reached: watch::Receiver<Members>,
}

/// Greets and listens.
pub struct Greeter {
    center: MessageCenter,
    inbox: Inbox<ReachTopic>,
    reach: Reach,
    after: Duration,
    members: watch::Receiver<Members>,
    unreached: watch::Sender<BTreeSet<NodeId>>,
    reached: watch::Sender<Members>,
    /// Since when it has talked to no majority.
    alone: Option<Instant>,
}

impl Greeter {
    /// A member that is not heard for `after` is given up; none is when that is nothing.
    pub fn new(
        center: MessageCenter,
        members: watch::Receiver<Members>,
        after: Duration,
    ) -> (Self, ReachViews) {
        let (unreached, unreached_view) = watch::channel(BTreeSet::new());
        let (reached, reached_view) = watch::channel(Arc::clone(&members.borrow()));
        let greeter = Self {
            inbox: center.register::<ReachTopic>(INBOX),
            reach: Reach::new(center.node().clone(), after, now()),
            center,
            after,
            members,
            unreached,
            reached,
            alone: None,
        };
        (greeter, ReachViews { unreached: unreached_view, reached: reached_view })
    }

    /// Greets until `stop`. A leader that reaches no majority lets another node lead.
    pub async fn run(mut self, leader: watch::Receiver<Option<CoordinatorHandle>>, stop: CancellationToken) {
        let mut tick = tokio::time::interval(PERIOD);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut members = self.members.clone();
        members.mark_changed();
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
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
                    Some(greeting) => {
                        self.reach.on_greeting(&greeting.from, &greeting.message.hears, now());
                    }
                    None => return,
                },
            }
        }
    }

    fn on_tick(&mut self, leader: &watch::Receiver<Option<CoordinatorHandle>>) {
        let now = now();
        self.greet(now);
        if self.after.is_zero() {
            return;
        }
        let changes = self.reach.on_tick(now);
        for change in &changes {
            match change {
                ReachChange::Lost(node) => {
                    tracing::warn!(%node, after_s = self.after.as_secs_f64(), "a member is not reached; its work is given to others");
                }
                ReachChange::Back(node) => {
                    tracing::info!(%node, "a member is reached again, and has been for a while");
                }
            }
        }
        if !changes.is_empty() {
            self.publish();
        }
        let members = self.members.borrow().len();
        if self.reach.has_majority(now) || members < FEWEST_TO_RESIGN {
            self.alone = None;
            return;
        }
        let since = *self.alone.get_or_insert(now);
        if now.saturating_duration_since(since) >= self.after {
            self.alone = Some(now);
            let handle = leader.borrow().clone();
            if let Some(handle) = handle {
                tracing::warn!(
                    "this node leads and reaches no majority of the members; another one is to lead"
                );
                // It stores its last checkpoints first; greetings go on meanwhile.
                tokio::spawn(async move { handle.resign().await });
            }
        }
    }

    /// A greeting that does not leave is one that is not heard.
    fn greet(&self, now: Instant) {
        let greeting = Greeting { hears: self.reach.hears(now) };
        let members = Arc::clone(&self.members.borrow());
        for node in members.keys().filter(|node| *node != self.center.node()) {
            if let Err(error) = self.center.send::<ReachTopic>(node, greeting.clone()) {
                tracing::trace!(%node, %error, "a greeting did not leave");
            }
        }
    }

    fn publish(&self) {
        let unreached = self.reach.unreached();
        let all = Arc::clone(&self.members.borrow());
        let reached: BTreeMap<NodeId, String> = all
            .iter()
            .filter(|(node, _)| !unreached.contains(*node))
            .map(|(node, address)| (node.clone(), address.clone()))
            .collect();
        // First who is given up, then who is there: whoever hears of a node that is back may use it.
        self.unreached.send_if_modified(|known| {
            let news = *known != *unreached;
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

/// The clock of the runtime, which tests may hold.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

#[cfg(test)]
mod tests {
    use messaging::MessagingConfig;
    use messaging::testing::Network;

    use super::*;

    #[test]
    fn a_greeting_reads_back_and_nonsense_is_refused() {
        for hears in [vec![], vec!["a"], vec!["a", "b-c", "d"]] {
            let greeting = Greeting { hears: hears.into_iter().map(NodeId::from).collect() };
            let mut bytes = Vec::new();
            greeting.encode(&mut bytes);
            assert_eq!(Greeting::decode(GREETING, &bytes).unwrap(), greeting);
        }
        assert!(Greeting::decode(GREETING, &[0xff]).is_err());
        assert!(Greeting::decode(GREETING + 1, b"a").is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_member_that_falls_silent_is_given_up_by_those_who_hear_each_other() {
        let network = Network::new(1);
        let names = ["a", "b", "c"];
        let known: BTreeMap<NodeId, String> =
            names.iter().map(|name| (NodeId::from(*name), String::new())).collect();
        let members = watch::Sender::new(Arc::new(known));
        let mut parts = Vec::new();
        for name in names {
            let center = MessageCenter::new(name.into(), MessagingConfig::default());
            network.join(&center);
            let (greeter, views) = Greeter::new(center, members.subscribe(), Duration::from_secs(3));
            let stop = CancellationToken::new();
            let leader = watch::channel(None).1;
            let task = tokio::spawn(greeter.run(leader, stop.clone()));
            parts.push((views, stop, task));
        }
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert!(parts.iter().all(|(views, ..)| views.unreached.borrow().is_empty()));
        parts[2].1.cancel();
        tokio::time::sleep(Duration::from_secs(5)).await;
        for (views, ..) in &parts[..2] {
            assert_eq!(*views.unreached.borrow(), BTreeSet::from(["c".into()]));
            assert_eq!(views.reached.borrow().keys().cloned().collect::<Vec<_>>(), ["a".into(), "b".into()]);
        }
        // Who leaves is nobody's concern any more.
        members.send_modify(|known| drop(Arc::make_mut(known).remove(&NodeId::from("c"))));
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(parts[..2].iter().all(|(views, ..)| views.unreached.borrow().is_empty()));
        for (_, stop, task) in parts {
            stop.cancel();
            task.await.unwrap();
        }
    }
}
