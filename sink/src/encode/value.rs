//! What the encodings do with each neutral type, and back again. The table of types is on the page of [`crate::encode`].

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use event::{ColumnType, TypeKind};

use super::moment;

/// A column's treatment, decided once per table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Class {
    Bool,
    Int16,
    Int32,
    Int64,
    Float32,
    Float64,
    Numeric {
        precision: Option<u32>,
        scale: i32,
    },
    Char(Option<u32>),
    Varchar(Option<u32>),
    Text,
    Bytes,
    Date,
    Time,
    TimeTz,
    /// `millis`: at most three fractional digits.
    Timestamp {
        millis: bool,
    },
    TimestampTz,
    Interval,
    Uuid,
    Json,
    /// 1 to 64 bits.
    Bit(u32),
    LongBit,
    Xml,
    Enum(Vec<String>),
    Other,
}

/// The nearest MySQL type and its Java type code.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct MysqlType {
    pub(crate) name: &'static str,
    pub(crate) java: i32,
}

/// The number in the first parentheses, such as 3 of `timestamp(3) without time zone`.
fn modifier(sql: &str) -> Option<u32> {
    let (_, rest) = sql.split_once('(')?;
    rest.split([')', ',']).next()?.trim().parse().ok()
}

impl Class {
    pub(crate) fn of(ty: &ColumnType) -> Self {
        match ty.kind.base() {
            TypeKind::Bool => Class::Bool,
            TypeKind::Int16 => Class::Int16,
            TypeKind::Int32 => Class::Int32,
            TypeKind::Int64 => Class::Int64,
            TypeKind::Float32 => Class::Float32,
            TypeKind::Float64 => Class::Float64,
            TypeKind::Numeric { precision, scale } => Class::Numeric { precision: *precision, scale: *scale },
            TypeKind::Char(len) => Class::Char(*len),
            TypeKind::Varchar(len) => Class::Varchar(*len),
            TypeKind::Text => Class::Text,
            TypeKind::Bytes => Class::Bytes,
            TypeKind::Date => Class::Date,
            TypeKind::Time => Class::Time,
            TypeKind::TimeTz => Class::TimeTz,
            TypeKind::Timestamp => Class::Timestamp {
                millis: ty.sql.starts_with("timestamp") && modifier(&ty.sql).is_some_and(|n| n <= 3),
            },
            TypeKind::TimestampTz => Class::TimestampTz,
            TypeKind::Interval => Class::Interval,
            TypeKind::Uuid => Class::Uuid,
            TypeKind::Json | TypeKind::Jsonb => Class::Json,
            TypeKind::Bit(len) => match len {
                Some(n)
                    if (1..=64).contains(n)
                        && !ty.sql.starts_with("bit varying")
                        && !ty.sql.starts_with("varbit") =>
                {
                    Class::Bit(*n)
                }
                Some(_) | None => Class::LongBit,
            },
            TypeKind::Xml => Class::Xml,
            TypeKind::Enum(labels) => Class::Enum(labels.clone()),
            // `Domain` is below `base()`; a kind that a later version adds is text.
            TypeKind::Array(_) | TypeKind::Domain(_) | TypeKind::Other | _ => Class::Other,
        }
    }

    pub(crate) const fn mysql(&self) -> MysqlType {
        let (name, java) = match self {
            Class::Bool => ("tinyint", -6),
            Class::Int16 => ("smallint", 5),
            Class::Int32 => ("int", 4),
            Class::Int64 => ("bigint", -5),
            Class::Float32 => ("float", 7),
            Class::Float64 => ("double", 8),
            Class::Numeric { .. } => ("decimal", 3),
            Class::Char(_) | Class::Uuid => ("char", 1),
            Class::Varchar(_) | Class::TimeTz | Class::Interval | Class::LongBit => ("varchar", 12),
            Class::Text | Class::Xml | Class::Other => ("text", 2005),
            Class::Bytes => ("blob", 2004),
            Class::Date => ("date", 91),
            Class::Time => ("time", 92),
            Class::Timestamp { .. } => ("datetime", 93),
            Class::TimestampTz => ("timestamp", 93),
            Class::Json => ("json", 12),
            Class::Bit(_) => ("bit", -7),
            Class::Enum(_) => ("enum", 4),
        };
        MysqlType { name, java }
    }

