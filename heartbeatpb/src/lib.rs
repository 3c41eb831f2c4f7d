//! The words that every part of Millrace shares: ids, positions, epochs, and the control messages.
//!
//! Domain types live in the modules below; the prost types of the wire live in [`wire`] and stop at
//! `convert`, the one file that sees both. Nobody above this crate meets an unknown enum value,
//! a missing sub-message or a zero epoch. Start reading at `ids.rs`.
//!
//! - **HB-1** Names and numbers on the wire are those of messaging §15; append only.
//! - **HB-2** Decoding never panics: malformed input is a [`DecodeError`].
//! - **HB-3** A configuration is never shown by `Debug`.

mod block;
mod causes;
pub mod codes;
pub mod config;
mod convert;
mod epoch;
mod error;
mod ids;
mod permit;
mod request;
mod rules;
mod span;
mod status;
mod surroundings;
mod ts;
pub mod wire;

pub use block::*;
pub use causes::error_chain;
pub use epoch::*;
pub use error::*;
pub use ids::*;
pub use permit::{Granted, WritePermit};
pub use request::*;
pub use rules::Rule;
#[cfg(feature = "test-util")]
pub use rules::switches::switch_off;
pub use span::*;
pub use status::*;
#[cfg(feature = "test-util")]
pub use surroundings::simulated;
pub use ts::*;
