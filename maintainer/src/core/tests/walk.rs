//! Random lives of a changefeed whose tables are divided, moved and joined, whose nodes come and go, and whose
//! maintainers follow one another: no row is left out, and no key has two writers.

use heartbeatpb::ComponentState::{Stopped, Working};
use heartbeatpb::{ScheduleAction, TableId, TableSpanStatus};
use proptest::prelude::*;
use replica::Standing;

use super::super::*;
use super::rig::{Rig, span, status};
use crate::fence::FenceOutcome;
use crate::placements::Wish;

const TABLES: i64 = 2;

/// Nodes with what they really run and where it really is, and what they have yet to say.
struct World {
    rig: Rig,
    running: BTreeMap<NodeId, BTreeMap<u64, (TableSpan, u64)>>,
    /// Nodes that nobody sees any more, and that go on writing until the downstream refuses them.
    ghosts: BTreeMap<NodeId, BTreeMap<u64, (TableSpan, u64)>>,
    /// Whether there are any: the downstream can refuse them.
    fences: bool,
    asked: Vec<(u64, Whom)>,
    nodes: usize,
    unsaid: BTreeMap<NodeId, Vec<TableSpanStatus>>,
    /// Up to where the rows of some keys were applied.
    applied: BTreeMap<(TableId, Vec<u8>), u64>,
    seq: u64,
    tickets: u64,
    maintainers: u64,
}

fn watched() -> impl Iterator<Item = (TableId, Vec<u8>)> {
    let keys = || (0..=255u8).step_by(15).flat_map(|byte| [vec![byte], vec![byte, 100]]);
    (1..=TABLES).flat_map(move |table| keys().map(move |key| (TableId(table), key)))
}

fn across(config: &mut heartbeatpb::config::ReplicaConfig) {
    config.scheduler.enable_table_across_nodes = true;
}

impl World {
    fn new(fences: bool) -> Self {
        let mut world = Self {
            rig: Rig::new(),
            ghosts: BTreeMap::new(),
            fences,
            asked: Vec::new(),
            nodes: 4,
            running: ["n1", "n2"].map(|node| (NodeId::from(node), BTreeMap::new())).into(),
            unsaid: BTreeMap::new(),
            applied: watched().map(|key| (key, 100)).collect(),
            seq: 1,
            tickets: 0,
            maintainers: 0,
        };
        world.take_over(100);
        world
    }

    /// Another maintainer follows: it knows the checkpoint, and what nodes say.
    fn take_over(&mut self, checkpoint: u64) {
        self.maintainers += 1;
        let before = self.rig.core.trigger.low;
        let last_id = self.maintainers * 10_000;
        self.rig = Rig::born(checkpoint, last_id, self.fences, across);
        self.asked.clear();
        self.unsaid.clear();
        for running in self.running.values_mut() {
            running.remove(&before);
        }
        let trigger = self.rig.core.trigger.low;
        let own = self.running.entry("n1".into()).or_default();
        own.insert(trigger, (TableSpan::ddl(), checkpoint));
        let names: Vec<String> = self.running.keys().map(ToString::to_string).collect();
        self.rig.nodes(&names.iter().map(String::as_str).collect::<Vec<_>>());
        self.rig.load(TABLES);
        for name in names {
            self.answer(&name);
        }
        self.rig.post_answer("n1", 5);
    }

    /// The downstream refuses those that it was asked to; or the answer is lost, or most were not refused.
    fn refuse(&mut self, pick: usize) {
        self.obey(false);
        for (attempt, whom) in std::mem::take(&mut self.asked) {
            let meant = |node: &NodeId| match &whom {
                Whom::AllBut(nodes) => !nodes.contains(node),
                Whom::Nodes(nodes) => nodes.contains(node),
            };
            let busy = self.ghosts.keys().find(|node| meant(node)).filter(|_| pick == 1).cloned();
            self.ghosts.retain(|node, _| !meant(node) || busy.as_ref() == Some(node));
            if pick != 2 {
                let busy = busy.map(|node| (node, "it goes on".to_owned())).into_iter().collect();
                let outcome = FenceOutcome { busy, writers: None };
                self.rig.core.on_fenced(attempt, Ok(outcome), self.rig.now, &mut self.rig.out);
            }
        }
        self.rig.core.settle();
    }

