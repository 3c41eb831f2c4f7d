//! What is known of the load of spans, and what follows from it: which tables are to be divided, which parts are to
//! be divided further, moved or joined (scheduling §8).
//!
//! Dispatchers say every ten seconds how much they handled; nothing is done on a single word: a hot span needs three
//! samples in a row, an imbalance as many rounds as are set, a merge patience. Spans that have just been divided or
//! joined have said nothing, and until each of them has said something three times their table is left alone.

mod joining;
mod parts;
mod traffic;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use heartbeatpb::{ComponentState, DispatcherId, NodeId, TableId};
use replica::{GroupId, SpanReplica, Standing};

use self::parts::Parts;
use crate::balance::is_quiet;
use crate::planner::{MAX_RANGES, Method};
use crate::view::{Decision, View};

/// High samples in a row that make a table hot.
const HOT: u32 = 3;
/// A hot span of fewer units is divided by its traffic; data says little about it.
const FEW_UNITS: u64 = 5_000;

/// When load is too much, too little, or too uneven.
#[derive(Clone, PartialEq, Debug)]
pub struct LoadSettings {
    /// Units of size that one span may have; 0 for any number.
    pub size_threshold: u64,
    /// Bytes per second that one span may handle; 0 for any number.
    pub write_threshold: u64,
    /// Rounds of imbalance before something is done about it.
    pub rounds: u32,
    /// A node with less than this share of the average is idle.
    pub min_share: f64,
    /// A node with more than this share of the average is busy.
    pub max_share: f64,
    /// Bytes per second of a table on one node below which no imbalance matters.
    pub min_traffic: u64,
    /// Looks in a row at which parts could be joined before they are.
    pub patience: u32,
    /// With more lag than this nothing is joined.
    pub max_lag: Duration,
}

impl Default for LoadSettings {
    fn default() -> Self {
        Self {
            size_threshold: 10_000,
            write_threshold: 0,
            rounds: 20,
            min_share: 0.8,
            max_share: 1.25,
            min_traffic: 1 << 20,
            patience: 5,
            max_lag: Duration::from_secs(30),
        }
    }
}

impl LoadSettings {
    fn is_hot(&self, sample: u64) -> bool {
        self.write_threshold > 0 && sample >= self.write_threshold
    }

    fn is_large(&self, units: u64) -> bool {
        self.size_threshold > 0 && units >= self.size_threshold
    }
}

/// What one span said of its load.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Gauge {
    /// High samples in a row.
    pub score: u32,
    /// The last three samples in bytes per second, the newest first; 0 where nothing was said yet.
    pub window: [u64; 3],
    /// Units of size; 0 while that is unknown.
    pub units: u64,
}

impl Gauge {
    /// How a span with this load is divided when it is too much.
    fn method(&self) -> Method {
        if self.units < FEW_UNITS { Method::ByTraffic } else { Method::BySize }
    }
}

/// A gauge as it is kept: there may be a million. What is larger counts as the largest number.
#[derive(Clone, Copy, Debug, Default)]
struct Kept {
    score: u8,
    window: [u32; 3],
    units: u32,
}

impl Kept {
    fn hear(&mut self, sample: u64, settings: &LoadSettings) {
        self.score = if settings.is_hot(sample) { self.score.saturating_add(1) } else { 0 };
        self.window = [small(sample), self.window[0], self.window[1]];
    }

    fn gauge(self) -> Gauge {
        Gauge {
            score: u32::from(self.score),
            window: self.window.map(u64::from),
            units: u64::from(self.units),
        }
    }
}

