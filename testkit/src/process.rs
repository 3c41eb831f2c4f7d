//! The real program as a process: started, killed, started again, measured.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::Api;
use crate::api::Progress;

/// How long the program may take until its API answers, or until it has stopped.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often a state is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// Unit of the times in `/proc/PID/stat`: the same on every Linux that Rust supports.
const TICKS_PER_SECOND: f64 = 100.0;

/// What `/proc/PID/stat`, or that of a thread, says.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Stat {
    parent: u32,
    /// Processor time in user and kernel mode.
    own_seconds: f64,
    /// That of its children that have ended and were reaped.
    reaped_seconds: f64,
    /// It has ended and only waits to be reaped.
    ended: bool,
}

impl Stat {
    fn parse(stat: &str) -> Option<Self> {
        // The program's name stands in parentheses and may hold anything, so counting begins after it.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let seconds = |at: usize| Some(fields.get(at)?.parse::<f64>().ok()? / TICKS_PER_SECOND);
        Some(Self {
            parent: fields.get(1)?.parse().ok()?,
            own_seconds: seconds(11)? + seconds(12)?,
            reaped_seconds: seconds(13)? + seconds(14)?,
            ended: matches!(fields.first(), Some(&"Z" | &"X")),
        })
    }
}

/// A line of `/proc/PID/status` that counts kilobytes, in bytes; 0 when it has none.
fn bytes_of(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kilobytes = line.and_then(|text| text.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kilobytes.unwrap_or_default() * 1024
}

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
        let stat = Stat::parse(&stat).context("/proc has an unknown form")?;
        Ok(Self { cpu_seconds: stat.own_seconds, peak_bytes: bytes_of(&status, "VmHWM"), ended: stat.ended })
    }
}

/// Processor time of a process, its living descendants, and those of its children that have ended, in seconds.
///
/// # Errors
/// When there is no such process.
pub fn tree_cpu_seconds(root: u32) -> Result<f64> {
    let mut processes: BTreeMap<u32, Stat> = BTreeMap::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        // It may have ended since it was listed.
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        processes.extend(Stat::parse(&stat).map(|found| (pid, found)));
    }
    if !processes.contains_key(&root) {
        bail!("process {root} is gone");
    }
    let mut total = 0.0;
    for (&pid, found) in &processes {
        let mut at = pid;
        // Bounded: a process id that was used again could close a circle.
        for _ in 0..64 {
            if at == root {
                total += found.own_seconds + found.reaped_seconds;
                break;
            }
            match processes.get(&at) {
                Some(stat) if stat.parent > 0 => at = stat.parent,
                Some(_) | None => break,
            }
        }
    }
    Ok(total)
}

/// Processor time of a thread of this process by its name, in seconds.
///
/// # Errors
/// When there is no such thread.
pub fn thread_cpu_seconds(name: &str) -> Result<f64> {
    for entry in fs::read_dir("/proc/self/task")? {
        let path = entry?.path();
        if fs::read_to_string(path.join("comm")).unwrap_or_default().trim() != name {
            continue;
        }
        // Nanoseconds on the processor, waiting for it, and turns; not every kernel has it.
        let times = fs::read_to_string(path.join("schedstat")).unwrap_or_default();
        if let Some(nanos) = times.split(' ').next().and_then(|text| text.parse::<u64>().ok()) {
            return Ok(Duration::from_nanos(nanos).as_secs_f64());
        }
        let stat = Stat::parse(&fs::read_to_string(path.join("stat"))?);
        return Ok(stat.context("/proc has an unknown form")?.own_seconds);
    }
    bail!("there is no thread {name}")
}

/// Memory of a process that it shares with nobody, in bytes; 0 when it is gone.
#[must_use]
pub fn private_bytes(pid: u32) -> u64 {
    bytes_of(&fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default(), "RssAnon")
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

    /// How far a changefeed is.
    ///
    /// # Errors
    /// When the process has ended, or the changefeed has a problem.
    pub async fn progress(&mut self, changefeed: &str) -> Result<Progress> {
        self.still_running()?;
        let progress = self.api().progress(changefeed).await?;
        if progress.state == "failed" || progress.state == "warning" {
            bail!("the changefeed has a problem: {}", progress.all["error"]);
        }
        Ok(progress)
    }

    /// Waits until everything up to a position is downstream; `look` is called meanwhile, every few milliseconds.
    ///
    /// # Errors
    /// As [`Millrace::progress`], and when it takes longer than `limit`.
    pub async fn reach(
        &mut self,
        changefeed: &str,
        position: u64,
        limit: Duration,
        mut look: impl FnMut(),
    ) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let progress = self.progress(changefeed).await?;
            look();
            if progress.checkpoint >= position {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("{changefeed} did not reach {position} within {limit:?}: {}", progress.all);
            }
            tokio::time::sleep(LOOK / 2).await;
        }
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
    fn what_proc_says_is_read_behind_any_program_name() {
        let stat = Stat::parse("42 (odd ) name) Z 7 2 3 4 5 6 7 8 9 10 150 50 25 75 20 0");
        let (own_seconds, reaped_seconds) = (2.0, 1.0);
        assert_eq!(stat, Some(Stat { parent: 7, own_seconds, reaped_seconds, ended: true }));
        assert_eq!(bytes_of("VmPeak:\t9 kB\nVmHWM:\t    2048 kB\n", "VmHWM"), 2 << 20);
        let own = Usage::of(std::process::id()).unwrap();
        assert!(own.peak_bytes > 0 && !own.ended);
    }

    #[test]
    fn processes_and_threads_that_are_there_have_a_time_and_others_have_none() {
        assert!(tree_cpu_seconds(std::process::id()).is_ok());
        assert!(private_bytes(std::process::id()) > 0);
        let thread = std::thread::Builder::new().name("counted".into());
        let thread = thread.spawn(|| thread_cpu_seconds("counted")).unwrap();
        assert!(thread.join().unwrap().is_ok());
        assert!(thread_cpu_seconds("nobody").is_err());
    }
}
