//! Two databases, a metadata store, nodes, and the network between them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tempfile::TempDir;
use testkit::wire::{Place, Wires};
use testkit::{Api, Comparison, Etcd, Millrace, PgServer, compare};
use tokio_postgres::Client;

use crate::history::{Counts, Ledger};
use crate::lag::Lag;
use crate::load::Load;
use crate::tables::{Tables, take_history};

/// The changefeed's name.
pub(crate) const FEED: &str = "chaos";
/// Database at the upstream.
pub(crate) const FROM: &str = "postgres";
/// Database at the downstream. Servers that were copied from one template look like one server, so it must
/// have another name.
pub(crate) const TO: &str = "mirror";
/// How long everything may take to arrive once nothing is added.
const SETTLE_LIMIT: Duration = Duration::from_secs(60);
/// How long one question may take: some are asked of nodes that are cut off or stopped.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// How often a state is looked at.
pub(crate) const LOOK: Duration = Duration::from_millis(50);

/// What a world is made of.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) program: PathBuf,
    pub(crate) nodes: usize,
    /// Members of etcd; none: the store that is built in, for one node.
    pub(crate) stores: usize,
    pub(crate) tables: Tables,
    pub(crate) seed: u64,
    pub(crate) connections: usize,
    pub(crate) rate: u32,
    /// Schema changes, and rows that belong to them, per second.
    pub(crate) schema_rate: u32,
    /// After this time without its leader etcd elects another one.
    pub(crate) election: Duration,
    /// Faults do not last long.
    pub(crate) short: bool,
    /// Put each data directory on a file system of this many mebibytes.
    pub(crate) disk_mib: Option<u32>,
}

/// One node.
pub(crate) struct Node {
    pub(crate) server: Millrace,
    /// The port that the others are told.
    advertised: u16,
    /// A file system of its own under the data directory.
    mounted: bool,
}

/// Everything that runs. Dropped = stopped and removed.
pub(crate) struct World {
    pub(crate) plan: Plan,
    pub(crate) load: Load,
    pub(crate) lag: Lag,
    pub(crate) wires: Wires,
    pub(crate) nodes: Vec<Node>,
    pub(crate) stores: Option<Etcd>,
    pub(crate) source: Arc<PgServer>,
    pub(crate) target: Arc<PgServer>,
    ledger: Ledger,
    dir: TempDir,
}

impl Drop for World {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            // A stopped process takes no signal but this one.
            let _ = node.server.kill();
            if node.mounted {
                let _ = unmount(&node.server.data_dir());
            }
        }
    }
}

