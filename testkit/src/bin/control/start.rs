//! A maintainer takes over what runs already.

use anyhow::Result;
use heartbeatpb::{DispatcherId, TableId};
use replica::SpanSet;

use crate::Extent;
use crate::clock::{nanoseconds, spent};
use crate::report::{Cost, Growth, Point, Report, Unit};
use crate::world::{Layout, World, tables};

/// Most of the bootstrap of a million spans.
const MOST_NANOSECONDS: f64 = 20e9;
/// Parts of a table that is divided.
const PARTS: u64 = 1_000;

/// Measures bootstraps.
pub(crate) fn measure(extent: &Extent, report: &mut Report) -> Result<()> {
    let (mut whole, mut divided) = (Vec::new(), Vec::new());
    for &spans in &extent.spans {
        let mut world = World::new(Layout::whole(spans));
        let time = world.take_over(Layout::whole(spans))?;
        let naive = (spans <= 5 * extent.quadratic)
            .then(|| nanoseconds(spent(|| search(world.rig.spans(), spans)).0.cpu));
        let ours = nanoseconds(time.cpu);
        report.time_limit(format!("bootstrap of {spans} spans on 3 nodes"), ours, MOST_NANOSECONDS);
        whole.push(Point { at: spans, ours, naive });
        drop(world);
        let layout = Layout { parts: PARTS, ..Layout::whole(spans) };
        let time = World::new(layout).take_over(layout)?;
        divided.push(Point { at: spans, ours: nanoseconds(time.cpu), naive: None });
    }
    let cost = |name, points, naive| Cost {
        name,
        unit: Unit::Nanoseconds,
        of: "spans",
        naive,
        points,
        growth: Growth::Linear(3.0),
    };
    report.cost(cost("bootstrap on 3 nodes", whole, "search for each table"));
    report.cost(cost("bootstrap on 3 nodes, tables in 1,000 parts", divided, ""));
    Ok(())
}

/// Finds the spans of each table by looking at all of them.
fn search(spans: &SpanSet, count: u64) -> usize {
    let all: Vec<(TableId, DispatcherId)> =
        spans.iter().map(|(_, span)| (span.span.table, span.id)).collect();
    tables(count).iter().filter(|table| all.iter().filter(|(of, _)| *of == table.id).count() == 1).count()
}
