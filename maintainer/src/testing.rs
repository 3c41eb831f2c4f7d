//! What measures and drives a maintainer without a node around it; not part of the product.

pub use crate::core::bench::{Request, Rig};
