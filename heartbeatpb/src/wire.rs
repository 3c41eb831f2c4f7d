//! The prost types of the wire, generated from `proto/` by `cargo xtask codegen`.
//!
//! For codecs, and for programs that talk to a cluster without our domain types. Everything else in
//! this project uses the domain types of the crate root. `Debug` of the messages that hold a configuration, and
//! of the envelope, shows sizes and not the content.

use std::fmt;

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

impl fmt::Debug for proto::Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Message")
            .field("type", &self.r#type)
            .field("from", &self.from)
            .field("to", &self.to)
            .field("topic", &self.topic)
            .field(
                "payload",
                &format_args!("{} elements, {} bytes", self.payload.len(), self.payload_bytes()),
            )
            .finish()
    }
}

impl proto::Message {
    /// Size of all payload elements.
    #[must_use]
    pub fn payload_bytes(&self) -> usize {
        self.payload.iter().map(|payload| payload.len()).sum()
    }
}

impl fmt::Debug for heartbeatpb::AddMaintainerRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AddMaintainerRequest")
            .field("id", &self.id)
            .field("config", &format_args!("{} bytes", self.config.len()))
            .field("checkpoint_ts", &self.checkpoint_ts)
            .field("is_new_changefeed", &self.is_new_changefeed)
            .field("maintainer_epoch", &self.maintainer_epoch)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for heartbeatpb::MaintainerBootstrapRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MaintainerBootstrapRequest")
            .field("changefeed_id", &self.changefeed_id)
            .field("config", &format_args!("{} bytes", self.config.len()))
            .field("start_ts", &self.start_ts)
            .field("is_new_changefeed", &self.is_new_changefeed)
            .field("maintainer_epoch", &self.maintainer_epoch)
            .finish_non_exhaustive()
    }
}
