//! The check of one stream: pure.

use heartbeatpb::Ts;

/// State of one stream at its receiver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct StreamCheck {
    epoch: u64,
    last_seq: u64,
    /// Largest position that this epoch delivered: a checkpoint beyond it is not reported.
    pub(crate) max_event_ts: Ts,
    /// Largest commit ts of a delivered event, over all epochs.
    last_commit_ts: Ts,
    /// Whether a schema change at `last_commit_ts` was delivered.
    ddl_at_last: bool,
}

/// What to do with an event.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    /// Hand it on.
    Deliver,
    /// Drop it: it belongs to another epoch, or was delivered before.
    Ignore,
    /// The stream has a gap: start again.
    Reset,
}

impl StreamCheck {
    /// A stream whose epochs are larger than `base`.
    pub(crate) fn new(base: u64) -> Self {
        Self {
            epoch: base,
            last_seq: 0,
            max_event_ts: Ts::ZERO,
            last_commit_ts: Ts::ZERO,
            ddl_at_last: false,
        }
    }

    /// Epoch of the current stream.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Begins a new stream after `start_ts`; answers its epoch.
    pub(crate) fn reset(&mut self, start_ts: Ts) -> u64 {
        self.epoch += 1;
        self.last_seq = 0;
        self.max_event_ts = start_ts;
        self.epoch
    }

    /// The first event of a stream.
    pub(crate) fn on_handshake(&mut self, epoch: u64, seq: u64) -> Verdict {
        if epoch != self.epoch {
            return Verdict::Ignore;
        }
        if seq != 1 || self.last_seq != 0 {
            // A repeated handshake changes nothing.
            return if self.last_seq >= seq { Verdict::Ignore } else { Verdict::Reset };
        }
        self.last_seq = 1;
        Verdict::Deliver
    }

    fn next(&mut self, epoch: u64, seq: u64) -> Verdict {
        if epoch != self.epoch {
            return Verdict::Ignore;
        }
        if self.last_seq == 0 || seq != self.last_seq + 1 {
            return Verdict::Reset;
        }
        self.last_seq = seq;
        Verdict::Deliver
    }

    /// A piece of an event: `Deliver` when the event is the next one. One that came before may come again.
    pub(crate) fn on_piece(&self, epoch: u64, seq: u64) -> Verdict {
        if epoch == self.epoch && seq <= self.last_seq {
            return Verdict::Ignore;
        }
        Self { ..*self }.next(epoch, seq)
    }

    /// Rows up to `last`. Rows at the last commit ts may come again: sinks are idempotent.
    pub(crate) fn on_rows(&mut self, epoch: u64, seq: u64, last: Ts) -> Verdict {
        let verdict = self.next(epoch, seq);
        if verdict != Verdict::Deliver {
            return verdict;
        }
        self.max_event_ts = self.max_event_ts.max(last);
        if last < self.last_commit_ts {
            return Verdict::Ignore;
        }
        if last > self.last_commit_ts {
            self.last_commit_ts = last;
            self.ddl_at_last = false;
        }
        Verdict::Deliver
    }

    /// A schema change.
    pub(crate) fn on_ddl(&mut self, epoch: u64, seq: u64, commit_ts: Ts) -> Verdict {
        let verdict = self.next(epoch, seq);
        if verdict != Verdict::Deliver {
            return verdict;
        }
        self.max_event_ts = self.max_event_ts.max(commit_ts);
        if commit_ts < self.last_commit_ts || (commit_ts == self.last_commit_ts && self.ddl_at_last) {
            return Verdict::Ignore;
        }
        self.last_commit_ts = commit_ts;
        self.ddl_at_last = true;
        Verdict::Deliver
    }

