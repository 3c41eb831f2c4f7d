//! Queues and their streams.

use std::collections::VecDeque;

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const ROOM: usize = 8;

fn link() -> Link {
    Link::with_room("b".into(), StreamClass::Command, ROOM, 1000)
}

fn envelope(topic: &str, number: u8, sequence: u64) -> Envelope {
    Envelope {
        r#type: 17,
        from: "a".to_owned(),
        to: "b".to_owned(),
        topic: topic.to_owned(),
        payload: vec![Bytes::from(vec![number])],
        sequence,
    }
}

fn push(link: &Link, envelope: Envelope) -> Result<(), SendErrorKind> {
    let bytes = wire_bytes(&envelope);
    link.push(envelope, bytes).map_err(|error| error.kind)
}

/// What a stream gets now: numbers of the messages of a frame; `None` when nothing waits or it has to end.
fn take(link: &Link, session: &Session) -> Result<Option<Vec<u8>>, ()> {
    let mut cx = Context::from_waker(Waker::noop());
    match link.poll_take(session, &mut cx) {
        Poll::Pending => Ok(None),
        Poll::Ready(None) => Err(()),
        Poll::Ready(Some(envelope)) => Ok(Some(envelope.payload.iter().map(|payload| payload[0]).collect())),
    }
}

fn up(link: &Link) -> Session {
    let (session, _) = link.attach().expect("open");
    link.ready(&session).expect("the newest");
    session
}

#[test]
fn a_queue_takes_nothing_before_its_first_stream_is_ready() {
    let link = link();
    assert_eq!(push(&link, envelope("t", 1, 1)), Err(SendErrorKind::ConnectionNotFound));
    let (session, was_up) = link.attach().expect("open");
    assert!(!was_up);
    assert_eq!(push(&link, envelope("t", 1, 1)), Err(SendErrorKind::ConnectionNotFound));
    assert_eq!(link.ready(&session), Some(1));
    assert_eq!(link.ready(&session), None, "once");
    assert_eq!(push(&link, envelope("t", 1, 1)), Ok(()));
}

#[test]
fn a_stream_that_was_replaced_takes_nothing_and_does_not_disturb() {
    let link = link();
    let old = up(&link);
    push(&link, envelope("t", 1, 1)).expect("room");
    let (new, was_up) = link.attach().expect("open");
    assert!(was_up && old.ended.is_cancelled() && !new.ended.is_cancelled());
    assert_eq!(take(&link, &old), Err(()));
    assert_eq!(link.ready(&old), None);
    assert!(!link.detach(&old), "its end is no news");
    assert_eq!(link.ready(&new), Some(2));
    assert_eq!(take(&link, &new), Ok(Some(vec![1])));
    assert!(link.detach(&new), "this one is");
    assert!(!link.detach(&new), "once");
    assert_eq!(take(&link, &new), Err(()));
}

#[test]
fn what_waits_survives_its_stream_for_thirty_seconds() {
    let link = link();
    let session = up(&link);
    push(&link, envelope("t", 1, 1)).expect("room");
    link.detach(&session);
    push(&link, envelope("t", 2, 2)).expect("still queued");
    let bytes = link.look().3;
    assert_eq!(link.forget_stale(Instant::now() + KEPT - Duration::from_secs(1)), None);
    let later = Instant::now() + KEPT;
    assert_eq!(link.forget_stale(later), Some(Lost { envelopes: 2, bytes }));
    assert_eq!(link.forget_stale(later), None, "once");
    assert_eq!(push(&link, envelope("t", 3, 3)), Err(SendErrorKind::ConnectionNotFound));
    let session = up(&link);
    assert_eq!(take(&link, &session), Ok(None));
}

#[test]
fn a_full_queue_refuses_by_number_and_by_bytes_but_takes_one_of_any_size() {
    let link = link();
    let session = up(&link);
    for number in 0..8 {
        push(&link, envelope("t", number, 0)).expect("room");
    }
    assert_eq!(push(&link, envelope("t", 8, 0)), Err(SendErrorKind::MessageCongested));
    while take(&link, &session) != Ok(None) {}
    let large = |size| Envelope { payload: vec![Bytes::from(vec![0; size])], ..envelope("t", 0, 0) };
    push(&link, large(5000)).expect("one always fits");
    assert_eq!(push(&link, envelope("t", 1, 0)), Err(SendErrorKind::MessageCongested));
    take(&link, &session).expect("taken");
    push(&link, large(900)).expect("room");
    assert_eq!(push(&link, large(100)), Err(SendErrorKind::MessageCongested));
    assert_eq!(link.look().2, 1);
}

