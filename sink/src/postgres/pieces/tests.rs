//! Pieces of progress: what a cut keeps, and that nobody is applied twice or left out.

use std::collections::BTreeMap;

use heartbeatpb::Ts;
use proptest::prelude::*;

use super::*;

fn at(ts: u64) -> Position {
    Position { commit_ts: Ts(ts), row_number: 0 }
}

fn range(start: &str, end: &str) -> Range {
    Range { start: start.as_bytes().to_vec(), end: end.as_bytes().to_vec() }
}

/// The same pieces in every queue.
fn stored(pieces: &[(&str, &str, u64)]) -> Vec<Stored> {
    let shards = (0..SHARDS).filter_map(Shard::from_index);
    let of = |shard| {
        let piece = move |(start, end, ts): &(&str, &str, u64)| Stored {
            shard,
            piece: Piece { range: range(start, end), at: at(*ts) },
        };
        pieces.iter().map(piece)
    };
    shards.flat_map(of).collect()
}

fn first_queue(rows: &[Stored]) -> Vec<(String, String, u64)> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let rows = rows.iter().filter(|row| row.shard.index() == 0);
    rows.map(|row| (text(&row.piece.range.start), text(&row.piece.range.end), row.piece.at.commit_ts.0))
        .collect()
}

fn told(start: &str, end: &str, ts: u64) -> (String, String, u64) {
    (start.to_owned(), end.to_owned(), ts)
}

#[test]
fn a_child_takes_its_part_of_the_parents_progress_and_leaves_the_rest() {
    let cut = cut(&range("g", "m"), &stored(&[("", "", 70)]));
    assert_eq!(*cut.progress.queue(Shard::of(0)), QueueProgress::One(at(70)));
    assert_eq!(first_queue(&cut.remove), [told("", "", 70)]);
    assert_eq!(first_queue(&cut.add), [told("", "g", 70), told("m", "", 70), told("g", "m", 70)]);
}

#[test]
fn a_merged_span_keeps_the_progress_of_its_parts_until_it_has_passed_both() {
    let cut = cut(&range("", ""), &stored(&[("", "m", 90), ("m", "", 120)]));
    assert!(cut.remove.is_empty() && cut.add.is_empty());
    let mut queue = cut.progress.queue(Shard::of(0)).clone();
    assert_eq!((queue.at(b"a"), queue.at(b"m"), queue.at(b"z")), (at(90), at(120), at(120)));
    queue.advance(at(100));
    assert_eq!((queue.at(b"a"), queue.at(b"z")), (at(100), at(120)));
    queue.advance(at(80));
    assert_eq!(queue.at(b"a"), at(100), "progress never goes back");
    queue.advance(at(130));
    assert_eq!(queue, QueueProgress::One(at(130)));
}

#[test]
fn what_no_piece_covers_begins_at_the_beginning() {
    let cut = cut(&range("b", "y"), &stored(&[("", "c", 5), ("f", "g", 6), ("t", "z", 7)]));
    let queue = cut.progress.queue(Shard::of(0));
    let ends: Vec<_> = [b"b", b"c", b"f", b"g", b"t"].map(|key| queue.at(key).commit_ts.0).into();
    assert_eq!(ends, [5, 0, 6, 0, 7]);
    assert_eq!(queue.at(b"z"), Position::START, "another's key");
    let mut after = first_queue(&cut.add);
    after.sort();
    assert_eq!(
        after,
        [
            told("", "b", 5),
            told("b", "c", 5),
            told("c", "f", 0),
            told("g", "t", 0),
            told("t", "y", 7),
            told("y", "z", 7)
        ]
    );
}

#[test]
fn a_barrier_concerns_the_pieces_that_are_not_behind_it() {
    let cut = cut(&range("", ""), &stored(&[("", "f", 90), ("f", "m", 95), ("m", "t", 120), ("t", "", 80)]));
    let queue = cut.progress.queue(Shard::of(0));
    assert_eq!(queue.before(&Range::default(), at(100)), [range("", "m"), range("t", "")]);
    assert_eq!(queue.before(&Range::default(), at(50)), []);
    let one = QueueProgress::One(at(90));
    assert_eq!(one.before(&range("a", "b"), at(100)), [range("a", "b")]);
    assert_eq!(one.before(&range("a", "b"), at(90)), []);
}

fn key(at: u8) -> Vec<u8> {
    if at == 0 { Vec::new() } else { vec![at] }
}

