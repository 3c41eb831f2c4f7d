//! Tables of a changefeed that are copied again while the others go on: carries out what the downstream keeps requests for.
//!
//! One task beside each log reader. The requests are durable downstream ([`event::Resync`]), and what answers one commits with
//! the rows; so this task knows nothing that has to survive it. It ends with its reader, and the next one begins with the
//! requests that are left.
//!
//! A table that comes to a running changefeed with rows is copied in the same way, and until that is done nothing of it is
//! served ([`Entrance`]). Which tables those are is not known before the downstream has told: until then all are held.
//!
//! ```text
//!   requests ──► the oldest that waits ──► copied ──► the next one
//!      ▲              │ fails: again after a pause, and others meanwhile
//!      │              └ a person must look: noted downstream as failed
//!      └── looked at when the reader starts, when somebody asks or changes one, and after each
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use event::{CopyError, CopyTarget, Resync, ResyncChange, ResyncState};
use heartbeatpb::{TableId, codes};
use logservice::event_store::Gate;
use logservice::upstream::{Entrance, FeedSpec, ReaderPhase, ReaderProgress, Upstream};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::http::{ApiFailure, time_text};

/// Pause after the first failure of a request, and the longest one; each is twice as long as the one before.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How long a schema change may wait for a table that comes.
const DELAY: Duration = Duration::from_secs(1);
/// Between two looks at whether the log is read.
const LOOK: Duration = Duration::from_millis(200);

impl From<CopyError> for ApiFailure {
    fn from(error: CopyError) -> Self {
        ApiFailure::new(error.code, error.message)
    }
}

/// What a request is carried out with.
pub(crate) struct Means {
    pub(crate) upstream: Arc<dyn Upstream>,
    pub(crate) spec: FeedSpec,
    pub(crate) gate: Gate,
    /// Of the log reader.
    pub(crate) reader: Arc<ReaderProgress>,
}

/// The table that is being copied.
struct Running {
    table: TableId,
    progress: Arc<ReaderProgress>,
    stop: CancellationToken,
}

/// Why the last attempt at a request failed, and when the next one is due.
struct Problem {
    code: &'static str,
    message: String,
    pause: Duration,
    due: Instant,
}

#[derive(Default)]
struct State {
    running: Option<Running>,
    problems: BTreeMap<TableId, Problem>,
}

/// The requests of a changefeed whose log is read here.
pub(crate) struct Resyncs {
    target: Option<Arc<dyn CopyTarget>>,
    gate: Option<Gate>,
    /// Whoever asks for a table that comes, or looks which ones are coming: one at a time.
    turn: tokio::sync::Mutex<()>,
    state: Mutex<State>,
    /// Somebody has asked or changed something.
    changed: Notify,
}

impl Resyncs {
    /// Those of a downstream; `None` of one that takes existing rows in the stream. Holds all tables until
    /// [`Resyncs::run`] has heard from the downstream.
    pub(crate) fn new(target: Option<Arc<dyn CopyTarget>>, gate: Option<Gate>) -> Self {
        if let (Some(_), Some(gate)) = (&target, &gate) {
            gate.hold_all();
        }
        Self {
            target,
            gate,
            turn: tokio::sync::Mutex::default(),
            state: Mutex::default(),
            changed: Notify::new(),
        }
    }

    /// All requests, oldest first.
    pub(crate) async fn all(&self) -> Result<Vec<Resync>, ApiFailure> {
        let unable = || {
            ApiFailure::invalid(
                "tables of this changefeed cannot be copied again: only a PostgreSQL target takes them, and not with \
                 on-existing-rows=append",
            )
        };
        let target = self.target.as_ref().ok_or_else(unable)?;
        let all = target.resyncs().await?.ok_or_else(unable)?;
        // Whoever carries them out may know less.
        self.changed.notify_one();
        Ok(all)
    }

    /// Changes one, durably. False: there is none in a state that allows it.
    pub(crate) async fn change(&self, table: TableId, change: &ResyncChange) -> Result<bool, ApiFailure> {
        let Some(target) = &self.target else { return Ok(false) };
        let changed = target.change_resync(table, change).await?;
        let mut state = self.state.lock();
        state.problems.remove(&table);
        if let Some(running) = state.running.as_ref().filter(|running| running.table == table && changed) {
            // It could not commit any more.
            running.stop.cancel();
        }
        drop(state);
        if let (ResyncChange::Cancel, Some(gate)) = (change, &self.gate) {
            gate.forget(table);
        }
        self.changed.notify_one();
        Ok(changed)
    }

