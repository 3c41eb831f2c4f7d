//! A sink's row in the target by which it may write, and the lock that its transactions hold while they do.
//!
//! A sink registers when it is opened, before it has written anything, under a random number: its incarnation. Whoever
//! takes its place marks the row and then waits for the incarnation's lock, which every transaction of the sink shares:
//!
//! ```text
//!   a writer's transaction                          a fence
//!   BEGIN                                           mark the row fenced; COMMIT
//!   share the lock of the incarnation               take the lock alone: waits for every transaction that shares it,
//!   progress := next, if the row is not fenced        and ends their sessions when they do not end by themselves
//!   rows …                                          delete the row
//!   COMMIT: lets go of the lock
//! ```
//!
//! The row is read by a later statement than the one that takes the lock, hence with a newer snapshot: a transaction
//! that got the lock after the fence has waited for it sees the mark, and one that got it before is waited for. The two
//! cost a writer no round trip: the lock is part of `BEGIN`, the condition part of the statement that moves the progress.
//! Sessions that change tables outside of a transaction share the lock as sessions, to the same effect.
//!
//! Why not a row lock: the transactions of a sink's workers would share the lock of one row, for which PostgreSQL writes
//! a multixact with all holders for each of them: with eight workers five members a transaction, which at five thousand
//! transactions a second uses their numbers up within two days. A row for each worker needs no multixact and is a little
//! cheaper for the smallest transactions (`examples/fence.rs` measures all of them), but writes to the log and to a page
//! each time, cannot be held by a session outside of a transaction, and does not show who holds it. An advisory lock
//! is memory only, and `pg_locks` names the sessions that have to be ended.
//!
//! ```text
//!   open ──► registered ──► closed in an orderly way: fences itself ──► gone
//!               │  ▲
//!               │  └── refused: the changefeed has gone on under a newer epoch, or without this node
//!               ▼
//!            fenced: by a maintainer, or by a newer sink of the same node ──► waited for ──► gone
//! ```
//!
//! A row that is not there is a fenced one: what is deleted needs no memory. What stays are the epochs of fences: no
//! sink registers under an older epoch than that of the newest fence, and none of a fenced node under the same.

use std::time::{Duration, Instant};

use heartbeatpb::{MaintainerEpoch, NodeId};
use rand::Rng;
use tokio_postgres::{Client, SimpleQueryMessage};

use super::config::PgConfig;
use super::connection::Connection;
use super::failure::{Failure, classify};
use super::progress::create_missing;
use super::sql::literal;
use crate::Error;

/// How long a fence waits for a transaction to end by itself before it ends its session.
const PATIENCE: Duration = Duration::from_millis(500);
/// How long all of a sink's transactions may take to end. Sessions that were told to end do so at once, unless their
/// backend waits for a disk.
const LIMIT: Duration = Duration::from_secs(4);
/// How long a sink that closes may take to give its place back; whoever comes next does it otherwise.
const RETIRE: Duration = Duration::from_secs(2);

/// Serialises registrations and fences of a changefeed. Held only inside of one message, never while a client thinks.
fn changefeed_lock(changefeed: &str) -> String {
    format!(
        "SET LOCAL lock_timeout = '5s'; SELECT pg_catalog.pg_advisory_xact_lock(\
         pg_catalog.hashtextextended({}, 5577006791947779411))",
        literal(changefeed)
    )
}

/// The right of one sink to write.
#[derive(Debug)]
pub(crate) struct Registration {
    incarnation: i64,
    lock: String,
    condition: String,
    share: String,
}

/// What became of the transactions of a fenced sink.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Drained {
    /// None is left, and none can begin.
    Yes,
    /// One does not end, for this reason.
    No(String),
}

/// The error of a sink that may not write any more.
pub(crate) fn fenced() -> Error {
    Error::Fenced {
        what: "this sink may not write any more: its tables were given to other nodes, or a newer sink of this node \
               has taken its place"
            .into(),
    }
}

