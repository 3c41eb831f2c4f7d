//! What it costs a transaction that its sink can be fenced: the transactions of the PostgreSQL sink, with and without
//! the lock and the condition, in turns against one server.
//!
//! ```text
//! cargo run --release -p sink --example fence                 # a server of its own, 8 workers
//! cargo run --release -p sink --example fence -- 16 20        # 16 workers, 20 rounds
//! cargo run --release -p sink --example fence -- 8 1 50       # turns of 50 ms, where 400 are usual
//! ```
//!
//! Prints for 1, 10 and 1000 rows in a transaction, and for each way to be fenced, the throughput in relation to no
//! fence at all, the log that one transaction writes, and the multixact members that it uses up.

use std::error::Error;
use std::time::{Duration, Instant};

use futures_util::future::join;
use testkit::PgServer;
use tokio_postgres::Client;
use tokio_postgres::types::ToSql;

/// How a transaction makes sure that its sink may write.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// Not at all.
    Nothing,
    /// As the sink does: shares an advisory lock, and reads its row with the statement that moves the progress.
    Advisory,
    /// Shares the lock of one row with all other workers.
    OneRow,
    /// Shares the lock of a row that is the worker's own.
    OwnRow,
}

const WAYS: [(Way, &str); 4] = [
    (Way::Nothing, "no fence"),
    (Way::Advisory, "advisory lock"),
    (Way::OneRow, "one row"),
    (Way::OwnRow, "row per worker"),
];

const SETUP: &str = "CREATE TABLE progress (shard int PRIMARY KEY, ts numeric(20) NOT NULL) WITH (fillfactor = 40); \
    INSERT INTO progress SELECT n, 0 FROM generate_series(0, 63) n; \
    CREATE TABLE writers (incarnation bigint PRIMARY KEY, fenced numeric(20)); \
    INSERT INTO writers SELECT n, NULL FROM generate_series(0, 63) n; \
    CREATE TABLE rows (shard int, id bigint, v text, PRIMARY KEY (shard, id)); \
    SET synchronous_commit = off";

struct Worker {
    client: Client,
    shard: i32,
    next: i64,
    advance: Vec<(Way, tokio_postgres::Statement)>,
    insert: tokio_postgres::Statement,
}

impl Worker {
    async fn new(server: &PgServer, shard: i32) -> Result<Self, Box<dyn Error>> {
        let client = server.client("bench").await?;
        client.batch_execute("SET enable_seqscan = off; SET synchronous_commit = off").await?;
        let mut advance = Vec::new();
        for (way, _) in WAYS {
            let update = "UPDATE progress SET ts = ts + 1 WHERE shard = $1";
            let of_row = |row: i32| {
                format!(
                    "WITH me AS (SELECT FROM writers WHERE incarnation = {row} AND fenced IS NULL FOR SHARE) \
                     {update} AND EXISTS (SELECT FROM me)"
                )
            };
            let sql = match way {
                Way::Nothing => update.to_owned(),
                Way::Advisory => format!(
                    "{update} AND EXISTS (SELECT FROM writers WHERE incarnation = 0 AND fenced IS NULL)"
                ),
                Way::OneRow => of_row(0),
                Way::OwnRow => of_row(shard),
            };
            advance.push((way, client.prepare(&sql).await?));
        }
        let insert = client
            .prepare("INSERT INTO rows SELECT $1, n, 'a text of common length' FROM generate_series($2::bigint, $3::bigint) n")
            .await?;
        Ok(Self { client, shard, next: 0, advance, insert })
    }

    /// Transactions until the turn is over.
    async fn run(&mut self, way: Way, rows: i64, until: Instant) -> Result<u64, tokio_postgres::Error> {
        let begin = match way {
            Way::Advisory => "BEGIN; SELECT pg_advisory_xact_lock_shared(0)",
            Way::Nothing | Way::OneRow | Way::OwnRow => "BEGIN",
        };
        let mut done = 0;
        while Instant::now() < until {
            let (first, last) = (self.next + 1, self.next + rows);
            self.next = last;
            let advance = self.advance.iter().find(|(of, _)| *of == way).map(|(_, advance)| advance);
            let Some(advance) = advance else { return Ok(done) };
            // As in the sink: beginning, progress and rows leave together.
            let client = &self.client;
            let moved: [&(dyn ToSql + Sync); 1] = [&self.shard];
            let new: [&(dyn ToSql + Sync); 3] = [&self.shard, &first, &last];
            let begun = join(client.batch_execute(begin), client.execute(advance, &moved));
            let (begun, inserted) = join(begun, client.execute(&self.insert, &new)).await;
            begun.0?;
            assert_eq!(begun.1?, 1, "it may write");
            inserted?;
            client.batch_execute("COMMIT").await?;
            done += 1;
        }
        Ok(done)
    }
}

