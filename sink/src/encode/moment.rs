//! Dates and times between PostgreSQL's text form and numbers since the Unix epoch.

use event::calendar::{civil_from_days, days_from_civil};

/// Microseconds of a day.
const DAY_MICROS: i64 = 86_400_000_000;

/// Microseconds that stand for `infinity`, as debezium's PostgreSQL connector has them.
pub(crate) const POSITIVE_INFINITY: i64 = 9_223_372_036_825_200_000;
/// Microseconds that stand for `-infinity`.
pub(crate) const NEGATIVE_INFINITY: i64 = -9_223_372_036_832_400_000;

fn number(text: &str) -> Option<i64> {
    (!text.is_empty() && text.len() <= 9 && text.bytes().all(|b| b.is_ascii_digit()))
        .then(|| text.parse().ok())?
}

/// Days since 1970-01-01 of `YYYY-MM-DD`, `bc` saying that the year counts backwards.
fn civil_date(text: &str, bc: bool) -> Option<i64> {
    let mut parts = text.split('-');
    let (year, month, day) = (number(parts.next()?)?, number(parts.next()?)?, number(parts.next()?)?);
    if parts.next().is_some() || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    Some(days_from_civil(if bc { 1 - year } else { year }, month, day))
}

/// Splits ` BC` off.
fn era(text: &str) -> (&str, bool) {
    text.strip_suffix(" BC").map_or((text, false), |text| (text, true))
}

/// Days since 1970-01-01 of a date; the infinities are the ends of `i32`.
pub(crate) fn date_days(text: &str) -> Option<i64> {
    match text {
        "infinity" => Some(i64::from(i32::MAX)),
        "-infinity" => Some(i64::from(i32::MIN)),
        text => {
            let (text, bc) = era(text);
            civil_date(text, bc)
        }
    }
}

/// Microseconds since midnight of `HH:MM:SS[.ffffff]`; `24:00:00` is a whole day.
pub(crate) fn time_micros(text: &str) -> Option<i64> {
    let (clock, fraction) = text.split_once('.').unwrap_or((text, ""));
    let mut parts = clock.split(':');
    let (hour, minute, second) = (number(parts.next()?)?, number(parts.next()?)?, number(parts.next()?)?);
    if parts.next().is_some() || hour > 24 || minute > 59 || second > 60 || fraction.len() > 6 {
        return None;
    }
    let mut micros = 0;
    if !fraction.is_empty() {
        micros = number(fraction)?;
        for _ in fraction.len()..6 {
            micros *= 10;
        }
    }
    Some(((hour * 60 + minute) * 60 + second) * 1_000_000 + micros)
}

/// Microseconds since the Unix epoch of a timestamp, read as UTC.
pub(crate) fn timestamp_micros(text: &str) -> Option<i64> {
    match text {
        "infinity" => return Some(POSITIVE_INFINITY),
        "-infinity" => return Some(NEGATIVE_INFINITY),
        _ => {}
    }
    let (text, bc) = era(text);
    let (date, time) = text.split_once(' ')?;
    civil_date(date, bc)?.checked_mul(DAY_MICROS)?.checked_add(time_micros(time)?)
}

/// The text of a date, the inverse of [`date_days`].
pub(crate) fn date_text(days: i64) -> String {
    if days == i64::from(i32::MAX) {
        return "infinity".into();
    }
    if days == i64::from(i32::MIN) {
        return "-infinity".into();
    }
    let (year, month, day) = civil_from_days(days);
    if year > 0 {
        format!("{year:04}-{month:02}-{day:02}")
    } else {
        format!("{:04}-{month:02}-{day:02} BC", 1 - year)
    }
}

/// The text of a time of day, the inverse of [`time_micros`].
pub(crate) fn time_text(micros: i64) -> String {
    let (seconds, fraction) = (micros.div_euclid(1_000_000), micros.rem_euclid(1_000_000));
    let clock = format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60);
    if fraction == 0 {
        return clock;
    }
    let digits = format!("{fraction:06}");
    format!("{clock}.{}", digits.trim_end_matches('0'))
}

/// The text of a timestamp, the inverse of [`timestamp_micros`].
pub(crate) fn timestamp_text(micros: i64) -> String {
    match micros {
        POSITIVE_INFINITY => return "infinity".into(),
        NEGATIVE_INFINITY => return "-infinity".into(),
        _ => {}
    }
    let date = date_text(micros.div_euclid(DAY_MICROS));
    let time = time_text(micros.rem_euclid(DAY_MICROS));
    match date.strip_suffix(" BC") {
        Some(date) => format!("{date} {time} BC"),
        None => format!("{date} {time}"),
    }
}

