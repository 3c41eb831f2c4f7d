//! Target tables, permissions, DDL, and the named errors when something does not fit.

use std::sync::Arc;

use event::{BlockEvent, Column, DdlEvent, DdlKind, TableInfo, TypeDefinition};
use heartbeatpb::{SchemaId, TableId, TableSpan, Ts};
use sink::{Error, SinkOptions};
use testkit::PgServer;

use crate::harness::{Rig, Rows, Running, column, table};

fn t(columns: &[(&str, &str)]) -> Arc<TableInfo> {
    Arc::new(table(1, "t", columns, &[0], &[]))
}

async fn refused(rig: &Rig, params: &str, info: &Arc<TableInfo>) -> Error {
    let sink = rig.sink(params).await;
    sink.table(info).await.expect_err("refused")
}

#[tokio::test]
async fn a_target_that_does_not_fit_is_named() {
    let rig = Rig::new().await;
    let info = t(&[("id", "integer"), ("v", "text")]);
    let error = refused(&rig, "create-tables=false", &info).await;
    assert_eq!(error.code(), "CDC:ErrTargetTableMissing");
    for (create, code, hint) in [
        ("CREATE TABLE t (id int PRIMARY KEY)", "CDC:ErrTargetColumnMissing", "ADD COLUMN \"v\" text"),
        ("CREATE TABLE t (id int, v text)", "CDC:ErrTargetKeyMissing", "CREATE UNIQUE INDEX"),
        (
            "CREATE TABLE t (id int, v text); CREATE UNIQUE INDEX ON t (id) WHERE v > 'a'",
            "CDC:ErrTargetKeyMissing",
            "unique key",
        ),
        (
            "CREATE TABLE t (id int PRIMARY KEY, v text, extra int NOT NULL)",
            "CDC:ErrTargetColumnExtra",
            "\"extra\"",
        ),
        (
            "CREATE TABLE t (id int PRIMARY KEY, v text GENERATED ALWAYS AS ('x') STORED)",
            "CDC:ErrTargetColumnGenerated",
            "\"v\"",
        ),
        ("CREATE VIEW t AS SELECT 1 AS id, 'a' AS v", "CDC:ErrTargetNotTable", "not a table"),
    ] {
        rig.exec(create).await;
        let error = refused(&rig, "", &info).await;
        assert_eq!(error.code(), code);
        assert!(error.to_string().contains(hint), "{error}");
        assert!(!error.is_retryable());
        rig.exec(if create.starts_with("CREATE VIEW") { "DROP VIEW t" } else { "DROP TABLE t" }).await;
    }
}

#[tokio::test]
async fn a_refused_row_names_table_and_state_and_shows_no_value() {
    let rig = Rig::new().await;
    rig.exec("CREATE TABLE t (id int PRIMARY KEY, v int)").await;
    let info = t(&[("id", "integer"), ("v", "text")]);
    let sink = rig.sink("").await;
    sink.table(&info).await.expect("opens");
    sink.write(Rows::of(&info).insert(10, &["1", "canary"]).build());
    let error = sink.error().await;
    assert_eq!(error.code(), "CDC:ErrSinkData");
    let text = format!("{error} {error:?}");
    assert!(text.contains("22P02") && text.contains("\"t\"") && !text.contains("canary"), "{text}");
}

#[tokio::test]
async fn a_value_that_is_too_long_is_refused_not_cut() {
    let rig = Rig::new().await;
    rig.exec("CREATE TABLE t (id int PRIMARY KEY, v varchar(3))").await;
    let info = t(&[("id", "integer"), ("v", "text")]);
    let sink = rig.sink("").await;
    sink.table(&info).await.expect("opens");
    sink.write(Rows::of(&info).insert(10, &["1", "long"]).build());
    assert!(sink.error().await.to_string().contains("22001"));
}

#[tokio::test]
async fn a_real_conflict_with_rows_of_others_fails_with_its_constraint() {
    let rig = Rig::new().await;
    rig.exec("CREATE TABLE t (id int PRIMARY KEY, v text CONSTRAINT only_one UNIQUE); INSERT INTO t VALUES (9, 'mine')")
        .await;
    let info = t(&[("id", "integer"), ("v", "text")]);
    let sink = rig.sink("").await;
    sink.table(&info).await.expect("opens");
    sink.write(Rows::of(&info).insert(10, &["1", "mine"]).build());
    let error = sink.error().await;
    assert_eq!(error.code(), "CDC:ErrSinkConflict");
    assert!(error.to_string().contains("only_one") && !error.to_string().contains("mine)"));
}

