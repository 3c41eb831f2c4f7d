//! Histories of a manager's core.

use std::time::{Duration, Instant};

use event::BlockEvent;
use heartbeatpb::config::{PerformanceMode, ReplicaConfig};
use heartbeatpb::{
    BlockAction, BlockStage, ChangefeedId, CheckpointTsMessage, ComponentState, DispatcherId,
    DispatcherStatus, HeartBeatRequest, HeartBeatResponse, InfluencedDispatchers, MaintainerBootstrapRequest,
    MaintainerEpoch, MaintainerPostBootstrapRequest, Mode, NodeId, OperatorType, Owner, ScheduleAction,
    ScheduleDispatcherRequest, SchemaId, Ts,
};
use sink::TableStart;

use super::*;
use crate::dispatcher::testing::*;

mod cost;
mod merging;
mod walk;

struct Bench {
    core: Core,
    feed: ChangefeedId,
    now: Instant,
    /// Every action so far.
    seen: Vec<Action>,
}

fn epoch(n: u64) -> Option<MaintainerEpoch> {
    MaintainerEpoch::from_wire(n)
}

fn a() -> NodeId {
    NodeId::from("a")
}

fn b() -> NodeId {
    NodeId::from("b")
}

fn show(action: &Action) -> String {
    match action {
        Action::OpenDispatcher { id, start_ts, .. } => format!("open {}@{start_ts}", id.low),
        Action::OpenTable { id, .. } => format!("table {}", id.low),
        Action::Write { id, .. } => format!("write {}", id.low),
        Action::Flush { id, .. } => format!("flush {}", id.low),
        Action::WriteBlock { event, .. } => format!("execute {}", show_key(crate::dispatcher::key_of(event))),
        Action::CloseDispatcher { id } => format!("close {}", id.low),
        Action::Subscribe { id, start_ts, event_service, .. } => {
            format!("subscribe {}@{start_ts} at {event_service}", id.low)
        }
        Action::Unsubscribe { id, .. } => format!("unsubscribe {}", id.low),
        Action::Copied { id, end } => format!("copied {} {}+{}", id.low, end.commit_ts, end.rows),
        Action::PublishCheckpoint { checkpoint, .. } => format!("publish {checkpoint}"),
        Action::HeartBeat(request) => show_heartbeat(request),
        Action::BlockStatus(request) => {
            let shown: Vec<String> = request
                .statuses
                .iter()
                .map(|status| format!("{} {}", status.id.low, show_state(&status.state)))
                .collect();
            format!("block [{}]", shown.join(", "))
        }
        Action::ReportError(fault) => format!("error {}", fault.code),
        Action::Bootstrapped(step) => format!("bootstrapped {}", show_step(step)),
        Action::Stop => "stop".into(),
        Action::Forget => "forget".into(),
    }
}

fn show_heartbeat(request: &HeartBeatRequest) -> String {
    let watermark = request.watermark.expect("every heartbeat of a core has one");
    let ts = |ts: Ts| if ts == Ts::MAX { "max".to_owned() } else { ts.to_string() };
    let mut text =
        format!("beat {}/{} seq {}", ts(watermark.checkpoint), ts(watermark.resolved), watermark.seq);
    for status in &request.statuses {
        text.push_str(&format!(" {}:{:?}@{}", status.id.low, status.state, status.checkpoint));
    }
    if request.complete {
        text.push_str(" complete");
    }
    text
}

fn show_step(step: &BootstrapStep) -> String {
    match step {
        BootstrapStep::Reply(response) => {
            let spans: Vec<String> = response.spans.iter().map(|span| span.id.low.to_string()).collect();
            let operators: Vec<String> = response
                .operators
                .iter()
                .map(|request| format!("{:?} {}", request.action, request.config.dispatcher.low))
                .collect();
            let epoch = MaintainerEpoch::to_wire(response.epoch);
            format!("reply e{epoch} @{} [{}] [{}]", response.checkpoint, spans.join(","), operators.join(","))
        }
        BootstrapStep::Refuse(fault) => format!("refuse {}", fault.code),
        BootstrapStep::Drop => "drop".into(),
        BootstrapStep::Wait => "wait".into(),
        BootstrapStep::Closing => "closing".into(),
        BootstrapStep::Closed => "closed".into(),
    }
}

impl Bench {
    /// A manager of owner `a` with epoch 1.
    fn new() -> Self {
        Self::owned_by(epoch(1))
    }

    fn owned_by(epoch: Option<MaintainerEpoch>) -> Self {
        let feed = ChangefeedId::fresh("test");
        let options = CoreOptions::of(&ReplicaConfig::default(), true);
        let core = Core::new(feed.clone(), Owner { node: a(), epoch }, Ts(50), options);
        Self { core, feed, now: Instant::now(), seen: Vec::new() }
    }

    /// What the core wants since the last call.
    fn take(&mut self) -> String {
        let start = self.seen.len();
        self.core.take_actions(&mut self.seen);
        let shown: Vec<String> = self.seen[start..].iter().map(show).collect();
        shown.join("; ")
    }

    /// The newest action that `pick` recognises.
    fn last<T>(&self, pick: impl Fn(&Action) -> Option<T>) -> T {
        self.seen.iter().rev().find_map(pick).expect("the core wanted it")
    }

