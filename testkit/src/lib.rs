//! Real servers and workloads for tests.
