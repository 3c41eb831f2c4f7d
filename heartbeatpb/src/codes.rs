//! Error codes: what a person greps for and what a coordinator decides by.
//!
//! A code that is written anywhere in the workspace or its documentation is one of these; `cargo xtask tidy` compares.
//! The first words of each comment say what happened, the rest what a person can do; `cargo xtask errors` writes
//! `docs/errors.md` from them. Codes are never renamed: other programs and their dashboards know them, misspellings
//! included.

// --- the upstream

/// The upstream URI cannot be used; the message says which part. Update the changefeed.
pub const UPSTREAM_URI_INVALID: &str = "CDC:ErrUpstreamURIInvalid";
/// The upstream URI has an unknown scheme. Update the changefeed.
pub const UPSTREAM_INVALID: &str = "CDC:ErrUpstreamInvalid";
/// Nothing answers at the upstream's address, or the connection broke.
pub const UPSTREAM_UNREACHABLE: &str = "CDC:ErrUpstreamUnreachable";
/// The upstream starts, stops, or has no connection left.
pub const UPSTREAM_UNAVAILABLE: &str = "CDC:ErrUpstreamUnavailable";
/// The upstream refuses user or password, or no rule of its `pg_hba.conf` lets the role in.
pub const UPSTREAM_AUTH_FAILED: &str = "CDC:ErrUpstreamAuthFailed";
/// The database of the upstream URI does not exist.
pub const UPSTREAM_DATABASE_NOT_EXISTS: &str = "CDC:ErrUpstreamDatabaseNotExists";
/// TLS could not be established as `sslmode` demands; the message says which certificate is in the way.
pub const UPSTREAM_TLS_FAILED: &str = "CDC:ErrUpstreamTLSFailed";
/// The role lacks a privilege; the message holds the statement that grants it.
pub const UPSTREAM_PRIVILEGE: &str = "CDC:ErrUpstreamPrivilege";
/// A setting of the upstream does not allow its log to be read; the message names it.
pub const UPSTREAM_PREREQUISITE: &str = "CDC:ErrUpstreamPrerequisite";
/// The upstream refused a statement; the message holds its words.
pub const UPSTREAM_QUERY_FAILED: &str = "CDC:ErrUpstreamQueryFailed";
/// A row is larger than what the upstream can send, or than this server has memory for; the message says what to do.
pub const UPSTREAM_VALUE_TOO_LARGE: &str = "CDC:ErrUpstreamValueTooLarge";
/// The upstream sent what its protocol does not allow.
pub const UPSTREAM_PROTOCOL: &str = "CDC:ErrUpstreamProtocol";
/// A replication slot or publication of this changefeed's name belongs to somebody else or was altered.
pub const UPSTREAM_SLOT_CONFLICT: &str = "CDC:ErrUpstreamSlotConflict";
/// A former reader of the changefeed, on a node that hangs or is cut off, still has the replication slot, and the role
/// may not end it. Replication goes on when the server has noticed that it is gone.
pub const UPSTREAM_SLOT_HELD: &str = "CDC:ErrUpstreamSlotHeld";
/// The upstream no longer has the log from the checkpoint on. Remove the changefeed and create it anew.
pub const START_TS_BEFORE_GC: &str = "CDC:ErrStartTsBeforeGC";
/// The upstream was promoted, or put back to an older state, and does not have all changes that were read from its
/// predecessor, or nobody knows whether it has. The message says how far both agree and how to go on.
pub const UPSTREAM_DIVERGED: &str = "CDC:ErrUpstreamDiverged";
/// A table cannot be replicated as it is, for want of a key; give it one, or leave it out with
/// `ignore-ineligible-table`.
pub const TABLE_INELIGIBLE: &str = "CDC:ErrTableIneligible";
/// A table changed in a way that cannot be followed; the message names the table and the change.
pub const SCHEMA_CHANGE_UNSUPPORTED: &str = "CDC:ErrSchemaChangeUnsupported";
/// A table was created, altered or dropped while it was copied; the copy begins again.
pub const COPY_OUTDATED: &str = "CDC:ErrCopyOutdated";
/// A filter rule is wrong, or what `filter.publish` wants of a table cannot be published; the message says why. Update the
/// changefeed, or create it again.
pub const FILTER_RULE_INVALID: &str = "CDC:ErrFilterRuleInvalid";
/// The log reader did not start or ended for a reason of our own.
pub const LOG_READER_FAILED: &str = "CDC:ErrLogReaderFailed";
/// A newer maintainer of the changefeed reads the log; the old one ends.
pub const READER_SUPERSEDED: &str = "CDC:ErrReaderSuperseded";
/// A part of the node's log service has been closed, as when the node stops.
pub const LOG_SERVICE_CLOSED: &str = "CDC:ErrLogServiceClosed";
/// The log reader met rows of a table that it does not know.
pub const TABLE_NOT_REGISTERED: &str = "CDC:ErrTableNotRegistered";
/// A dispatcher asked the event service before it was known there; it registers again.
pub const DISPATCHER_NOT_REGISTERED: &str = "CDC:ErrDispatcherNotRegistered";
/// The data directory cannot be read or written; the message names the file.
pub const EVENT_STORE_IO: &str = "CDC:ErrEventStoreIO";
/// A file of the event store is damaged; the rows are read from the upstream again. Check the disk.
pub const EVENT_STORE_DAMAGED: &str = "CDC:ErrEventStoreDamaged";
/// One transaction is larger than the event store's disk quota. Raise `event-store.disk-bytes`, restart the server,
/// and resume the changefeed.
pub const TRANSACTION_TOO_LARGE: &str = "CDC:ErrTransactionTooLarge";
/// The event store does not hold what a dispatcher asked for; it registers again.
pub const EVENT_STORE_OUT_OF_RANGE: &str = "CDC:ErrEventStoreOutOfRange";
/// Rows from the event store or from another node are damaged; they are read from the upstream again.
pub const EVENT_MALFORMED: &str = "CDC:ErrEventMalformed";

