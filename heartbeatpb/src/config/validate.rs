//! Checks a replica configuration against its sink, and settles what the two say differently.

use super::{
    CloudStorageConfig, ConfigError, DdlCapture, DdlConfig, FilterConfig, HumanDuration, Protocol,
    ReplicaConfig, SchedulerConfig, SinkConfig, SinkKind, TransactionAtomicity, Uri,
};

/// Smallest time an erroring changefeed is given before it fails.
const LEAST_STUCK: HumanDuration = HumanDuration::from_secs(1800);
/// Most events handed over at once.
const MOST_BATCH: u32 = 8192;
/// Smallest useful threshold of write traffic.
const LEAST_WRITE_THRESHOLD: i64 = 10 << 20;
/// More copy connections than this only queue up behind the upstream's disks.
const MOST_COPY_PARALLEL: u32 = 128;
/// Smaller parts cost more than they carry.
const LEAST_COPY_PART: u64 = 64 << 10;

impl ReplicaConfig {
    /// Checks the configuration against a sink URI and settles it: a parameter of the URI wins over the
    /// configuration, values that only need rounding are rounded. Returns what was changed or is suspicious,
    /// as sentences for people. Applying it twice changes nothing more.
    ///
    /// # Errors
    /// When a value is not allowed, the sink URI is unusable, or something is asked for that this version
    /// cannot do. The text never shows the URI.
    pub fn validate_and_adjust(&mut self, sink_uri: &str) -> Result<Vec<String>, ConfigError> {
        let uri = Uri::parse(sink_uri).map_err(|what| ConfigError::SinkUri(what.to_owned()))?;
        let kind = SinkKind::of(sink_uri)?;
        let mut warnings = Vec::new();
        self.refuse_unavailable()?;
        self.check_top_level(&mut warnings)?;
        self.filter.check_publish()?;
        self.settle_capture(&mut warnings)?;
        self.scheduler.validate(kind, &mut warnings)?;
        self.ddl.adjust(kind)?;
        self.verify.validate(kind)?;
        self.sink.take_params(&uri, &mut warnings)?;
        self.sink.validate(kind, &uri)?;
        self.sink.cloud_storage_config.take_params(&uri, kind, &mut warnings)?;
        Ok(warnings)
    }

    /// What has its place in the schema but does not exist yet is refused, never ignored.
    fn refuse_unavailable(&self) -> Result<(), ConfigError> {
        let absent = |key: &str, what: &str| {
            Err(ConfigError::invalid(key, format!("{what} not available in this version; remove the key")))
        };
        if self.enable_sync_point {
            return absent("enable-sync-point", "sync points are");
        }
        if self.bdr_mode {
            return absent("bdr-mode", "replication in both directions is");
        }
        match self.consistent.level.as_str() {
            "none" | "" => {}
            "eventual" => return absent("consistent.level", "the redo log is"),
            _ => return Err(ConfigError::invalid("consistent.level", "must be none or eventual")),
        }
        match self.integrity.integrity_check_level.as_str() {
            "none" => {}
            "correctness" => return absent("integrity.integrity-check-level", "row checksums are"),
            _ => {
                return Err(ConfigError::invalid(
                    "integrity.integrity-check-level",
                    "must be none or correctness",
                ));
            }
        }
        if !matches!(self.integrity.corruption_handle_level.as_str(), "warn" | "error") {
            return Err(ConfigError::invalid("integrity.corruption-handle-level", "must be warn or error"));
        }
        if !self.sink.dispatchers.is_empty() {
            return absent("sink.dispatchers", "dispatch rules and table routes are");
        }
        if !self.sink.column_selectors.is_empty() {
            return absent("sink.column-selectors", "column selectors are");
        }
        if !self.filter.event_filters.is_empty() {
            return absent("filter.event-filters", "event filters are");
        }
        if !self.filter.ignore_txn_start_ts.is_empty() {
            return absent("filter.ignore-txn-start-ts", "leaving out single transactions is");
        }
        Ok(())
    }

    /// Shapes that the triggers write down are those of whole tables.
    fn settle_capture(&mut self, warnings: &mut Vec<String>) -> Result<(), ConfigError> {
        if self.filter.publish.is_empty() {
            return Ok(());
        }
        match self.ddl.capture {
            DdlCapture::Off => {}
            DdlCapture::Auto => {
                self.ddl.capture = DdlCapture::Off;
                warnings.push(
                    "ddl.capture is off because of filter.publish: a change of a replicated table's shape stops the \
                     changefeed, and new tables are not replicated"
                        .to_owned(),
                );
            }
            DdlCapture::On => {
                return Err(ConfigError::invalid(
                    "filter.publish",
                    "cannot be used while schema changes are captured; set ddl.capture to \"off\", or leave it out",
                ));
            }
        }
        Ok(())
    }

