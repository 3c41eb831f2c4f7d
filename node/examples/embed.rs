//! A whole server inside one's own program: a generator is replicated into files, followed, and removed.
//!
//! `cargo run -p node --example embed -- [seconds]`

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use node::Node;
use node::cli::Client;
use node::config::ServerConfig;
use serde_json::json;

/// How long the server may take to be ready, and the first rows to arrive.
const PATIENCE: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> Result<()> {
    let seconds = std::env::args().nth(1).map_or(Ok(5), |text| text.parse()).context("number of seconds")?;
    let dir = tempfile::tempdir()?;
    // Port 0: any free one. The node says which.
    let config = ServerConfig {
        addr: "127.0.0.1:0".to_owned(),
        data_dir: dir.path().join("data"),
        ..ServerConfig::default()
    };
    let node = Node::start(config).await?;
    let outcome = replicate(&node, &dir.path().join("files"), seconds).await;
    node.stop().await?;
    outcome
}

async fn replicate(node: &Node, files: &Path, seconds: u64) -> Result<()> {
    let api = Client::new(&format!("http://{}", node.address()))?;
    let deadline = Instant::now() + PATIENCE;
    while api.get("/api/v2/health").await.is_err() {
        if Instant::now() > deadline {
            bail!("the node is not ready after {PATIENCE:?}");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!("a node answers at {}", node.address());

    let sink = format!("file://{}?protocol=canal-json&flush-interval=200ms", files.display());
    let upstream = json!({ "uri": "generator://bank?rate=500&tables=2" });
    let body = json!({ "changefeed_id": "example", "upstream": upstream, "sink_uri": sink });
    api.post("/api/v2/changefeeds", &body).await?;

    let (mut written, until) = (0, Instant::now() + Duration::from_secs(seconds));
    while Instant::now() < until || written == 0 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let progress = api.get("/api/v2/changefeeds/example/progress").await?;
        written = progress["rows_written"].as_u64().unwrap_or_default();
        println!(
            "{written} rows written, {:.1} s behind",
            progress["lag_seconds"].as_f64().unwrap_or_default()
        );
        if progress["state"] == "failed" || Instant::now() > until + PATIENCE {
            bail!("no rows arrived: {progress}");
        }
    }
    api.delete("/api/v2/changefeeds/example").await?;
    let tables = files.join("bank");
    for entry in std::fs::read_dir(&tables).with_context(|| format!("nothing in {}", tables.display()))? {
        println!("{}", entry?.path().strip_prefix(files)?.display());
    }
    Ok(())
}