    fn last_ticket(&self) -> Ticket {
        self.last(|action| if let Action::Write { ticket, .. } = action { Some(*ticket) } else { None })
    }

    fn bootstrap_request(&self, trigger: Option<u64>, e: u64) -> MaintainerBootstrapRequest {
        MaintainerBootstrapRequest {
            changefeed: self.feed.clone(),
            config: heartbeatpb::ConfigBytes([].into()),
            start_ts: Ts(50),
            trigger: trigger.map(id),
            is_new: false,
            redo_trigger: None,
            keyspace_id: 0,
            epoch: epoch(e),
        }
    }

    fn bootstrap(&mut self, from: &NodeId, trigger: Option<u64>, e: u64) -> String {
        let request = self.bootstrap_request(trigger, e);
        show_step(&self.core.on_bootstrap(from, &request, false))
    }

    fn post_bootstrap(&mut self, from: &NodeId, trigger: u64, e: u64) -> PostBootstrapStep {
        let request = MaintainerPostBootstrapRequest {
            changefeed: self.feed.clone(),
            trigger: id(trigger),
            schemas: Vec::new(),
            redo_schemas: Vec::new(),
            epoch: epoch(e),
        };
        self.core.on_post_bootstrap(from, &request)
    }

    fn request(&self, action: ScheduleAction, n: u64, e: u64) -> ScheduleDispatcherRequest {
        ScheduleDispatcherRequest {
            changefeed: self.feed.clone(),
            config: config(n, i64::try_from(n).expect("small"), 60),
            action,
            operator: OperatorType::Add,
            epoch: epoch(e),
        }
    }

    fn schedule(&mut self, from: &NodeId, action: ScheduleAction, n: u64, e: u64) -> String {
        let request = self.request(action, n, e);
        self.core.on_schedule(from, request, self.now);
        self.take()
    }

    fn opened(&mut self, n: u64, start: u64) -> String {
        let start = TableStart { start_ts: Ts(start), skip_dml_at_start: false };
        let asked = self.core.opening.get(&id(n)).map_or(Ts::ZERO, |opening| opening.config.start_ts);
        self.core.on_dispatcher_opened(id(n), asked, Ok(start), self.now);
        self.take()
    }

    /// A working dispatcher.
    fn working(&mut self, n: u64) {
        self.schedule(&a(), ScheduleAction::Create, n, 1);
        self.opened(n, 60);
        self.arrive(n, Arrival::Begin(Some(table(1, 1))));
        self.core.on_table_opened(self.slot(n), Ok(()), self.now);
        self.arrive(n, resolved(60));
        self.wait(11);
    }

    /// The table trigger, started.
    fn trigger(&mut self, n: u64) {
        let request = self.bootstrap_request(Some(n), 1);
        assert!(matches!(self.core.on_bootstrap(&a(), &request, true), BootstrapStep::Wait));
        self.opened(n, 50);
        assert!(matches!(self.post_bootstrap(&a(), n, 1), PostBootstrapStep::Reply(_)));
        self.take();
        self.arrive(n, resolved(55));
        self.wait(11);
    }

    fn slot(&self, n: u64) -> Slot {
        self.core.dispatchers.slot(id(n)).expect("present")
    }

    fn arrive(&mut self, n: u64, arrival: Arrival) -> String {
        self.core.on_arrival(id(n), arrival, self.now);
        self.take()
    }

    fn wait(&mut self, millis: u64) -> String {
        self.now += Duration::from_millis(millis);
        self.core.on_tick(self.now);
        self.take()
    }

    fn respond(&mut self, from: &NodeId, e: u64, status: DispatcherStatus) -> String {
        let response = HeartBeatResponse {
            changefeed: self.feed.clone(),
            mode: Mode::Default,
            statuses: vec![status],
            epoch: epoch(e),
        };
        self.core.on_heartbeat_response(from, &response, self.now);
        self.take()
    }

    fn checkpoint_message(&mut self, from: &NodeId, checkpoint: u64) -> String {
        let message = CheckpointTsMessage { changefeed: self.feed.clone(), checkpoint: Ts(checkpoint) };
        self.core.on_checkpoint(from, &message);
        self.take()
    }

    /// A tick that certainly aggregates.
    fn beat(&mut self) -> String {
        self.core.next_heartbeat = Some(self.now);
        self.core.next_complete = Some(self.now + Duration::from_secs(10));
        self.wait(0)
    }
}

// behaviour: dispatcher-52
#[test]
fn ownership_follows_the_truth_tables() {
    let cases: &[(u64, u64, &str, &str, bool, bool)] = &[
        // sender's epoch, current epoch, current owner, sender, may bootstrap, may do the rest
        (0, 0, "a", "a", true, true),
        (0, 0, "", "a", true, true),
        (0, 0, "a", "b", true, false),
        (0, 3, "a", "a", false, false),
        (3, 0, "a", "a", true, false),
        (3, 2, "a", "b", true, false),
        (3, 3, "a", "a", true, true),
        (3, 3, "", "a", true, false),
        (3, 3, "a", "b", false, false),
        (3, 4, "a", "a", false, false),
    ];
    for (e, current, node, from, can_update, allows) in cases {
        let mut owner = Owner { node: NodeId::from(*node), epoch: epoch(*current) };
        let from = NodeId::from(*from);
        assert_eq!(owner.allows(&from, epoch(*e)), *allows, "{e} {current} {node} {from}");
        assert_eq!(owner.can_update(&from, epoch(*e)), *can_update, "{e} {current} {node} {from}");
        let before = owner.clone();
        assert_eq!(owner.try_update(&from, epoch(*e)), *can_update);
        assert!(*can_update || owner == before);
        assert!(owner.epoch >= before.epoch);
    }
}

