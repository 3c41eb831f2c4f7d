//! Every type reads back as it was written, whichever statement carried it.

use std::sync::Arc;

use event::{ReplicaIdentity, RowOp};

use crate::harness::{Rig, Rows, table, values};

/// Type and values; NULL is added to each.
fn matrix() -> Vec<(&'static str, Vec<String>)> {
    let many = |values: &[&str]| values.iter().map(ToString::to_string).collect::<Vec<_>>();
    vec![
        ("smallint", many(&["-32768", "32767"])),
        ("integer", many(&["-2147483648", "0"])),
        ("bigint", many(&["-9223372036854775808", "9223372036854775807"])),
        (
            "numeric",
            vec![
                "NaN".into(),
                "Infinity".into(),
                "9".repeat(1000),
                format!("-0.{}1", "0".repeat(900)),
                "1.500".into(),
            ],
        ),
        ("numeric(10,2)", many(&["12345678.90", "-0.01"])),
        ("real", many(&["1e-45", "3.4028235e+38", "NaN", "-Infinity"])),
        ("double precision", many(&["5e-324", "0.1", "-0"])),
        ("boolean", many(&["t", "f"])),
        ("text", many(&["", " ", "\\N", "NULL", "a'b\"c\\d\n\t\r{},", "üñîçødé 🦀"])),
        ("character varying(12)", many(&["abc", "ä  "])),
        ("character(5)", many(&["ab", "abcde"])),
        ("\"char\"", many(&["x"])),
        ("name", many(&["a name"])),
        ("bytea", many(&["\\x", "\\x00ff5c275c5c", "\\xdeadbeef"])),
        ("date", many(&["infinity", "-infinity", "4713-01-01 BC", "5874897-12-31"])),
        ("time without time zone", many(&["00:00:00", "24:00:00", "23:59:59.999999"])),
        ("time with time zone", many(&["12:00:00+14", "00:00:00.5-12:30"])),
        (
            "timestamp without time zone",
            many(&["infinity", "4713-01-01 00:00:00 BC", "294276-12-31 23:59:59.999999"]),
        ),
        (
            "timestamp(3) with time zone",
            many(&["-infinity", "2024-02-29 12:34:56.789+00", "0044-03-15 12:00:00+00 BC"]),
        ),
        ("interval", many(&["1 year 2 mons -3 days +04:05:06.7", "-178000000 years", "00:00:00"])),
        ("uuid", many(&["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"])),
        ("json", many(&["{\"a\" :  1, \"a\": 2}", "null", "\"\\u00e9\""])),
        ("jsonb", many(&["{\"a\": 1.50, \"b\": [null, {}]}", "\"x\""])),
        ("xml", many(&["<a b=\"c\">d</a>", "text <b/> content"])),
        ("bit(5)", many(&["01010"])),
        ("bit varying", many(&["", "1", "110011001100"])),
        ("inet", many(&["10.0.0.1/8", "::1", "2001:db8::/32"])),
        ("cidr", many(&["10.0.0.0/8"])),
        ("macaddr", many(&["08:00:2b:01:02:03"])),
        ("money", many(&["$1,234.50", "-$0.01"])),
        ("point", many(&["(1.5,-2)"])),
        ("polygon", many(&["((0,0),(1,1),(1,0))"])),
        ("circle", many(&["<(1,2),3>"])),
        ("int4range", many(&["[1,10)", "empty", "(,5)"])),
        ("tstzrange", many(&["[\"2024-01-01 00:00:00+00\",)"])),
        ("int4multirange", many(&["{[1,3),[5,7)}"])),
        ("tsvector", many(&["'a':1A 'b''c':2,3B"])),
        ("tsquery", many(&["'a' & !'b'"])),
        ("pg_lsn", many(&["16/B374D848"])),
        ("integer[]", many(&["{}", "{1,NULL,-3}", "[0:1]={5,6}", "{{1,2},{3,4}}"])),
        ("text[]", many(&["{\"\",NULL,\"NULL\",\"a,b\",\"q\\\"\\\\\"}"])),
        ("numeric(8,3)[]", many(&["{1.000,NaN}"])),
        ("bytea[]", many(&["{\"\\\\x00ff\"}"])),
        ("app.mood", many(&["sad", "it's \"ok\""])),
        ("app.mood[]", many(&["{sad,\"it's \\\"ok\\\"\"}"])),
        ("app.positive", many(&["1", "7"])),
        ("app.code", many(&["abc"])),
        ("app.pair", many(&["(1,\"a b\")", "(,)"])),
        ("app.pair[]", many(&["{\"(1,\\\"x y\\\")\"}"])),
        ("app.span", many(&["[1.5,2.5)"])),
        ("hidden.citext", many(&["MiXed"])),
        ("hidden.hstore", many(&["\"a\"=>\"1\", \"b\"=>NULL"])),
    ]
}

