//! Secrets and values of rows, looked for in everything that a node tells (metrics §5.3).

use std::collections::BTreeMap;
use std::net::SocketAddr;

use base64::Engine as _;
use node::Node;
use node::config::{ServerConfig, UpstreamSection};
use serde_json::{Value, json};
use testkit::PgServer;

use crate::common::{ask, eventually, send, shown, tell};

/// In URIs and in the configuration of a changefeed.
const SECRET: &str = "s3cr3t-canary";
/// In a row that the target refuses.
const ROW: &str = "r0w-canary";

/// Everything that was told, and by what.
#[derive(Default)]
struct Told(Vec<(String, String)>);

impl Told {
    async fn ask(&mut self, address: SocketAddr, request: &str, body: &str) {
        let login = base64::engine::general_purpose::STANDARD.encode(format!("ann:{SECRET}"));
        let headers = format!("Authorization: Basic {login}\r\nContent-Type: application/json\r\n");
        // A node that lets another lead may close the connection.
        let (status, text) = send(address, request, &headers, body).await.unwrap_or_default();
        self.0.push((format!("{request} {status}"), text));
    }

    fn keeps_its_secrets(&self) {
        let encoded = base64::engine::general_purpose::STANDARD.encode(format!("ann:{SECRET}"));
        for (what, text) in &self.0 {
            for secret in [SECRET, ROW, &encoded] {
                let found = text.find(secret).map(|at| {
                    let from = text[..at].char_indices().rev().nth(200).map_or(0, |(at, _)| at);
                    &text[from..(at + secret.len())]
                });
                assert_eq!(found, None, "{what} shows {secret}");
            }
        }
    }
}

/// A database with a role whose password is looked for, and a table.
async fn database(name: &str, table: &str) -> (PgServer, String) {
    let server = PgServer::start().await.unwrap();
    server.sql("postgres", &format!("CREATE ROLE canary SUPERUSER LOGIN PASSWORD '{SECRET}'")).await.unwrap();
    // The servers are copies of one template, so that only the name tells them apart.
    server.sql("postgres", &format!("CREATE DATABASE {name}")).await.unwrap();
    server.sql(name, table).await.unwrap();
    let uri = server.uri_as("canary", SECRET, name);
    (server, uri)
}

/// Every request that the description of the API has: those that only look come first, and what ends something last.
fn requests(document: &Value, node: &str) -> Vec<String> {
    let mut all: BTreeMap<(usize, String), ()> = BTreeMap::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys().filter(|key| *key != "parameters") {
            let method = method.to_uppercase();
            let last = path.ends_with("resign") || (method == "DELETE" && path.ends_with("{id}"));
            let rank = if last { 2 } else { usize::from(method != "GET") };
            let path = path.replace("{id}", "f").replace("{node}", node).replace("{profile}", "goroutine");
            all.insert((rank, format!("{method} {path}?seconds=1&sasl-password={SECRET}")), ());
        }
    }
    all.into_keys().map(|(_, request)| request).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
