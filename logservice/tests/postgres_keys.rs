//! Keys and key ranges against a real server: order, equality, what can be divided, and where.

#![expect(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

mod rig;

use std::collections::BTreeMap;

use event::KeyCodec;
use heartbeatpb::{TableId, TableSpan};
use logservice::upstream::{SourceTable, SplitPoints, open};
use rig::spec;
use testkit::PgServer;
use tokio_postgres::SimpleQueryMessage;

/// Each type with an expression that makes values of it from a number `n`, and how it is ordered.
const TYPES: &[(&str, &str, &str)] = &[
    ("smallint", "(n % 65536 - 32768)::smallint", ""),
    ("integer", "(hash & 4294967295) - 2147483648", ""),
    ("bigint", "hash", ""),
    ("oid", "(hash & 4294967295)::oid", ""),
    (
        "numeric",
        "CASE WHEN n = 1 THEN 'NaN' WHEN n = 2 THEN 'Infinity' WHEN n = 3 THEN '-Infinity' WHEN n < 40 THEN n - 20 \
           WHEN n < 200 THEN ((n - 120) / 100.0)::numeric(10, 4) \
           ELSE round(hash::numeric * 10::numeric ^ (n % 41 - 30), (n % 30)::int) END",
        "",
    ),
    ("numeric(10,3)", "((hash & 1048575) - 524288)::numeric / (n % 7 + 1)", ""),
    ("boolean", "n % 2 = 0", ""),
    (
        "date",
        "CASE n WHEN 1 THEN 'infinity' WHEN 2 THEN '-infinity' WHEN 3 THEN '4713-01-01 BC' WHEN 4 THEN '5874897-12-31' \
           ELSE '2000-01-01'::date + (hash % 2000000)::int END",
        "",
    ),
    (
        "time",
        "CASE n WHEN 1 THEN '24:00' ELSE '00:00'::time + (hash & 68719476735) * interval '1 microsecond' END",
        "",
    ),
    (
        "timestamp",
        "CASE n WHEN 1 THEN 'infinity' WHEN 2 THEN '-infinity' WHEN 3 THEN '294276-12-31 23:59:59.999999' \
           ELSE '2000-01-01'::timestamp + hash % 100000000000000000 * interval '1 microsecond' END",
        "",
    ),
    (
        "timestamptz",
        "CASE n WHEN 1 THEN 'infinity' WHEN 2 THEN '4713-01-01 00:00:00+00 BC' \
           ELSE '1900-01-01'::timestamptz + hash % 100000000000000000 * interval '1 microsecond' END",
        "",
    ),
    ("uuid", "md5(n::text)::uuid", ""),
    ("bytea", "CASE WHEN n < 9 THEN decode(repeat('00', n), 'hex') ELSE decode(md5(n::text), 'hex') END", ""),
    ("text", "substr('Ab ä€zZ 😀_' || md5(n::text), (n % 9)::int + 1, (n % 5)::int)", " COLLATE \"C\""),
    ("varchar(9)", "repeat(chr((n % 90)::int + 33), (n % 8)::int)", " COLLATE \"C\""),
    ("character(6)", "repeat(chr((n % 90)::int + 33), (n % 6)::int)", " COLLATE \"C\""),
    ("bit varying", "(n % 64)::int::bit(6)::varbit || substr('0101', 1, (n % 4)::int)::varbit", ""),
    ("whole", "(n % 100)::whole", ""),
];

async fn tables(server: &PgServer) -> BTreeMap<String, SourceTable> {
    let spec = spec(&server.uri("postgres"), &["*.*"]);
    let report = open(&spec.upstream_uri).unwrap().check(&spec).await.unwrap();
    report.eligible.into_iter().map(|table| (table.info.name.clone(), table)).collect()
}

