//! Where things are kept in the metadata store (coordinator §3).

use heartbeatpb::NodeId;
use heartbeatpb::config::{is_valid_keyspace, is_valid_name};

use crate::error::Error;

/// Words that would collide with parts of a key.
const RESERVED: [&str; 6] = ["owner", "capture", "task", "changefeed", "job", "meta"];

/// Stands where a keyspace would, in front of what belongs to the whole cluster.
const META: &str = "__cdc_meta__";

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
        if !is_valid_name(cluster) || RESERVED.contains(&cluster) {
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
        format!("{}/{META}/owner", self.base)
    }

    /// What is known of drains.
    #[must_use]
    pub fn drain(&self) -> String {
        format!("{}/{META}/drain", self.base)
    }

    /// What people asked to be changed.
    #[must_use]
    pub fn operation_prefix(&self) -> String {
        format!("{}/{META}/operation/", self.base)
    }

    /// One operation.
    #[must_use]
    pub fn operation(&self, id: &str) -> String {
        format!("{}{id}", self.operation_prefix())
    }

    /// Registered nodes.
    #[must_use]
    pub fn capture_prefix(&self) -> String {
        format!("{}/{META}/capture/", self.base)
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
        if parts.next().is_some() || changefeed != "changefeed" {
            return None;
        }
        let is_keyspace = !keyspace.is_empty() && keyspace != META && is_valid_keyspace(keyspace);
        if !is_keyspace || !is_valid_name(name) {
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
            "/tidb/cdc/default/__cdc_meta__/changefeed/info/a",
            "/tidb/cdc/default//changefeed/info/a",
            "/tidb/cdc/default/k k/changefeed/info/a",
            "/tidb/cdc/default/k/changefeed/info/a_b",
            "/tidb/cdc/default/k/changefeed/info/-",
            "/tidb/cdc/default/k/task/position/n",
        ] {
            assert_eq!(layout.parse(key), None, "{key}");
        }
        // The keys that operators' tools know.
        let node = NodeId::from("a3b1c7de-77aa-4a0b-8c1d-3f0e2d9c5544");
        assert_eq!(
            layout.capture(&node),
            "/tidb/cdc/default/__cdc_meta__/capture/a3b1c7de-77aa-4a0b-8c1d-3f0e2d9c5544"
        );
        assert_eq!(layout.owner_prefix(), "/tidb/cdc/default/__cdc_meta__/owner");
        assert_eq!(layout.status("default", "a"), "/tidb/cdc/default/default/changefeed/status/a");
        for reserved in ["capture", "task", "changefeed", "job", "meta"] {
            assert!(Layout::new(reserved).is_err(), "{reserved}");
        }
        assert!(Layout::new(&"x".repeat(128)).is_ok() && Layout::new(&"x".repeat(129)).is_err());
        assert!(Layout::new("owner").is_err() && Layout::new("a b").is_err() && Layout::new("").is_err());
    }
}
