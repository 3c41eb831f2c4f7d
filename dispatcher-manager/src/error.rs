//! What goes wrong in a dispatcher manager, and how it is told to the owner.

use heartbeatpb::config::ConfigError;
use heartbeatpb::{NodeId, RunningError, WallTime, error_chain};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Why a dispatcher manager could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The manager stops: whoever sees this stops silently and reports no failure.
    #[error("the write path of the dispatcher manager is closed")]
    WritePathClosed,
    /// The configuration in a bootstrap request cannot be read.
    #[error("the configuration of the changefeed cannot be read")]
    Config(#[source] ConfigError),
    /// The downstream failed.
    #[error("the downstream failed")]
    Sink(#[source] sink::Error),
    /// The manager's task has ended without being asked to.
    #[error("the dispatcher manager has ended")]
    Ended,
    /// A bootstrap asks for another table trigger than the one that runs here.
    #[error("{0}")]
    Trigger(&'static str),
}

impl Error {
    /// Stable code for the API.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Error::WritePathClosed => "CDC:ErrDispatcherManagerWritePathClosed",
            Error::Config(error) => error.code(),
            Error::Sink(error) => error.code(),
            Error::Trigger(_) => TRIGGER_FAILED,
            Error::Ended => DISPATCHER_FAILED,
        }
    }

    /// Whether trying again can succeed without a person's help.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Error::WritePathClosed | Error::Ended | Error::Trigger(_) => true,
            Error::Config(_) => false,
            Error::Sink(error) => error.is_retryable(),
        }
    }

    /// What the owner is told.
    #[must_use]
    pub fn fault(&self) -> Fault {
        Fault { code: self.code().into(), message: error_chain(self), retryable: self.is_retryable() }
    }
}

/// Code of everything that is wrong with a table trigger.
pub(crate) const TRIGGER_FAILED: &str = "CDC:ErrChangefeedInitTableTriggerDispatcherFailed";
/// Code of a dispatcher that cannot go on for a reason that is our own.
pub(crate) const DISPATCHER_FAILED: &str = "CDC:ErrDispatcherFailed";

/// A failure as the owner is told of it. Holds no row values and no secrets.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    /// Stable code; the coordinator decides by it whether to try again.
    pub code: String,
    /// Text for people.
    pub message: String,
    /// Whether trying again can succeed without a person's help.
    pub retryable: bool,
}

impl Fault {
    /// A failure of our own logic or of a broken promise of a neighbour.
    pub(crate) fn dispatcher(message: impl Into<String>) -> Self {
        Self { code: DISPATCHER_FAILED.into(), message: message.into(), retryable: false }
    }

    /// A failure of the downstream, with its causes.
    pub(crate) fn sink(error: &sink::Error) -> Self {
        Self { code: error.code().into(), message: error_chain(error), retryable: error.is_retryable() }
    }

    /// The form that travels, stamped with the time and the node.
    pub(crate) fn running(&self, node: &NodeId, at: WallTime) -> RunningError {
        let at = OffsetDateTime::from_unix_timestamp_nanos(i128::from(at.0) * 1_000);
        RunningError {
            time: at.ok().and_then(|at| at.format(&Rfc3339).ok()).unwrap_or_default(),
            node: node.as_str().into(),
            code: self.code.clone(),
            message: self.message.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_shows_code_and_causes() {
        let error = Error::Sink(sink::Error::Unavailable {
            what: "cannot connect".into(),
            source: Some("refused".into()),
        });
        let fault = error.fault();
        assert_eq!(fault.code, "CDC:ErrSinkUnavailable");
        assert_eq!(fault.message, "the downstream failed: cannot connect: refused");
        assert!(fault.retryable);
    }
}
