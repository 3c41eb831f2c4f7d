//! Who may ask (api-cli-config §2): HTTP Basic, verified against a file of verifiers or by a login in a database.
//!
//! ```text
//! no credentials -----------------------------------------------> 401 CDC:ErrCredentialNotFound
//! user, password --> verified the same within 30 s? --yes--------> in
//!                        | no
//!                        v one of 4 at a time; a failure keeps its place for half a second
//!                    allowed, and file or database say yes? --yes-> in, remembered
//!                        | no
//!                        +---------------------------------------> 401 CDC:ErrUnauthorized
//! ```

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, header};
use base64::Engine as _;
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use super::ApiFailure;
use super::password::{Verifier, same};
use crate::config::SecuritySection;

/// How long a password that was right is not verified again.
const REMEMBERED: Duration = Duration::from_secs(30);
/// Verifications at one time.
const AT_ONCE: usize = 4;
/// How long a failure keeps others from trying.
const PENALTY: Duration = Duration::from_millis(500);
/// Longest file of verifiers that is read.
const LONGEST_FILE: u64 = 1 << 20;

/// The code of a request without credentials.
pub(super) const NOT_FOUND: &str = "CDC:ErrCredentialNotFound";
/// The code of credentials that are not right.
pub(super) const UNAUTHORIZED: &str = "CDC:ErrUnauthorized";

/// Lets requests in, or not.
pub(crate) struct Gate {
    /// `None`: everybody.
    users: Option<Users>,
}

struct Users {
    allowed: Vec<String>,
    provider: Provider,
    known: Mutex<BTreeMap<String, (String, Instant)>>,
    places: Semaphore,
}

/// What knows whether a password is right.
enum Provider {
    File(PathBuf),
    /// Logs in; the URI has no user and no password.
    Login(url::Url),
}

impl Gate {
    /// What the configuration says.
    ///
    /// # Errors
    /// When the file of verifiers cannot be used, or the URI of the database is none.
    pub(crate) fn new(section: &SecuritySection) -> Result<Self, String> {
        if !section.client_user_required {
            return Ok(Self { users: None });
        }
        let provider = if section.client_login_uri.is_empty() {
            let path = section.client_password_file.clone();
            verifiers(&path)?;
            Provider::File(path)
        } else {
            let url = url::Url::parse(&section.client_login_uri);
            Provider::Login(url.map_err(|_| "security.client-login-uri is not a URI".to_owned())?)
        };
        let allowed = section.client_allowed_user.clone();
        Ok(Self {
            users: Some(Users {
                allowed,
                provider,
                known: Mutex::default(),
                places: Semaphore::new(AT_ONCE),
            }),
        })
    }

    /// The user that a request comes from; `None` when nobody is asked.
    pub(crate) async fn admit(&self, headers: &HeaderMap) -> Result<Option<String>, ApiFailure> {
        let Some(users) = &self.users else { return Ok(None) };
        let (user, password) = credentials(headers)?;
        if users.remembers(&user, &password) {
            return Ok(Some(user));
        }
        let Ok(_place) = users.places.acquire().await else { return Err(wrong()) };
        // Whoever waited for the place may have been verified meanwhile.
        if users.remembers(&user, &password) {
            return Ok(Some(user));
        }
        match users.verify(&user, &password).await {
            Ok(()) => {
                users.known.lock().insert(user.clone(), (password, Instant::now()));
                Ok(Some(user))
            }
            Err(failure) => {
                tokio::time::sleep(PENALTY).await;
                Err(failure)
            }
        }
    }
}

/// Says neither whether there is such a user nor whether it is allowed.
fn wrong() -> ApiFailure {
    ApiFailure::new(UNAUTHORIZED, "the user or the password is wrong, or the user is not allowed")
}

impl Users {
    fn remembers(&self, user: &str, password: &str) -> bool {
        let mut known = self.known.lock();
        known.retain(|_, (_, at)| at.elapsed() < REMEMBERED);
        known.get(user).is_some_and(|(right, _)| same(right.as_bytes(), password.as_bytes()))
    }

