//! Progress by key range: pure.
//!
//! The progress of one queue of one table is a set of pieces that do not overlap: a key range, and the position up to
//! which every change of its keys in that queue is applied. That is a fact about the target, whoever made it so; it
//! stays true when a table is divided or put together at any checkpoint. A dispatcher that opens a span cuts the pieces
//! at its bounds, and fills what no piece covers with "nothing yet". It applies a change when its position is behind the
//! piece of its key, and all pieces of its span become one when the queue has passed the furthest of them.
//!
//! ```text
//!  split at checkpoint 40:      [········ 70 ········)            the parent wrote up to 70
//!                               [··· 70 ··)[·· 70 ···)            children begin at 40, skip up to 70
//!  merge at checkpoint 80:      [··· 90 ··)[·· 120 ··)            the merged one begins at 80: skips up to 90 on the
//!                               [······· 130 ········)            left and 120 on the right; one piece behind 120
//! ```

use heartbeatpb::TableSpan;

use super::route::Position;
use crate::causality::{SHARDS, Shard};

/// A key range. Its bounds are row values: no `Debug` output shows them.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) struct Range {
    /// First key.
    pub(crate) start: Vec<u8>,
    /// End key, exclusive; empty: none.
    pub(crate) end: Vec<u8>,
}

impl std::fmt::Debug for Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if *self == Self::default() { "all" } else { "part" })
    }
}

impl Range {
    pub(crate) fn of(span: &TableSpan) -> Self {
        Self { start: span.start.clone(), end: span.end.clone() }
    }

    /// Whether it holds every key.
    pub(crate) fn is_all(&self) -> bool {
        self.start.is_empty() && self.end.is_empty()
    }

    fn is_before_end(key: &[u8], end: &[u8]) -> bool {
        end.is_empty() || key < end
    }

    fn contains(&self, key: &[u8]) -> bool {
        key >= self.start.as_slice() && Self::is_before_end(key, &self.end)
    }

    fn ends_within(&self, other: &Self) -> bool {
        other.end.is_empty() || (!self.end.is_empty() && self.end <= other.end)
    }

    /// Whether every key of `self` is one of `other`.
    pub(crate) fn is_within(&self, other: &Self) -> bool {
        self.start >= other.start && self.ends_within(other)
    }

    /// The keys of both; `None` when there are none.
    pub(crate) fn common(&self, other: &Self) -> Option<Self> {
        let start = self.start.clone().max(other.start.clone());
        let end = if self.ends_within(other) { self.end.clone() } else { other.end.clone() };
        Self::is_before_end(&start, &end).then_some(Self { start, end })
    }
}

/// A key range and how far it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Piece {
    pub(crate) range: Range,
    pub(crate) at: Position,
}

/// How far one queue of a span is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum QueueProgress {
    /// All of the span.
    One(Position),
    /// Piece by piece, in the order of their keys.
    Many(Vec<Piece>),
}

impl QueueProgress {
    fn new(pieces: Vec<Piece>) -> Self {
        match pieces.as_slice() {
            [piece] => QueueProgress::One(piece.at),
            _ => QueueProgress::Many(pieces),
        }
    }

    /// How far the piece is that has a key.
    pub(crate) fn at(&self, key: &[u8]) -> Position {
        match self {
            QueueProgress::One(at) => *at,
            QueueProgress::Many(pieces) => {
                let next = pieces.partition_point(|piece| piece.range.start.as_slice() <= key);
                let piece = next.checked_sub(1).and_then(|last| pieces.get(last));
                // A key outside of the span is none of ours: nothing of it is known.
                piece.filter(|piece| piece.range.contains(key)).map_or(Position::START, |piece| piece.at)
            }
        }
    }

    /// Every change up to `to` that the queue has is applied. Changes come in order, so that is all of the span.
    pub(crate) fn advance(&mut self, to: Position) {
        match self {
            QueueProgress::One(at) => *at = to.max(*at),
            QueueProgress::Many(pieces) if pieces.iter().all(|piece| piece.at <= to) => {
                *self = QueueProgress::One(to);
            }
            QueueProgress::Many(pieces) => {
                pieces.iter_mut().for_each(|piece| piece.at = piece.at.max(to));
            }
        }
    }

