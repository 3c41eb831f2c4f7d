//! Metrics of the process, and the bounds of every histogram.

use std::sync::OnceLock;
use std::time::SystemTime;

use metrics::{Gauge, counter, describe_counter, describe_gauge, gauge};

/// 1 for this build. Labels: `release_version`, `git_hash`, `utc_build_time`, `kernel_type`, `ticdc_arch`.
pub const BUILD_INFO: &str = "ticdc_server_build_info";
/// Processors that the process may use.
pub const MAX_PROCS: &str = "ticdc_server_go_max_procs";
/// Seconds from 1970 to the start of the process.
pub const START_TIME: &str = "process_start_time_seconds";
/// Seconds of processor time in user and kernel mode, with fractions; exported as a counter.
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

/// Bytes of memory that the program has allocated and touched: its resident memory without files.
pub const HEAP_ALLOC: &str = "go_memstats_heap_alloc_bytes";
/// The same, under the name that dashboards subtract it by.
pub const HEAP_INUSE: &str = "go_memstats_heap_inuse_bytes";
/// Memory that the allocator keeps for later; not known apart from what is in use, so 0.
pub const HEAP_IDLE: &str = "go_memstats_heap_idle_bytes";
/// Always 0: dashboards subtract it.
pub const HEAP_RELEASED: &str = "go_memstats_heap_released_bytes";
/// Seconds until this node stops to write unless the metadata store confirms its lease; 0 while writing is suspended. Absent with the built-in store, whose lease lasts.
pub const LEASE_REMAINING: &str = "ticdc_metastore_lease_remaining_seconds";
/// Bytes written to the log file; 0 when the log goes to the console.
pub const LOG_WRITTEN: &str = "ticdc_logger_write_bytes_total";
/// Bytes of the log file.
pub const LOG_FILE_SIZE: &str = "ticdc_logger_file_size_bytes";
/// Bytes of the log file and of those that were put aside.
pub const LOG_TOTAL_SIZE: &str = "ticdc_logger_total_size_bytes";
/// Size of the file system with the log file.
pub const LOG_DISK_TOTAL: &str = "ticdc_logger_disk_total_bytes";
/// Bytes in use on the file system with the log file.
pub const LOG_DISK_USED: &str = "ticdc_logger_disk_used_bytes";

/// Time of one of the last hundred operations of people, in milliseconds since 1970, where it was answered. Labels: `namespace`, `changefeed`, `operation`, `result`, `username`, `details`, `error`, `event_id`.
pub const OPERATION_TIME: &str = "ticdc_owner_changefeed_operation_time";
/// Bytes of a source's log behind what was read and before what was confirmed: the source has to keep at least these. Labels: `namespace`, `changefeed`.
pub const UNCONFIRMED: &str = "ticdc_log_reader_unconfirmed_bytes";
/// Time of the oldest position that a source of this node has to keep, in milliseconds since 1970.
pub const SAFEPOINT: &str = "ticdc_gc_cdc_gc_safepoint";
/// The same: nobody else is asked what a source has to keep.
pub const MIN_SAFEPOINT: &str = "ticdc_gc_min_service_gc_safepoint";

/// Rows, and tables or columns that the target lacks, that differed in the last comparison of both ends. Labels: `namespace`, `changefeed`.
pub const VERIFY_DIFFERENT: &str = "ticdc_verify_different_rows";
/// Rows about which the last comparison could not decide, because they never stood still. Labels: `namespace`, `changefeed`.
pub const VERIFY_UNDECIDED: &str = "ticdc_verify_undecided_rows";
/// Seconds from 1970 to the end of the last comparison that came to its end. Labels: `namespace`, `changefeed`.
pub const VERIFY_ENDED: &str = "ticdc_verify_ended_timestamp_seconds";
/// Seconds from 1970 to the end of the last comparison that found both ends equal; 0 when there was none. Labels: `namespace`, `changefeed`.
pub const VERIFY_EQUAL: &str = "ticdc_verify_equal_timestamp_seconds";

/// Gauges that only grow: exported as counters, which have no fractions of their own.
pub(crate) const GROWING: &[&str] = &[CPU_SECONDS, sink::file_metrics::WORKER_BUSY];

/// Unit of the times in `/proc/self/stat`: the same on every Linux that Rust supports.
const TICKS_PER_SECOND: f64 = 100.0;