impl Registration {
    fn new(own_schema: &str) -> Self {
        Self::of(own_schema, rand::rng().random_range(1..i64::MAX))
    }

    /// One that somebody else has made.
    pub(crate) fn of(own_schema: &str, incarnation: i64) -> Self {
        Self {
            incarnation,
            lock: format!("SELECT pg_catalog.pg_advisory_xact_lock_shared({incarnation})"),
            condition: format!(
                "EXISTS (SELECT FROM {own_schema}.writers WHERE incarnation = {incarnation} AND fenced IS NULL)"
            ),
            share: format!("pg_catalog.pg_advisory_lock_shared({incarnation})"),
        }
    }

    /// By which it is known.
    pub(crate) fn incarnation(&self) -> i64 {
        self.incarnation
    }

    /// The statement behind `BEGIN` for which fences wait. The first write of the transaction has to hold to
    /// [`Registration::condition`].
    pub(crate) fn lock(&self) -> &str {
        &self.lock
    }

    /// A condition that holds as long as this sink may write.
    pub(crate) fn condition(&self) -> &str {
        &self.condition
    }

    /// A call that lets fences wait for the session, until it unlocks or ends.
    pub(crate) fn share(&self) -> &str {
        &self.share
    }

    /// Fails when this sink may not write any more.
    pub(crate) async fn check(&self, client: &Client) -> Result<(), Failure> {
        let row = client
            .query_one(&format!("SELECT {}", self.condition), &[])
            .await
            .map_err(|e| classify(e, "looking whether this sink may write"))?;
        if row.get(0) { Ok(()) } else { Err(Failure::Fatal(fenced())) }
    }

    /// Begins a transaction for which fences wait, of a sink that may write.
    pub(crate) async fn begin_checked(&self, client: &Client) -> Result<(), Failure> {
        let begin = format!("BEGIN; {}", self.lock);
        client.batch_execute(&begin).await.map_err(|e| classify(e, "beginning a transaction"))?;
        self.check(client).await
    }

    /// Lets fences wait for the session, of a sink that may write.
    pub(crate) async fn share_checked(&self, client: &Client) -> Result<(), Failure> {
        let sql = format!("SELECT {}", self.share);
        client.batch_execute(&sql).await.map_err(|e| classify(e, "taking the lock of this sink"))?;
        self.check(client).await
    }

    /// Lets go of what [`Registration::share_checked`] took.
    pub(crate) async fn unshare(&self, client: &Client) -> Result<(), Failure> {
        let sql = format!("SELECT pg_catalog.pg_advisory_unlock_shared({})", self.incarnation);
        client.batch_execute(&sql).await.map_err(|e| classify(e, "giving the lock of this sink back"))
    }
}

/// Creates the tables of writers and fences where they are missing.
pub(crate) async fn prepare(client: &Client, config: &PgConfig) -> Result<(), Failure> {
    let schema = &config.own_schema;
    let statements = format!(
        "CREATE TABLE IF NOT EXISTS {schema}.writers (changefeed text NOT NULL, node text NOT NULL, \
             incarnation bigint NOT NULL PRIMARY KEY, epoch numeric(20) NOT NULL, fenced numeric(20), \
             since timestamptz NOT NULL DEFAULT pg_catalog.now()); \
         CREATE TABLE IF NOT EXISTS {schema}.fences (changefeed text NOT NULL, node text NOT NULL, \
             epoch numeric(20) NOT NULL, PRIMARY KEY (changefeed, node));"
    );
    create_missing(client, config, &["writers", "fences"], &statements).await
}