// --- the downstream

/// The sink URI or the sink's configuration is wrong; the message says which part.
pub const SINK_URI_INVALID: &str = "CDC:ErrSinkURIInvalid";
/// The sink does not know the protocol; the message lists those that it knows.
pub const SINK_UNKNOWN_PROTOCOL: &str = "CDC:ErrSinkUnknownProtocol";
/// The downstream does not answer, a connection broke, or it is short of memory, disk or connections.
pub const SINK_UNAVAILABLE: &str = "CDC:ErrSinkUnavailable";
/// A sink may not write any more: its tables were given to other nodes, or a newer sink of its node has taken its
/// place. It stops for good; its node begins anew, or the changefeed starts again, by itself.
pub const SINK_FENCED: &str = "CDC:ErrSinkFenced";
/// A transaction of a lost node does not end, and its tables cannot start elsewhere until it has. Let the sink's user
/// end sessions (`GRANT pg_signal_backend`), or end the session by hand.
pub const SINK_FENCE_BLOCKED: &str = "CDC:ErrSinkFenceBlocked";
/// A newer maintainer has taken the downstream over; the old one ends. After the metadata store was restored from an
/// old copy: delete the changefeed's rows of the table `fences` in the sink's schema.
pub const SINK_FENCE_SUPERSEDED: &str = "CDC:ErrSinkFenceSuperseded";
/// The sink was closed, as when its node stops.
pub const SINK_CLOSED: &str = "CDC:ErrSinkClosed";
/// A task of the sink ended for a reason of our own.
pub const SINK_INTERNAL: &str = "CDC:ErrSinkInternal";
/// The downstream refuses user or password.
pub const SINK_AUTH: &str = "CDC:ErrSinkAuth";
/// The database of the sink URI does not exist.
pub const SINK_DATABASE_MISSING: &str = "CDC:ErrSinkDatabaseMissing";
/// The downstream's user lacks a privilege; the message names the statement that grants it.
pub const SINK_PERMISSION: &str = "CDC:ErrSinkPermission";
/// The target database is a standby; it can be written once it is promoted.
pub const SINK_READ_ONLY: &str = "CDC:ErrSinkReadOnly";
/// The target database is older than what is supported.
pub const SINK_VERSION: &str = "CDC:ErrSinkVersion";
/// A statement does not fit the target's tables, as after a column was dropped there.
pub const SINK_SCHEMA: &str = "CDC:ErrSinkSchema";
/// The target's column cannot hold a value; the message names the column.
pub const SINK_DATA: &str = "CDC:ErrSinkData";
/// A row violates a constraint of the target, such as a foreign key whose row comes from another table.
pub const SINK_CONSTRAINT: &str = "CDC:ErrSinkConstraint";
/// A row violates a unique constraint of the target; rows were written there by somebody else.
pub const SINK_CONFLICT: &str = "CDC:ErrSinkConflict";
/// The target refused a statement; the message holds its words.
pub const SINK_SQL: &str = "CDC:ErrSinkSQL";
/// The progress in the target is not what this changefeed left there; it is read again.
pub const SINK_PROGRESS: &str = "CDC:ErrSinkProgress";
/// A change does not carry what finds its row; the table needs a key, or `REPLICA IDENTITY FULL` with
/// `force-replicate`.
pub const SINK_ROW_INCOMPLETE: &str = "CDC:ErrSinkRowIncomplete";
/// A target table does not exist and `create-tables` is off.
pub const TARGET_TABLE_MISSING: &str = "CDC:ErrTargetTableMissing";
/// What has the name of a target table is no table.
pub const TARGET_NOT_TABLE: &str = "CDC:ErrTargetNotTable";
/// A target table lacks a column; the message holds the statement that adds it.
pub const TARGET_COLUMN_MISSING: &str = "CDC:ErrTargetColumnMissing";
/// A target table has a further column that must have a value.
pub const TARGET_COLUMN_EXTRA: &str = "CDC:ErrTargetColumnExtra";
/// A column is generated in the target and plain in the source, or the other way round.
pub const TARGET_COLUMN_GENERATED: &str = "CDC:ErrTargetColumnGenerated";
/// A target table has no key by which rows are found; the message holds the statement that adds it.
pub const TARGET_KEY_MISSING: &str = "CDC:ErrTargetKeyMissing";
/// A target table has rows already; `on-existing-rows` says what to do with them.
pub const TARGET_NOT_EMPTY: &str = "CDC:ErrTargetNotEmpty";
/// A row to change does not exist in the target; somebody else removed it there.
pub const TARGET_ROW_MISSING: &str = "CDC:ErrTargetRowMissing";
/// A part of a table was to be replicated that cannot be divided into key ranges; see `docs/postgresql.md`.
pub const TABLE_SPLIT_UNSUPPORTED: &str = "CDC:ErrTableSplitUnsupported";
/// An update moves a row to another key range, and the log lacks an out-of-line value of it. The changefeed starts again
/// with the table undivided, which applies the update; where the ranges were copied at different times, it copies the table
/// again. `REPLICA IDENTITY FULL` avoids it.
pub const SPLIT_ROW_INCOMPLETE: &str = "CDC:ErrSplitRowIncomplete";
/// A table that is divided into key ranges cannot be after a schema change; the message says what to set.
pub const TABLE_AFTER_NOT_SPLITABLE: &str = "CDC:ErrTableAfterNotSplitable";
/// A schema change cannot be carried out in the target; the message names it.
pub const DDL_UNSUPPORTED: &str = "CDC:ErrDDLUnsupported";
/// The sink has no sync points; switch them off.
pub const SYNC_POINT_UNSUPPORTED: &str = "CDC:ErrSyncPointUnsupported";
/// A row cannot be written in the chosen format; the message names table and column.
pub const ENCODE_FAILED: &str = "CDC:ErrEncodeFailed";
/// The configuration of a file sink is wrong; the message says which part.
pub const STORAGE_SINK_INVALID_CONFIG: &str = "CDC:ErrStorageSinkInvalidConfig";
/// The directory of a file sink cannot be written by the server's user.
pub const STORAGE_SINK_PERMISSION: &str = "CDC:ErrStorageSinkPermission";
/// The directory of a file sink holds something where a file or directory should be.
pub const STORAGE_SINK_LAYOUT: &str = "CDC:ErrStorageSinkLayout";
/// A schema file in the directory of a file sink is damaged; restore it or choose an empty directory.
pub const STORAGE_SINK_SCHEMA_FILE: &str = "CDC:ErrStorageSinkSchemaFile";
/// The configuration of a MySQL sink is wrong.
pub const MYSQL_INVALID_CONFIG: &str = "CDC:ErrMySQLInvalidConfig";
/// A MySQL downstream cannot be reached.
pub const MYSQL_CONNECTION_ERROR: &str = "CDC:ErrMySQLConnectionError";
/// An active-active table has an index that its mode does not allow.
pub const ACTIVE_ACTIVE_TSO_INDEX_INCOMPATIBLE: &str = "CDC:ErrActiveActiveTSOIndexIncompatible";

