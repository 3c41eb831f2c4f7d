//! The description of the API as JSON. It is written as YAML (`docs/openapi.yaml`), in the part of YAML that is read here:
//! block mappings and sequences, flow ones within a line, plain and double-quoted scalars, and `|` texts.

use std::sync::OnceLock;

use axum::http::header;
use axum::response::IntoResponse;
use serde_json::{Map, Value};

/// The document, as part of the program.
const PAGE: &str = include_str!("../../../docs/openapi.yaml");

pub(super) async fn document() -> impl IntoResponse {
    static JSON: OnceLock<String> = OnceLock::new();
    let json = JSON.get_or_init(|| parse(PAGE).unwrap_or_default().to_string());
    ([(header::CONTENT_TYPE, "application/json")], json.as_str())
}

/// A line that says something: its indentation, and the rest.
type Line<'a> = (usize, &'a str);

/// Reads a document.
///
/// # Errors
/// Names the line that cannot be read.
fn parse(text: &str) -> Result<Value, String> {
    let lines: Vec<Line<'_>> =
        text.lines().map(|line| (line.len() - line.trim_start_matches(' ').len(), line.trim())).collect();
    let mut reader = Reader { lines: &lines, at: 0 };
    let value = reader.block(0)?;
    match reader.next_line() {
        None => Ok(value),
        Some((_, rest)) => Err(format!("line {}: {rest:?} has no place", reader.at + 1)),
    }
}

struct Reader<'a> {
    lines: &'a [Line<'a>],
    at: usize,
}

impl<'a> Reader<'a> {
    /// The next line that is neither empty nor a comment.
    fn next_line(&mut self) -> Option<Line<'a>> {
        while let Some((_, rest)) = self.lines.get(self.at) {
            if !rest.is_empty() && !rest.starts_with('#') {
                return Some(self.lines[self.at]);
            }
            self.at += 1;
        }
        None
    }

    /// A mapping or a sequence whose lines are indented by at least so much.
    fn block(&mut self, least: usize) -> Result<Value, String> {
        match self.next_line() {
            Some((indent, rest)) if indent >= least => {
                if rest.starts_with("- ") {
                    self.sequence(indent)
                } else {
                    self.mapping(indent, None)
                }
            }
            Some(_) | None => Ok(Value::Null),
        }
    }

    fn sequence(&mut self, own: usize) -> Result<Value, String> {
        let mut items = Vec::new();
        while let Some((indent, rest)) = self.next_line() {
            let Some(item) = rest.strip_prefix("- ").filter(|_| indent == own) else { break };
            let deeper = own + rest.len() - item.trim_start().len();
            let item = item.trim_start();
            if split_key(item).is_some() && !item.starts_with(['{', '[', '"']) {
                items.push(self.mapping(deeper, Some(item))?);
            } else {
                items.push(self.scalar(item)?);
                self.at += 1;
            }
        }
        Ok(Value::Array(items))
    }

    /// `first` is the rest of the present line, when that began with a dash.
    fn mapping(&mut self, own: usize, mut first: Option<&'a str>) -> Result<Value, String> {
        let mut map = Map::new();
        loop {
            let rest = match first.take() {
                Some(rest) => rest,
                None => match self.next_line() {
                    Some((indent, rest)) if indent == own && !rest.starts_with("- ") => rest,
                    Some(_) | None => return Ok(Value::Object(map)),
                },
            };
            let (key, value) = split_key(rest)
                .ok_or_else(|| format!("line {}: {rest:?} is no key and value", self.at + 1))?;
            let key = match self.scalar(key)? {
                Value::String(key) => key,
                other @ (Value::Null
                | Value::Bool(_)
                | Value::Number(_)
                | Value::Array(_)
                | Value::Object(_)) => other.to_string(),
            };
            let value = match value {
                "" => {
                    self.at += 1;
                    self.below(own)?
                }
                "|" => {
                    self.at += 1;
                    Value::String(self.text(own))
                }
                value => {
                    let value = self.scalar(value)?;
                    self.at += 1;
                    value
                }
            };
            map.insert(key, value);
        }
    }

    /// What belongs to a key: a sequence may be as far left as the key.
    fn below(&mut self, own: usize) -> Result<Value, String> {
        match self.next_line() {
            Some((indent, rest)) if indent == own && rest.starts_with("- ") => self.sequence(own),
            Some(_) | None => self.block(own + 1),
        }
    }

    /// The lines of a `|` text.
    fn text(&mut self, own: usize) -> String {
        let mut out = String::new();
        let mut base = None;
        while let Some((indent, rest)) = self.lines.get(self.at) {
            if rest.is_empty() {
                out.push('\n');
            } else if *indent <= own {
                break;
            } else {
                let base = *base.get_or_insert(*indent);
                out.extend(std::iter::repeat_n(' ', indent.saturating_sub(base)));
                out.push_str(rest);
                out.push('\n');
            }
            self.at += 1;
        }
        out.trim_end_matches('\n').to_owned() + "\n"
    }

    /// A value within one line.
    fn scalar(&self, text: &str) -> Result<Value, String> {
        let wrong = |what: &str| format!("line {}: {what} in {text:?}", self.at + 1);
        let mut flow = Flow { rest: text };
        let value = flow.value(false).ok_or_else(|| wrong("something is not closed"))?;
        let rest = flow.rest.trim_start();
        if rest.is_empty() || rest.starts_with('#') { Ok(value) } else { Err(wrong("something follows")) }
    }
}