    /// Digits or length, and digits behind the point, where the type limits them.
    pub(crate) const fn precision(&self) -> (Option<u32>, Option<i32>) {
        match self {
            Class::Numeric { precision: Some(precision), scale } => (Some(*precision), Some(*scale)),
            Class::Char(len) | Class::Varchar(len) => (*len, None),
            Class::Bit(len) => (Some(*len), None),
            Class::Timestamp { millis: true } => (None, Some(3)),
            Class::Bool
            | Class::Int16
            | Class::Int32
            | Class::Int64
            | Class::Float32
            | Class::Float64
            | Class::Numeric { precision: None, .. }
            | Class::Text
            | Class::Bytes
            | Class::Date
            | Class::Time
            | Class::TimeTz
            | Class::Timestamp { millis: false }
            | Class::TimestampTz
            | Class::Interval
            | Class::Uuid
            | Class::Json
            | Class::LongBit
            | Class::Xml
            | Class::Enum(_)
            | Class::Other => (None, None),
        }
    }

    /// The class of a column in a schema file: the inverse of [`Class::mysql`] as far as reading needs it.
    pub(crate) fn of_schema_file(
        mysql: &str,
        source: &str,
        precision: Option<u32>,
        scale: Option<i32>,
        labels: Vec<String>,
    ) -> Self {
        let starts = |prefix: &str| source.starts_with(prefix);
        match mysql.to_ascii_lowercase().as_str() {
            "tinyint" => Class::Bool,
            "smallint" => Class::Int16,
            "int" => Class::Int32,
            "bigint" => Class::Int64,
            "float" => Class::Float32,
            "double" => Class::Float64,
            "decimal" => Class::Numeric { precision, scale: scale.unwrap_or_default() },
            "char" if source == "uuid" => Class::Uuid,
            "char" => Class::Char(precision),
            "varchar" if starts("time") && source.ends_with("with time zone") => Class::TimeTz,
            "varchar" if starts("interval") => Class::Interval,
            "varchar" if starts("bit") => Class::LongBit,
            "varchar" => Class::Varchar(precision),
            "blob" => Class::Bytes,
            "date" => Class::Date,
            "time" => Class::Time,
            "datetime" => Class::Timestamp { millis: scale.is_some_and(|n| n <= 3) },
            "timestamp" => Class::TimestampTz,
            "json" => Class::Json,
            "bit" => Class::Bit(precision.unwrap_or(1)),
            "enum" => Class::Enum(labels),
            "text" if source == "text" => Class::Text,
            "text" if source == "xml" => Class::Xml,
            _ => Class::Other,
        }
    }
}

/// Whether the text is a decimal integer.
pub(crate) fn is_integer(text: &str) -> bool {
    let digits = text.strip_prefix('-').unwrap_or(text);
    !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit())
}

/// Whether the text is a float that has no number: NaN and the infinities.
pub(crate) fn is_special(text: &str) -> bool {
    matches!(text, "NaN" | "Infinity" | "-Infinity")
}

/// `t` or `f`.
pub(crate) fn boolean(text: &str) -> Option<bool> {
    match text {
        "t" => Some(true),
        "f" => Some(false),
        _ => None,
    }
}

