//! The basic scheduler: what nobody runs goes to whoever has least to do.

use std::time::Duration;

use heartbeatpb::DispatcherId;
use replica::{GroupId, GroupIndex, Standing};

use crate::load::{Load, Loads};
use crate::view::{Decision, Scheduler, View};

/// Time between two looks.
pub const INTERVAL: Duration = Duration::from_millis(500);
/// Time to the next look when operators use up most of the budget.
pub const SHORT_OF_BUDGET: Duration = Duration::from_millis(100);

/// Places absent spans (scheduling §7.2): parts of divided tables first, each table spread over the
/// nodes with a ceiling per node, then whole tables with what is left of the budget.
#[derive(Clone, Debug)]
pub struct Basic {
    /// Operators that may run at once.
    batch: usize,
    /// Parts of one table that may start on one node at once.
    ceiling: usize,
}

impl Basic {
    /// A scheduler with a budget of `batch` operators, and a `ceiling` of starting parts per table and node.
    #[must_use]
    pub fn new(batch: usize, ceiling: usize) -> Self {
        Self { batch: batch.max(1), ceiling: ceiling.max(1) }
    }

    fn place(
        &self,
        id: GroupId,
        group: &GroupIndex,
        budget: usize,
        view: &View<'_>,
        out: &mut Vec<Decision>,
    ) {
        let ceiling = match id {
            GroupId::Default => None,
            GroupId::Table(_) => Some(self.ceiling),
        };
        let mut loads = loads(id, group, view);
        let free = group.absent().filter(|span| !(view.is_occupied)(*span));
        for span in free.take(budget) {
            let Some(dest) = loads.place(ceiling) else { break };
            out.push(Decision::Add { span, dest });
        }
    }
}

fn loads(id: GroupId, group: &GroupIndex, view: &View<'_>) -> Loads {
    let count = view.candidates().count();
    let seed = match id {
        GroupId::Default => 0,
        GroupId::Table(table) => usize::try_from(table.0.unsigned_abs()).unwrap_or(0),
    };
    let of = |(position, node): (usize, &heartbeatpb::NodeId)| Load {
        starting: group.on_node(node).scheduling,
        spans: view.spans.size_by_node(node),
        rank: (position + seed) % count,
        node: node.clone(),
    };
    view.candidates().enumerate().map(of).collect()
}

impl Scheduler for Basic {
    fn name(&self) -> &'static str {
        "basic-scheduler"
    }

    fn tick(&mut self, view: &View<'_>, out: &mut Vec<Decision>) -> Duration {
        let budget = self.batch.saturating_sub(view.operators);
        if budget == 0 || view.spans.count(Standing::Absent) == 0 {
            return INTERVAL;
        }
        // Waits until there is room for a good many: small portions would be spread badly.
        if budget < self.batch / 2 {
            return SHORT_OF_BUDGET;
        }
        let before = out.len();
        let left = |out: &Vec<Decision>| budget - (out.len() - before);
        for (id, group) in view.spans.groups().filter(|(id, _)| *id != GroupId::Default) {
            self.place(id, group, left(out), view, out);
        }
        if let Some((id, group)) = view.spans.groups().find(|(id, _)| *id == GroupId::Default) {
            self.place(id, group, left(out), view, out);
        }
        INTERVAL
    }
}

