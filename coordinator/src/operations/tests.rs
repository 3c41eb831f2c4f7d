//! Histories of operations, leaders that come and go included.

use super::*;

const GID: Gid = Gid { low: 1, high: 2 };
const OTHER: Gid = Gid { low: 3, high: 4 };

fn asked(id: &str, key: &str) -> Asked {
    Asked {
        id: id.to_owned(),
        operation: "pause",
        keyspace: "default".to_owned(),
        changefeed: "f".to_owned(),
        gid: Some(GID),
        user: "ann".to_owned(),
        keeps: !key.is_empty(),
        key: (!key.is_empty()).then(|| (key.to_owned(), "body".to_owned())),
        now_ms: 1_000,
    }
}

fn begun(begin: Begin) -> OperationDoc {
    match begin {
        Begin::New { doc, .. } | Begin::Again { doc, .. } => doc,
        other @ (Begin::Before(_)
        | Begin::Applied(_)
        | Begin::Gone(_)
        | Begin::OtherRequest
        | Begin::Full) => {
            panic!("not begun: {other:?}")
        }
    }
}

fn end(status: u16) -> End {
    End { status, answer: "{}".to_owned(), changefeed: "f".to_owned(), now_ms: 2_000, ..End::default() }
}

fn log(version: u64, found: &[OperationDoc]) -> OperationLog {
    // As if they had been stored and read.
    let read = found.iter().map(|doc| serde_json::from_slice(&doc.to_json()).unwrap());
    OperationLog::new(version, read.collect(), Vec::new())
}

#[test]
fn a_key_stands_for_one_operation_until_that_fails_for_a_reason_that_passes() {
    let mut log = log(7, &[]);
    let first = begun(log.begin(asked("a", "k")));
    assert_eq!(log.begin(asked("b", "k")), Begin::Before(first.clone()), "it is under way");
    let done = first.ended(end(200));
    log.settle(done.clone());
    assert_eq!(log.begin(asked("b", "k")), Begin::Before(done));
    let other = Asked { key: Some(("k".to_owned(), "another body".to_owned())), ..asked("b", "k") };
    assert_eq!(log.begin(other), Begin::OtherRequest);

    let second = begun(log.begin(asked("c", "l")));
    log.settle(second.ended(end(503)));
    let again = begun(log.begin(asked("d", "l")));
    assert_eq!((again.id.as_str(), again.attempt), ("c", 2), "it is tried again");
    assert_eq!((again.state, again.status, again.ended_ms), (OperationState::Running, 0, 0));
    log.settle(again.ended(end(400)));
    assert!(matches!(log.begin(asked("d", "l")), Begin::Before(_)), "and then refused for good");
    let without = begun(log.begin(asked("e", "")));
    assert_ne!(begun(log.begin(asked("f", ""))).event, without.event, "without a key each is another one");
}

#[test]
fn what_a_replaced_coordinator_had_not_stored_is_done_again_and_what_it_had_is_answered() {
    let mut old = log(7, &[]);
    let running = begun(old.begin(asked("a", "k")));
    let applied = begun(old.begin(asked("b", "l"))).applied();
    let failed = begun(old.begin(asked("c", "m"))).ended(end(400));
    let mut new = log(9, &[running.clone(), applied.clone(), failed.clone()]);
    assert!(new.last().all(|doc| !new.is_under_way(doc)));

    let again = begun(new.begin(asked("x", "k")));
    assert_eq!(
        (again.id.as_str(), again.event, again.attempt),
        ("a", running.event, 2),
        "the same operation"
    );
    assert_eq!((again.coordinator, again.state), (9, OperationState::Running));
    assert_eq!(new.begin(asked("x", "k")), Begin::Before(again.clone()), "and now it is under way here");
    assert_eq!(new.begin(asked("x", "l")), Begin::Applied(applied));
    assert_eq!(new.begin(asked("x", "m")), Begin::Before(failed));
    // It led before, and leads again: what it had under way then is not under way now.
    let mut back = log(9, &[again]);
    assert!(matches!(back.begin(asked("y", "k")), Begin::Again { .. }));
}

