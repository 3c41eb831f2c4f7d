//! The message bus between nodes: topics that each carry one message type.
//!
//! A [`MessageCenter`] is a node's end of the bus. `send` never blocks: a message is queued, or the call says
//! at once why not. Delivery is at most once and in order per (sender, receiver, stream class); whoever needs
//! more repeats until it observes the result. Between processes the feature `grpc` carries messages; its page tells
//! how streams are opened, broken and replaced. Inside a process commands still pass through the codec, so that
//! one node behaves like many; row events pass by reference. Start reading at `topic.rs`, the table of the
//! whole protocol, then `center.rs`.
//!
//! Neighbours: `heartbeatpb` gives the words; every tier above sends through here and links to none of its peers.
//!
//! - **MS-1** A topic delivers its own message type only; anything else is dropped and counted.
//! - **MS-2** Each topic has a bounded queue of its own. Sending never waits for room; a receiver that is full
//!   pushes back on the streams of its peers until they refuse to send.
//! - **MS-3** Errors and logs name type, sender and topic, never a message's content.
//! - **MS-4** An envelope without a usable payload is not delivered.
//! - **MS-5** A message says the truth about its sender: a peer cannot speak for another node.
//! - **MS-6** Commands of one sender under one topic are delivered in order and once, whatever the network does.

pub mod binary;
mod center;
pub mod codec;
mod error;
#[cfg(feature = "grpc")]
pub mod grpc;
mod inbox;
pub mod metrics;
mod order;
mod router;
#[cfg(feature = "test-util")]
pub mod testing;
mod topic;
mod transport;

pub use center::{MessageCenter, MessagingConfig};
pub use codec::WireMessage;
pub use error::{SendError, SendErrorKind};
pub use inbox::{Inbound, Inbox, SLOW};
pub use topic::*;
pub use transport::{QUEUE_CAPACITY, Transport};
