//! Sink and upstream URIs: taken apart, and shown without their secrets.

use std::fmt;

use super::ConfigError;

/// What is shown instead of a URI that cannot be taken apart.
pub const INVALID_URI: &str = "<invalid uri>";

/// What is shown instead of a secret inside a URI.
const MASK: &str = "xxxxx";

/// A parameter whose lower-case name contains one of these holds a secret.
const SECRET_WORDS: [&str; 11] = [
    "password",
    "passwd",
    "pwd",
    "access",
    "token",
    "secret",
    "key",
    "signature",
    "credential",
    "private",
    "client",
];

/// A URI taken apart: `scheme://[user[:password]@]host[:port][,host…][/path][?params]`.
///
/// Several hosts are allowed, which general URI parsers refuse. `Debug` shows the masked form.
#[derive(Clone, PartialEq, Eq)]
pub struct Uri {
    /// Lower-case scheme.
    pub scheme: String,
    /// User name, decoded; empty when absent.
    pub user: String,
    /// Password, decoded.
    pub password: Option<String>,
    /// Hosts with their ports, as written.
    pub hosts: Vec<(String, Option<u16>)>,
    /// Path, decoded, with its leading slash; empty when absent.
    pub path: String,
    /// Parameters in their order, decoded.
    pub params: Vec<(String, String)>,
    raw: Parts,
}

#[derive(Clone, PartialEq, Eq)]
struct Parts {
    user: String,
    authority: String,
    path: String,
    query: Vec<(String, Option<String>)>,
    fragment: Option<String>,
}

impl Uri {
    /// Takes a URI apart. The reason of a refusal never contains the URI.
    ///
    /// # Errors
    /// When it is not of the form above.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let text = text.trim();
        if text.is_empty() {
            return Err("it is empty");
        }
        if text.chars().any(|c| c.is_control() || c == ' ') {
            return Err("it contains a space or a control character; write it as %20");
        }
        let (scheme, rest) =
            text.split_once("://").ok_or("it has no scheme; write for example postgres://…")?;
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.');
        if scheme.is_empty()
            || !scheme.starts_with(|c: char| c.is_ascii_alphabetic())
            || !scheme.chars().all(plain)
        {
            return Err("its scheme is malformed");
        }
        let (rest, fragment) = match rest.split_once('#') {
            Some((rest, fragment)) => (rest, Some(fragment.to_owned())),
            None => (rest, None),
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = match rest.find('/') {
            Some(slash) => rest.split_at(slash),
            None => (rest, ""),
        };
        let (user_info, authority) = authority.rsplit_once('@').unwrap_or(("", authority));
        let (user, password) = match user_info.split_once(':') {
            Some((user, password)) => (user, Some(password)),
            None => (user_info, None),
        };
        let mut hosts = Vec::new();
        for host in authority.split(',').filter(|host| !host.is_empty()) {
            hosts.push(split_host(host)?);
        }
        let query: Vec<(String, Option<String>)> = query
            .split('&')
            .filter(|pair| !pair.is_empty())
            .map(|pair| match pair.split_once('=') {
                Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                None => (pair.to_owned(), None),
            })
            .collect();
        let mut params = Vec::with_capacity(query.len());
        for (key, value) in &query {
            let value = value.as_deref().unwrap_or_default();
            params.push((decode(&key.replace('+', " "))?, decode(&value.replace('+', " "))?));
        }
        Ok(Self {
            scheme: scheme.to_ascii_lowercase(),
            user: decode(user)?,
            password: password.map(decode).transpose()?,
            hosts,
            path: decode(path)?,
            params,
            raw: Parts {
                user: user.to_owned(),
                authority: authority.to_owned(),
                path: path.to_owned(),
                query,
                fragment,
            },
        })
    }

