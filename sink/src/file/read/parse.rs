//! From the bytes of a data file to row changes.

use std::collections::BTreeMap;

use heartbeatpb::Ts;
use serde::Deserialize;
use serde_json::value::RawValue;

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
    /// CSV: what is known of each writer.
    writers: BTreeMap<String, CsvWriter>,
    /// The writer of the next file.
    writer: String,
    /// CSV: which writer a change comes from, in the order of the changes.
    sources: Vec<u64>,
    duplicates: u64,
}

/// How far the records of one writer go.
#[derive(Clone, Copy, Default)]
struct CsvWriter {
    /// The order in which writers appeared.
    number: u64,
    /// The record before, by its commit ts and its number in that commit.
    previous: Position,
    /// The furthest record taken.
    furthest: Option<Position>,
}

impl CsvWriter {
    /// The number of the next record in its commit. A commit ts that goes back begins a repetition.
    fn number(&mut self, commit_ts: Ts) -> Position {
        let row = if commit_ts == self.previous.commit_ts { self.previous.row + 1 } else { 1 };
        self.previous = Position { commit_ts, row };
        self.previous
    }
}

type Parsed<T> = Result<T, String>;

/// Values as they are in the file: a number keeps its digits.
type Image = BTreeMap<String, Box<RawValue>>;

/// What is read of a canal-json row.
#[derive(Deserialize)]
struct CanalRow {
    #[serde(rename = "type")]
    kind: String,
    old: Option<Vec<Image>>,
    data: Option<Vec<Image>>,
    #[serde(rename = "_tidb")]
    extension: Extension,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Extension {
    commit_ts: Ts,
    row_number: u64,
}

/// What is read of a debezium envelope.
#[derive(Deserialize)]
struct DebeziumRow {
    payload: Payload,
}

#[derive(Deserialize)]
struct Payload {
    source: Source,
    op: String,
    before: Option<Image>,
    after: Option<Image>,
}

#[derive(Deserialize)]
struct Source {
    commit_ts: Ts,
    row: u64,
}

/// The JSON reader's own words may quote a value, so that only the place is told.
fn row<T: for<'de> Deserialize<'de>>(line: &str) -> Parsed<T> {
    serde_json::from_str(line)
        .map_err(|e| format!("a row is no row of the format, at its byte {}", e.column()))
}

fn need<T>(value: Option<T>, what: &str) -> Parsed<T> {
    value.ok_or_else(|| what.to_owned())
}

impl<'a> Reader<'a> {
    pub(super) fn new(options: &'a EncodeOptions, columns: &[ReadColumn]) -> Self {
        let (writers, writer, sources) = (BTreeMap::new(), String::new(), Vec::new());
        Self { options, columns: columns.to_vec(), writers, writer, sources, duplicates: 0 }
    }

    /// The next file is one of this writer.
    pub(super) fn enter(&mut self, writer: String) {
        let number = self.writers.len() as u64;
        self.writers.entry(writer.clone()).or_insert(CsvWriter { number, ..CsvWriter::default() });
        self.writer = writer;
    }

    /// Puts the changes of all files together; answers how many rows CSV files repeated.
    pub(super) fn finish(self, changes: &mut Vec<Change>) -> u64 {
        if self.options.format != Format::Csv || self.writers.len() < 2 {
            return self.duplicates;
        }
        let key: Vec<usize> = (0..self.columns.len()).filter(|&at| self.columns[at].in_key).collect();
        let before = changes.len();
        super::several::merge(changes, &self.sources, &key);
        self.duplicates + (before - changes.len()) as u64
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
                    let change = if self.options.format == Format::CanalJson {
                        self.canal(row(line)?)?
                    } else {
                        self.debezium(row(line)?)?
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

    fn canal(&self, row: CanalRow) -> Parsed<Change> {
        let position = Position { commit_ts: row.extension.commit_ts, row: row.extension.row_number };
        let op = match row.kind.as_str() {
            "INSERT" => Op::Insert,
            "UPDATE" => Op::Update,
            "DELETE" => Op::Delete,
            _ => return Err("a row has an unknown type".into()),
        };
        let image = |images: Option<Vec<Image>>| {
            let image =
                images.map(|images| need(images.into_iter().next(), "an image is missing")).transpose()?;
            self.image(image, |class, raw| {
                let text: String = serde_json::from_str(raw.get()).ok()?;
                if self.options.canal_unchanged.as_ref() == Some(&text) {
                    return Some(Cell::Unchanged);
                }
                value::from_canal(class, text).map(Cell::Text)
            })
        };
        let (data, old) = (image(row.data)?, image(row.old)?);
        let (old, new) = if op == Op::Delete { (data, None) } else { (old, data) };
        Ok(Change { position, op, old, new })
    }

    fn debezium(&self, row: DebeziumRow) -> Parsed<Change> {
        let Payload { source, op, before, after } = row.payload;
        let position = Position { commit_ts: source.commit_ts, row: source.row };
        let op = match op.as_str() {
            "c" => Op::Insert,
            "u" => Op::Update,
            "d" => Op::Delete,
            _ => return Err("a row has an unknown op".into()),
        };
        let unavailable = value::base64(UNAVAILABLE.as_bytes());
        let image = |image: Option<Image>| {
            self.image(image, |class, raw| {
                let text = serde_json::from_str::<&str>(raw.get()).ok();
                if text == Some(UNAVAILABLE) || *class == Class::Bytes && text == Some(unavailable.as_str()) {
                    return Some(Cell::Unchanged);
                }
                value::from_debezium(class, raw).map(Cell::Text)
            })
        };
        Ok(Change { position, op, old: image(before)?, new: image(after)? })
    }

    /// An image in the order of the columns; what it does not have was not sent.
    fn image(
        &self,
        image: Option<Image>,
        cell: impl Fn(&Class, &RawValue) -> Option<Cell>,
    ) -> Parsed<Option<Vec<Cell>>> {
        let Some(image) = image else { return Ok(None) };
        let known = self.columns.iter().filter(|column| image.contains_key(&column.name)).count();
        if known != image.len() {
            return Err("an image has a column that the schema file has not".into());
        }
        let cells = self.columns.iter().map(|column| match image.get(&column.name) {
            None => Ok(Cell::Unchanged),
            Some(raw) if raw.get() == "null" => Ok(Cell::Null),
            Some(raw) => cell(&column.class, raw)
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
            let writer = self.writers.entry(self.writer.clone()).or_default();
            let position = writer.number(commit_ts);
            if writer.furthest.is_some_and(|furthest| position <= furthest) {
                self.duplicates += 1;
                continue;
            }
            writer.furthest = Some(position);
            let source = writer.number;
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
                self.sources.push(source);
            }
        }
        Ok(())
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