/// All workers at once; answers transactions a second.
async fn turn(
    workers: &mut [Worker],
    way: Way,
    rows: i64,
    long: Duration,
) -> Result<(f64, u64), Box<dyn Error>> {
    let begun = Instant::now();
    let running = workers.iter_mut().map(|worker| worker.run(way, rows, begun + long));
    let mut total = 0;
    for done in futures_util::future::join_all(running).await {
        total += done?;
    }
    Ok((f64::from(u32::try_from(total)?) / begun.elapsed().as_secs_f64(), total))
}

/// Bytes of log, and multixact members.
async fn used(client: &Client) -> Result<(i64, i64), tokio_postgres::Error> {
    client.batch_execute("CHECKPOINT").await?;
    let sql = "SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint, next_multi_offset::text::bigint \
               FROM pg_control_checkpoint()";
    let row = client.query_one(sql, &[]).await?;
    Ok((row.get(0), row.get(1)))
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn per(used: i64, transactions: u64) -> f64 {
    used as f64 / transactions.max(1) as f64
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let count: i32 = args.next().map_or(Ok(8), |n| n.parse())?;
    let rounds: usize = args.next().map_or(Ok(11), |n| n.parse())?;
    // One way's turn.
    let long = Duration::from_millis(args.next().map_or(Ok(400), |n| n.parse())?);
    let server = PgServer::start().await?;
    server.sql("postgres", "CREATE DATABASE bench").await?;
    let client = server.client("bench").await?;
    client.batch_execute(SETUP).await?;
    let mut workers = Vec::new();
    for shard in 0..count {
        workers.push(Worker::new(&server, shard).await?);
    }
    println!("{count} workers, {rounds} rounds; the medians of the rounds' ratios\n");
    println!(
        "{:>6}  {:<15} {:>8} {:>8} {:>10} {:>9}",
        "rows", "way", "txn/s", "ratio", "log B/txn", "members"
    );
    for rows in [1, 10, 1000] {
        let mut ratios = vec![Vec::new(); WAYS.len()];
        let mut speeds = vec![Vec::new(); WAYS.len()];
        for round in 0..rounds {
            client.batch_execute("TRUNCATE rows").await?;
            let mut speed = [0.0; WAYS.len()];
            // Whoever comes first in a round has the warmest or coldest server: they take turns.
            for n in 0..WAYS.len() {
                let at = (n + round) % WAYS.len();
                speed[at] = turn(&mut workers, WAYS[at].0, rows, long).await?.0;
            }
            for at in 0..WAYS.len() {
                speeds[at].push(speed[at]);
                ratios[at].push(speed[at] / speed[0]);
            }
        }
        for (at, (way, name)) in WAYS.into_iter().enumerate() {
            client.batch_execute("TRUNCATE rows").await?;
            // Behind the first touch of every page, which is logged as a whole.
            used(&client).await?;
            turn(&mut workers, way, rows, long).await?;
            let sql = "SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint";
            let log: i64 = client.query_one(sql, &[]).await?.get(0);
            let (_, done) = turn(&mut workers, way, rows, long).await?;
            let log = client.query_one(sql, &[]).await?.get::<_, i64>(0) - log;
            let (_, before) = used(&client).await?;
            let (_, again) = turn(&mut workers, way, rows, long).await?;
            let (_, after) = used(&client).await?;
            println!(
                "{rows:>6}  {name:<15} {:>8.0} {:>8.3} {:>10.0} {:>9.2}",
                median(&mut speeds[at]),
                median(&mut ratios[at]),
                per(log, done),
                per(after - before, again),
            );
        }
    }
    Ok(())
}
