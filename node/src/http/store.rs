//! What the metadata store holds, for people who look for a fault (api-cli-config §4.4).

use axum::Json;
use axum::extract::{Query, State};
use heartbeatpb::config::api::{HIDDEN, mask_secrets};
use heartbeatpb::config::mask_uri;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{ApiFailure, Shared};

/// Where a description has its keyspace.
const KEYSPACE: &str = "/id/display/keyspace";

#[derive(Deserialize, Default)]
#[serde(default)]
pub(super) struct MetadataQuery {
    raw: Option<String>,
}

/// Every key of the cluster with its value; secrets are hidden unless `raw=true`.
pub(super) async fn metadata(
    State(state): State<Shared>,
    Query(query): Query<MetadataQuery>,
) -> Result<Json<Value>, ApiFailure> {
    let raw = match query.raw.as_deref() {
        None | Some("" | "false" | "0") => false,
        Some("true" | "1") => true,
        Some(_) => return Err(ApiFailure::invalid("raw must be true or false")),
    };
    if raw {
        tracing::warn!("the metadata of the cluster was shown with its secrets by a request");
    }
    let found = state.store.scan(&state.layout.base()).await;
    let found = found.map_err(|error| ApiFailure::new(error.code(), error.to_string()))?.found;
    let items = found.iter().map(|kv| {
        let text = String::from_utf8_lossy(&kv.value);
        json!({ "key": kv.key, "value": if raw { text.into_owned() } else { shown(&text) } })
    });
    Ok(Json(items.collect()))
}

/// A stored value without its secrets.
fn shown(text: &str) -> String {
    match serde_json::from_str::<Value>(text) {
        Ok(mut value) => {
            // The name of a keyspace is none, though `key` is in its name.
            let keyspace = value.pointer(KEYSPACE).cloned();
            mask_secrets(&mut value);
            mask_texts(&mut value);
            if let (Some(place), Some(keyspace)) = (value.pointer_mut(KEYSPACE), keyspace) {
                *place = keyspace;
            }
            value.to_string()
        }
        // A name of a node or a number; what looks like a URI is masked as one.
        Err(_) if text.contains("://") => mask_uri(text),
        Err(_) if text.len() > 256 => HIDDEN.to_owned(),
        Err(_) => text.to_owned(),
    }
}

/// Masks every text that is a URI, whatever its key.
fn mask_texts(value: &mut Value) {
    match value {
        Value::String(text) if text.contains("://") => *text = mask_uri(text),
        Value::Array(items) => items.iter_mut().for_each(mask_texts),
        Value::Object(map) => map.values_mut().for_each(mask_texts),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

pub(super) async fn no_locks() -> ApiFailure {
    ApiFailure::new("CDC:ErrAPIGone", "there are no locks to resolve: upstreams here have none")
}

pub(super) async fn no_safepoint() -> ApiFailure {
    ApiFailure::new(
        "CDC:ErrAPIGone",
        "there is no common hold: each changefeed holds its own log upstream, and gives it up when it is removed",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_values_are_shown_without_their_secrets() {
        let canary = "s3cr3t-canary";
        for (text, kept) in [
            (format!(r#"{{"sink-uri":"postgres://u:{canary}@h/d","state":"normal"}}"#), "normal"),
            (format!(r#"{{"upstream-info":{{"uri":"postgres://u:{canary}@h/d"}}}}"#), "upstream-info"),
            (
                format!(r#"{{"config":{{"sink":{{"kafka-config":{{"sasl-password":"{canary}"}}}}}}}}"#),
                "kafka-config",
            ),
            (format!(r#"{{"error":{{"message":"kafka://h/?sasl-password={canary}"}}}}"#), "message"),
            (format!("postgres://u:{canary}@h/d"), "postgres"),
            (format!("{canary}{}", "x".repeat(300)), ""),
            (r#"{"id":{"display":{"keyspace":"default"}}}"#.to_owned(), r#""keyspace":"default""#),
            ("5d0e8a0c".to_owned(), "5d0e8a0c"),
        ] {
            let shown = shown(&text);
            assert!(!shown.contains(canary) && shown.contains(kept), "{text}: {shown}");
        }
    }
}
