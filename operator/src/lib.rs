//! Changes of placement as deterministic state machines.