    /// Somebody has asked for something of which this may not know.
    pub(crate) fn look(&self) {
        self.changed.notify_one();
    }

    /// A request for people.
    pub(crate) fn shown(&self, resync: &Resync) -> Value {
        let state = self.state.lock();
        let is_waiting = resync.state == ResyncState::Waiting;
        let running = state.running.as_ref().filter(|running| is_waiting && running.table == resync.table);
        let problem = state.problems.get(&resync.table).filter(|_| is_waiting);
        let error = |code: &str, message: &str| json!({ "code": code, "message": message });
        let failed = resync.error.as_ref().map(|(code, message)| error(code, message));
        let mut value = json!({
            "table_id": resync.table,
            "table": resync.name,
            "state": if running.is_some() { "copying" } else { resync.state.name() },
            "entering": resync.entering,
            "asked": time_text(Some(resync.asked)),
            "ended": time_text(resync.ended),
            "rows": resync.rows,
            "error": failed.or_else(|| problem.map(|problem| error(problem.code, &problem.message))),
        });
        if let Some(running) = running {
            running.add_to(&mut value);
        }
        value
    }

    /// Tables that have come and are not copied yet, whatever keeps them from that.
    pub(crate) fn entering(&self) -> Vec<TableId> {
        self.gate.as_ref().map(Gate::kept).unwrap_or_default()
    }

    /// The one that is being carried out; `null` when there is none.
    pub(crate) fn view(&self) -> Value {
        let state = self.state.lock();
        let Some(running) = &state.running else { return Value::Null };
        let mut value = json!({ "table_id": running.table, "state": "copying" });
        running.add_to(&mut value);
        value
    }

    /// Carries requests out until `shutdown`. What is under way then is ended in an orderly way, which may take seconds.
    pub(crate) async fn run(&self, means: Means, shutdown: CancellationToken) {
        let Some(target) = &self.target else { return };
        tokio::select! {
            () = self.begin(&means, &**target) => {}
            () = shutdown.cancelled() => return,
        }
        loop {
            let next = tokio::select! {
                next = self.next(&means, &**target) => next,
                () = shutdown.cancelled() => return,
            };
            let Some(table) = next else { return };
            self.carry_out(&means, &**target, table, &shutdown).await;
        }
    }

    /// Lets all tables go but those whose rows are missing.
    async fn begin(&self, means: &Means, target: &dyn CopyTarget) {
        let Some(gate) = &self.gate else { return };
        let _turn = self.turn.lock().await;
        let all = read(means, target).await.unwrap_or_default();
        gate.release_but(&entering(&all));
    }

    /// The next one that is due, however long that takes. `None`: there will never be one.
    async fn next(&self, means: &Means, target: &dyn CopyTarget) -> Option<TableId> {
        loop {
            let turn = self.turn.lock().await;
            let all = read(means, target).await?;
            if let Some(gate) = &self.gate {
                // Those that are done, or withdrawn by somebody else.
                let entering = entering(&all);
                let kept = gate.kept();
                kept.into_iter()
                    .filter(|table| !entering.contains(table))
                    .for_each(|table| gate.forget(table));
            }
            drop(turn);
            self.pass(means, target).await;
            match self.choose(&all, Instant::now()) {
                Choice::Table(table) => return Some(table),
                Choice::Later(wait) => self.rest(Some(wait)).await,
                Choice::Nothing => self.rest(None).await,
            }
        }
    }

    /// Waits until something is asked for or changed, for so long at most, or until a schema change waits for a table that
    /// comes.
    async fn rest(&self, longest: Option<Duration>) {
        let begun = Instant::now();
        loop {
            let left = longest.map(|longest| longest.saturating_sub(begun.elapsed()));
            let comes = self.gate.as_ref().is_some_and(|gate| !gate.kept().is_empty());
            let pause = left.into_iter().chain(comes.then_some(DELAY)).min();
            let Some(pause) = pause else { return self.changed.notified().await };
            let told = tokio::time::timeout(pause, self.changed.notified()).await.is_ok();
            let delays = self.gate.as_ref().is_some_and(|gate| !gate.delaying().is_empty());
            if told || delays || left.is_some_and(|left| left <= pause) {
                return;
            }
        }
    }

