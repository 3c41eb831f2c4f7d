//! Every encoding of every type, against files that were looked at by a person.
//!
//! `UPDATE_GOLDEN=1 cargo test -p sink --test encode_golden` rewrites them.

mod support;

use std::path::PathBuf;
use std::sync::Arc;

use event::{RowBatch, TableInfo, TypeKind};
use heartbeatpb::WallTime;
use sink::encode::{BinaryEncoding, DecimalMode, EncodeOptions, Format, TableEncoder};
use support::{Rows, column, table};

/// Name, kind, SQL type, then a smallest, a largest and a special value.
fn samples() -> Vec<(&'static str, TypeKind, &'static str, [&'static str; 3])> {
    let enumeration = || TypeKind::Enum(vec!["sad".into(), "ok, fine".into()]);
    vec![
        ("bool", TypeKind::Bool, "boolean", ["f", "t", "t"]),
        ("int2", TypeKind::Int16, "smallint", ["-32768", "32767", "0"]),
        ("int4", TypeKind::Int32, "integer", ["-2147483648", "2147483647", "0"]),
        ("int8", TypeKind::Int64, "bigint", ["-9223372036854775808", "9223372036854775807", "0"]),
        ("float4", TypeKind::Float32, "real", ["-3.4028235e+38", "1e-45", "NaN"]),
        (
            "float8",
            TypeKind::Float64,
            "double precision",
            ["-1.7976931348623157e+308", "5e-324", "-Infinity"],
        ),
        (
            "numeric",
            TypeKind::Numeric { precision: None, scale: 0 },
            "numeric",
            ["-99999999999999999999999999999.000000001", "0.10", "NaN"],
        ),
        (
            "price",
            TypeKind::Numeric { precision: Some(10), scale: 2 },
            "numeric(10,2)",
            ["-99999999.99", "0.00", "1.50"],
        ),
        ("bpchar", TypeKind::Char(Some(4)), "character(4)", ["    ", "abcd", "é   "]),
        ("varchar", TypeKind::Varchar(Some(20)), "character varying(20)", ["", "a,b\"c", "line\r\nbreak"]),
        ("text", TypeKind::Text, "text", ["", "a\\N\\", "tab\t\u{1}\u{1f600}"]),
        ("bytea", TypeKind::Bytes, "bytea", ["\\x", "\\x00ff7f80", "\\xdeadbeef"]),
        ("date", TypeKind::Date, "date", ["4714-11-24 BC", "5874897-12-31", "infinity"]),
        ("time", TypeKind::Time, "time without time zone", ["00:00:00", "24:00:00", "12:34:56.789012"]),
        (
            "timetz",
            TypeKind::TimeTz,
            "time with time zone",
            ["00:00:00+15", "23:59:59.999999-15:30", "12:00:00+00"],
        ),
        (
            "timestamp",
            TypeKind::Timestamp,
            "timestamp without time zone",
            ["4714-11-24 00:00:00 BC", "294246-12-31 23:59:59.999999", "-infinity"],
        ),
        (
            "timestamp3",
            TypeKind::Timestamp,
            "timestamp(3) without time zone",
            ["1969-12-31 23:59:59.999", "2024-02-29 12:00:00", "infinity"],
        ),
        (
            "timestamptz",
            TypeKind::TimestampTz,
            "timestamp with time zone",
            ["4714-11-24 00:00:00+00 BC", "2024-02-29 23:59:59.999999+00", "infinity"],
        ),
        (
            "interval",
            TypeKind::Interval,
            "interval",
            ["-178000000 years", "1 year 2 mons 3 days 04:05:06", "00:00:00"],
        ),
        (
            "uuid",
            TypeKind::Uuid,
            "uuid",
            [
                "00000000-0000-0000-0000-000000000000",
                "ffffffff-ffff-ffff-ffff-ffffffffffff",
                "123e4567-e89b-12d3-a456-426614174000",
            ],
        ),
        ("json", TypeKind::Json, "json", ["{}", "{\"a\": [1, null, \"x\"]}", "null"]),
        ("jsonb", TypeKind::Jsonb, "jsonb", ["[]", "{\"b\": \"\\\"\"}", "1e400"]),
        ("bit1", TypeKind::Bit(Some(1)), "bit(1)", ["0", "1", "1"]),
        ("bit12", TypeKind::Bit(Some(12)), "bit(12)", ["000000000000", "111111111111", "000000000101"]),
        ("varbit", TypeKind::Bit(None), "bit varying", ["", "0001", "1"]),
        ("xml", TypeKind::Xml, "xml", ["", "<a b=\"c\">&amp;</a>", "<!-- -->"]),
        ("mood", enumeration(), "app.mood", ["sad", "ok, fine", "added later"]),
        ("list", TypeKind::Array(Box::new(TypeKind::Int32)), "integer[]", ["{}", "{1,NULL,-3}", "{{1},{2}}"]),
        ("amount", TypeKind::Domain(Box::new(TypeKind::Int32)), "app.amount", ["-1", "1", "0"]),
        ("inet", TypeKind::Other, "inet", ["0.0.0.0/0", "::1", "10.0.0.1/8"]),
    ]
}

fn every_type() -> Arc<TableInfo> {
    let mut columns = vec![column("id", TypeKind::Int64, "bigint", false)];
    columns.extend(samples().into_iter().map(|(name, kind, sql, _)| column(name, kind, sql, true)));
    let mut generated = column("doubled", TypeKind::Int64, "bigint", true);
    generated.generated = Some("id * 2".into());
    columns.push(generated);
    table(1, "every \"type\"", 100, columns, &[0])
}

fn image<'a>(id: &'a str, value: impl Fn([&'static str; 3]) -> &'a str) -> Vec<&'a str> {
    let mut image = vec![id];
    image.extend(samples().into_iter().map(|(_, _, _, values)| value(values)));
    image.push("\\U");
    image
}

/// One insert per kind of value, an update with and without an old image, one of the key, and deletes.
fn rows() -> RowBatch {
    let (smallest, largest) = (image("1", |v| v[0]), image("2", |v| v[1]));
    let (special, nulls) = (image("3", |v| v[2]), image("4", |_| "\\N"));
    let (unchanged, key) = (image("1", |_| "\\U"), image("5", |_| "\\U"));
    let moved = image("6", |_| "\\U");
    Rows::of(&every_type())
        .at(200, 0)
        .insert(&smallest)
        .insert(&largest)
        .insert(&special)
        .insert(&nulls)
        .at(201, 7)
        .update(None, &unchanged)
        .update(Some(&key), &moved)
        .update(Some(&image("1", |v| v[0])), &image("1", |_| "\\N"))
        .delete(&image("2", |_| "\\U"))
        .delete(&special)
        .build()
}

fn encode(options: &EncodeOptions, batch: &RowBatch) -> String {
    let encoder = TableEncoder::new(&Arc::new(options.clone()), &batch.table);
    let mut out = Vec::new();
    encoder.header(&mut out);
    for row in batch.iter() {
        encoder.encode(&row, WallTime(1_700_000_001_000_000), &mut out).expect("the samples are valid");
    }
    String::from_utf8(out).expect("text")
}

fn check(name: &str, text: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::create_dir_all(path.parent().expect("a directory")).expect("created");
        std::fs::write(&path, text).expect("written");
        return;
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    for (line, (golden, got)) in golden.split('\n').zip(text.split('\n')).enumerate() {
        assert_eq!(got, golden, "{name}, line {}", line + 1);
    }
    assert_eq!(text.len(), golden.len(), "{name} has another length");
}

fn options(format: Format) -> EncodeOptions {
    let mut options = EncodeOptions::new(format);
    options.terminator = "\n".into();
    options
}

#[test]
// behaviour: dataplane-9
fn canal_json_writes_every_type_as_before() {
    let text = encode(&options(Format::CanalJson), &rows());
    check("canal_json.json", &text);
    for line in text.lines() {
        let row: serde_json::Value = serde_json::from_str(line).expect("JSON");
        let keys: Vec<&str> = row.as_object().expect("an object").keys().map(String::as_str).collect();
        assert_eq!(
            keys,
            [
                "id",
                "database",
                "table",
                "pkNames",
                "isDdl",
                "type",
                "es",
                "ts",
                "sql",
                "sqlType",
                "mysqlType",
                "old",
                "data",
                "_tidb"
            ]
        );
    }
}

#[test]
fn canal_json_with_options_writes_what_they_say() {
    let mut options = options(Format::CanalJson);
    options.canal_extension = false;
    options.only_updated_columns = true;
    options.only_key_on_delete = true;
    options.canal_unchanged = Some("?".into());
    check("canal_json_options.json", &encode(&options, &rows()));
}

#[test]
// behaviour: dataplane-9
fn debezium_writes_every_type_as_before() {
    let text = encode(&options(Format::Debezium), &rows());
    check("debezium.json", &text);
    for line in text.lines() {
        let row: serde_json::Value = serde_json::from_str(line).expect("JSON");
        assert_eq!(row["payload"]["source"]["connector"], "millrace");
        let fields = row["schema"]["fields"][1]["fields"].as_array().expect("fields of after");
        assert_eq!(fields.len(), samples().len() + 1, "generated columns are not written");
    }
}

#[test]
fn debezium_with_options_writes_what_they_say() {
    let mut options = options(Format::Debezium);
    options.debezium_schema = false;
    options.debezium_old_value = false;
    options.debezium_start_ts = true;
    options.debezium_decimal = DecimalMode::Double;
    options.only_key_on_delete = true;
    check("debezium_options.json", &encode(&options, &rows()));
}

#[test]
// behaviour: dataplane-9
fn csv_writes_every_type_as_before() {
    check("plain.csv", &encode(&options(Format::Csv), &rows()));
}

#[test]
fn csv_with_options_writes_what_they_say() {
    let mut options = options(Format::Csv);
    options.csv.include_commit_ts = true;
    options.csv.output_old_value = true;
    options.csv.header = true;
    options.csv.binary = BinaryEncoding::Hex;
    options.csv.null = "NULL".into();
    options.csv.delimiter = "|+|".into();
    options.csv.quote = Some('\'');
    check("options.csv", &encode(&options, &rows()));
    options.csv.quote = None;
    options.csv.delimiter = ",".into();
    check("unquoted.csv", &encode(&options, &rows()));
}

#[test]
fn a_value_that_is_not_of_its_type_is_named_and_never_shown() {
    let samples = [
        (TypeKind::Bool, "boolean"),
        (TypeKind::Int32, "integer"),
        (TypeKind::Float64, "double precision"),
        (TypeKind::Bytes, "bytea"),
        (TypeKind::Date, "date"),
        (TypeKind::TimestampTz, "timestamp with time zone"),
        (TypeKind::Bit(Some(3)), "bit(3)"),
    ];
    for (kind, sql) in samples {
        let shape = table(1, "t", 1, vec![column("secretless", kind, sql, true)], &[]);
        let batch = Rows::of(&shape).at(5, 0).insert(&["1,\"s3cret"]).build();
        let encoder = TableEncoder::new(&Arc::new(options(Format::Debezium)), &shape);
        let mut out = b"before".to_vec();
        let row = batch.iter().next().expect("one row");
        let error = encoder.encode(&row, WallTime(0), &mut out).expect_err(sql).to_string();
        assert!(error.contains("secretless") && !error.contains("s3cret"), "{error}");
        assert_eq!(out, b"before", "nothing of the row stays");
    }
}
