//! Documents move between the stores of one node and of a cluster, whole or not at all.

use std::os::unix::fs::PermissionsExt as _;

use coordinator::backend::memory;
use heartbeatpb::config::{ChangefeedInfo, ChangefeedStatusDoc};
use testkit::Etcd;

use super::*;

const URI: &str = "postgres://me:s3cret@target/db";

fn arguments(words: &[&str]) -> StoreCommand {
    #[derive(clap::Parser)]
    struct Program {
        #[command(subcommand)]
        command: StoreCommand,
    }
    use clap::Parser as _;
    Program::try_parse_from(["store"].iter().chain(words)).unwrap().command
}

async fn millrace(words: &[&str]) -> Result<(), String> {
    run(arguments(words)).await.map_err(|error| error.to_string())
}

fn layout() -> Layout {
    Layout::new("default").unwrap()
}

fn info(name: &str, epoch: u64) -> Vec<u8> {
    let text = format!(
        r#"{{"id":{{"id":{{"low":1,"high":2}},"display":{{"name":"{name}","keyspace":"default","namespace":"default"}}}},"upstream-id":7,"sink-uri":"{URI}","create-time":"2026-03-01T08:00:12.481Z","start-ts":5,"target-ts":0,"admin-job-type":0,"sort-engine":"unified","sort-dir":"","upstream-info":null,"config":{{"memory-quota":536870912}},"state":"stopped","error":null,"warning":null,"creator-version":"v1","epoch":{epoch},"keyspace-id":0}}"#
    );
    text.into_bytes()
}

