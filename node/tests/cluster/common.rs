//! What the tests of a cluster share.

use std::path::Path;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use testkit::load;
use testkit::wire::{Place, Wires};
use testkit::{Etcd, EtcdBuilder, Load, Millrace, PgServer, compare};

/// How long a state may take to come: the machines that run this are busy.
const PATIENCE: Duration = Duration::from_secs(90);
/// Rows of the tables at the start.
pub(crate) const ROWS: u64 = 2_000;
/// Database of the target. The servers are copies of one template, so that only the name tells them apart.
pub(crate) const TARGET: &str = "target";
/// Name of the changefeed.
const FEED: &str = "f";

/// Waits until there is something; fails with its name.
pub(crate) async fn until<T>(what: &str, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = probe().await {
            return found;
        }
        assert!(Instant::now() < deadline, "never came true: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Waits for a state; fails with its name.
pub(crate) async fn eventually(what: &str, mut probe: impl AsyncFnMut() -> bool) {
    until(what, async || probe().await.then_some(())).await;
}

/// Processes with a store between the source's database `postgres` and the target's database [`TARGET`].
pub(crate) struct Cluster {
    pub(crate) etcd: Etcd,
    pub(crate) nodes: Vec<Millrace>,
    pub(crate) source: PgServer,
    pub(crate) target: PgServer,
    /// The network between the nodes, where it can be cut.
    pub(crate) wires: Option<Wires>,
    /// Ports that the nodes are told of each other.
    advertised: Vec<u16>,
    /// A node that does not answer although it runs.
    pub(crate) asleep: Option<usize>,
    config: String,
    dir: TempDir,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for (at, node) in self.nodes.iter().enumerate() {
                eprintln!("--- node {at}\n{}", node.log_tail(60));
            }
        }
    }
}

impl Cluster {
    /// So many processes with a configuration file that have found each other, and filled tables at the source.
    pub(crate) async fn start(nodes: usize, config: &str) -> Self {
        Self::start_with(nodes, config, Etcd::builder()).await
    }

    /// As [`Cluster::start`], with such a store.
    pub(crate) async fn start_with(nodes: usize, config: &str, etcd: EtcdBuilder) -> Self {
        Self::start_on(nodes, config, etcd, None).await
    }

    /// As [`Cluster::start`], over a network that can be cut.
    pub(crate) async fn start_wired(nodes: usize, config: &str) -> Self {
        Self::start_on(nodes, config, Etcd::builder(), Some(Wires::new())).await
    }

    async fn start_on(nodes: usize, config: &str, etcd: EtcdBuilder, wires: Option<Wires>) -> Self {
        let (etcd, source, target) = tokio::join!(etcd.start(), PgServer::start(), PgServer::start());
        let (source, target) = (source.unwrap(), target.unwrap());
        target.sql("postgres", &format!("CREATE DATABASE {TARGET}")).await.unwrap();
        load::prepare(&source.client("postgres").await.unwrap(), ROWS).await.unwrap();
        let mut dir = tempfile::tempdir().unwrap();
        let mut config = config.to_owned();
        if let Ok(level) = std::env::var("MILLRACE_TEST_LOG") {
            // Somebody wants to read what happened.
            config = format!("log-level = \"{level}\"\n{config}");
            dir.disable_cleanup(true);
            eprintln!("logs are in {}", dir.path().display());
        }
        let mut cluster = Self {
            etcd: etcd.unwrap(),
            nodes: Vec::new(),
            source,
            target,
            wires,
            advertised: Vec::new(),
            asleep: None,
            config,
            dir,
        };
        for _ in 0..nodes {
            cluster.add().await;
        }
        for node in &mut cluster.nodes {
            node.ready().await.unwrap();
        }
        for at in 0..nodes {
            cluster.sees(at, nodes).await;
        }
        cluster
    }

