//! Queues and their streams.
