//! A directory that cannot be written: who tries again, and what people are told meanwhile.
//!
//! ```text
//!   an attempt fails, a person need not act ──► a wait is noted ──► tried again after 0.1 s … 2 s, until it succeeds
//!   ten seconds later                       ──► told as the sink's trouble, the oldest wait first
//!   it succeeds, or the sink stops          ──► the note is gone
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::Error;

/// A disk that refuses for so long is told. A short hiccup of a network file system is over by then.
const TOLD_AFTER: Duration = Duration::from_secs(10);

/// Somebody who waits for the disk.
#[derive(Debug)]
struct Wait {
    since: Instant,
    what: String,
}

#[derive(Debug, Default)]
struct Waits {
    next: u64,
    /// By number, hence by age.
    waits: BTreeMap<u64, Wait>,
}

/// What the threads of a sink wait for. One that succeeds says nothing about the others: a small file may fit where a
/// large one does not.
#[derive(Clone, Debug, Default)]
pub(crate) struct Troubles(Arc<Mutex<Waits>>);

/// One wait; over when it is dropped.
#[derive(Debug)]
pub(crate) struct Waiting {
    troubles: Troubles,
    number: Option<u64>,
}

impl Troubles {
    /// Somebody who may have to wait.
    pub(crate) fn waiting(&self) -> Waiting {
        Waiting { troubles: self.clone(), number: None }
    }

    /// What people are told.
    pub(crate) fn told(&self) -> Option<Error> {
        let waits = self.0.lock();
        let oldest = waits.waits.values().next().filter(|wait| wait.since.elapsed() >= TOLD_AFTER)?;
        let what = format!("{}; it is tried again until it succeeds", oldest.what);
        Some(Error::Unavailable { what, source: None })
    }
}

impl Waiting {
    /// An attempt failed. Says whether it is the first; what it said is what is told.
    pub(crate) fn failed(&mut self, error: &Error) -> bool {
        if self.number.is_some() {
            return false;
        }
        let mut waits = self.troubles.0.lock();
        let number = waits.next;
        waits.next += 1;
        waits.waits.insert(number, Wait { since: Instant::now(), what: error.to_string() });
        self.number = Some(number);
        true
    }

    /// An attempt succeeded.
    pub(crate) fn succeeded(&mut self) {
        if let Some(number) = self.number.take() {
            self.troubles.0.lock().waits.remove(&number);
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.succeeded();
    }
}

#[cfg(test)]
impl Troubles {
    /// Lets everybody have waited for so much longer.
    pub(crate) fn age(&self, time: Duration) {
        for wait in self.0.lock().waits.values_mut() {
            wait.since = wait.since.checked_sub(time).unwrap_or(wait.since);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(what: &str) -> Error {
        Error::Unavailable { what: what.into(), source: None }
    }

    #[test]
    fn what_lasts_is_told_until_all_who_wait_have_succeeded() {
        let troubles = Troubles::default();
        let told = || troubles.told().map(|error| error.to_string()).unwrap_or_default();
        let (mut first, mut second) = (troubles.waiting(), troubles.waiting());
        assert!(first.failed(&refused("the disk is full")));
        assert!(!first.failed(&refused("something else")), "told in one way");
        assert_eq!(told(), "", "it may be over soon");
        troubles.age(TOLD_AFTER);
        assert!(second.failed(&refused("no room for a directory")));
        assert_eq!(told(), "the disk is full; it is tried again until it succeeds");
        first.succeeded();
        assert_eq!(told(), "", "the other has not waited for long");
        troubles.age(TOLD_AFTER);
        assert!(told().starts_with("no room"));
        drop(second);
        assert_eq!(told(), "");
        assert!(first.failed(&refused("again")) && told().is_empty(), "a new one");
    }
}
