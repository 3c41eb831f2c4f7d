//! A core with a store that does at once what it is told, and the words in which histories are written.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use coordinator::core::{Action, Command, Core, OpId, Reply, Write};
use coordinator::drain::DrainDoc;
use coordinator::meta::{CheckpointWrite, Stored};
use coordinator::{CoordinatorConfig, Error};
use expect_test::Expect;
use heartbeatpb::config::{
    ChangefeedInfo, ChangefeedState, ChangefeedStatusDoc, Progress, ReplicaConfig, UpstreamInfo,
};
use heartbeatpb::{
    ChangefeedId, ComponentState, CoordinatorBootstrapResponse, Gid, MaintainerEpoch, MaintainerStatus,
    NodeId, RunningError, Ts,
};
use messaging::{ToCoordinator, ToMaintainerManager};

/// A core, the time, and a store that does at once what it is told.
pub(crate) struct World {
    pub(crate) core: Core,
    pub(crate) now: Instant,
    /// Documents by changefeed, as a store would hold them.
    pub(crate) disk: Vec<Stored>,
    /// Writes under way that the test has yet to let happen.
    pub(crate) pending: Vec<(ChangefeedId, Write)>,
    /// What is stored about drains.
    pub(crate) drain: Option<DrainDoc>,
    /// A write of it that the test has yet to let happen.
    pub(crate) pending_drain: Option<DrainDoc>,
    /// It waits for `settle_drain` while set.
    pub(crate) held_drain: bool,
    /// Writes fail with a lost connection while set.
    pub(crate) failing: bool,
    /// Writes wait for `settle` while set.
    pub(crate) held: bool,
    /// Nodes that answered; that they are asked again when they are silent is not logged.
    pub(crate) answered: BTreeSet<NodeId>,
    pub(crate) log: Vec<String>,
    pub(crate) next_op: u64,
}

pub(crate) fn id(name: &str) -> ChangefeedId {
    let low = name.bytes().fold(1, |sum, byte| sum * 31 + u64::from(byte));
    ChangefeedId { gid: Gid::new(0, low), name: name.into(), keyspace: "default".into() }
}

pub(crate) fn doc(name: &str, state: ChangefeedState, epoch: u64, progress: Progress) -> Stored {
    let mut info = ChangefeedInfo::new(
        id(name),
        UpstreamInfo::default(),
        "blackhole://",
        ReplicaConfig::default(),
        Ts(10),
    );
    info.state = state;
    info.epoch = MaintainerEpoch::from_wire(epoch);
    let mut status = ChangefeedStatusDoc::at(Ts(100), info.epoch);
    status.progress = progress;
    Stored { info, status }
}

pub(crate) fn report(name: &str, epoch: u64, state: ComponentState, checkpoint: u64) -> MaintainerStatus {
    MaintainerStatus {
        changefeed: id(name),
        feed_state: "normal".to_owned(),
        state,
        checkpoint: Ts(checkpoint),
        errors: Vec::new(),
        bootstrap_done: true,
        last_synced: Ts(checkpoint),
        drain: None,
        epoch: MaintainerEpoch::from_wire(epoch),
        checkpoint_time: None,
        trouble: None,
    }
}

pub(crate) fn working(name: &str, epoch: u64, checkpoint: u64) -> MaintainerStatus {
    report(name, epoch, ComponentState::Working, checkpoint)
}

pub(crate) fn stopped(name: &str, epoch: u64) -> MaintainerStatus {
    report(name, epoch, ComponentState::Stopped, 0)
}

pub(crate) fn erring(name: &str, epoch: u64, checkpoint: u64, code: &str) -> MaintainerStatus {
    let error = RunningError {
        time: "2026-03-01T08:00:00Z".to_owned(),
        node: "n1".to_owned(),
        code: code.to_owned(),
        message: "it broke".to_owned(),
    };
    MaintainerStatus { errors: vec![error], ..working(name, epoch, checkpoint) }
}

pub(crate) fn answer(statuses: Vec<MaintainerStatus>) -> ToCoordinator {
    ToCoordinator::BootstrapResponse(CoordinatorBootstrapResponse {
        statuses,
        drain_protocol_version: 1,
        drain_target: None,
        drain_epoch: 0,
    })
}

impl World {
    pub(crate) fn new(disk: Vec<Stored>) -> Self {
        Self {
            core: Core::new("n1".into(), 7, CoordinatorConfig::default()),
            now: Instant::now(),
            disk,
            pending: Vec::new(),
            drain: None,
            pending_drain: None,
            held_drain: false,
            failing: false,
            held: false,
            answered: BTreeSet::new(),
            log: Vec::new(),
            next_op: 0,
        }
    }

