//! Who runs what, where: one indexed, checked structure.
