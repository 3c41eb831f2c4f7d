//! A private PostgreSQL server per test: made with `initdb`, on a free port, gone when dropped.

use std::ffi::OsStr;
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use tempfile::TempDir;

/// Password of the superuser `postgres` of every [`PgServer`].
pub const PASSWORD: &str = "pass of the tests";

/// Attempts to find a port that nobody else takes between probing and starting.
const PORT_ATTEMPTS: usize = 5;
/// How long a server may take to start, stop, or disappear.
const PATIENCE: Duration = Duration::from_secs(60);

/// Linux's file system in memory, for everybody.
const IN_MEMORY: &str = "/dev/shm";
/// Room that it must have for a server: the largest tests write some hundreds of mebibytes, and several run at a time.
const MEMORY_ROOM: u64 = 8 << 30;

/// How [`PgServer::stop`] ends the server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StopMode {
    /// Disconnects clients and writes a checkpoint. Waits for replication clients to catch up.
    Fast,
    /// Exits at once, as a crash; the next start recovers.
    Immediate,
}

impl StopMode {
    fn word(self) -> &'static str {
        match self {
            StopMode::Fast => "fast",
            StopMode::Immediate => "immediate",
        }
    }
}

/// What a [`PgServer`] is made of; see [`PgServer::builder`].
#[derive(Clone, Debug)]
pub struct PgServerBuilder {
    settings: Vec<(String, String)>,
    host_auth: String,
    tls: Option<(String, String)>,
}

impl PgServerBuilder {
    /// Sets a configuration parameter; the last value of a name wins.
    #[must_use]
    pub fn setting(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Authentication of TCP connections: `scram-sha-256` (the default), `md5`, `password` or `trust`.
    #[must_use]
    pub fn host_auth(mut self, method: &str) -> Self {
        method.clone_into(&mut self.host_auth);
        self
    }

    /// Turns TLS on with a certificate and its private key, both PEM.
    #[must_use]
    pub fn tls(mut self, certificate: &str, key: &str) -> Self {
        self.tls = Some((certificate.to_owned(), key.to_owned()));
        self
    }

    /// Creates the cluster and starts it.
    ///
    /// # Errors
    /// When PostgreSQL is not installed or does not start; the text has the end of its log.
    pub async fn start(self) -> Result<PgServer> {
        tokio::task::spawn_blocking(move || PgServer::create(self)).await?
    }
}

/// A running PostgreSQL server with `wal_level = logical`. Dropped = stopped and removed.
#[derive(Debug)]
pub struct PgServer {
    dir: TempDir,
    port: u16,
    settings: Vec<(String, String)>,
}

impl PgServer {
    /// A server with the defaults of [`PgServer::builder`].
    ///
    /// # Errors
    /// As [`PgServerBuilder::start`].
    pub async fn start() -> Result<Self> {
        Self::builder().start().await
    }

    /// Defaults: logical WAL, room for twenty slots and WAL senders, no fsync, SCRAM over TCP.
    #[must_use]
    pub fn builder() -> PgServerBuilder {
        let defaults = [
            ("wal_level", "logical"),
            ("max_wal_senders", "20"),
            ("max_replication_slots", "20"),
            ("max_connections", "100"),
            ("shared_buffers", "32MB"),
            ("fsync", "off"),
            ("full_page_writes", "off"),
            ("listen_addresses", "127.0.0.1"),
            ("timezone", "Europe/Berlin"),
            ("log_min_messages", "warning"),
        ];
        PgServerBuilder {
            settings: defaults.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec(),
            host_auth: "scram-sha-256".to_owned(),
            tls: None,
        }
    }

