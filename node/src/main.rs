//! The `millrace` program: server, client, quickstart.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use node::cli::{CliArgs, CliError};
use node::config::{LogFormat, ServerConfig};
use node::quickstart::QuickstartArgs;

/// Change data capture that scales out.
#[derive(Parser, Debug)]
#[command(name = "millrace", version, propagate_version = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run a server.
    Server(Box<ServerArgs>),
    /// Talk to a running server.
    Cli(CliArgs),
    /// Run a server in a temporary directory and watch rows flow.
    Quickstart(Box<QuickstartArgs>),
    /// Print the version.
    Version,
}

/// Flags that are given override the configuration file.
#[derive(Args, Debug)]
struct ServerArgs {
    /// Configuration file, TOML.
    #[arg(long)]
    config: Option<PathBuf>,
    /// `host:port` to listen on; 127.0.0.1:8300 by default.
    #[arg(long)]
    addr: Option<String>,
    /// `host:port` that others are told; the listening address by default.
    #[arg(long)]
    advertise_addr: Option<String>,
    /// Directory of the metadata store and the event store; ./millrace_data by default.
    #[arg(long)]
    data_dir: Option<PathBuf>,
    /// Name that isolates clusters.
    #[arg(long)]
    cluster_id: Option<String>,
    /// File for the log; standard error by default.
    #[arg(long)]
    log_file: Option<String>,
    /// error, warn, info, debug or a filter directive.
    #[arg(long)]
    log_level: Option<String>,
    /// Form of a log line.
    #[arg(long)]
    log_format: Option<LogFormat>,
}

impl ServerArgs {
    fn into_config(self) -> anyhow::Result<ServerConfig> {
        let mut config = match &self.config {
            Some(path) => ServerConfig::load(path)?,
            None => ServerConfig::default(),
        };
        let ServerArgs {
            config: _,
            addr,
            advertise_addr,
            data_dir,
            cluster_id,
            log_file,
            log_level,
            log_format,
        } = self;
        config.addr = addr.unwrap_or(config.addr);
        config.advertise_addr = advertise_addr.unwrap_or(config.advertise_addr);
        config.data_dir = data_dir.unwrap_or(config.data_dir);
        config.cluster_id = cluster_id.unwrap_or(config.cluster_id);
        config.log_file = log_file.unwrap_or(config.log_file);
        config.log_level = log_level.unwrap_or(config.log_level);
        config.log.format = log_format.unwrap_or(config.log.format);
        config.validate()?;
        Ok(config)
    }
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(words) => {
            // Nobody may be there to read them.
            let _ = words.print();
            // The code 2 says that a person said no.
            return if words.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start the async runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(run(arguments.command));
    // Blocking work that is still under way (a file flush) must not hold up the exit.
    runtime.shutdown_timeout(std::time::Duration::from_secs(5));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let told = error.downcast_ref::<CliError>();
            if !told.is_some_and(CliError::is_unheard) {
                eprintln!("error: {error:#}");
            }
            told.map_or(ExitCode::FAILURE, |e| ExitCode::from(e.exit_code()))
        }
    }
}

async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Server(args) => {
            let config = args.into_config()?;
            node::telemetry::init_logging(&config)?;
            tracing::info!(version = env!("CARGO_PKG_VERSION"), addr = %config.addr, "starting server");
            let running = node::Node::start(config).await?;
            let failure = tokio::select! {
                signal = node::shutdown::signal() => {
                    signal.context("cannot listen for signals")?;
                    None
                }
                why = running.failed() => Some(why),
            };
            tokio::select! {
                result = running.stop() => match failure {
                    None => result,
                    Some(why) => anyhow::bail!("the server cannot go on and has stopped: {why}"),
                },
                again = node::shutdown::signal() => {
                    again.context("cannot listen for signals")?;
                    anyhow::bail!("stopped at once by a second signal")
                }
            }
        }
        Command::Cli(args) => Ok(node::cli::run(args).await?),
        Command::Quickstart(args) => node::quickstart::run(*args).await,
        Command::Version => Ok(node::cli::say(&format_args!("millrace {}", env!("CARGO_PKG_VERSION")))?),
    }
}
