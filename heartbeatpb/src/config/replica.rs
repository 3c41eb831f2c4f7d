//! The replica configuration: everything about a changefeed that is neither its position nor its address.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{ConfigError, HumanDuration, SinkConfig, VerifyConfig, api};

/// How a changefeed replicates (api-cli-config §11). Missing keys take their defaults.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
#[expect(clippy::struct_excessive_bools, reason = "each is one key of the file")]
pub struct ReplicaConfig {
    /// What to prefer when throughput and latency disagree.
    pub performance_mode: PerformanceMode,
    /// Bytes of events in flight per node; 0 means the default.
    pub memory_quota: u64,
    /// Events handed over at once; 0 lets the sink choose.
    pub event_collector_batch_count: u32,
    /// Bytes handed over at once; 0 lets the sink choose.
    pub event_collector_batch_bytes: u64,
    /// Whether filter rules distinguish upper and lower case.
    pub case_sensitive: bool,
    /// Replicate tables that have no key too.
    pub force_replicate: bool,
    /// Leave out tables that have no key instead of refusing the changefeed.
    pub ignore_ineligible_table: bool,
    /// Refuse a start position that the upstream may no longer have.
    pub check_gc_safe_point: bool,
    /// Write sync points downstream.
    pub enable_sync_point: bool,
    /// Time between sync points.
    pub sync_point_interval: HumanDuration,
    /// How long sync points are kept.
    pub sync_point_retention: HumanDuration,
    /// Collect statistics for each table.
    pub enable_table_monitor: bool,
    /// Leave out what was itself replicated here.
    pub bdr_mode: bool,
    /// How long an erroring changefeed may stand still before it fails.
    pub changefeed_error_stuck_duration: HumanDuration,
    /// Which tables and events.
    pub filter: FilterConfig,
    /// Decoding.
    pub mounter: MounterConfig,
    /// How the events are written.
    pub sink: SinkConfig,
    /// How tables are spread over nodes.
    pub scheduler: SchedulerConfig,
    /// Row checksums.
    pub integrity: IntegrityConfig,
    /// Redo log.
    pub consistent: ConsistentConfig,
    /// When a changefeed counts as synced.
    pub synced_status: SyncedStatusConfig,
    /// How the upstream is read.
    pub source: SourceConfig,
    /// Copy of the rows that exist when the changefeed is created.
    pub initial_copy: InitialCopyConfig,
    /// Changes of the schema.
    pub ddl: DdlConfig,
    /// Comparisons of both ends.
    pub verify: VerifyConfig,
}

/// What to prefer when throughput and latency disagree.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PerformanceMode {
    /// Larger batches.
    #[default]
    Throughput,
    /// Smaller batches.
    LowLatency,
}

/// `[filter]`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct FilterConfig {
    /// Table filter rules; the last rule that matches wins.
    pub rules: Vec<String>,
    /// Transactions to leave out, by their start position.
    pub ignore_txn_start_ts: Vec<u64>,
    /// Events to leave out.
    pub event_filters: Vec<EventFilter>,
    /// What of some tables leaves the source; the first entry that fits a table holds for it.
    pub publish: Vec<PublishRule>,
}

/// One `[[filter.publish]]`: what of some tables leaves the source. `Debug` hides the condition.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct PublishRule {
    /// Tables it holds for, as table filter rules.
    pub matcher: Vec<String>,
    /// Only these columns; all when empty.
    pub columns: Vec<String>,
    /// Only rows for which this SQL expression is true; all when empty.
    #[serde(rename = "where")]
    pub condition: String,
}

/// One `[[filter.event-filters]]`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct EventFilter {
    /// Tables it applies to, as table filter rules.
    pub matcher: Vec<String>,
    /// Kinds of events, such as `delete` or `truncate table`.
    pub ignore_event: Vec<String>,
    /// Patterns of DDL texts.
    #[serde(alias = "ignore_sql")]
    pub ignore_sql: Vec<String>,
    /// Condition on a new row.
    pub ignore_insert_value_expr: String,
    /// Condition on the new image of a changed row.
    pub ignore_update_new_value_expr: String,
    /// Condition on the old image of a changed row.
    pub ignore_update_old_value_expr: String,
    /// Condition on a deleted row.
    pub ignore_delete_value_expr: String,
    /// Leave out updates that change nothing but these columns.
    pub ignore_update_only_columns: Vec<String>,
}

/// `[mounter]`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct MounterConfig {
    /// Decoding tasks.
    pub worker_num: u32,
}

