//! Histories and properties of the queues.

use proptest::prelude::*;

use super::order::IN_ORDER;
use super::*;

const T: TableId = TableId(1);

fn access(shard: u8, keys: &[u64]) -> Access {
    Access {
        table: T,
        shard: Shard(shard),
        row: u64::MAX,
        moves_to: None,
        keys: keys.into(),
        barrier: false,
        bytes: 10,
        weight: 1,
    }
}

fn taken(causality: &mut Causality<&'static str>) -> Option<(Batch<&'static str>, Vec<&'static str>)> {
    let batch = causality.take(100, 10_000)?;
    let names = batch.entries.iter().map(|entry| entry.payload).collect();
    Some((batch, names))
}

fn expect(causality: &mut Causality<&'static str>, names: &[&str]) -> Batch<&'static str> {
    let (batch, got) = taken(causality).expect("a batch is ready");
    assert_eq!(got, names);
    batch
}

fn expect_none(causality: &mut Causality<&'static str>) {
    assert!(taken(causality).is_none());
}

// behaviour: dataplane-4
#[test]
fn a_unique_value_freed_in_one_queue_is_taken_in_another_only_after_the_commit() {
    let mut c = Causality::default();
    c.push(access(1, &[7]), "free 7");
    c.push(access(2, &[8]), "unrelated");
    c.push(access(2, &[7]), "take 7");
    let free = expect(&mut c, &["free 7"]);
    let unrelated = expect(&mut c, &["unrelated"]);
    c.complete(&unrelated);
    expect_none(&mut c);
    c.complete(&free);
    let take = expect(&mut c, &["take 7"]);
    c.complete(&take);
    assert_eq!(c.pending(), 0);
    assert!(c.latest.is_empty() && c.tables.is_empty());
}

#[test]
fn queues_are_taken_together_up_to_the_room() {
    let mut c = Causality::default();
    for (shard, keys, name) in
        [(1, 7, "a"), (1, 8, "b"), (2, 9, "c"), (3, 7, "waits for a"), (4, 6, "d"), (5, 5, "e")]
    {
        c.push(access(shard, &[keys]), name);
    }
    let batches = c.take_together(4, 10_000);
    let names: Vec<_> = batches.iter().flat_map(|batch| &batch.entries).map(|entry| entry.payload).collect();
    assert_eq!(names, ["a", "b", "c", "waits for a"]);
    assert_eq!((c.pending(), c.waiting()), (6, 2));
    for batch in &batches {
        c.complete(batch);
    }
    let rest = c.take_together(4, 10_000);
    let names: Vec<_> = rest.iter().flat_map(|batch| &batch.entries).map(|entry| entry.payload).collect();
    assert_eq!((names.len(), c.waiting()), (2, 0), "{names:?}");
    assert!(c.take_together(4, 10_000).is_empty());
    for batch in &rest {
        c.complete(batch);
    }
    assert_eq!((c.pending(), c.waiting()), (0, 0));
}

/// What a transaction of several queues has, in order.
fn together(c: &mut Causality<&'static str>, most: u64) -> (Vec<Batch<&'static str>>, Vec<&'static str>) {
    let batches = c.take_together(most, 10_000);
    let mut entries: Vec<_> = batches.iter().flat_map(|batch| &batch.entries).collect();
    entries.sort_by_key(|entry| entry.seq);
    let names = entries.into_iter().map(|entry| entry.payload).collect();
    (batches, names)
}

#[test]
fn a_transaction_brings_what_its_changes_wait_for() {
    let mut c = Causality::default();
    c.push(access(5, &[]), "before it");
    c.push(access(5, &[7]), "free 7");
    c.push(access(5, &[]), "behind it");
    c.push(access(9, &[7, 8]), "take 7, free 8");
    c.push(access(1, &[8]), "take 8");
    let (batches, names) = together(&mut c, 4);
    assert_eq!(names, ["before it", "free 7", "take 7, free 8", "take 8"]);
    assert!(c.take_together(4, 10_000).is_empty(), "its queues are being written");
    batches.iter().for_each(|batch| c.complete(batch));
    assert_eq!(together(&mut c, 4).1, ["behind it"]);
}

#[test]
fn a_transaction_leaves_what_waits_for_another_one_and_has_no_more_than_its_room() {
    let mut c = Causality::default();
    c.push(access(5, &[7]), "free 7");
    let (other, _) = together(&mut c, 1);
    c.push(access(1, &[]), "free to go");
    c.push(access(1, &[7]), "take 7");
    c.push(access(1, &[]), "behind it");
    for name in ["a", "b", "c"] {
        c.push(access(2, &[9]), name);
    }
    c.push(access(3, &[9]), "behind c");
    let (batches, names) = together(&mut c, 3);
    assert_eq!(names, ["free to go", "a", "b"], "room for three");
    other.iter().chain(&batches).for_each(|batch| c.complete(batch));
    assert_eq!(together(&mut c, 100).1, ["take 7", "behind it", "c", "behind c"]);
}

// behaviour: dataplane-16
#[test]
fn a_table_keeps_the_order_of_its_changes_after_a_unique_value_was_in_the_way() {
    let mut c = Causality::default();
    // What the first one frees is not known.
    c.push(access(9, &[1]), "7 becomes 1");
    c.push(access(2, &[7]), "takes 7");
    c.push(Access { table: TableId(2), ..access(9, &[]) }, "another table");
    c.push(Access { table: TableId(2), ..access(3, &[]) }, "its queue");
    let early = c.take_together(1, 10_000);
    assert_eq!(early[0].entries[0].payload, "takes 7", "queue 2 comes first");
    assert!(c.again_in_order(early, T).is_ok());
    let first = c.take_together(1, 10_000);
    assert_eq!(first[0].entries[0].payload, "its queue", "no order between tables");
    let (batches, names) = together(&mut c, 3);
    assert_eq!(names, ["7 becomes 1", "takes 7", "another table"]);
    let batches = c.again_in_order(batches, T).expect_err("they were in order");
    batches.iter().chain(&first).for_each(|batch| c.complete(batch));
    assert_eq!(c.pending(), 0);
}

#[test]
fn a_transaction_that_was_taken_before_the_order_goes_again_and_the_order_lasts_longer_each_time() {
    let mut c = Causality::default();
    let take = |c: &mut Causality<_>, shard| {
        c.push(access(shard, &[7]), "x");
        c.take_together(1, 10_000)
    };
    c.push(access(1, &[]), "a");
    let one = c.take_together(1, 10_000);
    c.push(access(2, &[]), "b");
    let two = c.take_together(1, 10_000);
    assert!(c.again_in_order(one, T).is_ok());
    let until = c.ordered[&T].until;
    assert!(c.again_in_order(two, T).is_ok(), "taken before");
    assert_eq!(c.ordered[&T].until, until, "for the same reason");
    let (both, _) = together(&mut c, 2);
    both.iter().for_each(|batch| c.complete(batch));
    let ordered = take(&mut c, 3);
    let ordered = c.again_in_order(ordered, T).expect_err("in order");
    c.complete(&ordered[0]);
    c.next_seq = until + 1;
    let later = take(&mut c, 4);
    assert!(c.again_in_order(later, T).is_ok(), "the order was over");
    assert_eq!(c.ordered[&T].length, 2 * IN_ORDER);
}

#[test]
fn what_is_committed_out_of_order_is_not_what_a_later_change_waits_for() {
    let mut c = Causality::default();
    c.push(access(1, &[]), "a");
    c.push(access(2, &[]), "b");
    c.push(access(3, &[]), "c");
    let (a, b) = (c.take_together(1, 10_000), c.take_together(1, 10_000));
    let (last, _) = together(&mut c, 1);
    assert!(c.again_in_order(a, T).is_ok());
    b.iter().chain(&last).for_each(|batch| c.complete(batch));
    let (first, names) = together(&mut c, 1);
    assert_eq!(names, ["a"]);
    c.push(access(4, &[]), "d");
    assert!(c.take_together(1, 10_000).is_empty(), "a is under way");
    first.iter().for_each(|batch| c.complete(batch));
    assert_eq!(together(&mut c, 9).1, ["d"]);
}

#[test]
fn a_barrier_and_a_change_that_goes_by_itself_are_taken_alone() {
    let mut c = Causality::default();
    c.push(access(1, &[]), "a");
    let barrier = Access { table: TableId(2), barrier: true, ..access(2, &[]) };
    c.push(barrier, "barrier of another table");
    c.push(access(3, &[]), "b");
    let [first, second] = &c.take_together(100, 10_000)[..] else { panic!("two batches") };
    assert_eq!((first.entries[0].payload, second.entries[0].payload), ("a", "b"));
    let alone = c.take_together(100, 10_000);
    assert_eq!((alone.len(), alone[0].entries[0].payload), (1, "barrier of another table"));
    let mut c = Causality::default();
    c.push(access(1, &[]), "a");
    let batch = c.take(100, 10_000).expect("ready");
    c.push(access(2, &[]), "b");
    c.retry_serially(batch);
    assert_eq!(c.waiting(), 2);
    let mut next = || -> Vec<_> {
        let batches = c.take_together(100, 10_000);
        batches.iter().flat_map(|batch| &batch.entries).map(|entry| entry.payload).collect()
    };
    assert_eq!((next(), next()), (vec!["b"], vec!["a"]));
}

#[test]
fn changes_of_one_queue_share_a_batch_even_when_they_share_a_key() {
    let mut c = Causality::default();
    c.push(access(1, &[7]), "a");
    c.push(access(1, &[7]), "b");
    expect(&mut c, &["a", "b"]);
}

#[test]
fn a_queue_is_written_by_one_batch_at_a_time() {
    let mut c = Causality::default();
    c.push(access(1, &[]), "a");
    let a = expect(&mut c, &["a"]);
    c.push(access(1, &[]), "b");
    expect_none(&mut c);
    c.complete(&a);
    expect(&mut c, &["b"]);
}

#[test]
fn what_comes_later_in_the_queue_that_a_row_moves_to_waits_for_the_move_whatever_row_it_is_of() {
    let mut c = Causality::default();
    c.push(Access { row: 10, moves_to: Some((Shard(2), 20)), ..access(1, &[]) }, "10 becomes 20");
    c.push(Access { row: 21, ..access(2, &[]) }, "another row of queue 2");
    c.push(Access { row: 30, moves_to: Some((Shard(2), 22)), ..access(3, &[]) }, "30 becomes 22");
    c.push(Access { row: 11, ..access(4, &[]) }, "another queue");
    let first = expect(&mut c, &["10 becomes 20"]);
    expect(&mut c, &["another queue"]);
    expect_none(&mut c);
    c.complete(&first);
    let second = expect(&mut c, &["another row of queue 2"]);
    expect_none(&mut c);
    c.complete(&second);
    expect(&mut c, &["30 becomes 22"]);
}

// behaviour: dataplane-4
#[test]
fn a_row_that_moves_to_another_key_orders_both_queues() {
    let mut c = Causality::default();
    c.push(Access { row: 20, ..access(2, &[]) }, "delete 20");
    c.push(Access { row: 10, moves_to: Some((Shard(2), 20)), ..access(1, &[]) }, "10 becomes 20");
    c.push(Access { row: 20, ..access(2, &[]) }, "update 20");
    let delete = expect(&mut c, &["delete 20"]);
    expect_none(&mut c);
    c.complete(&delete);
    let moved = expect(&mut c, &["10 becomes 20"]);
    expect_none(&mut c);
    c.complete(&moved);
    let update = expect(&mut c, &["update 20"]);
    c.complete(&update);
    assert_eq!(c.moves, 0);
}

#[test]
fn a_barrier_stands_alone_between_the_changes_of_its_table() {
    let mut c = Causality::default();
    c.push(access(1, &[]), "before 1");
    c.push(access(2, &[]), "before 2");
    c.push(Access { barrier: true, ..access(1, &[]) }, "truncate");
    c.push(access(1, &[]), "after 1");
    c.push(access(3, &[]), "after 3");
    c.push(Access { table: TableId(2), ..access(4, &[]) }, "other table");
    let one = expect(&mut c, &["before 1"]);
    let two = expect(&mut c, &["before 2"]);
    let other = expect(&mut c, &["other table"]);
    expect_none(&mut c);
    c.complete(&one);
    c.complete(&other);
    expect_none(&mut c);
    c.complete(&two);
    let truncate = expect(&mut c, &["truncate"]);
    expect_none(&mut c);
    c.complete(&truncate);
    expect(&mut c, &["after 3"]);
    expect(&mut c, &["after 1"]);
}

#[test]
fn a_refused_batch_goes_again_one_by_one_in_the_order_of_all_queues() {
    let mut c = Causality::default();
    c.push(access(1, &[]), "first");
    c.push(access(2, &[]), "second");
    c.push(access(2, &[]), "third");
    let first = expect(&mut c, &["first"]);
    let refused = expect(&mut c, &["second", "third"]);
    c.retry_serially(refused);
    c.push(access(2, &[]), "fourth");
    expect_none(&mut c);
    c.complete(&first);
    let second = expect(&mut c, &["second"]);
    assert!(second.serial);
    c.complete(&second);
    let third = expect(&mut c, &["third"]);
    c.complete(&third);
    assert!(!expect(&mut c, &["fourth"]).serial);
}

#[test]
fn a_batch_is_bounded_by_number_and_bytes() {
    let mut c = Causality::default();
    for _ in 0..10 {
        c.push(access(1, &[]), "x");
    }
    let batch = c.take(3, 1000).expect("ready");
    assert_eq!(batch.entries.len(), 3);
    c.complete(&batch);
    let batch = c.take(100, 15).expect("ready");
    assert_eq!(batch.entries.len(), 2, "the limit may be passed by one change");
    c.complete(&batch);
    assert_eq!(c.pending(), 5);
}

#[derive(Clone, Debug)]
enum Step {
    Push { table: i64, row: u8, moves_to: Option<u8>, keys: Vec<u8>, barrier: bool },
    Take { together: bool },
    Finish { which: usize, outcome: Outcome },
}

/// How a transaction ends.
#[derive(Clone, Copy, Debug)]
enum Outcome {
    Commits,
    Serially,
    InOrder(i64),
}

fn step() -> impl Strategy<Value = Step> {
    let row = 0..6u8;
    prop_oneof![
        6 => (1..3i64, row.clone(), prop::option::weighted(0.2, row), prop::collection::vec(0..5u8, 0..3), prop::bool::weighted(0.05))
            .prop_map(|(table, row, moves_to, keys, barrier)| Step::Push { table, row, moves_to, keys, barrier }),
        4 => any::<bool>().prop_map(|together| Step::Take { together }),
        4 => (any::<usize>(), outcome()).prop_map(|(which, outcome)| Step::Finish { which, outcome }),
    ]
}

fn outcome() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        16 => Just(Outcome::Commits),
        3 => Just(Outcome::Serially),
        1 => (1..3i64).prop_map(Outcome::InOrder),
    ]
}

