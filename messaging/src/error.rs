//! Why a message could not be sent (spec/messaging.md §5.1).

use std::fmt;

/// Kind of a failure, with its number on the wire of error reports.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[non_exhaustive]
pub enum SendErrorKind {
    /// The connection is not there yet, or the target was closed. Retry later.
    ConnectionNotFound,
    /// The target's queue is full. Retry after a pause.
    MessageCongested,
    /// The node is not known: not discovered yet, or gone. Drop state bound to it.
    TargetNotFound,
    /// The message or its address cannot be used.
    InvalidMessage,
}

impl SendErrorKind {
    /// Stable number.
    #[must_use]
    pub const fn code(self) -> u16 {
        match self {
            SendErrorKind::ConnectionNotFound => 202,
            SendErrorKind::MessageCongested => 204,
            SendErrorKind::TargetNotFound => 207,
            SendErrorKind::InvalidMessage => 208,
        }
    }

    /// Stable name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            SendErrorKind::ConnectionNotFound => "ConnectionNotFound",
            SendErrorKind::MessageCongested => "MessageCongested",
            SendErrorKind::TargetNotFound => "TargetNotFound",
            SendErrorKind::InvalidMessage => "InvalidMessage",
        }
    }
}

/// A message was not sent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SendError {
    /// What went wrong.
    pub kind: SendErrorKind,
    /// Where and why, without any content.
    pub reason: String,
}

impl SendError {
    /// An error with a reason.
    pub fn new(kind: SendErrorKind, reason: impl Into<String>) -> Self {
        Self { kind, reason: reason.into() }
    }

    /// Whether the same call may succeed in a moment.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self.kind {
            SendErrorKind::ConnectionNotFound | SendErrorKind::MessageCongested => true,
            SendErrorKind::TargetNotFound | SendErrorKind::InvalidMessage => false,
        }
    }
}

impl fmt::Display for SendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ErrorType: {}, Reason: {}", self.kind.name(), self.reason)
    }
}

impl std::error::Error for SendError {}
