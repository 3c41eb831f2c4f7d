//! Parts of an initial copy, written by the nodes that own their spans.
//!
//! The node that reads the log makes the copy: it takes the snapshot, divides the tables and knows what is missing. A part
//! whose key range a dispatcher of another node has goes to that node as an order. There a hand joins the same snapshot over
//! a connection of its own and writes the part into the target over another one, so that its rows take neither way through
//! the node that reads the log.
//!
//! ```text
//!   reader's node (orders.rs)                              owner's node (hands.rs, jobs.rs)
//!     right for the node, from the target
//!     order, every second until it is answered ──────────▶ known? says how far it is : joins the snapshot, writes
//!     heard ◀────────────────────────────── running ────── every order is answered
//!     part is durable ◀──────────────────── written ────── committed
//!     silent or failed: right taken back, then what the target has of the part counts; the rest is written here
//! ```
//!
//! Nothing depends on an answer: the target notes the part in its transaction, and no right is given to anybody else before
//! the one of the node was taken back ([`event::CopySession::dismiss`]). A node that did not do as it was asked gets no
//! more orders in this run.

mod hands;
mod jobs;
mod orders;
mod topic;

pub(crate) use hands::work;
pub use hands::{CopyEnds, Ends};
pub use orders::CopyCrew;
pub(crate) use orders::Waiting;
pub use topic::{CopyOrder, CopyOrderTopic, CopyReport, CopyReportTopic, OrderId, OrderState};
