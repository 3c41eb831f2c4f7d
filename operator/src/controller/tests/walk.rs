//! Random lives of a changefeed: whatever comes in whatever order, no key is lost, and none has two writers.

use std::collections::BTreeMap;

use proptest::prelude::*;
use replica::{holes, overlap};

use super::*;
use crate::span::{MoveSpan, SplitSpan};

const NODES: [&str; 3] = ["n1", "n2", "n3"];
const TABLES: [TableId; 2] = [TableId(7), TableId(8)];

/// Nodes that obey, in their own time: requests wait until they are picked, and so do reports.
struct World {
    rig: Rig,
    requests: Vec<(NodeId, Effect)>,
    reports: Vec<(NodeId, TableSpanStatus)>,
    /// What each node really runs.
    running: BTreeMap<NodeId, BTreeMap<DispatcherId, TableSpan>>,
    /// Up to where the rows of some keys were really applied.
    applied: BTreeMap<(TableId, Vec<u8>), u64>,
    /// The maintainer leaves: it heals nothing any more.
    leaving: bool,
    next_id: u64,
    now: u64,
}

/// Keys that are watched: single bytes, and some between them.
fn watched() -> impl Iterator<Item = (TableId, Vec<u8>)> {
    let keys = || (0..=255u8).step_by(5).flat_map(|byte| [vec![byte], vec![byte, 100], vec![byte, 100, 30]]);
    TABLES.into_iter().flat_map(move |table| keys().map(move |key| (table, key)))
}

impl World {
    fn new() -> Self {
        let mut rig = Rig::new();
        for id in [SPAN, OTHER] {
            rig.spans.remove(id);
        }
        rig.alive = NODES.map(NodeId::from).into();
        for (n, table) in TABLES.into_iter().enumerate() {
            rig.spans.add_table(DispatcherId::new(2, n as u64 + 1), SchemaId(1), table, true, Ts(10));
        }
        Self {
            rig,
            requests: Vec::new(),
            reports: Vec::new(),
            running: BTreeMap::new(),
            applied: watched().map(|key| (key, 10)).collect(),
            leaving: false,
            next_id: 100,
            now: 10,
        }
    }

    fn fresh(&mut self) -> DispatcherId {
        self.next_id += 1;
        DispatcherId::new(2, self.next_id)
    }

    fn pick(&self, n: usize) -> Option<SpanReplica> {
        let all: Vec<&SpanReplica> = self.rig.spans.iter().map(|(_, span)| span).collect();
        (!all.is_empty()).then(|| all[n % all.len()].clone())
    }

    fn collect(&mut self) {
        for effect in std::mem::take(&mut self.rig.out) {
            match &effect {
                // A node that comes back is a new process: what was sent to the one before is lost.
                Effect::Send(to, _) | Effect::Merge(to, _) => {
                    if self.rig.alive.contains(to) {
                        self.requests.push((to.clone(), effect));
                    }
                }
                Effect::Uncovered(_) | Effect::Started(_) | Effect::Finished(..) => {}
            }
        }
    }

    /// A dispatcher begins at a position: nothing between this and what was applied before is left out.
    fn begin(&self, span: &TableSpan, start: Ts) {
        for ((table, key), applied) in &self.applied {
            let inside = *table == span.table && span.contains_key(key);
            assert!(
                !inside || start.0 <= *applied,
                "{span:?} begins at {start}, but only {applied} was applied"
            );
        }
    }

    /// A dispatcher that works has applied everything up to now.
    fn apply(&mut self, node: &NodeId, id: DispatcherId) {
        let Some(span) = self.running.get(node).and_then(|running| running.get(&id)) else { return };
        for ((table, key), applied) in &mut self.applied {
            if *table == span.table && span.contains_key(key) {
                *applied = self.now.max(*applied);
            }
        }
    }

