//! Who runs what, where: the spans of a changefeed in one indexed, checked structure.
//!
//! A [`SpanSet`] is what a maintainer *wants*; what nodes report is folded into it status by status. It is plain
//! data without clock or I/O, owned by one task. Operators and schedulers read it; only its owner changes it.
//! Start reading at `set.rs`.
//!
//! - **RP-1** Every span is in exactly one group: absent, scheduling or replicating; only an absent span has no node.
//! - **RP-2** The table trigger's span is in no group and counts on no node; it belongs to its maintainer.
//! - **RP-3** A span's checkpoint never goes back, and no create request starts below the committed checkpoint.

mod bootstrapper;
mod coverage;
mod multiset;
mod set;
mod span;

pub use bootstrapper::{Bootstrapper, Heard, NodeChange, RESEND};
pub use coverage::{Coverage, check_coverage};
pub use multiset::MinSet;
pub use set::{Group, SpanSet};
pub use span::SpanReplica;
