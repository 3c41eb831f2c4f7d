//! Histories of one lease, and any history of leases at a store that loses its leader, its clock and its answers.

use testkit::Random;

use super::*;

const TTL: Duration = Duration::from_secs(10);

fn watchdog() -> (Watchdog, impl Fn(u64) -> Instant) {
    let start = Instant::now();
    (Watchdog::new(TTL, start), move |seconds| start + Duration::from_secs(seconds))
}

const fn after(seconds: u64) -> Option<Verdict> {
    Some(Verdict::Resumed { after: Duration::from_secs(seconds) })
}

#[test]
// behaviour: coordinator-ST-20
fn a_store_that_does_not_answer_stops_all_writing_before_the_lease_can_end() {
    let (mut dog, at) = watchdog();
    assert_eq!((dog.on_time(at(7)), dog.may_write(at(7))), (None, true));
    // The answer came at 7, to a question of 5: the lease lives until 15.
    assert_eq!(dog.on_confirmed(at(5)), None);
    assert_eq!((dog.deadline(), dog.on_time(at(12))), (at(13), None));
    assert_eq!(dog.on_confirmed(at(3)), None);
    assert_eq!(dog.deadline(), at(13), "an older answer takes nothing back");
    assert!(!dog.may_write(at(13)), "also before anybody has noticed");
    assert_eq!(dog.on_time(at(13)), Some(Verdict::Suspended));
    assert_eq!((dog.on_time(at(99)), dog.lost()), (None, None), "said once, and nothing is lost");
    assert!(!dog.may_write(at(99)));
}

#[test]
fn the_same_lease_confirmed_and_the_registration_seen_let_writing_go_on() {
    let (mut dog, at) = watchdog();
    assert_eq!(dog.on_time(at(8)), Some(Verdict::Suspended));
    assert_eq!(dog.suspended_since(), Some(at(8)));
    assert!(dog.wants_registration());
    assert_eq!((dog.on_confirmed(at(20)), dog.on_time(at(21))), (None, None), "somebody may have deleted it");
    assert_eq!((dog.on_registration(at(7), true), dog.wants_registration()), (None, true), "that was before");
    assert_eq!((dog.on_registration(at(20), true), dog.wants_registration()), (None, false));
    assert_eq!(dog.on_time(at(21)), after(13));
    assert!(dog.may_write(at(21)) && dog.suspended_since().is_none());
    assert_eq!((dog.deadline(), dog.on_time(at(28))), (at(28), Some(Verdict::Suspended)), "and so on");
    assert!(dog.wants_registration(), "what was seen before says nothing of now");
    // The other way round: a look at the registration is not a confirmation of the lease.
    assert_eq!((dog.on_registration(at(28), true), dog.on_time(at(29))), (None, None));
    assert_eq!((dog.on_confirmed(at(15)), dog.on_time(at(30))), (None, None), "too old to count");
    assert_eq!((dog.on_confirmed(at(29)), dog.on_time(at(30))), (None, after(2)));
}

#[test]
fn an_answer_after_a_stop_of_the_process_does_not_hide_the_stop() {
    let (mut dog, at) = watchdog();
    // Stopped from 1 to 60. What runs first is the renewal, then the look at the clock.
    assert_eq!(dog.on_confirmed(at(60)), Some(Verdict::Suspended));
    assert_eq!((dog.on_time(at(60)), dog.may_write(at(60))), (None, false));
    assert_eq!((dog.on_registration(at(60), true), dog.on_time(at(61))), (None, after(53)));
}

#[test]
// behaviour: coordinator-ST-9
// behaviour: coordinator-ST-10
fn the_end_of_a_lease_is_told_once_whatever_tells_it() {
    for suspended in [false, true] {
        for first in 0..3 {
            let (mut dog, at) = watchdog();
            if suspended {
                dog.on_time(at(9));
            }
            let mut told = Vec::new();
            for turn in 0..6 {
                told.extend(match (first + turn) % 3 {
                    0 => dog.on_done(),
                    1 => dog.on_gone(),
                    _ => dog.on_registration(at(9), false),
                });
            }
            let expected = [Lost::Done, Lost::Gone, Lost::Unregistered][first];
            assert_eq!(told, [Verdict::Lost(expected)]);
            assert_eq!(expected.code(), heartbeatpb::codes::CAPTURE_SUICIDE);
            // An answer that comes after the verdict changes nothing: others may have acted on it.
            let late = (dog.on_confirmed(at(9)), dog.on_registration(at(9), true), dog.on_time(at(9)));
            assert_eq!(late, (None, None, None));
            assert_eq!(
                (dog.lost(), dog.may_write(at(9)), dog.wants_registration()),
                (Some(expected), false, false)
            );
        }
    }
}

#[test]
fn short_leases_keep_a_margin_of_a_second() {
    let start = Instant::now();
    let dog = Watchdog::new(Duration::from_secs(3), start);
    assert_eq!(dog.deadline(), start + Duration::from_secs(2));
    assert_eq!(dog.answer_limit(), Duration::from_secs(1));
    let dog = Watchdog::new(Duration::from_millis(900), start);
    assert_eq!((dog.deadline(), dog.answer_limit()), (start, Duration::from_millis(300)));
}