    fn report(&mut self, node: &NodeId, id: DispatcherId, state: ComponentState) {
        self.apply(node, id);
        let checkpoint = if is_terminal(state) { Ts(0) } else { Ts(self.now) };
        let mode = Mode::Default;
        let status = TableSpanStatus { id, state, checkpoint, event_size_per_second: 0.0, mode };
        self.reports.push((node.clone(), status));
    }

    /// A node does what it was told. Requests of one node are done in their order.
    fn obey(&mut self, n: usize) {
        if self.requests.is_empty() {
            return;
        }
        let node = self.requests[n % self.requests.len()].0.clone();
        let Some(first) = self.requests.iter().position(|(to, _)| *to == node) else { return };
        let (_, effect) = self.requests.remove(first);
        if !self.rig.alive.contains(&node) {
            return;
        }
        let running = self.running.entry(node.clone()).or_default();
        match effect {
            Effect::Send(_, request) => {
                let id = request.config.dispatcher;
                let state = match request.action {
                    ScheduleAction::Create => {
                        let (span, start) = (request.config.span, request.config.start_ts);
                        if running.insert(id, span.clone()).is_none() {
                            self.begin(&span, start);
                        }
                        Working
                    }
                    ScheduleAction::Remove => {
                        running.remove(&id);
                        Stopped
                    }
                };
                self.report(&node, id, state);
            }
            Effect::Merge(_, request) => {
                let ranges: Option<Vec<TableSpan>> =
                    request.sources.iter().map(|id| running.get(id).cloned()).collect();
                if let Some(ranges) = ranges {
                    let (first, last) = (&ranges[0], &ranges[ranges.len() - 1]);
                    let whole = TableSpan { end: last.end.clone(), ..first.clone() };
                    request.sources.iter().for_each(|id| drop(running.remove(id)));
                    running.insert(request.merged, whole);
                }
                if running.contains_key(&request.merged) {
                    self.report(&node, request.merged, Working);
                }
            }
            Effect::Uncovered(_) | Effect::Started(_) | Effect::Finished(..) => {}
        }
    }

    /// A report arrives, some of them twice; what a maintainer does with it beside its operators is done too.
    fn hear(&mut self, n: usize, again: bool) {
        if self.reports.is_empty() {
            return;
        }
        // The reports of one node about one dispatcher keep their order.
        let (node, id) = {
            let (node, status) = &self.reports[n % self.reports.len()];
            (node.clone(), status.id)
        };
        let Some(at) = self.reports.iter().position(|(from, s)| *from == node && s.id == id) else { return };
        let (from, status) = self.reports.remove(at);
        if !self.rig.alive.contains(&from) {
            return;
        }
        for _ in 0..=usize::from(again) {
            self.rig.call(|controller, cx| controller.on_status(&from, &status, cx));
        }
        let bound = self.rig.spans.get(status.id).is_some_and(|span| span.node.as_ref() == Some(&from));
        if bound {
            self.rig.spans.observe(&status);
            let heals = !self.leaving && !self.rig.controller.contains(status.id);
            if is_terminal(status.state) && heals {
                self.rig.spans.mark_absent(status.id);
            }
        }
    }

    fn kill_and_revive(&mut self, n: usize) {
        let node = NodeId::from(NODES[n % NODES.len()]);
        if self.rig.alive.contains(&node) {
            self.running.remove(&node);
            self.requests.retain(|(to, _)| *to != node);
            self.reports.retain(|(from, _)| *from != node);
            self.rig.gone(node.as_str());
        }
        // Mostly another process takes its place at once: with few nodes alive little happens.
        if !n.is_multiple_of(4) {
            self.rig.alive.insert(node);
        }
    }