impl World {
    /// Starts everything, replicates what is there, and begins the load.
    pub(crate) async fn start(plan: Plan) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("millrace-chaos-").tempdir()?;
        // Transactions come before they end as soon as a few are under way.
        let source = PgServer::builder().setting("logical_decoding_work_mem", "64kB");
        let (source, target) = tokio::try_join!(source.start(), PgServer::start())?;
        let (source, target) = (Arc::new(source), Arc::new(target));
        target.sql("postgres", &format!("CREATE DATABASE {TO}")).await?;
        plan.tables.create_source(&source.client(FROM).await?).await?;
        plan.tables.create_target(&target.client(TO).await?).await?;
        let wires = Wires::new();
        let (stores, endpoints) = stores(&plan, &wires).await?;
        let nodes = nodes(&plan, dir.path(), &endpoints, &wires).await?;
        let load = Load::start(
            &source,
            FROM,
            plan.tables,
            plan.seed,
            plan.connections,
            (plan.rate, plan.schema_rate),
        );
        let lag = Lag::start((&source, FROM), (&target, TO), plan.tables);
        let ledger = Ledger::default();
        let mut world = Self { plan, load, lag, wires, nodes, stores, source, target, ledger, dir };
        for n in 0..world.nodes.len() {
            world.launch(n)?;
        }
        world.all_ready(Duration::from_secs(60)).await?;
        world.replicate().await?;
        Ok(world)
    }

    /// Creates the changefeed and waits until both ends are equal; from then on everything is counted.
    async fn replicate(&mut self) -> Result<()> {
        let port = |place, port| self.wires.open(place, port);
        let from = port(Place::Source, self.source.port()).await?;
        let to = port(Place::Target, self.target.port()).await?;
        let through =
            |uri: String, own: u16, port: u16| uri.replace(&format!(":{own}/"), &format!(":{port}/"));
        let from = through(self.source.uri(FROM), self.source.port(), from);
        let to = through(self.target.uri(TO), self.target.port(), to);
        let config = json!({ "force_replicate": true, "filter": { "rules": ["chaos.*"] } });
        let leader = self.leader().await?;
        self.api(leader).create(FEED, &from, &to, &config).await.context("create the changefeed")?;
        let beats = self.lag.hold().await;
        if !self.settled(SETTLE_LIMIT).await? {
            bail!("the rows that were there are not at the target after {SETTLE_LIMIT:?}");
        }
        self.plan.tables.keep_history(&self.target_client().await?).await?;
        let source = self.source_client().await?;
        take_history(&source).await?;
        self.ledger = self.plan.tables.ledger(&source).await?;
        drop(beats);
        self.load.work();
        Ok(())
    }

    /// The API of a node.
    pub(crate) fn api(&self, n: usize) -> Api {
        self.nodes[n].server.api()
    }

    /// A connection to the source.
    pub(crate) async fn source_client(&self) -> Result<Client> {
        self.source.client(FROM).await
    }

    /// A connection to the target.
    pub(crate) async fn target_client(&self) -> Result<Client> {
        self.target.client(TO).await
    }

    /// Transactions that the source has sent before they ended.
    pub(crate) async fn sent_unfinished(&self) -> Result<i64> {
        let sql = "SELECT coalesce(sum(stream_txns), 0)::int8 FROM pg_stat_replication_slots";
        Ok(self.source_client().await?.query_one(sql, &[]).await?.get(0))
    }

    /// Starts a node's process, with the data of its former life.
    pub(crate) fn launch(&mut self, n: usize) -> Result<()> {
        self.nodes[n].server.spawn()?;
        let pid = self.nodes[n].server.pid().context("the server has no process")?;
        self.wires.is_at(pid, Place::Node(n));
        Ok(())
    }

    /// Starts a node and waits until it is a member again.
    pub(crate) async fn relaunch(&mut self, n: usize, limit: Duration) -> Result<()> {
        self.launch(n)?;
        self.all_ready(limit).await
    }

    /// Waits until every node answers and knows that all are there.
    pub(crate) async fn all_ready(&mut self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let mut missing = None;
            for n in 0..self.nodes.len() {
                let node = &mut self.nodes[n];
                node.server.still_running().with_context(|| format!("node {n}"))?;
                let members = ask(node.server.api(), "/api/v2/captures").await;
                let count = members.as_ref().ok().and_then(|answer| answer["items"].as_array()).map(Vec::len);
                if count != Some(self.nodes.len()) {
                    missing = Some(format!("node {n} sees {count:?} members"));
                    break;
                }
            }
            let Some(missing) = missing else {
                return self.leader().await.map(drop);
            };
            if Instant::now() > deadline {
                bail!("not every node is there after {limit:?}: {missing}");
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The node that leads, by its own word.
    pub(crate) async fn leader(&self) -> Result<usize> {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            for n in 0..self.nodes.len() {
                let status = ask(self.api(n), "/api/v2/status").await;
                let leads = status.is_ok_and(|status| status["is_owner"] == true);
                if leads && ask(self.api(n), "/api/v2/changefeeds").await.is_ok() {
                    return Ok(n);
                }
            }
            if Instant::now() > deadline {
                bail!("no node leads after 30 s");
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The node that looks after the changefeed, once there is one: it may be on its way to another node.
    pub(crate) async fn maintainer(&self) -> Result<usize> {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let leader = self.leader().await?;
            let feed = ask(self.api(leader), &format!("/api/v2/changefeeds/{FEED}")).await?;
            let address = feed["maintainer_addr"].as_str().unwrap_or_default();
            let port = address.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
            if let Some(place) = self.nodes.iter().position(|node| Some(node.advertised) == port) {
                return Ok(place);
            }
            if Instant::now() > deadline {
                bail!("the maintainer's address is {address:?}, which is no node's, for 30 s");
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// How many dispatchers run on each node, as the maintainer tells.
    pub(crate) async fn dispatchers(&self) -> Result<Vec<usize>> {
        let maintainer = self.maintainer().await?;
        let answer = ask(self.api(maintainer), &format!("/api/v2/changefeeds/{FEED}/tables")).await?;
        let mut counts = Vec::new();
        for n in 0..self.nodes.len() {
            let id = self.id(n).await?;
            let item = answer["items"].as_array().into_iter().flatten().find(|item| item["node_id"] == *id);
            counts.push(item.and_then(|item| item["table_ids"].as_array()).map_or(0, Vec::len));
        }
        Ok(counts)
    }

    /// The id under which a node is a member now.
    pub(crate) async fn id(&self, n: usize) -> Result<String> {
        let status = ask(self.api(n), "/api/v2/status").await?;
        Ok(status["id"].as_str().context("the status has no id")?.to_owned())
    }

    /// Waits until both ends are equal, while nothing is added. False when the time is over.
    async fn settled(&self, limit: Duration) -> Result<bool> {
        let (source, target) = (self.source_client().await?, self.target_client().await?);
        let (shape, sums) = (Tables::shape(&source).await?, self.plan.tables.sums(&source).await?);
        let deadline = Instant::now() + limit;
        loop {
            // Rows of an unknown shape have no sums.
            let equal = async {
                anyhow::Ok(
                    Tables::shape(&target).await? == shape && self.plan.tables.sums(&target).await? == sums,
                )
            };
            match equal.await {
                Ok(true) => return Ok(true),
                Ok(false) if Instant::now() > deadline => return Ok(false),
                // A table that goes between two steps of a look is an error of the server, as is one that it waits for.
                Err(error) if Instant::now() > deadline => return Err(error),
                Ok(false) | Err(_) => tokio::time::sleep(LOOK).await,
            }
        }
    }

    /// Stops the changes, waits until they have arrived, and counts what was not replicated as it was made.
    pub(crate) async fn verify(&mut self) -> Result<Verdict> {
        self.verify_within(SETTLE_LIMIT).await
    }

    /// The same, where what is missing is missing for good after a shorter time.
    pub(crate) async fn verify_within(&mut self, limit: Duration) -> Result<Verdict> {
        let beats = self.lag.hold().await;
        self.load.rest().await?;
        let started = Instant::now();
        let settled = self.settled(limit).await?;
        let (source, target) = (self.source_client().await?, self.target_client().await?);
        let (made, written) = (take_history(&source).await?, take_history(&target).await?);
        let tables = self.plan.tables;
        let counts = self.ledger.compare(&made, &written, |table| tables.rule(table));
        let counts = counts.map_err(anyhow::Error::msg).context("the load does not count right")?;
        let (shape, names) = Tables::shape(&source).await?;
        let (shape_there, names_there) = Tables::shape(&target).await?;
        let shapes =
            shape.iter().filter(|words| !shape_there.contains(words)).map(|words| format!("made {words}"));
        let extra =
            shape_there.iter().filter(|words| !shape.contains(words)).map(|words| format!("arrived {words}"));
        let shapes: Vec<String> = shapes.chain(extra).collect();
        let names: BTreeSet<&str> = names.iter().chain(&names_there).map(String::as_str).collect();
        let comparison = compare(&source, &target, &Vec::from_iter(names)).await?;
        let total = tables.balances(&target).await?;
        drop(beats);
        self.load.work();
        Ok(Verdict {
            counts,
            wrong: self.ledger.wrong.clone(),
            settled,
            settle_seconds: started.elapsed().as_secs_f64(),
            equal: comparison.equal() && shapes.is_empty(),
            comparison,
            shapes,
            total_kept: total == tables.total(),
        })
    }

    /// The end of every node's log.
    pub(crate) fn last_words(&self, lines: usize) -> String {
        let words = |(n, node): (usize, &Node)| format!("node {n}:\n{}\n", node.server.log_tail(lines));
        self.nodes.iter().enumerate().map(words).collect()
    }

    /// Where everything is kept after a failure.
    pub(crate) fn keep(mut self) -> PathBuf {
        self.dir.disable_cleanup(true);
        self.dir.path().to_owned()
    }
}

/// What a comparison of both ends found.
#[derive(Debug)]
pub(crate) struct Verdict {
    pub(crate) counts: Counts,
    /// The first rows of which not every change arrived once and in order.
    pub(crate) wrong: Vec<String>,
    /// Both ends became equal within the limit.
    pub(crate) settled: bool,
    pub(crate) settle_seconds: f64,
    /// Every table has the same shape and rows at both ends.
    pub(crate) equal: bool,
    pub(crate) comparison: Comparison,
    /// Tables that have not the same columns and indexes at both ends, in words.
    pub(crate) shapes: Vec<String>,
    /// The balances at the target come to what they always came to.
    pub(crate) total_kept: bool,
}

impl Verdict {
    /// Whether everything arrived once and in order.
    pub(crate) fn clean(&self) -> bool {
        self.counts.clean() && self.settled && self.equal && self.total_kept
    }
}

/// Asks a node, but does not wait for one that is stopped.
pub(crate) async fn ask(api: Api, path: &str) -> Result<Value> {
    match tokio::time::timeout(ANSWER_LIMIT, api.get(path)).await {
        Ok(answer) => answer,
        Err(_) => bail!("GET {path}: no answer within {ANSWER_LIMIT:?}"),
    }
}

/// Starts the members of etcd, and says where the nodes reach them.
async fn stores(plan: &Plan, wires: &Wires) -> Result<(Option<Etcd>, Vec<String>)> {
    let (mut urls, mut places) = (Vec::new(), Vec::new());
    for n in 0..plan.stores {
        let (port, place) = wires.open_early(Place::Store(n)).await?;
        urls.push(format!("http://127.0.0.1:{port}"));
        places.push(place);
    }
    if plan.stores == 0 {
        return Ok((None, urls));
    }
    // Clients ask the members where the others are.
    let told = format!("--advertise-client-urls={}", urls.join(","));
    let (election, heartbeat) = (plan.election.as_millis(), plan.election.as_millis() / 10);
    let etcd = Etcd::builder().members(plan.stores).argument(&told);
    let etcd = etcd.argument(&format!("--election-timeout={election}"));
    let etcd = etcd.argument(&format!("--heartbeat-interval={heartbeat}")).start().await?;
    for (url, place) in etcd.endpoints().iter().zip(places) {
        let port = url.rsplit_once(':').and_then(|(_, port)| port.parse().ok());
        place.is_at(port.with_context(|| format!("etcd has no port in {url}"))?);
    }
    Ok((Some(etcd), urls))
}

async fn nodes(plan: &Plan, dir: &Path, endpoints: &[String], wires: &Wires) -> Result<Vec<Node>> {
    let mut nodes = Vec::new();
    for n in 0..plan.nodes {
        let own = dir.join(format!("node{n}"));
        std::fs::create_dir(&own)?;
        // A Ctrl-C reaches this program alone, which then ends the nodes.
        let server = Millrace::new(&plan.program, &own)?.apart_from_terminal();
        let advertised = wires.open(Place::Node(n), server.api().port()).await?;
        let mut arguments = vec!["--advertise-addr".to_owned(), format!("127.0.0.1:{advertised}")];
        if !endpoints.is_empty() {
            arguments.extend(["--store".to_owned(), endpoints.join(",")]);
        }
        let mut node = Node { server: server.with_arguments(arguments), advertised, mounted: false };
        if let Some(size) = plan.disk_mib {
            mount(&node.server.data_dir(), size)?;
            node.mounted = true;
        }
        nodes.push(node);
    }
    Ok(nodes)
}

/// Puts a small file system in memory under a directory. Needs root.
fn mount(directory: &Path, mebibytes: u32) -> Result<()> {
    std::fs::create_dir_all(directory)?;
    let size = format!("size={mebibytes}m");
    let status = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", &size, "millrace-chaos"])
        .arg(directory)
        .status()?;
    if !status.success() {
        bail!("cannot mount a file system under {}", directory.display());
    }
    Ok(())
}

/// Takes it away again.
fn unmount(directory: &Path) -> Result<()> {
    let status = std::process::Command::new("umount").arg("-l").arg(directory).status()?;
    if !status.success() {
        bail!("cannot unmount {}", directory.display());
    }
    Ok(())
}