#[test]
fn a_repeated_request_does_not_touch_another_changefeed_of_the_same_name() {
    let mut old = log(7, &[]);
    let meant = begun(old.begin(asked("a", "k")));
    let none = begun(old.begin(Asked { gid: None, ..asked("b", "l") }));
    let mut new = log(9, &[meant.clone(), none.clone()]);
    assert_eq!(new.begin(Asked { gid: Some(OTHER), ..asked("x", "k") }), Begin::Gone(meant.clone()));
    assert_eq!(new.begin(Asked { gid: None, ..asked("x", "k") }), Begin::Gone(meant));
    assert_eq!(new.begin(Asked { gid: Some(OTHER), ..asked("x", "l") }), Begin::Gone(none));
}

#[test]
fn a_creation_that_is_repeated_makes_its_own_incarnation_and_knows_the_one_before() {
    let create = |gid| Asked { operation: "create", gid: Some(gid), ..asked("a", "k") };
    let mut old = log(7, &[]);
    let first = begun(old.begin(create(GID)));
    let mut new = log(9, &[first]);
    match new.begin(create(OTHER)) {
        Begin::Again { doc, .. } => assert_eq!((doc.gid, doc.leftover), (Some(OTHER), vec![GID])),
        other @ (Begin::New { .. }
        | Begin::Before(_)
        | Begin::Applied(_)
        | Begin::Gone(_)
        | Begin::OtherRequest
        | Begin::Full) => panic!("{other:?}"),
    }
}

#[test]
fn what_every_killed_attempt_of_a_creation_may_have_left_is_known_until_it_is_cleared_away() {
    let third = Gid::new(3, 3);
    let create = |gid| Asked { operation: "create", gid: Some(gid), ..asked("a", "k") };
    let first = begun(log(7, &[]).begin(create(GID)));
    // The second is killed before it has cleared away what the first has left.
    let second = begun(log(9, &[first]).begin(create(OTHER)));
    let mut last = log(11, &[second]);
    let doc = begun(last.begin(create(third)));
    assert_eq!((doc.gid, doc.leftover.as_slice()), (Some(third), [GID, OTHER].as_slice()));
    let stored: OperationDoc = serde_json::from_slice(&doc.to_json()).expect("it is read as it was written");
    assert_eq!(stored, doc);
    // It ends for a reason that passes when one of the two was cleared away, and has made nothing of its own.
    last.settle(doc.ended(End { leftover: vec![OTHER], ..end(503) }));
    let again = begun(last.begin(create(GID)));
    assert_eq!(again.leftover, [OTHER]);
    last.settle(again.ended(end(503)));
    assert_eq!(begun(last.begin(create(GID))).leftover, []);
    // One that cannot be stored does not take the knowledge with it.
    let lost = begun(log(9, &[again]).begin(create(third)));
    let mut shaky = log(11, &[lost]);
    let lost = begun(shaky.begin(create(GID)));
    shaky.abandon(&lost);
    assert_eq!(begun(shaky.begin(create(GID))).leftover, [OTHER, GID, third]);
}