#[test]
fn a_bootstrap_creates_the_trigger_and_answers() {
    let mut x = Bench::new();
    let request = x.bootstrap_request(Some(1), 1);
    assert!(matches!(x.core.on_bootstrap(&a(), &request, true), BootstrapStep::Wait));
    assert_eq!(x.take(), "open 1@50");
    assert_eq!(x.opened(1, 70), "bootstrapped reply e1 @70 [1] []");
    assert_eq!(x.bootstrap(&a(), Some(1), 1), "reply e1 @70 [1] []");
    let PostBootstrapStep::Reply(reply) = x.post_bootstrap(&a(), 1, 1) else { panic!("allowed") };
    assert_eq!((reply.trigger, reply.epoch), (Some(id(1)), epoch(1)));
    assert_eq!(x.take(), "subscribe 1@70 at a");
    assert!(matches!(x.post_bootstrap(&a(), 1, 1), PostBootstrapStep::Reply(_)), "a retry succeeds");
    assert_eq!(x.take(), "");
}

#[test]
fn a_new_changefeed_ignores_what_the_downstream_knows() {
    let mut x = Bench::new();
    let request = MaintainerBootstrapRequest { is_new: true, ..x.bootstrap_request(Some(1), 1) };
    x.core.on_bootstrap(&a(), &request, true);
    x.take();
    assert_eq!(x.opened(1, 70), "bootstrapped reply e1 @50 [1] []");
}

#[test]
fn a_trigger_that_failed_is_created_by_the_next_bootstrap_of_the_same_owner() {
    let mut x = Bench::new();
    assert_eq!(x.bootstrap(&a(), Some(1), 2), "wait");
    assert_eq!(x.take(), "open 1@50");
    x.core.on_dispatcher_opened(id(1), Ts(50), Err(fault()), x.now);
    assert_eq!(x.take(), "bootstrapped refuse CDC:ErrSinkUnavailable");
    assert_eq!(x.core.owner().epoch, epoch(2), "the new owner stays");
    assert_eq!(x.bootstrap(&a(), Some(1), 2), "wait");
    assert_eq!(x.take(), "open 1@50");
    assert_eq!(x.opened(1, 50), "bootstrapped reply e2 @50 [1] []");
}

// behaviour: dispatcher-17, dispatcher-18, dispatcher-19
#[test]
fn a_bootstrap_with_another_trigger_is_refused_and_the_owner_stays() {
    let mut x = Bench::new();
    x.trigger(1);
    let refused = "refuse CDC:ErrChangefeedInitTableTriggerDispatcherFailed";
    assert_eq!(x.bootstrap(&b(), Some(2), 2), refused);
    assert_eq!(x.bootstrap(&b(), None, 2), refused);
    let redo = MaintainerBootstrapRequest { redo_trigger: Some(id(9)), ..x.bootstrap_request(Some(1), 2) };
    assert_eq!(show_step(&x.core.on_bootstrap(&b(), &redo, false)), refused);
    assert_eq!(x.core.owner(), &Owner { node: a(), epoch: epoch(1) });
    assert_eq!(x.core.on_close(&a(), epoch(1), false), CloseStep::Closing);
}

#[test]
fn a_stale_bootstrap_is_dropped() {
    let mut x = Bench::owned_by(epoch(5));
    assert_eq!(x.bootstrap(&a(), None, 4), "drop");
    assert_eq!(x.bootstrap(&a(), None, 0), "drop");
    assert_eq!(x.bootstrap(&b(), None, 5), "drop");
    assert_eq!(x.bootstrap(&b(), None, 6), "reply e6 @0 [] []");
}

// behaviour: dispatcher-22
#[test]
fn a_post_bootstrap_without_its_trigger_is_answered_with_an_error() {
    let mut x = Bench::new();
    let PostBootstrapStep::Refuse(fault) = x.post_bootstrap(&a(), 1, 1) else { panic!("no trigger") };
    assert_eq!(fault.code, "CDC:ErrChangefeedInitTableTriggerDispatcherFailed");
    x.trigger(1);
    assert!(matches!(x.post_bootstrap(&a(), 2, 1), PostBootstrapStep::Refuse(_)));
    assert!(matches!(x.post_bootstrap(&b(), 1, 1), PostBootstrapStep::Drop));
    assert!(matches!(x.post_bootstrap(&a(), 1, 2), PostBootstrapStep::Drop));
}

