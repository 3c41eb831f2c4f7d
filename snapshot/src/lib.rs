//! Lock-free publication of versioned values.
