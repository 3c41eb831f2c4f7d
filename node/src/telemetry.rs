//! Logs and metrics of the process.

use std::sync::OnceLock;

use anyhow::Context;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, reload};

use crate::config::{LogFormat, ServerConfig};

type FilterHandle = reload::Handle<EnvFilter, Registry>;

static FILTER: OnceLock<FilterHandle> = OnceLock::new();
static METRICS: OnceLock<PrometheusHandle> = OnceLock::new();

/// Buckets for histograms in seconds: 1 ms doubling to about two minutes.
const SECONDS_BUCKETS: [f64; 18] = [
    0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 2.048, 4.096, 8.192, 16.384,
    32.768, 65.536, 131.072,
];

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
    let writer: tracing_subscriber::fmt::writer::BoxMakeWriter = if config.log_file.is_empty() {
        tracing_subscriber::fmt::writer::BoxMakeWriter::new(std::io::stderr)
    } else {
        let file = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&config.log_file)
            .with_context(|| format!("cannot open the log file {}", config.log_file))?;
        tracing_subscriber::fmt::writer::BoxMakeWriter::new(std::sync::Mutex::new(file))
    };
    let registry = tracing_subscriber::registry().with(filter);
    let layer = tracing_subscriber::fmt::layer().with_ansi(false).with_writer(writer);
    match config.log.format {
        LogFormat::Text => registry.with(layer).try_init()?,
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

/// Installs the metrics recorder, once per process, and describes every metric.
///
/// # Errors
/// When another recorder was installed before.
pub fn init_metrics() -> anyhow::Result<PrometheusHandle> {
    if let Some(handle) = METRICS.get() {
        return Ok(handle.clone());
    }
    let builder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Prefix("ticdc_".to_owned()), &SECONDS_BUCKETS)?;
    let recorder = crate::metrics::buckets(builder)?.build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder)?;
    let _ = METRICS.set(handle.clone());
    Ok(handle)
}
