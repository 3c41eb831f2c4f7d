//! The documents about one changefeed: what is stored, and what travels to its maintainer and dispatchers.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::{ConfigError, ReplicaConfig, mask_uri};
use crate::{ChangefeedId, ConfigBytes, Gid, MaintainerEpoch, RunningError, Ts, codes};

/// State of a changefeed (coordinator §11.1).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ChangefeedState {
    /// Replicating or waiting to be scheduled.
    #[default]
    Normal,
    /// Older documents only; shown as warning.
    Pending,
    /// Needs a person.
    Failed,
    /// Paused by a person.
    Stopped,
    /// Reached its target.
    Finished,
    /// Being removed.
    Removed,
    /// Trying again after an error.
    Warning,
    /// Not initialised; shown as normal.
    #[serde(rename = "")]
    Uninitialized,
}

impl ChangefeedState {
    /// Every state.
    pub const ALL: [Self; 8] = [
        Self::Normal,
        Self::Pending,
        Self::Failed,
        Self::Stopped,
        Self::Finished,
        Self::Removed,
        Self::Warning,
        Self::Uninitialized,
    ];

    /// The name in documents and in the API.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::Pending => "pending",
            Self::Failed => "failed",
            Self::Stopped => "stopped",
            Self::Finished => "finished",
            Self::Removed => "removed",
            Self::Warning => "warning",
            Self::Uninitialized => "",
        }
    }

    /// The state of a name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.name() == name)
    }

    /// The state that people are shown: the two legacy ones have a modern name.
    #[must_use]
    pub const fn shown(self) -> Self {
        match self {
            Self::Pending => Self::Warning,
            Self::Uninitialized => Self::Normal,
            Self::Normal | Self::Failed | Self::Stopped | Self::Finished | Self::Removed | Self::Warning => {
                self
            }
        }
    }

    /// Value of the metric.
    #[must_use]
    pub const fn metric(self) -> u8 {
        match self {
            Self::Normal => 0,
            Self::Pending => 1,
            Self::Failed => 2,
            Self::Stopped => 3,
            Self::Finished => 4,
            Self::Removed => 5,
            Self::Warning => 6,
            Self::Uninitialized => 7,
        }
    }

    /// Whether a changefeed stored in this state belongs on a node.
    #[must_use]
    pub const fn should_run(self) -> bool {
        !matches!(self, Self::Stopped | Self::Failed | Self::Finished | Self::Removed)
    }

    /// Whether a resume is allowed.
    #[must_use]
    pub const fn is_resumable(self) -> bool {
        matches!(self, Self::Stopped | Self::Failed | Self::Finished)
    }

    /// Whether the upstream must keep its log for a changefeed in this state with this error code.
    /// A failed changefeed without an error keeps it.
    #[must_use]
    pub fn blocks_retention(self, code: Option<&str>) -> bool {
        match self {
            Self::Finished | Self::Removed => false,
            Self::Failed => !code.is_some_and(is_retention_loss),
            Self::Normal | Self::Pending | Self::Stopped | Self::Warning | Self::Uninitialized => true,
        }
    }
}

impl fmt::Display for ChangefeedState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Whether a code says that the upstream no longer has the log: holding more of it cannot help.
fn is_retention_loss(code: &str) -> bool {
    matches!(code, codes::GC_TTL_EXCEEDED | codes::SNAPSHOT_LOST_BY_GC | codes::START_TS_BEFORE_GC)
}

/// How to reach an upstream.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct UpstreamInfo {
    /// `postgres`, `mysql` or `generic`.
    pub kind: String,
    /// Address and credentials.
    pub uri: String,
    /// What the kind needs beside its URI.
    pub options: BTreeMap<String, String>,
}

impl fmt::Debug for UpstreamInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UpstreamInfo")
            .field("kind", &self.kind)
            .field("uri", &mask_uri(&self.uri))
            .finish_non_exhaustive()
    }
}

/// The stored description of a changefeed (coordinator §3.2).
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ChangefeedInfo {
    /// Identity and names.
    #[serde(with = "id_doc", default = "id_doc::absent")]
    pub id: ChangefeedId,
    /// Identity reported by the upstream.
    #[serde(default)]
    pub upstream_id: u64,
    /// Address and credentials of the downstream.
    pub sink_uri: String,
    /// RFC 3339.
    #[serde(default)]
    pub create_time: String,
    /// Changes after it are replicated.
    pub start_ts: Ts,
    /// The changefeed finishes there; zero is never.
    #[serde(default)]
    pub target_ts: Ts,
    /// Older documents only.
    #[serde(default)]
    pub admin_job_type: i32,
    /// Older documents only.
    #[serde(default)]
    pub sort_engine: String,
    /// Older documents only.
    #[serde(default)]
    pub sort_dir: String,
    /// How to reach the upstream.
    #[serde(default)]
    pub upstream_info: Option<UpstreamInfo>,
    /// Replica configuration.
    #[serde(default, deserialize_with = "null_is_default")]
    pub config: ReplicaConfig,
    /// State.
    #[serde(default)]
    pub state: ChangefeedState,
    /// The error that caused the state.
    #[serde(default)]
    pub error: Option<RunningError>,
    /// A warning that did not change the state.
    #[serde(default)]
    pub warning: Option<RunningError>,
    /// Version of the program that created it.
    #[serde(default)]
    pub creator_version: String,
    /// Epoch of its newest maintainer.
    #[serde(default, with = "epoch_doc")]
    pub epoch: Option<MaintainerEpoch>,
    /// Tenant.
    #[serde(default)]
    pub keyspace_id: u32,
}

