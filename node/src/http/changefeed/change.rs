//! What people ask to be changed: create, pause, resume, update, remove (api-cli-config §8.1–8.4).

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State};
use heartbeatpb::config::{ChangefeedState, mask_uri};
use heartbeatpb::{ChangefeedId, Gid, Ts, codes};
use logservice::upstream::Upstream;
use serde::Deserialize;
use serde_json::{Value, json};

use super::request::{
    FeedBody, UpstreamBody, check_ends, check_request, check_tables, check_target, scheme_of,
};
use super::{Answer, KEYSPACE, find, shown};
use crate::http::models::{PositionArg, check_name, merge};
use crate::http::operations::{self, note};
use crate::http::{ApiFailure, ApiState, Shared, leader, parse_body};

/// Creates a changefeed, in the order of api-cli-config §8.1.
pub(in crate::http) async fn create(State(state): State<Shared>, body: Bytes) -> Answer {
    let body: FeedBody = parse_body(&body)?;
    let doc = operations::current();
    let own = || doc.as_ref().map_or_else(|| uuid::Uuid::new_v4().to_string(), |doc| doc.id.clone());
    let name = body.changefeed_id.clone().unwrap_or_else(own);
    note(&name, "");
    check_name(&name)?;
    let (gid, leftover) = doc.map_or((None, Vec::new()), |doc| (doc.gid, doc.leftover));
    clear_away(&state, &body, &name, &leftover).await?;
    let taken = leader(&state)?.list(Some(KEYSPACE)).await?.iter().any(|feed| *feed.info.id.name == *name);
    if taken {
        return Err(ApiFailure::new(
            "CDC:ErrChangeFeedAlreadyExists",
            format!("changefeed {name} exists already"),
        ));
    }
    let mut request = check_request(&state, &body)?;
    let mut id = ChangefeedId::fresh(&name);
    id.gid = gid.unwrap_or(id.gid);
    let spec = request.spec(id.clone())?;
    let upstream = state.upstreams.open(&spec.upstream_uri)?;
    let report = upstream.check(&spec).await?;
    check_tables(&request.config, &report)?;
    request.warnings.extend(report.warnings.iter().cloned());
    let upstream_id = check_ends(&state, &*upstream, &id, &body.sink_uri, &request.config).await?;
    let at = (body.start_ts.0 != Ts::ZERO).then_some(body.start_ts.0);
    check_target(&body, at)?;
    if at.is_some() && request.config.initial_copy.enabled {
        // The copy holds the rows of another moment: what was committed between the two would be missing.
        return Err(ApiFailure::invalid(
            "start_ts is where changes begin, and the initial copy brings rows as of now; set \
             initial_copy.enabled to false (--no-initial-copy), or leave start_ts out",
        ));
    }
    operations::makes(id.gid);
    let point = upstream.create_retention(&spec, at).await?;
    let mut info = request.info(id.clone());
    info.sink_uri.clone_from(&body.sink_uri);
    info.start_ts = point.start_ts;
    info.target_ts = body.target_ts.0;
    info.upstream_id = upstream_id;
    info.create_time = crate::wiring::rfc3339_now();
    info.creator_version = concat!("v", env!("CARGO_PKG_VERSION")).to_owned();
    let (start, target, scheme) = (info.start_ts, info.target_ts, scheme_of(&info.sink_uri));
    note(&name, format!("start_ts={start} target_ts={target} sink_scheme={scheme}"));
    if let Err(error) = leader(&state)?.create(info).await {
        undo(&*upstream, &id, &error).await;
        return Err(error.into());
    }
    let mut value = shown(&state, &name).await?;
    value["warnings"] = json!(request.warnings);
    Ok(Json(value))
}

