//! The servers that the tests start: found, or installed as Debian's packages.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Result, bail};

/// Where Debian puts PostgreSQL's server programs, one folder per major version.
const POSTGRES_ROOT: &str = "/usr/lib/postgresql";

/// A server that tests start.
struct Server {
    name: &'static str,
    /// Debian's packages.
    packages: &'static [&'static str],
    /// Names the folder of its programs where they are not in their usual place.
    variable: &'static str,
    /// A program that shows that it is there.
    program: &'static str,
    is_there: fn(&str) -> bool,
}

const SERVERS: [Server; 4] = [
    Server {
        name: "PostgreSQL",
        packages: &["postgresql"],
        variable: "MILLRACE_TEST_PG_BIN",
        program: "initdb",
        is_there: has_postgres_program,
    },
    Server {
        name: "etcd",
        packages: &["etcd-server", "etcd-client"],
        variable: "MILLRACE_TEST_ETCD_BIN",
        program: "etcdctl",
        is_there: is_in_path,
    },
    Server {
        name: "Prometheus",
        packages: &["prometheus"],
        variable: "MILLRACE_TEST_PROMETHEUS_BIN",
        program: "promtool",
        is_there: is_in_path,
    },
    // For the peer that uses nothing of ours but the .proto files.
    Server {
        name: "gRPC for Python",
        packages: &["protobuf-compiler", "python3-grpcio", "python3-protobuf"],
        variable: "MILLRACE_TEST_PYTHON_BIN",
        program: "python3",
        is_there: has_python_grpc,
    },
];

/// Whether PostgreSQL's server programs are installed; they are not in the path.
fn has_postgres_program(program: &str) -> bool {
    let Ok(versions) = std::fs::read_dir(POSTGRES_ROOT) else { return false };
    versions.flatten().any(|entry| entry.path().join("bin").join(program).exists())
}

fn is_in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// Whether the distribution's interpreter has its gRPC, and there is a compiler for .proto files.
fn has_python_grpc(program: &str) -> bool {
    let imports = Command::new(format!("/usr/bin/{program}"))
        .args(["-c", "import grpc, google.protobuf"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    imports.is_ok_and(|status| status.success()) && is_in_path("protoc")
}

/// Makes sure that every server is there, installing Debian's packages as root.
pub(crate) fn ensure() -> Result<()> {
    let missing: Vec<&Server> = SERVERS.iter().filter(|server| !server.is_found()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|server| server.name).collect();
    let advice: Vec<String> = missing.iter().map(|server| server.advice()).collect();
    let (names, advice) = (names.join(" and "), advice.join("; "));
    if !is_root() {
        bail!("{names} is missing and only root can install it; {advice}");
    }
    eprintln!("installing {names} for the tests");
    let packages = missing.iter().flat_map(|server| server.packages).copied();
    let install: Vec<&str> =
        ["install", "-y", "-q", "--no-install-recommends"].into_iter().chain(packages).collect();
    for arguments in [&["update", "-q"][..], &install] {
        let status = Command::new("apt-get")
            .args(arguments)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdout(Stdio::null())
            .status();
        if !status.is_ok_and(|status| status.success()) {
            bail!("apt-get {} failed; {advice}", arguments.join(" "));
        }
    }
    match missing.into_iter().find(|server| !server.is_found()) {
        Some(server) => {
            bail!("the package was installed but {} is not there; {}", server.program, server.advice())
        }
        None => Ok(()),
    }
}

impl Server {
    fn is_found(&self) -> bool {
        match std::env::var_os(self.variable) {
            Some(dir) => PathBuf::from(dir).join(self.program).is_file(),
            None => (self.is_there)(self.program),
        }
    }

    fn advice(&self) -> String {
        format!(
            "install {} (Debian, Ubuntu: apt-get install {}), or set {} to the folder that holds {}",
            self.name,
            self.packages.join(" "),
            self.variable,
            self.program
        )
    }
}

fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout.starts_with(b"0\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_looked_for_where_a_person_says_and_else_in_its_usual_place() {
        assert!(is_in_path("sh") && !is_in_path("no-such-program-of-the-tests"));
        assert!(!has_postgres_program("no-such-program-of-the-tests"));
        let server = Server {
            name: "Shell",
            packages: &["dash"],
            variable: "MILLRACE_TEST_VARIABLE_THAT_NOBODY_SETS",
            program: "sh",
            is_there: is_in_path,
        };
        assert!(server.is_found());
        let advice = Server { program: "initdb", ..server }.advice();
        assert!(advice.contains("apt-get install dash") && advice.contains("holds initdb"), "{advice}");
    }
}
