//! The registry behind `/metrics`: cells that handles write without a lock, and the text that a scrape reads, which
//! `metrics-exporter-prometheus` writes. Its own registry keeps series for ever, or takes them from handles that live.
//!
//! A changefeed, a maintainer or a peer comes and goes while the process lives, and so do their series. The owner of
//! a thing keeps the handles of its series, and that is all it has to do:
//!
//! - a gauge is exported as long as somebody holds its handle;
//! - a counter or histogram that is labelled with something that goes ([`PASSING`]) likewise;
//! - any other counter or histogram stays until the process ends, since it counts for the node.
//!
//! Two owners of the same labels, an old maintainer and its successor say, share one cell: the first to go takes
//! nothing from the other. A series that comes again begins at zero, as after a restart.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use metrics::{Counter, Gauge, Histogram, HistogramFn, Key, KeyName, Label, Metadata, SharedString, Unit};
use metrics_exporter_prometheus::LabelSet;
use metrics_exporter_prometheus::formatting::{write_help_line, write_metric_line, write_type_line};
use parking_lot::Mutex;

/// Labels of things that go while the process stays.
const PASSING: [&str; 4] = ["changefeed", "area", "target", "from"];

/// The recorder; cheap to clone.
#[derive(Clone)]
pub(crate) struct Recorder(Arc<Registry>);

/// Reads what was recorded; cheap to clone.
#[derive(Clone)]
pub struct MetricsHandle(Arc<Registry>);

struct Registry {
    /// Bounds of histograms by name.
    bounds: fn(&str) -> Vec<f64>,
    /// Names of gauges that only grow by fractions, and are exported as counters.
    growing: &'static [&'static str],
    families: Mutex<BTreeMap<String, Family>>,
}

#[derive(Default)]
struct Family {
    help: String,
    bounds: Option<Arc<[f64]>>,
    /// By sorted labels as they are written.
    series: BTreeMap<Vec<String>, Series>,
}

struct Series {
    labels: LabelSet,
    cell: Cell,
    /// Goes with the last handle.
    passing: bool,
}

#[derive(Clone)]
enum Cell {
    Counter(Arc<AtomicU64>),
    Gauge(Arc<AtomicU64>),
    Histogram(Arc<Buckets>),
}

impl Cell {
    fn kind(&self) -> &'static str {
        match self {
            Self::Counter(_) => "counter",
            Self::Gauge(_) => "gauge",
            Self::Histogram(_) => "histogram",
        }
    }

    /// Whether somebody holds a handle.
    fn is_held(&self) -> bool {
        match self {
            Self::Counter(cell) | Self::Gauge(cell) => Arc::strong_count(cell) > 1,
            Self::Histogram(cell) => Arc::strong_count(cell) > 1,
        }
    }
}

/// A histogram. Its count is the sum of its buckets, so that a scrape never sees one without the other.
struct Buckets {
    bounds: Arc<[f64]>,
    /// One more than there are bounds.
    counts: Box<[AtomicU64]>,
    /// Bits of the sum.
    sum: AtomicU64,
}

impl Buckets {
    fn new(bounds: &Arc<[f64]>) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds: Arc::clone(bounds), counts, sum: AtomicU64::new(0) }
    }
}

impl HistogramFn for Buckets {
    fn record(&self, value: f64) {
        if value.is_nan() {
            return;
        }
        let at = self.bounds.partition_point(|bound| *bound < value);
        self.counts[at].fetch_add(1, Ordering::Relaxed);
        let add = |bits| Some((f64::from_bits(bits) + value).to_bits());
        let _ = self.sum.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
    }
}

impl Registry {
    fn describe(&self, name: &KeyName, help: &SharedString) {
        self.families.lock().entry(name.as_str().to_owned()).or_default().help = help.to_string();
    }

