//! Rounds of the schedulers, and the loss of a node.

use std::collections::{BTreeMap, BTreeSet};
use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use heartbeatpb::{DispatcherId, NodeId};
use replica::{SpanSet, Standing};
use scheduler::{Balance, Basic, Decision, Scheduler, View, nobody_occupied};

use crate::Extent;
use crate::clock::{Spent, nanoseconds, per_call, spent};
use crate::report::{Cost, Growth, Point, Report, Unit};
use crate::world::{Layout, TICK, World, nodes};

/// What one round may begin: the product's limits.
const PLACED: usize = 10_000;
const MOVED: usize = 1_024;
/// Ticks, quiet rounds.
const CALLS: u64 = 1_000;

/// Measures rounds.
pub(crate) fn measure(extent: &Extent, report: &mut Report) -> Result<()> {
    let mut costs: BTreeMap<&'static str, Vec<Point>> = BTreeMap::new();
    let mut add = |name, at, ours, naive| costs.entry(name).or_default().push(Point { at, ours, naive });
    for &spans in &extent.spans {
        let mut world = World::settled(Layout::whole(spans))?;
        let ours = per_call(extent.rounds, CALLS, |_| world.rig.pass(TICK));
        let naive = per_call(extent.rounds, 3, |_| drop(black_box(by_node(world.rig.spans()))));
        add(TICK_OF, spans, ours, Some(naive));
        let (ours, naive) = basic(extent, world.rig.spans())?;
        add(BASIC, spans, ours, Some(naive));
        let (quiet, even, naive) = balance(extent, world.rig.spans())?;
        add(QUIET, spans, quiet, Some(naive));
        add(EVEN, spans, even, Some(naive));
        let naive = (spans <= extent.quadratic).then(|| lose_slowly(world.rig.spans()));
        drop(world);
        let limited = lose(spans, None)?;
        let unlimited = lose(spans, usize::try_from(spans).ok())?;
        add(LOSS, spans, nanoseconds(limited.cpu), naive);
        add(LOSS_AT_ONCE, spans, nanoseconds(unlimited.cpu), naive);
    }
    // What visits spans in the order of their random ids pays for each miss of the processor's caches.
    let shown = [
        (TICK_OF, "scan", Growth::Flat(2.0)),
        (BASIC, "scan", Growth::Flat(4.0)),
        (QUIET, "scan", Growth::Flat(2.0)),
        (EVEN, "scan", Growth::Flat(4.0)),
        (LOSS, "count for each span", Growth::Linear(3.5)),
        (LOSS_AT_ONCE, "count for each span", Growth::Linear(3.5)),
    ];
    for (name, naive, growth) in shown {
        let points = costs.remove(name).unwrap_or_default();
        report.cost(Cost { name, unit: Unit::Nanoseconds, of: "spans", naive, points, growth });
    }
    Ok(())
}

const TICK_OF: &str = "tick with nothing to do";
const BASIC: &str = "basic round that places 10,000 spans";
const QUIET: &str = "balance round with nothing to do";
const EVEN: &str = "balance round that moves 1,024 spans";
const LOSS: &str = "loss of a node with a third, 10,000 operators at once";
const LOSS_AT_ONCE: &str = "loss of a node with a third, no limit";

fn view<'a>(spans: &'a SpanSet, nodes: &'a BTreeSet<NodeId>) -> View<'a> {
    View {
        spans,
        nodes,
        draining: None,
        is_paused: false,
        operators: 0,
        is_occupied: &nobody_occupied,
        now: Instant::now(),
    }
}

/// Spans by node, by looking at each.
fn by_node(spans: &SpanSet) -> BTreeMap<Option<&NodeId>, Vec<DispatcherId>> {
    let mut found: BTreeMap<Option<&NodeId>, Vec<DispatcherId>> = BTreeMap::new();
    for (_, span) in spans.iter() {
        found.entry(span.node.as_ref()).or_default().push(span.id);
    }
    found
}

