//! One changefeed and the reports about it.

use std::time::Instant;

use heartbeatpb::config::{ChangefeedState, ChangefeedStatusDoc, ReplicaConfig, UpstreamInfo};
use heartbeatpb::{ChangefeedId, ComponentState, MaintainerEpoch};

use super::*;

fn stored(sink: &str, checkpoint: u64) -> Stored {
    let id = ChangefeedId::fresh("a");
    let mut info = ChangefeedInfo::new(id, UpstreamInfo::default(), sink, ReplicaConfig::default(), Ts(1));
    info.epoch = MaintainerEpoch::from_wire(5);
    let epoch = info.epoch;
    Stored { info, status: ChangefeedStatusDoc::at(Ts(checkpoint), epoch) }
}

fn status(changefeed: &Changefeed, checkpoint: u64, bootstrap_done: bool, code: &str) -> MaintainerStatus {
    let error = |code: &str| RunningError {
        time: String::new(),
        node: "n".to_owned(),
        code: code.to_owned(),
        message: String::new(),
    };
    MaintainerStatus {
        changefeed: changefeed.id().clone(),
        feed_state: "normal".to_owned(),
        state: ComponentState::Working,
        checkpoint: Ts(checkpoint),
        errors: if code.is_empty() { Vec::new() } else { vec![error(code)] },
        bootstrap_done,
        last_synced: Ts(checkpoint),
        drain: None,
        epoch: changefeed.info.epoch,
        checkpoint_time: None,
        trouble: None,
    }
}

fn state(change: &StateChange) -> Option<ChangefeedState> {
    match change {
        StateChange::CheckpointOnly => None,
        StateChange::To { state, .. } => Some(*state),
    }
}

#[test]
// behaviour: coordinator-CF-1
fn a_changefeed_shows_what_was_stored_and_one_with_a_bad_sink_fails_with_the_reason() {
    let stored_doc = stored("kafka://h:9092/t", 7);
    let changefeed = Changefeed::load(stored_doc.clone());
    assert_eq!(changefeed.id(), &stored_doc.info.id);
    assert_eq!((changefeed.reported.checkpoint, changefeed.last_saved), (Ts(7), Ts(7)));
    assert_eq!((changefeed.sink, changefeed.group()), (Some(SinkKind::Kafka), Group::Absent));

    let broken = Changefeed::load(stored("nowhere s3cr", 7));
    assert_eq!((broken.info.state, broken.group()), (ChangefeedState::Failed, Group::Stopped));
    assert!(!broken.is_runnable(Instant::now()));
    let error = broken.info.error.as_ref().unwrap();
    assert_eq!(error.code, "CDC:ErrSinkURIInvalid");
    assert!(!error.message.contains("s3cr"));
}

#[test]
// behaviour: coordinator-CF-3
// behaviour: coordinator-CF-4
// behaviour: coordinator-CF-5
// behaviour: coordinator-CF-6
fn reports_are_judged_error_first() {
    let now = Instant::now();
    let fresh = || {
        let mut changefeed = Changefeed::load(stored("blackhole://", 100));
        changefeed.adopt("n".into());
        changefeed
    };
    let mut c = fresh();
    assert_eq!(state(&c.on_status(&status(&c, 110, false, ""), now)), None);
    assert_eq!(c.reported.checkpoint, Ts(110));
    assert_eq!(state(&c.on_status(&status(&c, 90, true, ""), now)), None);
    assert!(!c.reported.bootstrap_done, "a report from the past changes nothing");
    assert_eq!(state(&c.on_status(&status(&c, 90, false, "CDC:ErrX"), now)), Some(ChangefeedState::Warning));
    assert_eq!(c.reported.checkpoint, Ts(110));

    let mut c = fresh();
    let fatal = status(&c, 100, true, "CDC:ErrDispatcherFailed");
    assert_eq!(state(&c.on_status(&fatal, now)), Some(ChangefeedState::Failed));
    let mut c = fresh();
    assert_eq!(state(&c.on_status(&status(&c, 100, true, "CDC:ErrX"), now)), Some(ChangefeedState::Warning));
    let mut c = fresh();
    assert_eq!(state(&c.on_status(&status(&c, 100, true, ""), now)), Some(ChangefeedState::Normal));
}

