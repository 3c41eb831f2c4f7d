//! Why a configuration is refused.

/// Why a configuration is refused. Names the key, says what to do, and never shows a URI or a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The sink URI cannot be used.
    #[error("sink uri: {0}")]
    SinkUri(String),
    /// The upstream URI cannot be used.
    #[error("upstream uri: {0}")]
    UpstreamUri(String),
    /// A value is not allowed.
    #[error("{key}: {what}")]
    Invalid {
        /// The key in its TOML spelling, such as `scheduler.region-count-per-span`.
        key: String,
        /// What is wrong and what to do.
        what: String,
    },
    /// Keys that no section knows.
    #[error("unknown keys: {}", .0.join(", "))]
    UnknownKeys(Vec<String>),
    /// No sink knows the protocol.
    #[error("sink.protocol: {0:?} is not a protocol; use csv, canal-json or debezium")]
    UnknownProtocol(String),
    /// The text is not TOML or JSON, or a value has the wrong type.
    #[error("{0}")]
    Syntax(String),
}

impl ConfigError {
    /// Stable code for the API.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::SinkUri(_) => "CDC:ErrSinkURIInvalid",
            Self::UpstreamUri(_) => "CDC:ErrUpstreamInvalid",
            Self::UnknownProtocol(_) => "CDC:ErrSinkUnknownProtocol",
            Self::Invalid { .. } | Self::UnknownKeys(_) | Self::Syntax(_) => "CDC:ErrInvalidReplicaConfig",
        }
    }

    pub(super) fn invalid(key: &str, what: impl Into<String>) -> Self {
        Self::Invalid { key: key.to_owned(), what: what.into() }
    }
}