#[test]
fn the_last_hundred_stay_answers_stay_for_a_day_and_what_is_under_way_stays() {
    let mut log = log(7, &[]);
    let dropped = std::cell::RefCell::new(Vec::new());
    let do_one = |log: &mut OperationLog, id: String, key: &str, now_ms: i64, ends: bool| match log
        .begin(Asked { now_ms, ..asked(&id, key) })
    {
        Begin::New { doc, drop } => {
            dropped.borrow_mut().extend(drop);
            if ends {
                log.settle(doc.ended(End { now_ms, ..end(200) }));
            }
            doc
        }
        other @ (Begin::Again { .. }
        | Begin::Before(_)
        | Begin::Applied(_)
        | Begin::Gone(_)
        | Begin::OtherRequest
        | Begin::Full) => panic!("{other:?}"),
    };
    let hangs = do_one(&mut log, "hangs".to_owned(), "", 0, false);
    do_one(&mut log, "keyed".to_owned(), "k", 0, true);
    for at in 0..300 {
        do_one(&mut log, format!("plain{at}"), "", 1, true);
    }
    assert!(matches!(log.begin(asked("x", "k")), Begin::Before(_)), "the day is not over");
    assert_eq!(log.last().count(), LAST);
    assert!(log.get("plain299").is_some() && log.get("plain100").is_none());
    do_one(&mut log, "later".to_owned(), "", KEPT_MS, true);
    assert!(log.get("keyed").is_none(), "the day is over");
    do_one(&mut log, "keyed again".to_owned(), "k", KEPT_MS, true);
    assert_eq!(log.get(&hangs.id).map(|doc| doc.event), Some(hangs.event));
    do_one(&mut log, "last".to_owned(), "", KEPT_MS, true);
    for id in ["plain0", "plain100", "keyed"] {
        assert!(dropped.borrow().iter().any(|dropped| dropped == id), "{id} is deleted from the store");
    }
    assert!(!dropped.borrow().contains(&hangs.id));

    for at in 0..2 * MOST_KEPT {
        do_one(&mut log, format!("kept{at}"), &format!("k{at}"), KEPT_MS, true);
    }
    assert!(log.docs.len() <= LAST + MOST_KEPT + 1, "{}", log.docs.len());
}

#[test]
fn a_key_in_the_list_is_free_again_after_a_day() {
    let mut log = log(7, &[]);
    let doc = begun(log.begin(asked("a", "k")));
    log.settle(doc.ended(end(200)));
    let later = Asked { now_ms: 1_000 + KEPT_MS, ..asked("b", "k") };
    assert_eq!(begun(log.begin(later)).id, "b");
    assert!(log.get("a").is_some_and(|doc| doc.answer.is_none()));
}

#[test]
fn only_so_many_are_under_way_and_what_cannot_be_stored_is_not() {
    let mut log = log(7, &[]);
    let mut last = None;
    for at in 0..MOST_RUNNING {
        last = Some(begun(log.begin(asked(&format!("a{at}"), ""))));
    }
    assert_eq!(log.begin(asked("b", "")), Begin::Full);
    let last = last.unwrap();
    log.abandon(&last);
    match log.begin(asked("b", "")) {
        Begin::New { drop, .. } => assert_eq!(drop, [last.id], "it may have reached the store"),
        other @ (Begin::Again { .. }
        | Begin::Before(_)
        | Begin::Applied(_)
        | Begin::Gone(_)
        | Begin::OtherRequest
        | Begin::Full) => panic!("{other:?}"),
    }
}

#[test]
fn documents_of_other_versions_are_read_and_long_answers_are_not_kept() {
    let later = br#"{"id":"a","event":3,"state":"postponed","colour":"blue"}"#;
    let doc: OperationDoc = serde_json::from_slice(later).unwrap();
    assert!(doc.state == OperationState::Unknown && doc.has_ended());
    let twice = log(7, &[doc.clone(), OperationDoc { id: "b".to_owned(), ..doc.clone() }]);
    assert_eq!(twice.last().count(), 2, "neither is lost");
    let long = End { answer: "x".repeat(LONGEST_ANSWER + 1), ..end(200) };
    let kept = OperationDoc { keeps: true, ..doc };
    assert_eq!(kept.ended(long).answer, None);
    assert_eq!(kept.ended(end(200)).answer.as_deref(), Some("{}"));
    let shown = format!("{:?}", OperationDoc { idempotency_key: "s3cr3t".to_owned(), ..kept });
    assert!(!shown.contains("s3cr3t"), "{shown}");
}