/// Registers a sink, and fences those of the same node that were there before: returns when they cannot write any more.
pub(crate) async fn register(
    client: &Client,
    config: &PgConfig,
    changefeed: &str,
    node: &NodeId,
    epoch: Option<MaintainerEpoch>,
) -> Result<Registration, Failure> {
    let own = &config.own_schema;
    let registration = Registration::new(own);
    let (feed, name, epoch) = (literal(changefeed), literal(node.as_str()), MaintainerEpoch::to_wire(epoch));
    let (incarnation, condition) = (registration.incarnation, &registration.condition);
    let sql = format!(
        "BEGIN; {lock}; \
         INSERT INTO {own}.writers (changefeed, node, incarnation, epoch) SELECT {feed}, {name}, {incarnation}, {epoch} \
         WHERE NOT EXISTS (SELECT FROM {own}.fences WHERE changefeed = {feed} AND (epoch > {epoch} AND node = '' \
             OR epoch >= {epoch} AND {epoch} > 0 AND node = {name})); \
         UPDATE {own}.writers SET fenced = {epoch} WHERE changefeed = {feed} AND node = {name} \
             AND incarnation <> {incarnation} AND fenced IS NULL AND {condition}; \
         SELECT node AS writer_node, incarnation AS writer FROM {own}.writers \
             WHERE changefeed = {feed} AND node = {name} AND {condition}; COMMIT",
        lock = changefeed_lock(changefeed),
    );
    let writers = run(client, &sql, "registering this sink").await?;
    if writers.is_empty() {
        let what =
            format!("node {node} may not write under epoch {epoch}: the changefeed has gone on without it");
        return Err(Failure::Fatal(Error::Fenced { what }));
    }
    for writer in writers.into_iter().filter(|writer| writer.incarnation != incarnation) {
        if let Drained::No(why) = drain(client, writer.incarnation).await? {
            let what = format!("an earlier sink of this node has not ended: {why}");
            return Err(Failure::Lost(Error::Unavailable { what, source: None }));
        }
        forget(client, own, writer.incarnation).await?;
    }
    Ok(registration)
}

/// A sink as a fence has found it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Marked {
    pub(crate) node: NodeId,
    pub(crate) incarnation: i64,
    /// It may not write any more.
    pub(crate) is_fenced: bool,
}

/// Whose rows a fence marks: a condition on `node`, without or with the nodes themselves.
pub(crate) struct Marking<'a> {
    pub(crate) changefeed: &'a str,
    pub(crate) epoch: Option<MaintainerEpoch>,
    /// The newest number that the maintainer has used for any node.
    pub(crate) newest: Option<MaintainerEpoch>,
    /// Only these nodes, or all but these.
    pub(crate) nodes: Vec<&'a str>,
    pub(crate) all_but: bool,
}