    /// Lets schema changes pass that wait for tables whose rows nobody has copied: what is before them will be in the copy.
    async fn pass(&self, means: &Means, target: &dyn CopyTarget) {
        let Some(gate) = &self.gate else { return };
        for (table, until) in gate.delaying() {
            match target.change_resync(table, &ResyncChange::LeaveOut { until }).await {
                Ok(true) => gate.pass(table, until),
                // It was withdrawn.
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(changefeedID = %means.spec.changefeed, errorCode = error.code, %error,
                        "a schema change waits for a table that is not copied yet");
                    tokio::time::sleep(FIRST_PAUSE).await;
                }
            }
        }
    }

    fn choose(&self, all: &[Resync], now: Instant) -> Choice {
        let mut state = self.state.lock();
        let waiting: Vec<TableId> =
            all.iter().filter(|one| one.state == ResyncState::Waiting).map(|one| one.table).collect();
        state.problems.retain(|table, _| waiting.contains(table));
        let due = |table: &&TableId| state.problems.get(table).is_none_or(|problem| problem.due <= now);
        if let Some(table) = waiting.iter().find(due) {
            return Choice::Table(*table);
        }
        let next = state.problems.values().map(|problem| problem.due).min();
        next.map_or(Choice::Nothing, |due| Choice::Later(due.saturating_duration_since(now)))
    }

    async fn carry_out(
        &self,
        means: &Means,
        target: &dyn CopyTarget,
        table: TableId,
        shutdown: &CancellationToken,
    ) {
        let stop = shutdown.child_token();
        let progress = Arc::new(ReaderProgress::default());
        let running = Running { table, progress: Arc::clone(&progress), stop: stop.clone() };
        self.state.lock().running = Some(running);
        let result = match streaming(&means.reader, &stop).await {
            true => means.upstream.resync(&means.spec, table, &means.gate, &progress, &stop).await,
            false => Ok(()),
        };
        self.state.lock().running = None;
        let Err(error) = result else { return };
        if stop.is_cancelled() {
            return;
        }
        // A session of ours that was fenced has a successor: another one of this node, or that of another maintainer, with
        // which this task ends.
        let passes = error.is_retryable() || error.code() == codes::SINK_FENCED;
        tracing::warn!(changefeedID = %means.spec.changefeed, tableID = %table, errorCode = error.code(),
            error = error.chain(), again = passes, "a table was not copied again");
        if !passes {
            let change = ResyncChange::Fail { code: error.code().to_owned(), message: error.chain() };
            if target.change_resync(table, &change).await.is_ok() {
                return;
            }
        }
        let mut state = self.state.lock();
        let pause =
            state.problems.get(&table).map_or(FIRST_PAUSE, |before| (before.pause * 2).min(LONGEST_PAUSE));
        let (code, message, due) = (error.code(), error.chain(), Instant::now() + pause);
        state.problems.insert(table, Problem { code, message, pause, due });
    }
}

#[async_trait]
impl Entrance for Resyncs {
    async fn enter(&self, table: TableId, name: &str) -> Result<bool, logservice::Error> {
        let (Some(target), Some(gate)) = (&self.target, &self.gate) else { return Ok(false) };
        let _turn = self.turn.lock().await;
        let Some(all) = target.resyncs().await? else { return Ok(false) };
        gate.keep(table);
        if !entering(&all).contains(&table) {
            let change = ResyncChange::Ask { name: name.to_owned(), entering: true };
            // One that waits or rests is done before as well.
            target.change_resync(table, &change).await?;
        }
        self.changed.notify_one();
        Ok(true)
    }
}