    /// A world whose coordinator runs `disk` on `nodes`, each reporting what is given for it.
    pub(crate) fn started(disk: Vec<Stored>, nodes: &[(&str, Vec<MaintainerStatus>)]) -> Self {
        let mut world = Self::new(disk);
        world.nodes(&nodes.iter().map(|(node, _)| *node).collect::<Vec<_>>());
        let loaded = world.disk.clone();
        let actions = world.core.on_loaded(loaded, world.now);
        world.perform(actions);
        world.log.clear();
        for (node, statuses) in nodes {
            world.hear(node, answer(statuses.clone()));
        }
        world
    }

    pub(crate) fn nodes(&mut self, nodes: &[&str]) {
        let alive: BTreeSet<NodeId> = nodes.iter().map(|node| NodeId::from(*node)).collect();
        let actions = self.core.on_nodes(alive, self.now);
        self.perform(actions);
    }

    pub(crate) fn hear(&mut self, from: &str, message: ToCoordinator) {
        if matches!(message, ToCoordinator::BootstrapResponse(_)) {
            self.answered.insert(from.into());
        }
        let actions = self.core.on_message(&from.into(), message, self.now);
        self.perform(actions);
    }

    pub(crate) fn beat(&mut self, from: &str, status: MaintainerStatus) {
        self.hear(from, ToCoordinator::MaintainerHeartbeat(vec![status]));
    }

    pub(crate) fn tick(&mut self, millis: u64) {
        self.now += Duration::from_millis(millis);
        let actions = self.core.on_tick(self.now);
        self.perform(actions);
    }

    pub(crate) fn ask(&mut self, command: Command) -> u64 {
        self.next_op += 1;
        let actions = self.core.on_command(OpId(self.next_op), command, self.now);
        self.perform(actions);
        self.next_op
    }

    pub(crate) fn pause(&mut self, name: &str) {
        self.ask(Command::Pause { keyspace: "default".to_owned(), name: name.to_owned() });
    }

    pub(crate) fn resume(&mut self, name: &str, overwrite: Option<u64>) {
        let overwrite = overwrite.map(Ts);
        self.ask(Command::Resume { keyspace: "default".to_owned(), name: name.to_owned(), overwrite });
    }

    pub(crate) fn remove(&mut self, name: &str) {
        self.ask(Command::Remove { keyspace: "default".to_owned(), name: name.to_owned() });
    }

    pub(crate) fn stored(&mut self, id: &ChangefeedId) -> Option<&mut Stored> {
        self.disk.iter_mut().find(|stored| stored.info.id == *id)
    }

