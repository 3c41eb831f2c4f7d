//! Errors of the log side, by what the caller would do.

use std::fmt;

use event::{BatchError, KeyError};
use heartbeatpb::{DispatcherId, TableId, Ts, codes};

/// A cause that only a person reads.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Why the log side failed. The texts hold no row values and no credentials.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An upstream URI is wrong; the reason does not repeat it.
    #[error("the upstream URI is not usable: {reason}")]
    UpstreamUri {
        /// What is wrong.
        reason: String,
    },
    /// A filter rule is wrong.
    #[error("filter rule {rule:?} is wrong: {reason}")]
    FilterRule {
        /// The rule.
        rule: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// What is wanted of a table cannot be published; the text does not repeat conditions.
    #[error("filter.publish: {what}")]
    PublishRule {
        /// Which table, what is wrong, and what to do.
        what: String,
    },
    /// Nothing answers at the upstream's address, or the connection broke.
    #[error("the upstream at {address} cannot be reached")]
    UpstreamUnreachable {
        /// Host and port.
        address: String,
        /// The cause.
        #[source]
        source: Cause,
    },
    /// The upstream is there but cannot serve now: it starts, stops, or has no connection left.
    #[error("the upstream is not ready: {message}")]
    UpstreamUnavailable {
        /// Its own words.
        message: String,
    },
    /// A former reader of the changefeed still has the replication slot, and we cannot make it go.
    #[error("replication slot {slot:?} is still held by a former reader: {what}")]
    SlotHeld {
        /// The slot.
        slot: String,
        /// Why it stays, and until when.
        what: String,
    },
    /// Wrong user or password, or no rule of the server lets the role in.
    #[error("the upstream refuses the login of {user:?}: {message}")]
    UpstreamAuth {
        /// The role.
        user: String,
        /// The server's words.
        message: String,
    },
    /// The database does not exist.
    #[error("database {database:?} does not exist on the upstream")]
    UpstreamNoDatabase {
        /// Its name.
        database: String,
    },
    /// TLS could not be established as the URI demands.
    #[error("TLS with the upstream failed: {reason}")]
    UpstreamTls {
        /// What failed and what to do.
        reason: String,
        /// The cause.
        #[source]
        source: Option<Cause>,
    },
    /// The role lacks a privilege.
    #[error("{what}")]
    UpstreamPrivilege {
        /// What is missing, and the statement that grants it.
        what: String,
    },
    /// A setting of the upstream does not allow log reading.
    #[error("{what}")]
    UpstreamPrerequisite {
        /// What is wrong, and what to change.
        what: String,
    },
    /// The upstream refused a statement in a way this program does not know.
    #[error("the upstream refused to {action}: {message} (SQLSTATE {sqlstate})")]
    UpstreamQuery {
        /// What was tried.
        action: String,
        /// The server's words.
        message: String,
        /// SQLSTATE.
        sqlstate: String,
    },
    /// A row does not fit a message of the upstream's protocol.
    #[error("{what}")]
    ValueTooLarge {
        /// Where, and what to do.
        what: String,
    },
    /// The upstream sent something that its protocol does not allow.
    #[error("the upstream broke its protocol: {what}")]
    UpstreamProtocol {
        /// What came.
        what: String,
    },
    /// A slot or publication of our name belongs to somebody else.
    #[error("{what}")]
    RetentionConflict {
        /// What exists, and what to do.
        what: String,
    },
    /// The log from the wanted position on is gone.
    #[error("{what}")]
    LogLost {
        /// What is missing, and what to do.
        what: String,
    },
    /// The server does not have the history that was read.
    #[error("{what}")]
    UpstreamDiverged {
        /// What differs, and what to do.
        what: String,
    },
    /// A newer owner reads this changefeed's log.
    #[error("a newer reader with epoch {current} has taken over")]
    Superseded {
        /// Its epoch.
        current: u64,
    },
    /// A wanted table cannot be replicated as it is.
    #[error("table {table} cannot be replicated: {reason}")]
    TableIneligible {
        /// Schema and name.
        table: String,
        /// Why, and what to do.
        reason: String,
    },
    /// A table changed its shape in a way that cannot be followed.
    #[error("the schema of table {table} changed: {change}")]
    SchemaChange {
        /// Schema and name.
        table: String,
        /// What changed.
        change: String,
    },
    /// Two schema changes at one commit ts, which names one of them: barriers and acknowledgements know no other name.
    #[error("an upstream gave two schema changes the commit ts {commit_ts}, and one of them would be lost")]
    SchemaChangesCollide {
        /// Where.
        commit_ts: Ts,
    },
    /// A table changed while it was copied.
    #[error("table {table} was created, altered or dropped while it was copied; the copy begins again")]
    CopyOutdated {
        /// Schema and name.
        table: String,
    },
    /// A row of a table that nobody registered.
    #[error("table {table} is not registered")]
    UnknownTable {
        /// Its id.
        table: TableId,
    },
    /// A local file of the event store failed.
    #[error("the event store cannot {action} {path}")]
    StoreIo {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A file of the event store does not hold what was written to it.
    #[error("{path} is damaged; check the disk below the data directory")]
    StoreDamaged {
        /// The file.
        path: String,
    },
    /// One transaction does not fit the event store's disk quota.
    #[error(
        "a transaction of more than {bytes} bytes does not fit the event store; raise event-store.disk-bytes \
         ({quota}) in the server's configuration"
    )]
    TransactionTooLarge {
        /// What had been read of it.
        bytes: u64,
        /// The quota.
        quota: u64,
    },
    /// Bytes of the event store, or of a peer, are not what was written.
    #[error("stored or received rows are malformed")]
    Malformed {
        /// What is wrong.
        #[source]
        source: BatchError,
    },
    /// A scan asked for a range that the store does not have any more, or not yet.
    #[error("the event store does not hold ({from}, {to}]")]
    OutOfRange {
        /// Exclusive start.
        from: Ts,
        /// Inclusive end.
        to: Ts,
    },
    /// A dispatcher is not, or no longer, registered.
    #[error("dispatcher {dispatcher} is not registered")]
    UnknownDispatcher {
        /// Its id.
        dispatcher: DispatcherId,
    },
    /// A dispatcher was given a part of a table that cannot be divided.
    #[error("table {table} cannot be divided into key ranges")]
    TableIndivisible {
        /// Schema and name.
        table: String,
        /// What is wrong with a row; otherwise the table has no key for it.
        #[source]
        source: Option<KeyError>,
    },
    /// An update moves a row to another key range, and the log does not hold all of the row.
    #[error(
        "an update of table {table} moves a row to another key range, but an out-of-line value that it leaves alone \
         is not in the log; the update is applied when the table is not divided. Set REPLICA IDENTITY FULL where keys \
         of such rows change often"
    )]
    SplitRowIncomplete {
        /// Schema and name.
        table: String,
    },
    /// The downstream did not take existing rows.
    #[error(transparent)]
    CopyTarget(#[from] event::CopyError),
    /// The component has been closed.
    #[error("{what} is closed")]
    Closed {
        /// Which.
        what: &'static str,
    },
}