// behaviour: dispatcher-21, dispatcher-46
#[test]
fn a_closing_manager_says_nothing_and_creates_nothing() {
    let mut x = Bench::new();
    x.trigger(1);
    x.core.stop();
    assert_eq!(x.take(), "unsubscribe 1; close 1; stop");
    assert!(matches!(x.post_bootstrap(&a(), 1, 1), PostBootstrapStep::Drop));
    assert_eq!(x.bootstrap(&a(), Some(1), 2), "closing");
    assert_eq!(x.schedule(&a(), ScheduleAction::Create, 2, 1), "");
    assert_eq!(x.wait(10_000), "");
    x.core.on_stopped();
    assert_eq!(x.bootstrap(&a(), Some(1), 2), "closed");
}

// behaviour: dispatcher-23
#[test]
fn a_trigger_that_opens_after_the_write_path_closed_answers_nobody() {
    let mut x = Bench::new();
    let request = x.bootstrap_request(Some(1), 1);
    x.core.on_bootstrap(&a(), &request, true);
    x.take();
    x.core.stop();
    assert_eq!(x.take(), "bootstrapped closing; stop");
    assert_eq!(x.opened(1, 50), "");
}

// behaviour: dispatcher-24
#[test]
fn a_trigger_that_fails_otherwise_is_answered_with_an_error() {
    let mut x = Bench::new();
    let request = x.bootstrap_request(Some(1), 1);
    x.core.on_bootstrap(&a(), &request, true);
    x.take();
    x.core.on_dispatcher_opened(id(1), Ts(50), Err(fault()), x.now);
    assert_eq!(x.take(), "bootstrapped refuse CDC:ErrSinkUnavailable");
}

// behaviour: dispatcher-20
#[test]
fn a_close_by_a_superseded_owner_changes_nothing() {
    let mut x = Bench::owned_by(epoch(2));
    assert_eq!(x.core.on_close(&a(), epoch(1), true), CloseStep::NotAllowed);
    assert_eq!(x.core.life(), Life::Open);
    assert_eq!(x.take(), "");
}

// behaviour: dispatcher-40
#[test]
fn a_closed_manager_cleans_up_when_the_changefeed_is_removed() {
    let mut x = Bench::new();
    assert_eq!(x.core.on_close(&a(), epoch(1), false), CloseStep::Closing);
    assert_eq!(x.take(), "stop");
    assert_eq!(x.core.on_close(&a(), epoch(1), false), CloseStep::Closing);
    x.core.on_stopped();
    assert_eq!(x.take(), "");
    assert_eq!(x.core.on_close(&a(), epoch(1), true), CloseStep::Closed);
    assert_eq!(x.take(), "forget");
    assert_eq!(x.core.on_close(&a(), epoch(1), true), CloseStep::Closed);
    assert_eq!(x.take(), "", "not twice at the same time");
    x.core.on_forgotten(false);
    assert_eq!(x.core.on_close(&a(), epoch(1), false), CloseStep::Closed);
    assert_eq!(x.take(), "forget", "again until it worked once; removal is remembered");
    x.core.on_forgotten(true);
    x.core.on_close(&a(), epoch(1), true);
    assert_eq!(x.take(), "");
}

#[test]
fn removal_asked_for_while_closing_is_remembered() {
    let mut x = Bench::new();
    x.core.on_close(&a(), epoch(1), false);
    x.core.on_close(&a(), epoch(1), true);
    x.take();
    x.core.on_stopped();
    assert_eq!(x.take(), "forget");
}

#[test]
fn a_dispatcher_is_in_the_table_before_its_events_can_come() {
    let mut x = Bench::new();
    assert_eq!(x.schedule(&a(), ScheduleAction::Create, 1, 1), "open 1@60");
    assert_eq!(x.core.journal.len(), 1);
    assert_eq!(x.schedule(&a(), ScheduleAction::Create, 1, 1), "", "one creation at a time");
    assert_eq!(x.opened(1, 65), "subscribe 1@65 at a");
    assert_eq!(x.core.journal.len(), 0);
    let dispatcher = x.core.dispatchers.get(x.slot(1)).expect("present");
    assert_eq!((dispatcher.seq, dispatcher.start_ts), (1, Ts(65)));
}

// behaviour: dispatcher-49
#[test]
fn a_creation_of_what_exists_is_skipped() {
    let mut x = Bench::new();
    x.working(1);
    assert_eq!(x.schedule(&a(), ScheduleAction::Create, 1, 1), "");
    assert_eq!(x.core.journal.len(), 0);
}

// behaviour: dispatcher-50
#[test]
fn only_the_owner_schedules() {
    let mut x = Bench::owned_by(epoch(10));
    assert_eq!(x.schedule(&a(), ScheduleAction::Create, 1, 9), "");
    assert_eq!(x.schedule(&a(), ScheduleAction::Create, 1, 0), "");
    assert_eq!(x.schedule(&b(), ScheduleAction::Create, 1, 10), "");
    assert_eq!(x.core.journal.len(), 0);
    assert_eq!(x.schedule(&a(), ScheduleAction::Create, 1, 10), "open 1@60");
    let mut x = Bench::owned_by(None);
    assert_eq!(x.schedule(&b(), ScheduleAction::Create, 1, 0), "");
    assert_eq!(x.schedule(&a(), ScheduleAction::Create, 1, 0), "open 1@60");
}

