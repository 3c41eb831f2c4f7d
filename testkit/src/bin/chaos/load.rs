//! Changes the source until it is told to rest: transfers between accounts of many tables, rows that come and go,
//! transactions that are sent before they end, and the schema.
//!
//! A connection that breaks is made again; whether its last transaction was committed does not matter, since the
//! triggers at the source know.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Result, bail};
use testkit::{PgServer, Random};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_postgres::{Client, error::SqlState};

use crate::schema::Changes;
use crate::tables::Tables;

/// Pause before a broken connection is made again.
const AGAIN: Duration = Duration::from_millis(100);
/// Rows of each table that change much more often than the others.
const HOT: u64 = 4;

/// Rows of a transaction that is sent before it ends, and as many that are rolled back: more than the source decodes in memory.
const LARGE: usize = 200;

/// What the workers are to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Wish {
    Work,
    Rest,
}

/// A running load.
pub(crate) struct Load {
    wish: watch::Sender<Wish>,
    /// Workers that have no transaction open.
    resting: watch::Sender<usize>,
    workers: JoinSet<Result<()>>,
    count: usize,
    transactions: Arc<AtomicU64>,
}

impl Load {
    /// Starts at rest.
    pub(crate) fn start(
        source: &Arc<PgServer>,
        database: &'static str,
        tables: Tables,
        seed: u64,
        count: usize,
        (rate, schema_rate): (u32, u32),
    ) -> Self {
        let (wish, resting) = (watch::Sender::new(Wish::Rest), watch::Sender::new(0));
        let transactions = Arc::new(AtomicU64::new(0));
        let mut workers = JoinSet::new();
        let mut start = |script, pause| {
            let transactions = Arc::clone(&transactions);
            let worker = Worker { source: Arc::clone(source), database, script, pause, transactions };
            workers.spawn(worker.run(wish.subscribe(), resting.clone()));
        };
        let pause = Duration::from_secs(1) * u32::try_from(count).unwrap_or(1) / rate.max(1);
        for stream in 0..count {
            start(Script::Rows(Random::new(seed, stream as u64), tables), pause);
        }
        start(Script::Large, Duration::from_secs(1));
        if schema_rate > 0 {
            start(Script::Schema(Changes::new(tables)), Duration::from_secs(1) / schema_rate);
        }
        let count = workers.len();
        Self { wish, resting, workers, count, transactions }
    }

    /// Lets the workers change the source.
    pub(crate) fn work(&self) {
        self.wish.send_replace(Wish::Work);
    }

    /// Stops changes and waits until none is under way.
    pub(crate) async fn rest(&mut self) -> Result<()> {
        self.wish.send_replace(Wish::Rest);
        let mut resting = self.resting.subscribe();
        let count = self.count;
        tokio::select! {
            all = resting.wait_for(|resting| *resting == count) => all.map(drop).map_err(Into::into),
            ended = self.workers.join_next() => match ended {
                Some(result) => result?,
                None => bail!("there are no workers"),
            },
        }
    }

    /// Transactions that were committed, or may have been.
    pub(crate) fn transactions(&self) -> u64 {
        self.transactions.load(Ordering::Relaxed)
    }
}

/// What a worker does.
enum Script {
    Rows(Random, Tables),
    Large,
    Schema(Changes),
}

impl Script {
    /// The next transaction.
    fn text(&mut self) -> String {
        match self {
            Self::Rows(random, tables) => statements(random, *tables),
            Self::Large => large(),
            Self::Schema(changes) => changes.statement(),
        }
    }

    /// It was committed.
    fn done(&mut self) {
        if let Self::Schema(changes) = self {
            changes.done();
        }
    }

    /// Nobody knows whether it was committed.
    fn broke(&mut self) {
        if let Self::Schema(changes) = self {
            changes.broke();
        }
    }

    fn may_be_done(&self) -> bool {
        matches!(self, Self::Schema(changes) if changes.may_be_done())
    }
}

struct Worker {
    source: Arc<PgServer>,
    database: &'static str,
    script: Script,
    pause: Duration,
    transactions: Arc<AtomicU64>,
}

