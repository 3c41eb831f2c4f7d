//! What people may rely on when they ask a node to change something: once for each key, whoever leads; only where the
//! state allows it; to its end; and without a secret in anything that is told.

#![expect(clippy::unwrap_used, reason = "a test fails where it cannot go on")]

mod change;
mod common;
mod killed;
mod leader;
mod process;
mod secrets;
