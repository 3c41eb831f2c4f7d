//! The live view of `millrace quickstart`: a few lines redrawn in a terminal, one line a second elsewhere.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How often a view that is not a terminal prints a line.
const PLAIN_INTERVAL: Duration = Duration::from_secs(2);

/// What one look at the changefeed found.
#[derive(Clone, Debug, Default)]
pub(super) struct Sample {
    pub(super) state: String,
    pub(super) checkpoint: u64,
    pub(super) lag_seconds: Option<f64>,
    pub(super) tables: u64,
    pub(super) copy_tables_total: u64,
    pub(super) copy_tables_done: u64,
    pub(super) copy_rows: u64,
    pub(super) rows_read: u64,
    pub(super) rows_written: u64,
    pub(super) error: Option<String>,
}

impl Sample {
    /// Reads the answer of `GET /api/v2/changefeeds/{id}/progress`.
    pub(super) fn from_json(value: &Value) -> Self {
        let number = |key: &str| value[key].as_u64().unwrap_or(0);
        Self {
            state: value["state"].as_str().unwrap_or("unknown").to_owned(),
            checkpoint: number("checkpoint_ts"),
            lag_seconds: value["lag_seconds"].as_f64(),
            tables: number("tables"),
            copy_tables_total: number("copy_tables_total"),
            copy_tables_done: number("copy_tables_done"),
            copy_rows: number("copy_rows"),
            rows_read: number("rows_read"),
            rows_written: number("rows_written"),
            error: value["error"]["message"].as_str().map(str::to_owned),
        }
    }
}

/// Draws samples; remembers the last one for rates.
pub(super) struct View {
    terminal: bool,
    drawn_lines: usize,
    last: Option<(Instant, u64)>,
    rate: f64,
    last_plain: Option<Instant>,
    header: Vec<String>,
}

impl View {
    pub(super) fn new(header: Vec<String>) -> Self {
        let terminal = std::io::stdout().is_terminal();
        for line in &header {
            println!("{line}");
        }
        Self { terminal, drawn_lines: 0, last: None, rate: 0.0, last_plain: None, header }
    }

    /// The header lines, for the summary.
    pub(super) fn header(&self) -> &[String] {
        &self.header
    }

    pub(super) fn draw(&mut self, sample: &Sample) {
        self.update_rate(sample.rows_written);
        let lines = self.lines(sample);
        let mut out = std::io::stdout().lock();
        if self.terminal {
            if self.drawn_lines > 0 {
                let _ = write!(out, "\x1b[{}A", self.drawn_lines);
            }
            for line in &lines {
                let _ = writeln!(out, "\x1b[2K{line}");
            }
            self.drawn_lines = lines.len();
        } else if self.last_plain.is_none_or(|at| at.elapsed() >= PLAIN_INTERVAL) {
            self.last_plain = Some(Instant::now());
            let _ = writeln!(out, "{}", lines.join("  ").split_whitespace().collect::<Vec<_>>().join(" "));
        }
        let _ = out.flush();
    }

    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    fn update_rate(&mut self, rows: u64) {
        let now = Instant::now();
        if let Some((at, before)) = self.last {
            let seconds = now.duration_since(at).as_secs_f64();
            if seconds > 0.05 {
                let instant_rate = rows.saturating_sub(before) as f64 / seconds;
                self.rate = 0.5f64.mul_add(self.rate, 0.5 * instant_rate);
            }
        }
        self.last = Some((now, rows));
    }

    fn lines(&self, sample: &Sample) -> Vec<String> {
        let lag = sample.lag_seconds.map_or_else(|| "-".to_owned(), |lag| format!("{:.1} s", lag.max(0.0)));
        let mut lines = vec![
            format!("  state       {}", sample.state),
            format!("  tables      {}", sample.tables),
            format!(
                "  rows        {} read, {} written, {:.0}/s",
                grouped(sample.rows_read),
                grouped(sample.rows_written),
                self.rate
            ),
            format!("  checkpoint  {}  lag {lag}", sample.checkpoint),
        ];
        if sample.copy_tables_total > 0 {
            lines.push(format!(
                "  copy        {} of {} tables, {} rows",
                sample.copy_tables_done,
                sample.copy_tables_total,
                grouped(sample.copy_rows)
            ));
        }
        lines.push(sample.error.as_ref().map_or_else(String::new, |error| format!("  error       {error}")));
        lines
    }
}

/// `1234567` as `1,234,567`.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::grouped;

    #[test]
    fn digits_are_grouped_by_three() {
        assert_eq!(
            [0, 999, 1000, 1_234_567].map(grouped),
            ["0".to_owned(), "999".to_owned(), "1,000".to_owned(), "1,234,567".to_owned()]
        );
    }
}
