//! The prost types of the wire, generated from `proto/` by `cargo xtask codegen`.
//!
//! For codecs, and for programs that talk to a cluster without our domain types. Everything else in
//! this project uses the domain types of the crate root.

/// Control messages.
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
#[path = "generated/heartbeatpb.rs"]
pub mod heartbeatpb;

/// Subscriptions to the event service.
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
#[path = "generated/eventpb.rs"]
pub mod eventpb;

/// State of event stores.
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
#[path = "generated/logservicepb.rs"]
pub mod logservicepb;

/// The envelope.
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
#[path = "generated/proto.rs"]
pub mod proto;

/// The encoded `FileDescriptorSet` of all four packages.
pub const DESCRIPTORS: &[u8] = include_bytes!("generated/descriptors.bin");
