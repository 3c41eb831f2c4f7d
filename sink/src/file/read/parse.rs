//! From the bytes of a data file to row changes.

use heartbeatpb::Ts;
use serde_json::Value;

use super::ReadColumn;
use crate::encode::value::{self, Class};
use crate::encode::{EncodeOptions, Format, UNAVAILABLE};
use crate::file::progress::Position;

/// A value as a file has it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Cell {
    Null,
    /// Not sent; the row keeps what it had.
    Unchanged,
    Text(String),
}

/// What happened to a row.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Op {
    Insert,
    Update,
    Delete,
}

/// A row change.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Change {
    pub(super) position: Position,
    pub(super) op: Op,
    pub(super) old: Option<Vec<Cell>>,
    pub(super) new: Option<Vec<Cell>>,
}

/// Reads the files of one version in order.
pub(super) struct Reader<'a> {
    options: &'a EncodeOptions,
    columns: Vec<ReadColumn>,
    /// CSV: the record before, by its commit ts and its number in that commit.
    previous: Position,
    /// CSV: the furthest record taken.
    furthest: Option<Position>,
    duplicates: u64,
}

type Parsed<T> = Result<T, String>;

fn need<T>(value: Option<T>, what: &str) -> Parsed<T> {
    value.ok_or_else(|| what.to_owned())
}

impl<'a> Reader<'a> {
    pub(super) fn new(options: &'a EncodeOptions, columns: &[ReadColumn]) -> Self {
        let previous = Position::default();
        Self { options, columns: columns.to_vec(), previous, furthest: None, duplicates: 0 }
    }

    /// Rows that a CSV file repeated.
    pub(super) fn duplicates(&self) -> u64 {
        self.duplicates
    }

    /// Appends the changes of a file at or before `limit`.
    pub(super) fn read(&mut self, bytes: &[u8], limit: Ts, out: &mut Vec<Change>) -> Parsed<()> {
        let text = std::str::from_utf8(bytes).map_err(|_| "it is not UTF-8".to_owned())?;
        match self.options.format {
            Format::CanalJson | Format::Debezium => {
                let body = need(
                    text.strip_suffix(self.options.terminator.as_str()).or(text.is_empty().then_some("")),
                    "its last row has no terminator",
                )?;
                for line in body.split(self.options.terminator.as_str()).filter(|line| !line.is_empty()) {
                    let row: Value =
                        serde_json::from_str(line).map_err(|e| format!("a row is not JSON: {e}"))?;
                    let change = if self.options.format == Format::CanalJson {
                        self.canal(&row)?
                    } else {
                        self.debezium(&row)?
                    };
                    if change.position.commit_ts <= limit {
                        out.push(change);
                    }
                }
                Ok(())
            }
            Format::Csv => self.csv(text, limit, out),
        }
    }

    fn canal(&self, row: &Value) -> Parsed<Change> {
        let extension = &row["_tidb"];
        let position = Position {
            commit_ts: Ts(need(extension["commitTs"].as_u64(), "a row has no _tidb.commitTs")?),
            row: need(extension["rowNumber"].as_u64(), "a row has no _tidb.rowNumber")?,
        };
        let op = match row["type"].as_str() {
            Some("INSERT") => Op::Insert,
            Some("UPDATE") => Op::Update,
            Some("DELETE") => Op::Delete,
            _ => return Err("a row has an unknown type".into()),
        };
        let image = |key: &str| -> Parsed<Option<Vec<Cell>>> {
            match row.get(key) {
                None | Some(Value::Null) => Ok(None),
                Some(rows) => self.object(&rows[0], |class, value| {
                    let text = value.as_str()?;
                    if self.options.canal_unchanged.as_deref() == Some(text) {
                        return Some(Cell::Unchanged);
                    }
                    value::from_canal(class, text.to_owned()).map(Cell::Text)
                }),
            }
        };
        let (data, old) = (image("data")?, image("old")?);
        let (old, new) = if op == Op::Delete { (data, None) } else { (old, data) };
        Ok(Change { position, op, old, new })
    }

    fn debezium(&self, row: &Value) -> Parsed<Change> {
        let payload = &row["payload"];
        let source = &payload["source"];
        let position = Position {
            commit_ts: Ts(need(source["commit_ts"].as_u64(), "a row has no source.commit_ts")?),
            row: need(source["row"].as_u64(), "a row has no source.row")?,
        };
        let op = match payload["op"].as_str() {
            Some("c") => Op::Insert,
            Some("u") => Op::Update,
            Some("d") => Op::Delete,
            _ => return Err("a row has an unknown op".into()),
        };
        let unavailable = value::base64(UNAVAILABLE.as_bytes());
        let image = |key: &str| -> Parsed<Option<Vec<Cell>>> {
            match payload.get(key) {
                None | Some(Value::Null) => Ok(None),
                Some(image) => self.object(image, |class, value| {
                    let text = value.as_str();
                    if text == Some(UNAVAILABLE) || *class == Class::Bytes && text == Some(&unavailable) {
                        return Some(Cell::Unchanged);
                    }
                    value::from_debezium(class, value).map(Cell::Text)
                }),
            }
        };
        Ok(Change { position, op, old: image("before")?, new: image("after")? })
    }

