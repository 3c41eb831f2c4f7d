//! The encoding of keys: its order, its equality, its limits.

use std::cmp::Ordering;

use proptest::prelude::*;

use super::*;
use crate::testing::{column, key, table_of};

fn codec(kinds: &[TypeKind]) -> KeyCodec {
    KeyCodec::new(&table_of(kinds)).expect("divisible")
}

fn encode(codec: &KeyCodec, values: &[&str]) -> Vec<u8> {
    codec.encode_values(values).unwrap_or_else(|| panic!("{values:?} are no key"))
}

const NUMERIC: TypeKind = TypeKind::Numeric { precision: None, scale: 0 };

/// Values of one type in the order of the database.
fn ordered(kind: TypeKind, values: &[&str]) {
    let codec = codec(&[kind]);
    let keys: Vec<_> = values.iter().map(|value| encode(&codec, &[value])).collect();
    for (at, pair) in keys.windows(2).enumerate() {
        assert!(pair[0] < pair[1], "{} is before {}", values[at], values[at + 1]);
    }
    for key in &keys {
        let values = codec.decode(key).expect("a key");
        let texts: Vec<&str> = values.iter().map(String::as_str).collect();
        assert_eq!(&encode(&codec, &texts), key, "{values:?}");
    }
}

#[test]
fn keys_are_in_the_order_of_the_database() {
    ordered(TypeKind::Bool, &["f", "t"]);
    ordered(
        TypeKind::Int64,
        &["-9223372036854775808", "-300", "-1", "0", "1", "255", "256", "9223372036854775807"],
    );
    ordered(TypeKind::Int64, &["0", "2147483648", "4294967295"]);
    ordered(
        NUMERIC,
        &[
            "-Infinity",
            "-1000000000000000000000",
            "-10.1",
            "-10",
            "-9.99",
            "-1",
            "-0.5",
            "-0.05",
            "-0.0499",
            "0",
            "0.00001",
            "0.0499",
            "0.05",
            "0.051",
            "0.5",
            "1",
            "1.05",
            "1.5",
            "9.99",
            "10",
            "10.01",
            "99",
            "100",
            "12345678901234567890123456789",
            "Infinity",
            "NaN",
        ],
    );
    ordered(
        TypeKind::Date,
        &[
            "-infinity",
            "4714-11-24 BC",
            "0044-03-15 BC",
            "0001-12-31 BC",
            "0001-01-01",
            "1969-12-31",
            "1970-01-01",
            "2000-02-29",
            "2000-03-01",
            "9999-12-31",
            "10000-01-01",
            "5874897-12-31",
            "infinity",
        ],
    );
    ordered(
        TypeKind::Time,
        &["00:00:00", "00:00:00.000001", "00:00:00.1", "09:59:59", "23:59:59.999999", "24:00:00"],
    );
    ordered(
        TypeKind::Timestamp,
        &[
            "-infinity",
            "4714-11-24 00:00:00 BC",
            "0044-03-15 12:00:00 BC",
            "1969-12-31 23:59:59.999999",
            "1970-01-01 00:00:00",
            "2024-02-29 10:00:00.5",
            "2024-02-29 10:00:00.51",
            "294276-12-31 23:59:59.999999",
            "infinity",
        ],
    );
    ordered(
        TypeKind::TimestampTz,
        &[
            "-infinity",
            "0044-03-15 12:00:00+00 BC",
            "2024-01-01 00:00:00+01",
            "2024-01-01 00:00:00+00",
            "2024-01-01 00:00:00-00:30",
            "2024-01-01 00:30:00.1+00",
            "infinity",
        ],
    );
    ordered(
        TypeKind::Uuid,
        &[
            "00000000-0000-0000-0000-000000000000",
            "00000000-0000-0000-0000-0000000000ff",
            "7fffffff-0000-0000-0000-000000000000",
            "80000000-0000-0000-0000-000000000000",
        ],
    );
    ordered(
        TypeKind::Bytes,
        &["\\x", "\\x00", "\\x0000", "\\x0001", "\\x01", "\\x0100", "\\xfe", "\\xff", "\\xff00"],
    );
    ordered(TypeKind::Text, &["", " ", "A", "AA", "B", "a", "a ", "aa", "ä", "😀"]);
    ordered(TypeKind::Bit(None), &["0", "00", "01", "1", "10"]);
}

#[test]
fn values_that_the_database_calls_equal_have_equal_bytes() {
    for (kind, values) in [
        (NUMERIC, &["1", "1.0", "01.000"][..]),
        (NUMERIC, &["0", "0.00", "-0.0"]),
        (NUMERIC, &["-1200", "-1200.0"]),
        (TypeKind::Char(Some(4)), &["a", "a   "]),
        (TypeKind::Char(None), &["", "  "]),
        (TypeKind::Timestamp, &["2024-01-01 00:00:00", "2024-01-01 00:00:00.000"]),
        (
            TypeKind::TimestampTz,
            &["2024-01-01 00:00:00+00", "2024-01-01 01:00:00+01", "2023-12-31 23:30:00-00:30"],
        ),
        (TypeKind::Uuid, &["0000000A-0000-0000-0000-000000000000", "0000000a-0000-0000-0000-000000000000"]),
        (TypeKind::Domain(Box::new(NUMERIC)), &["5", "5.0"]),
    ] {
        let codec = codec(&[kind]);
        for pair in values.windows(2) {
            assert_eq!(encode(&codec, &pair[..1]), encode(&codec, &pair[1..]), "{pair:?}");
        }
    }
}

