//! What an error of an etcd server means for the request that met it: whether it may have been applied, and whether
//! another server or a later time would help.

use std::error::Error as _;

use tonic::Code;

use crate::backend::StoreError;

/// Why one attempt at one server failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The request was not applied. Another server may take it.
    NotTaken(String),
    /// Nobody knows whether the request was applied.
    Lost(String),
    /// The password or the token is not valid any more at this server: the client has to introduce itself again.
    /// Nothing was applied.
    Stranger(String),
    /// It fails everywhere and every time. Nothing was applied.
    Final(StoreError),
}

/// What people can do when nobody answers.
const NOT_REACHED: &str =
    "check that etcd runs there, that its client port is open to this machine, and the list of endpoints";
const NO_QUORUM: &str = "most members of etcd have to be running and to reach each other";
const NOT_TRUSTED: &str = "check that security.ca-path signed the server's certificate and that the certificate has the endpoint's name";
const UNKNOWN_USER: &str = "check the user and the password of the store";
const NOT_ALLOWED: &str = "give the user read and write permission on the store's prefix";
const FULL: &str = "compact and defragment etcd, and disarm its alarm";

/// Of a lease that an earlier attempt has made.
pub(super) const LEASE_EXISTS: &str = "the lease exists already";

impl Failure {
    /// Reads what a client returned.
    pub(super) fn of(endpoint: &str, status: &tonic::Status) -> Self {
        let message = status.message();
        if let Some(cause) = never_sent(status) {
            return Self::NotTaken(format!("{endpoint}: {cause}; {}", advice(&cause)));
        }
        let with = |advice: &str| format!("{endpoint}: {message}; {advice}");
        let told = |text: &str| message.contains(text);
        match status.code() {
            Code::FailedPrecondition if told("lease already exists") => {
                Self::Final(StoreError::Invalid(LEASE_EXISTS))
            }
            Code::NotFound if told("requested lease not found") => Self::Final(StoreError::LeaseGone),
            Code::OutOfRange if told("has been compacted") => Self::Final(StoreError::Compacted),
            Code::PermissionDenied => Self::Final(StoreError::Refused(with(NOT_ALLOWED))),
            Code::Unauthenticated => Self::Stranger(with(UNKNOWN_USER)),
            Code::InvalidArgument if told("revision of auth store is old") => {
                Self::Stranger(with(UNKNOWN_USER))
            }
            Code::InvalidArgument if told("authentication failed") || told("user name is empty") => {
                Self::Final(StoreError::Refused(with(UNKNOWN_USER)))
            }
            Code::InvalidArgument if told("request is too large") || told("too many operations") => {
                Self::Final(StoreError::Refused(with(
                    "raise etcd's --max-request-bytes and --max-txn-ops to their defaults at least",
                )))
            }
            Code::InvalidArgument | Code::FailedPrecondition | Code::Unimplemented => {
                Self::Final(StoreError::Refused(with("this is not expected of etcd 3.4 or later")))
            }
            Code::ResourceExhausted if told("database space exceeded") => Self::NotTaken(with(FULL)),
            // Both are said before the request enters etcd's log.
            Code::ResourceExhausted if told("too many requests") => {
                Self::NotTaken(with("etcd is overloaded"))
            }
            Code::Unavailable if told("etcdserver: no leader") => Self::NotTaken(with(NO_QUORUM)),
            Code::Unavailable | Code::DeadlineExceeded if told("request timed out") => {
                Self::Lost(with(NO_QUORUM))
            }
            Code::Ok
            | Code::Cancelled
            | Code::Unknown
            | Code::DeadlineExceeded
            | Code::NotFound
            | Code::AlreadyExists
            | Code::ResourceExhausted
            | Code::Aborted
            | Code::OutOfRange
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss => Self::Lost(format!("{endpoint}: {message}")),
        }
    }

    /// What to tell whoever wanted something that can be asked for again.
    pub(super) fn of_question(self) -> StoreError {
        match self {
            Self::NotTaken(what) | Self::Lost(what) => StoreError::Unavailable(what),
            Self::Stranger(what) => StoreError::Refused(what),
            Self::Final(error) => error,
        }
    }

