//! Why a comparison cannot go on.

use std::time::Duration;

use heartbeatpb::Ts;

/// A comparison that ended early. Names, keys and values of rows are in none of the texts.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A server did not answer a question as it should.
    #[error("the {end} database did not {doing}: {source}")]
    Database {
        /// `source` or `target`.
        end: &'static str,
        /// What was asked of it.
        doing: &'static str,
        /// What it answered.
        source: tokio_postgres::Error,
    },
    /// The changefeed did not get as far as the source was.
    #[error(
        "the changefeed's checkpoint stands at {checkpoint} and did not reach {wanted}, where the source was, within {} s; \
         its status says what it waits for", patience.as_secs()
    )]
    Behind {
        /// Where it is.
        checkpoint: Ts,
        /// Where it had to be.
        wanted: Ts,
        /// How long it was waited for.
        patience: Duration,
    },
    /// Nobody can say how far the changefeed is.
    #[error("the changefeed's checkpoint is not known: {0}")]
    NoCheckpoint(String),
}

impl Error {
    /// Whether a table or a column was not there: somebody has changed the schema meanwhile.
    pub(crate) fn is_other_schema(&self) -> bool {
        use tokio_postgres::error::SqlState;
        let Self::Database { source, .. } = self else { return false };
        source.code().is_some_and(|code| {
            [SqlState::UNDEFINED_COLUMN, SqlState::UNDEFINED_TABLE, SqlState::UNDEFINED_OBJECT].contains(code)
        })
    }
}
