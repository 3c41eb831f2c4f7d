//! What PostgreSQL writes comes back from the files of every format, letter by letter.

mod support;

use std::sync::Arc;

use event::{Column, TypeKind};
use heartbeatpb::config::SinkConfig;
use heartbeatpb::{ChangefeedId, DispatcherId, Ts, WallTime};
use sink::{FileConfig, FileSink, Flushed, Sink, replay};
use support::{Rows, column, table};
use testkit::PgServer;
use tokio_util::sync::CancellationToken;

/// Column, kind, SQL type, and an expression over `i` from 1 to 300 that makes values.
fn columns() -> Vec<(&'static str, TypeKind, &'static str, &'static str)> {
    let mood = TypeKind::Enum(vec!["sad".into(), "2".into(), "1".into()]);
    vec![
        ("b", TypeKind::Bool, "boolean", "i % 2 = 0"),
        ("i2", TypeKind::Int16, "smallint", "(i * 109) - 16000"),
        ("i8", TypeKind::Int64, "bigint", "(random() * 9e18)::bigint - 4e18::bigint"),
        ("f4", TypeKind::Float32, "real", "(random() - 0.5) * (10.0::float8 ^ (i % 75 - 37))"),
        ("f8", TypeKind::Float64, "double precision", "(random() - 0.5) * (10.0::float8 ^ (i * 2 - 300))"),
        (
            "f8s",
            TypeKind::Float64,
            "double precision",
            "round((random() * 1000)::numeric, 2) * (10.0 ^ (i % 20))",
        ),
        (
            "odd",
            TypeKind::Float64,
            "double precision",
            "(ARRAY['NaN', 'Infinity', '-Infinity', '-0', '0', '1e15', '123456789012345', '0.0001', '0.00001'])[i % 9 + 1]::float8",
        ),
        (
            "odd4",
            TypeKind::Float32,
            "real",
            "(ARRAY['NaN', '-Infinity', '999999', '1000000', '1234567', '0.0001', '3e-5'])[i % 7 + 1]::real",
        ),
        (
            "n",
            TypeKind::Numeric { precision: None, scale: 0 },
            "numeric",
            "CASE WHEN i % 50 = 0 THEN 'NaN'::numeric ELSE (random() - 0.5)::numeric * 10.0 ^ (i % 60) END",
        ),
        ("c", TypeKind::Char(Some(5)), "character(5)", "repeat('x', i % 6)"),
        (
            "t",
            TypeKind::Text,
            "text",
            "CASE i % 5 WHEN 0 THEN '' WHEN 1 THEN E'\\\\N' WHEN 2 THEN E'a\"b,c\\r\\nd\\\\' WHEN 3 THEN 'é😀' ELSE E'\\t\\x01\\x7f' END",
        ),
        ("by", TypeKind::Bytes, "bytea", "decode(repeat(lpad(to_hex(i % 256), 2, '0'), i % 20), 'hex')"),
        (
            "d",
            TypeKind::Date,
            "date",
            "(ARRAY['infinity', '-infinity', '0044-03-15 BC', '12345-01-01'])[i % 8]::date",
        ),
        ("d2", TypeKind::Date, "date", "'2000-01-01'::date + (i - 150) * 1717"),
        ("ti", TypeKind::Time, "time without time zone", "(interval '1 second') * (random() * 86399)"),
        (
            "ttz",
            TypeKind::TimeTz,
            "time with time zone",
            "('12:34:56.' || i || (ARRAY['+00', '-03:30', '+14', '-08'])[i % 4 + 1])::timetz",
        ),
        (
            "ts",
            TypeKind::Timestamp,
            "timestamp without time zone",
            "(ARRAY['infinity', '-infinity', '0044-03-15 01:02:03.4 BC'])[i % 9]::timestamp",
        ),
        (
            "ts2",
            TypeKind::Timestamp,
            "timestamp without time zone",
            "'2000-01-01'::timestamp + (i - 150) * interval '103 days 01:02:03.456789'",
        ),
        (
            "ts3",
            TypeKind::Timestamp,
            "timestamp(3) without time zone",
            "'1970-01-01'::timestamp + (i - 150) * interval '103 days 01:02:03.456'",
        ),
        (
            "tz",
            TypeKind::TimestampTz,
            "timestamp with time zone",
            "(ARRAY['infinity', '0044-03-15 01:02:03.4+00 BC', '0001-01-01 00:00:00+00 BC'])[i % 9]::timestamptz",
        ),
        (
            "tz2",
            TypeKind::TimestampTz,
            "timestamp with time zone",
            "'2000-01-01'::timestamptz + (i - 150) * interval '103 days 01:02:03.456789'",
        ),
        ("iv", TypeKind::Interval, "interval", "(i - 150) * interval '1 month 3 days 04:05:06.7'"),
        ("u", TypeKind::Uuid, "uuid", "gen_random_uuid()"),
        ("j", TypeKind::Json, "json", "('{ \"a\" :' || i || '}')::json"),
        ("jb", TypeKind::Jsonb, "jsonb", "jsonb_build_object('k', i, 's', E'\"\\\\\\n')"),
        ("bi", TypeKind::Bit(Some(12)), "bit(12)", "i::bit(12)"),
        ("b1", TypeKind::Bit(Some(1)), "bit(1)", "(i % 2)::bit(1)"),
        ("b64", TypeKind::Bit(Some(64)), "bit(64)", "(-i)::bigint::bit(64)"),
        ("vb", TypeKind::Bit(None), "bit varying", "substring(i::bit(12), i % 12 + 1)::varbit"),
        ("m", mood, "mood", "(ARRAY['sad', '2', '1'])[i % 3 + 1]::mood"),
        ("a", TypeKind::Array(Box::new(TypeKind::Text)), "text[]", "ARRAY['x', NULL, i::text, 'a \"b\"']"),
        ("ip", TypeKind::Other, "inet", "('10.0.0.' || i % 256)::inet"),
        ("r", TypeKind::Other, "int4range", "int4range(i, i + 5)"),
        ("nul", TypeKind::Text, "text", "NULL"),
    ]
}

