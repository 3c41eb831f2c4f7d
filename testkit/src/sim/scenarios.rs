//! Situations in which control planes of this kind are known to have failed, each as a plan of its own. They are run with
//! many seeds: what varies is the network and the moments, what happens is the same.

use super::feed::DdlChoice;
use super::members::UNREACHED_AFTER;
use super::plan::{Event, Plan};
use super::wire::Faults;

/// A situation.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// What goes wrong.
    pub name: &'static str,
    /// Machines, changefeeds, tables of each.
    size: (u32, u32, i64),
    faults: Faults,
    /// Milliseconds after which a silent member is given up.
    unreached_after: u64,
    events: Vec<(u64, Event)>,
}

impl Scenario {
    /// Its plan with a seed.
    #[must_use]
    pub fn plan(&self, seed: u64) -> Plan {
        let (machines, feeds, tables) = self.size;
        let last = self.events.last().map_or(0, |(at, _)| *at);
        Plan {
            seed,
            machines,
            feeds,
            tables,
            faults: self.faults,
            uncertain: 0,
            unreached_after: self.unreached_after,
            chaos: last + 4_000,
            without: [None; 2],
            events: self.events.clone(),
        }
    }
}

const SLOW: Faults = Faults { loss: 2, duplication: 5, disorder: 10, delay: 200, late: 3_000 };
const LOSSY: Faults = Faults { loss: 25, duplication: 10, disorder: 5, delay: 50, late: 1_000 };

