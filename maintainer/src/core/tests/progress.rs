//! What the checkpoint must never do, under any history.

use heartbeatpb::ComponentState::{Removed, Stopped, Working};
use proptest::prelude::*;

use replica::Standing;

use super::super::*;
use super::rig::{Rig, status};

#[test]
fn a_new_table_holds_the_checkpoint_until_its_dispatcher_is_in_the_watermark() {
    let mut rig = Rig::working(1);
    rig.report("n1", &[], 250, 3);
    rig.add_tables(300, &[9]);
    rig.report("n1", &[], 900, 3);
    assert_eq!(rig.checkpoint(), 300, "nobody runs it yet");
    rig.tick(500);
    rig.report("n1", &[status(3, Working, 300)], 310, 4);
    assert_eq!(rig.checkpoint(), 310);
}

// behaviour: maintainer-38
#[test]
fn a_dead_nodes_spans_hold_the_checkpoint_when_its_watermark_goes() {
    let mut rig = Rig::working(0);
    rig.nodes(&["n1", "n2"]);
    rig.answer("n2", vec![]);
    rig.add_tables(110, &[1, 2]);
    rig.create_all();
    rig.report("n2", &[], 200, 5);
    rig.report("n1", &[], 900, 5);
    assert_eq!(rig.checkpoint(), 200);
    let on_n2 = rig.core.placement().spans.ids_by_node(&"n2".into()).next().unwrap();
    rig.nodes(&["n1"]);
    rig.report("n1", &[], 950, 6);
    assert_eq!(rig.checkpoint(), 200, "nobody says where its span is: it was last seen at its start");
    assert!(rig.core.placement().spans.get(on_n2).is_some());
}

// behaviour: maintainer-34, maintainer-35
#[test]
fn only_low_latency_changefeeds_tell_each_move() {
    let mut rig = Rig::working(1);
    let before = rig.core.version();
    rig.report("n1", &[], 200, 3);
    assert_eq!((rig.checkpoint(), rig.core.version()), (200, before));

    let mut rig = Rig::with(|config| config.performance_mode = PerformanceMode::LowLatency);
    rig.nodes(&["n1"]);
    rig.load(0);
    rig.answer("n1", vec![]);
    let before = rig.core.version();
    rig.report("n1", &[], 200, 3);
    assert_eq!(rig.core.version(), before + 1);
    rig.report("n1", &[], 200, 3);
    assert_eq!(rig.core.version(), before + 1, "nothing moved");
}

/// A world that obeys and disobeys: per node the dispatchers that run there, with their real checkpoints.
#[derive(Default)]
struct World {
    running: BTreeMap<NodeId, BTreeMap<u64, u64>>,
    seq: u64,
}

impl World {
    /// Carries out what the maintainer asked for, except what is lost.
    fn hear(&mut self, rig: &mut Rig, lose: bool) {
        for effect in std::mem::take(&mut rig.out) {
            let Effect::Dispatch(node, ToHeartbeatCollector::Schedule(request)) = effect else { continue };
            let Some(running) = self.running.get_mut(&node).filter(|_| !lose) else { continue };
            let id = request.config.dispatcher.low;
            self.seq += 1;
            match request.action {
                heartbeatpb::ScheduleAction::Create => {
                    running.entry(id).or_insert(request.config.start_ts.0);
                }
                heartbeatpb::ScheduleAction::Remove => drop(running.remove(&id)),
            }
        }
    }

    fn watermark(&self, node: &NodeId) -> u64 {
        self.running[node].values().copied().min().unwrap_or(u64::MAX)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    // behaviour: maintainer-38
    #[test]
    fn the_checkpoint_passes_no_dispatcher_and_no_table_under_any_history(
        steps in prop::collection::vec((0u8..12, 0u64..4, 1u64..60), 1..120)
    ) {
        let mut rig = Rig::working(3);
        let mut world = World::default();
        let own = world.running.entry("n1".into()).or_default();
        for id in 1..=4 {
            own.insert(id, 100);
        }
        let mut ddl_ts = 100;
        let mut last = rig.checkpoint();
        for (what, pick, by) in steps {
            let names: Vec<NodeId> = world.running.keys().cloned().collect();
            let node = names[usize::try_from(pick).unwrap() % names.len()].clone();
            match what {
                // Dispatchers move on, one of them or all.
                0 | 1 => {
                    for ts in world.running.get_mut(&node).unwrap().values_mut() {
                        *ts += by;
                    }
                }
                2 => {
                    if let Some(ts) = world.running.get_mut(&node).unwrap().values_mut().next_back() {
                        *ts += by;
                    }
                }
                // A node reports, with or without statuses.
                3..=5 => {
                    let statuses: Vec<_> = world.running[&node]
                        .iter()
                        .filter(|_| what > 3)
                        .map(|(id, ts)| status(*id, Working, *ts))
                        .collect();
                    let (mark, seq) = (world.watermark(&node), world.seq);
                    rig.report(node.as_str(), &statuses, mark, seq);
                }
                // A dispatcher ends; the node says so, or does not.
                6 => {
                    let last_id = world.running[&node].keys().copied().rfind(|id| *id > 1);
                    if let Some(id) = last_id {
                        let ts = world.running.get_mut(&node).unwrap().remove(&id).unwrap_or(0);
                        let state = if by % 2 == 0 { Stopped } else { Removed };
                        let mark = world.watermark(&node).min(ts);
                        rig.report(node.as_str(), &[status(id, state, ts)], mark, world.seq);
                    }
                }
                // A node joins.
                7 => {
                    let name = format!("n{}", pick + 2);
                    if world.running.len() < 4 && !world.running.contains_key(&NodeId::from(name.as_str())) {
                        world.running.entry(name.as_str().into()).or_default();
                        let all: Vec<String> = world.running.keys().map(ToString::to_string).collect();
                        rig.nodes(&all.iter().map(String::as_str).collect::<Vec<_>>());
                        rig.answer(&name, vec![]);
                    }
                }
                // A node dies.
                8 => {
                    if node.as_str() != "n1" {
                        world.running.remove(&node);
                        let all: Vec<String> = world.running.keys().map(ToString::to_string).collect();
                        rig.nodes(&all.iter().map(String::as_str).collect::<Vec<_>>());
                    }
                }
                // The trigger executes a DDL that adds a table; its own checkpoint waits for the acknowledgement.
                9 => {
                    let trigger = world.running[&NodeId::from("n1")].get(&1).copied().unwrap_or(0);
                    ddl_ts = ddl_ts.max(trigger) + by;
                    rig.add_tables(ddl_ts, &[i64::try_from(ddl_ts).unwrap() + 1000]);
                }
                10 => rig.tick(by * 20),
                _ => {
                    rig.tick(500);
                    world.hear(&mut rig, true);
                }
            }
            world.hear(&mut rig, false);
            let now = rig.checkpoint();
            prop_assert!(now >= last, "it went back from {last} to {now}");
            let moved = now > last;
            last = now;
            for (node, running) in &world.running {
                for (id, ts) in running {
                    let wanted = rig.core.placement().spans.get(DispatcherId::new(0, *id));
                    let known = wanted.is_some_and(|span| span.node.as_ref() == Some(node));
                    prop_assert!(!known || now <= *ts, "{now} passed d{id} at {ts} on {node}");
                }
            }
            for (standing, span) in rig.core.placement().spans.iter() {
                // A lost span was last seen behind what its node had reported in sum; nothing moves before it is back.
                let held = standing != Standing::Replicating;
                prop_assert!(!(moved && held) || now <= span.checkpoint.0);
            }
        }
    }
}
