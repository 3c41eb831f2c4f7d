//! Load that asks for tables to be divided, moved and joined, as a maintainer hears it and acts on it.

use heartbeatpb::ComponentState::Working;
use heartbeatpb::config::ReplicaConfig;
use heartbeatpb::{TableId, TableSpanStatus};
use replica::{GroupId, Standing};

use super::super::*;
use super::rig::{Rig, status};

const MIB: f32 = 1_048_576.0;

fn by_traffic(config: &mut ReplicaConfig) {
    config.scheduler.enable_table_across_nodes = true;
    config.scheduler.region_threshold = 0;
    config.scheduler.write_key_threshold = 10 << 20;
    config.scheduler.balance_score_threshold = 1;
}

impl Rig {
    /// Two nodes and one table on the first one, whose checkpoint has moved since the start.
    fn loaded(edit: impl FnOnce(&mut ReplicaConfig)) -> Self {
        let mut rig = Self::working_with(1, edit);
        rig.nodes(&["n1", "n2"]);
        rig.answer("n2", vec![]);
        rig.core.on_lag(Some(1.0));
        rig.progress_to(200);
        rig.out.clear();
        rig
    }

    fn progress_to(&mut self, ts: u64) {
        let spans: Vec<(NodeId, u64)> = self.running();
        for (node, id) in spans {
            self.report(node.as_str(), &[status(id, Working, ts)], ts, 5);
        }
        for node in ["n1", "n2"] {
            self.report(node, &[], ts, 6);
        }
    }

    /// What runs, in the order of keys.
    fn running(&self) -> Vec<(NodeId, u64)> {
        let mut spans: Vec<_> = self.core.placement().spans.iter().map(|(_, span)| span.clone()).collect();
        spans.sort_by(|a, b| a.span.cmp(&b.span));
        spans.into_iter().filter_map(|span| Some((span.node?, span.id.low))).collect()
    }

    /// Every span says how much it handles, in the order of keys (the last number is that of the others too).
    fn handles(&mut self, mib: &[f32]) {
        for (n, (node, id)) in self.running().into_iter().enumerate() {
            let sample = mib.get(n).or(mib.last()).copied().unwrap_or(0.1) * MIB;
            let status = TableSpanStatus { event_size_per_second: sample, ..status(id, Working, 200) };
            self.report(node.as_str(), &[status], 200, 7);
        }
        self.tick(15_000);
        self.obey();
    }

    fn questions(&mut self) -> Vec<(u64, usize)> {
        let effects: Vec<Effect> = self.kept.drain(..).chain(self.out.drain(..)).collect();
        let of = |effect: &Effect| {
            if let Effect::Points { question, pieces, .. } = effect {
                Some((*question, *pieces))
            } else {
                None
            }
        };
        effects.iter().filter_map(of).collect()
    }

    fn cut(&mut self, question: u64, keys: &[u8]) {
        let points =
            crate::SplitPoints { keys: keys.iter().map(|key| vec![*key]).collect(), ..Default::default() };
        self.core.on_points(question, Ok(points), self.now, &mut self.out);
        self.come_to_rest();
    }

    fn parts(&self) -> usize {
        self.core.placement().spans.by_table(TableId(1)).count()
    }
}

// behaviour: maintainer-70, scheduling-107
#[test]
fn a_hot_table_is_divided_after_three_samples_and_its_parts_are_spread() {
    let mut rig = Rig::loaded(by_traffic);
    for _ in 0..2 {
        rig.handles(&[12.0]);
        assert!(rig.questions().is_empty(), "two samples say nothing");
    }
    rig.handles(&[12.0]);
    assert_eq!(rig.questions(), [(1, 4)]);
    rig.handles(&[12.0]);
    assert!(rig.questions().is_empty(), "it is being asked for");
    rig.cut(1, &[1, 2, 3]);
    assert_eq!((rig.sizes().as_str(), rig.parts()), ("n1=2 n2=2", 4));
    assert_eq!(rig.core.placement().spans.count(Standing::Replicating), 4);
}

// behaviour: maintainer-70, scheduling-112
#[test]
fn a_large_table_is_divided_and_its_parts_start_few_at_a_time() {
    let mut rig = Rig::loaded(|config| {
        config.scheduler.enable_table_across_nodes = true;
        config.scheduler.region_threshold = 50;
        config.scheduler.region_count_per_span = 10;
        config.scheduler.scheduling_task_count_per_node = 2;
    });
    rig.handles(&[0.1]);
    rig.tick(100);
    let asked = rig.questions();
    assert_eq!(asked.last().map(|(_, pieces)| *pieces), Some(1), "how large it is");
    let points = crate::SplitPoints { keys: vec![], rows: Some(97 * 960_000), bytes: Some(100 * (96 << 20)) };
    rig.core.on_points(asked[0].0, Ok(points), rig.now, &mut rig.out);
    rig.tick(100);
    let asked = rig.questions();
    let (question, pieces) = asked[asked.len() - 1];
    assert_eq!(pieces, 10, "100 units, 10 in each span");
    let points = crate::SplitPoints { keys: (1..10).map(|n| vec![n]).collect(), ..Default::default() };
    rig.core.on_points(question, Ok(points), rig.now, &mut rig.out);
    let mut most = 0;
    for _ in 0..20 {
        rig.obey();
        rig.tick(500);
        let group = rig.core.placement().spans.group(GroupId::Table(TableId(1)));
        for node in ["n1", "n2"] {
            most = most.max(group.map_or(0, |group| group.on_node(&node.into()).scheduling));
        }
    }
    assert_eq!((rig.sizes().as_str(), most), ("n1=5 n2=5", 2));
}