/// `2024-01-02 03:04:05.6+00` as `2024-01-02T03:04:05.6Z`; another offset keeps its digits as `+HH:MM`.
/// The infinities stay words, and a year before 1 gets a sign and four digits.
pub(crate) fn zoned_timestamp(text: &str) -> Option<String> {
    if matches!(text, "infinity" | "-infinity") {
        return Some(text.into());
    }
    let (text, bc) = era(text);
    let (date, time) = text.split_once(' ')?;
    civil_date(date, bc)?;
    let (clock, offset) = time.split_at(time.find(['+', '-'])?);
    time_micros(clock)?;
    let offset = match offset {
        "+00" => "Z".to_owned(),
        offset => iso_offset(offset),
    };
    let date = if bc {
        let (year, rest) = date.split_once('-')?;
        let year = 1 - number(year)?;
        format!("{}{:04}-{rest}", if year < 0 { "-" } else { "" }, year.abs())
    } else {
        date.to_owned()
    };
    Some(format!("{date}T{clock}{offset}"))
}

/// The inverse of [`zoned_timestamp`].
pub(crate) fn zoned_timestamp_text(iso: &str) -> Option<String> {
    if matches!(iso, "infinity" | "-infinity") {
        return Some(iso.into());
    }
    let (date, time) = iso.split_once('T')?;
    let time = match time.strip_suffix('Z') {
        Some(clock) => format!("{clock}+00"),
        None => time.strip_suffix(":00").unwrap_or(time).to_owned(),
    };
    let negative = date.strip_prefix('-');
    let (year, rest) = negative.unwrap_or(date).split_once('-')?;
    let year = number(year)?;
    if negative.is_some() || year == 0 {
        return Some(format!("{:04}-{rest} {time} BC", year + 1));
    }
    Some(format!("{date} {time}"))
}

/// `+02` as `+02:00`; offsets with minutes stay.
fn iso_offset(offset: &str) -> String {
    if offset.len() == 3 { format!("{offset}:00") } else { offset.to_owned() }
}

/// A time with an offset as ISO 8601: `13:30:00+02` as `13:30:00+02:00`.
pub(crate) fn zoned_time(text: &str) -> Option<String> {
    let (clock, offset) = text.split_at(text.find(['+', '-'])?);
    time_micros(clock)?;
    Some(format!("{clock}{}", iso_offset(offset)))
}

/// The inverse of [`zoned_time`].
pub(crate) fn zoned_time_text(iso: &str) -> String {
    iso.strip_suffix(":00")
        .filter(|rest| rest.len() > 8 && rest.contains(['+', '-']))
        .unwrap_or(iso)
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_go_both_ways_over_the_whole_range_of_postgresql() {
        for (text, days) in [
            ("1970-01-01", 0),
            ("2000-03-01", 11_017),
            ("1969-12-31", -1),
            ("0001-01-01", -719_162),
            ("0001-12-31 BC", -719_163),
            ("4714-11-24 BC", -2_440_588),
            ("5874897-12-31", 2_145_042_905),
            ("infinity", 2_147_483_647),
        ] {
            assert_eq!(date_days(text), Some(days), "{text}");
            assert_eq!(date_text(days), text);
        }
        for bad in ["", "2024", "2024-13-01", "2024-01-32", "2024-01-01x", "-2024-01-01", "0x10-01-01"] {
            assert_eq!(date_days(bad), None, "{bad}");
        }
    }

    #[test]
    fn timestamps_go_both_ways() {
        for text in [
            "1970-01-01 00:00:00",
            "2024-02-29 23:59:59.999999",
            "1969-12-31 23:59:59.5",
            "4714-11-24 00:00:00 BC",
            "294246-12-31 23:59:59.999999",
            "infinity",
            "-infinity",
        ] {
            assert_eq!(timestamp_text(timestamp_micros(text).expect(text)), text);
        }
        assert_eq!(timestamp_micros("1970-01-01 00:00:01"), Some(1_000_000));
        assert_eq!(time_micros("24:00:00"), Some(86_400_000_000));
        assert_eq!(time_text(86_400_000_000), "24:00:00");
    }

    #[test]
    fn zoned_values_go_both_ways() {
        for (text, iso) in [
            ("2024-01-02 03:04:05.6+00", "2024-01-02T03:04:05.6Z"),
            ("2024-01-02 03:04:05+02", "2024-01-02T03:04:05+02:00"),
            ("2024-01-02 03:04:05-03:30", "2024-01-02T03:04:05-03:30"),
            ("0044-03-15 12:00:00+00 BC", "-0043-03-15T12:00:00Z"),
            ("0001-03-15 12:00:00+00 BC", "0000-03-15T12:00:00Z"),
            ("infinity", "infinity"),
        ] {
            assert_eq!(zoned_timestamp(text).as_deref(), Some(iso));
            assert_eq!(zoned_timestamp_text(iso).as_deref(), Some(text));
        }
        assert_eq!(zoned_time("13:30:00+02").as_deref(), Some("13:30:00+02:00"));
        assert_eq!(zoned_time_text("13:30:00+02:00"), "13:30:00+02");
    }
}
