//! One table again, while the changefeed goes on: what people ask for, and what a downstream keeps about it.
//!
//! The request is kept by the downstream that the rows go to, because there it can be answered in the transaction that
//! replaces them: a request that is done is done, and one whose transaction did not commit is still waiting, whoever dies.
//!
//! ```text
//!   asked ──► waiting ──► done       in the transaction of the rows
//!               │  ▲  └──► failed    a person must look; asked again it is waiting
//!        paused ▼  │ resumed
//!             paused
//!   cancelled from any of them: gone
//! ```

use heartbeatpb::{TableId, Ts, WallTime};

/// How far a request is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ResyncState {
    /// It is being carried out, or will be.
    Waiting,
    /// Nobody carries it out until it is resumed.
    Paused,
    /// The table was replaced.
    Done,
    /// It cannot be carried out without a person's help.
    Failed,
}

impl ResyncState {
    /// Its name in answers and in the downstream.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Paused => "paused",
            Self::Done => "done",
            Self::Failed => "failed",
        }
    }

    /// The state of that name.
    #[must_use]
    pub fn of_name(name: &str) -> Option<Self> {
        [Self::Waiting, Self::Paused, Self::Done, Self::Failed].into_iter().find(|state| state.name() == name)
    }
}

/// A request to copy a table again.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Resync {
    /// The table.
    pub table: TableId,
    /// Schema and name when it was asked for, for people.
    pub name: String,
    /// How far it is.
    pub state: ResyncState,
    /// The table has come to a changefeed that was running, with rows that nobody has copied, or lacks a value that the log
    /// does not have: until it is done no change of the table can be applied.
    pub entering: bool,
    /// When it was asked for.
    pub asked: WallTime,
    /// When it was done or failed.
    pub ended: Option<WallTime>,
    /// Rows that were written, when it is done.
    pub rows: u64,
    /// Code and text of what a person has to mend, when it failed. The text holds no row values and no credentials.
    pub error: Option<(String, String)>,
}

/// What is to become of a request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ResyncChange {
    /// The table, of this name, is to be copied again. Not while a request of it is waiting or paused.
    Ask {
        /// Schema and name, for people.
        name: String,
        /// As [`Resync::entering`]; it stays so until the request is done or withdrawn.
        entering: bool,
    },
    /// A waiting one is to rest.
    Pause,
    /// A paused one is to go on.
    Resume,
    /// It is withdrawn, or its result forgotten.
    Cancel,
    /// Of an entering table nothing up to here is applied, for good: only a snapshot at or behind it answers the request. Not
    /// of a table that is not entering any more.
    LeaveOut {
        /// Where.
        until: Ts,
    },
    /// A waiting one cannot be carried out.
    Fail {
        /// Stable code.
        code: String,
        /// What happened and what to do.
        message: String,
    },
}
