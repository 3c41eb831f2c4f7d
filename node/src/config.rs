//! Server configuration: defaults, then the TOML file, then flags that were given.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use heartbeatpb::config::HumanDuration;
use serde::{Deserialize, Serialize};

pub(crate) mod nearest;
mod older;
mod security;
mod store;
mod upstreams;

pub use security::{RedactMode, SecuritySection};
pub use store::{StoreKind, StoreSection};
pub use upstreams::UpstreamSection;

/// Port that a server listens on when nothing else is said.
pub const DEFAULT_ADDR: &str = "127.0.0.1:8300";

/// Longest time to live of a node's lease: so long nobody takes the work of a dead node over.
const LONGEST_SESSION: Duration = Duration::from_secs(600);
/// Shortest time to live of a node's lease: writing stops a second before it may end, and it is renewed in thirds.
const SHORTEST_SESSION: Duration = Duration::from_secs(2);
/// Longest time for which a node that disappeared is kept.
const LONGEST_REMOVAL_DELAY: Duration = Duration::from_secs(600);
/// Members greet each other twice a second, and a few greetings may be late.
const SHORTEST_SILENCE: Duration = Duration::from_secs(2);

/// Configuration of one server process (api-cli-config §10).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct ServerConfig {
    /// Isolates several clusters in one store.
    pub cluster_id: String,
    /// `host:port` to listen on.
    pub addr: String,
    /// `host:port` that other nodes and clients are told; `addr` when empty.
    pub advertise_addr: String,
    /// Where the event store lives, and the metadata store when it is embedded.
    pub data_dir: PathBuf,
    /// Time to live of the lease under which this node is a member of its cluster. Others take its work over so long
    /// after it was last heard of, and it stops writing a second earlier.
    #[serde(deserialize_with = "seconds")]
    pub capture_session_ttl: HumanDuration,
    /// How long a node is kept whose registration disappeared without a goodbye.
    pub capture_removal_delay: HumanDuration,
    /// After which silence the work of a member is given to others although its lease lives; nothing turns it off.
    pub unreached_after: HumanDuration,
    /// Where the cluster keeps its metadata.
    pub store: StoreSection,
    /// Certificates, and who may ask.
    pub security: SecuritySection,
    /// File for the log; empty is standard error.
    pub log_file: String,
    /// `error`, `warn`, `info`, `debug` or a tracing filter directive.
    pub log_level: String,
    /// Details of logging.
    pub log: LogConfig,
    /// Event store limits.
    pub event_store: EventStoreConfig,
    /// Upstreams that changefeeds may name.
    pub upstreams: BTreeMap<String, UpstreamSection>,
    /// What the file has that means nothing here, in words for the log.
    #[serde(skip)]
    pub ignored: Vec<String>,
}

/// `[log]`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct LogConfig {
    /// `text` or `json`.
    pub format: LogFormat,
    /// How the log file is put aside.
    pub file: LogFileConfig,
}

/// `[log.file]`: when the log file is put aside, and how long those that were are kept. 0 is without a limit.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct LogFileConfig {
    /// MiB at which the file is put aside, under the time of that moment.
    pub max_size: u64,
    /// Days for which files that were put aside are kept.
    pub max_days: u64,
    /// How many of them are kept.
    pub max_backups: usize,
}

impl Default for LogFileConfig {
    fn default() -> Self {
        Self { max_size: 300, max_days: 0, max_backups: 0 }
    }
}

/// Form of a log line.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For machines.
    Json,
}

/// `[event-store]`: limits per changefeed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct EventStoreConfig {
    /// Bytes of recent changes kept in memory per changefeed.
    pub memory_bytes: u64,
    /// Bytes on disk per changefeed; when they are used up, the upstream is not read until there is room.
    pub disk_bytes: u64,
}