    fn check_top_level(&mut self, warnings: &mut Vec<String>) -> Result<(), ConfigError> {
        if self.memory_quota == 0 {
            self.memory_quota = Self::DEFAULT_MEMORY_QUOTA;
        }
        if self.event_collector_batch_count > MOST_BATCH {
            return Err(ConfigError::invalid(
                "event-collector-batch-count",
                format!("must be at most {MOST_BATCH}"),
            ));
        }
        if self.changefeed_error_stuck_duration < LEAST_STUCK {
            return Err(ConfigError::invalid("changefeed-error-stuck-duration", "must be at least 30m"));
        }
        if self.mounter.worker_num == 0 {
            return Err(ConfigError::invalid("mounter.worker-num", "must be at least 1"));
        }
        if self.filter.rules.is_empty() {
            return Err(ConfigError::invalid(
                "filter.rules",
                "is empty, so nothing would be replicated; write for example [\"*.*\"]",
            ));
        }
        if self.initial_copy.parallel == 0 {
            return Err(ConfigError::invalid("initial-copy.parallel", "must be at least 1"));
        }
        if self.initial_copy.part_bytes < LEAST_COPY_PART {
            self.initial_copy.part_bytes = LEAST_COPY_PART;
            warnings.push(format!("initial-copy.part-bytes is raised to {LEAST_COPY_PART}"));
        }
        if self.initial_copy.parallel > MOST_COPY_PARALLEL {
            self.initial_copy.parallel = MOST_COPY_PARALLEL;
            warnings.push(format!("initial-copy.parallel is lowered to {MOST_COPY_PARALLEL}"));
        }
        Ok(())
    }
}

impl FilterConfig {
    fn check_publish(&self) -> Result<(), ConfigError> {
        for (at, rule) in self.publish.iter().enumerate() {
            let wrong = |key: &str, what: &str| {
                Err(ConfigError::invalid(&format!("filter.publish[{at}].{key}"), what))
            };
            if rule.matcher.is_empty() {
                return wrong("matcher", "is empty; write for example [\"public.orders\"]");
            }
            if rule.columns.iter().enumerate().any(|(at, name)| rule.columns[..at].contains(name)) {
                return wrong("columns", "has a column twice");
            }
            if rule.condition.contains('\0')
                || (rule.condition.trim().is_empty() && !rule.condition.is_empty())
            {
                return wrong("where", "is no SQL expression; leave it out to replicate every row");
            }
        }
        Ok(())
    }
}

impl DdlConfig {
    /// Only a database of the same kind has sequences.
    fn adjust(&mut self, kind: SinkKind) -> Result<(), ConfigError> {
        self.sequence_values &= kind == SinkKind::Postgres;
        if self.sequence_interval.0 < std::time::Duration::from_secs(1) {
            return Err(ConfigError::invalid("ddl.sequence-interval", "must be 1s or longer"));
        }
        Ok(())
    }
}

impl SchedulerConfig {
    fn validate(&mut self, kind: SinkKind, warnings: &mut Vec<String>) -> Result<(), ConfigError> {
        let must = |ok: bool, key: &str, what: &str| {
            if ok { Ok(()) } else { Err(ConfigError::invalid(&format!("scheduler.{key}"), what)) }
        };
        // The stored form has no spelling for an infinity.
        must(self.min_traffic_percentage.is_finite(), "min-traffic-percentage", "must lie between 0 and 1")?;
        must(self.max_traffic_percentage.is_finite(), "max-traffic-percentage", "must be larger than 1")?;
        if !self.enable_table_across_nodes {
            return Ok(());
        }
        must(
            !self.force_split,
            "force-split",
            "is not available in this version: a table without a key that is safe to divide by stays whole; remove the key",
        )?;
        must(self.region_threshold >= 0, "region-threshold", "cannot be negative")?;
        must(self.region_count_per_span > 0, "region-count-per-span", "must be larger than 0")?;
        must(
            !self.region_count_refresh_interval.0.is_zero(),
            "region-count-refresh-interval",
            "must be longer than 0",
        )?;
        must(self.write_key_threshold >= 0, "write-key-threshold", "cannot be negative; 0 switches it off")?;
        must(
            self.scheduling_task_count_per_node >= 0,
            "scheduling-task-count-per-node",
            "cannot be negative",
        )?;
        must(self.balance_score_threshold > 0, "balance-score-threshold", "must be larger than 0")?;
        let least = self.min_traffic_percentage;
        must(least > 0.0 && least < 1.0, "min-traffic-percentage", "must lie between 0 and 1")?;
        let most = self.max_traffic_percentage;
        must(most > 1.0, "max-traffic-percentage", "must be larger than 1")?;
        if self.region_threshold > 0 && self.region_count_per_span > self.region_threshold {
            self.region_count_per_span = self.region_threshold;
            warnings
                .push("scheduler.region-count-per-span is lowered to scheduler.region-threshold".to_owned());
        }
        if (1..LEAST_WRITE_THRESHOLD).contains(&self.write_key_threshold) {
            self.write_key_threshold = LEAST_WRITE_THRESHOLD;
            warnings.push("scheduler.write-key-threshold is raised to 10 MiB per second".to_owned());
        }
        if kind == SinkKind::Mysql {
            self.enable_splittable_check = true;
        }
        Ok(())
    }
}

