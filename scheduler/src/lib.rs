//! Placement decisions: functions from what is to what should be done.
//!
//! A [`Scheduler`] looks at a [`View`] and returns [`Decision`]s; its owner turns them into operators. It holds no
//! clock and no randomness, so one sequence of views always gives one sequence of decisions. Start reading at
//! `view.rs`, then `basic.rs`; what follows from load is in `board.rs`. Neighbours: `replica` has the spans;
//! maintainers own schedulers.
//!
//! ```text
//!              looks at                          decides                waits for
//! Basic        spans that nobody runs            Add                    room for operators
//! Drain        the node that is being emptied    Move                   room for moves from it
//! Balance      whole tables on each node         Move                   quiet: no operator, no absent span,
//! Board        load of whole tables              Split                    no node emptied now or lately
//! Board        load of tables in parts           Split, Move, Merge     quiet, and the table's parts at rest
//! ```
//!
//! What the [`Board`] considers for a table in parts, one kind of step at a time; the first that applies is taken:
//!
//! ```text
//! every part has said something three times? --no--> nothing: it has just been divided or joined
//!  | yes
//! a part too hot or too large?    --> divide it where it is
//! small as a whole?               --> one node: join all | several: bring all to one node
//! a node busy or idle for long?   --> move parts that fit | divide one over both nodes
//! too many parts, little lag, and patience?
//!      neighbours on one node     --> join them
//!      else                       --> move parts next to others, exchanging some to keep the balance
//! ```
//!
//! Where a span can be divided is not decided here: a planner ([`by_size`], [`by_traffic`]) groups what the upstream
//! offers, and leaves the span whole when that is not exactly it.
//!
//! - **SC-1** A span is given to a node that may take work, never to one that is being emptied.
//! - **SC-2** Among candidates the least loaded one is chosen (see [`Load`] for what that means).
//! - **SC-3** No more is decided at once than the budget allows; a span that an operator occupies is left alone.
//! - **SC-4** A tick visits what it decides and what is occupied in between, never all spans; of a table in parts,
//!   each part once.
//! - **SC-5** No single sample changes anything: load is acted on when it has lasted.

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