    fn create(builder: PgServerBuilder) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("millrace-pg-").tempdir_in(place(&builder.settings))?;
        give_to_postgres(dir.path())?;
        let data = dir.path().join("data");
        run(as_postgres("cp").arg("-a").arg(template()?).arg(&data)).context("copy the template cluster")?;
        write_owned(
            &data.join("pg_hba.conf"),
            &format!(
                "local all all trust\nhost all all all {0}\nlocal replication all trust\nhost replication all all {0}\n",
                builder.host_auth
            ),
        )?;
        let mut settings = builder.settings;
        if builder.host_auth == "md5" {
            settings.push(("password_encryption".to_owned(), "md5".to_owned()));
        }
        if let Some((certificate, key)) = &builder.tls {
            write_owned(&data.join("server.crt"), certificate)?;
            write_owned(&data.join("server.key"), key)?;
            settings.push(("ssl".to_owned(), "on".to_owned()));
        }
        let mut server = Self { dir, port: 0, settings };
        let mut last = anyhow!("no attempt was made");
        for _ in 0..PORT_ATTEMPTS {
            server.port = free_port()?;
            match server.launch() {
                Ok(()) => return Ok(server),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// The port it listens on, on 127.0.0.1. Stays the same over restarts.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Directory of its Unix socket.
    #[must_use]
    pub fn socket_dir(&self) -> &Path {
        self.dir.path()
    }

    /// URI of a database for the superuser.
    #[must_use]
    pub fn uri(&self, database: &str) -> String {
        self.uri_as("postgres", PASSWORD, database)
    }

    /// URI of a database for a role.
    #[must_use]
    pub fn uri_as(&self, user: &str, password: &str, database: &str) -> String {
        format!("postgres://{user}:{}@127.0.0.1:{}/{database}", password.replace(' ', "%20"), self.port)
    }

    /// A connected superuser client; its connection runs in a task of its own.
    ///
    /// # Errors
    /// When the server does not accept the connection.
    pub async fn client(&self, database: &str) -> Result<tokio_postgres::Client> {
        let mut config = tokio_postgres::Config::new();
        config.host_path(self.dir.path()).port(self.port).user("postgres").dbname(database);
        let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    /// Runs statements as the superuser on a connection of their own.
    ///
    /// # Errors
    /// When one of them fails.
    pub async fn sql(&self, database: &str, statements: &str) -> Result<()> {
        Ok(self.client(database).await?.batch_execute(statements).await?)
    }

    /// Stops the server.
    ///
    /// # Errors
    /// When it does not stop in time.
    pub async fn stop(&self, mode: StopMode) -> Result<()> {
        let mut command = self.pg_ctl();
        command.args(["stop", "-m", mode.word()]);
        tokio::task::spawn_blocking(move || run(&mut command)).await?
    }

    /// Starts a stopped or killed server again, on the same port.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn resume(&self) -> Result<()> {
        // The call is short, but it waits for a process; tests run on multi-threaded or idle runtimes.
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.launch() {
                Ok(()) => return Ok(()),
                // After a kill, the children of the old server hold its shared memory for a moment.
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }

    /// Stops and starts the server.
    ///
    /// # Errors
    /// When it does not stop or start.
    pub async fn restart(&self, mode: StopMode) -> Result<()> {
        self.stop(mode).await?;
        self.resume().await
    }

    /// Kills the server's main process, as the kernel would; its children follow by themselves.
    ///
    /// # Errors
    /// When it is not running.
    pub fn kill(&self) -> Result<()> {
        let pid = self.pid()?.to_string();
        // The shell's own: a small system has no program of that name.
        run(as_postgres("sh").args(["-c", "kill -KILL \"$0\"", &pid]))
    }

    /// The process id of the server's main process.
    ///
    /// # Errors
    /// When it is not running.
    pub fn pid(&self) -> Result<u32> {
        let pid_file = fs::read_to_string(self.data().join("postmaster.pid"))?;
        let pid = pid_file.lines().next().context("postmaster.pid is empty")?;
        pid.trim().parse().context("postmaster.pid has an unknown form")
    }

    /// Changes a parameter that a reload applies.
    ///
    /// # Errors
    /// When the server refuses it.
    pub async fn reload_with(&self, name: &str, value: &str) -> Result<()> {
        let client = self.client("postgres").await?;
        client.execute(&format!("ALTER SYSTEM SET {name} = '{value}'"), &[]).await?;
        client.execute("SELECT pg_reload_conf()", &[]).await?;
        Ok(())
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn pg_ctl(&self) -> Command {
        let mut command = as_postgres(&program("pg_ctl"));
        command.arg("-D").arg(self.data()).arg("-s").arg("-w").args(["-t", "60"]);
        command
    }

    fn launch(&self) -> Result<()> {
        let log = self.data().join("server.log");
        let mut options = format!("-p {} -k {}", self.port, self.dir.path().display());
        for (name, value) in &self.settings {
            options.push_str(&format!(" -c {name}='{value}'"));
        }
        let mut command = self.pg_ctl();
        command.arg("-l").arg(&log).arg("-o").arg(options).arg("start");
        run(&mut command).with_context(|| {
            let text = fs::read_to_string(&log).unwrap_or_default();
            let tail: Vec<&str> = text.lines().rev().take(12).collect();
            tail.into_iter().rev().collect::<Vec<_>>().join("\n")
        })
    }
}

impl Drop for PgServer {
    fn drop(&mut self) {
        let mut command = self.pg_ctl();
        command.args(["stop", "-m", "immediate"]);
        // A server that a test has stopped or killed already is no problem.
        drop(run(&mut command));
    }
}

/// Where a server has its files. One that does not wait for a disk needs none: a cluster is a thousand small files, whose
/// making and removal takes longer than most tests where the kernel has a disk's directories to keep. It stays on the disk
/// where somebody says which (`TMPDIR`), and where memory has no room.
fn place(settings: &[(String, String)]) -> PathBuf {
    let setting = settings.iter().rfind(|(name, _)| name == "fsync");
    let durable = setting.is_none_or(|(_, value)| value != "off");
    let room = || {
        let memory = rustix::fs::statvfs(IN_MEMORY).ok()?;
        memory.f_bavail.checked_mul(memory.f_frsize)
    };
    if durable || std::env::var_os("TMPDIR").is_some() || room() < Some(MEMORY_ROOM) {
        return std::env::temp_dir();
    }
    PathBuf::from(IN_MEMORY)
}

/// A cluster made by `initdb` once per machine and kept in the temporary directory; servers start from a
/// copy of it, which is several times faster.
fn template() -> Result<PathBuf> {
    static BUSY: Mutex<()> = Mutex::new(());
    let _alone = BUSY.lock().map_err(|_| anyhow!("an initdb panicked"))?;
    let initdb = program("initdb");
    let version = initdb.split('/').find(|part| part.parse::<u32>().is_ok()).unwrap_or("x");
    let user = if is_root() { "root" } else { "self" };
    let kept = std::env::temp_dir().join(format!("millrace-initdb-1-{version}-{user}"));
    let data = kept.join("data");
    if data.exists() {
        return Ok(data);
    }
    let dir = tempfile::Builder::new().prefix("millrace-initdb-").tempdir()?;
    let password = dir.path().join("password");
    give_to_postgres(dir.path())?;
    write_owned(&password, PASSWORD)?;
    run(as_postgres(&initdb)
        .arg("-D")
        .arg(dir.path().join("data"))
        .args(["-U", "postgres", "--no-sync", "-E", "UTF8", "--locale=C.UTF-8"])
        .arg("--pwfile")
        .arg(&password))
    .context("initdb")?;
    // Another process may have been faster; then its cluster is as good.
    if fs::rename(dir.path(), &kept).is_err() && !data.exists() {
        bail!("cannot keep the template cluster in {}", kept.display());
    }
    Ok(data)
}

/// A program of the newest installed PostgreSQL; `MILLRACE_TEST_PG_BIN` names another directory.
#[must_use]
pub fn program(name: &str) -> String {
    if let Ok(dir) = std::env::var("MILLRACE_TEST_PG_BIN") {
        return format!("{dir}/{name}");
    }
    let newest = (14..=18)
        .rev()
        .map(|version| format!("/usr/lib/postgresql/{version}/bin/{name}"))
        .find(|path| Path::new(path).exists());
    newest.unwrap_or_else(|| name.to_owned())
}

/// PostgreSQL refuses to run as root.
fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|meta| std::os::unix::fs::MetadataExt::uid(&meta) == 0)
}

/// Runs a program as the user of the servers, who owns their files, to its end.
///
/// # Errors
/// When it cannot be started or fails; the text has what it wrote.
pub fn run_as_server(program: &str, args: &[&str]) -> Result<()> {
    run(as_postgres(program).args(args))
}

fn as_postgres(program: &str) -> Command {
    let mut command = if is_root() {
        let mut command = Command::new("runuser");
        command.args(["-u", "postgres", "--", program]);
        command
    } else {
        Command::new(program)
    };
    command.current_dir("/").env("LC_ALL", "C.UTF-8");
    command
}

/// Makes a file or directory the servers' own.
///
/// # Errors
/// When this user may not.
pub fn give_to_postgres(path: &Path) -> Result<()> {
    if is_root() {
        run(Command::new("chown").arg("postgres").arg(path))?;
    }
    Ok(())
}

fn write_owned(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    give_to_postgres(path)
}

/// A port on which nobody listens now.
///
/// # Errors
/// When there is none.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

/// Runs a command to its end; its error output becomes the error's text.
///
/// The output goes to a file: a server that it starts inherits it, and would hold a pipe open.
fn run(command: &mut Command) -> Result<()> {
    let output = tempfile::tempfile()?;
    let status = command
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output.try_clone()?)
        .status()
        .with_context(|| format!("start {}", command.get_program().display()))?;
    if status.success() {
        return Ok(());
    }
    let mut text = String::new();
    std::io::Seek::rewind(&mut &output)?;
    std::io::Read::read_to_string(&mut &output, &mut text)?;
    let words: Vec<&OsStr> = command.get_args().collect();
    bail!("{} {words:?}: {status}: {}", command.get_program().display(), text.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_is_to_survive_a_crash_of_the_machine_is_on_the_disk() {
        let durable = PgServer::builder().setting("fsync", "on");
        assert_eq!(place(&durable.settings), std::env::temp_dir());
        assert_eq!(place(&[]), std::env::temp_dir(), "as PostgreSQL has it by default");
    }
}