#[tokio::test]
async fn an_update_of_a_missing_row_inserts_what_is_complete_and_names_what_is_not() {
    let rig = Rig::new().await;
    let info = t(&[("id", "integer"), ("v", "text")]);
    let sink = rig.sink("").await;
    sink.table(&info).await.expect("opens");
    sink.write(
        Rows::of(&info).update(10, &["1", "whole"]).update_from(11, &["7", "\\U"], &["2", "moved"]).build(),
    );
    sink.flush().await;
    rig.expect("t", &["1|whole", "2|moved"]).await;
    sink.write(
        Rows::of(&info).update(12, &["3", "\\U"]).update_from(13, &["5", "\\U"], &["4", "\\U"]).build(),
    );
    let error = sink.error().await;
    assert_eq!(error.code(), "CDC:ErrTargetRowMissing");
}

#[tokio::test]
async fn schemas_types_and_odd_names_are_created() {
    let rig = Rig::new().await;
    let mut info =
        table(1, "Größe \"x\"", &[("iD", "integer"), ("mood ", "text"), ("g", "text")], &[0], &[&[1]]);
    info.schema = "Ünï code".into();
    info.columns[1].ty.sql = "\"my types\".\"Mood\"".into();
    info.columns[1].ty.definitions = vec![TypeDefinition {
        schema: "my types".into(),
        name: "Mood".into(),
        create_sql: "CREATE TYPE \"my types\".\"Mood\" AS ENUM ('so', 'so la la')".into(),
    }];
    info.columns[2] = Column { generated: Some("'A'".into()), ..column("g", "text") };
    let info = Arc::new(info);
    let sink = rig.sink("").await;
    sink.table(&info).await.expect("created");
    sink.sink.open_table(sink.dispatcher, &info).await.expect("again");
    sink.write(
        Rows::of(&info)
            .insert(10, &["1", "so", "\\U"])
            .update(11, &["1", "so la la", "\\U"])
            .insert(12, &["2", "\\N", "\\U"])
            .build(),
    );
    sink.flush().await;
    rig.expect("\"Ünï code\".\"Größe \"\"x\"\"\"", &["1|so la la|A", "2|\\N|A"]).await;
}

#[tokio::test]
async fn identity_columns_of_the_target_take_the_values_of_the_source() {
    let rig = Rig::new().await;
    rig.exec(
        "CREATE TABLE t (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v text, \
              n int GENERATED ALWAYS AS IDENTITY)",
    )
    .await;
    let info = t(&[("id", "integer"), ("v", "text"), ("n", "integer")]);
    let sink = rig.sink("").await;
    sink.table(&info).await.expect("opens");
    sink.write(
        Rows::of(&info)
            .insert(10, &["41", "a", "7"])
            .update(11, &["41", "b", "7"])
            .update_from(12, &["41", "\\U", "\\U"], &["42", "c", "7"])
            .build(),
    );
    sink.flush().await;
    rig.expect("t", &["42|c|7"]).await;
}

#[tokio::test]
async fn columns_that_only_the_target_has_keep_their_values() {
    let rig = Rig::new().await;
    rig.exec("CREATE TABLE t (id int PRIMARY KEY, own text DEFAULT 'own', v text)").await;
    let info = t(&[("id", "integer"), ("v", "text")]);
    let sink = rig.sink("").await;
    sink.table(&info).await.expect("opens");
    sink.write(Rows::of(&info).insert(10, &["1", "a"]).build());
    sink.flush().await;
    rig.exec("UPDATE t SET own = 'kept'").await;
    sink.write(Rows::of(&info).update(11, &["1", "b"]).build());
    sink.flush().await;
    rig.expect("t", &["1|kept|b"]).await;
}

#[tokio::test]
async fn a_part_of_a_table_without_a_usable_key_is_refused() {
    let rig = Rig::new().await;
    let sink = rig.sink("").await;
    let info = Arc::new(table(1, "t", &[("id", "integer"), ("u", "integer")], &[0], &[&[1]]));
    let part = TableSpan { start: vec![1], ..TableSpan::whole(info.id) };
    sink.sink.open_dispatcher(sink.dispatcher, &part, Ts(1)).await.expect("the shape is not known yet");
    let error = sink.sink.open_table(sink.dispatcher, &info).await.expect_err("another unique key");
    assert_eq!(error.code(), "CDC:ErrTableSplitUnsupported");
}

