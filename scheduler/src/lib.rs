//! Placement decisions: functions from what is to what should be done.
//!
//! A [`Scheduler`] looks at a [`View`] and returns [`Decision`]s; its owner turns them into operators. It holds no
//! clock and no randomness, so one sequence of views always gives one sequence of decisions. Start reading at
//! `view.rs`, then `basic.rs`. Neighbours: `replica` has the spans; maintainers own schedulers.
//!
//! - **SC-1** A span is given to a node that may take work, never to one that is being emptied.
//! - **SC-2** Among candidates the least loaded one is chosen (see [`Load`] for what that means).
//! - **SC-3** No more is decided at once than the budget allows; a span that an operator occupies is left alone.
//! - **SC-4** A tick visits what it decides and what is occupied in between, never all spans.

mod balance;
mod basic;
mod board;
mod drain;
mod load;
mod planner;
mod view;

pub use balance::Balance;
pub use basic::{Basic, INTERVAL, SHORT_OF_BUDGET, nobody_occupied};
pub use board::{Board, Gauge, LoadSettings};
pub use drain::{COOLDOWN, Cooldown, Drain, MOVES_AT_LEAST, limit, shortage};
pub use load::{Load, Loads};
pub use planner::{BySize, MAX_RANGES, Method, Unit, by_size, by_traffic};
pub use view::{Decision, Draining, Scheduler, View};

#[cfg(test)]
mod tests;