/// Marks sinks as fenced, for good and durably, and answers them and those that are left. `None`: a newer maintainer has
/// fenced already, and nothing was marked.
pub(crate) async fn mark(
    client: &Client,
    own: &str,
    marking: &Marking<'_>,
) -> Result<Option<Vec<Marked>>, Failure> {
    let (feed, epoch) = (literal(marking.changefeed), MaintainerEpoch::to_wire(marking.epoch));
    let until = MaintainerEpoch::to_wire(marking.newest.max(marking.epoch));
    let list = marking.nodes.iter().map(|node| literal(node)).collect::<Vec<_>>().join(", ");
    let meant = match (marking.all_but, list.is_empty()) {
        (true, true) => "true".to_owned(),
        (false, true) => "false".to_owned(),
        (true, false) => format!("node NOT IN ({list})"),
        // A fence that comes late does not mean what was let in again since.
        (false, false) => format!("node IN ({list}) AND epoch <= {until}"),
    };
    let newest = format!(
        "EXISTS (SELECT FROM {own}.fences WHERE changefeed = {feed} AND node = '' AND epoch = {epoch})"
    );
    // Names of nodes that were fenced before say nothing that the new epoch does not say of everybody.
    let nodes = if marking.all_but {
        format!(
            "DELETE FROM {own}.fences WHERE changefeed = {feed} AND node <> '' AND epoch < {epoch} AND {newest}"
        )
    } else {
        format!(
            "INSERT INTO {own}.fences (changefeed, node, epoch) SELECT {feed}, n, {until} \
             FROM pg_catalog.unnest(ARRAY[{list}]::text[]) AS u(n) WHERE {newest} \
             ON CONFLICT (changefeed, node) DO UPDATE SET epoch = GREATEST({own}.fences.epoch, EXCLUDED.epoch)"
        )
    };
    // A sweep also waits for those that somebody else has marked and not finished with.
    let waited = if marking.all_but { "true" } else { meant.as_str() };
    let sql = format!(
        "BEGIN; {lock}; \
         INSERT INTO {own}.fences AS f (changefeed, node, epoch) VALUES ({feed}, '', {epoch}) \
             ON CONFLICT (changefeed, node) DO UPDATE SET epoch = EXCLUDED.epoch WHERE f.epoch < EXCLUDED.epoch; \
         {nodes}; \
         UPDATE {own}.writers SET fenced = {epoch} WHERE changefeed = {feed} AND fenced IS NULL AND {meant} AND {newest}; \
         SELECT '' AS writer_node, 0 AS writer WHERE {newest}; \
         SELECT node AS writer_node, incarnation AS writer FROM {own}.writers \
             WHERE changefeed = {feed} AND fenced IS NOT NULL AND {waited} AND {newest}; \
         SELECT node AS writer_node, incarnation AS writer, true AS writes FROM {own}.writers \
             WHERE changefeed = {feed} AND fenced IS NULL AND {newest}; COMMIT",
        lock = changefeed_lock(marking.changefeed),
    );
    let mut marked = run(client, &sql, "fencing writers").await?;
    let before = marked.len();
    marked.retain(|writer| writer.incarnation != 0);
    Ok((marked.len() < before).then_some(marked))
}

/// Runs a transaction that is one message, and answers the writers that it names.
async fn run(client: &Client, sql: &str, doing: &str) -> Result<Vec<Marked>, Failure> {
    let messages = match client.simple_query(sql).await {
        Ok(messages) => messages,
        Err(error) => {
            // The connection may be used again; a failed rollback shows at its next use.
            let _ = client.batch_execute("ROLLBACK").await;
            return Err(classify(error, doing));
        }
    };
    let mut writers = Vec::new();
    for message in messages {
        if let SimpleQueryMessage::Row(row) = message
            && let (Ok(Some(node)), Ok(Some(incarnation))) =
                (row.try_get("writer_node"), row.try_get("writer"))
            && let Ok(incarnation) = incarnation.parse()
        {
            let is_fenced = !matches!(row.try_get("writes"), Ok(Some("t")));
            writers.push(Marked { node: node.into(), incarnation, is_fenced });
        }
    }
    Ok(writers)
}

/// Waits until no transaction of a marked sink is left, and ends the sessions of those that do not end.
pub(crate) async fn drain(client: &Client, incarnation: i64) -> Result<Drained, Failure> {
    let begun = Instant::now();
    let take = format!(
        "BEGIN; SET LOCAL lock_timeout = '{}ms'; SELECT pg_catalog.pg_advisory_xact_lock({incarnation}); COMMIT",
        PATIENCE.as_millis()
    );
    loop {
        let Err(error) = client.batch_execute(&take).await else { return Ok(Drained::Yes) };
        let is_held = error.code().is_some_and(|code| code.code() == "55P03");
        if !is_held {
            return Err(classify(error, "waiting for the transactions of a fenced sink"));
        }
        client.batch_execute("ROLLBACK").await.map_err(|e| classify(e, "fencing writers"))?;
        let ended = client
            .query(
                "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_locks WHERE locktype = 'advisory' \
                 AND objsubid = 1 AND granted AND pid <> pg_catalog.pg_backend_pid() \
                 AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()) \
                 AND (classid::bigint << 32) | objid::bigint = $1",
                &[&incarnation],
            )
            .await;
        let why = match ended {
            Ok(sessions) => {
                tracing::info!(sessions = sessions.len(), "ended sessions of a fenced sink");
                "its session was told to end and has not".to_owned()
            }
            Err(error) if error.code().is_some_and(|code| code.code() == "42501") => {
                "the sink's user may not end its session; grant it pg_signal_backend, or end the session by hand"
                    .to_owned()
            }
            Err(error) => return Err(classify(error, "ending the sessions of a fenced sink")),
        };
        if begun.elapsed() >= LIMIT {
            return Ok(Drained::No(format!(
                "a transaction has not ended within {} s; {why}",
                LIMIT.as_secs()
            )));
        }
    }
}

