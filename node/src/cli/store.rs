//! `millrace store`: moves the documents of a cluster between metadata stores.
//!
//! ```text
//!   store of a stopped cluster -- export --> one JSON file -- import --> an empty place in another store
//! ```
//!
//! Everything of the cluster that has no lease travels: changefeeds with their checkpoints and epochs, upstreams,
//! what is known of drains. Registrations and candidacies belong to processes and stay behind. Epochs are kept as
//! they are, so that a maintainer of the new cluster is newer than every one of the old.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, Subcommand};
use coordinator::Layout;
use coordinator::backend::{Compare, KeyValue, MAX_TXN_BYTES, MAX_TXN_OPS, Op, Store, StoreError, Txn, redb};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{CliError, say};
use crate::config::{ServerConfig, StoreKind, StoreSection};

/// Says what a file is.
const FORMAT: &str = "millrace-store";
/// Version of the file. Changes when an older program would misread it.
const VERSION: u32 = 1;
/// Said to people and in the file.
const SECRETS: &str = "The file contains credentials of upstreams and sinks: keep it as you keep a password.";
/// Room that one transaction keeps free for the key and the value of the mark.
const MARK_BYTES: usize = 1024;
/// Key, below the cluster's, that stands while an import is under way.
const MARK: &str = "__cdc_meta__/import";

/// Moves the metadata of a stopped cluster.
#[derive(Subcommand, Debug)]
pub enum StoreCommand {
    /// Write the documents of a store into a new file. Stop the servers first: what they write later is not in it.
    Export(StoreArgs),
    /// Write the documents of a file into an empty store.
    Import(StoreArgs),
}

/// Which store, and which file.
#[derive(Args, Debug)]
pub struct StoreArgs {
    /// The file; readable by its owner only.
    file: PathBuf,
    #[command(flatten)]
    place: PlaceArgs,
}

/// Which store.
#[derive(Args, Debug)]
pub(super) struct PlaceArgs {
    /// Configuration file of a server, TOML: its store is meant.
    #[arg(long)]
    pub(super) config: Option<PathBuf>,
    /// Data directory of a server: the embedded store in it is meant. ./millrace_data by default.
    #[arg(long)]
    data_dir: Option<PathBuf>,
    /// etcd endpoints with commas between: the store there is meant.
    #[arg(long, value_name = "ENDPOINTS", conflicts_with = "data_dir")]
    store: Option<String>,
    /// Name that isolates clusters; `default` by default.
    #[arg(long)]
    cluster_id: Option<String>,
}

/// The file.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Dump {
    format: String,
    version: u32,
    note: String,
    program: String,
    cluster_id: String,
    /// Identity of the store that it was read from.
    store: u64,
    /// Where that store was.
    revision: u64,
    documents: Vec<Document>,
}

#[derive(Serialize, Deserialize, Clone, PartialEq, Eq)]
struct Document {
    /// Below the cluster's own part of the key.
    key: String,
    #[serde(flatten)]
    content: Content,
}

/// What a key holds.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
enum Content {
    /// A JSON document that is written as it was read.
    Json(Value),
    /// Any other text.
    Text(String),
}

impl Content {
    fn of(bytes: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(bytes).ok()?;
        match serde_json::from_str::<Value>(text) {
            Ok(value) if serde_json::to_string(&value).is_ok_and(|written| written == text) => {
                Some(Self::Json(value))
            }
            Ok(_) | Err(_) => Some(Self::Text(text.to_owned())),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Json(value) => value.to_string().into_bytes(),
            Self::Text(text) => text.clone().into_bytes(),
        }
    }
}

/// Runs a command.
///
/// # Errors
/// When the store or the file cannot be used; the text says what to do.
pub async fn run(command: StoreCommand) -> Result<(), CliError> {
    match command {
        StoreCommand::Export(arguments) => {
            let place = Place::of(&arguments.place)?;
            let (store, layout) = place.open(true).await?;
            let (count, running) =
                export(&*store, &layout, &place.config.cluster_id, &arguments.file).await?;
            say(&format_args!("{count} documents are in {}. {SECRETS}", arguments.file.display()))?;
            if running > 0 {
                say(&format_args!(
                    "{running} servers of the cluster are running: what they write from now on is not in the file."
                ))?;
            }
            Ok(())
        }
        StoreCommand::Import(arguments) => {
            // Everything that can be wrong with the file is found before the store is touched.
            let dump = read(&arguments.file)?;
            let place = Place::of(&arguments.place)?;
            let (store, layout) = place.open(false).await?;
            let count = import(&*store, &layout, &dump).await?;
            say(&format_args!(
                "{count} documents were written. Do not start servers with the store that they come from: \
                 both clusters would write the same changefeeds."
            ))
        }
    }
}

