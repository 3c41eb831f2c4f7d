//! One fault from a steady state to the next: it is done, undone, and everything is counted.

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use serde_json::json;
use testkit::wire::Place;
use testkit::{Random, StopMode};

use crate::fault::{Fault, Kind, Limit, Role};
use crate::lag::SAMPLE;
use crate::world::{FEED, LOOK, Verdict, World, ask};

/// A lag below this counts as none, in seconds.
pub(crate) const CALM: f64 = 1.0;
/// How long the lag must stay low until it is called low.
const CALM_FOR: Duration = Duration::from_secs(2);
/// How long anything may take until it is called broken.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long a drain may take.
const DRAIN_LIMIT: Duration = Duration::from_secs(60);
/// How long the world is watched before and after.
const BEFORE: Duration = Duration::from_secs(2);
const AFTER: Duration = Duration::from_secs(3);
/// A killed node is away for at least this long, so that its lease ends and others have to do without it.
const AWAY: Duration = Duration::from_secs(10);
/// Marks that say that a fault is over.
const UNDONE: [&str; 3] = ["started again", "woken", "mended"];
/// Attempts to get the leader and the maintainer onto different nodes.
const RESIGNATIONS: usize = 4;
/// Room that is left in a full directory.
const ROOM_STEP: usize = 64 << 10;

/// What one round brought.
#[derive(Debug)]
pub(crate) struct Round {
    /// What was struck, such as `node 2`.
    pub(crate) victim: String,
    /// When that was, by the clock that the logs of the nodes are dated by.
    pub(crate) struck: SystemTime,
    /// Seconds since the beginning of the samples, and what happened then.
    pub(crate) marks: Vec<(f64, String)>,
    /// Seconds since the beginning, and the lag in seconds.
    pub(crate) samples: Vec<(f64, f64)>,
    pub(crate) highest: f64,
    /// Seconds until the lag was and stayed below [`CALM`]; from the fault where others take over, otherwise from its
    /// end.
    pub(crate) recovery: f64,
    /// Nodes that ended by themselves and were started again.
    pub(crate) restarts: usize,
    pub(crate) verdict: Verdict,
    /// What was not as promised, in words.
    pub(crate) problems: Vec<String>,
}

/// What is under way in a round.
struct Course<'w> {
    world: &'w mut World,
    fault: Fault,
    started: Instant,
    marks: Vec<(Instant, String)>,
    restarts: usize,
    problems: Vec<String>,
}

/// Runs a round. An error means that the world is broken; what is not as promised is in the round.
pub(crate) async fn run(world: &mut World, fault: Fault, random: &mut Random) -> Result<Round> {
    world.all_ready(PATIENCE).await?;
    calm(world, PATIENCE).await.context("before the fault")?;
    spread(world).await?;
    let started = Instant::now();
    let mut course = Course { world, fault, started, marks: Vec::new(), restarts: 0, problems: Vec::new() };
    // Not always at the same place between two heartbeats.
    tokio::time::sleep(BEFORE + Duration::from_millis(random.between(0, 400))).await;
    let (victim, from) = course.strike().await?;
    course.supervise(PATIENCE).await?;
    if let Err(error) = calm(course.world, PATIENCE).await {
        course.problems.push(format!("{error:#}"));
    }
    tokio::time::sleep(AFTER).await;
    let ended = Instant::now();
    let verdict = course.world.verify().await?;
    Ok(course.conclude(victim, from, ended, verdict))
}

