//! Measures how old changes are when they are committed in a second server, under a load of half and of nine tenths of
//! what can be applied, next to PostgreSQL's own logical replication under the same shares of what that can apply.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use testkit::figures::{load, median};
use testkit::pair::{self, Tables, feed_name};
use testkit::plot::{self, Chart, Line};
use testkit::{Millrace, Pair};
use tokio_postgres::Client;

/// Rows that a transaction updates; it inserts as many.
const ROWS: u64 = 10;
/// Connections of the load, each with accounts of its own.
const CONNECTIONS: u64 = 4;
/// Percentages of the applied rate.
const LEVELS: [u64; 2] = [50, 90];
/// How long one way may take for a backlog, or to come to rest after a load.
const LIMIT: Duration = Duration::from_secs(600);
/// How often a state is looked at.
const LOOK: Duration = Duration::from_millis(10);
/// Lines of the log that are shown after a failure.
const LOG_LINES: usize = 50;
/// Transactions of the target and when they committed.
const COMMITTED: &str = "CREATE TEMPORARY TABLE committed (xid bigint PRIMARY KEY, at timestamptz NOT NULL)";
/// Ages of the changes of a run: milliseconds between the time in the row and the commit in the target.
const AGES: &str = "SELECT percentile_disc(ARRAY[0.5, 0.95, 0.99, 0.999, 1]::float8[]) WITHIN GROUP (ORDER BY ms), count(ms), \
        count(*) \
    FROM (SELECT xmin, mtime FROM pgbench_history WHERE mtime > $1::text::timestamptz \
          UNION ALL SELECT xmin, btrim(filler)::timestamptz FROM pgbench_accounts \
            WHERE filler > '2' AND btrim(filler)::timestamptz > $1::text::timestamptz) AS change (xid, at) \
    LEFT JOIN committed ON committed.xid = change.xid::text::bigint, \
    LATERAL (SELECT extract(epoch FROM committed.at - change.at)::float8 * 1000 AS ms) AS age";

/// Measures the age of changes when they are committed in the target.
#[derive(Parser, Debug)]
#[command(name = "lag")]
struct Arguments {
    /// The program; by default the one that was built beside this one.
    #[arg(long)]
    millrace: Option<PathBuf>,
    /// Length of one load, in seconds.
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    /// How often each way meets each load.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=9))]
    rounds: u64,
    /// Row changes of the backlog from which the applied rates are taken.
    #[arg(long, default_value_t = 400_000)]
    changes: u64,
    /// Size of the tables: 100,000 accounts each.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=1000))]
    scale: u64,
    /// `synchronous_commit` of the target, for both ways.
    #[arg(long, default_value = "on", value_parser = ["on", "off"])]
    synchronous_commit: String,
    /// Draws the ages into a file, as SVG.
    #[arg(long)]
    plot: Option<PathBuf>,
    /// Short loads, once: whether the program works.
    #[arg(long)]
    quick: bool,
}

/// One of the two ways.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Native,
    Millrace,
}

impl Way {
    const ALL: [Self; 2] = [Self::Native, Self::Millrace];

    const fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Millrace => "millrace",
        }
    }
}

/// Ages of changes, in milliseconds.
#[derive(Clone, Copy, Default, Debug)]
struct Ages {
    /// Half, 95, 99, 99.9 and 100 of a hundred are not older.
    at: [f64; 5],
}

impl std::fmt::Display for Ages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [p50, p95, p99, p999, most] = self.at;
        write!(f, "p50 {p50:8.1}  p95 {p95:8.1}  p99 {p99:8.1}  p99.9 {p999:8.1}  most {most:8.1} ms")
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    if arguments.quick {
        (arguments.seconds, arguments.rounds, arguments.changes, arguments.scale) = (3, 1, 20_000, 1);
    }
    match run(&arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: &Arguments) -> Result<()> {
    let pair = Pair::start(Tables::Pgbench(arguments.scale), &arguments.synchronous_commit).await?;
    let work = tempfile::Builder::new().prefix("millrace-lag-").tempdir()?;
    let program = arguments.millrace.clone().unwrap_or_else(Millrace::default_program);
    let mut bench = Bench {
        script: work.path().join("load.sql"),
        millrace: Millrace::new(&program, work.path())?,
        arguments,
        pair,
        number: 0,
    };
    write_script(&bench.script, arguments.scale)?;
    bench.millrace.start().await?;
    let outcome = bench.measure().await;
    if outcome.is_err() {
        println!("the last lines of millrace's log:\n{}", bench.millrace.log_tail(LOG_LINES));
    }
    outcome
}

