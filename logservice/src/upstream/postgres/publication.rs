//! The publication of a changefeed: how it is made, what it remembers, and whether it is as it was made.
//!
//! What somebody takes out of a publication, or filters away there, is not in the log any more, and the log does not
//! tell. So a reader looks at it before it begins and every now and then while it reads ([`Fingerprint`]), and compares it
//! with what should be there: where schema changes are captured, with the tables that the triggers published, otherwise
//! with the list that was written down when it was made.
//!
//! The comment says whose it is, and behind that, as JSON, what has to outlive a reader ([`Note`]).
//!
//! - **PB-1** A publication that lost a wanted table, or carries a part of it, is an error that names the table.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::conn::Connection;
use super::ddl::message::Lost;
use super::names::Names;
use super::origin::Origin;
use super::sql::{ident, literal};
use crate::upstream::{FeedSpec, TablePart};
use crate::{Error, TableFilter};

/// How many tables an error names.
const NAMED_TABLES: usize = 5;

/// What the comment keeps. What a later version adds is left out by an earlier one.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Note {
    /// The history that was read last.
    pub(crate) origin: Option<Origin>,
    /// The tables that belong to the changefeed, where the triggers do not tell it.
    pub(crate) tables: Option<Vec<i64>>,
    /// The newest membership that we made; what has a larger id was put in by somebody else.
    pub(crate) newest: u32,
    /// What of the tables of the list is published, where that is not all, as the server prints it.
    pub(crate) parts: BTreeMap<i64, TablePart>,
}

impl Note {
    /// The comment.
    fn text(&self, names: &Names) -> String {
        format!("{} {}", names.marker, serde_json::to_string(self).unwrap_or_default())
    }

    /// Reads a comment; `None`: it is not ours. Without a readable note nothing is known.
    fn read(names: &Names, comment: &str) -> Option<Self> {
        let rest = comment.strip_prefix(&names.marker)?;
        if rest.is_empty() {
            return Some(Self::default());
        }
        rest.strip_prefix(' ').map(|json| serde_json::from_str(json).unwrap_or_default())
    }
}

/// What changes when somebody alters a publication. Cheap to ask for, however many tables it has.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Fingerprint {
    id: u32,
    /// Every kind of change, by the root of a partitioned table, and no more tables than are named.
    complete: bool,
    /// A hash of the row filters and column lists, if there are any.
    partial: Option<String>,
    members: u64,
    /// Id of the newest membership.
    newest: u32,
}

impl Fingerprint {
    /// Whether it is the same publication, altered or not, and not another one of its name.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

/// A publication of our name.
#[derive(Clone, Debug)]
pub(crate) struct Publication {
    pub(crate) fingerprint: Fingerprint,
    /// What its comment keeps; `None`: it was not made by this changefeed.
    pub(crate) note: Option<Note>,
}

impl Publication {
    /// Whether this changefeed made it.
    pub(crate) fn is_ours(&self) -> bool {
        self.note.is_some()
    }
}

/// Row filters and column lists are known since PostgreSQL 15.
fn partial(version: u32) -> &'static str {
    if version < 15 {
        "NULL"
    } else {
        "md5(string_agg(concat_ws(' ', r.oid, r.prattrs, r.prqual), ',' ORDER BY r.oid) \
           FILTER (WHERE r.prqual IS NOT NULL OR r.prattrs IS NOT NULL))"
    }
}

