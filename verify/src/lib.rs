//! Compares two PostgreSQL databases while changes flow from one to the other, and neither stands still.
//!
//! A row that differs may be wrong, or on its way. Which of both is decided by the changefeed's checkpoint: everything
//! that was committed at the source up to there is in the target.
//!
//! ```text
//!  table --> parts of some thousand rows --> number and checksum at both ends --same--> equal
//!                                                 | not the same
//!                                                 v
//!            wait for the checkpoint, look again --same-----------------------------> equal
//!                                                 | not the same
//!                                                 v
//!            keys and a hash of every row of the part at both ends: which rows differ?
//!                                                 |
//!     .-------------------------------------------'
//!     v                                                        target has the same --> equal
//!   suspect: read at the source (1) --> wait for the checkpoint --> read at the target --> read at the source (2)
//!     ^   (1) and (2) are not the same: it changes, begins anew ------------------------------'    | not the same
//!     '---- once more, since it may have changed to and fro <------------- first time -------------+
//!                                                                                   second time    v
//!                                                                                             a difference
//! ```
//!
//! The parts are ranges of the key where both ends order its values in the same way, texts under the same collation included.
//! Else the parts are buckets: rows are dealt out by a hash of their key, or of the whole row where there is no key, and the
//! numbers and checksums of all of them come from one scan of each end. Where they differ, the rows of some buckets cost one
//! more scan each, and so does each look at rows without a key.
//!
//! Rows are compared by what both servers print for them, under the same settings, as a hash that the servers make:
//! no row crosses the network, but the keys of those that differ do.
//!
//! Neighbours: none but `heartbeatpb`. The caller brings two connections and a [`Checkpoint`]; `node` has both. Start
//! reading at [`Verifier::run`], then `suspects.rs`, where it is decided.
//!
//! A row that changes all the time is watched at the source meanwhile: it is the same when the target shows, in two rounds,
//! two different states that the source has shown in them.
//!
//! - **VF-1** What is called equal was the same at both ends at some moment after the comparison began; of a row that never
//!   stands still, the target went through states that the source had gone through since then.
//! - **VF-2** What is called a difference did not change at the source while the target, which had everything up to then,
//!   showed something else; seen twice.
//! - **VF-3** Whatever could not be decided is said; a table that was not compared is never called equal.
//! - **VF-4** Nothing is written or locked at either end, and memory is bounded by the size of a part.
//! - **VF-5** With a limit, no end is read faster over a comparison, its end included: what a statement reads at once is
//!   followed by a rest, and a part by ranges is no larger than what a second allows. Only both looks of a round, before the
//!   wait for the checkpoint and after it, are rested for together: time between them would be time for the rows to change.

mod catalog;
mod collation;
mod error;
mod pace;
mod part;
mod report;
mod run;
mod sql;
mod suspects;

pub use error::Error;
pub use report::{Difference, Kind, Outcome, Reading, Report, TableReport};
pub use run::{Checkpoint, Options, TablePair, Verifier};
pub use sql::TableName;