/// Everything that a change touches, as names of things that must be ordered.
#[derive(Clone, Debug, PartialEq)]
struct Touched {
    table: i64,
    names: Vec<(char, u8)>,
    barrier: bool,
}

impl Touched {
    fn conflicts(&self, other: &Self) -> bool {
        self.table == other.table
            && (self.barrier || other.barrier || self.names.iter().any(|name| other.names.contains(name)))
    }
}

fn row_hash(table: i64, row: u8) -> u64 {
    (u64::from(row) * 3 % 16) << 60 | 0x1000 | (table as u64) << 8 | u64::from(row)
}

fn key_hash(table: i64, key: u8) -> u64 {
    0x2000 | (table as u64) << 8 | u64::from(key)
}

/// Ends a transaction. Its batches may be given back in any order; its changes were applied in theirs.
fn finish(
    c: &mut Causality<Touched>,
    mut batches: Vec<Batch<Touched>>,
    outcome: Outcome,
    done: &mut Vec<(u64, Touched)>,
) {
    if let Outcome::InOrder(table) = outcome
        && batches.iter().all(|batch| !batch.serial)
    {
        match c.again_in_order(batches, TableId(table)) {
            Ok(()) => return,
            Err(back) => batches = back,
        }
    }
    let mut applied = Vec::new();
    for batch in batches.into_iter().rev() {
        if let Outcome::Serially = outcome {
            c.retry_serially(batch);
        } else {
            c.complete(&batch);
            applied.extend(batch.entries.into_iter().map(|entry| (entry.seq, entry.payload)));
        }
    }
    applied.sort_by_key(|(seq, _)| *seq);
    done.extend(applied);
}

