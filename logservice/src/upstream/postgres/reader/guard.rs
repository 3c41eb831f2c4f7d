//! Beside the stream: looks now and then whether the publication is as it was made, because the log does not tell.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::Session;
use crate::upstream::postgres::admin;
use crate::upstream::postgres::names::Names;
use crate::upstream::postgres::options::ConnectOptions;
use crate::upstream::postgres::publication::{self, Fingerprint, Note};
use crate::{Error, TableFilter};

/// Between the first two looks at the publication; each pause is twice as long as the one before.
const FIRST: Duration = Duration::from_secs(2);
/// Longest pause: how long it may take until somebody hears that changes are missing. A look costs the server a
/// connection.
const LONGEST: Duration = Duration::from_secs(30);

/// The publication as it was seen last.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) fingerprint: Fingerprint,
    pub(super) note: Note,
}

/// See the module. Dropping it ends a look that is under way.
pub(super) struct Guard {
    looks: JoinSet<Result<Option<Seen>, Error>>,
    pause: Duration,
    next: Instant,
}

impl Guard {
    /// Begins after a connection has looked itself.
    pub(super) fn new() -> Self {
        Self { looks: JoinSet::new(), pause: FIRST, next: Instant::now() + FIRST }
    }

    /// Takes up the result of the last look and begins the next one when it is due. Does not wait.
    ///
    /// # Errors
    /// What is wrong with the publication.
    pub(super) fn turn(&mut self, session: &mut Session) -> Result<(), Error> {
        match self.looks.try_join_next() {
            Some(Ok(Ok(seen))) => {
                if seen.is_some() {
                    session.seen = seen;
                }
            }
            Some(Ok(Err(error))) if !error.is_retryable() => return Err(error),
            // The stream finds out by itself whether the server is there.
            Some(Ok(Err(error))) => {
                tracing::debug!(error = error.chain(), "cannot look at the publication");
            }
            Some(Err(_)) | None => {}
        }
        let now = Instant::now();
        let Some(seen) = session.seen.clone().filter(|_| now >= self.next && self.looks.is_empty()) else {
            return Ok(());
        };
        self.pause = (self.pause * 2).min(LONGEST);
        self.next = now + self.pause;
        let look = Look {
            options: session.options.clone(),
            names: session.names.clone(),
            filter: Arc::clone(&session.spec.filter),
            captured: session.captured,
            seen,
        };
        self.looks.spawn(look.run());
        Ok(())
    }
}

/// One look.
struct Look {
    options: ConnectOptions,
    names: Names,
    filter: Arc<TableFilter>,
    captured: bool,
    seen: Seen,
}

impl Look {
    /// What is there now, if that is news.
    async fn run(self) -> Result<Option<Seen>, Error> {
        let mut conn = admin::connect(&self.options).await?;
        let Self { names, filter, captured, seen, .. } = &self;
        let now = publication::fingerprint(&mut conn, names).await?;
        let now = now.filter(|now| now.is_same(&seen.fingerprint)).ok_or_else(|| publication::gone(names))?;
        if now == seen.fingerprint {
            conn.close().await;
            return Ok(None);
        }
        publication::verify(&mut conn, filter, names, &now, &seen.note, *captured).await?;
        conn.close().await;
        Ok(Some(Seen { fingerprint: now, note: seen.note.clone() }))
    }
}