impl Course<'_> {
    fn mark(&mut self, what: impl Into<String>) -> Instant {
        let now = Instant::now();
        self.marks.push((now, what.into()));
        now
    }

    fn lasts(&self) -> Duration {
        self.fault.lasts(self.world.plan.short)
    }

    /// Does it and undoes it. The moment is the one from which the recovery counts.
    async fn strike(&mut self) -> Result<(String, Instant)> {
        match self.fault.kind {
            Kind::Kill(role) => self.kill(role, false).await,
            Kind::PowerOff(role) => self.kill(role, true).await,
            Kind::Pause(role) => self.pause(role).await,
            Kind::CutNodes(one, other) => self.cut_nodes(one, other, false).await,
            Kind::CutOneWay => self.cut_nodes(Role::Maintainer, Role::Dispatcher, true).await,
            Kind::CutStore(role) => self.cut_store(role).await,
            Kind::CutAll(role) => self.cut_all(role).await,
            Kind::StoreLeader => self.store_leader().await,
            Kind::TargetDown => self.target_down().await,
            Kind::TargetSilent => self.target_silent().await,
            Kind::SourceRestart => self.source(StopMode::Fast).await,
            Kind::SourceCrash => self.source(StopMode::Immediate).await,
            Kind::DiskFull => self.disk_full().await,
            Kind::Drain | Kind::Rolling | Kind::RollingHasty => self.one_by_one().await,
        }
    }

    async fn kill(&mut self, role: Role, in_silence: bool) -> Result<(String, Instant)> {
        let victim = self.find(role).await?;
        let from = self.mark("killed");
        if in_silence {
            self.isolate(victim);
        }
        self.world.nodes[victim].server.kill()?;
        if self.fault.is_survived(self.world.nodes.len()) {
            self.await_calm().await;
            tokio::time::sleep_until((from + AWAY).into()).await;
            self.world.wires.mend();
            self.mark("started again");
        } else {
            self.world.wires.mend();
        }
        self.world.relaunch(victim, PATIENCE).await?;
        Ok((format!("node {victim}"), from))
    }

    async fn pause(&mut self, role: Role) -> Result<(String, Instant)> {
        let victim = self.find(role).await?;
        let from = self.mark("stopped");
        self.world.nodes[victim].server.signal("STOP")?;
        tokio::time::sleep(self.lasts()).await;
        let woken = self.mark("woken");
        self.world.nodes[victim].server.signal("CONT")?;
        Ok((format!("node {victim}"), self.counts_from(from, woken)))
    }

    async fn cut_nodes(&mut self, one: Role, other: Role, one_way: bool) -> Result<(String, Instant)> {
        let (one, other) = loop {
            // Looking for one may move the other.
            let found = (self.find(one).await?, self.find(other).await?);
            if found.0 != found.1 && self.find(one).await? == found.0 {
                break found;
            }
        };
        let from = self.mark("cut");
        self.world.wires.cut_one_way(Place::Node(one), Place::Node(other));
        if !one_way {
            self.world.wires.cut_one_way(Place::Node(other), Place::Node(one));
        }
        let mended = self.hold_and_mend().await;
        Ok((format!("nodes {one} and {other}"), self.counts_from(from, mended)))
    }

    async fn cut_store(&mut self, role: Role) -> Result<(String, Instant)> {
        let victim = self.find(role).await?;
        let from = self.mark("cut");
        for n in 0..self.world.plan.stores {
            self.world.wires.cut(Place::Node(victim), Place::Store(n));
        }
        let mended = self.hold_and_mend().await;
        Ok((format!("node {victim}"), self.counts_from(from, mended)))
    }

    async fn cut_all(&mut self, role: Role) -> Result<(String, Instant)> {
        let victim = self.find(role).await?;
        let from = self.mark("cut");
        self.isolate(victim);
        let mended = self.hold_and_mend().await;
        Ok((format!("node {victim}"), self.counts_from(from, mended)))
    }

    async fn hold_and_mend(&mut self) -> Instant {
        tokio::time::sleep(self.lasts()).await;
        self.world.wires.mend();
        self.mark("mended")
    }

    fn isolate(&self, victim: usize) {
        let nodes = (0..self.world.nodes.len()).filter(|n| *n != victim).map(Place::Node);
        let stores = (0..self.world.plan.stores).map(Place::Store);
        for place in nodes.chain(stores).chain([Place::Source, Place::Target]) {
            self.world.wires.cut(Place::Node(victim), place);
        }
    }

    async fn store_leader(&mut self) -> Result<(String, Instant)> {
        let stores = self.world.stores.as_mut().context("there is no etcd")?;
        let victim = stores.leader().await?;
        stores.kill(victim)?;
        let from = self.mark("killed");
        let over = from + self.lasts();
        while Instant::now() < over {
            self.restart_ended()?;
            tokio::time::sleep(LOOK).await;
        }
        self.mark("started again");
        let stores = self.world.stores.as_mut().context("there is no etcd")?;
        stores.resume(victim)?;
        stores.ready().await?;
        Ok((format!("member {victim}"), from))
    }

    async fn target_down(&mut self) -> Result<(String, Instant)> {
        self.mark("down");
        self.world.target.stop(StopMode::Immediate).await?;
        tokio::time::sleep(self.lasts()).await;
        self.world.target.resume().await?;
        Ok(("target".to_owned(), self.mark("up")))
    }

    async fn target_silent(&mut self) -> Result<(String, Instant)> {
        self.mark("silent");
        for n in 0..self.world.nodes.len() {
            self.world.wires.cut(Place::Node(n), Place::Target);
        }
        Ok(("target".to_owned(), self.hold_and_mend().await))
    }

    async fn source(&mut self, mode: StopMode) -> Result<(String, Instant)> {
        self.mark("down");
        self.world.source.stop(mode).await?;
        tokio::time::sleep(self.lasts()).await;
        self.world.source.resume().await?;
        Ok(("source".to_owned(), self.mark("up")))
    }

    /// Takes all room that is left, again and again, since a store may give some back.
    async fn disk_full(&mut self) -> Result<(String, Instant)> {
        let victim = self.find(Role::Maintainer).await?;
        let path = self.world.nodes[victim].server.data_dir().join("filled-by-somebody-else");
        self.mark("full");
        let over = Instant::now() + self.lasts();
        let mut file = std::fs::File::create(&path)?;
        while Instant::now() < over {
            while std::io::Write::write_all(&mut file, &[0; ROOM_STEP]).is_ok() {}
            tokio::time::sleep(SAMPLE).await;
        }
        std::fs::remove_file(&path)?;
        Ok((format!("node {victim}"), self.mark("room")))
    }

    /// Restarts every node, the leader last.
    async fn one_by_one(&mut self) -> Result<(String, Instant)> {
        let from = Instant::now();
        let leader = self.world.leader().await?;
        let mut order: Vec<usize> = (0..self.world.nodes.len()).filter(|n| *n != leader).collect();
        order.push(leader);
        for n in order {
            if self.fault.kind == Kind::Drain {
                self.mark(format!("drain {n}"));
                self.drain(n).await?;
            }
            self.mark(format!("stop {n}"));
            self.world.nodes[n].server.stop().await.with_context(|| format!("stop node {n}"))?;
            self.world.relaunch(n, PATIENCE).await?;
            if self.fault.kind != Kind::RollingHasty {
                calm(self.world, PATIENCE).await?;
            }
        }
        self.mark("done");
        Ok(("every node".to_owned(), from))
    }

    /// Empties a node; one that leads lets another one lead first.
    async fn drain(&mut self, victim: usize) -> Result<()> {
        let id = self.world.id(victim).await?;
        let deadline = Instant::now() + DRAIN_LIMIT;
        loop {
            let leader = self.world.leader().await?;
            if leader == victim {
                self.world.api(leader).post("/api/v2/owner/resign", &json!({})).await?;
            } else {
                let path = format!("/api/v2/captures/{id}/drain");
                // The leader may change while it is asked.
                let answer = self.world.api(leader).put(&path, &json!({})).await;
                if answer.is_ok_and(|answer| answer["current_table_count"] == 0) {
                    return Ok(());
                }
            }
            if Instant::now() > deadline {
                bail!("node {victim} is not empty after {DRAIN_LIMIT:?}");
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The node that has a role, and no other one if that can be had.
    async fn find(&mut self, role: Role) -> Result<usize> {
        let (mut leader, mut maintainer) = (self.world.leader().await?, self.world.maintainer().await?);
        if self.world.nodes.len() == 1 {
            return Ok(0);
        }
        for _ in 0..RESIGNATIONS {
            if leader != maintainer {
                break;
            }
            // It may be elected again.
            self.world.api(leader).post("/api/v2/owner/resign", &json!({})).await?;
            tokio::time::sleep(CALM_FOR).await;
            (leader, maintainer) = (self.world.leader().await?, self.world.maintainer().await?);
        }
        match role {
            Role::Leader => Ok(leader),
            Role::Maintainer => Ok(maintainer),
            Role::Dispatcher => {
                let counts = self.world.dispatchers().await?;
                let others = (0..counts.len()).filter(|n| *n != maintainer && counts[*n] > 0);
                let found = others.min_by_key(|n| *n == leader);
                found.context("every table is on the maintainer's node")
            }
        }
    }

    fn counts_from(&self, done: Instant, undone: Instant) -> Instant {
        if self.fault.is_survived(self.world.nodes.len()) { done } else { undone }
    }

    async fn await_calm(&mut self) {
        if let Err(error) = calm(self.world, PATIENCE).await {
            self.problems.push(format!("before the node came back: {error:#}"));
        }
    }

    /// Starts what ended by itself, as whoever runs a cluster does, and waits until every node is there.
    async fn supervise(&mut self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            self.restart_ended()?;
            let error = match self.world.all_ready(Duration::from_secs(1)).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            if Instant::now() > deadline {
                return Err(error);
            }
        }
    }

    fn restart_ended(&mut self) -> Result<()> {
        for n in 0..self.world.nodes.len() {
            if let Err(error) = self.world.nodes[n].server.still_running() {
                self.restarts += 1;
                self.mark(format!("node {n} ended"));
                if !self.fault.may_end_nodes() {
                    self.problems.push(format!("node {n}: {error:#}"));
                }
                self.world.launch(n)?;
            }
        }
        Ok(())
    }

    fn conclude(mut self, victim: String, from: Instant, ended: Instant, verdict: Verdict) -> Round {
        let length = (ended - self.started).as_secs_f64();
        let mut samples = self.world.lag.since(self.started);
        samples.retain(|(at, _)| *at <= length);
        let seconds = |at: Instant| at.saturating_duration_since(self.started).as_secs_f64();
        let first = self.marks.first().map_or(from, |(at, _)| *at);
        let struck = SystemTime::now() - first.elapsed();
        let from = seconds(from);
        let marks: Vec<(f64, String)> =
            self.marks.iter().map(|(at, what)| (seconds(*at), what.clone())).collect();
        // What is done next, such as waking a node up, is a disturbance of its own.
        let undone = marks.iter().find(|(_, what)| UNDONE.contains(&what.as_str())).map(|(at, _)| *at);
        let until = undone.filter(|at| *at > from).unwrap_or(length);
        let highest = samples.iter().map(|(_, lag)| *lag).fold(0.0, f64::max);
        let recovery = recovery(&samples, from, until);
        let plan = &self.world.plan;
        let limit = self.fault.limit(self.world.nodes.len(), plan.short, plan.schema_rate > 0);
        self.problems.extend(missed(limit, highest, recovery));
        if !verdict.clean() {
            self.problems.push(describe(&verdict));
        }
        Round {
            victim,
            struck,
            marks,
            samples,
            highest,
            recovery,
            restarts: self.restarts,
            verdict,
            problems: self.problems,
        }
    }
}

/// Seconds from a moment until the lag is low for good, or until the next event.
fn recovery(samples: &[(f64, f64)], from: f64, until: f64) -> f64 {
    let mut high = samples.iter().filter(|(at, lag)| *at >= from && *at < until && *lag >= CALM);
    high.next_back().map_or(0.0, |(at, _)| at + SAMPLE.as_secs_f64() - from)
}

/// What was promised and not kept.
fn missed(limit: Limit, highest: f64, recovery: f64) -> Vec<String> {
    let mut words = Vec::new();
    if let Some(promised) = limit.recovery.filter(|promised| recovery > promised.as_secs_f64()) {
        words.push(format!(
            "the lag was under {CALM} s only after {recovery:.1} s, promised are {promised:?}"
        ));
    }
    if let Some(promised) = limit.highest.filter(|promised| highest > promised.as_secs_f64()) {
        words.push(format!("the lag rose to {highest:.1} s, promised are {promised:?}"));
    }
    words
}

/// What was not replicated as it was made, in words.
pub(crate) fn describe(verdict: &Verdict) -> String {
    let counts = verdict.counts;
    let mut words = format!(
        "of {} changes {} were lost, {} doubled, {} reordered, {} invented",
        counts.changes, counts.lost, counts.doubled, counts.reordered, counts.invented
    );
    for row in &verdict.wrong {
        words.push_str("\n      ");
        words.push_str(row);
    }
    if !verdict.total_kept {
        words.push_str("; the balances do not come to what they must");
    }
    if !verdict.equal {
        words.push_str(&format!("; the ends differ:\n{}", verdict.comparison));
        for shape in &verdict.shapes {
            words.push_str(&format!("\n      {shape}"));
        }
    }
    words
}

/// Waits until the lag is low for a while.
pub(crate) async fn calm(world: &World, limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    let mut since = Instant::now();
    loop {
        let lag = world.lag.now();
        if lag >= CALM {
            since = Instant::now();
        }
        if since.elapsed() >= CALM_FOR {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("the lag is {lag:.1} s after {limit:?}; {}", standing(world).await);
        }
        tokio::time::sleep(SAMPLE).await;
    }
}

/// What the cluster says it waits for.
async fn standing(world: &World) -> String {
    for n in 0..world.nodes.len() {
        if let Ok(status) = ask(world.api(n), &format!("/api/v2/changefeeds/{FEED}/status")).await {
            return format!("node {n} says: {status}");
        }
    }
    "no node knows the changefeed".to_owned()
}

/// Waits for a while until every node has tables; a fault of a node without work would say little.
async fn spread(world: &World) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(30);
    while world.nodes.len() > 1 && Instant::now() < deadline {
        if world.dispatchers().await.is_ok_and(|counts| counts.iter().all(|count| *count > 0)) {
            break;
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recovery_is_the_time_until_the_lag_stays_low() {
        let samples: Vec<(f64, f64)> = [0.0, 0.0, 0.5, 1.5, 0.9, 2.0, 0.2, 0.1, 5.0, 0.0]
            .iter()
            .enumerate()
            .map(|(n, lag)| (n as f64, *lag))
            .collect();
        assert!((recovery(&samples, 1.0, 8.0) - 4.1).abs() < 1e-9);
        assert!((recovery(&samples, 1.0, 99.0) - 7.1).abs() < 1e-9);
        assert!(recovery(&samples, 6.0, 8.0) < 1e-9);
    }

    #[test]
    fn a_missed_promise_is_said() {
        let limit = Limit { recovery: Some(Duration::from_secs(6)), highest: Some(Duration::from_secs(3)) };
        assert!(missed(limit, 2.9, 5.9).is_empty());
        assert_eq!(missed(limit, 3.1, 6.1).len(), 2);
    }
}