/// Deletes the row of a sink that is marked and has no transaction left.
pub(crate) async fn forget(client: &Client, own: &str, incarnation: i64) -> Result<(), Failure> {
    let sql = format!("DELETE FROM {own}.writers WHERE incarnation = {incarnation} AND fenced IS NOT NULL");
    client.batch_execute(&sql).await.map_err(|e| classify(e, "removing the registration of a sink"))
}

/// Which writers are meant.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Whose<'a> {
    Incarnation(i64),
    /// Those of a changefeed whose name is this one with a slash and something behind it.
    Under {
        changefeed: &'a str,
        name: &'a str,
    },
}

/// Ends the rights of writers: when this returns nothing that they had begun is under way. Those that are not there any more
/// were ended before.
pub(crate) async fn close(client: &Client, own: &str, whose: Whose<'_>) -> Result<(), Failure> {
    let meant = match whose {
        Whose::Incarnation(incarnation) => format!("incarnation = {incarnation}"),
        Whose::Under { changefeed, name } => {
            let (feed, prefix) = (literal(changefeed), literal(&format!("{name}/")));
            format!("changefeed = {feed} AND pg_catalog.starts_with(node, {prefix})")
        }
    };
    let sql = format!(
        "UPDATE {own}.writers SET fenced = epoch WHERE {meant} AND fenced IS NULL; \
         SELECT node AS writer_node, incarnation AS writer FROM {own}.writers WHERE {meant}"
    );
    for writer in run(client, &sql, "ending the registration of a sink").await? {
        if let Drained::No(why) = drain(client, writer.incarnation).await? {
            let what = format!("a transaction of {} does not end: {why}", writer.node);
            return Err(Failure::Lost(Error::Unavailable { what, source: None }));
        }
        forget(client, own, writer.incarnation).await?;
    }
    Ok(())
}

/// A sink closes: nothing that it had begun reaches the target after this returns, if the target can be asked. If it
/// cannot, whoever takes the sink's place fences it.
pub(crate) async fn retire(config: &PgConfig, registration: &Registration) {
    let retiring = async {
        let connection = Connection::open(config).await?;
        let own = Whose::Incarnation(registration.incarnation);
        close(connection.client(), &config.own_schema, own).await
    };
    match tokio::time::timeout(RETIRE, retiring).await {
        Ok(Ok(())) => {}
        Ok(Err(failure)) => {
            let error = failure.into_error();
            tracing::debug!(%error, "the registration of a closed sink is left to its successor");
        }
        Err(_) => tracing::debug!("the registration of a closed sink is left to its successor"),
    }
}

/// Removes all registrations and fences of a changefeed: nobody may write for it any more.
pub(crate) async fn forget_all(client: &Client, config: &PgConfig, changefeed: &str) -> Result<(), Failure> {
    for relation in ["writers", "fences"] {
        let sql = format!("DELETE FROM {}.{relation} WHERE changefeed = $1", config.own_schema);
        match client.execute(&sql, &[&changefeed]).await {
            Ok(_) => {}
            // Never created: nothing to forget.
            Err(e) if e.code().is_some_and(|code| matches!(code.code(), "42P01" | "3F000")) => {}
            Err(e) => return Err(classify(e, "removing the progress of a changefeed")),
        }
    }
    Ok(())
}
