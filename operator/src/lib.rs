//! Changes of placement as values: an operator brings one span from where it is to where it should be.
//!
//! An operator hears what nodes report and says what has to be done, as [`Action`]s; it holds no clock, no sender
//! and no span. The [`Controller`] keeps at most one operator for a dispatcher, carries its actions out on the
//! [`replica::SpanSet`], turns requests into messages, repeats what was not answered, and freezes everything when
//! its maintainer leaves. Start reading at `operator.rs`, then `span/moving.rs`, then `controller.rs`.
//!
//! Neighbours: `replica` has the spans; maintainers own a controller; schedulers do not know operators. A new
//! kind of operator is one file under `span/` that implements [`Operator`].
//!
//! - **OP-1** Two nodes are never told to run one span: a span is bound before its create request, and released
//!   only when its node is known to have let go, or to be gone.
//! - **OP-2** At most one operator exists for a dispatcher; admission, registration and start are one step.
//! - **OP-3** A request is repeated until its effect is observed; handlers are idempotent.
//! - **OP-4** What follows an operator's end happens exactly once, and not at all for a cancelled one.
//! - **OP-5** After quiesce nothing but the allowed ids acts, and what is frozen still holds the checkpoint.
//! - **OP-6** Every request carries the epoch that the controller was built with.

mod controller;
mod operator;
pub mod span;

pub use controller::{Context, Controller, Effect, FIRST_RESEND, LAST_RESEND, RESEND_BATCH, SLOW, Slow};
pub use operator::{Action, Kind, Operator};