// --- a changefeed's own parts

/// The changefeed's configuration cannot be used; the message names the key.
pub const INVALID_REPLICA_CONFIG: &str = "CDC:ErrInvalidReplicaConfig";
/// A dispatcher cannot go on for a reason of our own; the log of its node says more.
pub const DISPATCHER_FAILED: &str = "CDC:ErrDispatcherFailed";
/// The dispatcher that carries out schema changes did not start.
pub const CHANGEFEED_INIT_TABLE_TRIGGER_DISPATCHER_FAILED: &str =
    "CDC:ErrChangefeedInitTableTriggerDispatcherFailed";
/// A node closed its dispatchers, as when it stops or lost its place in the cluster.
pub const DISPATCHER_MANAGER_WRITE_PATH_CLOSED: &str = "CDC:ErrDispatcherManagerWritePathClosed";
/// A maintainer ended for a reason of our own; it is started again.
pub const MAINTAINER_FAILED: &str = "CDC:ErrMaintainerFailed";

// --- the cluster and its API

/// A request cannot be understood; the message names the parameter.
pub const API_INVALID_PARAM: &str = "CDC:ErrAPIInvalidParam";
/// There is nothing at this path.
pub const API_NOT_FOUND: &str = "CDC:ErrAPINotFound";
/// There is nothing of that kind here; the message says what there is instead.
pub const API_GONE: &str = "CDC:ErrAPIGone";
/// This server cannot answer that; the message says what answers instead.
pub const API_NOT_SUPPORTED: &str = "CDC:ErrAPINotSupported";
/// Somebody else is being answered the same; ask again when that is done.
pub const API_TOO_MANY: &str = "CDC:ErrAPITooManyRequests";
/// The request needs a user, and has no credentials of HTTP Basic.
pub const CREDENTIAL_NOT_FOUND: &str = "CDC:ErrCredentialNotFound";
/// The user or the password is wrong, the user is not allowed, or passwords cannot be verified now.
pub const UNAUTHORIZED: &str = "CDC:ErrUnauthorized";
/// The node made a mistake; its log says which.
pub const INTERNAL: &str = "CDC:ErrInternal";
/// The command line was given a position to resume from that is none.
pub const CLI_INVALID_CHECKPOINT_TS: &str = "CDC:ErrCliInvalidCheckpointTs";
/// There is no changefeed of this name.
pub const CHANGEFEED_NOT_EXISTS: &str = "CDC:ErrChangeFeedNotExists";
/// A changefeed of this name exists.
pub const CHANGEFEED_ALREADY_EXISTS: &str = "CDC:ErrChangeFeedAlreadyExists";
/// A changefeed of this name is being created and is not stored yet; ask again in a moment.
pub const CHANGEFEED_CREATION_UNFINISHED: &str = "CDC:ErrChangeFeedCreationUnfinished";
/// A changefeed of this name is being removed; ask again in a moment.
pub const CHANGEFEED_DELETION_UNFINISHED: &str = "CDC:ErrChangeFeedDeletionUnfinished";
/// A changefeed is updated while it is stopped or failed, and keeps its start and identity.
pub const CHANGEFEED_UPDATE_REFUSED: &str = "CDC:ErrChangefeedUpdateRefused";
/// The target position is not behind the start position.
pub const TARGET_TS_BEFORE_START_TS: &str = "CDC:ErrTargetTsBeforeStartTs";
/// Source and target are one database: the changes would come round again.
pub const SAME_UPSTREAM_DOWNSTREAM: &str = "CDC:ErrSameUpstreamDownstream";
/// The changefeed has no maintainer, or it is on another node; the message says where.
pub const MAINTAINER_NOT_FOUND: &str = "CDC:ErrMaintainerNotFounded";
/// There is no such node.
pub const CAPTURE_NOT_EXIST: &str = "CDC:ErrCaptureNotExist";
/// The coordinator is starting or stopping; ask again in a moment.
pub const CAPTURE_NOT_INITIALIZED: &str = "CDC:ErrCaptureNotInitialized";
/// No coordinator is elected; ask again in a moment.
pub const OWNER_NOT_FOUND: &str = "CDC:ErrOwnerNotFound";
/// The coordinator is not ready; ask again in a moment.
pub const CLUSTER_IS_UNHEALTHY: &str = "CDC:ErrClusterIsUnhealthy";
/// The node is starting; ask again in a moment.
pub const NOT_INITIALIZED: &str = "CDC:ErrNotInitialized";
/// The node is starting; ask again in a moment.
pub const SERVER_IS_NOT_READY: &str = "CDC:ErrServerIsNotReady";
/// The node is not the coordinator any more; ask again.
pub const NOT_OWNER: &str = "CDC:ErrNotOwner";
/// A request to place something was refused; the message says why.
pub const SCHEDULER_REQUEST_FAILED: &str = "CDC:ErrSchedulerRequestFailed";
/// The metadata store failed or was written by somebody else at the same time.
pub const META_OP_FAILED: &str = "CDC:ErrMetaOpFailed";
/// A transaction of the metadata store has too many operations.
pub const ETCD_TXN_OPS_EXCEED: &str = "CDC:ErrEtcdTxnOpsExceed";
/// A transaction of the metadata store is too large.
pub const ETCD_TXN_SIZE_EXCEED: &str = "CDC:ErrEtcdTxnSizeExceed";
/// The session with the metadata store has ended; the node leaves the cluster.
pub const ETCD_SESSION_DONE: &str = "CDC:ErrEtcdSessionDone";
/// The node cannot prove any more that it may write: it has stopped to, and ends.
pub const CAPTURE_SUICIDE: &str = "CDC:ErrCaptureSuicide";
/// What holds the upstream's log cannot be made or dropped; the message says why.
pub const UPDATE_SERVICE_SAFEPOINT_FAILED: &str = "CDC:ErrUpdateServiceSafepointFailed";

