//! What an upstream must offer, and what a changefeed leaves there.

mod rig;

use std::sync::Arc;

use event::ReplicaIdentity;
use heartbeatpb::Ts;
use logservice::upstream::{self, FeedSpec, Upstream};
use rig::{Running, partial, spec, version};
use testkit::PgServer;

fn open(spec: &FeedSpec) -> Arc<dyn Upstream> {
    upstream::open(&spec.upstream_uri).expect("uri")
}

async fn refusal(spec: &FeedSpec) -> (String, String) {
    let error = open(spec).check(spec).await.expect_err("refused");
    (error.code().to_owned(), error.chain())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_missing_prerequisite_has_its_own_error() {
    let server = PgServer::builder().setting("max_replication_slots", "1").start().await.expect("server");
    server
        .sql(
            "postgres",
            "CREATE TABLE t (id int PRIMARY KEY); CREATE SCHEMA closed; CREATE TABLE closed.c (id int PRIMARY KEY);
             CREATE ROLE plain LOGIN PASSWORD 'pw'; CREATE ROLE reader LOGIN REPLICATION PASSWORD 'pw';
             CREATE ROLE \"Odd one\" LOGIN PASSWORD 'pw';
             CREATE ROLE creator LOGIN REPLICATION PASSWORD 'pw'; GRANT CREATE ON DATABASE postgres TO creator, plain;
             GRANT SELECT ON t TO creator;
             CREATE ROLE nologin PASSWORD 'pw'",
        )
        .await
        .expect("roles");
    server.sql("postgres", "CREATE DATABASE private").await.expect("database");
    server.sql("postgres", "REVOKE CONNECT ON DATABASE private FROM PUBLIC").await.expect("revoke");
    let closed_port = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("port");
        listener.local_addr().expect("address").port()
    };
    let with_copy = |uri: String| FeedSpec { initial_copy: true, ..spec(&uri, &["*.*"]) };
    let cases: Vec<(&str, FeedSpec, &str, &str)> = vec![
        (
            "nobody listens",
            spec(&format!("postgres://a:b@127.0.0.1:{closed_port}/d"), &["*.*"]),
            "CDC:ErrUpstreamUnreachable",
            "refused",
        ),
        (
            "no such host",
            spec("postgres://a:b@nowhere.invalid/d", &["*.*"]),
            "CDC:ErrUpstreamUnreachable",
            "nowhere.invalid:5432",
        ),
        (
            "wrong password",
            spec(&server.uri_as("plain", "sesame", "postgres"), &["*.*"]),
            "CDC:ErrUpstreamAuthFailed",
            "\"plain\"",
        ),
        (
            "no password",
            spec(&format!("postgres://plain@127.0.0.1:{}/postgres", server.port()), &["*.*"]),
            "CDC:ErrUpstreamAuthFailed",
            "the URI has none",
        ),
        (
            "not allowed to log in",
            spec(&server.uri_as("nologin", "pw", "postgres"), &["*.*"]),
            "CDC:ErrUpstreamAuthFailed",
            "not permitted to log in",
        ),
        (
            "no such database",
            spec(&server.uri("missing"), &["*.*"]),
            "CDC:ErrUpstreamDatabaseNotExists",
            "\"missing\"",
        ),
        (
            "no right to connect",
            spec(&server.uri_as("plain", "pw", "private"), &["*.*"]),
            "CDC:ErrUpstreamPrivilege",
            "may not connect",
        ),
        (
            "TLS demanded, not offered",
            spec(&format!("{}?sslmode=require", server.uri("postgres")), &["*.*"]),
            "CDC:ErrUpstreamTLSFailed",
            "ssl = on",
        ),
        (
            "no REPLICATION",
            spec(&server.uri_as("plain", "pw", "postgres"), &["*.*"]),
            "CDC:ErrUpstreamPrivilege",
            "ALTER ROLE \"plain\" REPLICATION",
        ),
        (
            "no CREATE on the database",
            spec(&server.uri_as("reader", "pw", "postgres"), &["*.*"]),
            "CDC:ErrUpstreamPrivilege",
            "GRANT CREATE ON DATABASE postgres TO reader",
        ),
        (
            "not the owner",
            spec(&server.uri_as("creator", "pw", "postgres"), &["*.*"]),
            "CDC:ErrUpstreamPrivilege",
            "does not own 2 table(s)",
        ),
        (
            "no free slot for the copy",
            with_copy(server.uri("postgres")),
            "CDC:ErrUpstreamPrerequisite",
            "0 of 1 replication slots are in use and 2 are needed",
        ),
        (
            "wrong scheme",
            spec("postgres://nobody@h", &["*.*"]),
            "CDC:ErrUpstreamURIInvalid",
            "names no database",
        ),
    ];
    for (name, spec, code, text) in cases {
        let (got, message) = match upstream::open(&spec.upstream_uri) {
            Ok(_) => refusal(&spec).await,
            Err(error) => (error.code().to_owned(), error.chain()),
        };
        assert_eq!(got, code, "{name}: {message}");
        assert!(message.contains(text), "{name}: {message}");
        assert!(!message.contains("sesame") && !message.contains("pw@"), "{name}: {message}");
    }
    server.sql("postgres", "SELECT pg_create_physical_replication_slot('somebody')").await.expect("slot");
    let (code, message) = refusal(&spec(&server.uri("postgres"), &["*.*"])).await;
    assert_eq!(code, "CDC:ErrUpstreamPrerequisite");
    assert!(message.contains("max_replication_slots"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_need_a_restart_are_named() {
    let server = PgServer::builder().setting("wal_level", "replica").start().await.expect("server");
    let (code, message) = refusal(&spec(&server.uri("postgres"), &["*.*"])).await;
    assert_eq!(code, "CDC:ErrUpstreamPrerequisite");
    assert!(message.contains("wal_level is replica") && message.contains("ALTER SYSTEM"), "{message}");
    drop(server);
    let server = PgServer::builder().setting("max_wal_senders", "1").start().await.expect("server");
    let copying = FeedSpec { initial_copy: true, ..spec(&server.uri("postgres"), &["*.*"]) };
    let (code, message) = refusal(&copying).await;
    assert_eq!(code, "CDC:ErrUpstreamPrerequisite");
    assert!(message.contains("max_wal_senders"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_password_method_and_every_level_of_tls_works() {
    for method in ["scram-sha-256", "md5", "password", "trust"] {
        let server = PgServer::builder().host_auth(method).start().await.expect("server");
        // The template's password is stored for SCRAM; a new one is stored as the method wants it.
        server.sql("postgres", "CREATE ROLE m LOGIN SUPERUSER PASSWORD 'm'").await.expect("role");
        let spec = spec(&server.uri_as("m", "m", "postgres"), &["*.*"]);
        open(&spec).check(&spec).await.unwrap_or_else(|error| panic!("{method}: {}", error.chain()));
    }
    let made = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        rcgen::generate_simple_self_signed(names).expect("certificate")
    };
    let (right, wrong_name, stranger) = (made(&["127.0.0.1"]), made(&["db.example"]), made(&["127.0.0.1"]));
    let dir = tempfile::TempDir::new().expect("dir");
    let file = |name: &str, pem: String| {
        let path = dir.path().join(name);
        std::fs::write(&path, pem).expect("write");
        path.display().to_string()
    };
    let strange_root = file("stranger.pem", stranger.cert.pem());
    for (certificate, by_name) in [(right, true), (wrong_name, false)] {
        let root = file("root.pem", certificate.cert.pem());
        let server = PgServer::builder()
            .tls(&certificate.cert.pem(), &certificate.signing_key.serialize_pem())
            .start()
            .await
            .expect("server");
        for (parameters, works) in [
            ("sslmode=disable".to_owned(), true),
            ("sslmode=prefer".to_owned(), true),
            ("sslmode=require".to_owned(), true),
            (format!("sslmode=verify-ca&sslrootcert={root}"), true),
            (format!("sslmode=verify-full&sslrootcert={root}"), by_name),
            (format!("sslmode=require&sslrootcert={strange_root}"), false),
            (format!("sslmode=verify-ca&sslrootcert={strange_root}"), false),
            ("sslmode=verify-full".to_owned(), false),
        ] {
            let spec = spec(&format!("{}?{parameters}", server.uri("postgres")), &["*.*"]);
            match open(&spec).current_position().await {
                Ok(_) => assert!(works, "{parameters}"),
                Err(error) => {
                    assert!(!works, "{parameters}: {}", error.chain());
                    assert_eq!(error.code(), "CDC:ErrUpstreamTLSFailed", "{parameters}: {}", error.chain());
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_stream_through_tls_and_a_unix_socket() {
    let certificate = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).expect("certificate");
    let server = PgServer::builder()
        .tls(&certificate.cert.pem(), &certificate.signing_key.serialize_pem())
        .start()
        .await
        .expect("server");
    server
        .sql("postgres", "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT g, 'x' FROM generate_series(1, 5000) g")
        .await
        .expect("table");
    let socket = format!(
        "postgres://postgres@localhost:{}/postgres?host={}",
        server.port(),
        server.socket_dir().display()
    );
    for (round, uri) in
        [format!("{}?sslmode=require", server.uri("postgres")), socket].into_iter().enumerate()
    {
        let mut spec = spec(&uri, &["*.*"]);
        spec.initial_copy = true;
        let running = Running::start(spec).await;
        let sql = format!(
            "INSERT INTO t SELECT g, repeat('y', 100) FROM generate_series({0}0000, {0}4999) g",
            round + 1
        );
        server.sql("postgres", &sql).await.expect("insert");
        running.catch_up().await;
        let expected = 5000 * (round + 2);
        assert_eq!(rig::replay(&running.changes("t")).len(), expected, "{uri}");
        running.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_that_cannot_be_replicated_say_why() {
    let server = PgServer::start().await.expect("server");
    server
        .sql(
            "postgres",
            "CREATE TABLE a_pk (id int PRIMARY KEY, v text UNIQUE);
             CREATE TABLE b_unique (a int NOT NULL, b int NOT NULL, UNIQUE (a, b));
             CREATE TABLE c_index (a int NOT NULL, b int NOT NULL, UNIQUE (a, b));
             ALTER TABLE c_index REPLICA IDENTITY USING INDEX c_index_a_b_key;
             CREATE TABLE d_full (a int); ALTER TABLE d_full REPLICA IDENTITY FULL;
             CREATE TABLE e_none (a int);
             CREATE TABLE f_full_pk (a int PRIMARY KEY); ALTER TABLE f_full_pk REPLICA IDENTITY FULL;
             CREATE TABLE g_nothing (a int PRIMARY KEY); ALTER TABLE g_nothing REPLICA IDENTITY NOTHING;
             CREATE TABLE h_deferred (a int PRIMARY KEY DEFERRABLE);
             CREATE UNLOGGED TABLE i_unlogged (a int PRIMARY KEY);
             CREATE TABLE j_generated (a int NOT NULL, g int GENERATED ALWAYS AS (a + 1) STORED PRIMARY KEY);
             CREATE TABLE k_other (a int PRIMARY KEY, b int NOT NULL UNIQUE);
             ALTER TABLE k_other REPLICA IDENTITY USING INDEX k_other_b_key;
             CREATE TABLE l_parts (a int PRIMARY KEY) PARTITION BY LIST (a);
             CREATE TABLE l_part_1 PARTITION OF l_parts FOR VALUES IN (1);
             CREATE TABLE l_part_2 PARTITION OF l_parts FOR VALUES IN (2);
             CREATE TABLE m_parts (a int PRIMARY KEY) PARTITION BY LIST (a);
             CREATE TABLE m_part_1 PARTITION OF m_parts FOR VALUES IN (1);
             ALTER TABLE m_parts REPLICA IDENTITY FULL;
             CREATE TABLE n_nullable (a int UNIQUE);
             CREATE VIEW o_view AS SELECT 1; CREATE TEMP TABLE p_temp (a int PRIMARY KEY);",
        )
        .await
        .expect("tables");
    let mut lines = Vec::new();
    for force in [false, true] {
        let spec = FeedSpec { force_replicate: force, ..spec(&server.uri("postgres"), &["*.*"]) };
        let report = open(&spec).check(&spec).await.expect("check");
        lines.push(format!("force {force}"));
        let named = report.eligible.iter().map(|table| (table.info.name.clone(), None));
        let refused =
            report.ineligible.iter().map(|(table, why)| (table.info.name.clone(), Some(why.clone())));
        let mut all: Vec<_> = named.chain(refused).collect();
        all.sort();
        for (name, why) in all {
            lines.push(format!(
                "{name}: {}",
                why.map_or("ok".to_owned(), |why| why.chars().take(60).collect())
            ));
        }
        let full = report.eligible.iter().find(|table| table.info.name == "f_full_pk").expect("eligible");
        assert_eq!(full.info.identity, ReplicaIdentity::Full);
        let splittable: Vec<&str> = report
            .eligible
            .iter()
            .filter(|table| table.splittable)
            .map(|table| table.info.name.as_str())
            .collect();
        assert_eq!(splittable, ["f_full_pk", "l_parts"]);
    }
    expect_test::expect![[r#"
        force false
        a_pk: ok
        b_unique: it has no replica identity, so updates and deletes cannot be
        c_index: ok
        d_full: it has no primary key or other unique key over NOT NULL colu
        e_none: it has no primary key or other unique key over NOT NULL colu
        f_full_pk: ok
        g_nothing: it has no replica identity, so updates and deletes cannot be
        h_deferred: it has no primary key or other unique key over NOT NULL colu
        i_unlogged: it is unlogged; run: ALTER TABLE … SET LOGGED
        j_generated: its replica identity contains the generated column "g", whic
        k_other: its replica identity does not contain its primary key, so ol
        l_parts: ok
        m_parts: partition public.m_part_1 has another replica identity than 
        n_nullable: it has no primary key or other unique key over NOT NULL colu
        force true
        a_pk: ok
        b_unique: it has no replica identity, so updates and deletes cannot be
        c_index: ok
        d_full: ok
        e_none: it has no primary key or other unique key over NOT NULL colu
        f_full_pk: ok
        g_nothing: it has no replica identity, so updates and deletes cannot be
        h_deferred: it has no primary key or other unique key over NOT NULL colu
        i_unlogged: it is unlogged; run: ALTER TABLE … SET LOGGED
        j_generated: its replica identity contains the generated column "g", whic
        k_other: its replica identity does not contain its primary key, so ol
        l_parts: ok
        m_parts: partition public.m_part_1 has another replica identity than 
        n_nullable: it has no primary key or other unique key over NOT NULL colu"#]]
    .assert_eq(&lines.join("\n"));
    let strict = FeedSpec { ignore_ineligible: false, ..spec(&server.uri("postgres"), &["*.*"]) };
    let error = open(&strict).create_retention(&strict, None).await.expect_err("refused");
    assert_eq!(error.code(), "CDC:ErrTableIneligible");
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_is_adopted_refused_and_dropped() {
    let server = PgServer::start().await.expect("server");
    server.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)").await.expect("table");
    let spec = spec(&server.uri("postgres"), &["*.*"]);
    let upstream = open(&spec);
    let first = upstream.create_retention(&spec, None).await.expect("create");
    let again = upstream.create_retention(&spec, None).await.expect("adopt");
    assert_eq!(first.start_ts, again.start_ts);
    let late = upstream.current_position().await.expect("position").start_ts.after();
    assert_eq!(upstream.create_retention(&spec, Some(late)).await.expect("later").start_ts, late);
    let early = upstream.create_retention(&spec, Some(Ts(1))).await.expect_err("too early");
    assert_eq!(early.code(), "CDC:ErrStartTsBeforeGC");

    // A table that appears later is not silently half replicated.
    server.sql("postgres", "CREATE TABLE later (id int PRIMARY KEY)").await.expect("table");
    let names: Vec<String> =
        upstream.tables(&spec).await.expect("tables").iter().map(|table| table.info.name.clone()).collect();
    assert_eq!(names, ["t"]);

    // Dropping ends a reader that is still there.
    let running = Running::resume(spec.clone(), first, first.start_ts, 1 << 20).await;
    running.catch_up().await;
    upstream.drop_retention(&spec.changefeed).await.expect("drop");
    upstream.drop_retention(&spec.changefeed).await.expect("drop again");
    assert_eq!(running.failed().await.code(), "CDC:ErrStartTsBeforeGC");
    let client = server.client("postgres").await.expect("client");
    let left = client
        .query_one(
            "SELECT (SELECT count(*) FROM pg_replication_slots) + (SELECT count(*) FROM pg_publication)",
            &[],
        )
        .await
        .expect("count");
    assert_eq!(left.get::<_, i64>(0), 0);

    // A failed creation leaves nothing behind.
    let early = upstream.create_retention(&spec, Some(Ts(1))).await.expect_err("too early");
    assert_eq!(early.code(), "CDC:ErrStartTsBeforeGC");
    let left = client.query("SELECT FROM pg_replication_slots", &[]).await.expect("slots");
    let publications = client.query("SELECT FROM pg_publication", &[]).await.expect("publications");
    assert_eq!((left.len(), publications.len()), (0, 0));

    // What belongs to somebody else is neither used nor removed.
    let slot = rig::slot(&spec);
    client.batch_execute(&format!("CREATE PUBLICATION {slot}")).await.expect("publication");
    let error = upstream.create_retention(&spec, None).await.expect_err("conflict");
    assert_eq!(error.code(), "CDC:ErrUpstreamSlotConflict");
    upstream.drop_retention(&spec.changefeed).await.expect("drop");
    assert_eq!(client.query("SELECT FROM pg_publication", &[]).await.expect("publications").len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_slot_is_a_named_error_with_advice() {
    let server = rig::forgetful_server().await;
    let spec = spec(&server.uri("postgres"), &["*.*"]);
    let upstream = open(&spec);
    let report = upstream.check(&spec).await.expect("check");
    assert!(report.warnings.iter().any(|warning| warning.contains("max_slot_wal_keep_size")), "{report:?}");
    let start = upstream.create_retention(&spec, None).await.expect("create");
    rig::lose_slot(&server).await;
    let running = Running::resume(spec, start, start.start_ts, 1 << 20).await;
    let error = running.failed().await;
    assert_eq!(error.code(), "CDC:ErrStartTsBeforeGC", "{}", error.chain());
    assert!(error.to_string().contains("create it again"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_database_has_one_identity_whatever_its_address() {
    let server = PgServer::start().await.expect("server");
    server.sql("postgres", "CREATE DATABASE second").await.expect("database");
    let identity = async |uri: String| {
        let spec = spec(&uri, &["*.*"]);
        open(&spec).identity().await.expect("identity")
    };
    let one = identity(server.uri("postgres")).await;
    let same = identity(server.uri("postgres").replace("127.0.0.1", "localhost")).await;
    let other = identity(server.uri("second")).await;
    assert_eq!(one, same);
    assert_eq!(one.system, other.system);
    assert_ne!(one.database_oid, other.database_oid);
    assert_ne!(one.system, 0);
}

/// How many backends, slots and publications of ours there are.
async fn left(client: &tokio_postgres::Client) -> (i64, i64, i64) {
    let sql = "SELECT (SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'millrace create %'), \
               (SELECT count(*) FROM pg_replication_slots), (SELECT count(*) FROM pg_publication)";
    let row = client.query_one(sql, &[]).await.expect("it answers");
    (row.get(0), row.get(1), row.get(2))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_server_still_makes_for_a_node_that_died_is_ended_and_removed() {
    let server = PgServer::start().await.expect("server");
    server.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)").await.expect("table");
    let (mut holder, watch) =
        (server.client("postgres").await.expect("client"), server.client("postgres").await.expect("client"));
    // The publication waits for a lock; the slot waits for a transaction that was there before it.
    for hindrance in ["LOCK TABLE t IN ACCESS EXCLUSIVE MODE", "INSERT INTO t SELECT 1"] {
        let held = holder.transaction().await.expect("transaction");
        held.batch_execute(hindrance).await.expect("it is held");
        let wanted = spec(&server.uri("postgres"), &["public.t"]);
        let creation = tokio::spawn({
            let wanted = wanted.clone();
            async move { open(&wanted).create_retention(&wanted, None).await }
        });
        let waits = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE application_name LIKE 'millrace create %' \
                     AND wait_event_type = 'Lock')";
        rig::eventually("it waits", async || {
            watch.query_one(waits, &[]).await.expect("it answers").get::<_, bool>(0).then_some(())
        })
        .await;
        // As when its node is killed: the server does not notice before it has something to tell.
        creation.abort();
        assert!(creation.await.is_err(), "{hindrance}: it has not ended");
        assert_eq!(left(&watch).await.0, 1, "{hindrance}: it goes on");
        open(&wanted).drop_retention(&wanted.changefeed).await.expect("it is removed");
        assert_eq!(left(&watch).await, (0, 0, 0), "{hindrance}");
        held.rollback().await.expect("it is let go");
        assert_eq!(left(&watch).await, (0, 0, 0), "{hindrance}: nothing comes afterwards");
    }
}

/// What cannot be published of which table: columns, condition, words of the error. None of them quotes a condition.
const UNPUBLISHABLE: &[(&str, &[&str], &str, &str)] = &[
    ("public.nothing", &[], "", "entry 0 fits no table"),
    ("public.view", &[], "", "entry 0 fits no table"),
    ("public.t", &["id", "nope"], "", "public.t, for which entry 0 holds: it has no column \"nope\""),
    ("public.t", &["id", "ID"], "", "it has no column \"ID\""),
    ("public.t", &["region", "v"], "", "column \"id\" belongs to its key"),
    ("public.t", &["id", "twice"], "", "column \"twice\" is generated"),
    ("public.whole", &["id"], "", "its replica identity is FULL"),
    ("public.named", &["id", "v"], "", "column \"code\" belongs to its key or its replica identity"),
    ("public.t", &[], "region = 'secret'", "column \"region\", which is not in the replica identity"),
    (
        "public.t",
        &["id", "region"],
        "region = 'secret'",
        "column \"region\", which is not in the replica identity",
    ),
    ("public.t", &[], "id >", "is not one SQL expression"),
    ("public.t", &[], "id > 0)", "is not one SQL expression"),
    ("public.t", &[], "(id > 0", "is not one SQL expression"),
    ("public.t", &[], "id > 0; DROP TABLE t", "is not one SQL expression"),
    ("public.t", &[], "id > 0); DROP TABLE public.t; SELECT (1", "is not one SQL expression"),
    ("public.t", &[], "true) UNION SELECT 1 FROM public.whole WHERE (true", "is not one SQL expression"),
    ("public.t", &[], "true) AND (true", "is not one SQL expression"),
    ("public.t", &[], "true), TABLE public.whole WHERE (true", "is not one SQL expression"),
    ("public.t", &[], "true) WITH (publish = 'insert'", "is not one SQL expression"),
    ("public.t", &[], "id > 0 /* secret", "is not one SQL expression"),
    ("public.t", &[], "v = 'secret", "is not one SQL expression"),
    ("public.t", &[], "secret > 0", "no column of the table"),
    ("public.t", &[], "id = $1", "(SQLSTATE"),
    ("public.t", &[], "id", "is not true or false"),
    ("public.t", &[], "secret(id)", "PostgreSQL itself does not have"),
    ("public.t", &[], "public.own(id)", "more than a row filter may be"),
    ("public.t", &[], "now() > '2020-01-01'", "more than a row filter may be"),
    ("public.t", &[], "id IN (SELECT id FROM public.whole)", "more than a row filter may be"),
    ("public.t", &[], "count(*) > 1", "more than a row filter may be"),
    ("public.t", &[], "xmin = '5'", "more than a row filter may be"),
    ("public.t", &[], "id = 'secret'", "a constant that does not fit its type"),
];

#[tokio::test(flavor = "multi_thread")]
// behaviour: api-P-2
async fn what_cannot_be_published_is_refused_by_name_and_leaves_nothing() {
    let server = PgServer::start().await.expect("server");
    let tables = "CREATE TABLE t (id int PRIMARY KEY, region text NOT NULL, v text, \
          twice int GENERATED ALWAYS AS (id * 2) STORED); \
        CREATE TABLE whole (id int PRIMARY KEY, v text); ALTER TABLE whole REPLICA IDENTITY FULL; \
        CREATE TABLE named (id int PRIMARY KEY, code int NOT NULL, v text); CREATE UNIQUE INDEX named_i ON named (id, code); \
        ALTER TABLE named REPLICA IDENTITY USING INDEX named_i; CREATE VIEW view AS SELECT 1; \
        CREATE FUNCTION own(int) RETURNS bool LANGUAGE sql IMMUTABLE AS 'SELECT true'";
    server.sql("postgres", tables).await.expect("tables");
    let (uri, client) = (server.uri("postgres"), server.client("postgres").await.expect("client"));
    if version(&server).await < 15 {
        let (code, words) = refusal(&partial(&uri, &["public.*"], &[("public.t", &["id"], "")])).await;
        assert_eq!(code, "CDC:ErrFilterRuleInvalid", "{words}");
        assert!(words.contains("15 is the first"), "{words}");
        return;
    }
    let refused = async |parts: &[(&str, &[&str], &str)], words: &str| {
        let spec = partial(&uri, &["public.*"], parts);
        // As a creation does.
        let error = match open(&spec).check(&spec).await {
            Err(error) => error,
            Ok(_) => open(&spec).create_retention(&spec, None).await.expect_err(words),
        };
        assert_eq!(error.code(), "CDC:ErrFilterRuleInvalid", "{words}: {error}");
        let told = error.chain();
        assert!(told.contains(words) && told.starts_with("filter.publish: "), "{parts:?}: {told}");
        assert!(!told.contains("secret") && !told.contains("DROP"), "{told}");
        let left =
            "SELECT (SELECT count(*) FROM pg_publication) + (SELECT count(*) FROM pg_replication_slots)";
        let left: i64 = client.query_one(left, &[]).await.expect("look").get(0);
        assert_eq!(left, 0, "{words}");
    };
    for (matcher, columns, condition, words) in UNPUBLISHABLE {
        refused(&[(matcher, columns, condition)], words).await;
    }
    refused(&[("public.*", &[], ""), ("public.t", &["id"], "")], "entry 1 fits no table").await;
    let mut captured = partial(&uri, &["public.*"], &[("public.t", &["id"], "")]);
    captured.ddl.capture = heartbeatpb::config::DdlCapture::On;
    assert!(refusal(&captured).await.1.contains("ddl.capture"));
    client.query_one("SELECT count(*) FROM t", &[]).await.expect("it is still there");

    // What ends in a comment is one expression; of tables for which no entry holds, all is published.
    let spec = partial(
        &uri,
        &["public.*"],
        &[("public.t", &["v", "id"], "id > 5 -- all"), ("public.named", &[], "code = 1 OR id = 1")],
    );
    let report = open(&spec).check(&spec).await.expect("check");
    assert_eq!(report.eligible.len(), 3, "{report:?}");
    open(&spec).create_retention(&spec, None).await.expect("create");
    let tables = open(&spec).check(&spec).await.expect("check").eligible;
    let part = |name: &str| {
        let table = tables.iter().find(|table| table.info.name == name).expect("table");
        let columns: Vec<&str> = table.info.columns.iter().map(|column| column.name.as_str()).collect();
        (columns.join(","), table.part.condition.clone().unwrap_or_default())
    };
    assert_eq!(part("t"), ("id,v".to_owned(), "(id > 5)".to_owned()));
    assert_eq!(part("named"), ("id,code,v".to_owned(), "((code = 1) OR (id = 1))".to_owned()));
    assert_eq!(part("whole"), ("id,v".to_owned(), String::new()));
    open(&spec).drop_retention(&spec.changefeed).await.expect("drop");
}
