//! Why bytes of a peer are no message.

/// A message that cannot be understood. The text never holds its content.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// Not the protobuf or binary form that its type has.
    #[error("{message} is malformed")]
    Malformed {
        /// Name of the message.
        message: &'static str,
    },
    /// A field that the message cannot do without is absent.
    #[error("{message} has no {field}")]
    Missing {
        /// Name of the message.
        message: &'static str,
        /// Name of the field.
        field: &'static str,
    },
    /// A field has a value that cannot be acted on.
    #[error("{message} has an unusable {field}")]
    Unusable {
        /// Name of the message.
        message: &'static str,
        /// Name of the field.
        field: &'static str,
    },
    /// No message has this type number.
    #[error("message type {0} is unknown")]
    UnknownType(i32),
}

impl From<std::convert::Infallible> for DecodeError {
    fn from(never: std::convert::Infallible) -> Self {
        match never {}
    }
}
