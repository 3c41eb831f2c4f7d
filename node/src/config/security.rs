//! `[security]`: certificates of this node, and who may ask for what.

use std::path::{Path, PathBuf};

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use crate::tls::TlsFiles;

/// `[security]`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct SecuritySection {
    /// Authorities that certificates of nodes and clients are checked against, PEM. With the next two: TLS is on.
    pub ca_path: PathBuf,
    /// Certificate chain of this node, PEM.
    pub cert_path: PathBuf,
    /// Private key of this node, PEM.
    pub key_path: PathBuf,
    /// Common names that certificates of clients may have; the node's own is added. Clients need one then.
    pub cert_allowed_cn: Vec<String>,
    /// Whether clients need a certificate.
    pub mtls: bool,
    /// How much of the values of rows log lines may show. None ever has one, so this is kept for those who ask.
    pub redact_info_log: RedactMode,
    /// Whether requests that change something, or that show more than positions, need a user and a password.
    pub client_user_required: bool,
    /// Users that are let in.
    pub client_allowed_user: Vec<String>,
    /// Lines `user:verifier`, as `millrace password` prints them.
    pub client_password_file: PathBuf,
    /// A database in which users log in with their password: `postgres://host:port/database`.
    pub client_login_uri: String,
}

impl SecuritySection {
    /// Whether connections are encrypted.
    #[must_use]
    pub fn has_tls(&self) -> bool {
        !self.cert_path.as_os_str().is_empty()
    }

    /// The certificates to load, when TLS is on.
    #[must_use]
    pub fn tls_files(&self) -> Option<TlsFiles> {
        self.has_tls().then(|| TlsFiles {
            ca: self.ca_path.clone(),
            cert: self.cert_path.clone(),
            key: self.key_path.clone(),
            allowed_names: self.cert_allowed_cn.clone(),
            client_required: self.mtls || !self.cert_allowed_cn.is_empty(),
        })
    }

    /// Checks every value; an error names its key and says what to do.
    ///
    /// # Errors
    /// The key and what to do about it.
    pub fn validate(&self) -> Result<(), (&'static str, String)> {
        self.check_files()?;
        if self.client_allowed_user.iter().any(|user| user.is_empty() || user.contains(':')) {
            let what = "a user's name is not empty and has no colon".to_owned();
            return Err(("security.client-allowed-user", what));
        }
        let file = !self.client_password_file.as_os_str().is_empty();
        let login = !self.client_login_uri.is_empty();
        if !self.client_user_required {
            if file || login || !self.client_allowed_user.is_empty() {
                let what = "must be true when users are configured; otherwise everybody is let in".to_owned();
                return Err(("security.client-user-required", what));
            }
            return Ok(());
        }
        if self.client_allowed_user.is_empty() {
            let what = "must name the users that are let in".to_owned();
            return Err(("security.client-allowed-user", what));
        }
        match (file, login) {
            (false, false) => {
                let what =
                    "is missing: users need it, or client-login-uri, to be verified against".to_owned();
                Err(("security.client-password-file", what))
            }
            (true, true) => {
                let what = "must be left out when there is a client-password-file".to_owned();
                Err(("security.client-login-uri", what))
            }
            (true, false) => check_readable("security.client-password-file", &self.client_password_file),
            (false, true) => self.check_login(),
        }
    }

    fn check_files(&self) -> Result<(), (&'static str, String)> {
        let files = [
            ("security.ca-path", &self.ca_path),
            ("security.cert-path", &self.cert_path),
            ("security.key-path", &self.key_path),
        ];
        let given = files.iter().filter(|(_, path)| !path.as_os_str().is_empty()).count();
        if given > 0 {
            for (key, path) in files {
                if path.as_os_str().is_empty() {
                    let what = "is missing: TLS needs ca-path, cert-path and key-path together".to_owned();
                    return Err((key, what));
                }
                check_readable(key, path)?;
            }
            return Ok(());
        }
        for (key, given) in
            [("security.mtls", self.mtls), ("security.cert-allowed-cn", !self.cert_allowed_cn.is_empty())]
        {
            if given {
                return Err((key, "needs TLS: give ca-path, cert-path and key-path too".to_owned()));
            }
        }
        Ok(())
    }

    /// The URI is shown with the configuration, so it may not have a login of its own.
    fn check_login(&self) -> Result<(), (&'static str, String)> {
        let wrong = |what: &str| {
            Err(("security.client-login-uri", format!("{what}; write postgres://host:port/database")))
        };
        match url::Url::parse(&self.client_login_uri) {
            Ok(url) if !matches!(url.scheme(), "postgres" | "postgresql") => {
                wrong("its scheme is another one")
            }
            Ok(url) if !url.username().is_empty() || url.password().is_some() => {
                wrong("it must not have a user or a password: those come with the request")
            }
            Ok(url) if url.host_str().is_none_or(str::is_empty) => wrong("it has no host"),
            Ok(_) => Ok(()),
            Err(_) => wrong("it is not a URI"),
        }
    }
}