impl Default for EventStoreConfig {
    fn default() -> Self {
        // 48 MiB holds a quarter of a second of a saturated reader; 64 GiB an afternoon of a busy database.
        Self { memory_bytes: 48 << 20, disk_bytes: 64 << 30 }
    }
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            cluster_id: "default".to_owned(),
            addr: DEFAULT_ADDR.to_owned(),
            advertise_addr: String::new(),
            data_dir: PathBuf::from("./millrace_data"),
            capture_session_ttl: HumanDuration::from_secs(3),
            capture_removal_delay: HumanDuration(Duration::from_millis(500)),
            unreached_after: HumanDuration::from_secs(3),
            store: StoreSection::default(),
            security: SecuritySection::default(),
            log_file: String::new(),
            log_level: "info".to_owned(),
            log: LogConfig::default(),
            event_store: EventStoreConfig::default(),
            upstreams: BTreeMap::new(),
            ignored: Vec::new(),
        }
    }
}

/// Why a server configuration is unusable. Names the key and says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The file is not valid TOML, or holds an unknown or ill-typed key.
    #[error("the configuration file {path} is not usable: {what}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong, with its line.
        what: String,
    },
    /// A value is not allowed.
    #[error("{key}: {what}")]
    Invalid {
        /// The key, as in the file.
        key: &'static str,
        /// What is wrong and what to do.
        what: String,
    },
}

impl ServerConfig {
    /// Reads a TOML file strictly: unknown keys are errors.
    ///
    /// # Errors
    /// When the file cannot be read or parsed.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&text).map_err(|what| ConfigError::Parse { path: path.to_owned(), what })
    }

    /// Reads the text of a file. An error has the place and the reason, and no value that may be a secret.
    fn parse(text: &str) -> Result<Self, String> {
        let told = |error: &toml::de::Error| {
            let place = error.span().map_or_else(String::new, |span| place(text, span.start));
            format!("{place}{}{}", without_uris(error.message().trim_end()), meant(error.message()))
        };
        let mut table: toml::Table = toml::from_str(text).map_err(|error| told(&error))?;
        let ignored = older::take(&mut table);
        if ignored.is_empty() {
            return toml::from_str(text).map_err(|error| told(&error));
        }
        let config: Self = table.try_into().map_err(|error| told(&error))?;
        Ok(Self { ignored, ..config })
    }

    /// The address that others are told.
    #[must_use]
    pub fn advertised(&self) -> &str {
        if self.advertise_addr.is_empty() { &self.addr } else { &self.advertise_addr }
    }

    /// Checks every value.
    ///
    /// # Errors
    /// Names the first key with a value that cannot be used.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let invalid = |key, what: String| Err(ConfigError::Invalid { key, what });
        if !is_name(&self.cluster_id) || self.cluster_id.len() > 128 {
            return invalid(
                "cluster-id",
                "use letters, digits and single hyphens, at most 128 bytes".to_owned(),
            );
        }
        if ["owner", "capture", "task", "changefeed", "job", "meta"].contains(&self.cluster_id.as_str()) {
            return invalid(
                "cluster-id",
                format!("{:?} is a reserved word; choose another", self.cluster_id),
            );
        }
        if let Err(what) = check_host_port(&self.addr) {
            return invalid("addr", what);
        }
        if !self.advertise_addr.is_empty() {
            if let Err(what) = check_host_port(&self.advertise_addr) {
                return invalid("advertise-addr", what);
            }
            if is_everywhere(&self.advertise_addr) {
                return invalid("advertise-addr", "must be an address that others can reach".to_owned());
            }
        }
        if self.data_dir.as_os_str().is_empty() {
            return invalid("data-dir", "must not be empty".to_owned());
        }
        let ttl = self.capture_session_ttl.0;
        if !(SHORTEST_SESSION..=LONGEST_SESSION).contains(&ttl) || ttl.subsec_nanos() > 0 {
            return invalid("capture-session-ttl", "must be whole seconds from 2s to 10m".to_owned());
        }
        if self.capture_removal_delay.0 > LONGEST_REMOVAL_DELAY {
            return invalid("capture-removal-delay", "must be at most 10m".to_owned());
        }
        let silence = self.unreached_after.0;
        if !silence.is_zero() && !(SHORTEST_SILENCE..=LONGEST_REMOVAL_DELAY).contains(&silence) {
            return invalid("unreached-after", "must be 0s, or between 2s and 10m".to_owned());
        }
        self.store.validate(&self.security).or_else(|(key, what)| invalid(key, what))?;
        self.security.validate().or_else(|(key, what)| invalid(key, what))?;
        upstreams::validate(&self.upstreams).or_else(|(key, what)| invalid(key, what))?;
        if self.store.kind == StoreKind::Etcd && self.advertise_addr.is_empty() && is_everywhere(&self.addr) {
            let what =
                format!("must be given in a cluster when addr is {}: others cannot reach that", self.addr);
            return invalid("advertise-addr", what);
        }
        if let Some(what) = self.log_file_problem() {
            return invalid("log-file", what);
        }
        if self.event_store.memory_bytes < 8 << 20 {
            return invalid("event-store.memory-bytes", "must be at least 8388608 (8 MiB)".to_owned());
        }
        if self.event_store.disk_bytes < 256 << 20 {
            return invalid("event-store.disk-bytes", "must be at least 268435456 (256 MiB)".to_owned());
        }
        crate::telemetry::parse_filter(&self.log_level).map(|_| ()).or_else(|what| invalid("log-level", what))
    }
}