/// All of them.
#[must_use]
pub fn scenarios() -> Vec<Scenario> {
    use DdlChoice::{All, Alter, Create, Drop, DropSchema, Truncate};
    let ddl = Event::Ddl;
    vec![
        Scenario {
            name: "a maintainer that was told to leave still schedules",
            size: (3, 2, 4),
            faults: SLOW,
            unreached_after: UNREACHED_AFTER,
            events: vec![
                (2_000, Event::Drain(0)),
                (2_300, Event::MoveTable(1)),
                (2_500, ddl(Create)),
                (2_700, Event::SplitTable(3)),
                (6_000, Event::Drain(1)),
            ],
        },
        Scenario {
            name: "dispatchers are made twice after a maintainer's node is lost",
            size: (3, 1, 4),
            faults: SLOW,
            unreached_after: UNREACHED_AFTER,
            events: vec![
                (2_000, ddl(Create)),
                (2_200, Event::CrashMaintainer(600)),
                (5_800, ddl(Create)),
                (6_100, Event::CrashMaintainer(600)),
            ],
        },
        Scenario {
            name: "operators in flight are lost with their maintainer",
            size: (3, 1, 3),
            faults: LOSSY,
            unreached_after: UNREACHED_AFTER,
            events: vec![
                (2_000, Event::MoveTable(1)),
                (2_100, Event::SplitTable(3)),
                (2_300, Event::CrashMaintainer(500)),
                (6_500, Event::MergeTable),
                (6_700, Event::CrashMaintainer(500)),
            ],
        },
        Scenario {
            name: "a checkpoint from before the hand-off is taken for new",
            size: (3, 2, 3),
            faults: SLOW,
            unreached_after: UNREACHED_AFTER,
            events: vec![
                (2_000, Event::Drain(0)),
                (3_000, Event::PauseFeeds(700)),
                (5_000, Event::Pause(1, 2_500)),
                (8_000, Event::CancelDrain),
            ],
        },
        Scenario {
            name: "a maintainer of an old epoch never finishes its bootstrap",
            size: (3, 2, 3),
            faults: LOSSY,
            unreached_after: UNREACHED_AFTER,
            events: vec![
                (1_500, Event::Isolate(1, 4_000)),
                (2_000, Event::PauseFeeds(400)),
                (3_000, Event::CrashMaintainer(300)),
                (6_500, Event::Join(4)),
            ],
        },
        Scenario {
            name: "a drain is said to be over too early",
            size: (3, 2, 4),
            faults: SLOW,
            unreached_after: UNREACHED_AFTER,
            events: vec![
                (2_000, Event::SplitTable(3)),
                (2_400, Event::MoveTable(1)),
                (2_500, Event::Drain(1)),
                (2_700, Event::MoveTable(1)),
                (2_900, ddl(Truncate)),
                (5_000, Event::Drain(2)),
            ],
        },
        Scenario {
            name: "nodes do not reach each other while all of them reach the store",
            size: (4, 2, 4),
            faults: Faults { loss: 0, duplication: 0, disorder: 0, delay: 20, late: 0 },
            unreached_after: UNREACHED_AFTER,
            events: vec![
                (1_500, Event::Cut(0, 1, 7_000)),
                (2_000, Event::Cut(2, 3, 6_000)),
                (2_500, ddl(All)),
                (4_000, Event::Isolate(2, 5_000)),
                (4_500, ddl(Alter)),
            ],
        },
        Scenario {
            name: "a barrier is short of one report",
            size: (3, 1, 5),
            faults: LOSSY,
            unreached_after: UNREACHED_AFTER,
            events: vec![
                (1_500, ddl(All)),
                (1_600, Event::CutStore(2, 4_000)),
                (2_500, ddl(DropSchema)),
                (3_500, Event::Crash(2, 900)),
                (4_000, ddl(All)),
            ],
        },
        Scenario {
            name: "a schema change overtakes rows of a divided table",
            size: (3, 1, 2),
            faults: SLOW,
            unreached_after: UNREACHED_AFTER,
            events: vec![
                (1_500, Event::SplitTable(4)),
                (2_500, ddl(Alter)),
                (3_000, Event::MoveTable(2)),
                (3_100, ddl(Alter)),
                (3_600, Event::MergeTable),
                (3_700, ddl(Drop)),
                (4_200, ddl(Truncate)),
            ],
        },
        Scenario {
            name: "one dead dispatcher holds a changefeed for ever",
            size: (3, 1, 4),
            faults: LOSSY,
            unreached_after: UNREACHED_AFTER,
            events: vec![
                (2_000, Event::SinkFails(1, 1_500)),
                (2_500, Event::Gaps(10, 3_000)),
                (4_000, Event::Crash(1, 400)),
                (5_000, Event::SinkFails(2, 1_000)),
            ],
        },
        Scenario {
            name: "a node that was given up has work again",
            size: (3, 1, 4),
            faults: Faults { loss: 0, duplication: 0, disorder: 0, delay: 20, late: 0 },
            unreached_after: 1_000,
            events: vec![
                (1_500, Event::CutPath(2, 5_000)),
                (1_500, Event::CutPath(0, 5_000)),
                (2_500, ddl(Create)),
                (4_500, Event::MoveTable(2)),
                // It is believed after 20 seconds.
                (28_000, Event::MoveTable(2)),
                (28_000, Event::MoveTable(0)),
                (29_000, ddl(Alter)),
                (30_000, Event::CutPath(2, 4_000)),
            ],
        },
        Scenario {
            name: "who was given up by one maintainer works for the next one",
            size: (4, 2, 4),
            faults: SLOW,
            unreached_after: UNREACHED_AFTER,
            events: vec![
                (1_500, Event::CutPath(1, 6_000)),
                (1_500, Event::CutPath(3, 6_000)),
                (5_000, Event::SplitTable(2)),
                (6_000, Event::CrashMaintainer(500)),
                (6_500, ddl(Alter)),
                (12_000, Event::DrainMaintainer),
            ],
        },
        Scenario {
            name: "a process that was stopped wakes and goes on",
            size: (3, 2, 3),
            faults: SLOW,
            unreached_after: UNREACHED_AFTER,
            events: vec![
                (1_800, Event::SplitTable(2)),
                (2_000, Event::Pause(0, 6_000)),
                (2_200, ddl(Create)),
                (4_000, Event::PauseFeeds(300)),
                (6_500, Event::Pause(1, 4_500)),
            ],
        },
    ]
}
