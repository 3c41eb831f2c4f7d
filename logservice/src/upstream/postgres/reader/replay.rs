//! The reader and transactions that come before they end: what is kept of them goes to the store when they are committed.
//!
//! Where that does not do (see [`Streaming`]), the server is asked to send the log in the other way for a while: then a
//! transaction comes as a whole when it is committed, and nothing has to be kept here. It does not do either where the server
//! itself fails: PostgreSQL 15, for one, cannot look up a table (`could not map filenode`) if a savepoint of a transaction that
//! has not ended was rolled back and had a schema change. In the other way the same log has no such places.

use std::time::{Duration, Instant};

use heartbeatpb::{Ts, WallTime};

use super::super::apply::{Heard, Step};
use super::super::pgoutput::{self, StreamCommit, StreamMessage};
use super::super::sql::lsn;
use super::unfinished::{Transaction, Unfinished};
use super::{STATUS_EVERY, Stream};
use crate::Error;
use crate::event_store::records;

/// How long transactions come as a whole after what is known or possible did not do.
const PAUSE: Duration = Duration::from_secs(600);

/// Whether the server sends large transactions before they end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Streaming {
    On,
    /// Not before everything up to here has come.
    After(Ts),
    /// Not before then.
    Later(Instant),
    Never,
}

impl Streaming {
    /// What the server is asked for.
    pub(super) fn options(self) -> &'static str {
        match self {
            Streaming::On => "proto_version '2', streaming 'on'",
            Streaming::After(_) | Streaming::Later(_) | Streaming::Never => "proto_version '1'",
        }
    }
}

/// Keeps the content of one CopyData message that comes while a block is open.
pub(super) fn keep(unfinished: &mut Unfinished, body: &[u8]) -> Result<Step, Error> {
    match pgoutput::decode_stream(body)? {
        StreamMessage::Data { content } => unfinished.hear(content).map(Step::Kept),
        StreamMessage::KeepAlive { end, clock, reply } => Ok(Step::KeepAlive { end, clock, reply }),
    }
}

impl Stream<'_> {
    /// The log is read again from the last transaction that was complete, and for a while what has not ended comes when it has.
    pub(super) fn only_at_commit(&mut self, why: &str) -> Option<()> {
        tracing::warn!(changefeed = %self.session.spec.changefeed, why, pause_s = PAUSE.as_secs(),
            "large transactions are not read before they end for a while");
        self.otherwise = Some(Streaming::Later(Instant::now() + PAUSE));
        None
    }

    /// A transaction that has ended is read again, as a whole.
    fn once_more(&mut self, commit: &StreamCommit, why: &str) -> Option<()> {
        tracing::info!(changefeed = %self.session.spec.changefeed, commit = lsn(commit.commit_lsn), why,
            "a transaction that came before its end is read again");
        self.otherwise = Some(Streaming::After(Ts(commit.end_lsn)));
        None
    }

    /// A transaction up to `end` has come; answers whether the log goes on in this way.
    pub(super) fn streams_again(&mut self, end: Ts) -> Option<()> {
        let again = match self.session.streaming {
            Streaming::On | Streaming::Never => false,
            Streaming::After(at) => end >= at,
            Streaming::Later(then) => Instant::now() >= then,
        };
        if again {
            self.otherwise = Some(Streaming::On);
            return None;
        }
        Some(())
    }

    /// The server cannot go on.
    pub(super) fn refused(&mut self, error: Error) -> Result<Option<()>, Error> {
        let error = self.session.log_error(error);
        // Nobody knows whether what it failed at is ever committed. If it is, it comes again.
        if self.session.streaming == Streaming::On && !error.is_retryable() {
            return Ok(self.only_at_commit(&error.chain()));
        }
        Err(error)
    }

    /// A message was kept.
    #[inline]
    pub(super) async fn on_kept(&mut self, heard: Heard) -> Result<Option<()>, Error> {
        match heard {
            Heard::More => Ok(Some(())),
            Heard::Full => self.write_out().await,
            Heard::TooMany => Ok(self.only_at_commit("they have too many subtransactions")),
        }
    }

    /// Moves what is kept in memory to disk.
    async fn write_out(&mut self) -> Result<Option<()>, Error> {
        // Room comes back when what is complete goes its way.
        self.publish();
        let Some(spool) = self.unfinished.largest() else { return Ok(Some(())) };
        let mut fits = true;
        let work = async {
            fits = spool.write_out().await?;
            Ok(())
        };
        if self.link.hold(work, &self.session.shutdown).await?.is_none() {
            return Ok(None);
        }
        if fits {
            return Ok(Some(()));
        }
        Ok(self.only_at_commit("they do not fit half of event-store.disk-bytes"))
    }

    /// A transaction is complete that came before its end: it goes to the store now.
    pub(super) async fn replay(&mut self, commit: StreamCommit) -> Result<Option<()>, Error> {
        let Some(mut transaction) = self.unfinished.take(commit.xid) else {
            return Err(Error::protocol(format_args!(
                "the end of transaction {}, which never came",
                commit.xid
            )));
        };
        if transaction.is_uncertain() {
            return Ok(self.once_more(&commit, "it changed schemas and was rolled back in part"));
        }
        // What is complete does not wait for it.
        self.publish();
        let begin = (commit.commit_lsn, commit.time, commit.xid);
        let step = self.tables.begin_at(begin, self.skip, &mut self.session.writer);
        self.perform(step).await?;
        match self.replay_all(&mut transaction).await {
            Ok(Some(())) => {}
            Ok(None) => return Ok(None),
            // What others that have not ended take may be what it lacks.
            Err(Error::TransactionTooLarge { .. }) if !self.unfinished.is_empty() => {
                return Ok(self.only_at_commit("they leave no room for one that has ended"));
            }
            Err(error) => return Err(error),
        }
        self.perform(Step::Commit { end: Ts(commit.end_lsn), time: WallTime(commit.time) }).await
    }

    async fn replay_all(&mut self, transaction: &mut Transaction) -> Result<Option<()>, Error> {
        loop {
            let mut rows = None;
            let read = async {
                rows = transaction.spool.next().await?;
                Ok(())
            };
            if self.link.alive_during(read, &self.session.shutdown).await?.is_none() {
                return Ok(None);
            }
            let Some(rows) = rows else { return Ok(Some(())) };
            for record in records(&rows) {
                let writer = &mut self.session.writer;
                let step = self.tables.apply(record, self.skip, self.open, writer)?;
                self.open_bytes += record.len();
                if self.perform(step).await?.is_none() {
                    return Ok(None);
                }
                if let Some(error) = self.link.broken.take() {
                    return Err(error);
                }
            }
            if self.link.last_status.elapsed() >= STATUS_EVERY {
                self.guard.turn(self.session)?;
                self.link.send_status(false).await?;
            }
            tokio::task::coop::consume_budget().await;
        }
    }
}
