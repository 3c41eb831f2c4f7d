//! Placement decisions as functions from a view.
