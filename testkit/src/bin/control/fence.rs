//! The check that a message comes from the owner: a published value beside a lock.

use std::hint::black_box;
use std::sync::{Barrier, PoisonError, RwLock};

use anyhow::Result;
use heartbeatpb::{MaintainerEpoch, NodeId, Owner};
use snapshot::{Publisher, Versioned};

use crate::Extent;
use crate::clock::{self, float, nanoseconds};
use crate::report::{Cost, Growth, Point, Report, Unit, number};

/// Reading threads.
const THREADS: [u64; 4] = [1, 2, 4, 8];
/// Most of one check: tens of nanoseconds.
const MOST_NANOSECONDS: f64 = 100.0;

/// Who owns a changefeed's dispatchers, as it is published.
struct Ownership {
    owner: Owner,
}

impl Versioned for Ownership {
    type Version = Option<MaintainerEpoch>;

    fn version(&self) -> Self::Version {
        self.owner.epoch
    }
}

/// Processor time of one check with so many threads at once, in nanoseconds; the cheapest round.
fn check<S: Send>(
    extent: &Extent,
    threads: u64,
    state: impl Fn() -> S,
    check: impl Fn(&mut S) -> bool + Sync,
) -> f64 {
    let mut least = f64::INFINITY;
    for _ in 0..extent.rounds {
        let start = Barrier::new(usize::try_from(threads).unwrap_or(1));
        let total: f64 = std::thread::scope(|scope| {
            let run = |mut state: S| {
                let (start, check) = (&start, &check);
                scope.spawn(move || {
                    start.wait();
                    let before = clock::used();
                    for _ in 0..extent.calls {
                        black_box(check(black_box(&mut state)));
                    }
                    nanoseconds(clock::used() - before)
                })
            };
            let running: Vec<_> = (0..threads).map(|_| run(state())).collect();
            running.into_iter().map(|thread| thread.join().unwrap_or(f64::INFINITY)).sum()
        });
        least = least.min(total / float(threads) / float(extent.calls));
    }
    least
}

/// Measures the fence.
pub(crate) fn measure(extent: &Extent, report: &mut Report) -> Result<()> {
    // As a message brings it: equal, and not the same allocation.
    let text = "7f1c9a52-0a53-4f2e-9b63-5d1f6a7e8c90";
    let (from, epoch) = (NodeId::from(text), MaintainerEpoch::from_wire(7));
    let owner = || Owner { node: text.into(), epoch };
    let publisher = Publisher::new(Ownership { owner: owner() });
    let locked = RwLock::new(owner());
    let mut points = Vec::new();
    for threads in THREADS {
        let ours = check(
            extent,
            threads,
            || publisher.view(),
            |view| view.load().owner.allows(black_box(&from), black_box(epoch)),
        );
        let naive = check(
            extent,
            threads,
            || (),
            |()| {
                locked
                    .read()
                    .unwrap_or_else(PoisonError::into_inner)
                    .allows(black_box(&from), black_box(epoch))
            },
        );
        points.push(Point { at: threads, ours, naive: Some(naive) });
    }
    let mut view = publisher.view();
    let mut allowed = 0;
    let counted = allocation_counter::measure(|| {
        for _ in 0..extent.calls {
            allowed += u64::from(view.load().owner.allows(&from, black_box(epoch)));
        }
    });
    anyhow::ensure!(allowed == extent.calls, "the owner was refused");
    let slowest = points.iter().map(|point| point.ours).fold(0.0, f64::max);
    report.time_limit("one fence check, with any number of threads", slowest, MOST_NANOSECONDS);
    report.limit("allocations in all fence checks of a run", float(counted.count_total), 0.0, number);
    report.cost(Cost {
        name: "fence check",
        unit: Unit::Nanoseconds,
        of: "threads",
        naive: "RwLock",
        points,
        growth: Growth::Flat(1.5),
    });
    Ok(())
}
