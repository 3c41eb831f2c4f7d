//! Uneven traffic of one table on the nodes, and what evens it out (scheduling §8.4).

use heartbeatpb::NodeId;

use super::parts::Parts;
use super::{Look, Part};
use crate::view::Decision;

/// Parts that are moved at once.
const MOVES: usize = 4;

/// What is wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Cause {
    /// A node is idle.
    Idle,
    /// A node is busy.
    Busy,
    /// One is idle and another one busy.
    Both,
}

/// An imbalance that has lasted for some rounds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Imbalance {
    cause: Cause,
    idlest: NodeId,
    busiest: NodeId,
    rounds: u32,
}

impl Imbalance {
    fn new(cause: Cause, idlest: &NodeId, busiest: &NodeId) -> Self {
        Self { cause, idlest: idlest.clone(), busiest: busiest.clone(), rounds: 1 }
    }

    /// The imbalance of a further round. With other nodes than before it is another one.
    fn after(self, now: Self) -> Self {
        let (idle, busy) = (self.idlest == now.idlest, self.busiest == now.busiest);
        let cause = match (self.cause, idle, busy) {
            (Cause::Both, true, true) => Cause::Both,
            (Cause::Both | Cause::Idle, true, _) => Cause::Idle,
            (Cause::Both | Cause::Busy, _, true) => Cause::Busy,
            (Cause::Both | Cause::Idle | Cause::Busy, _, _) => return now,
        };
        Self { cause, rounds: self.rounds + 1, ..self }
    }
}

impl Look<'_> {
    /// Once an imbalance has lasted, moves parts from the busiest node to the idlest one, or divides a part over
    /// both when none fits.
    pub(super) fn even_out(&self, state: &mut Parts, out: &mut Vec<Decision>) {
        // One round of reports counts once, however often it is looked at.
        if !std::mem::take(&mut state.heard) {
            return;
        }
        let order = self.by_traffic();
        let (Some(idlest), Some(busiest)) = (order.first().copied(), order.last().copied()) else { return };
        let Some(cause) = self.cause(idlest, busiest) else {
            state.imbalance = None;
            return;
        };
        let now = Imbalance::new(cause, idlest, busiest);
        let imbalance = match state.imbalance.take() {
            Some(before) => before.after(now),
            None => now,
        };
        if imbalance.rounds < self.settings.rounds {
            state.imbalance = Some(imbalance);
            return;
        }
        self.relieve(busiest, idlest, out);
    }

    fn cause(&self, idlest: &NodeId, busiest: &NodeId) -> Option<Cause> {
        let worth_it = self.nodes.values().flatten().any(|sample| *sample > self.settings.min_traffic);
        let (low, high) = (self.nodes.get(idlest)?, self.nodes.get(busiest)?);
        if !worth_it {
            return None;
        }
        let share = |sample: u64, n: usize, share: f64| (as_float(sample), self.average(n) * share);
        let idle = low.iter().enumerate().all(|(n, sample)| {
            let (sample, limit) = share(*sample, n, self.settings.min_share);
            sample <= limit
        });
        let busy = high.iter().enumerate().all(|(n, sample)| {
            let (value, limit) = share(*sample, n, self.settings.max_share);
            value >= limit && *sample >= self.settings.min_traffic
        });
        match (idle, busy) {
            (true, true) => Some(Cause::Both),
            (true, false) => Some(Cause::Idle),
            (false, true) => Some(Cause::Busy),
            (false, false) => None,
        }
    }

    fn average(&self, n: usize) -> f64 {
        as_float(self.total[n]) / as_float(self.nodes.len() as u64)
    }

    fn relieve(&self, busiest: &NodeId, idlest: &NodeId, out: &mut Vec<Decision>) {
        let average = self.total[0] / (self.nodes.len() as u64).max(1);
        let lacking = average.saturating_sub(self.traffic_on(idlest));
        let excess = self.traffic_on(busiest).saturating_sub(average);
        let mut parts: Vec<&Part<'_>> = self.parts.iter().filter(|part| part.node == Some(busiest)).collect();
        parts.sort_by_key(|part| (part.traffic(), part.id()));
        let (mut gap, mut moved) = (lacking.min(excess), 0);
        for part in parts.iter().rev() {
            if gap == 0 || moved == MOVES {
                break;
            }
            if part.traffic() <= gap {
                gap -= part.traffic();
                moved += 1;
                out.extend(part.moved_to(idlest));
            }
        }
        if moved > 0 {
            return;
        }
        let gap = lacking.min(excess);
        let fitting = parts.iter().rev().find(|part| part.traffic() <= gap.saturating_mul(2));
        let Some(part) = fitting.or(parts.first()).filter(|part| part.replica.splittable) else { return };
        out.push(Decision::Split {
            span: part.id(),
            on: busiest.clone(),
            pieces: 2,
            method: part.gauge.method(),
            nodes: vec![idlest.clone(), busiest.clone()],
        });
    }
}

/// Traffic for a comparison of shares.
#[expect(clippy::cast_precision_loss, reason = "a share does not need the last bits of a sum of bytes")]
fn as_float(bytes: u64) -> f64 {
    bytes as f64
}