#[tokio::test]
async fn keys_have_the_servers_order_and_its_equality() {
    let server = PgServer::start().await.unwrap();
    let client = server.client("postgres").await.unwrap();
    let session = "SET timezone = 'UTC'; SET datestyle = 'ISO'; SET bytea_output = 'hex'";
    client.batch_execute(session).await.unwrap();
    client.batch_execute("CREATE DOMAIN whole AS integer CHECK (VALUE >= 0)").await.unwrap();
    for (number, (sql, ..)) in TYPES.iter().enumerate() {
        client.batch_execute(&format!("CREATE TABLE t{number} (k {sql} PRIMARY KEY)")).await.unwrap();
    }
    let tables = tables(&server).await;
    for (number, (sql, values, collation)) in TYPES.iter().enumerate() {
        let table = &tables[&format!("t{number}")];
        assert!(table.splittable, "{sql}");
        let codec = KeyCodec::new(&table.info).unwrap();
        let query = format!(
            "SELECT k, k = lag(k) OVER (ORDER BY k{collation}) FROM (SELECT ({values})::{sql} AS k \
             FROM (SELECT n, hashint8extended(n, 7) AS hash FROM generate_series(1, 1500) AS n) AS s) AS v ORDER BY k{collation}"
        );
        let messages = client.simple_query(&query).await.unwrap_or_else(|e| panic!("{sql}: {e:?}"));
        let mut before: Option<(String, Vec<u8>)> = None;
        let mut rows = 0;
        for message in messages {
            let SimpleQueryMessage::Row(row) = message else { continue };
            let text = row.get(0).unwrap().to_owned();
            let key = codec.encode_values(&[&text]).unwrap_or_else(|| panic!("{sql}: {text:?} is no key"));
            if let Some((previous, smaller)) = &before {
                let equal = row.get(1) == Some("t");
                assert_eq!(*smaller == key, equal, "{sql}: {previous:?} and {text:?}");
                assert!(equal || *smaller < key, "{sql}: {previous:?} is before {text:?}");
            }
            // What is decoded is the same value to the server.
            if rows % 50 == 0 {
                let decoded = codec.decode(&key).unwrap().remove(0);
                let same = format!("SELECT $1::text::{sql} = $2::text::{sql}");
                let decoded = client.query_one(&same, &[&decoded, &text]).await;
                assert!(decoded.is_ok_and(|row| row.get(0)), "{sql}: {text:?}");
            }
            before = Some((text, key));
            rows += 1;
        }
        assert_eq!(rows, 1500, "{sql}");
    }
}

#[tokio::test]
async fn a_table_is_divisible_when_nothing_but_its_primary_key_keeps_rows_apart() {
    let server = PgServer::start().await.unwrap();
    let statements = "
        CREATE COLLATION loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
        CREATE DOMAIN name_of AS text COLLATE loose;
        CREATE TYPE mood AS ENUM ('sad', 'glad');
        CREATE TABLE a_plain (id int PRIMARY KEY, v text);
        CREATE TABLE b_composite (id int, name text, PRIMARY KEY (name, id));
        CREATE TABLE c_loose (k text COLLATE loose PRIMARY KEY);
        CREATE TABLE d_loose_domain (k name_of PRIMARY KEY);
        CREATE TABLE e_loose_value (id int PRIMARY KEY, v text COLLATE loose);
        CREATE TABLE f_float (k float8 PRIMARY KEY);
        CREATE TABLE g_enum (k mood PRIMARY KEY);
        CREATE TABLE h_unique (id int PRIMARY KEY, u int UNIQUE);
        CREATE TABLE i_partial (id int PRIMARY KEY, u int);
        CREATE UNIQUE INDEX ON i_partial (u) WHERE u > 0;
        CREATE TABLE j_expression (id int PRIMARY KEY, u text);
        CREATE UNIQUE INDEX ON j_expression (lower(u));
        CREATE TABLE k_deferred (id int PRIMARY KEY, u int UNIQUE DEFERRABLE INITIALLY DEFERRED);
        CREATE TABLE l_exclusion (id int PRIMARY KEY, r int4range, EXCLUDE USING gist (r WITH &&));
        CREATE TABLE m_parts (id int PRIMARY KEY, u int) PARTITION BY RANGE (id);
        CREATE TABLE m_part_1 PARTITION OF m_parts FOR VALUES FROM (0) TO (100);
        CREATE TABLE n_parts (id int PRIMARY KEY, u int) PARTITION BY RANGE (id);
        CREATE TABLE n_part_1 PARTITION OF n_parts FOR VALUES FROM (0) TO (100);
        CREATE UNIQUE INDEX ON n_part_1 (u);
        CREATE TABLE o_full (id int PRIMARY KEY, v text);
        ALTER TABLE o_full REPLICA IDENTITY FULL;";
    server.sql("postgres", statements).await.unwrap();
    let tables = tables(&server).await;
    let divisible: Vec<&str> =
        tables.values().filter(|table| table.splittable).map(|table| table.info.name.as_str()).collect();
    assert_eq!(divisible, ["a_plain", "b_composite", "e_loose_value", "m_parts", "o_full"]);
    let refused = tables.len() - divisible.len();
    assert_eq!(refused, 10, "{:?}", tables.keys());
}

