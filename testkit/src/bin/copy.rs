//! Measures how fast Millrace copies existing rows into another server, next to `COPY … TO STDOUT | COPY … FROM STDIN`
//! between the same servers with as many connections.

use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use serde_json::json;
use testkit::figures::median;
use testkit::pair::Times;
use testkit::plot::{self, Bar};
use testkit::postgres::program;
use testkit::{Millrace, PgServer, Usage};

/// How long one copy may take.
const LIMIT: Duration = Duration::from_secs(1800);
/// How often a state is looked at; also the precision of the times.
const LOOK: Duration = Duration::from_millis(10);
/// Lines of the server's log that are shown after a failure.
const LOG_LINES: usize = 50;

/// Measures how fast Millrace copies existing rows, next to COPY into COPY.
#[derive(Parser, Debug)]
#[command(name = "copy")]
struct Arguments {
    /// The program; by default the one that was built beside this one.
    #[arg(long)]
    millrace: Option<PathBuf>,
    /// Rows of the table with few columns. Those of the wide one are a tenth.
    #[arg(long, default_value_t = 5_000_000)]
    rows: u64,
    /// How often each is measured.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=9))]
    rounds: u64,
    /// Connections to each server.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=32))]
    parallel: u64,
    /// Bytes of a part.
    #[arg(long, default_value_t = 64 << 20)]
    part_bytes: u64,
    /// Draws the rates into a file, as SVG.
    #[arg(long)]
    plot: Option<PathBuf>,
}

/// A table that is measured.
struct Shape {
    name: &'static str,
    columns: &'static str,
    /// What its rows are made of, by a number `i`.
    values: &'static str,
    /// The number of rows is divided by it.
    divisor: u64,
}

const SHAPES: [Shape; 2] = [
    Shape {
        name: "narrow",
        columns: "id bigint PRIMARY KEY, branch int NOT NULL, balance int NOT NULL, at timestamptz NOT NULL, \
                  filler char(84) NOT NULL",
        values: "i, (i / 100000)::int, 0, '2024-01-01'::timestamptz + i * interval '1 s', ''",
        divisor: 1,
    },
    Shape {
        name: "wide",
        columns: "id bigint PRIMARY KEY, a text, b text, n1 numeric, n2 numeric, f1 float8, f2 float8, j jsonb, u uuid, \
                  t1 timestamptz, t2 timestamptz, d date, raw bytea, l int[]",
        values: "i, repeat(md5(i::text), 10), repeat('wide ', 60), i / 7.0, -i::numeric, i / 3.0, random(), \
                 jsonb_build_object('i', i, 'name', md5(i::text)), gen_random_uuid(), now(), now() - i * interval '1 s', \
                 '2000-01-01'::date + (i % 9000)::int, decode(repeat(md5(i::text), 4), 'hex'), ARRAY[i, i + 1]::int[]",
        divisor: 10,
    },
];

/// What one copy needed.
#[derive(Clone, Copy, Debug, Default)]
struct Measure {
    wall_seconds: f64,
    /// In the place of Millrace all `psql` together, where they copy.
    times: Times,
    /// Most memory of Millrace, or of all `psql` together.
    peak_bytes: u64,
}

