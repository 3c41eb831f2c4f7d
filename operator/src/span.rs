//! Operators of table spans.

mod add;
mod merge;
mod moving;
mod remove;
mod split;

pub use add::AddSpan;
pub use merge::{MergeSpans, OccupySpan};
pub use moving::MoveSpan;
pub use remove::{Afterwards, RemoveSpan};
pub use split::SplitSpan;