async fn points(
    server: &PgServer,
    table: &str,
    bounds: [Vec<u8>; 2],
    pieces: usize,
) -> (SourceTable, SplitPoints) {
    let table = tables(server).await.remove(table).unwrap();
    let [start, end] = bounds;
    let span = TableSpan { start, end, ..TableSpan::whole(table.info.id) };
    let spec = spec(&server.uri("postgres"), &["*.*"]);
    let points = open(&spec.upstream_uri).unwrap().split_points(&spec, &span, pieces).await.unwrap();
    (table, points)
}

#[tokio::test]
async fn a_sample_divides_a_large_table_into_parts_of_about_the_same_size() {
    let server = PgServer::start().await.unwrap();
    // Ten times as many rows below zero, in no order; more pages than are read.
    let statements = "
        CREATE TABLE large (id bigint, part text, filler text, PRIMARY KEY (id, part));
        INSERT INTO large SELECT CASE WHEN n % 11 = 0 THEN h ELSE -h END, n::text, repeat('x', 100)
            FROM (SELECT n, abs(hashint8extended(n, 3) / 2) + 1 AS h FROM generate_series(1, 60000) AS n) AS s;
        CREATE TABLE few (id int PRIMARY KEY);
        INSERT INTO few VALUES (5);
        CREATE TABLE loose (k float8 PRIMARY KEY);
        INSERT INTO loose SELECT generate_series(1, 100);
        ANALYZE large";
    server.sql("postgres", statements).await.unwrap();
    let all = || [Vec::new(), Vec::new()];
    let (table, divided) = points(&server, "large", all(), 4).await;
    let rows = divided.rows.unwrap();
    assert!((55_000..65_000).contains(&rows), "{rows} rows");
    assert!(divided.bytes.is_some_and(|bytes| bytes > 60_000 * 100), "{:?} bytes", divided.bytes);
    assert_eq!(divided.keys.len(), 3);
    let codec = KeyCodec::new(&table.info).unwrap();
    let client = server.client("postgres").await.unwrap();
    let mut before = 0i64;
    for key in &divided.keys {
        let values = codec.decode(key).unwrap();
        let sql = format!(
            "SELECT count(*) FROM large WHERE (id, part COLLATE \"C\") < ({}, '{}')",
            values[0], values[1]
        );
        let count: i64 = client.query_one(&sql, &[]).await.unwrap().get(0);
        assert!((10_000..20_000).contains(&(count - before)), "{} rows in a part", count - before);
        before = count;
    }
    // A part of it is divided inside, and knows its share.
    let half = [divided.keys[1].clone(), Vec::new()];
    let (_, again) = points(&server, "large", half.clone(), 2).await;
    assert_eq!(again.keys.len(), 1);
    assert!(again.keys[0] > half[0]);
    assert!((20_000..40_000).contains(&again.rows.unwrap()), "{:?}", again.rows);
    assert!(points(&server, "few", all(), 4).await.1.keys.len() <= 1);
    assert!(points(&server, "loose", all(), 4).await.1.keys.is_empty(), "it cannot be divided");
    let nowhere = TableSpan::whole(TableId(1));
    let spec = spec(&server.uri("postgres"), &["*.*"]);
    let none = open(&spec.upstream_uri).unwrap().split_points(&spec, &nowhere, 4).await.unwrap();
    assert_eq!(none, SplitPoints::default(), "a table that is gone");
}

#[tokio::test]
async fn a_generator_divides_the_keys_that_it_begins_with() {
    let uri = "generator://bank?accounts=1000&tables=2";
    let spec = spec(uri, &["*.*"]);
    let upstream = open(uri).unwrap();
    let tables = upstream.tables(&spec).await.unwrap();
    for table in tables {
        let span = TableSpan::whole(table.info.id);
        let points = upstream.split_points(&spec, &span, 4).await.unwrap();
        match table.info.name.as_str() {
            "cards" => assert!(!table.splittable && points.keys.is_empty(), "its moved rows are incomplete"),
            "transfers" => assert_eq!(points, SplitPoints::default(), "it begins empty"),
            _ => {
                let codec = KeyCodec::new(&table.info).unwrap();
                let keys: Vec<String> =
                    points.keys.iter().flat_map(|key| codec.decode(key).unwrap()).collect();
                assert_eq!(keys, ["251", "501", "751"]);
                assert_eq!(points.rows, Some(1000));
            }
        }
    }
}