/// Pieces over the keys 1..=9 that do not overlap, with gaps.
fn table() -> impl Strategy<Value = Vec<Stored>> {
    prop::collection::vec((prop::bool::weighted(0.8), 1u64..50), 10).prop_map(|parts| {
        let shards = (0..SHARDS).filter_map(Shard::from_index);
        let pieces: Vec<Piece> = parts
            .iter()
            .enumerate()
            .filter(|(_, (there, _))| *there)
            .map(|(i, (_, ts))| {
                let i = u8::try_from(i).expect("small");
                Piece { range: Range { start: key(i), end: key((i + 1) % 10) }, at: at(*ts) }
            })
            .collect();
        shards
            .flat_map(|shard| pieces.clone().into_iter().map(move |piece| Stored { shard, piece }))
            .collect()
    })
}

fn position(rows: &[Stored], key: &[u8]) -> Vec<Position> {
    let mine = rows.iter().filter(|row| row.shard.index() == 0 && row.piece.range.contains(key));
    mine.map(|row| row.piece.at).collect()
}

proptest! {
    #[test]
    fn a_cut_changes_no_keys_progress(rows in table(), start in 0u8..9, len in 1u8..9) {
        let end = if start + len > 9 { 0 } else { start + len };
        let span = Range { start: key(start), end: key(end) };
        let cut = cut(&span, &rows);
        let mut after: Vec<Stored> = rows.iter().filter(|row| !cut.remove.contains(row)).cloned().collect();
        after.extend(cut.add.clone());
        for k in 1..10u8 {
            let k = vec![k];
            let (before, now) = (position(&rows, &k), position(&after, &k));
            prop_assert!(now.len() <= 1, "pieces do not overlap");
            let known = before.first().copied().unwrap_or(Position::START);
            if span.contains(&k) {
                prop_assert_eq!(now, vec![known]);
                prop_assert_eq!(cut.progress.queue(Shard::of(0)).at(&k), known);
            } else {
                prop_assert_eq!(now, before);
            }
        }
        let again = super::cut(&span, &after);
        prop_assert!(again.remove.is_empty() && again.add.is_empty(), "a cut is made once");
    }

    #[test]
    fn every_change_is_applied_once_over_any_splits_and_merges(
        changes in prop::collection::vec(1u8..10, 1..60),
        runs in prop::collection::vec((prop::collection::vec(1u8..10, 0..4), any::<u8>(), any::<u8>()), 1..8),
    ) {
        // Each run divides the table anew; every dispatcher of it begins at the checkpoint and dies somewhere.
        let mut rows: Vec<Stored> = Vec::new();
        let mut applied: BTreeMap<usize, u32> = BTreeMap::new();
        let mut checkpoint = 0usize;
        for (mut bounds, seed, last) in runs {
            bounds.sort_unstable();
            bounds.dedup();
            let edges: Vec<u8> = std::iter::once(0).chain(bounds).chain([0]).collect();
            let mut ends = Vec::new();
            for (i, pair) in edges.windows(2).enumerate() {
                let span = Range { start: key(pair[0]), end: key(pair[1]) };
                let shard = Shard::of(0);
                let cut = cut(&span, &rows);
                rows.retain(|row| !cut.remove.contains(row));
                rows.extend(cut.add.clone());
                let mut queue = cut.progress.queue(shard).clone();
                let far = usize::from(seed.wrapping_mul(31).wrapping_add(u8::try_from(i).expect("small").wrapping_mul(97)));
                let end = (checkpoint + far % (changes.len() + 1)).min(changes.len());
                for (n, change) in changes.iter().enumerate().take(end).skip(checkpoint) {
                    let k = [*change];
                    if !span.contains(&k) {
                        continue;
                    }
                    let place = at(n as u64 + 1);
                    if place > queue.at(&k) {
                        *applied.entry(n).or_default() += 1;
                    }
                    queue.advance(place);
                }
                rows.retain(|row| row.shard != shard || row.piece.range.common(&span).is_none());
                rows.extend(queue.pieces(&span).into_iter().map(|piece| Stored { shard, piece }));
                ends.push(end);
            }
            // The checkpoint is somewhere at or before the slowest.
            let slowest = ends.into_iter().min().unwrap_or(checkpoint);
            checkpoint += usize::from(last) % (slowest - checkpoint + 1);
        }
        for (n, key) in changes.iter().enumerate().take(checkpoint) {
            prop_assert_eq!(applied.get(&n), Some(&1), "change {} of key {}", n, key);
        }
        prop_assert!(applied.values().all(|times| *times == 1));
    }
}
