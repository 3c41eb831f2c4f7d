//! Metrics of the process, and what of all metrics a scrape shows.

use std::fmt::Write as _;
use std::sync::OnceLock;
use std::time::SystemTime;

use coordinator::ChangefeedView;
use heartbeatpb::config::ChangefeedState;
use metrics::{describe_gauge, gauge};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder};

/// 1 for this build. Labels: `release_version`, `git_hash`, `utc_build_time`, `kernel_type`, `ticdc_arch`.
pub const BUILD_INFO: &str = "ticdc_server_build_info";
/// Processors that the process may use.
pub const MAX_PROCS: &str = "ticdc_server_go_max_procs";
/// Seconds from 1970 to the start of the process.
pub const START_TIME: &str = "process_start_time_seconds";
/// Seconds of processor time in user and kernel mode; a counter with a fraction.
pub const CPU_SECONDS: &str = "process_cpu_seconds_total";
/// Bytes of resident memory.
pub const RESIDENT_BYTES: &str = "process_resident_memory_bytes";
/// Bytes of address space.
pub const VIRTUAL_BYTES: &str = "process_virtual_memory_bytes";
/// Open file descriptors.
pub const OPEN_FDS: &str = "process_open_fds";
/// Most file descriptors that may be open.
pub const MAX_FDS: &str = "process_max_fds";
/// Live tasks of the async runtime. Dashboards find clusters by this name.
pub const TASKS: &str = "go_goroutines";
/// Threads of the operating system.
pub const THREADS: &str = "go_threads";

/// Unit of the times in `/proc/self/stat`: the same on every Linux that Rust supports.
const TICKS_PER_SECOND: f64 = 100.0;

/// Describes the metrics of this crate, and sets those that never change.
#[expect(clippy::cast_precision_loss, reason = "a number of processors")]
pub(crate) fn describe() {
    describe_gauge!(BUILD_INFO, "Build of the program");
    describe_gauge!(MAX_PROCS, "Processors that the process may use");
    describe_gauge!(START_TIME, "Start of the process in seconds since 1970");
    describe_gauge!(RESIDENT_BYTES, "Resident memory of the process");
    describe_gauge!(VIRTUAL_BYTES, "Address space of the process");
    describe_gauge!(OPEN_FDS, "Open file descriptors");
    describe_gauge!(MAX_FDS, "Most file descriptors that may be open");
    describe_gauge!(TASKS, "Live tasks of the async runtime");
    describe_gauge!(THREADS, "Threads of the process");
    gauge!(BUILD_INFO, "release_version" => concat!("v", env!("CARGO_PKG_VERSION")),
        "git_hash" => option_env!("MILLRACE_GIT_HASH").unwrap_or(""),
        "utc_build_time" => option_env!("MILLRACE_BUILD_TIME").unwrap_or(""),
        "kernel_type" => "Classic", "ticdc_arch" => "newarch")
    .set(1.0);
    gauge!(MAX_PROCS).set(std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as f64);
    static STARTED: OnceLock<f64> = OnceLock::new();
    let started = STARTED.get_or_init(|| {
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
    });
    gauge!(START_TIME).set(*started);
}

/// Looks at the process. The text is what the exporter has no type for.
#[expect(clippy::cast_precision_loss, reason = "counts for people")]
pub(crate) fn collect() -> String {
    if let Ok(runtime) = tokio::runtime::Handle::try_current() {
        gauge!(TASKS).set(runtime.metrics().num_alive_tasks() as f64);
    }
    if let Ok(files) = std::fs::read_dir("/proc/self/fd") {
        gauge!(OPEN_FDS).set(files.count() as f64);
    }
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let most = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    if let Some(most) = most.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok()) {
        gauge!(MAX_FDS).set(most);
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    for (key, name, unit) in
        [("VmRSS:", RESIDENT_BYTES, 1024.0), ("VmSize:", VIRTUAL_BYTES, 1024.0), ("Threads:", THREADS, 1.0)]
    {
        let number = status.lines().find_map(|line| line.strip_prefix(key)?.split_whitespace().next());
        if let Some(number) = number.and_then(|text| text.parse::<f64>().ok()) {
            gauge!(name).set(number * unit);
        }
    }
    let mut text = String::new();
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    if let Some(seconds) = cpu_seconds(&stat) {
        let help = "Processor time in user and kernel mode";
        let _ = writeln!(
            text,
            "# HELP {CPU_SECONDS} {help}\n# TYPE {CPU_SECONDS} counter\n{CPU_SECONDS} {seconds}"
        );
    }
    text
}

fn cpu_seconds(stat: &str) -> Option<f64> {
    // The program's name stands in parentheses and may hold anything, so counting begins after it.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?;
    Some(ticks / TICKS_PER_SECOND)
}

/// `count` bounds from `first`, each twice the one before.
fn doubling(first: f64, count: usize) -> Vec<f64> {
    std::iter::successors(Some(first), |bound| Some(bound * 2.0)).take(count).collect()
}

