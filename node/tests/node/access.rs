//! Who may ask a node: certificates, users and passwords, and where the command line has them from.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use node::Node;
use node::config::{SecuritySection, ServerConfig};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};
use serde_json::Value;

const PASSWORD: &str = "s3cr3t-canary";

/// Runs a command with its own home and nothing from the environment of the test; `input` is typed.
fn millrace(home: &Path, environment: &[(&str, &str)], arguments: &[&str], input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_millrace"))
        .args(arguments)
        .current_dir(home)
        .env_clear()
        .env("HOME", home)
        .env("PATH", std::env::var("PATH").unwrap())
        .envs(environment.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Certificates of one authority: of the node, of a person, and of somebody else.
fn certificates(dir: &Path) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    std::fs::write(dir.join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
    let issuer = Issuer::new(params, key);
    for name in ["node", "person", "stranger"] {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.subject_alt_names.push(SanType::IpAddress("127.0.0.1".parse().unwrap()));
        let key = KeyPair::generate().unwrap();
        std::fs::write(dir.join(format!("{name}.key")), key.serialize_pem()).unwrap();
        std::fs::write(dir.join(format!("{name}.pem")), params.signed_by(&key, &issuer).unwrap().pem())
            .unwrap();
    }
}

async fn node(dir: &Path, security: SecuritySection) -> (Node, String) {
    let config = ServerConfig {
        addr: "127.0.0.1:0".to_owned(),
        data_dir: dir.join("data"),
        security,
        ..ServerConfig::default()
    };
    let node = Node::start(config).await.unwrap();
    let address = node.address().to_string();
    (node, address)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
// behaviour: api-S-1
async fn a_node_with_tls_lets_in_who_shows_an_allowed_certificate() {
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let file = |name: &str| dir.path().join(name);
    let security = SecuritySection {
        ca_path: file("ca.pem"),
        cert_path: file("node.pem"),
        key_path: file("node.key"),
        cert_allowed_cn: vec!["person".to_owned()],
        ..SecuritySection::default()
    };
    let (node, address) = node(dir.path(), security).await;
    let status = |who: Option<&str>, environment: &[(&str, &str)]| {
        let (cert, key) = (format!("{}.pem", who.unwrap_or("")), format!("{}.key", who.unwrap_or("")));
        let mut arguments = vec!["cli", "--server", &address, "--ca", "ca.pem"];
        if who.is_some() {
            arguments.extend(["--cert", &cert, "--key", &key]);
        }
        arguments.push("status");
        millrace(dir.path(), environment, &arguments, "")
    };
    let person = status(Some("person"), &[]);
    assert!(person.status.success(), "{}", err(&person));
    let shown: Value = serde_json::from_slice(&person.stdout).unwrap();
    assert_eq!(shown["liveness"], 0);
    let environment = [("MILLRACE_CERT_PATH", "person.pem"), ("MILLRACE_KEY_PATH", "person.key")];
    assert!(status(None, &environment).status.success());
    for refused in [status(Some("stranger"), &[]), status(None, &[])] {
        assert_eq!(refused.status.code(), Some(1));
        assert!(err(&refused).contains("no answer from https://"), "{}", err(&refused));
    }
    // In clear nobody is heard, and a server that nobody vouches for is not spoken to.
    let clear = millrace(dir.path(), &[], &["cli", "--server", &format!("http://{address}"), "status"], "");
    assert_eq!(clear.status.code(), Some(1));
    let web = millrace(dir.path(), &[], &["cli", "--server", &format!("https://{address}"), "status"], "");
    assert!(err(&web).contains("certificate"), "{}", err(&web));
    for (arguments, words) in [
        (&["--cert", "person.pem"][..], "--key"),
        (&["--key", "person.key"], "--cert"),
        (&["--ca", "none.pem"], "none.pem"),
        (&["--ca", "person.key"], "no certificate"),
    ] {
        let output = millrace(
            dir.path(),
            &[],
            &[&["cli", "--server", &address][..], arguments, &["status"]].concat(),
            "",
        );
        assert!(output.status.code() == Some(1) && err(&output).contains(words), "{words}: {}", err(&output));
    }
    node.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_line_has_its_login_from_flags_the_environment_and_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let line = millrace(dir.path(), &[], &["password", "--user", "ann"], &format!("{PASSWORD}\n"));
    assert!(line.status.success() && line.stdout.starts_with(b"ann:SCRAM-SHA-256$"), "{}", err(&line));
    let file = dir.path().join("passwords");
    std::fs::write(&file, &line.stdout).unwrap();
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let security = SecuritySection {
        client_user_required: true,
        client_allowed_user: vec!["ann".to_owned()],
        client_password_file: file,
        ..SecuritySection::default()
    };
    let (node, address) = node(dir.path(), security).await;
    // It is told as not there, which only somebody is told who was let in.
    let query = |environment: &[(&str, &str)], arguments: &[&str], input: &str| {
        let all =
            [&["cli", "--server", &address][..], arguments, &["changefeed", "pause", "-c", "none"]].concat();
        let output = millrace(dir.path(), environment, &all, input);
        assert_eq!(output.status.code(), Some(1));
        assert!(!err(&output).contains(PASSWORD), "{}", err(&output));
        err(&output)
    };
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while query(&[], &["--user", "ann", "--password", PASSWORD], "").contains("ErrOwnerNotFound") {
        assert!(std::time::Instant::now() < deadline, "nobody leads");
    }
    let let_in = "does not exist";
    assert!(query(&[], &["--user", "ann", "--password", PASSWORD], "").contains(let_in));
    assert!(query(&[], &["--user", "ann"], &format!("{PASSWORD}\n")).contains(let_in), "it is asked for");
    assert!(query(&[("MILLRACE_USER", "ann"), ("MILLRACE_PASSWORD", PASSWORD)], &[], "").contains(let_in));
    let refused = query(&[], &[], "");
    assert!(
        refused.contains("ErrCredentialNotFound") && refused.contains("configure-credentials"),
        "{refused}"
    );
    assert!(query(&[], &["--user", "ann", "--password", "other"], "").contains("ErrUnauthorized"));
    assert!(query(&[], &["--password", PASSWORD], "").contains("--user"));

    let configured =
        millrace(dir.path(), &[], &["cli", "configure-credentials"], &format!("ann\n{PASSWORD}\n"));
    assert!(configured.status.success(), "{}", err(&configured));
    assert!(query(&[], &[], "").contains(let_in), "the file knows it");
    assert!(
        query(&[("MILLRACE_USER", "bob"), ("MILLRACE_PASSWORD", "x")], &[], "").contains("ErrUnauthorized")
    );
    let credentials = dir.path().join(".millrace/credentials");
    std::fs::set_permissions(&credentials, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    assert!(query(&[], &[], "").contains("chmod 600"), "others may read it");
    node.stop().await.unwrap();
}

#[test]
fn completions_and_manual_pages_are_printed() {
    let dir = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = millrace(dir.path(), &[], &["completions", shell], "");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success() && text.contains("changefeed") && text.contains("completions"),
            "{shell}"
        );
    }
    let page = millrace(dir.path(), &[], &["man"], "");
    assert!(String::from_utf8_lossy(&page.stdout).contains(".TH millrace"));
    assert!(millrace(dir.path(), &[], &["man", "--dir", "man"], "").status.success());
    let page = std::fs::read_to_string(dir.path().join("man/millrace-server.1")).unwrap();
    assert!(page.contains("\\-\\-data\\-dir") && page.contains("\\-\\-store"), "{page}");
    assert!(dir.path().join("man/millrace-cli-changefeed-create.1").exists());
    assert_eq!(millrace(dir.path(), &[], &["completions", "sh"], "").status.code(), Some(1));
}
