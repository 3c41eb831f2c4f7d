//! Members of an etcd cluster as processes, each with a directory of its own, that can be killed and started again.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// How long the members may take to agree on a leader.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often they are asked.
const LOOK: Duration = Duration::from_millis(50);
/// Time between two messages of the leader, and without one after which another is elected, in milliseconds.
const HEARTBEAT: &str = "100";
const ELECTION: &str = "1000";

/// The cluster. Dropped = killed.
pub(crate) struct Stores {
    members: Vec<Member>,
}

struct Member {
    arguments: Vec<String>,
    log: PathBuf,
    client: u16,
    child: Option<Child>,
}

impl Drop for Member {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Stores {
    /// Starts `count` members and waits until one of them leads.
    pub(crate) async fn start(dir: &Path, count: usize) -> Result<Self> {
        let mut ports = Vec::new();
        // All are held until the last one is known, so that none is given twice.
        let mut held = Vec::new();
        for _ in 0..count * 2 {
            let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
            ports.push(listener.local_addr()?.port());
            held.push(listener);
        }
        drop(held);
        let peer = |n: usize| format!("http://127.0.0.1:{}", ports[count + n]);
        let all: Vec<String> = (0..count).map(|n| format!("store{n}={}", peer(n))).collect();
        let member = |n: usize| {
            let client = format!("http://127.0.0.1:{}", ports[n]);
            let arguments = [
                ("--name", format!("store{n}")),
                ("--data-dir", dir.join(format!("store{n}")).display().to_string()),
                ("--listen-client-urls", client.clone()),
                ("--advertise-client-urls", client),
                ("--listen-peer-urls", peer(n)),
                ("--initial-advertise-peer-urls", peer(n)),
                ("--initial-cluster", all.join(",")),
                ("--initial-cluster-state", "new".to_owned()),
                ("--heartbeat-interval", HEARTBEAT.to_owned()),
                ("--election-timeout", ELECTION.to_owned()),
            ];
            Member {
                arguments: arguments.into_iter().flat_map(|(name, value)| [name.to_owned(), value]).collect(),
                log: dir.join(format!("store{n}.log")),
                client: ports[n],
                child: None,
            }
        };
        let mut stores = Self { members: (0..count).map(member).collect() };
        for n in 0..count {
            stores.launch(n)?;
        }
        stores.leader().await?;
        Ok(stores)
    }

    /// Ports that clients connect to.
    pub(crate) fn ports(&self) -> Vec<u16> {
        self.members.iter().map(|member| member.client).collect()
    }

    /// Starts a member with the data of its former life.
    pub(crate) fn launch(&mut self, n: usize) -> Result<()> {
        let member = &mut self.members[n];
        let log = File::options().create(true).append(true).open(&member.log)?;
        let child = Command::new("etcd")
            .args(&member.arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start etcd; install it (Debian, Ubuntu: apt-get install etcd-server)")?;
        member.child = Some(child);
        Ok(())
    }

    /// Kills a member.
    pub(crate) fn kill(&mut self, n: usize) -> Result<()> {
        if let Some(mut child) = self.members[n].child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// The member that leads.
    pub(crate) async fn leader(&self) -> Result<usize> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            for (n, member) in self.members.iter().enumerate() {
                if member.child.is_some() && leads(member.client).await.unwrap_or(false) {
                    return Ok(n);
                }
            }
            tokio::time::sleep(LOOK).await;
        }
        bail!("no member of etcd leads after {PATIENCE:?}")
    }
}

/// Asks the member's metrics, which need no client of etcd.
async fn leads(port: u16) -> Result<bool> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    let request = "GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await??;
    Ok(String::from_utf8_lossy(&answer).contains("\netcd_server_is_leader 1"))
}