/// The bytes of `\x` and hex digits.
pub(crate) fn bytes(text: &str) -> Option<Vec<u8>> {
    let hex = text.strip_prefix("\\x")?.as_bytes();
    if !hex.len().is_multiple_of(2) {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    hex.chunks_exact(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
}

/// `\x` and hex digits, the inverse of [`bytes`].
pub(crate) fn bytes_text(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 + bytes.len() * 2);
    text.push_str("\\x");
    text.push_str(&hex(bytes));
    text
}

/// Lower-case hex digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let digit = |nibble: u8| char::from(if nibble < 10 { b'0' + nibble } else { b'a' + nibble - 10 });
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// The number that up to 64 binary digits are.
pub(crate) fn bits(text: &str) -> Option<u64> {
    let binary = !text.is_empty() && text.len() <= 64 && text.bytes().all(|b| matches!(b, b'0' | b'1'));
    if binary { u64::from_str_radix(text, 2).ok() } else { None }
}

/// Base64 with padding.
pub(crate) fn base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// The inverse of [`base64`].
pub(crate) fn from_base64(text: &str) -> Option<Vec<u8>> {
    STANDARD.decode(text).ok()
}

/// A decimal number taken apart: `digits` behind a point, times ten to the `exponent`. No rounding happens, so
/// that the digits that the upstream chose stay.
struct Decimal<'a> {
    sign: &'a str,
    /// Without zeros on either side; empty for zero.
    digits: String,
    exponent: i32,
}

impl<'a> Decimal<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let (sign, rest) = text.split_at(usize::from(text.starts_with('-')));
        let (mantissa, exponent) = rest.split_once(['e', 'E']).unwrap_or((rest, "0"));
        let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
        if whole.is_empty() || !whole.bytes().chain(fraction.bytes()).all(|b| b.is_ascii_digit()) {
            return None;
        }
        let exponent: i32 = exponent.strip_prefix('+').unwrap_or(exponent).parse().ok()?;
        let all = format!("{whole}{fraction}");
        let digits = all.trim_start_matches('0');
        let leading = i32::try_from(all.len() - digits.len()).ok()?;
        let point = i32::try_from(whole.len()).ok()?.checked_sub(leading)?.checked_add(exponent)?;
        let digits = digits.trim_end_matches('0').to_owned();
        // No float is further away, and the text below would grow without limit.
        let exponent = if digits.is_empty() { 1 } else { point };
        (-400..=400).contains(&exponent).then_some(Self { sign, digits, exponent })
    }

    /// Without exponent.
    fn plain(&self) -> String {
        let Self { sign, digits, exponent } = self;
        if digits.is_empty() {
            return format!("{sign}0");
        }
        let count = digits.len();
        match usize::try_from(*exponent) {
            Ok(whole) if whole >= count => format!("{sign}{digits}{}", "0".repeat(whole - count)),
            Ok(whole) if whole > 0 => format!("{sign}{}.{}", &digits[..whole], &digits[whole..]),
            Ok(_) | Err(_) => format!("{sign}0.{}{digits}", "0".repeat(exponent.unsigned_abs() as usize)),
        }
    }
}

/// A float as a decimal without exponent.
pub(crate) fn plain_float(text: &str) -> Option<String> {
    if is_special(text) {
        return Some(text.into());
    }
    Decimal::parse(text).map(|decimal| decimal.plain())
}

/// A float as PostgreSQL's output function writes it: scientific below 1e-4 and from 1e6 (single) or 1e15
/// (double).
pub(crate) fn float_text(text: &str, single: bool) -> Option<String> {
    if is_special(text) {
        return Some(text.into());
    }
    let decimal = Decimal::parse(text)?;
    let exponent = decimal.exponent - 1;
    if decimal.digits.is_empty() || (-4..if single { 6 } else { 15 }).contains(&exponent) {
        return Some(decimal.plain());
    }
    let (first, rest) = decimal.digits.split_at(1);
    let point = if rest.is_empty() { "" } else { "." };
    let sign = if exponent < 0 { '-' } else { '+' };
    Some(format!("{}{first}{point}{rest}e{sign}{:02}", decimal.sign, exponent.abs()))
}

