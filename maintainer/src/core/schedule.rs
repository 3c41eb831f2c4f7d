//! When schedulers look, what they see, and what their decisions become.

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use heartbeatpb::config::SchedulerConfig;
use heartbeatpb::{DispatcherId, NodeId, OperatorType, TableId, TableSpanStatus};
use messaging::ToHeartbeatCollector;
use operator::Operator;
use operator::span::{AddSpan, MoveSpan};
use replica::{SpanReplica, Standing};
use scheduler::{
    Balance, Basic, Board, BySize, Decision, Drain, Draining, LoadSettings, Method, Scheduler, View,
};

use super::planning::{Purpose, Wanted};
use super::{Core, Effect};

/// Operators that may run at once.
const BATCH: usize = 10_000;
/// Moves that balancing may begin at once.
const BALANCE_BATCH: usize = 1_024;
/// How often it is looked whether nodes have their share.
const BALANCE_INTERVAL: Duration = Duration::from_secs(15);
/// Nothing waits for an operator that has run for so long: it was warned of, and others go on (scheduling §7.1).
const STUCK: Duration = Duration::from_secs(600);

/// The schedulers of a maintainer, with the times when they want to look.
pub(super) struct Schedule {
    /// In the order in which they look.
    pub(super) schedulers: [(Box<dyn Scheduler>, Instant); 3],
    /// The loads of spans, when tables may be divided.
    board: Option<Board>,
    /// How large tables are divided.
    portion: BySize,
    /// When the loads of tables in parts are looked at next.
    parts_at: Instant,
    /// When the loads of whole tables are looked at next.
    whole_at: Instant,
    /// Spans whose size is to be asked for.
    unmeasured: VecDeque<DispatcherId>,
    measure_at: Instant,
    measure_interval: Duration,
    /// How far the changefeed is behind, if that is known.
    pub(super) lag: Option<Duration>,
}

impl Schedule {
    pub(super) fn new(config: &SchedulerConfig, now: Instant) -> Self {
        let ceiling = usize::try_from(config.scheduling_task_count_per_node).unwrap_or(1);
        Self {
            schedulers: [
                (Box::new(Basic::new(BATCH, ceiling)), now),
                (Box::new(Drain::new(BATCH)), now),
                (Box::new(Balance::new(BALANCE_BATCH, BALANCE_INTERVAL)), now + BALANCE_INTERVAL),
            ],
            board: config.enable_table_across_nodes.then(|| Board::new(load_settings(config))),
            portion: BySize::Units {
                threshold: usize::try_from(config.region_threshold).unwrap_or(0),
                per_range: usize::try_from(config.region_count_per_span).unwrap_or(1),
            },
            parts_at: now + BALANCE_INTERVAL,
            whole_at: now + BALANCE_INTERVAL,
            unmeasured: VecDeque::new(),
            measure_at: now,
            measure_interval: measure_interval(config),
            lag: None,
        }
    }
}

/// How often sizes are asked for; nothing usable is what is usual.
pub(super) fn measure_interval(config: &SchedulerConfig) -> Duration {
    let set = config.region_count_refresh_interval.0;
    if set.is_zero() { SchedulerConfig::default().region_count_refresh_interval.0 } else { set }
}

fn load_settings(config: &SchedulerConfig) -> LoadSettings {
    let number = |value: i64| u64::try_from(value).unwrap_or(0);
    LoadSettings {
        size_threshold: number(config.region_threshold),
        write_threshold: number(config.write_key_threshold),
        rounds: u32::try_from(config.balance_score_threshold).unwrap_or(u32::MAX).max(1),
        min_share: config.min_traffic_percentage,
        max_share: config.max_traffic_percentage,
        ..LoadSettings::default()
    }
}

impl Core {
    /// Placing and emptying are looked at at the next tick; balancing keeps its pace.
    pub(super) fn wake_schedulers(&mut self, now: Instant) {
        let [basic, drain, _] = &mut self.schedule.schedulers;
        basic.1 = basic.1.min(now);
        drain.1 = drain.1.min(now);
    }

    /// Nodes that live, have answered, and are not being emptied: those that may be given something.
    pub(super) fn usable_nodes(&self) -> BTreeSet<NodeId> {
        let target = self.drain.active().map(|(node, _)| node);
        let usable = |node: &&NodeId| self.bootstrapper.has_answered(node) && target != Some(*node);
        self.alive.iter().filter(usable).cloned().collect()
    }

