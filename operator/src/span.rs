//! Operators of table spans.

mod add;
mod remove;

pub use add::AddSpan;
pub use remove::{Afterwards, RemoveSpan};
