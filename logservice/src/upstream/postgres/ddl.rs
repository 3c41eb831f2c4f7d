//! Schema changes of a PostgreSQL upstream, at their places in commit order.
//!
//! Logical decoding knows rows, not statements. Event triggers (`ddl/install.sql`) compare each object that a statement
//! touched with its shape before, and write the difference as a transactional logical message: it comes in the stream
//! exactly where the statement was, between the rows of its transaction. The statements for the target are made from the
//! two shapes (`statement.rs`, `alter.rs`, `object.rs`).
//!
//! Two things are told without an event trigger, since none fires for them: the truncation of a partition, by a trigger on
//! it (`partition.rs`), and values of sequences, by whoever reads the log (`sequences.rs`).
//!
//! ```text
//!  event triggers            ─ tables, schemas, views, sequences, types ─┐
//!  BEFORE TRUNCATE triggers  ─ one partition, not with those above it ───┼─▶ message ─▶ log ─▶ reader ─▶ DdlEvent
//!  Watch, every 10 s         ─ values of sequences, in a transaction ────┘                       (event.rs)
//!                              of their own
//! ```
//!
//! ```text
//!  upstream's transaction     BEGIN    row row   ALTER a    row    ALTER b    row    COMMIT
//!  in the log                  B        I   I     M          I      M          I      C
//!  commit ts                            ╰─┬─╯     │          │      │          │
//!                                      c + 1 ─────╯       c + 2 ────╯       end of the commit record
//! ```
//!
//! A commit ts names at most one schema change, and `c` is where the commit record begins. The record is longer than its
//! transaction has changes, since each of them leaves an invalidation in it, so the numbers behind `c` are free: every
//! message ends a part of the transaction, and rows behind it have the next number.
//!
//! The tables as they were at a checkpoint are the present ones, with the changes behind the checkpoint taken back
//! (`history.rs`): the triggers keep what was before each change until every changefeed has passed it. Whether a changefeed
//! has passed one is known exactly, because whoever reads a transaction with changes writes its place down
//! before it lets the first of them through.
//!
//! - **DC-1** A part of a transaction has one commit ts in every replay.
//! - **DC-2** A change that cannot be made again at the target is an error of the changefeed, never silence.

pub(crate) mod alter;
pub(crate) mod entrance;
pub(crate) mod event;
pub(crate) mod history;
pub(crate) mod install;
pub(crate) mod message;
pub(crate) mod object;
pub(crate) mod partition;
pub(crate) mod sequences;
pub(crate) mod statement;
pub(crate) mod table;
pub(crate) mod using;
