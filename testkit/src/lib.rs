//! Real servers and workloads for tests. Only ever a dev-dependency.
//!
//! [`PgServer`] starts a private PostgreSQL in a temporary directory and removes it when it is dropped.

pub mod postgres;

pub use postgres::{PgServer, PgServerBuilder, StopMode};