/// What is set at every look at the process.
struct Process {
    build: Gauge,
    max_procs: Gauge,
    start: Gauge,
    tasks: Gauge,
    open_fds: Gauge,
    max_fds: Gauge,
    cpu: Gauge,
    /// By the key in `/proc/self/status`, with the unit there.
    status: Vec<(&'static str, f64, Gauge)>,
    started: f64,
    _released: [Gauge; 2],
}

fn process() -> &'static Process {
    static PROCESS: OnceLock<Process> = OnceLock::new();
    PROCESS.get_or_init(|| {
        let started = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Process {
            build: gauge!(BUILD_INFO, "release_version" => concat!("v", env!("CARGO_PKG_VERSION")),
                "git_hash" => option_env!("MILLRACE_GIT_HASH").unwrap_or(""),
                "utc_build_time" => option_env!("MILLRACE_BUILD_TIME").unwrap_or(""),
                "kernel_type" => "Classic", "ticdc_arch" => "newarch"),
            max_procs: gauge!(MAX_PROCS),
            start: gauge!(START_TIME),
            tasks: gauge!(TASKS),
            open_fds: gauge!(OPEN_FDS),
            max_fds: gauge!(MAX_FDS),
            cpu: gauge!(CPU_SECONDS),
            status: vec![
                ("VmRSS:", 1024.0, gauge!(RESIDENT_BYTES)),
                ("VmSize:", 1024.0, gauge!(VIRTUAL_BYTES)),
                ("RssAnon:", 1024.0, gauge!(HEAP_ALLOC)),
                ("RssAnon:", 1024.0, gauge!(HEAP_INUSE)),
                ("Threads:", 1.0, gauge!(THREADS)),
            ],
            started: started.as_secs_f64(),
            _released: [gauge!(HEAP_IDLE), gauge!(HEAP_RELEASED)],
        }
    })
}

/// Describes the metrics of this crate.
pub(crate) fn describe() {
    for (name, words) in [
        (BUILD_INFO, "Build of the program"),
        (MAX_PROCS, "Processors that the process may use"),
        (START_TIME, "Start of the process in seconds since 1970"),
        (CPU_SECONDS, "Processor time in user and kernel mode"),
        (RESIDENT_BYTES, "Resident memory of the process"),
        (VIRTUAL_BYTES, "Address space of the process"),
        (OPEN_FDS, "Open file descriptors"),
        (MAX_FDS, "Most file descriptors that may be open"),
        (TASKS, "Live tasks of the async runtime"),
        (THREADS, "Threads of the process"),
        (HEAP_ALLOC, "Memory that the program has allocated and touched"),
        (HEAP_INUSE, "Memory that the program has allocated and touched"),
        (HEAP_IDLE, "Not known apart from what is in use"),
        (HEAP_RELEASED, "Not known apart from what is in use"),
        (OPERATION_TIME, "Times of the last operations of people"),
        (VERIFY_DIFFERENT, "Rows that differed in the last comparison of both ends"),
        (VERIFY_UNDECIDED, "Rows about which the last comparison could not decide"),
        (VERIFY_ENDED, "End of the last comparison of both ends in seconds since 1970"),
        (VERIFY_EQUAL, "End of the last comparison that found both ends equal in seconds since 1970"),
        (UNCONFIRMED, "Bytes of a source's log that were read and are not confirmed"),
        (SAFEPOINT, "Time of the oldest position that a source of this node has to keep"),
        (MIN_SAFEPOINT, "Time of the oldest position that a source of this node has to keep"),
        (LEASE_REMAINING, "Seconds until writing is suspended unless the lease is confirmed"),
        (LOG_FILE_SIZE, "Bytes of the log file"),
        (LOG_TOTAL_SIZE, "Bytes of the log file and of those that were put aside"),
        (LOG_DISK_TOTAL, "Size of the file system with the log file"),
        (LOG_DISK_USED, "Bytes in use on the file system with the log file"),
    ] {
        describe_gauge!(name, words);
    }
    describe_counter!(LOG_WRITTEN, "Bytes written to the log file");
    counter!(LOG_WRITTEN).increment(0);
    // Its start is the first look at the clock.
    let _ = process();
}