/// All requests, as soon as the downstream answers.
async fn read(means: &Means, target: &dyn CopyTarget) -> Option<Vec<Resync>> {
    let mut pause = FIRST_PAUSE;
    loop {
        match target.resyncs().await {
            Ok(all) => return all,
            Err(error) => {
                tracing::warn!(changefeedID = %means.spec.changefeed, errorCode = error.code, %error,
                    "cannot read in the target which tables are to be copied");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

/// Tables of which nothing may be applied.
fn entering(all: &[Resync]) -> Vec<TableId> {
    all.iter().filter(|one| one.entering).map(|one| one.table).collect()
}

/// Waits until the log is followed: before that nobody knows the tables, or all of them are being copied. False: told to
/// stop before.
async fn streaming(reader: &ReaderProgress, stop: &CancellationToken) -> bool {
    while !matches!(reader.phase(), ReaderPhase::Streaming | ReaderPhase::WaitingForRoom) {
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = stop.cancelled() => return false,
        }
    }
    true
}

/// What is to be done next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Choice {
    Table(TableId),
    /// All that wait have failed: so long.
    Later(Duration),
    Nothing,
}

impl Running {
    fn add_to(&self, value: &mut Value) {
        value["waits_for"] = json!(self.progress.last_error());
        let copy = &self.progress.copy.view()["tables"][0];
        if copy.is_null() {
            return;
        }
        for key in ["rows", "bytes", "rows_expected", "rows_per_second", "remaining_seconds"] {
            value[key] = copy[key].clone();
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use heartbeatpb::WallTime;

    use super::*;

    fn resync(table: i64, state: ResyncState) -> Resync {
        Resync { state, ..waiting(table, &format!("s.t{table}")) }
    }

    /// A request of nothing but its table.
    pub(crate) fn waiting(table: i64, name: &str) -> Resync {
        Resync {
            table: TableId(table),
            name: name.to_owned(),
            state: ResyncState::Waiting,
            entering: false,
            asked: WallTime(table),
            ended: None,
            rows: 0,
            error: None,
        }
    }

    #[test]
    fn the_oldest_that_waits_is_next_and_one_that_failed_lets_the_others_pass() {
        let resyncs = Resyncs::new(None, None);
        let now = Instant::now();
        let all = [
            resync(1, ResyncState::Done),
            resync(2, ResyncState::Paused),
            resync(3, ResyncState::Waiting),
            resync(4, ResyncState::Waiting),
            resync(5, ResyncState::Failed),
        ];
        assert_eq!(resyncs.choose(&all[..2], now), Choice::Nothing);
        assert_eq!(resyncs.choose(&all, now), Choice::Table(TableId(3)));
        let problem = |due| Problem { code: "CDC:ErrX", message: String::new(), pause: FIRST_PAUSE, due };
        resyncs.state.lock().problems.insert(TableId(3), problem(now + Duration::from_secs(5)));
        assert_eq!(resyncs.choose(&all, now), Choice::Table(TableId(4)));
        resyncs.state.lock().problems.insert(TableId(4), problem(now + Duration::from_secs(3)));
        assert_eq!(resyncs.choose(&all, now), Choice::Later(Duration::from_secs(3)));
        assert_eq!(resyncs.choose(&all, now + Duration::from_secs(5)), Choice::Table(TableId(3)));
        assert_eq!(resyncs.choose(&all[..2], now), Choice::Nothing, "what was withdrawn is forgotten");
        assert_eq!(resyncs.choose(&all, now), Choice::Table(TableId(3)), "and begins anew");
    }

    #[test]
    fn what_is_shown_of_a_request_follows_from_its_state() {
        let resyncs = Resyncs::new(None, None);
        let waiting = resync(3, ResyncState::Waiting);
        assert_eq!(resyncs.shown(&waiting)["state"], "waiting");
        let due = Instant::now();
        let problem = Problem { code: "CDC:ErrX", message: "away".into(), pause: FIRST_PAUSE, due };
        resyncs.state.lock().problems.insert(TableId(3), problem);
        assert_eq!(resyncs.shown(&waiting)["error"], json!({ "code": "CDC:ErrX", "message": "away" }));
        let progress = Arc::new(ReaderProgress::default());
        progress.set_last_error(Some("it waits".to_owned()));
        let running = Running { table: TableId(3), progress, stop: CancellationToken::new() };
        resyncs.state.lock().running = Some(running);
        let shown = resyncs.shown(&waiting);
        assert_eq!((&shown["state"], &shown["waits_for"]), (&json!("copying"), &json!("it waits")));
        assert_eq!(resyncs.view()["table_id"], 3);
        assert_eq!(resyncs.shown(&resync(3, ResyncState::Done))["state"], "done");
        assert_eq!(resyncs.shown(&resync(4, ResyncState::Paused))["state"], "paused");
    }
}