    /// The keys for which a change of the table as a whole is still to be applied.
    pub(crate) fn before(&self, span: &Range, to: Position) -> Vec<Range> {
        let pieces = match self {
            QueueProgress::One(at) if *at < to => return vec![span.clone()],
            QueueProgress::One(_) => return Vec::new(),
            QueueProgress::Many(pieces) => pieces,
        };
        let mut ranges: Vec<Range> = Vec::new();
        for piece in pieces.iter().filter(|piece| piece.at < to) {
            match ranges.last_mut() {
                Some(last) if last.end == piece.range.start => last.end.clone_from(&piece.range.end),
                Some(_) | None => ranges.push(piece.range.clone()),
            }
        }
        ranges
    }

    /// The pieces, of which `span` is the range if there is one.
    pub(crate) fn pieces(&self, span: &Range) -> Vec<Piece> {
        match self {
            QueueProgress::One(at) => vec![Piece { range: span.clone(), at: *at }],
            QueueProgress::Many(pieces) => pieces.clone(),
        }
    }
}

/// How far the queues of a span are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct SpanProgress {
    queues: Box<[QueueProgress]>,
}

impl SpanProgress {
    pub(crate) fn queue(&self, shard: Shard) -> &QueueProgress {
        &self.queues[shard.index()]
    }

    /// Takes what another worker has committed since this was read.
    pub(crate) fn raise(&mut self, known: &Self) {
        for (read, known) in self.queues.iter_mut().zip(&known.queues) {
            if let (QueueProgress::One(read), QueueProgress::One(known)) = (read, known) {
                *read = (*read).max(*known);
            }
        }
    }

    pub(crate) fn set(&mut self, shard: Shard, progress: QueueProgress) {
        self.queues[shard.index()] = progress;
    }
}

/// A piece of one queue as it is stored.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Stored {
    pub(crate) shard: Shard,
    pub(crate) piece: Piece,
}

/// What a span finds, and what must be stored before it may write.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Cut {
    pub(crate) progress: SpanProgress,
    pub(crate) remove: Vec<Stored>,
    pub(crate) add: Vec<Stored>,
}

/// Cuts the stored pieces of a table at the bounds of a span.
pub(crate) fn cut(span: &Range, stored: &[Stored]) -> Cut {
    let (mut remove, mut add) = (Vec::new(), Vec::new());
    let mut queues = Vec::with_capacity(SHARDS);
    for shard in (0..SHARDS).filter_map(Shard::from_index) {
        let mut rows: Vec<&Stored> = stored.iter().filter(|row| row.shard == shard).collect();
        rows.sort_unstable_by(|one, other| one.piece.range.cmp(&other.piece.range));
        let mut pieces: Vec<Piece> = Vec::new();
        // What of the span is not told yet.
        let mut rest = Some(span.clone());
        for row in rows {
            let whole = &row.piece.range;
            let Some(open) = &rest else { break };
            let Some(own) = whole.common(open) else { continue };
            if own.start > open.start {
                let range = Range { start: open.start.clone(), end: own.start.clone() };
                pieces.push(Piece { range, at: Position::START });
                add.extend(pieces.last().map(|piece| Stored { shard, piece: piece.clone() }));
            }
            if own != *whole {
                remove.push(row.clone());
                let left = Range { start: whole.start.clone(), end: own.start.clone() };
                let right = Range { start: own.end.clone(), end: whole.end.clone() };
                let sides = [(left, whole.start < own.start), (right, own.end != whole.end)];
                let sides = sides.into_iter().filter(|(_, there)| *there).map(|(range, _)| range);
                let at = row.piece.at;
                add.extend(
                    sides.chain([own.clone()]).map(|range| Stored { shard, piece: Piece { range, at } }),
                );
            }
            rest = (own.end != open.end).then(|| Range { start: own.end.clone(), end: open.end.clone() });
            pieces.push(Piece { range: own, at: row.piece.at });
        }
        if let Some(range) = rest {
            pieces.push(Piece { range, at: Position::START });
            add.extend(pieces.last().map(|piece| Stored { shard, piece: piece.clone() }));
        }
        queues.push(QueueProgress::new(pieces));
    }
    Cut { progress: SpanProgress { queues: queues.into() }, remove, add }
}

#[cfg(test)]
mod tests;