#[test]
fn a_frame_holds_messages_of_one_type_and_topic_in_order_and_the_number_of_the_last() {
    let link = link();
    let session = up(&link);
    let other_type = Envelope { r#type: 18, ..envelope("t", 4, 4) };
    for envelope in [
        envelope("t", 1, 1),
        envelope("t", 2, 2),
        envelope("u", 3, 1),
        other_type,
        envelope("t", 5, 5),
        envelope("t", 6, 0),
        envelope("t", 7, 0),
    ] {
        push(&link, envelope).expect("room");
    }
    let mut cx = Context::from_waker(Waker::noop());
    let Poll::Ready(Some(first)) = link.poll_take(&session, &mut cx) else { panic!("seven wait") };
    assert_eq!((first.payload.len(), first.sequence), (2, 2));
    let rest: Vec<_> = std::iter::from_fn(|| take(&link, &session).expect("not ended")).collect();
    assert_eq!(rest, [vec![3], vec![4], vec![5], vec![6, 7]]);
    assert_eq!(link.look().3, 0, "no bytes are left");
}

#[test]
fn a_frame_is_bounded_in_bytes_and_messages() {
    let link = Link::with_room("b".into(), StreamClass::Event, 1000, usize::MAX);
    let session = up(&link);
    for number in 0..200 {
        push(&link, envelope("t", number, 0)).expect("room");
    }
    let first = take(&link, &session).expect("not ended").expect("200 wait");
    assert_eq!(first, (0..64).collect::<Vec<u8>>());
    while take(&link, &session) != Ok(None) {}
    for number in 0..4 {
        let payload = vec![Bytes::from(vec![number; 30 << 10])];
        push(&link, Envelope { payload, ..envelope("t", 0, 0) }).expect("room");
    }
    assert_eq!(take(&link, &session), Ok(Some(vec![0, 1])));
}

#[test]
fn a_peer_that_left_is_no_target_any_more() {
    let link = link();
    let session = up(&link);
    push(&link, envelope("t", 1, 1)).expect("room");
    let (lost, was_up) = link.close();
    assert!(was_up && lost.envelopes == 1 && lost.bytes > 0 && session.ended.is_cancelled());
    assert_eq!(take(&link, &session), Err(()));
    assert_eq!(push(&link, envelope("t", 1, 1)), Err(SendErrorKind::TargetNotFound));
    assert!(link.attach().is_none());
}

#[test]
fn what_waits_when_the_bus_stops_still_leaves() {
    let link = link();
    let session = up(&link);
    push(&link, envelope("t", 1, 1)).expect("room");
    link.finish();
    assert_eq!(push(&link, envelope("t", 2, 2)), Err(SendErrorKind::Closed));
    assert!(link.attach().is_none());
    assert_eq!(take(&link, &session), Ok(Some(vec![1])));
    assert_eq!(take(&link, &session), Err(()));
}

/// What can happen to a link.
#[derive(Clone, Copy, Debug)]
enum Step {
    Push,
    /// By the stream of this age, 0 being the newest.
    Take(usize),
    Attach,
    Ready(usize),
    Detach(usize),
    Interrupt,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Push),
        4 => (0usize..3).prop_map(Step::Take),
        1 => Just(Step::Attach),
        1 => (0usize..3).prop_map(Step::Ready),
        1 => (0usize..3).prop_map(Step::Detach),
        1 => Just(Step::Interrupt),
    ]
}

proptest! {
    /// GR-1, GR-2: whatever streams do, what was queued is taken in order, once, by the newest stream.
    #[test]
    fn what_is_queued_is_taken_in_order_and_once(steps in vec(step(), 0..200)) {
        let link = link();
        let mut sessions: Vec<Session> = Vec::new();
        let (mut number, mut expected) = (0u8, VecDeque::new());
        for step in steps {
            let of = |age: usize| sessions.iter().rev().nth(age);
            match step {
                Step::Push => {
                    number = number.wrapping_add(1);
                    if push(&link, envelope("t", number, 0)).is_ok() {
                        expected.push_back(number);
                    }
                }
                Step::Take(age) => {
                    let Some(session) = of(age) else { continue };
                    let taken = take(&link, session);
                    prop_assert!(age == 0 || taken == Err(()), "an old stream took {taken:?}");
                    for number in taken.ok().flatten().unwrap_or_default() {
                        prop_assert_eq!(Some(number), expected.pop_front());
                    }
                }
                Step::Attach => sessions.push(link.attach().expect("open").0),
                Step::Ready(age) => {
                    let Some(session) = of(age) else { continue };
                    let ready = link.ready(session);
                    prop_assert!(age == 0 || ready.is_none());
                }
                Step::Detach(age) => {
                    let Some(session) = of(age) else { continue };
                    let counted = link.detach(session);
                    prop_assert!(age == 0 || !counted);
                }
                Step::Interrupt => {
                    link.interrupt();
                }
            }
            prop_assert_eq!(link.look().2, expected.len());
        }
        let last = up(&link);
        while let Ok(Some(numbers)) = take(&link, &last) {
            for number in numbers {
                prop_assert_eq!(Some(number), expected.pop_front());
            }
        }
        prop_assert!(expected.is_empty());
        prop_assert_eq!(link.look().3, 0);
    }
}
