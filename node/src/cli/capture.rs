//! `millrace cli capture …`.

use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{ApiError, CliError, Session, items, print_json};

/// Polls in a row without an answer after which watching a drain ends.
const PATIENCE: u32 = 3;

#[derive(Subcommand, Debug)]
pub(super) enum CaptureCommand {
    /// List the servers.
    List,
    /// Empty a server before it is stopped, and wait until nothing is left on it.
    ///
    /// The server stays out of placements afterwards: stop it, and start it anew. Interrupting this command leaves
    /// the drain under way.
    Drain(DrainArgs),
}

#[derive(Args, Debug)]
pub(super) struct DrainArgs {
    /// Id of the server, as `capture list` shows it.
    #[arg(long, value_parser = parse_id)]
    capture_id: String,
    /// Give up watching after this time, for example 10m; 0 is never. The drain goes on.
    #[arg(long, default_value = "0", value_parser = parse_duration)]
    timeout: Duration,
    /// Between two looks.
    #[arg(long, default_value = "2s", value_parser = parse_duration)]
    interval: Duration,
    /// Take the drain back. What has moved stays where it is.
    #[arg(long, conflicts_with_all = ["timeout", "interval"])]
    cancel: bool,
}

/// An id goes into a path, so what is not one must not reach it.
pub(super) fn parse_id(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':');
    if !text.is_empty() && text.len() <= 128 && text.chars().all(fits) {
        return Ok(text.to_owned());
    }
    Err("a capture id is a server's id, as `capture list` shows it".to_owned())
}

/// A duration, or a number of seconds.
fn parse_duration(text: &str) -> Result<Duration, String> {
    if let Ok(seconds) = text.parse() {
        return Ok(Duration::from_secs(seconds));
    }
    heartbeatpb::config::HumanDuration::parse(text)
        .map(|duration| duration.0)
        .ok_or_else(|| format!("{text:?} is not a duration; write for example 20s or 5m"))
}

pub(super) async fn run(client: &Session, command: CaptureCommand) -> Result<(), CliError> {
    match command {
        CaptureCommand::List => list(client).await,
        CaptureCommand::Drain(args) if args.cancel => {
            client.delete(&path(&args.capture_id)).await?;
            let words = format!("Cancel drain successfully!\nID: {}", args.capture_id);
            client.tell(&words, &json!({ "id": args.capture_id, "cancelled": true }))
        }
        CaptureCommand::Drain(args) => drain(client, &args).await,
    }
}

async fn list(client: &Session) -> Result<(), CliError> {
    let captures = client.get("/api/v2/captures").await?;
    let rows: Vec<Value> = items(&captures)
        .map(|c| {
            json!({
                "id": c["id"], "is-owner": c["is_owner"], "address": c["address"],
                "cluster-id": c["cluster_id"],
            })
        })
        .collect();
    print_json(&Value::Array(rows))
}

fn path(id: &str) -> String {
    format!("/api/v2/captures/{id}/drain")
}

/// Asks until nothing remains; what remains goes to standard error whenever it changes.
async fn drain(client: &Session, args: &DrainArgs) -> Result<(), CliError> {
    let deadline = (!args.timeout.is_zero()).then(|| Instant::now() + args.timeout);
    let (mut told, mut silent) = (String::new(), 0);
    let mut pace = Pace::default();
    let mut remaining = None;
    loop {
        match client.put(&path(&args.capture_id), &json!({})).await {
            Ok(answer) => {
                silent = 0;
                let left = answer["current_table_count"].as_u64().ok_or_else(|| {
                    CliError::Usage(
                        "the server does not say what is left; is it of another version?".to_owned(),
                    )
                })?;
                if left == 0 {
                    let words = format!("Drain capture successfully!\nID: {}", args.capture_id);
                    return client.tell(&words, &json!({ "id": args.capture_id, "drained": true }));
                }
                remaining = Some(left);
                let now = progress(left, &answer);
                let rest = pace.rest(Instant::now(), left);
                if now != told {
                    let about = rest.map_or_else(String::new, |rest| format!(", about {rest} s"));
                    eprintln!("{now}{about}");
                    told = now;
                }
            }
            // The coordinator may be on its way to another node.
            Err(error) if passes(&error) && silent < PATIENCE => silent += 1,
            Err(error) => return Err(error.into()),
        }
        if deadline.is_some_and(|deadline| Instant::now() + args.interval > deadline) {
            let left =
                remaining.map_or_else(|| "it has not begun".to_owned(), |left| format!("{left} remaining"));
            return Err(CliError::Usage(format!(
                "the drain of {} is not finished after {} s: {left}; it goes on, --cancel takes it back",
                args.capture_id,
                args.timeout.as_secs()
            )));
        }
        tokio::time::sleep(args.interval).await;
    }
}