    /// One more process, not waited for.
    pub(crate) async fn add(&mut self) -> usize {
        let at = self.nodes.len();
        let dir = self.dir.path().join(format!("n{at}"));
        std::fs::create_dir_all(&dir).unwrap();
        let file = dir.join("config.toml");
        std::fs::write(&file, &self.config).unwrap();
        let mut node = process(&dir, &self.etcd.endpoints().join(","), &file);
        let mut advertised = node.api().port();
        if let Some(wires) = &self.wires {
            advertised = wires.open(Place::Node(at), advertised).await.unwrap();
            let told = format!("127.0.0.1:{advertised}");
            node = node.with_arguments(["--advertise-addr", told.as_str()]);
        }
        node.spawn().unwrap();
        if let Some(wires) = &self.wires {
            wires.is_at(node.pid().unwrap(), Place::Node(at));
        }
        self.advertised.push(advertised);
        self.nodes.push(node);
        at
    }

    /// Waits until a node sees so many members.
    pub(crate) async fn sees(&self, at: usize, members: usize) {
        let api = self.nodes[at].api();
        eventually(&format!("node {at} sees {members} members"), async || {
            api.get("/api/v2/captures").await.is_ok_and(|list| list["total"] == members)
        })
        .await;
    }

    /// Id of a node.
    pub(crate) async fn id(&self, at: usize) -> String {
        let api = self.nodes[at].api();
        until("a node tells its id", async || {
            Some(api.get("/api/v2/status").await.ok()?["id"].as_str()?.to_owned())
        })
        .await
    }

    /// The nodes that run and answer.
    fn answering(&self) -> impl Iterator<Item = (usize, &Millrace)> {
        self.nodes.iter().enumerate().filter(|(at, node)| node.is_started() && self.asleep != Some(*at))
    }

    /// Any of them.
    pub(crate) fn some(&self) -> &Millrace {
        self.answering().next().unwrap().1
    }

    fn at_address(&self, address: &str) -> Option<usize> {
        self.nodes
            .iter()
            .zip(&self.advertised)
            .position(|(node, port)| node.is_started() && address.ends_with(&format!(":{port}")))
    }

    /// The node that leads.
    pub(crate) async fn leader(&self) -> usize {
        until("somebody leads", async || {
            let list = self.some().api().get("/api/v2/captures").await.ok()?;
            let leader = list["items"].as_array()?.iter().find(|node| node["is_owner"] == true)?;
            self.at_address(leader["address"].as_str()?)
        })
        .await
    }

    /// The changefeed as its coordinator shows it.
    pub(crate) async fn feed(&self) -> Option<Value> {
        self.some().api().get(&format!("/api/v2/changefeeds/{FEED}")).await.ok()
    }

    /// The node with the maintainer of the changefeed.
    pub(crate) async fn maintainer(&self) -> usize {
        until("somebody maintains the changefeed", async || {
            let feed = self.feed().await?;
            self.at_address(feed["maintainer_addr"].as_str().filter(|address| !address.is_empty())?)
        })
        .await
    }

    /// The nodes with spans of tables.
    pub(crate) async fn dispatchers(&self) -> Vec<usize> {
        until("tables are on nodes", async || {
            let tables = self.some().api().get(&format!("/api/v2/changefeeds/{FEED}/tables")).await.ok()?;
            let mut nodes = Vec::new();
            for (at, node) in self.answering() {
                let id = node.api().get("/api/v2/status").await.ok()?["id"].as_str()?.to_owned();
                if tables.to_string().contains(&id) {
                    nodes.push(at);
                }
            }
            (!nodes.is_empty()).then_some(nodes)
        })
        .await
    }

    /// Creates the changefeed at one of the nodes.
    pub(crate) async fn create(&self, at: usize, config: &Value) {
        let (from, to) = (self.source.uri("postgres"), self.target.uri(TARGET));
        self.nodes[at].api().create(FEED, &from, &to, config).await.unwrap();
    }