/// Bounds of the histograms that are not in the range of most: what counts bytes and rows, and what lasts longer.
///
/// # Errors
/// When a list of bounds is empty, which none is.
pub(crate) fn buckets(mut builder: PrometheusBuilder) -> Result<PrometheusBuilder, BuildError> {
    let operators = [
        0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 20.0, 40.0, 60.0, 90.0, 120.0, 180.0, 240.0, 300.0, 480.0, 600.0,
        720.0, 900.0, 1200.0, 1800.0, 3600.0,
    ];
    for name in [
        coordinator::metrics::OPERATOR_DURATION,
        maintainer::metrics::OPERATOR_DURATION,
        maintainer::metrics::BOOTSTRAP_DURATION,
    ] {
        builder = builder.set_buckets_for_metric(Matcher::Full(name.to_owned()), &operators)?;
    }
    for (name, first, count) in [
        (sink::metrics::BATCH_ROW_COUNT, 1.0, 18),
        (sink::metrics::BATCH_WRITE_BYTES, 1024.0, 18),
        (logservice::metrics::BATCH_BYTES, 1024.0, 16),
        ("ticdc_sink_cloud_storage_flush_bytes", 1024.0, 20),
        (maintainer::metrics::HANDLE_EVENT_DURATION, 0.01, 18),
        (dispatcher_manager::metrics::DDL_EXEC_DURATION, 0.01, 18),
        (dispatcher_manager::metrics::CREATE_DISPATCHER_DURATION, 0.000_001, 20),
        (sink::metrics::DML_BATCH_COMMIT, 0.01, 18),
        (sink::metrics::WORKER_FLUSH_DURATION, 0.001, 20),
        (sink::metrics::WORKER_BATCH_FLUSH_DURATION, 0.001, 20),
        (sink::metrics::WORKER_TOTAL_DURATION, 0.001, 20),
        (sink::metrics::CONFLICT_DETECT_DURATION, 0.001, 20),
    ] {
        builder = builder.set_buckets_for_metric(Matcher::Full(name.to_owned()), &doubling(first, count))?;
    }
    Ok(builder)
}

/// A scrape without the series of what is not there any more: the exporter keeps every series until the process
/// ends. Gone are those of changefeeds that were removed, checkpoints of changefeeds that do not run, errors that
/// are over, and families of which nothing is left.
pub(crate) fn current(text: &str, feeds: &[ChangefeedView]) -> String {
    let mut out = String::with_capacity(text.len());
    let mut head = String::new();
    for line in text.lines() {
        if line.starts_with('#') {
            // Both lines of a head name its family in the third word.
            let family = line.split(' ').nth(2).unwrap_or_default();
            if head.split(' ').nth(2) != Some(family) {
                head.clear();
            }
            head.push_str(line);
            head.push('\n');
        } else if !line.is_empty() && is_current(line, feeds) {
            out.push_str(&std::mem::take(&mut head));
            out.push_str(line);
            out.push('\n');
        }
    }
    out
}

fn is_current(line: &str, feeds: &[ChangefeedView]) -> bool {
    let Some(name) = label(line, "changefeed") else { return true };
    let Some(feed) = feeds.iter().find(|feed| *feed.info.id.name == *name) else { return false };
    let state = feed.info.state;
    let metric = line.split(['{', ' ']).next().unwrap_or_default();
    if [coordinator::metrics::CHECKPOINT_TS, coordinator::metrics::CHECKPOINT_LAG].contains(&metric) {
        return !matches!(
            state,
            ChangefeedState::Stopped | ChangefeedState::Finished | ChangefeedState::Removed
        );
    }
    if metric == coordinator::metrics::ERROR_INFO {
        let erring = matches!(state, ChangefeedState::Failed | ChangefeedState::Warning);
        return feed.info.error.as_ref().filter(|_| erring).is_some_and(|error| {
            label(line, "error_time") == Some(&error.time)
                && label(line, "code") == Some(&error.code)
                && label(line, "state") == Some(state.name())
        });
    }
    true
}

/// The value of a label that needs no escapes.
fn label<'l>(line: &'l str, name: &str) -> Option<&'l str> {
    let labels = line.split_once('{')?.1;
    let at = if let Some(rest) = labels.strip_prefix(name).and_then(|rest| rest.strip_prefix("=\"")) {
        rest
    } else {
        labels.split_once(&format!(",{name}=\""))?.1
    };
    at.split('"').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_read_behind_any_program_name() {
        let stat = "42 (odd ) name) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20";
        assert_eq!(cpu_seconds(stat), Some(2.0));
        assert_eq!(cpu_seconds("nonsense"), None);
        assert!(collect().contains("process_cpu_seconds_total "));
    }

    #[test]
    fn labels_are_found_wherever_they_stand() {
        let line = r#"m{namespace="default",changefeed="a",type="x"} 1"#;
        assert_eq!(label(line, "changefeed"), Some("a"));
        assert_eq!(label(line, "namespace"), Some("default"));
        assert_eq!(label(line, "feed"), None);
        assert_eq!(label("m 1", "changefeed"), None);
    }

    #[test]
    fn what_is_gone_is_not_shown_and_neither_is_its_family() {
        let text =
            "# HELP a words\n# TYPE a gauge\na{changefeed=\"gone\"} 1\n\n# TYPE b counter\nb{type=\"x\"} 2\n";
        assert_eq!(current(text, &[]), "# TYPE b counter\nb{type=\"x\"} 2\n");
    }
}
