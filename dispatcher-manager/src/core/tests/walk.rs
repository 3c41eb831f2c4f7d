//! Random histories of a manager's core between a log, a sink and an owner that lose, repeat and delay what they say.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use event::BlockEvent;
use heartbeatpb::{BlockStatusRequest, MergeDispatcherRequest, TableId, TableSpan, TableSpanStatus};
use proptest::prelude::*;

use super::*;

mod owner;

use owner::{Down, Model};

/// Everything begins behind it.
const START: u64 = 10;

/// The key of the row of a commit ts.
fn key_at(ts: u64) -> u8 {
    b'a' + u8::try_from(ts * 7 % 26).expect("a letter")
}

fn holds(span: &TableSpan, ts: u64) -> bool {
    span.contains_key(&[key_at(ts)])
}

fn overlap(one: &TableSpan, other: &TableSpan) -> bool {
    let before = |end: &[u8], start: &[u8]| !end.is_empty() && end <= start;
    !before(&one.end, &other.start) && !before(&other.end, &one.start)
}

/// What the log has at a commit ts; rows come first.
#[derive(Clone, Copy, Default)]
struct Entry {
    row: bool,
    ddl: bool,
}

/// A stream of the log: everything up to `at` was sent, where `2 * ts` is behind the row and `2 * ts + 1` behind the
/// DDL of a commit ts.
struct Stream {
    span: TableSpan,
    at: u64,
    begun: bool,
    stands_at: Option<u64>,
}

/// Rows that the sink has and that are not durable.
struct Flight {
    slot: Slot,
    id: DispatcherId,
    ticket: Ticket,
    rows: Vec<u64>,
}

/// A call that the sink has not answered.
enum Call {
    Open { id: DispatcherId, start: Ts },
    Table { slot: Slot },
    Flush { slot: Slot, id: DispatcherId },
    Block { slot: Slot, ts: u64 },
}

enum Up {
    Beat(HeartBeatRequest),
    Block(BlockStatusRequest),
}

struct World {
    core: Core,
    now: Instant,
    log: BTreeMap<u64, Entry>,
    frontier: u64,
    streams: BTreeMap<DispatcherId, Stream>,
    queue: VecDeque<(DispatcherId, Arrival)>,
    flights: Vec<Flight>,
    calls: Vec<Call>,
    durable: BTreeSet<u64>,
    executed: BTreeSet<u64>,
    /// Nobody is removed, and the owner stays: then a DDL is executed once.
    calm: bool,
    owner: Model,
    /// Messages on their way to the core, by the node that sent them.
    down: BTreeMap<NodeId, VecDeque<Down>>,
    up: VecDeque<Up>,
    trace: Vec<String>,
}

impl World {
    fn new(calm: bool) -> Self {
        let feed = ChangefeedId::fresh("test");
        let options = CoreOptions::of(&ReplicaConfig::default(), false);
        let core = Core::new(feed.clone(), Owner { node: a(), epoch: epoch(1) }, Ts(START), options);
        Self {
            core,
            now: Instant::now(),
            log: BTreeMap::new(),
            frontier: START,
            streams: BTreeMap::new(),
            queue: VecDeque::new(),
            flights: Vec::new(),
            calls: Vec::new(),
            durable: BTreeSet::new(),
            executed: BTreeSet::new(),
            calm,
            owner: Model::new(feed),
            down: BTreeMap::new(),
            up: VecDeque::new(),
            trace: Vec::new(),
        }
    }

    fn step(&mut self, op: u8, pick: u16) -> Result<(), TestCaseError> {
        let pick = usize::from(pick);
        match op {
            0..=3 => {
                self.frontier += 1 + pick as u64 % 2;
                self.log.entry(self.frontier).or_default().row = true;
            }
            4 => {
                self.frontier += 1;
                self.log.insert(self.frontier, Entry { row: pick.is_multiple_of(2), ddl: true });
            }
            5..=13 => self.pump(pick),
            14..=25 => self.deliver(),
            26..=29 if !self.flights.is_empty() => {
                let flight = self.flights.swap_remove(pick % self.flights.len());
                self.durable.extend(flight.rows);
                self.core.on_flushed(flight.slot, flight.ticket);
            }
            30..=34 if !self.calls.is_empty() => self.answer(pick),
            35..=38 => {
                self.now += Duration::from_millis([1, 11, 200, 11_000][pick % 4]);
                self.core.on_tick(self.now);
            }
            39..=45 => self.hear_down(pick, pick.is_multiple_of(11), pick.is_multiple_of(13)),
            46..=51 => self.hear_up(pick.is_multiple_of(11), pick.is_multiple_of(13))?,
            52 => self.restart_stream(pick),
            53 if pick.is_multiple_of(4) && !self.calm => self.new_owner(pick.is_multiple_of(8)),
            _ => self.owner.act(pick, self.calm, &mut self.down),
        }
        self.perform()?;
        self.check()
    }

