//! Schema changes through a whole node: each is executed once, at its place between the rows.

#![expect(clippy::unwrap_used, reason = "a test fails where it cannot go on")]

mod alter;
mod common;
mod kinds;
