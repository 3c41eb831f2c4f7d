//! Random lives of barriers: reports and requests that are lost, repeated, late and reordered; spans that are moved,
//! divided and lost with their nodes while they wait; maintainers that begin anew. Nobody writes an event before all who
//! take part are durable in front of it, nobody passes it before it is written, and in the end everybody is behind
//! everything.

use proptest::prelude::*;

use super::*;

/// Keys of a table, as far as durability is counted.
const UNITS: usize = 8;
const NODES: [&str; 2] = ["n1", "n2"];

/// A schema change of the upstream's history.
#[derive(Clone)]
struct Change {
    ts: u64,
    influence: InfluencedTables,
    dropped: &'static [i64],
    added: &'static [i64],
}

/// Table 1 may be divided; tables 1 and 2 are of schema 1, 3 and 13 of schema 2.
fn history() -> Vec<Change> {
    let change = |ts: u64, influence: InfluencedTables| Change { ts, influence, dropped: &[], added: &[] };
    vec![
        change(110, normal(&[1])),
        change(120, normal(&[1, 0])),
        change(130, normal(&[2, 3])),
        change(140, InfluencedTables::Schema(SchemaId(1))),
        change(150, InfluencedTables::All),
        Change { dropped: &[3], added: &[13], ..change(160, normal(&[3, 0])) },
        change(170, InfluencedTables::All),
        change(180, normal(&[1, 2, 13, 0])),
    ]
}

fn schema_of(table: i64) -> i64 {
    if table < 3 { 1 } else { 2 }
}

fn takes_part(change: &Change, table: i64) -> bool {
    match &change.influence {
        InfluencedTables::All => true,
        InfluencedTables::Schema(schema) => table == 0 || schema.0 == schema_of(table),
        InfluencedTables::Normal(tables) => tables.contains(&TableId(table)),
    }
}

/// A dispatcher of a node.
#[derive(Clone)]
struct Dispatcher {
    node: &'static str,
    span: TableSpan,
    /// It has passed every event up to here.
    passed: u64,
    /// The event that it waits at.
    waits: Option<u64>,
    acknowledged: bool,
}

enum Message {
    Report(&'static str, u64, BlockState),
    Answer(NodeId, DispatcherStatus),
}

struct World {
    bench: Bench,
    changes: Vec<Change>,
    dispatchers: BTreeMap<u64, Dispatcher>,
    wire: Vec<Message>,
    executed: BTreeSet<u64>,
    /// Position up to which the rows of some keys of a table are downstream.
    durable: BTreeMap<i64, [u64; UNITS]>,
    next: u64,
}

fn edge(bytes: &[u8], empty: usize) -> usize {
    bytes.first().map_or(empty, |byte| usize::from(byte - b'a'))
}

impl World {
    fn new() -> Self {
        let bench = Bench::new(&[(1, 1, "n1"), (2, 1, "n2"), (3, 2, "n2")]);
        let mut world = Self {
            bench,
            changes: history(),
            dispatchers: BTreeMap::new(),
            wire: Vec::new(),
            executed: BTreeSet::new(),
            durable: [0, 1, 2, 3].map(|table| (table, [100; UNITS])).into(),
            next: 300,
        };
        for (id, table, node) in [(TRIGGER, 0, "n1"), (101, 1, "n1"), (102, 2, "n2"), (103, 3, "n2")] {
            world.create(id, TableSpan::whole(TableId(table)), node, 100);
        }
        world
    }

    fn create(&mut self, id: u64, span: TableSpan, node: &'static str, passed: u64) {
        let dispatcher = Dispatcher { node, span, passed, waits: None, acknowledged: false };
        self.dispatchers.insert(id, dispatcher);
    }

    fn flushed(&mut self, span: &TableSpan, ts: u64) {
        let units = self.durable.entry(span.table.0).or_insert([0; UNITS]);
        for unit in &mut units[edge(&span.start, 0)..edge(&span.end, UNITS)] {
            *unit = (*unit).max(ts);
        }
    }

    fn pick(&self, random: usize) -> Option<u64> {
        self.dispatchers.keys().nth(random % self.dispatchers.len().max(1)).copied()
    }

