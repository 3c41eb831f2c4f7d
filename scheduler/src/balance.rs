//! Gives every node its share of whole tables.

use std::collections::BTreeSet;
use std::time::Duration;

use heartbeatpb::{DispatcherId, NodeId};
use replica::{GroupId, GroupIndex, Standing};

use crate::drain::shortage;
use crate::view::{Decision, Scheduler, View};

/// Moves whole tables from nodes with more than their share to nodes with less (scheduling §7.4). It waits until
/// nothing else changes: no span without a home, no operator, no node being emptied now or lately.
#[derive(Clone, Debug)]
pub struct Balance {
    batch: usize,
    interval: Duration,
}

impl Balance {
    /// A scheduler that looks every `interval` and starts at most `batch` moves.
    #[must_use]
    pub fn new(batch: usize, interval: Duration) -> Self {
        Self { batch: batch.max(1), interval }
    }

    fn even_out(&self, group: &GroupIndex, view: &View<'_>, out: &mut Vec<Decision>) {
        let missing = shortage(group, view.candidates());
        if missing == 0 {
            return;
        }
        let mut nodes: BTreeSet<(usize, &NodeId)> =
            view.candidates().map(|node| (group.on_node(node).spans, node)).collect();
        let total: usize = nodes.iter().map(|(count, _)| count).sum();
        let share = total.checked_div(nodes.len()).unwrap_or(0);
        // Each donor is walked once: a span that cannot go is not looked at again.
        let mut stocks: std::collections::BTreeMap<&NodeId, Stock<'_>> =
            view.candidates().map(|node| (node, stock(node, view))).collect();
        let mut left = missing.min(self.batch);
        while left > 0 {
            let (Some(taker), Some(giver)) = (nodes.first().copied(), nodes.last().copied()) else { break };
            if taker.0 >= share || giver.0 <= share {
                break;
            }
            let Some(span) = stocks.get_mut(giver.1).and_then(Iterator::next) else {
                nodes.remove(&giver);
                continue;
            };
            out.push(Decision::Move { span, from: giver.1.clone(), dest: taker.1.clone() });
            nodes.remove(&taker);
            nodes.remove(&giver);
            nodes.insert((taker.0 + 1, taker.1));
            nodes.insert((giver.0 - 1, giver.1));
            left -= 1;
        }
    }
}

/// Whether nothing else changes: no span without a home, no operator, no node being emptied now or lately.
pub(crate) fn is_quiet(view: &View<'_>) -> bool {
    !view.is_paused
        && view.draining.is_none()
        && view.operators == 0
        && view.spans.count(Standing::Absent) == 0
}

type Stock<'a> = Box<dyn Iterator<Item = DispatcherId> + 'a>;

/// What a node could give.
fn stock<'a>(node: &'a NodeId, view: &View<'a>) -> Stock<'a> {
    let (spans, is_occupied) = (view.spans, view.is_occupied);
    let free = spans
        .ids_on_node_in(node, GroupId::Default)
        .filter(move |span| spans.is_replicating(*span) && !is_occupied(*span));
    Box::new(free)
}

impl Scheduler for Balance {
    fn name(&self) -> &'static str {
        "balance-scheduler"
    }

    fn tick(&mut self, view: &View<'_>, out: &mut Vec<Decision>) -> Duration {
        if let Some(group) = view.spans.group(GroupId::Default).filter(|_| is_quiet(view)) {
            self.even_out(group, view, out);
        }
        self.interval
    }
}
