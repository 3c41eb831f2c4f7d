//! What loads lead to, look by look.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::time::Instant;

use heartbeatpb::{SchemaId, TableSpan, Ts};
use replica::SpanSet;

use super::*;

mod histories;

const TABLE: TableId = TableId(7);
const CALM: Option<Duration> = Some(Duration::from_secs(1));

/// Spans on nodes, and the board that hears of them.
struct Field {
    spans: SpanSet,
    nodes: BTreeSet<NodeId>,
    board: Board,
    next: u64,
    asked: Cell<usize>,
}

fn settings(size_threshold: u64, write_threshold: u64) -> LoadSettings {
    LoadSettings {
        size_threshold,
        write_threshold,
        rounds: 1,
        max_share: 1.2,
        min_traffic: 1,
        patience: 1,
        ..LoadSettings::default()
    }
}

impl Field {
    fn new(settings: LoadSettings, nodes: &[&str]) -> Self {
        let trigger = SpanReplica::absent(DispatcherId::new(9, 9), SchemaId::DDL, TableSpan::ddl(), Ts(1));
        Self {
            spans: SpanSet::new(trigger),
            nodes: nodes.iter().map(|node| NodeId::from(*node)).collect(),
            board: Board::new(settings),
            next: 0,
            asked: Cell::new(0),
        }
    }

    fn place(&mut self, range: TableSpan, node: &str) -> DispatcherId {
        self.next += 1;
        let id = DispatcherId::new(1, self.next);
        let mut span = SpanReplica::absent(id, SchemaId(1), range, Ts(1));
        span.splittable = true;
        span.state = ComponentState::Working;
        self.spans.add_replicating(span, node.into());
        id
    }

    fn whole(&mut self, table: i64, node: &str) -> DispatcherId {
        self.place(TableSpan::whole(TableId(table)), node)
    }

    /// A table in as many parts as there are nodes in the list.
    fn parts(&mut self, table: TableId, nodes: &[&str]) -> Vec<DispatcherId> {
        let key = |n: usize| {
            if n == 0 || n == nodes.len() { vec![] } else { (n as u32 | 1 << 31).to_be_bytes().to_vec() }
        };
        let range = |n| TableSpan { keyspace_id: 0, table, start: key(n), end: key(n + 1) };
        nodes.iter().enumerate().map(|(n, node)| self.place(range(n), node)).collect()
    }

    fn hear(&mut self, span: DispatcherId, sample: u64) {
        self.board.observe(self.spans.get(span).unwrap(), sample as f32);
    }

    fn hear_all(&mut self, spans: &[DispatcherId], samples: &[u64], times: usize) {
        for _ in 0..times {
            for (span, sample) in spans.iter().zip(samples) {
                self.hear(*span, *sample);
            }
        }
    }

    fn measure(&mut self, spans: &[DispatcherId], units: &[u64]) {
        for (span, units) in spans.iter().zip(units) {
            self.board.set_estimate(self.spans.get(*span).unwrap(), *units);
        }
    }

