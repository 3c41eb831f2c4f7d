//! The server's configuration: flags, file, data directory, address.

use std::net::TcpListener;

use testkit::Millrace;

use super::{Complaints, millrace};

#[test]
// behaviour: api-S-5
fn configurations_that_cannot_be_used_are_refused_with_the_key_and_what_to_write() {
    let mut complaints = Complaints::default();
    let dir = tempfile::tempdir().unwrap();
    let files: &[(&str, &[&str])] = &[
        ("addres = \"127.0.0.1:0\"", &["addres", "unknown"]),
        ("[event-store]\nmemory = 1", &["memory", "unknown"]),
        ("[log]\nlevel = \"info\"", &["level", "unknown"]),
        ("addres = \"127.0.0.1:0\"", &["addres", "did you mean addr?"]),
        ("[event-store]\nmemory-byte = 1", &["memory-byte", "did you mean event-store.memory-bytes?"]),
        ("[security]\nca-file = \"a\"", &["ca-file", "unknown"]),
        ("[security]\nmtls = true", &["security.mtls", "ca-path"]),
        ("[security]\nca-path = \"nowhere.pem\"", &["security.ca-path", "nowhere.pem"]),
        ("[security]\nclient-user-required = true", &["security.client-allowed-user"]),
        ("[security]\nclient-allowed-user = [\"a\"]", &["security.client-user-required"]),
        ("[security]\nredact-info-log = \"some\"", &["off, marker or on"]),
        ("[log.file]\nmax-size = -1", &["max-size", "u64"]),
        ("data-dir = \"d\"\nlog-file = \"d/log/x.log\"", &["log-file", "data directory", "d/millrace.log"]),
        ("data-dir = \"d\"\nlog-file = \"./e/../d\"", &["log-file", "data directory"]),
        ("addr = 8300", &["addr", "string"]),
        ("data-dir = [\"a\"]", &["data-dir", "string"]),
        ("[event-store]\ndisk-bytes = \"64 GiB\"", &["disk-bytes", "u64"]),
        ("[event-store]\nmemory-bytes = -1", &["memory-bytes", "u64"]),
        ("[log]\nformat = \"xml\"", &["xml", "text", "json"]),
        ("addr = \"127.0.0.1\"", &["addr", "no port", "host:port"]),
        ("addr = \":8300\"", &["addr", "no host"]),
        ("addr = \"\"", &["addr", "host:port"]),
        ("addr = \"127.0.0.1:70000\"", &["addr", "70000"]),
        ("advertise-addr = \"0.0.0.0:8300\"", &["advertise-addr", "others can reach"]),
        ("advertise-addr = \"a\"", &["advertise-addr", "no port"]),
        ("cluster-id = \"\"", &["cluster-id", "letters"]),
        ("cluster-id = \"a/b\"", &["cluster-id", "letters"]),
        ("cluster-id = \"owner\"", &["cluster-id", "reserved"]),
        ("data-dir = \"\"", &["data-dir", "empty"]),
        ("log-level = \"millrace=loud\"", &["log-level", "millrace=loud"]),
        ("[event-store]\nmemory-bytes = 1", &["event-store.memory-bytes", "8388608"]),
        ("[event-store]\ndisk-bytes = 1", &["event-store.disk-bytes", "268435456"]),
        ("[upstreams.a]\nurl = \"postgres://u:s3cr3t-canary@h/d\"", &["url", "unknown"]),
        ("[upstreams]\na = \"postgres://u:s3cr3t-canary@h/d\"", &["line 2, a"]),
        ("[upstreams.a]\nuri = \"mysql://u:s3cr3t-canary@h/d\"", &["upstreams", "postgres or generator"]),
        ("[upstreams.\"a b\"]\nuri = \"generator://bank\"", &["upstreams", "is not a name"]),
        ("capture-session-ttl = \"soon\"", &["capture-session-ttl", "number of seconds"]),
        ("[event-store\n", &["server.toml"]),
        ("= 1", &["server.toml"]),
    ];
    for (text, words) in files {
        std::fs::write(dir.path().join("server.toml"), text).unwrap();
        complaints.refuses(dir.path(), &["server", "--config", "server.toml"], words);
    }
    std::fs::write(dir.path().join("bytes.toml"), [0xff, 0xfe]).unwrap();
    std::fs::write(dir.path().join("file"), "").unwrap();
    let flags: &[(&[&str], &[&str])] = &[
        (&["--config", "missing.toml"], &["missing.toml", "No such file"]),
        (&["--config", "."], &["configuration file", "directory"]),
        (&["--config", "bytes.toml"], &["bytes.toml", "UTF-8"]),
        (&["--addr", "here"], &["addr", "host:port"]),
        (&["--addr", "host.invalid:1", "--data-dir", "d"], &["host.invalid:1"]),
        (&["--ca", "a.pem"], &["--cert", "--key"]),
        (&["--cert", "a.pem", "--key", "a.key"], &["--ca"]),
        (&["--ca", "no.pem", "--cert", "no.pem", "--key", "no.key"], &["security.ca-path", "no.pem"]),
        (&["--cert-allowed-cn", "a,b"], &["security.cert-allowed-cn", "TLS"]),
        (&["--log-format", "xml"], &["xml", "json"]),
        (&["--log-level", "a=b=c"], &["log-level"]),
        (&["--log-file", "nowhere/log", "--addr", "127.0.0.1:0"], &["nowhere/log", "No such file"]),
        (&["--data-dir", "file", "--addr", "127.0.0.1:0"], &["data directory", "file"]),
        (&["--data-dir", "file/below", "--addr", "127.0.0.1:0"], &["data directory", "file/below"]),
        (&["--data-dir", "/proc/nowhere", "--addr", "127.0.0.1:0"], &["data directory", "/proc/nowhere"]),
        (&["--data-dir", "/proc/self", "--addr", "127.0.0.1:0"], &["/proc/"]),
        (&["--cluster-id", "-"], &["cluster-id"]),
        (&["--colour", "blue"], &["--colour"]),
    ];
    for (arguments, words) in flags {
        complaints.refuses(dir.path(), &[&["server"][..], arguments].concat(), words);
    }
    complaints.none();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_or_a_data_directory_in_use_is_named() {
    let mut complaints = Complaints::default();
    let dir = tempfile::tempdir().unwrap();
    let mut first = Millrace::new(std::path::Path::new(env!("CARGO_BIN_EXE_millrace")), dir.path()).unwrap();
    first.start().await.unwrap();
    complaints.refuses(
        dir.path(),
        &["server", "--addr", "127.0.0.1:0", "--data-dir", "data"],
        &["data directory", "data", "another process"],
    );
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    complaints.refuses(
        dir.path(),
        &["server", "--addr", &address, "--data-dir", "other"],
        &["cannot listen", &address],
    );
    complaints.refuses(
        dir.path(),
        &["quickstart", "--addr", &address, "--data-dir", "other"],
        &["cannot listen", &address],
    );
    first.ready().await.unwrap();
    first.stop().await.unwrap();
    complaints.none();
}

#[test]
fn a_quickstart_that_cannot_begin_says_why_and_leaves_no_server_behind() {
    let mut complaints = Complaints::default();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("unknown.toml"), "[filter]\nrulez = [\"*.*\"]\n").unwrap();
    let run = ["quickstart", "--duration", "1s", "--addr", "127.0.0.1:0"];
    let cases: &[(&[&str], &[&str])] = &[
        (&["--from", "gopher://x"], &["postgres", "generator"]),
        (&["--from", "generator://unknown"], &["bank", "wide"]),
        (&["--from", "generator://bank?rate=fast"], &["rate"]),
        (&["--from", "generator://bank?speed=1"], &["speed"]),
        (&["--from", "postgres://u:s3cr3t-canary@127.0.0.1:1/d"], &["127.0.0.1:1"]),
        (&["--to", "gopher://x"], &["sink"]),
        (&["--to", "file:///proc/nowhere?protocol=canal-json"], &["/proc/nowhere"]),
        (&["--to", "file:///tmp/x?protocol=morse"], &["morse"]),
        (&["--to", "postgres://u:s3cr3t-canary@127.0.0.1:1/d"], &["127.0.0.1:1"]),
        (&["--config", "missing.toml"], &["missing.toml", "No such file"]),
        (&["--config", "unknown.toml"], &["rulez"]),
        (&["--filter", "a.b.c[", "--from", "generator://bank"], &["a.b.c["]),
        (&["--data-dir", "/proc/nowhere"], &["/proc/nowhere"]),
    ];
    for (arguments, words) in cases {
        complaints.refuses(dir.path(), &[&run[..], arguments].concat(), words);
    }
    assert!(millrace(dir.path(), &["version"]).status.success());
    complaints.none();
}
