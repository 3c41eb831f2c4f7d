//! A mixed load on tables that are hard to replicate.
//!
//! Every transaction is made by `statements` from a seeded sequence; the connections race, so the outcome
//! is not the same twice, and a transaction that loses a race is rolled back and counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::{PgServer, Random};

/// The tables that the load changes, named as in SQL.
pub const TABLES: [&str; 7] = [
    "shop.accounts",
    "shop.seats",
    "shop.documents",
    "shop.events",
    "shop.scratch",
    "\"Odd Schema\".\"Weird \"\"Table\"",
    "shop.marker",
];

/// Makes the tables. `documents.body` is stored out of line and not compressed, so an update that leaves it
/// alone does not log it.
const SCHEMA: &str = r#"
CREATE SCHEMA shop;
CREATE SCHEMA "Odd Schema";
CREATE SEQUENCE shop.ids START 10000000;
CREATE TABLE shop.accounts (
    id bigint PRIMARY KEY, balance numeric NOT NULL, note text, tags int[], at timestamptz, raw bytea, doc jsonb);
CREATE TABLE shop.seats (
    id bigint PRIMARY KEY, code bigint UNIQUE, line bigint, place bigint, label text, UNIQUE (line, place));
CREATE TABLE shop.documents (id bigint PRIMARY KEY, title text, version bigint NOT NULL, body text, appendix text);
ALTER TABLE shop.documents ALTER body SET STORAGE EXTERNAL, ALTER appendix SET STORAGE EXTERNAL;
CREATE TABLE shop.events (kind bigint, payload text, extra text, big text);
ALTER TABLE shop.events REPLICA IDENTITY FULL;
ALTER TABLE shop.events ALTER big SET STORAGE EXTERNAL;
CREATE TABLE shop.scratch (id bigint PRIMARY KEY, value text);
CREATE TABLE "Odd Schema"."Weird ""Table" (
    "Key A" bigint, "b.c" text, "select" text, "ünï" text, PRIMARY KEY ("Key A", "b.c"));
CREATE TABLE shop.marker (id bigint PRIMARY KEY);
"#;

/// Sets the tables up and fills them with about `rows` rows.
///
/// # Errors
/// When the server refuses a statement.
pub async fn prepare(client: &Client, rows: u64) -> Result<()> {
    client.batch_execute(SCHEMA).await?;
    let Sizes { accounts, seats, documents, events, odd } = Sizes::of(rows);
    client
        .batch_execute(&format!(
            r#"
INSERT INTO shop.accounts SELECT i, i * 1.25, md5(i::text), ARRAY[i, -i],
    timestamptz '2026-01-01' + i * interval '1 s', decode(md5(i::text), 'hex'),
    jsonb_build_object('n', i) FROM generate_series(1, {accounts}) i;
INSERT INTO shop.seats SELECT i, i, i / 10, i % 10, 'seat ' || i FROM generate_series(1, {seats}) i;
INSERT INTO shop.documents SELECT i, 'title ' || i, 0, repeat(md5(i::text), 300 + i % 300), NULL
    FROM generate_series(1, {documents}) i;
INSERT INTO shop.events SELECT i % {kinds}, 'event ' || i % {kinds}, nullif(i % 3, 0)::text, NULL
    FROM generate_series(1, {events}) i;
INSERT INTO "Odd Schema"."Weird ""Table" SELECT i, 'k\' || i % 7, 'it''s "' || i, E'tab\t nl\n' || i
    FROM generate_series(1, {odd}) i;
"#,
            kinds = KINDS
        ))
        .await?;
    Ok(())
}

/// Different values in the table that has no key, so that each is there many times.
const KINDS: u64 = 500;

/// Rows of each table at the start.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    accounts: u64,
    seats: u64,
    documents: u64,
    events: u64,
    odd: u64,
}

impl Sizes {
    fn of(rows: u64) -> Self {
        let part = |percent: u64| (rows * percent / 100).max(10);
        let documents = (rows / 100).clamp(10, 2000);
        Self { accounts: part(75), seats: part(10), documents, events: part(10), odd: part(4) }
    }
}

/// What a load has done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LoadStats {
    /// Transactions that were sent and not refused; some of them roll themselves back.
    pub transactions: u64,
    /// Transactions that the server rolled back because they lost a race.
    pub refused: u64,
}

/// A running load.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    workers: JoinSet<Result<LoadStats>>,
}