    /// A resolved position repeats the sequence number of the last event.
    pub(crate) fn on_resolved(&mut self, epoch: u64, seq: u64, ts: Ts) -> Verdict {
        if epoch != self.epoch {
            return Verdict::Ignore;
        }
        if self.last_seq == 0 || seq != self.last_seq {
            return if seq < self.last_seq { Verdict::Ignore } else { Verdict::Reset };
        }
        self.max_event_ts = self.max_event_ts.max(ts);
        Verdict::Deliver
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started() -> StreamCheck {
        let mut check = StreamCheck::new(0);
        assert_eq!(check.reset(Ts(100)), 1);
        assert_eq!(check.on_handshake(1, 1), Verdict::Deliver);
        check
    }

    // behaviour: dispatcher-89
    #[test]
    fn anything_but_the_next_number_starts_the_stream_again() {
        let mut check = StreamCheck::new(0);
        check.reset(Ts(100));
        assert_eq!(check.on_rows(1, 1, Ts(110)), Verdict::Reset, "rows before the handshake");
        assert_eq!(started().on_rows(1, 3, Ts(110)), Verdict::Reset, "gap before rows");
        assert_eq!(started().on_ddl(1, 3, Ts(110)), Verdict::Reset, "gap before a schema change");
        assert_eq!(
            started().on_resolved(1, 2, Ts(110)),
            Verdict::Reset,
            "rows before a resolved ts are missing"
        );
        let mut check = started();
        assert_eq!(check.on_rows(1, 2, Ts(110)), Verdict::Deliver);
        assert_eq!(check.on_resolved(1, 2, Ts(120)), Verdict::Deliver);
    }

    #[test]
    fn a_piece_is_taken_of_the_next_event_only_and_counts_as_none() {
        let check = started();
        assert_eq!(check.on_piece(1, 2), Verdict::Deliver);
        assert_eq!(check.on_piece(1, 2), Verdict::Deliver, "the event has not come yet");
        assert_eq!(check.on_piece(1, 1), Verdict::Ignore);
        assert_eq!(check.on_piece(1, 3), Verdict::Reset);
        assert_eq!(check.on_piece(7, 2), Verdict::Ignore);
        assert_eq!(StreamCheck::new(0).on_piece(0, 1), Verdict::Reset, "a piece before the handshake");
    }

    // behaviour: dispatcher-90
    #[test]
    fn an_event_of_another_epoch_is_dropped() {
        let mut check = started();
        check.reset(Ts(100));
        assert_eq!(check.on_rows(1, 2, Ts(110)), Verdict::Ignore);
        assert_eq!(check.on_handshake(1, 1), Verdict::Ignore);
        assert_eq!(check.on_resolved(1, 1, Ts(110)), Verdict::Ignore);
        assert_eq!(check.on_handshake(2, 1), Verdict::Deliver);
    }

    // behaviour: dispatcher-91
    #[test]
    fn what_was_delivered_before_a_reset_is_not_delivered_again_except_rows_at_the_last_ts() {
        let mut check = started();
        assert_eq!(check.on_rows(1, 2, Ts(110)), Verdict::Deliver);
        assert_eq!(check.on_ddl(1, 3, Ts(110)), Verdict::Deliver);
        check.reset(Ts(100));
        check.on_handshake(2, 1);
        assert_eq!(check.on_rows(2, 2, Ts(105)), Verdict::Ignore);
        assert_eq!(check.on_rows(2, 3, Ts(110)), Verdict::Deliver);
        assert_eq!(check.on_ddl(2, 4, Ts(110)), Verdict::Ignore);
        assert_eq!(check.on_ddl(2, 5, Ts(111)), Verdict::Deliver);
    }

    // behaviour: dispatcher-92
    #[test]
    fn rows_that_were_all_delivered_before_leave_the_streams_last_event_as_it_is() {
        let mut check = started();
        check.on_rows(1, 2, Ts(110));
        check.on_ddl(1, 3, Ts(110));
        check.reset(Ts(100));
        check.on_handshake(2, 1);
        let before = (check.last_commit_ts, check.ddl_at_last);
        assert_eq!(check.on_rows(2, 2, Ts(109)), Verdict::Ignore);
        assert_eq!((check.last_commit_ts, check.ddl_at_last), before);
        assert_eq!(check.on_ddl(2, 3, Ts(110)), Verdict::Ignore, "it was delivered before the reset");
        assert_eq!(check.on_rows(2, 4, Ts(111)), Verdict::Deliver);
    }

    // behaviour: dispatcher-99
    #[test]
    fn a_reset_lowers_the_position_that_may_be_reported() {
        let mut check = started();
        check.on_rows(1, 2, Ts(210));
        assert_eq!(check.max_event_ts, Ts(210));
        check.reset(Ts(150));
        assert_eq!(check.max_event_ts, Ts(150));
    }
}
