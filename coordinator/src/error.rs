//! Errors of the coordinator, by what the caller would do.

use crate::backend::StoreError;

/// Why the coordinator refused or failed. No text holds a URI or a configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No changefeed has the name.
    #[error("changefeed {0} does not exist")]
    NotExists(String),
    /// A changefeed has the name already.
    #[error("changefeed {0} already exists; remove it first or choose another name")]
    AlreadyExists(String),
    /// A changefeed of this name is being created, and is not stored yet: it may still come to nothing.
    #[error("changefeed {0} is still being created; try again later")]
    CreationUnfinished(String),
    /// A changefeed of this name is still being removed.
    #[error("changefeed {0} is still being removed; try again later")]
    DeletionUnfinished(String),
    /// The state of the changefeed does not allow it.
    #[error("changefeed {name} is {state}; {what}")]
    UpdateRefused {
        /// The changefeed.
        name: String,
        /// Its state.
        state: String,
        /// What to do.
        what: &'static str,
    },
    /// The name or keyspace is not one.
    #[error(
        "{0:?} cannot name a changefeed: use letters and digits with single dashes between, at most 128 bytes"
    )]
    InvalidName(String),
    /// The cluster id is not one.
    #[error(
        "{0:?} cannot be a cluster id: use letters and digits with single dashes between, no reserved word"
    )]
    InvalidClusterId(String),
    /// The description is not usable.
    #[error("the changefeed's description is not usable")]
    Config(#[from] heartbeatpb::config::ConfigError),
    /// No node of the cluster has the id.
    #[error("node {0} is not in the cluster")]
    NodeNotExists(String),
    /// The drain cannot be.
    #[error("{0}")]
    Drain(&'static str),
    /// The coordinator has not yet heard from every node.
    #[error("the coordinator is starting; try again in a moment")]
    NotInitialized,
    /// The coordinator is gone.
    #[error("the coordinator stopped; try again in a moment")]
    Stopped,
    /// Another coordinator was elected.
    #[error("this node is not the coordinator any more")]
    NotOwner,
    /// The numbers of maintainer epochs are used up.
    #[error("changefeed {0} has no further maintainer epoch; create it anew")]
    EpochOverflow(String),
    /// Somebody else kept changing the same document.
    #[error("the metadata of changefeed {0} keeps changing; try again")]
    Conflict(String),
    /// The upstream still keeps its log for the changefeed.
    #[error("the log at the upstream is not released yet: {0}")]
    Retention(String),
    /// The metadata store failed.
    #[error("metadata store: {0}")]
    Store(#[from] StoreError),
}

impl Error {
    /// Stable code for the API.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotExists(_) => "CDC:ErrChangeFeedNotExists",
            Self::AlreadyExists(_) => "CDC:ErrChangeFeedAlreadyExists",
            Self::CreationUnfinished(_) => "CDC:ErrChangeFeedCreationUnfinished",
            Self::DeletionUnfinished(_) => "CDC:ErrChangeFeedDeletionUnfinished",
            Self::UpdateRefused { .. } => "CDC:ErrChangefeedUpdateRefused",
            Self::InvalidName(_) | Self::InvalidClusterId(_) => "CDC:ErrAPIInvalidParam",
            Self::Config(e) => e.code(),
            Self::NodeNotExists(_) => "CDC:ErrCaptureNotExist",
            Self::Drain(_) => "CDC:ErrSchedulerRequestFailed",
            Self::NotInitialized | Self::Stopped => "CDC:ErrCaptureNotInitialized",
            Self::NotOwner => "CDC:ErrNotOwner",
            Self::EpochOverflow(_) => "CDC:ErrSchedulerRequestFailed",
            Self::Conflict(_) => "CDC:ErrMetaOpFailed",
            Self::Retention(_) => "CDC:ErrUpdateServiceSafepointFailed",
            Self::Store(e) => e.code(),
        }
    }

    /// Whether the same request may succeed later without a person's help.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::NotInitialized
            | Self::Stopped
            | Self::NotOwner
            | Self::CreationUnfinished(_)
            | Self::DeletionUnfinished(_)
            | Self::Conflict(_)
            | Self::Retention(_) => true,
            Self::Store(e) => e.is_retryable(),
            Self::NotExists(_)
            | Self::NodeNotExists(_)
            | Self::Drain(_)
            | Self::AlreadyExists(_)
            | Self::UpdateRefused { .. }
            | Self::InvalidName(_)
            | Self::InvalidClusterId(_)
            | Self::Config(_)
            | Self::EpochOverflow(_) => false,
        }
    }
}
