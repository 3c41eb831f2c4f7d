//! A Millrace process: everything is assembled, observed and stopped here.
//!
//! The only crate that sees all others. [`Node`] builds a server from a [`config::ServerConfig`]; the
//! `millrace` program, the tests and other people's programs start one the same way. Neighbours are plugged
//! together in `wiring.rs`: the maintainer asks for a table source and gets the log service, the dispatcher
//! manager asks for sinks and gets the sink crate. Start reading at `wiring.rs`.
//!
//! - **ND-1** Everything that can fail on bad configuration fails before the first task runs.
//! - **ND-2** Parts stop from the edge inward: HTTP, coordinator, maintainers, dispatchers, log, messages.
//! - **ND-3** Nothing that this crate prints, logs or answers holds a password or a row value.

pub mod cli;
pub mod config;
mod connect;
mod copies;
mod http;
pub mod metrics;
mod permitted;
pub mod quickstart;
mod resync;
pub mod serve;
pub mod shutdown;
mod sinks;
pub mod telemetry;
pub mod tls;
mod upstream;
mod verification;
mod wiring;

pub use http::password;
pub use wiring::{Connect, Node, Surroundings};
