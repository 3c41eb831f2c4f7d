//! Row, DDL and sync-point events: one shape from the upstream log to the sink.
//!
//! The log service decodes an upstream once into [`RowBatch`]es: rows of one table in commit order, in one
//! contiguous buffer that every later stage shares and nobody copies. A value keeps the text form that the
//! upstream's output function gave it, so that nothing is lost on the way; sinks convert where they must.
//!
//! Start reading at `batch.rs`; `table.rs` describes what the columns mean.
//!
//! A table with a primary key can be divided into key ranges. `key.rs` turns a key into bytes whose order is the order
//! of ranges ([`heartbeatpb::TableSpan`]), and `part.rs` picks from a batch what belongs to one range, without copying:
//!
//! ```text
//!            batch of the whole table          range ["", m)        range [m, "")
//!            ┌──────────────────────┐
//!  number 0  │ insert  key c        │─────────▶ insert c
//!         1  │ delete  key x        │──────────────────────────────▶ delete x
//!         2  │ update  key d        │─────────▶ update d
//!         3  │ update  key e → p    │─────────▶ delete e ─ ─ ─ ─ ─ ▶ insert p       (both are number 3)
//!         4  │ truncate             │─────────▶ truncate ──────────▶ truncate       (each clears its own range)
//!            └──────────────────────┘
//! ```
//!
//! - **EV-1** Rows of a batch have non-decreasing commit ts, and belong to one version of one table.
//! - **EV-2** A batch is immutable once built; cloning it is cheap.
//! - **EV-3** The parts of a batch in ranges that cover the keys hold, together and by key in order, what the batch
//!   holds; a row keeps its number.
//! - **EV-4** No `Debug` output contains a row value.

mod batch;
pub mod calendar;
mod copy;
mod ddl;
mod key;
mod part;
mod resync;
mod table;
#[cfg(any(test, feature = "test-util"))]
pub mod testing;
mod tuple;

pub use batch::*;
pub use copy::*;
pub use ddl::*;
pub use key::{KeyCodec, KeyError, KeyForm};
pub use part::Picker;
pub use resync::*;
pub use table::*;
pub use tuple::*;
