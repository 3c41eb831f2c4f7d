//! `millrace cli unsafe reset`: deletes everything that a cluster stores (api-cli-config §9.4, coordinator §3).
//!
//! ```text
//!   servers run? --yes, without --force--> refused
//!     | no, or their leases are ended
//!     v
//!   let go of the log at every source --one does not, without --force--> stops here, nothing is deleted
//!     | done, or told what stays behind
//!     v
//!   documents deleted, all of them
//! ```

use std::time::{Duration, Instant};

use clap::Args;
use coordinator::Layout;
use coordinator::backend::{KeyValue, Op, Store, Txn};
use coordinator::layout::ChangefeedKey;
use heartbeatpb::config::ChangefeedInfo;
use serde_json::json;

use super::changefeed::confirm;
use super::store::{Place, PlaceArgs, failed, wrong};
use super::{CliError, print_json, say};

/// Keys of one transaction that deletes.
const CHUNK: usize = 100;
/// How long servers whose leases were ended may hold on to slots.
const RELEASE: Duration = Duration::from_secs(30);
/// Between two attempts to drop a slot.
const AGAIN: Duration = Duration::from_millis(500);

/// Which cluster.
#[derive(Args, Debug)]
pub(super) struct ResetArgs {
    #[command(flatten)]
    place: PlaceArgs,
    /// Do not ask.
    #[arg(long)]
    no_confirm: bool,
    /// End servers that run, and go on where a source cannot be reached.
    #[arg(long)]
    force: bool,
}

/// What was found, and what became of it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Done {
    documents: usize,
    released: Vec<String>,
    /// Changefeeds whose source may go on keeping its log, and why.
    left: Vec<String>,
}

/// Asks, and does it.
pub(super) async fn run(json: bool, arguments: &ResetArgs) -> Result<(), CliError> {
    let place = Place::of(&arguments.place)?;
    let cluster = &place.config.cluster_id;
    let (store, layout) = place.open(true).await?;
    let found = scan(&*store, &layout).await?;
    if found.is_empty() {
        return Err(wrong(format!(
            "there is nothing below {}; check --cluster-id and the store's prefix",
            layout.base()
        )));
    }
    let feeds = found.iter().filter(|kv| is_info(&layout, kv)).count();
    let question = format!(
        "Everything that cluster {cluster} stores is deleted, {feeds} changefeeds with it: {} documents. Go on?",
        found.len()
    );
    if !arguments.no_confirm && !confirm(&question)? {
        return Err(CliError::Aborted);
    }
    let done = reset(&*store, &layout, arguments.force).await?;
    if json {
        return print_json(&json!({
            "cluster_id": cluster, "documents": done.documents, "released": done.released, "left": done.left,
        }));
    }
    for left in &done.left {
        eprintln!("warning: {left}");
    }
    say(&format_args!(
        "Reset cluster {cluster} successfully!\n{} documents are deleted, {} changefeeds have let go of their source.",
        done.documents,
        done.released.len()
    ))
}

fn is_info(layout: &Layout, kv: &KeyValue) -> bool {
    matches!(layout.parse(&kv.key), Some(ChangefeedKey::Info { .. }))
}

async fn scan(store: &dyn Store, layout: &Layout) -> Result<Vec<KeyValue>, CliError> {
    Ok(store.scan(&layout.base()).await.map_err(failed("cannot read the store"))?.found)
}

async fn reset(store: &dyn Store, layout: &Layout, force: bool) -> Result<Done, CliError> {
    let servers: Vec<KeyValue> = scan(store, layout)
        .await?
        .into_iter()
        .filter(|kv| kv.key.starts_with(&layout.capture_prefix()))
        .collect();
    if !servers.is_empty() && !force {
        return Err(wrong(format!(
            "{} servers of the cluster are running; stop them first, or end them with --force",
            servers.len()
        )));
    }
    for lease in servers.iter().filter_map(|kv| kv.lease) {
        store.revoke(lease).await.map_err(failed("cannot end the lease of a server"))?;
    }
    // What they wrote before is read now.
    let found = scan(store, layout).await?;
    let mut done = Done::default();
    let deadline = Instant::now() + RELEASE;
    for kv in found.iter().filter(|kv| is_info(layout, kv)) {
        match release(layout, kv, deadline).await {
            Ok(name) => done.released.push(name),
            Err(left) => done.left.push(left),
        }
    }
    if !done.left.is_empty() && !force {
        return Err(wrong(format!(
            "nothing is deleted, because sources would keep their log for ever: {}; --force deletes all the same",
            done.left.join("; ")
        )));
    }
    done.documents = delete_all(store, layout).await?;
    Ok(done)
}

