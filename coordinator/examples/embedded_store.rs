//! Opens an embedded metadata store, elects a coordinator in it, and shows why a replaced one cannot write.
//!
//! Run it with `cargo run -p coordinator --example embedded_store`; run it twice to see revisions go on.

use std::sync::Arc;
use std::time::Duration;

use coordinator::Layout;
use coordinator::backend::{Store, redb};
use coordinator::meta::{Meta, Stored};
use heartbeatpb::config::{ChangefeedInfo, ChangefeedStatusDoc, ReplicaConfig, UpstreamInfo};
use heartbeatpb::{ChangefeedId, Ts};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = std::env::temp_dir().join("millrace-example-store");
    let store: Arc<dyn Store> = Arc::new(redb::open(&dir)?);
    println!("store {:x} in {}", store.identity().await?, dir.display());

    let layout = Layout::new("example")?;
    let session = store.session(Duration::from_secs(10)).await?;
    let won = store.campaign(&layout.owner_prefix(), session.lease, "this-node").await?;
    println!("elected; this coordinator has version {}", won.revision);
    let meta = Meta::new(Arc::clone(&store), layout.clone(), won);

    let (sink, config) = ("blackhole://", ReplicaConfig::default());
    let info =
        ChangefeedInfo::new(ChangefeedId::fresh("demo"), UpstreamInfo::default(), sink, config, Ts(100));
    let status = ChangefeedStatusDoc::at(info.start_ts, None);
    match meta.create(&Stored { info, status }).await {
        Ok(()) => println!("created changefeed demo"),
        Err(error) => println!("{error} ({})", error.code()),
    }
    let id = meta.get("default", "demo").await?.info.id;
    for _ in 0..3 {
        let bumped = meta.bump_epoch(&id, 0, |_| Ok(())).await?;
        println!("its next maintainer has epoch {:?}", bumped.info.epoch);
    }

    store.resign(&layout.owner_prefix(), session.lease).await?;
    if let Err(error) = meta.bump_epoch(&id, 0, |_| Ok(())).await {
        println!("after resigning: {error}");
    }
    Ok(())
}
