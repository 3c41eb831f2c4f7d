//! Changes of placement as values: an operator brings one span from where it is to where it should be.
//!
//! An operator hears what nodes report and says what has to be done, as [`Action`]s that its owner performs;
//! it holds no clock, no sender and no span. The [`Controller`] keeps at most one operator for a span and
//! repeats what was not answered. Start reading at `operator.rs`, then `span/add.rs`.
//!
//! Neighbours: `replica` has the spans; maintainers own a controller; schedulers do not know operators.
//!
//! - **OP-1** Two nodes are never told to run one span: a span is bound before its create request, and released
//!   only when its node is known to have let go, or to be gone.
//! - **OP-2** At most one operator exists for a span.
//! - **OP-3** A request is repeated until its effect is observed; handlers are idempotent.

mod controller;
mod operator;
pub mod span;

pub use controller::{Controller, RESEND_INTERVAL};
pub use operator::{Action, Operator};
