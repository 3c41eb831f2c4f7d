//! Nodes that begin anew: they were fenced and are back, or have what an earlier maintainer left there.

use expect_test::expect;
use heartbeatpb::ComponentState::Working;
use heartbeatpb::{HeartBeatRequest, TableId};

use super::super::*;
use super::rig::{ME, Rig, WHOLE, error, span, status};
use crate::fence::FenceOutcome;

impl Rig {
    /// All but some were refused, and these of them can write.
    fn swept(&mut self, attempt: u64, writers: &[&str]) {
        let writers = writers.iter().map(|node| NodeId::from(*node)).collect();
        let outcome = FenceOutcome { writers: Some(writers), ..FenceOutcome::default() };
        self.core.on_fenced(attempt, Ok(outcome), self.now, &mut self.out);
        self.core.settle();
    }

    /// A node that was let in again answers, and with it comes what its dispatchers had said before they were closed.
    fn answers_by(&mut self, node: &str, number: u64, stale: u64, seq: u64) {
        let response = MaintainerBootstrapResponse {
            changefeed: self.core.id.clone(),
            spans: vec![],
            error: None,
            // Where the table trigger is.
            checkpoint: if node == ME { Ts(self.trigger_start) } else { Ts::ZERO },
            redo_checkpoint: Ts::ZERO,
            operators: vec![],
            merges: vec![],
            epoch: MaintainerEpoch::from_wire(number),
        };
        self.core.on_bootstrap(&node.into(), response, self.now, &mut self.out);
        self.report(node, &[status(80, Working, stale)], stale, seq);
    }

    /// The same, when `n2` is gone, cannot write any more, and `n1` has all tables.
    fn without_n2() -> Self {
        let mut rig = Self::two_nodes();
        rig.nodes(&["n1"]);
        rig.fenced(2, &[]);
        rig.report("n1", &[status(80, Working, 200)], 200, 4);
        rig.out.clear();
        rig
    }

    /// A maintainer that was asked to begin, with tables that earlier ones have left to `n2` and `n3`; all have answered but
    /// `n1`, its own node.
    fn successor() -> Self {
        let mut rig = Self::fencing();
        rig.nodes(&["n1", "n2", "n3"]);
        rig.load(2);
        rig.answer("n2", vec![span(80, 1, WHOLE, Working)]);
        rig.answer("n3", vec![span(90, 2, WHOLE, Working)]);
        rig.out.clear();
        rig
    }

    /// The sink of a node says that it may not write.
    fn sink_is_fenced(&mut self, node: &str) {
        let request = HeartBeatRequest {
            changefeed: self.core.id.clone(),
            watermark: None,
            redo_watermark: None,
            statuses: vec![],
            complete: false,
            error: Some(error(codes::SINK_FENCED)),
            trouble: None,
        };
        self.core.on_heartbeat(&node.into(), request, self.now, &mut self.out);
        self.core.settle();
    }

    fn told_codes(&self) -> Vec<String> {
        self.core.status().errors.into_iter().map(|error| error.code).collect()
    }
}

