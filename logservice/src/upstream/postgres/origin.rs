//! Which history of a server a changefeed reads, and whether the present server goes on with it.
//!
//! A position means something only in one history. A standby that is promoted begins a timeline of its own: up to the
//! point where it branches off, both histories are the same, and behind it equal positions name different changes. A
//! server that was restored from an older state can even go on in the same timeline. What was read therefore remembers
//! where it came from: a reader while it runs, and the publication's comment (`publication.rs`) from one reader to the
//! next, because that is in the log itself and branches off with it.
//!
//! ```text
//!  timeline 1  ──────────┬─────────── x      read up to x before it was lost
//!                        │ E
//!  timeline 2            └─────────────────  the promoted standby
//!
//!  read ≤ E    the reader goes on            known only while the reader that has read is still there
//!  read > E    the changes between E and x were replicated and do not exist any more: a person decides
//! ```
//!
//! - **OR-1** No position is asked for in a history in which it was not read.

use serde::{Deserialize, Serialize};

use super::conn::Connection;
use super::sql::{lsn, parse_lsn};
use crate::Error;

/// A history: a server's data, and the branch of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Origin {
    /// `system_identifier`: made by `initdb`, kept by physical copies.
    pub(crate) system: u64,
    /// Counted up by each promotion.
    pub(crate) timeline: u32,
}

/// The server that answers now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Server {
    pub(crate) origin: Origin,
    /// End of its log on disk; nothing behind it was ever sent.
    pub(crate) end: u64,
}

/// Asks a server which one it is.
///
/// # Errors
/// When it cannot be asked.
pub(crate) async fn ask(conn: &mut Connection) -> Result<Server, Error> {
    // The control file tells the timeline of the last checkpoint, which may be before a promotion; the name of the
    // current file of the log has the present one.
    let sql = "SELECT s.system_identifier, substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8), \
               pg_current_wal_flush_lsn() FROM pg_control_system() s";
    let rows = conn.query("identify itself", sql).await?;
    let malformed = || Error::protocol("malformed identity");
    let row = rows.first().ok_or_else(malformed)?;
    let system: i64 = row.number(0)?;
    let timeline = u32::from_str_radix(row.text(1), 16).map_err(|_| malformed())?;
    let end = parse_lsn(row.text(2)).ok_or_else(malformed)?;
    Ok(Server { origin: Origin { system: system.cast_unsigned(), timeline }, end })
}

/// Asks on a replication connection where the former timelines of the present one ended.
///
/// # Errors
/// When the server cannot be asked.
pub(crate) async fn history(conn: &mut Connection, timeline: u32) -> Result<History, Error> {
    let rows = conn.query("show its history", &format!("TIMELINE_HISTORY {timeline}")).await?;
    Ok(History::parse(rows.first().map(|row| row.text(1)).unwrap_or_default()))
}

/// Where the former timelines of a server ended.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct History(Vec<(u32, u64)>);

impl History {
    /// Reads a history file: a timeline, its end and a reason in each line.
    fn parse(text: &str) -> Self {
        let line = |line: &str| {
            let mut words = line.split_whitespace();
            Some((words.next()?.parse().ok()?, parse_lsn(words.next()?)?))
        };
        Self(text.lines().filter_map(line).collect())
    }

    /// Where a timeline ended, if the present one descends from it.
    fn end_of(&self, timeline: u32) -> Option<u64> {
        self.0.iter().find(|(former, _)| *former == timeline).map(|(_, end)| *end)
    }
}

/// How far a changefeed was read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Read {
    /// Everything that was given on is at or before this, if `is_all`; otherwise at least this was.
    pub(crate) to: u64,
    /// Who has read is still here and knows what it gave on.
    pub(crate) is_all: bool,
    /// Nothing was read yet; `to` is where somebody wants to begin, which may be a position of the future.
    pub(crate) is_wish: bool,
}

/// Why a server cannot go on with a history.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Break {
    /// It is another server.
    Other,
    /// Its log ends before what was read.
    Behind {
        /// Where.
        end: u64,
    },
    /// It branched off before what was read.
    Branched {
        /// The timeline that was read.
        from: u32,
        /// Where that ended; `None` if the present one does not descend from it at all.
        end: Option<u64>,
    },
    /// It branched off, and nobody knows how far the former one was read.
    Unproven {
        /// The timeline that was read.
        from: u32,
        /// Where that ended.
        end: u64,
    },
}

/// Whether a changefeed that read `before` goes on at `server`. `former` is the history of the server's timeline.
///
/// # Errors
/// Why it does not.
pub(crate) fn judge(before: Origin, server: Server, read: Read, former: &History) -> Result<(), Break> {
    if before.system != server.origin.system {
        return Err(Break::Other);
    }
    let from = before.timeline;
    if from == server.origin.timeline {
        let behind = read.to > server.end && !read.is_wish;
        return if behind { Err(Break::Behind { end: server.end }) } else { Ok(()) };
    }
    match former.end_of(from) {
        Some(end) if read.to > end => Err(Break::Branched { from, end: Some(end) }),
        Some(end) if !read.is_all => Err(Break::Unproven { from, end }),
        Some(_) => Ok(()),
        None => Err(Break::Branched { from, end: None }),
    }
}

