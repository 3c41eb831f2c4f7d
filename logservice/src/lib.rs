//! Reads an upstream log, stores it, and serves it to dispatchers.