impl Worker {
    async fn run(mut self, mut wish: watch::Receiver<Wish>, resting: watch::Sender<usize>) -> Result<()> {
        let mut ticks = tokio::time::interval(self.pause.max(Duration::from_micros(100)));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut client = None;
        loop {
            if *wish.borrow_and_update() == Wish::Rest {
                resting.send_modify(|count| *count += 1);
                if wish.wait_for(|wish| *wish == Wish::Work).await.is_err() {
                    return Ok(());
                }
                resting.send_modify(|count| *count -= 1);
            }
            ticks.tick().await;
            let Some(connection) = &client else {
                client = self.connect().await;
                continue;
            };
            let text = self.script.text();
            match connection.batch_execute(&text).await {
                Ok(()) => {
                    self.script.done();
                    self.transactions.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) if error.code().is_some_and(lost_race) => {
                    // A connection that broke now is noticed by the next transaction.
                    let _ = connection.batch_execute("ROLLBACK").await;
                }
                Err(error) if error.code().is_some_and(is_mistake) => {
                    if !self.script.may_be_done() {
                        bail!("{error}: {text}");
                    }
                    self.script.done();
                    let _ = connection.batch_execute("ROLLBACK").await;
                }
                Err(_) => {
                    self.script.broke();
                    client = None;
                }
            }
        }
    }

    async fn connect(&self) -> Option<Client> {
        let client = self.source.client(self.database).await;
        match client {
            Ok(client) => {
                client.batch_execute("SET deadlock_timeout = '20ms'").await.is_ok().then_some(client)
            }
            Err(_) => {
                tokio::time::sleep(AGAIN).await;
                None
            }
        }
    }
}

/// Whether another connection was faster.
fn lost_race(code: &SqlState) -> bool {
    [SqlState::UNIQUE_VIOLATION, SqlState::T_R_DEADLOCK_DETECTED, SqlState::T_R_SERIALIZATION_FAILURE]
        .contains(code)
}

/// Whether the statements are wrong, which would make a load that does nothing.
fn is_mistake(code: &SqlState) -> bool {
    code.code().starts_with("42") || code.code().starts_with("22") || code.code().starts_with("23")
}

/// One transaction. Its rows come in the same order in every transaction, so that few of them meet in a deadlock.
fn statements(random: &mut Random, tables: Tables) -> String {
    let last = u64::from(tables.keyed.unsigned_abs()).saturating_sub(1);
    let table = |random: &mut Random| random.between(0, last);
    let accounts = tables.accounts.unsigned_abs();
    let mut rows: Vec<(u64, u64, String)> = Vec::new();
    let amount = random.between(1, 50);
    for sign in ["-", "+"] {
        let id = random.between(1, accounts);
        rows.push((table(random), id, format!("balance = balance {sign} {amount}, ")));
    }
    for _ in 0..random.between(0, 3) {
        rows.push((table(random), random.between(1, HOT.min(accounts)), String::new()));
    }
    rows.sort();
    let mut body = String::new();
    for (table, id, set) in rows {
        let name = format!("chaos.t{table:02}");
        body.push_str(&format!("UPDATE {name} SET {set}v = v + 1, at = clock_timestamp() WHERE id = {id};"));
    }
    let table = table(random);
    let name = format!("chaos.t{table:02}");
    let id = accounts + random.between(1, accounts);
    // A row that comes counts from where it went, also when somebody else is just removing it; see the triggers.
    body.push_str(&format!("SELECT pg_advisory_xact_lock({table}, {id});"));
    match random.between(0, 3) {
        0 => body.push_str(&format!("DELETE FROM {name} WHERE id = {id};")),
        1 | 2 => body.push_str(&format!(
            "INSERT INTO {name} (id, at, code, note) VALUES ({id}, clock_timestamp(), {id}, 'n{amount}') \
             ON CONFLICT DO NOTHING;"
        )),
        _ => {}
    }
    if random.between(0, 1) == 0 {
        body.push_str(
            "INSERT INTO chaos.log (id, at, note) VALUES (nextval('chaos_check.ids'), clock_timestamp(), 'a line');",
        );
    }
    format!("BEGIN; {body} COMMIT;")
}

/// A transaction that is sent before it ends, and of which a part is rolled back.
fn large() -> String {
    let rows = |words: &str| {
        format!(
            "INSERT INTO chaos.log (id, at, note) SELECT nextval('chaos_check.ids'), clock_timestamp(), \
             repeat('{words} ', 30) FROM generate_series(1, {LARGE});"
        )
    };
    format!("BEGIN; {} SAVEPOINT s; {} ROLLBACK TO s; COMMIT;", rows("many lines"), rows("never there"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_moves_an_amount_between_accounts_and_is_the_same_for_the_same_seed() {
        let tables = Tables { keyed: 3, accounts: 10 };
        let text = statements(&mut Random::new(1, 2), tables);
        assert_eq!(text, statements(&mut Random::new(1, 2), tables));
        let mut random = Random::new(5, 0);
        for _ in 0..200 {
            let text = statements(&mut random, tables);
            let amount = |sign: &str| {
                let (_, after) = text.split_once(&format!("balance {sign} ")).unwrap();
                after.split(',').next().unwrap().to_owned()
            };
            assert_eq!(amount("-"), amount("+"), "{text}");
            assert!(!text.contains("chaos.t03"), "{text}");
        }
    }
}