// behaviour: dispatcher-51
#[test]
fn a_request_of_an_earlier_owner_blocks_nobody() {
    let mut x = Bench::new();
    x.schedule(&a(), ScheduleAction::Create, 1, 1);
    assert_eq!(x.bootstrap(&b(), None, 2), "reply e2 @0 [] []");
    assert_eq!(x.core.journal.len(), 0);
    assert_eq!(x.schedule(&b(), ScheduleAction::Create, 1, 2), "", "the sink is still being asked");
    assert_eq!(x.core.journal.len(), 1);
    assert_eq!(x.opened(1, 60), "subscribe 1@60 at b");
}

#[test]
fn a_creation_whose_owner_was_superseded_meanwhile_is_undone() {
    let mut x = Bench::new();
    x.schedule(&a(), ScheduleAction::Create, 1, 1);
    x.bootstrap(&b(), None, 2);
    assert_eq!(x.opened(1, 60), "close 1");
    assert!(x.core.dispatchers.len() == 0);
}

#[test]
fn an_answer_to_another_start_is_not_used() {
    let mut x = Bench::new();
    x.schedule(&a(), ScheduleAction::Create, 1, 1);
    x.schedule(&a(), ScheduleAction::Remove, 1, 1);
    let mut again = x.request(ScheduleAction::Create, 1, 1);
    again.config.start_ts = Ts(70);
    x.core.on_schedule(&a(), again, x.now);
    assert_eq!(x.take(), "");
    let late = TableStart { start_ts: Ts(60), skip_dml_at_start: false };
    x.core.on_dispatcher_opened(id(1), Ts(60), Ok(late), x.now);
    assert_eq!(x.take(), "open 1@70");
    assert_eq!(x.opened(1, 70), "subscribe 1@70 at a");
}

// behaviour: dispatcher-47
#[test]
fn a_creation_cut_off_by_the_end_of_the_write_path_keeps_its_entry() {
    let mut x = Bench::new();
    x.schedule(&a(), ScheduleAction::Create, 1, 1);
    x.core.stop();
    x.take();
    assert_eq!(x.opened(1, 60), "");
    assert_eq!(x.core.journal.len(), 1);
}

#[test]
fn a_creation_that_failed_is_reported_and_may_be_repeated() {
    let mut x = Bench::new();
    x.schedule(&a(), ScheduleAction::Create, 1, 1);
    x.core.on_dispatcher_opened(id(1), Ts(60), Err(fault()), x.now);
    assert_eq!(x.wait(0), "error CDC:ErrSinkUnavailable");
    assert_eq!(x.core.journal.len(), 0);
    assert_eq!(x.schedule(&a(), ScheduleAction::Create, 1, 1), "open 1@60");
}

// behaviour: dispatcher-48
#[test]
fn a_removal_of_nobody_is_confirmed_and_clears_what_a_creation_left() {
    let mut x = Bench::new();
    x.schedule(&a(), ScheduleAction::Create, 1, 1);
    assert_eq!(x.schedule(&a(), ScheduleAction::Remove, 1, 1), "");
    assert_eq!(x.core.journal.len(), 0);
    assert_eq!(x.wait(10), "beat 50/50 seq 0 1:Stopped@0");
    assert_eq!(x.opened(1, 60), "close 1");
}

#[test]
fn a_removal_waits_for_the_flush_and_is_reported_once() {
    let mut x = Bench::new();
    x.working(1);
    assert_eq!(x.arrive(1, rows(&[70])), "write 1");
    assert_eq!(x.schedule(&a(), ScheduleAction::Remove, 1, 1), "unsubscribe 1");
    assert_eq!(x.schedule(&a(), ScheduleAction::Remove, 1, 1), "");
    assert_eq!(x.core.journal.len(), 1);
    assert_eq!(x.beat(), "beat 69/60 seq 1");
    x.core.on_flushed(x.slot(1), x.last_ticket());
    assert_eq!(x.beat(), "close 1; beat 69/60 seq 1 1:Stopped@69");
    assert_eq!(x.core.journal.len(), 0);
    assert_eq!(x.beat(), "beat max/max seq 1");
    assert_eq!(x.schedule(&a(), ScheduleAction::Remove, 1, 1), "");
}

// behaviour: dispatcher-84
#[test]
fn a_removal_does_not_wait_for_a_broken_sink() {
    let mut x = Bench::new();
    x.working(1);
    x.arrive(1, rows(&[70]));
    x.schedule(&a(), ScheduleAction::Remove, 1, 1);
    x.core.on_sink_failed(fault(), x.now);
    assert_eq!(x.beat(), "close 1; beat 69/60 seq 1 1:Stopped@69; error CDC:ErrSinkUnavailable");
}

#[test]
fn the_trigger_may_be_removed_and_created_again() {
    let mut x = Bench::new();
    x.trigger(1);
    assert_eq!(x.schedule(&a(), ScheduleAction::Remove, 1, 1), "unsubscribe 1");
    assert_eq!(x.beat(), "close 1; beat 55/55 seq 1 1:Stopped@55");
    assert_eq!(x.bootstrap(&b(), None, 2), "reply e2 @0 [] []");
}