/// Looks at the publication. `None`: there is none.
///
/// # Errors
/// When the upstream cannot be asked.
pub(crate) async fn fingerprint(conn: &mut Connection, names: &Names) -> Result<Option<Fingerprint>, Error> {
    let sql = format!(
        "SELECT p.oid, pubinsert AND pubupdate AND pubdelete AND pubtruncate AND pubviaroot AND NOT puballtables, \
           {partial}, count(r.oid), COALESCE(max(r.oid::bigint), 0) \
         FROM pg_publication p LEFT JOIN pg_publication_rel r ON r.prpubid = p.oid WHERE p.pubname = {name} GROUP BY p.oid",
        partial = partial(conn.version()),
        name = literal(&names.slot)
    );
    let rows = conn.query("look up a publication", &sql).await?;
    let Some(row) = rows.first() else { return Ok(None) };
    Ok(Some(Fingerprint {
        id: row.number(0)?,
        complete: row.flag(1),
        partial: row.opt(2).map(ToOwned::to_owned),
        members: row.number(3)?,
        newest: row.number(4)?,
    }))
}

/// Looks the publication up.
///
/// # Errors
/// When the upstream cannot be asked.
pub(crate) async fn find(conn: &mut Connection, names: &Names) -> Result<Option<Publication>, Error> {
    let Some(fingerprint) = fingerprint(conn, names).await? else { return Ok(None) };
    let sql = format!(
        "SELECT obj_description(oid, 'pg_publication') FROM pg_publication WHERE oid = {}",
        fingerprint.id
    );
    let rows = conn.query("look up a publication", &sql).await?;
    // It may have been dropped since.
    let Some(row) = rows.first() else { return Ok(None) };
    Ok(Some(Publication { fingerprint, note: Note::read(names, row.text(0)) }))
}

/// The publication, as it was made. `captured`: the triggers tell which tables belong to it.
///
/// # Errors
/// What is wrong with it, and what to do.
pub(crate) async fn usable(
    conn: &mut Connection,
    spec: &FeedSpec,
    names: &Names,
    captured: bool,
) -> Result<Publication, Error> {
    let mut found = find(conn, names).await?.ok_or_else(|| gone(names))?;
    let Some(note) = &mut found.note else { return Err(foreign(names)) };
    if note.tables.is_none() && !spec.publish.is_empty() {
        // A person has accepted it as it is.
        note.parts = parts(conn, names).await?;
    }
    verify(conn, &spec.filter, names, &found.fingerprint, note, captured).await?;
    Ok(found)
}

/// What of its tables the publication carries, by their ids, where that is not all.
///
/// # Errors
/// When there is no publication, or the upstream cannot be asked.
pub(crate) async fn parts(conn: &mut Connection, names: &Names) -> Result<BTreeMap<i64, TablePart>, Error> {
    let found = fingerprint(conn, names).await?.ok_or_else(|| gone(names))?;
    if found.partial.is_none() {
        return Ok(BTreeMap::new());
    }
    let members = members(conn, &found, &BTreeMap::new()).await?;
    Ok(members.into_iter().map(|(id, _, part)| (id, part)).collect())
}

/// Id, name and part of each table that has a row filter or a column list, or had one.
async fn members(
    conn: &mut Connection,
    found: &Fingerprint,
    noted: &BTreeMap<i64, TablePart>,
) -> Result<Vec<(i64, String, TablePart)>, Error> {
    let noted = noted.keys().map(i64::to_string).collect::<Vec<_>>().join(",");
    let sql = format!(
        "SELECT r.prrelid, r.prrelid::regclass, pg_get_expr(r.prqual, r.prrelid), \
           CASE WHEN r.prattrs IS NOT NULL THEN to_json(ARRAY(SELECT a.attname FROM pg_catalog.pg_attribute a \
             WHERE a.attrelid = r.prrelid AND a.attnum = ANY (r.prattrs::int2[]) ORDER BY a.attnum)) END \
         FROM pg_catalog.pg_publication_rel r WHERE r.prpubid = {} \
           AND (r.prqual IS NOT NULL OR r.prattrs IS NOT NULL OR r.prrelid = ANY ('{{{noted}}}'::oid[])) ORDER BY r.oid",
        found.id
    );
    let mut members = Vec::new();
    let rows = conn.query("list row filters and column lists", &sql).await;
    for row in rows.map_err(super::catalog::gone_meanwhile)? {
        let columns = row.opt(3).map(serde_json::from_str).transpose();
        let columns = columns.map_err(|_| Error::protocol("a column list is malformed"))?;
        let part = TablePart { columns, condition: row.opt(2).map(ToOwned::to_owned) };
        members.push((row.number(0)?, row.text(1).to_owned(), part));
    }
    Ok(members)
}

