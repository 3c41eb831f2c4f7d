//! PostgreSQL as an upstream: logical replication with `pgoutput`.
