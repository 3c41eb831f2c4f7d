//! One look at a table in parts: the order in which steps are considered (scheduling §8.3).

use std::collections::BTreeMap;
use std::time::Duration;

use heartbeatpb::{NodeId, TableId};

use super::traffic::Imbalance;
use super::{Board, HOT, Look, Part, portions};
use crate::planner::{MAX_RANGES, Method};
use crate::view::{Decision, View};

/// What is remembered of a table in parts between two looks.
#[derive(Clone, Debug, Default)]
pub(super) struct Parts {
    /// Whether a part reported since the last look at the traffic.
    pub(super) heard: bool,
    pub(super) imbalance: Option<Imbalance>,
    /// Looks in a row at which parts could have been joined.
    pub(super) patience: u32,
}

impl Board {
    /// Decides the next step for a table whose parts are all at rest.
    pub(super) fn balance_table(
        &mut self,
        table: TableId,
        view: &View<'_>,
        lag: Option<Duration>,
        batch: usize,
        out: &mut Vec<Decision>,
    ) {
        let look = Look::new(table, view, &self.settings, &self.gauges);
        let state = self.tables.entry(table).or_default();
        let patience = std::mem::take(&mut state.patience);
        let silent = look.parts.iter().any(|part| part.gauge.window.contains(&0));
        let taken = look.parts.iter().any(|part| (view.is_occupied)(part.id()));
        if silent || taken || look.nodes.is_empty() {
            return;
        }
        if look.parts.windows(2).any(|pair| !pair[0].replica.span.is_followed_by(&pair[1].replica.span)) {
            self.torn.insert(table);
            return;
        }
        let before = out.len();
        look.split(batch, out);
        if out.len() == before {
            look.fold(batch, out);
        }
        if out.len() == before {
            look.even_out(state, out);
        }
        if out.len() == before
            && let Some(runs) = look.runs(lag)
        {
            state.patience = patience + 1;
            if state.patience >= look.settings.patience {
                look.join(&runs, batch, out);
            }
        }
    }
}

impl Look<'_> {
    /// Divides parts that are too hot or too large, where they are.
    fn split(&self, batch: usize, out: &mut Vec<Decision>) {
        let settings = self.settings;
        let of = |part: &Part<'_>| {
            let (load, threshold, method) = if settings.write_threshold > 0 && part.gauge.score > HOT {
                (part.traffic(), settings.write_threshold, part.gauge.method())
            } else if settings.size_threshold > 0 && part.gauge.units > settings.size_threshold {
                (part.gauge.units, settings.size_threshold, Method::BySize)
            } else {
                return None;
            };
            let on = part.node.cloned().filter(|_| part.replica.splittable)?;
            let pieces = portions(load, threshold).clamp(2, MAX_RANGES);
            Some(Decision::Split { span: part.id(), nodes: vec![on.clone(); pieces], on, pieces, method })
        };
        out.extend(self.parts.iter().filter_map(of).take(batch));
    }

    /// Makes a table that is small as a whole one span again: by one merge when it is on one node, otherwise by
    /// bringing it to one node first.
    fn fold(&self, batch: usize, out: &mut Vec<Decision>) {
        let settings = self.settings;
        let configured = settings.size_threshold > 0 || settings.write_threshold > 0;
        let small = settings.size_threshold == 0 || self.units <= settings.size_threshold / 2;
        let cool = settings.write_threshold == 0
            || self.total.iter().all(|sum| *sum <= settings.write_threshold / 2);
        let placed = self.parts.iter().all(|part| part.node.is_some());
        if !(configured && small && cool && placed) || self.parts.len() < 2 {
            return;
        }
        let mut counts: BTreeMap<&NodeId, usize> = BTreeMap::new();
        for node in self.parts.iter().filter_map(|part| part.node) {
            *counts.entry(node).or_default() += 1;
        }
        // Most parts, then most traffic, then the first: the next look chooses the same one.
        let rank = |node: &NodeId, count: usize| (count, self.traffic_on(node));
        let best = counts.iter().rev().max_by_key(|(node, count)| rank(node, **count));
        let Some((target, _)) = best else { return };
        if counts.len() == 1 {
            out.push(Decision::Merge { sources: self.parts.iter().map(Part::id).collect() });
            return;
        }
        let away = self.parts.iter().filter(|part| part.node != Some(target));
        out.extend(away.filter_map(|part| part.moved_to(target)).take(batch));
    }
}

impl Part<'_> {
    /// The decision to move it.
    pub(super) fn moved_to(&self, dest: &NodeId) -> Option<Decision> {
        let from = self.node.cloned()?;
        Some(Decision::Move { span: self.id(), from, dest: dest.clone() })
    }
}
