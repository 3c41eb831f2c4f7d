//! Forms that the API gives to positions, times and documents.

use heartbeatpb::{Ts, WallTime};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
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
pub(crate) fn time_text(time: Option<WallTime>) -> Option<String> {
    let time = time?;
    let format = format_description!("[year]-[month]-[day] [hour]:[minute]:[second].[subsecond digits:3]");
    let time = OffsetDateTime::from_unix_timestamp_nanos(i128::from(time.0) * 1000).ok()?;
    time.format(&format).ok()
}

/// Puts the keys of `changes` into `base`: objects key by key, null takes a key away, everything else replaces.
pub(super) fn merge(base: Value, changes: Value) -> Value {
    match (base, changes) {
        (Value::Object(mut base), Value::Object(changes)) => {
            for (key, value) in changes {
                if value.is_null() {
                    base.remove(&key);
                } else {
                    let old = base.remove(&key).unwrap_or(Value::Null);
                    base.insert(key, merge(old, value));
                }
            }
            Value::Object(base)
        }
        (_, changes) => changes,
    }
}

/// A document as TOML. What TOML cannot say is left out: nulls, and the identity, whose halves are too large.
pub(super) fn toml_text(mut value: Value) -> Result<String, ApiFailure> {
    if let Some(map) = value.as_object_mut() {
        map.remove("gid");
    }
    without_nulls(&mut value);
    toml::to_string(&value).map_err(|error| {
        ApiFailure::new("CDC:ErrInternal", format!("the answer cannot be written as TOML: {error}"))
    })
}

fn without_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, value| !value.is_null());
            map.values_mut().for_each(without_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(without_nulls),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
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
    // behaviour: api-A-7
    fn a_changefeed_as_toml_is_read_back_without_a_loss() {
        use heartbeatpb::config::ReplicaConfig;
        let mut config = ReplicaConfig::default();
        config.filter.rules = vec!["shop.*".to_owned()];
        config.initial_copy.parallel = 7;
        let value = serde_json::json!({ "id": "a", "start_ts": 7, "gid": { "low": u64::MAX }, "none": null, "config": config.to_value() });
        let text = toml_text(value).unwrap();
        let table: toml::Table = toml::from_str(&text).unwrap();
        assert_eq!(
            (table["start_ts"].as_integer(), table.get("gid"), table.get("none")),
            (Some(7), None, None)
        );
        let back = ReplicaConfig::from_toml(&toml::to_string(&table["config"]).unwrap()).unwrap();
        assert_eq!(back.to_value(), config.to_value());
    }

    #[test]
    fn a_merge_changes_what_is_named() {
        use serde_json::json;
        let base = json!({ "a": { "b": 1, "c": [1, 2] }, "d": "x" });
        assert_eq!(merge(base.clone(), json!({})), base);
        assert_eq!(
            merge(base, json!({ "a": { "c": [3] }, "d": null, "e": { "f": null, "g": 1 } })),
            json!({ "a": { "b": 1, "c": [3] }, "e": { "f": null, "g": 1 } })
        );
    }

    #[test]
    fn times_are_utc_with_milliseconds() {
        assert_eq!(
            time_text(Some(WallTime(1_772_352_000_123_456))).as_deref(),
            Some("2026-03-01 08:00:00.123")
        );
    }
}
