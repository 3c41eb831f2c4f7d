//! A bank: money moves between tables, and every published checkpoint is held against the source's history.
//!
//! A transaction moves an amount from one table to the other, raises the version of both accounts and notes
//! number, versions and balances in a ledger, all three in different tables and so by different dispatchers.
//! The position that the source had when a commit had returned is noted. A transaction whose noted position
//! is not beyond a published checkpoint must be in all three tables of the target from then on: its ledger row,
//! and each account in this version or a later one. Whatever version an account has, it must be one that the
//! source committed, with its balance.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::json;
use testkit::{PgServer, Random};
use tokio::task::JoinSet;
use tokio_postgres::Client;

use crate::common::{
    TARGET, assert_same, caught_up, checkpoint, create, eventually, position, same, servers, start,
};

/// Accounts per table: few, so that transactions meet.
const ACCOUNTS: u64 = 40;
/// What every account begins with.
const DEPOSIT: i64 = 1000;
const TELLERS: u64 = 4;
/// Between two transactions of a teller, so that the target is never far behind and checkpoints are many.
const PAUSE: Duration = Duration::from_millis(3);
/// How long the target's tables are closed to writers, one after the other, so that some are behind others.
const CLOSED: Duration = Duration::from_millis(500);
/// Checkpoints that are held against the history.
const CHECKPOINTS: usize = 16;
const TABLES: [&str; 3] = ["checking", "savings", "ledger"];

const SCHEMA: &str = "
CREATE SEQUENCE ids START 1000;
CREATE TABLE checking (id bigint PRIMARY KEY, owner bigint NOT NULL, version bigint NOT NULL, balance bigint NOT NULL);
CREATE TABLE savings (id bigint PRIMARY KEY, owner bigint NOT NULL, version bigint NOT NULL, balance bigint NOT NULL);
CREATE TABLE ledger (number bigint PRIMARY KEY, debtor bigint, debtor_version bigint, debtor_balance bigint,
    creditor bigint, creditor_version bigint, creditor_balance bigint);
CREATE FUNCTION transfer(number bigint, debtor bigint, creditor bigint, amount bigint, new_key boolean)
RETURNS void LANGUAGE sql AS $$
    WITH d AS (UPDATE checking SET balance = balance - amount, version = version + 1,
            id = CASE WHEN new_key THEN nextval('ids') ELSE id END
        WHERE owner = debtor RETURNING version, balance),
    c AS (UPDATE savings SET balance = balance + amount, version = version + 1,
            id = CASE WHEN new_key THEN nextval('ids') ELSE id END
        WHERE owner = creditor RETURNING version, balance)
    INSERT INTO ledger SELECT number, debtor, d.version, d.balance, creditor, c.version, c.balance FROM d, c
$$;
";

/// A transaction and a position at or behind its commit.
type Noted = Vec<(u64, u64)>;

struct Tellers {
    stop: Arc<AtomicBool>,
    noted: Arc<Mutex<Noted>>,
    tasks: JoinSet<()>,
}

impl Tellers {
    async fn start(source: &PgServer, numbers: &Arc<AtomicU64>, noted: &Arc<Mutex<Noted>>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut tasks = JoinSet::new();
        for stream in 0..TELLERS {
            let client = source.client("postgres").await.unwrap();
            let random = Random::new(numbers.load(Ordering::Relaxed), stream);
            tasks.spawn(teller(client, random, Arc::clone(&stop), Arc::clone(numbers), Arc::clone(noted)));
        }
        Self { stop, noted: Arc::clone(noted), tasks }
    }

    async fn stop(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(ended) = self.tasks.join_next().await {
            ended.unwrap();
        }
    }
}

