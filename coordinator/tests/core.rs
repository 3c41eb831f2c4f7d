//! Histories of the core: events in, printed actions out.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "core/drain.rs"]
mod drain;
#[path = "core/handover.rs"]
mod handover;
#[path = "core/histories.rs"]
mod histories;
#[path = "core/left_behind.rs"]
mod left_behind;
#[path = "core/placement.rs"]
mod placement;
#[path = "core/walk.rs"]
mod walk;
#[path = "core/world.rs"]
mod world;
