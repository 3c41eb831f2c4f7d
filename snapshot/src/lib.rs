//! Publication of a value from one writer to many readers, without a lock.
//!
//! Drain targets, maintainer epochs, liveness and checkpoints travel this way: the writer replaces the whole
//! value, a reader looks at one consistent copy of it. Uses no other crate of ours; every tier uses it.
//!
//! - **SN-1** A published value never goes back: [`Publisher::publish`] refuses a version that is not newer.
//! - **SN-2** Looking never waits for the writer and allocates nothing.
//! - **SN-3** A view may be a moment behind; safety comes from the fence at the receiver, never from freshness.

use std::fmt;
use std::sync::Arc;

use arc_swap::{ArcSwap, Cache};

/// A value that knows how new it is.
pub trait Versioned {
    /// What decides which of two values is newer.
    type Version: Ord;

    /// The version of this value.
    fn version(&self) -> Self::Version;
}

/// The only writer of a value. Deliberately not `Clone`.
pub struct Publisher<T> {
    cell: Arc<ArcSwap<T>>,
}

/// A reader's private handle: one atomic check per look while nothing changes.
pub struct View<T> {
    cache: Cache<Arc<ArcSwap<T>>, Arc<T>>,
}

impl<T> Publisher<T> {
    /// A writer whose readers see `first` until something is published.
    pub fn new(first: T) -> Self {
        Self { cell: Arc::new(ArcSwap::from_pointee(first)) }
    }

    /// A new reader.
    #[must_use]
    pub fn view(&self) -> View<T> {
        View { cache: Cache::new(Arc::clone(&self.cell)) }
    }

    /// What readers see now.
    #[must_use]
    pub fn current(&self) -> Arc<T> {
        self.cell.load_full()
    }
}

impl<T: Versioned> Publisher<T> {
    /// Replaces the value unless that would go back in time; says whether it did.
    pub fn publish(&mut self, next: T) -> bool {
        let newer = self.cell.load().version() < next.version();
        if newer {
            self.cell.store(Arc::new(next));
        }
        newer
    }
}

impl<T> View<T> {
    /// The newest value. Load once per decision: loading twice can see two worlds.
    pub fn load(&mut self) -> &T {
        self.cache.load()
    }

    /// The newest value, shared.
    pub fn load_full(&mut self) -> Arc<T> {
        Arc::clone(self.cache.load())
    }
}

impl<T> Clone for View<T> {
    fn clone(&self) -> Self {
        Self { cache: self.cache.clone() }
    }
}

impl<T: fmt::Debug> fmt::Debug for Publisher<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Publisher").field(&self.cell.load()).finish()
    }
}

impl<T> fmt::Debug for View<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("View")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq)]
    struct Target {
        epoch: u64,
        node: Option<&'static str>,
    }

    impl Versioned for Target {
        type Version = u64;
        fn version(&self) -> u64 {
            self.epoch
        }
    }

    #[test]
    fn a_view_sees_what_was_published_last() {
        let mut publisher = Publisher::new(Target { epoch: 0, node: None });
        let mut view = publisher.view();
        assert!(publisher.publish(Target { epoch: 2, node: Some("a") }));
        assert_eq!(view.load().node, Some("a"));
    }

    #[test]
    fn an_older_or_equal_version_changes_nothing() {
        let mut publisher = Publisher::new(Target { epoch: 3, node: Some("a") });
        let mut view = publisher.view();
        assert!(!publisher.publish(Target { epoch: 3, node: Some("b") }));
        assert!(!publisher.publish(Target { epoch: 2, node: Some("b") }));
        assert_eq!(view.load().node, Some("a"));
    }

    #[test]
    fn readers_in_other_threads_never_see_a_mix_of_two_values() {
        struct Pair(u64, u64);
        impl Versioned for Pair {
            type Version = u64;
            fn version(&self) -> u64 {
                self.0
            }
        }
        let mut publisher = Publisher::new(Pair(0, 0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                let mut view = publisher.view();
                scope.spawn(move || {
                    let mut last = 0;
                    while last < 10_000 {
                        let pair = view.load();
                        assert_eq!(pair.1, pair.0 * 2);
                        assert!(pair.0 >= last);
                        last = pair.0;
                    }
                });
            }
            scope.spawn(move || {
                for n in 1..=10_000 {
                    publisher.publish(Pair(n, n * 2));
                }
            });
        });
    }
}
