//! Histories of transactions with subtransactions, as a server sends them, against a plain list of what they did.

use std::sync::Arc;

use heartbeatpb::{ChangefeedId, Ts};
use proptest::prelude::*;

use super::*;
use crate::event_store::{Store, StoreConfig, StoreWriter, records};

const TOP: u32 = 700;

fn store() -> (tempfile::TempDir, StoreWriter) {
    let dir = tempfile::tempdir().unwrap();
    let config = StoreConfig { dir: dir.path().join("store"), memory_bytes: 1 << 20, disk_bytes: 1 << 20 };
    let (_, writer) = Store::open(ChangefeedId::fresh("t"), config, Ts(1), Arc::default()).unwrap();
    (dir, writer)
}

fn row(xid: u32, number: u32) -> Vec<u8> {
    [b"I".as_slice(), &xid.to_be_bytes(), &number.to_be_bytes()].concat()
}

fn notice(xid: u32, number: u32) -> Vec<u8> {
    let prefix = message::PREFIX.as_bytes();
    let (flags, lsn) = ([1], [0; 8]);
    [b"M".as_slice(), &xid.to_be_bytes(), &flags, &lsn, prefix, &[0], &number.to_be_bytes()].concat()
}

/// The numbers of what was kept.
fn kept(transaction: Transaction) -> Vec<u32> {
    let mut spool = transaction.spool;
    let mut numbers = Vec::new();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    while let Some(rows) = runtime.block_on(spool.next()).unwrap() {
        let number = |record: &[u8]| u32::from_be_bytes(*record.last_chunk().unwrap());
        numbers.extend(records(&rows).map(number));
    }
    numbers
}

/// A session of the server with one transaction, and what it sends.
struct Session {
    unfinished: Unfinished,
    writer: StoreWriter,
    /// Savepoints that are open, from the outermost on: the id, once there is one, and ids of those released into it.
    open: Vec<(Option<u32>, Vec<u32>)>,
    next_xid: u32,
    next_number: u32,
    /// What was done and not rolled back, with the savepoints in which it was.
    done: Vec<(usize, u32)>,
    _dir: tempfile::TempDir,
}

impl Session {
    fn new() -> Self {
        let (dir, writer) = store();
        Self {
            unfinished: Unfinished::new(usize::MAX),
            writer,
            open: Vec::new(),
            next_xid: TOP + 1,
            next_number: 0,
            done: Vec::new(),
            _dir: dir,
        }
    }

    /// The id under which something is written now: whoever is around has one before.
    fn xid(&mut self) -> u32 {
        for (xid, _) in &mut self.open {
            if xid.is_none() {
                *xid = Some(self.next_xid);
                self.next_xid += 1;
            }
        }
        self.open.last().map_or(TOP, |(xid, _)| xid.unwrap())
    }

