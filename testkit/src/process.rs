//! The real program as a process: started, killed, started again, measured.

use std::fs::{self, File, OpenOptions};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::Api;

/// How long the program may take until its API answers, or until it has stopped.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often a state is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// Unit of the times in `/proc/PID/stat`: the same on every Linux that Rust supports.
const TICKS_PER_SECOND: f64 = 100.0;

/// What a process has used so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Processor time in user and kernel mode.
    pub cpu_seconds: f64,
    /// Most memory that was resident at once; 0 when the process has ended.
    pub peak_bytes: u64,
    /// It has ended and only waits to be reaped.
    pub ended: bool,
}

impl Usage {
    /// Reads `/proc` about a process.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn of(pid: u32) -> Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("the process is gone")?;
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        Self::parse(&stat, &status).context("/proc has an unknown form")
    }

    fn parse(stat: &str, status: &str) -> Option<Self> {
        // The program's name stands in parentheses and may hold anything, so counting begins after it.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let ticks: f64 = fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?;
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kilobytes: u64 =
            peak.and_then(|text| text.trim().strip_suffix("kB")?.trim().parse().ok()).unwrap_or_default();
        Some(Self {
            cpu_seconds: ticks / TICKS_PER_SECOND,
            peak_bytes: kilobytes * 1024,
            ended: matches!(fields.first(), Some(&"Z" | &"X")),
        })
    }
}

/// A Millrace server. Dropped = killed.
#[derive(Debug)]
pub struct Millrace {
    program: PathBuf,
    dir: PathBuf,
    port: u16,
    arguments: Vec<String>,
    child: Option<Child>,
    peak_bytes: u64,
    apart: bool,
}

impl Millrace {
    /// A server that keeps its data and its log in `dir` and is not started yet.
    ///
    /// # Errors
    /// When the program does not exist, or no port is free.
    pub fn new(program: &Path, dir: &Path) -> Result<Self> {
        if !program.exists() {
            bail!("{} does not exist; build it with `cargo build --release -p node`", program.display());
        }
        let port = crate::postgres::free_port()?;
        Ok(Self {
            program: program.to_owned(),
            dir: dir.to_owned(),
            port,
            arguments: Vec::new(),
            child: None,
            peak_bytes: 0,
            apart: false,
        })
    }

    /// A Ctrl-C in the terminal does not reach the process: whoever started it stops it.
    #[must_use]
    pub fn apart_from_terminal(mut self) -> Self {
        self.apart = true;
        self
    }

    /// Gives further arguments to `millrace server`, such as `--store`, from the next start on.
    #[must_use]
    pub fn with_arguments<S: Into<String>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Its process id, if it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// The directory that it keeps its data in.
    #[must_use]
    pub fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// Sends a signal by its name, such as `STOP` or `CONT`.
    ///
    /// # Errors
    /// When the process does not run.
    pub fn signal(&self, name: &str) -> Result<()> {
        let child = self.child.as_ref().context("the server is not running")?;
        // The shell's own: a small system has no program of that name.
        let script = format!("kill -{name} {}", child.id());
        let sent = Command::new("sh").args(["-c", &script]).status()?;
        if !sent.success() {
            bail!("the server cannot be sent {name}");
        }
        Ok(())
    }

    /// Whether the process was started and not stopped or killed since.
    #[must_use]
    pub fn is_started(&self) -> bool {
        self.child.is_some()
    }

    /// Where the program is looked for when nobody names it: beside the running one.
    #[must_use]
    pub fn default_program() -> PathBuf {
        let beside = std::env::current_exe().ok().map(|own| own.with_file_name("millrace"));
        beside.filter(|path| path.exists()).unwrap_or_else(|| PathBuf::from("target/release/millrace"))
    }

    /// Its API.
    #[must_use]
    pub fn api(&self) -> Api {
        Api::new(self.port)
    }

    /// Everything that it wrote to its outputs, over all of its lives.
    #[must_use]
    pub fn log_path(&self) -> PathBuf {
        self.dir.join("millrace.log")
    }