/// The upstream's text of a canal-json value; `None` when it is malformed.
pub(crate) fn from_canal(class: &Class, text: String) -> Option<String> {
    Some(match class {
        Class::Bool => match text.as_str() {
            "1" => "t".into(),
            "0" => "f".into(),
            _ => return None,
        },
        Class::Float32 => float_text(&text, true)?,
        Class::Float64 => float_text(&text, false)?,
        Class::Bytes => {
            let bytes = text.chars().map(|c| u8::try_from(u32::from(c)).ok()).collect::<Option<Vec<u8>>>()?;
            bytes_text(&bytes)
        }
        Class::TimestampTz => plain_utc_text(text),
        Class::Bit(len) => format!("{:0width$b}", text.parse::<u64>().ok()?, width = *len as usize),
        Class::Enum(labels) => match text.parse::<usize>() {
            Ok(position) if (1..=labels.len()).contains(&position) => labels[position - 1].clone(),
            Ok(_) | Err(_) => text,
        },
        Class::Int16
        | Class::Int32
        | Class::Int64
        | Class::Numeric { .. }
        | Class::Char(_)
        | Class::Varchar(_)
        | Class::Text
        | Class::Date
        | Class::Time
        | Class::TimeTz
        | Class::Timestamp { .. }
        | Class::Interval
        | Class::Uuid
        | Class::Json
        | Class::LongBit
        | Class::Xml
        | Class::Other => text,
    })
}

/// A timestamp with time zone without its `+00`.
pub(crate) fn plain_utc(text: &str) -> String {
    match text.strip_suffix(" BC") {
        Some(rest) => format!("{} BC", rest.strip_suffix("+00").unwrap_or(rest)),
        None => text.strip_suffix("+00").unwrap_or(text).to_owned(),
    }
}

/// The inverse of [`plain_utc`].
fn plain_utc_text(text: String) -> String {
    if matches!(text.as_str(), "infinity" | "-infinity") {
        return text;
    }
    let (rest, bc) = text.strip_suffix(" BC").map_or((text.as_str(), ""), |rest| (rest, " BC"));
    let zoned = rest.split_once(' ').is_some_and(|(_, time)| time.contains(['+', '-']));
    if zoned { text } else { format!("{rest}+00{bc}") }
}

/// The upstream's text of a debezium value; `None` when it is malformed. A number is taken by its digits: as a
/// float it could come back with others.
pub(crate) fn from_debezium(class: &Class, raw: &serde_json::value::RawValue) -> Option<String> {
    let value: serde_json::Value = serde_json::from_str(raw.get()).ok()?;
    let text = || value.as_str().map(str::to_owned);
    Some(match class {
        Class::Bool => if value.as_bool()? { "t" } else { "f" }.into(),
        Class::Bit(1) => if value.as_bool()? { "1" } else { "0" }.into(),
        Class::Int16 | Class::Int32 | Class::Int64 => value.as_i64()?.to_string(),
        Class::Float32 | Class::Float64 => {
            let digits = text().unwrap_or_else(|| raw.get().to_owned());
            float_text(&digits, *class == Class::Float32)?
        }
        Class::Numeric { .. } => text().unwrap_or_else(|| raw.get().to_owned()),
        Class::Bytes => bytes_text(&from_base64(value.as_str()?)?),
        Class::Bit(len) => {
            let mut number = [0; 8];
            for (to, from) in number.iter_mut().zip(from_base64(value.as_str()?)?) {
                *to = from;
            }
            format!("{:0width$b}", u64::from_le_bytes(number), width = *len as usize)
        }
        Class::Date => moment::date_text(value.as_i64()?),
        Class::Time => moment::time_text(value.as_i64()?),
        Class::TimeTz => moment::zoned_time_text(value.as_str()?),
        Class::Timestamp { millis } => match (value.as_i64()?, millis) {
            (millis, true) if millis == moment::POSITIVE_INFINITY.div_euclid(1000) => "infinity".into(),
            (millis, true) if millis == moment::NEGATIVE_INFINITY.div_euclid(1000) => "-infinity".into(),
            (millis, true) => moment::timestamp_text(millis.checked_mul(1000)?),
            (micros, false) => moment::timestamp_text(micros),
        },
        Class::TimestampTz => moment::zoned_timestamp_text(value.as_str()?)?,
        Class::Char(_)
        | Class::Varchar(_)
        | Class::Text
        | Class::Interval
        | Class::Uuid
        | Class::Json
        | Class::LongBit
        | Class::Xml
        | Class::Enum(_)
        | Class::Other => text()?,
    })
}