    /// The value of a parameter; the last one wins.
    #[must_use]
    pub fn param(&self, name: &str) -> Option<&str> {
        self.params.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The URI with every secret replaced by `xxxxx`.
    #[must_use]
    pub fn masked(&self) -> String {
        let mut out = format!("{}://", self.scheme);
        if self.password.is_some() {
            out.push_str(&self.raw.user);
            out.push(':');
            out.push_str(MASK);
            out.push('@');
        } else if !self.raw.user.is_empty() {
            out.push_str(&self.raw.user);
            out.push('@');
        }
        out.push_str(&self.raw.authority);
        out.push_str(&self.raw.path);
        for (at, ((raw_key, raw_value), (key, _))) in self.raw.query.iter().zip(&self.params).enumerate() {
            out.push(if at == 0 { '?' } else { '&' });
            out.push_str(raw_key);
            if let Some(value) = raw_value {
                out.push('=');
                out.push_str(if is_secret_name(key) { MASK } else { value });
            }
        }
        if self.raw.fragment.is_some() {
            // Nothing of ours reads a fragment: it is most likely the rest of a password with a bare `#`.
            out.push('#');
            out.push_str(MASK);
        }
        out
    }
}

impl fmt::Debug for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.masked())
    }
}

fn split_host(host: &str) -> Result<(String, Option<u16>), &'static str> {
    let (name, port) = if host.starts_with('[') {
        let close = host.find(']').ok_or("a bracket of an IPv6 address is not closed")?;
        let (name, rest) = host.split_at(close + 1);
        match rest.strip_prefix(':') {
            Some(port) => (name, Some(port)),
            None if rest.is_empty() => (name, None),
            None => return Err("something follows an IPv6 address that is not a port"),
        }
    } else {
        match host.split_once(':') {
            Some((name, port)) => (name, Some(port)),
            None => (host, None),
        }
    };
    let port = match port {
        None | Some("") => None,
        Some(port) => Some(port.parse().map_err(
            |_| "a port is not a number; if a password contains one of / ? # @ : write it percent-encoded",
        )?),
    };
    Ok((name.to_owned(), port))
}

fn decode(text: &str) -> Result<String, &'static str> {
    if !text.contains('%') {
        return Ok(text.to_owned());
    }
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let digit =
                |b: Option<u8>| b.and_then(|b| char::from(b).to_digit(16)).and_then(|d| u8::try_from(d).ok());
            match (digit(bytes.next()), digit(bytes.next())) {
                (Some(high), Some(low)) => out.push(high << 4 | low),
                _ => return Err("a % is not followed by two hexadecimal digits; write a bare % as %25"),
            }
        } else {
            out.push(byte);
        }
    }
    String::from_utf8(out).map_err(|_| "a percent-encoded part is not UTF-8")
}

/// Whether a parameter or key of this name holds a secret.
#[must_use]
pub(super) fn is_secret_name(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    SECRET_WORDS.iter().any(|word| name.contains(word))
}

/// A URI as it may be shown: without password and secret parameters (api-cli-config §7.7).
#[must_use]
pub fn mask_uri(uri: &str) -> String {
    match Uri::parse(uri) {
        // A bare `/` in a password leaves its tail, and the `@` after it, in the path.
        Ok(parsed) if parsed.raw.path.contains('@') && !parsed.hosts.is_empty() => INVALID_URI.to_owned(),
        Ok(parsed) => parsed.masked(),
        Err(_) => INVALID_URI.to_owned(),
    }
}

/// The family of a sink, from its scheme.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum SinkKind {
    /// `postgres`, `postgresql`.
    Postgres,
    /// `mysql`, `mysql+ssl`, `tidb`, `tidb+ssl`.
    Mysql,
    /// `kafka`, `kafka+ssl`.
    Kafka,
    /// `pulsar` and its variants.
    Pulsar,
    /// `file`, `s3`, `gcs`, `gs`, `azblob`, `azure`, `noop`.
    Storage,
    /// `blackhole`.
    Blackhole,
}

impl SinkKind {
    /// The kind of a scheme.
    #[must_use]
    pub fn of_scheme(scheme: &str) -> Option<Self> {
        match scheme {
            "postgres" | "postgresql" => Some(Self::Postgres),
            "mysql" | "mysql+ssl" | "tidb" | "tidb+ssl" => Some(Self::Mysql),
            "kafka" | "kafka+ssl" => Some(Self::Kafka),
            "pulsar" | "pulsar+ssl" | "pulsar+http" | "pulsar+https" => Some(Self::Pulsar),
            "file" | "s3" | "gcs" | "gs" | "azblob" | "azure" | "noop" => Some(Self::Storage),
            "blackhole" => Some(Self::Blackhole),
            _ => None,
        }
    }