/// Compares a publication with what it should be.
///
/// # Errors
/// What is wrong with it, and what to do.
pub(crate) async fn verify(
    conn: &mut Connection,
    filter: &TableFilter,
    names: &Names,
    found: &Fingerprint,
    note: &Note,
    captured: bool,
) -> Result<(), Error> {
    if !found.complete {
        return Err(altered(names, INCOMPLETE));
    }
    if found.partial.is_some() || !note.parts.is_empty() {
        let mut members = members(conn, found, &note.parts).await?;
        members.retain(|(id, _, part)| note.parts.get(id).cloned().unwrap_or_default() != *part);
        if !members.is_empty() {
            let mine = members.iter().any(|(id, ..)| note.parts.contains_key(id));
            let tables: Vec<&str> =
                members.iter().take(NAMED_TABLES).map(|(_, name, _)| name.as_str()).collect();
            let tables = tables.join(", ");
            let what = if mine { other_part(&tables) } else { filtered(&tables) };
            return Err(unless_gone(conn, names, found, altered(names, &what)).await?);
        }
    }
    let lost = if captured { lost_captured(names, found) } else { lost_noted(found, note) };
    let Some(sql) = lost else { return Ok(()) };
    let rows = conn.query("compare the tables of a publication", &sql).await?;
    // Who narrows a filter takes the tables out that it does not match any more.
    let tables: Vec<String> = rows
        .iter()
        .filter(|row| filter.matches(row.text(0), row.text(1)))
        .map(|row| format!("{}.{}", row.text(0), row.text(1)))
        .collect();
    if tables.is_empty() {
        return Ok(());
    }
    Err(unless_gone(conn, names, found, altered(names, &taken_out(&tables))).await?)
}

/// What is wrong with a publication that may have been dropped while it was looked at: it has no tables then.
async fn unless_gone(
    conn: &mut Connection,
    names: &Names,
    found: &Fingerprint,
    otherwise: Error,
) -> Result<Error, Error> {
    let now = fingerprint(conn, names).await?;
    Ok(if now.is_some_and(|now| now.is_same(found)) { otherwise } else { gone(names) })
}

/// What is wrong when some kind of change is missing.
const INCOMPLETE: &str = "it does not publish every kind of change of exactly its tables any more";

fn filtered(tables: &str) -> String {
    format!("it has a row filter or a column list on {tables}")
}

fn other_part(tables: &str) -> String {
    format!("the row filter or the column list of {tables} is not the one that it was made with")
}

fn taken_out(tables: &[String]) -> String {
    let named = &tables[..tables.len().min(NAMED_TABLES)];
    format!("{} of its tables were taken out: {}", tables.len(), named.join(", "))
}

/// What it means that somebody altered the publication, as the log tells it. A table that is not wanted any more may be
/// taken out.
///
/// # Errors
/// What is missing from the log, and what to do.
pub(crate) fn judge(names: &Names, filter: &TableFilter, lost: &Lost) -> Result<(), Error> {
    Err(match lost {
        Lost::All => gone(names),
        Lost::Kinds => altered(names, INCOMPLETE),
        Lost::Rows(schema, name) => altered(names, &filtered(&format!("{schema}.{name}"))),
        Lost::Table(schema, name) if filter.matches(schema, name) => {
            altered(names, &taken_out(&[format!("{schema}.{name}")]))
        }
        Lost::Table(..) => return Ok(()),
    })
}