/// `[scheduler]`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct SchedulerConfig {
    /// Split big tables over nodes. The other keys matter only then.
    pub enable_table_across_nodes: bool,
    /// Size estimate above which a table is split.
    pub region_threshold: i64,
    /// Size estimate of one span.
    pub region_count_per_span: i64,
    /// How often the size estimate is renewed.
    pub region_count_refresh_interval: HumanDuration,
    /// Bytes per second above which a table is split; 0 switches it off.
    pub write_key_threshold: i64,
    /// Changes of placement in flight per node.
    pub scheduling_task_count_per_node: i64,
    /// Split only tables for which it is safe.
    pub enable_splittable_check: bool,
    /// Split tables although the check says no.
    pub force_split: bool,
    /// Rounds of imbalance before something moves.
    pub balance_score_threshold: i64,
    /// A node below this share of the average is idle.
    pub min_traffic_percentage: f64,
    /// A node above this share of the average is busy.
    pub max_traffic_percentage: f64,
}

/// `[integrity]`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct IntegrityConfig {
    /// `none` or `correctness`.
    pub integrity_check_level: String,
    /// `warn` or `error`.
    pub corruption_handle_level: String,
}

/// `[consistent]`: the redo log.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct ConsistentConfig {
    /// `none` or `eventual`.
    pub level: String,
    /// Where the log lives.
    pub storage: String,
}

/// `[synced-status]`, in seconds.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct SyncedStatusConfig {
    /// Silence after which a changefeed may count as synced.
    pub synced_check_interval: u64,
    /// Largest lag of a synced changefeed.
    pub checkpoint_interval: u64,
}

/// `[source]`: how the upstream is read.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct SourceConfig {
    /// Whether a PostgreSQL upstream sends large transactions before they end. They wait for their ends on the disk of the
    /// node that reads.
    pub streaming: bool,
}

impl Default for SourceConfig {
    fn default() -> Self {
        Self { streaming: true }
    }
}

/// `[initial-copy]`: the rows that exist when the changefeed is created.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct InitialCopyConfig {
    /// Copy them before streaming.
    pub enabled: bool,
    /// Tables or parts of tables copied at the same time: connections to the upstream, and as many to the downstream.
    pub parallel: u32,
    /// About how large a part of a table is, in bytes: what is copied in one piece, and again when it is cut off.
    pub part_bytes: u64,
}

/// `[ddl]`: changes of the schema.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct DdlConfig {
    /// Whether a PostgreSQL upstream gets event triggers that write schema changes into its log. Decided when the
    /// changefeed is created.
    pub capture: DdlCapture,
    /// `CREATE SCHEMA`.
    pub create_schema: DdlPolicy,
    /// `DROP SCHEMA`.
    pub drop_schema: DdlPolicy,
    /// `CREATE TABLE`.
    pub create_table: DdlPolicy,
    /// `DROP TABLE`.
    pub drop_table: DdlPolicy,
    /// A table gets another name or schema.
    pub rename_table: DdlPolicy,
    /// Columns, constraints and indexes of a table.
    pub alter_table: DdlPolicy,
    /// `TRUNCATE`, of a table or of a partition.
    pub truncate_table: DdlPolicy,
    /// Partitions, views, sequences, types, other names of schemas.
    pub other: DdlPolicy,
    /// Carry the values of sequences to a database that has these sequences too.
    pub sequence_values: bool,
    /// How often the upstream is asked for them.
    pub sequence_interval: HumanDuration,
    /// How many steps a sequence is ahead downstream, so that after a fail-over it gives no value twice. Zero carries the
    /// values as they are.
    pub sequence_ahead: u32,
}

impl Default for DdlConfig {
    fn default() -> Self {
        Self {
            capture: DdlCapture::default(),
            create_schema: DdlPolicy::default(),
            drop_schema: DdlPolicy::default(),
            create_table: DdlPolicy::default(),
            drop_table: DdlPolicy::default(),
            rename_table: DdlPolicy::default(),
            alter_table: DdlPolicy::default(),
            truncate_table: DdlPolicy::default(),
            other: DdlPolicy::default(),
            sequence_values: true,
            sequence_interval: HumanDuration::from_secs(10),
            sequence_ahead: 1000,
        }
    }
}

/// Whether the upstream's schema changes are captured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DdlCapture {
    /// Where the role may install it.
    #[default]
    Auto,
    /// Always; a role that may not is refused.
    On,
    /// Never.
    Off,
}

/// What is done about a kind of schema change.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DdlPolicy {
    /// It is executed downstream.
    #[default]
    Apply,
    /// It is followed, but not executed downstream: somebody else does that.
    Ignore,
    /// The changefeed fails in front of it.
    Fail,
}

impl ReplicaConfig {
    /// Bytes in flight when nothing else is said.
    pub const DEFAULT_MEMORY_QUOTA: u64 = 1 << 30;

    /// Reads a TOML file strictly.
    ///
    /// # Errors
    /// When the text is not TOML, a value has the wrong type, or there are keys that nobody knows; all of
    /// those are listed.
    pub fn from_toml(text: &str) -> Result<Self, ConfigError> {
        let value: serde_json::Value = toml::from_str(text)
            .map_err(|e| ConfigError::Syntax(e.message().to_owned() + &line_of(text, e.span())))?;
        let config: Self = toml::from_str(text)
            .map_err(|e| ConfigError::Syntax(e.message().to_owned() + &line_of(text, e.span())))?;
        let unknown = api::unknown_keys(&value, &config.to_value());
        if unknown.is_empty() { Ok(config) } else { Err(ConfigError::UnknownKeys(unknown)) }
    }

