//! Metrics of the coordinator. Its series are `CoordinatorMetrics`'s: they go with the role.

use std::collections::BTreeMap;
use std::time::Duration;

use heartbeatpb::config::{ChangefeedState, SinkKind, Uri};
use heartbeatpb::{ChangefeedId, NodeId, RunningError, WallTime};
use metrics::{Gauge, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

use crate::core::{ChangefeedView, Counts, DrainView};

/// Seconds this node has been coordinator; the sum over nodes grows by one per second.
pub const OWNERSHIP: &str = "ticdc_owner_ownership_counter";
/// State of a changefeed as a number. Labels: `namespace`, `changefeed`, `keyspace_id`.
pub const STATUS: &str = "ticdc_owner_status";
/// Time of the persisted checkpoint in milliseconds. Labels: `namespace`, `changefeed`.
pub const CHECKPOINT_TS: &str = "ticdc_owner_checkpoint_ts";
/// Seconds from the persisted checkpoint to now. Labels: `namespace`, `changefeed`, `keyspace_id`.
pub const CHECKPOINT_LAG: &str = "ticdc_owner_checkpoint_ts_lag";
/// 1 for the error of a failed or retrying changefeed.
pub const ERROR_INFO: &str = "ticdc_owner_changefeed_error_info";
/// 1 for the kind of a changefeed's sink. Labels: `namespace`, `changefeed`, `downstream_type`.
pub const DOWNSTREAM_INFO: &str = "ticdc_owner_changefeed_downstream_info";
/// Changefeeds. Label: `state`.
pub const CHANGEFEED_STATE: &str = "ticdc_coordinator_changefeed_state";
/// Operators ever begun. Label: `type`.
pub const OPERATOR_CREATED: &str = "ticdc_coordinator_operator_created_count";
/// Operators ever ended. Label: `type`.
pub const OPERATOR_FINISHED: &str = "ticdc_coordinator_operator_finished_count";
/// Seconds from the begin to the end of an operator. Label: `type`.
pub const OPERATOR_DURATION: &str = "ticdc_coordinator_finish_operators_duration_seconds";
/// Size of the membership view.
pub const ALIVE_NODES: &str = "ticdc_coordinator_alive_nodes";
/// What is left on a node that is being drained. Label: `node`.
pub const DRAIN_REMAINING: &str = "ticdc_coordinator_drain_remaining";
/// The role was gained or lost. Label: `role`.
pub const ELECTION_CHANGES: &str = "ticdc_coordinator_election_changes_total";
/// Seconds of a request to the metadata store. Labels: `op`, `result`.
pub const METASTORE_DURATION: &str = "ticdc_metastore_request_duration_seconds";

/// Between two passes over the changefeeds.
pub const PERIOD: Duration = Duration::from_secs(5);
/// Characters of an error message in a label.
const MESSAGE_BYTES: usize = 256;

/// Registers the descriptions.
pub fn describe() {
    describe_counter!(OWNERSHIP, Unit::Seconds, "Seconds this node has been coordinator");
    describe_gauge!(STATUS, "State of the changefeed");
    describe_gauge!(CHECKPOINT_TS, Unit::Milliseconds, "Time of the persisted checkpoint");
    describe_gauge!(CHECKPOINT_LAG, Unit::Seconds, "Time from the persisted checkpoint to now");
    describe_gauge!(ERROR_INFO, "Error of a failed or retrying changefeed");
    describe_gauge!(DOWNSTREAM_INFO, "Kind of the changefeed's sink");
    describe_gauge!(CHANGEFEED_STATE, "Number of changefeeds by state of placement");
    describe_gauge!(OPERATOR_CREATED, "Changes of placement ever begun");
    describe_gauge!(OPERATOR_FINISHED, "Changes of placement ever ended");
    describe_histogram!(OPERATOR_DURATION, Unit::Seconds, "Duration of a change of placement");
    describe_gauge!(ALIVE_NODES, "Members of the cluster");
    describe_gauge!(DRAIN_REMAINING, "What is left on a node that is being drained");
    describe_counter!(ELECTION_CHANGES, "Times the role was gained or lost");
    describe_histogram!(METASTORE_DURATION, Unit::Seconds, "Duration of a request to the metadata store");
    // Alerts need the counter on every node, from the start.
    counter!(OWNERSHIP).absolute(0);
    counter!(ELECTION_CHANGES, "role" => "coordinator").absolute(0);
}

/// A request to the store ended.
pub(crate) fn count_store(op: &'static str, ok: bool, took: Duration) {
    let result = if ok { "ok" } else { "error" };
    histogram!(METASTORE_DURATION, "op" => op, "result" => result).record(took.as_secs_f64());
}

/// The role was gained or lost.
pub(crate) fn count_election() {
    counter!(ELECTION_CHANGES, "role" => "coordinator").increment(1);
}

/// The coordinator has led for some more time.
pub(crate) fn count_ownership(seconds: u64) {
    counter!(OWNERSHIP).increment(seconds);
}

/// What the coordinator shows. Its series go with it, so that nobody shows what is another node's by now.
#[derive(Default)]
pub(crate) struct CoordinatorMetrics {
    /// By their state.
    counts: BTreeMap<&'static str, Gauge>,
    nodes: Option<Gauge>,
    /// By kind: begun, and ended.
    operators: BTreeMap<&'static str, [Gauge; 2]>,
    drain: Option<(NodeId, Gauge)>,
    feeds: BTreeMap<ChangefeedId, FeedMetrics>,
}

impl CoordinatorMetrics {
    /// An operator began, or ended after some time.
    pub(crate) fn operator(&mut self, kind: &'static str, took: Option<Duration>) {
        let [begun, ended] = self.operators.entry(kind).or_insert_with(|| {
            [gauge!(OPERATOR_CREATED, "type" => kind), gauge!(OPERATOR_FINISHED, "type" => kind)]
        });
        match took {
            None => begun.increment(1),
            Some(took) => {
                ended.increment(1);
                histogram!(OPERATOR_DURATION, "type" => kind).record(took.as_secs_f64());
            }
        }
    }

    /// How many there are.
    #[expect(clippy::cast_precision_loss, reason = "counts for people")]
    pub(crate) fn set_counts(&mut self, counts: Counts) {
        for (state, count) in [
            ("Total", counts.total),
            ("Working", counts.working),
            ("Scheduling", counts.scheduling),
            ("Absent", counts.absent),
            ("Stopped", counts.stopped),
        ] {
            let gauge =
                self.counts.entry(state).or_insert_with(|| gauge!(CHANGEFEED_STATE, "state" => state));
            gauge.set(count as f64);
        }
        self.nodes.get_or_insert_with(|| gauge!(ALIVE_NODES)).set(counts.nodes as f64);
    }

    /// How far the drain is, if one is under way.
    #[expect(clippy::cast_precision_loss, reason = "counts for people")]
    pub(crate) fn set_drain(&mut self, drain: Option<&DrainView>) {
        let Some(drain) = drain else {
            self.drain = None;
            return;
        };
        if self.drain.as_ref().is_none_or(|(node, _)| *node != drain.target) {
            let gauge = gauge!(DRAIN_REMAINING, "node" => drain.target.to_string());
            self.drain = Some((drain.target.clone(), gauge));
        }
        if let Some((_, gauge)) = &self.drain {
            gauge.set(drain.remaining as f64);
        }
    }

    /// Sets the series of the changefeeds that there are; those of others go. `time` is when a position of a
    /// changefeed was committed upstream.
    pub(crate) fn set_changefeeds(
        &mut self,
        views: &[ChangefeedView],
        time: impl Fn(&ChangefeedView) -> Option<WallTime>,
        now: WallTime,
    ) {
        self.feeds.retain(|id, _| views.iter().any(|view| view.info.id == *id));
        for view in views {
            self.feeds.entry(view.info.id.clone()).or_default().set(view, time(view), now);
        }
    }
}

/// A series with labels that change.
#[derive(Default)]
struct Relabelled(Option<(Vec<(&'static str, String)>, Gauge)>);

impl Relabelled {
    /// Shows 1 with these labels and nothing with those before; `None` shows nothing.
    fn show(&mut self, name: &'static str, labels: Option<Vec<(&'static str, String)>>) {
        if self.0.as_ref().map(|(known, _)| known) == labels.as_ref() {
            return;
        }
        self.0 = labels.map(|labels| {
            let gauge = gauge!(name, &labels);
            gauge.set(1.0);
            (labels, gauge)
        });
    }
}

/// The series of one changefeed.
#[derive(Default)]
struct FeedMetrics {
    status: Option<Gauge>,
    /// Time and lag of the checkpoint.
    checkpoint: Option<[Gauge; 2]>,
    /// The last checkpoint whose time was known.
    known: Option<WallTime>,
    downstream: Relabelled,
    error: Relabelled,
}

impl FeedMetrics {
    /// `time` is when its persisted checkpoint was committed upstream, if that is known now: otherwise its lag is what
    /// it was, and longer.
    #[expect(clippy::cast_precision_loss, reason = "milliseconds since 1970 fit a double exactly")]
    fn set(&mut self, view: &ChangefeedView, time: Option<WallTime>, now: WallTime) {
        let info = &view.info;
        let feed = [("namespace", info.id.keyspace.to_string()), ("changefeed", info.id.name.to_string())];
        let with = |more: &[(&'static str, String)]| [&feed[..], more].concat();
        let keyspace_id = with(&[("keyspace_id", info.keyspace_id.to_string())]);
        let status = self.status.get_or_insert_with(|| gauge!(STATUS, &keyspace_id));
        status.set(f64::from(info.state.metric()));
        let scheme = Uri::parse(&info.sink_uri).map_or_else(|_| "unknown".to_owned(), |uri| uri.scheme);
        let downstream = SinkKind::downstream_type(&scheme).to_owned();
        self.downstream.show(DOWNSTREAM_INFO, Some(with(&[("downstream_type", downstream)])));
        let ended = matches!(
            info.state,
            ChangefeedState::Stopped | ChangefeedState::Finished | ChangefeedState::Removed
        );
        self.known = time.or(self.known).filter(|_| !ended);
        match self.known {
            None => self.checkpoint = None,
            Some(time) => {
                let handles = || [gauge!(CHECKPOINT_TS, &feed), gauge!(CHECKPOINT_LAG, &keyspace_id)];
                let [ts, lag] = self.checkpoint.get_or_insert_with(handles);
                ts.set(time.millis() as f64);
                lag.set(time.seconds_until(now).max(0.0));
            }
        }
        let erring = matches!(info.state, ChangefeedState::Failed | ChangefeedState::Warning);
        let error = info.error.as_ref().filter(|_| erring).map(|error| {
            with(&[
                ("state", info.state.name().to_owned()),
                ("error_time", error.time.clone()),
                ("code", error.code.clone()),
                ("message", label_text(error)),
            ])
        });
        self.error.show(ERROR_INFO, error);
    }
}

/// The message on one line, cut to the length of a label.
fn label_text(error: &RunningError) -> String {
    let line = error.message.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.len() <= MESSAGE_BYTES {
        return line;
    }
    let mut cut = MESSAGE_BYTES - 3;
    while !line.is_char_boundary(cut) {
        cut -= 1;
    }
    format!("{}...", &line[..cut])
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Arc;

    use heartbeatpb::config::{ChangefeedInfo, ReplicaConfig, UpstreamInfo};
    use heartbeatpb::{ChangefeedId, Ts};
    use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString};
    use parking_lot::Mutex;

    use super::*;
    use crate::changefeed::Group;

    /// Keeps the series that were asked for: the name, and the labels' values.
    #[derive(Default)]
    struct Asked(Mutex<BTreeSet<String>>);

    impl Asked {
        fn note(&self, key: &Key) {
            let labels: Vec<_> = key.labels().map(|label| label.value()).collect();
            self.0.lock().insert(format!("{} {}", key.name(), labels.join("/")));
        }

        /// Series of one name since the last time.
        fn take(&self, name: &str) -> Vec<String> {
            let all = std::mem::take(&mut *self.0.lock());
            all.iter()
                .filter_map(|key| key.strip_prefix(name)?.strip_prefix(' '))
                .map(str::to_owned)
                .collect()
        }
    }

    impl Recorder for Asked {
        fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
        fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
        fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

        fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
            self.note(key);
            Counter::noop()
        }

        fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
            self.note(key);
            Gauge::noop()
        }

        fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
            self.note(key);
            Histogram::noop()
        }
    }

    fn view(state: ChangefeedState, error_time: Option<&str>) -> ChangefeedView {
        let (upstream, config) = (UpstreamInfo::default(), ReplicaConfig::default());
        let mut info = ChangefeedInfo::new(ChangefeedId::fresh("a"), upstream, "blackhole://", config, Ts(1));
        info.state = state;
        info.error = error_time.map(|time| RunningError {
            time: time.to_owned(),
            node: "n1".to_owned(),
            code: "CDC:ErrX".to_owned(),
            message: "no".to_owned(),
        });
        ChangefeedView {
            info: Arc::new(info),
            checkpoint: Ts(5),
            saved_checkpoint: Ts(5),
            saved_time: None,
            last_synced: Ts(5),
            group: Group::Replicating,
            node: None,
            bootstrap_done: true,
            errors: Vec::new(),
            removing: false,
            waiting_for: None,
        }
    }

    // behaviour: coordinator-CO-25
    #[test]
    fn a_changefeed_that_ended_has_no_lag() {
        let asked = Asked::default();
        let lag_of = |state| {
            metrics::with_local_recorder(&asked, || {
                let mut feed = FeedMetrics::default();
                feed.set(&view(state, None), Some(WallTime(1_000_000)), WallTime(3_000_000));
            });
            asked.take(CHECKPOINT_LAG)
        };
        assert_eq!(lag_of(ChangefeedState::Normal), ["default/a/0"]);
        for ended in [ChangefeedState::Stopped, ChangefeedState::Finished, ChangefeedState::Removed] {
            assert!(lag_of(ended).is_empty(), "{ended}");
        }
        assert_eq!(lag_of(ChangefeedState::Failed), ["default/a/0"], "a failed one falls behind");
    }

    // behaviour: coordinator-CO-26
    #[test]
    fn each_time_of_an_error_is_a_series() {
        let asked = Asked::default();
        let errors_of = |state, time| {
            metrics::with_local_recorder(&asked, || {
                FeedMetrics::default().set(&view(state, time), None, WallTime(3_000_000));
            });
            asked.take(ERROR_INFO)
        };
        let warning = ChangefeedState::Warning;
        assert_eq!(errors_of(warning, Some("")), ["default/a/warning//CDC:ErrX/no"]);
        assert_eq!(errors_of(warning, Some("t1")), ["default/a/warning/t1/CDC:ErrX/no"]);
        assert_eq!(errors_of(ChangefeedState::Failed, Some("t2")), ["default/a/failed/t2/CDC:ErrX/no"]);
        assert!(errors_of(warning, None).is_empty());
        assert!(errors_of(ChangefeedState::Normal, Some("t1")).is_empty(), "it is over");
    }

    #[test]
    fn what_is_left_of_a_drain_is_shown_as_long_as_there_is_one() {
        let asked = Asked::default();
        let mut shown = CoordinatorMetrics::default();
        let drain = DrainView::of(&"n1".into(), crate::drain::NodeState::Draining, 7);
        let series = |shown: &mut CoordinatorMetrics, drain| {
            metrics::with_local_recorder(&asked, || shown.set_drain(drain));
            (asked.take(DRAIN_REMAINING), shown.drain.is_some())
        };
        assert_eq!(series(&mut shown, Some(&drain)), (vec!["n1".to_owned()], true));
        assert_eq!(series(&mut shown, Some(&drain)), (Vec::new(), true), "the handle is kept");
        assert_eq!(series(&mut shown, None), (Vec::new(), false));
    }

    #[test]
    fn the_series_of_a_changefeed_go_with_it_and_its_lag_grows_when_nobody_knows_it() {
        let mut shown = CoordinatorMetrics::default();
        let feed = view(ChangefeedState::Normal, None);
        let mut look = |views: &[ChangefeedView], time: Option<i64>, now| {
            shown.set_changefeeds(views, |_| time.map(WallTime), WallTime(now));
            shown.feeds.values().next().map(|feed| feed.known)
        };
        let one = std::slice::from_ref(&feed);
        assert_eq!(look(one, None, 2), Some(None), "there is no lag to tell");
        assert_eq!(look(one, Some(1_000_000), 3_000_000), Some(Some(WallTime(1_000_000))));
        assert_eq!(look(one, None, 9_000_000), Some(Some(WallTime(1_000_000))), "it counts on from there");
        assert_eq!(look(&[], None, 9_000_000), None);
    }

    #[test]
    fn a_message_becomes_one_bounded_line() {
        let error = |message: &str| RunningError {
            time: String::new(),
            node: String::new(),
            code: String::new(),
            message: message.to_owned(),
        };
        assert_eq!(label_text(&error("a\n  b\tc")), "a b c");
        let long = label_text(&error(&"é".repeat(200)));
        assert!(long.len() <= MESSAGE_BYTES && long.ends_with("é..."));
    }
}
