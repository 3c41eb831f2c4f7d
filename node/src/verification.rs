//! Comparisons of both ends of changefeeds, run by the node that leads: it knows their addresses and their checkpoints.
//!
//! One at a time for each changefeed, when somebody asks, or again and again (`rounds`). What was found is kept in memory
//! until the next one, or until another node leads, and is told as metrics (`told`).

mod rounds;
mod told;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use coordinator::{ChangefeedView, CoordinatorHandle};
use heartbeatpb::{Gid, Ts, WallTime, codes};
use logservice::upstream::SourceTable;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use verify::{Checkpoint, Options, Outcome, Report, TableName, TablePair, Verifier};

use crate::http::ApiFailure;
use crate::upstream::{UpstreamHub, feed_spec};

pub(crate) use rounds::run;
use told::Told;

/// Comparisons that run at once: each keeps both ends busy.
const MOST_RUNNING: usize = 4;
/// Comparisons that are remembered.
const MOST_KEPT: usize = 64;
/// How long a comparison waits for a changefeed to get as far as its upstream was.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a person may ask for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wish {
    /// Only these tables, as `schema.name`; all when empty.
    pub(crate) tables: Vec<String>,
    pub(crate) rows_per_second: Option<u32>,
    pub(crate) part_rows: Option<u32>,
}

/// How far a comparison is, or what came of it.
#[derive(Clone, Debug)]
pub(crate) struct Comparison {
    pub(crate) report: Report,
    /// Why it ended early.
    pub(crate) error: Option<String>,
    pub(crate) began: WallTime,
    /// `None` while it runs.
    pub(crate) ended: Option<WallTime>,
}

/// A comparison that runs or ran; it ends when this is dropped.
struct Job {
    state: watch::Receiver<Arc<Comparison>>,
    task: JoinHandle<()>,
}

impl Job {
    fn runs(&self) -> bool {
        !self.task.is_finished()
    }

