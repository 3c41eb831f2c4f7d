//! Endpoints that compare both ends of a changefeed.

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State};
use serde::Deserialize;
use serde_json::{Value, json};

use super::changefeed::find;
use super::models::time_text;
use super::{ApiFailure, Shared, parse_body};
use crate::verification::{Comparison, Wish};

type Answer = Result<Json<Value>, ApiFailure>;

/// What is to be compared, and how fast.
#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
struct VerifyBody {
    tables: Vec<String>,
    rows_per_second: Option<u32>,
    part_rows: Option<u32>,
}

impl VerifyBody {
    fn wish(self) -> Result<Wish, ApiFailure> {
        if self.rows_per_second == Some(0) {
            return Err(ApiFailure::invalid("rows_per_second is at least 1; leave it out for no limit"));
        }
        if self.part_rows.is_some_and(|rows| !(1..=1_000_000).contains(&rows)) {
            return Err(ApiFailure::invalid("part_rows is between 1 and 1000000"));
        }
        Ok(Wish { tables: self.tables, rows_per_second: self.rows_per_second, part_rows: self.part_rows })
    }
}

fn shown(state: &Comparison) -> Answer {
    Ok(Json(json!({
        "report": state.report, "error": state.error,
        "began": time_text(Some(state.began)), "ended": time_text(state.ended),
    })))
}

/// Begins a comparison; one that runs already is answered with.
pub(super) async fn begin(State(state): State<Shared>, Path(name): Path<String>, body: Bytes) -> Answer {
    let wish = if body.is_empty() { Wish::default() } else { parse_body::<VerifyBody>(&body)?.wish()? };
    let feed = find(&state, &name).await?;
    shown(&*state.verifications.begin(&feed, wish, &state.upstreams, state.leader.clone()).await?)
}

/// How far it is, or what came of it.
pub(super) async fn get(State(state): State<Shared>, Path(name): Path<String>) -> Answer {
    let feed = find(&state, &name).await?;
    let none = || {
        ApiFailure::invalid(
            "nobody has compared both ends of this changefeed since this node leads; POST begins",
        )
    };
    shown(&*state.verifications.state(feed.info.id.gid).ok_or_else(none)?)
}

/// Ends it.
pub(super) async fn cancel(State(state): State<Shared>, Path(name): Path<String>) -> Answer {
    let feed = find(&state, &name).await?;
    let was = state.verifications.cancel(feed.info.id.gid);
    Ok(Json(json!({ "cancelled": was })))
}
