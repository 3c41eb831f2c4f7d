//! What came out, for people and for machines.

use std::time::SystemTime;

use serde_json::{Value, json};

use crate::fault::Fault;
use crate::history::Counts;
use crate::round::Round;

/// Characters of a curve.
const COLUMNS: usize = 48;
/// Heights of a character, lowest first.
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// The rounds of one fault.
#[derive(Debug)]
pub(crate) struct Series {
    pub(crate) fault: Fault,
    pub(crate) rounds: Vec<Round>,
    /// Why it was not run.
    pub(crate) skipped: Option<String>,
    /// Why it could not be run to its end.
    pub(crate) broken: Option<String>,
}

impl Series {
    /// Whether everything was as promised.
    pub(crate) fn ok(&self) -> bool {
        self.broken.is_none() && self.rounds.iter().all(|round| round.problems.is_empty())
    }

    fn counts(&self) -> Counts {
        let mut all = Counts::default();
        self.rounds.iter().for_each(|round| all.add(&round.verdict.counts));
        all
    }

    fn result(&self) -> &'static str {
        match (&self.skipped, self.ok()) {
            (Some(_), _) => "skipped",
            (None, true) => "ok",
            (None, false) => "FAILED",
        }
    }

    fn json(&self) -> Value {
        json!({
            "name": self.fault.name, "what": self.fault.what, "ok": self.ok(),
            "skipped": self.skipped, "broken": self.broken,
            "rounds": self.rounds.iter().map(round_json).collect::<Vec<_>>(),
        })
    }
}

fn round_json(round: &Round) -> Value {
    let counts = round.verdict.counts;
    json!({
        "victim": round.victim,
        "events": round.marks.iter().map(|(at, what)| json!({ "seconds": rounded(*at), "what": what })).collect::<Vec<_>>(),
        "highest_lag_seconds": rounded(round.highest), "recovery_seconds": rounded(round.recovery),
        "settle_seconds": rounded(round.verdict.settle_seconds), "nodes_ended": round.restarts,
        "changes": counts.changes, "lost": counts.lost, "doubled": counts.doubled, "reordered": counts.reordered,
        "invented": counts.invented, "ends_equal": round.verdict.equal, "total_kept": round.verdict.total_kept,
        "problems": round.problems,
        "lag": round.samples.iter().map(|(at, lag)| json!([rounded(*at), rounded(*lag)])).collect::<Vec<_>>(),
    })
}

/// Milliseconds are enough.
fn rounded(seconds: f64) -> f64 {
    (seconds * 1000.0).round() / 1000.0
}

/// Everything, for machines.
pub(crate) fn json(all: &[Series], world: Value) -> Value {
    json!({
        "ok": all.iter().all(Series::ok), "world": world,
        "faults": all.iter().map(Series::json).collect::<Vec<_>>(),
    })
}

/// One round in one line, with the lag over time.
pub(crate) fn line(name: &str, number: usize, of: usize, round: &Round) -> String {
    let counts = round.verdict.counts;
    format!(
        "{name:18} {number:2}/{of:<2} {:12} at {} highest {:5.1} s, low after {:5.1} s, lost {} doubled {} reordered {}  {}{}",
        round.victim,
        clock(round.struck),
        round.highest,
        round.recovery,
        counts.lost,
        counts.doubled,
        counts.reordered,
        curve(&round.samples),
        round.problems.iter().map(|problem| format!("\n    {problem}")).collect::<String>(),
    )
}

/// A time of the day in UTC, to be looked for in the logs.
fn clock(at: SystemTime) -> String {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let second = since.as_secs() % (24 * 3600);
    format!("{:02}:{:02}:{:02}.{:03}", second / 3600, second / 60 % 60, second % 60, since.subsec_millis())
}

/// The lag over time, each character the highest of its part.
fn curve(samples: &[(f64, f64)]) -> String {
    let highest = samples.iter().map(|(_, lag)| *lag).fold(1.0, f64::max);
    let part = samples.len().div_ceil(COLUMNS).max(1);
    let bar = |part: &[(f64, f64)]| {
        let here = part.iter().map(|(_, lag)| *lag).fold(0.0, f64::max);
        let bar = BARS.iter().enumerate().rev().find(|(n, _)| here * 8.0 > highest * f64::from(*n as u8));
        bar.map_or(BARS[0], |(_, bar)| *bar)
    };
    samples.chunks(part).map(bar).collect()
}

/// Every fault in one line.
pub(crate) fn table(all: &[Series]) -> String {
    let mut text = format!(
        "{:18} {:>6} {:>16} {:>18} {:>9} {:>5} {:>8} {:>10}  result\n{:18} {:>6} {:>16} {:>18}\n",
        "fault",
        "rounds",
        "highest lag, s",
        "low again after, s",
        "changes",
        "lost",
        "doubled",
        "reordered",
        "",
        "",
        "median     most",
        "median     most",
    );
    for series in all {
        let counts = series.counts();
        let (lag_middle, lag_most) = spread(&series.rounds, |round| round.highest);
        let (low_middle, low_most) = spread(&series.rounds, |round| round.recovery);
        let why = series
            .skipped
            .as_ref()
            .or(series.broken.as_ref())
            .map_or(String::new(), |why| format!(": {why}"));
        if series.rounds.is_empty() {
            text.push_str(&format!("{:18} {:>6} {}{why}\n", series.fault.name, 0, series.result()));
            continue;
        }
        text.push_str(&format!(
            "{:18} {:>6} {lag_middle:>8.2} {lag_most:>7.2} {low_middle:>9.2} {low_most:>8.2} {:>9} {:>5} {:>8} {:>10}  {}{why}\n",
            series.fault.name,
            series.rounds.len(),
            counts.changes,
            counts.lost,
            counts.doubled,
            counts.reordered,
            series.result(),
        ));
    }
    text
}

/// Median and highest of a number.
fn spread(rounds: &[Round], get: fn(&Round) -> f64) -> (f64, f64) {
    let mut values: Vec<f64> = rounds.iter().map(get).collect();
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    match values.last() {
        None => (0.0, 0.0),
        Some(most) if values.len() % 2 == 1 => (values[half], *most),
        Some(most) => (f64::midpoint(values[half - 1], values[half]), *most),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_shows_the_highest_of_each_part() {
        let samples: Vec<(f64, f64)> =
            (0..96).map(|n| (f64::from(n) / 10.0, if n == 50 { 8.0 } else { 0.05 })).collect();
        let curve = curve(&samples);
        assert_eq!(curve.chars().count(), 48);
        assert_eq!(curve.chars().position(|bar| bar == '█'), Some(25));
        assert!(curve.starts_with("▁▁"));
    }
}
