//! A node's registration in the metadata store (coordinator §3.1), and how it is taken back.

use std::time::Duration;

use heartbeatpb::{NodeId, WallTime};
use serde::{Deserialize, Serialize};

use crate::Layout;
use crate::backend::{LeaseId, Op, Revision, Store, StoreError, Txn};

/// A registration that takes longer is given up, and with it the start of the process.
const REGISTER: Duration = Duration::from_secs(10);
/// Between two attempts to register.
const PAUSE: Duration = Duration::from_millis(200);
/// What this node can do, for nodes of other versions.
const FEATURES: [&str; 2] = ["maintainer-epoch", "drain-1"];

/// What a node says of itself in the store. Readers do without what older nodes leave out.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct NodeInfo {
    /// Its id.
    pub id: String,
    /// `host:port` where others reach it.
    pub address: String,
    /// Version of its program.
    pub version: String,
    /// Commit that its program was built from.
    pub git_hash: String,
    /// Path of its program.
    pub deploy_path: String,
    /// When it started, in seconds since 1970.
    pub start_timestamp: i64,
    /// Tells nodes of this architecture from older ones.
    pub is_new_arch: bool,
    /// Epoch of the process; 0 when it does not say.
    pub epoch: u64,
    /// What it can do.
    pub features: Vec<String>,
    /// It has stopped to write and says goodbye: nobody need wait for it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub leaving: bool,
}

impl NodeInfo {
    /// This process.
    #[must_use]
    pub fn own(id: &NodeId, address: &str, epoch: u64) -> Self {
        let program = std::env::current_exe().map(|path| path.display().to_string());
        Self {
            id: id.to_string(),
            address: address.to_owned(),
            version: concat!("v", env!("CARGO_PKG_VERSION")).to_owned(),
            git_hash: option_env!("MILLRACE_GIT_HASH").unwrap_or("").to_owned(),
            deploy_path: program.unwrap_or_default(),
            start_timestamp: WallTime::now().0 / 1_000_000,
            is_new_arch: true,
            epoch,
            features: FEATURES.iter().map(|&feature| feature.to_owned()).collect(),
            leaving: false,
        }
    }

    /// Reads a registration; `None` when it is not one.
    #[must_use]
    pub fn read(value: &[u8]) -> Option<Self> {
        serde_json::from_slice(value).ok().filter(|info: &Self| !info.id.is_empty())
    }

    fn value(&self) -> Result<Vec<u8>, StoreError> {
        serde_json::to_vec(self).map_err(|_| StoreError::Invalid("the registration cannot be written down"))
    }
}

/// A registration under a lease.
#[derive(Debug)]
pub struct Registration {
    key: String,
    info: NodeInfo,
    lease: LeaseId,
}

impl Registration {
    /// Makes this node known to the others. Returns the revision at which they see it.
    ///
    /// # Errors
    /// When the store does not take it within 10 seconds, or not at all.
    pub async fn new(
        store: &dyn Store,
        layout: &Layout,
        info: NodeInfo,
        lease: LeaseId,
    ) -> Result<(Self, Revision), StoreError> {
        let key = layout.capture(&NodeId::from(info.id.as_str()));
        let put = Op::Put { key: key.clone(), value: info.value()?, lease: Some(lease) };
        let deadline = tokio::time::Instant::now() + REGISTER;
        let revision = loop {
            match store.txn(Txn { then: vec![put.clone()], ..Txn::default() }).await {
                Ok(outcome) => break outcome.revision,
                // Writing it once more is the same.
                Err(error) if error.is_retryable() && tokio::time::Instant::now() < deadline => {
                    tracing::warn!(%error, "the node cannot be registered yet");
                    tokio::time::sleep(PAUSE).await;
                }
                Err(error) => return Err(error),
            }
        };
        Ok((Self { key, info, lease }, revision))
    }

    /// Where it is.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Takes the registration back, and with the lease everything else that hangs on it. To be called only when
    /// nothing in this process can write downstream any more: others take over at once.
    ///
    /// # Errors
    /// When the store did not take the lease back: it ends by itself then.
    pub async fn take_back(self, store: &dyn Store) -> Result<(), StoreError> {
        // First the word that this is meant: a registration that is merely gone is waited for.
        let leaving = NodeInfo { leaving: true, ..self.info };
        let value = leaving.value()?;
        let say = Op::Put { key: self.key, value, lease: Some(self.lease) };
        let say = Txn { then: vec![say], ..Txn::default() };
        match store.txn(say).await {
            Ok(_) => {}
            Err(StoreError::LeaseGone) => return Ok(()),
            Err(error) => tracing::warn!(%error, "the goodbye was not stored"),
        }
        store.revoke(self.lease).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registration_reads_back_and_foreign_ones_do_with_less() {
        let own = NodeInfo::own(&"a".into(), "10.0.0.5:8300", 7);
        let text = String::from_utf8(own.value().unwrap()).unwrap();
        for key in ["\"start-timestamp\":", "\"is-new-arch\":true", "\"git-hash\":", "\"epoch\":7"] {
            assert!(text.contains(key), "{text}");
        }
        assert!(!text.contains("leaving"), "{text}");
        assert_eq!(NodeInfo::read(text.as_bytes()), Some(own));
        let older = NodeInfo::read(br#"{"id":"b","address":"h:1","version":"v8","unknown":1}"#).unwrap();
        assert_eq!((older.address.as_str(), older.epoch, older.leaving), ("h:1", 0, false));
        for wrong in ["", "{}", "[]", "{\"id\":7}"] {
            assert_eq!(NodeInfo::read(wrong.as_bytes()), None, "{wrong}");
        }
    }
}
