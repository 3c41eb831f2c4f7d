//! A private etcd per test: one member or several, on free ports, gone when dropped or when the test ends.

use std::fs::{File, OpenOptions};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use tempfile::TempDir;

use crate::postgres::free_port;

/// Attempts to find ports that nobody else takes between probing and starting.
const PORT_ATTEMPTS: usize = 5;
/// How long a cluster may take to elect a leader, or a member to stop.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often a state is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// Certificates for clients, all PEM. See [`EtcdBuilder::tls`].
#[derive(Clone, Debug)]
struct Tls {
    certificate: String,
    key: String,
    /// Authority of the certificates that clients have to show.
    client_ca: Option<String>,
}

/// What an [`Etcd`] is made of; see [`Etcd::builder`].
#[derive(Clone, Debug)]
pub struct EtcdBuilder {
    members: usize,
    tls: Option<Tls>,
    arguments: Vec<String>,
}

impl EtcdBuilder {
    /// How many members it has; one by default.
    #[must_use]
    pub fn members(mut self, members: usize) -> Self {
        self.members = members.max(1);
        self
    }

    /// One more argument of the program.
    #[must_use]
    pub fn argument(mut self, argument: &str) -> Self {
        self.arguments.push(argument.to_owned());
        self
    }

    /// Clients use TLS: a certificate for 127.0.0.1 and its key, and the authority of the certificates that clients
    /// have to show, if they have to; all PEM.
    #[must_use]
    pub fn tls(mut self, certificate: &str, key: &str, client_ca: Option<&str>) -> Self {
        self.tls = Some(Tls {
            certificate: certificate.to_owned(),
            key: key.to_owned(),
            client_ca: client_ca.map(ToOwned::to_owned),
        });
        self
    }