/// Lets go of what a source keeps for a changefeed. Gives its name, or what stays behind.
async fn release(layout: &Layout, kv: &KeyValue, deadline: Instant) -> Result<String, String> {
    let Some(ChangefeedKey::Info { keyspace, name }) = layout.parse(&kv.key) else {
        return Err(format!("{} is not a changefeed", kv.key));
    };
    let stays = |why: String| format!("changefeed {keyspace}/{name}: {why}");
    let (info, _) = ChangefeedInfo::from_json(&kv.value, keyspace, name)
        .map_err(|error| stays(format!("its description cannot be read: {error}")))?;
    let uri = info.upstream_info.map(|upstream| upstream.uri).unwrap_or_default();
    let upstream = logservice::upstream::open(&uri).map_err(|error| stays(error.chain()))?;
    loop {
        match upstream.drop_retention(&info.id).await {
            Ok(()) => return Ok(format!("{keyspace}/{name}")),
            // A server that has just lost its lease may still read.
            Err(error) if error.is_retryable() && Instant::now() < deadline => {
                tokio::time::sleep(AGAIN).await
            }
            Err(error) => return Err(stays(error.chain())),
        }
    }
}

/// Deletes every key of the cluster; also those that are written meanwhile.
async fn delete_all(store: &dyn Store, layout: &Layout) -> Result<usize, CliError> {
    let mut count = 0;
    loop {
        let found = scan(store, layout).await?;
        if found.is_empty() {
            return Ok(count);
        }
        for chunk in found.chunks(CHUNK) {
            let then = chunk.iter().map(|kv| Op::delete(kv.key.clone())).collect();
            let txn = Txn { then, ..Txn::default() };
            store.txn(txn).await.map_err(failed("cannot delete; run the command again"))?;
            count += chunk.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use coordinator::backend::memory::{self, Disk};
    use heartbeatpb::ChangefeedId;
    use heartbeatpb::config::{ReplicaConfig, UpstreamInfo};
    use heartbeatpb::{NodeId, Ts};

    use super::*;

    /// A store with changefeeds from these sources, and documents of another cluster.
    async fn filled(sources: &[&str]) -> (Arc<dyn Store>, Layout) {
        let store: Arc<dyn Store> = Arc::new(memory::open(&Disk::new()).unwrap());
        let layout = Layout::new("shop").unwrap();
        let mut then = vec![
            Op::put(layout.drain(), b"{}".to_vec()),
            Op::put(layout.operation("a"), b"{}".to_vec()),
            Op::put(Layout::new("shop2").unwrap().drain(), b"{}".to_vec()),
        ];
        for (at, uri) in sources.iter().enumerate() {
            let id = ChangefeedId::fresh(&format!("f{at}"));
            let upstream = UpstreamInfo { uri: (*uri).to_owned(), ..UpstreamInfo::default() };
            let info = ChangefeedInfo::new(id, upstream, "blackhole://", ReplicaConfig::default(), Ts::ZERO);
            then.push(Op::put(layout.info("default", &format!("f{at}")), info.to_json()));
            then.push(Op::put(layout.status("default", &format!("f{at}")), b"{}".to_vec()));
        }
        store.txn(Txn { then, ..Txn::default() }).await.unwrap();
        (store, layout)
    }

    #[tokio::test]
    async fn everything_of_a_cluster_is_deleted_and_nothing_of_another() {
        let (store, layout) = filled(&["generator://bank", "generator://bank"]).await;
        let done = reset(&*store, &layout, false).await.unwrap();
        assert_eq!(
            (done.documents, done.released, done.left.len()),
            (6, vec!["default/f0".to_owned(), "default/f1".to_owned()], 0)
        );
        assert!(store.scan(&layout.base()).await.unwrap().found.is_empty());
        assert_eq!(store.scan("").await.unwrap().found.len(), 1, "the other cluster");
    }

    #[tokio::test]
    async fn servers_that_run_are_ended_only_by_force() {
        let (store, layout) = filled(&[]).await;
        let lease = store.grant(Duration::from_secs(60)).await.unwrap();
        let key = layout.capture(&NodeId::from("n1"));
        let register = Op::Put { key, value: b"{}".to_vec(), lease: Some(lease) };
        store.txn(Txn { then: vec![register], ..Txn::default() }).await.unwrap();
        let refused = reset(&*store, &layout, false).await.unwrap_err().to_string();
        assert!(refused.contains("1 servers") && refused.contains("--force"), "{refused}");
        assert_eq!(store.scan(&layout.base()).await.unwrap().found.len(), 3, "nothing is deleted");
        assert_eq!(reset(&*store, &layout, true).await.unwrap().documents, 2);
        assert_eq!(store.time_to_live(lease).await.unwrap(), None, "its lease is over");
    }

    #[tokio::test]
    async fn a_source_that_would_keep_its_log_is_told_without_its_password() {
        let (store, layout) = filled(&["gopher://u:s3cr3t@h/d"]).await;
        let refused = reset(&*store, &layout, false).await.unwrap_err().to_string();
        assert!(refused.contains("default/f0") && !refused.contains("s3cr3t"), "{refused}");
        assert!(!store.scan(&layout.base()).await.unwrap().found.is_empty());
        let done = reset(&*store, &layout, true).await.unwrap();
        assert_eq!((done.documents, done.left.len()), (4, 1));
    }
}