#[test]
fn streams_begin_again_where_the_new_owner_reads_the_log() {
    let mut x = Bench::new();
    x.working(1);
    x.working(2);
    x.arrive(1, resolved(80));
    x.schedule(&a(), ScheduleAction::Remove, 2, 1);
    x.take();
    x.core.on_bootstrap(&a(), &x.bootstrap_request(None, 2), false);
    assert_eq!(x.take(), "", "the same node reads the same log");
    x.core.on_bootstrap(&b(), &x.bootstrap_request(None, 3), false);
    assert_eq!(x.take(), "unsubscribe 1; subscribe 1@80 at b");
}

// behaviour: dispatcher-15
#[test]
fn a_removal_that_still_runs_is_told_to_the_new_owner() {
    let mut x = Bench::new();
    x.working(1);
    x.working(2);
    x.arrive(1, rows(&[70]));
    x.schedule(&a(), ScheduleAction::Remove, 1, 1);
    x.schedule(&a(), ScheduleAction::Create, 3, 1);
    assert_eq!(x.bootstrap(&b(), None, 2), "reply e2 @0 [1,2] [Remove 1]");
    assert_eq!(x.core.journal.len(), 1);
}

#[test]
fn a_request_that_cannot_be_used_is_dropped() {
    let mut x = Bench::new();
    let mut zero = x.request(ScheduleAction::Create, 1, 1);
    zero.config.dispatcher = DispatcherId::new(0, 0);
    x.core.on_schedule(&a(), zero, x.now);
    let mut redo = x.request(ScheduleAction::Create, 1, 1);
    redo.config.mode = Mode::Redo;
    x.core.on_schedule(&a(), redo, x.now);
    assert_eq!(x.take(), "");
    assert_eq!(x.core.journal.len(), 0);
}

// behaviour: dispatcher-56
#[test]
fn intervals_follow_the_performance_mode() {
    let options = CoreOptions::of(&ReplicaConfig::default(), false);
    assert_eq!(options.heartbeat_interval, Duration::from_millis(200));
    assert_eq!(options.first_heartbeat, Duration::from_secs(1));
    let low = ReplicaConfig { performance_mode: PerformanceMode::LowLatency, ..ReplicaConfig::default() };
    let options = CoreOptions::of(&low, false);
    assert_eq!(options.heartbeat_interval, Duration::from_millis(50));
    assert_eq!(options.first_heartbeat, Duration::ZERO);
}

#[test]
fn heartbeats_begin_with_the_first_dispatcher_and_list_everybody_now_and_then() {
    let mut x = Bench::new();
    assert_eq!(x.wait(60_000), "");
    x.schedule(&a(), ScheduleAction::Create, 1, 1);
    x.opened(1, 60);
    assert_eq!(x.wait(999), "");
    assert_eq!(x.wait(1), "beat 60/60 seq 1 complete", "one that has seen nothing counts, but is not listed");
    assert_eq!(x.arrive(1, resolved(70)), "");
    assert_eq!(x.wait(10), "beat 60/60 seq 1 1:Working@70");
    assert_eq!(x.wait(190), "beat 70/70 seq 1");
    let mut complete = 0;
    for _ in 0..100 {
        complete += u32::from(x.wait(200).contains("1:Working@70 complete"));
    }
    assert_eq!(complete, 2);
}

#[test]
fn a_watermark_counts_every_dispatcher_from_its_creation_on() {
    let mut x = Bench::new();
    x.working(1);
    x.arrive(1, resolved(500));
    x.beat();
    x.schedule(&a(), ScheduleAction::Create, 2, 1);
    x.opened(2, 60);
    x.arrive(2, resolved(61));
    assert_eq!(x.wait(10), "beat 61/500 seq 2 2:Working@61");
    assert_eq!(x.beat(), "beat 61/61 seq 2");
}

#[test]
fn what_could_not_leave_leaves_later() {
    let mut x = Bench::new();
    x.working(1);
    x.schedule(&a(), ScheduleAction::Remove, 1, 1);
    x.beat();
    let unsent =
        x.last(|action| if let Action::HeartBeat(request) = action { Some(request.clone()) } else { None });
    x.core.on_heartbeat_unsent(unsent, x.now);
    assert_eq!(x.wait(10), "beat 60/60 seq 1 1:Stopped@60");
}

// The checks that divide tables live on it: only complete lists carry a rate, of each dispatcher for itself.
#[test]
fn complete_lists_tell_the_measured_rate_of_each_dispatcher() {
    let mut x = Bench::new();
    x.working(1);
    x.working(2);
    let rates = |x: &mut Bench, seconds: u64| {
        x.now += Duration::from_secs(seconds);
        x.core.next_complete = Some(x.now);
        x.core.next_heartbeat = Some(x.now);
        x.wait(0);
        let complete = |action: &Action| {
            let Action::HeartBeat(request) = action else { return None };
            request.complete.then(|| request.clone())
        };
        let beat = x.last(complete);
        let rates: Vec<f32> = beat.statuses.iter().map(|status| status.event_size_per_second).collect();
        (beat, rates)
    };
    rates(&mut x, 10);
    x.arrive(1, rows(&[70, 71, 72]));
    let bytes =
        x.last(|action| if let Action::Write { batch, .. } = action { Some(batch.bytes()) } else { None });
    assert_eq!(rates(&mut x, 10).1, [1.0, 1.0], "what is not durable is not measured");
    x.core.on_flushed(x.slot(1), x.last_ticket());
    let (unsent, measured) = rates(&mut x, 10);
    assert!((f64::from(measured[0]) - bytes as f64 / 10.0).abs() < 0.01, "{measured:?} of {bytes}");
    assert!((measured[1] - 1.0).abs() < f32::EPSILON);
    x.core.on_heartbeat_unsent(unsent, x.now);
    let (_, again) = rates(&mut x, 10);
    assert!((f64::from(again[0]) - bytes as f64 / 20.0).abs() < 0.01, "what nobody heard is not lost");
    assert_eq!(rates(&mut x, 10).1, [1.0, 1.0]);
}

