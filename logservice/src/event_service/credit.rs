//! What a receiver may be sent: pure.

use std::time::Duration;

use tokio::time::Instant;

/// A receiver that reports, and to which nothing arrives for so long, will not get what was on its way. Receivers report
/// every second.
const LOST: Duration = Duration::from_millis(700);
/// Patience with a receiver whose link is so slow that what was given up has arrived after all.
const MOST_PATIENCE: Duration = Duration::from_secs(10);

/// What a receiver says about itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Report {
    pub(super) opening: u64,
    pub(super) received: u64,
    pub(super) freed: u64,
    pub(super) window: u64,
}

/// Account of one receiver. Without a report nothing may be sent.
#[derive(Debug, Default)]
pub(super) struct Credit {
    opening: u64,
    /// Bytes sent, in the receiver's count: what it had received when the account was opened, and more.
    sent: u64,
    /// Bytes that are read from disk to be sent.
    reserved: u64,
    received: u64,
    freed: u64,
    window: u64,
    /// When something arrived last, or nothing was on its way.
    moved: Option<Instant>,
    /// When the receiver reported last.
    heard: Option<Instant>,
    /// Times that the patience was doubled.
    slow: u32,
    /// Something was given up, and everything sent since has arrived or may arrive.
    gave_up: bool,
}

impl Credit {
    /// Whether there is room for another batch.
    pub(super) fn available(&self) -> bool {
        (self.sent + self.reserved).saturating_sub(self.freed) < self.window
    }

    /// Bytes that may be sent now.
    pub(super) fn room(&self) -> u64 {
        self.window.saturating_sub((self.sent + self.reserved).saturating_sub(self.freed))
    }

    /// Whether the receiver has reported after `since`.
    pub(super) fn heard_after(&self, since: Instant) -> bool {
        self.heard.is_some_and(|at| at > since)
    }

    /// Keeps room for a batch that is read from disk.
    pub(super) fn reserve(&mut self, bytes: u64) {
        self.reserved += bytes;
    }

    /// Gives back what was kept: the batch is there.
    pub(super) fn release(&mut self, bytes: u64) {
        self.reserved = self.reserved.saturating_sub(bytes);
    }

    /// Counts a batch that was sent.
    pub(super) fn take(&mut self, bytes: u64) {
        self.sent += bytes;
    }

    /// How long nothing must arrive before what is on its way is given up.
    fn patience(&self) -> Duration {
        LOST.saturating_mul(1 << self.slow.min(8)).min(MOST_PATIENCE)
    }

    /// Hears from the receiver.
    pub(super) fn on_report(&mut self, report: Report, now: Instant) {
        if report.opening < self.opening {
            return;
        }
        if report.opening > self.opening {
            *self = Self { opening: report.opening, reserved: self.reserved, ..Self::default() };
        }
        self.heard = Some(now);
        if report.received > self.received {
            self.received = report.received;
            self.moved = Some(now);
        }
        // What arrived was sent: by an earlier life of this service perhaps, or it was given up too early.
        if self.received > self.sent && std::mem::take(&mut self.gave_up) {
            self.slow += 1;
        }
        self.sent = self.sent.max(self.received);
        let moved = *self.moved.get_or_insert(now);
        if self.sent == self.received {
            self.moved = Some(now);
        } else if now.duration_since(moved) >= self.patience() {
            self.sent = self.received;
            self.moved = Some(now);
            self.gave_up = true;
        }
        self.freed = self.freed.max(report.freed);
        self.window = report.window;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(received: u64, freed: u64) -> Report {
        Report { opening: 7, received, freed, window: 100 }
    }

    #[test]
    fn nothing_is_sent_before_a_report_and_no_more_than_the_window_after_it() {
        let now = Instant::now();
        let mut credit = Credit::default();
        assert!(!credit.available());
        credit.on_report(report(0, 0), now);
        assert!(credit.available());
        credit.take(100);
        assert!(!credit.available());
        credit.on_report(report(100, 1), now);
        assert!(credit.available());
    }

    #[test]
    fn a_service_that_starts_later_counts_what_the_receiver_still_holds() {
        let mut credit = Credit::default();
        credit.on_report(report(5000, 4950), Instant::now());
        credit.take(50);
        assert!(!credit.available(), "50 are held and 50 are on their way");
    }

    #[test]
    fn room_that_is_kept_for_a_read_is_not_given_away() {
        let mut credit = Credit::default();
        credit.on_report(report(0, 0), Instant::now());
        credit.reserve(100);
        assert!(!credit.available());
        credit.on_report(Report { opening: 8, ..report(0, 0) }, Instant::now());
        assert!(!credit.available(), "what is read for an opening before is still to come");
        credit.release(100);
        assert!(credit.available());
    }

    #[test]
    fn bytes_that_never_arrive_are_given_back_with_the_next_report() {
        let start = Instant::now();
        let mut credit = Credit::default();
        credit.on_report(report(0, 0), start);
        credit.take(100);
        credit.on_report(report(0, 0), start + Duration::from_millis(500));
        assert!(!credit.available());
        credit.on_report(report(0, 0), start + Duration::from_secs(1));
        assert!(credit.available());
    }

    #[test]
    fn a_link_on_which_bytes_arrive_after_all_is_given_more_time() {
        let at = |millis| Duration::from_millis(millis);
        let start = Instant::now();
        let mut credit = Credit::default();
        credit.on_report(report(0, 0), start);
        credit.take(100);
        credit.on_report(report(0, 0), start + at(1000));
        assert!(credit.available(), "given up");
        credit.on_report(report(100, 100), start + at(1100));
        credit.take(100);
        credit.on_report(report(100, 100), start + at(2100));
        assert!(!credit.available(), "they are late again");
        credit.on_report(report(100, 100), start + at(2600));
        assert!(credit.available(), "even a slow link loses something");
    }

    #[test]
    fn a_new_opening_begins_at_zero_and_an_old_one_is_ignored() {
        let now = Instant::now();
        let mut credit = Credit::default();
        credit.on_report(report(0, 0), now);
        credit.take(100);
        credit.on_report(Report { opening: 8, ..report(0, 0) }, now);
        assert!(credit.available());
        credit.take(100);
        credit.on_report(report(1000, 1000), now);
        assert!(!credit.available());
    }
}