impl Load {
    /// Starts the load on several connections, at most `rate` transactions a second over all of them.
    ///
    /// # Errors
    /// When the server does not accept a connection.
    pub async fn start(
        server: &PgServer,
        database: &str,
        seed: u64,
        connections: u64,
        rate: u64,
        rows: u64,
    ) -> Result<Self> {
        let pause = Duration::from_secs(1) * u32::try_from(connections.max(1))? / u32::try_from(rate.max(1))?;
        let pace = Pace { pause: pause.max(Duration::from_micros(1)), most: u64::MAX };
        Self::at(server, database, seed, connections, rows, pace).await
    }

    async fn at(
        server: &PgServer,
        database: &str,
        seed: u64,
        connections: u64,
        rows: u64,
        pace: Pace,
    ) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut workers = JoinSet::new();
        for stream in 0..connections {
            let client = server.client(database).await?;
            client.batch_execute("SET deadlock_timeout = '20ms'").await?;
            let (stop, random) = (Arc::clone(&stop), Random::new(seed, stream));
            workers.spawn(work(client, random, Sizes::of(rows), pace, stop));
        }
        Ok(Self { stop, workers })
    }

    /// Makes so many transactions, as fast as the server takes them.
    ///
    /// # Errors
    /// When the server does not accept a connection, or one fails.
    pub async fn backlog(
        server: &PgServer,
        database: &str,
        connections: u64,
        transactions: u64,
        rows: u64,
    ) -> Result<LoadStats> {
        let pace = Pace { pause: Duration::ZERO, most: transactions / connections.max(1) };
        Self::at(server, database, 1, connections, rows, pace).await?.ended().await
    }

    /// Ends the load; every transaction that was begun is finished.
    ///
    /// # Errors
    /// When a connection failed.
    pub async fn stop(self) -> Result<LoadStats> {
        self.stop.store(true, Ordering::Relaxed);
        self.ended().await
    }

    async fn ended(mut self) -> Result<LoadStats> {
        let mut all = LoadStats::default();
        while let Some(worker) = self.workers.join_next().await {
            let stats = worker??;
            all.transactions += stats.transactions;
            all.refused += stats.refused;
        }
        Ok(all)
    }
}

/// How one connection goes on.
#[derive(Clone, Copy, Debug)]
struct Pace {
    /// Between the beginnings of two transactions; zero is none.
    pause: Duration,
    /// Transactions at most.
    most: u64,
}