    /// The cell of a series, made by `make` if there is none.
    fn cell(&self, key: &Key, make: impl FnOnce(&Arc<[f64]>) -> Cell) -> Cell {
        let mut sorted: Vec<Label> = key.labels().cloned().collect();
        sorted.sort();
        let passes = sorted.iter().any(|label| PASSING.contains(&label.key()));
        let labels = LabelSet::from_key_and_global(
            &Key::from_parts(key.name().to_owned(), sorted),
            &Default::default(),
        );
        let mut families = self.families.lock();
        let family = families.entry(key.name().to_owned()).or_default();
        let bounds = family.bounds.get_or_insert_with(|| (self.bounds)(key.name()).into());
        let made = make(bounds);
        // One name has one type: what is asked for as another is recorded and not shown.
        if family.series.values().next().is_some_and(|series| series.cell.kind() != made.kind()) {
            debug_assert!(false, "{} has two types", key.name());
            return made;
        }
        let passing = matches!(made, Cell::Gauge(_)) || passes;
        let written = labels.to_strings().collect();
        family.series.entry(written).or_insert(Series { labels, cell: made, passing }).cell.clone()
    }
}

impl metrics::Recorder for Recorder {
    fn describe_counter(&self, key: KeyName, _: Option<Unit>, help: SharedString) {
        self.0.describe(&key, &help);
    }

    fn describe_gauge(&self, key: KeyName, _: Option<Unit>, help: SharedString) {
        self.0.describe(&key, &help);
    }

    fn describe_histogram(&self, key: KeyName, _: Option<Unit>, help: SharedString) {
        self.0.describe(&key, &help);
    }

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        match self.0.cell(key, |_| Cell::Counter(Arc::default())) {
            Cell::Counter(cell) => Counter::from_arc(cell),
            Cell::Gauge(_) | Cell::Histogram(_) => Counter::noop(),
        }
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        match self.0.cell(key, |_| Cell::Gauge(Arc::default())) {
            Cell::Gauge(cell) => Gauge::from_arc(cell),
            Cell::Counter(_) | Cell::Histogram(_) => Gauge::noop(),
        }
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        match self.0.cell(key, |bounds| Cell::Histogram(Arc::new(Buckets::new(bounds)))) {
            Cell::Histogram(cell) => Histogram::from_arc(cell),
            Cell::Counter(_) | Cell::Gauge(_) => Histogram::noop(),
        }
    }
}

impl Recorder {
    /// A recorder without series. `bounds` are a histogram's, by its name; `growing` are gauges that are exported as
    /// counters, because a counter of the recorder's interface has no fractions.
    pub(crate) fn new(bounds: fn(&str) -> Vec<f64>, growing: &'static [&'static str]) -> Self {
        Self(Arc::new(Registry { bounds, growing, families: Mutex::default() }))
    }

    /// Reads what is recorded here.
    pub(crate) fn handle(&self) -> MetricsHandle {
        MetricsHandle(Arc::clone(&self.0))
    }
}

impl MetricsHandle {
    /// Forgets the series of what is gone. For a timer: without it they would wait for the next scrape.
    pub fn run_upkeep(&self) {
        for family in self.0.families.lock().values_mut() {
            // The lock keeps others from taking a handle in between.
            family.series.retain(|_, series| !series.passing || series.cell.is_held());
        }
    }

    /// Everything that is there, in the text format of Prometheus, version 0.0.4.
    #[must_use]
    pub fn render(&self) -> String {
        self.run_upkeep();
        let mut text = String::with_capacity(64 << 10);
        for (name, family) in &*self.0.families.lock() {
            let Some(first) = family.series.values().next() else { continue };
            if !family.help.is_empty() {
                write_help_line(&mut text, name, None, None, &family.help);
            }
            let growing = self.0.growing.contains(&name.as_str());
            let kind = if growing { "counter" } else { first.cell.kind() };
            write_type_line(&mut text, name, None, None, kind);
            for series in family.series.values() {
                write_series(&mut text, name, series);
            }
        }
        text
    }
}

