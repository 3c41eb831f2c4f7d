//! A span moves from one node to another while reports are late and nodes die, and is divided; printed are the
//! requests that leave, and where the span stands: `cargo run -p operator --example moving`.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use heartbeatpb::{
    ChangefeedId, ComponentState, DispatcherId, MaintainerEpoch, Mode, NodeId, SchemaId, TableId, TableSpan,
    TableSpanStatus, Ts,
};
use operator::span::{MoveSpan, SplitSpan};
use operator::{Context, Controller, Effect};
use replica::{SpanReplica, SpanSet};

const SPAN: DispatcherId = DispatcherId::new(0, 1);

struct Scene {
    spans: SpanSet,
    controller: Controller,
    alive: BTreeSet<NodeId>,
    now: Instant,
}

impl Scene {
    fn new() -> Self {
        let trigger = SpanReplica::absent(DispatcherId::new(1, 0), SchemaId::DDL, TableSpan::ddl(), Ts(1));
        let mut spans = SpanSet::new(trigger);
        let span = SpanReplica::absent(SPAN, SchemaId(1), TableSpan::whole(TableId(7)), Ts(100));
        spans.add_replicating(span, "n1".into());
        Self {
            spans,
            controller: Controller::new(
                ChangefeedId::fresh("shop"),
                Mode::Default,
                MaintainerEpoch::from_wire(5),
            ),
            alive: ["n1", "n2"].map(NodeId::from).into(),
            now: Instant::now(),
        }
    }

    fn step(&mut self, what: &str, f: impl FnOnce(&mut Controller, &mut Context<'_>)) {
        let mut out = Vec::new();
        let mut cx = Context { spans: &mut self.spans, alive: &self.alive, now: self.now, out: &mut out };
        f(&mut self.controller, &mut cx);
        let sent: Vec<String> = out.iter().filter_map(request).collect();
        let stands: Vec<String> = self
            .spans
            .iter()
            .map(|(standing, span)| {
                let node = span.node.as_ref().map_or("nobody", |node| node.as_str());
                format!("{:?} {standing:?} with {node} at {}", span.span, span.checkpoint)
            })
            .collect();
        println!("{what:42} -> {:38} | {}", sent.join(", "), stands.join("; "));
    }

    fn report(&mut self, from: &str, state: ComponentState, checkpoint: u64) {
        let status = TableSpanStatus {
            id: SPAN,
            state,
            checkpoint: Ts(checkpoint),
            event_size_per_second: 0.0,
            mode: Mode::Default,
        };
        self.step(&format!("{from} reports {state:?} at {checkpoint}"), |controller, cx| {
            controller.on_status(&from.into(), &status, cx);
        });
    }

    fn start_move(&mut self) {
        self.step("move it from n1 to n2", |controller, cx| {
            if let Some(span) = cx.spans.get(SPAN) {
                let operator = MoveSpan::new(span, "n1".into(), "n2".into());
                controller.add(Box::new(operator), cx);
            }
        });
    }

    fn lose(&mut self, node: &str) {
        self.alive.remove(&NodeId::from(node));
        self.step(&format!("{node} dies"), |controller, cx| controller.on_node_removed(&node.into(), cx));
    }
}

fn request(effect: &Effect) -> Option<String> {
    match effect {
        Effect::Send(node, request) => {
            Some(format!("{:?} on {node} from {}", request.action, request.config.start_ts))
        }
        Effect::Merge(node, request) => Some(format!("merge {} on {node}", request.sources.len())),
        Effect::Uncovered(_) | Effect::Started(_) | Effect::Finished(..) => None,
    }
}

fn main() {
    println!("a move, with a report of the destination that comes too early:");
    let mut scene = Scene::new();
    scene.start_move();
    scene.report("n2", ComponentState::Working, 100);
    scene.now += Duration::from_millis(500);
    scene.step("half a second without an answer", Controller::on_tick);
    scene.report("n1", ComponentState::Stopped, 140);
    scene.report("n2", ComponentState::Working, 140);

    println!("\na move whose destination dies: the origin may still write, so nobody else is asked yet:");
    let mut scene = Scene::new();
    scene.start_move();
    scene.lose("n2");
    scene.report("n1", ComponentState::Stopped, 150);

    println!("\na split with a place for each part:");
    let mut scene = Scene::new();
    scene.step("divide it at 6d", |controller, cx| {
        let Some(span) = cx.spans.get(SPAN) else { return };
        let left = TableSpan { end: vec![0x6d], ..span.span.clone() };
        let right = TableSpan { start: vec![0x6d], ..span.span.clone() };
        let parts = vec![(DispatcherId::new(0, 2), left), (DispatcherId::new(0, 3), right)];
        let operator = SplitSpan::new(span, "n1".into(), parts, vec!["n1".into(), "n2".into()]);
        controller.add(Box::new(operator), cx);
    });
    scene.report("n1", ComponentState::Stopped, 160);
}