#[test]
fn a_changefeed_finishes_at_its_target() {
    let mut doc = stored("blackhole://", 100);
    doc.info.target_ts = Ts(200);
    let mut c = Changefeed::load(doc);
    assert_eq!(state(&c.on_status(&status(&c, 199, false, ""), Instant::now())), None);
    let change = c.on_status(&status(&c, 200, false, ""), Instant::now());
    assert_eq!(state(&change), Some(ChangefeedState::Finished));
}

#[test]
// behaviour: coordinator-CF-9
// behaviour: coordinator-CF-10
fn commands_carry_everything_and_a_resume_forgets_the_errors() {
    let now = Instant::now();
    let mut c = Changefeed::load(stored("blackhole://", 100));
    c.is_new = true;
    let add = c.add_request();
    assert_eq!((add.checkpoint, add.is_new, add.epoch), (Ts(100), true, MaintainerEpoch::from_wire(5)));
    let (info, _) = ChangefeedInfo::from_json(&add.config.0, "", "").unwrap();
    assert_eq!(info, *c.info);
    assert!(remove_request(c.id(), false, true, 3, None).cascade, "a removal cascades");
    assert!(!remove_request(c.id(), false, false, 3, None).cascade);

    c.adopt("n".into());
    let report = status(&c, 120, true, "CDC:ErrX");
    c.on_status(&report, now);
    assert!(!c.restart_at(Ts(50), true), "a changefeed that runs is not restarted");
    assert_eq!(c.stop(), Some("n".into()));
    assert!(c.restart_at(Ts(50), true));
    assert!(c.reported.errors.is_empty() && !c.reported.bootstrap_done && c.is_new);
    assert_eq!((c.reported.checkpoint, c.last_saved, c.group()), (Ts(50), Ts(50), Group::Absent));
}

#[test]
// behaviour: coordinator-DB-2
// behaviour: coordinator-DB-3
// behaviour: coordinator-DB-4
// behaviour: coordinator-DB-8
fn a_changefeed_moves_between_its_groups() {
    let now = Instant::now();
    let mut c = Changefeed::load(stored("blackhole://", 500));
    c.bind("n".into());
    assert_eq!((c.group(), c.node()), (Group::Scheduling, Some(&"n".into())));
    c.mark_replicating();
    assert_eq!(c.group(), Group::Replicating);
    let fatal = status(&c, 500, true, "CDC:ErrDispatcherFailed");
    c.on_status(&fatal, now);
    assert_eq!(c.stop(), Some("n".into()));
    assert_eq!((c.group(), c.node()), (Group::Stopped, None));
    assert!(!c.backoff.should_run(now));

    assert!(c.restart_at(Ts(300), true));
    assert!(c.is_runnable(now), "nothing is held against it");
    let retrying = status(&c, 300, false, "CDC:ErrX");
    assert_eq!(state(&c.on_status(&retrying, now)), Some(ChangefeedState::Warning));
    let progress = status(&c, 301, false, "");
    assert_eq!(
        state(&c.on_status(&progress, now)),
        Some(ChangefeedState::Normal),
        "progress from the new place counts"
    );
    c.mark_absent();
    assert_eq!((c.group(), c.node()), (Group::Absent, None));
}

#[test]
// behaviour: coordinator-ST-12
fn epochs_match_when_equal_and_unknown_ones_only_when_tolerated() {
    let epoch = MaintainerEpoch::from_wire;
    assert!(epoch_matches(epoch(5), epoch(5), false));
    assert!(!epoch_matches(epoch(4), epoch(5), true));
    for (reported, current) in [(0, 5), (5, 0)] {
        assert!(epoch_matches(epoch(reported), epoch(current), true));
        assert!(!epoch_matches(epoch(reported), epoch(current), false));
    }
}
