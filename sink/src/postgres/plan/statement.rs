//! The statements of a table, by kind.

use std::sync::Arc;

use parking_lot::Mutex;
use rustc_hash::FxHashMap;

use super::super::stage;
use super::super::target::{Compare, Target};
use super::Kind;

/// Where a statement finds the values of its rows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Source {
    /// In its parameters, each a `text[]`.
    Params,
    /// In the staging table of the transaction, for so many rows.
    Staged(u64),
}

impl Source {
    /// The values as the rows of a relation `u`.
    fn from(self, lists: &[(&str, &[usize])]) -> String {
        let names: Vec<String> = lists
            .iter()
            .flat_map(|(prefix, columns)| columns.iter().map(move |at| format!("{prefix}{at}")))
            .collect();
        let relation = match self {
            Source::Params => {
                let params: Vec<String> = (1..=names.len()).map(|n| format!("${n}::text[]")).collect();
                format!("unnest({})", params.join(", "))
            }
            Source::Staged(rows) => stage::relation(rows, names.len()),
        };
        format!("{relation} AS u({})", names.join(", "))
    }
}

/// The statements of a table whose rows come as parameters, by kind: nothing else is in their texts.
#[derive(Debug, Default)]
pub(crate) struct Texts(Mutex<FxHashMap<Kind, Arc<str>>>);

/// Texts that a table keeps: there are as many kinds of updates as sets of columns.
const MAX_TEXTS: usize = 64;

/// The statement of a kind, as [`sql`] writes it for [`Source::Params`].
pub(crate) fn text(target: &Target, kind: &Kind) -> Arc<str> {
    let mut texts = target.texts.0.lock();
    if let Some(text) = texts.get(kind) {
        return Arc::clone(text);
    }
    if texts.len() >= MAX_TEXTS {
        texts.clear();
    }
    let text: Arc<str> = sql(target, kind, Source::Params).into();
    texts.insert(kind.clone(), Arc::clone(&text));
    text
}

/// The statement of a kind.
pub(crate) fn sql(target: &Target, kind: &Kind, source: Source) -> String {
    let names = || target.columns.iter().map(|column| column.name.as_str()).collect::<Vec<_>>().join(", ");
    let all: Vec<usize> = (0..target.columns.len()).collect();
    let insert = || {
        let casts: Vec<String> = all.iter().map(|&at| cast(target, at, "c", at)).collect();
        format!(
            "INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM {}",
            target.name,
            names(),
            casts.join(", "),
            source.from(&[("c", &all)])
        )
    };
    match kind {
        Kind::Copy => format!("COPY {} ({}) FROM STDIN", target.name, names()),
        Kind::Insert => insert(),
        Kind::Upsert => {
            let key: Vec<&str> = target.key.iter().map(|&at| target.columns[at].name.as_str()).collect();
            let set: Vec<String> = all
                .iter()
                .filter(|at| !target.key.contains(at) && !target.columns[**at].identity_always)
                .map(|&at| format!("{0} = EXCLUDED.{0}", target.columns[at].name))
                .collect();
            let action =
                if set.is_empty() { "NOTHING".into() } else { format!("UPDATE SET {}", set.join(", ")) };
            format!("{} ON CONFLICT ({}) DO {action}", insert(), key.join(", "))
        }
        Kind::Update(set) => {
            let columns = set_columns(set);
            let set: Vec<String> = columns
                .iter()
                .map(|&at| format!("{} = {}", target.columns[at].name, cast(target, at, "n", at)))
                .collect();
            let set = set.join(", ");
            if target.key.is_empty() {
                format!(
                    "{} UPDATE {} AS t SET {set} FROM found AS f, wanted AS u \
                     WHERE t.ctid = f.place AND t.tableoid = f.place_of",
                    found_row(target, source, &columns),
                    target.name,
                )
            } else {
                format!(
                    "UPDATE {} AS t SET {set} FROM {} WHERE {}",
                    target.name,
                    source.from(&[("k", &target.key), ("n", &columns)]),
                    same_key(target)
                )
            }
        }
        Kind::Delete if target.key.is_empty() => format!(
            "{} DELETE FROM {} AS t USING found AS f WHERE t.ctid = f.place AND t.tableoid = f.place_of",
            found_row(target, source, &[]),
            target.name
        ),
        Kind::Delete => format!(
            "DELETE FROM {} AS t USING {} WHERE {}",
            target.name,
            source.from(&[("k", &target.key)]),
            same_key(target)
        ),
    }
}

pub(super) fn set_columns(set: &[bool]) -> Vec<usize> {
    set.iter().enumerate().filter(|(_, set)| **set).map(|(at, _)| at).collect()
}

fn cast(target: &Target, column: usize, prefix: &str, at: usize) -> String {
    match target.columns[column].cast.as_str() {
        "text" => format!("u.{prefix}{at}"),
        ty => format!("u.{prefix}{at}::{ty}"),
    }
}

fn same_key(target: &Target) -> String {
    let same = |&at: &usize| {
        let column = &target.columns[at];
        format!("t.{} {} {}", column.name, column.equals, cast(target, at, "k", at))
    };
    target.key.iter().map(same).collect::<Vec<_>>().join(" AND ")
}

/// Finds one row by all its values, as `found`: its place, by which it is then taken. `new` are columns whose new values come
/// with the old ones, as `wanted`. Where the equality of a type may call two values equal that are not the same, or there is
/// none, both sides are compared as text that this session wrote. The wanted values are converted before the table is read:
/// a subquery without a reference to it is evaluated once.
fn found_row(target: &Target, source: Source, new: &[usize]) -> String {
    let all: Vec<usize> = (0..target.columns.len()).collect();
    let wanted = all.iter().map(|&at| match target.columns[at].compare {
        Compare::Text => format!("({})::text AS c{at}", cast(target, at, "c", at)),
        Compare::Equals | Compare::NotDistinct => format!("{} AS c{at}", cast(target, at, "c", at)),
    });
    let wanted: Vec<String> = wanted.chain(new.iter().map(|at| format!("u.n{at}"))).collect();
    let same = all.iter().map(|&at| {
        let (name, own) = (&target.columns[at].name, format!("(SELECT c{at} FROM wanted)"));
        match target.columns[at].compare {
            Compare::Equals => format!("t.{name} = {own}"),
            Compare::NotDistinct => format!("t.{name} IS NOT DISTINCT FROM {own}"),
            Compare::Text => format!("t.{name}::text COLLATE pg_catalog.\"C\" IS NOT DISTINCT FROM {own}"),
        }
    });
    let same: Vec<String> = same.collect();
    format!(
        "WITH wanted AS MATERIALIZED (SELECT {} FROM {}), found AS MATERIALIZED (SELECT t.tableoid AS place_of, \
         t.ctid AS place FROM {} AS t WHERE {} LIMIT 1)",
        wanted.join(", "),
        source.from(&[("c", &all), ("n", new)]),
        target.name,
        if same.is_empty() { "true".to_owned() } else { same.join(" AND ") }
    )
}