    /// The log sends something to one dispatcher.
    fn pump(&mut self, pick: usize) {
        let n = pick % self.streams.len().max(1);
        let Some((id, stream)) = self.streams.iter_mut().nth(n) else { return };
        let id = *id;
        if !stream.begun {
            stream.begun = true;
            self.queue.push_back((id, Arrival::Begin(Some(table(1, 1)))));
            return;
        }
        if let Some(at) = stream.stands_at {
            let slot = self.core.dispatchers.slot(id).and_then(|slot| self.core.dispatchers.get(slot));
            if slot.is_some_and(|dispatcher| dispatcher.checkpoint() >= Ts(at)) {
                stream.stands_at = None;
            } else {
                self.queue.push_back((id, resolved(at)));
            }
            return;
        }
        let mut batch = Vec::new();
        for (ts, entry) in self.log.range(stream.at / 2..) {
            if entry.row && 2 * ts > stream.at && holds(&stream.span, *ts) {
                batch.push(*ts);
                stream.at = 2 * ts;
            }
            if entry.ddl && 2 * ts + 1 > stream.at {
                if batch.is_empty() {
                    stream.at = 2 * ts + 1;
                    stream.stands_at = Some(*ts);
                    self.queue.push_back((id, block(ddl(*ts))));
                    return;
                }
                break;
            }
            if batch.len() == 3 {
                break;
            }
        }
        if batch.is_empty() {
            stream.at = 2 * self.frontier + 1;
            self.queue.push_back((id, resolved(self.frontier)));
        } else {
            self.queue.push_back((id, rows(&batch)));
        }
    }

    fn deliver(&mut self) {
        if let Some((id, arrival)) = self.queue.pop_front() {
            self.core.on_arrival(id, arrival, self.now);
        }
    }

    /// The collector found a gap: the stream begins again at the checkpoint.
    fn restart_stream(&mut self, pick: usize) {
        let n = pick % self.streams.len().max(1);
        let Some((id, stream)) = self.streams.iter_mut().nth(n) else { return };
        let slot = self.core.dispatchers.slot(*id).and_then(|slot| self.core.dispatchers.get(slot));
        let Some(dispatcher) = slot else { return };
        let (at, span) = (2 * dispatcher.checkpoint().0 + 1, stream.span.clone());
        *stream = Stream { span, at, begun: false, stands_at: None };
    }

    /// The sink answers a call, now and then with a failure to open.
    fn answer(&mut self, pick: usize) {
        let n = pick % self.calls.len();
        if let Call::Flush { id, .. } = &self.calls[n]
            && self.flights.iter().any(|flight| flight.id == *id)
        {
            return;
        }
        match self.calls.swap_remove(n) {
            Call::Open { id, start } => {
                // Where nothing else says that a DDL was done, a database does.
                let last = self.executed.last().filter(|_| !self.calm);
                let start_ts = last.map_or(start, |last| start.max(Ts(*last)));
                let found = Ok(TableStart { start_ts, skip_dml_at_start: false });
                let found = if pick.is_multiple_of(7) { Err(fault()) } else { found };
                self.core.on_dispatcher_opened(id, start, found, self.now);
            }
            Call::Table { slot } => self.core.on_table_opened(slot, Ok(()), self.now),
            Call::Flush { slot, .. } => self.core.on_flush_finished(slot, Ok(()), self.now),
            Call::Block { slot, ts } => {
                self.executed.insert(ts);
                self.core.on_block_written(slot, Ok(()), self.now);
            }
        }
    }

    fn hear_down(&mut self, pick: usize, lose: bool, repeat: bool) {
        let n = pick % self.down.len().max(1);
        let Some((from, queue)) = self.down.iter_mut().nth(n) else { return };
        let from = from.clone();
        let Some(message) = queue.pop_front() else { return };
        if lose {
            return;
        }
        if repeat {
            queue.push_front(message.clone());
        }
        match message {
            Down::Schedule(request) => self.core.on_schedule(&from, request, self.now),
            Down::Merge(request) => self.core.on_merge(&from, request, self.now),
            Down::Reply(reply) => self.core.on_heartbeat_response(&from, &reply, self.now),
        }
    }

    fn hear_up(&mut self, lose: bool, repeat: bool) -> Result<(), TestCaseError> {
        let Some(message) = self.up.pop_front() else { return Ok(()) };
        if lose {
            return Ok(());
        }
        for _ in 0..=usize::from(repeat) {
            match &message {
                Up::Beat(beat) => self.owner.on_beat(beat, &mut self.down),
                Up::Block(request) => self.owner.on_block(request, &mut self.down),
            }
        }
        // DM-1, DM-6 as the owner sees them.
        let missing: Vec<u64> = self.lost_below(self.owner.checkpoint, |_| true);
        prop_assert!(missing.is_empty(), "the owner passed {missing:?} at {}", self.owner.checkpoint);
        Ok(())
    }

