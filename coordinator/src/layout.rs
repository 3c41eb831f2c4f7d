//! Where things are kept in the metadata store (coordinator §3).

use heartbeatpb::NodeId;

use crate::error::Error;

/// Words that would collide with parts of a key.
const RESERVED: [&str; 6] = ["owner", "capture", "task", "changefeed", "job", "meta"];

/// The keys of one cluster.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Layout {
    base: String,
}

/// A key that belongs to a changefeed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ChangefeedKey<'a> {
    /// Its description.
    Info {
        /// Keyspace.
        keyspace: &'a str,
        /// Name.
        name: &'a str,
    },
    /// Its progress.
    Status {
        /// Keyspace.
        keyspace: &'a str,
        /// Name.
        name: &'a str,
    },
}

impl Layout {
    /// The keys of the cluster of this id.
    ///
    /// # Errors
    /// When the id is not one: letters and digits with single dashes between, at most 128 bytes, no
    /// reserved word.
    pub fn new(cluster: &str) -> Result<Self, Error> {
        if !heartbeatpb::config::is_valid_name(cluster) || RESERVED.contains(&cluster) {
            return Err(Error::InvalidClusterId(cluster.chars().take(128).collect()));
        }
        Ok(Self { base: format!("/tidb/cdc/{cluster}") })
    }

    /// Everything of the cluster is under it.
    #[must_use]
    pub fn base(&self) -> String {
        format!("{}/", self.base)
    }

    /// Candidates for coordinator.
    #[must_use]
    pub fn owner_prefix(&self) -> String {
        format!("{}/__cdc_meta__/owner", self.base)
    }

    /// What is known of drains.
    #[must_use]
    pub fn drain(&self) -> String {
        format!("{}/__cdc_meta__/drain", self.base)
    }

    /// Registered nodes.
    #[must_use]
    pub fn capture_prefix(&self) -> String {
        format!("{}/__cdc_meta__/capture/", self.base)
    }

    /// A registered node.
    #[must_use]
    pub fn capture(&self, node: &NodeId) -> String {
        format!("{}{node}", self.capture_prefix())
    }

    /// Description of a changefeed.
    #[must_use]
    pub fn info(&self, keyspace: &str, name: &str) -> String {
        format!("{}/{keyspace}/changefeed/info/{name}", self.base)
    }

    /// Progress of a changefeed.
    #[must_use]
    pub fn status(&self, keyspace: &str, name: &str) -> String {
        format!("{}/{keyspace}/changefeed/status/{name}", self.base)
    }

    /// What a key says about a changefeed; `None` for other keys.
    #[must_use]
    pub fn parse<'a>(&self, key: &'a str) -> Option<ChangefeedKey<'a>> {
        let mut parts = key.strip_prefix(&self.base)?.strip_prefix('/')?.split('/');
        let (keyspace, changefeed, kind, name) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        if parts.next().is_some() || changefeed != "changefeed" || keyspace.is_empty() || name.is_empty() {
            return None;
        }
        match kind {
            "info" => Some(ChangefeedKey::Info { keyspace, name }),
            "status" => Some(ChangefeedKey::Status { keyspace, name }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    // behaviour: coordinator-ST-6
    fn keys_read_back_and_malformed_ones_are_nothing() {
        let layout = Layout::new("default").unwrap();
        assert_eq!(layout.info("k", "a"), "/tidb/cdc/default/k/changefeed/info/a");
        let info = layout.info("k", "a");
        assert_eq!(layout.parse(&info), Some(ChangefeedKey::Info { keyspace: "k", name: "a" }));
        let status = layout.status("k", "a");
        assert_eq!(layout.parse(&status), Some(ChangefeedKey::Status { keyspace: "k", name: "a" }));
        for key in [
            "",
            "/tidb/cdc/default",
            "/tidb/cdc/default/k/changefeed/info/",
            "/tidb/cdc/default/k/changefeed/info/a/b",
            "/tidb/cdc/default/k/changefeed/other/a",
            "/tidb/cdc/default2/k/changefeed/info/a",
            "/tidb/cdc/default/__cdc_meta__/owner/1f",
        ] {
            assert_eq!(layout.parse(key), None, "{key}");
        }
        assert!(Layout::new("owner").is_err() && Layout::new("a b").is_err() && Layout::new("").is_err());
    }
}
