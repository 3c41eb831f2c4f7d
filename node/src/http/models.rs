//! Forms that the API gives to positions, times and documents.

use heartbeatpb::{Ts, WallTime};
use serde::{Deserialize, Deserializer};
use time::OffsetDateTime;
use time::macros::format_description;

use super::ApiFailure;

/// A position in a request: a number, its decimal text, or the upstream's native text (`pg:16/B374D848`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct PositionArg(pub(super) Ts);

impl<'de> Deserialize<'de> for PositionArg {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Number(u64),
            Text(String),
        }
        match Form::deserialize(deserializer)? {
            Form::Number(number) => Ok(Self(Ts(number))),
            Form::Text(text) => parse_position(&text).map(Self).map_err(serde::de::Error::custom),
        }
    }
}

/// Parses a position's text.
pub(super) fn parse_position(text: &str) -> Result<Ts, String> {
    let wrong = || format!("{text:?} is not a position; use a decimal number or pg:16/B374D848");
    if let Some(lsn) = text.strip_prefix("pg:") {
        let (high, low) = lsn.split_once('/').ok_or_else(wrong)?;
        let part = |hex: &str| u32::from_str_radix(hex, 16).map_err(|_| wrong());
        return Ok(Ts(u64::from(part(high)?) << 32 | u64::from(part(low)?)));
    }
    text.parse().map(Ts).map_err(|_| wrong())
}

/// A position in the upstream's own notation.
pub(super) fn position_text(upstream_uri: &str, ts: Ts) -> String {
    if upstream_uri.starts_with("postgres") {
        format!("pg:{:X}/{:X}", ts.0 >> 32, ts.0 & 0xffff_ffff)
    } else {
        ts.to_string()
    }
}

/// Milliseconds since the epoch, 0 when unknown.
pub(super) fn millis_of(time: WallTime) -> i64 {
    time.millis()
}

/// `YYYY-MM-DD hh:mm:ss.mmm` in UTC; `null` in JSON when unknown.
pub(super) fn time_text(time: Option<WallTime>) -> Option<String> {
    let time = time?;
    let format = format_description!("[year]-[month]-[day] [hour]:[minute]:[second].[subsecond digits:3]");
    let time = OffsetDateTime::from_unix_timestamp_nanos(i128::from(time.0) * 1000).ok()?;
    time.format(&format).ok()
}

/// Checks a changefeed name from a path or a body.
pub(super) fn check_name(name: &str) -> Result<(), ApiFailure> {
    if heartbeatpb::config::is_valid_name(name) {
        return Ok(());
    }
    Err(ApiFailure::invalid(
        "a changefeed id has letters, digits and single hyphens between them, at most 128 bytes",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_read_in_every_documented_form() {
        assert_eq!(parse_position("42"), Ok(Ts(42)));
        assert_eq!(parse_position("pg:16/B374D848"), Ok(Ts(0x16_B374_D848)));
        for bad in ["", "pg:16", "pg:x/1", "-1", "pg:1/123456789"] {
            assert!(parse_position(bad).unwrap_err().contains("not a position"), "{bad}");
        }
        assert_eq!(position_text("postgres://h/d", Ts(0x16_B374_D848)), "pg:16/B374D848");
    }

    #[test]
    fn times_are_utc_with_milliseconds() {
        assert_eq!(
            time_text(Some(WallTime(1_772_352_000_123_456))).as_deref(),
            Some("2026-03-01 08:00:00.123")
        );
    }
}
