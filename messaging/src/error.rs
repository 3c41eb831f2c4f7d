//! Why a message could not be sent (messaging §5.1).

use std::fmt;

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident = $code:literal,)+) => {
        /// Kind of a failure, with its stable number.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        #[non_exhaustive]
        pub enum SendErrorKind {
            $($(#[$doc])* $kind,)+
        }

        impl SendErrorKind {
            /// Every kind that occurs.
            pub const ALL: &[Self] = &[$(Self::$kind,)+];

            /// Stable number.
            #[must_use]
            pub const fn code(self) -> u16 {
                match self {
                    $(Self::$kind => $code,)+
                }
            }

            /// Stable name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$kind => stringify!($kind),)+
                }
            }
        }
    };
}

kinds! {
    /// The bus is shutting down.
    Closed = 107,
    /// Dialling a peer or opening a stream failed.
    ConnectionFailed = 201,
    /// The connection is not there yet, or the target was closed. Retry later.
    ConnectionNotFound = 202,
    /// The target's queue is full. Retry after a pause.
    MessageCongested = 204,
    /// A stream broke while receiving.
    MessageReceiveFailed = 205,
    /// A stream broke while sending.
    MessageSendFailed = 206,
    /// The node is not known: not discovered yet, or gone. Drop state bound to it.
    TargetNotFound = 207,
    /// The message or its address cannot be used.
    InvalidMessage = 208,
    /// A peer took this node for another one.
    TargetMismatch = 209,
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
            SendErrorKind::ConnectionFailed
            | SendErrorKind::ConnectionNotFound
            | SendErrorKind::MessageCongested
            | SendErrorKind::MessageReceiveFailed
            | SendErrorKind::MessageSendFailed => true,
            SendErrorKind::Closed
            | SendErrorKind::TargetNotFound
            | SendErrorKind::InvalidMessage
            | SendErrorKind::TargetMismatch => false,
        }
    }
}

impl fmt::Display for SendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ErrorType: {}, Reason: {}", self.kind.name(), self.reason)
    }
}

impl std::error::Error for SendError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_are_stable() {
        let listed: Vec<_> = SendErrorKind::ALL.iter().map(|kind| (kind.code(), kind.name())).collect();
        let expected = [
            (107, "Closed"),
            (201, "ConnectionFailed"),
            (202, "ConnectionNotFound"),
            (204, "MessageCongested"),
            (205, "MessageReceiveFailed"),
            (206, "MessageSendFailed"),
            (207, "TargetNotFound"),
            (208, "InvalidMessage"),
            (209, "TargetMismatch"),
        ];
        assert_eq!(listed, expected);
    }

    #[test]
    fn the_text_names_kind_and_reason() {
        let error = SendError::new(SendErrorKind::TargetNotFound, "node b is not known");
        assert_eq!(error.to_string(), "ErrorType: TargetNotFound, Reason: node b is not known");
        assert!(!error.is_retryable());
        assert!(SendError::new(SendErrorKind::MessageCongested, "").is_retryable());
    }
}
