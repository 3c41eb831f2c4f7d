//! Who asks: from flags, the environment and `~/.millrace/credentials`, the first that says it.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::CliError;
use super::client::Credentials;

/// What to do when the server asks for a user.
pub(super) const HINT: &str = "give --user and --password, or set MILLRACE_USER and MILLRACE_PASSWORD, or write them \
                               down with `millrace cli configure-credentials`";

/// Flags of the login and of TLS.
#[derive(Args, Debug, Clone, Default)]
pub(super) struct CredentialArgs {
    /// User of the server; the password is asked for when it is not given.
    #[arg(long, global = true, env = "MILLRACE_USER")]
    user: Option<String>,
    /// Password of the user. Better: MILLRACE_PASSWORD, or the credentials file.
    #[arg(long, global = true, env = "MILLRACE_PASSWORD", hide_env_values = true)]
    password: Option<String>,
    /// Certificates of the authorities that the server's is checked against, PEM; those of the web by default.
    #[arg(long, global = true, env = "MILLRACE_CA_PATH", value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Certificate to show to the server, PEM.
    #[arg(long, global = true, env = "MILLRACE_CERT_PATH", value_name = "FILE")]
    cert: Option<PathBuf>,
    /// Its private key, PEM.
    #[arg(long, global = true, env = "MILLRACE_KEY_PATH", value_name = "FILE")]
    key: Option<PathBuf>,
}

/// `~/.millrace/credentials`, TOML.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct File {
    #[serde(skip_serializing_if = "Option::is_none")]
    millrace_user: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    millrace_password: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ca_path: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cert_path: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_path: Option<PathBuf>,
}

fn home() -> Option<PathBuf> {
    std::env::var_os("HOME").filter(|home| !home.is_empty()).map(PathBuf::from)
}

fn file_in(home: &Path) -> PathBuf {
    home.join(".millrace").join("credentials")
}

fn usage(what: impl Into<String>) -> CliError {
    CliError::Usage(what.into())
}

impl CredentialArgs {
    /// What the client uses. `server` says whether TLS is wanted without any of its files.
    pub(super) fn resolve(&self, server: &str) -> Result<Credentials, CliError> {
        let file = match home() {
            Some(home) => read(&file_in(&home))?,
            None => File::default(),
        };
        let merged = self.over(file);
        let login = merged.login(|user| ask_password(&format!("Password of {user}: ")))?;
        let own = match (&merged.cert, &merged.key) {
            (Some(cert), Some(key)) => Some((cert.as_path(), key.as_path())),
            (None, None) => None,
            (Some(_), None) => return Err(usage("--cert needs --key too")),
            (None, Some(_)) => return Err(usage("--key needs --cert too")),
        };
        let wanted = server.starts_with("https://") || merged.ca.is_some() || own.is_some();
        let tls = if wanted {
            let tls = crate::tls::client(merged.ca.as_deref(), own);
            Some(tls.map_err(|error| usage(error.to_string()))?)
        } else {
            None
        };
        Ok(Credentials { login, tls })
    }

    /// Flags and the environment win over the file, a login as a whole.
    fn over(&self, file: File) -> Self {
        let given = self.clone();
        let (user, password) = match (given.user, given.password) {
            (None, None) => (file.millrace_user, file.millrace_password),
            // The password of the file belongs to the user of the file.
            (Some(user), None) if file.millrace_user.as_ref() == Some(&user) => {
                (Some(user), file.millrace_password)
            }
            (None, Some(password)) => (file.millrace_user, Some(password)),
            given @ (Some(_), _) => given,
        };
        Self {
            user,
            password,
            ca: given.ca.or(file.ca_path),
            cert: given.cert.or(file.cert_path),
            key: given.key.or(file.key_path),
        }
    }

    fn login(
        &self,
        ask: impl FnOnce(&str) -> Result<String, CliError>,
    ) -> Result<Option<(String, String)>, CliError> {
        match (&self.user, &self.password) {
            (None, None) => Ok(None),
            (None, Some(_)) => Err(usage("a password needs a user: give --user too")),
            (Some(user), _) if user.is_empty() || user.contains(':') => {
                Err(usage("a user's name is not empty and has no colon"))
            }
            (Some(user), Some(password)) => Ok(Some((user.clone(), password.clone()))),
            (Some(user), None) => Ok(Some((user.clone(), ask(user)?))),
        }
    }
}

/// The file, if there is one. One that others may read is told of.
fn read(path: &Path) -> Result<File, CliError> {
    use std::os::unix::fs::PermissionsExt as _;
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(File::default()),
        Err(error) => return Err(usage(format!("{}: {error}", path.display()))),
    };
    let open = std::fs::metadata(path).is_ok_and(|data| data.permissions().mode() & 0o077 != 0);
    if open {
        let at = path.display();
        eprintln!("warning: others may read {at}; chmod 600 {at}");
    }
    toml::from_str(&text).map_err(|error| {
        // Not the line itself: it may hold the password.
        let line =
            error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
        let keys = "millrace_user, millrace_password, ca_path, cert_path and key_path";
        usage(format!(
            "{}, line {line}: not usable; it is TOML with the keys {keys}, all of them texts",
            path.display()
        ))
    })
}

