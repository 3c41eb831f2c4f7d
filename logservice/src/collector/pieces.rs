//! An event that comes in pieces, put together: pure.

use bytes::{Bytes, BytesMut};

use super::Credit;
use crate::topic::EventHead;

/// Largest event: one row is at most a message of the upstream, a GiB, and its old image may be as large.
const MOST: u64 = 3 << 30;

/// One piece.
pub(super) struct Piece {
    pub(super) head: EventHead,
    pub(super) total: u64,
    pub(super) offset: u64,
    pub(super) bytes: Bytes,
}

/// The pieces of one event that have come.
#[derive(Default)]
pub(super) struct Assembly {
    head: Option<EventHead>,
    bytes: BytesMut,
    /// Room that they take.
    credit: Credit,
}

/// What a piece has led to.
#[derive(Debug)]
pub(super) enum Added {
    /// More are to come.
    Waits,
    /// One before it was lost.
    Gap,
    /// It was the last one: the event, and the room that it takes.
    Whole(Bytes, Credit),
}

impl Assembly {
    /// Takes a piece. The first of another event replaces what was there.
    pub(super) fn add(&mut self, piece: &Piece, credit: Credit) -> Added {
        let Piece { head, total, offset, bytes } = piece;
        if *offset == 0 && self.head != Some(*head) {
            *self = Self { head: Some(*head), ..Self::default() };
        }
        let have = self.bytes.len() as u64;
        let end = offset.saturating_add(bytes.len() as u64);
        if self.head != Some(*head) || *offset > have || end > *total || *total > MOST {
            *self = Self::default();
            return Added::Gap;
        }
        if end <= have {
            // It came twice.
            return Added::Waits;
        }
        self.bytes.extend_from_slice(
            bytes.get(usize::try_from(have - offset).unwrap_or(usize::MAX)..).unwrap_or_default(),
        );
        self.credit.join(credit);
        if end < *total {
            return Added::Waits;
        }
        let Self { bytes, credit, .. } = std::mem::take(self);
        Added::Whole(bytes.freeze(), credit)
    }
}

#[cfg(test)]
mod tests {
    use heartbeatpb::{DispatcherId, Gid};

    use super::*;

    fn piece(seq: u64, offset: u64, text: &'static str) -> Piece {
        let head =
            EventHead { changefeed: Gid::new(1, 2), dispatcher: DispatcherId::new(1, 1), epoch: 1, seq };
        Piece { head, total: 6, offset, bytes: Bytes::from_static(text.as_bytes()) }
    }

    fn add(assembly: &mut Assembly, piece: &Piece) -> String {
        match assembly.add(piece, Credit::default()) {
            Added::Waits => "waits".to_owned(),
            Added::Gap => "gap".to_owned(),
            Added::Whole(bytes, _) => String::from_utf8_lossy(&bytes).into_owned(),
        }
    }

    #[test]
    fn pieces_become_the_event_and_those_that_come_twice_change_nothing() {
        let mut assembly = Assembly::default();
        assert_eq!(add(&mut assembly, &piece(2, 0, "ab")), "waits");
        assert_eq!(add(&mut assembly, &piece(2, 0, "ab")), "waits");
        assert_eq!(add(&mut assembly, &piece(2, 2, "cd")), "waits");
        assert_eq!(add(&mut assembly, &piece(2, 0, "ab")), "waits");
        assert_eq!(add(&mut assembly, &piece(2, 4, "ef")), "abcdef");
        assert_eq!(add(&mut assembly, &piece(3, 0, "ghijkl")), "ghijkl");
    }

    #[test]
    fn a_piece_that_is_missing_is_a_gap_and_the_next_event_begins_anew() {
        let mut assembly = Assembly::default();
        assert_eq!(add(&mut assembly, &piece(2, 2, "cd")), "gap", "the first is missing");
        assert_eq!(add(&mut assembly, &piece(2, 0, "ab")), "waits");
        assert_eq!(add(&mut assembly, &piece(2, 4, "ef")), "gap");
        assert_eq!(add(&mut assembly, &piece(3, 0, "ab")), "waits");
        assert_eq!(add(&mut assembly, &piece(4, 0, "uv")), "waits", "the rest of the one before is lost");
        assert_eq!(add(&mut assembly, &piece(3, 2, "cdef")), "gap");
    }

    #[test]
    fn more_than_was_announced_is_a_gap() {
        let mut assembly = Assembly::default();
        assert_eq!(add(&mut assembly, &piece(2, 0, "abcd")), "waits");
        assert_eq!(add(&mut assembly, &piece(2, 4, "efg")), "gap");
        let huge = Piece { total: MOST + 1, ..piece(3, 0, "ab") };
        assert_eq!(add(&mut assembly, &huge), "gap");
    }
}