fn check_readable(key: &'static str, path: &Path) -> Result<(), (&'static str, String)> {
    let opened = std::fs::File::open(path).and_then(|file| file.metadata());
    match opened {
        Ok(data) if data.is_file() => Ok(()),
        Ok(_) => Err((key, format!("{} is not a file", path.display()))),
        Err(error) => Err((key, format!("{} cannot be read: {error}", path.display()))),
    }
}

/// How values are written where they may be: as they are, between marks, or not at all. Larger hides more.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RedactMode {
    /// As they are.
    Off,
    /// Between `‹` and `›`.
    #[default]
    Marker,
    /// As `?`.
    On,
}

impl RedactMode {
    /// Reads a name or one of its other spellings.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        match text.trim().to_ascii_lowercase().as_str() {
            "off" | "false" | "0" | "disable" | "disabled" => Some(Self::Off),
            "marker" | "mark" => Some(Self::Marker),
            "on" | "true" | "1" | "enable" | "enabled" => Some(Self::On),
            _ => None,
        }
    }

    /// As the API shows it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "OFF",
            Self::Marker => "MARKER",
            Self::On => "ON",
        }
    }
}

impl<'de> Deserialize<'de> for RedactMode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Switch(bool),
            Text(String),
        }
        match Form::deserialize(deserializer)? {
            Form::Switch(on) => Ok(if on { Self::On } else { Self::Off }),
            Form::Text(text) => Self::parse(&text)
                .ok_or_else(|| D::Error::custom("must be off, marker or on, or true or false")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<SecuritySection, String> {
        toml::from_str(text).map_err(|error| error.to_string())
    }

    #[test]
    // behaviour: api-S-2
    fn every_spelling_of_redaction_is_read_and_others_are_refused() {
        for (text, mode) in [
            ("true", RedactMode::On),
            ("false", RedactMode::Off),
            ("\" Marker \"", RedactMode::Marker),
            ("\"mark\"", RedactMode::Marker),
            ("\"enable\"", RedactMode::On),
            ("\"0\"", RedactMode::Off),
        ] {
            let section = parse(&format!("redact-info-log = {text}")).unwrap();
            assert_eq!(section.redact_info_log, mode, "{text}");
        }
        assert_eq!(parse("").unwrap().redact_info_log, RedactMode::Marker);
        assert!(parse("redact-info-log = \"some\"").unwrap_err().contains("off, marker or on"));
    }

    #[test]
    fn what_does_not_fit_together_is_refused_with_the_key() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let here = file.display();
        let users = "client-user-required = true\nclient-allowed-user = [\"a\"]\n";
        let cases = [
            ("ca-path = \"x\"".to_owned(), "security.ca-path", "cannot be read"),
            (format!("ca-path = \"{here}\""), "security.cert-path", "missing"),
            (format!("ca-path = \"{here}\"\ncert-path = \"{here}\""), "security.key-path", "missing"),
            (
                format!(
                    "ca-path = \"{}\"\ncert-path = \"{here}\"\nkey-path = \"{here}\"",
                    dir.path().display()
                ),
                "security.ca-path",
                "not a file",
            ),
            ("mtls = true".to_owned(), "security.mtls", "TLS"),
            ("cert-allowed-cn = [\"a\"]".to_owned(), "security.cert-allowed-cn", "TLS"),
            ("client-user-required = true".to_owned(), "security.client-allowed-user", "name"),
            ("client-allowed-user = [\"a\"]".to_owned(), "security.client-user-required", "true"),
            ("client-allowed-user = [\"a:b\"]".to_owned(), "security.client-allowed-user", "colon"),
            (users.to_owned(), "security.client-password-file", "missing"),
            (
                format!("{users}client-password-file = \"x\""),
                "security.client-password-file",
                "cannot be read",
            ),
            (format!("{users}client-login-uri = \"mysql://h/d\""), "security.client-login-uri", "scheme"),
            (
                format!("{users}client-login-uri = \"postgres://u:p@h/d\""),
                "security.client-login-uri",
                "request",
            ),
            (format!("{users}client-login-uri = \"h\""), "security.client-login-uri", "not a URI"),
            (
                format!("{users}client-password-file = \"{here}\"\nclient-login-uri = \"postgres://h/d\""),
                "security.client-login-uri",
                "left out",
            ),
        ];
        for (text, key, words) in cases {
            let (at, what) = parse(&text).unwrap().validate().unwrap_err();
            assert!(at == key && what.contains(words), "{text}: {at}: {what}");
        }
        for text in [
            String::new(),
            format!("{users}client-password-file = \"{here}\""),
            format!("{users}client-login-uri = \"postgres://h:1/d\""),
            format!("ca-path = \"{here}\"\ncert-path = \"{here}\"\nkey-path = \"{here}\"\nmtls = true"),
        ] {
            parse(&text).unwrap().validate().unwrap();
        }
        assert!(parse("client-users = []").unwrap_err().contains("client-users"));
    }
}