/// Nothing that it says counts before it has closed what it had and was asked anew.
#[test]
fn a_node_that_comes_back_is_let_in_under_a_new_number_and_gets_work_again() {
    for fenced_first in [true, false] {
        let mut rig = if fenced_first { Rig::without_n2() } else { Rig::two_nodes() };
        if fenced_first {
            rig.nodes(&["n1", "n2"]);
            rig.says(&expect!["close n2 by 6"]);
        } else {
            rig.nodes(&["n1"]);
            rig.nodes(&["n1", "n2"]);
            rig.says(&expect!["fence 2: n2"]);
            rig.fenced(2, &[]);
            rig.says(&expect!["close n2 by 6, +add, create d80 t2@200 on n1"]);
            rig.report("n1", &[status(80, Working, 200)], 200, 4);
            rig.tick(0);
            rig.out.clear();
        }
        // What it had says this and that.
        rig.answer("n2", vec![span(80, 2, WHOLE, Working)]);
        rig.report("n2", &[status(80, Working, 900)], 900, 40);
        rig.closed("n2", true, 5);
        rig.closed("n2", false, 6);
        rig.says(&expect!["stale bootstrap_response, stale close_response"]);
        // It is at it.
        rig.tick(100);
        rig.says(&expect!["close n2 by 6"]);
        rig.tick(900);
        rig.says(&expect!["-"]);
        rig.tick(100);
        rig.says(&expect!["close n2 by 6"]);
        rig.closed("n2", true, 6);
        rig.says(&expect!["bootstrap n2 by 7"]);
        rig.closed("n2", true, 6);
        rig.answer("n2", vec![]);
        rig.says(&expect!["stale close_response, stale bootstrap_response"]);
        // Its first words may have waited behind the last ones of what it had.
        rig.answers_by("n2", 7, 900, 40);
        rig.add_tables(300, &[9]);
        rig.tick(0);
        let said: Vec<String> = rig.out.drain(..).map(|effect| super::rig::text(&effect)).collect();
        assert!(
            said.iter().any(|word| word.starts_with("create d") && word.ends_with("on n2 by 7")),
            "{said:?}"
        );
        let created = rig.core.placement().spans.by_table(TableId(9)).next().unwrap().id.low;
        rig.report("n2", &[status(created, Working, 300)], 300, 1);
        rig.report("n1", &[status(70, Working, 900), status(80, Working, 900)], 900, 5);
        assert_eq!(rig.checkpoint(), 300, "the new dispatcher holds it");
        assert!(rig.core.status().errors.is_empty(), "{:?}", rig.core.status().errors);

        // It goes once more.
        rig.out.clear();
        rig.nodes(&["n1"]);
        rig.says(&expect!["fence 3 by 7: n2"]);
        rig.fenced(3, &[]);
        rig.out.clear();
        rig.nodes(&["n1", "n2"]);
        rig.says(&expect!["close n2 by 8"]);
        rig.closed("n2", true, 8);
        rig.says(&expect!["bootstrap n2 by 9"]);
    }
}

#[test]
fn a_node_that_goes_before_it_has_closed_what_it_had_begins_again_when_it_is_back() {
    let mut rig = Rig::without_n2();
    rig.nodes(&["n1", "n2"]);
    rig.nodes(&["n1"]);
    rig.out.clear();
    rig.closed("n2", true, 6);
    rig.tick(5_000);
    rig.says(&expect!["stale close_response"]);
    rig.nodes(&["n1", "n2"]);
    rig.says(&expect!["close n2 by 7"]);
    rig.closed("n2", true, 6);
    rig.says(&expect!["stale close_response"]);
    rig.closed("n2", true, 7);
    rig.says(&expect!["bootstrap n2 by 8"]);
}

#[test]
fn a_node_that_goes_and_comes_back_before_the_take_over_closes_what_it_had() {
    let mut rig = Rig::fencing();
    rig.nodes(&["n1", "n2"]);
    rig.answer("n1", vec![]);
    rig.answer("n2", vec![span(80, 1, WHOLE, Working)]);
    rig.fenced(1, &[]);
    rig.nodes(&["n1"]);
    rig.out.clear();
    rig.nodes(&["n1", "n2"]);
    rig.says(&expect!["close n2 by 6"]);
    rig.closed("n2", true, 6);
    rig.says(&expect!["-"]);
    rig.fenced(2, &[]);
    rig.says(&expect!["bootstrap n2 by 7"]);
    rig.load(1);
    rig.says(&expect!["-"]);
    rig.answers_by("n2", 7, 100, 1);
    rig.says(&expect!["initialized, post n1: 1=public[1=t1], +add, create d2 t1@100 on n1"]);
}

/// Another maintainer had given them up, and they have not noticed.
#[test]
fn members_whose_sinks_were_fenced_before_begin_anew_and_nobody_waits_for_them() {
    let mut rig = Rig::successor();
    rig.answer("n1", vec![]);
    rig.out.clear();
    rig.swept(1, &["n1", "n3"]);
    rig.says(&expect!["fence 2: all but n1 n3, close n2 by 6"]);
    rig.swept(2, &["n1", "n3"]);
    rig.says(&expect!["initialized, post n1: 1=public[1=t1 2=t2], +add, create d2 t1@100 on n1"]);
    rig.closed("n2", true, 6);
    rig.says(&expect!["bootstrap n2 by 7"]);
}