/// Removes what coordinators that were replaced may have made upstream for this creation: nobody else knows of it.
async fn clear_away(
    state: &ApiState,
    body: &FeedBody,
    name: &str,
    leftover: &[Gid],
) -> Result<(), ApiFailure> {
    if leftover.is_empty() {
        return Ok(());
    }
    let id = ChangefeedId::fresh(name);
    let spec = check_request(state, body)?.spec(id.clone())?;
    let upstream = state.upstreams.open(&spec.upstream_uri)?;
    for &gid in leftover {
        upstream.drop_retention(&ChangefeedId { gid, ..id.clone() }).await?;
        operations::cleared(gid);
    }
    Ok(())
}

/// Removes what was made upstream for a changefeed that was refused: nobody else knows of this incarnation. If it may
/// have been stored all the same, what it needs stays.
async fn undo(upstream: &dyn Upstream, id: &ChangefeedId, error: &coordinator::Error) {
    let gone = matches!(error, coordinator::Error::Stopped | coordinator::Error::NotOwner);
    let stored = gone || matches!(error, coordinator::Error::Store(error) if error.may_have_applied());
    if stored {
        tracing::warn!(changefeedID = %id, "a creation ended without an answer: if there is no such changefeed, its slot and its publication are left behind");
    } else if let Err(undo) = upstream.drop_retention(id).await {
        tracing::warn!(changefeedID = %id, error = %undo.chain(), "cannot drop what was created upstream for a refused changefeed");
    } else {
        operations::cleared(id.gid);
    }
}

/// State and checkpoint of a changefeed before it is changed, for the record.
async fn note_before(state: &ApiState, name: &str) {
    if let Ok(feed) = find(state, name).await {
        note(name, format!("state={} checkpoint={}", feed.info.state.shown().name(), feed.checkpoint));
    }
}

