//! The reader behind an initial copy: whether the tables are still those that were copied.

use heartbeatpb::Ts;

use super::Session;
use super::follow::Followed;
use crate::Error;
use crate::upstream::postgres::admin;
use crate::upstream::postgres::catalog;
use crate::upstream::postgres::conn::Connection;
use crate::upstream::postgres::ddl::{history, install};

impl Session {
    /// The copy has the tables as they were read, and whoever placed them read them at another moment: nothing may have
    /// changed from the changefeed's start on. The log goes on at `position`.
    pub(super) async fn check_copied(&mut self, copied: &[Followed], position: Ts) -> Result<(), Error> {
        let mut conn = admin::connect(&self.options).await?;
        let changed = self.changed(&mut conn, copied, position).await?;
        if self.captured && changed.is_none() {
            install::begin_at(&mut conn, &self.names, position).await?;
        }
        conn.close().await;
        changed.map_or(Ok(()), |table| Err(Error::CopyOutdated { table }))
    }

    /// Why a copy failed: the upstream refuses to read tables that are not what they were when they were listed.
    pub(super) async fn explain_copy(&mut self, tables: &[Followed], error: Error) -> Error {
        let Error::UpstreamQuery { sqlstate, .. } = &error else { return error };
        // Names and types that are not there, and what the server finds out only when it opens a relation.
        if !["42", "3F", "XX", "0A"].iter().any(|class| sqlstate.starts_with(class)) {
            return error;
        }
        let looked = async {
            let mut conn = admin::connect(&self.options).await?;
            let changed = self.changed(&mut conn, tables, Ts::MAX).await?;
            conn.close().await;
            Ok::<_, Error>(changed)
        };
        match looked.await {
            Ok(Some(table)) => {
                tracing::info!(changefeed = %self.spec.changefeed, error = error.chain(),
                    "a table has changed while it was copied");
                Error::CopyOutdated { table }
            }
            Ok(None) => error,
            // Whoever cannot ask now can be told nothing about the tables, and tries again.
            Err(trouble) if trouble.is_retryable() => trouble,
            Err(_) => error,
        }
    }

    /// One of the tables of a copy that is not what it was when it was listed, or one that came or went before `position`.
    async fn changed(
        &self,
        conn: &mut Connection,
        copied: &[Followed],
        position: Ts,
    ) -> Result<Option<String>, Error> {
        if !self.captured {
            let current = catalog::load(conn, &admin::selection(&self.spec)).await?;
            let is_same = |old: &Followed| current.iter().any(|new| new.info == old.0.info);
            let other = copied.iter().find(|old| !is_same(old));
            return Ok(other.map(|(table, _)| format!("{}.{}", table.info.schema, table.info.name)));
        }
        let ids: Vec<i64> = copied.iter().map(|(table, _)| table.info.id.0).collect();
        let changed = history::changed_since(conn, &self.names, self.spec.start_ts, position, &ids).await?;
        if changed.is_some() {
            // What is seen of the changes now is no news any more, neither for the stream nor for the next attempt.
            install::begin_at(conn, &self.names, Ts::MAX).await?;
        }
        Ok(changed)
    }
}
