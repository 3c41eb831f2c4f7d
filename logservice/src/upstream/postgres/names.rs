//! Names of what a changefeed leaves on the server.

use heartbeatpb::{ChangefeedId, MaintainerEpoch};

/// Longest part of a changefeed's name that goes into a slot's name; PostgreSQL allows 63 bytes in all.
const NAME_PART: usize = 40;

/// Names that belong to one incarnation of a changefeed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Names {
    /// Slot and publication.
    pub(crate) slot: String,
    /// Comment that marks the publication as ours.
    pub(crate) marker: String,
    short: String,
}

impl Names {
    /// `millrace_<name>_<first eight digits of the gid>`, in the letters that a slot may have.
    pub(crate) fn of(changefeed: &ChangefeedId) -> Self {
        let name: String = changefeed
            .name
            .chars()
            .take(NAME_PART)
            .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' })
            .collect();
        let short = format!("{:08x}", changefeed.gid.high >> 32);
        Self {
            slot: format!("millrace_{name}_{short}"),
            marker: format!("millrace changefeed {}", changefeed.gid),
            short,
        }
    }

    /// A temporary slot for a copy; `salt` keeps it apart from one that is about to disappear.
    pub(crate) fn copy_slot(&self, salt: u32) -> String {
        format!("millrace_copy_{}_{salt:08x}", self.short)
    }

    /// What a reader calls itself, so that its successor knows it.
    pub(crate) fn application(&self, epoch: Option<MaintainerEpoch>) -> String {
        format!("millrace {} {}", self.short, MaintainerEpoch::to_wire(epoch))
    }

    /// What a connection calls itself that makes slot and publication, so that whoever removes them ends it first.
    pub(crate) fn creator(&self) -> String {
        format!("millrace create {}", self.short)
    }

    /// The epoch of a reader of this changefeed that calls itself `application`.
    pub(crate) fn epoch_of(&self, application: &str) -> Option<u64> {
        application.strip_prefix("millrace ")?.strip_prefix(self.short.as_str())?.trim().parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use heartbeatpb::Gid;

    use super::*;

    #[test]
    fn names_fit_the_server_and_tell_incarnations_apart() {
        let mut id = ChangefeedId::fresh(&format!("My-Feed.{}", "x".repeat(100)));
        id.gid = Gid::new(0x0123_4567_89ab_cdef, 1);
        let names = Names::of(&id);
        assert!(names.slot.starts_with("millrace_my_feed_xxx"));
        assert!(names.slot.ends_with("_01234567"));
        assert!(names.slot.len() <= 63);
        assert!(names.copy_slot(7).len() <= 63);
        let application = names.application(MaintainerEpoch::from_wire(12));
        assert_eq!(names.epoch_of(&application), Some(12));
        assert_eq!(names.epoch_of("millrace 99999999 12"), None);
    }
}