impl ChangefeedInfo {
    /// A changefeed that was just described and not yet stored: normal, without an epoch.
    #[must_use]
    pub fn new(
        id: ChangefeedId,
        upstream: UpstreamInfo,
        sink_uri: &str,
        config: ReplicaConfig,
        start_ts: Ts,
    ) -> Self {
        Self {
            id,
            upstream_id: 0,
            sink_uri: sink_uri.to_owned(),
            create_time: String::new(),
            start_ts,
            target_ts: Ts::ZERO,
            admin_job_type: 0,
            sort_engine: String::new(),
            sort_dir: String::new(),
            upstream_info: Some(upstream),
            config,
            state: ChangefeedState::Normal,
            error: None,
            warning: None,
            creator_version: String::new(),
            epoch: None,
            keyspace_id: 0,
        }
    }

    /// Reads a document. One without an identity gets a fresh one for the names given here; the flag says so.
    ///
    /// # Errors
    /// When it is not such a document. The text never shows its content.
    pub fn from_json(bytes: &[u8], keyspace: &str, name: &str) -> Result<(Self, bool), ConfigError> {
        let mut info: Self = serde_json::from_slice(bytes).map_err(|e| {
            // The text of a serde error may quote a value; its place and kind are enough.
            ConfigError::Syntax(format!(
                "changefeed document: {:?} error at column {}",
                e.classify(),
                e.column()
            ))
        })?;
        let assigned = info.id.gid.is_zero();
        if assigned {
            info.id = ChangefeedId { gid: Gid::random(), name: name.into(), keyspace: keyspace.into() };
        }
        Ok((info, assigned))
    }

    /// The stored form.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("the schema has string keys and finite numbers only")
    }

    /// The form that travels to a maintainer.
    #[must_use]
    pub fn to_bytes(&self) -> ConfigBytes {
        ConfigBytes(self.to_json().into())
    }

    /// Whether the upstream must keep its log for this changefeed.
    #[must_use]
    pub fn blocks_retention(&self) -> bool {
        self.state.blocks_retention(self.error.as_ref().map(|e| e.code.as_str()))
    }
}

impl fmt::Debug for ChangefeedInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChangefeedInfo")
            .field("id", &self.id)
            .field("state", &self.state)
            .field("start_ts", &self.start_ts)
            .field("epoch", &self.epoch)
            .finish_non_exhaustive()
    }
}

/// What is under way with a changefeed; survives a restart of the coordinator.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Progress {
    /// Nothing.
    #[default]
    None,
    /// It is being removed.
    Removing,
    /// It is being stopped.
    Stopping,
}

impl Serialize for Progress {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u8(match self {
            Self::None => 1,
            Self::Removing => 2,
            Self::Stopping => 3,
        })
    }
}

impl<'de> Deserialize<'de> for Progress {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match u8::deserialize(deserializer)? {
            0 | 1 => Ok(Self::None),
            2 => Ok(Self::Removing),
            3 => Ok(Self::Stopping),
            other => Err(serde::de::Error::custom(format!("unknown progress {other}"))),
        }
    }
}

/// The stored progress of a changefeed (coordinator §3.3).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ChangefeedStatusDoc {
    /// Everything at or before it is durable downstream.
    pub checkpoint_ts: Ts,
    /// What is under way.
    #[serde(default)]
    pub progress: Progress,
    /// Older documents only.
    #[serde(default)]
    pub min_table_barrier_ts: Ts,
    /// Older documents only.
    #[serde(default)]
    pub admin_job_type: i32,
    /// Epoch under which the checkpoint was accepted.
    #[serde(default, with = "epoch_doc")]
    pub epoch: Option<MaintainerEpoch>,
}

impl ChangefeedStatusDoc {
    /// The status of a changefeed that is at `checkpoint` with nothing under way.
    #[must_use]
    pub fn at(checkpoint: Ts, epoch: Option<MaintainerEpoch>) -> Self {
        Self {
            checkpoint_ts: checkpoint,
            progress: Progress::None,
            min_table_barrier_ts: Ts::ZERO,
            admin_job_type: 0,
            epoch,
        }
    }

