//! Errors of downstreams, by what the caller would do.

/// Why a downstream failed. The text is for people and holds no row values and no credentials.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The sink URI or the sink's configuration is wrong; a person must change it.
    #[error("{0}")]
    Config(String),
    /// The downstream does not answer, or a connection broke: trying again later may help.
    #[error("{what}")]
    Unavailable {
        /// What was tried, and what to do.
        what: String,
        /// The cause.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// The downstream refuses the data or its content contradicts the stream; a person must look.
    #[error("{what}")]
    Rejected {
        /// Stable code, such as `CDC:ErrTargetNotEmpty`.
        code: &'static str,
        /// What is wrong and what to do.
        what: String,
    },
    /// Another has taken the sink's place: it writes nothing any more, and stays so. A new sink may.
    #[error("{what}")]
    Fenced {
        /// Who has.
        what: String,
    },
    /// The sink is closed.
    #[error("the sink is closed")]
    Closed,
}

impl Error {
    /// Stable code for the API.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Error::Config(_) => "CDC:ErrSinkURIInvalid",
            Error::Unavailable { .. } => "CDC:ErrSinkUnavailable",
            Error::Rejected { code, .. } => code,
            Error::Fenced { .. } => heartbeatpb::codes::SINK_FENCED,
            Error::Closed => "CDC:ErrSinkClosed",
        }
    }

    /// Whether trying again, with a new sink, can succeed without a person's help.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Error::Unavailable { .. } | Error::Fenced { .. } | Error::Closed => true,
            Error::Config(_) | Error::Rejected { .. } => false,
        }
    }
}