/// Takes a transaction; `tables` has that of every change so far.
fn take(
    c: &mut Causality<Touched>,
    together: bool,
    tables: &[i64],
    done: &[(u64, Touched)],
) -> Option<Vec<Batch<Touched>>> {
    let taken = if together { c.take_together(4, 1000) } else { c.take(4, 1000).into_iter().collect() };
    assert!(taken.len() < 2 || taken.iter().all(|batch| !batch.serial), "by itself means alone");
    let entries = || taken.iter().flat_map(|batch| &batch.entries);
    assert!(entries().count() <= 4, "no more than the room");
    assert!(entries().count() < 2 || entries().all(|entry| !entry.payload.barrier), "a barrier is alone");
    for entry in entries() {
        let ordered = c.ordered.get(&entry.table).is_some_and(|order| entry.seq <= order.until);
        for earlier in (1..entry.seq).filter(|_| ordered) {
            let other = tables[earlier as usize - 1] != entry.table.0;
            let before =
                || done.iter().any(|(seq, _)| *seq == earlier) || entries().any(|e| e.seq == earlier);
            assert!(other || before(), "{} of a table that keeps its order is before {earlier}", entry.seq);
        }
    }
    Some(taken).filter(|taken| !taken.is_empty())
}

proptest! {
    #[test]
    fn conflicting_changes_complete_in_order_and_nothing_is_left_behind(
        steps in prop::collection::vec(step(), 1..120)
    ) {
        let mut c = Causality::default();
        let mut writing: Vec<Vec<Batch<Touched>>> = Vec::new();
        let mut done = Vec::new();
        let mut tables = Vec::new();
        for step in steps {
            match step {
                Step::Push { table, row, moves_to, keys, barrier } => {
                    let row_key = row_hash(table, row);
                    let moves_to = moves_to.filter(|new| *new != row && !barrier);
                    let mut names = vec![('r', row)];
                    names.extend(moves_to.map(|new| ('r', new)));
                    names.extend(keys.iter().map(|key| ('k', *key)));
                    let access = Access {
                        table: TableId(table),
                        shard: Shard::of(row_key),
                        row: row_key,
                        moves_to: moves_to.map(|new| (Shard::of(row_hash(table, new)), row_hash(table, new))),
                                        keys: keys.iter().map(|key| key_hash(table, *key)).collect(),
                        barrier,
                        bytes: 1,
                        weight: 1,
                    };
                    c.push(access, Touched { table, names, barrier });
                    tables.push(table);
                }
                Step::Take { together } => writing.extend(take(&mut c, together, &tables, &done)),
                Step::Finish { which, outcome } if !writing.is_empty() => {
                    let batches = writing.swap_remove(which % writing.len());
                    finish(&mut c, batches, outcome, &mut done);
                }
                Step::Finish { .. } => {}
            }
        }
        while c.pending() > 0 {
            let together = tables.len() % 2 == 0;
            if let Some(batches) = writing.pop().or_else(|| take(&mut c, together, &tables, &done)) {
                finish(&mut c, batches, Outcome::Commits, &mut done);
            } else {
                prop_assert!(false, "CA-2: pending changes but nothing to take");
            }
        }
        prop_assert_eq!(done.len(), tables.len());
        for (position, (seq, touched)) in done.iter().enumerate() {
            for (later_seq, later) in &done[position + 1..] {
                prop_assert!(seq < later_seq || !touched.conflicts(later), "CA-1: {seq} after {later_seq}");
            }
        }
        prop_assert!(c.latest.is_empty() && c.tables.is_empty());
        prop_assert_eq!((c.moves, c.waiting()), (0, 0));
    }
}