/// A view needs to know who is occupied; nobody is.
#[must_use]
pub fn nobody_occupied(_: DispatcherId) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::time::Instant;

    use heartbeatpb::{NodeId, SchemaId, TableId, TableSpan, Ts};
    use replica::{SpanReplica, SpanSet};

    use super::*;

    fn id(n: u64) -> DispatcherId {
        DispatcherId::new(0, n)
    }

    fn tables(count: u64) -> SpanSet {
        let mut spans = SpanSet::new(SpanReplica::absent(
            DispatcherId::new(1, 1),
            SchemaId::DDL,
            TableSpan::ddl(),
            Ts(1),
        ));
        for n in 1..=count {
            spans.add_table(id(n), SchemaId(1), TableId(n.cast_signed()), true, Ts(1));
        }
        spans
    }

    /// `count` parts of one table.
    fn parts(spans: &mut SpanSet, table: i64, count: u8) {
        for n in 0..count {
            let start = if n == 0 { vec![] } else { vec![n] };
            let end = if n + 1 == count { vec![] } else { vec![n + 1] };
            let range = TableSpan { keyspace_id: 0, table: TableId(table), start, end };
            let id = DispatcherId::new(table.unsigned_abs(), u64::from(n) + 1);
            spans.add_absent(SpanReplica::absent(id, SchemaId(1), range, Ts(1)));
        }
    }

    fn nodes(names: &[&str]) -> BTreeSet<NodeId> {
        names.iter().map(|name| NodeId::from(*name)).collect()
    }

    fn decide(
        scheduler: &mut Basic,
        spans: &SpanSet,
        on: &[&str],
        operators: usize,
    ) -> (Vec<Decision>, Duration) {
        let nodes = nodes(on);
        let node = NodeId::from("draining");
        let draining = crate::Draining { node: &node, epoch: 1, in_flight: 0, is_own: false };
        let view = View {
            spans,
            nodes: &nodes,
            draining: Some(draining),
            is_paused: false,
            operators,
            is_occupied: &nobody_occupied,
            now: Instant::now(),
        };
        let mut out = Vec::new();
        let next = scheduler.tick(&view, &mut out);
        (out, next)
    }

    fn counts(decisions: &[Decision]) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for decision in decisions {
            let (Decision::Add { dest, .. } | Decision::Move { dest, .. }) = decision else {
                panic!("{decision:?}")
            };
            *counts.entry(dest.to_string()).or_insert(0) += 1;
        }
        counts
    }

    fn apply(spans: &mut SpanSet, decisions: &[Decision]) {
        for decision in decisions {
            let (Decision::Add { span, dest } | Decision::Move { span, dest, .. }) = decision else {
                panic!("{decision:?}")
            };
            spans.bind(*span, dest.clone());
        }
    }

    // behaviour: scheduling-101, maintainer-66
    #[test]
    fn ten_tables_with_a_batch_of_nine_go_to_three_nodes_evenly_and_one_waits() {
        let (decisions, next) = decide(&mut Basic::new(9, 1), &tables(10), &["a", "b", "c"], 0);
        assert_eq!(counts(&decisions).into_values().collect::<Vec<_>>(), [3, 3, 3]);
        assert_eq!(next, INTERVAL);
    }

    #[test]
    fn single_tables_one_after_the_other_go_to_different_nodes() {
        let mut spans = tables(0);
        for n in 1..=9 {
            spans.add_table(id(n), SchemaId(1), TableId(n.cast_signed()), true, Ts(1));
            let (decisions, _) = decide(&mut Basic::new(100, 1), &spans, &["a", "b", "c"], 0);
            assert_eq!(decisions.len(), 1);
            apply(&mut spans, &decisions);
            spans.mark_replicating(id(n));
        }
        for node in ["a", "b", "c"] {
            assert_eq!(spans.size_by_node(&node.into()), 3);
        }
    }

    #[test]
    fn a_draining_node_takes_nothing_and_without_nodes_nothing_is_decided() {
        let (decisions, _) = decide(&mut Basic::new(100, 1), &tables(4), &["a", "draining"], 0);
        assert_eq!(counts(&decisions), [("a".to_owned(), 4)].into());
        assert!(decide(&mut Basic::new(100, 1), &tables(4), &["draining"], 0).0.is_empty());
        assert!(decide(&mut Basic::new(100, 1), &tables(4), &[], 0).0.is_empty());
    }

    #[test]
    fn operators_use_the_budget_up() {
        assert_eq!(decide(&mut Basic::new(10, 1), &tables(20), &["a"], 5).0.len(), 5);
        let (decisions, next) = decide(&mut Basic::new(10, 1), &tables(20), &["a"], 6);
        assert_eq!((decisions.len(), next), (0, SHORT_OF_BUDGET));
        let (decisions, next) = decide(&mut Basic::new(10, 1), &tables(20), &["a"], 10);
        assert_eq!((decisions.len(), next), (0, INTERVAL));
    }

    // behaviour: scheduling-112
    #[test]
    fn parts_of_a_table_start_few_at_a_time_on_each_node() {
        let mut spans = tables(0);
        parts(&mut spans, 7, 10);
        let mut basic = Basic::new(1000, 2);
        let (decisions, _) = decide(&mut basic, &spans, &["a", "b", "c"], 0);
        assert_eq!(counts(&decisions).into_values().collect::<Vec<_>>(), [2, 2, 2]);
        apply(&mut spans, &decisions);
        assert!(decide(&mut basic, &spans, &["a", "b", "c"], 6).0.is_empty(), "all nodes are busy");
        for decision in &decisions {
            let (Decision::Add { span, .. } | Decision::Move { span, .. }) = decision else {
                panic!("{decision:?}")
            };
            spans.mark_replicating(*span);
        }
        assert_eq!(decide(&mut basic, &spans, &["a", "b", "c"], 0).0.len(), 4);
    }

    #[test]
    fn one_view_gives_one_answer() {
        let spans = tables(7);
        let answer = || decide(&mut Basic::new(100, 1), &spans, &["a", "b"], 0);
        assert_eq!(answer(), answer());
    }
}
