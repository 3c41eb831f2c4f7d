//! Histories of members that hear each other or do not.

use testkit::Random;

use super::*;

const AFTER: Duration = Duration::from_secs(3);
const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

/// Members that greet each other, and what is cut between them, in milliseconds.
struct Cluster {
    base: Instant,
    now: u64,
    nodes: BTreeMap<NodeId, Reach>,
    /// From and to.
    cut: BTreeSet<(NodeId, NodeId)>,
    /// These do not run.
    stopped: BTreeSet<NodeId>,
    told: Vec<(u64, NodeId, ReachChange)>,
}

impl Cluster {
    fn new(size: usize) -> Self {
        let base = Instant::now();
        let members: BTreeSet<NodeId> = NAMES[..size].iter().map(|name| NodeId::from(*name)).collect();
        let node = |id: &NodeId| {
            let mut reach = Reach::new(id.clone(), AFTER, base);
            reach.on_members(&members);
            (id.clone(), reach)
        };
        let nodes = members.iter().map(node).collect();
        let mut cluster =
            Self { base, now: 0, nodes, cut: BTreeSet::new(), stopped: BTreeSet::new(), told: Vec::new() };
        cluster.run(2_000);
        assert!(
            cluster.told.is_empty() && cluster.nodes.values().all(|reach| reach.has_majority(cluster.at()))
        );
        cluster
    }

    fn at(&self) -> Instant {
        self.base + Duration::from_millis(self.now)
    }

    /// Cuts both directions.
    fn cut(&mut self, one: &str, other: &str) {
        self.cut_one_way(one, other);
        self.cut_one_way(other, one);
    }

    fn cut_one_way(&mut self, from: &str, to: &str) {
        self.cut.insert((from.into(), to.into()));
    }

    fn run(&mut self, millis: u64) {
        let end = self.now + millis;
        while self.now < end {
            self.now += 500;
            let at = self.at();
            let runs: Vec<NodeId> =
                self.nodes.keys().filter(|node| !self.stopped.contains(*node)).cloned().collect();
            let said: Vec<(NodeId, Vec<NodeId>)> =
                runs.iter().map(|node| (node.clone(), self.nodes[node].hears(at))).collect();
            for (from, hears) in said {
                for to in runs.iter().filter(|to| **to != from) {
                    if !self.cut.contains(&(from.clone(), to.clone())) {
                        self.nodes.get_mut(to).unwrap().on_greeting(&from, &hears, at);
                    }
                }
            }
            for node in runs {
                let changes = self.nodes.get_mut(&node).unwrap().on_tick(at);
                self.told.extend(changes.into_iter().map(|change| (self.now, node.clone(), change)));
            }
        }
    }

    /// Whom a node has given up.
    fn unreached(&self, node: &str) -> Vec<String> {
        self.nodes[&NodeId::from(node)].unreached().iter().map(ToString::to_string).collect()
    }
}

#[test]
fn who_stops_to_hear_one_a_moment_after_the_other_is_the_one_that_is_cut_off() {
    for later in [500, 1_000] {
        let mut cluster = Cluster::new(3);
        cluster.cut("a", "b");
        cluster.run(later);
        cluster.cut("a", "c");
        cluster.run(10_000);
        assert!(cluster.unreached("a").is_empty(), "{later}: {:?}", cluster.told);
        assert_eq!(
            (cluster.unreached("b"), cluster.unreached("c")),
            (vec!["a".to_owned()], vec!["a".to_owned()])
        );
    }
}

#[test]
fn two_of_three_that_are_cut_off_from_each_other_give_each_other_up_and_the_third_gives_up_nobody() {
    let mut cluster = Cluster::new(3);
    cluster.cut("a", "b");
    cluster.run(2_500);
    assert!(cluster.told.is_empty(), "it may be over in a moment");
    cluster.run(1_000);
    assert_eq!((cluster.unreached("a"), cluster.unreached("b")), (vec!["b".into()], vec!["a".into()]));
    assert!(cluster.unreached("c").is_empty());
    // Mended: trusted again only when it has lasted.
    cluster.cut.clear();
    cluster.run(50_000);
    assert_eq!(cluster.told.len(), 2, "{:?}", cluster.told);
    cluster.run(15_000);
    assert!(cluster.nodes.values().all(|reach| reach.unreached().is_empty()));
    assert_eq!(cluster.told.len(), 4);
}

#[test]
fn a_cut_of_one_direction_is_noticed_by_both() {
    let mut cluster = Cluster::new(3);
    cluster.cut_one_way("a", "b");
    cluster.run(6_000);
    // b hears nothing of a; a hears of b that it does not.
    assert_eq!((cluster.unreached("a"), cluster.unreached("b")), (vec!["b".into()], vec!["a".into()]));
}

