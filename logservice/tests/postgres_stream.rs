//! A real server's changes come out of the store as they were made.

mod rig;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use event::RowOp;
use heartbeatpb::{MaintainerEpoch, Ts};
use logservice::event_store::Position;
use logservice::upstream::ReaderPhase;
use rig::{Running, content, eventually, replay, spec};
use testkit::{PgServer, StopMode};

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_change_arrives_with_its_images() {
    let server = PgServer::start().await.expect("server");
    server
        .sql(
            "postgres",
            "CREATE TABLE t (id int PRIMARY KEY, a text, big text, twice int GENERATED ALWAYS AS (id * 2) STORED);
             ALTER TABLE t ALTER big SET STORAGE EXTERNAL;
             CREATE TABLE f (a int, big text); ALTER TABLE f REPLICA IDENTITY FULL;
             ALTER TABLE f ALTER big SET STORAGE EXTERNAL;
             CREATE TABLE p (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
             CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10);
             CREATE TABLE p2 PARTITION OF p FOR VALUES FROM (10) TO (20);
             CREATE TABLE other (id int PRIMARY KEY);",
        )
        .await
        .expect("tables");
    let mut spec = spec(&server.uri("postgres"), &["public.*", "!public.other"]);
    spec.force_replicate = true;
    let running = Running::start(spec).await;
    server
        .sql(
            "postgres",
            "INSERT INTO t VALUES (1, 'x', repeat('y', 4000)), (2, NULL, '');
             UPDATE t SET a = 'z' WHERE id = 1;
             UPDATE t SET id = 3 WHERE id = 1;
             DELETE FROM t WHERE id = 2;
             TRUNCATE t;
             INSERT INTO f VALUES (1, repeat('k', 4000)), (1, NULL);
             UPDATE f SET a = 2 WHERE big IS NOT NULL;
             DELETE FROM f;
             INSERT INTO p VALUES (1, 'one');
             UPDATE p SET v = 'uno' WHERE id = 1;
             UPDATE p SET id = 11 WHERE id = 1;
             TRUNCATE p;
             INSERT INTO other VALUES (1);",
        )
        .await
        .expect("changes");
    running.catch_up().await;
    let (y, k) = ("y".repeat(4000), "k".repeat(4000));
    assert_eq!(
        running.history("t"),
        [
            format!("Insert new 1,x,{y},<unchanged>"),
            "Insert new 2,<null>,,<unchanged>".to_owned(),
            "Update new 1,z,<unchanged>,<unchanged>".to_owned(),
            "Update old 1,<unchanged>,<unchanged>,<unchanged> new 3,z,<unchanged>,<unchanged>".to_owned(),
            "Delete old 2,<unchanged>,<unchanged>,<unchanged>".to_owned(),
            "Truncate".to_owned(),
        ]
    );
    // With a full identity an untouched out-of-line value is taken from the old image.
    assert_eq!(
        running.history("f"),
        [
            format!("Insert new 1,{k}"),
            "Insert new 1,<null>".to_owned(),
            format!("Update old 1,{k} new 2,{k}"),
            "Delete old 1,<null>".to_owned(),
            format!("Delete old 2,{k}"),
        ]
    );
    assert_eq!(
        running.history("p"),
        ["Insert new 1,one", "Update new 1,uno", "Delete old 1,<unchanged>", "Insert new 11,uno", "Truncate"]
    );
    assert!(!running.tables.contains_key("other"));
    assert_eq!(running.progress.log_rows.load(Ordering::Relaxed), 16);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn values_of_every_type_are_the_servers_text_in_copy_and_stream() {
    const TYPES: &[(&str, &str)] = &[
        ("bool", "true"),
        ("smallint", "-32768"),
        ("int", "2147483647"),
        ("bigint", "-9223372036854775808"),
        ("real", "1.1::real"),
        ("real", "'-Infinity'"),
        ("float8", "0.1::float8 + 0.2::float8"),
        ("float8", "'NaN'"),
        ("numeric(40,10)", "123456789012345678901234567890.0123456789"),
        ("numeric", "'NaN'"),
        ("char(5)", "'ab'"),
        ("varchar(20)", "E'tab\\there'"),
        ("text", "E'back\\\\slash \\n new \\r line \\\\N ''quoted'' \\u00e9 \\U0001F600'"),
        ("text", "''"),
        ("text", "NULL"),
        ("\"char\"", "'x'"),
        ("name", "'some_name'"),
        ("bytea", "'\\x00ff5c0a'"),
        ("date", "'0044-03-15 BC'"),
        ("date", "'infinity'"),
        ("time(3)", "'12:34:56.789'"),
        ("timetz", "'12:34:56.789+05:30'"),
        ("timestamp", "'2024-02-29 23:59:59.999999'"),
        ("timestamptz", "'2024-07-01 12:00:00.5+02'"),
        ("timestamptz", "'-infinity'"),
        ("interval", "'1 year 2 mons -3 days 04:05:06.789'"),
        ("uuid", "'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'"),
        ("json", "'{\"b\": 1,  \"a\": [null, \"x\\\\ny\"]}'"),
        ("jsonb", "'{\"b\": 1,  \"a\": [null, \"x\\\\ny\"]}'"),
        ("bit(5)", "B'10101'"),
        ("bit varying", "B'0011'"),
        ("xml", "'<a>&lt;</a>'"),
        ("money", "1234.5::money"),
        ("inet", "'192.168.0.1/24'"),
        ("cidr", "'10.0.0.0/8'"),
        ("macaddr", "'08:00:2b:01:02:03'"),
        ("point", "'(1.5,-2)'"),
        ("polygon", "'((0,0),(1,1),(1,0))'"),
        ("int[]", "'{{1,NULL},{3,4}}'"),
        ("text[]", "ARRAY['a,b', 'c\"d', 'e\\f', NULL, 'NULL', '']"),
        ("tsvector", "to_tsvector('english', 'the quick foxes')"),
        ("int4range", "'[1,5)'"),
        ("tstzrange", "'[2024-01-01 00:00+00, 2024-02-01 00:00+01)'"),
        ("int4multirange", "'{[1,3), [5,8)}'"),
        ("oid", "4294967295"),
        ("regclass", "'app.things'::regclass"),
        ("app.mood", "'so so'"),
        ("app.mood[]", "'{happy,\"so so\"}'"),
        ("app.positive", "7"),
        ("app.pair", "ROW(1, 'a,b')"),
        ("app.span", "'[1.5,2.5]'"),
        ("app.\"Odd Name\"", "'x'"),
    ];
    let server = PgServer::start().await.expect("server");
    let columns: Vec<String> = TYPES.iter().enumerate().map(|(i, (ty, _))| format!("c{i} {ty}")).collect();
    let values: Vec<&str> = TYPES.iter().map(|(_, value)| *value).collect();
    server
        .sql(
            "postgres",
            &format!(
                "CREATE SCHEMA app;
                 CREATE TABLE app.things (id int);
                 CREATE TYPE app.mood AS ENUM ('happy', 'so so');
                 CREATE DOMAIN app.positive AS int CONSTRAINT above CHECK (VALUE > 0);
                 CREATE TYPE app.pair AS (a app.positive, b text);
                 CREATE TYPE app.span AS RANGE (subtype = numeric);
                 CREATE DOMAIN app.\"Odd Name\" AS text DEFAULT 'd' NOT NULL;
                 CREATE TABLE app.m (id int PRIMARY KEY, {});
                 INSERT INTO app.m VALUES (1, {values});",
                columns.join(","),
                values = values.join(",")
            ),
        )
        .await
        .expect("table");
    // Settings of the role must not show in the values.
    server
        .sql(
            "postgres",
            "ALTER ROLE postgres SET datestyle = 'SQL, DMY'; ALTER ROLE postgres SET extra_float_digits = -3;
             ALTER ROLE postgres SET bytea_output = 'escape'; ALTER ROLE postgres SET intervalstyle = 'iso_8601'",
        )
        .await
        .expect("settings");
    let mut spec = spec(&server.uri("postgres"), &["app.m"]);
    spec.initial_copy = true;
    let running = Running::start(spec).await;
    server
        .sql("postgres", &format!("INSERT INTO app.m VALUES (2, {})", values.join(",")))
        .await
        .expect("insert");
    running.catch_up().await;

    let client = server.client("postgres").await.expect("client");
    client
        .batch_execute(
            "SET datestyle = 'ISO'; SET timezone = 'UTC'; SET extra_float_digits = 3; SET bytea_output = 'hex';
             SET intervalstyle = 'postgres'; SET search_path = ''; SET lc_monetary = 'C'",
        )
        .await
        .expect("settings");
    // What an output function gives is what simple queries show; a cast to text may differ.
    let simple = client.simple_query("SELECT * FROM app.m WHERE id = 1").await.expect("row");
    let expected: Vec<String> = simple
        .iter()
        .find_map(|message| {
            let tokio_postgres::SimpleQueryMessage::Row(row) = message else { return None };
            Some((1..row.len()).map(|i| row.get(i).unwrap_or("<null>").to_owned()).collect())
        })
        .expect("a row");
    let changes = running.changes("m");
    assert_eq!(
        changes.iter().map(|change| change.op).collect::<Vec<_>>(),
        [RowOp::CopyStart, RowOp::Insert, RowOp::Insert]
    );
    for change in &changes[1..] {
        let values = &change.new.as_ref().expect("image")[1..];
        for (i, (value, expected)) in values.iter().zip(&expected).enumerate() {
            assert_eq!(value, expected, "{:?}", TYPES[i]);
        }
    }
    let info = &running.tables["m"];
    let definitions: Vec<&str> = info
        .columns
        .iter()
        .flat_map(|column| &column.ty.definitions)
        .map(|definition| definition.create_sql.as_str())
        .collect();
    assert_eq!(
        definitions,
        [
            r#"CREATE TYPE "app"."mood" AS ENUM ('happy', 'so so')"#,
            r#"CREATE TYPE "app"."mood" AS ENUM ('happy', 'so so')"#,
            r#"CREATE DOMAIN "app"."positive" AS integer CONSTRAINT "above" CHECK ((VALUE > 0))"#,
            r#"CREATE DOMAIN "app"."positive" AS integer CONSTRAINT "above" CHECK ((VALUE > 0))"#,
            r#"CREATE TYPE "app"."pair" AS ("a" app.positive, "b" text)"#,
            r#"CREATE TYPE "app"."span" AS RANGE (SUBTYPE = numeric, MULTIRANGE_TYPE_NAME = "app".span_multirange)"#,
            r#"CREATE DOMAIN "app"."Odd Name" AS text DEFAULT 'd'::text NOT NULL"#,
        ]
    );
    // The statements work on another database.
    server.sql("postgres", "CREATE DATABASE copy").await.expect("database");
    let mut unique = definitions.clone();
    unique.dedup();
    server.sql("copy", &format!("CREATE SCHEMA app; {}", unique.join("; "))).await.expect("definitions");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn copy_and_stream_meet_without_a_gap_or_an_overlap() {
    let server = PgServer::start().await.expect("server");
    server
        .sql(
            "postgres",
            "CREATE TABLE a (id int PRIMARY KEY, v int); INSERT INTO a SELECT g, 0 FROM generate_series(1, 20000) g;
             CREATE TABLE b (id int PRIMARY KEY, v int); INSERT INTO b SELECT g, 0 FROM generate_series(1, 20000) g;
             CREATE TABLE nothing (id int PRIMARY KEY)",
        )
        .await
        .expect("tables");
    let mut spec = spec(&server.uri("postgres"), &["*.*"]);
    spec.initial_copy = true;
    let upstream = logservice::upstream::open(&spec.upstream_uri).expect("uri");
    let start = upstream.create_retention(&spec, None).await.expect("retention");
    let client = Arc::new(server.client("postgres").await.expect("client"));
    let busy = tokio::spawn({
        let client = Arc::clone(&client);
        async move {
            for round in 1..=150 {
                let sql = format!(
                    "BEGIN; UPDATE a SET v = {round} WHERE id % 97 = {round} % 97;
                     UPDATE b SET v = {round} WHERE id % 97 = {round} % 97;
                     DELETE FROM a WHERE id = {round}; INSERT INTO b VALUES (20000 + {round}, {round}); COMMIT"
                );
                client.batch_execute(&sql).await.expect("round");
            }
        }
    });
    let running = Running::resume(spec, start, start.start_ts, 256 << 20).await;
    busy.await.expect("busy");
    running.catch_up().await;
    for table in ["a", "b"] {
        let changes = running.changes(table);
        assert_eq!(changes[0].op, RowOp::CopyStart);
        assert!(changes[0].commit_ts > start.start_ts);
        assert!(changes.is_sorted_by_key(|change| change.commit_ts));
        assert_eq!(replay(&changes), content(&server, "postgres", table, &["id", "v"]).await, "{table}");
    }
    assert_eq!(running.history("nothing"), ["CopyStart"]);
    assert_eq!(running.progress.copy_tables_done.load(Ordering::Relaxed), 3);
    assert_eq!(running.progress.copy_tables_total.load(Ordering::Relaxed), 3);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_breaks_begins_again_with_a_new_snapshot() {
    let server = PgServer::start().await.expect("server");
    server
        .sql(
            "postgres",
            "CREATE TABLE t (id int PRIMARY KEY, v text);
             INSERT INTO t SELECT g, repeat('x', 1000) FROM generate_series(1, 20000) g;",
        )
        .await
        .expect("table");
    let mut spec = spec(&server.uri("postgres"), &["*.*"]);
    spec.initial_copy = true;
    let upstream = logservice::upstream::open(&spec.upstream_uri).expect("uri");
    let start = upstream.create_retention(&spec, None).await.expect("retention");
    // The store is too small for the table, so the copy is in its middle until somebody takes the rows.
    let running = Running::resume(spec, start, start.start_ts, 1 << 20).await;
    eventually("the copy has begun", async || {
        (running.progress.copy_rows.load(Ordering::Relaxed) > 0).then_some(())
    })
    .await;
    assert_eq!(running.progress.phase(), ReaderPhase::Copying);
    server.restart(StopMode::Immediate).await.expect("restart");
    server
        .sql("postgres", "UPDATE t SET v = 'y' WHERE id <= 10; DELETE FROM t WHERE id = 20")
        .await
        .expect("changes");
    assert_eq!(running.store.resolved().0, start.start_ts);
    let target = upstream.current_position().await.expect("position").start_ts;
    let table = running.tables["t"].id;
    let (mut changes, mut at) = (Vec::new(), Position::default());
    eventually("everything arrives", async || {
        let done = running.store.resolved().0 >= target;
        rig::take(&running.store, table, &mut at, &mut changes);
        running.store.trim(table, start.start_ts, Some(at));
        done.then_some(())
    })
    .await;
    let copies = changes.iter().filter(|change| change.op == RowOp::CopyStart).map(|change| change.commit_ts);
    let copies: Vec<Ts> = copies.collect();
    assert_eq!(copies.len(), 2);
    assert!(start.start_ts < copies[0] && copies[0] < copies[1]);
    assert!(changes.is_sorted_by_key(|change| change.commit_ts));
    assert_eq!(replay(&changes), content(&server, "postgres", "t", &["id", "v"]).await);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_waits_for_a_transaction_says_so_and_can_be_stopped() {
    let server = PgServer::start().await.expect("server");
    server.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)").await.expect("table");
    let mut spec = spec(&server.uri("postgres"), &["*.*"]);
    spec.initial_copy = true;
    let upstream = logservice::upstream::open(&spec.upstream_uri).expect("uri");
    let start = upstream.create_retention(&spec, None).await.expect("retention");
    let slow = server.client("postgres").await.expect("client");
    slow.batch_execute("BEGIN; INSERT INTO t VALUES (1)").await.expect("begin");
    let running = Running::resume(spec, start, start.start_ts, 1 << 20).await;
    eventually("the reader says what it waits for", async || {
        running.progress.last_error().filter(|error| error.contains("transactions that are running"))
    })
    .await;
    running.stop().await;
    slow.batch_execute("COMMIT").await.expect("commit");
    let client = server.client("postgres").await.expect("client");
    eventually("the temporary slot is gone", async || {
        let rows =
            client.query("SELECT FROM pg_replication_slots WHERE temporary", &[]).await.expect("slots");
        rows.is_empty().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn restarts_and_crashes_of_the_server_neither_lose_nor_repeat_a_row() {
    let server = PgServer::builder().setting("fsync", "on").start().await.expect("server");
    server.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY, v text)").await.expect("table");
    let running = Running::start(spec(&server.uri("postgres"), &["*.*"])).await;
    let mut next = 0;
    for round in 0..4 {
        for _ in 0..5 {
            let sql = format!("INSERT INTO t SELECT g, 'v' FROM generate_series({next}, {next} + 999) g");
            server.sql("postgres", &sql).await.expect("insert");
            next += 1000;
        }
        match round {
            0 => server.restart(StopMode::Immediate).await.expect("restart"),
            1 => {
                server.kill().expect("kill");
                server.resume().await.expect("resume");
            }
            2 => {
                // Half of what was read is confirmed when the connection breaks.
                running.catch_up().await;
                running.persisted.send_replace(running.changes("t")[9_999].commit_ts);
                server
                    .sql("postgres", "SELECT pg_terminate_backend(pid) FROM pg_stat_replication")
                    .await
                    .expect("terminate");
            }
            _ => {}
        }
    }
    running.catch_up().await;
    let changes = running.changes("t");
    assert_eq!(changes.len(), 20_000);
    assert!(changes.is_sorted_by_key(|change| change.commit_ts));
    assert_eq!(replay(&changes).len(), 20_000);
    assert!(running.progress.reconnects.load(Ordering::Relaxed) >= 3);
    // A second reader that resumes at a checkpoint gets exactly what is after it.
    let middle = changes[9_999].commit_ts;
    let (spec, start) = (running.spec.clone(), running.start);
    running.stop().await;
    let resumed = Running::resume(spec, start, middle, 256 << 20).await;
    resumed.catch_up().await;
    let expected: Vec<_> = changes.into_iter().filter(|change| change.commit_ts > middle).collect();
    assert_eq!(resumed.changes("t"), expected);
    resumed.stop().await;
}

// behaviour: dataplane-11
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_changefeed_lets_the_server_forget_its_log() {
    let server = PgServer::start().await.expect("server");
    server
        .sql("postgres", "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE noise (id int)")
        .await
        .expect("tables");
    server.sql("postgres", "CREATE DATABASE elsewhere").await.expect("database");
    let running = Running::start(spec(&server.uri("postgres"), &["public.t"])).await;
    for (database, sql) in [
        ("postgres", "INSERT INTO noise SELECT generate_series(1, 1000)"),
        ("elsewhere", "CREATE TABLE n AS SELECT generate_series(1, 1000)"),
    ] {
        server.sql(database, sql).await.expect("noise");
        let position = running.upstream.current_position().await.expect("position").start_ts;
        running.reach(position).await;
        running.persisted.send_replace(running.store.resolved().0);
        let client = server.client("postgres").await.expect("client");
        eventually("the slot follows", async || {
            let row = client
                .query_one("SELECT (confirmed_flush_lsn - '0/0')::bigint FROM pg_replication_slots", &[])
                .await
                .expect("slot");
            (u64::try_from(row.get::<_, i64>(0)).expect("position") >= position.0).then_some(())
        })
        .await;
    }
    // Without any news the time still goes on, so that an idle changefeed does not seem to lag.
    let before = running.store.resolved().1;
    eventually("time goes on", async || (running.store.resolved().1 > before).then_some(())).await;
    assert_eq!(running.history("t"), [] as [String; 0]);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_is_persisted_is_confirmed() {
    let server = PgServer::start().await.expect("server");
    server.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)").await.expect("table");
    let running = Running::start(spec(&server.uri("postgres"), &["*.*"])).await;
    server.sql("postgres", "INSERT INTO t SELECT generate_series(1, 1000)").await.expect("insert");
    running.catch_up().await;
    // Several status updates go out meanwhile.
    let since = running.store.resolved().1;
    eventually("three seconds pass", async || {
        (since.seconds_until(running.store.resolved().1) > 3.0).then_some(())
    })
    .await;
    let client = server.client("postgres").await.expect("client");
    let row = client
        .query_one("SELECT (confirmed_flush_lsn - '0/0')::bigint FROM pg_replication_slots", &[])
        .await
        .expect("slot");
    assert_eq!(u64::try_from(row.get::<_, i64>(0)).expect("position"), running.start.start_ts.0);
    running.stop().await;
}

// A checkpoint may be any number: the maintainer's is often one less than the end of the oldest transaction that is not
// downstream. The server skips a transaction whose commit record begins before the position that it is asked for.
#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_inside_a_commit_record_does_not_lose_its_transaction() {
    let server = PgServer::start().await.expect("server");
    server.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)").await.expect("table");
    let running = Running::start(spec(&server.uri("postgres"), &["*.*"])).await;
    for id in 0..20 {
        server.sql("postgres", &format!("INSERT INTO t VALUES ({id})")).await.expect("insert");
    }
    running.catch_up().await;
    let changes = running.changes("t");
    let (spec, start) = (running.spec.clone(), running.start);
    running.stop().await;
    // One after the other, each in the log of the one before: also confirmed positions must leave it alone.
    for (lost, back) in [(5, 1), (10, 8), (15, 1)] {
        let checkpoint = Ts(changes[lost].commit_ts.0 - back);
        let resumed = Running::resume(spec.clone(), start, checkpoint, 256 << 20).await;
        resumed.catch_up().await;
        assert_eq!(
            resumed.changes("t"),
            changes[lost..],
            "from {checkpoint}, {back} before a transaction's end"
        );
        let last = changes[changes.len() - 1].commit_ts;
        resumed.persisted.send_replace(if lost == 15 { last } else { checkpoint });
        eventually("an end of a transaction is confirmed", async || {
            let confirmed = resumed.progress.confirmed.load(Ordering::Relaxed);
            (lost < 15 || confirmed == last.0).then_some(())
        })
        .await;
        resumed.stop().await;
    }
}

/// A reader with a small store, waiting for room in the middle of forty transactions of a thousand rows.
async fn waiting_for_room(server: &PgServer) -> Running {
    server.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY, v text)").await.expect("table");
    let spec = spec(&server.uri("postgres"), &["*.*"]);
    let upstream = logservice::upstream::open(&spec.upstream_uri).expect("uri");
    let start = upstream.create_retention(&spec, None).await.expect("retention");
    let running = Running::resume(spec, start, start.start_ts, 1 << 20).await;
    for round in 0..40 {
        let sql = format!(
            "INSERT INTO t SELECT g, repeat('x', 1000) FROM generate_series({round}000, {round}999) g"
        );
        server.sql("postgres", &sql).await.expect("insert");
    }
    eventually("the reader waits", async || {
        (running.progress.phase() == ReaderPhase::WaitingForRoom).then_some(())
    })
    .await;
    running
}

/// Makes room by and by until everything has come; the transactions must come once and in order.
async fn take_everything(running: &Running) {
    let table = running.tables["t"].id;
    let mut transactions: Vec<(Ts, usize)> = Vec::new();
    eventually("everything arrives", async || {
        let done = transactions.last().map_or(Ts::ZERO, |(ts, _)| *ts);
        for change in rig::changes_after(&running.store, table, done) {
            match transactions.last_mut() {
                Some((ts, rows)) if *ts == change.commit_ts => *rows += 1,
                _ => transactions.push((change.commit_ts, 1)),
            }
        }
        let done = transactions.last().map_or(Ts::ZERO, |(ts, _)| *ts);
        running.store.trim(table, done, None);
        (transactions.len() >= 40).then_some(())
    })
    .await;
    assert!(transactions.is_sorted());
    assert_eq!(transactions.iter().map(|(_, rows)| *rows).collect::<Vec<_>>(), [1000; 40]);
    running.catch_up().await;
    assert_eq!(rig::changes_after(&running.store, table, transactions[39].0), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_store_stops_reading_and_keeps_the_connection() {
    let server = PgServer::builder().setting("wal_sender_timeout", "2s").start().await.expect("server");
    let running = waiting_for_room(&server).await;
    let rows = running.progress.log_rows.load(Ordering::Relaxed);
    assert!(rows < 40_000);
    // Longer than the server's patience with a silent reader.
    let before = running.upstream.current_position().await.expect("position").time;
    eventually("the server's patience is over", async || {
        let now = running.upstream.current_position().await.expect("position").time;
        (before.seconds_until(now) > 5.0).then_some(())
    })
    .await;
    let client = server.client("postgres").await.expect("client");
    let row = client.query_one("SELECT count(*) FROM pg_stat_replication", &[]).await.expect("count");
    assert_eq!(row.get::<_, i64>(0), 1);
    assert_eq!(running.progress.log_rows.load(Ordering::Relaxed), rows);
    take_everything(&running).await;
    assert_eq!(running.progress.reconnects.load(Ordering::Relaxed), 0);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_restarts_while_the_store_is_full_repeats_nothing() {
    let server = PgServer::start().await.expect("server");
    let running = waiting_for_room(&server).await;
    server.restart(StopMode::Immediate).await.expect("restart");
    // Some status updates go into the void.
    let before = running.upstream.current_position().await.expect("position").time;
    eventually("the reader tries to report", async || {
        let now = running.upstream.current_position().await.expect("position").time;
        (before.seconds_until(now) > 3.0).then_some(())
    })
    .await;
    assert_eq!(running.progress.phase(), ReaderPhase::WaitingForRoom);
    take_everything(&running).await;
    assert!(running.progress.reconnects.load(Ordering::Relaxed) >= 1);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_schema_is_a_named_error() {
    let server = PgServer::start().await.expect("server");
    for (change, expected) in [
        ("ADD COLUMN c int", "column \"c\" is new"),
        ("DROP COLUMN b", "column \"b\" is gone"),
        ("RENAME COLUMN b TO bb", "column \"bb\" is where \"b\" was"),
        ("ALTER COLUMN b TYPE varchar(9)", "the type of column \"b\" is not text any more"),
        ("REPLICA IDENTITY FULL", "its replica identity is now 'f'"),
        ("RENAME TO u", "its name is now public.u"),
    ] {
        server.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY, b text)").await.expect("table");
        let running = Running::start(spec(&server.uri("postgres"), &["*.*"])).await;
        server.sql("postgres", "INSERT INTO t VALUES (1, 'x')").await.expect("before");
        running.catch_up().await;
        let upstream = Arc::clone(&running.upstream);
        let changefeed = running.spec.changefeed.clone();
        server.sql("postgres", &format!("ALTER TABLE t {change}")).await.expect(change);
        let table = if change.starts_with("RENAME TO") { "u" } else { "t" };
        server.sql("postgres", &format!("INSERT INTO {table} (id) VALUES (2)")).await.expect("after");
        let error = running.failed().await;
        assert_eq!(error.code(), "CDC:ErrSchemaChangeUnsupported", "{change}: {error}");
        assert!(error.to_string().contains(expected), "{change}: {error}");
        assert!(error.to_string().contains("public.t"), "{error}");
        upstream.drop_retention(&changefeed).await.expect("drop");
        server.sql("postgres", &format!("DROP TABLE {table}")).await.expect("clean");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_reader_takes_the_slot_and_an_older_one_gives_way() {
    let server = PgServer::start().await.expect("server");
    server.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)").await.expect("table");
    let first = Running::start(spec(&server.uri("postgres"), &["*.*"])).await;
    first.catch_up().await;
    let mut newer = first.spec.clone();
    newer.epoch = MaintainerEpoch::from_wire(2);
    let second = Running::resume(newer, first.start, first.start.start_ts, 1 << 20).await;
    let error = first.failed().await;
    assert_eq!(error.code(), "CDC:ErrReaderSuperseded");
    server.sql("postgres", "INSERT INTO t VALUES (1)").await.expect("insert");
    second.catch_up().await;
    assert_eq!(second.history("t"), ["Insert new 1"]);
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_former_reader_that_may_not_be_ended_is_named_and_waited_for() {
    let server = PgServer::start().await.expect("server");
    let other = "CREATE TABLE t (id int PRIMARY KEY); \
        CREATE ROLE other LOGIN REPLICATION PASSWORD 'p'; GRANT SELECT ON t TO other";
    server.sql("postgres", other).await.expect("table and role");
    let first = Running::start(spec(&server.uri("postgres"), &["*.*"])).await;
    first.catch_up().await;
    // Without a view of other roles' connections, and with one.
    for (epoch, grant) in [(2, ""), (3, "GRANT pg_read_all_stats TO other")] {
        server.sql("postgres", grant).await.expect("grant");
        let mut newer = first.spec.clone();
        newer.epoch = MaintainerEpoch::from_wire(epoch);
        newer.upstream_uri = server.uri_as("other", "p", "postgres");
        let second = Running::resume(newer, first.start, first.start.start_ts, 1 << 20).await;
        let (code, words) = eventually("it is named", async || {
            let failure = second.progress.last_failure();
            assert!(second.progress.phase() != ReaderPhase::Stopped, "{failure:?}");
            failure.filter(|(code, _)| *code == "CDC:ErrUpstreamSlotHeld")
        })
        .await;
        assert!(words.contains("wal_sender_timeout (1min)"), "{code}: {words}");
        assert!(words.contains("pg_terminate_backend("), "{words}");
        second.stop().await;
    }
    assert!(first.progress.connected.load(Ordering::Relaxed), "nobody took the slot");
    first.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_published_behind_our_back_is_an_error_once_it_has_rows() {
    let server = PgServer::start().await.expect("server");
    server.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)").await.expect("table");
    let running = Running::start(spec(&server.uri("postgres"), &["public.*"])).await;
    running.catch_up().await;
    // A reader that has not looked yet would know the table from the beginning.
    eventually("the reader knows its tables", async || {
        running.progress.connected.load(Ordering::Relaxed).then_some(())
    })
    .await;
    let publication = format!("millrace_test_{:08x}", running.spec.changefeed.gid.high >> 32);
    server
        .sql(
            "postgres",
            &format!(
                "CREATE TABLE late (id int PRIMARY KEY); CREATE SCHEMA s; CREATE TABLE s.unwanted (id int PRIMARY KEY);
                 ALTER PUBLICATION {publication} ADD TABLE late, s.unwanted; INSERT INTO s.unwanted VALUES (1)"
            ),
        )
        .await
        .expect("publish");
    running.catch_up().await;
    server.sql("postgres", "INSERT INTO late VALUES (1)").await.expect("insert");
    let error = running.failed().await;
    assert_eq!(error.code(), "CDC:ErrSchemaChangeUnsupported");
    assert!(error.to_string().contains("public.late"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn partitions_that_come_later_belong_to_their_table() {
    let server = PgServer::start().await.expect("server");
    server
        .sql(
            "postgres",
            "CREATE TABLE p (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
             CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10); INSERT INTO p VALUES (1, 'old')",
        )
        .await
        .expect("tables");
    let mut spec = spec(&server.uri("postgres"), &["public.*"]);
    spec.initial_copy = true;
    let running = Running::start(spec).await;
    running.reach(running.start.start_ts.after()).await;
    server
        .sql(
            "postgres",
            "CREATE TABLE p2 PARTITION OF p FOR VALUES FROM (10) TO (20);
             INSERT INTO p VALUES (11, 'new'); UPDATE p SET v = 'moved', id = 12 WHERE id = 1",
        )
        .await
        .expect("changes");
    running.catch_up().await;
    assert_eq!(
        running.history("p"),
        [
            "CopyStart",
            "Insert new 1,old",
            "Insert new 11,new",
            "Delete old 1,<unchanged>",
            "Insert new 12,moved"
        ]
    );
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strange_names_are_quoted_everywhere() {
    let server = PgServer::start().await.expect("server");
    server
        .sql(
            "postgres",
            "CREATE SCHEMA \"S'ch \"\"q\";
             CREATE TABLE \"S'ch \"\"q\".\"T\\ \"\"name\" (\"I'd\" int PRIMARY KEY, \"se\"\"lect\" text, \"ü\" int);
             INSERT INTO \"S'ch \"\"q\".\"T\\ \"\"name\" VALUES (1, 'a', 2);
             CREATE TABLE empty (); ALTER TABLE empty REPLICA IDENTITY FULL; INSERT INTO empty DEFAULT VALUES",
        )
        .await
        .expect("tables");
    let mut spec = spec(&server.uri("postgres"), &["\"S'ch \"\"q\".*", "public.empty"]);
    spec.initial_copy = true;
    spec.force_replicate = true;
    spec.changefeed.name = "Ünïcode' \"feed\"".into();
    let running = Running::start(spec).await;
    // The copy is complete; its snapshot may have been taken any time after the start.
    running.reach(running.start.start_ts.after()).await;
    server
        .sql("postgres", "DELETE FROM \"S'ch \"\"q\".\"T\\ \"\"name\"; INSERT INTO empty DEFAULT VALUES")
        .await
        .expect("changes");
    running.catch_up().await;
    assert_eq!(
        running.history("T\\ \"name"),
        ["CopyStart", "Insert new 1,a,2", "Delete old 1,<unchanged>,<unchanged>"]
    );
    assert_eq!(running.history("empty"), ["CopyStart", "Insert new ", "Insert new "]);
    running.upstream.drop_retention(&running.spec.changefeed).await.expect("drop");
    assert_eq!(running.failed().await.code(), "CDC:ErrStartTsBeforeGC");
}
