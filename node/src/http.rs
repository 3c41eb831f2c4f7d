//! The HTTP API: routes and the state behind them (api-cli-config §1–8, the part that one node serves).

mod access;
mod auth;
mod capture;
mod changefeed;
mod debug;
mod error;
mod facts;
mod forward;
mod models;
mod openapi;
mod operate;
mod operations;
mod page;
pub mod password;
mod resync;
mod server;
mod status;
mod store;
mod table;
#[cfg(test)]
mod tests;
mod v1;
mod verify;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::routing::{any, delete, get, patch, post, put};
use coordinator::backend::Store;
use coordinator::{CoordinatorHandle, Layout};
use serde_json::{Value, json};

use crate::config::UpstreamSection;
use crate::upstream::UpstreamHub;

pub(crate) use access::Access;
pub(crate) use changefeed::KEYSPACE;
pub(crate) use debug::dump_on_signal;
pub(crate) use debug::tasks::Tasks;
pub(crate) use error::ApiFailure;
pub(crate) use models::time_text;

/// Largest request body: a changefeed configuration is a few KiB.
const MAX_BODY_BYTES: usize = 2 << 20;

/// What the handlers need.
pub(crate) struct ApiState {
    pub(crate) node: heartbeatpb::NodeId,
    pub(crate) members: tokio::sync::watch::Receiver<coordinator::Members>,
    /// The node that leads, as far as this one knows.
    pub(crate) leading: tokio::sync::watch::Receiver<Option<heartbeatpb::NodeId>>,
    pub(crate) cluster_id: String,
    /// The configuration in effect.
    pub(crate) config: Value,
    pub(crate) data_dir: std::path::PathBuf,
    pub(crate) started: Instant,
    pub(crate) leader: tokio::sync::watch::Receiver<Option<CoordinatorHandle>>,
    pub(crate) upstreams: Arc<UpstreamHub>,
    pub(crate) verifications: crate::verification::Verifications,
    pub(crate) placements: maintainer::PlacementHandle,
    pub(crate) metrics: crate::telemetry::MetricsHandle,
    pub(crate) liveness: Arc<maintainer::LivenessCell>,
    pub(crate) access: Access,
    /// Certificates, when nodes talk over TLS.
    pub(crate) tls: Option<Arc<crate::tls::Tls>>,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) layout: Layout,
    /// Upstreams of the configuration.
    pub(crate) named: BTreeMap<String, UpstreamSection>,
    pub(crate) tasks: Arc<Tasks>,
    /// For what one person at a time may look at.
    pub(crate) looking: tokio::sync::Semaphore,
    /// Members that this node does not reach.
    pub(crate) unreached: tokio::sync::watch::Receiver<std::collections::BTreeSet<heartbeatpb::NodeId>>,
    /// Whether this node may write now.
    pub(crate) lease: Arc<crate::wiring::Lease>,
}

impl ApiState {
    /// The coordinator, if this node leads.
    fn leader(&self) -> Option<CoordinatorHandle> {
        self.leader.borrow().clone()
    }

    /// The URI of an upstream of this node's configuration.
    fn named_upstream(&self, name: &str) -> Result<String, ApiFailure> {
        self.named.get(name).map(UpstreamSection::full_uri).ok_or_else(|| {
            let known: Vec<&str> = self.named.keys().map(String::as_str).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            let name: String = name.chars().take(64).collect();
            ApiFailure::invalid(format!(
                "the configuration of this server has no upstream {name:?} in [upstreams]; it has {known}"
            ))
        })
    }

    /// Whether the coordinator of this node knows its changefeeds and its nodes.
    async fn is_initialised(&self) -> bool {
        match self.leader() {
            Some(leader) => leader.list(None).await.is_ok(),
            None => false,
        }
    }
}

pub(crate) type Shared = Arc<ApiState>;

/// The coordinator, or why there is none to ask. Within an operation the one under which it was begun.
fn leader(state: &ApiState) -> Result<CoordinatorHandle, ApiFailure> {
    operations::leader().or_else(|| state.leader()).ok_or_else(|| {
        ApiFailure::new(
            "CDC:ErrOwnerNotFound",
            "this node does not coordinate any more; ask again in a moment",
        )
    })
}