#[test]
fn who_is_cut_off_from_everybody_gives_up_nobody_and_is_given_up() {
    let mut cluster = Cluster::new(3);
    cluster.cut("a", "b");
    cluster.cut("a", "c");
    cluster.run(60_000);
    assert!(
        cluster.unreached("a").is_empty() && !cluster.nodes[&NodeId::from("a")].has_majority(cluster.at())
    );
    assert_eq!((cluster.unreached("b"), cluster.unreached("c")), (vec!["a".into()], vec!["a".into()]));
    // Of two nobody can tell which one it is.
    let mut cluster = Cluster::new(2);
    cluster.cut("a", "b");
    cluster.run(60_000);
    assert!(cluster.told.is_empty());
}

#[test]
fn the_smaller_part_of_a_cluster_gives_up_nobody() {
    let mut cluster = Cluster::new(5);
    for one in ["a", "b"] {
        for other in ["c", "d", "e"] {
            cluster.cut(one, other);
        }
    }
    cluster.run(30_000);
    for node in NAMES {
        let expected: &[&str] = if node < "c" { &[] } else { &["a", "b"] };
        assert_eq!(cluster.unreached(node), expected, "{node}");
    }
}

#[test]
fn a_node_that_was_stopped_does_not_take_its_sleep_for_the_silence_of_others() {
    let mut cluster = Cluster::new(3);
    cluster.stopped.insert("a".into());
    cluster.run(20_000);
    assert_eq!(cluster.unreached("b"), ["a"]);
    cluster.stopped.clear();
    cluster.run(60_000 + 5_000);
    assert!(cluster.told.iter().all(|(_, node, _)| *node != NodeId::from("a")), "{:?}", cluster.told);
    assert!(cluster.unreached("b").is_empty());
}

#[test]
fn who_flaps_is_given_up_once_and_who_leaves_is_forgotten() {
    let mut cluster = Cluster::new(3);
    for _ in 0..10 {
        cluster.cut("a", "b");
        cluster.run(4_000);
        cluster.cut.clear();
        cluster.run(10_000);
    }
    assert_eq!(cluster.told.len(), 2, "{:?}", cluster.told);
    let members: BTreeSet<NodeId> = ["a", "c"].map(NodeId::from).into();
    let a = cluster.nodes.get_mut(&NodeId::from("a")).unwrap();
    a.on_members(&members);
    assert!(a.unreached().is_empty());
    let at = cluster.at();
    let a = cluster.nodes.get_mut(&NodeId::from("a")).unwrap();
    a.on_greeting(&"b".into(), &["a".into()], at);
    assert!(!a.hears(at).contains(&"b".into()), "a stranger is not heard");
}

#[test]
fn a_member_that_never_greets_is_not_judged() {
    let mut cluster = Cluster::new(3);
    let members: BTreeSet<NodeId> = ["a", "b", "c", "old"].map(NodeId::from).into();
    for reach in cluster.nodes.values_mut() {
        reach.on_members(&members);
    }
    cluster.run(60_000);
    assert!(cluster.told.is_empty());
}

#[test]
fn whatever_is_cut_nobody_is_given_up_without_a_majority_and_everybody_is_taken_back() {
    for seed in 0..100 {
        let random = &mut Random::new(seed, 2);
        let size = usize::try_from(random.between(2, 5)).unwrap();
        let mut cluster = Cluster::new(size);
        for _ in 0..20 {
            let pick =
                |random: &mut Random| NAMES[usize::try_from(random.between(0, size as u64 - 1)).unwrap()];
            match random.between(0, 5) {
                0 | 1 => {
                    let (one, other) = (pick(random), pick(random));
                    cluster.cut(one, other);
                }
                2 => {
                    let (one, other) = (pick(random), pick(random));
                    cluster.cut_one_way(one, other);
                }
                3 => drop(cluster.stopped.insert(pick(random).into())),
                _ => {
                    cluster.cut.clear();
                    cluster.stopped.clear();
                }
            }
            let before = cluster.told.len();
            cluster.run(random.between(1, 20) * 500);
            let at = cluster.at();
            for (when, node, change) in &cluster.told[before..] {
                let ReachChange::Lost(other) = change else { continue };
                assert_ne!(node, other, "seed {seed}");
                // Whoever gave somebody up at the end of this time still has its majority.
                if *when == cluster.now {
                    assert!(cluster.nodes[node].has_majority(at), "seed {seed}: {node} gives up {other}");
                }
            }
        }
        cluster.cut.clear();
        cluster.stopped.clear();
        cluster.run(70_000);
        for (node, reach) in &cluster.nodes {
            assert!(reach.unreached().is_empty() && reach.has_majority(cluster.at()), "seed {seed}: {node}");
        }
    }
}
