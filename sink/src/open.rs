//! From a sink URI to a running sink, and the checks made when a changefeed is created.

use std::path::PathBuf;
use std::sync::Arc;

use event::CopyTarget;
use heartbeatpb::config::ReplicaConfig;
use heartbeatpb::{ChangefeedId, MaintainerEpoch, NodeId, WritePermit};
use url::Url;

use crate::blackhole::BlackholeSink;
use crate::file::{FileConfig, FileSink};
use crate::postgres::{self, PostgresCopies, PostgresSink};
use crate::{Error, Sink};

/// What a sink needs besides its URI.
#[derive(Clone, Debug)]
pub struct SinkOptions {
    /// The changefeed that writes.
    pub changefeed: ChangefeedId,
    /// The node on which the sink runs. A newer sink of a node takes the place of the older ones of its changefeed.
    pub node: NodeId,
    /// Epoch of the maintainer that wants the sink.
    pub epoch: Option<MaintainerEpoch>,
    /// Directory of the node for what a sink spools; a sink makes its own place below it.
    pub data_dir: PathBuf,
    /// The changefeed's configuration; its `[sink]` part says how files are written.
    pub replica: ReplicaConfig,
    /// Looked at before every effect. While it does not hold, what the sink has taken waits.
    pub permit: WritePermit,
}

impl SinkOptions {
    /// Options with the configuration at its defaults, for a sink of a node of its own, which may always write.
    #[must_use]
    pub fn new(changefeed: ChangefeedId, data_dir: impl Into<PathBuf>) -> Self {
        Self {
            changefeed,
            node: NodeId::random(),
            epoch: None,
            data_dir: data_dir.into(),
            replica: ReplicaConfig::default(),
            permit: WritePermit::always(),
        }
    }
}

/// Which database a downstream is, to notice that it is the upstream itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DownstreamIdentity {
    /// PostgreSQL: `pg_control_system().system_identifier`, in decimal.
    pub system_identifier: String,
    /// Database name.
    pub database: String,
}

/// What the check of a downstream found.
#[derive(Clone, Debug, Default)]
pub struct SinkCheck {
    /// `None` for downstreams that are no database.
    pub identity: Option<DownstreamIdentity>,
    /// Things that work but that a person should know.
    pub warnings: Vec<String>,
}

/// What a URI names.
pub(crate) enum Target {
    Postgres,
    File,
    Blackhole(Url),
}

/// Parses the URI as far as needed to choose the sink. Error texts never quote it: it may hold a password.
pub(crate) fn target(uri: &str) -> Result<Target, Error> {
    let scheme = uri.split_once(':').map_or("", |(scheme, _)| scheme);
    match scheme.to_ascii_lowercase().as_str() {
        "postgres" | "postgresql" => Ok(Target::Postgres),
        "file" => Ok(Target::File),
        "blackhole" => Url::parse(uri)
            .map(Target::Blackhole)
            .map_err(|e| Error::Config(format!("the sink URI is not a URI: {e}"))),
        "" => Err(Error::Config(
            "the sink URI has no scheme, such as postgres://, file:// or blackhole://".into(),
        )),
        other => Err(Error::Config(format!(
            "sink scheme {:?} is not supported; use postgres, file or blackhole",
            other.chars().take(32).collect::<String>()
        ))),
    }
}

/// Opens a sink: parses the URI, connects, and prepares the downstream's own tables.
///
/// # Errors
/// [`Error::Config`] for a wrong URI, [`Error::Unavailable`] when the downstream does not answer,
/// [`Error::Rejected`] when it refuses the user or a permission is missing, [`Error::Fenced`] when the changefeed has
/// gone on without this node.
pub async fn open(uri: &str, options: &SinkOptions) -> Result<Arc<dyn Sink>, Error> {
    match target(uri)? {
        Target::Postgres => Ok(Arc::new(PostgresSink::open(uri, options).await?)),
        Target::File => {
            let config = FileConfig::for_changefeed(uri, &options.replica)?;
            Ok(Arc::new(FileSink::open_permitted(config, &options.changefeed, options.permit.clone()).await?))
        }
        Target::Blackhole(url) => Ok(Arc::new(BlackholeSink::new(&url, options)?)),
    }
}

/// The downstream's way for existing rows past the stream; `None` where it has none. Nothing is connected yet.
///
/// # Errors
/// [`Error::Config`] for a wrong URI.
pub fn copies(uri: &str, options: &SinkOptions) -> Result<Option<Arc<dyn CopyTarget>>, Error> {
    match target(uri)? {
        Target::Postgres => Ok(Some(Arc::new(PostgresCopies::new(uri, options)?))),
        Target::File | Target::Blackhole(_) => Ok(None),
    }
}

/// Checks a downstream before a changefeed is created: it answers, the user may do what the sink needs,
/// and which database it is. Leaves nothing behind.
///
/// # Errors
/// As [`open`].
pub async fn check(uri: &str, options: &SinkOptions) -> Result<SinkCheck, Error> {
    match target(uri)? {
        Target::Postgres => postgres::check(uri).await,
        Target::File => {
            let warnings = FileSink::check(&FileConfig::for_changefeed(uri, &options.replica)?).await?;
            Ok(SinkCheck { identity: None, warnings })
        }
        Target::Blackhole(url) => BlackholeSink::new(&url, options).map(|_| SinkCheck::default()),
    }
}

/// Which database the downstream is; `None` when it is no database.
///
/// # Errors
/// As [`open`].
pub async fn downstream_identity(uri: &str) -> Result<Option<DownstreamIdentity>, Error> {
    match target(uri)? {
        Target::Postgres => Ok(postgres::check(uri).await?.identity),
        Target::File | Target::Blackhole(_) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> SinkOptions {
        SinkOptions::new(ChangefeedId::fresh("test"), "unused")
    }

    #[tokio::test]
    async fn an_unknown_scheme_is_refused_without_quoting_the_uri() {
        let error = check("mysql://user:secret@host/db", &options()).await.expect_err("not supported");
        assert_eq!(error.code(), "CDC:ErrSinkURIInvalid");
        assert!(!error.to_string().contains("secret"));
        assert!(check("nonsense", &options()).await.is_err());
    }

    #[tokio::test]
    async fn a_black_hole_opens_without_anything() {
        let sink = open("blackhole://", &options()).await.expect("no dependencies");
        assert!(sink.healthy());
        assert!(!sink.wants_checkpoints());
    }
}
