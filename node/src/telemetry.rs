//! Logs and metrics of the process.

mod file;
mod format;
mod recorder;

use std::sync::OnceLock;

use anyhow::Context;
use parking_lot::Mutex;
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, reload};

use crate::config::{LogFormat, ServerConfig};

pub(crate) use file::measure as measure_log;
pub use recorder::MetricsHandle;

type FilterHandle = reload::Handle<EnvFilter, Registry>;

static FILTER: OnceLock<FilterHandle> = OnceLock::new();
static METRICS: OnceLock<MetricsHandle> = OnceLock::new();

/// Parses a log level or a filter directive.
///
/// # Errors
/// Says what a valid one looks like.
pub fn parse_filter(text: &str) -> Result<EnvFilter, String> {
    EnvFilter::try_new(text.trim()).map_err(|_| {
        format!("{text:?} is not a log level; use error, warn, info, debug, or a directive such as info,sink=debug")
    })
}

/// Starts logging as configured. Called once per process; later calls change the level only.
///
/// # Errors
/// When the level cannot be parsed or the log file cannot be opened.
pub fn init_logging(config: &ServerConfig) -> anyhow::Result<()> {
    let filter = parse_filter(&config.log_level).map_err(anyhow::Error::msg)?;
    if FILTER.get().is_some() {
        return set_log_level(&config.log_level).map_err(anyhow::Error::msg);
    }
    let (filter, handle) = reload::Layer::new(filter);
    let writer = if config.log_file.is_empty() {
        BoxMakeWriter::new(std::io::stderr)
    } else {
        let file = file::LogFile::open(config.log_file.as_ref(), &config.log.file)
            .with_context(|| format!("cannot open the log file {}", config.log_file))?;
        BoxMakeWriter::new(std::sync::Mutex::new(file))
    };
    let registry = tracing_subscriber::registry().with(filter);
    let layer = tracing_subscriber::fmt::layer().with_ansi(false).with_writer(writer);
    match config.log.format {
        LogFormat::Text => {
            registry.with(layer.event_format(format::Unified).fmt_fields(format::Unified)).try_init()?;
        }
        LogFormat::Json => registry.with(layer.json()).try_init()?,
    }
    let _ = FILTER.set(handle);
    Ok(())
}

/// Changes the log level while running.
///
/// # Errors
/// When the level cannot be parsed, or logging was never started.
pub fn set_log_level(text: &str) -> Result<(), String> {
    let filter = parse_filter(text)?;
    let handle = FILTER.get().ok_or("logging was not started by this process")?;
    handle.reload(filter).map_err(|e| e.to_string())
}

/// Which log lines are written; `None` when logging was never started.
pub(crate) fn log_filter() -> Option<String> {
    FILTER.get()?.with_current(ToString::to_string).ok()
}

/// Installs the metrics recorder, once per process.
///
/// # Errors
/// When another recorder was installed before.
pub fn init_metrics() -> anyhow::Result<MetricsHandle> {
    // Nodes of one process may start at the same time.
    static INSTALLING: Mutex<()> = Mutex::new(());
    let _one = INSTALLING.lock();
    if let Some(handle) = METRICS.get() {
        return Ok(handle.clone());
    }
    let recorder = recorder::Recorder::new(crate::metrics::bounds, crate::metrics::GROWING);
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder)?;
    let _ = METRICS.set(handle.clone());
    Ok(handle)
}
