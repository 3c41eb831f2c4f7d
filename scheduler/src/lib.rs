//! Placement decisions: functions from what is to what should be done, with one budget.
//!
//! A scheduler looks at loads and absent spans and returns [`Decision`]s; its owner turns them into operators.
//! It holds no state, no clock and no randomness, so one view always gives one answer. Start reading at `basic.rs`.
//!
//! - **SC-1** A span is given to a node that may take work, never to one that drains or stops.
//! - **SC-2** Among eligible nodes the least loaded one is chosen, the smaller id among equals.
//! - **SC-3** No more spans are placed at once than the budget allows.

mod basic;
mod load;

pub use basic::{Decision, basic};
pub use load::Loads;