async fn work(
    client: Client,
    mut random: Random,
    sizes: Sizes,
    pace: Pace,
    stop: Arc<AtomicBool>,
) -> Result<LoadStats> {
    let mut stats = LoadStats::default();
    let mut ticks = tokio::time::interval_at(Instant::now(), pace.pause.max(Duration::from_micros(1)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !stop.load(Ordering::Relaxed) && stats.transactions + stats.refused < pace.most {
        if !pace.pause.is_zero() {
            ticks.tick().await;
        }
        let text = statements(&mut random, sizes);
        match client.batch_execute(&text).await {
            Ok(()) => stats.transactions += 1,
            Err(error) if error.code().is_some_and(lost_race) => {
                stats.refused += 1;
                client.batch_execute("ROLLBACK").await?;
            }
            Err(error) => return Err(anyhow::Error::from(error).context(text)),
        }
    }
    Ok(stats)
}

/// Whether another connection was faster; everything else is a mistake in the statements.
fn lost_race(code: &SqlState) -> bool {
    [SqlState::UNIQUE_VIOLATION, SqlState::T_R_DEADLOCK_DETECTED, SqlState::T_R_SERIALIZATION_FAILURE]
        .contains(code)
}

/// The statements of one transaction.
fn statements(random: &mut Random, sizes: Sizes) -> String {
    // A little above the first ids, so that some statements find nothing.
    let account = random.between(1, sizes.accounts + sizes.accounts / 50);
    let other = random.between(1, sizes.accounts);
    let number = random.between(1, 1_000_000);
    let body = match random.between(0, 99) {
        0..18 => {
            let count = random.between(1, 6);
            format!(
                "INSERT INTO shop.accounts SELECT nextval('shop.ids'), {number}.5, 'new', NULL, clock_timestamp(), NULL, \
                 '{{\"a\": [1, null]}}' FROM generate_series(1, {count});"
            )
        }
        18..34 => format!(
            "UPDATE shop.accounts SET balance = balance + {number}, note = NULL WHERE id = {account}; \
             UPDATE shop.accounts SET tags = tags || {number}, doc = NULL WHERE id = {other};"
        ),
        34..38 => format!("UPDATE shop.accounts SET id = nextval('shop.ids') WHERE id = {account};"),
        38..41 => moved_keys(account, other),
        41..44 => format!("DELETE FROM shop.accounts WHERE id = {account};"),
        44..46 => {
            let end = other + random.between(10, 400);
            format!("UPDATE shop.accounts SET note = 'wide {number}' WHERE id BETWEEN {other} AND {end};")
        }
        46..49 => format!(
            "DELETE FROM shop.accounts WHERE id = {account}; INSERT INTO shop.accounts VALUES ({account}, 0, 'again') \
             ON CONFLICT DO NOTHING; UPDATE shop.accounts SET balance = {number} WHERE id = {account};"
        ),
        49..57 => seats(random, sizes.seats),
        57..69 => documents(random, sizes.documents, number),
        69..81 => events(random, number),
        81..88 => odd(random, sizes.odd, number),
        88..95 => savepoints(account, other, number),
        95..97 => format!(
            "UPDATE shop.accounts SET balance = -1 WHERE id BETWEEN {other} AND {other} + 20; \
             INSERT INTO shop.events VALUES (-1, 'never', NULL, NULL); ROLLBACK; BEGIN;"
        ),
        97..98 => format!(
            "TRUNCATE shop.scratch; INSERT INTO shop.scratch SELECT i, 'after {number}' FROM generate_series(1, 20) i \
             ON CONFLICT DO NOTHING;"
        ),
        _ => format!(
            "INSERT INTO shop.scratch VALUES ({number}, 'x') ON CONFLICT (id) DO UPDATE SET value = 'y'; \
             UPDATE shop.scratch SET value = value || 'z' WHERE id <= 3;"
        ),
    };
    format!("BEGIN; {body} COMMIT;")
}

/// Two keys change places through a third, and a key that became free is taken at once.
fn moved_keys(a: u64, b: u64) -> String {
    format!(
        "UPDATE shop.accounts SET id = -{a} WHERE id = {a}; UPDATE shop.accounts SET id = {a} WHERE id = {b}; \
         UPDATE shop.accounts SET id = {b} WHERE id = -{a}; UPDATE shop.accounts SET id = nextval('shop.ids') \
         WHERE id = {a}; INSERT INTO shop.accounts VALUES ({a}, 7, 'taken') ON CONFLICT DO NOTHING;"
    )
}

/// Values under a unique constraint move between rows whose primary keys stay.
fn seats(random: &mut Random, count: u64) -> String {
    let (a, b) = (random.between(1, count), random.between(1, count));
    let change = match random.between(0, 3) {
        0 => format!(
            "UPDATE shop.seats SET code = -{a} WHERE id = {a}; UPDATE shop.seats SET code = x.code WHERE id = {b}; \
             UPDATE shop.seats SET code = y.code WHERE id = {a};"
        ),
        1 => format!(
            "UPDATE shop.seats SET place = -{a} WHERE id = {a}; \
             UPDATE shop.seats SET line = x.line, place = x.place, code = NULL WHERE id = {b}; \
             UPDATE shop.seats SET line = y.line, place = y.place WHERE id = {a}; \
             UPDATE shop.seats SET code = y.code WHERE id = {b};"
        ),
        // The value goes on in a row with another key.
        2 => format!(
            "DELETE FROM shop.seats WHERE id = {a}; \
             INSERT INTO shop.seats VALUES (nextval('shop.ids'), x.code, x.line, x.place, 'moved'); \
             INSERT INTO shop.seats VALUES ({a}, NULL, NULL, NULL, 'without');"
        ),
        _ => format!(
            "UPDATE shop.seats SET code = nextval('shop.ids') WHERE id = {a}; \
             UPDATE shop.seats SET code = x.code, label = 'heir' WHERE id = {b};"
        ),
    };
    format!(
        "DO $$ DECLARE x shop.seats; y shop.seats; BEGIN \
         SELECT * INTO x FROM shop.seats WHERE id = {a} FOR UPDATE; \
         SELECT * INTO y FROM shop.seats WHERE id = {b} FOR UPDATE; \
         IF x.id IS NOT NULL AND y.id IS NOT NULL AND x.id <> y.id THEN {change} END IF; END $$;"
    )
}

/// Large values: new ones, ones that an update leaves alone, and ones that move with their row's key.
fn documents(random: &mut Random, count: u64, number: u64) -> String {
    let (free, start) = (random.between(1, count * 2), random.between(1, count * 2));
    let pieces = random.between(300, 900);
    let one = format!("id = (SELECT id FROM shop.documents WHERE id >= {start} ORDER BY id LIMIT 1)");
    match random.between(0, 11) {
        0 | 1 => format!(
            "INSERT INTO shop.documents VALUES ({free}, 'new {number}', 0, repeat(md5('{number}'), {pieces}), NULL) \
             ON CONFLICT DO NOTHING;"
        ),
        2 => format!("DELETE FROM shop.documents WHERE {one};"),
        3 => format!("UPDATE shop.documents SET body = repeat(md5('{number}'), {pieces}) WHERE {one};"),
        4 => format!(
            "UPDATE shop.documents SET appendix = repeat('{number} ', {pieces} * 5), version = version + 1 WHERE {one};"
        ),
        5 | 6 => format!("UPDATE shop.documents SET id = {free}, version = version + 1 WHERE {one};"),
        7 => format!("UPDATE shop.documents SET body = NULL, title = 'empty' WHERE {one};"),
        _ => format!(
            "UPDATE shop.documents SET version = version + 1 WHERE {one}; \
             UPDATE shop.documents SET title = 'title {number}' WHERE {one};"
        ),
    }
}

/// Rows that are there several times; an update or a delete means exactly one of them.
fn events(random: &mut Random, number: u64) -> String {
    let kind = random.between(0, KINDS - 1);
    let one = format!("ctid = (SELECT ctid FROM shop.events WHERE kind = {kind} LIMIT 1)");
    match random.between(0, 9) {
        0..=3 => {
            let count = random.between(1, 4);
            format!(
                "INSERT INTO shop.events SELECT {kind}, 'event {kind}', NULL, NULL FROM generate_series(1, {count});"
            )
        }
        4 => format!("DELETE FROM shop.events WHERE {one};"),
        5 => format!("UPDATE shop.events SET extra = 'one of them' WHERE {one};"),
        6 => format!("UPDATE shop.events SET payload = 'all {number}' WHERE kind = {kind};"),
        7 => format!("DELETE FROM shop.events WHERE kind = {kind};"),
        8 => format!("UPDATE shop.events SET big = repeat('{kind},', 4000), kind = {kind} WHERE {one};"),
        _ => format!(
            "INSERT INTO shop.events VALUES (NULL, NULL, NULL, NULL), (NULL, 'null kind {kind}', NULL, NULL);"
        ),
    }
}

/// Names and values that need quoting, and a key of two columns.
fn odd(random: &mut Random, count: u64, number: u64) -> String {
    let table = TABLES[5];
    let (a, word) = (random.between(1, count), random.between(0, 9));
    match random.between(0, 3) {
        0 => format!(
            "INSERT INTO {table} VALUES ({a}, 'w''{word}\\', NULL, '\\N {number}') \
             ON CONFLICT (\"Key A\", \"b.c\") DO UPDATE SET \"select\" = 'again ' || {number};"
        ),
        1 => format!("UPDATE {table} SET \"ünï\" = 'ß \"{number}\"' WHERE \"Key A\" = {a};"),
        2 => format!(
            "UPDATE {table} SET \"b.c\" = \"b.c\" || '{word}' WHERE \"Key A\" = {a} AND length(\"b.c\") < 40;"
        ),
        _ => format!("DELETE FROM {table} WHERE \"Key A\" = {a} AND \"b.c\" LIKE '%{word}%';"),
    }
}

/// Parts of a transaction that are taken back, and parts that stay.
fn savepoints(a: u64, b: u64, number: u64) -> String {
    format!(
        "UPDATE shop.accounts SET note = 'kept {number}' WHERE id = {a}; SAVEPOINT one; \
         DELETE FROM shop.accounts WHERE id BETWEEN {b} AND {b} + 5; INSERT INTO shop.events VALUES (-2, 'never', NULL, NULL); \
         ROLLBACK TO one; SAVEPOINT two; UPDATE shop.accounts SET balance = {number} WHERE id = {b}; SAVEPOINT three; \
         UPDATE shop.accounts SET balance = -2 WHERE id = {b}; ROLLBACK TO three; \
         INSERT INTO shop.events VALUES (1, 'after a savepoint', NULL, NULL); RELEASE two;"
    )
}