    /// The end of its log.
    #[must_use]
    pub fn log_tail(&self, lines: usize) -> String {
        let text = fs::read(self.log_path()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// Most memory that was resident at once, over all of its lives.
    #[must_use]
    pub fn peak_bytes(&self) -> u64 {
        self.usage().map_or(self.peak_bytes, |usage| self.peak_bytes.max(usage.peak_bytes))
    }

    /// What the present process has used.
    ///
    /// # Errors
    /// When it does not run.
    pub fn usage(&self) -> Result<Usage> {
        Usage::of(self.child.as_ref().context("the server is not running")?.id())
    }

    /// Starts the process, with the data of its former life.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&mut self) -> Result<()> {
        let log: File = OpenOptions::new().create(true).append(true).open(self.log_path())?;
        let mut command = Command::new(&self.program);
        if self.apart {
            command.process_group(0);
        }
        let child = command
            .args(["server", "--addr", &format!("127.0.0.1:{}", self.port), "--data-dir"])
            .arg(self.data_dir())
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {}", self.program.display()))?;
        self.child = Some(child);
        Ok(())
    }

    /// Waits until the API serves changefeeds.
    ///
    /// # Errors
    /// When the process ends, or takes too long.
    pub async fn ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.still_running()?;
            match self.api().get("/api/v2/changefeeds?state=all").await {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > deadline => {
                    return Err(error.context(format!("the server is not ready after {PATIENCE:?}")));
                }
                Err(_) => tokio::time::sleep(LOOK).await,
            }
        }
    }

    /// Starts the process and waits until its API serves changefeeds.
    ///
    /// # Errors
    /// As [`Millrace::spawn`] and [`Millrace::ready`].
    pub async fn start(&mut self) -> Result<()> {
        self.spawn()?;
        self.ready().await
    }

    /// An error when the process has ended by itself.
    ///
    /// # Errors
    /// Says how it ended.
    pub fn still_running(&mut self) -> Result<()> {
        let child = self.child.as_mut().context("the server is not running")?;
        if let Some(status) = child.try_wait()? {
            self.child = None;
            bail!("the server ended by itself: {status}");
        }
        Ok(())
    }

    /// Kills the process as the kernel would, without a chance to write anything.
    ///
    /// # Errors
    /// When it had ended by itself before.
    pub fn kill(&mut self) -> Result<()> {
        self.still_running()?;
        self.peak_bytes = self.peak_bytes();
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// Asks the process to stop and waits until it has.
    ///
    /// # Errors
    /// When it does not stop in time or fails while stopping.
    pub async fn stop(&mut self) -> Result<()> {
        self.still_running()?;
        self.peak_bytes = self.peak_bytes();
        let Some(mut child) = self.child.take() else { return Ok(()) };
        let script = format!("kill -TERM {}", child.id());
        let asked = Command::new("sh").args(["-c", &script]).status()?;
        let deadline = Instant::now() + PATIENCE;
        while asked.success() && Instant::now() < deadline {
            if let Some(status) = child.try_wait()? {
                if !status.success() {
                    bail!("the server failed while it stopped: {status}");
                }
                return Ok(());
            }
            tokio::time::sleep(LOOK).await;
        }
        child.kill()?;
        child.wait()?;
        bail!("the server did not stop within {PATIENCE:?}")
    }
}

impl Drop for Millrace {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_is_read_behind_any_program_name() {
        let stat = "42 (odd ) name) Z 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20";
        let usage = Usage::parse(stat, "VmPeak:\t9 kB\nVmHWM:\t    2048 kB\n").unwrap();
        assert!((usage.cpu_seconds - 2.0).abs() < 1e-9);
        assert_eq!((usage.peak_bytes, usage.ended), (2 << 20, true));
        let own = Usage::of(std::process::id()).unwrap();
        assert!(own.peak_bytes > 0 && !own.ended);
    }
}
