//! Metrics of maintainers. Labels: `namespace` (the keyspace), `changefeed` (the bare name), and `mode` where a
//! pipeline is meant.

use std::time::Duration;

use heartbeatpb::{ChangefeedId, WallTime};
use metrics::{
    Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram, gauge,
    histogram,
};
use operator::Kind;

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

/// Handles of one changefeed, resolved once. The exporter keeps a series until the process ends. What one
/// maintainer added it takes away when it goes, so an old one never undoes what its successor reports.
pub(crate) struct MaintainerMetrics {
    checkpoint_ts: Gauge,
    checkpoint_lag: Gauge,
    resolved_ts: Gauge,
    resolved_lag: Gauge,
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
        let maintainers = plain(MAINTAINERS);
        maintainers.increment(1.0);
        Self {
            checkpoint_ts: plain(CHECKPOINT_TS),
            checkpoint_lag: plain(CHECKPOINT_LAG),
            resolved_ts: plain(RESOLVED_TS),
            resolved_lag: plain(RESOLVED_LAG),
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
    #[expect(clippy::cast_precision_loss, reason = "milliseconds fit a float until the year 287396")]
    pub(crate) fn set_lag(&self, now: WallTime, checkpoint: Option<f64>, resolved: Option<f64>) {
        for (lag, lag_gauge, ts_gauge) in [
            (checkpoint, &self.checkpoint_lag, &self.checkpoint_ts),
            (resolved, &self.resolved_lag, &self.resolved_ts),
        ] {
            if let Some(lag) = lag {
                lag_gauge.set(lag.max(0.0));
                ts_gauge.set(now.millis() as f64 - lag * 1000.0);
            }
        }
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

    pub(crate) fn stale(&self, what: &'static str) {
        let mut labels = self.labels.to_vec();
        labels.push(("type", what.to_owned()));
        let dropped: Counter = counter!(STALE_MESSAGES, &labels);
        dropped.increment(1);
    }
}

impl Drop for MaintainerMetrics {
    fn drop(&mut self) {
        self.maintainers.decrement(1.0);
        for gauge in [
            &self.checkpoint_lag,
            &self.resolved_lag,
            &self.waiting,
            &self.scheduling,
            &self.spans,
            &self.tables,
            &self.absent,
            &self.working,
            &self.barriers,
            &self.barrier_oldest,
        ] {
            gauge.set(0.0);
        }
    }
}