/// The upstream's text of a CSV value, which was not NULL; `None` when it is malformed.
pub(crate) fn from_csv(class: &Class, text: String, binary: super::BinaryEncoding) -> Option<String> {
    Some(match class {
        Class::Bool => match text.as_str() {
            "true" => "t".into(),
            "false" => "f".into(),
            _ => return None,
        },
        Class::Bytes => match binary {
            super::BinaryEncoding::Base64 => bytes_text(&from_base64(&text)?),
            super::BinaryEncoding::Hex => format!("\\x{text}"),
        },
        Class::Bit(len) => format!("{:0width$b}", text.parse::<u64>().ok()?, width = *len as usize),
        Class::Int16
        | Class::Int32
        | Class::Int64
        | Class::Float32
        | Class::Float64
        | Class::Numeric { .. }
        | Class::Char(_)
        | Class::Varchar(_)
        | Class::Text
        | Class::Date
        | Class::Time
        | Class::TimeTz
        | Class::Timestamp { .. }
        | Class::TimestampTz
        | Class::Interval
        | Class::Uuid
        | Class::Json
        | Class::LongBit
        | Class::Xml
        | Class::Enum(_)
        | Class::Other => text,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_read_back_as_postgresql_writes_them() {
        for (text, plain) in [
            ("0", "0"),
            ("-0", "-0"),
            ("0.1", "0.1"),
            ("1e+20", "100000000000000000000"),
            ("1.5e-07", "0.00000015"),
            ("123456789012345", "123456789012345"),
            ("1e+15", "1000000000000000"),
            ("NaN", "NaN"),
            ("-Infinity", "-Infinity"),
        ] {
            assert_eq!(plain_float(text).as_deref(), Some(plain));
            assert_eq!(float_text(plain, false).as_deref(), Some(text));
        }
        assert_eq!(float_text("1234567", true).as_deref(), Some("1.234567e+06"));
        assert_eq!(float_text("3.4028235e+38", true).as_deref(), Some("3.4028235e+38"));
    }

    #[test]
    fn bytes_and_bits_read_back() {
        assert_eq!(bytes("\\x00ff7f"), Some(vec![0, 255, 127]));
        assert_eq!(bytes_text(&[0, 255, 127]), "\\x00ff7f");
        for bad in ["", "00", "\\x0", "\\xzz"] {
            assert_eq!(bytes(bad), None, "{bad}");
        }
        assert_eq!(bits("101"), Some(5));
        assert_eq!(from_canal(&Class::Bit(5), "5".into()).as_deref(), Some("00101"));
        assert_eq!(bits("2"), None);
    }

    #[test]
    fn a_timestamp_in_utc_loses_and_regains_its_offset() {
        for (text, plain) in [
            ("2024-01-02 03:04:05+00", "2024-01-02 03:04:05"),
            ("0044-01-02 03:04:05+00 BC", "0044-01-02 03:04:05 BC"),
            ("2024-01-02 03:04:05+02", "2024-01-02 03:04:05+02"),
            ("infinity", "infinity"),
        ] {
            assert_eq!(plain_utc(text), plain);
            assert_eq!(plain_utc_text(plain.into()), text);
        }
    }
}
