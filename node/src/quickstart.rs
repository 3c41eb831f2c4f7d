//! `millrace quickstart`: a server in a temporary directory, one changefeed, a live view.

mod verify;
mod view;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use serde_json::json;

use crate::Node;
use crate::cli::Client;
use crate::config::{DEFAULT_ADDR, ServerConfig};
use view::{Sample, View, grouped};

/// Name of the changefeed that quickstart makes.
const FEED: &str = "quickstart";
/// How often the live view looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// How long the server may take to become ready, and how often it is asked.
const READY_LIMIT: Duration = Duration::from_secs(30);
const READY_POLL: Duration = Duration::from_millis(50);
/// How long a verification waits for the downstream to catch up.
const CATCH_UP_LIMIT: Duration = Duration::from_secs(300);

/// Options of `millrace quickstart`.
#[derive(Args, Debug)]
pub struct QuickstartArgs {
    /// Where changes come from.
    #[arg(
        long,
        env = "MILLRACE_UPSTREAM_URI",
        hide_env_values = true,
        default_value = "generator://bank?seed=1&rate=1000&accounts=1000&tables=4"
    )]
    from: String,
    /// Where changes go; files in the temporary directory by default.
    #[arg(long, env = "MILLRACE_SINK_URI", hide_env_values = true)]
    to: Option<String>,
    /// Stop after this long, for example 20s or 5m; until Ctrl-C by default.
    #[arg(long, value_parser = parse_duration)]
    duration: Option<Duration>,
    /// Compare both ends before the end; a difference makes the exit code non-zero.
    #[arg(long)]
    verify: bool,
    /// Directory to work in; a temporary one that is removed at the end by default.
    #[arg(long)]
    data_dir: Option<PathBuf>,
    /// `host:port` of the API; a free port when 8300 is taken.
    #[arg(long)]
    addr: Option<String>,
    /// Replica configuration, TOML.
    #[arg(long)]
    config: Option<PathBuf>,
    /// Table filter rule; may be given several times.
    #[arg(long = "filter")]
    filters: Vec<String>,
    /// Log level; the log goes to standard error.
    #[arg(long, default_value = "warn")]
    log_level: String,
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    heartbeatpb::config::HumanDuration::parse(text)
        .map(|duration| duration.0)
        .ok_or_else(|| format!("{text:?} is not a duration; write for example 20s or 5m"))
}

/// A directory that is removed at the end unless the person named it.
struct WorkDir {
    path: PathBuf,
    temporary: bool,
}