/// `key: value`; a colon without a blank behind it belongs to the key.
fn split_key(text: &str) -> Option<(&str, &str)> {
    let from = match text.strip_prefix('"') {
        Some(rest) => rest.find('"')? + 2,
        None => 0,
    };
    if let Some(at) = text[from..].find(": ") {
        let (key, value) = text.split_at(from + at);
        return Some((key, value[2..].trim()));
    }
    text.strip_suffix(':').filter(|key| key.len() >= from).map(|key| (key, ""))
}

/// Flow style: what is within one line.
struct Flow<'a> {
    rest: &'a str,
}

impl Flow<'_> {
    /// The next value; within braces a comma ends it.
    fn value(&mut self, inside: bool) -> Option<Value> {
        self.rest = self.rest.trim_start();
        match self.rest.chars().next()? {
            '{' => self.map(),
            '[' => self.list(),
            '"' => self.quoted().map(Value::String),
            _ => {
                let end = if inside { self.rest.find([',', '}', ']']) } else { self.rest.find(" #") };
                let (text, rest) = self.rest.split_at(end.unwrap_or(self.rest.len()));
                self.rest = rest;
                Some(plain(text.trim()))
            }
        }
    }

    fn quoted(&mut self) -> Option<String> {
        let mut escaped = false;
        let end = self.rest.char_indices().skip(1).find(|(_, c)| {
            let ends = *c == '"' && !escaped;
            escaped = *c == '\\' && !escaped;
            ends
        });
        let (text, rest) = self.rest.split_at(end?.0 + 1);
        self.rest = rest;
        serde_json::from_str(text).ok()
    }

    /// Whether this comes next; takes it.
    fn takes(&mut self, c: char) -> bool {
        self.rest = self.rest.trim_start();
        let rest = self.rest.strip_prefix(c);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    fn map(&mut self) -> Option<Value> {
        let mut map = Map::new();
        self.takes('{');
        while !self.takes('}') {
            let key = if self.rest.starts_with('"') {
                self.quoted()?
            } else {
                let (key, rest) = self.rest.split_at(self.rest.find(':')?);
                self.rest = rest;
                key.trim().to_owned()
            };
            if !self.takes(':') {
                return None;
            }
            map.insert(key, self.value(true)?);
            if !self.takes(',') && !self.rest.starts_with('}') {
                return None;
            }
        }
        Some(Value::Object(map))
    }

    fn list(&mut self) -> Option<Value> {
        let mut items = Vec::new();
        self.takes('[');
        while !self.takes(']') {
            items.push(self.value(true)?);
            if !self.takes(',') && !self.rest.starts_with(']') {
                return None;
            }
        }
        Some(Value::Array(items))
    }
}

/// A scalar without quotes.
fn plain(text: &str) -> Value {
    match text {
        "" | "null" | "~" => Value::Null,
        "true" => Value::Bool(true),
        "false" => Value::Bool(false),
        _ => text
            .parse::<i64>()
            .map(Value::from)
            .or_else(|_| text.parse::<u64>().map(Value::from))
            .unwrap_or_else(|_| Value::String(text.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use axum::http::Method;
    use serde_json::json;

    use super::*;

    #[test]
    fn the_part_of_yaml_that_is_used_becomes_the_same_json() {
        let text = "# words\na: 1\n\"b\":\n  - {$ref: \"#/x, y\", n: [1, two], o: {}}\n  - name: c # why\n    in: \
                    \"path\\n\"\n  - plain: text\nd:\n- x\ne: |\n  one\n    two\n\n  three\nf:\n  g: {}\n  \"200\": a:b\n  h:\n";
        assert_eq!(
            parse(text).unwrap(),
            json!({
                "a": 1,
                "b": [
                    { "$ref": "#/x, y", "n": [1, "two"], "o": {} },
                    { "name": "c", "in": "path\n" },
                    { "plain": "text" },
                ],
                "d": ["x"], "e": "one\n  two\n\nthree\n", "f": { "g": {}, "200": "a:b", "h": null },
            })
        );
        for bad in ["a", "a: {b: 1", "a: \"b", "a: 1\n    b: 2\n", "a: [1 2", "a: {b}", "a: \"b\" c"] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_document_is_read_whole_and_every_path_of_it_has_its_rule() {
        let page = parse(PAGE).unwrap();
        assert_eq!(page["openapi"], "3.0.3");
        let paths = page["paths"].as_object().unwrap();
        assert!(paths.len() > 50, "{}", paths.len());
        for (path, methods) in paths {
            for method in methods.as_object().unwrap().keys().filter(|key| *key != "parameters") {
                let ruled: Method = method.to_uppercase().parse().unwrap();
                let rule = super::super::access::rule_of(&ruled, path);
                let rule = rule.unwrap_or_else(|| panic!("{method} {path} has no rule"));
                let asks = methods[method]["security"].is_array();
                assert_eq!(rule.asks_for_a_user(), asks, "{method} {path}");
                assert!(methods[method]["responses"].is_object(), "{method} {path} has no answers");
            }
        }
    }
}