// --- nodes of other programs only

/// The checkpoint is too old for the upstream to hold its log.
pub const GC_TTL_EXCEEDED: &str = "CDC:ErrGCTTLExceeded";
/// The upstream no longer has the rows of the start position.
pub const SNAPSHOT_LOST_BY_GC: &str = "CDC:ErrSnapshotLostByGC";
/// An expression of a filter names a column that does not exist.
pub const EXPRESSION_COLUMN_NOT_FOUND: &str = "CDC:ErrExpressionColumnNotFound";
/// An expression of a filter is wrong.
pub const INVALID_FILTER_EXPRESSION: &str = "CDC:ErrInvalidFilterExpression";
/// The table shapes of the start position are gone.
pub const SCHEMA_SNAPSHOT_NOT_FOUND: &str = "CDC:ErrSchemaSnapshotNotFound";
/// A table was renamed into or out of what the filter takes.
pub const SYNC_RENAME_TABLE_FAILED: &str = "CDC:ErrSyncRenameTableFailed";
/// The reporting node says that trying again cannot help.
pub const CHANGEFEED_UNRETRYABLE: &str = "CDC:ErrChangefeedUnretryable";
/// A checksum of a row is wrong.
pub const CORRUPTED_DATA_MUTATION: &str = "CDC:ErrCorruptedDataMutation";
/// A column selector names what is not there.
pub const COLUMN_SELECTOR_FAILED: &str = "CDC:ErrColumnSelectorFailed";
/// A table routing rule is wrong.
pub const INVALID_TABLE_ROUTING_RULE: &str = "CDC:ErrInvalidTableRoutingRule";
/// A table routing rule cannot be applied.
pub const TABLE_ROUTING_FAILED: &str = "CDC:ErrTableRoutingFailed";
/// The configuration of a Kafka sink is wrong.
pub const KAFKA_INVALID_CONFIG: &str = "CDC:ErrKafkaInvalidConfig";
/// Two tables are routed to one.
pub const TABLE_ROUTE_CONFLICT: &str = "CDC:ErrTableRouteConflict";