impl WorkDir {
    fn open(named: Option<PathBuf>) -> anyhow::Result<Self> {
        let (path, temporary) = match named {
            Some(path) => (path, false),
            None => (std::env::temp_dir().join(format!("millrace-{}", uuid::Uuid::new_v4().simple())), true),
        };
        std::fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self { path, temporary })
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if self.temporary {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

/// Runs a server until the duration is over or a signal comes, then prints a summary.
///
/// # Errors
/// When the server or the changefeed cannot start, the changefeed failed, or the ends differ.
pub async fn run(args: QuickstartArgs) -> anyhow::Result<()> {
    let work = WorkDir::open(args.data_dir.clone())?;
    let to = args.to.clone().unwrap_or_else(|| {
        format!("file://{}?protocol=canal-json&flush-interval=1s", work.path.join("files").display())
    });
    let node = start_node(&args, &work).await?;
    let api = format!("http://{}", node.address());
    let client = Client::new(&api)?;
    let outcome = match create_feed(&args, &to, &client).await {
        Ok(()) => watch(&args, &to, &client, &api).await,
        Err(error) => Err(error),
    };
    // A changefeed that only lived for this run must not leave a slot behind that holds the upstream's log.
    if work.temporary
        && let Err(error) = client.delete(&format!("/api/v2/changefeeds/{FEED}")).await
    {
        eprintln!("warning: the changefeed could not be removed: {error}");
    }
    node.stop().await?;
    outcome
}

async fn start_node(args: &QuickstartArgs, work: &WorkDir) -> anyhow::Result<Node> {
    let mut config = ServerConfig {
        addr: args.addr.clone().unwrap_or_else(|| DEFAULT_ADDR.to_owned()),
        data_dir: work.path.join("server"),
        log_level: args.log_level.clone(),
        ..ServerConfig::default()
    };
    config.validate()?;
    crate::telemetry::init_logging(&config)?;
    if args.addr.is_none() && std::net::TcpListener::bind(&config.addr).is_err() {
        config.addr = "127.0.0.1:0".to_owned();
    }
    Node::start(config).await
}

/// Waits until the server has looked at what its data directory holds.
async fn wait_until_ready(client: &Client) -> anyhow::Result<()> {
    let deadline = Instant::now() + READY_LIMIT;
    while let Err(error) = client.get("/api/v2/health").await {
        if Instant::now() >= deadline {
            return Err(error).context("the server did not become ready");
        }
        tokio::time::sleep(READY_POLL).await;
    }
    Ok(())
}

async fn create_feed(args: &QuickstartArgs, to: &str, client: &Client) -> anyhow::Result<()> {
    wait_until_ready(client).await?;
    let mut replica = match &args.config {
        None => heartbeatpb::config::ReplicaConfig::default(),
        Some(path) => {
            let text =
                std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
            heartbeatpb::config::ReplicaConfig::from_toml(&text)?
        }
    };
    if !args.filters.is_empty() {
        replica.filter.rules.clone_from(&args.filters);
    }
    let existing = client.get(&format!("/api/v2/changefeeds/{FEED}")).await;
    if existing.is_ok() {
        return Ok(());
    }
    let body = json!({
        "changefeed_id": FEED, "sink_uri": to, "upstream": { "uri": args.from }, "replica_config": replica.to_api(),
    });
    let info = client.post("/api/v2/changefeeds", &body).await?;
    for warning in info["warnings"].as_array().into_iter().flatten().filter_map(serde_json::Value::as_str) {
        eprintln!("warning: {warning}");
    }
    Ok(())
}

async fn watch(args: &QuickstartArgs, to: &str, client: &Client, api: &str) -> anyhow::Result<()> {
    let started = Instant::now();
    let mut view = View::new(vec![
        format!("Millrace {}", env!("CARGO_PKG_VERSION")),
        format!("  from        {}", heartbeatpb::config::mask_uri(&args.from)),
        format!("  to          {}", heartbeatpb::config::mask_uri(to)),
        format!("  api         {api}"),
        "  stop        Ctrl-C".to_owned(),
    ]);
    let mut sample = look(client).await?;
    let mut stopping = std::pin::pin!(crate::shutdown::signal());
    let end = args.duration.map(|duration| started + duration);
    loop {
        view.draw(&sample);
        if sample.state == "failed" {
            bail!("the changefeed failed: {}", sample.error.as_deref().unwrap_or("no error was reported"));
        }
        if end.is_some_and(|end| Instant::now() >= end) {
            break;
        }
        tokio::select! {
            result = &mut stopping => { result?; break }
            () = tokio::time::sleep(LOOK_INTERVAL) => {}
        }
        sample = look(client).await?;
    }
    let verified = if args.verify { Some(verify_ends(args, to, client).await?) } else { None };
    let last = look(client).await?;
    summary(&view, &last, started.elapsed(), verified.as_ref());
    match verified {
        Some(outcome) if !outcome.differences.is_empty() => {
            bail!("the ends differ:\n  {}", outcome.differences.join("\n  "))
        }
        Some(_) | None => Ok(()),
    }
}

async fn look(client: &Client) -> anyhow::Result<Sample> {
    Ok(Sample::from_json(&client.get(&format!("/api/v2/changefeeds/{FEED}/progress")).await?))
}

async fn verify_ends(args: &QuickstartArgs, to: &str, client: &Client) -> anyhow::Result<verify::Outcome> {
    let deadline = Instant::now() + CATCH_UP_LIMIT;
    let mut report = verify::Outcome::default();
    // An upstream that is still written to differs by what is on its way: try again until it is quiet.
    while Instant::now() < deadline {
        let body = json!({ "upstream": { "uri": args.from } });
        let position = client.post("/api/v2/tso", &body).await?["position"].as_u64().unwrap_or(0);
        wait_for_checkpoint(&args.from, client, position, deadline).await?;
        let checkpoint = look(client).await?.checkpoint;
        report = verify::compare(&args.from, to, heartbeatpb::Ts(checkpoint), &args.filters).await?;
        if report.differences.is_empty() {
            break;
        }
    }
    Ok(report)
}

async fn wait_for_checkpoint(
    from: &str,
    client: &Client,
    position: u64,
    deadline: Instant,
) -> anyhow::Result<()> {
    if from.starts_with("generator:") {
        return Ok(());
    }
    loop {
        let sample = look(client).await?;
        if sample.checkpoint >= position {
            return Ok(());
        }
        if sample.state == "failed" {
            bail!("the changefeed failed: {}", sample.error.as_deref().unwrap_or("no error was reported"));
        }
        if Instant::now() >= deadline {
            bail!("the downstream did not catch up within {} s", CATCH_UP_LIMIT.as_secs());
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

fn summary(view: &View, sample: &Sample, elapsed: Duration, verified: Option<&verify::Outcome>) {
    println!("\nSummary");
    for line in view.header().iter().skip(1).take(2) {
        println!("{line}");
    }
    println!("  ran         {:.1} s", elapsed.as_secs_f64());
    println!("  tables      {}", sample.tables);
    println!("  rows        {} written", grouped(sample.rows_written));
    println!("  checkpoint  {}", sample.checkpoint);
    if let Some(outcome) = verified {
        if outcome.differences.is_empty() {
            println!("  verified    {} tables, {} rows equal", outcome.tables, grouped(outcome.rows));
        } else {
            println!("  verified    {} differences", outcome.differences.len());
        }
    }
}