/// Reads a line without showing it, from the terminal; from a file or a pipe as it is.
pub fn ask_password(question: &str) -> Result<String, CliError> {
    use std::io::IsTerminal as _;
    let hidden = std::io::stdin().is_terminal();
    if hidden {
        eprint!("{question}");
        let _ = std::io::stderr().flush();
        show_typing(false);
    }
    let mut line = String::new();
    let read = std::io::stdin().read_line(&mut line);
    if hidden {
        show_typing(true);
        eprintln!();
    }
    match read {
        Ok(0) => Err(usage("there is no password to read; give --password, or MILLRACE_PASSWORD")),
        Ok(_) => Ok(line.trim_end_matches(['\r', '\n']).to_owned()),
        Err(error) => Err(usage(format!("cannot read the password: {error}"))),
    }
}

/// Whether the terminal repeats what is typed.
fn show_typing(shown: bool) {
    let word = if shown { "echo" } else { "-echo" };
    if !std::process::Command::new("stty").arg(word).status().is_ok_and(|status| status.success()) && !shown {
        eprint!("(it will be visible) ");
    }
}

/// Asks for credentials and writes them to the file of the person, which nobody else may read.
pub(super) fn configure(given: &CredentialArgs) -> Result<PathBuf, CliError> {
    let home = home().ok_or_else(|| usage("HOME is not set, and the credentials file belongs there"))?;
    let path = file_in(&home);
    let user = match &given.user {
        Some(user) => user.clone(),
        None => {
            eprint!("User: ");
            let _ = std::io::stderr().flush();
            let mut line = String::new();
            std::io::stdin().read_line(&mut line)?;
            line.trim().to_owned()
        }
    };
    let chosen = CredentialArgs { user: Some(user), ..given.clone() };
    let (user, password) = chosen
        .login(|user| ask_password(&format!("Password of {user}: ")))?
        .ok_or_else(|| usage("there is no user"))?;
    let absolute = |path: &Option<PathBuf>| path.as_ref().map(std::path::absolute).transpose();
    let file = File {
        millrace_user: Some(user),
        millrace_password: Some(password),
        ca_path: absolute(&given.ca)?,
        cert_path: absolute(&given.cert)?,
        key_path: absolute(&given.key)?,
    };
    write(&path, &file).map_err(|error| usage(format!("{}: {error}", path.display())))?;
    Ok(path)
}

/// Replaces the file as a whole: whoever reads sees the old or the new one.
fn write(path: &Path, file: &File) -> std::io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
    let text = toml::to_string(file).map_err(std::io::Error::other)?;
    let dir = path.parent().unwrap_or(Path::new("."));
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let new = path.with_extension("new");
    let _ = std::fs::remove_file(&new);
    let mut out = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    out.write_all(text.as_bytes())?;
    out.sync_all()?;
    std::fs::rename(new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some(text: &str) -> Option<String> {
        Some(text.to_owned())
    }

    fn args(user: Option<&str>, password: Option<&str>) -> CredentialArgs {
        CredentialArgs {
            user: user.map(str::to_owned),
            password: password.map(str::to_owned),
            ..CredentialArgs::default()
        }
    }

    #[test]
    // behaviour: api-L-9
    fn what_is_given_wins_over_the_file_and_a_password_needs_its_user() {
        let file = || File {
            millrace_user: some("ann"),
            millrace_password: some("of-ann"),
            ca_path: Some("file-ca".into()),
            ..File::default()
        };
        let login =
            |given: CredentialArgs, file| given.over(file).login(|user| Ok(format!("asked-{user}"))).unwrap();
        let pair = |user: &str, password: &str| Some((user.to_owned(), password.to_owned()));
        assert_eq!(login(args(None, None), File::default()), None);
        assert_eq!(login(args(None, None), file()), pair("ann", "of-ann"));
        assert_eq!(login(args(Some("ann"), None), file()), pair("ann", "of-ann"));
        assert_eq!(
            login(args(Some("bob"), None), file()),
            pair("bob", "asked-bob"),
            "not the password of another"
        );
        assert_eq!(login(args(Some("bob"), Some("x")), file()), pair("bob", "x"));
        assert_eq!(login(args(None, Some("x")), file()), pair("ann", "x"));
        assert!(args(None, Some("x")).login(|_| unreachable!()).unwrap_err().to_string().contains("--user"));
        assert!(args(Some("a:b"), Some("x")).login(|_| unreachable!()).is_err());
        let given = CredentialArgs { ca: Some("flag-ca".into()), ..args(None, None) };
        assert_eq!(given.over(file()).ca.unwrap(), Path::new("flag-ca"));
        assert_eq!(args(None, None).over(file()).ca.unwrap(), Path::new("file-ca"));
    }

    #[test]
    fn the_file_is_written_for_its_owner_only_and_read_back() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = file_in(dir.path());
        assert_eq!(read(&path).unwrap(), File::default(), "there is none");
        let file = File { millrace_user: some("ann"), millrace_password: some("a\"b\n"), ..File::default() };
        for _ in 0..2 {
            write(&path, &file).unwrap();
        }
        assert_eq!(read(&path).unwrap(), file);
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        for bad in ["millrace_user = \"a\"\npassword = \"s3cr3t\"", "millrace_password = s3cr3t"] {
            std::fs::write(&path, bad).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains("line") && !error.contains("s3cr3t"), "{error}");
        }
    }
}
