//! What the process does: its tasks, threads, memory and files (metrics §7.2). The paths of Go's profiler answer with what
//! there is instead: without code in C nothing here can walk other threads' stacks, and a made-up profile misleads.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::HeaderMap;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use heartbeatpb::codes;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{ApiFailure, Shared, info_text, plain};

/// How long threads are watched when nothing else is said.
const USUAL: u64 = 10;
/// And at most, in seconds.
const LONGEST: u64 = 120;

/// What there is, and what is not.
const INDEX: &str = "\
/debug/pprof/            this page
/debug/pprof/goroutine   the tasks of this node, and what each changefeed waits for
/debug/pprof/profile     not here; /debug/threads?seconds=10 tells which threads use the processor, `perf record -g -p PID` why
/debug/pprof/heap        not here; /debug/runtime tells the memory of the process, /metrics what holds it
/debug/runtime           tasks, runtime, memory, files
/debug/threads           processor time of each thread, while you wait
/debug/info              node, coordinator, changefeeds; ?format=json
/debug/log               which log lines are written
/config                  the configuration in effect
A process that does not answer writes the same into its log on SIGUSR1.
";

pub(crate) async fn index() -> Response {
    plain(INDEX.to_owned())
}

/// The names of Go's profiles.
pub(crate) async fn profile(
    State(state): State<Shared>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ApiFailure> {
    let instead = match name.as_str() {
        "goroutine" => {
            let info = info_text(&state, headers.get(header::AUTHORIZATION)).await;
            return Ok(plain(format!("{}{info}", state.tasks.text())));
        }
        "profile" => {
            "/debug/threads?seconds=10 tells which threads use the processor, `perf record -g -p PID` why"
        }
        "heap" | "allocs" => "/debug/runtime tells the memory of the process, /metrics what holds it",
        "threadcreate" => "/debug/threads lists the threads",
        "block" | "mutex" => "`perf trace -p PID` or eBPF shows what threads wait for",
        "trace" => "/debug/pprof/goroutine shows tasks, and what changefeeds wait for",
        "symbol" => "nothing that is answered here needs symbols",
        "cmdline" => {
            "a command line may hold secrets; /api/v2/status tells the version, /config the configuration"
        }
        _ => {
            return Err(ApiFailure::new(
                codes::API_NOT_FOUND,
                "there is no profile of this name; /debug/pprof/ lists what there is",
            ));
        }
    };
    Err(ApiFailure::new(codes::API_NOT_SUPPORTED, format!("there is no {name} profile: {instead}")))
}

/// Tasks, runtime, memory, files.
pub(crate) async fn runtime(State(state): State<Shared>) -> Json<Value> {
    let mut value = state.tasks.value();
    value["uptime_seconds"] = json!(state.started.elapsed().as_secs());
    value["process"] = process();
    Json(value)
}

/// Numbers of the process, as far as the system tells them.
fn process() -> Value {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    let files = std::fs::read_dir("/proc/self/fd").ok().map(Iterator::count);
    json!({
        "memory_kib": field("VmRSS"), "memory_peak_kib": field("VmHWM"), "swapped_kib": field("VmSwap"),
        "threads": field("Threads"), "open_files": files,
    })
}

#[derive(Deserialize, Default)]
#[serde(default)]
pub(crate) struct ThreadsQuery {
    seconds: Option<String>,
}

impl ThreadsQuery {
    fn time(&self) -> Result<Duration, ApiFailure> {
        let seconds = match self.seconds.as_deref() {
            None | Some("") => Some(USUAL),
            Some(text) => text.parse().ok().filter(|seconds| (1..=LONGEST).contains(seconds)),
        };
        let wrong = || ApiFailure::invalid(format!("seconds must be a number from 1 to {LONGEST}"));
        seconds.map(Duration::from_secs).ok_or_else(wrong)
    }
}

/// Which threads use the processor. One at a time looks.
pub(crate) async fn threads(
    State(state): State<Shared>,
    Query(query): Query<ThreadsQuery>,
) -> Result<Response, ApiFailure> {
    let time = query.time()?;
    let Ok(_looking) = state.looking.try_acquire() else {
        return Err(ApiFailure::new(
            codes::API_TOO_MANY,
            "somebody else is looking; ask again when she is done",
        ));
    };
    tracing::info!(seconds = time.as_secs(), "threads are watched by a request");
    let before = Sample::now();
    tokio::time::sleep(time).await;
    let text = Sample::now().since(&before, time);
    text.map(|text| plain(text).into_response()).ok_or_else(|| {
        ApiFailure::new(codes::API_NOT_SUPPORTED, "the system does not tell the processor time of threads")
    })
}

/// Processor time of each thread, in ticks of the clock of the kernel's statistics.
struct Sample(BTreeMap<u64, (String, u64)>);

/// Ticks of a second in `/proc`: fixed for programs, whatever the kernel counts in.
const TICKS: f64 = 100.0;

impl Sample {
    fn now() -> Self {
        let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
        let known = threads.filter_map(|entry| {
            let id = entry.file_name().to_str()?.parse().ok()?;
            Some((id, stat(&std::fs::read_to_string(entry.path().join("stat")).ok()?)?))
        });
        Self(known.collect())
    }

    /// What was used since, the busiest first; `None` when nothing is known.
    #[expect(clippy::cast_precision_loss, reason = "a share for people")]
    fn since(&self, before: &Self, time: Duration) -> Option<String> {
        if self.0.is_empty() {
            return None;
        }
        let mut used: Vec<(u64, &str, u64)> = self
            .0
            .iter()
            .map(|(id, (name, ticks))| {
                let was = before.0.get(id).map_or(0, |(_, ticks)| *ticks);
                (ticks.saturating_sub(was), name.as_str(), *id)
            })
            .collect();
        used.sort_by(|a, b| b.0.cmp(&a.0).then(a.2.cmp(&b.2)));
        let lines = used.iter().map(|(ticks, name, id)| {
            let seconds = *ticks as f64 / TICKS;
            format!("{:>6.1} % {seconds:>8.2} s  {name} ({id})\n", 100.0 * seconds / time.as_secs_f64())
        });
        Some(lines.collect())
    }
}

/// Name and processor time of a line of `/proc/…/stat` (proc_pid_stat(5)): the name stands in brackets and may have any
/// characters; user and system time are the 14th and 15th field.
fn stat(line: &str) -> Option<(String, u64)> {
    let (open, close) = (line.find('(')?, line.rfind(')')?);
    let name = line.get(open + 1..close)?.to_owned();
    let mut rest = line.get(close + 1..)?.split_whitespace().skip(11);
    let (user, system): (u64, u64) = (rest.next()?.parse().ok()?, rest.next()?.parse().ok()?);
    Some((name, user + system))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_threads_name_may_have_brackets_and_its_time_is_told_as_a_share() {
        let line = "4711 (a) b (c) S 1 4711 4711 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 9 0 1 2 3";
        assert_eq!(stat(line), Some(("a) b (c".to_owned(), 300)));
        for bad in ["", "4711 (a", "4711 (a) S 1 2 3", ") ("] {
            assert_eq!(stat(bad), None, "{bad:?}");
        }
        let sample = |ticks: [u64; 2]| {
            let thread = |id, ticks| (id, (format!("t{id}"), ticks));
            Sample([thread(1, ticks[0]), thread(2, ticks[1])].into())
        };
        let told = sample([110, 400]).since(&sample([100, 0]), Duration::from_secs(8)).unwrap();
        assert_eq!(told, "  50.0 %     4.00 s  t2 (2)\n   1.2 %     0.10 s  t1 (1)\n");
        assert_eq!(Sample(BTreeMap::new()).since(&sample([0, 0]), Duration::from_secs(1)), None);
    }

    #[test]
    fn the_time_of_a_look_has_bounds() {
        let time = |text: Option<&str>| ThreadsQuery { seconds: text.map(str::to_owned) }.time();
        assert_eq!(
            (time(None), time(Some("120"))),
            (Ok(Duration::from_secs(10)), Ok(Duration::from_secs(120)))
        );
        for bad in ["0", "121", "-1", "1.5", "soon", "99999999999999999999"] {
            assert!(time(Some(bad)).is_err(), "{bad}");
        }
    }
}
