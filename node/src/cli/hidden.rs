//! `millrace cli unsafe …`: what only helps to find a fault.

use clap::Subcommand;
use serde_json::json;

use super::changefeed::confirm;
use super::{CliError, Session, print_json, reset, say};

#[derive(Subcommand, Debug)]
pub(super) enum UnsafeCommand {
    /// Print what the metadata store holds of the cluster.
    ShowMetadata {
        /// Do not ask.
        #[arg(long)]
        no_confirm: bool,
        /// With the credentials in it.
        #[arg(long)]
        raw: bool,
    },
    /// Delete everything that a cluster stores, and let go of the log that its sources keep. Stop its servers first.
    Reset(reset::ResetArgs),
    /// There is nothing of that kind here; says what there is instead.
    DeleteServiceGcSafepoint {
        /// Do not ask.
        #[arg(long)]
        no_confirm: bool,
    },
    /// There is nothing of that kind here; says so.
    ResolveLock {
        /// Do not ask.
        #[arg(long)]
        no_confirm: bool,
        /// Not used.
        #[arg(long)]
        region: Option<u64>,
        /// Not used.
        #[arg(long)]
        ts: Option<u64>,
    },
}

fn ask(no_confirm: bool) -> Result<(), CliError> {
    if no_confirm || confirm("This is for people who look for a fault. Go on?")? {
        return Ok(());
    }
    Err(CliError::Aborted)
}

pub(super) async fn run(session: &Session, command: UnsafeCommand) -> Result<(), CliError> {
    match command {
        UnsafeCommand::ShowMetadata { no_confirm, raw } => {
            ask(no_confirm)?;
            let stored = session.get(&format!("/api/v2/unsafe/metadata?raw={raw}")).await?;
            if session.json {
                return print_json(&stored);
            }
            let all = stored.as_array().map_or(&[][..], Vec::as_slice);
            for kv in all {
                let text = |key: &str| kv[key].as_str().unwrap_or_default().to_owned();
                say(&format_args!("Key: {}, Value: {}", text("key"), text("value")))?;
            }
            say(&format_args!("Show {} KVs", all.len()))
        }
        UnsafeCommand::Reset(arguments) => reset::run(session.json, &arguments).await,
        UnsafeCommand::DeleteServiceGcSafepoint { no_confirm } => {
            ask(no_confirm)?;
            Ok(session.delete("/api/v2/unsafe/service_gc_safepoint").await.map(drop)?)
        }
        UnsafeCommand::ResolveLock { no_confirm, region, ts } => {
            ask(no_confirm)?;
            let body = json!({ "region_id": region, "ts": ts });
            Ok(session.post("/api/v2/unsafe/resolve_lock", &body).await.map(drop)?)
        }
    }
}
