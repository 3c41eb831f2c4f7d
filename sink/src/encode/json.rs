//! Pieces of JSON, appended to a buffer.

use std::io::Write as _;

/// Appends a JSON string.
pub(crate) fn string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    escaped(out, text);
    out.push(b'"');
}

/// Appends the inside of a JSON string.
pub(crate) fn escaped(out: &mut Vec<u8>, text: &str) {
    let bytes = text.as_bytes();
    let mut from = 0;
    for (at, &byte) in bytes.iter().enumerate() {
        if byte >= 0x20 && byte != b'"' && byte != b'\\' {
            continue;
        }
        out.extend_from_slice(&bytes[from..at]);
        from = at + 1;
        match byte {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            byte => display(out, format_args!("\\u{byte:04x}")),
        }
    }
    out.extend_from_slice(&bytes[from..]);
}

/// Appends formatted text as it is.
pub(crate) fn display(out: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    out.write_fmt(text).expect("a buffer takes everything");
}

/// A JSON string on its own.
pub(crate) fn quoted(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len() + 2);
    string(&mut out, text);
    out
}

/// Whether the text is a number in JSON's grammar.
pub(crate) fn is_number(text: &[u8]) -> bool {
    fn digits(text: &[u8]) -> Option<&[u8]> {
        let end = text.iter().position(|b| !b.is_ascii_digit()).unwrap_or(text.len());
        (end > 0).then(|| &text[end..])
    }
    fn number(text: &[u8]) -> Option<bool> {
        let text = text.strip_prefix(b"-").unwrap_or(text);
        if text.first() == Some(&b'0') && text.get(1).is_some_and(u8::is_ascii_digit) {
            return None;
        }
        let mut rest = digits(text)?;
        if let Some(fraction) = rest.strip_prefix(b".") {
            rest = digits(fraction)?;
        }
        if let Some(exponent) = rest.strip_prefix(b"e").or_else(|| rest.strip_prefix(b"E")) {
            rest = digits(
                exponent.strip_prefix(b"+").or_else(|| exponent.strip_prefix(b"-")).unwrap_or(exponent),
            )?;
        }
        Some(rest.is_empty())
    }
    number(text) == Some(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_json_string_reads_back() {
        let text = "a\"b\\c\n\r\t\u{1}\u{7f}é漢\u{10348}/";
        let json = quoted(text);
        assert_eq!(serde_json::from_slice::<String>(&json).expect("valid JSON"), text);
    }

    #[test]
    fn numbers_are_those_of_json() {
        for good in ["0", "-0", "1", "-12.50", "1e+20", "1.5E-7"] {
            assert!(is_number(good.as_bytes()), "{good}");
        }
        for bad in ["", "-", "01", "1.", ".5", "+1", "NaN", "1e", "1 ", "0x1"] {
            assert!(!is_number(bad.as_bytes()), "{bad}");
        }
    }
}
