//! Row, DDL and sync-point events: one shape from the upstream log to the sink.
//!
//! The log service decodes an upstream once into [`RowBatch`]es: rows of one table in commit order, in one
//! contiguous buffer that every later stage shares and nobody copies. A value keeps the text form that the
//! upstream's output function gave it, so that nothing is lost on the way; sinks convert where they must.
//!
//! Start reading at `batch.rs`; `table.rs` describes what the columns mean.
//!
//! - **EV-1** Rows of a batch have non-decreasing commit ts, and belong to one version of one table.
//! - **EV-2** A batch is immutable once built; cloning it is cheap.
//! - **EV-3** No `Debug` output contains a row value.

mod batch;
mod ddl;
mod table;
mod tuple;

pub use batch::*;
pub use ddl::*;
pub use table::*;
pub use tuple::*;