    /// Waits until everything that the source has committed by now is at the target, copied rows included.
    pub(crate) async fn caught_up(&self) {
        let source = self.source.client("postgres").await.unwrap();
        let row = source.query_one("SELECT (pg_current_wal_flush_lsn() - '0/0')::bigint", &[]).await.unwrap();
        let end = u64::try_from(row.get::<_, i64>(0)).unwrap();
        let mut last = Value::Null;
        eventually("the checkpoint reaches the source's position", async || {
            let Some(feed) = self.feed().await else { return false };
            assert_ne!(feed["state"], "failed", "{}", feed["error"]);
            let copies = u64::from(feed["config"]["initial_copy"]["enabled"] == true);
            let least = end.max(feed["start_ts"].as_u64().unwrap_or(u64::MAX - 1) + copies);
            let done = feed["checkpoint_ts"].as_u64().is_some_and(|checkpoint| checkpoint >= least);
            last = feed;
            done
        })
        .await;
    }

    /// Compares every row of both ends. Nothing may change meanwhile.
    pub(crate) async fn equal(&self) {
        self.caught_up().await;
        let (source, target) =
            tokio::try_join!(self.source.client("postgres"), self.target.client(TARGET)).unwrap();
        let result = compare(&source, &target, &load::TABLES).await.unwrap();
        assert!(result.equal(), "the ends differ\n{result}");
    }

    /// Waits until a further table is the same at both ends.
    pub(crate) async fn same(&self, table: &str) {
        let (source, target) =
            tokio::try_join!(self.source.client("postgres"), self.target.client(TARGET)).unwrap();
        let result = compare(&source, &target, &[table]).await.unwrap();
        assert!(result.equal(), "the ends differ\n{result}");
    }

    /// How long a row waits that is written at the source now.
    pub(crate) async fn outage(&self) -> Duration {
        let began = Instant::now();
        let (source, target) =
            tokio::try_join!(self.source.client("postgres"), self.target.client(TARGET)).unwrap();
        let id = marker();
        source.execute("INSERT INTO shop.marker VALUES ($1)", &[&id]).await.unwrap();
        eventually("a row arrives", async || {
            let found = target.query_opt("SELECT 1 FROM shop.marker WHERE id = $1", &[&id]).await;
            found.is_ok_and(|row| row.is_some())
        })
        .await;
        began.elapsed()
    }

    /// Ids of the processes, which a node that was started again would not have.
    pub(crate) fn pids(&self) -> Vec<Option<u32>> {
        self.nodes.iter().map(Millrace::pid).collect()
    }

    /// Waits for every node that this or that holds of what it says of its writing.
    pub(crate) async fn writing(&self, what: &str, holds: impl Fn(&Value) -> bool) {
        for node in &self.nodes {
            eventually(what, async || {
                node.api().get("/api/v2/status").await.is_ok_and(|status| holds(&status["writing"]))
            })
            .await;
        }
    }

    /// Changes everything, about `rate` times a second.
    pub(crate) async fn load(&self, seed: u64, rate: u64) -> Load {
        Load::start(&self.source, "postgres", seed, 4, rate, ROWS).await.unwrap()
    }
}

/// A key that no other row of `shop.marker` has.
fn marker() -> i64 {
    static NEXT: AtomicI64 = AtomicI64::new(1_000_000);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn process(dir: &Path, endpoints: &str, file: &Path) -> Millrace {
    // Another build of it can be put in its place, such as an optimised one.
    let other = std::env::var_os("MILLRACE_PROGRAM");
    let program = other.as_deref().map_or(Path::new(env!("CARGO_BIN_EXE_millrace")), Path::new);
    let file = file.display().to_string();
    Millrace::new(program, dir).unwrap().with_arguments(["--store", endpoints, "--config", &file])
}

/// Configuration of a changefeed that copies the tables first.
pub(crate) fn copying() -> Value {
    json!({ "initial_copy": { "enabled": true }, "force_replicate": true })
}
