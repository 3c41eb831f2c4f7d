//! The routes of `node/src/http.rs` against the paths of `docs/openapi.yaml`.
//!
//! Both files are read as text, in the form in which they are written: a router per `let`, and two spaces per level.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result};

/// Where the routes are.
const ROUTES: &str = "node/src/http.rs";
/// Where they are described.
const PAGE: &str = "docs/openapi.yaml";
/// Methods of a route, as axum and OpenAPI call them.
const METHODS: [&str; 5] = ["get", "post", "put", "delete", "patch"];

/// Routes that are not described, descriptions of nothing, and references to nothing.
pub(crate) fn violations(root: &Path) -> Result<Vec<String>> {
    let read =
        |name: &str| std::fs::read_to_string(root.join(name)).with_context(|| format!("cannot read {name}"));
    let (routes, page) = (routes(&read(ROUTES)?), read(PAGE)?);
    let described = described(&page);
    let mut found = Vec::new();
    if routes.is_empty() {
        found.push(format!("{ROUTES}: no route was found; does xtask/src/openapi.rs know its form?"));
    }
    found.extend(
        routes.difference(&described).map(|(path, method)| format!("{PAGE}: {method} {path} is missing")),
    );
    found.extend(
        described
            .difference(&routes)
            .map(|(path, method)| format!("{PAGE}: {method} {path} is no route of {ROUTES}")),
    );
    found.extend(dangling(&page).into_iter().map(|name| format!("{PAGE}: nothing is called {name}")));
    Ok(found)
}

/// A router: its own routes, and other routers under a prefix.
#[derive(Default)]
struct Router {
    routes: Vec<(String, Vec<&'static str>)>,
    nested: Vec<(String, String)>,
}

/// Every path and method that the outermost router serves.
fn routes(source: &str) -> BTreeSet<(String, String)> {
    let mut routers: BTreeMap<String, Router> = BTreeMap::new();
    let mut pieces = source.split("Router::new()");
    let mut before = pieces.next().unwrap_or_default();
    for piece in pieces {
        let name = name_of(before);
        // A router ends with its statement or, the last one, with its function.
        let own = piece.split(';').next().unwrap_or_default();
        routers.insert(name, read_router(own));
        before = piece;
    }
    let mut all = BTreeSet::new();
    collect(&routers, "", "", &mut all);
    all
}

/// `let v2 = ` is `v2`; the outermost router is an expression without a name.
fn name_of(before: &str) -> String {
    let line = before.rsplit(['\n', ';', '{']).next().unwrap_or_default().trim();
    line.strip_prefix("let ").and_then(|rest| rest.strip_suffix('=')).map_or("", str::trim).to_owned()
}

fn read_router(text: &str) -> Router {
    let mut router = Router::default();
    let calls = text.replace(".route(", "\nroute(").replace(".nest(", "\nnest(");
    for call in calls.lines().map(str::trim) {
        let quoted = || call.split('"').nth(1).map(str::to_owned);
        if let Some(handlers) = call.strip_prefix("route(") {
            let methods: Vec<&str> = METHODS
                .into_iter()
                .filter(|method| {
                    [format!(", {method}("), format!(").{method}(")]
                        .iter()
                        .any(|form| handlers.contains(form.as_str()))
                })
                .collect();
            // What answers every method is described as what it is for.
            let methods = if methods.is_empty() { vec!["get"] } else { methods };
            router.routes.extend(quoted().map(|path| (path, methods)));
        } else if call.starts_with("nest(") {
            let inner = call.rsplit(',').next().unwrap_or_default().trim().trim_end_matches(')').to_owned();
            router.nested.extend(quoted().map(|prefix| (prefix, inner)));
        }
    }
    router
}

fn collect(
    routers: &BTreeMap<String, Router>,
    name: &str,
    prefix: &str,
    all: &mut BTreeSet<(String, String)>,
) {
    let Some(router) = routers.get(name) else { return };
    for (path, methods) in &router.routes {
        let whole = format!("{prefix}{path}");
        let whole = if prefix.is_empty() { whole.as_str() } else { whole.trim_end_matches('/') };
        all.extend(methods.iter().map(|method| (whole.to_owned(), (*method).to_owned())));
    }
    for (inner_prefix, inner) in router.nested.iter().filter(|(_, inner)| inner != name) {
        collect(routers, inner, &format!("{prefix}{inner_prefix}"), all);
    }
}

/// Every path and method under `paths:`.
fn described(page: &str) -> BTreeSet<(String, String)> {
    let mut all = BTreeSet::new();
    let mut path = "";
    let lines = page.lines().skip_while(|line| *line != "paths:").skip(1);
    for line in lines.take_while(|line| line.is_empty() || line.starts_with(' ')) {
        let Some(key) = line.trim_end().strip_suffix(':') else { continue };
        if let Some(name) = key.strip_prefix("  /") {
            path = &key[key.len() - name.len() - 1..];
        } else if let Some(method) = key.strip_prefix("    ").filter(|key| METHODS.contains(key)) {
            all.insert((path.to_owned(), method.to_owned()));
        }
    }
    all
}

/// Names in `$ref`s that are not defined.
fn dangling(page: &str) -> BTreeSet<String> {
    let components = page.split_once("\ncomponents:").map_or("", |(_, rest)| rest);
    let mut kind = "";
    let mut known = BTreeSet::new();
    for key in components.lines().filter_map(|line| line.strip_suffix(':')) {
        if let Some(name) = key.strip_prefix("    ").filter(|name| !name.starts_with(' ')) {
            known.insert(format!("#/components/{kind}/{name}"));
        } else if let Some(name) = key.strip_prefix("  ").filter(|name| !name.starts_with(' ')) {
            kind = name;
        }
    }
    page.split("$ref: ")
        .skip(1)
        .filter_map(|rest| rest.split(['"', '\'']).nth(1))
        .filter(|name| !known.contains(*name))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = r#"
pub(crate) fn router(state: ApiState) -> Router {
    let feeds = Router::new()
        .route("/", get(changefeed::list).post(changefeed::create))
        .route("/{id}/pause", post(changefeed::pause));
    let v2 = Router::new().route("/log", post(server::set_log_level)).nest("/changefeeds", feeds);
    Router::new()
        .route("/", get(server::index))
        .route("/metrics", any(server::metrics))
        .nest("/api/v2", v2)
        .with_state(Arc::new(state))
}
"#;

    fn text(routes: &BTreeSet<(String, String)>) -> Vec<String> {
        routes.iter().map(|(path, method)| format!("{method} {path}")).collect()
    }

    #[test]
    fn routes_are_found_under_their_prefixes_with_their_methods() {
        let expected = [
            "get /",
            "get /api/v2/changefeeds",
            "post /api/v2/changefeeds",
            "post /api/v2/changefeeds/{id}/pause",
            "post /api/v2/log",
            "get /metrics",
        ];
        assert_eq!(text(&routes(SOURCE)), expected);
    }

    #[test]
    fn paths_and_references_of_a_page_are_found() {
        let page = "openapi: 3.0.3\npaths:\n  /a/{id}:\n    get:\n      summary: x\n    put:\n      x: {$ref: \"#/components/schemas/B\"}\n\ncomponents:\n  schemas:\n    A:\n      type: object\n";
        assert_eq!(text(&described(page)), ["get /a/{id}", "put /a/{id}"]);
        assert_eq!(dangling(page).into_iter().collect::<Vec<_>>(), ["#/components/schemas/B"]);
        assert!(dangling(&page.replace("    A:", "    B:")).is_empty());
    }
}