#[test]
fn a_question_from_before_a_sleep_is_not_dated_after_it() {
    let start = Instant::now();
    // By the clock that stops.
    let at = |seconds| start + Duration::from_secs(seconds);
    let seconds = Duration::from_secs;
    let mut log = SleepLog::new(seconds(5), at(0));
    assert_eq!(log.date(at(1)), at(6), "it had slept before the lease");
    log.on_look(seconds(5), at(2));
    // It sleeps for an hour at 3, and somebody looks at 4.
    assert_eq!(log.date(at(3)), at(8), "asked before or after: nobody has noticed");
    log.on_look(seconds(3605), at(4));
    assert_eq!(log.date(at(3)), at(8), "asked before it was noticed");
    assert_eq!(log.date(at(4)), at(3609));
    assert_eq!(log.date(at(5)), at(3610));
    // Twice in a row, and a question from before both.
    log.on_look(seconds(3700), at(6));
    log.on_look(seconds(3800), at(7));
    assert_eq!(log.date(at(5)), at(3610));
    assert_eq!(log.date(at(7)), at(3807));
    log.on_look(seconds(3800) + Duration::from_micros(300), at(8));
    assert_eq!(log.date(at(8)), at(3808), "clocks that are read one after the other");
}

/// A store with one lease, in milliseconds.
struct Store {
    ttl: u64,
    /// When it gives the lease up; never without a leader.
    ends: u64,
    /// Without a leader until then.
    leaderless: u64,
    alive: bool,
}

impl Store {
    fn on_time(&mut self, now: u64) {
        self.alive &= now < self.leaderless || now < self.ends;
    }

    /// Nobody leads for a while. Whoever leads then begins every lease anew.
    fn lose_leader(&mut self, now: u64, until: u64) {
        self.on_time(now);
        self.leaderless = until;
        self.ends = self.ends.max(until + self.ttl);
    }

    /// Nobody is answered without a leader.
    fn renew(&mut self, now: u64) -> Option<bool> {
        self.on_time(now);
        if now < self.leaderless {
            return None;
        }
        if self.alive {
            self.ends = now + self.ttl;
        }
        Some(self.alive)
    }
}

/// From then on nothing happens to anybody.
const QUIET: u64 = 50_000;

/// A node whose questions, answers and looks at the clock take what they take.
struct Node {
    dog: Watchdog,
    base: Instant,
    /// Stopped until then: nothing of it runs.
    stopped: u64,
    /// Answers on their way: when they arrive, when the question was asked, whether the lease lives.
    answers: Vec<(u64, u64, bool)>,
    /// The same of the registration.
    looks: Vec<(u64, u64, bool)>,
    asks_at: u64,
    resumed: u32,
}

impl Node {
    fn at(&self, millis: u64) -> Instant {
        self.base + Duration::from_millis(millis)
    }

    fn step(&mut self, now: u64, store: &mut Store, random: &mut Random) {
        if now < self.stopped {
            return;
        }
        if now >= self.asks_at {
            self.asks_at = now + 500;
            let heard = now + random.between(0, 400);
            let lost = now < QUIET && random.between(0, 9) == 0;
            if !lost && let Some(lives) = store.renew(now) {
                self.answers.push((heard, now, lives));
            }
            if self.dog.wants_registration() && now >= store.leaderless {
                self.looks.push((heard, now, store.alive));
            }
        }
        let mut verdicts = Vec::new();
        for (_, asked, lives) in self.answers.extract_if(.., |(heard, ..)| *heard <= now).collect::<Vec<_>>()
        {
            verdicts.extend(if lives { self.dog.on_confirmed(self.at(asked)) } else { self.dog.on_gone() });
        }
        for (_, asked, found) in self.looks.extract_if(.., |(heard, ..)| *heard <= now).collect::<Vec<_>>() {
            verdicts.extend(self.dog.on_registration(self.at(asked), found));
        }
        verdicts.extend(self.dog.on_time(self.at(now)));
        self.resumed +=
            verdicts.iter().filter(|verdict| matches!(verdict, Verdict::Resumed { .. })).count() as u32;
    }
}

/// One history. Whoever may write has the lease, and for the whole margin yet; who has no lease learns it and stays lost;
/// who has it and is answered may write again.
fn history(seed: u64) -> (u32, bool) {
    let random = &mut Random::new(seed, 1);
    let base = Instant::now();
    let ttl = 3_000;
    let mut store = Store { ttl, ends: ttl, leaderless: 0, alive: true };
    let mut node = Node {
        dog: Watchdog::new(Duration::from_millis(ttl), base),
        base,
        stopped: 0,
        answers: Vec::new(),
        looks: Vec::new(),
        asks_at: 0,
        resumed: 0,
    };
    let end = QUIET + 10_000;
    for now in (0..end).step_by(10) {
        if now < QUIET {
            match random.between(0, 600) {
                0 => store.lose_leader(now, now + random.between(100, 6_000)),
                1 => node.stopped = now + random.between(100, 5_000),
                _ => {}
            }
        }
        store.on_time(now);
        // A stopped node can be woken at any moment, and what wakes first may be a writer.
        if node.dog.may_write(node.at(now)) {
            let margin = now + 1_000 <= store.ends.max(store.leaderless);
            assert!(store.alive && margin, "seed {seed}: writes at {now} with a lease until {}", store.ends);
            assert_eq!(node.dog.lost(), None);
        }
        node.step(now, &mut store, random);
    }
    assert_eq!(node.dog.lost().is_some(), !store.alive, "seed {seed}");
    assert_eq!(node.dog.may_write(node.at(end)), store.alive, "seed {seed}: ten quiet seconds are enough");
    (node.resumed, store.alive)
}

#[test]
// behaviour: coordinator-ST-20
fn whatever_happens_nobody_writes_without_the_lease_and_nobody_stays_suspended_with_it() {
    let (mut resumed, mut lost) = (0, 0);
    for seed in 0..500 {
        let (times, alive) = history(seed);
        resumed += times;
        lost += u32::from(!alive);
    }
    assert!(resumed > 100 && lost > 100, "the histories have both: {resumed} resumed, {lost} lost");
}