impl Break {
    /// The error, with what a person does. `accept` is the statement that lets the changefeed go on.
    pub(crate) fn into_error(self, server: Server, read: Read, accept: &str) -> Error {
        let now = server.origin.timeline;
        let again = "remove the changefeed and create it again";
        let what = match self {
            Break::Other => format!(
                "the server is not the one that was read before (its system identifier is {}), so positions mean \
                 nothing there; {again}",
                server.origin.system
            ),
            Break::Behind { end } => format!(
                "the server's log ends at {}, before {}, up to which it was read: it was put back to an older state. \
                 The target may have changes that do not exist any more; {again}",
                lsn(end),
                lsn(read.to)
            ),
            Break::Branched { from, end: Some(end) } => format!(
                "the server was promoted (timeline {now}) and has the changes of timeline {from} only up to {}, but \
                 they were read up to {}: the target may have changes that do not exist any more; {again}",
                lsn(end),
                lsn(read.to)
            ),
            Break::Branched { from, end: None } => format!(
                "the server is on timeline {now}, which does not descend from timeline {from} that was read before: \
                 another server was promoted in between. Connect to that one; if it is gone, {again}"
            ),
            Break::Unproven { from, end } => format!(
                "the server was promoted (timeline {now}; timeline {from} ended at {}) while nobody read it, and the \
                 former server may have sent changes that are not here. Compare both ends with millrace verify; if \
                 they are equal, run on the source: {accept}; and resume the changefeed. Otherwise {again}",
                lsn(end)
            ),
        };
        Error::UpstreamDiverged { what }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Origin = Origin { system: 7, timeline: 1 };

    fn server(timeline: u32, end: u64) -> Server {
        Server { origin: Origin { system: 7, timeline }, end }
    }

    fn all(to: u64) -> Read {
        Read { to, is_all: true, is_wish: false }
    }

    #[test]
    fn a_reader_goes_on_where_everything_that_it_has_read_is_there_too() {
        let former = History::parse("1\t0/1000\tno recovery target specified\n\n2\t0/2000\tbefore x\n");
        assert_eq!(former, History(vec![(1, 0x1000), (2, 0x2000)]));
        let none = History::default();
        assert_eq!(judge(ONE, server(1, 0x500), all(0x500), &none), Ok(()));
        assert_eq!(judge(ONE, server(1, 0x500), all(0x501), &none), Err(Break::Behind { end: 0x500 }));
        let wish = Read { to: 0x900, is_all: false, is_wish: true };
        assert_eq!(judge(ONE, server(1, 0x500), wish, &none), Ok(()), "a start in the future");
        for timeline in [2, 3] {
            assert_eq!(judge(ONE, server(timeline, 0x3000), all(0x1000), &former), Ok(()));
            let lost = Err(Break::Branched { from: 1, end: Some(0x1000) });
            assert_eq!(judge(ONE, server(timeline, 0x3000), all(0x1001), &former), lost);
        }
        let two = Origin { timeline: 2, ..ONE };
        assert_eq!(judge(two, server(3, 0x3000), all(0x1800), &former), Ok(()));
        let stranger = Err(Break::Branched { from: 2, end: None });
        assert_eq!(judge(two, server(1, 0x3000), all(0x10), &none), stranger, "the former primary is back");
        let other = Origin { system: 8, ..ONE };
        assert_eq!(judge(other, server(1, 0x3000), all(0x10), &none), Err(Break::Other));
    }

    #[test]
    fn what_a_reader_that_is_gone_has_given_on_is_not_taken_for_granted() {
        let former = History::parse("1\t0/1000\tx");
        let checkpoint = Read { to: 0x800, is_all: false, is_wish: false };
        let unproven = Break::Unproven { from: 1, end: 0x1000 };
        assert_eq!(judge(ONE, server(2, 0x3000), checkpoint, &former), Err(unproven));
        let past = Read { to: 0x1800, ..checkpoint };
        let lost = Err(Break::Branched { from: 1, end: Some(0x1000) });
        assert_eq!(judge(ONE, server(2, 0x3000), past, &former), lost);
        let error = unproven.into_error(server(2, 0x3000), checkpoint, "COMMENT ON x");
        let text = error.to_string();
        assert!(text.contains("timeline 1 ended at 0/1000") && text.contains("COMMENT ON x"), "{text}");
        assert_eq!(error.code(), "CDC:ErrUpstreamDiverged");
    }

    #[test]
    fn a_history_that_cannot_be_read_proves_nothing() {
        for text in ["", "\n", "one 0/1", "1", "1 zero", "-1 0/1"] {
            assert_eq!(History::parse(text), History::default(), "{text:?}");
        }
    }
}