    /// Starts the members and waits until they have a leader.
    ///
    /// # Errors
    /// When etcd is not installed or does not start; the text has the end of its log.
    pub async fn start(self) -> Result<Etcd> {
        let mut last = anyhow!("no attempt was made");
        for _ in 0..PORT_ATTEMPTS {
            match Etcd::create(&self).await {
                Ok(etcd) => return Ok(etcd),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

/// A running etcd cluster. Dropped = killed and removed.
#[derive(Debug)]
pub struct Etcd {
    dir: TempDir,
    tls: bool,
    members: Vec<Member>,
}

#[derive(Debug)]
struct Member {
    name: String,
    client: u16,
    arguments: Vec<String>,
    child: Option<Child>,
    log: PathBuf,
}

impl Etcd {
    /// A single member without TLS.
    ///
    /// # Errors
    /// As [`EtcdBuilder::start`].
    pub async fn start() -> Result<Self> {
        Self::builder().start().await
    }

    /// One member, no TLS, no fsync where the version knows how.
    #[must_use]
    pub fn builder() -> EtcdBuilder {
        EtcdBuilder { members: 1, tls: None, arguments: Vec::new() }
    }

    async fn create(builder: &EtcdBuilder) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("millrace-etcd-").tempdir()?;
        let mut etcd = Self { tls: builder.tls.is_some(), members: Vec::new(), dir };
        let tls = match &builder.tls {
            Some(tls) => etcd.write_tls(tls)?,
            None => Vec::new(),
        };
        let mut peers = Vec::new();
        for at in 0..builder.members {
            peers.push((format!("m{at}"), free_port()?));
        }
        let cluster: Vec<String> =
            peers.iter().map(|(name, peer)| format!("{name}=http://127.0.0.1:{peer}")).collect();
        for (name, peer) in &peers {
            let member = etcd.member(name, *peer, &cluster.join(","), "new", &tls, &builder.arguments)?;
            etcd.members.push(member);
        }
        for member in &mut etcd.members {
            member.spawn()?;
        }
        etcd.ready().await?;
        Ok(etcd)
    }

    fn member(
        &self,
        name: &str,
        peer: u16,
        cluster: &str,
        state: &str,
        tls: &[String],
        more: &[String],
    ) -> Result<Member> {
        let client = free_port()?;
        let scheme = if self.tls { "https" } else { "http" };
        let mut arguments = vec![
            format!("--name={name}"),
            format!("--data-dir={}", self.dir.path().join(name).display()),
            format!("--listen-client-urls={scheme}://127.0.0.1:{client}"),
            format!("--advertise-client-urls={scheme}://127.0.0.1:{client}"),
            format!("--listen-peer-urls=http://127.0.0.1:{peer}"),
            format!("--initial-advertise-peer-urls=http://127.0.0.1:{peer}"),
            format!("--initial-cluster={cluster}"),
            format!("--initial-cluster-state={state}"),
            format!("--initial-cluster-token={}", self.dir.path().display()),
            // A disk that is busy with other tests is no reason to elect.
            "--heartbeat-interval=100".to_owned(),
            "--election-timeout=1000".to_owned(),
        ];
        arguments.extend(tls.iter().chain(more).cloned());
        let log = self.dir.path().join(format!("{name}.log"));
        Ok(Member { name: name.to_owned(), client, arguments, child: None, log })
    }

    fn write_tls(&self, tls: &Tls) -> Result<Vec<String>> {
        let write = |name: &str, text: &str| -> Result<String> {
            let path = self.dir.path().join(name);
            std::fs::write(&path, text)?;
            Ok(path.display().to_string())
        };
        let mut arguments = vec![
            format!("--cert-file={}", write("server.crt", &tls.certificate)?),
            format!("--key-file={}", write("server.key", &tls.key)?),
        ];
        if let Some(ca) = &tls.client_ca {
            arguments.push(format!("--trusted-ca-file={}", write("clients.crt", ca)?));
            arguments.push("--client-cert-auth".to_owned());
        }
        Ok(arguments)
    }

    /// Client URLs of all members.
    #[must_use]
    pub fn endpoints(&self) -> Vec<String> {
        (0..self.members.len()).map(|at| self.endpoint(at)).collect()
    }

    /// Client URL of one member. Stays the same over restarts.
    #[must_use]
    pub fn endpoint(&self, at: usize) -> String {
        let scheme = if self.tls { "https" } else { "http" };
        format!("{scheme}://127.0.0.1:{}", self.members[at].client)
    }

    /// Where the data is kept.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The end of a member's log.
    #[must_use]
    pub fn log_tail(&self, at: usize) -> String {
        let text = std::fs::read(&self.members[at].log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().rev().take(12).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    /// Waits until every running member answers and knows a leader.
    ///
    /// # Errors
    /// When a member ends, or when it takes too long.
    pub async fn ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        for at in 0..self.members.len() {
            while let Some(child) = self.members[at].child.as_mut() {
                if let Some(status) = child.try_wait()? {
                    bail!("etcd ended by itself: {status}: {}", self.log_tail(at));
                }
                if self.tls && self.members[at].says("ready to serve client requests")
                    || !self.tls && self.health(at).await
                {
                    break;
                }
                if Instant::now() > deadline {
                    bail!("etcd is not ready after {PATIENCE:?}: {}", self.log_tail(at));
                }
                tokio::time::sleep(LOOK).await;
            }
        }
        Ok(())
    }

    /// Whether a member serves and knows a leader.
    async fn health(&self, at: usize) -> bool {
        let Ok(Ok(answer)) =
            tokio::time::timeout(Duration::from_secs(2), get(self.members[at].client, "/health")).await
        else {
            return false;
        };
        answer.contains("\"health\":\"true\"")
    }

    /// Which member leads.
    ///
    /// # Errors
    /// When nobody leads within a minute.
    pub async fn leader(&self) -> Result<usize> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            for (at, member) in self.members.iter().enumerate() {
                let metrics =
                    tokio::time::timeout(Duration::from_secs(2), get(member.client, "/metrics")).await;
                if let Ok(Ok(text)) = metrics
                    && text.lines().any(|line| line == "etcd_server_is_leader 1")
                {
                    return Ok(at);
                }
            }
            tokio::time::sleep(LOOK).await;
        }
        bail!("nobody leads the etcd cluster")
    }

    /// Kills a member as the kernel would.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill(&mut self, at: usize) -> Result<()> {
        let mut child = self.members[at].child.take().context("the member is not running")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Starts a killed member again, with its data and on its port. [`Etcd::ready`] waits for it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn resume(&mut self, at: usize) -> Result<()> {
        self.members[at].spawn()
    }

    /// Deletes the data of a killed member.
    ///
    /// # Errors
    /// When it runs, or the files cannot be deleted.
    pub fn wipe(&mut self, at: usize) -> Result<()> {
        if self.members[at].child.is_some() {
            bail!("the member is running");
        }
        Ok(std::fs::remove_dir_all(self.dir.path().join(&self.members[at].name))?)
    }

    /// Freezes a member: it keeps its connections and answers nothing.
    ///
    /// # Errors
    /// When it does not run.
    pub fn pause(&self, at: usize) -> Result<()> {
        self.members[at].signal("STOP")
    }

    /// Lets a frozen member go on.
    ///
    /// # Errors
    /// When it does not run.
    pub fn unpause(&self, at: usize) -> Result<()> {
        self.members[at].signal("CONT")
    }

    /// Starts one more member and tells the others. Without TLS only.
    ///
    /// # Errors
    /// When the cluster does not take it.
    pub async fn add_member(&mut self) -> Result<usize> {
        let at = self.members.len();
        let (name, peer) = (format!("m{at}"), free_port()?);
        let peer_urls = format!("--peer-urls=http://127.0.0.1:{peer}");
        let added = self.change_members(&["member", "add", &name, &peer_urls]).await?;
        let cluster = added
            .lines()
            .find_map(|line| line.strip_prefix("ETCD_INITIAL_CLUSTER="))
            .context("etcdctl did not say the cluster")?;
        let mut member = self.member(&name, peer, cluster.trim_matches('"'), "existing", &[], &[])?;
        member.spawn()?;
        self.members.push(member);
        self.ready().await?;
        Ok(at)
    }

    /// Takes a member out of the cluster; it ends by itself.
    ///
    /// # Errors
    /// When the cluster refuses it.
    pub async fn remove_member(&mut self, at: usize) -> Result<()> {
        let list = self.ctl(&["member", "list"])?;
        let name = &self.members[at].name;
        let id = list
            .lines()
            .find(|line| line.split(", ").nth(2) == Some(name))
            .and_then(|line| line.split(',').next())
            .context("the member is not listed")?
            .to_owned();
        self.change_members(&["member", "remove", &id]).await.map(drop)
    }

    /// etcd takes a change only when its members have been connected for some seconds.
    async fn change_members(&self, arguments: &[&str]) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.ctl(arguments) {
                Err(error)
                    if Instant::now() < deadline && error.to_string().contains("unhealthy cluster") =>
                {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                done => return done,
            }
        }
    }

    /// Runs `etcdctl` against the members that run; gives what it printed. Without TLS only.
    ///
    /// # Errors
    /// When the program is not there or fails.
    pub fn ctl(&self, arguments: &[&str]) -> Result<String> {
        let running = (0..self.members.len()).filter(|at| self.members[*at].child.is_some());
        let endpoints: Vec<String> = running.map(|at| self.endpoint(at)).collect();
        let output = Command::new(program("etcdctl"))
            .env("ETCDCTL_API", "3")
            .arg(format!("--endpoints={}", endpoints.join(",")))
            .args(arguments)
            .output()
            .with_context(advice)?;
        if !output.status.success() {
            bail!("etcdctl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for member in &mut self.members {
            if let Some(mut child) = member.child.take() {
                // It may have ended already. A frozen process dies of this signal too.
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

impl Member {
    fn spawn(&mut self) -> Result<()> {
        let log: File = OpenOptions::new().create(true).append(true).open(&self.log)?;
        let child = Command::new(program("etcd"))
            .args(&self.arguments)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(advice)?;
        // Whoever kills a test leaves no server behind, and a server that is shared by all tests of a program ends
        // with it: this shell outlives us by a second.
        let watch = "while kill -0 \"$0\" && kill -0 \"$1\"; do sleep 1; done 2>/dev/null; \
                     kill -0 \"$0\" 2>/dev/null && exit; kill -KILL \"$1\"; rm -rf \"$2\"";
        Command::new("sh")
            .args(["-c", watch, &std::process::id().to_string(), &child.id().to_string()])
            .arg(self.log.parent().unwrap_or(&self.log))
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        self.child = Some(child);
        Ok(())
    }

    fn signal(&self, signal: &str) -> Result<()> {
        let child = self.child.as_ref().context("the member is not running")?;
        let status = Command::new("sh")
            .args(["-c", &format!("kill -{signal} \"$0\""), &child.id().to_string()])
            .status()?;
        if !status.success() {
            bail!("the member cannot be sent {signal}");
        }
        Ok(())
    }

    /// Whether its log has a text.
    fn says(&self, text: &str) -> bool {
        let log = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&log).contains(text)
    }
}

/// `etcd` or `etcdctl` in the path; `MILLRACE_TEST_ETCD_BIN` names another directory.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    match std::env::var_os("MILLRACE_TEST_ETCD_BIN") {
        Some(dir) => PathBuf::from(dir).join(name),
        None => PathBuf::from(name),
    }
}

fn advice() -> String {
    "etcd is not there; install it (Debian, Ubuntu: apt-get install etcd-server etcd-client), or set \
     MILLRACE_TEST_ETCD_BIN to the directory of the programs"
        .to_owned()
}

/// The body and head of an answer to a plain HTTP request.
async fn get(port: u16, path: &str) -> Result<String> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}