/// Looks at the process.
#[expect(clippy::cast_precision_loss, reason = "counts for people")]
pub(crate) fn collect() {
    let process = process();
    process.build.set(1.0);
    process.start.set(process.started);
    process.max_procs.set(std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as f64);
    if let Ok(runtime) = tokio::runtime::Handle::try_current() {
        process.tasks.set(runtime.metrics().num_alive_tasks() as f64);
    }
    if let Ok(files) = std::fs::read_dir("/proc/self/fd") {
        process.open_fds.set(files.count() as f64);
    }
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let most = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    if let Some(most) = most.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok()) {
        process.max_fds.set(most);
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    for (key, unit, gauge) in &process.status {
        let number = status.lines().find_map(|line| line.strip_prefix(key)?.split_whitespace().next());
        if let Some(number) = number.and_then(|text| text.parse::<f64>().ok()) {
            gauge.set(number * unit);
        }
    }
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    if let Some(seconds) = cpu_seconds(&stat) {
        process.cpu.set(seconds);
    }
    crate::telemetry::measure_log();
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

/// Bounds of lags in seconds: close together where people look, wide where it only matters that it is much.
fn lags() -> Vec<f64> {
    let mut bounds = Vec::new();
    for (first, step, last) in
        [(0.5, 0.5, 10.0), (11.0, 1.0, 20.0), (21.0, 30.0, 591.0), (900.0, 300.0, 3600.0)]
    {
        bounds.extend(std::iter::successors(Some(first), |at| Some(at + step)).take_while(|at| *at <= last));
    }
    bounds.extend([4000.0, 8000.0, 16000.0, 32000.0]);
    bounds
}

/// Bounds of the age of operators in seconds.
const OPERATORS: [f64; 21] = [
    0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 20.0, 40.0, 60.0, 90.0, 120.0, 180.0, 240.0, 300.0, 480.0, 600.0, 720.0,
    900.0, 1200.0, 1800.0, 3600.0,
];

/// Bounds of every histogram, by its name.
pub(crate) fn bounds(name: &str) -> Vec<f64> {
    use dispatcher_manager::metrics as manager;
    use logservice::collector_metrics;
    use logservice::event_store::metrics as store_metrics;
    let (first, count) = match name {
        coordinator::metrics::OPERATOR_DURATION
        | maintainer::metrics::OPERATOR_DURATION
        | maintainer::metrics::BOOTSTRAP_DURATION => return OPERATORS.to_vec(),
        collector_metrics::RECEIVED_LAG
        | logservice::metrics::REGISTER_LAG
        | logservice::metrics::SUBSCRIPTION_LAG
        | logservice::metrics::SUBSCRIPTION_GC_LAG => return lags(),
        collector_metrics::HANDLE_DURATION => {
            return vec![0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
        }
        maintainer::metrics::HANDLE_EVENT_DURATION
        | manager::DDL_EXEC_DURATION
        | manager::DDL_HANDLE_DURATION
        | sink::metrics::DML_BATCH_COMMIT => (0.01, 18),
        manager::CREATE_DISPATCHER_DURATION => (0.000_001, 20),
        sink::metrics::BATCH_ROW_COUNT => (1.0, 18),
        sink::metrics::BATCH_WRITE_BYTES => (1024.0, 18),
        sink::metrics::EVENT_ROW_COUNT => (1.0, 12),
        sink::file_metrics::FLUSH_BYTES => (1024.0, 20),
        sink::file_metrics::FLUSH_DURATION => (0.001, 15),
        sink::file_metrics::BLOCK_FLUSH_DURATION | coordinator::metrics::METASTORE_DURATION => (0.001, 16),
        logservice::metrics::SCANNED_BYTES => (1024.0, 16),
        logservice::metrics::SCANNED => (8.0, 12),
        logservice::metrics::SCANNED_TXNS => (1.0, 8),
        logservice::metrics::SCAN_DURATION => (0.000_04, 19),
        logservice::metrics::SEND_DURATION
        | logservice::metrics::RESOLVED_DIFF
        | store_metrics::WRITE_DURATION
        | store_metrics::WRITE_QUEUE_DURATION
        | store_metrics::WRITE_PREPARE_DURATION
        | store_metrics::READ_DURATION => (0.000_04, 28),
        logservice::metrics::BIG_TXN_SIZE => (1_048_576.0, 16),
        store_metrics::WRITE_BATCH_EVENTS => (8.0, 20),
        store_metrics::WRITE_BATCH_SIZE => (32.0, 20),
        logservice::metrics::NOTIFY_DURATION => (0.000_01, 20),
        logservice::metrics::TABLE_INFO_DURATION => (0.000_01, 28),
        // From a millisecond to almost nine minutes.
        _ => (0.001, 20),
    };
    doubling(first, count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_read_behind_any_program_name() {
        let stat = "42 (odd ) name) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20";
        assert_eq!(cpu_seconds(stat), Some(2.0));
        assert_eq!(cpu_seconds("nonsense"), None);
    }

    // behaviour: metrics-2
    #[test]
    fn bounds_end_where_they_are_promised_to() {
        let last = |name| *bounds(name).last().unwrap();
        assert_eq!((lags().len(), lags()[29], lags()[30]), (64, 20.0, 21.0));
        assert_eq!(lags()[49..51], [591.0, 900.0]);
        assert_eq!(last(sink::metrics::BATCH_ROW_COUNT), 131_072.0);
        assert_eq!(last(maintainer::metrics::HANDLE_EVENT_DURATION), 1310.72);
        assert_eq!(last("ticdc_sink_txn_worker_flush_duration"), 524.288);
        assert_eq!(last(dispatcher_manager::metrics::CREATE_DISPATCHER_DURATION), 0.524_288);
        for name in
            [logservice::event_store::metrics::READ_DURATION, logservice::collector_metrics::RECEIVED_LAG]
        {
            assert!(bounds(name).is_sorted(), "{name}");
        }
    }
}
