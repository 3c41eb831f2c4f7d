//! A checkpoint that stands still: who is named.

use heartbeatpb::ComponentState::Working;

use super::rig::{Rig, status};

/// What holds the checkpoint, in words, with ids as the rig gives them.
fn held(rig: &Rig) -> String {
    let standstill = rig.core.standstill(rig.now).unwrap();
    format!("{} s: {}: {}", standstill.lasts.as_secs(), standstill.holder.kind(), standstill.holder)
}

#[test]
fn nodes_and_the_upstream_are_named_before_anything_runs() {
    let mut rig = Rig::new();
    rig.nodes(&["n1", "n2"]);
    rig.tick(2000);
    assert_eq!(held(&rig), "2 s: bootstrap: nodes have not answered the maintainer: n1, n2");
    rig.answer("n2", vec![]);
    assert_eq!(held(&rig), "2 s: bootstrap: nodes have not answered the maintainer: n1");
    rig.answer("n1", vec![]);
    assert_eq!(
        held(&rig),
        "2 s: upstream: the log reader has not started: the upstream's tables are not known"
    );
    rig.load(1);
    assert_eq!(held(&rig), "2 s: silent_node: nodes have not reported how far they are: n1");
}

#[test]
fn the_slowest_span_of_the_slowest_node_is_named() {
    let mut rig = Rig::working(3);
    rig.report("n1", &[status(2, Working, 400), status(3, Working, 150), status(4, Working, 400)], 150, 4);
    let id = rig.id(3);
    rig.tick(500);
    assert_eq!(held(&rig), format!("0 s: node: table 2 ({id}) on node n1 has got no further"));
    rig.tick(3000);
    assert!(held(&rig).starts_with("3 s: node: "), "{}", held(&rig));
    rig.report("n1", &[status(3, Working, 300)], 300, 4);
    rig.tick(500);
    assert!(held(&rig).starts_with("0 s: node: "), "it moved: {}", held(&rig));
}

#[test]
fn a_span_that_nobody_runs_and_what_is_done_about_it_are_named() {
    let mut rig = Rig::working(1);
    rig.report("n1", &[], 250, 3);
    rig.add_tables(300, &[9]);
    rig.report("n1", &[], 900, 3);
    assert_eq!(rig.checkpoint(), 300);
    let id = rig.id(3);
    rig.tick(500);
    assert_eq!(
        held(&rig),
        format!("0 s: homeless_span: table 9 ({id}) runs on no node yet; operator add is at work")
    );
    rig.report("n1", &[status(3, Working, 300)], 310, 4);
    rig.tick(500);
    assert!(held(&rig).contains(": node: "), "{}", held(&rig));
}

#[test]
fn a_checkpoint_of_an_upstream_to_which_nothing_happens_does_not_stand_still() {
    let mut rig = Rig::working(1);
    for _ in 1..=100 {
        rig.core.on_lag(Some(1.5));
        rig.tick(1000);
        assert!(rig.core.stalled(rig.now).is_none());
    }
    for second in 1..=30 {
        // Something has happened that nobody has written.
        rig.core.on_lag(Some(f64::from(second) + 5.0));
        rig.tick(1000);
        assert_eq!(rig.core.stalled(rig.now).is_some(), second == 30, "after {second} s");
    }
}

#[test]
fn a_warning_comes_once_in_a_while_and_only_while_the_checkpoint_stands_still() {
    let mut rig = Rig::working(1);
    let mut told = 0;
    for second in 1..=100 {
        rig.tick(1000);
        told += usize::from(rig.core.stalled(rig.now).is_some());
        assert_eq!(told, second / 30, "after {second} s");
    }
    rig.report("n1", &[], 500, 3);
    rig.tick(1000);
    assert!(rig.core.stalled(rig.now).is_none(), "it moved");
    rig.remove(5, false, false);
    rig.tick(60_000);
    assert!(rig.core.stalled(rig.now).is_none(), "it leaves");
    assert_eq!(rig.core.standstill(rig.now).unwrap().holder.kind(), "leaving");
}
