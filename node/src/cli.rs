//! `millrace cli`: a client of the HTTP API.

mod capture;
mod changefeed;
mod client;
mod table;
mod update;

use clap::{Args, Subcommand};
use serde_json::Value;

pub use client::{ApiError, Client};

/// Options shared by every client command.
#[derive(Args, Debug)]
pub struct CliArgs {
    /// Address of any server of the cluster.
    #[arg(long, global = true, env = "MILLRACE_SERVER", default_value = "http://127.0.0.1:8300")]
    server: String,
    #[command(subcommand)]
    command: CliCommand,
}

#[derive(Subcommand, Debug)]
enum CliCommand {
    /// Create, list, query, pause, resume and remove changefeeds.
    #[command(subcommand)]
    Changefeed(changefeed::ChangefeedCommand),
    /// List the servers of the cluster, and empty one before it is stopped.
    #[command(subcommand)]
    Capture(capture::CaptureCommand),
    /// The upstream's current position.
    #[command(subcommand)]
    Tso(TsoCommand),
    /// State of the server that is asked.
    Status,
}

#[derive(Subcommand, Debug)]
enum TsoCommand {
    /// Print the current position of an upstream as a decimal number.
    Query {
        /// The upstream, for example postgres://user:password@host/db.
        #[arg(long, env = "MILLRACE_UPSTREAM_URI", hide_env_values = true)]
        upstream_uri: String,
    },
}

/// Why a client command failed, and the exit code that says so.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CliError {
    /// The server answered with an error, or did not answer.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// The arguments are wrong.
    #[error("{0}")]
    Usage(String),
    /// The person said no.
    #[error("aborted")]
    Aborted,
    /// Standard output takes nothing more.
    #[error("cannot write to standard output")]
    Output(#[from] std::io::Error),
}

impl CliError {
    /// Exit code of the process: 2 when a person aborted, 141 when whoever read the output went away, otherwise 1.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            CliError::Aborted => 2,
            CliError::Output(_) if self.is_unheard() => 141,
            CliError::Api(_) | CliError::Usage(_) | CliError::Output(_) => 1,
        }
    }

    /// Whether whoever read the output went away, as `head` does: nobody is to be told.
    #[must_use]
    pub fn is_unheard(&self) -> bool {
        matches!(self, CliError::Output(error) if error.kind() == std::io::ErrorKind::BrokenPipe)
    }
}

/// Runs one client command and prints its result to standard output.
///
/// # Errors
/// When the arguments are wrong or the server refuses.
pub async fn run(args: CliArgs) -> Result<(), CliError> {
    let client = Client::new(&args.server)?;
    match args.command {
        CliCommand::Changefeed(command) => changefeed::run(&client, command).await,
        CliCommand::Capture(command) => capture::run(&client, command).await,
        CliCommand::Tso(TsoCommand::Query { upstream_uri }) => {
            let body = serde_json::json!({ "upstream": { "uri": upstream_uri } });
            let answer = client.post("/api/v2/tso", &body).await?;
            say(&answer["position"])
        }
        CliCommand::Status => print_json(&client.get("/api/v2/status").await?),
    }
}

/// The items of a list answer.
fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list["items"].as_array().into_iter().flatten()
}

fn print_json(value: &Value) -> Result<(), CliError> {
    say(&format_args!("{value:#}"))
}

/// Prints one line to standard output.
///
/// # Errors
/// When it is closed, or cannot be written.
pub fn say(line: &dyn std::fmt::Display) -> Result<(), CliError> {
    use std::io::Write as _;
    Ok(writeln!(std::io::stdout(), "{line}")?)
}