    pub(crate) fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Send { to, message: ToMaintainerManager::CoordinatorBootstrap(_) }
                    if self.answered.contains(&to) => {}
                Action::Send { to, message } => self.log.push(format!("{to}: {}", show(&message))),
                Action::Write { id, write } => {
                    if self.held {
                        self.log.push(format!("begin {}", name_of(&write)));
                    }
                    self.pending.push((id, write));
                }
                Action::WriteDrain(doc) => self.pending_drain = Some(doc),
                Action::SaveCheckpoints(writes) => {
                    let shown: Vec<String> = writes
                        .iter()
                        .map(|write| format!("{}@{}", write.id.name, write.checkpoint))
                        .collect();
                    self.log.push(format!("save {}", shown.join(" ")));
                    let durable = if self.failing { Vec::new() } else { self.save(&writes) };
                    let actions = self.core.on_checkpoints_saved(&durable, self.now);
                    self.perform(actions);
                }
                Action::Reply { op, result } => {
                    self.log.push(format!("reply {}: {}", op.0, show_reply(&result)))
                }
                Action::Count { .. } => {}
            }
        }
        if !self.held {
            self.settle();
        }
        if !self.held_drain {
            self.settle_drain();
        }
    }

    pub(crate) fn save(&mut self, writes: &[CheckpointWrite]) -> Vec<CheckpointWrite> {
        for write in writes {
            if let Some(stored) = self.stored(&write.id) {
                stored.status.checkpoint_ts = write.checkpoint;
            }
        }
        writes.to_vec()
    }

    /// Lets the write of the document of drains happen.
    pub(crate) fn settle_drain(&mut self) {
        let Some(doc) = self.pending_drain.take() else { return };
        let result = if self.failing {
            Err(Error::Conflict("drain".to_owned()))
        } else {
            self.drain = Some(doc);
            Ok(())
        };
        let actions = self.core.on_drain_written(result, self.now);
        self.perform(actions);
    }

    /// Lets every write under way happen.
    pub(crate) fn settle(&mut self) {
        while !self.pending.is_empty() {
            let (id, write) = self.pending.remove(0);
            let result = if self.failing {
                self.log.push(format!("lost {}", name_of(&write)));
                Err(Error::Conflict(id.to_string()))
            } else {
                self.log.push(format!("wrote {}", name_of(&write)));
                self.write(&id, &write)
            };
            let actions = self.core.on_written(&id, result, self.now);
            self.perform(actions);
        }
    }

    pub(crate) fn write(&mut self, id: &ChangefeedId, write: &Write) -> Result<Option<Stored>, Error> {
        if let Write::Create { info } = write {
            let status = ChangefeedStatusDoc::at(info.start_ts, info.epoch);
            self.disk.push(Stored { info: (**info).clone(), status });
        }
        if matches!(write, Write::Delete) {
            self.disk.retain(|stored| stored.info.id != *id);
            return Ok(None);
        }
        let stored = self.stored(id).ok_or_else(|| Error::NotExists(id.to_string()))?;
        let bump = |stored: &mut Stored| stored.info.epoch = MaintainerEpoch::next(stored.info.epoch, 0);
        match write {
            Write::BumpForAdd { .. } | Write::BumpForMove { .. } => bump(stored),
            Write::BumpForRestart { error } => {
                bump(stored);
                stored.info.state = ChangefeedState::Warning;
                stored.info.error = Some(error.clone());
            }
            Write::State { state, error } => {
                stored.info.state = *state;
                stored.info.error.clone_from(error);
                let ends = if state.should_run() { Progress::None } else { Progress::Stopping };
                set_progress(stored, ends);
            }
            Write::Pause { .. } => {
                stored.info.state = ChangefeedState::Stopped;
                set_progress(stored, Progress::Stopping);
            }
            Write::Resume { overwrite, known, .. } => {
                if !stored.info.state.is_resumable() && stored.info.epoch <= *known {
                    return Err(Error::UpdateRefused {
                        name: id.to_string(),
                        state: stored.info.state.to_string(),
                        what: "only a stopped, failed or finished changefeed can be resumed",
                    });
                }
                bump(stored);
                stored.status.epoch = stored.info.epoch;
                stored.info.state = ChangefeedState::Normal;
                stored.info.error = None;
                stored.status.progress = Progress::None;
                stored.status.checkpoint_ts = overwrite.unwrap_or(stored.status.checkpoint_ts);
            }
            Write::Update { info, .. } => stored.info.sink_uri.clone_from(&info.sink_uri),
            Write::Removing { .. } => stored.status.progress = Progress::Removing,
            Write::StopDone { last } => {
                if let Some(last) = last.as_ref().filter(|last| last.epoch >= stored.status.epoch) {
                    stored.status.checkpoint_ts = stored.status.checkpoint_ts.max(last.checkpoint);
                    stored.status.epoch = last.epoch;
                }
                set_progress(stored, Progress::None);
            }
            Write::Create { .. } | Write::DropRetention { .. } | Write::Delete => {}
        }
        Ok(Some(stored.clone()))
    }

    /// Compares what happened since the last time.
    pub(crate) fn expect(&mut self, expected: &Expect) {
        let shown = std::mem::take(&mut self.log).join("\n");
        expected.assert_eq(&shown);
    }

    pub(crate) fn table(&self) -> String {
        let shown = |view: &coordinator::ChangefeedView| {
            let node = view.node.as_ref().map_or("-", |node| node.as_str());
            let state = view.info.state;
            format!("{} {state} {:?} {node} saved={}", view.info.id.name, view.group, view.saved_checkpoint)
        };
        self.core.views(None, self.now).iter().map(shown).collect::<Vec<_>>().join("\n")
    }
}

/// An intent to remove is taken back by nothing.
fn set_progress(stored: &mut Stored, progress: Progress) {
    if stored.status.progress != Progress::Removing {
        stored.status.progress = progress;
    }
}

pub(crate) fn name_of(write: &Write) -> String {
    match write {
        Write::Create { .. } => "create".to_owned(),
        Write::BumpForAdd { dest } => format!("bump for {dest}"),
        Write::BumpForMove { origin, dest } => format!("bump for {origin} to {dest}"),
        Write::BumpForRestart { error } => format!("bump with warning {}", error.code),
        Write::State { state, .. } => format!("state {state}"),
        Write::Pause { .. } => "pause".to_owned(),
        Write::Resume { .. } => "resume".to_owned(),
        Write::Update { .. } => "update".to_owned(),
        Write::Removing { .. } => "removing".to_owned(),
        Write::StopDone { .. } => "stop done".to_owned(),
        Write::DropRetention { .. } => "drop retention".to_owned(),
        Write::Delete => "delete".to_owned(),
    }
}