/// Documents of `count` changefeeds and of everything else that is kept, with a registration and a candidacy.
async fn fill(store: &dyn Store, count: u64) {
    let layout = layout();
    for at in 0..count {
        let name = format!("feed-{at:04}");
        let status = format!(
            r#"{{"checkpoint-ts":{at},"progress":1,"min-table-barrier-ts":0,"admin-job-type":0,"epoch":9}}"#
        );
        let then = vec![
            Op::put(layout.info("default", &name), info(&name, 100 + at)),
            Op::put(layout.status("default", &name), status.into_bytes()),
        ];
        store.txn(Txn { then, ..Txn::default() }).await.unwrap();
    }
    let session = store.session(std::time::Duration::from_secs(60)).await.unwrap();
    let registration =
        Op::Put { key: layout.capture(&"node-1".into()), value: b"{}".to_vec(), lease: Some(session.lease) };
    let then = vec![
        registration,
        Op::put(layout.drain(), br#"{"epoch":3}"#.to_vec()),
        Op::put(format!("{}__cdc_meta__/meta/meta-version", layout.base()), b"1".to_vec()),
        Op::put(format!("{}default/upstream/7", layout.base()), b"{ \"spaced\": 1.50 }".to_vec()),
        Op::put("/tidb/cdc/other-cluster/default/changefeed/info/x", b"{}".to_vec()),
    ];
    store.txn(Txn { then, ..Txn::default() }).await.unwrap();
    store.campaign(&layout.owner_prefix(), session.lease, "node-1").await.unwrap();
}

/// What should travel: keys and values below the cluster's own key, without those of processes.
async fn documents(store: &dyn Store, cluster: &str) -> Vec<(String, Vec<u8>)> {
    let layout = Layout::new(cluster).unwrap();
    let found = store.scan(&layout.base()).await.unwrap().found;
    let kept = found.into_iter().filter(|kv| !is_of_a_process(&layout, kv));
    kept.map(|kv| (kv.key.strip_prefix(&layout.base()).unwrap().to_owned(), kv.value)).collect()
}

struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    fn embedded(&self, name: &str) -> coordinator::backend::LocalStore {
        redb::open(&self.dir.path().join(name).join("meta")).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_travel_from_embedded_to_etcd_and_back_with_their_epochs() {
    let world = World::new();
    let etcd = Etcd::start().await.unwrap();
    let endpoint = etcd.endpoint(0);
    let (data, back) = (world.path("data"), world.path("back"));
    let (first, second) = (world.path("first.json"), world.path("second.json"));
    let original = {
        let store = world.embedded("data");
        fill(&store, 150).await;
        let locked = millrace(&["export", &first, "--data-dir", &data]).await.unwrap_err();
        assert!(
            locked.contains("a running server holds the store") && locked.contains("stop it"),
            "{locked}"
        );
        documents(&store, "default").await
    };
    assert_eq!(original.len(), 303);
    millrace(&["export", &first, "--data-dir", &data]).await.unwrap();
    let mode = std::fs::metadata(&first).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let text = std::fs::read_to_string(&first).unwrap();
    assert!(text.contains("s3cret") && text.contains("contains credentials"));
    assert!(!text.contains("node-1") && !text.contains("/owner/") && !text.contains("other-cluster"));

    millrace(&["import", &first, "--store", &endpoint, "--cluster-id", "moved"]).await.unwrap();
    let config = coordinator::backend::etcd::EtcdConfig::new([endpoint.clone()]);
    let there = coordinator::backend::etcd::connect(config).await.unwrap();
    assert_eq!(documents(&there, "moved").await, original);
    assert!(there.scan("/tidb/cdc/default/").await.unwrap().found.is_empty());

    // The next epoch is larger than all before, whatever revisions the new store begins with.
    let session = there.session(std::time::Duration::from_secs(60)).await.unwrap();
    let moved = Layout::new("moved").unwrap();
    let fence = there.campaign(&moved.owner_prefix(), session.lease, "n").await.unwrap();
    let meta = coordinator::meta::Meta::new(Arc::new(there.clone()), moved, fence);
    let stored = meta.get("default", "feed-0149").await.unwrap();
    assert_eq!(stored.info.epoch.unwrap().get(), 249);
    let bumped = meta.bump_epoch(&stored.info.id, 1, |_| Ok(())).await.unwrap();
    // Every number of the maintainer before lies behind it.
    assert_eq!(bumped.info.epoch, heartbeatpb::MaintainerEpoch::successor(stored.info.epoch, 0));
    assert_eq!(bumped.info.epoch.unwrap().get(), 249 + heartbeatpb::MaintainerEpoch::ROOM);

    let refused =
        millrace(&["import", &first, "--store", &endpoint, "--cluster-id", "moved"]).await.unwrap_err();
    assert!(refused.contains("servers of the cluster are running"), "{refused}");
    there.revoke(session.lease).await.unwrap();
    let refused =
        millrace(&["import", &first, "--store", &endpoint, "--cluster-id", "moved"]).await.unwrap_err();
    assert!(refused.contains("not empty") && !refused.contains("s3cret"), "{refused}");
    let now = documents(&there, "moved").await;

    millrace(&["export", &second, "--store", &endpoint, "--cluster-id", "moved"]).await.unwrap();
    millrace(&["import", &second, "--data-dir", &back]).await.unwrap();
    let store = world.embedded("back");
    assert_eq!(documents(&store, "default").await, now);
    assert_eq!(now.len(), original.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_never_overwritten_and_a_store_never_made_by_an_export() {
    let world = World::new();
    let (data, file) = (world.path("data"), world.path("file.json"));
    let missing = millrace(&["export", &file, "--data-dir", &data]).await.unwrap_err();
    assert!(missing.contains("there is no store in"), "{missing}");
    assert!(!Path::new(&data).exists() && !Path::new(&file).exists());
    drop(world.embedded("data"));
    let empty = millrace(&["export", &file, "--data-dir", &data]).await.unwrap_err();
    assert!(empty.contains("there is nothing below /tidb/cdc/default/"), "{empty}");
    fill(&world.embedded("data"), 1).await;
    std::fs::write(&file, "mine").unwrap();
    assert!(millrace(&["export", &file, "--data-dir", &data]).await.is_err());
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "mine");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_does_not_fit_is_refused_before_anything_is_written() {
    let world = World::new();
    let (file, data) = (world.path("file.json"), world.path("data"));
    let good = || {
        serde_json::json!({
            "format": "millrace-store", "version": 1, "note": "", "program": "0", "cluster-id": "default",
            "store": 1, "revision": 5,
            "documents": [{ "key": "default/changefeed/info/a", "json": { "sink-uri": URI } }],
        })
    };
    let with = |change: fn(&mut Value)| {
        let mut value = good();
        change(&mut value);
        value.to_string()
    };
    for (text, expected) in [
        ("{ s3cret".to_owned(), "it is not JSON, see line 1"),
        ("{}".to_owned(), "was not written by"),
        (with(|file| file["version"] = 2.into()), "it has version 2 and this program reads version 1"),
        (with(|file| file["version"] = "1".into()), "does not say its version"),
        (with(|file| file["more"] = "s3cret".into()), "damaged"),
        (with(|file| file["documents"][0]["key"] = "/absolute".into()), "not a key"),
        (with(|file| file["documents"][0]["key"] = "__cdc_meta__/owner/1".into()), "not a key"),
        (with(|file| file["documents"] = Value::Array(Vec::new())), "no document"),
        (
            with(|file| file["documents"][0]["json"] = "x".repeat(MAX_TXN_BYTES).into()),
            "larger than a store takes",
        ),
        (
            with(|file| {
                let first = file["documents"][0].clone();
                file["documents"].as_array_mut().unwrap().push(first);
            }),
            "twice",
        ),
    ] {
        std::fs::write(&file, text).unwrap();
        let error = millrace(&["import", &file, "--data-dir", &data]).await.unwrap_err();
        assert!(error.contains(expected) && error.contains("nothing was written"), "{expected}: {error}");
        assert!(!error.contains("s3cret") && !Path::new(&data).exists(), "{error}");
    }
    std::fs::write(&file, good().to_string()).unwrap();
    millrace(&["import", &file, "--data-dir", &data]).await.unwrap();
    assert_eq!(documents(&world.embedded("data"), "default").await.len(), 1);
}

#[tokio::test]
async fn an_import_that_was_interrupted_is_done_again_from_the_start() {
    let store = memory::open(&memory::Disk::new()).unwrap();
    let layout = layout();
    let mark = format!("{}{MARK}", layout.base());
    let left = Txn {
        then: vec![
            Op::put(&mark, b"somebody".to_vec()),
            Op::put(layout.info("default", "half"), info("half", 1)),
        ],
        ..Txn::default()
    };
    store.txn(left).await.unwrap();
    let file = World::new();
    let path = file.dir.path().join("file.json");
    let unfinished = export(&store, &layout, "default", &path).await.unwrap_err().to_string();
    assert!(unfinished.contains("did not finish"), "{unfinished}");

    let documents_of = |count: usize| -> Vec<Document> {
        let status = ChangefeedStatusDoc::from_json(br#"{"checkpoint-ts":5,"progress":1}"#).unwrap();
        let json: Value = serde_json::from_slice(&status.to_json()).unwrap();
        (0..count)
            .map(|at| Document {
                key: format!("default/changefeed/status/{at}"),
                content: Content::Json(json.clone()),
            })
            .collect()
    };
    let dump = Dump {
        format: FORMAT.to_owned(),
        version: VERSION,
        note: String::new(),
        program: String::new(),
        cluster_id: "default".to_owned(),
        store: 1,
        revision: 1,
        documents: documents_of(1000),
    };
    assert_eq!(import(&store, &layout, &dump).await.unwrap(), 1000);
    let found = documents(&store, "default").await;
    assert_eq!(found.len(), 1000, "the half of the earlier one and the mark are gone");
    assert!(ChangefeedInfo::from_json(&info("x", 7), "default", "x").is_ok());
}

#[test]
fn portions_fit_into_transactions_together_with_the_mark() {
    let ops: Vec<Op> = (0..400).map(|at| Op::put(format!("{at}"), vec![0; at * 40])).collect();
    let chunks = chunked(ops.clone());
    for chunk in &chunks {
        let then = chunk.iter().cloned().chain([Op::delete("m".repeat(500))]).collect();
        let when = vec![Compare::Value { key: "m".repeat(100), value: vec![0; 36] }];
        Txn { when, then, or_else: Vec::new() }.check().unwrap();
    }
    assert_eq!(chunks.concat(), ops);
    assert!(chunks.len() > 3 && chunks.iter().any(|chunk| chunk.len() < 100));
}