async fn teller(
    client: Client,
    mut random: Random,
    stop: Arc<AtomicBool>,
    numbers: Arc<AtomicU64>,
    noted: Arc<Mutex<Noted>>,
) {
    while !stop.load(Ordering::Relaxed) {
        let number = numbers.fetch_add(1, Ordering::Relaxed) + 1;
        let committed = client.batch_execute(&transaction(&mut random, number)).await;
        match committed {
            Ok(()) => {
                let at = position(&client).await;
                noted.lock().push((number, at));
            }
            // Two transactions of several transfers may have waited for each other.
            Err(error) => {
                assert_eq!(error.code(), Some(&tokio_postgres::error::SqlState::T_R_DEADLOCK_DETECTED));
                client.batch_execute("ROLLBACK").await.unwrap();
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// One transfer or a few, sometimes with a key that changes, beside changes that are taken back.
fn transaction(random: &mut Random, number: u64) -> String {
    let mut transfer = |number: i64| {
        let (debtor, creditor) = (random.between(1, ACCOUNTS), random.between(1, ACCOUNTS));
        let (amount, new_key) = (random.between(1, 50), random.between(0, 3) == 0);
        format!("SELECT transfer({number}, {debtor}, {creditor}, {amount}, {new_key});")
    };
    let number = i64::try_from(number).unwrap();
    let kept = transfer(number * 10);
    let body = match number % 7 {
        0 => format!("SAVEPOINT s; {} ROLLBACK TO s; {kept} RELEASE s;", transfer(-number)),
        1 => format!("{kept} SAVEPOINT s; DELETE FROM checking; {} ROLLBACK TO s;", transfer(-number)),
        2 => format!("{kept} {} {}", transfer(number * 10 + 1), transfer(number * 10 + 2)),
        3 => format!("{} ROLLBACK; BEGIN; {kept}", transfer(-number)),
        _ => kept,
    };
    format!("BEGIN; {body} COMMIT;")
}

/// Closes one table of the target after the other to writers; readers may go on.
async fn disturb(target: Client, stop: Arc<AtomicBool>) {
    for table in TABLES.iter().cycle().take_while(|_| !stop.load(Ordering::Relaxed)) {
        let missing =
            target.batch_execute(&format!("BEGIN; LOCK TABLE {table} IN EXCLUSIVE MODE")).await.is_err();
        tokio::time::sleep(if missing { PAUSE } else { CLOSED }).await;
        target.batch_execute("ROLLBACK").await.unwrap();
        tokio::time::sleep(CLOSED / 4).await;
    }
}

/// An account's owner, version and balance.
type Account = (i64, i64, i64);

/// What the three tables hold at one moment.
struct Books {
    checking: Vec<Account>,
    savings: Vec<Account>,
    ledger: BTreeMap<i64, (Account, Account)>,
}

impl Books {
    async fn read(server: &PgServer, database: &str) -> Self {
        let client = server.client(database).await.unwrap();
        client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await.unwrap();
        let triple =
            |row: &tokio_postgres::Row, from: usize| (row.get(from), row.get(from + 1), row.get(from + 2));
        let accounts = async |table: &str| {
            let sql = format!("SELECT owner, version, balance FROM {table} ORDER BY owner");
            client.query(&sql, &[]).await.unwrap().iter().map(|row| triple(row, 0)).collect::<Vec<_>>()
        };
        let (checking, savings) = (accounts("checking").await, accounts("savings").await);
        let rows = client.query("SELECT * FROM ledger", &[]).await.unwrap();
        let ledger = rows.iter().map(|row| (row.get(0), (triple(row, 1), triple(row, 4)))).collect();
        Self { checking, savings, ledger }
    }

    fn sum(&self) -> i64 {
        self.checking.iter().chain(&self.savings).map(|(_, _, balance)| balance).sum()
    }

    fn debtors(&self) -> Vec<(i64, Account)> {
        self.ledger.iter().map(|(number, (debtor, _))| (*number, *debtor)).collect()
    }

    fn creditors(&self) -> Vec<(i64, Account)> {
        self.ledger.iter().map(|(number, (_, creditor))| (*number, *creditor)).collect()
    }
}

/// Whether accounts of the target are in states that the source had, none older than the promised ledger rows say.
fn check_accounts(table: &str, accounts: &[Account], history: &[(i64, Account)], promised: &[i64]) {
    let owners: Vec<i64> = accounts.iter().map(|account| account.0).collect();
    let expected: Vec<i64> = (1..=i64::try_from(ACCOUNTS).unwrap()).collect();
    assert_eq!(owners, expected, "{table}: every account is there once");
    let states: BTreeMap<(i64, i64), i64> =
        history.iter().map(|&(_, (owner, version, balance))| ((owner, version), balance)).collect();
    let mut oldest: BTreeMap<i64, i64> = BTreeMap::new();
    for &(number, (owner, version, _)) in history {
        if promised.binary_search(&number).is_ok() {
            let known = oldest.entry(owner).or_default();
            *known = version.max(*known);
        }
    }
    for &(owner, version, balance) in accounts {
        let state = if version == 0 { Some(&DEPOSIT) } else { states.get(&(owner, version)) };
        assert_eq!(state, Some(&balance), "{table}: account {owner} at version {version}");
        let oldest = oldest.get(&owner).copied().unwrap_or_default();
        assert!(version >= oldest, "{table}: account {owner} is at version {version}, not yet at {oldest}");
    }
}

/// Holds the target against what the source had at a checkpoint. Answers how many transactions it promised.
async fn check(source: &PgServer, target: &PgServer, noted: &Noted, checkpoint: u64) -> usize {
    let seen = Books::read(target, TARGET).await;
    let truth = Books::read(source, "postgres").await;
    let promised: Vec<i64> = noted
        .iter()
        .filter(|(_, at)| *at <= checkpoint)
        .flat_map(|(number, _)| {
            let first = i64::try_from(*number).unwrap() * 10;
            truth.ledger.range(first..first + 10).map(|(number, _)| *number)
        })
        .collect();
    for number in &promised {
        assert_eq!(seen.ledger.get(number), truth.ledger.get(number), "transfer {number} at {checkpoint}");
    }
    for (number, transfer) in &seen.ledger {
        assert_eq!(truth.ledger.get(number), Some(transfer), "transfer {number} was never committed");
    }
    let mut promised = promised;
    promised.sort_unstable();
    check_accounts("checking", &seen.checking, &truth.debtors(), &promised);
    check_accounts("savings", &seen.savings, &truth.creditors(), &promised);
    promised.len()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_published_checkpoint_holds_all_transactions_up_to_it_in_every_table() {
    let (source, target) = servers().await;
    source.sql("postgres", SCHEMA).await.unwrap();
    for table in &TABLES[..2] {
        let fill =
            format!("INSERT INTO {table} SELECT i, i, 0, {DEPOSIT} FROM generate_series(1, {ACCOUNTS}) i");
        source.sql("postgres", &fill).await.unwrap();
    }
    let total = DEPOSIT * 2 * i64::try_from(ACCOUNTS).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    let (numbers, noted) = (Arc::new(AtomicU64::new(0)), Arc::default());
    let mut tellers = Tellers::start(&source, &numbers, &noted).await;
    let calm = Arc::new(AtomicBool::new(false));
    let disturber = tokio::spawn(disturb(target.client(TARGET).await.unwrap(), Arc::clone(&calm)));
    let begin = create(&client, &source, &target.uri(TARGET), json!({})).await.unwrap();
    let mut last = begin["checkpoint_ts"].as_u64().unwrap();
    let mut promised = Vec::new();
    while promised.len() < CHECKPOINTS {
        // A new checkpoint, and the target after it was published.
        eventually("the checkpoint moves", async || checkpoint(&client).await > last).await;
        let now = checkpoint(&client).await;
        assert!(now > last, "a checkpoint never moves back");
        last = now;
        let known = tellers.noted.lock().clone();
        promised.push(check(&source, &target, &known, now).await);
        if promised.len() % 5 != 0 {
            continue;
        }
        // A quiet moment: then the target is the source, at once and without a second look.
        tellers.stop().await;
        caught_up(&client, &source).await;
        assert_eq!(Books::read(&target, TARGET).await.sum(), total);
        for table in TABLES {
            assert_same(&source, &target, table, "at a checkpoint of a quiet source").await;
        }
        tellers = Tellers::start(&source, &numbers, &noted).await;
    }
    tellers.stop().await;
    calm.store(true, Ordering::Relaxed);
    disturber.await.unwrap();
    assert!(promised.last() > promised.first(), "checkpoints followed the load: {promised:?}");
    for table in TABLES {
        same(&source, &target, table).await;
    }
    assert_eq!(Books::read(&target, TARGET).await.sum(), total);
    println!("transfers promised by {} checkpoints: {promised:?}", promised.len());
    node.stop().await.unwrap();
}