fn ddl(ts: u64, kind: DdlKind, query: &str) -> BlockEvent {
    BlockEvent::Ddl(Arc::new(DdlEvent {
        schema_id: SchemaId(1),
        table_id: TableId(1),
        schema: "public".into(),
        table: "t".into(),
        query: query.into(),
        ..DdlEvent::new(kind, Ts(ts))
    }))
}

// behaviour: dataplane-3
#[tokio::test]
async fn a_ddl_is_executed_once_however_often_it_comes() {
    let rig = Rig::new().await;
    let old = t(&[("id", "integer")]);
    let sink = rig.sink("").await;
    sink.table(&old).await.expect("opens");
    sink.write(Rows::of(&old).insert(10, &["1"]).build());
    sink.sink.flush_before_block(sink.dispatcher).await.expect("flushed");
    let event = ddl(20, DdlKind::AlterTable, "ALTER TABLE t ADD COLUMN v text DEFAULT 'd'");
    sink.sink.write_block_event(&event).await.expect("executed");
    sink.sink.write_block_event(&event).await.expect("skipped");
    let index = ddl(21, DdlKind::Other, "CREATE INDEX CONCURRENTLY ON t (v)");
    sink.sink.write_block_event(&index).await.expect("executed outside of a transaction");
    let create = ddl(22, DdlKind::CreateTable, "CREATE TABLE t (id int)");
    sink.sink.write_block_event(&create).await.expect("it exists already");
    let mut new = (*t(&[("id", "integer"), ("v", "text")])).clone();
    new.version = Ts(20);
    let new = Arc::new(new);
    sink.sink.open_table(sink.dispatcher, &new).await.expect("fits");
    sink.write(Rows::of(&new).insert(30, &["2", "b"]).update(31, &["1", "a"]).build());
    sink.flush().await;
    rig.expect("t", &["1|a", "2|b"]).await;
    let wrong = ddl(40, DdlKind::AlterTable, "ALTER TABLE nowhere ADD COLUMN v text");
    assert_eq!(sink.sink.write_block_event(&wrong).await.expect_err("fails").code(), "CDC:ErrSinkSchema");
    sink.sink.write_block_event(&ddl(41, DdlKind::Other, "SELECT 1")).await.expect("the next one works");
}

#[tokio::test]
async fn missing_permissions_are_named_with_the_statement_that_grants_them() {
    let rig = Rig::new().await;
    rig.server.sql("dst", "CREATE ROLE writer LOGIN PASSWORD 'secret'").await.expect("role");
    let options = SinkOptions::new(rig.changefeed.clone(), "unused");
    let uri =
        |params: &str| format!("{}?sslmode=disable&{params}", rig.server.uri_as("writer", "secret", "dst"));
    let error = sink::check(&uri(""), &options).await.expect_err("may not set the role");
    assert_eq!(error.code(), "CDC:ErrSinkPermission");
    assert!(error.to_string().contains("GRANT SET ON PARAMETER"), "{error}");
    let origin = uri("session-replication-role=origin");
    let error = sink::check(&origin, &options).await.expect_err("may not create a schema");
    assert!(error.to_string().contains("CREATE SCHEMA \"millrace\""), "{error}");
    let error = sink::open(&origin, &options).await.map(|_| ()).expect_err("the same when opened");
    assert!(error.to_string().contains("CREATE SCHEMA \"millrace\""), "{error}");
    rig.exec(
        "CREATE SCHEMA millrace AUTHORIZATION writer; CREATE TABLE t (id int PRIMARY KEY); \
              GRANT SELECT, INSERT, UPDATE, DELETE ON t TO writer",
    )
    .await;
    let check = sink::check(&origin, &options).await.expect("works");
    assert_eq!(check.identity.map(|identity| identity.database), Some("dst".into()));
    assert_eq!(check.warnings.len(), 1, "no schemas can be created");
    let sink = Running::open(&origin, &rig.changefeed).await.expect("opens");
    let info = t(&[("id", "integer")]);
    sink.table(&info).await.expect("opens");
    sink.write(Rows::of(&info).insert(10, &["1"]).truncate(11).insert(12, &["2"]).build());
    sink.flush().await;
    rig.expect("t", &["2"]).await;
}