fn write_series(text: &mut String, name: &str, series: &Series) {
    let labels = &series.labels;
    let mut line = |suffix, bound: Option<String>, value: &dyn std::fmt::Display| {
        write_metric_line(text, name, suffix, labels, bound.map(|bound| ("le", bound)), value, None);
    };
    match &series.cell {
        Cell::Counter(cell) => line(None, None, &cell.load(Ordering::Relaxed)),
        Cell::Gauge(cell) => line(None, None, &f64::from_bits(cell.load(Ordering::Relaxed))),
        Cell::Histogram(cell) => {
            let mut count = 0;
            for (at, here) in cell.counts.iter().enumerate() {
                count += here.load(Ordering::Relaxed);
                let bound = cell.bounds.get(at).map_or_else(|| "+Inf".to_owned(), f64::to_string);
                line(Some("bucket"), Some(bound), &count);
            }
            line(Some("sum"), None, &f64::from_bits(cell.sum.load(Ordering::Relaxed)));
            line(Some("count"), None, &count);
        }
    }
}

#[cfg(test)]
mod tests {
    use metrics::{counter, describe_counter, gauge, histogram};

    use super::*;

    fn bounds(_: &str) -> Vec<f64> {
        vec![1.0, 2.5]
    }

    /// Runs `f` under a recorder of its own.
    fn with<R>(f: impl FnOnce(&MetricsHandle) -> R) -> R {
        let recorder = Recorder::new(bounds, &["seconds_total"]);
        let handle = recorder.handle();
        metrics::with_local_recorder(&recorder, || f(&handle))
    }

    #[test]
    fn every_type_is_written_as_the_format_has_it() {
        with(|handle| {
            describe_counter!("c_count", "counts\nthings");
            counter!("c_count", "b" => "say \"x\"\\", "a" => "1").increment(3);
            let held = gauge!("g");
            held.set(-1.5);
            let seconds = gauge!("seconds_total");
            seconds.increment(0.25);
            let sizes = histogram!("h", "type" => "t");
            for value in [1.0, 2.0, 9.0] {
                sizes.record(value);
            }
            sizes.record(f64::NAN);
            let expected = "# HELP c_count counts\\nthings\n# TYPE c_count counter\n\
                c_count{a=\"1\",b=\"say \\\"x\\\"\\\\\"} 3\n\
                # TYPE g gauge\ng -1.5\n\
                # TYPE h histogram\nh_bucket{type=\"t\",le=\"1\"} 1\nh_bucket{type=\"t\",le=\"2.5\"} 2\n\
                h_bucket{type=\"t\",le=\"+Inf\"} 3\nh_sum{type=\"t\"} 12\nh_count{type=\"t\"} 3\n\
                # TYPE seconds_total counter\nseconds_total 0.25\n";
            assert_eq!(handle.render(), expected);
        });
    }

    // behaviour: metrics-7
    #[test]
    fn the_successor_of_one_that_goes_keeps_its_series() {
        with(|handle| {
            let feed = || gauge!("running", "changefeed" => "a");
            let (old, new) = (feed(), feed());
            old.increment(1.0);
            new.increment(1.0);
            old.decrement(1.0);
            drop(old);
            assert!(handle.render().contains("running{changefeed=\"a\"} 1\n"));
            drop(new);
            assert_eq!(handle.render(), "", "and its family goes with the last");
        });
    }

    #[test]
    fn what_counts_for_the_node_outlives_its_handle_and_what_counts_for_a_peer_does_not() {
        with(|handle| {
            counter!("sent", "type" => "event").increment(1);
            counter!("sent", "type" => "event", "target" => "n1").increment(1);
            histogram!("took", "area" => "default/a").record(1.0);
            assert_eq!(handle.render(), "# TYPE sent counter\nsent{type=\"event\"} 1\n");
        });
    }
}
