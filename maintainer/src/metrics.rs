//! Metrics of maintainers. Labels: `namespace` (the keyspace), `changefeed` (the bare name), and `mode` where a
//! pipeline is meant.

use std::collections::BTreeMap;
use std::time::Duration;

use heartbeatpb::{ChangefeedId, WallTime};
use metrics::{
    Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram, gauge,
    histogram,
};
use operator::Kind;

use crate::core::Standstill;

/// Checkpoint, milliseconds since the epoch.
pub const CHECKPOINT_TS: &str = "ticdc_maintainer_checkpoint_ts";
/// Seconds between the checkpoint and now.
pub const CHECKPOINT_LAG: &str = "ticdc_maintainer_checkpoint_ts_lag";
/// Resolved ts, milliseconds since the epoch.
pub const RESOLVED_TS: &str = "ticdc_maintainer_resolved_ts";
/// Seconds between the resolved ts and now.
pub const RESOLVED_LAG: &str = "ticdc_maintainer_resolved_ts_lag";
/// Maintainers of the changefeed on this node.
pub const MAINTAINERS: &str = "ticdc_changefeed_maintainer_counter";
/// Seconds that a maintainer took for one event: a batch of messages, or a period.
pub const HANDLE_EVENT_DURATION: &str = "ticdc_maintainer_handle_event_duration";
/// Messages that wait for the maintainer.
pub const EVENT_CH_LEN: &str = "ticdc_maintainer_event_ch_len";
/// Operators in flight, by `type`.
pub const OPERATORS: &str = "ticdc_maintainer_created_count";
/// Operators that were ever started, by `type`.
pub const OPERATORS_TOTAL: &str = "ticdc_maintainer_total_operator_count";
/// Age of operators when they finished, in seconds, by `type`.
pub const OPERATOR_DURATION: &str = "ticdc_maintainer_finish_operators_duration_seconds";
/// Spans between absent and replicating.
pub const SCHEDULING: &str = "ticdc_scheduler_task";
/// Spans, the table trigger apart.
pub const SPANS: &str = "ticdc_scheduler_span_count";
/// Tables.
pub const TABLES: &str = "ticdc_scheduler_table_count";
/// Spans by `state`: `Absent` or `Working`.
pub const REPLICATION_STATE: &str = "ticdc_scheduler_table_replication_state";
/// Events that dispatchers wait for each other at.
pub const BARRIERS: &str = "ticdc_ddl_exec_blocking";
/// Age of the oldest event that dispatchers wait for each other at, in seconds; 0 without any.
pub const BARRIER_OLDEST: &str = "ticdc_maintainer_barrier_oldest_seconds";
/// Seconds from the start of a maintainer until every node had answered.
pub const BOOTSTRAP_DURATION: &str = "ticdc_maintainer_bootstrap_duration_seconds";
/// Seconds until the upstream said where a span can be divided. Label: `group_id`.
pub const SPLIT_CHECK_DURATION: &str = "ticdc_maintainer_split_span_check_duration";
/// Table of the span that is least far.
pub const SLOW_TABLE: &str = "ticdc_scheduler_slow_table_id";
/// Checkpoint of that span, milliseconds since the epoch.
pub const SLOW_TABLE_CHECKPOINT: &str = "ticdc_scheduler_slow_table_checkpoint_ts";
/// Resolved ts up to which that span could be, milliseconds since the epoch.
pub const SLOW_TABLE_RESOLVED: &str = "ticdc_scheduler_slow_table_resolved_ts";
/// Resolved ts of the changefeed's log, milliseconds since the epoch. The log is read where the maintainer is.
pub const OWNER_RESOLVED_TS: &str = "ticdc_owner_resolved_ts";
/// Seconds between it and now.
pub const OWNER_RESOLVED_LAG: &str = "ticdc_owner_resolved_ts_lag";
/// Seconds for which the checkpoint has stood still; there only when it does. Labels: `held_by`, the kind of what holds it; `node`, where that is.
pub const STALLED: &str = "ticdc_maintainer_checkpoint_stalled_seconds";
/// Messages refused because of another maintainer epoch, by `type`.
pub const STALE_MESSAGES: &str = "ticdc_maintainer_stale_message_count";

