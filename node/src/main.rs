//! The `millrace` program: server, client, quickstart.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, CommandFactory as _, Parser, Subcommand};
use node::cli::{CliArgs, CliError};
use node::config::{LogFormat, ServerConfig, StoreKind};
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
    /// Compare both ends of a changefeed while rows flow. Ends with 0 when they are equal, 3 when they differ, 4 when that
    /// is not known.
    Verify(Box<node::cli::VerifyArgs>),
    /// Move the metadata of a stopped cluster from one store to another.
    #[command(subcommand)]
    Store(node::cli::store::StoreCommand),
    /// Run a server in a temporary directory and watch rows flow.
    Quickstart(Box<QuickstartArgs>),
    /// Print the version.
    Version,
    /// Print the line of a user for the server's file of passwords (security.client-password-file).
    Password {
        /// Name of the user. The password is asked for, or read from standard input.
        #[arg(long)]
        user: String,
    },
    /// Print the script that completes commands in a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page, or write those of all commands.
    Man {
        /// Write the page of every command into this directory.
        #[arg(long)]
        dir: Option<PathBuf>,
    },
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
    /// etcd endpoints with commas between, such as http://10.0.0.1:2379,http://10.0.0.2:2379: makes servers with the
    /// same ones a cluster. Without it this server is alone and keeps its metadata in its data directory.
    #[arg(long, value_name = "ENDPOINTS")]
    store: Option<String>,
    /// Certificates of the authorities that nodes and clients are checked against, PEM. With --cert and --key: TLS.
    #[arg(long, value_name = "FILE", requires_all = ["cert", "key"])]
    ca: Option<PathBuf>,
    /// Certificate chain of this server, PEM.
    #[arg(long, value_name = "FILE", requires_all = ["ca", "key"])]
    cert: Option<PathBuf>,
    /// Private key of this server, PEM.
    #[arg(long, value_name = "FILE", requires_all = ["ca", "cert"])]
    key: Option<PathBuf>,
    /// Common names that certificates of clients may have, with commas between; clients need one then.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    cert_allowed_cn: Option<Vec<String>>,
    /// File for the log; standard error by default.
    #[arg(long)]
    log_file: Option<String>,
    /// error, warn, info, debug or a filter directive.
    #[arg(long)]
    log_level: Option<String>,
    /// Form of a log line.
    #[arg(long)]
    log_format: Option<LogFormat>,
    #[command(flatten)]
    older: OlderArgs,
}

/// Flags of older scripts.
#[derive(Args, Debug)]
struct OlderArgs {
    /// Taken and ignored: there is one architecture.
    #[arg(long, short = 'x', hide = true)]
    newarch: bool,
    /// Taken and ignored: times are UTC.
    #[arg(long, hide = true)]
    tz: Option<String>,
    /// Taken and ignored: a slot holds the log for as long as its changefeed exists.
    #[arg(long, hide = true)]
    gc_ttl: Option<u64>,
    /// Not taken any more: name etcd with --store.
    #[arg(long, hide = true, value_parser = refuse_pd)]
    pd: Option<String>,
}

fn refuse_pd(_: &str) -> Result<String, String> {
    Err("there is no PD here; servers that share an etcd are a cluster: --store http://host:2379".to_owned())
}

impl OlderArgs {
    /// What was given and means nothing here.
    fn ignored(&self) -> impl Iterator<Item = String> {
        let given =
            [("--newarch", self.newarch), ("--tz", self.tz.is_some()), ("--gc-ttl", self.gc_ttl.is_some())];
        given.into_iter().filter(|(_, is)| *is).map(|(flag, _)| format!("{flag} is ignored"))
    }
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
            store,
            ca,
            cert,
            key,
            cert_allowed_cn,
            log_file,
            log_level,
            log_format,
            older,
        } = self;
        config.ignored.extend(older.ignored());
        config.addr = addr.unwrap_or(config.addr);
        config.advertise_addr = advertise_addr.unwrap_or(config.advertise_addr);
        config.data_dir = data_dir.unwrap_or(config.data_dir);
        config.cluster_id = cluster_id.unwrap_or(config.cluster_id);
        if let Some(endpoints) = store {
            config.store.kind = StoreKind::Etcd;
            config.store.endpoints =
                endpoints.split(',').map(|endpoint| endpoint.trim().to_owned()).collect();
        }
        let security = &mut config.security;
        // Clap has seen to it that all three are given, or none: files of two sources do not fit together.
        security.ca_path = ca.unwrap_or_else(|| std::mem::take(&mut security.ca_path));
        security.cert_path = cert.unwrap_or_else(|| std::mem::take(&mut security.cert_path));
        security.key_path = key.unwrap_or_else(|| std::mem::take(&mut security.key_path));
        security.cert_allowed_cn =
            cert_allowed_cn.unwrap_or_else(|| std::mem::take(&mut security.cert_allowed_cn));
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
            for words in &config.ignored {
                tracing::warn!(words, "a setting means nothing here");
            }
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
        Command::Verify(args) => Ok(node::cli::verify(*args).await?),
        Command::Store(command) => Ok(node::cli::store::run(command).await?),
        Command::Quickstart(args) => node::quickstart::run(*args).await,
        Command::Password { user } => {
            let password = node::cli::ask_password(&format!("Password of {user}: "))?;
            Ok(node::cli::say(&node::password::line(&user, &password).map_err(anyhow::Error::msg)?)?)
        }
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "millrace", &mut script);
            Ok(node::cli::say(&String::from_utf8_lossy(&script).trim_end())?)
        }
        Command::Man { dir } => manual(dir.as_deref()),
        Command::Version => Ok(node::cli::say(&format_args!(
            "millrace {}\ncommit {}\nbuilt for {}-{}, {}",
            env!("CARGO_PKG_VERSION"),
            option_env!("MILLRACE_GIT_HASH").unwrap_or("unknown"),
            std::env::consts::ARCH,
            std::env::consts::OS,
            if cfg!(debug_assertions) { "for developers" } else { "optimised" },
        ))?),
    }
}

/// Prints the page of the program, or writes one for each command.
fn manual(dir: Option<&std::path::Path>) -> anyhow::Result<()> {
    let command = Arguments::command();
    if let Some(dir) = dir {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        return clap_mangen::generate_to(command, dir)
            .with_context(|| format!("cannot write manual pages into {}", dir.display()));
    }
    let mut page = Vec::new();
    clap_mangen::Man::new(command).render(&mut page)?;
    Ok(node::cli::say(&String::from_utf8_lossy(&page).trim_end())?)
}
