//! Schema changes of a PostgreSQL upstream, statement by statement: after each, the catalogs and the rows of both ends are
//! the same, or the changefeed says why it cannot follow.

#![expect(clippy::unwrap_used, reason = "a test fails where it cannot go on")]

mod common;
mod docs;
mod feeds;
mod kill;
mod matrix;
mod partition;
mod refused;
mod sequences;
mod user_types;
