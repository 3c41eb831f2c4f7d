//! What may be chosen about the file sink, from its URI and the changefeed's configuration.

use std::path::PathBuf;
use std::time::Duration;

use heartbeatpb::config::{DateSeparator, HumanDuration, ReplicaConfig, SinkConfig, Uri};

use crate::Error;
use crate::encode::{BinaryEncoding, DecimalMode, EncodeOptions, Format};

/// Bytes of rows and of their text that wait in memory before files are written early.
const DEFAULT_BUFFER: usize = 16 << 20;

/// The file sink's configuration.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FileConfig {
    /// Directory of the output.
    pub root: PathBuf,
    /// Encoding.
    pub encode: EncodeOptions,
    /// Longest time that a row waits for its file.
    pub flush_interval: Duration,
    /// Bytes after which a file is closed.
    pub file_size: usize,
    /// Writing threads.
    pub workers: usize,
    /// Whether directories are named by table id.
    pub use_table_id_as_path: bool,
    /// Directory level by date, in UTC.
    pub date_separator: DateSeparator,
    /// Digits of the number in a file name.
    pub file_index_digits: usize,
    /// Whether schema files have column ids.
    pub output_column_id: bool,
    /// Whether several dispatchers may write one table, so that file names need the dispatcher.
    pub across_nodes: bool,
    /// Bytes that wait in memory before files are written early; must be well below the memory quota of the
    /// changefeed, because its credits return only when a file is durable.
    pub buffer_bytes: usize,
}

fn config(what: impl Into<String>) -> Error {
    Error::Config(what.into())
}

fn flag(name: &str, value: &str) -> Result<bool, Error> {
    match value.to_ascii_lowercase().as_str() {
        "true" | "1" | "t" => Ok(true),
        "false" | "0" | "f" => Ok(false),
        _ => Err(config(format!("parameter {name} must be true or false"))),
    }
}

fn number(name: &str, value: &str) -> Result<i64, Error> {
    value.parse().map_err(|_| config(format!("parameter {name} must be a number")))
}

fn clamp(value: i64, least: i64, most: i64) -> usize {
    usize::try_from(value.clamp(least, most)).unwrap_or(usize::MAX)
}

impl FileConfig {
    /// As [`FileConfig::new`], for a changefeed: several dispatchers may write one table if tables are split,
    /// and what waits in memory is at most a quarter of the memory quota unless `buffer-size` says otherwise.
    ///
    /// # Errors
    /// As [`FileConfig::new`].
    pub fn for_changefeed(uri: &str, replica: &ReplicaConfig) -> Result<Self, Error> {
        let mut file = Self::new(uri, &replica.sink)?;
        file.across_nodes = replica.scheduler.enable_table_across_nodes;
        if file.buffer_bytes == DEFAULT_BUFFER && replica.memory_quota > 0 {
            file.buffer_bytes =
                usize::try_from(replica.memory_quota / 4).unwrap_or(usize::MAX).min(DEFAULT_BUFFER);
        }
        Ok(file)
    }