/// The routes.
pub(crate) fn router(state: Shared) -> Router {
    let feeds = Router::new()
        .route("/", get(changefeed::list).post(changefeed::create))
        .route("/{id}", get(changefeed::get).put(changefeed::update))
        .route("/{id}", patch(changefeed::patch).delete(changefeed::remove))
        .route("/{id}/pause", post(changefeed::pause))
        .route("/{id}/resume", post(changefeed::resume))
        .route("/{id}/status", get(status::status))
        .route("/{id}/synced", get(changefeed::synced))
        .route("/{id}/progress", get(changefeed::progress))
        .route("/{id}/verify", post(verify::begin).get(verify::get).delete(verify::cancel))
        .route("/{id}/move_table", post(table::move_table))
        .route("/{id}/move_split_table", post(table::move_split_table))
        .route("/{id}/split_table_by_region_count", post(table::split_table))
        .route("/{id}/merge_table", post(table::merge_table))
        .route("/{id}/resyncs", get(resync::list))
        .route("/{id}/resync_table", post(resync::ask))
        .route("/{id}/pause_resync", post(resync::pause))
        .route("/{id}/resume_resync", post(resync::resume))
        .route("/{id}/cancel_resync", post(resync::cancel))
        .route("/{id}/get_dispatcher_count", get(table::dispatcher_count))
        .route("/{id}/tables", get(table::tables));
    let v2 = Router::new()
        .route("/status", get(server::status))
        .route("/health", get(server::health))
        .route("/log", post(server::set_log_level))
        .route("/log/redact", post(server::set_redaction))
        .route("/tso", post(server::tso))
        .route("/openapi.json", get(openapi::document))
        .route("/internal/facts", post(facts::answer))
        .route("/operations", get(operations::list))
        .route("/operations/{id}", get(operations::get))
        .route("/unsafe/metadata", get(store::metadata))
        .route("/unsafe/resolve_lock", post(store::no_locks))
        .route("/unsafe/service_gc_safepoint", delete(store::no_safepoint))
        .route("/captures", get(capture::list))
        .route("/captures/{node}/drain", get(capture::progress).put(capture::drain).delete(capture::cancel))
        .route("/owner/resign", post(capture::resign))
        .route("/processors", get(server::no_processors))
        .route("/processors/{id}/{node}", get(server::no_tables))
        .route("/verify_table", post(changefeed::verify_table))
        .route("/get_all_tables", post(changefeed::all_tables))
        .nest("/changefeeds", feeds);
    let v1_feeds = Router::new()
        .route("/", get(v1::list).post(v1::create))
        .route("/{id}", get(changefeed::get).put(v1::update).delete(v1::remove))
        .route("/{id}/pause", post(v1::pause))
        .route("/{id}/resume", post(v1::resume))
        .route("/{id}/tables/rebalance_table", post(v1::rebalance))
        .route("/{id}/tables/move_table", post(table::move_table_v1));
    let v1 = Router::new()
        .route("/status", get(server::status))
        .route("/health", get(server::health))
        .route("/log", post(server::set_log_level))
        .route("/processors", get(v1::no_processors))
        .route("/processors/{id}/{node}", get(server::no_tables))
        .nest("/changefeeds", v1_feeds)
        .route("/captures", get(capture::list_v1))
        .route("/captures/drain", put(capture::drain_v1))
        .route("/owner/resign", post(capture::resign_v1));
    Router::new()
        .route("/", get(page::page))
        .route("/status", get(server::status))
        .route("/livez", get(server::livez))
        .route("/readyz", get(server::readyz))
        .route("/metrics", any(server::metrics))
        .route("/config", get(debug::config))
        .route("/debug/info", get(debug::info))
        .route("/debug/log", get(debug::log_filter))
        .route("/debug/runtime", get(debug::process::runtime))
        .route("/debug/threads", get(debug::process::threads))
        .route("/debug/pprof/", get(debug::process::index))
        .route("/debug/pprof/{profile}", get(debug::process::profile))
        .nest("/api/v1", v1)
        .nest("/api/v2", v2)
        .fallback(server::not_found)
        .method_not_allowed_fallback(server::wrong_method)
        .layer(axum::extract::DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(axum::middleware::map_response(error::in_json))
        .layer(axum::middleware::from_fn_with_state(Arc::clone(&state), access::pass))
        .with_state(state)
}

/// Parses a JSON object, or says what is wrong with it without quoting it: bodies hold credentials.
pub(crate) fn parse_body<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiFailure> {
    let body: Value = serde_json::from_slice(bytes).map_err(|e| {
        let kind = match e.classify() {
            serde_json::error::Category::Syntax | serde_json::error::Category::Data => "is not JSON",
            serde_json::error::Category::Eof => "ends too early",
            serde_json::error::Category::Io => "cannot be read",
        };
        ApiFailure::invalid(format!("the request body {kind} (line {}, column {})", e.line(), e.column()))
    })?;
    let Value::Object(fields) = &body else {
        return Err(ApiFailure::invalid("the request body is not a JSON object"));
    };
    T::deserialize(&body).map_err(|_| {
        // Every field may be left out, so the one that is wrong is wrong alone too.
        let wrong = fields.iter().find(|(name, value)| T::deserialize(json!({ *name: value })).is_err());
        let what = wrong.map_or_else(|| "a field".to_owned(), |(name, _)| format!("the field {name:?}"));
        ApiFailure::invalid(format!("{what} of the request body is of a wrong type"))
    })
}