    fn now(&self) -> Arc<Comparison> {
        Arc::clone(&self.state.borrow())
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The comparisons of this node.
#[derive(Default)]
pub(crate) struct Verifications {
    jobs: Mutex<BTreeMap<Gid, Job>>,
    told: Mutex<BTreeMap<Gid, Arc<Told>>>,
}

impl Verifications {
    /// How far the comparison of a changefeed is; `None`: there was none.
    pub(crate) fn state(&self, feed: Gid) -> Option<Arc<Comparison>> {
        self.jobs.lock().get(&feed).map(Job::now)
    }

    /// Ends and forgets it.
    pub(crate) fn cancel(&self, feed: Gid) -> bool {
        self.jobs.lock().remove(&feed).is_some()
    }

    /// Whether one of this changefeed runs.
    fn is_running(&self, feed: Gid) -> bool {
        self.jobs.lock().get(&feed).is_some_and(Job::runs)
    }

    /// Whether no other one may begin now.
    fn is_full(&self) -> bool {
        is_full(&self.jobs.lock())
    }

    /// Ends and forgets those of other changefeeds, their metrics too.
    fn keep_only(&self, feeds: &[Gid]) {
        self.jobs.lock().retain(|feed, _| feeds.contains(feed));
        self.told.lock().retain(|feed, _| feeds.contains(feed));
    }

    /// The metrics of a changefeed.
    fn told(&self, feed: &ChangefeedView) -> Arc<Told> {
        let mut told = self.told.lock();
        let name = &feed.info.id.name;
        Arc::clone(told.entry(feed.info.id.gid).or_insert_with(|| Told::new(name)))
    }

    /// Begins one, unless one runs already, whose state is the answer then.
    ///
    /// # Errors
    /// When the ends are not two PostgreSQL databases, cannot be reached, or have no such table.
    pub(crate) async fn begin(
        &self,
        feed: &ChangefeedView,
        wish: Wish,
        hub: &UpstreamHub,
        leader: watch::Receiver<Option<CoordinatorHandle>>,
    ) -> Result<Arc<Comparison>, ApiFailure> {
        let id = feed.info.id.gid;
        if let Some(running) = running(&self.jobs.lock(), id)? {
            return Ok(running);
        }
        let spec = feed_spec(&feed.info, None)?;
        for (end, uri) in [("upstream", &spec.upstream_uri), ("downstream", &feed.info.sink_uri)] {
            if !uri.starts_with("postgres") {
                let words =
                    format!("only two PostgreSQL databases can be compared, and the {end} is something else");
                return Err(ApiFailure::invalid(words));
            }
        }
        let tables = wanted(&hub.check(&spec).await?.eligible, &wish.tables)?;
        let failed = |end: &str| {
            let end = end.to_owned();
            move |error: sink::Error| {
                ApiFailure::new(error.code(), format!("the {end} cannot be compared: {error}"))
            }
        };
        let source = sink::connect_postgres(&spec.upstream_uri).await.map_err(failed("upstream"))?;
        let target = sink::connect_postgres(&feed.info.sink_uri).await.map_err(failed("downstream"))?;
        let checkpoint = Feed { name: feed.info.id.name.to_string(), id, leader };
        let options = Options {
            rows_per_second: wish.rows_per_second,
            part_rows: wish.part_rows.unwrap_or(Options::default().part_rows),
            patience: PATIENCE,
            ..Options::default()
        };
        let verifier = Verifier::new(source, target, checkpoint, options)
            .await
            .map_err(|error| ApiFailure::new(codes::API_INVALID_PARAM, error.to_string()))?;
        self.keep(id, Job::begin(feed.info.id.name.to_string(), verifier, tables, self.told(feed)))
    }

    /// Somebody may have begun the same meanwhile.
    fn keep(&self, id: Gid, job: Job) -> Result<Arc<Comparison>, ApiFailure> {
        let mut jobs = self.jobs.lock();
        if let Some(running) = running(&jobs, id)? {
            return Ok(running);
        }
        let state = job.now();
        while jobs.len() >= MOST_KEPT {
            let Some(oldest) = jobs.iter().find(|(_, job)| !job.runs()).map(|(id, _)| *id) else {
                break;
            };
            jobs.remove(&oldest);
        }
        jobs.insert(id, job);
        Ok(state)
    }
}

/// Whether no other comparison may begin now.
fn is_full(jobs: &BTreeMap<Gid, Job>) -> bool {
    jobs.values().filter(|job| job.runs()).count() >= MOST_RUNNING
}

/// The comparison of this changefeed that runs.
///
/// # Errors
/// When none does, and no other one may begin now.
fn running(jobs: &BTreeMap<Gid, Job>, id: Gid) -> Result<Option<Arc<Comparison>>, ApiFailure> {
    if let Some(job) = jobs.get(&id).filter(|job| job.runs()) {
        return Ok(Some(job.now()));
    }
    if !is_full(jobs) {
        return Ok(None);
    }
    let words = format!("{MOST_RUNNING} changefeeds are being compared already; wait for one, or cancel one");
    Err(ApiFailure::new(codes::SCHEDULER_REQUEST_FAILED, words))
}

impl Job {
    fn begin(name: String, verifier: Verifier<Feed>, tables: Vec<TablePair>, told: Arc<Told>) -> Self {
        let begun =
            Comparison { report: Report::default(), error: None, began: WallTime::now(), ended: None };
        let (tell, state) = watch::channel(Arc::new(begun.clone()));
        let task = tokio::spawn(async move {
            tracing::info!(changefeed = %name, tables = tables.len(), "both ends are compared");
            let progress = |report: &Report| {
                tell.send_replace(Arc::new(Comparison { report: report.clone(), ..begun.clone() }));
            };
            let result = verifier.run(&tables, progress).await;
            let mut end = Comparison::clone(&tell.borrow());
            end.ended = Some(WallTime::now());
            match result {
                Ok(report) => {
                    told.tell(&report);
                    end.report = report;
                }
                Err(error) => {
                    end.report.outcome = Outcome::Undecided;
                    end.error = Some(heartbeatpb::error_chain(&error));
                }
            }
            match (end.report.outcome, &end.error) {
                (Outcome::Equal, _) => tracing::info!(changefeed = %name, "both ends are equal"),
                (_, Some(error)) => {
                    tracing::warn!(changefeed = %name, error, "the comparison of both ends ended early")
                }
                (Outcome::Different, None) => {
                    let rows: u64 = end.report.tables.iter().map(|table| table.differences).sum();
                    tracing::error!(changefeed = %name, rows, "both ends are not equal");
                }
                (Outcome::Undecided | Outcome::Running, None) => {
                    tracing::warn!(changefeed = %name, "not everything could be compared");
                }
            }
            tell.send_replace(Arc::new(end));
        });
        Self { state, task }
    }
}

/// The tables that a person names, or all.
fn wanted(tables: &[SourceTable], names: &[String]) -> Result<Vec<TablePair>, ApiFailure> {
    let pair = |table: &SourceTable| {
        let name = TableName { schema: table.info.schema.clone(), name: table.info.name.clone() };
        let part = table.part.clone();
        TablePair { source: name.clone(), target: name, columns: part.columns, condition: part.condition }
    };
    let all: Vec<TablePair> = tables.iter().map(pair).collect();
    for name in names {
        if all.iter().all(|pair| pair.source.to_string() != *name) {
            let name: String = name.chars().take(200).collect();
            return Err(ApiFailure::invalid(format!(
                "the changefeed replicates no table {name:?}; write schema.table"
            )));
        }
    }
    let asked = |pair: &TablePair| names.is_empty() || names.contains(&pair.source.to_string());
    Ok(all.into_iter().filter(asked).collect())
}

/// A changefeed whose checkpoint the coordinator knows.
struct Feed {
    name: String,
    id: Gid,
    leader: watch::Receiver<Option<CoordinatorHandle>>,
}

impl Checkpoint for Feed {
    async fn checkpoint(&self) -> Result<Ts, String> {
        let leader = self.leader.borrow().clone().ok_or("another node leads now; begin again")?;
        let feed = leader.get(crate::http::KEYSPACE, &self.name).await.map_err(|error| error.to_string())?;
        if feed.info.id.gid != self.id {
            return Err("the changefeed was removed".to_owned());
        }
        Ok(feed.checkpoint)
    }
}