/// Describes every metric of this crate.
pub fn describe() {
    describe_gauge!(CHECKPOINT_TS, "Checkpoint of the changefeed in milliseconds");
    describe_gauge!(CHECKPOINT_LAG, "Seconds between the checkpoint and now");
    describe_gauge!(RESOLVED_TS, "Resolved ts of the changefeed in milliseconds");
    describe_gauge!(RESOLVED_LAG, "Seconds between the resolved ts and now");
    describe_gauge!(MAINTAINERS, "Maintainers of the changefeed on this node");
    describe_histogram!(HANDLE_EVENT_DURATION, "Seconds that a maintainer took for one event");
    describe_gauge!(EVENT_CH_LEN, "Messages that wait for the maintainer");
    describe_gauge!(OPERATORS, "Operators in flight");
    describe_gauge!(OPERATORS_TOTAL, "Operators that were ever started");
    describe_histogram!(OPERATOR_DURATION, "Age of operators when they finished, in seconds");
    describe_gauge!(SCHEDULING, "Spans between absent and replicating");
    describe_gauge!(SPANS, "Spans, the table trigger apart");
    describe_gauge!(TABLES, "Tables");
    describe_gauge!(REPLICATION_STATE, "Spans by state");
    describe_gauge!(BARRIERS, "Blocking events that are not over");
    describe_gauge!(BARRIER_OLDEST, "Age of the oldest blocking event in seconds");
    describe_histogram!(BOOTSTRAP_DURATION, "Seconds until every node had answered a new maintainer");
    describe_histogram!(SPLIT_CHECK_DURATION, "Seconds until the upstream said where a span can be divided");
    describe_gauge!(SLOW_TABLE, "Table of the span that is least far");
    describe_gauge!(SLOW_TABLE_CHECKPOINT, "Checkpoint of the span that is least far, in milliseconds");
    describe_gauge!(SLOW_TABLE_RESOLVED, "Resolved ts up to which that span could be, in milliseconds");
    describe_gauge!(OWNER_RESOLVED_TS, "Resolved ts of the changefeed's log in milliseconds");
    describe_gauge!(OWNER_RESOLVED_LAG, "Seconds between the resolved ts of the log and now");
    describe_gauge!(STALLED, "Seconds for which the checkpoint has stood still");
    describe_counter!(STALE_MESSAGES, "Messages refused because of another maintainer epoch");
}

struct OperatorMetrics {
    kind: Kind,
    running: Gauge,
    total: Gauge,
    duration: Histogram,
}

/// What is measured of a maintainer's spans.
pub(crate) struct Population {
    pub(crate) spans: usize,
    pub(crate) tables: usize,
    pub(crate) absent: usize,
    pub(crate) scheduling: usize,
    pub(crate) replicating: usize,
    pub(crate) barriers: usize,
    pub(crate) barrier_oldest: Duration,
    pub(crate) waiting: usize,
}

/// A time that is known, and the series that show it.
struct Mark {
    lag: Gauge,
    ts: Gauge,
    /// Milliseconds since 1970.
    at: Option<f64>,
}

impl Mark {
    /// `lag` is how long ago it was, if anybody knows now; otherwise it is longer ago than it was.
    #[expect(clippy::cast_precision_loss, reason = "milliseconds fit a float until the year 287396")]
    fn set(&mut self, now: WallTime, lag: Option<f64>) {
        let now = now.millis() as f64;
        if let Some(lag) = lag {
            self.at = Some(now - lag.max(0.0) * 1000.0);
        }
        if let Some(at) = self.at {
            self.ts.set(at);
            self.lag.set(((now - at) / 1000.0).max(0.0));
        }
    }
}