    /// Rows up to the next event are written, and the dispatcher stands there.
    fn go_on(&mut self, id: u64) {
        let Some(dispatcher) = self.dispatchers.get(&id).filter(|d| d.waits.is_none()) else { return };
        let (table, passed, span) = (dispatcher.span.table.0, dispatcher.passed, dispatcher.span.clone());
        let Some(next) =
            self.changes.iter().find(|change| change.ts > passed && takes_part(change, table)).cloned()
        else {
            return self.flushed(&span, 1_000);
        };
        let ts = next.ts;
        self.flushed(&span, ts - 1);
        let whole_and_alone = span.is_whole()
            && matches!(&next.influence, InfluencedTables::Normal(tables) if tables.len() == 1);
        let dispatcher = self.dispatchers.get_mut(&id).unwrap();
        if whole_and_alone {
            // It needs nobody else.
            dispatcher.passed = ts;
            self.executed.insert(ts);
            return;
        }
        (dispatcher.waits, dispatcher.acknowledged) = (Some(ts), false);
        self.say(id);
    }

    /// Says, again, that a dispatcher waits.
    fn say(&mut self, id: u64) {
        let Some(dispatcher) = self.dispatchers.get(&id) else { return };
        let Some(ts) = dispatcher.waits else { return };
        let change = self.changes.iter().find(|change| change.ts == ts).unwrap();
        let mut state = waiting(ts, change.influence.clone());
        if !change.dropped.is_empty() {
            state.dropped = Some(normal(change.dropped));
        }
        state.added = change
            .added
            .iter()
            .map(|id| AddedTable { table: TableId(*id), schema: SchemaId(2), splittable: false })
            .collect();
        self.wire.push(Message::Report(dispatcher.node, id, state));
    }

    fn deliver(&mut self, message: &Message) {
        match message {
            Message::Report(node, id, state) => {
                let status = TableSpanBlockStatus {
                    id: DispatcherId::new(0, *id),
                    mode: Mode::Default,
                    state: state.clone(),
                };
                let (changefeed, statuses) = (ChangefeedId::fresh("t"), vec![status]);
                let request = BlockStatusRequest { changefeed, mode: Mode::Default, statuses };
                let Bench { barrier, placement, now } = &mut self.bench;
                let outcome = barrier.on_request(&(*node).into(), &request, placement, *now);
                assert!(outcome.unusable.is_empty());
                self.send(outcome.responses);
            }
            Message::Answer(node, status) => self.obey(node, status),
        }
        self.bench.placement.take_effects();
    }

    fn send(&mut self, responses: impl IntoIterator<Item = (NodeId, Vec<DispatcherStatus>)>) {
        for (node, statuses) in responses {
            self.wire.extend(statuses.into_iter().map(|status| Message::Answer(node.clone(), status)));
        }
    }

    fn obey(&mut self, node: &NodeId, status: &DispatcherStatus) {
        let is_meant = |id: u64, dispatcher: &Dispatcher| {
            *node == NodeId::from(dispatcher.node)
                && match &status.influenced {
                    None => false,
                    Some(InfluencedDispatchers::Normal(ids)) => ids.contains(&DispatcherId::new(0, id)),
                    Some(InfluencedDispatchers::Schema { schema, .. }) => {
                        id == TRIGGER || schema_of(dispatcher.span.table.0) == schema.0
                    }
                    Some(InfluencedDispatchers::All { .. }) => true,
                }
        };
        let meant: Vec<u64> =
            self.dispatchers.iter().filter(|(id, d)| is_meant(**id, d)).map(|(id, _)| *id).collect();
        for id in meant {
            let dispatcher = self.dispatchers.get_mut(&id).unwrap();
            let waits = dispatcher.waits;
            if status.ack.is_some_and(|key| waits == Some(key.commit_ts.0)) {
                dispatcher.acknowledged = true;
            }
            if status.ignored.is_some_and(|key| waits == Some(key.commit_ts.0)) {
                self.say(id);
            }
            let Some((action, key)) = status.action else { continue };
            let ts = key.commit_ts.0;
            if waits == Some(ts) {
                if action == BlockAction::Write {
                    self.write(ts);
                }
                self.pass(id, ts);
            } else if self.dispatchers[&id].passed < ts {
                continue;
            }
            let node = self.dispatchers[&id].node;
            self.wire.push(Message::Report(node, id, done(ts)));
        }
    }

