//! The database servers that the tests start.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Result, bail};

/// Where Debian puts PostgreSQL's server programs, one folder per major version.
const POSTGRES_ROOT: &str = "/usr/lib/postgresql";

/// Folder with `initdb` and `postgres`, if they are installed.
fn postgres_programs() -> Option<PathBuf> {
    let versions = std::fs::read_dir(POSTGRES_ROOT).ok()?;
    versions.flatten().map(|entry| entry.path().join("bin")).find(|bin| bin.join("initdb").exists())
}

/// Makes sure that PostgreSQL's server programs are there, installing Debian's package as root.
pub(crate) fn ensure() -> Result<()> {
    if postgres_programs().is_some() || std::env::var_os("MILLRACE_TEST_PG_BIN").is_some() {
        return Ok(());
    }
    let advice = "install PostgreSQL's server programs (Debian, Ubuntu: apt-get install postgresql), \
                  or set MILLRACE_TEST_PG_BIN to the folder that holds initdb";
    if !is_root() {
        bail!("PostgreSQL's server programs are missing and only root can install them; {advice}");
    }
    eprintln!("installing PostgreSQL for the tests");
    for arguments in
        [&["update", "-q"][..], &["install", "-y", "-q", "--no-install-recommends", "postgresql"]]
    {
        let status = Command::new("apt-get")
            .args(arguments)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdout(Stdio::null())
            .status();
        if !status.is_ok_and(|status| status.success()) {
            bail!("apt-get {} failed; {advice}", arguments.join(" "));
        }
    }
    if postgres_programs().is_none() {
        bail!("the package was installed but {POSTGRES_ROOT}/*/bin/initdb is not there; {advice}");
    }
    Ok(())
}

fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout.starts_with(b"0\n"))
}