// behaviour: api-M-10
async fn no_answer_no_log_line_and_no_metric_has_a_secret_or_the_value_of_a_row() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("server.log");
    let (source, upstream) = database("d", "CREATE TABLE t (id int PRIMARY KEY, v text)").await;
    let check = format!("CREATE TABLE t (id int PRIMARY KEY, v text CHECK (v <> '{ROW}'))");
    let (_target, sink) = database("e", &check).await;
    let named = UpstreamSection {
        uri: upstream.clone(),
        options: [("sslmode".to_owned(), "prefer".to_owned())].into(),
        ..UpstreamSection::default()
    };
    let config = ServerConfig {
        addr: "127.0.0.1:0".to_owned(),
        data_dir: dir.path().join("data"),
        log_file: log.display().to_string(),
        log_level: "debug".to_owned(),
        upstreams: [("shop".to_owned(), named)].into(),
        ..ServerConfig::default()
    };
    node::telemetry::init_logging(&config).unwrap();
    let node = Node::start(config).await.unwrap();
    let address = node.address();
    eventually("it leads", async || ask(address, "GET", "/api/v2/health").await.0 == 200).await;
    let hidden = json!({
        "consistent": { "storage": format!("s3://b/p?secret-access-key={SECRET}") },
        "sink": { "schema_registry": format!("http://u:{SECRET}@h/") },
    });
    let body = json!({
        "changefeed_id": "f", "upstream_name": "shop", "sink_uri": sink, "replica_config": hidden,
    });
    let (status, made) = tell(address, "POST", "/api/v2/changefeeds", &body).await;
    assert_eq!(status, 200, "{made}");
    source.sql("d", &format!("INSERT INTO t VALUES (1, '{ROW}')")).await.unwrap();
    eventually("the target refuses the row", async || {
        let feed = shown(address, "/api/v2/changefeeds/f").await;
        feed["error"]["code"].is_string()
    })
    .await;

    let mut told = Told::default();
    let document = shown(address, "/api/v2/openapi.json").await;
    let own = shown(address, "/api/v2/status").await["id"].as_str().unwrap().to_owned();
    let wrong = json!({
        "changefeed_id": "g", "sink_uri": format!("gopher://u:{SECRET}@h"), "start_ts": 1,
        "upstream": { "uri": format!("postgres://u:{SECRET}@127.0.0.1:1/d") },
        "capture_id": "none", "table_id": 1, "log_level": "debug", "redact_info_log": "on",
        "replica_config": { "sink": { "kafka_config": { "sasl_password": SECRET } }, "filter": { "rules": [SECRET, 1] } },
    });
    let mut wrong_uri = wrong.clone();
    wrong_uri["replica_config"] = hidden;
    wrong_uri["upstream"] = json!({ "uri": format!("postgres://u:{SECRET}/x@h:port/d") });
    let torn = format!("{{\"sink_uri\":\"postgres://u:{SECRET}@h\",");
    let bodies = ["{}".to_owned(), wrong.to_string(), wrong_uri.to_string(), torn, format!("\"{SECRET}\"")];
    let all = requests(&document, &own);
    assert!(all.len() > 60, "{}", all.len());
    for request in &all {
        let bodies = if request.starts_with("GET ") { &bodies[..1] } else { &bodies[..] };
        for body in bodies {
            told.ask(address, request, body).await;
        }
    }
    eventually("somebody leads again", async || ask(address, "GET", "/api/v2/health").await.0 == 200).await;
    for path in
        ["/metrics", "/config", "/debug/info?format=json", "/debug/pprof/goroutine", "/api/v2/operations"]
    {
        told.ask(address, &format!("GET {path}"), "").await;
    }
    told.ask(address, "GET /api/v2/unsafe/metadata", "").await;
    // What would be found if it were shown.
    let (_, raw) = ask(address, "GET", "/api/v2/unsafe/metadata?raw=true").await;
    assert!(raw.contains("/operation/"), "{raw}");
    node.stop().await.unwrap();
    let written = std::fs::read_to_string(&log).unwrap();
    assert!(
        written.contains("changefeedID") && written.contains("sasl-password=xxxxx"),
        "requests are logged"
    );
    told.0.push(("the log".to_owned(), written));
    told.keeps_its_secrets();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_stored_has_its_secrets_only_for_who_asks_for_them() {
    let dir = tempfile::tempdir().unwrap();
    let config = ServerConfig {
        addr: "127.0.0.1:0".to_owned(),
        data_dir: dir.path().join("data"),
        ..ServerConfig::default()
    };
    let node = Node::start(config).await.unwrap();
    let address = node.address();
    eventually("it leads", async || ask(address, "GET", "/api/v2/health").await.0 == 200).await;
    let body = json!({
        "changefeed_id": "f", "upstream": { "uri": "generator://bank?rate=1" },
        "sink_uri": format!("blackhole://u:{SECRET}@h/"),
    });
    assert_eq!(tell(address, "POST", "/api/v2/changefeeds", &body).await.0, 200);
    let metadata =
        async |query: &str| ask(address, "GET", &format!("/api/v2/unsafe/metadata{query}")).await.1;
    assert!(metadata("?raw=true").await.contains(SECRET));
    assert!(!metadata("").await.contains(SECRET));
    node.stop().await.unwrap();
}
