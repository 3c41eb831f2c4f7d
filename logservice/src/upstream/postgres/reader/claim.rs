//! Before a stream begins: whether the server goes on with the history that was read, whether publication and slot are as
//! they were made, and who has the slot.

use std::sync::Arc;

use super::Session;
use super::guard::Seen;
use crate::Error;
use crate::upstream::postgres::catalog::CatalogTable;
use crate::upstream::postgres::conn::{Connection, Purpose};
use crate::upstream::postgres::ddl::install;
use crate::upstream::postgres::origin::{self, History, Origin, Read, Server};
use crate::upstream::postgres::shape::Shape;
use crate::upstream::postgres::{admin, publication, slot};

impl Session {
    /// Makes sure that the slot is ours and free, and reads the tables. Says whether a former reader was ended.
    pub(super) async fn claim(&mut self) -> Result<(Vec<(CatalogTable, Arc<Shape>)>, bool), Error> {
        let mut conn = admin::connect(&self.options).await?;
        self.recognize(&mut conn).await?;
        let ended = self.claim_slot(&mut conn).await?;
        let tables = self.read_tables(&mut conn).await?;
        conn.close().await;
        Ok((tables, ended))
    }

    /// Ends the connection of a reader that came before us; gives way to one that came after. Says whether it ended one.
    async fn claim_slot(&mut self, conn: &mut Connection) -> Result<bool, Error> {
        let slot = slot::usable(conn, &self.names, self.resolved, self.promoted).await?;
        let Some(pid) = slot.active_pid else { return Ok(false) };
        let mine = heartbeatpb::MaintainerEpoch::to_wire(self.spec.epoch);
        let sql = format!("SELECT application_name FROM pg_stat_activity WHERE pid = {pid}");
        let rows = conn.query("tell who reads the log", &sql).await?;
        let name = rows.first().map(|row| row.text(0));
        match name.map(|name| (name.is_empty(), self.names.epoch_of(name))) {
            Some((_, Some(current))) if current > mine => Err(Error::Superseded { current }),
            Some((_, Some(_))) => self.end_former(conn, pid).await,
            // Another role's: we may not even see what it calls itself.
            Some((true, None)) => Err(self.held(conn, pid, "it belongs to another role").await?),
            Some((false, None)) => {
                let what = format!(
                    "connection {pid} reads it, which calls itself {:?} and is no reader of this changefeed; what it \
                     confirms is lost here, so keep it away, and run: SELECT pg_terminate_backend({pid})",
                    name.unwrap_or_default()
                );
                Err(Error::SlotHeld { slot: self.names.slot.clone(), what })
            }
            // It has just left.
            None => Ok(false),
        }
    }

    /// Makes sure that the server goes on with the history that was read, and that the publication is as it was made.
    pub(super) async fn recognize(&mut self, conn: &mut Connection) -> Result<(), Error> {
        let captured = install::is_active(conn, &self.names).await?;
        self.captured = captured;
        let found = publication::usable(conn, &self.spec, &self.names, captured).await?;
        let server = origin::ask(conn).await?;
        let noted = found.note.as_ref().and_then(|note| note.origin);
        let read =
            Read { to: self.resolved.0, is_all: self.origin.is_some(), is_wish: self.resolved == self.start };
        if let Some(before) = self.origin.or(noted) {
            self.follow_on(before, server, read).await?;
        }
        let mut note = found.note.clone().unwrap_or_default();
        if noted != Some(server.origin) {
            match publication::note(conn, &self.names, &found, server.origin, captured).await {
                Ok(written) => note = written,
                Err(error) if error.is_retryable() => return Err(error),
                Err(error) => {
                    tracing::warn!(changefeed = %self.spec.changefeed, error = error.chain(),
                        "cannot write down which history of the upstream is read");
                }
            }
        }
        self.origin = Some(server.origin);
        self.seen = Some(Seen { fingerprint: found.fingerprint, note });
        Ok(())
    }

    /// Makes sure that `server` has everything that was read from `before`.
    async fn follow_on(&mut self, before: Origin, server: Server, read: Read) -> Result<(), Error> {
        let former = if before.timeline == server.origin.timeline {
            History::default()
        } else {
            let mut asked = Connection::connect(&self.options, Purpose::Replication, "millrace").await?;
            let former = origin::history(&mut asked, server.origin.timeline).await?;
            asked.close().await;
            former
        };
        if let Err(why) = origin::judge(before, server, read, &former) {
            return Err(why.into_error(server, read, &publication::acceptance(&self.names)));
        }
        if before != server.origin {
            self.promoted = true;
            tracing::warn!(changefeed = %self.spec.changefeed, from = before.timeline, to = server.origin.timeline,
                read = %self.resolved, "the upstream was promoted; it has everything that was read");
        }
        Ok(())
    }

    /// Ends the connection of a reader that came before us: its node may hang, or be cut off from everybody but the
    /// server. Where our role may not do that, the server does it by itself when it hears nothing for long enough.
    async fn end_former(&self, conn: &mut Connection, pid: u32) -> Result<bool, Error> {
        match admin::terminate(conn, pid).await {
            Ok(true) => {
                tracing::info!(changefeed = %self.spec.changefeed, pid, "ended the log connection of a former reader");
                Ok(true)
            }
            Ok(false) => Ok(false),
            Err(Error::UpstreamPrivilege { what }) => Err(self.held(conn, pid, &what).await?),
            Err(error) => Err(error),
        }
    }

    /// The slot has a reader that we may not end.
    async fn held(&self, conn: &mut Connection, pid: u32, why: &str) -> Result<Error, Error> {
        let patience = admin::setting(conn, "wal_sender_timeout").await?;
        let what = format!(
            "{why}; the server ends a reader that is gone after wal_sender_timeout ({patience}) and replication goes on \
             then; to be faster, run as a superuser: SELECT pg_terminate_backend({pid})"
        );
        Ok(Error::SlotHeld { slot: self.names.slot.clone(), what })
    }
}
