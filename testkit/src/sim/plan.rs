//! What happens in a run, decided before it begins, so that parts of it can be left out again.

use std::fmt;

use super::feed::DdlChoice;
use super::members::UNREACHED_AFTER;
use super::wire::Faults;
use crate::Random;

/// Something that happens to the cluster. Machines are numbers; on each, one process runs after the other.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// Kill the process of a machine; the next one starts after this many milliseconds.
    Crash(u32, u64),
    /// Kill the process that leads.
    CrashLeader(u64),
    /// Kill the process that has a changefeed's maintainer.
    CrashMaintainer(u64),
    /// Kill the process that leads and the one that has a changefeed's maintainer.
    CrashBoth(u64),
    /// Stop the process of a machine (SIGSTOP) for a while.
    Pause(u32, u64),
    /// Stop the process that leads.
    PauseLeader(u64),
    /// Stop the process that has a changefeed's maintainer.
    PauseMaintainer(u64),
    /// What the leader sends takes so many milliseconds longer, for so many milliseconds, in order.
    SlowLeader(u64, u64),
    /// What a changefeed's maintainer sends takes so many milliseconds longer, for so many milliseconds, in order.
    SlowMaintainer(u64, u64),
    /// What the process that has a changefeed's maintainer sends to one machine takes so many milliseconds longer, for so
    /// many milliseconds, in order.
    SlowPath(u32, u64, u64),
    /// What the leader sends comes again, up to so many milliseconds later, for so many milliseconds.
    EchoLeader(u64, u64),
    /// What a changefeed's maintainer sends comes again, up to so many milliseconds later, for so many milliseconds.
    EchoMaintainer(u64, u64),
    /// Cut two machines off from each other; the metadata store stays reachable.
    Cut(u32, u32, u64),
    /// Cut the process that has a changefeed's maintainer off from one machine; the metadata store stays reachable.
    CutPath(u32, u64),
    /// Cut one machine off from all others.
    Isolate(u32, u64),
    /// Cut one machine off from the metadata store.
    CutStore(u32, u64),
    /// Nobody reaches the metadata store.
    StoreDown(u64),
    /// So many percent of the requests to the metadata store fail, or their answers are lost, for a while.
    FlakyStore(u64, u64),
    /// The target refuses one machine for a while.
    SinkFails(u32, u64),
    /// Whatever the target does for one machine takes so many milliseconds longer, for a while.
    SlowTarget(u32, u64, u64),
    /// The clock of a machine is set, by so many milliseconds.
    Clock(u32, i64),
    /// Event streams begin again at their checkpoints, this many percent of them in each step, for a while.
    Gaps(u64, u64),
    /// A machine that was not there starts.
    Join(u32),
    /// A person drains the process of a machine; it is replaced when it is empty.
    Drain(u32),
    /// A person drains the process that leads.
    DrainLeader,
    /// A person drains the process that has a changefeed's maintainer.
    DrainMaintainer,
    /// A person takes the drain back.
    CancelDrain,
    /// A person pauses the changefeeds, and resumes them after a while.
    PauseFeeds(u64),
    /// A person moves a table to a machine.
    MoveTable(u32),
    /// A person divides a table.
    SplitTable(u32),
    /// A person joins two parts of a table.
    MergeTable,
    /// A schema change.
    Ddl(DdlChoice),
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// A run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    /// Everything random comes from it.
    pub seed: u64,
    /// Machines at the start.
    pub machines: u32,
    /// Changefeeds.
    pub feeds: u32,
    /// Tables of each changefeed at the start.
    pub tables: i64,
    /// What is always wrong with the network.
    pub faults: Faults,
    /// Chance in percent that the answer to a write to the metadata store is lost.
    pub uncertain: u64,
    /// A member that is not heard for so many milliseconds is given up.
    pub unreached_after: u64,
    /// Milliseconds until faults end.
    pub chaos: u64,
    /// Rules of the control plane that are switched off.
    pub without: [Option<heartbeatpb::Rule>; 2],
    /// What happens, each with its time in milliseconds.
    pub events: Vec<(u64, Event)>,
}

