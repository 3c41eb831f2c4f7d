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

mod barriers;
mod cost;
mod heartbeats;
mod merging;
mod ownership;
mod schedule;
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