#[tokio::test]
async fn an_unreachable_or_unknown_target_is_named_without_its_password() {
    let rig = Rig::new().await;
    let options = SinkOptions::new(rig.changefeed.clone(), "unused");
    let uri = rig.server.uri_as("postgres", "wrong-canary", "dst");
    let error = sink::check(&uri, &options).await.expect_err("wrong password");
    assert_eq!(error.code(), "CDC:ErrSinkAuth");
    assert!(!format!("{error:?}").contains("canary"));
    let error = sink::check(&rig.server.uri("nowhere"), &options).await.expect_err("no database");
    assert_eq!(error.code(), "CDC:ErrSinkDatabaseMissing");
    let error = sink::check("postgres://u:canary@127.0.0.1:1/db", &options).await.expect_err("nobody there");
    assert_eq!(error.code(), "CDC:ErrSinkUnavailable");
    assert!(error.is_retryable() && !format!("{error:?}").contains("canary"));
    let ours = sink::downstream_identity(&rig.uri("")).await.expect("answers").expect("a database");
    assert!(ours.system_identifier.parse::<u64>().is_ok());
}

/// And the certificate that it shows, as PEM.
async fn server_with_tls() -> (PgServer, String) {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".into(), "127.0.0.1".into()])
        .expect("a certificate");
    let builder = PgServer::builder().tls(&made.cert.pem(), &made.signing_key.serialize_pem());
    (builder.start().await.expect("a server"), made.cert.pem())
}

#[tokio::test]
async fn tls_is_used_and_verified_as_asked() {
    let (server, certificate) = server_with_tls().await;
    let dir = tempfile::tempdir().expect("a directory");
    let root = dir.path().join("root.pem");
    std::fs::write(&root, certificate).expect("written");
    let options = SinkOptions::new(heartbeatpb::ChangefeedId::fresh("test"), "unused");
    let uri = |params: &str| format!("{}?{params}", server.uri("postgres"));
    sink::check(&uri("sslmode=require"), &options).await.expect("encrypted");
    sink::check(&uri("sslmode=prefer"), &options).await.expect("encrypted if possible");
    let verify = format!("sslmode=verify-full&sslrootcert={}", root.display());
    sink::check(&uri(&verify), &options).await.expect("verified");
    let error = sink::check(&uri("sslmode=verify-full"), &options).await.expect_err("an unknown issuer");
    assert_eq!(error.code(), "CDC:ErrSinkUnavailable");
}

#[tokio::test]
async fn rows_are_written_however_the_server_is_reached() {
    let (server, _) = server_with_tls().await;
    server.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY, v text)").await.expect("a table");
    let plain = server.uri("postgres");
    let tcp = |params: &str| format!("{plain}?{params}");
    let socket = server.socket_dir().display().to_string().replace('/', "%2F");
    let socket = plain.replace("127.0.0.1", &socket);
    // A server that is not there is passed over.
    let port = format!(":{}/", server.port());
    let second = plain.replace(&port, ":1/");
    let second = format!("{second}?host=127.0.0.1&port={}", server.port());
    let wide = "x".repeat(300_000);
    for (at, uri) in [
        tcp("sslmode=disable"),
        tcp("sslmode=require"),
        tcp("sslmode=require&channel_binding=require"),
        socket,
        format!("{second}&target_session_attrs=read-write"),
    ]
    .iter()
    .enumerate()
    {
        let changefeed = heartbeatpb::ChangefeedId::fresh("test");
        let sink = Running::open(uri, &changefeed).await.expect("opens");
        let info = t(&[("id", "integer"), ("v", "text")]);
        sink.table(&info).await.expect("opens");
        let id = at.to_string();
        sink.write(Rows::of(&info).insert(10, &[&id, "a"]).update(11, &[&id, &wide]).build());
        sink.flush().await;
    }
    let rows = "SELECT count(*) FROM t WHERE length(v) = 300000";
    let client = server.client("postgres").await.expect("a client");
    assert_eq!(client.query_one(rows, &[]).await.expect("counted").get::<_, i64>(0), 5);
    let options = SinkOptions::new(heartbeatpb::ChangefeedId::fresh("test"), "unused");
    let error = sink::check(&tcp("target_session_attrs=read-only"), &options).await.expect_err("it writes");
    assert!(error.is_retryable() && error.to_string().contains("target_session_attrs"), "{error}");
}
