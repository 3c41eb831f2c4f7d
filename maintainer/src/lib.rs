//! The maintainer drives one changefeed: it places table spans on nodes, lets schema changes happen once, and folds
//! everybody's progress into the changefeed's checkpoint. The manager of a node starts and stops maintainers for
//! the coordinator.
//!
//! Hears `MaintainerManagerTopic` and `MaintainerTopic`; tells `HeartbeatCollectorTopic`, `OrchestratorTopic`
//! and `CoordinatorTopic`. What it needs from an upstream and a downstream it declares as [`Upstream`] and
//! [`DownstreamFence`]; the node plugs them in.
//!
//! Every decision is made in `core` and `barrier`, without clock, randomness or I/O; `maintainer` is the one task
//! around a core, with `mailbox` in front of it; `manager` is the node's endpoint, one task too. Start reading at
//! `core.rs`.
//!
//! The bootstrap. Nodes and upstream are asked at once; the take-over needs both, and a downstream that takes nothing
//! any more from anybody who has not answered. It plans first, and cannot fail while it is carried out:
//!
//! ```text
//!  nodes join --> ask each ----> all have answered --> fence all others --.
//!    ^ silent: again after 500 ms       ^                 | failed, busy: again after 0.5 s … 1 s
//!    |                                  `-- a member left-'               +--> plan --> carry out --> trigger --> works
//!  start -------> load tables -> tables are known ------------------------'     |         spans, operators and merges
//!    ^ failed: again after 10 s                                                 |         that were on their way,
//!                                                                               |         blocking events, keys that
//!                                                                               |         nobody covers
//!                                                                               `--> no trigger anywhere: an error,
//!                                                                                    nothing has changed
//!
//!  merges that nodes remember:   target works            --> target stays, sources forgotten
//!                                all sources, neighbours --> the merge goes on
//!                                else: target has begun  --> target stays     | not begun --> sources stay
//! ```
//!
//! A node that is gone may still write: it may only be slow, stopped, or cut off. Whatever it had begun has to be over,
//! and whatever it begins later has to fail, before anybody takes its place:
//!
//! ```text
//!  member --gone--> lost: not heard, not asked, given nothing; its spans and operators stay as they are, as those of a
//!                    |    silent node, and hold the checkpoint
//!                    `--> fence at the downstream --fenced--> gone: operators hear that it is, its spans are free
//!                             failed, or it may still write (busy): again after 0.5 s … 1 s; the standstill says why;
//!                             no answer for 30 s: taken for lost
//!
//!  gone --back in the set--> closing: told by number n + 1 to close what it has, each second until it has; nothing that
//!    ^                        |       it says meanwhile counts
//!    `------gone once more----|
//!                             `--closed--> member: asked by number n + 2 for a new manager, whose sink registers by it;
//!                                          it is empty, and gets work by balance
//!
//!  (a) a member goes, or this node does not reach it    fence the node
//!  (b) a maintainer takes over                          fence everybody but the members that have answered; of those the
//!                                                       target names whose sinks were fenced before, under an earlier
//!                                                       maintainer: they are gone, and let in again as above
//!  (c) a member's dispatchers were closed under it      it answers with a new sink, which has fenced the older ones
//!                                                       of its node before it was opened
//!  (d) a member cannot answer: an earlier maintainer's  let in again as above, once. The take-over does without it,
//!      table trigger is there, or its sink was fenced   unless it is the own node, or nothing else keeps it from
//!                                                       writing: then it waits until that is closed
//!  (e) a node comes after the take-over and has what    let in again as above; (b) has fenced it
//!      this maintainer has not put there
//!  (f) a member's sink says that it was fenced          as (a): then it begins anew. The own node's: the changefeed
//!                                                       starts again
//! ```
//!
//! (d) to (f) are what is left of two maintainers that both lived: who leads did not reach the node of the first, and gave
//! the changefeed to another one, while the first gave up nodes that it did not reach.
//!
//! Numbers. A maintainer owns those from its epoch up to the next [`heartbeatpb::MaintainerEpoch::ROOM`], and its successor begins
//! beyond them; n is the last one used. A node that was never gone is asked by the epoch itself. Whatever is compared is
//! compared as ever: to a node, and to the target, a node that is let in again has a newer owner. So an order of before
//! that comes late is refused by the node, a sink of before by the target, and a fence that comes late does not mean the
//! sink that is there now. A maintainer that has used up its numbers lets nobody in again; its successor does.
//!
//! Fences carry the epoch: one that comes late from an earlier maintainer does nothing. Downstreams whose writers
//! cannot harm each other (files, black holes) have no fence, and nobody waits for one; nor is a member given up there that
//! only is not reached ([`MaintainerManager::with_unreached`]).
//!
//! How a table comes to be divided. The upstream is asked outside the core, one question at a time, and everything is
//! looked at anew when it has answered:
//!
//! ```text
//!  load or size (board) --.                                     span as it was? --> split operator
//!  a wish of people ------+--> reserved --> question --> answer --+
//!                              (10 s)                             `--> changed, no keys, error: stays as it is
//! ```
//!
//! The hand-off to another maintainer, and the end:
//!
//! ```text
//!  remove(epoch) --> quiesce all but the trigger
//!     move:     remove trigger --> it has ended --.
//!     cascade:  close every node --> all closed --+--> stop the log reader --> stopped, told at once, forgotten
//!  a late order to begin with this epoch or an older one is refused from here on
//!  the node stops --> maintainers and readers end --> the last checkpoints are told: whoever follows begins there
//! ```
//!
//! What goes wrong reaches the coordinator in one of two ways. An *error* ends the changefeed here: it starts again, or waits for
//! a person. A *trouble* is waited out by whoever met it, a log reader without its upstream, a sink or a fence without its
//! downstream: it is shown for as long as it lasts, and nothing has to be started again.
//!
//! A node that is being emptied:
//!
//! ```text
//!  target (node, epoch) --> schedulers place nothing there; Drain moves at most max(10, 1 %) of its spans at once
//!     own node: nothing moves; the coordinator moves the maintainer first, its successor empties the node
//!  cleared --> nothing is balanced for two minutes
//! ```
//!
//! - **MT-1** The checkpoint never moves back, and never passes a span that exists, whoever runs it or does not.
//! - **MT-2** Everything that the checkpoint is made of is changed by one task: each fold sees one state. Who lets
//!   go of a constraint has installed the next one before.
//! - **MT-3** Every request carries the maintainer's epoch, or the number of the node that was let in again; a response of
//!   another one changes nothing.
//! - **MT-4** A node never runs two maintainers of one changefeed; a place changes hands only after its holder
//!   has stopped, and never to an epoch that was stopped here before.
//! - **MT-5** After a removal began, nothing is created or moved, and the table trigger's last position stays a
//!   constraint. The log reader stops before the maintainer says that it has.
//! - **MT-6** An event is written after everybody has arrived, changes the tables once and in order, and lets
//!   everybody pass only then.
//! - **MT-7** Neither a status nor an error counts as told before it was handed over.
//! - **MT-8** A take-over is planned as a whole; what cannot be continued never leaves a key without or with two owners.
//! - **MT-9** Nothing is created in the place of a node that is gone, and no event is written in its place, before the
//!   downstream takes nothing from it any more.
//! - **MT-10** The log here is told a floor only after the take-over, and never one above the checkpoint: until then, whoever
//!   reads it may be told to begin where this maintainer did.

mod barrier;
mod checkpoint;
mod core;
mod drain;
mod fence;
mod fencing;
mod liveness;
mod mailbox;
mod maintainer;
mod manager;
pub mod metrics;
mod placement;
mod placements;
#[cfg(feature = "test-util")]
pub mod testing;
mod upstream;

pub use core::{Holder, Place, Standstill};

pub use checkpoint::{CheckpointFold, Progress};
pub use drain::DrainTarget;
pub use fence::{DownstreamFence, FenceOutcome, NothingToFence, Whom};
pub use liveness::LivenessCell;
pub use manager::{MaintainerManager, ManagerConfig};
pub use placements::{PlacementError, PlacementHandle};
pub use upstream::{SourceTable, SplitPoints, Upstream};