pub(crate) fn show(message: &ToMaintainerManager) -> String {
    let epoch = MaintainerEpoch::to_wire;
    match message {
        ToMaintainerManager::CoordinatorBootstrap(request) => format!("Bootstrap v{}", request.version),
        ToMaintainerManager::AddMaintainer(add) => {
            let new = if add.is_new { " new" } else { "" };
            format!("Add {} epoch {} at {}{new}", add.changefeed.name, epoch(add.epoch), add.checkpoint)
        }
        ToMaintainerManager::RemoveMaintainer(remove) => {
            let cascade = if remove.cascade { " cascade" } else { "" };
            let removed = if remove.removed { " removed" } else { "" };
            format!("Remove {} epoch {}{cascade}{removed}", remove.changefeed.name, epoch(remove.epoch))
        }
        ToMaintainerManager::CheckpointTs(message) => {
            format!("Checkpoint {} {}", message.changefeed.name, message.checkpoint)
        }
        ToMaintainerManager::SetNodeLiveness(request) => {
            format!("Liveness {:?} epoch {}", request.target, request.node_epoch)
        }
        ToMaintainerManager::SetDrainTarget(request) => {
            let target = request.target.as_ref().map_or("-", |node| node.as_str());
            format!("Target {target} epoch {}", request.epoch)
        }
        other @ (ToMaintainerManager::HeartBeat(_)
        | ToMaintainerManager::BlockStatus(_)
        | ToMaintainerManager::BootstrapResponse(_)
        | ToMaintainerManager::PostBootstrapResponse(_)) => format!("{other:?}"),
    }
}

pub(crate) fn show_reply(result: &Result<Reply, Error>) -> String {
    match result {
        Ok(Reply::Info(info)) => {
            format!("info {} epoch {}", info.id.name, MaintainerEpoch::to_wire(info.epoch))
        }
        Ok(Reply::Checkpoint(checkpoint)) => format!("checkpoint {checkpoint}"),
        Ok(Reply::One(view)) => format!("one {}", view.info.id.name),
        Ok(Reply::Drain(view)) => format!("remaining {}", view.remaining),
        Ok(Reply::Done) => "done".to_owned(),
        Ok(Reply::Many(views)) => format!("many {}", views.len()),
        Err(error) => error.code().to_owned(),
    }
}

pub(crate) const NORMAL: ChangefeedState = ChangefeedState::Normal;

pub(crate) fn running() -> World {
    let mut world =
        World::started(vec![doc("a", NORMAL, 5, Progress::None)], &[("n1", vec![working("a", 5, 100)])]);
    world.log.clear();
    world.tick(500);
    world.log.clear();
    world
}

impl World {
    /// Lets the oldest write under way happen, and no other.
    pub(crate) fn settle_one(&mut self) {
        let (id, write) = self.pending.remove(0);
        let result = self.write(&id, &write);
        let actions = self.core.on_written(&id, result, self.now);
        self.perform(actions);
    }
}

impl World {
    /// The nodes do at once what the commands of the log say.
    pub(crate) fn obey(&mut self) {
        for line in std::mem::take(&mut self.log) {
            let Some((node, command)) = line.split_once(": ") else { continue };
            let words: Vec<&str> = command.split(' ').collect();
            let epoch = |at: usize| words.get(at).and_then(|word| word.parse().ok()).unwrap_or(0);
            match words.first() {
                Some(&"Add") => self.beat(node, working(words[1], epoch(3), epoch(5))),
                Some(&"Remove") => self.beat(node, stopped(words[1], epoch(3))),
                Some(_) | None => {}
            }
        }
    }
}

impl World {
    pub(crate) fn create(&mut self, name: &str) {
        let info = Box::new(doc(name, NORMAL, 0, Progress::None).info);
        self.log.clear();
        self.ask(Command::Create { info, candidate: 9 });
    }

    /// The nodes that were told to start a maintainer since the last time.
    pub(crate) fn placed(&mut self) -> Vec<String> {
        let node = |line: &String| line.split_once(": Add ").map(|(node, _)| node.to_owned());
        std::mem::take(&mut self.log).iter().filter_map(node).collect()
    }
}
