//! The configuration of a changefeed: one schema for the TOML file, the JSON API and the stored document.
//!
//! A struct's keys are kebab-case; that is the TOML and the stored form. The JSON API uses the same schema
//! with its keys rewritten by [`api`], so the two cannot drift apart. `Debug` never shows a value of these
//! documents, because sink and upstream URIs hold credentials.

pub mod api;
mod changefeed;
mod duration;
mod error;
mod replica;
mod sink;
#[cfg(test)]
mod tests;
mod uri;
mod validate;
mod verify;

pub use changefeed::{
    ChangefeedInfo, ChangefeedState, ChangefeedStatusDoc, DispatcherManagerConfig, Progress, UpstreamInfo,
    is_valid_keyspace, is_valid_name,
};
pub use duration::HumanDuration;
pub use error::ConfigError;
pub use replica::{
    ConsistentConfig, DdlCapture, DdlConfig, DdlPolicy, EventFilter, FilterConfig, InitialCopyConfig,
    IntegrityConfig, MounterConfig, PerformanceMode, PublishRule, ReplicaConfig, SchedulerConfig,
    SourceConfig, SyncedStatusConfig,
};
pub use sink::{
    CloudStorageConfig, ColumnSelector, CsvConfig, DateSeparator, DebeziumConfig, DispatchRule, OpenConfig,
    Protocol, SinkConfig, TransactionAtomicity,
};
pub use uri::{INVALID_URI, SinkKind, Uri, mask_uri};
pub use verify::VerifyConfig;