/// Rows as the output functions write them.
async fn rows_of_postgresql(server: &PgServer) -> Vec<Vec<Option<String>>> {
    let client = server.client("postgres").await.expect("connected");
    client
        .batch_execute("SET TimeZone = 'UTC'; CREATE TYPE mood AS ENUM ('sad', '2', '1')")
        .await
        .expect("set up");
    let list: Vec<String> =
        columns().iter().map(|(name, _, sql, make)| format!("({make})::{sql} AS {name}")).collect();
    let create = format!(
        "CREATE TABLE t AS SELECT i::bigint AS id, {} FROM generate_series(1, 300) i",
        list.join(", ")
    );
    client.batch_execute(&create).await.expect("created");
    // The simple protocol sends what output functions write, as the log does.
    let messages = client.simple_query("SELECT * FROM t ORDER BY id").await.expect("read");
    messages
        .into_iter()
        .filter_map(|message| {
            let tokio_postgres::SimpleQueryMessage::Row(row) = message else { return None };
            Some((0..row.len()).map(|at| row.get(at).map(str::to_owned)).collect())
        })
        .collect()
}

#[tokio::test]
async fn every_value_of_postgresql_reads_back_from_every_format() {
    let server = PgServer::start().await.expect("a server");
    let rows = rows_of_postgresql(&server).await;
    assert_eq!(rows.len(), 300);
    let mut shape: Vec<Column> = vec![column("id", TypeKind::Int64, "bigint", false)];
    shape.extend(columns().into_iter().map(|(name, kind, sql, _)| column(name, kind, sql, true)));
    let shape = table(1, "t", 10, shape, &[0]);
    for params in [
        "protocol=canal-json",
        "protocol=debezium",
        "protocol=csv&include-commit-ts=true",
        "protocol=csv&include-commit-ts=true&output-old-value=true&output-field-header=true",
    ] {
        let dir = tempfile::tempdir().expect("a directory");
        let uri = format!("file://{}?file-size=100000&{params}", dir.path().display());
        let mut settings = SinkConfig::default();
        if params.contains("header") {
            settings.csv.quote = String::new();
            settings.csv.delimiter = "|+".into();
        }
        let config = FileConfig::new(&uri, &settings).expect("valid");
        let sink =
            Arc::new(FileSink::open(config.clone(), &ChangefeedId::fresh("text")).await.expect("opened"));
        let (running, shutdown) = (Arc::clone(&sink), CancellationToken::new());
        let token = shutdown.clone();
        let task = tokio::spawn(async move { running.run(token).await });
        let dispatcher = DispatcherId::random();
        sink.open_dispatcher(dispatcher, &heartbeatpb::TableSpan::whole(shape.id), Ts(10))
            .await
            .expect("opened");
        sink.open_table(dispatcher, &shape).await.expect("opened");
        let batch =
            rows.iter().fold(Rows::of(&shape).at(20, 0), |batch, row| batch.insert_values(row)).build();
        sink.write_rows(dispatcher, batch, Flushed::new(|| {}));
        sink.flush_before_block(dispatcher).await.expect("flushed");
        sink.publish_checkpoint(Ts(20), WallTime(0));
        shutdown.cancel();
        task.await.expect("no panic").expect("stopped");
        let read = replay(&config.root, &config.encode, None).expect("readable");
        let read = &read.tables[&("app".to_owned(), "t".to_owned())];
        assert_eq!(read.rows.len(), rows.len());
        for row in &rows {
            let read = &read.rows[&vec![row[0].clone()]];
            for ((read, written), column) in read.iter().zip(row).zip(&shape.columns) {
                assert_eq!(read, written, "column {}, {params}", column.name);
            }
        }
    }
}
