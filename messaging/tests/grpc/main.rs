//! Nodes that talk over real connections on the loopback.

#![expect(clippy::unwrap_used, reason = "a test fails where it cannot go on")]
#![expect(clippy::wildcard_enum_match_arm, reason = "whatever a test does not expect fails it")]

mod connect;
mod faults;
mod handshake;
mod pressure;
mod proxy;
mod raw;
mod reconnect;
mod support;
mod tls;