/// How fast a drain gets on, since something first moved.
#[derive(Debug, Default)]
struct Pace {
    began: Option<(Instant, u64)>,
}

impl Pace {
    /// Seconds that the rest will take at the pace so far; none before something has moved.
    fn rest(&mut self, now: Instant, left: u64) -> Option<u64> {
        let (since, most) = *self.began.get_or_insert((now, left));
        if left > most {
            // More came, as from a changefeed that had not reported.
            self.began = Some((now, left));
            return None;
        }
        let done = most - left;
        let millis = u64::try_from((now - since).as_millis()).unwrap_or(u64::MAX);
        (done > 0).then(|| millis.saturating_mul(left).div_ceil(done).div_ceil(1000))
    }
}

/// Whether asking again may help.
fn passes(error: &ApiError) -> bool {
    match error {
        ApiError::Refused { status, .. } => *status == 503,
        ApiError::Unreachable { .. } => true,
        ApiError::Address(_) | ApiError::Version(_) => false,
    }
}

/// What is left, in one line.
fn progress(left: u64, answer: &Value) -> String {
    if let Some(reason) = answer["waiting_for"].as_str() {
        return format!("waiting for {reason}");
    }
    let parts = [
        ("maintainers", "maintainers"),
        ("dispatchers", "dispatchers"),
        ("inflight_moves", "moves under way"),
        ("operators", "changes of placement"),
        ("pending_changefeeds", "changefeeds that have not reported"),
    ];
    let shown: Vec<String> = parts
        .iter()
        .filter_map(|(key, words)| answer[*key].as_u64().filter(|n| *n > 0).map(|n| format!("{n} {words}")))
        .collect();
    let shown = if shown.is_empty() { "the server's confirmation".to_owned() } else { shown.join(", ") };
    format!("remaining: {left} ({shown})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_told_in_words() {
        let answer = json!({ "current_table_count": 7, "maintainers": 2, "dispatchers": 7, "operators": 0 });
        assert_eq!(progress(7, &answer), "remaining: 7 (2 maintainers, 7 dispatchers)");
        assert_eq!(progress(1, &json!({})), "remaining: 1 (the server's confirmation)");
        let other = json!({ "waiting_for": "the drain of node a to end" });
        assert_eq!(progress(1, &other), "waiting for the drain of node a to end");
    }

    #[test]
    fn the_rest_is_estimated_by_the_pace_so_far() {
        let (mut pace, began) = (Pace::default(), Instant::now());
        let at = |seconds| began + Duration::from_secs(seconds);
        assert_eq!(pace.rest(at(0), 10), None);
        assert_eq!(pace.rest(at(2), 10), None, "nothing has moved");
        assert_eq!(pace.rest(at(4), 8), Some(16), "2 in 4 s, 8 are left");
        assert_eq!(pace.rest(at(8), 2), Some(2));
        assert_eq!(pace.rest(at(9), 30), None, "more came");
        assert_eq!(pace.rest(at(10), 29), Some(29));
    }

    #[test]
    fn ids_and_durations_are_checked_before_anything_is_sent() {
        assert!(parse_id("5d0e8a0c-2f52-4a57-9d0e-0f5f6c9a7b11").is_ok());
        for bad in ["", "a/b", "a b", "a?b", "ä", &"a".repeat(129)] {
            assert!(parse_id(bad).unwrap_err().contains("capture list"), "{bad}");
        }
        assert_eq!(parse_duration("0"), Ok(Duration::ZERO));
        assert_eq!(parse_duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("5m"), Ok(Duration::from_secs(300)));
        assert!(parse_duration("soon").unwrap_err().contains("soon"));
    }
}