    async fn verify(&self, user: &str, password: &str) -> Result<(), ApiFailure> {
        let allowed = self.allowed.iter().any(|name| name == user);
        match &self.provider {
            Provider::File(path) => {
                let (path, user, password) = (path.clone(), user.to_owned(), password.to_owned());
                let right = tokio::task::spawn_blocking(move || {
                    let verifiers = verifiers(&path)?;
                    // Somebody unknown takes as long as somebody known.
                    let right = match verifiers.get(&user) {
                        Some(verifier) => verifier.admits(&password),
                        None => Verifier::nobody().admits(&password),
                    };
                    Ok::<_, String>(right)
                });
                match right.await {
                    Ok(Ok(right)) if right && allowed => Ok(()),
                    Ok(Ok(_)) => Err(wrong()),
                    Ok(Err(why)) => {
                        tracing::error!(
                            error = why,
                            "the file of passwords cannot be used; nobody is let in"
                        );
                        Err(unable())
                    }
                    Err(error) => {
                        tracing::error!(%error, "verifying a password ended abnormally");
                        Err(unable())
                    }
                }
            }
            Provider::Login(_) if !allowed => Err(wrong()),
            Provider::Login(uri) => log_in(uri, user, password).await,
        }
    }
}

fn unable() -> ApiFailure {
    ApiFailure::new(UNAUTHORIZED, "passwords cannot be verified now; the log of the node says why")
}

/// A login in the database, with the user's own password.
async fn log_in(uri: &url::Url, user: &str, password: &str) -> Result<(), ApiFailure> {
    let mut uri = uri.clone();
    if uri.set_username(user).is_err() || uri.set_password(Some(password)).is_err() {
        return Err(wrong());
    }
    let asked = match logservice::upstream::open(uri.as_str()) {
        Ok(database) => database.current_position().await.map(drop),
        Err(error) => Err(error),
    };
    match asked {
        Ok(()) => Ok(()),
        Err(error) if error.code() == "CDC:ErrUpstreamAuthFailed" => Err(wrong()),
        Err(error) => {
            tracing::warn!(error = error.chain(), "users cannot be verified by a login");
            Err(unable())
        }
    }
}

/// User and password of `Authorization: Basic`.
fn credentials(headers: &HeaderMap) -> Result<(String, String), ApiFailure> {
    let missing = |what: &str| {
        let how = "send HTTP Basic credentials (--user and --password of the command line, or MILLRACE_USER and \
                   MILLRACE_PASSWORD)";
        ApiFailure::new(NOT_FOUND, format!("{what}; {how}"))
    };
    let value = headers.get(header::AUTHORIZATION).ok_or_else(|| missing("this needs a user"))?;
    let text = value.to_str().unwrap_or_default();
    let encoded = text
        .split_once(' ')
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("basic"))
        .map(|(_, encoded)| encoded.trim());
    let decoded = encoded.and_then(|text| base64::engine::general_purpose::STANDARD.decode(text).ok());
    let decoded = decoded.and_then(|bytes| String::from_utf8(bytes).ok());
    match decoded.as_deref().and_then(|text| text.split_once(':')) {
        Some((user, password)) if !user.is_empty() => Ok((user.to_owned(), password.to_owned())),
        _ => Err(missing("the Authorization header is not that of HTTP Basic")),
    }
}