/// Codes after which starting a changefeed again cannot help until a person has put something right. Every other code
/// is tried again with growing pauses.
pub const NEEDS_PERSON: &[&str] = &[
    UPSTREAM_URI_INVALID,
    UPSTREAM_INVALID,
    UPSTREAM_AUTH_FAILED,
    UPSTREAM_DATABASE_NOT_EXISTS,
    UPSTREAM_TLS_FAILED,
    UPSTREAM_PRIVILEGE,
    UPSTREAM_PREREQUISITE,
    UPSTREAM_SLOT_CONFLICT,
    START_TS_BEFORE_GC,
    UPSTREAM_DIVERGED,
    TABLE_INELIGIBLE,
    SCHEMA_CHANGE_UNSUPPORTED,
    FILTER_RULE_INVALID,
    TRANSACTION_TOO_LARGE,
    UPSTREAM_VALUE_TOO_LARGE,
    SINK_URI_INVALID,
    SINK_UNKNOWN_PROTOCOL,
    SINK_AUTH,
    SINK_DATABASE_MISSING,
    SINK_PERMISSION,
    SINK_VERSION,
    SINK_SCHEMA,
    SINK_DATA,
    SINK_CONFLICT,
    SINK_ROW_INCOMPLETE,
    TARGET_TABLE_MISSING,
    TARGET_NOT_TABLE,
    TARGET_COLUMN_MISSING,
    TARGET_COLUMN_EXTRA,
    TARGET_COLUMN_GENERATED,
    TARGET_KEY_MISSING,
    TARGET_NOT_EMPTY,
    TARGET_ROW_MISSING,
    TABLE_AFTER_NOT_SPLITABLE,
    DDL_UNSUPPORTED,
    SYNC_POINT_UNSUPPORTED,
    ENCODE_FAILED,
    STORAGE_SINK_INVALID_CONFIG,
    STORAGE_SINK_PERMISSION,
    STORAGE_SINK_LAYOUT,
    STORAGE_SINK_SCHEMA_FILE,
    MYSQL_INVALID_CONFIG,
    ACTIVE_ACTIVE_TSO_INDEX_INCOMPATIBLE,
    INVALID_REPLICA_CONFIG,
    DISPATCHER_FAILED,
    GC_TTL_EXCEEDED,
    SNAPSHOT_LOST_BY_GC,
    EXPRESSION_COLUMN_NOT_FOUND,
    INVALID_FILTER_EXPRESSION,
    SCHEMA_SNAPSHOT_NOT_FOUND,
    SYNC_RENAME_TABLE_FAILED,
    CHANGEFEED_UNRETRYABLE,
    CORRUPTED_DATA_MUTATION,
    COLUMN_SELECTOR_FAILED,
    INVALID_TABLE_ROUTING_RULE,
    TABLE_ROUTING_FAILED,
    KAFKA_INVALID_CONFIG,
    TABLE_ROUTE_CONFLICT,
];

/// Whether starting a changefeed again cannot help against this code.
#[must_use]
pub fn needs_person(code: &str) -> bool {
    NEEDS_PERSON.contains(&code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_upstream_has_lost_and_what_is_written_wrongly_needs_a_person_and_a_silent_server_does_not() {
        for code in [START_TS_BEFORE_GC, SINK_URI_INVALID, TABLE_AFTER_NOT_SPLITABLE] {
            assert!(needs_person(code), "{code}");
        }
        for code in [UPSTREAM_UNREACHABLE, SINK_UNAVAILABLE, SINK_READ_ONLY, EVENT_MALFORMED, "CDC:ErrX", ""]
        {
            assert!(!needs_person(code), "{code}");
        }
        assert!(!needs_person("CDC:ErrSinkURIInvalid2"), "a code is not a prefix");
        let mut names = NEEDS_PERSON.to_vec();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), NEEDS_PERSON.len(), "each is listed once");
    }
}
