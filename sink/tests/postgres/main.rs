//! The PostgreSQL sink against real servers.

mod copies;
mod ddl;
mod faults;
mod fence;
mod harness;
mod large;
mod order;
mod parts;
mod permit;
mod resync;
mod schema;
mod spans;
mod types;