    /// Reads the snake_case form of the JSON API over the defaults, and lists keys that nobody knows.
    /// An absent or null key takes its default.
    ///
    /// # Errors
    /// When a value has the wrong type.
    pub fn from_api(value: serde_json::Value) -> Result<(Self, Vec<String>), ConfigError> {
        let value = api::to_stored_keys(value)?;
        let config: Self =
            serde_json::from_value(value.clone()).map_err(|e| ConfigError::Syntax(e.to_string()))?;
        let unknown = api::unknown_keys(&value, &config.to_value());
        Ok((config, unknown))
    }

    /// The snake_case form of the JSON API, with secrets shown as `******` and durations in nanoseconds.
    #[must_use]
    pub fn to_api(&self) -> serde_json::Value {
        let mut value = self.to_value();
        api::mask_secrets(&mut value);
        let mut value = api::to_api_keys(value);
        api::number_durations(&mut value);
        value
    }

    /// The stored form.
    #[must_use]
    pub fn to_value(&self) -> serde_json::Value {
        serde_json::to_value(self).expect("the schema has string keys and finite defaults only")
    }

    /// Takes from `stored` every secret that the API form hid.
    #[must_use]
    pub fn keep_secrets_of(&self, stored: &Self) -> Self {
        let mut value = self.to_value();
        api::restore_secrets(&mut value, &stored.to_value());
        serde_json::from_value(value).unwrap_or_else(|_| self.clone())
    }
}

fn line_of(text: &str, span: Option<std::ops::Range<usize>>) -> String {
    span.and_then(|span| text.get(..span.start))
        .map_or_else(String::new, |before| format!(" (line {})", before.matches('\n').count() + 1))
}

impl fmt::Debug for ReplicaConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplicaConfig").finish_non_exhaustive()
    }
}

impl fmt::Debug for PublishRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PublishRule")
            .field("matcher", &self.matcher)
            .field("columns", &self.columns)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for ConsistentConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConsistentConfig").field("level", &self.level).finish_non_exhaustive()
    }
}

impl Default for ReplicaConfig {
    fn default() -> Self {
        Self {
            performance_mode: PerformanceMode::Throughput,
            memory_quota: Self::DEFAULT_MEMORY_QUOTA,
            event_collector_batch_count: 0,
            event_collector_batch_bytes: 0,
            case_sensitive: false,
            force_replicate: false,
            ignore_ineligible_table: false,
            check_gc_safe_point: true,
            enable_sync_point: false,
            sync_point_interval: HumanDuration::from_secs(600),
            sync_point_retention: HumanDuration::from_secs(86_400),
            enable_table_monitor: false,
            bdr_mode: false,
            changefeed_error_stuck_duration: HumanDuration::from_secs(1800),
            filter: FilterConfig::default(),
            mounter: MounterConfig::default(),
            sink: SinkConfig::default(),
            scheduler: SchedulerConfig::default(),
            integrity: IntegrityConfig::default(),
            consistent: ConsistentConfig::default(),
            synced_status: SyncedStatusConfig::default(),
            source: SourceConfig::default(),
            initial_copy: InitialCopyConfig::default(),
            ddl: DdlConfig::default(),
            verify: VerifyConfig::default(),
        }
    }
}

impl Default for FilterConfig {
    fn default() -> Self {
        Self {
            rules: vec!["*.*".to_owned()],
            ignore_txn_start_ts: Vec::new(),
            event_filters: Vec::new(),
            publish: Vec::new(),
        }
    }
}

impl Default for MounterConfig {
    fn default() -> Self {
        Self { worker_num: 16 }
    }
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            enable_table_across_nodes: false,
            region_threshold: 10_000,
            region_count_per_span: 100,
            region_count_refresh_interval: HumanDuration::from_secs(300),
            write_key_threshold: 0,
            scheduling_task_count_per_node: 20,
            enable_splittable_check: false,
            force_split: false,
            balance_score_threshold: 20,
            min_traffic_percentage: 0.8,
            max_traffic_percentage: 1.25,
        }
    }
}

impl Default for IntegrityConfig {
    fn default() -> Self {
        Self { integrity_check_level: "none".to_owned(), corruption_handle_level: "warn".to_owned() }
    }
}

impl Default for ConsistentConfig {
    fn default() -> Self {
        Self { level: "none".to_owned(), storage: String::new() }
    }
}

impl Default for SyncedStatusConfig {
    fn default() -> Self {
        Self { synced_check_interval: 300, checkpoint_interval: 15 }
    }
}

impl Default for InitialCopyConfig {
    fn default() -> Self {
        // Four connections fill one sink without starving the upstream of connections.
        // A part of so many bytes takes seconds: long enough to pay for its beginning, short enough to lose.
        Self { enabled: true, parallel: 4, part_bytes: 64 << 20 }
    }
}
