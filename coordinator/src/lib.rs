//! The coordinator makes a cluster converge: it gives each changefeed's maintainer to a node, makes
//! checkpoints and epochs durable, and carries out what people ask for.
//!
//! Hears `CoordinatorTopic`; tells `MaintainerManagerTopic`; looks at the set of members. `core` decides (no
//! clock, no I/O), [`Coordinator`] is the task around it, [`meta`] changes the stored documents by
//! compare-and-set, [`backend`] is the metadata store, [`Election`] says who leads. What it needs from upstreams
//! it declares as [`RetentionHook`] and [`UpstreamClock`]; the node plugs them in. Start reading at `core.rs`.
//!
//! - **CO-1** Durable before effective: no command carries an epoch, state or checkpoint that is not stored.
//! - **CO-2** A stored epoch never becomes smaller; a stored checkpoint only by a resume under a newer epoch.
//! - **CO-3** Every write compares the coordinator's own election key: a replaced coordinator changes nothing.
//! - **CO-4** One operator per changefeed; a maintainer starts only after the previous one stopped or its node left.
//! - **CO-5** A stored intent to stop or remove is cleared only by its own completion, restarts included.
//! - **CO-6** Commands are repeated until their effect is seen; late and doubled ones change nothing.
//! - **CO-7** Nothing stored or received makes the coordinator panic.
//! - **CO-8** A changefeed that is not to run has no dispatchers left when that is said: the last stop closes them
//!   everywhere under the stored epoch.
//! - **CO-9** What ought to be heard and is not is asked for again, or taken for lost and started anew.
//! - **CO-10** What a person asks for is stored before it is done, and that it was done in the transaction that does it: a
//!   request that is repeated with its key is done once, whoever leads ([`operations`]).
//!
//! # A changefeed
//!
//! What is stored (`heartbeatpb::config::ChangefeedState`), moved by reports ([`changefeed`], `core/status.rs`) and by
//! people (`core/command.rs`):
//!
//! ```text
//!            create
//!              |
//!              v      an error that may pass        no progress for stuck-duration,
//!   +------> normal ------------------------> warning --- or an error that a restart
//!   |          |  ^                             |   |      cannot help -----+
//!   |          |  +---- the checkpoint moves ---+   |                      v
//!   |          |                                    |                   failed
//!   |          +--- checkpoint >= target --> finished                     |
//!   |          +--- pause ---> stopped <--- pause --+---------------------+
//!   |                             |                                       |
//!   +------ resume, under a larger epoch, from stopped, failed, finished -+
//!
//!   remove, from any state: intent stored -> stopped everywhere -> log released -> documents deleted
//! ```
//!
//! Where it is ([`Group`]). A placement begins when a larger epoch is stored; an operator says when it ends:
//!
//! ```text
//!             bump stored, start told             it runs, bootstrap done
//!   Absent ------------------------> Scheduling -------------------------> Replicating
//!     ^ ^                              |    ^                                |  |  |
//!     | +--- its node left, or refuses +    +------ bump stored, move -------+  |  |
//!     +------ its node left, it ended by itself, it is missing, it erred -------+  |
//!     +--- resume --- Stopped <--- pause, failed, finished, removed ---------------+
//! ```
//!
//! # Operators
//!
//! One at a time per changefeed (`changefeed/operator.rs`); commands are repeated every half second. Epoch `e` is that
//! of the maintainer which runs, `n` the one that was stored for the operator.
//!
//! ```text
//! add    Add(n) to dest ---- dest reports Working(n), bootstrap done ----> done: Replicating
//!          | dest left --> Absent          | dest says it is stopping --> stop(n), then Absent
//!
//! move   Remove(e) to origin, without its dispatchers
//!          | origin reports not Working(e), or left              | dest left: dest := origin
//!          v                                                     | both left --> Absent
//!        Add(n) to dest ---- dest reports Working(n), bootstrap done ----> done: Replicating
//!          | dest left --> Absent (nothing else starts under n)
//!
//! stop   Remove(e, with dispatchers, deleted?) to the node
//!          | node reports not Working(e)          | node left
//!          v                                      v
//!        another maintainer is to be stopped too? --yes--> stop that one
//!          | no
//!        not to run, and e is not the stored epoch, or the node left? --yes--> stop(stored epoch) at the own node,
//!          | no                                                               which closes what is left everywhere
//!        store the end: nothing under way, or: release the log, delete
//! ```
//!
//! A wish that comes during an operator waits for the store, not for the operator: a pause, a removal or an error
//! replaces an add or a move by a stop, and a removal turns a stop into one that deletes.
//!
//! # Draining a node
//!
//! One session at a time (`core/drain.rs`), stored before anybody hears of it:
//!
//! ```text
//!   none -- asked, every member can --> starting -- stored --> active: target told every 5 s, node told to drain,
//!    ^                                     |                   |  its maintainers moved, its dispatchers by maintainers
//!    |                                     |                   |  nothing left -> node told to stop -> it says so -> 0
//!    |            cancelled, or the node left                  |
//!    +-- every node has taken the end <-- clearing <-----------+ the node left (remembered if it was empty), cancelled
//! ```
//!
//! 0 is said only when the node's own process reported that it is stopping, and no maintainer, operator, dispatcher,
//! move or unreported changefeed is left.
//!
//! # From election to work
//!
//! ```text
//!   campaign --won--> fence = revision of the own key ----> load documents  ---+
//!      ^                        |                           ask every member --+--> all answered: table filled,
//!      |                        | any write finds another   (again each 500 ms) |    stale maintainers stopped,
//!      |                        v key: stop at once                             |    drain resumed -> initialised
//!      +-- 1 s -- resigned: asked to, draining, session ended           members join: asked alone, later
//! ```
//!
//! [`membership`] decides who is in the cluster, and [`watchdog`] when this process may not write, for a while or for
//! good. Both are cores for stores that several nodes share; with the embedded store one process is the cluster. While
//! writing is suspended nothing reaches the store ([`backend::PermittedStore`]); what then does compares the election's key.
//!
//! # The metadata store
//!
//! One trait, [`backend::Store`], and the same keys ([`layout`]) in every binding:
//!
//! | binding | for | lease | durable |
//! |---|---|---|---|
//! | [`backend::redb`] | one node, nothing to install | the lock of the directory | when a call returns |
//! | `backend::etcd`, feature `etcd` | clusters | etcd's, renewed every sixth of its time | when most members have it |
//! | [`backend::memory`] | tests, simulations | as long as the process | as long as its `Disk` |
//!
//! Without the feature `etcd` this crate needs no gRPC, no TLS and no network; `node` turns it on. No `protoc` is
//! needed either way: the few messages of etcd's API are written by hand.
//!
//! What becomes of a transaction, as its caller sees it:
//!
//! ```text
//!   sent ---> Ok(succeeded, revision)          all operations at one revision, or the alternative
//!     |-----> Err(Unavailable)                 certainly not applied: send it again
//!     |-----> Err(Uncertain)                   applied or not: read, and compare with what was sent ([`meta`] does)
//!     |-----> Err(LeaseGone | Refused | ...)   certainly not applied, and never will be
//!     +-----> Err(Broken)                      this process cannot use the store any more: start anew
//! ```
//!
//! A session, which carries every role of a process:
//!
//! ```text
//!   granted ---> kept ---- answer of any member -----+
//!                 ^ |                                |  confirmed := when its question was sent
//!                 | +--------------------------------+  (what `watchdog` counts from)
//!                 |
//!                 +-- no answer for ttl - margin: the watchdog suspends writing until the same lease is confirmed
//!                 +-- lease unknown to the store, revoked, store broken: `done`
//! ```
//!
//! An election is won by the candidate with the smallest create revision. A candidacy is written once, so the winner's
//! revision, which is the coordinator's version and its fence, is larger than that of every winner before.

pub mod backend;
pub mod changefeed;
mod config;
mod coordinator;
pub mod core;
pub mod drain;
mod election;
mod error;
mod handle;
pub mod layout;
pub mod membership;
pub mod meta;
pub mod metrics;
pub mod operations;
pub mod reach;
pub mod watchdog;

pub use changefeed::Group;
pub use config::CoordinatorConfig;
pub use coordinator::{Coordinator, Members, Neighbours, RetentionHook, UpstreamClock};
pub use core::{ChangefeedView, Counts, DrainView};
pub use election::Election;
pub use error::Error;
pub use handle::CoordinatorHandle;
pub use layout::Layout;
