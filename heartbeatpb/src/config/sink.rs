//! `[sink]`: how events are written downstream.

use serde::{Deserialize, Serialize};

use super::{ConfigError, HumanDuration};

/// `[sink]` (api-cli-config §11.3).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
#[expect(clippy::struct_excessive_bools, reason = "each is one key of the file")]
pub struct SinkConfig {
    /// How much of a transaction arrives at once; `None` lets the sink choose.
    pub transaction_atomicity: Option<TransactionAtomicity>,
    /// Encoding of files and messages; see [`SinkConfig::protocol`]. Empty when the sink needs none.
    pub protocol: String,
    /// Where the events of a table go.
    pub dispatchers: Vec<DispatchRule>,
    /// Which columns are sent.
    pub column_selectors: Vec<ColumnSelector>,
    /// Encoders that work at the same time.
    pub encoder_concurrency: u32,
    /// Ends a line in a file.
    pub terminator: String,
    /// Directory level by date.
    pub date_separator: DateSeparator,
    /// Directory level by partition.
    pub enable_partition_separator: bool,
    /// Digits of the number in a file name.
    pub file_index_digit: u32,
    /// Leave unchanged columns out of updates.
    pub only_output_updated_columns: bool,
    /// Deletes carry the key only.
    pub delete_only_output_handle_key_columns: bool,
    /// Imitate the official encoding in details.
    pub content_compatible: bool,
    /// Write each change so that it may be repeated.
    pub safe_mode: bool,
    /// Debezium messages without their schema part.
    pub debezium_disable_schema: bool,
    /// Details of csv.
    pub csv: CsvConfig,
    /// Details of the open protocol.
    pub open: OpenConfig,
    /// Details of debezium.
    pub debezium: DebeziumConfig,
    /// Details of files and object stores.
    pub cloud_storage_config: CloudStorageConfig,
}

impl SinkConfig {
    /// The encoding, `None` when none is set.
    ///
    /// # Errors
    /// When the name is unknown.
    pub fn protocol(&self) -> Result<Option<Protocol>, ConfigError> {
        if self.protocol.is_empty() { Ok(None) } else { Protocol::parse(&self.protocol).map(Some) }
    }
}

/// Encoding of files and messages.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Protocol {
    /// Open protocol.
    Open,
    /// Canal JSON.
    CanalJson,
    /// Avro.
    Avro,
    /// Debezium in Avro.
    DebeziumAvro,
    /// Comma separated values.
    Csv,
    /// Debezium JSON.
    Debezium,
    /// Simple protocol.
    Simple,
}

impl Protocol {
    /// Reads a name; upper and lower case are the same.
    ///
    /// # Errors
    /// When the name is unknown or names an encoding that is not offered any more.
    pub fn parse(name: &str) -> Result<Self, ConfigError> {
        match name.to_ascii_lowercase().as_str() {
            "default" | "open-protocol" => Ok(Self::Open),
            "canal-json" => Ok(Self::CanalJson),
            "avro" | "flat-avro" => Ok(Self::Avro),
            "debezium-avro" => Ok(Self::DebeziumAvro),
            "csv" => Ok(Self::Csv),
            "debezium" => Ok(Self::Debezium),
            "simple" => Ok(Self::Simple),
            _ => Err(ConfigError::UnknownProtocol(name.chars().take(64).collect())),
        }
    }

    /// The name in configurations.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Open => "open-protocol",
            Self::CanalJson => "canal-json",
            Self::Avro => "avro",
            Self::DebeziumAvro => "debezium-avro",
            Self::Csv => "csv",
            Self::Debezium => "debezium",
            Self::Simple => "simple",
        }
    }
}

/// How much of a transaction arrives at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TransactionAtomicity {
    /// Transactions may be split.
    None,
    /// The part of a transaction that concerns one table stays together.
    Table,
}

impl TransactionAtomicity {
    pub(super) fn parse(text: &str) -> Option<Self> {
        match text {
            "none" => Some(Self::None),
            "table" => Some(Self::Table),
            _ => None,
        }
    }
}

