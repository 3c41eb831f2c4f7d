//! Every kind of change, value and name.

use std::sync::atomic::Ordering;

use event::RowOp;
use heartbeatpb::Ts;
use heartbeatpb::config::DdlPolicy;
use testkit::PgServer;

use crate::rig::{Running, changes, spec};

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

// behaviour: dataplane-12
#[tokio::test(flavor = "multi_thread")]
async fn a_truncation_obeys_the_policy_unless_it_was_passed_under_another() {
    let server = PgServer::start().await.expect("server");
    server
        .sql("postgres", "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY)")
        .await
        .expect("tables");
    // Schema changes are not captured.
    let mut ignore = spec(&server.uri("postgres"), &["*.*"]);
    ignore.ddl.truncate_table = DdlPolicy::Ignore;
    let mut fail = ignore.clone();
    fail.ddl.truncate_table = DdlPolicy::Fail;
    let running = Running::start(fail.clone()).await;
    for sql in [
        "INSERT INTO a VALUES (1)",
        "INSERT INTO b VALUES (2); TRUNCATE a, b; INSERT INTO b VALUES (3)",
        "INSERT INTO a VALUES (4)",
    ] {
        server.sql("postgres", sql).await.expect(sql);
    }
    let (start, store, tables) =
        (running.start, std::sync::Arc::clone(&running.store), running.tables.clone());
    let refused = async |running: Running| {
        let error = running.failed().await;
        assert_eq!(error.code(), "CDC:ErrSchemaChangeUnsupported");
        let text = error.to_string();
        assert!(text.contains("public.a, public.b ") && text.contains("ddl.truncate-table is"), "{text}");
    };
    refused(running).await;
    let came = |table: &str| changes(&store, tables[table].id).iter().map(ToString::to_string).collect();
    let (a, b): (Vec<String>, Vec<String>) = (came("a"), came("b"));
    assert_eq!((a, b), (vec!["Insert new 1".to_owned()], Vec::new()), "what is in front of it");

    let running = Running::resume(ignore, start, start.start_ts, 1 << 20).await;
    running.catch_up().await;
    assert_eq!(running.history("a"), ["Insert new 1", "Insert new 4"]);
    assert_eq!(running.history("b"), ["Insert new 2", "Insert new 3"]);
    let end = running.changes("b")[0].commit_ts;
    running.stop().await;

    // Nothing was confirmed, so the server repeats everything.
    let running = Running::resume(fail.clone(), start, end, 1 << 20).await;
    running.catch_up().await;
    assert_eq!(running.history("a"), ["Insert new 4"]);
    assert_eq!(running.history("b"), [""; 0]);
    running.stop().await;
    refused(Running::resume(fail, start, Ts(end.0 - 1), 1 << 20).await).await;
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
