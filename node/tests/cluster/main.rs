//! Several real processes with a real etcd between two real databases: they are one server that survives the loss of
//! any part.

#![expect(clippy::unwrap_used, reason = "a test fails where it cannot go on")]

mod common;
mod copy;
mod cut;
mod handover;
mod lease;
mod leave;
mod loss;
mod resync;