impl Error {
    /// Stable code for the API.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Error::UpstreamUri { .. } => "CDC:ErrUpstreamURIInvalid",
            Error::FilterRule { .. } | Error::PublishRule { .. } => codes::FILTER_RULE_INVALID,
            Error::UpstreamUnreachable { .. } => "CDC:ErrUpstreamUnreachable",
            Error::UpstreamUnavailable { .. } => "CDC:ErrUpstreamUnavailable",
            Error::SlotHeld { .. } => codes::UPSTREAM_SLOT_HELD,
            Error::UpstreamAuth { .. } => "CDC:ErrUpstreamAuthFailed",
            Error::UpstreamNoDatabase { .. } => "CDC:ErrUpstreamDatabaseNotExists",
            Error::UpstreamTls { .. } => "CDC:ErrUpstreamTLSFailed",
            Error::UpstreamPrivilege { .. } => "CDC:ErrUpstreamPrivilege",
            Error::UpstreamPrerequisite { .. } => "CDC:ErrUpstreamPrerequisite",
            Error::UpstreamQuery { .. } => "CDC:ErrUpstreamQueryFailed",
            Error::ValueTooLarge { .. } => codes::UPSTREAM_VALUE_TOO_LARGE,
            Error::UpstreamProtocol { .. } => "CDC:ErrUpstreamProtocol",
            Error::RetentionConflict { .. } => "CDC:ErrUpstreamSlotConflict",
            Error::LogLost { .. } => "CDC:ErrStartTsBeforeGC",
            Error::UpstreamDiverged { .. } => codes::UPSTREAM_DIVERGED,
            Error::Superseded { .. } => "CDC:ErrReaderSuperseded",
            Error::TableIneligible { .. } => "CDC:ErrTableIneligible",
            Error::SchemaChange { .. } | Error::SchemaChangesCollide { .. } => {
                "CDC:ErrSchemaChangeUnsupported"
            }
            Error::CopyOutdated { .. } => codes::COPY_OUTDATED,
            Error::UnknownTable { .. } => "CDC:ErrTableNotRegistered",
            Error::StoreIo { .. } => "CDC:ErrEventStoreIO",
            Error::StoreDamaged { .. } => "CDC:ErrEventStoreDamaged",
            Error::TransactionTooLarge { .. } => "CDC:ErrTransactionTooLarge",
            Error::Malformed { .. } => "CDC:ErrEventMalformed",
            Error::OutOfRange { .. } => "CDC:ErrEventStoreOutOfRange",
            Error::UnknownDispatcher { .. } => "CDC:ErrDispatcherNotRegistered",
            Error::TableIndivisible { .. } => codes::TABLE_SPLIT_UNSUPPORTED,
            Error::SplitRowIncomplete { .. } => codes::SPLIT_ROW_INCOMPLETE,
            Error::CopyTarget(error) => error.code,
            Error::Closed { .. } => "CDC:ErrLogServiceClosed",
        }
    }

    /// Whether trying again can succeed without a person's help.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Error::CopyTarget(error) => error.retryable,
            Error::UpstreamUnreachable { .. }
            | Error::UpstreamUnavailable { .. }
            | Error::SlotHeld { .. }
            | Error::StoreDamaged { .. }
            | Error::OutOfRange { .. }
            | Error::UnknownDispatcher { .. }
            | Error::TableIndivisible { .. }
            | Error::SplitRowIncomplete { .. }
            | Error::CopyOutdated { .. }
            | Error::Closed { .. } => true,
            Error::UpstreamUri { .. }
            | Error::FilterRule { .. }
            | Error::PublishRule { .. }
            | Error::UpstreamAuth { .. }
            | Error::UpstreamNoDatabase { .. }
            | Error::UpstreamTls { .. }
            | Error::UpstreamPrivilege { .. }
            | Error::UpstreamPrerequisite { .. }
            | Error::UpstreamQuery { .. }
            | Error::ValueTooLarge { .. }
            | Error::UpstreamProtocol { .. }
            | Error::RetentionConflict { .. }
            | Error::LogLost { .. }
            | Error::UpstreamDiverged { .. }
            | Error::Superseded { .. }
            | Error::TableIneligible { .. }
            | Error::SchemaChange { .. }
            | Error::SchemaChangesCollide { .. }
            | Error::UnknownTable { .. }
            | Error::StoreIo { .. }
            | Error::TransactionTooLarge { .. }
            | Error::Malformed { .. } => false,
        }
    }

    /// The message and its causes in one line, for states that a person reads.
    #[must_use]
    pub fn chain(&self) -> String {
        heartbeatpb::error_chain(self)
    }

    /// A protocol error.
    pub(crate) fn protocol(what: impl fmt::Display) -> Self {
        Error::UpstreamProtocol { what: what.to_string() }
    }
}

impl From<BatchError> for Error {
    fn from(source: BatchError) -> Self {
        Error::Malformed { source }
    }
}