impl Measure {
    /// Rows a second.
    #[expect(clippy::cast_precision_loss, reason = "rates for people")]
    fn rate(self, rows: u64) -> f64 {
        rows as f64 / self.wall_seconds.max(f64::EPSILON)
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(&Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: &Arguments) -> Result<()> {
    let server = || {
        PgServer::builder()
            .setting("max_wal_size", "16GB")
            .setting("shared_buffers", "256MB")
            .setting("autovacuum", "off")
            .start()
    };
    let (source, target) = tokio::try_join!(server(), server())?;
    let mut bars = Vec::new();
    for shape in &SHAPES {
        let database = shape.name;
        source.sql("postgres", &format!("CREATE DATABASE {database}")).await?;
        let rows = (arguments.rows / shape.divisor).max(1);
        let fill = format!(
            "CREATE TABLE {0} ({1}); INSERT INTO {0} SELECT {2} FROM generate_series(1, {rows}::bigint) i; \
             VACUUM (FREEZE, ANALYZE) {0}; CHECKPOINT",
            shape.name, shape.columns, shape.values
        );
        for statement in fill.split("; ") {
            source.sql(database, statement).await?;
        }
        bars.extend(measure(arguments, shape, rows, &source, &target).await?);
    }
    if let Some(path) = &arguments.plot {
        plot::save(path, plot::bars("Rows a second that are copied", &bars))?;
    }
    Ok(())
}

fn bar(shape: &Shape, name: &str, colour: usize, rows: u64, measure: Measure) -> Bar {
    let value = measure.rate(rows);
    Bar { name: format!("{}: {name}", shape.name), value, text: format!("{value:.0}"), colour }
}

async fn measure(
    arguments: &Arguments,
    shape: &Shape,
    rows: u64,
    source: &PgServer,
    target: &PgServer,
) -> Result<[Bar; 2]> {
    let work = tempfile::Builder::new().prefix("millrace-copy-").tempdir()?;
    let path = arguments.millrace.clone().unwrap_or_else(Millrace::default_program);
    let mut millrace = Millrace::new(&path, work.path())?;
    let (mut theirs, mut ours) = (Vec::new(), Vec::new());
    for round in 1..=arguments.rounds {
        for own in [false, true] {
            let database = format!("{}_{round}_{own}", shape.name);
            target.sql("postgres", &format!("CREATE DATABASE {database}")).await?;
            target.sql(&database, &format!("CREATE TABLE {} ({})", shape.name, shape.columns)).await?;
            target.sql("postgres", "CHECKPOINT").await?;
            let measured = if own {
                let outcome =
                    replicate(arguments, shape, &mut millrace, round, (source, target, &database)).await;
                if outcome.is_err() {
                    println!("the last lines of millrace's log:\n{}", millrace.log_tail(LOG_LINES));
                }
                outcome?
            } else {
                pipe(arguments, shape, source, target, &database).await?
            };
            let counted = target.client(&database).await?;
            let counted = counted.query_one(&format!("SELECT count(*) FROM {}", shape.name), &[]).await?;
            if u64::try_from(counted.get::<_, i64>(0))? != rows {
                bail!("{} of {rows} rows have arrived", counted.get::<_, i64>(0));
            }
            let who = if own { "millrace" } else { "COPY | COPY" };
            print_measure(&format!("{} round {round} {who}", shape.name), rows, measured);
            if own {
                ours.push(measured)
            } else {
                theirs.push(measured)
            }
            target.sql("postgres", &format!("DROP DATABASE {database} WITH (FORCE)")).await?;
        }
    }
    let by = |measure: &Measure| measure.wall_seconds;
    let (their, own) = (median(&theirs, by), median(&ours, by));
    print_measure(&format!("{} median COPY | COPY", shape.name), rows, their);
    print_measure(&format!("{} median millrace", shape.name), rows, own);
    println!(
        "{}: rate of millrace / rate of COPY | COPY: {:.3}",
        shape.name,
        their.wall_seconds / own.wall_seconds
    );
    Ok([bar(shape, "COPY | COPY", 0, rows, their), bar(shape, "millrace", 1, rows, own)])
}

/// Each connection reads its share of the table's pages, in the binary format, which is the faster one.
async fn pipe(
    arguments: &Arguments,
    shape: &Shape,
    source: &PgServer,
    target: &PgServer,
    database: &str,
) -> Result<Measure> {
    let client = source.client(shape.name).await?;
    let pages = format!("SELECT pg_relation_size('{}') / 8192", shape.name);
    let pages: i64 = client.query_one(&pages, &[]).await?.get(0);
    let share = u64::try_from(pages)?.div_ceil(arguments.parallel).max(1);
    let before = Times::of(source, target, None)?;
    let started = Instant::now();
    let mut children = Vec::new();
    for connection in 0..arguments.parallel {
        let (from, to) = (connection * share, (connection + 1) * share);
        let name = shape.name;
        let read = format!(
            "COPY (SELECT * FROM {name} WHERE ctid >= '({from},0)' AND ctid < '({to},0)') TO STDOUT (FORMAT binary)"
        );
        let mut reader =
            psql(source, shape.name, &read).stdout(Stdio::piped()).spawn().context("start psql")?;
        let output = reader.stdout.take().context("psql has an output")?;
        let write = format!("COPY {name} FROM STDIN (FORMAT binary)");
        let writer = psql(target, database, &write).stdin(output).spawn().context("start psql")?;
        children.extend([reader, writer]);
    }
    let (cpu_seconds, peak_bytes) = until_ended(&children).await?;
    let wall_seconds = started.elapsed().as_secs_f64();
    for mut child in children {
        let status = child.wait()?;
        if !status.success() {
            bail!("psql: {status}");
        }
    }
    let times = Times { millrace: cpu_seconds, ..Times::of(source, target, None)?.since(before) };
    Ok(Measure { wall_seconds, times, peak_bytes })
}

fn psql(server: &PgServer, database: &str, sql: &str) -> Command {
    let mut command = Command::new(program("psql"));
    command.arg("-h").arg(server.socket_dir()).args(["-p", &server.port().to_string(), "-U", "postgres"]);
    command.args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", database, "-c", sql]).stdin(Stdio::null());
    command
}

/// Waits until all have ended, and leaves them to be reaped: their processor time and the most memory that each had, together.
async fn until_ended(children: &[Child]) -> Result<(f64, u64)> {
    let mut peaks = vec![0; children.len()];
    loop {
        let (mut cpu_seconds, mut running) = (0.0, false);
        for (child, peak) in children.iter().zip(&mut peaks) {
            let usage = Usage::of(child.id())?;
            *peak = usage.peak_bytes.max(*peak);
            cpu_seconds += usage.cpu_seconds;
            running |= !usage.ended;
        }
        if !running {
            return Ok((cpu_seconds, peaks.iter().sum()));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// A changefeed from its creation until the copy is complete, in a fresh process.
async fn replicate(
    arguments: &Arguments,
    shape: &Shape,
    millrace: &mut Millrace,
    round: u64,
    (source, target, database): (&PgServer, &PgServer, &str),
) -> Result<Measure> {
    millrace.start().await?;
    let before = Times::of(source, target, Some(millrace))?;
    let api = millrace.api();
    let config =
        json!({ "initial_copy": { "parallel": arguments.parallel, "part_bytes": arguments.part_bytes } });
    let name = format!("copy-{round}");
    let started = Instant::now();
    let feed = api.create(&name, &source.uri(shape.name), &target.uri(database), &config).await?;
    let begin = feed["start_ts"].as_u64().context("a start position")?;
    loop {
        let progress = millrace.progress(&name).await?;
        if progress.checkpoint > begin || progress.all["copy"]["tables_done"] == 1 {
            break;
        }
        if started.elapsed() > LIMIT {
            bail!("the copy is not complete within {LIMIT:?}: {}", progress.all);
        }
        tokio::time::sleep(LOOK).await;
    }
    let wall_seconds = started.elapsed().as_secs_f64();
    let times = Times::of(source, target, Some(millrace))?.since(before);
    let measure = Measure { wall_seconds, times, peak_bytes: millrace.peak_bytes() };
    api.pause(&name).await?;
    millrace.stop().await?;
    Ok(measure)
}

fn print_measure(what: &str, rows: u64, measure: Measure) {
    let rate = measure.rate(rows);
    let Measure { wall_seconds, times: Times { source, target, millrace: cpu_seconds }, peak_bytes } =
        measure;
    println!(
        "{what}: {wall_seconds:.2} s, {rate:.0} rows/s, processor time {cpu_seconds:.1} s, source {source:.1} s, target \
         {target:.1} s, {} MiB at most",
        peak_bytes >> 20
    );
}