    /// Reads a document.
    ///
    /// # Errors
    /// When it is not such a document.
    pub fn from_json(bytes: &[u8]) -> Result<Self, ConfigError> {
        serde_json::from_slice(bytes).map_err(|e| ConfigError::Syntax(format!("status document: {e}")))
    }

    /// The stored form.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("the schema has numbers only")
    }
}

/// What a dispatcher manager needs to know; travels as the configuration of a maintainer's bootstrap request.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DispatcherManagerConfig {
    /// The changefeed.
    #[serde(with = "id_doc")]
    pub changefeed: ChangefeedId,
    /// Address and credentials of the downstream.
    pub sink_uri: String,
    /// Replica configuration.
    #[serde(default)]
    pub config: ReplicaConfig,
    /// Start of the changefeed (not of this manager).
    pub start_ts: Ts,
    /// End of the changefeed; zero is never.
    #[serde(default)]
    pub target_ts: Ts,
    /// Epoch of the maintainer that sends it.
    #[serde(default, with = "epoch_doc")]
    pub epoch: Option<MaintainerEpoch>,
}

impl DispatcherManagerConfig {
    /// The part of a changefeed's description that concerns its dispatchers.
    #[must_use]
    pub fn of(info: &ChangefeedInfo) -> Self {
        Self {
            changefeed: info.id.clone(),
            sink_uri: info.sink_uri.clone(),
            config: info.config.clone(),
            start_ts: info.start_ts,
            target_ts: info.target_ts,
            epoch: info.epoch,
        }
    }

    /// Reads the form that travels.
    ///
    /// # Errors
    /// When it is malformed. The text never shows its content.
    pub fn from_bytes(bytes: &ConfigBytes) -> Result<Self, ConfigError> {
        serde_json::from_slice(&bytes.0).map_err(|e| {
            ConfigError::Syntax(format!(
                "dispatcher manager config: {:?} error at column {}",
                e.classify(),
                e.column()
            ))
        })
    }

    /// The form that travels.
    #[must_use]
    pub fn to_bytes(&self) -> ConfigBytes {
        ConfigBytes(
            serde_json::to_vec(self).expect("the schema has string keys and finite numbers only").into(),
        )
    }
}

impl fmt::Debug for DispatcherManagerConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DispatcherManagerConfig")
            .field("changefeed", &self.changefeed)
            .field("start_ts", &self.start_ts)
            .field("epoch", &self.epoch)
            .finish_non_exhaustive()
    }
}

/// Whether a text may name a changefeed: letters and digits with single dashes between, at most 128 bytes.
#[must_use]
pub fn is_valid_name(name: &str) -> bool {
    name.len() <= 128
        && name.split('-').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric()))
}

/// Whether a text may name a keyspace: at most 20 letters, digits, dashes and underscores.
#[must_use]
pub fn is_valid_keyspace(keyspace: &str) -> bool {
    keyspace.len() <= 20 && keyspace.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
}

fn null_is_default<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<ReplicaConfig, D::Error> {
    Ok(Option::<ReplicaConfig>::deserialize(deserializer)?.unwrap_or_default())
}

/// An epoch in a document: 0 is none.
mod epoch_doc {
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::MaintainerEpoch;

    pub(super) fn serialize<S: Serializer>(
        epoch: &Option<MaintainerEpoch>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(MaintainerEpoch::to_wire(*epoch))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<MaintainerEpoch>, D::Error> {
        Ok(MaintainerEpoch::from_wire(u64::deserialize(deserializer)?))
    }
}

/// A changefeed id in a document: `{"id":{"low","high"},"display":{"name","keyspace","namespace"}}`.
mod id_doc {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use crate::{ChangefeedId, Gid};

    #[derive(Serialize, Deserialize)]
    struct Doc {
        id: Halves,
        display: Display,
    }

    #[derive(Serialize, Deserialize)]
    struct Halves {
        low: u64,
        high: u64,
    }

    #[derive(Serialize, Deserialize)]
    struct Display {
        name: String,
        #[serde(default)]
        keyspace: String,
        #[serde(default)]
        namespace: String,
    }

    pub(super) fn absent() -> ChangefeedId {
        ChangefeedId { gid: Gid::new(0, 0), name: "".into(), keyspace: "".into() }
    }

    pub(super) fn serialize<S: Serializer>(id: &ChangefeedId, serializer: S) -> Result<S::Ok, S::Error> {
        Doc {
            id: Halves { low: id.gid.low, high: id.gid.high },
            display: Display {
                name: id.name.to_string(),
                keyspace: id.keyspace.to_string(),
                namespace: id.keyspace.to_string(),
            },
        }
        .serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ChangefeedId, D::Error> {
        let Some(Doc { id, display }) = Option::<Doc>::deserialize(deserializer)? else {
            return Ok(absent());
        };
        let keyspace = if display.keyspace.is_empty() { display.namespace } else { display.keyspace };
        Ok(ChangefeedId {
            gid: Gid::new(id.high, id.low),
            name: display.name.into(),
            keyspace: keyspace.into(),
        })
    }
}
