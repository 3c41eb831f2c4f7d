//! Every type through a whole node: copied and streamed, beside a key, as the key, and in a table without one.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use serde_json::json;
use testkit::PgServer;

use crate::common::{TARGET, assert_same, caught_up, content, create, eventually, servers, start, state};

/// A type as SQL writes it, and values of it, each an expression that is cast to it.
const MATRIX: &[(&str, &[&str])] = &[
    ("bool", &["true", "false"]),
    ("smallint", &["-32768", "32767"]),
    ("integer", &["-2147483648", "2147483647"]),
    ("bigint", &["-9223372036854775808", "9223372036854775807"]),
    (
        "numeric",
        &[
            "'NaN'",
            "'Infinity'",
            "'-Infinity'",
            "repeat('9', 1000)",
            "'-0.' || repeat('0', 500) || '12300'",
            "'1.50'",
            "'1e400'",
            "'0.00'",
        ],
    ),
    ("numeric(12,3)", &["'123456789.125'", "'-0.001'", "'NaN'"]),
    ("numeric(3,-2)", &["'12345'", "'-99900'"]),
    ("real", &["'NaN'", "'Infinity'", "'-Infinity'", "'-0'", "'1e-45'", "'3.4028235e38'", "'0.1'"]),
    (
        "double precision",
        &["'NaN'", "'Infinity'", "'-Infinity'", "'-0'", "'5e-324'", "'1.7976931348623157e308'", "'0.1'"],
    ),
    ("date", &["'infinity'", "'-infinity'", "'4713-01-01 BC'", "'5874897-12-31'", "'2024-02-29'"]),
    ("time", &["'24:00'", "'00:00'", "'23:59:59.999999'"]),
    ("timetz", &["'24:00+15:59'", "'00:00-15:59'", "'12:34:56.789-03:30'"]),
    (
        "timestamp",
        &["'infinity'", "'-infinity'", "'4713-01-01 00:00:00 BC'", "'294276-12-31 23:59:59.999999'"],
    ),
    (
        "timestamptz",
        &[
            "'infinity'",
            "'-infinity'",
            "'0044-03-15 12:00:00+01 BC'",
            "'2024-10-27 02:30:00+02'",
            "'2024-10-27 02:30:00+01'",
            "'1890-01-01 00:00:00.000001+00'",
        ],
    ),
    ("timestamp(3)", &["'2024-01-01 00:00:00.9996'"]),
    (
        "interval",
        &[
            "'1 year -2 mons +3 days -04:05:06.789'",
            "'-178000000 years'",
            "'0'",
            "'1 mon -1 day'",
            "'-00:00:00.000001'",
        ],
    ),
    ("interval day to second(2)", &["'3 days 04:05:06.789'"]),
    ("json", &[r#"'{"b" : 1, "a": [null, "\u0000"], "b": 2}'"#, "' null '", r#"'"ü\n\\"'"#]),
    ("jsonb", &[r#"'{"b": 1, "a": [null, {"c": 1e500}], "": "\t\"\\"}'"#, "'null'", "'[]'"]),
    ("jsonpath", &[r#"'$.a[*] ? (@.b > 1 && @."c d" like_regex "^x" flag "i")'"#, "'strict $'"]),
    ("text", &["''", r"E'a\tb\nc\r\\N\\'", "'\\N'", "'ünï ☃ 𝄞'", "'NULL'", "E'\\x01\\x7f'", "'\"{},()'"]),
    ("varchar(7)", &["'1234567'", "' a '", "''"]),
    ("char(5)", &["'a'", "'  b'", "''", "'12345'"]),
    ("bpchar", &["'trail  '", "''"]),
    ("name", &["'A name with \"quotes\"'", "repeat('x', 63)"]),
    ("\"char\"", &["'a'", "''", r"'\303'", r"'\\'"]),
    ("bytea", &[r"'\x00ff5c27'", "''", "decode(repeat('5c00', 3000), 'hex')"]),
    ("uuid", &["'00000000-0000-0000-0000-000000000000'", "'FFFFFFFF-ffff-4fff-bfff-ffffffffffff'"]),
    ("bit(9)", &["B'101010101'", "B'000000000'"]),
    ("bit", &["B'1'"]),
    ("varbit", &["B''", "B'1011'", "repeat('10', 200)"]),
    ("varbit(5)", &["B'101'"]),
    ("inet", &["'192.168.0.1/24'", "'::ffff:1.2.3.4'", "'2001:db8::1/64'", "'10.0.0.0'"]),
    ("cidr", &["'192.168.0.0/24'", "'2001:db8::/32'", "'10.1.2.3/32'"]),
    ("macaddr", &["'08:00:2b:01:02:03'"]),
    ("macaddr8", &["'08:00:2b:01:02:03:04:05'", "'08002b:010203'"]),
    ("money", &["'-92233720368547758.08'", "'92233720368547758.07'", "'0.01'"]),
    (
        "xml",
        &["'<a b=\"c\">ü&lt;<!-- x --></a>'", "'text only'", "'<?xml version=\"1.0\"?><r/>'", "'<a/><b/>'"],
    ),
    ("tsvector", &[r"$$'it''s':1A,5B 'b\\' c:16383$$", "''"]),
    ("tsquery", &[r"$$'a' & !('b''c' | d:*AB) <2> e$$", "''"]),
    ("point", &["'(1.5,-0)'", "'(NaN,Infinity)'"]),
    ("line", &["'{1,-2,3.25}'"]),
    ("lseg", &["'[(0,0),(1,1e300)]'"]),
    ("box", &["'(2,2),(1,1)'"]),
    ("path", &["'((0,0),(1,2),(3,4))'", "'[(0,0),(1,2)]'"]),
    ("polygon", &["'((0,0),(1,2),(3,4))'"]),
    ("circle", &["'<(1,2),0.1>'"]),
    ("pg_lsn", &["'FFFFFFFF/FFFFFFFF'", "'0/0'"]),
    ("txid_snapshot", &["'10:20:10,14,15'"]),
    ("pg_snapshot", &["'10:20:10,14,15'"]),
    ("oid", &["'4294967295'", "'0'"]),
    ("xid", &["'4294967295'"]),
    ("xid8", &["'18446744073709551615'"]),
    ("cid", &["'7'"]),
    ("tid", &["'(4294967295,65535)'"]),
    ("regtype", &["'integer'", "'double precision[]'", "'-'"]),
    ("regclass", &["'pg_class'"]),
    ("int2vector", &["'1 -2 3'", "''"]),
    ("oidvector", &["'1 2 3'"]),
    ("refcursor", &["'a cursor'"]),
    ("int4range", &["'empty'", "'(,)'", "'[1,5)'", "'(,7]'"]),
    ("int8range", &["'[-9223372036854775808,9223372036854775807)'"]),
    ("numrange", &["'(1.50,2.0]'", "'[NaN,NaN]'", "'[-Infinity,0]'"]),
    ("tsrange", &["'[\"2020-01-01 00:00\",infinity)'", "'(,\"0044-01-01 BC\"]'"]),
    ("tstzrange", &["'[\"2024-10-27 02:30+02\",\"2024-10-27 02:30+01\")'"]),
    ("daterange", &["'[2020-01-01,2020-01-31]'", "'(-infinity,infinity)'"]),
    ("int4multirange", &["'{}'", "'{[1,2],[5,9),(,-3]}'"]),
    ("int8multirange", &["'{[1,2]}'"]),
    ("nummultirange", &["'{(1.50,2.0],[7,)}'"]),
    ("tsmultirange", &["'{[2020-01-01,2021-01-01)}'"]),
    ("tstzmultirange", &["'{[2020-01-01,2021-01-01),[infinity,infinity]}'"]),
    ("datemultirange", &["'{[2020-01-01,2020-02-01)}'"]),
    (
        "integer[]",
        &["'{}'", "'{1,NULL,3}'", "'[-3:-1]={1,2,3}'", "'{{1,2},{NULL,4}}'", "'[0:1][5:5]={{1},{2}}'"],
    ),
    ("text[]", &[r#"ARRAY['', 'NULL', NULL, 'a"b\c', 'x,y', '{}', E'n\nt\t', ' ']"#, "'{{a,b},{c,NULL}}'"]),
    ("numeric(8,2)[]", &["'{NaN,1.5,NULL}'"]),
    ("bytea[]", &[r"ARRAY['\x00ff'::bytea, NULL, '']"]),
    ("jsonb[]", &[r#"ARRAY['{"a": "b,\"c"}'::jsonb, NULL]"#]),
    ("timestamptz[]", &["'{infinity,\"2024-01-01 00:00+00\",NULL}'"]),
    ("int4range[]", &["'{\"[1,2)\",empty,NULL}'"]),
    ("box[]", &["'{(2,2),(1,1);(4,4),(3,3)}'"]),
    ("char(3)[]", &["'{a,\"b \",NULL}'"]),
    // Types of the user, see `USER_TYPES`.
    ("app.mood", &["'happy'", "'it''s \"so\", so'", "''", "'ünglücklich'"]),
    ("app.mood[]", &["'{happy,NULL,\"it''s \\\"so\\\", so\"}'"]),
    ("app.\"Positive Number\"", &["'0.001'", "'99999999.999'"]),
    ("app.\"Positive Number\"[]", &["'{1,NULL,2.5}'"]),
    ("app.codes", &["'{ab,\"c \"}'", "'{}'"]),
    ("app.nested_domain", &["'1'"]),
    (
        "app.address",
        &[r#"ROW('a "b", (c)\', NULL, 'happy', '{1,NULL}', '1.5')"#, "ROW(NULL,NULL,NULL,NULL,NULL)"],
    ),
    ("app.address[]", &["ARRAY[ROW('x', 1, 'happy', '{}', 2)::app.address, NULL]"]),
    (
        "app.person",
        &["ROW('p', ROW('x,y', 1, 'happy', '{1}', 2)::app.address, ARRAY[ROW('z')]::app.single[])"],
    ),
    ("app.moods", &["'[\"it''s \\\"so\\\", so\",happy)'", "'empty'"]),
    ("app.moods_multi", &["'{[happy,happy]}'"]),
    ("app.floats", &["'[0.5,Infinity)'"]),
    ("plain", &["'in public'"]),
    ("ext.hstore", &["'a=>NULL, \"b\\\"c\"=>\"\"'", "''"]),
    ("ext.citext", &["'MiXed'", "'mixed'"]),
    ("ext.ltree[]", &["'{a.b.c,NULL}'"]),
];

const USER_TYPES: &str = r#"
CREATE SCHEMA app;
CREATE SCHEMA ext;
CREATE EXTENSION hstore SCHEMA ext;
CREATE EXTENSION citext SCHEMA ext;
CREATE EXTENSION ltree SCHEMA ext;
CREATE TYPE app.mood AS ENUM ('', 'it''s "so", so', 'happy');
ALTER TYPE app.mood ADD VALUE 'ünglücklich' BEFORE 'happy';
CREATE DOMAIN app."Positive Number" AS numeric(11,3) CONSTRAINT "more than 0" CHECK (VALUE > 0);
CREATE DOMAIN app.codes AS char(4)[] CHECK (array_length(VALUE, 1) IS DISTINCT FROM 3);
CREATE DOMAIN app.nested_domain AS app."Positive Number" DEFAULT 1 CHECK (VALUE < 1000);
CREATE TYPE app.address AS ("Street Name" text, "Nö" int, mood app.mood, list int[], n app."Positive Number");
CREATE TYPE app.single AS (t text);
CREATE TYPE app.person AS (name varchar(5), home app.address, others app.single[]);
CREATE TYPE app.moods AS RANGE (SUBTYPE = app.mood, MULTIRANGE_TYPE_NAME = app.moods_multi);
CREATE TYPE app.floats AS RANGE (SUBTYPE = float8, SUBTYPE_DIFF = float8mi);
CREATE DOMAIN plain AS text COLLATE "C";
"#;

/// Types that a unique index can hold, also ones whose equal values may differ as text.
const KEYS: &[(&str, [&str; 4])] = &[
    ("numeric", ["'1.0'", "'NaN'", "'1.00'", "'2'"]),
    ("double precision", ["'0'", "'NaN'", "'-0'", "'Infinity'"]),
    ("text", ["''", "'\\N'", "'NULL'", "E'\\t\\\\'"]),
    ("char(4)", ["'a'", "''", "'b '", "'abcd'"]),
    ("bytea", ["'\\x00'", "''", "'\\x5c'", "'\\x0000'"]),
    ("uuid", ["'00000000-0000-0000-0000-000000000000'", "md5('1')", "md5('2')", "md5('3')"]),
    (
        "timestamptz",
        ["'infinity'", "'2024-10-27 02:30:00+02'", "'2024-10-27 02:30:00+01'", "'0044-01-01 00:00+00 BC'"],
    ),
    ("date", ["'infinity'", "'-infinity'", "'0001-01-01 BC'", "'2024-01-01'"]),
    ("interval", ["'1 mon'", "'-1 day'", "'30 days'", "'0'"]),
    ("inet", ["'10.0.0.1/8'", "'10.0.0.1'", "'::1'", "'10.0.0.0/8'"]),
    ("varbit", ["B''", "B'0'", "B'00'", "B'1'"]),
    ("jsonb", ["'1.0'", "'null'", "'1.00'", "'{\"a\": 1}'"]),
    ("int4range", ["'empty'", "'(,)'", "'[1,2)'", "'[1,3)'"]),
    ("int4multirange", ["'{}'", "'{[1,2)}'", "'{(,)}'", "'{[1,3)}'"]),
    ("numeric[]", ["'{1.0,NULL}'", "'{}'", "'{1.00,NULL}'", "'[0:0]={1}'"]),
    ("\"char\"", ["'a'", "''", r"'\303'", "'b'"]),
    ("name", ["'a'", "''", "'A'", "'ü'"]),
    ("oid", ["0", "1", "4294967295", "7"]),
    ("money", ["0", "1", "'-1'", "'92233720368547758.07'"]),
    ("pg_lsn", ["'0/0'", "'0/1'", "'1/0'", "'FFFFFFFF/0'"]),
    ("tsvector", ["'a'", "''", "'a:1'", "'b'"]),
    ("app.mood", ["'happy'", "''", "'ünglücklich'", "'it''s \"so\", so'"]),
    ("app.\"Positive Number\"", ["1", "2", "3", "4"]),
    ("app.single", ["ROW('')", "ROW('a b')", "ROW('(\",')", "ROW('z')"]),
    ("ext.citext", ["'a'", "'b'", "'A'", "'c'"]),
    ("app.mood[]", ["'{}'", "'{happy}'", "'{happy,NULL}'", "'{\"\"}'"]),
];

/// Rows of the matrix: as many as the longest list of values, and one of NULLs.
fn rows() -> usize {
    MATRIX.iter().map(|(_, values)| values.len()).max().unwrap()
}

/// A value of a column in a row, moved on by `shift`.
fn value(column: usize, row: usize, shift: usize) -> String {
    let (ty, values) = MATRIX[column];
    if row == rows() {
        "NULL".to_owned()
    } else {
        format!("({})::{ty}", values[(row + shift) % values.len()])
    }
}

fn insert(table: &str, first: usize) -> String {
    let mut sql = String::new();
    for row in 0..=rows() {
        let values: Vec<String> = (0..MATRIX.len()).map(|column| value(column, row, 0)).collect();
        let _ = write!(sql, "INSERT INTO {table} VALUES ({}, {});", first + row, values.join(", "));
    }
    sql
}

/// Moves every value of a row on, and NULLs to a value and a value to NULL.
fn update(table: &str, first: usize) -> String {
    let mut sql = String::new();
    for row in 0..=rows() {
        let new = if row == rows() {
            0
        } else if row == 0 {
            rows()
        } else {
            row
        };
        let set: Vec<String> =
            (0..MATRIX.len()).map(|column| format!("c{column} = {}", value(column, new, 1))).collect();
        let _ = write!(sql, "UPDATE {table} SET {} WHERE \"Größe\" = {};", set.join(", "), first + row);
    }
    sql
}

fn schema() -> String {
    let columns: Vec<String> =
        MATRIX.iter().enumerate().map(|(column, (ty, _))| format!("c{column} {ty}")).collect();
    let columns = columns.join(", ");
    let mut sql = format!(
        "{USER_TYPES} CREATE TABLE app.\"Mätrix \"\"1\"\"\" (\"Größe\" int PRIMARY KEY, {columns}); \
         CREATE TABLE loose (\"Größe\" int, {columns}); ALTER TABLE loose REPLICA IDENTITY FULL;"
    );
    for (at, (ty, _)) in KEYS.iter().enumerate() {
        let _ = write!(sql, "CREATE TABLE key{at} (k {ty} PRIMARY KEY, n int);");
    }
    sql
}

/// Statements about the table of each type of key, with its values put in for `$0` to `$3`.
fn on_keys(statements: &str) -> String {
    let mut sql = String::new();
    for (at, (ty, values)) in KEYS.iter().enumerate() {
        let mut text = statements.replace("TABLE", &format!("key{at}"));
        for (number, value) in values.iter().enumerate() {
            text = text.replace(&format!("${number}"), &format!("({value})::{ty}"));
        }
        sql.push_str(&text);
    }
    sql
}

/// Both tables that hold the matrix.
const TABLES: [&str; 2] = ["app.\"Mätrix \"\"1\"\"\"", "loose"];

/// Says which columns differ, for people.
async fn difference(source: &PgServer, target: &PgServer, table: &str) -> String {
    let read = async |server: &PgServer, database: &str, column: &str| {
        let sql = format!("SELECT \"Größe\", {column}::text FROM {table} ORDER BY 1, 2");
        let rows = server.client(database).await.unwrap().query(&sql, &[]).await.unwrap();
        rows.iter().map(|row| (row.get(0), row.get(1))).collect::<Vec<(i32, Option<String>)>>()
    };
    let mut out = String::new();
    for (at, (ty, _)) in MATRIX.iter().enumerate() {
        let column = format!("c{at}");
        let (want, have) = (read(source, "postgres", &column).await, read(target, TARGET, &column).await);
        for (want, have) in want.iter().zip(&have).filter(|(want, have)| want != have) {
            let _ = writeln!(out, "{table} {ty}: {want:?} became {have:?}");
        }
    }
    out
}

/// What the columns and unique keys of every replicated table look like.
async fn shapes(server: &PgServer, database: &str) -> Vec<String> {
    let client = server.client(database).await.unwrap();
    client.batch_execute("SET search_path = ''").await.unwrap();
    let sql = "SELECT concat_ws(' ', c.oid::regclass, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, \
                 a.attgenerated, CASE WHEN a.attgenerated <> '' THEN pg_get_expr(d.adbin, d.adrelid) END) \
               FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 \
               LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum \
               WHERE c.relkind = 'r' AND c.relnamespace::regnamespace::text IN ('public', 'app') \
               UNION ALL \
               SELECT concat_ws(' ', i.indrelid::regclass, i.indisprimary, i.indkey, i.indnullsnotdistinct) FROM pg_index i \
               JOIN pg_class c ON c.oid = i.indrelid \
               WHERE i.indisunique AND c.relnamespace::regnamespace::text IN ('public', 'app') \
               ORDER BY 1";
    client.query(sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

async fn equal(source: &PgServer, target: &PgServer, when: &str) {
    for table in TABLES {
        let want = content(source, "postgres", table).await;
        let have = content(target, TARGET, table).await;
        assert!(
            want.is_some() && want == have,
            "{when}: {want:?} became {have:?}\n{}",
            difference(source, target, table).await
        );
    }
    for (at, (ty, _)) in KEYS.iter().enumerate() {
        let table = format!("key{at}");
        assert_same(source, target, &table, &format!("{when}, key of type {ty}")).await;
    }
}

/// An error names the statements, which are what is wrong here.
async fn run(source: &PgServer, statements: &str) {
    let client = source.client("postgres").await.unwrap();
    let done = client.batch_execute(statements).await;
    assert!(done.is_ok(), "{done:?}: {statements}");
}

/// Settings of a database that change how values are written and read as text.
const ODD_SETTINGS: [&str; 13] = [
    "datestyle = 'German'",
    "intervalstyle = 'sql_standard'",
    "bytea_output = 'escape'",
    "extra_float_digits = -15",
    "timezone = 'Asia/Kathmandu'",
    "xmloption = 'document'",
    "array_nulls = off",
    "standard_conforming_strings = off",
    "quote_all_identifiers = on",
    "search_path = 'app, ext'",
    "default_transaction_read_only = on",
    "default_transaction_isolation = 'serializable'",
    "client_encoding = 'LATIN1'",
];

/// Replicates the matrix; the node's connections begin under these settings of both databases.
async fn matrix(settings: &[&str]) {
    let (source, target) = servers().await;
    run(&source, &schema()).await;
    for table in TABLES {
        run(&source, &insert(table, 0)).await;
    }
    run(&source, &on_keys("INSERT INTO TABLE VALUES ($0, 1), ($1, 2);")).await;
    let ends = [(&source, "postgres"), (&target, TARGET)];
    // Statements about settings go through a database that does not have them.
    for (server, database) in ends {
        for setting in settings {
            server.sql("template1", &format!("ALTER DATABASE {database} SET {setting}")).await.unwrap();
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    create(&client, &source, &target.uri(TARGET), json!({ "force_replicate": true })).await.unwrap();
    caught_up(&client, &source).await;
    for (server, database) in ends {
        server.sql("template1", &format!("ALTER DATABASE {database} RESET ALL")).await.unwrap();
    }
    equal(&source, &target, "copied").await;
    assert_eq!(shapes(&target, TARGET).await, shapes(&source, "postgres").await);

    for table in TABLES {
        run(&source, &insert(table, 100)).await;
    }
    caught_up(&client, &source).await;
    equal(&source, &target, "inserted").await;

    for table in TABLES {
        // The copied rows were written by COPY, the others by statements with casts.
        run(&source, &update(table, 0)).await;
        run(&source, &update(table, 100)).await;
    }
    let changes = "UPDATE TABLE SET n = n + 10 WHERE k = $0; DELETE FROM TABLE WHERE k = $1; \
        UPDATE TABLE SET k = $2 WHERE k = $0; INSERT INTO TABLE VALUES ($3, 4), ($1, 5); \
        UPDATE TABLE SET n = 6 WHERE k = $3;";
    run(&source, &on_keys(changes)).await;
    caught_up(&client, &source).await;
    equal(&source, &target, "updated").await;

    for table in TABLES {
        run(&source, &format!("DELETE FROM {table} WHERE \"Größe\" % 2 = 0")).await;
    }
    run(&source, &on_keys("DELETE FROM TABLE WHERE k = $2;")).await;
    caught_up(&client, &source).await;
    equal(&source, &target, "deleted").await;
    node.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn values_of_every_type_arrive_exactly_by_the_copy_and_by_the_stream() {
    matrix(&[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settings_of_the_databases_do_not_change_values() {
    matrix(&ODD_SETTINGS).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn identities_generated_columns_and_odd_names_are_written_as_the_source_has_them() {
    const SCHEMA: &str = r#"
        CREATE TABLE always (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v text);
        CREATE TABLE by_default (id int GENERATED BY DEFAULT AS IDENTITY (START 7 INCREMENT 3), k serial PRIMARY KEY, v text);
        CREATE TABLE computed (a int, total int GENERATED ALWAYS AS (a * 2) STORED, b int PRIMARY KEY,
            label text NOT NULL GENERATED ALWAYS AS ('n' || b::text) STORED, UNIQUE (total));
        CREATE TABLE "Ta.b""le \ 'x' ☃" ("Ke y" int, "select" text DEFAULT 'd', "a""b" int NOT NULL DEFAULT 5, "$1" text,
            "ünï" text, PRIMARY KEY ("Ke y", "a""b"), UNIQUE ("select", "ünï"));
        CREATE TABLE only_key (a int, b text, PRIMARY KEY (b, a));
        CREATE TABLE others (a int UNIQUE, b int NOT NULL, c int, UNIQUE NULLS NOT DISTINCT (c));
        ALTER TABLE others ADD UNIQUE (b), REPLICA IDENTITY USING INDEX others_b_key;
        INSERT INTO always (v) VALUES ('one'), ('two'), ('three');
        INSERT INTO by_default (v) VALUES ('one'), ('two');
        INSERT INTO computed (a, b) VALUES (1, 10), (NULL, 11), (3, 12);
        INSERT INTO "Ta.b""le \ 'x' ☃" ("Ke y", "$1") VALUES (1, '$2'), (2, NULL);
        INSERT INTO only_key VALUES (1, 'x'), (2, E'\t');
        INSERT INTO others VALUES (1, 1, NULL), (NULL, 2, 2), (NULL, 3, 3);
    "#;
    const CHANGES: &str = r#"
        INSERT INTO always OVERRIDING SYSTEM VALUE VALUES (100, 'forced');
        UPDATE always SET id = DEFAULT WHERE id = 2; UPDATE always SET v = 'x' WHERE id = 1; DELETE FROM always WHERE id = 3;
        UPDATE by_default SET id = 50 WHERE k = 1; UPDATE by_default SET k = 60 WHERE k = 2; INSERT INTO by_default (v) VALUES ('new');
        UPDATE computed SET a = 9 WHERE b = 10; UPDATE computed SET b = 20 WHERE b = 11; DELETE FROM computed WHERE b = 12;
        INSERT INTO computed (a, b) VALUES (3, 13);
        UPDATE "Ta.b""le \ 'x' ☃" SET "a""b" = 6, "ünï" = E'\\' WHERE "Ke y" = 1; DELETE FROM "Ta.b""le \ 'x' ☃" WHERE "Ke y" = 2;
        INSERT INTO "Ta.b""le \ 'x' ☃" VALUES (2, NULL, 1, 'back');
        UPDATE only_key SET a = 3 WHERE a = 1; INSERT INTO only_key VALUES (1, 'x'); DELETE FROM only_key WHERE a = 2;
        UPDATE others SET c = NULL WHERE b = 2 AND false; UPDATE others SET b = 30, a = 30 WHERE b = 3; UPDATE others SET c = 9 WHERE b = 1;
        UPDATE others SET c = NULL WHERE b = 2; DELETE FROM others WHERE b = 30; INSERT INTO others VALUES (30, 3, 3);
    "#;
    const TABLES: [&str; 6] =
        ["always", "by_default", "computed", "\"Ta.b\"\"le \\ 'x' ☃\"", "only_key", "others"];
    let (source, target) = servers().await;
    run(&source, SCHEMA).await;
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    create(&client, &source, &target.uri(TARGET), json!({})).await.unwrap();
    for changes in ["", CHANGES] {
        run(&source, changes).await;
        caught_up(&client, &source).await;
        for table in TABLES {
            assert_same(&source, &target, table, if changes.is_empty() { "copied" } else { "changed" }).await;
        }
    }
    assert_eq!(shapes(&target, TARGET).await, shapes(&source, "postgres").await);
    node.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_type_that_cannot_be_created_fails_the_changefeed_with_its_name() {
    let (source, target) = servers().await;
    // The row type of a table that is not replicated exists only with that table.
    run(
        &source,
        "CREATE TABLE pattern (a int PRIMARY KEY); CREATE TABLE uses (id int PRIMARY KEY, p pattern); \
         INSERT INTO uses VALUES (1, ROW(5))",
    )
    .await;
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    let config = json!({ "filter": { "rules": ["public.uses"] } });
    create(&client, &source, &target.uri(TARGET), config).await.unwrap();
    eventually("the changefeed fails", async || state(&client).await == "failed").await;
    let feed = client.get("/api/v2/changefeeds/f").await.unwrap();
    let message = feed["error"]["message"].as_str().unwrap();
    println!("{}: {message}", feed["error"]["code"]);
    assert_eq!(feed["error"]["code"], "CDC:ErrSinkSchema");
    assert!(message.contains("\"uses\"") && message.contains("pattern"), "{message}");

    // Whoever mends the target goes on.
    target.sql(TARGET, "CREATE TYPE pattern AS (a int)").await.unwrap();
    client.post("/api/v2/changefeeds/f/resume", &json!({})).await.unwrap();
    caught_up(&client, &source).await;
    assert_same(&source, &target, "uses", "mended").await;
    node.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_in_another_encoding_arrives_in_the_targets() {
    let (source, target) = servers().await;
    run(&source, "CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0").await;
    let table = "CREATE TABLE \"Größe\" (\"Ä\" text PRIMARY KEY, v char(3)); \
                 INSERT INTO \"Größe\" VALUES ('copied é', 'ü'), (U&'\\00ff\\00a0', 'ÿ')";
    source.sql("latin", table).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    let body = json!({
        "changefeed_id": "f", "sink_uri": target.uri(TARGET), "upstream": { "uri": source.uri("latin") },
    });
    client.post("/api/v2/changefeeds", &body).await.unwrap();
    let changes = "INSERT INTO \"Größe\" VALUES ('streamed ß', 'æ'); UPDATE \"Größe\" SET \"Ä\" = 'moved é' WHERE v = 'ü'";
    source.sql("latin", changes).await.unwrap();
    let rows = async |server: &PgServer, database: &str| {
        let client = server.client(database).await.unwrap();
        let rows = client.query("SELECT t::text FROM \"Größe\" t", &[]).await.unwrap_or_default();
        rows.iter().map(|row| row.get(0)).collect::<BTreeSet<String>>()
    };
    let want = rows(&source, "latin").await;
    assert_eq!(want.len(), 3);
    eventually("the rows are equal", async || rows(&target, TARGET).await == want).await;
    node.stop().await.unwrap();
}