/// Handles of one changefeed, resolved once; its series go with them. What one maintainer added it takes away when it
/// goes, so an old one never undoes what its successor reports.
pub(crate) struct MaintainerMetrics {
    checkpoint: Mark,
    resolved: Mark,
    log: Mark,
    slow_table: [Gauge; 3],
    stalled: Option<((&'static str, String), Gauge)>,
    split_check: Histogram,
    stale: BTreeMap<&'static str, Counter>,
    maintainers: Gauge,
    handle_event: Histogram,
    waiting: Gauge,
    scheduling: Gauge,
    spans: Gauge,
    tables: Gauge,
    absent: Gauge,
    working: Gauge,
    barriers: Gauge,
    barrier_oldest: Gauge,
    bootstrap: Histogram,
    operators: Vec<OperatorMetrics>,
    labels: [(&'static str, String); 2],
}

impl MaintainerMetrics {
    pub(crate) fn new(id: &ChangefeedId) -> Self {
        let labels = [("namespace", id.keyspace.to_string()), ("changefeed", id.name.to_string())];
        let plain = |name: &'static str| gauge!(name, &labels);
        let with = |name: &'static str, more: &[(&'static str, &'static str)]| {
            let mut labels = labels.to_vec();
            labels.extend(more.iter().map(|(key, value)| (*key, (*value).to_owned())));
            labels.push(("mode", "default".to_owned()));
            (name, labels)
        };
        let moded = |name, more: &[_]| {
            let (name, labels) = with(name, more);
            gauge!(name, &labels)
        };
        let operators = Kind::ALL
            .into_iter()
            .map(|kind| {
                let kind_label = [("type", kind.name())];
                let (name, labels) = with(OPERATOR_DURATION, &kind_label);
                OperatorMetrics {
                    kind,
                    running: moded(OPERATORS, &kind_label),
                    total: moded(OPERATORS_TOTAL, &kind_label),
                    duration: histogram!(name, &labels),
                }
            })
            .collect();
        let mark = |lag, ts| Mark { lag: plain(lag), ts: plain(ts), at: None };
        let [ns, feed] = labels.clone();
        let groups = [ns, feed, ("group_id", "default".to_owned())];
        let maintainers = plain(MAINTAINERS);
        maintainers.increment(1.0);
        Self {
            checkpoint: mark(CHECKPOINT_LAG, CHECKPOINT_TS),
            resolved: mark(RESOLVED_LAG, RESOLVED_TS),
            log: mark(OWNER_RESOLVED_LAG, OWNER_RESOLVED_TS),
            slow_table: [SLOW_TABLE, SLOW_TABLE_CHECKPOINT, SLOW_TABLE_RESOLVED].map(plain),
            stalled: None,
            split_check: histogram!(SPLIT_CHECK_DURATION, &groups),
            stale: BTreeMap::new(),
            maintainers,
            handle_event: histogram!(HANDLE_EVENT_DURATION, &labels),
            waiting: plain(EVENT_CH_LEN),
            scheduling: moded(SCHEDULING, &[]),
            spans: moded(SPANS, &[]),
            tables: moded(TABLES, &[]),
            absent: moded(REPLICATION_STATE, &[("state", "Absent")]),
            working: moded(REPLICATION_STATE, &[("state", "Working")]),
            barriers: moded(BARRIERS, &[]),
            barrier_oldest: moded(BARRIER_OLDEST, &[]),
            bootstrap: histogram!(BOOTSTRAP_DURATION),
            operators,
            labels,
        }
    }

    /// How far the changefeed is behind; called on a timer, so that a lag grows when nothing happens.
    pub(crate) fn set_lag(&mut self, now: WallTime, checkpoint: Option<f64>, resolved: Option<f64>) {
        self.checkpoint.set(now, checkpoint);
        self.resolved.set(now, resolved);
        self.log.set(now, resolved);
    }

    /// What is least far, and for how long it has been there if that is long; called on a timer.
    #[expect(clippy::cast_precision_loss, reason = "numbers for people")]
    pub(crate) fn set_standstill(&mut self, standstill: Option<&Standstill>, least: Duration) {
        if let Some(place) = standstill.and_then(|standstill| standstill.holder.place()) {
            let [table, checkpoint, resolved] = &self.slow_table;
            table.set(place.table.0 as f64);
            checkpoint.set(self.checkpoint.at.unwrap_or_default());
            resolved.set(self.resolved.at.unwrap_or_default());
        }
        let Some(standstill) = standstill.filter(|standstill| standstill.lasts >= least) else {
            self.stalled = None;
            return;
        };
        let node = standstill.holder.node().map_or_else(String::new, ToString::to_string);
        let held_by = (standstill.holder.kind(), node);
        if self.stalled.as_ref().is_none_or(|(known, _)| *known != held_by) {
            let mut labels = self.labels.to_vec();
            labels.extend([("held_by", held_by.0.to_owned()), ("node", held_by.1.clone())]);
            self.stalled = Some((held_by, gauge!(STALLED, &labels)));
        }
        if let Some((_, gauge)) = &self.stalled {
            gauge.set(standstill.lasts.as_secs_f64());
        }
    }

    /// The upstream said where a span can be divided, or could not.
    pub(crate) fn split_checked(&self, took: Duration) {
        self.split_check.record(took);
    }

    #[expect(clippy::cast_precision_loss, reason = "counts for people")]
    pub(crate) fn set_population(&self, population: &Population) {
        self.spans.set(population.spans as f64);
        self.tables.set(population.tables as f64);
        self.absent.set(population.absent as f64);
        self.scheduling.set(population.scheduling as f64);
        self.working.set(population.replicating as f64);
        self.barriers.set(population.barriers as f64);
        self.barrier_oldest.set(population.barrier_oldest.as_secs_f64());
        self.waiting.set(population.waiting as f64);
    }

    pub(crate) fn handled(&self, took: Duration) {
        self.handle_event.record(took);
    }

    pub(crate) fn initialized(&self, took: Duration) {
        self.bootstrap.record(took);
    }

    fn of(&self, kind: Kind) -> Option<&OperatorMetrics> {
        self.operators.iter().find(|operator| operator.kind == kind)
    }

    pub(crate) fn operator_started(&self, kind: Kind) {
        if let Some(operator) = self.of(kind) {
            operator.running.increment(1.0);
            operator.total.increment(1.0);
        }
    }

    pub(crate) fn operator_finished(&self, kind: Kind, age: Duration) {
        if let Some(operator) = self.of(kind) {
            operator.running.decrement(1.0);
            operator.duration.record(age);
        }
    }

    /// Operators that never finished go with their maintainer.
    pub(crate) fn operators_gone(&self, kinds: impl IntoIterator<Item = Kind>) {
        for operator in kinds.into_iter().filter_map(|kind| self.of(kind)) {
            operator.running.decrement(1.0);
        }
    }

    pub(crate) fn stale(&mut self, what: &'static str) {
        let [ns, feed] = self.labels.clone();
        let labels = [ns, feed, ("type", what.to_owned())];
        self.stale.entry(what).or_insert_with(|| counter!(STALE_MESSAGES, &labels)).increment(1);
    }
}

impl Drop for MaintainerMetrics {
    fn drop(&mut self) {
        self.maintainers.decrement(1.0);
    }
}

#[cfg(test)]
mod tests {
    use heartbeatpb::{DispatcherId, TableId, Ts};

    use super::*;
    use crate::core::{Holder, Place};

    fn standstill(seconds: u64, holder: Holder) -> Standstill {
        Standstill { checkpoint: Ts(7), lasts: Duration::from_secs(seconds), holder }
    }

    #[test]
    fn what_holds_a_checkpoint_is_a_label_as_long_as_it_does() {
        let mut shown = MaintainerMetrics::new(&ChangefeedId::fresh("a"));
        let mut look = |standstill: Option<Standstill>| {
            shown.set_standstill(standstill.as_ref(), Duration::from_secs(10));
            shown.stalled.as_ref().map(|(held_by, _)| held_by.clone())
        };
        let place = Place { dispatcher: DispatcherId { high: 1, low: 2 }, table: TableId(9) };
        let node = |id: &str| Holder::Node { node: id.into(), slowest: Some(place), waits_at: None };
        assert_eq!(look(Some(standstill(9, node("n1")))), None, "it has not lasted");
        assert_eq!(look(Some(standstill(10, node("n1")))), Some(("node", "n1".to_owned())));
        assert_eq!(look(Some(standstill(12, Holder::Upstream))), Some(("upstream", String::new())));
        let silent = Holder::Silent { nodes: vec!["n2".into(), "n3".into()] };
        assert_eq!(look(Some(standstill(14, silent))), Some(("silent_node", "n2".to_owned())));
        assert_eq!(look(Some(standstill(0, node("n1")))), None, "it moves again");
        assert_eq!(look(None), None);
    }

    // behaviour: metrics-5
    #[test]
    fn a_lag_that_nobody_knows_grows() {
        let mut shown = MaintainerMetrics::new(&ChangefeedId::fresh("a"));
        let mut known = |now: i64, lag| {
            shown.set_lag(WallTime(now * 1_000_000), lag, None);
            shown.checkpoint.at
        };
        assert_eq!(known(100, None), None);
        assert_eq!(known(100, Some(3.0)), Some(97_000.0));
        assert_eq!(known(160, None), Some(97_000.0), "the time stays, so the lag is a minute more");
        assert_eq!(known(161, Some(-5.0)), Some(161_000.0), "a clock that is behind is no negative lag");
    }
}
