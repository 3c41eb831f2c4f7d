//! Events that a maintainer finds when it starts.

use expect_test::expect;

use super::*;

impl Bench {
    fn restore(&mut self, reported: &[(u64, BlockState)]) {
        let reported: Vec<_> =
            reported.iter().map(|(id, state)| (DispatcherId::new(0, *id), state.clone())).collect();
        self.barrier.restore(&reported, &mut self.placement, self.now);
    }
}

fn at(stage: BlockStage) -> BlockState {
    BlockState { stage, ..waiting(110, normal(&[1, 2])) }
}

// behaviour: maintainer-79, maintainer-93
#[test]
fn an_event_that_all_wait_for_is_written_without_another_report() {
    let mut b = Bench::new(&[(1, 1, "n1"), (2, 1, "n2")]);
    b.restore(&[(101, at(BlockStage::Waiting)), (102, at(BlockStage::Waiting))]);
    expect!["n2: write 110 to 102"].assert_eq(&b.after(100));
    b.report("n2", &[(102, done(110))]);
    expect!["n1: pass 110 to 101; n2: pass 110 to 102"].assert_eq(&b.after(100));
}

// behaviour: maintainer-79, maintainer-92
#[test]
fn an_event_that_is_being_written_ends_only_when_it_is_written() {
    let mut b = Bench::new(&[(1, 1, "n1"), (2, 1, "n2")]);
    b.restore(&[(101, at(BlockStage::Waiting)), (102, at(BlockStage::Writing))]);
    for _ in 0..3 {
        b.after(1100);
        assert_eq!(b.barrier.len(), 1);
    }
    // Only who is writing: a second one would execute it too.
    expect!["n2: write 110 to 102"].assert_eq(&b.after(1100));
    b.report("n2", &[(102, done(110))]);
    expect!["n1: pass 110 to 101; n2: pass 110 to 102"].assert_eq(&b.after(100));
    b.report("n1", &[(101, done(110))]);
    assert_eq!(b.barrier.len(), 0);
}

// behaviour: maintainer-92
#[test]
fn a_restored_event_that_changes_tables_ends() {
    let mut b = Bench::new(&[(1, 1, "n1")]);
    let mut dropping = waiting(110, normal(&[1, 0]));
    dropping.dropped = Some(normal(&[1]));
    let writing = BlockState { stage: BlockStage::Writing, ..dropping.clone() };
    b.restore(&[(101, dropping), (TRIGGER, writing)]);
    expect!["n1: write 110 to 1"].assert_eq(&b.after(100));
    b.report("n1", &[(TRIGGER, done(110))]);
    assert!(!b.placement.spans.has_table(TableId(1)));
    expect!["-"].assert_eq(&b.after(100));
    b.report("n1", &[(TRIGGER, done(110))]);
    assert_eq!(b.barrier.len(), 0);
}

// behaviour: maintainer-79
#[test]
fn spans_that_wait_for_nothing_make_no_event() {
    let mut b = Bench::new(&[(1, 1, "n1")]);
    b.restore(&[(TRIGGER, executed(110, &[11]))]);
    assert_eq!(b.barrier.len(), 0);
}
