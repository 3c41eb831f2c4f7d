//! Progress: a watermark that moves the checkpoint, and a complete heartbeat.

use std::collections::HashMap;
use std::hint::black_box;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use anyhow::Result;
use heartbeatpb::{ComponentState, DispatcherId, NodeId, TableSpanStatus, Ts};
use replica::{SpanReplica, SpanSet};

use crate::Extent;
use crate::clock::{float, nanoseconds, per_call, spent};
use crate::report::{Cost, Growth, Point, Report, Unit, number};
use crate::world::{Layout, World, dispatcher, status};

/// Statuses of one complete heartbeat.
const STATUSES: u64 = 10_000;
/// Calls of what looks at every span.
const SCANS: u64 = 5;

/// Measures progress.
pub(crate) fn measure(extent: &Extent, report: &mut Report) -> Result<()> {
    let (mut moves, mut heartbeats, mut allocations) = (Vec::new(), Vec::new(), 0);
    for &spans in &extent.spans {
        let mut world = World::settled(Layout::whole(spans))?;
        let ours = per_call(extent.rounds, extent.calls / 10, |_| move_checkpoint(&mut world));
        let counted =
            allocation_counter::measure(|| (0..extent.calls / 10).for_each(|_| move_checkpoint(&mut world)));
        allocations += counted.count_total;
        let naive = per_call(extent.rounds, SCANS, |_| {
            move_checkpoint(&mut world);
            black_box(scan(world.rig.spans()));
        });
        moves.push(Point { at: spans, ours, naive: Some(naive) });
        heartbeats.push(heartbeat(extent, spans)?);
    }
    allocations += of_many_nodes(extent)?;
    report.limit(
        "allocations while the checkpoint moves, with 3 and 100 nodes",
        float(allocations),
        0.0,
        number,
    );
    report.cost(Cost {
        name: "checkpoint: three watermarks and a look",
        unit: Unit::Nanoseconds,
        of: "spans",
        naive: "scan",
        points: moves,
        growth: Growth::Flat(1.5),
    });
    report.cost(Cost {
        name: "complete heartbeat of 10,000 statuses",
        unit: Unit::Nanoseconds,
        of: "spans",
        naive: "locks and scan",
        points: heartbeats,
        // Each status meets a span by its random id: with few of them the processor's caches hold all.
        growth: Growth::Flat(8.0),
    });
    Ok(())
}

/// Every node reports its progress, and somebody looks at the changefeed's.
fn move_checkpoint(world: &mut World) {
    let at = world.step();
    for k in 0..world.nodes.len() {
        let heartbeat = world.heartbeat(Vec::new(), false);
        let node = world.nodes[k].clone();
        world.rig.hear(&node, heartbeat);
    }
    assert_eq!(black_box(world.rig.progress()).checkpoint, at, "every node has flushed it");
}

fn scan(spans: &SpanSet) -> Option<Ts> {
    spans.iter().map(|(_, span)| span.checkpoint).min()
}

fn of_many_nodes(extent: &Extent) -> Result<u64> {
    let mut world = World::settled(Layout { nodes: 100, ..Layout::whole(10_000) })?;
    move_checkpoint(&mut world);
    let counted =
        allocation_counter::measure(|| (0..extent.calls / 100).for_each(|_| move_checkpoint(&mut world)));
    Ok(counted.count_total)
}

/// Each node has as many spans as one heartbeat has statuses; the nodes take turns.
fn heartbeat(extent: &Extent, spans: u64) -> Result<Point> {
    let layout = Layout { nodes: spans.div_ceil(STATUSES), ..Layout::whole(spans) };
    let mut world = World::settled(layout)?;
    let mut table = Locked::of(world.rig.spans());
    let (mut ours, mut naive) = (f64::INFINITY, f64::INFINITY);
    for round in 0..u64::try_from(extent.rounds)? + 1 {
        let k = round % layout.nodes;
        let at = world.step();
        let statuses: Vec<TableSpanStatus> =
            layout.on_node(k).map(|n| status(dispatcher(n), ComponentState::Working, at)).collect();
        let node = world.nodes[usize::try_from(k)?].clone();
        let locked = nanoseconds(spent(|| table.heartbeat(&node, &statuses)).0.cpu);
        let heartbeat = world.heartbeat(statuses, true);
        let time = nanoseconds(spent(|| world.rig.hear(&node, heartbeat)).0.cpu);
        // The first round meets cold memory.
        if round > 0 {
            (ours, naive) = (ours.min(time), naive.min(locked));
        }
    }
    Ok(Point { at: spans, ours, naive: Some(naive) })
}

/// Spans behind locks: one for the map, one for each span; and the minimum by looking at all.
struct Locked {
    spans: RwLock<HashMap<DispatcherId, Arc<Mutex<SpanReplica>>>>,
    operators: RwLock<HashMap<DispatcherId, ()>>,
}

impl Locked {
    fn of(spans: &SpanSet) -> Self {
        let spans = spans.iter().map(|(_, span)| (span.id, Arc::new(Mutex::new(span.clone())))).collect();
        Self { spans: RwLock::new(spans), operators: RwLock::default() }
    }

    fn heartbeat(&mut self, from: &NodeId, statuses: &[TableSpanStatus]) -> Option<Ts> {
        for status in statuses {
            let occupied =
                self.operators.read().unwrap_or_else(PoisonError::into_inner).contains_key(&status.id);
            let span = self.spans.read().unwrap_or_else(PoisonError::into_inner).get(&status.id).cloned();
            let Some(span) = span.filter(|_| !occupied) else { continue };
            let bound = span
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .node
                .as_ref()
                .is_some_and(|node| node == from);
            if bound {
                span.lock().unwrap_or_else(PoisonError::into_inner).observe(status);
            }
        }
        let spans = self.spans.read().unwrap_or_else(PoisonError::into_inner);
        #[expect(clippy::iter_over_hash_type, reason = "a minimum knows no order")]
        let least = {
            let mut least = None;
            for span in spans.values() {
                let checkpoint = span.lock().unwrap_or_else(PoisonError::into_inner).checkpoint;
                least = Some(least.map_or(checkpoint, |least: Ts| least.min(checkpoint)));
            }
            least
        };
        least
    }
}