/// Tables that the triggers have published and that are not published.
fn lost_captured(names: &Names, found: &Fingerprint) -> Option<String> {
    Some(format!(
        "SELECT n.nspname, c.relname FROM millrace_capture.shapes s \
         JOIN pg_catalog.pg_class c ON c.oid = s.object JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         WHERE s.class = 'table' AND s.shape -> 'published' ? {} AND NOT EXISTS (SELECT FROM pg_publication_rel r \
           WHERE r.prpubid = {} AND r.prrelid = s.object) ORDER BY c.oid",
        literal(&names.slot),
        found.id
    ))
}

/// Tables of the list that exist and are not published, or not without a gap.
fn lost_noted(found: &Fingerprint, note: &Note) -> Option<String> {
    let list = note.tables.as_ref().filter(|tables| !tables.is_empty())?;
    let list = list.iter().map(i64::to_string).collect::<Vec<_>>().join(",");
    Some(format!(
        "SELECT n.nspname, c.relname FROM unnest('{{{list}}}'::oid[]) AS t (id) \
         JOIN pg_catalog.pg_class c ON c.oid = t.id JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         WHERE NOT EXISTS (SELECT FROM pg_publication_rel r WHERE r.prpubid = {} AND r.prrelid = t.id \
           AND r.oid <= {}) ORDER BY c.oid",
        found.id, note.newest
    ))
}

/// The publication was dropped: what was changed since is not in the log for us.
pub(crate) fn gone(names: &Names) -> Error {
    Error::LogLost {
        what: format!(
            "publication {:?} does not exist any more, so changes are missing from the log; remove the changefeed and \
             create it again",
            names.slot
        ),
    }
}

fn altered(names: &Names, what: &str) -> Error {
    Error::RetentionConflict {
        what: format!(
            "publication {:?} was altered: {what}; changes since then are missing from the log: remove the changefeed \
             and create it again",
            names.slot
        ),
    }
}

/// Somebody else has a publication of our name.
pub(crate) fn foreign(names: &Names) -> Error {
    Error::RetentionConflict {
        what: format!(
            "publication {:?} exists and was not made by this changefeed; drop it first",
            names.slot
        ),
    }
}

/// Makes the publication of some tables.
///
/// # Errors
/// When the upstream refuses it.
pub(crate) async fn create(conn: &mut Connection, names: &Names, tables: &[String]) -> Result<(), Error> {
    let tables = if tables.is_empty() { String::new() } else { format!("FOR TABLE {}", tables.join(", ")) };
    let sql = format!(
        "CREATE PUBLICATION {} {tables} \
         WITH (publish = 'insert, update, delete, truncate', publish_via_partition_root = true); {}",
        ident(&names.slot),
        comment(names, &names.marker)
    );
    conn.query("create a publication", &sql).await.map(drop)
}

/// Writes down which tables belong to it, unless the triggers tell, and which history is read. Answers the note.
///
/// # Errors
/// When the upstream refuses it.
pub(crate) async fn note(
    conn: &mut Connection,
    names: &Names,
    found: &Publication,
    origin: Origin,
    captured: bool,
) -> Result<Note, Error> {
    let mut note = found.note.clone().unwrap_or_default();
    note.origin = Some(origin);
    if !captured && note.tables.is_none() {
        let sql = format!(
            "SELECT r.prrelid FROM pg_publication_rel r WHERE r.prpubid = {} AND r.oid <= {} ORDER BY 1",
            found.fingerprint.id, found.fingerprint.newest
        );
        let rows = conn.query("list the tables of a publication", &sql).await?;
        let tables: Result<Vec<i64>, Error> = rows.iter().map(|row| row.number(0)).collect();
        (note.tables, note.newest) = (Some(tables?), found.fingerprint.newest);
        note.parts = parts(conn, names).await?;
    }
    let sql = comment(names, &note.text(names));
    conn.query("comment on a publication", &sql).await.map(|_| note)
}

/// The statement with which a person accepts a publication and its server as they are.
pub(crate) fn acceptance(names: &Names) -> String {
    comment(names, &names.marker)
}