/// Reads a boolean parameter; absent is `None`.
fn flag(uri: &Uri, name: &str) -> Result<Option<bool>, ConfigError> {
    match uri.param(name).map(str::to_ascii_lowercase).as_deref() {
        None => Ok(None),
        Some("true" | "1" | "t") => Ok(Some(true)),
        Some("false" | "0" | "f") => Ok(Some(false)),
        Some(_) => Err(ConfigError::SinkUri(format!("parameter {name} must be true or false"))),
    }
}

/// Lets a parameter win over the configuration.
fn win<T: PartialEq>(slot: &mut T, param: Option<T>, default: &T, name: &str, warnings: &mut Vec<String>) {
    if let Some(value) = param {
        if *slot != value && *slot != *default {
            warnings.push(format!(
                "sink.{name} differs from the parameter {name} of the sink uri; the parameter wins"
            ));
        }
        *slot = value;
    }
}

impl SinkConfig {
    fn take_params(&mut self, uri: &Uri, warnings: &mut Vec<String>) -> Result<(), ConfigError> {
        let default = Self::default();
        let protocol = uri
            .param("protocol")
            .map(|name| Protocol::parse(name).map(|p| p.name().to_owned()))
            .transpose()?;
        if let Some(protocol) = self.protocol()? {
            protocol.name().clone_into(&mut self.protocol);
        }
        win(&mut self.protocol, protocol, &default.protocol, "protocol", warnings);
        let atomicity = match uri.param("transaction-atomicity") {
            None => None,
            Some(text) => Some(Some(TransactionAtomicity::parse(text).ok_or_else(|| {
                ConfigError::SinkUri("parameter transaction-atomicity must be none or table".to_owned())
            })?)),
        };
        win(&mut self.transaction_atomicity, atomicity, &None, "transaction-atomicity", warnings);
        for (slot, name) in [
            (&mut self.safe_mode, "safe-mode"),
            (&mut self.only_output_updated_columns, "only-output-updated-columns"),
            (&mut self.content_compatible, "content-compatible"),
            (&mut self.debezium_disable_schema, "debezium-disable-schema"),
        ] {
            win(slot, flag(uri, name)?, &false, name, warnings);
        }
        if self.content_compatible {
            self.only_output_updated_columns = true;
        }
        Ok(())
    }

    fn validate(&self, kind: SinkKind, uri: &Uri) -> Result<(), ConfigError> {
        let protocol = self.protocol()?;
        match kind {
            SinkKind::Kafka | SinkKind::Pulsar => {
                if uri.path.trim_matches('/').is_empty() {
                    return Err(ConfigError::SinkUri(
                        "a message queue needs a topic; write it as the path".to_owned(),
                    ));
                }
                match protocol {
                    None => {
                        return Err(ConfigError::invalid(
                            "sink.protocol",
                            "a message queue needs a protocol",
                        ));
                    }
                    Some(Protocol::Csv) => {
                        return Err(ConfigError::invalid("sink.protocol", "csv is for files only"));
                    }
                    Some(other) if kind == SinkKind::Pulsar && other != Protocol::CanalJson => {
                        return Err(ConfigError::invalid("sink.protocol", "Pulsar takes canal-json only"));
                    }
                    Some(_) => {}
                }
                if self.transaction_atomicity == Some(TransactionAtomicity::Table) {
                    return Err(ConfigError::invalid(
                        "sink.transaction-atomicity",
                        "a message queue allows none only",
                    ));
                }
            }
            SinkKind::Storage => match protocol {
                Some(Protocol::Csv | Protocol::CanalJson | Protocol::Debezium) => {}
                None => {
                    return Err(ConfigError::invalid(
                        "sink.protocol",
                        "files need a protocol: csv, canal-json or debezium",
                    ));
                }
                Some(Protocol::Open | Protocol::Avro | Protocol::DebeziumAvro | Protocol::Simple) => {
                    return Err(ConfigError::invalid(
                        "sink.protocol",
                        "files can be csv, canal-json or debezium",
                    ));
                }
            },
            SinkKind::Postgres | SinkKind::Mysql | SinkKind::Blackhole => {}
        }
        if !(6..=20).contains(&self.file_index_digit) {
            return Err(ConfigError::invalid("sink.file-index-digit", "must lie between 6 and 20"));
        }
        if protocol == Some(Protocol::Csv) {
            self.validate_csv()?;
        }
        Ok(())
    }