pub(super) fn wrong(what: impl Into<String>) -> CliError {
    CliError::Usage(what.into())
}

pub(super) fn failed(what: &str) -> impl Fn(StoreError) -> CliError + '_ {
    move |error| wrong(format!("{what}: {error}"))
}

/// Which store a person means.
pub(super) struct Place {
    pub(super) config: ServerConfig,
}

impl Place {
    pub(super) fn of(arguments: &PlaceArgs) -> Result<Self, CliError> {
        let mut config = match &arguments.config {
            Some(path) => ServerConfig::load(path).map_err(|error| wrong(error.to_string()))?,
            None => ServerConfig::default(),
        };
        if let Some(endpoints) = &arguments.store {
            let prefix = std::mem::take(&mut config.store.prefix);
            config.store = StoreSection { prefix, ..StoreSection::etcd(endpoints) };
        }
        if let Some(dir) = &arguments.data_dir {
            config.data_dir.clone_from(dir);
            config.store = StoreSection::default();
        }
        if let Some(cluster) = &arguments.cluster_id {
            config.cluster_id.clone_from(cluster);
        }
        config.validate().map_err(|error| wrong(error.to_string()))?;
        Ok(Self { config })
    }

    /// Opens the store. `existing`: it has to be there already.
    pub(super) async fn open(&self, existing: bool) -> Result<(Arc<dyn Store>, Layout), CliError> {
        let layout = Layout::new(&self.config.cluster_id).map_err(|error| wrong(error.to_string()))?;
        let store: Arc<dyn Store> = match self.config.store.kind {
            StoreKind::Embedded => {
                let dir = match &self.config.store.path {
                    path if path.as_os_str().is_empty() => self.config.data_dir.join("meta"),
                    path => path.clone(),
                };
                if existing && !dir.join("meta.redb").exists() {
                    return Err(wrong(format!(
                        "there is no store in {}; name the data directory of a server with --data-dir, or etcd with \
                         --store",
                        dir.display()
                    )));
                }
                let opened = tokio::task::spawn_blocking(move || redb::open(&dir)).await;
                let opened = opened.map_err(|_| wrong("the store could not be opened"))?;
                Arc::new(opened.map_err(|error| {
                    if let StoreError::Locked(dir) = error {
                        return wrong(format!("a running server holds the store in {dir}; stop it first"));
                    }
                    wrong(error.to_string())
                })?)
            }
            #[cfg(feature = "etcd")]
            StoreKind::Etcd => {
                let connected =
                    coordinator::backend::etcd::connect(self.config.store.etcd_config(&self.config.security))
                        .await;
                Arc::new(connected.map_err(failed("cannot reach the store"))?)
            }
            #[cfg(not(feature = "etcd"))]
            StoreKind::Etcd => return Err(wrong("this program was built without etcd")),
        };
        Ok((store, layout))
    }
}

/// Whether a key belongs to a process: a registration, a candidacy.
fn is_of_a_process(layout: &Layout, kv: &KeyValue) -> bool {
    kv.lease.is_some()
        || kv.key.starts_with(&layout.capture_prefix())
        || kv.key.starts_with(&format!("{}/", layout.owner_prefix()))
}

/// Writes everything into a new file. Gives the number of documents, and of servers that are registered.
async fn export(
    store: &dyn Store,
    layout: &Layout,
    cluster_id: &str,
    path: &Path,
) -> Result<(usize, usize), CliError> {
    let base = layout.base();
    let found = store.scan(&base).await.map_err(failed("cannot read the store"))?;
    if found.found.iter().any(|kv| kv.key == format!("{base}{MARK}")) {
        return Err(wrong("an import into this store did not finish; import again, then export"));
    }
    let registered = layout.capture_prefix();
    let running = found.found.iter().filter(|kv| kv.key.starts_with(&registered)).count();
    let mut documents = Vec::new();
    for kv in found.found.iter().filter(|kv| !is_of_a_process(layout, kv)) {
        let content = Content::of(&kv.value)
            .ok_or_else(|| wrong(format!("{} does not hold text; nothing was written", kv.key)))?;
        let key = kv.key.strip_prefix(&base).unwrap_or(&kv.key).to_owned();
        documents.push(Document { key, content });
    }
    if documents.is_empty() {
        return Err(wrong(format!(
            "there is nothing below {base}; check --cluster-id and the store's prefix"
        )));
    }
    let count = documents.len();
    let dump = Dump {
        format: FORMAT.to_owned(),
        version: VERSION,
        note: SECRETS.to_owned(),
        program: env!("CARGO_PKG_VERSION").to_owned(),
        cluster_id: cluster_id.to_owned(),
        store: store.identity().await.map_err(failed("cannot read the store"))?,
        revision: found.revision,
        documents,
    };
    write_new(path, &dump).map_err(|error| wrong(format!("cannot write {}: {error}", path.display())))?;
    Ok((count, running))
}