    /// The target executes an event, unless it has.
    fn write(&mut self, ts: u64) {
        if !self.executed.insert(ts) {
            return;
        }
        let change = self.changes.iter().find(|change| change.ts == ts).unwrap().clone();
        for (table, units) in &self.durable {
            let is_there = !self.changes.iter().any(|other| {
                other.ts != ts && other.dropped.contains(table) && self.executed.contains(&other.ts)
            });
            if *table != 0 && is_there && takes_part(&change, *table) {
                assert!(
                    units.iter().all(|unit| *unit + 1 >= ts),
                    "{ts} is written before table {table}: {units:?}"
                );
            }
        }
    }

    fn pass(&mut self, id: u64, ts: u64) {
        assert!(self.executed.contains(&ts), "{id} passes {ts}, which nobody has written");
        let dispatcher = self.dispatchers.get_mut(&id).unwrap();
        (dispatcher.passed, dispatcher.waits) = (ts, None);
        let span = dispatcher.span.clone();
        self.flushed(&span, ts);
    }

    /// Checkpoints reach the maintainer; its committed one follows.
    fn heartbeat(&mut self) {
        for (id, dispatcher) in &self.dispatchers {
            // Behind an event it is soon further; in front of one it is not.
            let behind = dispatcher.passed + u64::from(dispatcher.passed.is_multiple_of(10));
            let checkpoint = dispatcher.waits.map_or(behind, |ts| ts - 1);
            self.bench.placement.spans.raise(DispatcherId::new(0, *id), Ts(checkpoint));
        }
        let spans = self.bench.placement.spans.all().map(|span| span.checkpoint);
        let least = spans.chain(self.bench.barrier.floor()).min();
        self.bench.placement.spans.advance_committed(least.unwrap_or_default());
    }

    /// A dispatcher is gone; its span has no home.
    fn lose(&mut self, id: u64) {
        if id != TRIGGER {
            self.dispatchers.remove(&id);
            self.bench.placement.spans.mark_absent(DispatcherId::new(0, id));
        }
    }

    /// Spans without a home get one, where they have to begin.
    fn place(&mut self, random: usize) {
        let spans = &mut self.bench.placement.spans;
        let committed = spans.committed();
        let absent: Vec<SpanReplica> =
            spans.all().filter(|span| !self.dispatchers.contains_key(&span.id.low)).cloned().collect();
        for span in absent {
            let node = NODES[random % 2];
            let start = span.create_config(committed, Mode::Default).start_ts;
            spans.bind(span.id, node.into());
            spans.mark_replicating(span.id);
            let dispatcher = Dispatcher {
                node,
                span: span.span.clone(),
                passed: start.0,
                waits: None,
                acknowledged: false,
            };
            self.dispatchers.insert(span.id.low, dispatcher);
        }
        // Dispatchers of tables that are gone end.
        let there =
            |id: &u64| *id == TRIGGER || self.bench.placement.spans.get(DispatcherId::new(0, *id)).is_some();
        self.dispatchers.retain(|id, _| there(id));
    }

    /// A part of table 1 becomes two.
    fn divide(&mut self, id: u64, random: usize) {
        let id_of = |id: u64| DispatcherId::new(0, id);
        let Some(span) = self.bench.placement.spans.get(id_of(id)).cloned() else { return };
        let (from, to) = (edge(&span.span.start, 0), edge(&span.span.end, UNITS));
        if span.span.table != TableId(1) || to - from < 2 || !self.dispatchers.contains_key(&id) {
            return;
        }
        let at = from + 1 + random % (to - from - 1);
        let middle = vec![b'a' + u8::try_from(at).unwrap()];
        let committed = self.bench.placement.spans.committed();
        let config = span.create_config(committed, Mode::Default);
        self.dispatchers.remove(&id);
        self.bench.placement.spans.remove(id_of(id));
        let parts = [
            TableSpan { end: middle.clone(), ..span.span.clone() },
            TableSpan { start: middle, ..span.span.clone() },
        ];
        for (part, node) in parts.into_iter().zip([random, random + 1]) {
            self.next += 1;
            let node = NODES[node % 2];
            let new = SpanReplica::absent(id_of(self.next), span.schema, part.clone(), config.start_ts);
            assert!(self.bench.placement.spans.add_replicating(new, node.into()));
            self.create(self.next, part, node, config.start_ts.0);
        }
    }

