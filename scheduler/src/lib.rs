//! Placement decisions: functions from what is to what should be done.
//!
//! A [`Scheduler`] looks at a [`View`] and returns [`Decision`]s; its owner turns them into operators. It holds no
//! clock and no randomness, so one sequence of views always gives one sequence of decisions. Start reading at
//! `view.rs`, then `basic.rs`. Neighbours: `replica` has the spans; maintainers own schedulers.
//!
//! - **SC-1** A span is given to a node that may take work, never to one that is being emptied.
//! - **SC-2** Among candidates the least loaded one is chosen (see [`Load`] for what that means).
//! - **SC-3** No more is decided at once than the budget allows; a span that an operator occupies is left alone.

mod basic;
mod load;
mod view;

pub use basic::{Basic, INTERVAL, SHORT_OF_BUDGET, nobody_occupied};
pub use load::{Load, Loads};
pub use view::{Decision, Scheduler, View};