    fn change(&mut self, what: u8, n: usize) {
        let Some(span) = self.pick(n) else { return };
        let dest = NodeId::from(NODES[n / 7 % NODES.len()]);
        match (what, span.node.clone()) {
            (0, None) => drop(self.rig.add(span.id, dest.as_str())),
            (1, Some(origin)) if self.rig.spans.is_replicating(span.id) => {
                let operator = MoveSpan::new(&span, origin, dest);
                self.rig.call(|controller, cx| controller.add(Box::new(operator), cx));
            }
            (2, Some(origin)) if self.rig.spans.is_replicating(span.id) => {
                let middle = span.span.start.iter().copied().chain([u8::try_from(n % 250).unwrap_or(1) + 1]);
                let middle: Vec<u8> = middle.collect();
                let left = TableSpan { end: middle.clone(), ..span.span.clone() };
                let right = TableSpan { start: middle, ..span.span.clone() };
                let parts = vec![(self.fresh(), left), (self.fresh(), right)];
                let nodes = if n.is_multiple_of(2) { vec![origin.clone(), dest] } else { vec![] };
                let operator = SplitSpan::new(&span, origin, parts, nodes);
                self.rig.call(|controller, cx| controller.add(Box::new(operator), cx));
            }
            (3, Some(_)) => {
                let next =
                    self.rig.spans.by_table(span.span.table).find(|s| span.span.is_followed_by(&s.span));
                if let Some(next) = next.map(|next| next.id) {
                    let target = self.fresh();
                    self.rig.call(|controller, cx| controller.merge(&[span.id, next], target, cx));
                }
            }
            _ => {}
        }
    }

    fn step(&mut self, what: u8, n: usize) {
        self.now += 1;
        match what {
            0..4 => self.change(what, n),
            4..9 => self.obey(n),
            9..14 => self.hear(n, n.is_multiple_of(5)),
            14 => self.kill_and_revive(n),
            15 => self.rig.later(600),
            // Lost on the way: whoever waits for an effect says it again.
            16 if !self.requests.is_empty() => drop(self.requests.remove(n % self.requests.len())),
            17 if !self.reports.is_empty() => drop(self.reports.remove(n % self.reports.len())),
            _ if n.is_multiple_of(9) => {
                let table = TABLES[n % TABLES.len()];
                self.rig.call(|controller, cx| controller.remove_tables(&[table], cx));
                let id = self.fresh();
                if self.rig.spans.add_table(id, SchemaId(1), table, true, Ts(self.now)) {
                    // Another table from here on: its rows begin now.
                    self.applied
                        .iter_mut()
                        .filter(|((of, _), _)| *of == table)
                        .for_each(|(_, at)| *at = self.now);
                }
            }
            _ => {
                let merges = self.rig.controller.running.iter();
                let merge =
                    merges.filter(|(_, r)| r.operator.kind() == Kind::Merge).map(|(id, _)| *id).next();
                // Before the node began: afterwards its target lives, and its sources do not.
                if let Some(id) = merge.filter(|id| !self.running.values().any(|r| r.contains_key(id))) {
                    self.requests
                        .retain(|(_, effect)| !matches!(effect, Effect::Merge(_, r) if r.merged == id));
                    self.rig.call(|controller, cx| controller.cancel_merge(id, cx));
                }
            }
        }
        self.collect();
        self.check();
    }

    /// What holds after every step.
    fn check(&mut self) {
        let spans = &self.rig.spans;
        let merging: BTreeSet<DispatcherId> = {
            let of = |(id, running): (&DispatcherId, &Running)| {
                (running.operator.kind() == Kind::Merge).then_some(*id)
            };
            self.rig.controller.running.iter().filter_map(of).collect()
        };
        for table in TABLES {
            let of_table: Vec<&SpanReplica> =
                spans.by_table(table).filter(|span| !merging.contains(&span.id)).collect();
            assert!(holes(table, of_table.iter().map(|span| &span.span)).is_empty(), "a key is nobody's");
            for (n, a) in of_table.iter().enumerate() {
                assert!(!of_table[..n].iter().any(|b| overlap(&a.span, &b.span)), "a key is wanted twice");
            }
        }
        for (standing, span) in spans.iter() {
            let occupied = self.rig.controller.contains(span.id);
            assert!(standing != Standing::Scheduling || occupied, "{} is on its way by itself", span.id);
        }
        // Nobody else runs what the desired state wants of a span: two writers would be of one id.
        for (node, running) in &self.running {
            for id in running.keys() {
                let twice = self.running.iter().any(|(other, r)| other != node && r.contains_key(id));
                assert!(!twice, "{id} runs on two nodes");
            }
        }
        // The changefeed commits what all of its spans have: from then on none may need less.
        assert!(
            spans.floor().is_none_or(|floor| floor >= spans.committed()),
            "the checkpoint would move back"
        );
        let reached = spans.iter().map(|(_, span)| span.checkpoint).min();
        if let Some(reached) = reached {
            self.rig.spans.advance_committed(reached);
        }
    }