    fn validate_csv(&self) -> Result<(), ConfigError> {
        let csv = &self.csv;
        let breaks = |text: &str| text.contains(['\r', '\n']);
        if !(1..=3).contains(&csv.delimiter.chars().count()) || breaks(&csv.delimiter) {
            return Err(ConfigError::invalid(
                "sink.csv.delimiter",
                "must be one to three characters, no line break",
            ));
        }
        if csv.quote.chars().count() > 1 || breaks(&csv.quote) {
            return Err(ConfigError::invalid(
                "sink.csv.quote",
                "must be at most one character, no line break",
            ));
        }
        if !csv.quote.is_empty() && csv.delimiter.contains(&csv.quote) {
            return Err(ConfigError::invalid("sink.csv.quote", "must not occur in sink.csv.delimiter"));
        }
        if !matches!(csv.binary_encoding_method.as_str(), "base64" | "hex") {
            return Err(ConfigError::invalid("sink.csv.binary-encoding-method", "must be base64 or hex"));
        }
        if self.delete_only_output_handle_key_columns {
            return Err(ConfigError::invalid(
                "sink.delete-only-output-handle-key-columns",
                "cannot be used with csv",
            ));
        }
        Ok(())
    }
}

impl CloudStorageConfig {
    fn take_params(
        &mut self,
        uri: &Uri,
        kind: SinkKind,
        warnings: &mut Vec<String>,
    ) -> Result<(), ConfigError> {
        if kind != SinkKind::Storage {
            return Ok(());
        }
        let number = |name: &str| {
            uri.param(name)
                .map(|text| {
                    text.parse::<i64>()
                        .map_err(|_| ConfigError::SinkUri(format!("parameter {name} must be a number")))
                })
                .transpose()
        };
        let interval = uri
            .param("flush-interval")
            .map(|text| {
                HumanDuration::parse(text).ok_or_else(|| {
                    ConfigError::SinkUri("parameter flush-interval must be a duration such as 5s".to_owned())
                })
            })
            .transpose()?;
        win(&mut self.worker_count, number("worker-count")?.map(Some), &None, "worker-count", warnings);
        win(&mut self.file_size, number("file-size")?.map(Some), &None, "file-size", warnings);
        win(&mut self.flush_interval, interval.map(Some), &None, "flush-interval", warnings);
        win(
            &mut self.use_table_id_as_path,
            flag(uri, "use-table-id-as-path")?,
            &false,
            "use-table-id-as-path",
            warnings,
        );
        if self.worker_count.is_some_and(|count| count <= 0) {
            return Err(ConfigError::invalid("sink.cloud-storage-config.worker-count", "must be at least 1"));
        }
        clamp(&mut self.worker_count, 1, 512, "worker-count", warnings);
        clamp(&mut self.flush_concurrency, 1, 512, "flush-concurrency", warnings);
        clamp(&mut self.file_size, 1 << 10, 512 << 20, "file-size", warnings);
        let (least, most) =
            (HumanDuration(std::time::Duration::from_millis(100)), HumanDuration::from_secs(600));
        clamp(&mut self.flush_interval, least, most, "flush-interval", warnings);
        Ok(())
    }
}

fn clamp<T: Ord + Copy + std::fmt::Display>(
    slot: &mut Option<T>,
    least: T,
    most: T,
    name: &str,
    warnings: &mut Vec<String>,
) {
    if let Some(value) = *slot {
        let fits = value.clamp(least, most);
        if fits != value {
            warnings.push(format!("sink.cloud-storage-config.{name} is changed to {fits}"));
            *slot = Some(fits);
        }
    }
}
