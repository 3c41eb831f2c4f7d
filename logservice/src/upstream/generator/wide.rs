//! Wide rows: a column of nearly every type, NULLs, large values, and updates that leave the large value out.

use event::{RowOp, TableInfo, TypeKind};
use heartbeatpb::Ts;

use super::mix;
use super::params::Params;
use super::workload::{
    Change, Clock, Day, Filler, Moment, RowText, Type, Workload, bigint, column, enum_column, keyed_table,
    text,
};

const MOODS: [&str; 3] = ["sad", "ok", "happy"];

#[derive(Debug)]
pub(super) struct Wide {
    seed: u64,
    tables: u64,
    rows: u64,
    value_bytes: u64,
}

impl Wide {
    pub(super) fn new(params: &Params) -> Self {
        Self {
            seed: params.seed,
            tables: params.get("tables"),
            rows: params.get("rows"),
            value_bytes: params.get("value-bytes"),
        }
    }

    /// A row as of transaction `n`; without its large value when `partial`.
    fn image(&self, id: u64, n: u64, partial: bool, out: &mut RowText) {
        let hash = mix(self.seed, n, id);
        let value = |lane: u64| mix(hash, lane, 9);
        let signed = |lane: u64| i64::from_ne_bytes(value(lane).to_ne_bytes());
        out.clear().put(id);
        for lane in 0..COLUMNS {
            // Every eighth value is NULL.
            if value(lane + 100).is_multiple_of(8) {
                out.null();
                continue;
            }
            let v = value(lane);
            match lane {
                0 => out.put(if v.is_multiple_of(2) { 't' } else { 'f' }),
                1 => out.put(signed(lane) >> 48),
                2 => out.put(signed(lane) >> 32),
                3 => out.put(signed(lane)),
                // Eighths are exact in binary, so that their shortest text is known.
                4 => out.put(format_args!("{}.{}", v % 1000, ["125", "5", "875"][(v >> 32) as usize % 3])),
                5 => out.put(format_args!(
                    "-{}.{}",
                    v % 1_000_000_000,
                    ["25", "5", "375"][(v >> 32) as usize % 3]
                )),
                6 => out.put(format_args!("{}.{:04}", v % 10_000_000_000, v % 9_999)),
                7 => out.put(format_args!("{:<8}", v % 100_000)),
                8 => out.put(format_args!("naïve \"{}\"\\\t", v % 1000)),
                9 => out.put(format_args!("\\x{v:016x}00")),
                10 => out.put(Day(v % 1_000_000_000_000)),
                11 => out.put(Clock(v)),
                12 => out.put(Moment(v % 1_000_000_000_000)),
                13 => out.put(format_args!("{}+00", Moment(v % 1_000_000_000_000))),
                14 => out.put(format_args!("{} days {}", v % 300 + 2, Clock(v % 86_399_000 + 1000))),
                15 => out.put(format_args!(
                    "{:08x}-{:04x}-4{:03x}-a{:03x}-{:012x}",
                    v >> 32,
                    v & 0xffff,
                    v >> 20 & 0xfff,
                    v >> 40 & 0xfff,
                    v & 0xffff_ffff_ffff
                )),
                16 => out.put(format_args!("{{\"n\":{n},  \"v\" : [{}]}}", v % 100)),
                17 => {
                    out.put(format_args!("{{\"a\": {}, \"bb\": \"é\\\"\", \"ccc\": [null, true]}}", v % 100))
                }
                18 => out.put(format_args!("{:012b}", v & 0xfff)),
                19 => out.put(format_args!("{{{},NULL,-{}}}", v % 50, v % 7 + 1)),
                20 => out.put(format_args!("{{plain,\"two words {}\",\"\"}}", v % 10)),
                21 => out.put(format_args!("10.{}.{}.{}", v % 256, v >> 8 & 255, v >> 16 & 255)),
                _ => out.put(MOODS[v as usize % MOODS.len()]),
            };
        }
        if partial {
            out.unchanged();
        } else {
            out.put(Filler { hash, bytes: self.value_bytes });
        }
    }
}