impl Plan {
    /// The run of a seed.
    #[must_use]
    pub fn of(seed: u64) -> Self {
        let mut random = Random::new(seed, 0);
        let machines = u32::try_from(random.between(2, 4)).unwrap_or(3);
        let chaos = random.between(8_000, 20_000);
        let faults = match random.between(0, 5) {
            0 => Faults { delay: 5, ..Faults::default() },
            1 => Faults { loss: 2, delay: 20, ..Faults::default() },
            2 => Faults { loss: 15, duplication: 5, disorder: 0, delay: 30, late: 400 },
            3 => Faults { loss: 3, duplication: 10, disorder: 5, delay: 50, late: 2_000 },
            4 => Faults { loss: 0, duplication: 20, disorder: 20, delay: 100, late: 4_000 },
            _ => Faults { loss: 5, duplication: 5, disorder: 10, delay: 300, late: 6_000 },
        };
        let mut plan = Self {
            seed,
            machines,
            feeds: u32::try_from(random.between(1, 2)).unwrap_or(1),
            tables: i64::try_from(random.between(1, 5)).unwrap_or(3),
            faults,
            uncertain: [0, 0, 5, 20][usize::try_from(random.between(0, 3)).unwrap_or(0)],
            unreached_after: UNREACHED_AFTER,
            chaos,
            without: [None; 2],
            events: Vec::new(),
        };
        for _ in 0..random.between(0, 9) {
            let event = fault(&mut random, machines);
            plan.events.push((random.between(1_000, chaos), event));
        }
        for _ in 0..random.between(0, 6) {
            let choice = ddl(&mut random);
            plan.events.push((random.between(1_000, chaos + 2_000), Event::Ddl(choice)));
        }
        for _ in 0..[0, 3, 8][usize::try_from(random.between(0, 2)).unwrap_or(0)] {
            let event = match random.between(0, 2) {
                0 => Event::MoveTable(any(&mut random, machines)),
                1 => Event::SplitTable(u32::try_from(random.between(2, 4)).unwrap_or(2)),
                _ => Event::MergeTable,
            };
            plan.events.push((random.between(1_000, chaos), event));
        }
        match random.between(0, 6) {
            0 | 1 => maintainer_replaced(&mut random, &mut plan),
            2 => leader_replaced(&mut random, &mut plan),
            3 => maintainer_leaves(&mut random, &mut plan),
            4 => to_and_fro(&mut random, &mut plan),
            5 => given_up(&mut random, &mut plan),
            _ if random.between(0, 1) == 0 => come_again(&mut random, &mut plan),
            _ if random.between(0, 1) == 0 => cut_short(&mut random, &mut plan),
            _ => {}
        }
        plan.events.sort_by_key(|(at, _)| *at);
        plan
    }
}

/// One of the machines.
fn any(random: &mut Random, machines: u32) -> u32 {
    u32::try_from(random.between(0, u64::from(machines) - 1)).unwrap_or(0)
}

/// A maintainer is replaced while what it said last is still on its way.
fn maintainer_replaced(random: &mut Random, plan: &mut Plan) {
    let begin = random.between(2_000, plan.chaos.max(6_000) - 4_000);
    let slow = Event::SlowMaintainer(random.between(1_500, 8_000), 9_000);
    plan.events.push((begin, slow));
    for _ in 0..random.between(1, 4) {
        let event = match random.between(0, 4) {
            0 | 1 => Event::MoveTable(any(random, plan.machines)),
            2 => Event::SplitTable(u32::try_from(random.between(2, 4)).unwrap_or(2)),
            3 => Event::MergeTable,
            _ => Event::Ddl(ddl(random)),
        };
        plan.events.push((begin + random.between(0, 1_200), event));
    }
    // A move takes two messages, one after the other; a successor starts three seconds later at the earliest.
    let last = begin + random.between(300, 10_000);
    plan.chaos = plan.chaos.max(last + 6_000);
    let end = match random.between(0, 3) {
        0 | 1 => Event::CrashMaintainer(random.between(200, 2_500)),
        2 => Event::CrashBoth(random.between(200, 2_500)),
        _ => Event::PauseMaintainer(random.between(2_500, 6_000)),
    };
    plan.events.push((last, end));
    if random.between(0, 1) == 0 {
        let event = Event::PauseFeeds(random.between(200, 4_000));
        plan.events.push((last + random.between(500, 6_000), event));
    }
}