    /// How far the changefeed is behind now.
    pub(crate) fn on_lag(&mut self, seconds: Option<f64>) {
        self.schedule.lag = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds.max(0.0)).ok());
    }

    /// A span's node said how much it handles.
    pub(super) fn weigh(&mut self, status: &TableSpanStatus) {
        let Some(board) = &mut self.schedule.board else { return };
        let table = |span: &&SpanReplica| span.span.table != TableId::DDL;
        let Some(span) = self.placement.spans.get(status.id).filter(table) else { return };
        if board.observe(span, status.event_size_per_second) && board.wants_estimates() {
            self.schedule.unmeasured.push_back(status.id);
        }
    }

    /// The upstream said how large a span is.
    pub(super) fn measured(&mut self, wanted: &Wanted, units: u64, now: Instant) {
        let span = self.placement.spans.get(wanted.span).filter(|span| span.span == wanted.range);
        let (Some(board), Some(span)) = (&mut self.schedule.board, span) else { return };
        board.set_estimate(span, units);
        // A table that is large from the start is divided into spans of the size that is set. Whoever grows large
        // later is divided with regard to the nodes, by the board.
        let pieces = self.schedule.portion.ranges(usize::try_from(units).unwrap_or(usize::MAX));
        let usable = span.span.is_whole()
            && span.splittable
            && self.placement.spans.is_replicating(span.id)
            && !self.is_occupied(span.id)
            && !self.planning.is_refused(span.id, now)
            && self.has_moved();
        if usable && pieces > 1 {
            let purpose = Purpose::Load(Method::BySize);
            self.planning.want(Wanted { pieces, purpose, ..wanted.clone() });
        }
    }

    /// Whether the checkpoint has moved since the take-over. A changefeed that has just been started may have been so
    /// because a division did it no good.
    fn has_moved(&self) -> bool {
        self.progress().checkpoint > self.began
    }

    /// Asks the schedulers whose time has come, and begins what they decide.
    pub(super) fn look_around(&mut self, now: Instant) {
        let schedule = &self.schedule;
        let (whole, parts) = (schedule.whole_at <= now, schedule.parts_at <= now);
        if !whole && !parts && schedule.schedulers.iter().all(|(_, at)| now < *at) {
            return;
        }
        if self.drain.active().is_some() {
            self.cooldown.start(now);
        }
        self.look_at_loads(whole, parts, now);
        let decisions = self.with_view(now, |schedule, view| {
            let mut decisions = Vec::new();
            for (scheduler, at) in schedule.schedulers.iter_mut().filter(|(_, at)| *at <= now) {
                *at = now + scheduler.tick(view, &mut decisions);
            }
            decisions
        });
        self.carry_out(decisions, now);
    }

    /// Tables that are too hot, too large or uneven. Before tables are moved: a table that is divided stays.
    fn look_at_loads(&mut self, whole: bool, parts: bool, now: Instant) {
        if whole {
            self.schedule.whole_at = now + BALANCE_INTERVAL;
        }
        if parts {
            self.schedule.parts_at = now + BALANCE_INTERVAL;
        }
        if !self.has_moved() || !(whole || parts) {
            return;
        }
        let (decisions, torn) = self.with_view(now, |schedule, view| {
            let mut decisions = Vec::new();
            let lag = schedule.lag;
            let Some(board) = &mut schedule.board else { return (decisions, BTreeSet::new()) };
            if whole {
                board.split_tables(view, BALANCE_BATCH, &mut decisions);
            }
            if parts {
                board.balance_parts(view, lag, BATCH, &mut decisions);
            }
            (decisions, board.take_torn())
        });
        for table in torn {
            tracing::error!(changefeedID = %self.id, %table, "the parts of a table do not follow each other; what is missing is placed");
            self.placement.repair(table);
        }
        self.carry_out(decisions, now);
        self.measure_sizes(now);
    }

    /// Lets somebody look: at one consistent view, which is good for one moment.
    fn with_view<R>(&mut self, now: Instant, f: impl FnOnce(&mut Schedule, &View<'_>) -> R) -> R {
        let nodes: BTreeSet<NodeId> =
            self.alive.iter().filter(|node| self.bootstrapper.has_answered(node)).cloned().collect();
        let (operators, planning) = (&self.placement.operators, &self.planning);
        let draining = self.drain.active().map(|(node, epoch)| Draining {
            node,
            epoch,
            in_flight: operators.moves_away_from(node),
            is_own: *node == self.me,
        });
        let spans = &self.placement.spans;
        // What is only planned does not keep a span from a home, nor on a node that is being emptied.
        let is_planned =
            |span| self.drain.active().is_none() && planning.reserves(span) && spans.is_replicating(span);
        let view = View {
            spans,
            nodes: &nodes,
            draining,
            is_paused: self.cooldown.is_on(now),
            operators: operators.len() - operators.older_than(STUCK, now),
            is_occupied: &|span| operators.contains(span) || is_planned(span),
            now,
        };
        f(&mut self.schedule, &view)
    }

    /// Decisions become operators, or questions to the upstream that come before them.
    fn carry_out(&mut self, decisions: Vec<Decision>, now: Instant) {
        for decision in decisions {
            match decision {
                Decision::Add { span, dest } => {
                    self.operate(Box::new(AddSpan::new(span, dest, OperatorType::Add)), now);
                }
                Decision::Move { span, from, dest } => {
                    if let Some(replica) = self.placement.spans.get(span) {
                        let operator = Box::new(MoveSpan::new(replica, from, dest));
                        self.operate(operator, now);
                    }
                }
                Decision::Split { span, on, pieces, method, nodes } => {
                    let Some(replica) = self.placement.spans.get(span) else { continue };
                    if self.planning.is_refused(span, now) {
                        continue;
                    }
                    let range = replica.span.clone();
                    let purpose = Purpose::Load(method);
                    self.planning.want(Wanted { span, range, origin: on, pieces, nodes, purpose });
                }
                Decision::Merge { sources } => {
                    let target = (self.placement.ids)();
                    self.placement.drive(now, |operators, cx| operators.merge(&sources, target, cx));
                }
                other => tracing::debug!(?other, "no operator for this decision"),
            }
        }
    }

    fn operate(&mut self, operator: Box<dyn Operator>, now: Instant) {
        self.placement.drive(now, |operators, cx| operators.add(operator, cx));
    }

    /// Asks for the size of one span after the other: of new ones soon, of all once in an interval.
    fn measure_sizes(&mut self, now: Instant) {
        let schedule = &mut self.schedule;
        if !schedule.board.as_ref().is_some_and(Board::wants_estimates) {
            return;
        }
        if schedule.unmeasured.is_empty() && schedule.measure_at <= now {
            schedule.measure_at = now + schedule.measure_interval;
            let spans = self.placement.spans.iter();
            schedule.unmeasured =
                spans.filter(|(_, span)| span.splittable).map(|(_, span)| span.id).collect();
        }
    }

    /// The next question about a size, when nothing more urgent is to be asked.
    pub(super) fn next_size(&mut self) {
        while self.planning.is_idle()
            && let Some(id) = self.schedule.unmeasured.pop_front()
        {
            let Some(span) = self.placement.spans.get(id) else { continue };
            let Some(origin) = span.node.clone() else { continue };
            let (range, purpose) = (span.span.clone(), Purpose::Estimate);
            self.planning.want(Wanted { span: id, range, origin, pieces: 1, nodes: Vec::new(), purpose });
        }
    }

    /// New spans that nobody runs are placed at once, and what operators ask for is passed on.
    pub(super) fn after_change(&mut self, now: Instant, out: &mut Vec<Effect>) {
        let homeless = self.placement.spans.count(Standing::Absent) > 0;
        if self.initialized && self.removal.is_none() && homeless && self.placement.operators.is_empty() {
            self.wake_schedulers(now);
            self.look_around(now);
        }
        self.flush_operators(out);
    }

    pub(super) fn flush_operators(&mut self, out: &mut Vec<Effect>) {
        let effects = self.placement.take_effects();
        out.extend(effects.into_iter().filter_map(|effect| match effect {
            operator::Effect::Send(node, request) => {
                Some(self.address(node, ToHeartbeatCollector::Schedule(request)))
            }
            operator::Effect::Merge(node, request) => {
                Some(self.address(node, ToHeartbeatCollector::Merge(request)))
            }
            operator::Effect::Started(kind) => Some(Effect::OperatorStarted(kind)),
            operator::Effect::Finished(kind, age) => Some(Effect::OperatorFinished(kind, age)),
            operator::Effect::Uncovered(_) => None,
        }));
    }
}
