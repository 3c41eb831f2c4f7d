//! The replication slot of a changefeed: whether it is there, whose it is, and whether the log behind it is.

use heartbeatpb::Ts;

use super::conn::Connection;
use super::names::Names;
use super::sql::{literal, lsn, parse_lsn};
use crate::Error;

/// State of a slot.
#[derive(Clone, Debug)]
pub(crate) struct SlotState {
    pub(crate) ours: bool,
    pub(crate) confirmed: u64,
    /// Why the server does not keep the log for it any more, in the server's word.
    pub(crate) lost: Option<String>,
    pub(crate) active_pid: Option<u32>,
}

/// The server's word for why a slot is lost; NULL for a good one. Servers before 17 have no word of their own.
fn reason(version: u32) -> &'static str {
    match version {
        ..=15 => "CASE WHEN wal_status = 'lost' THEN 'wal_removed' END",
        16 => "CASE WHEN conflicting THEN 'conflict' WHEN wal_status = 'lost' THEN 'wal_removed' END",
        _ => "COALESCE(invalidation_reason, CASE WHEN wal_status = 'lost' THEN 'wal_removed' END)",
    }
}

/// What a server's word for a loss means, and what keeps it from happening again.
fn because(reason: &str) -> String {
    match reason {
        "wal_removed" => "it needed more log than max_slot_wal_keep_size allows".to_owned(),
        "idle_timeout" => "nobody read it for longer than idle_replication_slot_timeout allows".to_owned(),
        "rows_removed" | "conflict" => {
            "rows of the catalog that it needs were removed; hot_standby_feedback on a standby keeps them"
                .to_owned()
        }
        "wal_level_insufficient" => "wal_level was lowered meanwhile".to_owned(),
        other => other.to_owned(),
    }
}

/// Looks a slot up.
///
/// # Errors
/// When the upstream cannot be asked.
pub(crate) async fn find(conn: &mut Connection, name: &str) -> Result<Option<SlotState>, Error> {
    let sql = format!(
        "SELECT COALESCE(plugin = 'pgoutput' AND database = current_database() AND NOT temporary, false), \
           confirmed_flush_lsn, {}, active_pid FROM pg_replication_slots WHERE slot_name = {}",
        reason(conn.version()),
        literal(name)
    );
    let rows = conn.query("look up a replication slot", &sql).await?;
    let Some(row) = rows.first() else { return Ok(None) };
    Ok(Some(SlotState {
        ours: row.flag(0),
        confirmed: row.opt(1).and_then(parse_lsn).unwrap_or(0),
        lost: row.opt(2).map(ToOwned::to_owned),
        active_pid: row.opt(3).and_then(|pid| pid.parse().ok()),
    }))
}

/// The slot, usable from `from` on; anything else is an error that says what to do. `promoted`: the server became the
/// primary while the changefeed existed.
///
/// # Errors
/// When there is none, when it is somebody else's, or when the log after `from` is gone.
pub(crate) async fn usable(
    conn: &mut Connection,
    names: &Names,
    from: Ts,
    promoted: bool,
) -> Result<SlotState, Error> {
    let what = match find(conn, &names.slot).await? {
        None if promoted => {
            let carries = if conn.version() < 17 {
                "which servers before PostgreSQL 17 do not carry to a standby"
            } else {
                "which a standby carries only with sync_replication_slots = on"
            };
            format!("the server was promoted and has no replication slot {:?}, {carries}", names.slot)
        }
        None => format!("replication slot {:?} does not exist any more", names.slot),
        Some(slot) if !slot.ours => {
            let what = format!("replication slot {:?} belongs to somebody else; drop it there", names.slot);
            return Err(Error::RetentionConflict { what });
        }
        Some(SlotState { lost: Some(reason), .. }) => {
            format!("replication slot {:?} was invalidated by the server: {}", names.slot, because(&reason))
        }
        Some(slot) if slot.confirmed > from.0 => format!(
            "replication slot {:?} begins at {}, after the wanted position {}: somebody else has read or moved it",
            names.slot,
            lsn(slot.confirmed),
            lsn(from.0)
        ),
        Some(slot) => return Ok(slot),
    };
    Err(Error::LogLost {
        what: format!("{what}; the log in between is lost: remove the changefeed and create it again"),
    })
}

/// The statement that creates a slot and answers its position. Since PostgreSQL 17 a standby may carry it along.
pub(crate) fn creation(version: u32, name: &str) -> String {
    let options = if version < 17 { "" } else { ", failover => true" };
    format!("SELECT lsn FROM pg_create_logical_replication_slot({}, 'pgoutput'{options})", literal(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_version_is_asked_in_its_own_words() {
        assert!(!creation(16, "s").contains("failover"));
        assert!(creation(17, "s").contains("'pgoutput', failover => true)"));
        assert!(!reason(15).contains("conflicting") && reason(16).contains("conflicting"));
        assert!(reason(17).contains("invalidation_reason") && reason(18).contains("invalidation_reason"));
        assert!(because("idle_timeout").contains("idle_replication_slot_timeout"));
        assert_eq!(because("a word of the future"), "a word of the future");
    }
}