#[test]
fn the_first_error_is_repeated_until_the_manager_is_closed() {
    let mut x = Bench::new();
    x.core.on_sink_failed(fault(), x.now);
    let other = Fault { code: "CDC:ErrOther".into(), ..fault() };
    x.core.on_error(other, x.now);
    assert_eq!(x.wait(0), "error CDC:ErrSinkUnavailable");
    assert_eq!(x.wait(4_999), "");
    assert_eq!(x.wait(1), "error CDC:ErrSinkUnavailable");
    assert_eq!(x.core.life(), Life::Open, "the owner decides");
    x.core.stop();
    x.take();
    assert_eq!(x.wait(60_000), "");
}

#[test]
fn a_waiting_report_is_repeated_until_it_is_acknowledged() {
    let mut x = Bench::new();
    x.working(1);
    x.beat();
    x.core.next_heartbeat = None;
    assert_eq!(x.arrive(1, block(wide(100))), "flush 1");
    x.core.on_flush_finished(x.slot(1), Ok(()), x.now);
    assert_eq!(x.wait(10), "block [1 WAITING 100]");
    assert_eq!(x.wait(4_000), "");
    assert_eq!(x.wait(990), "", "suppressed while the first one has not left");
    let sent =
        x.last(|action| if let Action::BlockStatus(request) = action { Some(request.clone()) } else { None });
    x.core.on_block_statuses_sent(&sent);
    assert_eq!(x.wait(5_000), "");
    assert_eq!(x.wait(10), "block [1 WAITING 100]");
    assert_eq!(x.respond(&a(), 1, ack(100)), "");
    assert_eq!(x.wait(20_000), "");
}

// behaviour: dispatcher-53
#[test]
fn a_barrier_reply_of_an_earlier_owner_reaches_nobody() {
    let mut x = Bench::new();
    x.working(1);
    x.arrive(1, block(wide(100)));
    x.core.on_flush_finished(x.slot(1), Ok(()), x.now);
    x.wait(10);
    x.bootstrap(&b(), None, 2);
    x.take();
    assert_eq!(x.respond(&a(), 1, act(BlockAction::Write, 100)), "");
    assert_eq!(x.respond(&b(), 1, act(BlockAction::Write, 100)), "");
    assert_eq!(x.respond(&b(), 2, act(BlockAction::Write, 100)), "execute 100");
}

fn to(influenced: Option<InfluencedDispatchers>) -> DispatcherStatus {
    DispatcherStatus { influenced, ..act(BlockAction::Pass, 100) }
}

#[test]
fn a_barrier_reply_reaches_exactly_those_it_is_for() {
    let mut x = Bench::new();
    x.trigger(9);
    for n in 1..=3 {
        x.working(n);
    }
    for n in [1, 2, 3, 9] {
        x.arrive(n, block(wide(100)));
        x.core.on_flush_finished(x.slot(n), Ok(()), x.now);
    }
    x.core.next_heartbeat = None;
    x.wait(10);
    let done = |x: &mut Bench, status: DispatcherStatus| {
        x.respond(&a(), 1, status);
        let actions = x.wait(10);
        [1u64, 2, 3, 9].into_iter().filter(|n| actions.contains(&format!("{n} DONE"))).collect::<Vec<_>>()
    };
    assert_eq!(done(&mut x, to(None)), Vec::<u64>::new());
    assert_eq!(done(&mut x, to(Some(InfluencedDispatchers::Normal(vec![id(2), id(77)])))), vec![2]);
    let schema = InfluencedDispatchers::Schema { schema: SchemaId(1), except: Some(id(1)) };
    x.core.blocks.clear();
    let reached = done(&mut x, to(Some(schema)));
    assert_eq!(
        reached,
        vec![2, 3, 9],
        "those that are done say so again; the trigger belongs to every schema"
    );
    x.core.blocks.clear();
    assert_eq!(done(&mut x, to(Some(InfluencedDispatchers::All { except: Some(id(3)) }))), vec![1, 2, 9]);
}

#[test]
fn a_dispatcher_hears_replies_only_between_its_first_event_and_its_end() {
    let mut x = Bench::new();
    x.schedule(&a(), ScheduleAction::Create, 1, 1);
    x.opened(1, 60);
    let all = DispatcherStatus {
        influenced: Some(InfluencedDispatchers::All { except: None }),
        ..act(BlockAction::Pass, 50)
    };
    x.respond(&a(), 1, all.clone());
    assert_eq!(x.core.waiting_block_statuses(), 0);
    x.arrive(1, resolved(60));
    x.respond(&a(), 1, all.clone());
    assert_eq!(x.core.waiting_block_statuses(), 1);
    x.core.blocks.clear();
    x.schedule(&a(), ScheduleAction::Remove, 1, 1);
    x.respond(&a(), 1, all);
    assert_eq!(x.core.waiting_block_statuses(), 0);
}

