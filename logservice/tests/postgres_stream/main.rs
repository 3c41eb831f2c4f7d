//! A real server's changes come out of the store as they were made.

mod changes;
mod confirmed;
mod copy;
mod failover;
mod outage;
mod publication;
#[path = "../rig/mod.rs"]
mod rig;
mod slot;
mod standby;
mod unfinished;
