//! Which nodes of a list are there.