    /// Reads a URI `file:///dir?protocol=canal-json&…`; its parameters win over `sink`.
    ///
    /// Parameters: `protocol` (canal-json, debezium, csv), `flush-interval` (5s), `file-size` (64 MiB),
    /// `worker-count` (16), `use-table-id-as-path`, `date-separator`, `file-index-digit`, `buffer-size`
    /// (16 MiB), `enable-tidb-extension` (true; canal-json), `debezium-disable-schema`,
    /// `decimal-handling-mode` (string, double; debezium), `only-output-updated-columns`, `include-commit-ts`,
    /// `output-old-value`, `output-field-header` (csv). Others that a changefeed accepts are ignored here.
    ///
    /// # Errors
    /// When the URI or a value is unusable. Never shows the URI.
    pub fn new(uri: &str, sink: &SinkConfig) -> Result<Self, Error> {
        let uri = Uri::parse(uri).map_err(|what| config(format!("the sink URI is not usable: {what}")))?;
        if uri.scheme != "file" {
            return Err(config("a file sink has the scheme file://"));
        }
        if !uri.hosts.is_empty() || !uri.path.starts_with('/') || uri.path.trim_matches('/').is_empty() {
            return Err(config("a file sink needs an absolute directory; write it as file:///directory"));
        }
        let protocol = uri.param("protocol").unwrap_or(&sink.protocol);
        let format = Format::parse(protocol)
            .ok_or_else(|| config("files need a protocol: canal-json, debezium or csv"))?;
        let storage = &sink.cloud_storage_config;
        let mut file = Self {
            root: PathBuf::from(&uri.path),
            encode: encode_options(format, sink)?,
            flush_interval: storage.flush_interval.map_or(Duration::from_secs(5), |interval| interval.0),
            file_size: clamp(storage.file_size.unwrap_or(64 << 20), 1 << 10, 512 << 20),
            workers: clamp(storage.worker_count.unwrap_or(16), 1, 512),
            use_table_id_as_path: storage.use_table_id_as_path,
            date_separator: sink.date_separator,
            file_index_digits: clamp(i64::from(sink.file_index_digit), 6, 20),
            output_column_id: storage.output_column_id,
            across_nodes: false,
            buffer_bytes: DEFAULT_BUFFER,
        };
        for (name, value) in &uri.params {
            file.take_param(name, value)?;
        }
        let (least, most) = (Duration::from_millis(100), Duration::from_secs(600));
        file.flush_interval = file.flush_interval.clamp(least, most);
        file.check()?;
        Ok(file)
    }

    fn take_param(&mut self, name: &str, value: &str) -> Result<(), Error> {
        match name {
            "flush-interval" => {
                let interval = HumanDuration::parse(value)
                    .ok_or_else(|| config("parameter flush-interval must be a duration such as 5s"))?;
                self.flush_interval = interval.0;
            }
            "file-size" => self.file_size = clamp(number(name, value)?, 1 << 10, 512 << 20),
            "worker-count" => match number(name, value)? {
                count if count <= 0 => return Err(config("parameter worker-count must be at least 1")),
                count => self.workers = clamp(count, 1, 512),
            },
            "buffer-size" => self.buffer_bytes = clamp(number(name, value)?, 64 << 10, 1 << 40),
            "use-table-id-as-path" => self.use_table_id_as_path = flag(name, value)?,
            "file-index-digit" => match number(name, value)? {
                digits if (6..=20).contains(&digits) => self.file_index_digits = clamp(digits, 6, 20),
                _ => return Err(config("parameter file-index-digit must lie between 6 and 20")),
            },
            "date-separator" => {
                self.date_separator = match value {
                    "none" => DateSeparator::None,
                    "year" => DateSeparator::Year,
                    "month" => DateSeparator::Month,
                    "day" => DateSeparator::Day,
                    _ => return Err(config("parameter date-separator must be none, year, month or day")),
                }
            }
            "enable-tidb-extension" => self.encode.canal_extension = flag(name, value)?,
            "debezium-disable-schema" => self.encode.debezium_schema = !flag(name, value)?,
            "only-output-updated-columns" => self.encode.only_updated_columns = flag(name, value)?,
            "decimal-handling-mode" => {
                self.encode.debezium_decimal = match value {
                    "string" | "precise" => DecimalMode::Exact,
                    "double" => DecimalMode::Double,
                    _ => return Err(config("parameter decimal-handling-mode must be string or double")),
                }
            }
            "include-commit-ts" => self.encode.csv.include_commit_ts = flag(name, value)?,
            "output-old-value" => {
                let value = flag(name, value)?;
                self.encode.csv.output_old_value = value;
                self.encode.debezium_old_value = value;
            }
            "output-field-header" => self.encode.csv.header = flag(name, value)?,
            // Checked with the changefeed's configuration; some of them mean something to other sinks only.
            _ => {}
        }
        Ok(())
    }

