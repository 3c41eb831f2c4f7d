//! Costs, limits, and how they are shown.

use std::fmt::Write as _;

use serde_json::{Value, json};

/// What a cost is counted in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Unit {
    /// Nanoseconds of processor time.
    Nanoseconds,
    /// Bytes.
    Bytes,
}

impl Unit {
    fn show(self, value: f64) -> String {
        match self {
            Self::Nanoseconds if value >= 1e9 => format!("{:.2} s", value / 1e9),
            Self::Nanoseconds if value >= 1e6 => format!("{:.2} ms", value / 1e6),
            Self::Nanoseconds if value >= 1e3 => format!("{:.2} µs", value / 1e3),
            Self::Nanoseconds => format!("{value:.1} ns"),
            Self::Bytes => format!("{value:.0} B"),
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Nanoseconds => "ns",
            Self::Bytes => "bytes",
        }
    }
}

/// How a cost may grow from the smallest number to the largest.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Growth {
    /// Not at all, up to this factor.
    Flat(f64),
    /// With the number, up to this factor on top of it.
    Linear(f64),
}

/// A cost at one number of spans, threads or changefeeds.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Point {
    /// The number.
    pub(crate) at: u64,
    /// What Millrace takes.
    pub(crate) ours: f64,
    /// What the naive version takes; `None` where it would take minutes.
    pub(crate) naive: Option<f64>,
}

/// A cost against a number of things.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Cost {
    /// What is done.
    pub(crate) name: &'static str,
    /// What it is counted in.
    pub(crate) unit: Unit,
    /// What `at` counts.
    pub(crate) of: &'static str,
    /// What the naive version is.
    pub(crate) naive: &'static str,
    /// Ascending.
    pub(crate) points: Vec<Point>,
    /// How it may grow.
    pub(crate) growth: Growth,
}

impl Cost {
    /// By how much the cost grew, beside what it may.
    pub(crate) fn grew(&self) -> Option<f64> {
        let (first, last) = (self.points.first()?, self.points.last()?);
        if first.at == last.at {
            return None;
        }
        let factor = last.ours / first.ours.max(f64::MIN_POSITIVE);
        let more = crate::clock::float(last.at) / crate::clock::float(first.at);
        Some(match self.growth {
            Growth::Flat(_) => factor,
            Growth::Linear(_) => factor / more,
        })
    }

    fn most(&self) -> f64 {
        match self.growth {
            Growth::Flat(most) | Growth::Linear(most) => most,
        }
    }

    /// Whether it grew no more than it may.
    pub(crate) fn kept(&self) -> bool {
        self.grew().is_none_or(|grew| grew <= self.most())
    }
}

/// A value that has a limit.
#[derive(Clone, Debug)]
pub(crate) struct Limit {
    /// What it is.
    pub(crate) name: String,
    /// What was measured, and its largest value; in the same unit.
    pub(crate) value: f64,
    /// The largest value that is fine.
    pub(crate) most: f64,
    /// How both are shown.
    pub(crate) show: fn(f64) -> String,
}

/// Everything that was measured.
#[derive(Debug)]
pub(crate) struct Report {
    /// Costs.
    pub(crate) costs: Vec<Cost>,
    limits: Vec<Limit>,
    /// Whether times are good for more than ratios.
    absolute: bool,
}

/// Seconds, from nanoseconds.
pub(crate) fn seconds(value: f64) -> String {
    Unit::Nanoseconds.show(value)
}

/// Bytes.
pub(crate) fn bytes(value: f64) -> String {
    Unit::Bytes.show(value)
}

/// A plain number.
pub(crate) fn number(value: f64) -> String {
    format!("{value:.2}")
}

impl Report {
    /// An empty one. `absolute`: limits on times count.
    pub(crate) fn new(absolute: bool) -> Self {
        Self { costs: Vec::new(), limits: Vec::new(), absolute }
    }

    /// Adds what another one holds.
    pub(crate) fn add(&mut self, other: Self) {
        self.costs.extend(other.costs);
        self.limits.extend(other.limits);
    }

    /// Adds a cost.
    pub(crate) fn cost(&mut self, cost: Cost) {
        self.costs.push(cost);
    }

    /// Adds a limit.
    pub(crate) fn limit(&mut self, name: impl Into<String>, value: f64, most: f64, show: fn(f64) -> String) {
        self.limits.push(Limit { name: name.into(), value, most, show });
    }

    /// Adds a limit on a time in nanoseconds: of no use with an unoptimised build.
    pub(crate) fn time_limit(&mut self, name: impl Into<String>, value: f64, most: f64) {
        if self.absolute {
            self.limit(name, value, most, seconds);
        }
    }

    /// Whether every limit is kept.
    pub(crate) fn kept(&self) -> bool {
        self.costs.iter().all(Cost::kept) && self.limits.iter().all(|limit| limit.value <= limit.most)
    }