    /// With living nodes that answer, everything comes to rest with every key replicated.
    fn come_to_rest(&mut self) {
        self.rig.alive = NODES.map(NodeId::from).into();
        for _ in 0..200 {
            let absent: Vec<DispatcherId> = self
                .rig
                .spans
                .iter()
                .filter(|(standing, _)| *standing == Standing::Absent)
                .map(|(_, span)| span.id)
                .collect();
            for id in absent {
                self.rig.add(id, "n1");
            }
            self.rig.later(10_000);
            self.collect();
            while !self.requests.is_empty() || !self.reports.is_empty() {
                self.obey(0);
                self.hear(0, false);
                self.collect();
                self.check();
            }
            if self.rig.controller.is_empty() && self.rig.spans.floor().is_none() {
                break;
            }
        }
        assert!(self.rig.controller.is_empty(), "operators are left: {:?}", self.rig.controller.running);
        assert_eq!(self.rig.spans.floor(), None, "something is not replicated");
        for (_, span) in self.rig.spans.iter() {
            let node = span.node.clone().unwrap();
            assert!(self.running[&node].contains_key(&span.id), "{} does not run on {node}", span.id);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, ..ProptestConfig::default() })]
    #[test]
    fn no_history_loses_a_key_or_gives_one_to_two_writers(
        steps in prop::collection::vec((0u8..20, 0usize..1000), 0..250)
    ) {
        let mut world = World::new();
        // Everything runs before anything is changed.
        world.come_to_rest();
        for (what, n) in steps {
            world.step(what, n);
        }
        world.come_to_rest();
    }

    // behaviour: scheduling-51
    #[test]
    fn once_quiesced_nothing_is_said_or_moved_and_what_was_on_its_way_holds_the_checkpoint(
        before in prop::collection::vec((0u8..20, 0usize..1000), 0..120),
        after in prop::collection::vec((4u8..18, 0usize..1000), 0..60)
    ) {
        let mut world = World::new();
        world.come_to_rest();
        for (what, n) in before {
            world.step(what, n);
        }
        world.rig.controller.quiesce_except([TRIGGER]);
        world.leaving = true;
        let stands = |world: &World| -> Vec<(DispatcherId, Standing, Option<NodeId>)> {
            world.rig.spans.iter().map(|(standing, span)| (span.id, standing, span.node.clone())).collect()
        };
        let (spans, operators) = (stands(&world), world.rig.controller.len());
        let held = world.rig.spans.floor().is_some();
        world.rig.out.clear();
        for (what, n) in after {
            world.now += 1;
            match what {
                0..9 => world.obey(n),
                9..14 => world.hear(n, n.is_multiple_of(5)),
                14 => world.kill_and_revive(n),
                _ => world.rig.later(10_000),
            }
            let table = TABLES[n % TABLES.len()];
            prop_assert!(!world.rig.call(|controller, cx| controller.remove_tables(&[table], cx)));
            prop_assert_eq!(world.rig.out.len(), 0);
        }
        prop_assert_eq!(stands(&world), spans);
        prop_assert_eq!(world.rig.controller.len(), operators);
        prop_assert_eq!(world.rig.spans.floor().is_some(), held);
    }
}