/// Every row that is changed bears the time at which it was.
fn write_script(path: &Path, scale: u64) -> Result<()> {
    let share = scale * 100_000 / CONNECTIONS;
    let script = format!(
        "BEGIN;\n\
         UPDATE pgbench_accounts SET abalance = abalance + 1, filler = clock_timestamp()::text WHERE aid = ANY (ARRAY(\
             SELECT :client_id * {share} + 1 + floor(random() * {share})::int FROM generate_series(1, {ROWS})));\n\
         INSERT INTO pgbench_history (tid, bid, aid, delta, mtime) \
             SELECT 1, 1, :client_id, g, clock_timestamp() FROM generate_series(1, {ROWS}) AS g;\n\
         END;\n"
    );
    std::fs::File::create(path)?.write_all(script.as_bytes())?;
    Ok(())
}

struct Bench<'a> {
    arguments: &'a Arguments,
    pair: Pair,
    millrace: Millrace,
    script: PathBuf,
    /// Of the last run.
    number: i32,
}

impl Bench<'_> {
    async fn measure(&mut self) -> Result<()> {
        let mut rates = Vec::new();
        for way in Way::ALL {
            let rate =
                self.applied_rate(way).await.with_context(|| format!("the backlog of {}", way.name()))?;
            println!("{:9} applies a backlog at {rate:.0} row changes/s   load {}", way.name(), load());
            rates.push((way, rate));
        }
        let mut results: Vec<(Way, u64, Vec<Ages>)> = Vec::new();
        for round in 1..=self.arguments.rounds {
            for level in LEVELS {
                for &(way, rate) in &rates {
                    let ages = self.under_load(way, level, rate, round).await;
                    let ages = ages.with_context(|| format!("{} at {level} %", way.name()))?;
                    match results.iter_mut().find(|(w, l, _)| (*w, *l) == (way, level)) {
                        Some((_, _, all)) => all.push(ages),
                        None => results.push((way, level, vec![ages])),
                    }
                }
            }
        }
        let results: Vec<_> =
            results.into_iter().map(|(way, level, ages)| (way, level, medians(&ages))).collect();
        for (way, level, ages) in &results {
            println!("median {:9} {level} %: {ages}", way.name());
        }
        if let Some(path) = &self.arguments.plot {
            plot::save(path, svg(&results))?;
        }
        Ok(())
    }

    /// A database of its own for a run, and everything from now on on its way into it.
    async fn prepare(&mut self, way: Way) -> Result<String> {
        self.number += 1;
        let database = format!("{}_{}", way.name(), self.number);
        self.pair.database(&database).await?;
        match way {
            Way::Native => self.pair.subscribe(&database).await?,
            Way::Millrace => self.pair.feed(&self.millrace, &database, "").await?,
        }
        Ok(database)
    }

    async fn begin(&self, way: Way, database: &str) -> Result<()> {
        match way {
            Way::Native => self.pair.enable(database, true).await,
            Way::Millrace => self.millrace.api().resume(&feed_name(database)).await,
        }
    }

    async fn end(&self, way: Way, database: &str) -> Result<()> {
        match way {
            Way::Native => {
                self.pair.enable(database, false).await?;
                self.pair.unsubscribe(database).await?;
            }
            Way::Millrace => self.millrace.api().pause(&feed_name(database)).await?,
        }
        self.pair.remove(database).await
    }

    /// Waits until everything that was written so far is in the target.
    async fn arrival(&mut self, way: Way, database: &str, client: &Client) -> Result<()> {
        self.number += 1;
        let end = self.pair.finish(self.number).await?;
        if way == Way::Millrace {
            return self.millrace.reach(&feed_name(database), end, LIMIT, || ()).await;
        }
        let deadline = Instant::now() + LIMIT;
        while !self.pair.finished(client, self.number).await? {
            if Instant::now() > deadline {
                bail!("not everything has arrived within {LIMIT:?}");
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    async fn pgbench(&self, how: &[&str]) -> Result<String> {
        let script = self.script.to_str().context("the temporary folder's name is not UTF-8")?;
        let connections = CONNECTIONS.to_string();
        let mut all = vec!["-n", "-M", "prepared", "-c", &connections, "-j", "1", "-f", script];
        all.extend(how);
        pair::pgbench(&self.pair.source, "postgres", &all).await
    }

    /// Row changes per second from a backlog.
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    async fn applied_rate(&mut self, way: Way) -> Result<f64> {
        let database = self.prepare(way).await?;
        let each = (self.arguments.changes / (2 * ROWS) / CONNECTIONS).max(1);
        self.pgbench(&["-t", &each.to_string()]).await?;
        self.pair.target.sql("postgres", "CHECKPOINT").await?;
        let client = self.pair.target.client(&database).await?;
        let began = Instant::now();
        self.begin(way, &database).await?;
        self.arrival(way, &database, &client).await?;
        let seconds = began.elapsed().as_secs_f64();
        self.end(way, &database).await?;
        Ok((each * CONNECTIONS * 2 * ROWS) as f64 / seconds)
    }

    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    async fn under_load(&mut self, way: Way, level: u64, rate: f64, round: u64) -> Result<Ages> {
        let database = self.prepare(way).await?;
        let client = self.pair.target.client(&database).await?;
        self.begin(way, &database).await?;
        self.arrival(way, &database, &client).await?;
        let transactions = (rate * level as f64 / 100.0 / (2 * ROWS) as f64).max(1.0);
        let from = self.pair.source.client("postgres").await?;
        // What starts up does not count.
        let from = from.query_one("SELECT (clock_timestamp() + interval '1 second')::text", &[]).await?;
        let from: String = from.get(0);
        let log = self.pair.target_log().await?;
        let before = self.pair.times(Some(&self.millrace))?;
        let (rate, seconds) = (format!("{transactions:.1}"), self.arguments.seconds.to_string());
        let output = self.pgbench(&["-R", &rate, "-T", &seconds]).await?;
        let times = self.pair.times(Some(&self.millrace))?.since(before);
        let began = Instant::now();
        self.arrival(way, &database, &client).await?;
        let behind = began.elapsed().as_secs_f64();
        let (ages, changes) = self.ages(&client, &log, &from).await?;
        let achieved = output.lines().find_map(|line| line.strip_prefix("tps = ")?.split(' ').next());
        let achieved: f64 = achieved.and_then(|text| text.parse().ok()).unwrap_or_default();
        println!(
            "round {round} {:9} {level} %: {ages}   {:.0} row changes/s asked for, {:.0} made, {} changes seen, at rest \
             {behind:.2} s after the load   {times}   load {}",
            way.name(),
            transactions * (2 * ROWS) as f64,
            achieved * (2 * ROWS) as f64,
            changes,
            load()
        );
        self.end(way, &database).await?;
        Ok(ages)
    }

    /// Ages of the changes that were made after `from`, and their number. All were committed behind the position `log`.
    async fn ages(&self, client: &Client, log: &str, from: &str) -> Result<(Ages, i64)> {
        let (ids, times): (Vec<i64>, Vec<String>) = self.pair.commit_times(log).await?.into_iter().unzip();
        client.batch_execute(COMMITTED).await?;
        let fill = "INSERT INTO committed SELECT * FROM unnest($1::bigint[], $2::text[]::timestamptz[])";
        client.execute(fill, &[&ids, &times]).await?;
        client.batch_execute("ANALYZE committed").await?;
        let row = client.query_one(AGES, &[&from]).await?;
        let (timed, all): (i64, i64) = (row.get(1), row.get(2));
        if timed != all {
            bail!("{} of {all} changes were committed by nobody knows whom", all - timed);
        }
        let found: Vec<f64> = row.get::<_, Option<Vec<f64>>>(0).unwrap_or_default();
        let Ok(at) = found.try_into() else { bail!("no change has arrived") };
        Ok((Ages { at }, all))
    }
}

/// Ages over percentiles, of each way under each load.
fn svg(results: &[(Way, u64, Ages)]) -> String {
    let lines = results.iter().map(|&(way, level, ages)| Line {
        name: format!("{}, {level} % of its rate", way.name()),
        colour: LEVELS.iter().position(|at| *at == level).unwrap_or_default(),
        dashed: way == Way::Native,
        points: (0..4u8).zip(ages.at).map(|(place, age)| (place.into(), age.max(0.01))).collect(),
    });
    let marks = (0..4u8).zip(["50", "95", "99", "99.9"]);
    let chart = Chart {
        title: "Age of changes when they are committed in the target",
        places: "so many of a hundred are not older",
        marks: marks.map(|(place, name)| (place.into(), name.to_owned())).collect(),
        value: |power| format!("{} ms", 10f64.powf(power)),
        lines: lines.collect(),
    };
    chart.svg()
}

/// The median of each number by itself.
fn medians(ages: &[Ages]) -> Ages {
    Ages {
        at: std::array::from_fn(|at| {
            let values: Vec<f64> = ages.iter().map(|ages| ages.at[at]).collect();
            median(&values, |value| *value)
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_under_each_load_is_a_line() {
        let ages = Ages { at: [1.0, 10.0, 20.0, 100.0, 0.0] };
        let svg = svg(&[(Way::Native, 50, ages), (Way::Millrace, 90, ages)]);
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert!(svg.contains("millrace, 90 %") && svg.contains("100 ms"));
    }

    #[test]
    fn each_percentile_has_a_median_of_its_own() {
        let ages = [[1.0, 9.0, 3.0, 4.0, 5.0], [2.0, 8.0, 3.0, 4.0, 5.0], [3.0, 7.0, 3.0, 4.0, 6.0]];
        let of = medians(&ages.map(|at| Ages { at }));
        assert_eq!(of.at.map(f64::to_bits), [2.0f64, 8.0, 3.0, 4.0, 5.0].map(f64::to_bits));
    }
}