const TYPES: &str = "CREATE SCHEMA app; CREATE SCHEMA hidden; CREATE TYPE app.mood AS ENUM ('sad', 'it''s \"ok\"'); \
    CREATE DOMAIN app.positive AS int CHECK (VALUE > 0); CREATE DOMAIN app.code AS varchar(3); \
    CREATE TYPE app.pair AS (a int, b text); CREATE TYPE app.span AS RANGE (subtype = float8)";

/// Extensions are part of the matrix where the server has them.
async fn extension(rig: &Rig, name: &str) -> bool {
    let sql = format!("CREATE EXTENSION {name} SCHEMA hidden");
    rig.source.batch_execute(&sql).await.is_ok() && rig.target.batch_execute(&sql).await.is_ok()
}

#[tokio::test]
async fn every_type_survives_copy_insert_update_and_delete() {
    let rig = Rig::new().await;
    rig.source.batch_execute(TYPES).await.expect("types");
    rig.exec(TYPES).await;
    let mut matrix = matrix();
    for name in ["citext", "hstore"] {
        if !extension(&rig, name).await {
            matrix.retain(|(sql, _)| !sql.ends_with(name));
        }
    }
    let mut names = vec![("id".to_owned(), "integer")];
    names.extend(matrix.iter().enumerate().map(|(i, (sql, _))| (format!("c{i}"), *sql)));
    let columns: Vec<(&str, &str)> = names.iter().map(|(name, sql)| (name.as_str(), *sql)).collect();
    let create = |name: &str| {
        let list: Vec<String> = columns.iter().map(|(name, sql)| format!("{name} {sql}")).collect();
        format!("CREATE TABLE {name} ({})", list.join(", "))
    };
    rig.source.batch_execute(&create("sample")).await.expect("source table");
    let height = matrix.iter().map(|(_, values)| values.len()).max().unwrap_or(0) + 1;
    for row in 0..height {
        let list: Vec<String> = matrix
            .iter()
            .map(|(sql, values)| {
                values.get(row).map_or("NULL".into(), |v| format!("'{}'::{sql}", v.replace('\'', "''")))
            })
            .collect();
        let insert = format!("INSERT INTO sample VALUES ({row}, {})", list.join(", "));
        rig.source.batch_execute(&insert).await.unwrap_or_else(|e| panic!("row {row}: {e:?}"));
    }
    let sample = values(&rig.source, "sample").await;
    let as_text = |row: &Vec<Option<String>>| {
        row.iter().map(|v| v.clone().unwrap_or_else(|| "\\N".into())).collect::<Vec<String>>()
    };
    // A text column holds the two characters that stand for NULL here: it goes as another value.
    let rows: Vec<Vec<String>> = sample
        .iter()
        .map(|row| {
            let mut texts = as_text(row);
            for (text, value) in texts.iter_mut().zip(row) {
                if value.as_deref() == Some("\\N") {
                    *text = "\\\\N".into();
                }
            }
            texts
        })
        .collect();
    rig.source.batch_execute("UPDATE sample SET c8 = '\\\\N' WHERE c8 = '\\N'").await.expect("update");
    let expected = crate::harness::rows(&rig.source, "sample").await;

    let sink = rig.sink("worker-count=2").await;
    for (id, name, primary, how) in [
        (1, "inserted", &[0usize][..], "insert"),
        (2, "copied", &[0][..], "copy"),
        (3, "updated", &[0][..], "update"),
        (4, "loose", &[][..], "loose"),
    ] {
        let mut info = table(id, name, &columns, primary, &[]);
        if how == "loose" {
            info.identity = ReplicaIdentity::Full;
        }
        let info = Arc::new(info);
        let dispatcher = heartbeatpb::DispatcherId::random();
        sink.sink
            .open_dispatcher(dispatcher, &heartbeatpb::TableSpan::whole(info.id), heartbeatpb::Ts(1))
            .await
            .expect("opens");
        sink.sink.open_table(dispatcher, &info).await.expect("created");
        let texts = |i: usize| rows[i].iter().map(String::as_str).collect::<Vec<&str>>();
        let mut batch = Rows::of(&info);
        if how == "copy" {
            batch = batch.copy_start(10);
        }
        let empty: Vec<&str> = std::iter::repeat_n("\\N", columns.len()).collect();
        for i in 0..rows.len() {
            let key = i.to_string();
            let ts = if how == "copy" { 10 } else { 10 + 10 * i as u64 };
            let new = texts(i);
            let mut blank = empty.clone();
            blank[0] = &key;
            let mut half = new.clone();
            half[1] = "\\U";
            batch = match how {
                "insert" | "copy" => batch.insert(ts, &new),
                // First everything but one column, then that one.
                "update" => {
                    let mut first = blank.clone();
                    first[1] = new[1];
                    batch.insert(ts, &first).update(ts + 1, &half)
                }
                // Found by all values: replaced and brought back, and a twin deleted.
                _ => batch
                    .insert(ts, &new)
                    .insert(ts, &new)
                    .op(ts + 1, RowOp::Update, Some(&new), Some(&blank))
                    .op(ts + 2, RowOp::Update, Some(&blank), Some(&new))
                    .delete(ts + 3, &new),
            };
        }
        sink.write_as(dispatcher, batch.build());
        sink.sink.flush_before_block(dispatcher).await.unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(rig.target_rows(name).await, expected, "{name}");
    }
}