#[test]
fn what_is_no_value_of_its_type_is_refused() {
    for (kind, values) in [
        (TypeKind::Bool, &["true", ""][..]),
        (TypeKind::Int32, &["", "1.0", "x", "99999999999999999999"]),
        (NUMERIC, &["", "-", ".", "1e5", "1.2.3", "nan"]),
        (TypeKind::Date, &["", "2024-01", "2024-13-01", "01/02/2024", "2024-01-01 BC BC"]),
        (TypeKind::Time, &["", "10:00", "25:00:00", "10:00:00.1234567"]),
        (TypeKind::Timestamp, &["2024-01-01", "2024-01-01T00:00:00"]),
        (TypeKind::TimestampTz, &["2024-01-01 00:00:00", "2024-01-01 00:00:00 UTC"]),
        (TypeKind::Uuid, &["", "0000000g-0000-0000-0000-000000000000", "00000000000000000000000000000000"]),
        (TypeKind::Bytes, &["abc", "\\x0", "\\x0g"]),
    ] {
        let codec = codec(&[kind]);
        for value in values {
            assert_eq!(codec.encode_values(&[value]), None, "{value:?}");
        }
    }
}

#[test]
fn a_table_is_divisible_by_a_primary_key_whose_equality_is_that_of_its_text() {
    let divisible = table_of(&[TypeKind::Int64, TypeKind::Text]);
    assert!(divisible.is_divisible());
    for kind in [
        TypeKind::Float64,
        TypeKind::Enum(vec!["a".into()]),
        TypeKind::TimeTz,
        TypeKind::Interval,
        TypeKind::Jsonb,
        TypeKind::Array(Box::new(TypeKind::Int32)),
        TypeKind::Nondeterministic(Box::new(TypeKind::Text)),
        TypeKind::Domain(Box::new(TypeKind::Nondeterministic(Box::new(TypeKind::Text)))),
        TypeKind::Other,
    ] {
        assert!(!table_of(&[TypeKind::Int32, kind.clone()]).is_divisible(), "{kind:?}");
    }
    let other_key = TableInfo {
        keys: vec![key(&[0], true), key(&[1], false)],
        columns: vec![column("k0", TypeKind::Int32), column("k1", TypeKind::Int32)],
        ..table_of(&[TypeKind::Int32])
    };
    assert!(!other_key.is_divisible());
    assert!(!TableInfo { keys: vec![key(&[0], false)], ..divisible.clone() }.is_divisible());
    assert!(!TableInfo { keys: Vec::new(), ..divisible.clone() }.is_divisible());
    for identity in [ReplicaIdentity::Nothing, ReplicaIdentity::Key(vec![1])] {
        assert!(!TableInfo { identity, ..divisible.clone() }.is_divisible());
    }
    let mut computed = divisible;
    computed.columns[0].generated = Some("1".into());
    assert!(!computed.is_divisible());
}

/// A numeric in hundredths.
fn hundredths(value: i64) -> String {
    let (sign, value) = (if value < 0 { "-" } else { "" }, value.unsigned_abs());
    format!("{sign}{}.{:02}", value / 100, value % 100)
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Composite(i64, i64, Vec<u8>, i32);

impl Composite {
    fn encode(&self) -> Vec<u8> {
        let kinds = [TypeKind::Int64, NUMERIC, TypeKind::Bytes, TypeKind::Date];
        let bytes = format!("\\x{}", hex_text(&self.2));
        let day = moment::date_text(i64::from(self.3)).expect("near");
        encode(&codec(&kinds), &[&self.0.to_string(), &hundredths(self.1), &bytes, &day])
    }
}

fn composite() -> impl Strategy<Value = Composite> {
    let byte = prop_oneof![Just(0u8), Just(1), Just(0xff), any::<u8>()];
    let small = prop_oneof![-3i64..3, any::<i64>()];
    let part = prop_oneof![-200i64..200, -(1i64 << 50)..1 << 50];
    (small, part, prop::collection::vec(byte, 0..4), -1_000_000i32..1_000_000)
        .prop_map(|(a, b, c, d)| Composite(a, b, c, d))
}

proptest! {
    #[test]
    fn composite_keys_are_ordered_and_none_begins_another(one in composite(), other in composite()) {
        let (a, b) = (one.encode(), other.encode());
        prop_assert!(!a.is_empty());
        prop_assert_eq!(a.cmp(&b), one.cmp(&other));
        prop_assert!(one.cmp(&other) == Ordering::Equal || !b.starts_with(&a));
    }

    #[test]
    fn a_key_is_read_back(one in composite()) {
        let kinds = [TypeKind::Int64, NUMERIC, TypeKind::Bytes, TypeKind::Date];
        let codec = codec(&kinds);
        let key = one.encode();
        let values = codec.decode(&key).expect("a key");
        let values: Vec<&str> = values.iter().map(String::as_str).collect();
        prop_assert_eq!(encode(&codec, &values), key);
    }

    #[test]
    fn random_bytes_and_texts_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..40), text in ".{0,20}") {
        for kind in [
            TypeKind::Bool, TypeKind::Int64, NUMERIC, TypeKind::Date, TypeKind::Time, TypeKind::Timestamp,
            TypeKind::TimestampTz, TypeKind::Uuid, TypeKind::Bytes, TypeKind::Text, TypeKind::Char(None),
        ] {
            let codec = codec(&[kind]);
            drop(codec.decode(&bytes));
            if let Some(key) = codec.encode_values(&[&text]) {
                prop_assert!(codec.decode(&key).is_some());
            }
        }
    }

    #[test]
    fn timestamps_are_read_back(micros in -62_135_596_800_000_000i64 * 2..253_402_300_800_000_000) {
        let text = moment::timestamp_text(micros, true).expect("near");
        prop_assert_eq!(moment::timestamp(text.as_bytes(), true), Some(micros));
    }
}