    /// Rows and DDLs at or before `checkpoint` that are not downstream.
    fn lost_below(&self, checkpoint: u64, concerns: impl Fn(u64) -> bool) -> Vec<u64> {
        let known = self.log.range(..=checkpoint);
        known
            .filter(|(ts, entry)| {
                (entry.row && concerns(**ts) && !self.durable.contains(ts))
                    || (entry.ddl && !self.executed.contains(ts))
            })
            .map(|(ts, _)| *ts)
            .collect()
    }

    fn new_owner(&mut self, moves: bool) {
        self.owner.succeed(moves);
        let request = MaintainerBootstrapRequest {
            changefeed: self.owner.feed.clone(),
            config: heartbeatpb::ConfigBytes([].into()),
            start_ts: Ts(START),
            trigger: None,
            is_new: false,
            redo_trigger: None,
            keyspace_id: 0,
            epoch: epoch(self.owner.epoch),
        };
        let step = self.core.on_bootstrap(&self.owner.node.clone(), &request, false);
        let BootstrapStep::Reply(response) = step else { panic!("a newer owner is served") };
        // Everything sent before the answer was heard before it.
        self.up.clear();
        self.owner.on_bootstrapped(&response);
    }

    fn perform(&mut self) -> Result<(), TestCaseError> {
        let mut actions = Vec::new();
        loop {
            self.core.take_actions(&mut actions);
            if actions.is_empty() {
                return Ok(());
            }
            for action in actions.drain(..) {
                self.trace.push(show(&action));
                match action {
                    Action::OpenDispatcher { id, start_ts, .. } => {
                        self.calls.push(Call::Open { id, start: start_ts });
                    }
                    Action::OpenTable { slot, .. } => self.calls.push(Call::Table { slot }),
                    Action::Flush { slot, id } => self.calls.push(Call::Flush { slot, id }),
                    Action::Write { slot, id, batch, ticket, .. } => {
                        let rows: Vec<u64> = batch.txns().iter().map(|txn| txn.commit_ts.0).collect();
                        self.check_write(id, &rows)?;
                        self.flights.push(Flight { slot, id, ticket, rows });
                    }
                    Action::WriteBlock { slot, event } => {
                        let ts = match event {
                            BlockEvent::Ddl(ddl) => ddl.commit_ts.0,
                            BlockEvent::SyncPoint(_) => continue,
                        };
                        let open: Vec<u64> = self.rows_below(ts);
                        prop_assert!(open.is_empty(), "DM-4: {ts} is executed before {open:?}");
                        let again = self.executed.contains(&ts);
                        prop_assert!(!again || !self.calm, "DM-4: {ts} is executed twice");
                        let behind = |row: &&u64| **row > ts;
                        let written = self.flights.iter().flat_map(|flight| &flight.rows);
                        let passed: Vec<&u64> = written.chain(&self.durable).filter(behind).collect();
                        prop_assert!(passed.is_empty(), "DM-4: {ts} is executed behind {passed:?}");
                        self.calls.push(Call::Block { slot, ts });
                    }
                    Action::Subscribe { id, span, start_ts, .. } => {
                        let stream = Stream { span, at: 2 * start_ts.0 + 1, begun: false, stands_at: None };
                        self.streams.insert(id, stream);
                    }
                    Action::Unsubscribe { id, .. } => {
                        self.streams.remove(&id);
                    }
                    Action::HeartBeat(beat) => self.up.push_back(Up::Beat(beat)),
                    Action::BlockStatus(request) => {
                        self.core.on_block_statuses_sent(&request);
                        self.up.push_back(Up::Block(request));
                    }
                    Action::CloseDispatcher { .. }
                    | Action::Copied { .. }
                    | Action::PublishCheckpoint { .. }
                    | Action::ReportError(_)
                    | Action::Bootstrapped(_)
                    | Action::Stop
                    | Action::Forget => {}
                }
            }
        }
    }

    fn rows_below(&self, ts: u64) -> Vec<u64> {
        let rows = self.log.range(..=ts).filter(|(_, entry)| entry.row).map(|(ts, _)| *ts);
        rows.filter(|ts| !self.durable.contains(ts)).collect()
    }