impl ServerConfig {
    /// Why the log file cannot be where it is: rotation puts files beside it, and the data directory is the server's.
    fn log_file_problem(&self) -> Option<String> {
        if self.log_file.is_empty() {
            return None;
        }
        let (file, dir) = (normal(self.log_file.as_ref()), normal(&self.data_dir));
        let dir_shown = self.data_dir.display();
        if file == dir {
            return Some(format!("is the data directory {dir_shown}; name a file beside it"));
        }
        // The server makes and removes what is in these.
        let part =
            ["meta", "log", "sink", "tmp"].into_iter().find(|part| file.starts_with(dir.join(part)))?;
        Some(format!(
            "lies where the server keeps its own files, {part} in the data directory {dir_shown}; choose another \
             place, for example {}",
            self.data_dir.join("millrace.log").display()
        ))
    }
}

/// The path without `.` and `..`, from the root. Links are not followed: nothing may exist yet.
fn normal(path: &Path) -> PathBuf {
    let whole = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut out = PathBuf::new();
    for part in whole.components() {
        if part == std::path::Component::ParentDir {
            out.pop();
        } else {
            out.push(part);
        }
    }
    out
}

/// A duration of which a bare number means seconds, as older files have it.
fn seconds<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<HumanDuration, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Form {
        Seconds(u64),
        Text(String),
    }
    let wrong = "must be a duration such as \"3s\", or a number of seconds";
    match Form::deserialize(deserializer).map_err(|_| serde::de::Error::custom(wrong))? {
        Form::Seconds(seconds) => Ok(HumanDuration::from_secs(seconds)),
        Form::Text(text) => HumanDuration::parse(&text).ok_or_else(|| serde::de::Error::custom(wrong)),
    }
}

/// Line and key at a place of a file; not its value, which may be a secret.
fn place(text: &str, at: usize) -> String {
    let before = text.get(..at).unwrap_or(text);
    let number = before.matches('\n').count() + 1;
    let line = text.lines().nth(number - 1).unwrap_or_default();
    match line.split_once('=') {
        Some((key, _)) if !key.trim().is_empty() => {
            format!("line {number}, {}: ", without_uris(key.trim()))
        }
        Some(_) | None => format!("line {number}: "),
    }
}

/// Words of an error that may quote a value, without what looks like a URI.
fn without_uris(text: &str) -> String {
    let quoted = |c: char| c.is_whitespace() || matches!(c, '"' | '\'' | '`');
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while !rest.is_empty() {
        let (word, tail) = rest.split_at(rest.find(quoted).unwrap_or(rest.len()));
        out.push_str(if word.contains("://") { "<uri>" } else { word });
        let mark = tail.chars().next().map_or(0, char::len_utf8);
        out.push_str(&tail[..mark]);
        rest = &tail[mark..];
    }
    out
}