#[tokio::test]
async fn keys_of_any_type_find_their_rows() {
    let rig = Rig::new().await;
    let keys: &[(&str, &str, &str)] = &[
        ("numeric", "1.50", "2"),
        ("text", "a b", "Ü"),
        ("character(4)", "a   ", "b   "),
        ("bytea", "\\x00", "\\x01"),
        ("timestamp with time zone", "2024-01-01 00:00:00+00", "infinity"),
        ("uuid", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a12"),
        ("integer[]", "{1,2}", "{}"),
        ("jsonb", "{\"a\": 1}", "null"),
        ("inet", "10.0.0.1", "::1"),
        ("interval", "1 day", "30 days"),
        ("int4range", "[1,3)", "empty"),
        ("bit(3)", "101", "000"),
    ];
    let sink = rig.sink("worker-count=2").await;
    for (id, (sql, one, two)) in (1..).zip(keys) {
        let name = format!("k{id}");
        let info = Arc::new(table(id, &name, &[("k", sql), ("v", "text")], &[0], &[]));
        let dispatcher = heartbeatpb::DispatcherId::random();
        sink.sink
            .open_dispatcher(dispatcher, &heartbeatpb::TableSpan::whole(info.id), heartbeatpb::Ts(1))
            .await
            .expect("opens");
        sink.sink.open_table(dispatcher, &info).await.expect("created");
        sink.write_as(
            dispatcher,
            Rows::of(&info)
                .insert(10, &[one, "a"])
                .update(11, &[one, "b"])
                .update_from(12, &[one, "\\U"], &[two, "\\U"])
                .insert(13, &[one, "c"])
                .delete(14, &[one, "\\U"])
                .build(),
        );
        sink.sink.flush_before_block(dispatcher).await.unwrap_or_else(|e| panic!("{sql}: {e}"));
        rig.expect(&name, &[&format!("{two}|b")]).await;
    }
}