#[test]
fn a_rename_changes_who_hears_a_schema_barrier() {
    let mut x = Bench::new();
    x.working(1);
    x.working(2);
    let change =
        heartbeatpb::SchemaChange { table: heartbeatpb::TableId(1), old: SchemaId(1), new: SchemaId(2) };
    x.arrive(1, block(event::DdlEvent { schema_changes: vec![change], ..ddl(100) }));
    assert_eq!(x.core.dispatchers.of_schema(SchemaId(1)), vec![x.slot(2)]);
    assert_eq!(x.core.dispatchers.of_schema(SchemaId(2)), vec![x.slot(1)]);
}

// behaviour: dispatcher-78
#[test]
fn a_slow_ddl_of_one_dispatcher_delays_no_other() {
    let mut x = Bench::new();
    x.working(1);
    x.working(2);
    assert_eq!(x.arrive(1, block(ddl(100))), "flush 1");
    x.core.on_flush_finished(x.slot(1), Ok(()), x.now);
    assert_eq!(x.take(), "execute 100");
    assert_eq!(x.arrive(2, block(ddl(101))), "flush 2");
    x.core.on_flush_finished(x.slot(2), Ok(()), x.now);
    assert_eq!(x.take(), "execute 101");
    x.core.on_block_written(x.slot(2), Ok(()), x.now);
    assert_eq!(x.arrive(2, rows(&[110])), "write 2");
    assert_eq!(x.arrive(1, rows(&[110])), "");
}

// behaviour: dispatcher-77
#[test]
fn the_trigger_holds_a_wide_barrier_until_the_owner_knows_its_tables() {
    let mut x = Bench::new();
    x.trigger(9);
    x.core.next_heartbeat = None;
    x.arrive(9, Arrival::Block(BlockEvent::Ddl(std::sync::Arc::new(adding(100, &[5])))));
    x.core.on_flush_finished(x.slot(9), Ok(()), x.now);
    assert_eq!(x.take(), "execute 100");
    x.core.on_block_written(x.slot(9), Ok(()), x.now);
    assert_eq!(x.arrive(9, block(wide(110))), "");
    assert_eq!(x.wait(10), "block [9 NONE 100 +5]");
    assert_eq!(x.respond(&a(), 1, ack(100)), "flush 9");
    x.core.on_flush_finished(x.slot(9), Ok(()), x.now);
    assert_eq!(x.wait(10), "block [9 WAITING 110]");
}

#[test]
fn a_barrier_in_flight_is_told_to_a_new_owner() {
    let mut x = Bench::new();
    x.working(1);
    x.arrive(1, block(wide(100)));
    x.core.on_flush_finished(x.slot(1), Ok(()), x.now);
    let BootstrapStep::Reply(response) = x.core.on_bootstrap(&b(), &x.bootstrap_request(None, 2), false)
    else {
        panic!("allowed");
    };
    let span = &response.spans[0];
    assert_eq!((span.id, span.state, span.checkpoint), (id(1), ComponentState::Working, Ts(60)));
    assert_eq!(span.block.as_ref().map(|block| block.stage), Some(BlockStage::Waiting));
    assert_eq!(response.epoch, epoch(2));
}

// behaviour: dispatcher-44
#[test]
fn checkpoints_reach_the_sink_from_the_owner_only_and_never_go_back() {
    let mut x = Bench::new();
    let request = x.bootstrap_request(Some(1), 1);
    x.core.on_bootstrap(&a(), &request, true);
    x.opened(1, 50);
    assert_eq!(x.checkpoint_message(&a(), 70), "", "dropped before the trigger is registered");
    assert!(matches!(x.post_bootstrap(&a(), 1, 1), PostBootstrapStep::Reply(_)));
    x.take();
    assert_eq!(x.checkpoint_message(&b(), 70), "");
    assert_eq!(x.checkpoint_message(&a(), 70), "publish 70");
    assert_eq!(x.checkpoint_message(&a(), 60), "");
    assert_eq!(x.checkpoint_message(&a(), 70), "");
    assert_eq!(x.checkpoint_message(&a(), 80), "publish 80");
    x.core.stop();
    x.take();
    assert_eq!(x.checkpoint_message(&a(), 90), "");
}

#[test]
fn large_transactions_tell_the_log_how_far_they_are_durable() {
    let mut x = Bench::new();
    x.working(1);
    x.arrive(1, rows(&[100; 5000]));
    x.core.on_flushed(x.slot(1), x.last_ticket());
    assert_eq!(x.beat(), "copied 1 100+5000; beat 99/60 seq 1");
    assert_eq!(x.beat(), "beat 99/60 seq 1");
}

#[test]
fn an_event_for_nobody_is_dropped() {
    let mut x = Bench::new();
    assert_eq!(x.arrive(5, rows(&[100])), "");
}
