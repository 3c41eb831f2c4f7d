//! Decimal numbers of any length, as bytes in the order of their values.
//!
//! A class, and for the two finite classes the exponent `e` of `0.d1d2… × 10^e`, pairs of digits, and an end. All of a
//! negative number but its class is inverted. Equal numbers of different scale have one form.

const MINUS_INFINITY: u8 = 1;
const NEGATIVE: u8 = 2;
const NOUGHT: u8 = 3;
const POSITIVE: u8 = 4;
const INFINITY: u8 = 5;
const NAN: u8 = 6;

/// Ends the digits; a pair is its value and one.
const END: u8 = 0;

/// Longest exponent that is read back: PostgreSQL has 131,072 digits before the point and 16,383 behind it.
const MAX_EXPONENT: i64 = 1 << 20;

/// Appends a number; `None` when the text is none.
pub(super) fn put(text: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let class = match text {
        b"NaN" => Some(NAN),
        b"Infinity" => Some(INFINITY),
        b"-Infinity" => Some(MINUS_INFINITY),
        _ => None,
    };
    if let Some(class) = class {
        out.push(class);
        return Some(());
    }
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let point = text.iter().position(|b| *b == b'.');
    let (whole, part) = point.map_or((text, &b""[..]), |at| (&text[..at], &text[at + 1..]));
    let are_digits = |digits: &[u8]| digits.iter().all(u8::is_ascii_digit);
    if whole.len() + part.len() == 0 || !are_digits(whole) || !are_digits(part) {
        return None;
    }
    let zeros = whole.iter().chain(part).take_while(|b| **b == b'0').count();
    let digits = whole.len() + part.len();
    if zeros == digits {
        out.push(NOUGHT);
        return Some(());
    }
    out.push(if negative { NEGATIVE } else { POSITIVE });
    let from = out.len();
    let exponent = i32::try_from(whole.len()).ok()? - i32::try_from(zeros).ok()?;
    out.extend_from_slice(&(exponent ^ i32::MIN).to_be_bytes());
    let trailing = part.iter().rev().chain(whole.iter().rev()).take_while(|b| **b == b'0').count();
    let mut digits = whole.iter().chain(part).take(digits - trailing).skip(zeros).map(|b| b - b'0');
    while let Some(first) = digits.next() {
        out.push(first * 10 + digits.next().unwrap_or(0) + 1);
    }
    out.push(END);
    if negative {
        out[from..].iter_mut().for_each(|byte| *byte = !*byte);
    }
    Some(())
}

/// Takes a number off the front of `key`, in its shortest text.
pub(super) fn take(key: &mut &[u8]) -> Option<String> {
    let [class] = super::take_bytes::<1>(key)?;
    let invert = match class {
        MINUS_INFINITY => return Some("-Infinity".to_owned()),
        NOUGHT => return Some("0".to_owned()),
        INFINITY => return Some("Infinity".to_owned()),
        NAN => return Some("NaN".to_owned()),
        NEGATIVE => 0xff,
        POSITIVE => 0,
        _ => return None,
    };
    let exponent = super::take_bytes::<4>(key)?.map(|byte| byte ^ invert);
    let exponent = i64::from(i32::from_be_bytes(exponent) ^ i32::MIN);
    let mut digits = String::new();
    loop {
        let [pair] = super::take_bytes::<1>(key)?;
        match pair ^ invert {
            END => break,
            pair if pair <= 100 => {
                digits.push(char::from(b'0' + (pair - 1) / 10));
                digits.push(char::from(b'0' + (pair - 1) % 10));
            }
            _ => return None,
        }
    }
    let digits = digits.trim_end_matches('0');
    if digits.is_empty() || digits.starts_with('0') || exponent.abs() > MAX_EXPONENT {
        return None;
    }
    let sign = if invert == 0 { "" } else { "-" };
    let Ok(before) = usize::try_from(exponent) else {
        let zeros = "0".repeat(usize::try_from(-exponent).ok()?);
        return Some(format!("{sign}0.{zeros}{digits}"));
    };
    Some(match digits.split_at_checked(before) {
        Some(("", part)) => format!("{sign}0.{part}"),
        Some((whole, "")) => format!("{sign}{whole}"),
        Some((whole, part)) => format!("{sign}{whole}.{part}"),
        None => format!("{sign}{digits}{}", "0".repeat(before - digits.len())),
    })
}
