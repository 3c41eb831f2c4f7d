//! Real servers and workloads for tests. Only ever a dev-dependency.
//!
//! [`PgServer`] starts a private PostgreSQL in a temporary directory and removes it when it is dropped; [`Etcd`] does
//! the same with an etcd of one member or several, [`Prometheus`] with a Prometheus.
//! [`Millrace`] runs the real program as a process that can be killed, [`Api`] talks to it, [`Load`] changes
//! tables in every way that is known to be hard, and [`compare()`] says what differs at the end. [`wire::Wires`] is a
//! network between the processes that can be cut. The programs
//! in `src/bin` put these together: `crash` kills, `drain`, `copy`, `apply` and `lag` measure (the last two with a
//! [`Pair`]), `dev` is for a person to play with.
//!
//! With the feature `sim` there is a module `sim`: whole clusters in one thread, on virtual time and without any server,
//! made of what nodes are made of; a seed says what goes wrong, and what must always hold is checked by what the simulated
//! databases see. Its front page lists the checks, `docs/testing.md` also what it cannot see.

pub mod api;
pub mod compare;
pub mod etcd;
pub mod figures;
pub mod load;
pub mod pair;
pub mod plot;
pub mod postgres;
pub mod process;
pub mod prometheus;
pub mod random;
#[cfg(feature = "sim")]
pub mod sim;
pub mod wire;

pub use api::Api;
pub use compare::{Comparison, compare};
pub use etcd::{Etcd, EtcdBuilder};
pub use load::Load;
pub use pair::Pair;
pub use postgres::{PgServer, PgServerBuilder, StopMode};
pub use process::{Millrace, Usage};
pub use prometheus::Prometheus;
pub use random::Random;