/// Columns between the key and the large value.
const COLUMNS: u64 = 23;

impl Workload for Wide {
    fn tables(&self) -> usize {
        usize::try_from(self.tables).unwrap_or(usize::MAX)
    }

    fn table(&self, table: usize, _ddls: u64, version: Ts) -> Option<TableInfo> {
        let nullable = |name: &str, kind: TypeKind, sql: &'static str, oid: u32| {
            column(name, Type(kind, sql, oid), true)
        };
        let array = |kind: TypeKind| TypeKind::Array(Box::new(kind));
        let columns = vec![
            column("id", bigint(), false),
            nullable("flag", TypeKind::Bool, "boolean", 16),
            nullable("small", TypeKind::Int16, "smallint", 21),
            nullable("medium", TypeKind::Int32, "integer", 23),
            nullable("large", TypeKind::Int64, "bigint", 20),
            nullable("single", TypeKind::Float32, "real", 700),
            nullable("double", TypeKind::Float64, "double precision", 701),
            nullable("exact", TypeKind::Numeric { precision: Some(20), scale: 4 }, "numeric(20,4)", 1700),
            nullable("padded", TypeKind::Char(Some(8)), "character(8)", 1042),
            nullable("short_text", TypeKind::Varchar(Some(100)), "character varying(100)", 1043),
            nullable("raw", TypeKind::Bytes, "bytea", 17),
            nullable("day", TypeKind::Date, "date", 1082),
            nullable("clock", TypeKind::Time, "time without time zone", 1083),
            nullable("moment", TypeKind::Timestamp, "timestamp without time zone", 1114),
            nullable("moment_tz", TypeKind::TimestampTz, "timestamp with time zone", 1184),
            nullable("span", TypeKind::Interval, "interval", 1186),
            nullable("tag", TypeKind::Uuid, "uuid", 2950),
            nullable("doc", TypeKind::Json, "json", 114),
            nullable("docb", TypeKind::Jsonb, "jsonb", 3802),
            nullable("bits", TypeKind::Bit(Some(12)), "bit(12)", 1560),
            nullable("numbers", array(TypeKind::Int32), "integer[]", 1007),
            nullable("words", array(TypeKind::Text), "text[]", 1009),
            nullable("address", TypeKind::Other, "inet", 869),
            enum_column("mood", "wide", "mood", &MOODS),
            column("body", text(), true),
        ];
        let id = i64::try_from(2000 + table).unwrap_or(i64::MAX);
        Some(keyed_table(id, "wide", format!("wide_{table}"), version, columns))
    }

    fn first_rows(&self, _table: usize) -> u64 {
        self.rows
    }

    fn first_row(&self, _table: usize, number: u64, out: &mut RowText) {
        self.image(number + 1, 0, false, out);
    }

    /// Mostly an update, half of them without the large value; sometimes the row is deleted and inserted again.
    fn transaction(&self, n: u64, emit: &mut dyn FnMut(Change<'_>)) {
        let mut row = RowText::default();
        let table = usize::try_from(mix(self.seed, n, 1) % self.tables).unwrap_or_default();
        let id = mix(self.seed, n, 2) % self.rows + 1;
        if mix(self.seed, n, 3).is_multiple_of(16) {
            row.clear().put(id);
            for _ in 0..=COLUMNS {
                row.unchanged();
            }
            emit(Change { table, op: RowOp::Delete, old: Some(&row), new: None });
            self.image(id, n, false, &mut row);
            emit(Change { table, op: RowOp::Insert, old: None, new: Some(&row) });
        } else {
            self.image(id, n, mix(self.seed, n, 4).is_multiple_of(2), &mut row);
            emit(Change { table, op: RowOp::Update, old: None, new: Some(&row) });
        }
    }
}