/// One `[[sink.dispatchers]]`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct DispatchRule {
    /// Tables it applies to, as table filter rules.
    pub matcher: Vec<String>,
    /// How rows are spread over partitions.
    pub partition: String,
    /// Index whose columns decide.
    pub index: String,
    /// Columns that decide.
    pub columns: Vec<String>,
    /// Topic, which may contain `{schema}` and `{table}`.
    pub topic: String,
    /// Schema of the target, which may contain `{schema}` and `{table}`.
    pub target_schema: String,
    /// Name of the target, which may contain `{schema}` and `{table}`.
    pub target_table: String,
}

/// One `[[sink.column-selectors]]`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct ColumnSelector {
    /// Tables it applies to, as table filter rules.
    pub matcher: Vec<String>,
    /// Columns that are sent.
    pub columns: Vec<String>,
}

/// Directory level by date.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DateSeparator {
    /// No such level.
    None,
    /// `2026`.
    Year,
    /// `2026-03`.
    Month,
    /// `2026-03-01`.
    #[default]
    Day,
}

/// `[sink.csv]`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
#[expect(clippy::struct_excessive_bools, reason = "each is one key of the file")]
pub struct CsvConfig {
    /// Between two values, one to three characters.
    pub delimiter: String,
    /// Around a value, at most one character; empty for none.
    pub quote: String,
    /// Stands for NULL.
    pub null: String,
    /// Add a column with the commit position.
    pub include_commit_ts: bool,
    /// `base64` or `hex`.
    pub binary_encoding_method: String,
    /// Updates carry the old row too.
    pub output_old_value: bool,
    /// Add the key columns.
    pub output_handle_key: bool,
    /// First line holds the names of the columns.
    pub output_field_header: bool,
}

/// `[sink.open]`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct OpenConfig {
    /// Updates carry the old row too.
    pub output_old_value: bool,
}

/// `[sink.debezium]`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct DebeziumConfig {
    /// Updates carry the old row too.
    pub output_old_value: bool,
    /// Add the start position of the transaction.
    pub include_start_ts: bool,
}

/// `[sink.cloud-storage-config]`; `None` lets the sink choose.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct CloudStorageConfig {
    /// Writers, 1 to 512.
    pub worker_count: Option<i64>,
    /// Longest time between two files of a table, 100 ms to 10 min.
    pub flush_interval: Option<HumanDuration>,
    /// Bytes after which a file is closed, 1 KiB to 512 MiB.
    pub file_size: Option<i64>,
    /// Files written at the same time, 1 to 512.
    pub flush_concurrency: Option<i64>,
    /// Column ids in the schema file.
    pub output_column_id: bool,
    /// Directories named by table id.
    pub use_table_id_as_path: bool,
}

impl Default for SinkConfig {
    fn default() -> Self {
        Self {
            transaction_atomicity: None,
            protocol: String::new(),
            dispatchers: Vec::new(),
            column_selectors: Vec::new(),
            encoder_concurrency: 32,
            terminator: "\r\n".to_owned(),
            date_separator: DateSeparator::Day,
            enable_partition_separator: true,
            file_index_digit: 20,
            only_output_updated_columns: false,
            delete_only_output_handle_key_columns: false,
            content_compatible: false,
            safe_mode: false,
            debezium_disable_schema: false,
            csv: CsvConfig::default(),
            open: OpenConfig::default(),
            debezium: DebeziumConfig::default(),
            cloud_storage_config: CloudStorageConfig::default(),
        }
    }
}

impl Default for CsvConfig {
    fn default() -> Self {
        Self {
            delimiter: ",".to_owned(),
            quote: "\"".to_owned(),
            null: "\\N".to_owned(),
            include_commit_ts: false,
            binary_encoding_method: "base64".to_owned(),
            output_old_value: false,
            output_handle_key: false,
            output_field_header: false,
        }
    }
}

impl Default for OpenConfig {
    fn default() -> Self {
        Self { output_old_value: true }
    }
}

impl Default for DebeziumConfig {
    fn default() -> Self {
        Self { output_old_value: true, include_start_ts: false }
    }
}