    /// One writer per key, and nothing in front of a DDL that was not executed.
    fn check_write(&self, id: DispatcherId, rows: &[u64]) -> Result<(), TestCaseError> {
        let slot = self.core.dispatchers.slot(id).expect("whoever writes is there");
        let span = &self.core.dispatchers.get(slot).expect("present").span;
        for row in rows {
            prop_assert!(holds(span, *row), "{id} writes {row} of somebody else");
            let other = self.flights.iter().find(|flight| {
                flight.id != id && flight.rows.iter().any(|other| key_at(*other) == key_at(*row))
            });
            prop_assert!(
                other.is_none(),
                "DM-8: {row} is with the sink for {id} and {:?}",
                other.map(|f| f.id)
            );
            let ddl = self.log.range(..*row).filter(|(_, entry)| entry.ddl).map(|(ts, _)| *ts).next_back();
            prop_assert!(ddl.is_none_or(|ts| self.executed.contains(&ts)), "DM-4: {row} passes {ddl:?}");
        }
        Ok(())
    }

    fn check(&self) -> Result<(), TestCaseError> {
        let all: Vec<_> = self.core.dispatchers.iter().filter(|dispatcher| dispatcher.counts()).collect();
        for (n, one) in all.iter().enumerate() {
            let lost = self.lost_below(one.checkpoint().0, |ts| holds(&one.span, ts));
            prop_assert!(lost.is_empty(), "DM-1: {} passed {lost:?} at {}", one.id, one.checkpoint());
            let active = |d: &crate::dispatcher::Dispatcher| !d.try_removing && !d.is_stopped();
            for other in &all[n + 1..] {
                let both = active(one) && active(other) && overlap(&one.span, &other.span);
                prop_assert!(!both, "DM-8: {} and {} have common keys", one.id, other.id);
            }
        }
        Ok(())
    }

    /// Nothing is lost any more, and everybody says again what was not answered.
    fn settle(&mut self) -> Result<(), TestCaseError> {
        self.frontier += 1;
        for round in 0..400 {
            self.owner.repeat(&mut self.down);
            while self.down.values().any(|queue| !queue.is_empty()) {
                for n in 0..self.down.len() {
                    self.hear_down(n, false, false);
                    self.perform()?;
                }
            }
            for n in 0..self.streams.len() * 4 {
                self.pump(n);
            }
            while !self.queue.is_empty() {
                self.deliver();
                self.perform()?;
            }
            while let Some(flight) = self.flights.pop() {
                self.durable.extend(flight.rows);
                self.core.on_flushed(flight.slot, flight.ticket);
                self.perform()?;
            }
            for n in 0..self.calls.len() {
                // Never the number that fails.
                self.answer(n * 7 + 1);
                self.perform()?;
            }
            self.now += Duration::from_millis(if round % 10 == 9 { 11_000 } else { 250 });
            self.core.on_tick(self.now);
            self.perform()?;
            while !self.up.is_empty() {
                self.hear_up(false, false)?;
                self.perform()?;
            }
            self.check()?;
            if self.owner.checkpoint >= self.frontier && self.is_quiet() {
                break;
            }
        }
        Ok(())
    }

    fn is_quiet(&self) -> bool {
        let working =
            |d: &crate::dispatcher::Dispatcher| d.state == ComponentState::Working && !d.is_stopped();
        self.owner.is_settled()
            && self.core.journal.len() == 0
            && self.core.merges.len() == 0
            && self.core.opening.is_empty()
            && self.core.dispatchers.iter().all(working)
    }

    fn picture(&self) -> String {
        let all: Vec<String> = self
            .core
            .dispatchers
            .iter()
            .map(|d| format!("{} {:?} {:?}@{} {}", d.id.low, d.span, d.state, d.checkpoint(), d.waits_for()))
            .collect();
        let start = self.trace.len().saturating_sub(60);
        format!(
            "dispatchers {all:#?}\nowner {:#?}\njournal {} merges {} opening {:?}\nlast {:#?}",
            self.owner,
            self.core.journal.len(),
            self.core.merges.len(),
            self.core.opening,
            &self.trace[start..]
        )
    }
}

proptest! {
    /// Whatever is lost, repeated or late: a checkpoint passes nothing that is not durable, a key has one writer, a DDL
    /// has everything before it and nothing behind it downstream, and in the end every key is written, nothing is
    /// locked and no request is left.
    #[test]
    fn every_history_keeps_the_promises_and_comes_to_an_end(
        calm in any::<bool>(),
        steps in proptest::collection::vec((0u8..60, any::<u16>()), 1..600),
    ) {
        let mut world = World::new(calm);
        world.owner.repeat(&mut world.down);
        for (op, pick) in steps {
            let result = world.step(op, pick);
            prop_assert!(result.is_ok(), "{}\n{}", result.unwrap_err(), world.picture());
        }
        let result = world.settle();
        prop_assert!(result.is_ok(), "{}\n{}", result.unwrap_err(), world.picture());
        prop_assert!(world.is_quiet(), "not at rest\n{}", world.picture());
        prop_assert!(world.owner.checkpoint >= world.frontier, "stuck\n{}", world.picture());
        prop_assert!(world.rows_below(world.frontier).is_empty());
    }
}
