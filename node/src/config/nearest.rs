//! A key that nobody knows is told together with the one that was probably meant.

use std::collections::BTreeSet;

use serde_json::Value;

/// Every key of a document, in full (`a.b.c`), sections included.
pub(crate) fn keys_of(value: &Value) -> BTreeSet<String> {
    fn collect(prefix: &str, value: &Value, out: &mut BTreeSet<String>) {
        let Value::Object(map) = value else { return };
        for (key, value) in map {
            let whole = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
            collect(&whole, value, out);
            out.insert(whole);
        }
    }
    let mut out = BTreeSet::new();
    collect("", value, &mut out);
    out
}

/// The key, and what was probably meant.
pub(crate) fn told(key: &str, known: &BTreeSet<String>) -> String {
    match nearest(key, known) {
        Some(near) => format!("{key} (did you mean {near}?)"),
        None => key.to_owned(),
    }
}

/// The known key that is most like it, unless none is: the same name elsewhere, or a few letters away.
pub(crate) fn nearest<'a>(key: &str, known: &'a BTreeSet<String>) -> Option<&'a str> {
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().replace('_', "-");
    let own = last(key);
    let scored = known.iter().map(|candidate| {
        let name = distance(&own, &last(candidate));
        // Of the same distance, one in the same section is meant.
        (name, distance(key, candidate), candidate.as_str())
    });
    let (name, _, best) = scored.min()?;
    (name <= own.chars().count().div_ceil(3)).then_some(best)
}

/// How many letters have to be put in, taken out or replaced.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_mistyped_or_misplaced_key_finds_the_one_that_was_meant() {
        let known = keys_of(&json!({
            "addr": 1, "data-dir": 1, "event-store": { "memory-bytes": 1, "disk-bytes": 1 }, "log": { "format": 1 },
        }));
        for (key, meant) in [
            ("addres", Some("addr")),
            ("data_dir", Some("data-dir")),
            ("event-store.memory-byte", Some("event-store.memory-bytes")),
            ("memory-bytes", Some("event-store.memory-bytes")),
            ("format", Some("log.format")),
            ("something-else", None),
            ("", None),
        ] {
            assert_eq!(nearest(key, &known), meant, "{key}");
        }
        assert_eq!(told("foo", &known), "foo");
        assert_eq!(told("adr", &known), "adr (did you mean addr?)");
        assert_eq!((distance("", "abc"), distance("kitten", "sitting")), (3, 3));
    }
}