    /// The kind of a sink URI.
    ///
    /// # Errors
    /// When the URI cannot be taken apart or nobody knows its scheme; never shows the URI.
    pub fn of(uri: &str) -> Result<Self, ConfigError> {
        let uri = Uri::parse(uri).map_err(|what| ConfigError::SinkUri(what.to_owned()))?;
        Self::of_scheme(&uri.scheme).ok_or_else(|| {
            ConfigError::SinkUri(
                "no sink knows its scheme; use postgres://, file:// or blackhole://".to_owned(),
            )
        })
    }

    /// Whether it is a message queue.
    #[must_use]
    pub const fn is_mq(self) -> bool {
        matches!(self, Self::Kafka | Self::Pulsar)
    }

    /// Whether the sink wants to hear each persisted checkpoint. A SQL target keeps its own progress and
    /// needs it only to publish a watermark in active-active mode.
    #[must_use]
    pub const fn wants_checkpoints(self, active_active: bool) -> bool {
        match self {
            Self::Kafka | Self::Pulsar | Self::Storage | Self::Blackhole => true,
            Self::Mysql | Self::Postgres => active_active,
        }
    }

    /// Value of the label `downstream_type` for a scheme.
    #[must_use]
    pub fn downstream_type(scheme: &str) -> &str {
        match scheme {
            "mysql" | "mysql+ssl" => "mysql/tidb",
            "tidb" | "tidb+ssl" => "tidb",
            "kafka" | "kafka+ssl" => "kafka",
            "pulsar" | "pulsar+ssl" | "pulsar+http" | "pulsar+https" => "pulsar",
            "gcs" | "gs" => "gcs",
            "azblob" | "azure" => "azblob",
            "postgres" | "postgresql" => "postgres",
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_is_taken_apart_and_shown_without_secrets() {
        let uri =
            Uri::parse("postgres://me:p%40ss@h1:5432,[::1]:5433/db?sslkey=/a/b&application_name=x").unwrap();
        assert_eq!((uri.scheme.as_str(), uri.user.as_str()), ("postgres", "me"));
        assert_eq!(uri.password.as_deref(), Some("p@ss"));
        assert_eq!(uri.hosts, [("h1".to_owned(), Some(5432)), ("[::1]".to_owned(), Some(5433))]);
        assert_eq!((uri.path.as_str(), uri.param("application_name")), ("/db", Some("x")));
        let shown = "postgres://me:xxxxx@h1:5432,[::1]:5433/db?sslkey=xxxxx&application_name=x";
        assert_eq!(uri.masked(), shown);
        assert_eq!(format!("{uri:?}"), shown);
    }

    #[test]
    fn no_part_of_a_password_survives_the_mask() {
        for uri in [
            "postgres://u:s3cr/et@h/db",
            "postgres://u:s3cr?et@h/db",
            "postgres://u:s3cr#et@h/db",
            "postgres://u:s3cr@et@h/db",
            "postgres://u:s3cr:et@h/db",
            "postgres://u:s3cr%zzet@h/db",
            "kafka://h:9092/t?sasl-password=s3cr&protocol=csv",
            "s3://b/p?Secret-Access-Key=s3cr",
            "nonsense s3cr",
        ] {
            let shown = mask_uri(uri);
            assert!(!shown.contains("s3cr") && !shown.contains("et@"), "{shown}");
            if let Err(what) = Uri::parse(uri) {
                assert!(!what.contains("s3cr"));
            }
        }
    }

    #[test]
    // behaviour: coordinator-CF-7
    // behaviour: coordinator-CF-8
    fn the_kind_of_a_sink_follows_from_its_scheme() {
        assert!(SinkKind::of("kafka://h:9092/t").unwrap().is_mq());
        assert!(!SinkKind::of("mysql://h:3306/").unwrap().is_mq());
        assert!(SinkKind::of("mysql://h/").unwrap().wants_checkpoints(true));
        assert!(!SinkKind::of("mysql://h/").unwrap().wants_checkpoints(false));
        assert!(SinkKind::of("blackhole://").unwrap().wants_checkpoints(false));
        assert_eq!(SinkKind::of("file:///tmp/x").unwrap(), SinkKind::Storage);
        assert_eq!(SinkKind::of("ftp://u:s3cr@h").unwrap_err().code(), "CDC:ErrSinkURIInvalid");
    }
}
