//! A real Prometheus for the tests: on a free port, with its data in a temporary directory, gone when it is dropped.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tempfile::TempDir;

use crate::Api;

/// How long it may take until it answers.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running Prometheus. Dropped = stopped and removed.
#[derive(Debug)]
pub struct Prometheus {
    child: Child,
    api: Api,
    /// Removed with its data at the end.
    dir: TempDir,
}

/// A program of Prometheus, `prometheus` or `promtool`: in the path, or where `MILLRACE_TEST_PROMETHEUS_BIN` says.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    let folder = std::env::var_os("MILLRACE_TEST_PROMETHEUS_BIN");
    folder.map_or_else(|| PathBuf::from(name), |folder| Path::new(&folder).join(name))
}

impl Prometheus {
    /// One that looks at these addresses every second, as the job `ticdc`, and evaluates the rules of a file.
    ///
    /// # Errors
    /// When it is not installed or does not start; the text has its log.
    pub async fn start(targets: &[String], rules: &Path) -> Result<Self> {
        let dir = TempDir::with_prefix("millrace-prometheus-")?;
        let port = crate::postgres::free_port()?;
        let rules = rules.canonicalize().with_context(|| format!("no rules at {}", rules.display()))?;
        // JSON is YAML.
        let config = serde_json::json!({
            "global": { "scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s" },
            "rule_files": [rules],
            "scrape_configs": [{ "job_name": "ticdc", "static_configs": [{ "targets": targets }] }],
        });
        let file = dir.path().join("prometheus.yml");
        std::fs::write(&file, config.to_string())?;
        let log = std::fs::File::create(dir.path().join("log"))?;
        let child = Command::new(program("prometheus"))
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start prometheus; install Debian's package of that name")?;
        let mut started = Self { child, api: Api::new(port), dir };
        let deadline = Instant::now() + PATIENCE;
        while started.query("vector(1)").await.is_err() {
            if started.child.try_wait()?.is_some() || Instant::now() > deadline {
                let log = std::fs::read_to_string(started.dir.path().join("log")).unwrap_or_default();
                bail!("prometheus does not answer:\n{log}");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(started)
    }

    /// What an expression gives now: its series.
    ///
    /// # Errors
    /// When it is not an expression; the text has Prometheus' words.
    pub async fn query(&self, expression: &str) -> Result<Vec<Value>> {
        let encoded = expression.bytes().fold(String::new(), |mut out, byte| {
            let _ = write!(out, "%{byte:02X}");
            out
        });
        let answer = self.api.get(&format!("/api/v1/query?query={encoded}")).await?;
        Ok(answer["data"]["result"].as_array().cloned().unwrap_or_default())
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