#[test]
fn a_maintainer_whose_own_node_was_fenced_before_takes_over_when_it_has_begun_anew() {
    let mut rig = Rig::fencing();
    rig.nodes(&["n1", "n2"]);
    rig.load(1);
    rig.answer("n1", vec![]);
    rig.answer("n2", vec![span(80, 1, WHOLE, Working)]);
    rig.out.clear();
    rig.swept(1, &["n2"]);
    rig.says(&expect!["close n1 by 6"]);
    rig.tick(1_000);
    rig.says(&expect!["load, close n1 by 6"]);
    rig.closed("n1", true, 6);
    rig.says(&expect!["bootstrap n1 by 7 with trigger"]);
    rig.answers_by("n1", 7, 100, 1);
    rig.says(&expect!["initialized, post n1 by 7: 1=public[1=t1]"]);
}

#[test]
fn what_is_removed_is_closed_by_the_number_of_each_node() {
    let mut rig = Rig::without_n2();
    rig.nodes(&["n1", "n2"]);
    rig.closed("n2", true, 6);
    rig.answers_by("n2", 7, 200, 1);
    rig.out.clear();
    rig.remove(5, true, false);
    rig.says(&expect!["close n1, close n2 by 7"]);
    rig.closed("n1", true, 5);
    rig.closed("n2", true, 5);
    rig.says(&expect!["stale close_response"]);
    rig.closed("n2", true, 7);
    rig.says(&expect!["leave"]);
}

#[test]
fn a_maintainer_that_has_used_up_its_numbers_lets_nobody_in_again() {
    let mut rig = Rig::two_nodes();
    let mut times = 0;
    loop {
        rig.nodes(&["n1"]);
        let asked = rig.out.iter().find_map(|effect| {
            let Effect::Fence { attempt, .. } = effect else { return None };
            Some(*attempt)
        });
        rig.fenced(asked.unwrap(), &[]);
        rig.out.clear();
        rig.nodes(&["n1", "n2"]);
        rig.tick(5_000);
        let closes = rig.out.iter().find_map(|effect| {
            let Effect::Orchestrate(_, ToOrchestrator::Close(request)) = effect else { return None };
            request.epoch
        });
        let Some(number) = closes else { break };
        rig.closed("n2", true, number.get());
        rig.out.clear();
        times += 1;
    }
    assert_eq!(times, MaintainerEpoch::ROOM / 2 - 1, "two numbers for each time");
    assert!(rig.core.fencing.newest() <= MaintainerEpoch::from_wire(5).map(MaintainerEpoch::last));
    assert!(rig.out.iter().all(|effect| !super::rig::text(effect).contains("n2")), "{:?}", rig.out);
}

/// The maintainer before was on `n2`, lives, and is not reached by whoever leads: its table trigger is still there.
#[test]
fn a_node_with_the_table_trigger_of_an_earlier_maintainer_begins_anew_and_nobody_waits_for_it() {
    let mut rig = Rig::fencing();
    rig.nodes(&["n1", "n2", "n3"]);
    rig.load(2);
    rig.answer("n1", vec![]);
    rig.answer("n3", vec![span(90, 2, WHOLE, Working)]);
    rig.out.clear();
    for _ in 0..2 {
        rig.refuses("n2", 5, codes::CHANGEFEED_INIT_TABLE_TRIGGER_DISPATCHER_FAILED);
    }
    rig.says(&expect!["fence 1: all but n1 n3, close n2 by 6, stale bootstrap_response"]);
    rig.swept(1, &["n1", "n3"]);
    rig.says(&expect!["initialized, post n1: 1=public[1=t1 2=t2], +add, create d2 t1@100 on n1"]);
    rig.closed("n2", true, 6);
    rig.says(&expect!["bootstrap n2 by 7"]);
    assert_eq!(rig.told_codes(), [""; 0], "nothing has to be started again");
    // That it does not help is told.
    rig.refuses("n2", 7, codes::CHANGEFEED_INIT_TABLE_TRIGGER_DISPATCHER_FAILED);
    assert_eq!(rig.told_codes(), [codes::CHANGEFEED_INIT_TABLE_TRIGGER_DISPATCHER_FAILED]);
}