fn small(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// The loads of a changefeed's spans. Spans that left are forgotten by and by.
#[derive(Clone, Debug)]
pub struct Board {
    settings: LoadSettings,
    gauges: BTreeMap<DispatcherId, Kept>,
    /// Whole tables that are too hot or too large.
    ready: BTreeSet<DispatcherId>,
    tables: BTreeMap<TableId, Parts>,
    torn: BTreeSet<TableId>,
}

impl Board {
    /// A board that knows nothing yet.
    #[must_use]
    pub fn new(settings: LoadSettings) -> Self {
        Self {
            settings,
            gauges: BTreeMap::new(),
            ready: BTreeSet::new(),
            tables: BTreeMap::new(),
            torn: BTreeSet::new(),
        }
    }

    /// What is known of a span.
    #[must_use]
    pub fn gauge(&self, span: DispatcherId) -> Option<Gauge> {
        self.gauges.get(&span).map(|kept| kept.gauge())
    }

    /// The node of a span reported it: with a sample in bytes per second, or without one (0). Only a span that works
    /// counts, and of whole tables only those that may be divided. Says whether it was heard of for the first time.
    pub fn observe(&mut self, span: &SpanReplica, sample: f32) -> bool {
        let group = span.group();
        if span.state != ComponentState::Working || (group == GroupId::Default && !span.splittable) {
            return false;
        }
        let known = self.gauges.len();
        let gauge = self.gauges.entry(span.id).or_default();
        if sample > 0.0 {
            gauge.hear(whole(sample), &self.settings);
        }
        match group {
            GroupId::Default => self.judge(span.id),
            GroupId::Table(table) => self.tables.entry(table).or_default().heard = true,
        }
        self.gauges.len() > known
    }

    /// Whether sizes matter: whether it is worth asking for them.
    #[must_use]
    pub fn wants_estimates(&self) -> bool {
        self.settings.size_threshold > 0
    }

    /// The upstream said how large a span is.
    pub fn set_estimate(&mut self, span: &SpanReplica, units: u64) {
        let Some(gauge) = self.gauges.get_mut(&span.id) else { return };
        gauge.units = small(units);
        if span.group() == GroupId::Default {
            self.judge(span.id);
        }
    }

    fn judge(&mut self, span: DispatcherId) {
        let Some(gauge) = self.gauge(span) else { return };
        if gauge.score >= HOT || self.settings.is_large(gauge.units) {
            self.ready.insert(span);
        } else {
            self.ready.remove(&span);
        }
    }

    /// Tables whose parts were found not to follow each other, since the last call.
    pub fn take_torn(&mut self) -> BTreeSet<TableId> {
        std::mem::take(&mut self.torn)
    }

    /// The tables that wait to be divided, for people.
    #[must_use]
    pub fn describe(&self) -> String {
        let of = |span: &DispatcherId| {
            let gauge = self.gauge(*span).unwrap_or_default();
            format!("{span} (score {}, {} units)", gauge.score, gauge.units)
        };
        self.ready.iter().map(of).collect::<Vec<_>>().join(", ")
    }

    fn forget_the_gone(&mut self, view: &View<'_>) {
        if self.gauges.len() > view.spans.len() {
            self.gauges.retain(|span, _| view.spans.get(*span).is_some());
        }
        self.tables.retain(|table, _| view.spans.group(GroupId::Table(*table)).is_some());
        self.ready.retain(|span| {
            let known = view.spans.get(*span).is_some();
            if !known {
                self.gauges.remove(span);
            }
            known
        });
    }

    /// Divides whole tables that are too hot or too large, at most `batch` of them, into twice as many parts as
    /// would do and at least two for each node.
    pub fn split_tables(&mut self, view: &View<'_>, batch: usize, out: &mut Vec<Decision>) {
        self.forget_the_gone(view);
        if !is_quiet(view) {
            return;
        }
        let nodes = view.candidates().count();
        let free = self.ready.iter().filter(|span| !(view.is_occupied)(**span));
        for span in free.take(batch) {
            let (Some(replica), Some(gauge)) = (view.spans.get(*span), self.gauge(*span)) else {
                continue;
            };
            let Some(on) = replica.node.clone().filter(|_| view.spans.is_replicating(*span)) else {
                continue;
            };
            let hot = gauge.score >= HOT;
            let (load, threshold, method) = if hot {
                (gauge.window[0], self.settings.write_threshold, gauge.method())
            } else {
                (gauge.units, self.settings.size_threshold, Method::BySize)
            };
            let pieces = (2 * portions(load, threshold)).max(2 * nodes).min(MAX_RANGES);
            out.push(Decision::Split { span: *span, on, pieces, method, nodes: Vec::new() });
        }
    }

    /// Looks at every table that is in parts and at rest, and divides, moves or joins some of them: one kind of step
    /// for each table at a time, because one step changes what the next one would be. `lag`: how far the changefeed
    /// is behind, if that is known; `batch`: operators that may be started.
    pub fn balance_parts(
        &mut self,
        view: &View<'_>,
        lag: Option<Duration>,
        batch: usize,
        out: &mut Vec<Decision>,
    ) {
        self.forget_the_gone(view);
        if !is_quiet(view) {
            return;
        }
        let mut left = batch;
        for (group, index) in view.spans.groups() {
            let GroupId::Table(table) = group else { continue };
            if left == 0 {
                return;
            }
            if index.count(Standing::Replicating) < index.len() {
                continue;
            }
            let before = out.len();
            self.balance_table(table, view, lag, left, out);
            left = left.saturating_sub(out[before..].iter().map(cost).sum());
        }
    }
}

/// Operators that a decision starts.
fn cost(decision: &Decision) -> usize {
    match decision {
        Decision::Add { .. } | Decision::Move { .. } | Decision::Split { .. } => 1,
        Decision::Merge { sources } => 1 + sources.len(),
    }
}

/// How many spans of the threshold a load fills; 1 without a threshold.
fn portions(load: u64, threshold: u64) -> usize {
    if threshold == 0 { 1 } else { usize::try_from(load.div_ceil(threshold)).unwrap_or(usize::MAX >> 8) }
}

/// A positive sample as a whole number; never 0, which means that nothing was said.
fn whole(sample: f32) -> u64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped: a float cast saturates"
    )]
    let bytes = f64::from(sample).ceil() as u64;
    bytes.clamp(1, u64::MAX >> 16)
}