/// Writes a file that was not there, which only its owner can read; all of it or nothing.
fn write_new(path: &Path, dump: &Dump) -> std::io::Result<()> {
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt as _;
        options.mode(0o600);
    }
    let mut file = options.open(path)?;
    let written = serde_json::to_string_pretty(dump)
        .map_err(std::io::Error::from)
        .and_then(|text| writeln!(file, "{text}"))
        .and_then(|()| file.sync_all());
    if written.is_err() {
        // The disk is full, most likely; half a file helps nobody.
        let _ = std::fs::remove_file(path);
    }
    written
}

/// Reads a file and checks everything that can be checked without a store.
fn read(path: &Path) -> Result<Dump, CliError> {
    let wrong = |what: String| wrong(format!("{}: {what}; nothing was written", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    // First what it is: the rest of another version may look different. The cause is not repeated, it may quote.
    let value: Value = serde_json::from_str(&text).map_err(|error| {
        wrong(format!("it is not JSON, see line {} column {}", error.line(), error.column()))
    })?;
    if value.get("format").and_then(Value::as_str) != Some(FORMAT) {
        return Err(wrong("it was not written by `millrace store export`".to_owned()));
    }
    match value.get("version").and_then(Value::as_u64) {
        Some(version) if version == u64::from(VERSION) => {}
        Some(version) => {
            return Err(wrong(format!("it has version {version} and this program reads version {VERSION}")));
        }
        None => return Err(wrong("it does not say its version".to_owned())),
    }
    let dump: Dump = serde_json::from_value(value).map_err(|_| wrong("it is damaged".to_owned()))?;
    check(&dump).map_err(wrong)?;
    Ok(dump)
}

fn check(dump: &Dump) -> Result<(), String> {
    let mut keys: Vec<&str> = Vec::new();
    for Document { key, content } in &dump.documents {
        let of_process =
            ["__cdc_meta__/capture/", "__cdc_meta__/owner/"].iter().any(|part| key.starts_with(part));
        if key.is_empty() || key.starts_with('/') || of_process || key == MARK {
            return Err(format!("{key:?} is not a key of a document"));
        }
        if key.len() + content.bytes().len() + MARK_BYTES > MAX_TXN_BYTES {
            return Err(format!("the document {key} is larger than a store takes"));
        }
        keys.push(key);
    }
    if keys.is_empty() {
        return Err("it holds no document".to_owned());
    }
    keys.sort_unstable();
    match keys.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(format!("it holds {} twice", pair[0])),
        None => Ok(()),
    }
}

/// Writes everything, or nothing: when one transaction is not enough, a mark stands until all is there, and what an
/// earlier import left behind its mark is cleared away.
async fn import(store: &dyn Store, layout: &Layout, dump: &Dump) -> Result<usize, CliError> {
    let base = layout.base();
    let mark = format!("{base}{MARK}");
    let own = uuid::Uuid::new_v4().to_string().into_bytes();
    let found = store.scan(&base).await.map_err(failed("cannot read the store"))?.found;
    if found.iter().any(|kv| is_of_a_process(layout, kv)) {
        return Err(wrong(format!(
            "servers of the cluster are running on {base}; stop them. Nothing was written"
        )));
    }
    let left = found.iter().find(|kv| kv.key == mark);
    if let Some(kv) = found.first()
        && left.is_none()
    {
        let others = found.len() - 1;
        return Err(wrong(format!(
            "the store is not empty: it holds {} and {others} more below {base}; choose another --cluster-id or \
             another store. Nothing was written",
            kv.key
        )));
    }
    let before = match left {
        Some(kv) => Compare::ModRevision { key: mark.clone(), revision: kv.mod_revision },
        None => Compare::Absent { key: mark.clone() },
    };
    let taken = Txn { when: vec![before], then: vec![Op::put(&mark, own.clone())], or_else: Vec::new() };
    if !apply(store, taken, &mark, &own).await? {
        return Err(wrong("another import into the same store is under way. Nothing was written"));
    }
    let old: Vec<Op> = found.iter().filter(|kv| kv.key != mark).map(|kv| Op::delete(&kv.key)).collect();
    let new: Vec<Op> = dump
        .documents
        .iter()
        .map(|document| Op::put(format!("{base}{}", document.key), document.content.bytes()))
        .collect();
    let done = write_all(store, &mark, &own, old, new.clone()).await;
    if let Err(error) = done {
        let keys =
            dump.documents.iter().map(|document| Op::delete(format!("{base}{}", document.key))).collect();
        return Err(match write_all(store, &mark, &own, keys, Vec::new()).await {
            Ok(()) => wrong(format!("{error}. What was written was taken back")),
            Err(_) => wrong(format!(
                "{error}. A part may be there: import again before a server is started with this store"
            )),
        });
    }
    Ok(dump.documents.len())
}

/// Carries out changes under our mark, and takes the mark away together with the last of them.
async fn write_all(
    store: &dyn Store,
    mark: &str,
    own: &[u8],
    old: Vec<Op>,
    new: Vec<Op>,
) -> Result<(), CliError> {
    let mut chunks = chunked(old);
    chunks.extend(chunked(new));
    let last = chunks.pop().unwrap_or_default();
    let held = || vec![Compare::Value { key: mark.to_owned(), value: own.to_vec() }];
    for then in chunks {
        let txn = Txn { when: held(), then, or_else: Vec::new() };
        if !apply(store, txn, mark, own).await? {
            return Err(wrong("another import into the same store has begun"));
        }
    }
    let then = last.into_iter().chain([Op::delete(mark)]).collect();
    let txn = Txn { when: held(), then, or_else: Vec::new() };
    match store.txn(txn.clone()).await {
        Ok(outcome) if outcome.succeeded => Ok(()),
        Ok(_) => Err(wrong("another import into the same store has begun")),
        Err(error) if error.may_have_applied() => {
            // With the mark everything went at once; while it stands nothing of this did.
            let left = store.get(mark).await.map_err(failed("the store does not answer any more"))?.found;
            match left {
                None => Ok(()),
                Some(kv) if kv.value == own => {
                    let again =
                        store.txn(txn).await.map_err(failed("the store does not take the documents"))?;
                    if again.succeeded { Ok(()) } else { Err(wrong("another import has begun")) }
                }
                Some(_) => Err(wrong("another import into the same store has begun")),
            }
        }
        Err(error) => Err(failed("the store does not take the documents")(error)),
    }
}

/// Changes in portions that one transaction takes, the mark included.
fn chunked(ops: Vec<Op>) -> Vec<Vec<Op>> {
    let (mut chunks, mut bytes) = (Vec::<Vec<Op>>::new(), 0);
    for op in ops {
        let more = match &op {
            Op::Put { key, value, .. } => key.len() + value.len(),
            Op::Delete { key } => key.len(),
        };
        match chunks.last_mut() {
            Some(chunk) if chunk.len() + 1 < MAX_TXN_OPS && bytes + more + MARK_BYTES <= MAX_TXN_BYTES => {
                bytes += more;
                chunk.push(op);
            }
            Some(_) | None => {
                bytes = more;
                chunks.push(vec![op]);
            }
        }
    }
    chunks
}

/// Runs a transaction that leaves our mark, once or twice; whether its condition held.
async fn apply(store: &dyn Store, txn: Txn, mark: &str, own: &[u8]) -> Result<bool, CliError> {
    let refused = failed("the store does not take the documents");
    match store.txn(txn.clone()).await {
        Ok(outcome) => Ok(outcome.succeeded),
        // Every operation is the same when it is repeated, and nobody else writes under our mark.
        Err(error) if error.may_have_applied() => {
            let kv = store.get(mark).await.map_err(&refused)?.found;
            if kv.is_some_and(|kv| kv.value == own) && txn.then.iter().any(|op| is_mark(op, mark)) {
                return Ok(true);
            }
            Ok(store.txn(txn).await.map_err(&refused)?.succeeded)
        }
        Err(error) => Err(refused(error)),
    }
}

fn is_mark(op: &Op, mark: &str) -> bool {
    matches!(op, Op::Put { key, .. } if key == mark)
}

#[cfg(test)]
mod tests;