    /// For people.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        let mut heads: Vec<(&str, Vec<u64>)> = Vec::new();
        for cost in &self.costs {
            let at: Vec<u64> = cost.points.iter().map(|point| point.at).collect();
            if !heads.contains(&(cost.of, at.clone())) {
                heads.push((cost.of, at));
            }
        }
        for (of, at) in heads {
            let costs = self.costs.iter().filter(|cost| {
                cost.of == of && cost.points.iter().map(|point| point.at).eq(at.iter().copied())
            });
            let mut rows = vec![head(of, &at)];
            rows.extend(costs.map(row));
            write_table(&mut text, &rows);
        }
        let mut rows = vec![["limit", "measured", "at most", ""].map(str::to_owned).to_vec()];
        for limit in &self.limits {
            let verdict = if limit.value <= limit.most { "pass" } else { "FAIL" };
            let cells =
                [limit.name.clone(), (limit.show)(limit.value), (limit.show)(limit.most), verdict.to_owned()];
            rows.push(cells.to_vec());
        }
        write_table(&mut text, &rows);
        text
    }

    /// For programs.
    pub(crate) fn json(&self) -> Value {
        let costs: Vec<Value> = self
            .costs
            .iter()
            .map(|cost| {
                let points: Vec<Value> = cost
                    .points
                    .iter()
                    .map(|point| json!({ cost.of: point.at, "cost": point.ours, "naive": point.naive }))
                    .collect();
                json!({
                    "name": cost.name, "unit": cost.unit.name(), "naive": cost.naive, "points": points,
                    "growth": cost.grew(), "growth_at_most": cost.most(), "kept": cost.kept(),
                })
            })
            .collect();
        let limits: Vec<Value> = self
            .limits
            .iter()
            .map(|limit| {
                json!({
                    "name": limit.name, "value": limit.value, "at_most": limit.most,
                    "kept": limit.value <= limit.most,
                })
            })
            .collect();
        json!({ "costs": costs, "limits": limits, "kept": self.kept() })
    }
}

fn head(of: &str, at: &[u64]) -> Vec<String> {
    let mut cells = vec![format!("cost by {of}")];
    cells.extend(at.iter().map(|at| grouped(*at)));
    cells.extend(["growth", "at most", "naive", "naive/ours", ""].map(str::to_owned));
    cells
}

fn row(cost: &Cost) -> Vec<String> {
    let mut cells = vec![cost.name.to_owned()];
    cells.extend(cost.points.iter().map(|point| cost.unit.show(point.ours)));
    let kind = match cost.growth {
        Growth::Flat(most) => format!("{most:.1}"),
        Growth::Linear(most) => format!("{most:.1} x n"),
    };
    cells.push(cost.grew().map_or_else(|| "-".to_owned(), |grew| format!("{grew:.2}")));
    cells.push(kind);
    let compared = cost.points.iter().rev().find_map(|point| Some((point, point.naive?)));
    match compared {
        Some((point, naive)) => {
            let at = if cost.points.last() == Some(point) {
                String::new()
            } else {
                format!(" at {}", grouped(point.at))
            };
            cells.push(format!("{}: {}{at}", cost.naive, cost.unit.show(naive)));
            cells.push(format!("{:.1}", naive / point.ours.max(f64::MIN_POSITIVE)));
        }
        None => cells.extend(["-".to_owned(), "-".to_owned()]),
    }
    cells.push(if cost.kept() { "pass" } else { "FAIL" }.to_owned());
    cells
}

/// Digits in groups of three.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn write_table(text: &mut String, rows: &[Vec<String>]) {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for (n, row) in rows.iter().enumerate() {
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(text, "| {cell:width$} ");
        }
        text.push_str("|\n");
        if n == 0 {
            for width in &widths {
                let _ = write!(text, "|{}", "-".repeat(width + 2));
            }
            text.push_str("|\n");
        }
    }
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(growth: Growth, ours: [f64; 2]) -> Cost {
        let point = |at, ours| Point { at, ours, naive: Some(2.0 * ours) };
        Cost {
            name: "something",
            unit: Unit::Nanoseconds,
            of: "spans",
            naive: "scan",
            points: vec![point(10, ours[0]), point(1_000, ours[1])],
            growth,
        }
    }

    #[test]
    fn a_cost_that_grows_more_than_it_may_is_a_failure() {
        assert!(cost(Growth::Flat(1.5), [100.0, 149.0]).kept());
        assert!(!cost(Growth::Flat(1.5), [100.0, 151.0]).kept());
        assert!(cost(Growth::Linear(2.0), [100.0, 19_900.0]).kept());
        assert!(!cost(Growth::Linear(2.0), [100.0, 20_100.0]).kept());
        let mut report = Report::new(true);
        report.cost(cost(Growth::Flat(1.5), [100.0, 100.0]));
        report.limit("bytes", 300.0, 300.0, bytes);
        assert!(report.kept());
        report.time_limit("slow", 2e9, 1e9);
        assert!(!report.kept());
        assert!(report.text().contains("FAIL") && report.json()["kept"] == false);
    }

    #[test]
    fn digits_stand_in_groups() {
        assert_eq!([7, 1_000, 1_234_567].map(grouped), ["7", "1,000", "1,234,567"]);
    }
}
