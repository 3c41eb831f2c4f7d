//! `millrace cli changefeed resume`.

use clap::Args;
use serde_json::{Value, json};
use time::macros::format_description;
use time::{Duration, OffsetDateTime, PrimitiveDateTime};

use super::changefeed::{IdArg, confirm, path};
use super::{CliError, Session};

/// A changefeed that is further behind is resumed only by somebody who says yes.
const FAR: Duration = Duration::days(1);

#[derive(Args, Debug)]
pub(super) struct ResumeArgs {
    #[command(flatten)]
    id: IdArg,
    /// Continue from this position, or from `now`, instead of the checkpoint: rows in between are not replicated, or
    /// again.
    #[arg(long, value_parser = parse_position, value_name = "NOW|POSITION")]
    overwrite_checkpoint_ts: Option<Value>,
    /// Do not ask.
    #[arg(long)]
    no_confirm: bool,
    /// Print the changefeed as it is then.
    #[arg(short, long)]
    verbose: bool,
}

/// `now`, a number above 0, or the upstream's notation.
fn parse_position(text: &str) -> Result<Value, String> {
    let wrong = "[CDC:ErrCliInvalidCheckpointTs]write now, or a position above 0";
    match text.parse::<u64>() {
        Ok(0) => Err(wrong.to_owned()),
        Ok(number) => Ok(json!(number)),
        Err(_) if text == "now" || text.contains(':') => Ok(json!(text)),
        Err(_) => Err(wrong.to_owned()),
    }
}

pub(super) async fn resume(session: &Session, args: &ResumeArgs) -> Result<(), CliError> {
    let id = &args.id.changefeed_id;
    let info = session.get(&path(id, "")).await?;
    let state = info["state"].as_str().unwrap_or_default();
    if !matches!(state, "stopped" | "failed" | "finished") {
        let words = "only one that is stopped, failed or finished can be resumed";
        let words = format!("[CDC:ErrChangefeedUpdateRefused]changefeed {id} is {state}; {words}");
        return Err(CliError::Usage(words));
    }
    let mut body = json!({});
    match &args.overwrite_checkpoint_ts {
        Some(position) => {
            body["overwrite_checkpoint_ts"] = position.clone();
            let words = format!(
                "The checkpoint {} will be replaced by {position}: rows in between are not replicated, or again. Go on?",
                info["checkpoint_ts"]
            );
            if !args.no_confirm && !confirm(&words)? {
                return Err(CliError::Aborted);
            }
        }
        None => {
            let behind = behind(&info["checkpoint_time"], OffsetDateTime::now_utc());
            if let Some(behind) = behind.filter(|behind| *behind > FAR && !args.no_confirm) {
                let words = format!("The changefeed is {} hours behind. Go on?", behind.whole_hours());
                if !confirm(&words)? {
                    return Err(CliError::Aborted);
                }
            }
        }
    }
    session.post(&path(id, "/resume"), &body).await?;
    let words = format!("Resume changefeed successfully!\nID: {id}");
    if args.verbose || session.json {
        let info = session.get(&path(id, "")).await?;
        return session.tell(&format_args!("{words}\nInfo: {info}"), &info);
    }
    session.tell(&words, &Value::Null)
}

/// How far a checkpoint is behind, if its time is known.
fn behind(checkpoint: &Value, now: OffsetDateTime) -> Option<Duration> {
    let format = format_description!("[year]-[month]-[day] [hour]:[minute]:[second].[subsecond digits:3]");
    let time = PrimitiveDateTime::parse(checkpoint.as_str()?, &format).ok()?;
    Some(now - time.assume_utc())
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    #[test]
    fn a_position_to_resume_from_is_now_a_number_or_a_notation_and_never_zero() {
        assert_eq!(parse_position("now"), Ok(json!("now")));
        assert_eq!(parse_position("42"), Ok(json!(42)));
        assert_eq!(parse_position("pg:16/B374D848"), Ok(json!("pg:16/B374D848")));
        for bad in ["0", "", "soon", "-1", "1.5", "99999999999999999999"] {
            assert!(parse_position(bad).unwrap_err().contains("ErrCliInvalidCheckpointTs"), "{bad}");
        }
    }

    #[test]
    fn a_day_behind_is_not_far_and_more_is() {
        let now = datetime!(2026-03-02 08:00:00 UTC);
        assert_eq!(behind(&json!("2026-03-01 08:00:00.000"), now), Some(FAR));
        assert!(behind(&json!("2026-03-01 07:59:59.999"), now).unwrap() > FAR);
        assert_eq!(behind(&Value::Null, now), None);
    }
}