fn basic(extent: &Extent, spans: &SpanSet) -> Result<(f64, f64)> {
    let mut spans = spans.clone();
    let ids: Vec<DispatcherId> = spans.iter().map(|(_, span)| span.id).collect();
    for id in ids.iter().step_by((ids.len() / PLACED).max(1)).take(PLACED) {
        spans.mark_absent(*id);
    }
    let nodes: BTreeSet<NodeId> = nodes(3).into_iter().collect();
    let mut scheduler = Basic::new(PLACED, PLACED);
    let mut placed = 0;
    let ours = per_call(extent.rounds, 1, |_| {
        let mut out = Vec::new();
        scheduler.tick(&view(&spans, &nodes), &mut out);
        placed = out.len();
    });
    ensure!(placed == spans.count(Standing::Absent).min(PLACED), "{placed} spans were placed");
    let naive = per_call(extent.rounds, 1, |_| {
        let mut found = by_node(&spans);
        let absent = found.remove(&None).unwrap_or_default();
        let mut sizes: BTreeSet<(usize, &NodeId)> =
            nodes.iter().map(|node| (found.get(&Some(node)).map_or(0, Vec::len), node)).collect();
        let mut out = Vec::new();
        for span in absent {
            let Some((size, node)) = sizes.pop_first() else { break };
            out.push(Decision::Add { span, dest: node.clone() });
            sizes.insert((size + 1, node));
        }
        drop(black_box(out));
    });
    Ok((ours, naive))
}

fn balance(extent: &Extent, spans: &SpanSet) -> Result<(f64, f64, f64)> {
    let mut scheduler = Balance::new(MOVED, Duration::from_secs(15));
    let three: BTreeSet<NodeId> = nodes(3).into_iter().collect();
    let four: BTreeSet<NodeId> = nodes(4).into_iter().collect();
    let mut moved = 0;
    let quiet = per_call(extent.rounds, CALLS, |_| {
        let mut out = Vec::new();
        scheduler.tick(&view(spans, &three), &mut out);
        moved += out.len();
    });
    ensure!(moved == 0, "even nodes were evened out");
    let even = per_call(extent.rounds, 1, |_| {
        let mut out = Vec::new();
        scheduler.tick(&view(spans, &four), &mut out);
        moved = out.len();
    });
    ensure!(moved == MOVED.min(spans.len() / 4), "{moved} spans are moved");
    let naive = per_call(extent.rounds, 1, |_| {
        let found = by_node(spans);
        let share = spans.len() / four.len();
        let spare = found.values().flat_map(|ids| ids.iter().skip(share));
        drop(black_box(spare.take(MOVED).copied().collect::<Vec<_>>()));
    });
    Ok((quiet, even, naive))
}

/// One of three nodes is gone; until every span has a node that runs it.
fn lose(spans: u64, limit: Option<usize>) -> Result<Spent> {
    let mut world = World::settled(Layout::whole(spans))?;
    if let Some(limit) = limit {
        world.rig.limit_operators(limit);
    }
    // Time for whatever a start leaves behind.
    world.rig.pass(Duration::from_secs(1));
    world.nodes.truncate(2);
    let alive: BTreeSet<NodeId> = world.nodes.iter().cloned().collect();
    let (mut total, ()) = spent(|| world.rig.nodes(alive));
    let mut placed = 0;
    let deadline = 10 + 10 * spans / 1_000;
    for _ in 0..deadline {
        let (time, created) = world.answer();
        total += time;
        placed += created;
        let done = world.rig.spans().count(Standing::Replicating) == world.rig.spans().len();
        if done && world.rig.operators().is_empty() {
            ensure!(placed >= usize::try_from(spans / 3)?, "only {placed} dispatchers were created");
            return Ok(total);
        }
        total += spent(|| world.rig.pass(TICK)).0;
    }
    anyhow::bail!("{} spans have no node that runs them", world.rig.spans().count(Standing::Absent));
}

/// For each span of the lost node the others' spans are counted anew.
fn lose_slowly(spans: &SpanSet) -> f64 {
    let alive = nodes(2);
    let mut homes: Vec<Option<&NodeId>> =
        spans.iter().map(|(_, span)| span.node.as_ref().filter(|node| alive.contains(node))).collect();
    let (time, ()) = spent(|| {
        for n in 0..homes.len() {
            if homes[n].is_none() {
                let load = |node: &NodeId| homes.iter().filter(|home| **home == Some(node)).count();
                homes[n] = alive.iter().min_by_key(|node| load(node));
            }
        }
    });
    nanoseconds(time.cpu)
}
