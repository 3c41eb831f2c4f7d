//! A typed node-to-node message bus.