/// What was probably meant by a key that nobody knows; nothing for other mistakes.
fn meant(message: &str) -> String {
    let key = message.strip_prefix("unknown field `").and_then(|rest| rest.split('`').next());
    let known = serde_json::to_value(ServerConfig::default()).map(|value| nearest::keys_of(&value));
    match (key, known) {
        (Some(key), Ok(known)) => {
            nearest::nearest(key, &known).map_or_else(String::new, |near| format!("\ndid you mean {near}?"))
        }
        _ => String::new(),
    }
}

/// Whether `text` is a name such as `orders-to-kafka`: alphanumeric words joined by single hyphens.
#[must_use]
pub fn is_name(text: &str) -> bool {
    !text.is_empty()
        && text.split('-').all(|word| !word.is_empty() && word.bytes().all(|b| b.is_ascii_alphanumeric()))
}

/// Whether the host of `host:port` stands for every address of a machine.
fn is_everywhere(text: &str) -> bool {
    let host = text.rsplit_once(':').map_or("", |(host, _)| host);
    ["0.0.0.0", "[::]", "::", ""].contains(&host)
}

fn check_host_port(text: &str) -> Result<(), String> {
    let Some((host, port)) = text.rsplit_once(':') else {
        return Err(format!("{text:?} has no port; write host:port, for example {DEFAULT_ADDR}"));
    };
    if host.is_empty() {
        return Err(format!("{text:?} has no host; write host:port, for example {DEFAULT_ADDR}"));
    }
    port.parse::<u16>().map(|_| ()).map_err(|_| format!("{port:?} is not a port number (0 to 65535)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid() {
        ServerConfig::default().validate().unwrap();
    }

    #[test]
    fn bad_values_are_named() {
        type Change = fn(&mut ServerConfig);
        let cases: [(&str, Change); 20] = [
            ("cluster-id", |c| c.cluster_id = "a--b".into()),
            ("cluster-id", |c| c.cluster_id = "owner".into()),
            ("addr", |c| c.addr = "localhost".into()),
            ("addr", |c| c.addr = "localhost:99999".into()),
            ("advertise-addr", |c| c.advertise_addr = "0.0.0.0:8300".into()),
            ("data-dir", |c| c.data_dir = PathBuf::new()),
            ("capture-session-ttl", |c| c.capture_session_ttl = HumanDuration::from_secs(1)),
            ("capture-session-ttl", |c| c.capture_session_ttl = HumanDuration(Duration::from_millis(2_500))),
            ("capture-removal-delay", |c| c.capture_removal_delay = HumanDuration::from_secs(601)),
            ("unreached-after", |c| c.unreached_after = HumanDuration::from_secs(1)),
            ("store.endpoints", |c| c.store.kind = StoreKind::Etcd),
            ("store.endpoints", |c| c.store.endpoints = vec!["http://a:2379".into()]),
            ("store.path", |c| {
                c.store = StoreSection::etcd("http://a:2379");
                c.store.path = PathBuf::from("meta");
            }),
            ("store.prefix", |c| c.store.prefix = "/team".into()),
            ("advertise-addr", |c| {
                c.store = StoreSection::etcd("http://a:2379");
                c.addr = "0.0.0.0:8300".into();
            }),
            ("event-store.memory-bytes", |c| c.event_store.memory_bytes = 1),
            ("log-level", |c| c.log_level = "millrace=nonsense".into()),
            ("log-file", |c| c.log_file = "./millrace_data".into()),
            ("log-file", |c| c.log_file = "x/../millrace_data/log/server.log".into()),
            ("security.mtls", |c| c.security.mtls = true),
        ];
        for (key, change) in cases {
            let mut config = ServerConfig::default();
            change(&mut config);
            let error = config.validate().unwrap_err().to_string();
            assert!(error.starts_with(key), "{error}");
        }
    }

    #[test]
    fn unknown_keys_in_the_file_are_errors_that_name_them() {
        let dir = std::env::temp_dir().join(format!("millrace-config-{}", std::process::id()));
        std::fs::write(&dir, "cluster-id = \"a\"\nfoo = 1\n").unwrap();
        let error = ServerConfig::load(&dir).unwrap_err().to_string();
        std::fs::remove_file(&dir).unwrap();
        assert!(error.contains("foo"), "{error}");
        assert_eq!(meant("unknown field `addres`, expected one of"), "\ndid you mean addr?");
        assert_eq!(meant("invalid type"), "");
        let beside =
            ServerConfig { log_file: "./millrace_data/server.log".to_owned(), ..ServerConfig::default() };
        beside.validate().unwrap();
    }

    #[test]
    fn an_error_in_the_file_has_its_place_and_no_credentials() {
        let error = |text: &str| ServerConfig::parse(text).unwrap_err();
        for text in [
            "upstreams = \"postgres://u:s3cr3t@h/d\"",
            "[upstreams]\na = \"postgres://u:s3cr3t@h/d\"",
            "[upstreams.a]\nuri = \"postgres://u:s3cr3t@h/d",
            "[upstreams.a]\nuri = \"postgres://u:s3cr3t@h/d\"\nport = 5",
            "gc-ttl = 5\n[upstreams]\na = \"postgres://u:s3cr3t@h/d\"",
        ] {
            assert!(!error(text).contains("s3cr3t"), "{}", error(text));
        }
        assert!(error("cluster-id = \"a\"\n\nfoo = 1").starts_with("line 3, foo: unknown field `foo`"));
        assert!(error("gc-ttl = 5\nfoo = 1").contains("foo"));
        assert_eq!(without_uris("string \"a://b\", expected 'x'"), "string \"<uri>\", expected 'x'");
    }

    #[test]
    fn a_bare_number_is_a_number_of_seconds_where_older_files_have_one() {
        let config = ServerConfig::parse("capture-session-ttl = 10\ngc-ttl = 86400").unwrap();
        assert_eq!(config.capture_session_ttl, HumanDuration::from_secs(10));
        assert!(config.ignored.len() == 1 && config.ignored[0].starts_with("gc-ttl"), "{:?}", config.ignored);
        let text = ServerConfig::parse("capture-session-ttl = \"4s\"").unwrap();
        assert_eq!(text.capture_session_ttl, HumanDuration::from_secs(4));
        for bad in ["capture-session-ttl = \"soon\"", "capture-session-ttl = -1", "capture-session-ttl = []"]
        {
            assert!(ServerConfig::parse(bad).unwrap_err().contains("number of seconds"), "{bad}");
        }
    }

    #[test]
    // behaviour: api-S-4
    fn the_defaults_are_the_same_after_they_were_written_and_read_and_are_what_is_documented() {
        let defaults = ServerConfig::default();
        let text = toml::to_string(&defaults).unwrap();
        assert_eq!(ServerConfig::parse(&text).unwrap(), defaults);
        let json = serde_json::to_value(&defaults).unwrap();
        assert_eq!(serde_json::from_value::<ServerConfig>(json.clone()).unwrap(), defaults);
        // The first block of the page is the defaults; every key is in one of the blocks before the changefeed's.
        let page = include_str!("../../docs/configuration.md");
        let server = page.split("## Changefeed").next().unwrap();
        let blocks: Vec<&str> =
            server.split("```toml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
        assert_eq!(ServerConfig::parse(blocks[0]).unwrap(), defaults);
        let documented: String = blocks.concat();
        for key in nearest::keys_of(&json) {
            let last = key.rsplit('.').next().unwrap();
            assert!(
                documented.contains(&format!("{last} = ")) || documented.contains(&format!("[{key}")),
                "{key}"
            );
        }
        for block in &blocks {
            ServerConfig::parse(block).unwrap();
        }
    }
}