    fn write(&mut self, content: impl FnOnce(u32, u32) -> Vec<u8>) {
        let xid = self.xid();
        let number = self.next_number;
        self.next_number += 1;
        let writer = &self.writer;
        self.unfinished.begin(TOP, || writer.spool());
        self.unfinished.hear(&content(xid, number)).unwrap();
        self.unfinished.hear(b"E").unwrap();
        self.done.push((self.open.len(), number));
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Row => self.write(row),
            // A logical message does not tell where it was written.
            Act::Notice => self.write(|_, number| notice(TOP, number)),
            // Into a table that nobody publishes.
            Act::Elsewhere => drop(self.xid()),
            Act::Savepoint => self.open.push((None, Vec::new())),
            Act::Release => {
                let Some((xid, released)) = self.open.pop() else { return };
                let around = self.open.len();
                for (depth, _) in self.done.iter_mut().filter(|(depth, _)| *depth > around) {
                    *depth = around;
                }
                if let Some((_, inside)) = self.open.last_mut() {
                    inside.extend(released.into_iter().chain(xid));
                }
            }
            Act::RollBack => {
                let Some((xid, released)) = self.open.pop() else { return };
                let around = self.open.len();
                self.done.retain(|(depth, _)| *depth <= around);
                for subxid in released.into_iter().chain(xid) {
                    self.unfinished.roll_back(TOP, subxid);
                }
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Act {
    Row,
    Notice,
    Elsewhere,
    Savepoint,
    Release,
    RollBack,
}

fn acts(notices: u32) -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        8 => Just(Act::Row),
        notices => Just(Act::Notice),
        1 => Just(Act::Elsewhere),
        4 => Just(Act::Savepoint),
        2 => Just(Act::Release),
        2 => Just(Act::RollBack),
    ];
    prop::collection::vec(act, 0..60)
}

fn run(acts: &[Act]) -> (Vec<u32>, Option<Transaction>, Unfinished) {
    let mut session = Session::new();
    acts.iter().for_each(|act| session.act(*act));
    let transaction = session.unfinished.take(TOP);
    (session.done.into_iter().map(|(_, number)| number).collect(), transaction, session.unfinished)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn rows_that_were_rolled_back_are_gone_and_all_others_are_there(acts in acts(0)) {
        let (expected, transaction, left) = run(&acts);
        prop_assert!(transaction.as_ref().is_none_or(|transaction| !transaction.is_uncertain()));
        prop_assert_eq!(transaction.map(kept).unwrap_or_default(), expected);
        prop_assert_eq!((left.parts, left.memory), (0, 0));
    }

    #[test]
    fn notices_that_may_have_been_rolled_back_are_not_handled(acts in acts(2)) {
        let (expected, transaction, _) = run(&acts);
        let certain = transaction.filter(|transaction| !transaction.is_uncertain());
        if let Some(transaction) = certain {
            prop_assert_eq!(kept(transaction), expected);
        }
    }
}

#[test]
fn transactions_are_kept_apart_and_an_abort_forgets_one() {
    let (_dir, writer) = store();
    let mut unfinished = Unfinished::new(usize::MAX);
    for (top, numbers) in [(1, [1, 2]), (2, [3, 4]), (1, [5, 6])] {
        unfinished.begin(top, || writer.spool());
        assert!(unfinished.in_block());
        for number in numbers {
            assert_eq!(unfinished.hear(&row(top + 10 * number, number)).unwrap(), Heard::More);
        }
        unfinished.hear(b"E").unwrap();
        assert!(!unfinished.in_block());
    }
    unfinished.roll_back(2, 2);
    unfinished.roll_back(9, 9);
    assert!(unfinished.take(2).is_none());
    assert_eq!(kept(unfinished.take(1).unwrap()), [1, 2, 5, 6]);
    assert!(unfinished.is_empty());
    assert_eq!((unfinished.parts, unfinished.memory), (0, 0));
    assert!(unfinished.hear(&row(1, 1)).is_err(), "no block is open");
}

#[test]
fn what_fills_the_memory_is_told_until_the_largest_is_written_out() {
    let (_dir, writer) = store();
    let mut unfinished = Unfinished::new(100);
    let mut fill = |top: u32, rows: u32| {
        unfinished.begin(top, || writer.spool());
        (0..rows).map(|number| unfinished.hear(&row(top, number)).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(fill(1, 3), [Heard::More; 3]);
    let heard = fill(2, 9);
    assert_eq!((heard[7], heard[8]), (Heard::More, Heard::Full));
    let largest = unfinished.largest().unwrap();
    assert_eq!(largest.end(), 9 * 9);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    assert!(runtime.block_on(largest.write_out()).unwrap());
    assert_eq!(unfinished.hear(&row(2, 9)).unwrap(), Heard::More);
    assert_eq!(kept(unfinished.take(2).unwrap()), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    assert_eq!(unfinished.memory, 3 * 9);
}

#[test]
fn more_subtransactions_than_can_be_known_are_told() {
    let (_dir, writer) = store();
    let mut unfinished = Unfinished::new(usize::MAX);
    unfinished.begin(1, || writer.spool());
    let most = u32::try_from(MOST_PARTS).unwrap();
    for subxid in 2..2 + most {
        assert_eq!(unfinished.hear(&row(subxid, subxid)).unwrap(), Heard::More);
    }
    assert_eq!(unfinished.hear(&row(2, 0)).unwrap(), Heard::More, "it is known");
    assert_eq!(unfinished.hear(&row(2 + most, 0)).unwrap(), Heard::TooMany);
    unfinished.roll_back(1, 2 + most);
    assert_eq!(unfinished.hear(&row(1, 0)).unwrap(), Heard::More);
}