    fn look<R>(&mut self, f: impl FnOnce(&mut Board, &View<'_>) -> R) -> R {
        let is_occupied = |_| {
            self.asked.set(self.asked.get() + 1);
            false
        };
        let view = View {
            spans: &self.spans,
            nodes: &self.nodes,
            draining: None,
            is_paused: false,
            operators: 0,
            is_occupied: &is_occupied,
            now: Instant::now(),
        };
        f(&mut self.board, &view)
    }

    fn split(&mut self, batch: usize) -> Vec<Decision> {
        let mut out = Vec::new();
        self.look(|board, view| board.split_tables(view, batch, &mut out));
        out
    }

    fn balance(&mut self, lag: Option<Duration>, batch: usize) -> Vec<Decision> {
        let mut out = Vec::new();
        self.look(|board, view| board.balance_parts(view, lag, batch, &mut out));
        out
    }

    /// Decisions come true at once; cuts are in the middle of what is cut.
    fn apply(&mut self, decisions: &[Decision]) {
        for decision in decisions {
            match decision {
                Decision::Add { span, dest } | Decision::Move { span, dest, .. } => {
                    self.spans.bind(*span, dest.clone());
                    self.run(*span);
                }
                Decision::Split { span, pieces, nodes, .. } => self.cut(*span, *pieces, nodes),
                Decision::Merge { sources } => {
                    let all: Vec<SpanReplica> =
                        sources.iter().map(|span| self.spans.remove(*span).unwrap()).collect();
                    assert!(all.windows(2).all(|pair| pair[0].span.is_followed_by(&pair[1].span)));
                    assert!(all.windows(2).all(|pair| pair[0].node == pair[1].node), "on one node");
                    let (first, last) = (&all[0], &all[all.len() - 1]);
                    let range = TableSpan { end: last.span.end.clone(), ..first.span.clone() };
                    let node = first.node.clone().unwrap();
                    self.place(range, node.as_str());
                }
            }
        }
    }

    fn run(&mut self, span: DispatcherId) {
        self.spans.mark_replicating(span);
        let working = heartbeatpb::TableSpanStatus {
            id: span,
            state: ComponentState::Working,
            checkpoint: Ts(1),
            event_size_per_second: 0.0,
            mode: heartbeatpb::Mode::Default,
        };
        self.spans.observe(&working);
    }

    fn cut(&mut self, span: DispatcherId, pieces: usize, nodes: &[NodeId]) {
        let whole = self.spans.get(span).unwrap().span.clone();
        let mut start = whole.start.clone();
        let mut parts = Vec::new();
        for n in 0..pieces {
            let mut end = whole.start.clone();
            let before = whole.end.first().filter(|_| end.is_empty()).map_or(0x40, |end| end / 2);
            end.extend([before, n as u8 + 1]);
            let end = if n + 1 == pieces { whole.end.clone() } else { end };
            self.next += 1;
            let range = TableSpan { start, end: end.clone(), ..whole.clone() };
            parts.push((DispatcherId::new(1, self.next), range));
            start = end;
        }
        assert!(self.spans.replace(span, &parts, Ts::MAX, nodes).is_some());
        for (part, _) in parts {
            self.run(part);
        }
    }

    fn on_nodes(&self) -> String {
        let count = |node: &NodeId| format!("{node}={}", self.spans.size_by_node(node));
        self.nodes.iter().map(count).collect::<Vec<_>>().join(" ")
    }
}

fn text(decisions: &[Decision]) -> Vec<String> {
    let of = |decision: &Decision| match decision {
        Decision::Add { span, dest } => format!("{} to {dest}", span.low),
        Decision::Move { span, from, dest } => format!("{} from {from} to {dest}", span.low),
        Decision::Split { span, pieces, method, nodes, .. } => {
            let nodes: Vec<&str> = nodes.iter().map(NodeId::as_str).collect();
            format!("split {} into {pieces} {method:?} [{}]", span.low, nodes.join(" "))
        }
        Decision::Merge { sources } => {
            let sources: Vec<String> = sources.iter().map(|span| span.low.to_string()).collect();
            format!("merge {}", sources.join("+"))
        }
    };
    decisions.iter().map(of).collect()
}

// behaviour: scheduling-81, scheduling-82
#[test]
fn a_table_is_ready_after_three_high_samples_in_a_row() {
    let mut field = Field::new(settings(0, 1_000), &["a"]);
    let table = field.whole(1, "a");
    let score = |field: &Field| field.board.gauge(table).map(|gauge| gauge.score);
    assert_eq!(score(&field), None);
    field.hear(table, 500);
    field.hear(table, 500);
    assert_eq!((score(&field), field.board.gauges.len()), (Some(0), 1));
    for expected in 1..=3 {
        assert!(field.split(10).is_empty(), "not yet");
        field.hear(table, 1_500);
        field.hear(table, 0);
        assert_eq!(score(&field), Some(expected), "a report without a sample changes nothing");
    }
    assert_eq!(text(&field.split(10)), ["split 1 into 4 ByTraffic []"]);
    field.hear(table, 999);
    assert!(field.split(10).is_empty(), "it has cooled down");
    field.spans.remove(table);
    field.split(10);
    assert_eq!(score(&field), None);
}

// behaviour: scheduling-83, scheduling-85
#[test]
fn a_large_table_is_ready_at_once_and_no_more_are_given_than_asked_for() {
    let mut field = Field::new(settings(5, 0), &["a"]);
    let tables: Vec<DispatcherId> = (1..=6).map(|table| field.whole(table, "a")).collect();
    field.hear_all(&tables, &[1; 6], 1);
    assert!(field.split(10).is_empty(), "nothing is known of their sizes");
    assert_eq!(field.board.describe(), "");
    field.measure(&tables, &[6, 6, 6, 6, 6, 4]);
    assert_eq!(field.split(3).len(), 3);
    assert_eq!(field.split(10).len(), 5);
    assert_eq!(text(&field.split(1)), ["split 1 into 4 BySize []"]);
    let shown = field.board.describe();
    assert!(tables[..5].iter().all(|table| shown.contains(&table.to_string())), "{shown}");
    assert!(shown.contains("(score 0, 6 units)") && !shown.contains(&tables[5].to_string()), "{shown}");
    // An upstream that is wrong by far does no harm.
    field.measure(&tables, &[u64::MAX; 6]);
    assert_eq!(field.split(10).len(), 6);
    let mut off = Field::new(settings(0, 0), &["a"]);
    let table = off.whole(1, "a");
    off.hear(table, u64::MAX >> 20);
    off.measure(&[table], &[u64::MAX]);
    assert!(off.split(10).is_empty(), "both thresholds are off");
}

// behaviour: scheduling-84, scheduling-90
#[test]
fn who_does_not_work_says_nothing_that_counts() {
    let mut field = Field::new(settings(0, 1_000), &["a"]);
    let whole = field.whole(1, "a");
    let part = field.parts(TABLE, &["a", "a"])[0];
    for span in [whole, part] {
        let mut stopped = field.spans.get(span).unwrap().clone();
        stopped.state = ComponentState::Stopped;
        assert!(!field.board.observe(&stopped, 1_500.0));
        assert_eq!(field.board.gauge(span), None);
        field.hear(span, 1_500);
        assert!(!field.board.observe(&stopped, 9.0));
        assert_eq!(field.board.gauge(span), Some(Gauge { score: 1, window: [1_500, 0, 0], units: 0 }));
    }
    let mut keyless = field.spans.get(whole).unwrap().clone();
    (keyless.splittable, keyless.id) = (false, DispatcherId::new(3, 3));
    assert!(!field.board.observe(&keyless, 1_500.0), "it cannot be divided whatever it handles");
}

// behaviour: scheduling-88, scheduling-89, scheduling-90
#[test]
fn parts_come_with_nothing_said_and_go_without_a_trace() {
    let mut field = Field::new(settings(10, 1_000), &["a"]);
    let parts = field.parts(TABLE, &["a", "a", "a"]);
    field.hear_all(&parts, &[0; 3], 1);
    for part in &parts {
        assert_eq!(field.board.gauge(*part), Some(Gauge::default()));
    }
    let mut windows = Vec::new();
    for sample in [500, 1_500, 0, 1_500, 1_500, 2_000] {
        field.hear(parts[0], sample);
        let gauge = field.board.gauge(parts[0]).unwrap();
        windows.push((gauge.score, gauge.window));
    }
    assert_eq!(
        windows,
        [
            (0, [500, 0, 0]),
            (1, [1_500, 500, 0]),
            (1, [1_500, 500, 0]),
            (2, [1_500, 1_500, 500]),
            (3, [1_500, 1_500, 1_500]),
            (4, [2_000, 1_500, 1_500]),
        ]
    );
    field.measure(&parts, &[3]);
    assert_eq!(field.board.gauge(parts[0]).unwrap().units, 3);
    field.measure(&[field.spans.trigger().unwrap().id], &[9]);
    for part in &parts {
        field.spans.remove(*part);
    }
    assert!(field.balance(CALM, 10).is_empty());
    assert!(field.board.gauges.is_empty() && field.board.tables.is_empty());
}

// behaviour: scheduling-91
#[test]
fn a_part_that_is_too_hot_or_too_large_is_divided_where_it_is() {
    let mut field = Field::new(settings(5, 1_000), &["a", "b"]);
    let parts = field.parts(TABLE, &["a", "b", "a"]);
    field.hear_all(&parts, &[1, 1_100, 1], 2);
    field.hear_all(&parts, &[1_500, 1_100, 1], 1);
    assert_eq!(field.board.gauge(parts[1]).unwrap().score, 3);
    field.hear_all(&parts, &[1_500, 2_500, 1], 1);
    assert_eq!(text(&field.balance(CALM, 10)), ["split 2 into 3 ByTraffic [b b b]"], "scores 2, 4 and 0");
    field.measure(&parts, &[8, 5, 8]);
    field.hear(parts[1], 1);
    let split = ["split 1 into 2 BySize [a a]", "split 3 into 2 BySize [a a]"];
    assert_eq!(text(&field.balance(CALM, 10)), split);
    assert_eq!(text(&field.balance(CALM, 1)), split[..1], "no more than asked for");
}

// behaviour: scheduling-92, scheduling-93
#[test]
fn a_table_that_is_small_as_a_whole_becomes_one_span_again() {
    let small = |nodes: &[&str], samples: [u64; 3], units: [u64; 3]| {
        let mut field = Field::new(settings(20, 2_000), &["a", "b", "c"]);
        let parts = field.parts(TABLE, nodes);
        field.hear_all(&parts, &samples, 3);
        field.measure(&parts, &units);
        text(&field.balance(None, 100))
    };
    let (cool, light) = ([300; 3], [2; 3]);
    assert_eq!(small(&["b", "b", "b"], cool, light), ["merge 1+2+3"]);
    assert_eq!(small(&["a", "b", "c"], cool, light), ["2 from b to a", "3 from c to a"]);
    assert_eq!(small(&["a", "b", "b"], cool, light), ["1 from a to b"], "where most parts are");
    assert_eq!(small(&["a", "b", "c"], [300, 300, 301], light), ["1 from a to c", "2 from b to c"]);
    let folds = |decisions: Vec<String>| decisions.iter().any(|decision| decision.contains("merge"));
    assert!(!folds(small(&["b", "b", "b"], [300, 400, 400], light)), "too hot together");
    assert!(!folds(small(&["b", "b", "b"], cool, [4, 4, 4])), "too large together");
    let mut off = Field::new(settings(0, 0), &["a"]);
    let parts = off.parts(TABLE, &["a", "a"]);
    off.hear_all(&parts, &[1, 1], 3);
    assert!(off.balance(CALM, 10).is_empty(), "nothing says what is small");
}

/// What is done about traffic on nodes `a`, `b`, …: the parts of each, with their samples.
fn uneven(nodes: &[(&str, &[u64])], limits: impl FnOnce(&mut LoadSettings)) -> Field {
    let names: Vec<&str> = nodes.iter().map(|(node, _)| *node).collect();
    let mut of = LoadSettings { max_lag: Duration::ZERO, ..settings(0, 0) };
    limits(&mut of);
    let mut field = Field::new(of, &names);
    let places: Vec<&str> = nodes.iter().flat_map(|(node, parts)| vec![*node; parts.len()]).collect();
    let samples: Vec<u64> = nodes.iter().flat_map(|(_, parts)| parts.iter().copied()).collect();
    let parts = field.parts(TABLE, &places);
    field.hear_all(&parts, &samples, 3);
    field
}

// behaviour: scheduling-94
#[test]
fn uneven_traffic_moves_parts_that_fit_and_otherwise_divides_one() {
    let check = |nodes: &[(&str, &[u64])]| text(&uneven(nodes, |_| {}).balance(CALM, 100));
    assert_eq!(check(&[("a", &[1200, 800]), ("b", &[200, 100])]), ["2 from a to b"]);
    assert_eq!(check(&[("a", &[1500]), ("b", &[100])]), ["split 1 into 2 ByTraffic [b a]"]);
    assert!(check(&[("a", &[500, 500]), ("b", &[500, 500])]).is_empty());
    assert!(check(&[("a", &[500, 900])]).is_empty(), "nobody could take it");
    let many = check(&[("a", &[100; 10]), ("b", &[])]);
    assert_eq!(many.len(), 4, "few at once: {many:?}");
    assert!(
        text(&uneven(&[("a", &[1500]), ("b", &[100])], |of| of.min_traffic = 1_500).balance(CALM, 9))
            .is_empty()
    );

    // What wavers is not uneven.
    let mut field = uneven(&[("a", &[1200]), ("b", &[1200])], |_| {});
    let parts = [DispatcherId::new(1, 1), DispatcherId::new(1, 2)];
    for samples in [[100, 1500], [100, 1500], [1500, 100]] {
        field.hear_all(&parts, &samples, 1);
    }
    assert!(field.balance(CALM, 100).is_empty());
}

#[test]
fn an_imbalance_counts_once_for_each_round_of_reports_and_begins_anew_with_other_nodes() {
    let nodes: &[(&str, &[u64])] = &[("a", &[1500]), ("b", &[700]), ("c", &[100])];
    let mut field = uneven(nodes, |of| of.rounds = 3);
    let parts: Vec<DispatcherId> = (1..=3).map(|n| DispatcherId::new(1, n)).collect();
    assert!(field.balance(CALM, 9).is_empty());
    assert!(field.balance(CALM, 9).is_empty());
    assert!(field.balance(CALM, 9).is_empty(), "nobody said anything in between");
    field.hear_all(&parts, &[1500, 700, 100], 1);
    assert!(field.balance(CALM, 9).is_empty());
    // The busy node stays, the idle one is another one: the imbalance goes on as that of the busy node.
    field.hear_all(&parts, &[1500, 100, 700], 3);
    assert_eq!(
        field.board.tables[&TABLE]
            .imbalance
            .as_ref()
            .map(|it| format!("{it:?}"))
            .unwrap()
            .matches("rounds: 2")
            .count(),
        1
    );
    let decisions = field.balance(CALM, 9);
    assert_eq!(text(&decisions).len(), 1, "{decisions:?}");

    let mut field = uneven(nodes, |of| of.rounds = 2);
    assert!(field.balance(CALM, 9).is_empty());
    field.hear_all(&parts, &[100, 1500, 700], 3);
    assert!(field.balance(CALM, 9).is_empty(), "another imbalance");
    field.hear_all(&parts, &[700, 700, 700], 3);
    assert!(field.balance(CALM, 9).is_empty(), "none");
    field.hear_all(&parts, &[100, 1500, 700], 3);
    assert!(field.balance(CALM, 9).is_empty(), "what was before it does not count");
}

/// Parts of one table on their nodes, with their samples, whose table is at rest otherwise.
fn neighbours(nodes: &[&str], samples: &[u64], of: LoadSettings) -> Field {
    let mut names: Vec<&str> = nodes.to_vec();
    names.sort_unstable();
    names.dedup();
    let mut field = Field::new(LoadSettings { min_traffic: u64::MAX, ..of }, &names);
    let parts = field.parts(TABLE, nodes);
    field.hear_all(&parts, samples, 3);
    field
}

// behaviour: scheduling-95
#[test]
fn small_neighbours_are_joined_unless_the_changefeed_lags_and_after_some_patience() {
    let of = LoadSettings { patience: 3, ..settings(0, 0) };
    let mut field = neighbours(&["a", "a", "a"], &[10, 10, 10], of);
    for lag in [None, Some(Duration::from_secs(31))] {
        for _ in 0..5 {
            assert!(field.balance(lag, 9).is_empty());
        }
    }
    assert!(field.balance(CALM, 9).is_empty());
    assert!(field.balance(CALM, 9).is_empty());
    assert!(field.balance(None, 9).is_empty(), "that ends the patience");
    assert!(field.balance(CALM, 9).is_empty());
    assert!(field.balance(CALM, 9).is_empty());
    assert_eq!(text(&field.balance(CALM, 9)), ["merge 1+2+3"]);
}

// behaviour: scheduling-96
#[test]
fn at_most_eight_merges_of_a_table_begin_at_once() {
    let pairs =
        |count: usize| -> Vec<&str> { (0..count).map(|n| if n / 2 % 2 == 0 { "a" } else { "b" }).collect() };
    let mut field = neighbours(&pairs(18), &[10; 18], settings(0, 0));
    let merges = field.balance(CALM, 20);
    assert_eq!(merges.len(), 8);
    assert!(text(&merges).iter().all(|merge| merge.matches('+').count() == 1), "pairs: {merges:?}");
    assert_eq!(neighbours(&pairs(8), &[10; 8], settings(0, 0)).balance(CALM, 3).len(), 3);
    assert!(neighbours(&pairs(8), &[10; 8], settings(0, 0)).balance(CALM, 0).is_empty());
}

// behaviour: scheduling-97
#[test]
fn a_part_is_moved_to_a_neighbour_that_it_can_be_joined_with() {
    let mut field = neighbours(&["a", "b", "a", "b", "a"], &[500, 500, 40, 40, 100], settings(20, 1_000));
    let parts: Vec<DispatcherId> = (1..=5).map(|n| DispatcherId::new(1, n)).collect();
    field.measure(&parts, &[4; 5]);
    assert_eq!(text(&field.balance(CALM, 100)), ["3 from a to b"]);
}

// behaviour: scheduling-98
#[test]
fn equal_parts_that_alternate_are_exchanged() {
    let mut field = neighbours(&["a", "b", "a", "b", "a", "b"], &[100; 6], settings(0, 300));
    let moves = field.balance(CALM, 100);
    assert_eq!(text(&moves), ["2 from b to a", "3 from a to b", "5 from a to b", "6 from b to a"]);
    field.apply(&moves);
    assert_eq!(field.on_nodes(), "a=3 b=3", "nobody has more than before");
    let parts: Vec<DispatcherId> = (1..=6).map(|n| DispatcherId::new(1, n)).collect();
    field.hear_all(&parts, &[100; 6], 1);
    assert_eq!(text(&field.balance(CALM, 100)), ["merge 1+2", "merge 3+4"]);
}

#[test]
fn a_node_without_a_part_gets_one_so_that_it_takes_part() {
    let mut field = neighbours(&["a", "a", "a", "a", "a"], &[500; 5], settings(0, 600));
    field.nodes.insert("b".into());
    assert!(field.balance(CALM, 100).is_empty(), "not more parts than would do");
    field.board.settings.write_threshold = 2_000;
    field.board.settings.size_threshold = 4;
    let parts: Vec<DispatcherId> = (1..=5).map(|n| DispatcherId::new(1, n)).collect();
    field.measure(&parts, &[3, 3, 0, 3, 0]);
    field.board.settings.size_threshold = 0;
    field.board.settings.write_threshold = 1_300;
    assert_eq!(text(&field.balance(CALM, 100)), ["1 from a to b"]);
}

// behaviour: scheduling-99
#[test]
fn what_could_be_divided_and_joined_is_divided() {
    let check = |size, write, samples: &[u64], units: &[u64]| {
        let mut field = neighbours(&["a", "a", "a", "a"], samples, settings(size, write));
        let parts: Vec<DispatcherId> = (1..=4).map(|n| DispatcherId::new(1, n)).collect();
        field.hear_all(&parts, samples, 1);
        field.measure(&parts, units);
        text(&field.balance(CALM, 100))
    };
    let (hot, cool) = ([1, 1, 1_500, 1], [1; 4]);
    let (large, light) = ([1, 1, 15, 1], [1; 4]);
    assert_eq!(check(10, 1_000, &hot, &large), ["split 3 into 2 ByTraffic [a a]"]);
    assert_eq!(check(10, 0, &hot, &large), ["split 3 into 2 BySize [a a]"], "by size alone");
    assert_eq!(check(0, 1_000, &hot, &large), ["split 3 into 2 ByTraffic [a a]"], "by traffic alone");
    assert_eq!(check(10, 1_000, &cool, &light), ["merge 1+2+3+4"]);
}

// behaviour: scheduling-100
#[test]
fn ten_thousand_parts_are_looked_at_a_bounded_number_of_times() {
    let nodes: Vec<&str> = (0..10_000).map(|n| if n % 2 == 0 { "a" } else { "b" }).collect();
    let mut field = neighbours(&nodes, &[100; 10_000], settings(0, 300_000));
    assert_eq!(field.balance(CALM, 10_000).len(), 16);
    assert_eq!(field.asked.take(), 10_000, "each part once");
}

#[test]
fn parts_that_do_not_follow_each_other_are_reported_and_left_alone() {
    let mut field = neighbours(&["a", "a", "a"], &[10, 10, 10], settings(0, 0));
    field.spans.remove(DispatcherId::new(1, 2));
    assert!(field.balance(CALM, 9).is_empty());
    assert_eq!(field.board.take_torn(), [TABLE].into());
    assert!(field.board.take_torn().is_empty());
}
