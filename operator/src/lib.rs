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
//! What each operator does, between `o` (start) and `#` (end); below an arrow what the span becomes. "ends" is a
//! terminal report of the dispatcher, or that its node is gone where nothing else is said.
//!
//! ```text
//! add      o --create at dest--> Creating --works at dest--------------------------> # replicating
//!                                    `----removed at dest, or dest gone------------> # absent
//!
//! remove   o --remove at node--> Removing --ends-----------------------------------> # forgotten, or absent
//!
//! move     o --remove at origin--> Stopping --ends--> bound to dest, create there
//!                                    |                    `--> Creating --works----> # replicating at dest
//!                                    |                              `---dest gone--> # absent
//!                                    `--dest gone--> Abandoning --ends-------------> # absent
//!
//! split    o --remove at origin--> Stopping --terminal report--> the parts take its place:
//!                                    |         with nodes: one add for each part---> # (adds go on)
//!                                    |         without:    parts absent------------> #
//!                                    `----origin gone------------------------------> # absent, whole
//!
//! merge    o --merge at node, sources reserved--> Merging
//!                                    |----target works-----> sources forgotten ----> # target replicating
//!                                    |----node gone--------> sources absent, -.
//!                                    `----target terminal--> sources go on, --+----> # target forgotten
//!                                          or given up
//! occupy   o --------------------> Reserved --its merge ends-----------------------> # as the merge says
//! ```
//!
//! A removed table cancels whatever has its spans, and a remove takes the place in the same step: at no moment is a
//! known span without an operator. When the maintainer leaves (`quiesce_except`), every operator but the allowed ones
//! stays as it is and keeps holding the checkpoint:
//!
//! ```text
//! running --quiesce_except(trigger)--> frozen: nothing starts, hears, repeats, ends or is removed
//!                                      trigger: its remove runs to its end, then the maintainer has left
//! ```
//!
//! - **OP-1** Two nodes are never told to run one span: a span is bound before its create request, and released
//!   only when its node is known to have let go, or to be gone.
//! - **OP-2** At most one operator exists for a dispatcher; admission, registration and start are one step.
//! - **OP-3** A request is repeated until its effect is observed; handlers are idempotent.
//! - **OP-4** What follows an operator's end happens exactly once, and not at all for a cancelled one.
//! - **OP-5** After quiesce nothing but the allowed ids acts, and what is frozen still holds the checkpoint.
//! - **OP-6** Every request carries the epoch that the controller was built with.
//! - **OP-7** Of a merge all operators are admitted or none; its reservations end last, and only with it.

mod controller;
mod operator;
pub mod span;

pub use controller::{Context, Controller, Effect, FIRST_RESEND, LAST_RESEND, RESEND_BATCH, SLOW, Slow};
pub use operator::{Action, Kind, Operator};
