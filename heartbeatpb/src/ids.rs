//! Identities: nodes, changefeeds, dispatchers, tables.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::surroundings;

/// One server process. A fresh random id per process start: a restarted process is another node.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeId(Arc<str>);

impl NodeId {
    /// A fresh random id.
    #[must_use]
    pub fn random() -> Self {
        let (high, low) = surroundings::random_pair();
        Self(uuid::Uuid::from_u64_pair(high, low).to_string().into())
    }

    /// The text form used on the wire.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether this is the empty id, which names no node.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<&str> for NodeId {
    fn from(text: &str) -> Self {
        Self(text.into())
    }
}

impl From<String> for NodeId {
    fn from(text: String) -> Self {
        Self(text.into())
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

macro_rules! id128 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name {
            /// Upper half.
            pub high: u64,
            /// Lower half.
            pub low: u64,
        }

        impl $name {
            /// The id made of two halves.
            #[must_use]
            pub const fn new(high: u64, low: u64) -> Self {
                Self { high, low }
            }

            /// A fresh random id, never zero.
            #[must_use]
            pub fn random() -> Self {
                let (high, low) = surroundings::random_pair();
                Self { high, low }
            }

            /// Whether this is the all-zero id, which is invalid.
            #[must_use]
            pub const fn is_zero(self) -> bool {
                self.high == 0 && self.low == 0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:016x}{:016x}", self.high, self.low)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

id128!(
    /// One placement of one table span: every placement gets a fresh id.
    DispatcherId
);
id128!(
    /// Internal id of one incarnation of a changefeed; two incarnations of one name differ.
    Gid
);

/// A changefeed: its [`Gid`] is its identity, the names are for people and metrics.
#[derive(Clone)]
pub struct ChangefeedId {
    /// Identity; equality, order and hash use it alone.
    pub gid: Gid,
    /// Display name.
    pub name: Arc<str>,
    /// Namespace of the display name; `default` when namespaces are unused.
    pub keyspace: Arc<str>,
}

impl ChangefeedId {
    /// A new incarnation of `name` in keyspace `default`.
    #[must_use]
    pub fn fresh(name: &str) -> Self {
        Self { gid: Gid::random(), name: name.into(), keyspace: "default".into() }
    }
}

impl PartialEq for ChangefeedId {
    fn eq(&self, other: &Self) -> bool {
        self.gid == other.gid
    }
}
impl Eq for ChangefeedId {}
impl PartialOrd for ChangefeedId {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for ChangefeedId {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.gid.cmp(&other.gid)
    }
}
impl std::hash::Hash for ChangefeedId {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.gid.hash(state);
    }
}

impl fmt::Display for ChangefeedId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.keyspace, self.name)
    }
}

impl fmt::Debug for ChangefeedId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}#{:08x}", self.keyspace, self.name, self.gid.high >> 32)
    }
}

macro_rules! id_i64 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub i64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

id_i64!(
    /// Physical table id (PostgreSQL: the relation's oid). 0 is the DDL span.
    TableId
);
id_i64!(
    /// Schema id (PostgreSQL: the namespace's oid). 0 belongs to the DDL span.
    SchemaId
);

impl TableId {
    /// The span of the table trigger dispatcher.
    pub const DDL: Self = Self(0);
}

impl SchemaId {
    /// The schema of the table trigger dispatcher.
    pub const DDL: Self = Self(0);
}
