//! `[upstreams.NAME]`: databases that changefeeds may name instead of giving a URI (api-cli-config §14).

use std::collections::BTreeMap;

use heartbeatpb::config::{Uri, mask_uri};
use serde::{Deserialize, Serialize};

use super::is_name;

/// `[upstreams.NAME]`.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct UpstreamSection {
    /// `postgres` or `generator`; follows from the URI when empty.
    pub kind: String,
    /// Address and credentials.
    pub uri: String,
    /// Parameters that are added to the URI.
    pub options: BTreeMap<String, String>,
}

impl std::fmt::Debug for UpstreamSection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UpstreamSection")
            .field("kind", &self.kind)
            .field("uri", &mask_uri(&self.uri))
            .finish_non_exhaustive()
    }
}

/// Kinds, and the schemes that belong to each.
const KINDS: [(&str, &[&str]); 2] =
    [("postgres", &["postgres", "postgresql"]), ("generator", &["generator"])];

impl UpstreamSection {
    /// The URI with its options.
    #[must_use]
    pub fn full_uri(&self) -> String {
        if self.options.is_empty() {
            return self.uri.clone();
        }
        let mut options = url::form_urlencoded::Serializer::new(String::new());
        options.extend_pairs(&self.options);
        let joint = if self.uri.contains('?') { '&' } else { '?' };
        format!("{}{joint}{}", self.uri, options.finish())
    }

    /// What is wrong with it, without its URI.
    fn problem(&self) -> Option<String> {
        if self.uri.is_empty() {
            return Some(
                "has no uri; write for example uri = \"postgres://user:password@host/database\"".to_owned(),
            );
        }
        let uri = match Uri::parse(&self.uri) {
            Ok(uri) => uri,
            Err(what) => return Some(format!("has a uri that cannot be used: {what}")),
        };
        let Some((kind, _)) = KINDS.iter().find(|(_, schemes)| schemes.contains(&uri.scheme.as_str())) else {
            return Some("has a uri of another scheme than postgres or generator".to_owned());
        };
        if !self.kind.is_empty() && self.kind != *kind {
            return Some(format!("is of kind {:?} and its uri is one of {kind}; leave kind out", self.kind));
        }
        let twice = self.options.keys().find(|name| uri.param(name).is_some());
        twice.map(|name| format!("has {name} in its uri and in its options; keep one"))
    }
}

/// Checks every named upstream; an error says which and what to do, without credentials.
pub(super) fn validate(upstreams: &BTreeMap<String, UpstreamSection>) -> Result<(), (&'static str, String)> {
    for (name, upstream) in upstreams {
        if !is_name(name) {
            let shown: String = name.chars().take(64).collect();
            return Err((
                "upstreams",
                format!("{shown:?} is not a name; use letters, digits and single hyphens"),
            ));
        }
        if let Some(problem) = upstream.problem() {
            return Err(("upstreams", format!("{name} {problem}")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<BTreeMap<String, UpstreamSection>, String> {
        let config: crate::config::ServerConfig = toml::from_str(text).map_err(|e| e.to_string())?;
        config.validate().map_err(|e| e.to_string())?;
        Ok(config.upstreams)
    }

    #[test]
    fn an_upstream_is_named_with_its_credentials_and_options() {
        let text = "[upstreams.shop]\nuri = \"postgres://u:s3cr3t@h/d\"\n[upstreams.shop.options]\n\
                    sslmode = \"require\"\napplication_name = \"a b&c\"\n[upstreams.bank]\nuri = \"generator://bank?seed=1\"\n\
                    options = { rate = \"5\" }\n";
        let read = read(text).unwrap();
        let shop = Uri::parse(&read["shop"].full_uri()).unwrap();
        assert_eq!((shop.param("sslmode"), shop.param("application_name")), (Some("require"), Some("a b&c")));
        assert_eq!(read["bank"].full_uri(), "generator://bank?seed=1&rate=5");
        assert!(!format!("{read:?}").contains("s3cr3t"), "{read:?}");
    }

    #[test]
    fn what_cannot_be_an_upstream_is_refused_by_name_and_without_its_password() {
        for (text, words) in [
            ("[upstreams.\"a b\"]\nuri = \"generator://bank\"", "is not a name"),
            ("[upstreams.a]\nkind = \"postgres\"", "has no uri"),
            ("[upstreams.a]\nuri = \"postgres://u:s3cr/3t@h/d\"", "a "),
            ("[upstreams.a]\nuri = \"mysql://u:s3cr3t@h/d\"", "postgres or generator"),
            ("[upstreams.a]\nkind = \"mysql\"\nuri = \"postgres://u:s3cr3t@h/d\"", "leave kind out"),
            ("[upstreams.a]\nuri = \"generator://bank?seed=1\"\noptions = { seed = \"2\" }", "keep one"),
            ("[upstreams.a]\nurl = \"postgres://u:s3cr3t@h/d\"", "url"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(words), "{words}: {error}");
        }
    }
}
