//! Joining small neighbours, and moves that make neighbours of what could be joined (scheduling §8.5, §8.6).

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use heartbeatpb::NodeId;

use super::{Look, Part, portions};
use crate::view::Decision;

/// Merges of one table that are begun at once.
const MERGES: usize = 8;
/// Moves that make merges possible and are begun at once; an exchange may add one.
const MOVES: usize = 16;

/// What parts have together.
#[derive(Clone, Copy, Default)]
struct Sum {
    units: u64,
    traffic: u64,
}

impl Look<'_> {
    /// Neighbours that can be joined; empty when there are none. `None` when nothing is to be joined at all: the
    /// changefeed is too far behind, or there are not too many parts.
    pub(super) fn runs(&self, lag: Option<Duration>) -> Option<Vec<Range<usize>>> {
        if lag.is_none_or(|lag| lag > self.settings.max_lag) {
            return None;
        }
        let by_traffic = portions(self.total[0], self.settings.write_threshold);
        let by_size = portions(self.units, self.settings.size_threshold);
        if self.parts.len() <= 2 * by_traffic.max(by_size).max(self.nodes.len()) {
            return None;
        }
        let (mut runs, mut start, mut sum) = (Vec::new(), 0, Sum::default());
        for (n, part) in self.parts.iter().enumerate() {
            let with = sum.and(part);
            let goes_on =
                n > start && part.node.is_some() && part.node == self.parts[start].node && self.fits(with);
            if goes_on {
                sum = with;
                continue;
            }
            if n - start > 1 {
                runs.push(start..n);
            }
            (start, sum) = (n, Sum::default().and(part));
        }
        if self.parts.len() - start > 1 {
            runs.push(start..self.parts.len());
        }
        Some(runs)
    }

    /// Whether so much may be in one span that was joined: with a margin, so that it is not divided at once.
    fn fits(&self, sum: Sum) -> bool {
        let (size, write) = (self.settings.size_threshold, self.settings.write_threshold);
        (size == 0 || sum.units <= size / 4 * 3) && (write == 0 || sum.traffic <= write / 4 * 3)
    }

    /// Joins neighbours; without any, moves parts so that there will be some.
    pub(super) fn join(&self, runs: &[Range<usize>], batch: usize, out: &mut Vec<Decision>) {
        if runs.is_empty() {
            Moves::new(self).find(out);
            return;
        }
        for run in runs.iter().take(batch.min(MERGES)) {
            let sources = self.parts[run.clone()].iter().map(Part::id).collect();
            out.push(Decision::Merge { sources });
        }
    }
}

impl Sum {
    fn and(self, part: &Part<'_>) -> Self {
        Self { units: self.units + part.gauge.units, traffic: self.traffic + part.traffic() }
    }
}

/// Moves that are being put together.
struct Moves<'l, 'v> {
    look: &'l Look<'v>,
    order: Vec<&'v NodeId>,
    /// Where each part is, or is to go.
    at: Vec<Option<&'v NodeId>>,
    /// Parts that moves rely on.
    selected: Vec<bool>,
    loads: BTreeMap<&'v NodeId, u64>,
    /// The least and the most that a node had before.
    bounds: (u64, u64),
    moves: usize,
}

impl<'l, 'v> Moves<'l, 'v> {
    fn new(look: &'l Look<'v>) -> Self {
        let loads: BTreeMap<&'v NodeId, u64> =
            look.nodes.iter().map(|(node, sums)| (*node, sums[0])).collect();
        let least = loads.values().min().copied().unwrap_or(0);
        let most = loads.values().max().copied().unwrap_or(0);
        Self {
            order: look.by_traffic(),
            at: look.parts.iter().map(|part| part.node).collect(),
            selected: vec![false; look.parts.len()],
            loads,
            bounds: (least, most),
            look,
            moves: 0,
        }
    }

    fn find(&mut self, out: &mut Vec<Decision>) {
        let (Some(idlest), Some(busiest)) = (self.order.first().copied(), self.order.last().copied()) else {
            return;
        };
        if !self.at.contains(&Some(idlest)) {
            // A seed: with a part on it the node takes part in what follows.
            let seed = self.look.parts.iter().find(|part| part.node == Some(busiest) && busiest != idlest);
            out.extend(seed.and_then(|part| part.moved_to(idlest)));
            return;
        }
        for dest in self.order.clone() {
            for n in 0..self.at.len() {
                if self.moves >= MOVES {
                    return;
                }
                self.consider(n, dest, out);
            }
        }
    }

    /// Moves a part to where it could be joined with a neighbour, alone or in exchange for another one.
    fn consider(&mut self, n: usize, dest: &'v NodeId, out: &mut Vec<Decision>) {
        let Some(origin) = self.at[n].filter(|node| *node != dest && !self.selected[n]) else { return };
        let partners = self.partners(n, dest);
        if partners.is_empty() {
            return;
        }
        if self.keeps_balance(&[(n, origin, dest)]) {
            self.carry(n, origin, dest, &partners, out);
            return;
        }
        let in_exchange = (0..self.at.len()).find(|other| {
            self.at[*other] == Some(dest)
                && !self.selected[*other]
                && *other != n
                && !partners.contains(other)
                && self.keeps_balance(&[(n, origin, dest), (*other, dest, origin)])
        });
        if let Some(other) = in_exchange {
            self.carry(n, origin, dest, &partners, out);
            let partners = self.partners(other, origin);
            self.carry(other, dest, origin, &partners, out);
        }
    }

    fn carry(
        &mut self,
        n: usize,
        origin: &'v NodeId,
        dest: &'v NodeId,
        partners: &[usize],
        out: &mut Vec<Decision>,
    ) {
        let traffic = self.look.parts[n].traffic();
        if let Some(load) = self.loads.get_mut(origin) {
            *load = load.saturating_sub(traffic);
        }
        *self.loads.entry(dest).or_default() += traffic;
        self.at[n] = Some(dest);
        self.selected[n] = true;
        for partner in partners {
            self.selected[*partner] = true;
        }
        self.moves += 1;
        out.extend(self.look.parts[n].moved_to(dest));
    }

    /// Neighbours on a node, or on their way there, that a part could be joined with.
    fn partners(&self, n: usize, dest: &NodeId) -> Vec<usize> {
        let mut sum = Sum::default().and(&self.look.parts[n]);
        let mut partners = Vec::new();
        for neighbour in [n.checked_sub(1), Some(n + 1)].into_iter().flatten() {
            let Some(part) = self.look.parts.get(neighbour) else { continue };
            let with = sum.and(part);
            if self.at[neighbour] == Some(dest) && self.look.fits(with) {
                sum = with;
                partners.push(neighbour);
            }
        }
        partners
    }

    /// Whether no node is left with less, or with more, than some node had before.
    fn keeps_balance(&self, moves: &[(usize, &'v NodeId, &'v NodeId)]) -> bool {
        let mut loads = self.loads.clone();
        for (n, origin, dest) in moves {
            let traffic = self.look.parts[*n].traffic();
            if let Some(load) = loads.get_mut(origin) {
                *load = load.saturating_sub(traffic);
            }
            *loads.entry(*dest).or_default() += traffic;
        }
        loads.values().all(|load| (self.bounds.0..=self.bounds.1).contains(load))
    }
}
