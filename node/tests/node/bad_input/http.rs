//! Requests: every endpoint, with what it cannot accept.

use std::net::SocketAddr;

use serde_json::{Value, json};
use testkit::PgServer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{Complaints, SECRET};
use crate::common::{eventually, start, state};

/// An answer: its status, and its body if that is JSON.
struct Answer {
    status: u16,
    text: String,
    body: Value,
}

/// Sends any bytes as a request.
async fn send(address: SocketAddr, head: &str, body: &[u8]) -> Answer {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request =
        format!("{head}\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all(request.as_bytes()).await.unwrap();
    // The server may refuse before it has read everything.
    let _ = stream.write_all(body).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    let text = String::from_utf8(answer).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_default();
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or_default();
    Answer { status, body: serde_json::from_str(body).unwrap_or(Value::Null), text: text.clone() }
}

impl Complaints {
    /// A refusal: status, code, and an error body with words in it.
    async fn refused(
        &mut self,
        address: SocketAddr,
        request: &str,
        body: &str,
        (status, code): (u16, &str),
        words: &[&str],
    ) {
        let answer = send(address, &format!("{request} HTTP/1.1"), body.as_bytes()).await;
        let start: String = body.chars().take(200).collect();
        let case = format!("{request} {start}: {} {}", answer.status, answer.body);
        self.unless(answer.status == status && answer.body["error_code"] == code, || {
            format!("not {status} {code}: {case}")
        });
        let message = answer.body["error_msg"].as_str().unwrap_or_default();
        for word in words {
            self.unless(message.contains(word), || format!("{word:?} is missing: {case}"));
        }
        self.unless(!answer.text.contains(SECRET), || format!("has a secret: {case}"));
    }
}

const PARAM: &str = "CDC:ErrAPIInvalidParam";
const EXISTS: &str = "CDC:ErrChangeFeedNotExists";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_cannot_be_understood_are_refused_by_every_endpoint() {
    let mut complaints = Complaints::default();
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    let address = node.address();
    let feeds = "/api/v2/changefeeds";
    for path in ["", "/f", "/f/resume"] {
        let method = if path == "/f" { "PUT" } else { "POST" };
        let request = format!("{method} {feeds}{path}");
        // An unknown changefeed is told before its body is looked at, or after: both are right.
        for (body, words) in [
            ("{", "ends too early"),
            ("nonsense", "is not JSON"),
            ("[1]", "object"),
            ("{} {}", "is not JSON"),
        ] {
            complaints.refused(address, &request, body, (400, PARAM), &[words]).await;
        }
    }
    for (path, body) in [
        ("", json!({ "changefeed_id": 7 })),
        ("", json!({ "sink_uri": ["a"] })),
        ("", json!({ "start_ts": -1 })),
        ("", json!({ "start_ts": "soon" })),
        ("", json!({ "start_ts": 1.5 })),
        ("", json!({ "target_ts": "pg:1" })),
        ("", json!({ "upstream": SECRET })),
        ("/f", json!({ "upstream": { "uri": 7 } })),
        ("/f/resume", json!({ "overwrite_checkpoint_ts": "now and then" })),
        ("/f/resume", json!({ "overwrite_checkpoint_ts": {} })),
    ] {
        let method = if path == "/f" { "PUT" } else { "POST" };
        complaints
            .refused(
                address,
                &format!("{method} {feeds}{path}"),
                &body.to_string(),
                (400, PARAM),
                &["of a wrong type"],
            )
            .await;
    }
    for path in ["verify_table", "get_all_tables", "tso", "log"] {
        complaints
            .refused(address, &format!("POST /api/v2/{path}"), "[", (400, PARAM), &["ends too early"])
            .await;
        complaints.refused(address, &format!("POST /api/v2/{path}"), "", (400, PARAM), &["body"]).await;
    }
    complaints.refused(address, "POST /api/v2/tso", "{}", (400, PARAM), &["upstream"]).await;
    complaints
        .refused(
            address,
            "POST /api/v2/tso",
            r#"{"upstream":{"uri":"ftp://u:s3cr3t-canary@h"}}"#,
            (400, "CDC:ErrUpstreamURIInvalid"),
            &["postgres"],
        )
        .await;
    complaints
        .refused(address, "POST /api/v2/log", r#"{"log_level":"a=b=c"}"#, (400, PARAM), &["a=b=c", "info"])
        .await;
    complaints
        .refused(address, "POST /api/v2/log", r#"{"log_level":7}"#, (400, PARAM), &["of a wrong type"])
        .await;
    for bad in ["a%20b", "a_b", "-a", "a--b", "%00", "..%2f", "%FF", &"a".repeat(129)] {
        for (method, rest) in [
            ("GET", ""),
            ("PUT", ""),
            ("DELETE", ""),
            ("POST", "/pause"),
            ("POST", "/resume"),
            ("GET", "/status"),
            ("GET", "/synced"),
            ("GET", "/progress"),
        ] {
            complaints
                .refused(address, &format!("{method} {feeds}/{bad}{rest}"), "{}", (400, PARAM), &[])
                .await;
        }
    }
    for (method, rest) in [
        ("GET", ""),
        ("PUT", ""),
        ("POST", "/pause"),
        ("POST", "/resume"),
        ("GET", "/status"),
        ("GET", "/synced"),
        ("GET", "/progress"),
    ] {
        complaints
            .refused(
                address,
                &format!("{method} {feeds}/none{rest}"),
                "{}",
                (400, EXISTS),
                &["none", "does not exist"],
            )
            .await;
    }
    assert_eq!(
        send(address, &format!("DELETE {feeds}/none HTTP/1.1"), b"").await.status,
        200,
        "a repeated removal"
    );
    for query in ["state=odd", "state=", "keyspace=other"] {
        let answer = send(address, &format!("GET {feeds}?{query} HTTP/1.1"), b"").await;
        assert_eq!(answer.status, if query == "state=odd" { 400 } else { 200 }, "{query}: {}", answer.text);
    }
    complaints
        .refused(address, &format!("GET {feeds}?state=all&state=normal"), "", (400, PARAM), &["state"])
        .await;
    complaints.refused(address, &format!("GET {feeds}?state=%FF"), "", (400, PARAM), &[]).await;
    for (request, path) in [
        ("PATCH", "/api/v2/changefeeds"),
        ("DELETE", "/api/v2/changefeeds"),
        ("GET", "/api/v2/changefeeds/f/pause"),
        ("PUT", "/api/v2/changefeeds/f/resume"),
        ("POST", "/api/v2/changefeeds/f/status"),
        ("POST", "/api/v2/status"),
        ("DELETE", "/api/v2/health"),
        ("GET", "/api/v2/log"),
        ("GET", "/api/v2/tso"),
        ("POST", "/api/v2/captures"),
        ("POST", "/api/v2/captures/n/drain"),
        ("GET", "/api/v2/owner/resign"),
        ("POST", "/api/v1/captures/drain"),
        ("PUT", "/api/v1/captures"),
        ("POST", "/livez"),
        ("POST", "/readyz"),
        ("GET", "/api/v2/verify_table"),
        ("PUT", "/api/v2/processors"),
    ] {
        complaints.refused(address, &format!("{request} {path}"), "", (405, PARAM), &[path, request]).await;
    }
    for path in [
        "/nowhere",
        "/api/v2/nowhere",
        "/api/v2/changefeeds/f/nowhere",
        "/api/v3/changefeeds",
        "/api/v2/changefeeds/f/status/x",
    ] {
        complaints.refused(address, &format!("GET {path}"), "", (404, "CDC:ErrAPINotFound"), &[path]).await;
    }
    for (method, path) in [
        ("POST", "move_table"),
        ("POST", "move_split_table"),
        ("POST", "split_table_by_region_count"),
        ("POST", "merge_table"),
        ("GET", "get_dispatcher_count"),
        ("GET", "tables"),
    ] {
        let none = format!("{method} {feeds}/none/{path}?tableID=1&targetNodeID=n");
        complaints.refused(address, &none, "", (400, EXISTS), &["none", "does not exist"]).await;
        complaints
            .refused(
                address,
                &format!("{method} {feeds}/a_b/{path}?tableID=1&targetNodeID=n"),
                "",
                (400, PARAM),
                &["letters"],
            )
            .await;
        let twice = format!("{method} {feeds}/none/{path}?tableID=1&tableID=2");
        complaints.refused(address, &twice, "", (400, PARAM), &["tableID"]).await;
        let wrong = if method == "GET" { "POST" } else { "GET" };
        complaints.refused(address, &format!("{wrong} {feeds}/none/{path}"), "", (405, PARAM), &[path]).await;
    }
    for path in ["move_table", "move_split_table", "split_table_by_region_count", "merge_table"] {
        for bad in ["", "tableID=", "tableID=one", "tableID=1.5", "tableID=99999999999999999999"] {
            complaints
                .refused(address, &format!("POST {feeds}/none/{path}?{bad}"), "", (400, PARAM), &["tableID"])
                .await;
        }
    }
    for path in ["move_table", "move_split_table"] {
        for bad in ["", "&targetNodeID=", "&targetNodeID=a%20b", "&targetNodeID=%00"] {
            let request = format!("POST {feeds}/none/{path}?tableID=1{bad}");
            complaints.refused(address, &request, "", (400, PARAM), &["targetNodeID"]).await;
        }
        let request = format!("POST {feeds}/none/{path}?tableID=1&targetNodeID=n&wait=maybe");
        complaints.refused(address, &request, "", (400, PARAM), &["wait"]).await;
    }
    let old = "/api/v1/changefeeds";
    for (request, body, words) in [
        (format!("POST {old}"), "{", "ends too early"),
        (format!("POST {old}"), r#"{"filter_rules":"a.b"}"#, "filter_rules"),
        (format!("POST {old}"), r#"{"sink_config":[]}"#, "sink_config"),
        (format!("POST {old}"), r#"{"mounter_worker_num":-1}"#, "mounter_worker_num"),
        (format!("POST {old}"), r#"{"changefeed_id":7}"#, "changefeed_id"),
        (format!("PUT {old}/none"), "[1]", "object"),
        (format!("POST {old}/none/resume"), "[1]", "object"),
        (format!("POST {old}/none/tables/move_table"), "{}", "table_id"),
        (format!("POST {old}/none/tables/move_table"), r#"{"table_id":1,"capture_id":"a b"}"#, "capture id"),
        (format!("POST {old}/a_b/tables/rebalance_table"), "", "letters"),
    ] {
        complaints.refused(address, &request, body, (400, PARAM), &[words]).await;
    }
    for request in ["GET /none", "PUT /none", "POST /none/pause", "POST /none/resume"] {
        let (method, path) = request.split_once(' ').unwrap();
        complaints.refused(address, &format!("{method} {old}{path}"), "{}", (400, EXISTS), &["none"]).await;
    }
    let drain = "/api/v2/captures";
    for method in ["GET", "PUT", "DELETE"] {
        for bad in ["a%20b", "%00", "a%2Fb", "%FF", &"a".repeat(129)] {
            complaints
                .refused(address, &format!("{method} {drain}/{bad}/drain"), "", (400, PARAM), &[])
                .await;
        }
    }
    let own = client.get("/api/v2/captures").await.unwrap()["items"][0]["id"].as_str().unwrap().to_owned();
    let (unknown, failed) = ("CDC:ErrCaptureNotExist", "CDC:ErrSchedulerRequestFailed");
    complaints
        .refused(address, &format!("PUT {drain}/{own}/drain"), "", (400, failed), &["owner", "no other node"])
        .await;
    complaints.refused(address, &format!("PUT {drain}/none/drain"), "", (400, unknown), &["none"]).await;
    complaints.refused(address, &format!("GET {drain}/none/drain"), "", (400, failed), &["none"]).await;
    complaints.refused(address, &format!("DELETE {drain}/none/drain"), "", (400, failed), &["drain"]).await;
    for (body, code) in [
        ("{", PARAM),
        ("[]", PARAM),
        ("{}", PARAM),
        (r#"{"capture_id":7}"#, PARAM),
        (r#"{"capture_id":"a b"}"#, PARAM),
        (r#"{"capture_id":"none"}"#, unknown),
    ] {
        complaints.refused(address, "PUT /api/v1/captures/drain", body, (400, code), &[]).await;
    }
    let huge = format!("{{\"changefeed_id\":\"{}\"}}", "a".repeat(3 << 20));
    complaints.refused(address, &format!("POST {feeds}"), &huge, (413, PARAM), &["large"]).await;
    let deep = "[".repeat(100_000);
    complaints.refused(address, &format!("POST {feeds}"), &deep, (400, PARAM), &[]).await;
    complaints.refused(address, &format!("POST {feeds}"), "\u{0}", (400, PARAM), &[]).await;
    assert!(client.get("/api/v2/health").await.is_ok());
    node.stop().await.unwrap();
    complaints.none();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
// behaviour: coordinator-ST-18
// behaviour: api-A-3
// behaviour: api-A-12
async fn changefeeds_that_cannot_be_are_refused_with_a_code_and_leave_nothing_behind() {
    let source = PgServer::start().await.unwrap();
    source.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE keyless (v text); CREATE ROLE weak LOGIN PASSWORD 's3cr3t-canary'").await.unwrap();
    let plain = PgServer::builder().setting("wal_level", "replica").start().await.unwrap();
    let mut complaints = Complaints::default();
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    let address = node.address();
    let uri = source.uri("postgres");
    let upstream = json!({ "uri": uri });
    let only_t = json!({ "filter": { "rules": ["public.t"] } });
    let with = |more: Value| {
        let mut body = json!({ "changefeed_id": "f", "upstream": upstream, "sink_uri": "blackhole://", "replica_config": only_t });
        for (key, value) in more.as_object().unwrap() {
            body[key] = value.clone();
        }
        body.to_string()
    };
    let nowhere = "postgres://u:s3cr3t-canary@127.0.0.1:1/d";
    let wrong = source.uri_as("postgres", SECRET, "postgres");
    let weak = source.uri_as("weak", SECRET, "postgres");
    let config = |value: Value| json!({ "replica_config": value });
    let cases: Vec<(Value, &str, &[&str])> = vec![
        (json!({ "upstream": null }), PARAM, &["upstream.uri"]),
        (json!({ "upstream": { "uri": "" } }), PARAM, &["upstream.uri"]),
        (json!({ "upstream": { "uri": "gopher://x" } }), "CDC:ErrUpstreamURIInvalid", &["postgres"]),
        (
            json!({ "upstream": { "uri": "postgres://u:s3cr3t-canary@h:port/d" } }),
            "CDC:ErrUpstreamURIInvalid",
            &[],
        ),
        (
            json!({ "upstream": { "uri": format!("{uri}?speed=fast") } }),
            "CDC:ErrUpstreamURIInvalid",
            &["speed"],
        ),
        (json!({ "upstream": { "uri": nowhere } }), "CDC:ErrUpstreamUnreachable", &["127.0.0.1:1"]),
        (json!({ "upstream": { "uri": wrong } }), "CDC:ErrUpstreamAuthFailed", &["postgres"]),
        (json!({ "upstream": { "uri": weak } }), "CDC:ErrUpstreamPrivilege", &["weak"]),
        (
            json!({ "upstream": { "uri": source.uri("absent") } }),
            "CDC:ErrUpstreamDatabaseNotExists",
            &["absent"],
        ),
        (
            json!({ "upstream": { "uri": format!("{uri}?sslmode=require") } }),
            "CDC:ErrUpstreamTLSFailed",
            &["TLS"],
        ),
        (
            json!({ "upstream": { "uri": plain.uri("postgres") } }),
            "CDC:ErrUpstreamPrerequisite",
            &["wal_level", "ALTER SYSTEM"],
        ),
        (json!({ "sink_uri": "" }), "CDC:ErrSinkURIInvalid", &["sink_uri"]),
        (json!({ "sink_uri": "nonsense s3cr3t-canary" }), "CDC:ErrSinkURIInvalid", &[]),
        (json!({ "sink_uri": "gopher://u:s3cr3t-canary@x" }), "CDC:ErrSinkURIInvalid", &["scheme"]),
        (json!({ "sink_uri": "file:///tmp/x?protocol=morse" }), "CDC:ErrSinkUnknownProtocol", &["morse"]),
        (
            json!({ "sink_uri": "file:///proc/nowhere?protocol=csv" }),
            "CDC:ErrSinkUnavailable",
            &["/proc/nowhere"],
        ),
        (json!({ "sink_uri": nowhere }), "CDC:ErrSinkUnavailable", &["127.0.0.1:1"]),
        (json!({ "sink_uri": wrong }), "CDC:ErrSinkAuth", &["password"]),
        (json!({ "sink_uri": source.uri("absent") }), "CDC:ErrSinkDatabaseMissing", &["absent"]),
        (
            json!({ "sink_uri": format!("{uri}?worker-count=99") }),
            "CDC:ErrSinkURIInvalid",
            &["worker-count", "16"],
        ),
        (json!({ "sink_uri": uri }), "CDC:ErrSameUpstreamDownstream", &["another database"]),
        (json!({ "changefeed_id": "a b" }), PARAM, &["letters"]),
        (json!({ "changefeed_id": "" }), PARAM, &["letters"]),
        (json!({ "changefeed_id": "a".repeat(129) }), PARAM, &["128"]),
        (json!({ "keyspace": "other" }), PARAM, &["keyspace"]),
        (json!({ "start_ts": 9, "target_ts": 3 }), "CDC:ErrTargetTsBeforeStartTs", &["target_ts 3"]),
        (
            json!({ "start_ts": 1, "replica_config": { "initial_copy": { "enabled": false }, "filter": only_t["filter"] } }),
            "CDC:ErrStartTsBeforeGC",
            &[],
        ),
        (config(json!({ "memory_quota": "much" })), "CDC:ErrInvalidReplicaConfig", &["memory_quota"]),
        (config(json!([1])), "CDC:ErrInvalidReplicaConfig", &[]),
        (config(json!({ "filter": { "rules": ["a.b.c.d["] } })), "CDC:ErrFilterRuleInvalid", &["a.b.c.d["]),
        (config(json!({ "filter": { "rules": [1] } })), "CDC:ErrInvalidReplicaConfig", &["filter"]),
        (config(json!({})), "CDC:ErrTableIneligible", &["public.keyless"]),
    ];
    for (more, code, words) in &cases {
        complaints
            .refused(address, "POST /api/v2/changefeeds", &with(more.clone()), (400, code), words)
            .await;
    }
    for path in ["verify_table", "get_all_tables"] {
        for (more, code, words) in cases.iter().take(11) {
            complaints
                .refused(address, &format!("POST /api/v2/{path}"), &with(more.clone()), (400, code), words)
                .await;
        }
    }
    let admin = source.client("postgres").await.unwrap();
    let left = "SELECT (SELECT count(*) FROM pg_replication_slots) + (SELECT count(*) FROM pg_publication)";
    assert_eq!(admin.query_one(left, &[]).await.unwrap().get::<_, i64>(0), 0);

    // Unknown fields are ignored; wrong transitions are refused.
    let made =
        send(address, "POST /api/v2/changefeeds HTTP/1.1", with(json!({ "colour": "blue" })).as_bytes())
            .await;
    assert_eq!(made.status, 200, "{}", made.text);
    eventually("it runs", async || state(&client).await == "normal").await;
    let feed = "/api/v2/changefeeds/f";
    let update_refused = "CDC:ErrChangefeedUpdateRefused";
    complaints
        .refused(
            address,
            "POST /api/v2/changefeeds",
            &with(json!({})),
            (400, "CDC:ErrChangeFeedAlreadyExists"),
            &["exists already"],
        )
        .await;
    complaints.refused(address, &format!("POST {feed}/resume"), "", (400, update_refused), &["normal"]).await;
    complaints.refused(address, &format!("PUT {feed}"), "{}", (400, update_refused), &["pause"]).await;
    let (failed, own) = ("CDC:ErrSchedulerRequestFailed", client.get("/api/v2/captures").await.unwrap());
    let own = own["items"][0]["id"].as_str().unwrap();
    eventually("its tables are placed", async || client.get(&format!("{feed}/tables")).await.is_ok()).await;
    let tables = client.get(&format!("{feed}/tables")).await.unwrap();
    let ids: Vec<i64> =
        tables["items"][0]["table_ids"].as_array().unwrap().iter().filter_map(Value::as_i64).collect();
    let table = *ids.iter().find(|id| **id != 0).unwrap();
    for (request, code, words) in [
        (format!("move_table?tableID=987654321&targetNodeID={own}"), PARAM, "987654321"),
        (format!("move_table?tableID=0&targetNodeID={own}"), failed, "trigger"),
        (format!("move_table?tableID={table}&targetNodeID=none"), failed, "none"),
        (format!("move_split_table?tableID={table}&targetNodeID=none"), failed, "none"),
        (format!("split_table_by_region_count?tableID={table}"), failed, "enable-table-across-nodes"),
        ("merge_table?tableID=987654321".to_owned(), PARAM, "987654321"),
    ] {
        complaints.refused(address, &format!("POST {feed}/{request}"), "", (400, code), &[words]).await;
    }
    client.post(&format!("{feed}/pause"), &json!({})).await.unwrap();
    complaints
        .refused(
            address,
            &format!("GET {feed}/tables"),
            "",
            (500, "CDC:ErrMaintainerNotFounded"),
            &["stopped"],
        )
        .await;
    client.post(&format!("{feed}/pause"), &json!({})).await.unwrap();
    complaints
        .refused(address, &format!("PUT {feed}"), r#"{"start_ts":7}"#, (400, PARAM), &["start_ts"])
        .await;
    complaints
        .refused(address, &format!("PUT {feed}"), r#"{"target_ts":7}"#, (400, update_refused), &["target_ts"])
        .await;
    complaints
        .refused(
            address,
            &format!("PUT {feed}"),
            r#"{"sink_uri":"gopher://u:s3cr3t-canary@x"}"#,
            (400, "CDC:ErrSinkURIInvalid"),
            &["scheme"],
        )
        .await;
    for position in ["0", "18446744073709551615", "\"pg:FFFFFFFF/0\""] {
        let body = format!("{{\"overwrite_checkpoint_ts\":{position}}}");
        complaints
            .refused(
                address,
                &format!("POST {feed}/resume"),
                &body,
                (400, PARAM),
                &["overwrite_checkpoint_ts"],
            )
            .await;
    }
    assert_eq!(state(&client).await, "stopped", "refused requests change nothing");
    client.delete(feed).await.unwrap();
    assert_eq!(admin.query_one(left, &[]).await.unwrap().get::<_, i64>(0), 0);
    node.stop().await.unwrap();
    complaints.none();
}
