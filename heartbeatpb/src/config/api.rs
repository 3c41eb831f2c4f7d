//! Conversion between the stored keys (kebab-case) and the keys of the JSON API (snake_case), and the
//! hiding of secrets in what the API shows.

use serde_json::{Map, Value};

use super::uri::{is_secret_name, mask_uri};
use super::{ConfigError, HumanDuration};

/// What is shown instead of a secret; on update it means "keep the stored value".
pub const HIDDEN: &str = "******";

/// Keys whose API name is not simply their snake_case form: (stored, API).
const RENAMED: [(&str, &str); 3] = [
    ("file-index-digit", "file_index_width"),
    ("target-schema", "target-schema"),
    ("target-table", "target-table"),
];

/// Keys whose value is a URI: its secrets are masked and the rest stays readable.
const URIS: [&str; 4] = ["storage", "uri", "sink-uri", "schema-registry"];

/// Keys, as the API names them, whose value is a duration: answers have whole nanoseconds (api-cli-config §1).
const DURATIONS: [&str; 6] = [
    "sync_point_interval",
    "sync_point_retention",
    "active_active_progress_interval",
    "active_active_sync_stats_interval",
    "changefeed_error_stuck_duration",
    "region_count_refresh_interval",
];

/// Rewrites the durations of an API document from text to nanoseconds.
pub fn number_durations(value: &mut Value) {
    match value {
        Value::Object(map) => {
            for (key, value) in map.iter_mut() {
                let duration = value.as_str().filter(|_| DURATIONS.contains(&key.as_str()));
                match duration.and_then(HumanDuration::parse) {
                    Some(HumanDuration(duration)) => {
                        *value = Value::from(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX));
                    }
                    None => number_durations(value),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(number_durations),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Rewrites every key of a stored document to its API form.
#[must_use]
pub fn to_api_keys(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            Value::Object(map.into_iter().map(|(key, value)| (api_key(&key), to_api_keys(value))).collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(to_api_keys).collect()),
        other @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_)) => other,
    }
}

fn api_key(stored: &str) -> String {
    RENAMED
        .iter()
        .find(|(key, _)| *key == stored)
        .map_or_else(|| stored.replace('-', "_"), |(_, api)| (*api).to_owned())
}

/// Rewrites every key of an API document to its stored form; the stored form is accepted too.
/// Keys with a null value are left out, so that they take their default.
///
/// # Errors
/// When one key is given twice in different spellings.
pub fn to_stored_keys(value: Value) -> Result<Value, ConfigError> {
    match value {
        Value::Object(map) => {
            let mut out = Map::with_capacity(map.len());
            for (key, value) in map {
                if value.is_null() {
                    continue;
                }
                let stored = stored_key(&key);
                let value = to_stored_keys(value)?;
                if out.insert(stored, value).is_some() {
                    return Err(ConfigError::invalid(
                        &key,
                        "is given twice in different spellings; keep one",
                    ));
                }
            }
            Ok(Value::Object(out))
        }
        Value::Array(items) => {
            Ok(Value::Array(items.into_iter().map(to_stored_keys).collect::<Result<_, _>>()?))
        }
        other @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_)) => Ok(other),
    }
}

fn stored_key(api: &str) -> String {
    RENAMED
        .iter()
        .find(|(_, key)| *key == api)
        .map_or_else(|| api.replace('_', "-"), |(stored, _)| (*stored).to_owned())
}

/// The keys of `given` that the schema did not take over: those that are missing in `understood`, which is
/// the document written back.
#[must_use]
pub fn unknown_keys(given: &Value, understood: &Value) -> Vec<String> {
    let mut out = Vec::new();
    collect_unknown(given, understood, "", &mut out);
    out.sort();
    out
}

fn collect_unknown(given: &Value, understood: &Value, path: &str, out: &mut Vec<String>) {
    match (given, understood) {
        (Value::Object(given), Value::Object(understood)) => {
            for (key, value) in given {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                // Older files spell this one key with an underscore.
                let known = understood
                    .get(key)
                    .or_else(|| (key == "ignore_sql").then(|| understood.get("ignore-sql"))?);
                match known {
                    Some(known) => collect_unknown(value, known, &path, out),
                    None => out.push(path),
                }
            }
        }
        (Value::Array(given), Value::Array(understood)) => {
            for (at, (given, understood)) in given.iter().zip(understood).enumerate() {
                collect_unknown(given, understood, &format!("{path}[{at}]"), out);
            }
        }
        _ => {}
    }
}

/// Hides every secret of a stored document.
pub fn mask_secrets(value: &mut Value) {
    match value {
        Value::Object(map) => {
            for (key, value) in map.iter_mut() {
                match value {
                    Value::String(text) if text.is_empty() => {}
                    Value::String(text) if URIS.contains(&key.as_str()) => *text = mask_uri(text),
                    Value::String(text) if is_secret_name(key) => HIDDEN.clone_into(text),
                    nested @ (Value::Null
                    | Value::Bool(_)
                    | Value::Number(_)
                    | Value::String(_)
                    | Value::Array(_)
                    | Value::Object(_)) => mask_secrets(nested),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(mask_secrets),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Puts back what [`mask_secrets`] hid: a value that still is what was shown becomes the stored one.
pub fn restore_secrets(value: &mut Value, stored: &Value) {
    match (value, stored) {
        (Value::Object(map), Value::Object(stored)) => {
            for (key, value) in map.iter_mut() {
                let Some(stored) = stored.get(key) else { continue };
                let shown = stored.as_str().is_some_and(|stored| {
                    value.as_str().is_some_and(|value| {
                        value == HIDDEN || (URIS.contains(&key.as_str()) && value == mask_uri(stored))
                    })
                });
                if shown {
                    *value = stored.clone();
                } else {
                    restore_secrets(value, stored);
                }
            }
        }
        (Value::Array(items), Value::Array(stored)) => {
            for (item, stored) in items.iter_mut().zip(stored) {
                restore_secrets(item, stored);
            }
        }
        _ => {}
    }
}