    fn object(
        &self,
        object: &Value,
        cell: impl Fn(&Class, &Value) -> Option<Cell>,
    ) -> Parsed<Option<Vec<Cell>>> {
        let object = need(object.as_object(), "an image is no object")?;
        let known = self.columns.iter().filter(|column| object.contains_key(&column.name)).count();
        if known != object.len() {
            return Err("an image has a column that the schema file has not".into());
        }
        let cells = self.columns.iter().map(|column| match object.get(&column.name) {
            None => Ok(Cell::Unchanged),
            Some(Value::Null) => Ok(Cell::Null),
            Some(value) => cell(&column.class, value)
                .ok_or_else(|| format!("a value of column {:?} does not fit its type", column.name)),
        });
        cells.collect::<Parsed<Vec<Cell>>>().map(Some)
    }

    fn csv(&mut self, text: &str, limit: Ts, out: &mut Vec<Change>) -> Parsed<()> {
        let csv = &self.options.csv;
        let mut tokens = Tokens { rest: text, options: self.options };
        let mut first = csv.header;
        while let Some(fields) = tokens.record()? {
            if std::mem::take(&mut first) {
                continue;
            }
            let meta = 4 + usize::from(csv.output_old_value);
            if fields.len() != meta + self.columns.len() {
                return Err("a record has another number of columns than the schema file".into());
            }
            let commit_ts = match &fields[3] {
                Field::Plain(ts) => Ts(need(ts.parse().ok(), "a commit ts is no number")?),
                Field::String(_) => return Err("a commit ts is no number".into()),
            };
            let position = self.number(commit_ts);
            if self.furthest.is_some_and(|furthest| position <= furthest) {
                self.duplicates += 1;
                continue;
            }
            self.furthest = Some(position);
            let image = fields[meta..]
                .iter()
                .zip(&self.columns)
                .map(|(field, column)| self.field(field, column))
                .collect::<Parsed<Vec<Cell>>>()?;
            let op = match fields[0].text() {
                "I" => Op::Insert,
                "U" => Op::Update,
                "D" => Op::Delete,
                _ => return Err("a record has an unknown operation".into()),
            };
            let (old, new) = if op == Op::Delete { (Some(image), None) } else { (None, Some(image)) };
            if commit_ts <= limit {
                out.push(Change { position, op, old, new });
            }
        }
        Ok(())
    }

    /// The number of the next record in its commit. A commit ts that goes back begins a repetition.
    fn number(&mut self, commit_ts: Ts) -> Position {
        let row = if commit_ts == self.previous.commit_ts { self.previous.row + 1 } else { 1 };
        self.previous = Position { commit_ts, row };
        self.previous
    }

    fn field(&self, field: &Field, column: &ReadColumn) -> Parsed<Cell> {
        let csv = &self.options.csv;
        let text = match field {
            Field::Plain(text) if *text == csv.null => return Ok(Cell::Null),
            Field::Plain(text) if *text == csv.unchanged => return Ok(Cell::Unchanged),
            Field::Plain(text) if csv.quote.is_none() => unescape(text),
            Field::Plain(text) => text.clone(),
            Field::String(text) => text.clone(),
        };
        value::from_csv(&column.class, text, csv.binary)
            .map(Cell::Text)
            .ok_or_else(|| format!("a value of column {:?} does not fit its type", column.name))
    }
}

/// The inverse of the backslash escapes of CSV without a quote.
fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some('r') => out.push('\r'),
                Some('n') => out.push('\n'),
                Some(other) => out.push(other),
                None => out.push('\\'),
            },
            c => out.push(c),
        }
    }
    out
}

/// A field of a CSV record.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Field {
    /// Not quoted; escapes are still in it.
    Plain(String),
    /// Quoted.
    String(String),
}

impl Field {
    fn text(&self) -> &str {
        match self {
            Field::Plain(text) | Field::String(text) => text,
        }
    }
}

/// Splits a CSV file.
struct Tokens<'a> {
    rest: &'a str,
    options: &'a EncodeOptions,
}

impl Tokens<'_> {
    fn record(&mut self) -> Parsed<Option<Vec<Field>>> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let (delimiter, terminator) = (self.options.csv.delimiter.as_str(), self.options.terminator.as_str());
        let mut fields = Vec::new();
        loop {
            fields.push(match self.options.csv.quote.filter(|&quote| self.rest.starts_with(quote)) {
                Some(quote) => Field::String(self.quoted(quote)?),
                None => Field::Plain(self.plain(delimiter, terminator)),
            });
            if let Some(rest) = self.rest.strip_prefix(delimiter) {
                self.rest = rest;
            } else if let Some(rest) = self.rest.strip_prefix(terminator) {
                self.rest = rest;
                return Ok(Some(fields));
            } else {
                return Err("a record has no terminator".into());
            }
        }
    }

    fn quoted(&mut self, quote: char) -> Parsed<String> {
        let mut text = String::new();
        let mut rest = &self.rest[quote.len_utf8()..];
        loop {
            let (part, tail) = need(rest.split_once(quote), "a quote is not closed")?;
            text.push_str(part);
            match tail.strip_prefix(quote) {
                Some(tail) => {
                    text.push(quote);
                    rest = tail;
                }
                None => {
                    self.rest = tail;
                    return Ok(text);
                }
            }
        }
    }

    fn plain(&mut self, delimiter: &str, terminator: &str) -> String {
        let mut escaped = false;
        for (at, c) in self.rest.char_indices() {
            let here = &self.rest[at..];
            if !escaped && (here.starts_with(delimiter) || here.starts_with(terminator)) {
                let text = self.rest[..at].to_owned();
                self.rest = here;
                return text;
            }
            escaped = !escaped && c == '\\' && self.options.csv.quote.is_none();
        }
        std::mem::take(&mut self.rest).to_owned()
    }
}
