//! A whole node against real servers: what it promises to people, and what they may do wrong.

#![expect(clippy::unwrap_used, reason = "a test fails where it cannot go on")]

mod access;
mod bad_input;
mod bank;
mod commands;
mod common;
mod copy;
mod copy_ddl;
mod copy_index;
mod enter;
mod faults;
mod filters;
mod identity;
mod large;
mod life;
mod many_tables;
mod observed;
mod partial;
mod people;
mod resync;
mod spans;
mod types;