/// The maintainer before had given up `n1`, where this one is now: its table trigger cannot be opened.
#[test]
fn a_maintainer_whose_own_nodes_sink_was_fenced_closes_it_and_takes_over_with_another() {
    let mut rig = Rig::successor();
    rig.refuses("n1", 5, codes::SINK_FENCED);
    rig.says(&expect!["close n1 by 6"]);
    assert_eq!(rig.core.waits_for().unwrap(), "n1 to close what an earlier maintainer left there");
    assert_eq!(rig.held_by(), "bootstrap: nodes have not answered the maintainer: n1");
    rig.closed("n1", false, 6);
    rig.tick(100);
    rig.says(&expect!["load, close n1 by 6"]);
    rig.closed("n1", true, 6);
    rig.says(&expect!["bootstrap n1 by 7 with trigger"]);
    rig.answers_by("n1", 7, 100, 1);
    rig.says(&expect!["fence 1 by 7: all but n1 n2 n3"]);
    rig.swept(1, &["n1", "n2", "n3"]);
    rig.says(&expect!["initialized, post n1 by 7: 1=public[1=t1 2=t2]"]);
    assert_eq!(rig.told_codes(), [""; 0]);
}

/// Files: nothing refuses what the earlier manager writes.
#[test]
fn where_nobody_can_be_fenced_the_take_over_waits_until_what_is_left_of_an_earlier_maintainer_is_closed() {
    for dies in [false, true] {
        let mut rig = Rig::at(100, 0, |_| {});
        rig.nodes(&["n1", "n2"]);
        rig.load(1);
        rig.answer("n1", vec![]);
        rig.out.clear();
        rig.refuses("n2", 5, codes::CHANGEFEED_INIT_TABLE_TRIGGER_DISPATCHER_FAILED);
        rig.says(&expect!["close n2 by 6"]);
        assert_eq!(rig.core.waits_for().unwrap(), "n2 to close what an earlier maintainer left there");
        if dies {
            rig.nodes(&["n1"]);
        } else {
            rig.closed("n2", true, 6);
            rig.says(&expect!["bootstrap n2 by 7"]);
            rig.answers_by("n2", 7, 100, 1);
        }
        let said: Vec<String> = rig.out.drain(..).map(|effect| super::rig::text(&effect)).collect();
        assert_eq!(said.first().unwrap(), "initialized", "{said:?}");
    }
}

/// It was given up by an earlier maintainer, and is reached again after this one has taken over.
#[test]
fn a_node_that_comes_after_the_take_over_with_what_it_had_before_begins_anew() {
    let mut rig = Rig::two_nodes();
    rig.nodes(&["n1", "n2", "n3"]);
    rig.says(&expect!["bootstrap n3"]);
    rig.answer("n3", vec![span(90, 2, WHOLE, Working)]);
    rig.says(&expect!["close n3 by 6"]);
    // Its streams find nothing at this maintainer's log, and its sink writes nothing.
    rig.sink_is_fenced("n3");
    rig.report("n3", &[status(90, Working, 120)], 120, 9);
    assert_eq!(rig.told_codes(), [""; 0]);
    rig.closed("n3", true, 6);
    rig.says(&expect!["bootstrap n3 by 7"]);
    rig.answers_by("n3", 7, 120, 9);
    rig.report("n1", &[status(70, Working, 300)], 300, 3);
    rig.report("n2", &[status(80, Working, 300)], 300, 3);
    assert_eq!(rig.checkpoint(), 300, "what it had holds nothing");
}

#[test]
fn a_new_node_is_asked_once_and_by_the_epoch_itself() {
    let mut rig = Rig::two_nodes();
    rig.nodes(&["n1", "n2", "n3"]);
    rig.answer("n3", vec![]);
    rig.answer("n3", vec![]);
    rig.says(&expect!["bootstrap n3"]);
}

// (c)
#[test]
fn a_member_whose_sink_was_refused_is_refused_for_good_and_begins_anew() {
    let mut rig = Rig::two_nodes();
    for _ in 0..2 {
        rig.sink_is_fenced("n2");
    }
    rig.says(&expect!["fence 2: n2"]);
    rig.desired(&expect![[r#"
        t1 - Replicating on n1 @200
        t2 - Replicating on n2 @200"#]]);
    rig.fenced(2, &[]);
    rig.says(&expect!["close n2 by 6, +add, create d80 t2@200 on n1"]);
    rig.closed("n2", true, 6);
    rig.says(&expect!["bootstrap n2 by 7"]);
    assert_eq!(rig.told_codes(), [""; 0], "nothing has to be started again");
}

#[test]
fn an_own_sink_that_was_refused_makes_the_changefeed_start_again() {
    let mut rig = Rig::two_nodes();
    rig.sink_is_fenced("n1");
    assert_eq!(rig.told_codes(), [codes::SINK_FENCED]);
    assert!(!codes::needs_person(codes::SINK_FENCED), "it is started again without a person");
}
