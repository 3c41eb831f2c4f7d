//! Dates and times as whole numbers: days or microseconds since 2000, in the proleptic Gregorian calendar. The
//! microseconds of every timestamp that PostgreSQL knows fit 64 bits that way.

use crate::calendar::{DAYS_TO_2000, civil_from_days, days_from_civil};

const INFINITY: &[u8] = b"infinity";
const MINUS_INFINITY: &[u8] = b"-infinity";
const DAY: i64 = 86_400_000_000;
/// Years that are read: PostgreSQL ends at 5,874,897.
const MAX_YEAR: i64 = 10_000_000;

fn digits(text: &[u8]) -> Option<i64> {
    if text.is_empty() || text.len() > 10 || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    Some(text.iter().fold(0, |value, digit| value * 10 + i64::from(digit - b'0')))
}

fn split(text: &[u8], by: u8) -> Option<(&[u8], &[u8])> {
    let at = text.iter().position(|b| *b == by)?;
    Some((&text[..at], &text[at + 1..]))
}

/// Days since 2000-01-01 of a date; years before the first are 0, -1, ….
fn days(year: i64, month: i64, day: i64) -> i64 {
    days_from_civil(year, month, day) - DAYS_TO_2000
}

/// The inverse of [`days`].
fn civil(days: i64) -> (i64, i64, i64) {
    civil_from_days(days + DAYS_TO_2000)
}

/// `YYYY-MM-DD`; `bc` tells that the year is before the first.
fn calendar(text: &[u8], bc: bool) -> Option<i64> {
    let (year, rest) = split(text, b'-')?;
    let (month, day) = split(rest, b'-')?;
    let (year, month, day) = (digits(year)?, digits(month)?, digits(day)?);
    let year = if bc { 1 - year } else { year };
    ((1..=12).contains(&month) && (1..=31).contains(&day) && year.abs() <= MAX_YEAR)
        .then(|| days(year, month, day))
}

fn before_christ(text: &[u8]) -> (&[u8], bool) {
    text.strip_suffix(b" BC").map_or((text, false), |text| (text, true))
}

fn limits(text: &[u8]) -> Option<i64> {
    match text {
        INFINITY => Some(i64::MAX),
        MINUS_INFINITY => Some(i64::MIN),
        _ => None,
    }
}

/// Days of a `date`.
pub(super) fn date(text: &[u8]) -> Option<i64> {
    limits(text).or_else(|| {
        let (text, bc) = before_christ(text);
        calendar(text, bc)
    })
}

/// Microseconds of a `time`.
pub(super) fn time(text: &[u8]) -> Option<i64> {
    let (hour, rest) = split(text, b':')?;
    let (minute, rest) = split(rest, b':')?;
    let (second, fraction) = split(rest, b'.').unwrap_or((rest, b"0"));
    let (hour, minute, second) = (digits(hour)?, digits(minute)?, digits(second)?);
    let scale = 10i64.checked_pow(u32::try_from(6usize.checked_sub(fraction.len())?).ok()?)?;
    let micros = digits(fraction)? * scale;
    (hour <= 24 && minute < 60 && second <= 60)
        .then(|| ((hour * 60 + minute) * 60 + second) * 1_000_000 + micros)
}

/// Microseconds of a `timestamp`, or with `zone` of a `timestamptz` in UTC.
pub(super) fn timestamp(text: &[u8], zone: bool) -> Option<i64> {
    if let Some(limit) = limits(text) {
        return Some(limit);
    }
    let (text, bc) = before_christ(text);
    let (day, clock) = split(text, b' ')?;
    let (clock, offset) = if zone {
        let at = clock.iter().position(|b| matches!(b, b'+' | b'-'))?;
        (&clock[..at], offset(&clock[at..])?)
    } else {
        (clock, 0)
    };
    calendar(day, bc)?.checked_mul(DAY)?.checked_add(time(clock)?)?.checked_sub(offset)
}

/// Microseconds of `±HH[:MM[:SS]]`.
fn offset(text: &[u8]) -> Option<i64> {
    let (sign, text) = text.split_first()?;
    let mut parts = text.split(|b| *b == b':');
    let mut next = || parts.next().map_or(Some(0), digits);
    let seconds = (next()? * 60 + next()?) * 60 + next()?;
    parts.next().is_none().then(|| if *sign == b'-' { -seconds } else { seconds } * 1_000_000)
}

fn era(year: i64) -> (i64, &'static str) {
    if year > 0 { (year, "") } else { (1 - year, " BC") }
}

/// Text of a `date`; `None` beyond every calendar.
pub(super) fn date_text(value: i64) -> Option<String> {
    match value {
        i64::MAX => return Some("infinity".to_owned()),
        i64::MIN => return Some("-infinity".to_owned()),
        _ => {}
    }
    if value.abs() > MAX_YEAR * 366 {
        return None;
    }
    let (year, month, day) = civil(value);
    let (year, suffix) = era(year);
    Some(format!("{year:04}-{month:02}-{day:02}{suffix}"))
}

/// Text of a `time`.
pub(super) fn time_text(micros: i64) -> Option<String> {
    if !(0..=DAY).contains(&micros) {
        return None;
    }
    let (seconds, micros) = (micros / 1_000_000, micros % 1_000_000);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    Some(format!("{hour:02}:{minute:02}:{second:02}.{micros:06}"))
}

/// Text of a `timestamp`, or with `zone` of a `timestamptz`.
pub(super) fn timestamp_text(value: i64, zone: bool) -> Option<String> {
    match value {
        i64::MAX => return Some("infinity".to_owned()),
        i64::MIN => return Some("-infinity".to_owned()),
        _ => {}
    }
    let (year, month, day) = civil(value.div_euclid(DAY));
    let (year, suffix) = era(year);
    let clock = time_text(value.rem_euclid(DAY))?;
    let zone = if zone { "+00" } else { "" };
    Some(format!("{year:04}-{month:02}-{day:02} {clock}{zone}{suffix}"))
}
