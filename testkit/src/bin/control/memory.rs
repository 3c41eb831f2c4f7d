//! What a span takes in its maintainer's memory.

use std::collections::HashMap;
use std::sync::{Arc, RwLock};

use anyhow::{Context, Result};
use heartbeatpb::{ComponentState, DispatcherId, NodeId, SchemaId, TableId};
use replica::{SpanReplica, SpanSet};

use crate::Extent;
use crate::clock::float;
use crate::report::{Cost, Growth, Point, Report, Unit, bytes, grouped};
use crate::world::{Layout, World, dispatcher, status};

/// Most bytes that a span may take, beside its keys.
const MOST_BYTES: f64 = 300.0;
/// Most bytes of one whose load is watched: a division of tables is switched on, and each has a gauge.
const MOST_WATCHED: f64 = 400.0;
/// Parts of a table that is divided.
const PARTS: u64 = 1_000;
/// Bytes of the keys that bound a part, beside their allocations.
const KEYS: f64 = 16.0;

/// Counts bytes.
pub(crate) fn measure(extent: &Extent, report: &mut Report) -> Result<()> {
    let (mut whole, mut divided, mut watched, mut peaks) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for &spans in &extent.spans {
        let (held, peak, world) = of(Layout::whole(spans))?;
        let mut naive = None;
        let counted = allocation_counter::measure(|| naive = Some(Maps::of(world.rig.spans())));
        drop((naive, world));
        #[expect(clippy::cast_precision_loss, reason = "bytes of a process")]
        let naive = counted.bytes_current as f64 / float(spans);
        report.limit(format!("bytes for each of {} whole tables", grouped(spans)), held, MOST_BYTES, bytes);
        whole.push(Point { at: spans, ours: held, naive: Some(naive) });
        peaks.push(Point { at: spans, ours: peak, naive: None });
        let (held, _, _) = of(Layout { parts: PARTS, ..Layout::whole(spans) })?;
        report.limit(
            format!("bytes for each of {} parts, beside their keys", grouped(spans)),
            held - KEYS,
            MOST_BYTES,
            bytes,
        );
        divided.push(Point { at: spans, ours: held, naive: None });
        let held = of_watched(spans)?;
        let name = format!("bytes for each of {} whole tables whose load is watched", grouped(spans));
        report.limit(name, held, MOST_WATCHED, bytes);
        watched.push(Point { at: spans, ours: held, naive: None });
    }
    let cost =
        |name, points, naive, growth| Cost { name, unit: Unit::Bytes, of: "spans", naive, points, growth };
    report.cost(cost("memory of a whole table", whole, "maps and locks", Growth::Flat(1.5)));
    report.cost(cost("memory of a part of a table", divided, "", Growth::Flat(1.5)));
    report.cost(cost("memory of a whole table whose load is watched", watched, "", Growth::Flat(1.5)));
    report.cost(cost("most memory during the bootstrap, for each span", peaks, "", Growth::Flat(1.5)));
    Ok(())
}

/// Bytes of each span that are held after the bootstrap, and at most during it.
fn of(layout: Layout) -> Result<(f64, f64, World)> {
    let mut made = None;
    let counted = allocation_counter::measure(|| made = Some(World::settled(layout)));
    let world = made.context("nothing was made")??;
    #[expect(clippy::cast_precision_loss, reason = "bytes of a process")]
    let held = counted.bytes_current as f64 / float(layout.spans);
    Ok((held, float(counted.bytes_max) / float(layout.spans), world))
}

/// The same when tables may be divided, and every dispatcher has said what it handles.
fn of_watched(spans: u64) -> Result<f64> {
    let layout = Layout { divides: true, ..Layout::whole(spans) };
    let mut made = None;
    let counted = allocation_counter::measure(|| {
        made = Some(World::settled(layout).map(|mut world| {
            for (k, node) in (0..).zip(world.nodes.clone()) {
                let at = world.step();
                let report = |n| status(dispatcher(n), ComponentState::Working, at);
                let heartbeat = world.heartbeat(layout.on_node(k).map(report).collect(), true);
                world.rig.hear(&node, heartbeat);
            }
            world
        }));
    });
    drop(made.context("nothing was made")??);
    #[expect(clippy::cast_precision_loss, reason = "bytes of a process")]
    let held = counted.bytes_current as f64;
    Ok(held / float(spans))
}

type Shared = HashMap<DispatcherId, Arc<RwLock<SpanReplica>>>;

/// The same spans in a map for each question, shared behind locks.
#[expect(dead_code, reason = "only its size is looked at")]
struct Maps {
    all: RwLock<Shared>,
    replicating: RwLock<Shared>,
    tables: RwLock<HashMap<TableId, Shared>>,
    schemas: RwLock<HashMap<SchemaId, Shared>>,
    nodes: RwLock<HashMap<NodeId, Shared>>,
}

impl Maps {
    fn of(spans: &SpanSet) -> Self {
        let mut all = Shared::new();
        let mut tables: HashMap<TableId, Shared> = HashMap::new();
        let mut schemas: HashMap<SchemaId, Shared> = HashMap::new();
        let mut nodes: HashMap<NodeId, Shared> = HashMap::new();
        for (_, span) in spans.iter() {
            let shared = Arc::new(RwLock::new(span.clone()));
            tables.entry(span.span.table).or_default().insert(span.id, Arc::clone(&shared));
            schemas.entry(span.schema).or_default().insert(span.id, Arc::clone(&shared));
            if let Some(node) = &span.node {
                nodes.entry(node.clone()).or_default().insert(span.id, Arc::clone(&shared));
            }
            all.insert(span.id, shared);
        }
        Self {
            replicating: RwLock::new(all.clone()),
            all: RwLock::new(all),
            tables: RwLock::new(tables),
            schemas: RwLock::new(schemas),
            nodes: RwLock::new(nodes),
        }
    }
}