/// One part of a table in one look at it.
#[derive(Clone, Copy, Debug)]
struct Part<'v> {
    replica: &'v SpanReplica,
    gauge: Gauge,
    /// Its node, if it may take work.
    node: Option<&'v NodeId>,
}

impl Part<'_> {
    fn id(&self) -> DispatcherId {
        self.replica.id
    }

    fn traffic(&self) -> u64 {
        self.gauge.window[0]
    }
}

/// One look at a table in parts.
#[derive(Debug)]
struct Look<'v> {
    table: TableId,
    settings: &'v LoadSettings,
    /// In the order of their keys.
    parts: Vec<Part<'v>>,
    /// Traffic of the table on each node that may take work.
    nodes: BTreeMap<&'v NodeId, [u64; 3]>,
    total: [u64; 3],
    units: u64,
}

impl<'v> Look<'v> {
    fn new(
        table: TableId,
        view: &View<'v>,
        settings: &'v LoadSettings,
        gauges: &BTreeMap<DispatcherId, Kept>,
    ) -> Self {
        let mut nodes: BTreeMap<&'v NodeId, [u64; 3]> = candidates(view).map(|node| (node, [0; 3])).collect();
        let (mut total, mut units) = ([0; 3], 0);
        let mut parts: Vec<Part<'v>> = view
            .spans
            .by_table(table)
            .map(|replica| {
                let gauge = gauges.get(&replica.id).copied().unwrap_or_default().gauge();
                let node = replica.node.as_ref().filter(|node| nodes.contains_key(node));
                Part { replica, gauge, node }
            })
            .collect();
        parts.sort_by(|a, b| a.replica.span.cmp(&b.replica.span));
        for part in &parts {
            let Some(sums) = part.node.and_then(|node| nodes.get_mut(node)) else { continue };
            for (n, sample) in part.gauge.window.iter().enumerate() {
                sums[n] += sample;
                total[n] += sample;
            }
            units += part.gauge.units;
        }
        Self { table, settings, parts, nodes, total, units }
    }

    /// Nodes by their newest traffic, the idlest first. Of equally busy ones different tables prefer different ones.
    fn by_traffic(&self) -> Vec<&'v NodeId> {
        let mut nodes: Vec<&'v NodeId> = self.nodes.keys().copied().collect();
        if self.table.0 % 2 == 0 {
            nodes.reverse();
        }
        nodes.sort_by_key(|node| self.traffic_on(node));
        nodes
    }

    fn traffic_on(&self, node: &NodeId) -> u64 {
        self.nodes.get(node).map_or(0, |sums| sums[0])
    }
}

/// Nodes that may take work, for as long as the view lasts.
fn candidates<'v>(view: &View<'v>) -> impl Iterator<Item = &'v NodeId> {
    let draining = view.draining;
    view.nodes.iter().filter(move |node| draining.is_none_or(|draining| draining.node != *node))
}

#[cfg(test)]
mod tests;