    fn check(&self) -> Result<(), Error> {
        let csv = &self.encode.csv;
        let breaks = |text: &str| text.contains(['\r', '\n']);
        if !(1..=3).contains(&csv.delimiter.chars().count()) || breaks(&csv.delimiter) {
            return Err(config("sink.csv.delimiter must be one to three characters, no line break"));
        }
        if csv.quote.is_some_and(|quote| csv.delimiter.contains(quote)) {
            return Err(config("sink.csv.quote must not occur in sink.csv.delimiter"));
        }
        if self.encode.terminator.is_empty() {
            return Err(config("sink.terminator must not be empty"));
        }
        Ok(())
    }
}

fn encode_options(format: Format, sink: &SinkConfig) -> Result<EncodeOptions, Error> {
    let mut options = EncodeOptions::new(format);
    options.terminator.clone_from(&sink.terminator);
    options.only_updated_columns = sink.only_output_updated_columns;
    options.only_key_on_delete = sink.delete_only_output_handle_key_columns;
    options.debezium_schema = !sink.debezium_disable_schema;
    options.debezium_old_value = sink.debezium.output_old_value;
    options.debezium_start_ts = sink.debezium.include_start_ts;
    let csv = &mut options.csv;
    csv.delimiter.clone_from(&sink.csv.delimiter);
    let mut quote = sink.csv.quote.chars();
    csv.quote = quote.next();
    if quote.next().is_some() || csv.quote.is_some_and(|quote| matches!(quote, '\r' | '\n')) {
        return Err(config("sink.csv.quote must be at most one character, no line break"));
    }
    csv.null.clone_from(&sink.csv.null);
    csv.include_commit_ts = sink.csv.include_commit_ts;
    csv.binary = match sink.csv.binary_encoding_method.as_str() {
        "base64" => BinaryEncoding::Base64,
        "hex" => BinaryEncoding::Hex,
        _ => return Err(config("sink.csv.binary-encoding-method must be base64 or hex")),
    };
    csv.output_old_value = sink.csv.output_old_value;
    csv.header = sink.csv.output_field_header;
    if format == Format::Csv && sink.csv.output_handle_key {
        return Err(config("sink.csv.output-handle-key is not available; remove the key"));
    }
    if format == Format::Csv && sink.delete_only_output_handle_key_columns {
        return Err(config("sink.delete-only-output-handle-key-columns cannot be used with csv"));
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(uri: &str) -> Result<FileConfig, Error> {
        FileConfig::new(uri, &SinkConfig::default())
    }

    #[test]
    fn parameters_win_and_are_brought_into_range() {
        let file = read("file:///a/b%20c?protocol=CSV&flush-interval=1ms&file-size=1&date-separator=none")
            .expect("valid");
        assert_eq!(file.root, PathBuf::from("/a/b c"));
        assert_eq!(file.encode.format, Format::Csv);
        assert_eq!(file.flush_interval, Duration::from_millis(100));
        assert_eq!((file.file_size, file.workers), (1 << 10, 16));
        assert_eq!(file.date_separator, DateSeparator::None);
    }

    #[test]
    fn wrong_values_are_refused_by_name() {
        for (uri, name) in [
            ("file:///a", "protocol"),
            ("file:///a?protocol=avro", "protocol"),
            ("file://host/a?protocol=csv", "directory"),
            ("file:///?protocol=csv", "directory"),
            ("s3://bucket/a?protocol=csv", "scheme"),
            ("file:///a?protocol=csv&worker-count=0", "worker-count"),
            ("file:///a?protocol=csv&flush-interval=soon", "flush-interval"),
            ("file:///a?protocol=csv&file-index-digit=3", "file-index-digit"),
        ] {
            let error = read(uri).expect_err(uri);
            assert!(error.to_string().contains(name), "{uri}: {error}");
        }
        let mut sink = SinkConfig::default();
        sink.csv.delimiter = "\"".into();
        assert!(FileConfig::new("file:///a?protocol=csv", &sink).is_err());
    }
}
