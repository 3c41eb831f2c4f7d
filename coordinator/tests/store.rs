//! What every binding of the metadata store must do, run against each of them, and what only one of them can show.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "store/bindings.rs"]
mod bindings;
#[path = "store/embedded.rs"]
mod embedded;
#[path = "store/etcd.rs"]
mod etcd;
#[path = "store/faults.rs"]
mod faults;
#[path = "store/suite.rs"]
mod suite;
