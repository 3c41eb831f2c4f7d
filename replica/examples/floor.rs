//! A million spans: what a node's report costs, and reading the floor: `cargo run --release -p replica --example floor`.

use std::hint::black_box;
use std::time::Instant;

use heartbeatpb::{
    ComponentState, DispatcherId, Mode, NodeId, SchemaId, TableId, TableSpan, TableSpanStatus, Ts,
};
use replica::{SpanReplica, SpanSet};

const SPANS: u64 = 1_000_000;

fn main() {
    let trigger = SpanReplica::absent(DispatcherId::new(1, 0), SchemaId::DDL, TableSpan::ddl(), Ts(1));
    let mut spans = SpanSet::new(trigger);
    let node = NodeId::from("n1");
    let timed = |what: &str, count: u64, since: Instant| {
        let each = since.elapsed().as_nanos() / u128::from(count);
        println!("{what}: {each} ns each");
    };

    let start = Instant::now();
    for n in 1..=SPANS {
        spans.add_table(DispatcherId::new(0, n), SchemaId(1), TableId(n.cast_signed()), true, Ts(n));
    }
    timed("adding a span", SPANS, start);

    let start = Instant::now();
    for n in 1..=SPANS {
        spans.bind(DispatcherId::new(0, n), node.clone());
        spans.mark_replicating(DispatcherId::new(0, n));
    }
    timed("binding and replicating it", SPANS, start);

    let start = Instant::now();
    for n in 1..=SPANS {
        let status = TableSpanStatus {
            id: DispatcherId::new(0, n),
            state: ComponentState::Working,
            checkpoint: Ts(SPANS + n),
            event_size_per_second: 0.0,
            mode: Mode::Default,
        };
        spans.observe(&status);
    }
    timed("a report", SPANS, start);

    for n in 1..=1_000 {
        spans.mark_scheduling(DispatcherId::new(0, n));
    }
    let start = Instant::now();
    for _ in 0..SPANS {
        black_box(spans.floor());
        black_box(spans.size_by_node(&node));
    }
    timed("reading the floor and the size of a node", SPANS, start);
}
