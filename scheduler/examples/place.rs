//! Places 1,000 tables on three nodes, loses a node, and places what it had: `cargo run -p scheduler --example place`.

use std::collections::BTreeSet;
use std::time::Instant;

use heartbeatpb::{DispatcherId, NodeId, SchemaId, TableId, TableSpan, Ts};
use replica::{SpanReplica, SpanSet, Standing};
use scheduler::{Basic, Decision, Scheduler, View, nobody_occupied};

fn round(scheduler: &mut Basic, spans: &mut SpanSet, nodes: &BTreeSet<NodeId>) -> usize {
    let view = View {
        spans,
        nodes,
        draining: None,
        is_paused: false,
        operators: 0,
        is_occupied: &nobody_occupied,
        now: Instant::now(),
    };
    let mut decisions = Vec::new();
    scheduler.tick(&view, &mut decisions);
    for decision in &decisions {
        if let Decision::Add { span, dest } = decision {
            spans.bind(*span, dest.clone());
            spans.mark_replicating(*span);
        }
    }
    decisions.len()
}

fn show(what: &str, spans: &SpanSet, nodes: &BTreeSet<NodeId>) {
    let counts: Vec<String> =
        nodes.iter().map(|node| format!("{node}: {}", spans.size_by_node(node))).collect();
    println!("{what}: {}; absent: {}", counts.join(", "), spans.count(Standing::Absent));
}

fn main() {
    let trigger = SpanReplica::absent(DispatcherId::new(1, 0), SchemaId::DDL, TableSpan::ddl(), Ts(1));
    let mut spans = SpanSet::new(trigger);
    for n in 1..=1_000 {
        spans.add_table(DispatcherId::new(0, n), SchemaId(1), TableId(n.cast_signed()), true, Ts(1));
    }
    let mut nodes: BTreeSet<NodeId> = ["n1", "n2", "n3"].map(NodeId::from).into();
    let mut scheduler = Basic::new(400, 20);
    while round(&mut scheduler, &mut spans, &nodes) > 0 {
        show("placed", &spans, &nodes);
    }
    let lost = NodeId::from("n2");
    nodes.remove(&lost);
    let orphans: Vec<DispatcherId> = spans.ids_by_node(&lost).collect();
    for span in orphans {
        spans.mark_absent(span);
    }
    show("n2 died", &spans, &nodes);
    while round(&mut scheduler, &mut spans, &nodes) > 0 {
        show("placed", &spans, &nodes);
    }
}
