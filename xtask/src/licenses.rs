//! Licences of what we build with, against the list in `deny.toml`.
//!
//! `cargo deny` checks the same and more where it is installed; this part needs nothing but cargo.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

/// Where the list is.
const LIST: &str = "deny.toml";

/// Packages whose licence is not allowed, and licences that are allowed for nothing.
pub(crate) fn violations(root: &Path, metadata: &Value) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(root.join(LIST)).with_context(|| format!("cannot read {LIST}"))?;
    let allowed = allowed(&text);
    let mut found = Vec::new();
    let mut used = BTreeSet::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or_default();
        let Some(license) = package["license"].as_str() else {
            found.push(format!("crate {name} names no licence"));
            continue;
        };
        match satisfy(license, &allowed) {
            Some(licenses) => used.extend(licenses),
            None => found.push(format!("crate {name}: licence {license} is not in {LIST}")),
        }
    }
    found.extend(
        allowed
            .iter()
            .filter(|license| !used.contains(*license))
            .map(|license| format!("{LIST}: nothing has licence {license}")),
    );
    Ok(found)
}

/// The strings of the `allow` list.
fn allowed(text: &str) -> BTreeSet<String> {
    let list = text.split_once("allow = [").map_or("", |(_, rest)| rest);
    let list = list.split(']').next().unwrap_or_default();
    list.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Every allowed licence of an SPDX expression when the allowed ones satisfy it: each part of an `AND` needs one of
/// its `OR`s. Old manifests write `/` for `OR`.
fn satisfy(expression: &str, allowed: &BTreeSet<String>) -> Option<Vec<String>> {
    let flat = expression.replace('/', " OR ");
    let mut parser = Parser { words: words(&flat), at: 0, allowed };
    let answer = parser.any();
    answer.filter(|_| parser.at == parser.words.len())
}

fn words(expression: &str) -> Vec<String> {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ");
    spaced.split_whitespace().map(str::to_owned).collect()
}

struct Parser<'a> {
    words: Vec<String>,
    at: usize,
    allowed: &'a BTreeSet<String>,
}

impl Parser<'_> {
    fn takes(&mut self, word: &str) -> bool {
        let is_next = self.words.get(self.at).is_some_and(|next| next == word);
        self.at += usize::from(is_next);
        is_next
    }

    /// `a OR b`: the allowed ones of those that are satisfied.
    fn any(&mut self) -> Option<Vec<String>> {
        let mut answer = self.every();
        while self.takes("OR") {
            answer = match (answer, self.every()) {
                (Some(left), Some(right)) => Some([left, right].concat()),
                (left, right) => left.or(right),
            };
        }
        answer
    }

    /// `a AND b`: all of them, or none.
    fn every(&mut self) -> Option<Vec<String>> {
        let mut answer = self.one();
        while self.takes("AND") {
            let right = self.one();
            answer = answer.zip(right).map(|(left, right)| [left, right].concat());
        }
        answer
    }

    fn one(&mut self) -> Option<Vec<String>> {
        if self.takes("(") {
            let answer = self.any();
            self.takes(")");
            return answer;
        }
        let mut license = self.words.get(self.at)?.clone();
        self.at += 1;
        if self.takes("WITH") {
            let exception = self.words.get(self.at)?;
            license = format!("{license} WITH {exception}");
            self.at += 1;
        }
        self.allowed.contains(&license).then(|| vec![license])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expression_needs_one_of_its_alternatives_and_all_of_its_parts() {
        let list = allowed("[licenses]\nallow = [\n \"MIT\", \"Apache-2.0\",\n \"A WITH B\"]\nx = [\"GPL\"]");
        assert_eq!(list.len(), 3);
        for (expression, ok) in [
            ("MIT", true),
            ("MIT OR GPL", true),
            ("GPL/MIT", true),
            ("GPL", false),
            ("MIT AND GPL", false),
            ("MIT AND Apache-2.0", true),
            ("(MIT OR GPL) AND Apache-2.0", true),
            ("GPL OR (MIT AND GPL)", false),
            ("A WITH B OR GPL", true),
            ("A", false),
            ("", false),
        ] {
            assert_eq!(satisfy(expression, &list).is_some(), ok, "{expression}");
        }
    }
}
