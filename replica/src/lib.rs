//! Who runs what, where: the spans of a changefeed in one indexed, checked structure.
//!
//! A [`SpanSet`] is what a maintainer *wants*; what nodes report is folded into it status by status. It is plain
//! data without clock, randomness or I/O, owned by one task. Operators change it through their controller,
//! schedulers only read it. Beside it: [`Bootstrapper`], the round of questions with which an owner learns what
//! its nodes run, and the arithmetic of key ranges. Uses `heartbeatpb` alone of ours. Start reading at `set.rs`.
//!
//! ```text
//!          bind                mark_replicating
//! Absent --------> Scheduling -----------------> Replicating
//!    ^               |    ^                        |     |
//!    |  mark_absent  |    +---- mark_scheduling ---+     |
//!    +---------------+------------ mark_absent ----------+
//! ```
//!
//! A span lies in a slot of the store, and is found by id with one look-up. Whatever else is asked (of a table, of a
//! schema, on a node) is answered by indexes of slots, so that a million spans take a few hundred bytes each.
//!
//! - **RP-1** Every span is in exactly one standing: absent, scheduling or replicating; exactly the absent ones
//!   have no node.
//! - **RP-2** The table trigger's span has no standing and counts on no node; it belongs to its maintainer and
//!   can never be placed.
//! - **RP-3** A span's checkpoint never goes back, and no create request starts below the committed checkpoint.
//! - **RP-4** The floor is the minimum over exactly the spans that no node replicates or that an operator holds;
//!   no path changes a checkpoint without it.
//! - **RP-5** Spans of a table are divided in one step, and only into exactly themselves: no key is lost or doubled.

mod bootstrapper;
mod coverage;
mod index;
mod multiset;
mod set;
mod span;
mod store;

pub use bootstrapper::{Bootstrapper, Heard, NodeChange, RESEND};
pub use coverage::{RangeCover, contains, divides, holes, overlap};
pub use index::{GroupIndex, NodeCounts};
pub use multiset::MinSet;
pub use set::{SpanSet, Standing};
pub use span::{GroupId, SpanReplica, is_terminal};
