//! Settings of the coordinator.

use std::time::Duration;

/// Settings that are captured when a coordinator is elected.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CoordinatorConfig {
    /// Changes of placement in flight at the same time.
    pub batch: usize,
    /// Between two rounds of repetition and of checkpoint persistence.
    pub tick: Duration,
    /// Between two looks at whether nodes have their share. After a drain nodes are left alone for as long.
    pub balance_interval: Duration,
    /// Accept maintainers that report no epoch, as nodes of older versions do. While one such node is
    /// registered there is no fence against it.
    pub tolerate_epochless: bool,
    /// Time to live of the lease under which a node leads.
    pub session_ttl: Duration,
}

impl Default for CoordinatorConfig {
    fn default() -> Self {
        Self {
            batch: 10,
            tick: Duration::from_millis(500),
            balance_interval: Duration::from_secs(15),
            tolerate_epochless: false,
            session_ttl: Duration::from_secs(10),
        }
    }
}