pub(in crate::http) async fn pause(State(state): State<Shared>, Path(name): Path<String>) -> Answer {
    check_name(&name)?;
    note_before(&state, &name).await;
    leader(&state)?.pause(KEYSPACE, &name).await?;
    Ok(Json(json!({})))
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct ResumeBody {
    overwrite_checkpoint_ts: Option<Overwrite>,
}

/// Where to go on.
#[derive(Clone, Copy, Deserialize)]
#[serde(untagged)]
enum Overwrite {
    Now(Now),
    At(PositionArg),
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Now {
    Now,
}

pub(in crate::http) async fn resume(
    State(state): State<Shared>,
    Path(name): Path<String>,
    body: Bytes,
) -> Answer {
    check_name(&name)?;
    let body: ResumeBody = if body.is_empty() { ResumeBody::default() } else { parse_body(&body)? };
    let mut overwrite = None;
    if let Some(wanted) = body.overwrite_checkpoint_ts {
        let feed = find(&state, &name).await?;
        // Before anything is asked of the upstream.
        if !feed.info.state.is_resumable() {
            return Err(refused("only a stopped, failed or finished changefeed can be resumed"));
        }
        let uri = feed.info.upstream_info.as_ref().map(|upstream| upstream.uri.clone()).unwrap_or_default();
        let now = state.upstreams.current_position(&uri).await?.start_ts;
        let position = match wanted {
            Overwrite::Now(Now::Now) => now,
            Overwrite::At(position) => position.0,
        };
        if position == Ts::ZERO || position > now {
            return Err(ApiFailure::invalid(format!(
                "overwrite_checkpoint_ts must be between 1 and the upstream's position {now}"
            )));
        }
        overwrite = Some(position);
    }
    let told = overwrite.map_or_else(String::new, |position| format!(" checkpoint={position}"));
    note(&name, format!("overwrite={}{told}", overwrite.is_some()));
    leader(&state)?.resume(KEYSPACE, &name, overwrite).await?;
    Ok(Json(json!({})))
}

/// Changes a stopped or failed changefeed (§8.3).
pub(in crate::http) async fn update(
    State(state): State<Shared>,
    Path(name): Path<String>,
    body: Bytes,
) -> Answer {
    change(&state, &name, parse_body(&body)?, false).await
}

/// As an update, but keys of the configuration that are absent keep their values.
pub(in crate::http) async fn patch(
    State(state): State<Shared>,
    Path(name): Path<String>,
    body: Bytes,
) -> Answer {
    change(&state, &name, parse_body(&body)?, true).await
}

fn refused(text: &str) -> ApiFailure {
    ApiFailure::new("CDC:ErrChangefeedUpdateRefused", text)
}

async fn change(state: &ApiState, name: &str, mut body: FeedBody, keeps: bool) -> Answer {
    let changed = [
        ("target", body.target_ts.0 != Ts::ZERO),
        ("sink", !body.sink_uri.is_empty()),
        ("config", body.replica_config.is_some()),
        ("upstream", body.upstream.is_some() || !body.upstream_name.is_empty()),
    ];
    let changed: Vec<&str> = changed.into_iter().filter(|(_, is)| *is).map(|(name, _)| name).collect();
    note(name, format!("changed={}", changed.join(",")));
    let feed = find(state, name).await?;
    if !matches!(feed.info.state, ChangefeedState::Stopped | ChangefeedState::Failed) {
        return Err(refused("a changefeed can be updated only when it is stopped or failed; pause it first"));
    }
    if body.start_ts.0 != Ts::ZERO {
        return Err(ApiFailure::invalid("start_ts cannot be changed"));
    }
    if body.target_ts.0 != Ts::ZERO && body.target_ts.0 <= feed.info.start_ts {
        return Err(refused("target_ts must be larger than start_ts"));
    }
    let mut info = (*feed.info).clone();
    // What is shown of a URI means the one that is stored.
    if body.sink_uri.is_empty() || body.sink_uri == mask_uri(&info.sink_uri) {
        body.sink_uri.clone_from(&info.sink_uri);
    }
    body.replica_config = Some(match body.replica_config.take() {
        None | Some(Value::Null) => info.config.to_api(),
        Some(config) if keeps => merge(info.config.to_api(), config),
        Some(config) => config,
    });
    let stored_uri = info.upstream_info.as_ref().map(|upstream| upstream.uri.clone()).unwrap_or_default();
    let given = body.upstream.as_ref().map_or("", |upstream| upstream.uri.as_str());
    if body.upstream_name.is_empty() && (given.is_empty() || given == mask_uri(&stored_uri)) {
        body.upstream = Some(UpstreamBody { uri: stored_uri });
    }
    let request = check_request(state, &body)?;
    let config = request.config.keep_secrets_of(&info.config);
    if config.filter.publish != info.config.filter.publish {
        return Err(refused(
            "filter.publish cannot be changed: the publication at the source has the row filters and column lists that it \
             was made with; remove the changefeed and create it again",
        ));
    }
    let spec = request.spec(info.id.clone())?;
    let upstream = state.upstreams.open(&spec.upstream_uri)?;
    check_tables(&config, &upstream.check(&spec).await?)?;
    check_ends(state, &*upstream, &info.id, &body.sink_uri, &config).await?;
    info.sink_uri = body.sink_uri;
    info.config = config;
    if body.target_ts.0 != Ts::ZERO {
        info.target_ts = body.target_ts.0;
    }
    if let Some(upstream) = &mut info.upstream_info {
        upstream.uri = request.upstream_uri;
    }
    leader(state)?.update(info).await?;
    Ok(Json(shown(state, name).await?))
}

pub(in crate::http) async fn remove(State(state): State<Shared>, Path(name): Path<String>) -> Answer {
    check_name(&name)?;
    note_before(&state, &name).await;
    match leader(&state)?.remove(KEYSPACE, &name).await {
        Ok(_) => Ok(Json(json!({}))),
        Err(error) if error.code() == codes::CHANGEFEED_NOT_EXISTS => Ok(Json(json!({}))),
        Err(error) => Err(error.into()),
    }
}