    /// A node says what it runs.
    fn answer(&mut self, node: &str) {
        let trigger = self.rig.core.trigger.low;
        let running = self.running.get(&NodeId::from(node)).cloned().unwrap_or_default();
        let spans = running.into_iter().filter(|(id, _)| *id != trigger).map(|(id, (range, at))| {
            let known = span(id, range.table.0, ("", ""), Working);
            heartbeatpb::BootstrapTableSpan { span: range, checkpoint: Ts(at), ..known }
        });
        self.rig.answer(node, spans.collect());
    }

    /// Nodes do what they are asked for; or it is lost.
    fn obey(&mut self, lose: bool) {
        for effect in std::mem::take(&mut self.rig.out) {
            let Effect::Dispatch(node, message) = effect else {
                if let Effect::Fence { attempt, whom, .. } = effect {
                    self.asked.push((attempt, whom));
                } else if matches!(effect, Effect::Points { .. }) {
                    self.rig.kept.push(effect);
                }
                continue;
            };
            if lose || !self.running.contains_key(&node) {
                continue;
            }
            match message {
                ToHeartbeatCollector::Schedule(request) => {
                    let id = request.config.dispatcher.low;
                    match request.action {
                        ScheduleAction::Create => {
                            let (range, start) = (request.config.span, request.config.start_ts.0);
                            self.create(&node, id, range, start);
                        }
                        ScheduleAction::Remove => {
                            let gone = self.running.get_mut(&node).and_then(|running| running.remove(&id));
                            self.seq += 1;
                            let at = gone.map_or(0, |(_, at)| at);
                            self.unsaid.entry(node).or_default().push(status(id, Stopped, at));
                        }
                    }
                }
                ToHeartbeatCollector::Merge(request) => {
                    let sources: Vec<u64> = request.sources.iter().map(|source| source.low).collect();
                    self.join(&node, &sources, request.merged.low);
                }
                ToHeartbeatCollector::CheckpointTs(_) | ToHeartbeatCollector::HeartBeatResponse(_) => {}
            }
        }
    }

    fn create(&mut self, node: &NodeId, id: u64, range: TableSpan, start: u64) {
        if self.running[node].contains_key(&id) {
            return;
        }
        for ((table, key), applied) in &self.applied {
            let inside = *table == range.table && range.contains_key(key);
            assert!(!inside || start <= *applied, "d{id} begins at {start}, but only {applied} was applied");
        }
        self.seq += 1;
        self.running.get_mut(node).unwrap().insert(id, (range, start));
    }

    fn join(&mut self, node: &NodeId, sources: &[u64], target: u64) {
        let running = self.running.get_mut(node).unwrap();
        if running.contains_key(&target) {
            return;
        }
        let spans: Option<Vec<(TableSpan, u64)>> =
            sources.iter().map(|id| running.get(id).cloned()).collect();
        self.seq += 1;
        match spans {
            Some(spans) => {
                let range = TableSpan { end: spans[spans.len() - 1].0.end.clone(), ..spans[0].0.clone() };
                let start = spans.iter().map(|(_, at)| *at).min().unwrap();
                sources.iter().for_each(|id| drop(running.remove(id)));
                running.insert(target, (range, start));
            }
            None => self.unsaid.entry(node.clone()).or_default().push(status(target, Stopped, 0)),
        }
    }

    fn advance(&mut self, node: &NodeId, by: u64) {
        let running = self.running.get_mut(node).into_iter().chain(self.ghosts.values_mut());
        for (range, at) in running.flat_map(BTreeMap::values_mut) {
            *at += by;
            for ((table, key), applied) in &mut self.applied {
                if *table == range.table && range.contains_key(key) {
                    *applied = (*applied).max(*at);
                }
            }
        }
    }

    fn report(&mut self, node: &NodeId, lose_ends: bool) {
        let mut statuses = self.unsaid.remove(node).filter(|_| !lose_ends).unwrap_or_default();
        statuses.extend(self.running[node].iter().map(|(id, (_, at))| status(*id, Working, *at)));
        let mark = self.running[node].values().map(|(_, at)| *at).min().unwrap_or(u64::MAX);
        let seq = self.seq;
        self.rig.report(node.as_str(), &statuses, mark, seq);
    }

    fn live(&mut self) {
        let names: Vec<String> = self.running.keys().map(ToString::to_string).collect();
        self.rig.nodes(&names.iter().map(String::as_str).collect::<Vec<_>>());
    }

    fn wish(&mut self, wish: Wish) {
        self.tickets += 1;
        self.rig.wish(self.tickets, wish);
    }

