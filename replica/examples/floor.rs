//! A million spans: what a node's report costs, and reading the floor: `cargo run --release -p replica --example floor`,
//! or another number of them, `-- 50000`.

use std::hint::black_box;
use std::time::Instant;

use heartbeatpb::{
    ComponentState, DispatcherId, Mode, NodeId, SchemaId, TableId, TableSpan, TableSpanStatus, Ts,
};
use replica::{SpanReplica, SpanSet};

fn main() -> Result<(), std::num::ParseIntError> {
    let count: u64 = std::env::args().nth(1).map_or(Ok(1_000_000), |count| count.parse())?;
    let trigger = SpanReplica::absent(DispatcherId::new(1, 0), SchemaId::DDL, TableSpan::ddl(), Ts(1));
    let mut spans = SpanSet::new(trigger);
    let node = NodeId::from("n1");
    let timed = |what: &str, since: Instant| {
        let each = since.elapsed().as_nanos() / u128::from(count.max(1));
        println!("{what}: {each} ns each");
    };

    let start = Instant::now();
    for n in 1..=count {
        spans.add_table(DispatcherId::new(0, n), SchemaId(1), TableId(n.cast_signed()), true, Ts(n));
    }
    timed("adding a span", start);

    let start = Instant::now();
    for n in 1..=count {
        spans.bind(DispatcherId::new(0, n), node.clone());
        spans.mark_replicating(DispatcherId::new(0, n));
    }
    timed("binding and replicating it", start);

    let start = Instant::now();
    for n in 1..=count {
        let status = TableSpanStatus {
            id: DispatcherId::new(0, n),
            state: ComponentState::Working,
            checkpoint: Ts(count + n),
            event_size_per_second: 0.0,
            mode: Mode::Default,
        };
        spans.observe(&status);
    }
    timed("a report", start);

    for n in 1..=count.min(1_000) {
        spans.mark_scheduling(DispatcherId::new(0, n));
    }
    let start = Instant::now();
    for _ in 0..count {
        black_box(spans.floor());
        black_box(spans.size_by_node(&node));
    }
    timed("reading the floor and the size of a node", start);
    Ok(())
}