/// A leader is replaced while what it said last is still on its way.
fn leader_replaced(random: &mut Random, plan: &mut Plan) {
    let machines = plan.machines;
    let machine = |random: &mut Random| any(random, machines);
    let begin = random.between(2_000, plan.chaos.max(6_000) - 4_000);
    let slow = Event::SlowLeader(random.between(1_500, 9_000), random.between(500, 3_000));
    plan.events.push((begin, slow));
    for _ in 0..random.between(1, 3) {
        let event = match random.between(0, 3) {
            0 => Event::PauseFeeds(random.between(200, 2_000)),
            1 => Event::CrashMaintainer(random.between(200, 2_500)),
            2 => Event::Crash(machine(random), random.between(200, 2_500)),
            _ => Event::Drain(machine(random)),
        };
        plan.events.push((begin + random.between(0, 1_200), event));
    }
    let last = begin + random.between(300, 2_000);
    let end = match random.between(0, 3) {
        0 => Event::CrashLeader(random.between(200, 2_500)),
        1 => Event::CrashBoth(random.between(200, 2_500)),
        2 => Event::PauseLeader(random.between(2_500, 6_000)),
        _ => {
            // It cannot give its role up, or not at once.
            let outage = match random.between(0, 1) {
                0 => Event::StoreDown(random.between(500, 2_500)),
                _ => Event::FlakyStore(random.between(20, 70), random.between(3_000, 9_000)),
            };
            plan.events.push((last + random.between(0, 200), outage));
            Event::DrainLeader
        }
    };
    plan.events.push((last, end));
    let event = Event::Drain(machine(random));
    plan.events.push((last + random.between(500, 6_000), event));
}

/// A maintainer is told to leave in the middle of its work, with its dispatchers or without, while what it says takes its
/// time, and is followed by one on another node.
fn maintainer_leaves(random: &mut Random, plan: &mut Plan) {
    // Of two that come back at once, one takes the place of the other.
    plan.feeds = 2;
    let begin = random.between(2_000, plan.chaos.max(6_000) - 4_000);
    let (extra, far) = (random.between(1_000, 6_000), any(random, plan.machines));
    let slow = match random.between(0, 2) {
        0 => Event::SlowMaintainer(extra, 9_000),
        _ => Event::SlowPath(far, extra, 9_000),
    };
    plan.events.push((begin, slow));
    if random.between(0, 1) == 0 {
        for machine in 0..plan.machines {
            plan.events.push((begin, Event::SlowTarget(machine, random.between(200, 2_000), 9_000)));
        }
    }
    let leaves = begin + random.between(200, 3_000);
    for _ in 0..random.between(1, 4) {
        let event = match random.between(0, 4) {
            0 => Event::MoveTable(any(random, plan.machines)),
            1 => Event::MoveTable(far),
            2 => Event::SplitTable(u32::try_from(random.between(2, 4)).unwrap_or(2)),
            3 => Event::MergeTable,
            _ => Event::Ddl(ddl(random)),
        };
        plan.events.push((random.between(begin, leaves), event));
    }
    let pause = Event::PauseFeeds(random.between(200, 3_000));
    match random.between(0, 4) {
        0 => plan.events.push((leaves, pause)),
        1 => {
            plan.events.push((leaves, pause));
            plan.events.push((leaves + random.between(0, 1_000), Event::DrainMaintainer));
        }
        _ => {
            // The table trigger does not let go while it writes.
            let (written, moved) = (random.between(0, 500), random.between(0, 1_000));
            plan.events.push((leaves - written.min(leaves - begin), Event::Ddl(DdlChoice::Create)));
            plan.events.push((leaves - moved.min(leaves - begin), Event::MoveTable(far)));
            plan.events.push((leaves, Event::DrainMaintainer));
        }
    }
    plan.chaos = plan.chaos.max(leaves + 2 * extra + 4_000);
}

/// Tables are moved to and fro while the target takes its time: a command that comes again, or late, meets what another
/// one has begun.
fn to_and_fro(random: &mut Random, plan: &mut Plan) {
    plan.tables = plan.tables.min(2);
    let mut at = random.between(2_000, plan.chaos.max(6_000) - 4_000);
    for machine in 0..plan.machines {
        let slow = Event::SlowTarget(machine, random.between(200, 3_000), random.between(5_000, 12_000));
        plan.events.push((at, slow));
    }
    for _ in 0..random.between(4, 9) {
        let event = match random.between(0, 5) {
            0 => Event::SplitTable(2),
            1 => Event::MergeTable,
            _ => Event::MoveTable(any(random, plan.machines)),
        };
        plan.events.push((at, event));
        at += random.between(200, 2_500);
    }
    plan.chaos = plan.chaos.max(at + 4_000);
}

/// Changefeeds begin and end in quick succession while commands come again, up to seconds later.
fn come_again(random: &mut Random, plan: &mut Plan) {
    let begin = random.between(1_000, plan.chaos.max(6_000) - 4_000);
    plan.events.push((begin, Event::EchoLeader(random.between(2_000, 9_000), 15_000)));
    if random.between(0, 2) == 0 {
        plan.events.push((begin, Event::EchoMaintainer(random.between(500, 5_000), 15_000)));
    }
    let mut at = begin;
    for _ in 0..random.between(2, 4) {
        at += random.between(300, 3_000);
        let event = match random.between(0, 5) {
            0 => Event::DrainMaintainer,
            1 => Event::CrashMaintainer(random.between(200, 2_500)),
            _ => Event::PauseFeeds(random.between(300, 4_000)),
        };
        plan.events.push((at, event));
        at += random.between(500, 4_000);
    }
    plan.chaos = plan.chaos.max(at + 4_000);
}

