//! `millrace cli`: a client of the HTTP API.

mod capture;
mod changefeed;
mod client;
mod credentials;
mod hidden;
mod reset;
mod resume;
mod resync;
pub mod store;
mod table;
mod update;
mod verify;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use self::credentials::CredentialArgs;

pub use client::{ApiError, Client};
pub use credentials::ask_password;

/// Arguments of the client commands.
#[derive(Args, Debug)]
pub struct CliArgs {
    #[command(flatten)]
    connection: ConnectionArgs,
    #[command(subcommand)]
    command: CliCommand,
}

/// Arguments of `millrace verify`.
#[derive(Args, Debug)]
pub struct VerifyArgs {
    #[command(flatten)]
    connection: ConnectionArgs,
    #[command(flatten)]
    what: verify::What,
}

/// Options shared by every client command.
#[derive(Args, Debug)]
struct ConnectionArgs {
    /// Address of any server of the cluster.
    #[arg(long, global = true, env = "MILLRACE_SERVER", default_value = "127.0.0.1:8300")]
    server: String,
    #[command(flatten)]
    credentials: CredentialArgs,
    /// Print every result as JSON.
    #[arg(long, global = true)]
    json: bool,
    /// Keyspace of changefeeds; there is one, `default`.
    #[arg(short, long, global = true, default_value = "default", value_parser = parse_keyspace, hide = true)]
    keyspace: String,
    /// Taken for the sake of older scripts; this client writes no log.
    #[arg(long, global = true, default_value = "warn", hide = true)]
    log_level: String,
    /// Not taken any more: name a server.
    #[arg(long, global = true, hide = true, value_parser = refuse_pd)]
    pd: Option<String>,
}

impl ConnectionArgs {
    fn session(self) -> Result<Session, CliError> {
        let credentials = self.credentials.resolve(&self.server)?;
        Ok(Session { client: Client::with(&self.server, credentials)?.checking_version(), json: self.json })
    }
}

fn parse_keyspace(text: &str) -> Result<String, String> {
    if text == "default" {
        return Ok(text.to_owned());
    }
    Err("keyspaces are not enabled; leave it out, or write default".to_owned())
}

fn refuse_pd(_: &str) -> Result<String, String> {
    Err("there is no PD here; name any server of the cluster with --server".to_owned())
}

#[derive(Subcommand, Debug)]
enum CliCommand {
    /// Create, list, query, pause, resume and remove changefeeds.
    #[command(subcommand)]
    Changefeed(Box<changefeed::ChangefeedCommand>),
    /// List the servers of the cluster, and empty one before it is stopped.
    #[command(subcommand)]
    Capture(capture::CaptureCommand),
    /// The upstream's current position.
    #[command(subcommand)]
    Tso(TsoCommand),
    /// State of the server that is asked.
    Status,
    /// The last operations that people asked for.
    Operations,
    /// Write user, password and certificates to ~/.millrace/credentials, for later commands.
    ConfigureCredentials,
    /// What only helps to find a fault.
    #[command(subcommand, hide = true)]
    Unsafe(hidden::UnsafeCommand),
}

#[derive(Subcommand, Debug)]
enum TsoCommand {
    /// Print the current position of an upstream as a decimal number.
    Query {
        /// The upstream, for example postgres://user:password@host/db. The only one of the server's configuration by
        /// default.
        #[arg(long, env = "MILLRACE_UPSTREAM_URI", hide_env_values = true)]
        upstream_uri: Option<String>,
        /// One of the server's configuration.
        #[arg(long, conflicts_with = "upstream_uri")]
        upstream_name: Option<String>,
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
    /// A comparison of both ends found that they differ.
    #[error("both ends of the changefeed are not equal")]
    Different,
    /// A comparison of both ends could not decide.
    #[error("it is not known whether both ends are equal: {0}")]
    Undecided(String),
    /// Standard output takes nothing more.
    #[error("cannot write to standard output")]
    Output(#[from] std::io::Error),
}

/// Says what helps against an error of credentials.
fn hinted(error: CliError) -> CliError {
    match error {
        CliError::Api(ApiError::Refused { status: 401, code, message }) => {
            let message = format!("{message}; {}", credentials::HINT);
            CliError::Api(ApiError::Refused { status: 401, code, message })
        }
        other @ (CliError::Api(_)
        | CliError::Usage(_)
        | CliError::Aborted
        | CliError::Different
        | CliError::Undecided(_)
        | CliError::Output(_)) => other,
    }
}

impl CliError {
    /// Exit code of the process: 2 when a person aborted, 3 when both ends differ, 4 when that is not known, 141 when
    /// whoever read the output went away, otherwise 1.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            CliError::Aborted => 2,
            CliError::Different => 3,
            CliError::Undecided(_) => 4,
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

/// A client, and how results are printed.
struct Session {
    client: Client,
    json: bool,
}

impl std::ops::Deref for Session {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl Session {
    /// Prints a result: words for people, or the value.
    fn tell(&self, words: &dyn std::fmt::Display, value: &Value) -> Result<(), CliError> {
        if self.json { print_json(value) } else { say(words) }
    }
}

/// Runs one client command and prints its result to standard output.
///
/// # Errors
/// When the arguments are wrong or the server refuses.
pub async fn run(args: CliArgs) -> Result<(), CliError> {
    if let CliCommand::ConfigureCredentials = args.command {
        let path = credentials::configure(&args.connection.credentials)?;
        return say(&format_args!("Credentials are kept in {}", path.display()));
    }
    perform(&args.connection.session()?, args.command).await.map_err(hinted)
}

/// Compares both ends of a changefeed, and prints what was found to standard output.
///
/// # Errors
/// When they differ, when not everything could be compared, when the arguments are wrong or the server refuses.
pub async fn verify(args: VerifyArgs) -> Result<(), CliError> {
    verify::verify(&args.connection.session()?, &args.what).await.map_err(hinted)
}

async fn perform(session: &Session, command: CliCommand) -> Result<(), CliError> {
    match command {
        CliCommand::Changefeed(command) => changefeed::run(session, *command).await,
        CliCommand::Capture(command) => capture::run(session, command).await,
        CliCommand::Tso(TsoCommand::Query { upstream_uri, upstream_name }) => {
            let body = match (upstream_uri, upstream_name) {
                (Some(uri), None) => json!({ "upstream": { "uri": uri } }),
                (_, Some(name)) => json!({ "upstream_name": name }),
                (None, None) => json!({}),
            };
            let answer = session.post("/api/v2/tso", &body).await?;
            session.tell(&answer["position"], &answer)
        }
        CliCommand::Status => print_json(&session.get("/api/v2/status").await?),
        CliCommand::Operations => print_json(&session.get("/api/v2/operations").await?["items"]),
        CliCommand::Unsafe(command) => hidden::run(session, command).await,
        CliCommand::ConfigureCredentials => Ok(()),
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