    /// Another maintainer takes over with what dispatchers tell it.
    fn take_over(&mut self) {
        let start = self.bench.placement.spans.committed();
        self.bench.barrier = Barrier::new("n1".into(), start);
        let mut reported = Vec::new();
        let ids: Vec<u64> = self.dispatchers.keys().copied().collect();
        for id in ids {
            let waits = self.dispatchers[&id].waits;
            self.bench.placement.spans.set_block(DispatcherId::new(0, id), None);
            if waits.is_some() {
                self.say(id);
                if let Some(Message::Report(_, id, state)) = self.wire.pop() {
                    reported.push((DispatcherId::new(0, id), state));
                }
            }
        }
        let Bench { barrier, placement, now } = &mut self.bench;
        barrier.restore(&reported, placement, *now);
        placement.take_effects();
    }

    fn scan(&mut self) {
        self.bench.now += Duration::from_millis(1_100);
        let said = self.bench.barrier.scan(&mut self.bench.placement, self.bench.now);
        self.bench.placement.take_effects();
        self.send(said);
    }

    fn act(&mut self, what: u8, random: usize) {
        let message = random % self.wire.len().max(1);
        match what {
            0..=5 => {
                if let Some(id) = self.pick(random) {
                    self.go_on(id);
                }
            }
            6..=12 if !self.wire.is_empty() => {
                let message = self.wire.swap_remove(message);
                self.deliver(&message);
            }
            13 if !self.wire.is_empty() => drop(self.wire.swap_remove(message)),
            14 => {
                if let Some(Message::Report(node, id, state)) = self.wire.get(message) {
                    self.wire.push(Message::Report(node, *id, state.clone()));
                }
            }
            15 | 16 => self.scan(),
            17 => {
                if let Some(id) = self.pick(random).filter(|id| !self.dispatchers[id].acknowledged) {
                    self.say(id);
                }
            }
            18 => self.heartbeat(),
            19 => {
                if let Some(id) = self.pick(random) {
                    self.lose(id);
                }
            }
            20 => self.place(random),
            21 => {
                if let Some(id) = self.pick(random) {
                    self.divide(id, random);
                }
            }
            22 => {
                let on_node: Vec<u64> =
                    self.dispatchers.iter().filter(|(_, d)| d.node == "n2").map(|(id, _)| *id).collect();
                on_node.into_iter().for_each(|id| self.lose(id));
            }
            23 => self.take_over(),
            _ => {}
        }
    }

    /// Nothing is lost any more: everybody comes behind everything.
    fn settle(&mut self) {
        for round in 0..200 {
            self.place(round);
            let ids: Vec<u64> = self.dispatchers.keys().copied().collect();
            for id in ids {
                self.go_on(id);
                self.say(id);
            }
            for message in std::mem::take(&mut self.wire) {
                self.deliver(&message);
            }
            self.heartbeat();
            self.scan();
        }
        let still: Vec<String> = self
            .dispatchers
            .iter()
            .filter(|(_, d)| d.waits.is_some())
            .map(|(id, d)| format!("{id} of table {} at {:?}", d.span.table, d.waits))
            .collect();
        let waits: Vec<String> = self
            .bench
            .barrier
            .events
            .values()
            .map(|event| format!("{:?} {}", event.key, event.waits_for()))
            .collect();
        assert!(still.is_empty() && waits.is_empty(), "{still:?}, {waits:?}");
        let executed: Vec<u64> = self.executed.iter().copied().collect();
        assert_eq!(executed, self.changes.iter().map(|change| change.ts).collect::<Vec<_>>());
        let tables: BTreeSet<i64> = self.bench.placement.spans.all().map(|span| span.span.table.0).collect();
        assert_eq!(tables, BTreeSet::from([0, 1, 2, 13]));
        assert_eq!(self.bench.barrier.floor(), None);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_500, ..ProptestConfig::default() })]

    #[test]
    fn an_event_is_written_when_all_are_there_and_all_come_behind_it(
        acts in prop::collection::vec((0u8..24, 0usize..10_000), 0..250),
    ) {
        let mut world = World::new();
        for (what, random) in acts {
            world.act(what, random);
        }
        world.settle();
    }
}