/// Changefeeds are paused soon after they have begun, in a network that says most things a second time, up to seconds
/// later: what a maintainer said at its beginning comes again when everything of it is closed. Nothing else goes wrong, so
/// that nothing but an end is in the way of what comes again.
fn cut_short(random: &mut Random, plan: &mut Plan) {
    // What a maintainer says to its own node does not travel.
    plan.machines = plan.machines.max(3);
    let late = random.between(3_000, 8_000);
    plan.faults = Faults { loss: 0, duplication: 70, disorder: 0, delay: 20, late };
    plan.events.clear();
    let mut at = random.between(1_500, 4_000);
    for _ in 0..random.between(2, 4) {
        // Long enough for what comes again to come before a successor does.
        let pause = random.between(3_000, 7_000);
        plan.events.push((at, Event::PauseFeeds(pause)));
        at += pause + random.between(1_500, 3_000);
    }
    plan.chaos = at;
}

/// A maintainer does not reach one machine, which everybody else does, and gives it up; then it is followed by another one,
/// or reaches that machine again for long enough to use it.
fn given_up(random: &mut Random, plan: &mut Plan) {
    plan.machines = plan.machines.max(3);
    let far = any(random, plan.machines);
    let begin = random.between(2_000, 5_000);
    let cut = random.between(4_000, 9_000);
    plan.events.push((begin, Event::CutPath(far, cut)));
    for _ in 0..random.between(0, 3) {
        let event = match random.between(0, 2) {
            0 => Event::MoveTable(far),
            1 => Event::SplitTable(2),
            _ => Event::Ddl(ddl(random)),
        };
        plan.events.push((begin + random.between(0, cut), event));
    }
    let mut end = begin + cut;
    if random.between(0, 3) > 0 {
        end = begin + random.between(3_000, cut + 3_000);
        let successor = match random.between(0, 3) {
            0 => Event::DrainMaintainer,
            1 => Event::PauseMaintainer(random.between(2_500, 6_000)),
            _ => Event::CrashMaintainer(random.between(200, 2_500)),
        };
        plan.events.push((end, successor));
    } else {
        // Whoever was given up is believed after it was heard for long.
        plan.unreached_after = 1_000;
        end += 21_000 + random.between(0, 3_000);
        plan.events.push((end, Event::MoveTable(far)));
        plan.events.push((end + random.between(0, 1_000), Event::CutPath(far, random.between(500, 5_000))));
    }
    plan.chaos = plan.chaos.max(end + 6_000);
}

fn fault(random: &mut Random, machines: u32) -> Event {
    let machine = |random: &mut Random| any(random, machines);
    let one = machine(random);
    let other = (one + 1 + machine(random) % (machines - 1).max(1)) % machines;
    let short = random.between(200, 2_500);
    let long = random.between(500, 9_000);
    match random.between(0, 18) {
        0 | 1 => Event::Crash(one, short),
        2 => Event::CrashLeader(short),
        3 => Event::CrashMaintainer(short),
        4 | 5 => Event::Pause(one, long),
        6 => Event::Cut(one, other, long),
        7 => Event::Isolate(one, long),
        8 => Event::CutStore(one, long),
        9 => Event::StoreDown(short),
        10 => Event::SinkFails(one, short),
        11 => Event::Clock(one, i64::try_from(random.between(0, 40_000)).unwrap_or(0) - 20_000),
        12 => Event::Gaps(random.between(1, 10), long),
        13 => Event::Join(machines + machine(random)),
        14 | 15 => Event::Drain(one),
        16 => Event::CancelDrain,
        17 => Event::PauseFeeds(short),
        _ => match random.between(0, 1) {
            0 => Event::SlowTarget(one, short, long),
            _ => Event::FlakyStore(random.between(5, 70), long),
        },
    }
}

fn ddl(random: &mut Random) -> DdlChoice {
    match random.between(0, 8) {
        0 | 1 => DdlChoice::Create,
        2 => DdlChoice::Drop,
        3 => DdlChoice::Truncate,
        4 | 5 => DdlChoice::Alter,
        6 => DdlChoice::Rename,
        7 => DdlChoice::DropSchema,
        _ => DdlChoice::All,
    }
}