    fn step(&mut self, what: u8, pick: usize, by: u64) {
        let nodes: Vec<NodeId> = self.running.keys().cloned().collect();
        let node = nodes[pick % nodes.len()].clone();
        let table = TableId(1 + i64::try_from(by).unwrap() % TABLES);
        match what {
            0 => self.wish(Wish::MoveParts { table, to: node, wait: by.is_multiple_of(2) }),
            1 => self.wish(Wish::Split { table, pieces: Some(2 + pick % 3) }),
            2 => self.wish(Wish::Merge { table }),
            3 => {
                let question = |effect: Effect| {
                    if let Effect::Points { question, pieces, .. } = effect {
                        Some((question, pieces))
                    } else {
                        None
                    }
                };
                let asked: Vec<_> = self.rig.kept.drain(..).filter_map(question).collect();
                for (question, pieces) in asked {
                    let step = u8::try_from(1 + by).unwrap();
                    let keys = (1..pieces).map(|n| vec![step * u8::try_from(n).unwrap()]).collect();
                    let points = crate::SplitPoints { keys, ..Default::default() };
                    self.rig.core.on_points(question, Ok(points), self.rig.now, &mut self.rig.out);
                }
            }
            4..=6 => self.advance(&node, by),
            7..=10 => self.report(&node, by == 7),
            11 => {
                if self.running.len() < 4 {
                    // A process that ends never comes back under its name, as far as a downstream refuses names.
                    self.nodes += 1;
                    let name = format!("n{}", if self.fences { self.nodes } else { pick % 4 + 1 });
                    self.running.entry(name.as_str().into()).or_default();
                    self.live();
                    self.answer(&name);
                }
            }
            12 if node.as_str() != "n1" => {
                let running = self.running.remove(&node);
                self.ghosts.extend(running.filter(|_| self.fences).map(|running| (node.clone(), running)));
                self.unsaid.remove(&node);
                self.live();
            }
            13 if by > 50 => {
                let checkpoint = self.rig.checkpoint() - by.min(self.rig.checkpoint() - 100);
                self.take_over(checkpoint);
            }
            14 => {
                self.rig.tick(500);
                self.obey(true);
            }
            15 => self.refuse(pick % 6),
            _ => self.rig.tick(by * 20),
        }
        self.obey(false);
        self.check();
    }

    fn check(&self) {
        for ((table, key), applied) in &self.applied {
            let checkpoint = self.rig.checkpoint();
            assert!(checkpoint <= *applied, "the checkpoint {checkpoint} passed a key at {applied}");
            let writers = self.running.values().chain(self.ghosts.values()).flat_map(BTreeMap::values);
            let writers =
                writers.filter(|(range, _)| range.table == *table && range.contains_key(key)).count();
            assert!(writers <= 1, "{writers} writers of a key of table {table}");
        }
    }

    fn come_to_rest(&mut self) {
        for _ in 0..300 {
            self.rig.tick(500);
            self.refuse(0);
            self.obey(false);
            let nodes: Vec<NodeId> = self.running.keys().cloned().collect();
            for node in nodes {
                self.advance(&node, 1);
                self.report(&node, false);
                self.obey(false);
                self.check();
            }
        }
        let placement = self.rig.core.placement();
        assert!(placement.operators.is_empty(), "operators are left: {:?}", placement.operators);
        assert_eq!(placement.spans.count(Standing::Replicating), placement.spans.len());
        for key in self.applied.keys() {
            let runs = self.running.values().flat_map(BTreeMap::values);
            assert!(runs.into_iter().any(|(range, _)| range.table == key.0 && range.contains_key(&key.1)));
        }
        let slowest = self.running.values().flat_map(BTreeMap::values).map(|(_, at)| *at).min().unwrap();
        assert!(self.rig.checkpoint() + 10 > slowest, "it follows: {} {slowest}", self.rig.checkpoint());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    // behaviour: maintainer-38, maintainer-69
    #[test]
    fn no_row_is_left_out_and_no_key_has_two_writers_under_any_history(
        steps in prop::collection::vec((0u8..17, 0usize..12, 1u64..60), 0..150)
    ) {
        let mut world = World::new(false);
        world.obey(false);
        for (what, pick, by) in steps {
            world.step(what, pick, by);
        }
        world.come_to_rest();
    }

    // behaviour: maintainer-38, maintainer-69
    #[test]
    fn nobody_takes_the_place_of_a_node_that_still_writes_under_any_history(
        steps in prop::collection::vec((0u8..17, 0usize..12, 1u64..60), 0..150)
    ) {
        let mut world = World::new(true);
        world.obey(false);
        world.refuse(0);
        world.obey(false);
        for (what, pick, by) in steps {
            world.step(what, pick, by);
        }
        world.come_to_rest();
    }
}