/// Reads lines `user:verifier`.
///
/// # Errors
/// Names the file, and the line when it is one.
fn verifiers(path: &std::path::Path) -> Result<BTreeMap<String, Verifier>, String> {
    use std::os::unix::fs::PermissionsExt as _;
    let at = path.display();
    let data = std::fs::metadata(path).map_err(|error| format!("{at} cannot be read: {error}"))?;
    if data.len() > LONGEST_FILE {
        return Err(format!("{at} is longer than {LONGEST_FILE} bytes"));
    }
    if data.permissions().mode() & 0o022 != 0 {
        return Err(format!("{at} can be written by others than its owner; chmod 600 {at}"));
    }
    let text = std::fs::read_to_string(path).map_err(|error| format!("{at} cannot be read: {error}"))?;
    let mut all = BTreeMap::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let read = line.split_once(':').filter(|(user, _)| !user.is_empty());
        let read = read.and_then(|(user, verifier)| Some((user, Verifier::parse(verifier.trim())?)));
        let Some((user, verifier)) = read else {
            return Err(format!(
                "{at}, line {}: write user:verifier, as `millrace password` prints it",
                number + 1
            ));
        };
        all.insert(user.trim().to_owned(), verifier);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::password::line;

    fn basic(text: &str) -> HeaderMap {
        let encoded = base64::engine::general_purpose::STANDARD.encode(text);
        HeaderMap::from_iter([(header::AUTHORIZATION, format!("Basic {encoded}").parse().unwrap())])
    }

    fn section(path: &std::path::Path) -> SecuritySection {
        SecuritySection {
            client_user_required: true,
            client_allowed_user: vec!["ann".to_owned(), "unlisted".to_owned()],
            client_password_file: path.to_owned(),
            ..SecuritySection::default()
        }
    }

    fn file(dir: &tempfile::TempDir, text: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt as _;
        let path = dir.path().join("passwords");
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        path
    }

    #[tokio::test]
    async fn only_allowed_users_with_the_right_password_are_let_in() {
        let dir = tempfile::tempdir().unwrap();
        let text =
            format!("# users\n{}\n\n{}\n", line("ann", "s3cret").unwrap(), line("bob", "other").unwrap());
        let path = file(&dir, &text);
        let gate = Gate::new(&section(&path)).unwrap();
        assert_eq!(gate.admit(&basic("ann:s3cret")).await.unwrap().as_deref(), Some("ann"));
        for (headers, code) in [
            (HeaderMap::new(), NOT_FOUND),
            (HeaderMap::from_iter([(header::AUTHORIZATION, "Bearer x".parse().unwrap())]), NOT_FOUND),
            (HeaderMap::from_iter([(header::AUTHORIZATION, "Basic ????".parse().unwrap())]), NOT_FOUND),
            (basic("ann"), NOT_FOUND),
            (basic(":s3cret"), NOT_FOUND),
            (basic("ann:s3cre"), UNAUTHORIZED),
            (basic("ann:s3cretx"), UNAUTHORIZED),
            (basic("ann:"), UNAUTHORIZED),
            (basic("bob:other"), UNAUTHORIZED),
            (basic("unlisted:x"), UNAUTHORIZED),
        ] {
            let failure = gate.admit(&headers).await.unwrap_err();
            assert_eq!(failure.code, code, "{headers:?}");
            assert!(!failure.message.contains("s3cre"), "{}", failure.message);
        }
        // A change of the file counts for whoever is not remembered.
        file(&dir, &line("ann", "changed").unwrap());
        assert!(gate.admit(&basic("ann:changed")).await.is_ok());
        assert!(
            gate.admit(&basic("ann:s3cret")).await.is_err(),
            "one password is remembered, the last that was right"
        );
        file(&dir, "nonsense");
        assert_eq!(gate.admit(&basic("unlisted:x")).await.unwrap_err().code, UNAUTHORIZED);
        assert!(gate.admit(&basic("ann:changed")).await.is_ok(), "it is remembered");
    }

    #[tokio::test]
    async fn nobody_is_asked_when_no_user_is_required() {
        let gate = Gate::new(&SecuritySection::default()).unwrap();
        assert_eq!(gate.admit(&HeaderMap::new()).await, Ok(None));
    }

    #[tokio::test]
    async fn failures_slow_down_whoever_tries_passwords() {
        let dir = tempfile::tempdir().unwrap();
        let gate = Gate::new(&section(&file(&dir, &line("ann", "s3cret").unwrap()))).unwrap();
        let began = Instant::now();
        let tries: Vec<_> = (0..9).map(|n| basic(&format!("ann:{n}"))).collect();
        let all = futures_util::future::join_all(tries.iter().map(|headers| gate.admit(headers))).await;
        assert!(all.iter().all(Result::is_err));
        assert!(
            began.elapsed() >= PENALTY * 3,
            "nine tries take three rounds of four: {:?}",
            began.elapsed()
        );
    }

    #[test]
    fn files_that_cannot_be_used_are_refused_with_the_line() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let good = line("ann", "s3cret").unwrap();
        for (text, words) in [
            ("ann", "line 1"),
            ("ann:plain", "line 1"),
            (&*format!("{good}\n:{good}"), "line 2"),
            ("ann:SCRAM-SHA-256$0:YQ==$YQ==:YQ==", "line 1"),
        ] {
            let error = Gate::new(&section(&file(&dir, text))).err().unwrap();
            assert!(error.contains(words) && !error.contains("SCRAM"), "{error}");
        }
        let path = file(&dir, &good);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o622)).unwrap();
        assert!(Gate::new(&section(&path)).err().unwrap().contains("chmod 600"));
    }
}
