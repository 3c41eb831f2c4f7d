//! A physical standby of a private server, which can be promoted.

use std::path::{Path, PathBuf};

use tempfile::TempDir;
use testkit::postgres::{PASSWORD, free_port, give_to_postgres, program, run_as_server};
use testkit::{PgServer, StopMode};

use crate::rig::eventually;

/// A standby. Dropped = stopped and removed.
pub(crate) struct Standby {
    dir: TempDir,
    port: u16,
    settings: String,
}

/// Runs a program as the servers' user, to its end.
fn run(program: &str, args: &[&str]) {
    run_as_server(program, args).expect("it succeeds");
}

fn word(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// Directory of a private server's data.
pub(crate) fn data_of(server: &PgServer) -> PathBuf {
    server.socket_dir().join("data")
}

/// Copies a directory with owners and times.
pub(crate) fn copy(from: &Path, to: &Path) {
    run("cp", &["-a", word(from), word(to)]);
}

/// Removes a directory.
pub(crate) fn remove(path: &Path) {
    run("rm", &["-rf", word(path)]);
}

impl Standby {
    /// A standby of `primary` that runs and follows, with further settings.
    pub(crate) async fn of(primary: &PgServer, settings: &[&str]) -> Self {
        let dir = tempfile::Builder::new().prefix("millrace-pg-").tempdir().expect("dir");
        let port = free_port().expect("port");
        let mut options = format!("-p {port} -k {}", word(dir.path()));
        let fixed = ["wal_level=logical", "max_wal_senders=20", "max_replication_slots=20", "fsync=off"];
        for setting in
            fixed.iter().chain(["shared_buffers=16MB", "listen_addresses=127.0.0.1"].iter()).chain(settings)
        {
            options.push_str(&format!(" -c {setting}"));
        }
        let standby = Self { dir, port, settings: options };
        standby.fill(primary).await;
        std::fs::write(standby.data().join("standby.signal"), "").expect("signal");
        let source = format!(
            "primary_conninfo = 'host={} port={} user=postgres dbname=postgres application_name=standby'\n",
            word(primary.socket_dir()),
            primary.port()
        );
        std::fs::write(standby.data().join("postgresql.auto.conf"), source).expect("configuration");
        standby.start();
        standby
    }

    /// Copies the primary's data, but not its slots: with `pg_basebackup` where that is installed.
    async fn fill(&self, primary: &PgServer) {
        give_to_postgres(self.dir.path()).expect("owner");
        let backup = program("pg_basebackup");
        if Path::new(&backup).exists() {
            let (socket, port) = (word(primary.socket_dir()), primary.port().to_string());
            let data = self.data();
            let args =
                ["-D", word(&data), "-h", socket, "-p", &port, "-U", "postgres", "-c", "fast", "--no-sync"];
            run(&backup, &args);
            return;
        }
        primary.stop(StopMode::Immediate).await.expect("stop");
        copy(&data_of(primary), &self.data());
        primary.resume().await.expect("resume");
        for name in ["postmaster.pid", "pg_replslot"] {
            remove(&self.data().join(name));
        }
        run("mkdir", &["-m", "700", word(&self.data().join("pg_replslot"))]);
    }

    /// Directory of its data.
    pub(crate) fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn start(&self) {
        let (data, log) = (self.data(), self.data().join("server.log"));
        run(
            &program("pg_ctl"),
            &["-D", word(&data), "-s", "-w", "-l", word(&log), "-o", &self.settings, "start"],
        );
    }

    pub(crate) fn stop(&self) {
        run(&program("pg_ctl"), &["-D", word(&self.data()), "-s", "-w", "-m", "immediate", "stop"]);
    }

    pub(crate) async fn client(&self) -> tokio_postgres::Client {
        let mut config = tokio_postgres::Config::new();
        config
            .host_path(self.dir.path())
            .port(self.port)
            .user("postgres")
            .password(PASSWORD)
            .dbname("postgres");
        let (client, connection) = config.connect(tokio_postgres::NoTls).await.expect("client");
        tokio::spawn(connection);
        client
    }

    /// Waits until it has everything that the primary has now.
    pub(crate) async fn caught_up(&self, primary: &PgServer) {
        let source = primary.client("postgres").await.expect("client");
        let row = source.query_one("SELECT pg_current_wal_flush_lsn()::text", &[]).await.expect("position");
        let sql = format!("SELECT pg_last_wal_replay_lsn() >= '{}'::pg_lsn", row.get::<_, &str>(0));
        let client = self.client().await;
        eventually("the standby has everything", async || {
            let row = client.query_one(&sql, &[]).await.expect("position");
            row.get::<_, Option<bool>>(0).unwrap_or_default().then_some(())
        })
        .await;
    }

    /// Hears nothing more from its primary.
    pub(crate) async fn cut_off(&self) {
        let client = self.client().await;
        client.execute("ALTER SYSTEM SET primary_conninfo = ''", &[]).await.expect("setting");
        client.execute("SELECT pg_reload_conf()", &[]).await.expect("reload");
        eventually("the standby is cut off", async || {
            client
                .query("SELECT FROM pg_stat_wal_receiver", &[])
                .await
                .expect("receiver")
                .is_empty()
                .then_some(())
        })
        .await;
    }

    /// Becomes a primary.
    pub(crate) async fn promote(&self) {
        let row = self.client().await.query_one("SELECT pg_promote(true, 60)", &[]).await.expect("promotion");
        assert!(row.get::<_, bool>(0), "it was promoted");
    }
}

impl Drop for Standby {
    fn drop(&mut self) {
        if self.data().join("postmaster.pid").exists() {
            self.stop();
        }
    }
}