fn comment(names: &Names, text: &str) -> String {
    format!("COMMENT ON PUBLICATION {} IS {}", ident(&names.slot), literal(text))
}

/// Drops the publication if this changefeed made it.
///
/// # Errors
/// When the upstream refuses it.
pub(crate) async fn remove(conn: &mut Connection, names: &Names) -> Result<(), Error> {
    if find(conn, names).await?.is_some_and(|publication| publication.is_ours()) {
        // Nobody is told: its changefeed goes, or was never there.
        let own = "SELECT set_config('millrace_capture.own', 'on', true)";
        let sql = format!("{own}; DROP PUBLICATION IF EXISTS {}", ident(&names.slot));
        conn.query("drop a publication", &sql).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use heartbeatpb::ChangefeedId;
    use testkit::PgServer;

    use super::*;
    use crate::upstream::postgres::admin::connect;
    use crate::upstream::postgres::options::ConnectOptions;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_publication_that_is_dropped_while_it_is_looked_at_is_gone_and_not_altered() {
        let server = PgServer::start().await.expect("server");
        server.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)").await.expect("table");
        let options = ConnectOptions::parse(&server.uri("postgres")).expect("options");
        let mut conn = connect(&options).await.expect("connect");
        let names = Names::of(&ChangefeedId::fresh("f"));
        create(&mut conn, &names, &["public.t".to_owned()]).await.expect("create");
        let found = fingerprint(&mut conn, &names).await.expect("look").expect("publication");
        let rows =
            conn.query("find the table", "SELECT 'public.t'::regclass::oid::bigint").await.expect("table");
        let note = Note {
            tables: Some(vec![rows.first().expect("row").number(0).expect("oid")]),
            newest: u32::MAX,
            ..Note::default()
        };
        let filter = TableFilter::new(&["*.*"], true).expect("filter");
        verify(&mut conn, &filter, &names, &found, &note, false).await.expect("as it was made");

        conn.query(
            "take a table out",
            &format!("ALTER PUBLICATION {} DROP TABLE public.t", ident(&names.slot)),
        )
        .await
        .expect("alter");
        let altered = verify(&mut conn, &filter, &names, &found, &note, false).await.expect_err("altered");
        assert_eq!(altered.code(), "CDC:ErrUpstreamSlotConflict", "{altered}");
        remove(&mut conn, &names).await.expect("drop");
        let gone = verify(&mut conn, &filter, &names, &found, &note, false).await.expect_err("gone");
        assert_eq!(gone.code(), "CDC:ErrStartTsBeforeGC", "{gone}");
    }

    #[test]
    fn a_comment_says_whose_it_is_and_what_an_older_or_newer_version_wrote_is_no_error() {
        let names = Names::of(&ChangefeedId::fresh("f"));
        let note = Note {
            origin: Some(Origin { system: u64::MAX, timeline: 3 }),
            tables: Some(vec![5, 4_294_967_295]),
            newest: 9,
            parts: BTreeMap::from([(
                5,
                TablePart {
                    columns: Some(vec!["a\"b".to_owned()]),
                    condition: Some("(a > 'x'::text)".to_owned()),
                },
            )]),
        };
        assert_eq!(Note::read(&names, &note.text(&names)), Some(note.clone()));
        assert_eq!(Note::read(&names, &names.marker), Some(Note::default()));
        let newer = format!("{} {{\"newest\": 9, \"further\": [1]}}", names.marker);
        assert_eq!(Note::read(&names, &newer), Some(Note { newest: 9, ..Note::default() }));
        assert_eq!(Note::read(&names, &format!("{} rubbish", names.marker)), Some(Note::default()));
        for other in
            ["", "mine", &format!("{}0", names.marker), &note.text(&Names::of(&ChangefeedId::fresh("f")))]
        {
            assert_eq!(Note::read(&names, other), None, "{other}");
        }
    }
}