// behaviour: scheduling-86
#[test]
fn sizes_are_asked_for_again_after_the_interval_that_is_set_or_the_usual_one() {
    let mut config = heartbeatpb::config::SchedulerConfig::default();
    let interval = |config: &_| super::super::schedule::measure_interval(config).as_secs();
    assert_eq!(interval(&config), 300);
    config.region_count_refresh_interval = heartbeatpb::config::HumanDuration::from_secs(60);
    assert_eq!(interval(&config), 60);
    config.region_count_refresh_interval = heartbeatpb::config::HumanDuration::from_secs(0);
    assert_eq!(interval(&config), 300);

    let mut rig = Rig::loaded(|config| {
        config.scheduler.enable_table_across_nodes = true;
        config.scheduler.region_count_refresh_interval = heartbeatpb::config::HumanDuration::from_secs(60);
    });
    let mut asked = Vec::new();
    for minute in 0..4 {
        for _ in 0..4 {
            rig.handles(&[0.1]);
            rig.tick(100);
            for (question, _) in rig.questions() {
                asked.push(minute);
                let answer =
                    if minute == 1 { Err("no connection".to_owned()) } else { Ok(Default::default()) };
                rig.core.on_points(question, answer, rig.now, &mut rig.out);
            }
        }
    }
    assert!((3..=6).contains(&asked.len()) && asked.last() == Some(&3), "once a minute: {asked:?}");
}

#[test]
fn nothing_is_divided_before_the_checkpoint_has_moved_and_what_cannot_be_divided_is_left_alone() {
    let mut rig = Rig::working_with(1, by_traffic);
    for _ in 0..10 {
        let hot = TableSpanStatus { event_size_per_second: 50.0 * MIB, ..status(2, Working, 100) };
        rig.report("n1", &[hot], 100, 7);
        rig.tick(15_000);
    }
    assert!(rig.questions().is_empty(), "a division may be why it was started again");
    let mut rig = Rig::loaded(by_traffic);
    for _ in 0..3 {
        rig.handles(&[50.0]);
    }
    let asked = rig.questions();
    assert_eq!(asked.len(), 1);
    rig.cut(asked[0].0, &[]);
    for _ in 0..10 {
        rig.handles(&[50.0]);
    }
    assert_eq!((rig.questions(), rig.parts()), (vec![], 1), "not asked for again so soon");
    for _ in 0..11 {
        rig.handles(&[50.0]);
    }
    assert_eq!(rig.questions().len(), 1, "some day it may have grown a key");
}

// behaviour: maintainer-69
#[test]
fn parts_follow_the_traffic_and_are_one_table_again_when_it_is_gone() {
    let mut rig = Rig::loaded(by_traffic);
    for _ in 0..3 {
        rig.handles(&[12.0]);
    }
    let asked = rig.questions();
    rig.cut(asked[0].0, &[1, 2, 3]);
    assert_eq!(rig.sizes(), "n1=2 n2=2");

    // Everything that is hot is on one node: after three samples a part leaves it.
    let hot = rig.running()[0].0.clone();
    let mut more = [6.0, 1.5].into_iter();
    let uneven: Vec<f32> =
        rig.running().iter().map(|(node, _)| if *node == hot { more.next().unwrap() } else { 0.5 }).collect();
    for _ in 0..2 {
        rig.handles(&uneven);
        assert_eq!(rig.sizes(), "n1=2 n2=2");
    }
    rig.handles(&uneven);
    rig.come_to_rest();
    assert_eq!(rig.core.placement().spans.size_by_node(&hot), 1, "{}", rig.sizes());

    // Hardly anything is left: the parts are brought together and joined.
    let mut history = Vec::new();
    for _ in 0..10 {
        rig.handles(&[0.2]);
        rig.come_to_rest();
        history.push(rig.parts());
    }
    assert_eq!(history.last(), Some(&1), "{history:?}");
    assert!(history.iter().take(2).all(|parts| *parts == 4), "only after three samples: {history:?}");
    for _ in 0..5 {
        rig.handles(&[0.2]);
        assert!(
            rig.questions().is_empty() && rig.core.placement().operators.is_empty(),
            "it has come to rest"
        );
    }
}

#[test]
fn a_node_that_joins_takes_parts_and_what_a_dead_one_had_is_placed_again() {
    let mut rig = Rig::loaded(by_traffic);
    for _ in 0..3 {
        rig.handles(&[12.0]);
    }
    let asked = rig.questions();
    rig.cut(asked[0].0, &[1, 2, 3]);
    rig.nodes(&["n1", "n2", "n3"]);
    rig.answer("n3", vec![]);
    for _ in 0..4 {
        rig.handles(&[4.0]);
        rig.come_to_rest();
    }
    let asked = rig.questions();
    assert!(
        rig.core.placement().spans.size_by_node(&"n3".into()) > 0 || !asked.is_empty(),
        "{}",
        rig.sizes()
    );
    rig.nodes(&["n1", "n3"]);
    rig.come_to_rest();
    assert_eq!(rig.core.placement().spans.size_by_node(&"n2".into()), 0);
    assert_eq!(rig.core.placement().spans.count(Standing::Absent), 0);
    let spans: Vec<_> =
        rig.core.placement().spans.by_table(TableId(1)).map(|span| span.span.clone()).collect();
    assert!(replica::holes(TableId(1), &spans).is_empty());
}