    /// What to tell whoever wanted to change something.
    pub(super) fn of_change(self) -> StoreError {
        match self {
            Self::Lost(what) => StoreError::Uncertain(what),
            other @ (Self::NotTaken(_) | Self::Stranger(_) | Self::Final(_)) => other.of_question(),
        }
    }
}

/// The cause when the server was not even reached.
fn never_sent(status: &tonic::Status) -> Option<String> {
    let mut source = status.source();
    while let Some(error) = source {
        if error.downcast_ref::<tonic::ConnectError>().is_some() {
            return Some(heartbeatpb::error_chain(error));
        }
        source = error.source();
    }
    None
}

fn advice(causes: &str) -> &'static str {
    if causes.contains("certificate") || causes.contains("tls") || causes.contains("TLS") {
        NOT_TRUSTED
    } else {
        NOT_REACHED
    }
}

/// Nobody answered.
pub(super) fn silent(endpoint: &str, limit: std::time::Duration) -> Failure {
    Failure::Lost(format!("{endpoint}: no answer within {limit:.1?}; {NO_QUORUM}; {NOT_REACHED}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(status: tonic::Status) -> String {
        let failure = Failure::of("http://e:2379", &status);
        match &failure {
            Failure::NotTaken(what) | Failure::Lost(what) | Failure::Stranger(what) => {
                assert!(what.starts_with("http://e:2379: "), "{what}");
            }
            Failure::Final(_) => {}
        }
        let (name, question) = match &failure {
            Failure::NotTaken(_) => ("not taken", true),
            Failure::Lost(_) => ("lost", true),
            Failure::Stranger(_) => ("stranger", false),
            Failure::Final(_) => ("final", false),
        };
        assert_eq!(failure.of_question().is_retryable(), question);
        name.to_owned()
    }

    #[test]
    // behaviour: coordinator-ST-1
    fn what_is_certain_not_to_have_happened_is_told_apart_from_what_may_have() {
        let connect = std::io::Error::new(std::io::ErrorKind::ConnectionRefused, "refused");
        let connect = tonic::Status::from_error(Box::new(tonic::ConnectError(Box::new(connect))));
        assert_eq!(kind(connect), "not taken");
        for (code, message, expected) in [
            (Code::Unavailable, "etcdserver: no leader", "not taken"),
            (Code::ResourceExhausted, "etcdserver: too many requests", "not taken"),
            (Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded", "not taken"),
            (Code::Unavailable, "etcdserver: request timed out", "lost"),
            (
                Code::Unavailable,
                "etcdserver: request timed out, possibly due to previous leader failure",
                "lost",
            ),
            (Code::Unavailable, "etcdserver: leader changed", "lost"),
            (Code::Unavailable, "transport is closing", "lost"),
            (Code::Unavailable, "etcdserver: server stopped", "lost"),
            (Code::Cancelled, "Timeout expired", "lost"),
            (Code::Unknown, "h2 protocol error", "lost"),
            (Code::Internal, "anything", "lost"),
            (Code::Unauthenticated, "etcdserver: invalid auth token", "stranger"),
            (Code::InvalidArgument, "etcdserver: revision of auth store is old", "stranger"),
            (Code::InvalidArgument, "etcdserver: user name is empty", "final"),
            (Code::PermissionDenied, "etcdserver: permission denied", "final"),
            (Code::NotFound, "etcdserver: requested lease not found", "final"),
            (Code::OutOfRange, "etcdserver: mvcc: required revision has been compacted", "final"),
        ] {
            assert_eq!(kind(tonic::Status::new(code, message)), expected, "{code:?} {message}");
        }
    }

    #[test]
    fn a_change_whose_answer_is_lost_is_uncertain_and_a_question_only_failed() {
        let lost = || Failure::Lost("x".to_owned());
        assert!(lost().of_change().may_have_applied());
        assert!(!lost().of_question().may_have_applied());
        assert!(!Failure::NotTaken("x".to_owned()).of_change().may_have_applied());
    }
}
