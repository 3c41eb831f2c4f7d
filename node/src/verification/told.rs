//! What the last comparison of a changefeed has found, as metrics.

use std::sync::Arc;

use heartbeatpb::WallTime;
use metrics::{Gauge, gauge};
use verify::{Outcome, Report};

use crate::http::KEYSPACE;
use crate::metrics::{VERIFY_DIFFERENT, VERIFY_ENDED, VERIFY_EQUAL, VERIFY_UNDECIDED};

/// The series of one changefeed; they go with the last of these.
pub(super) struct Told {
    different: Gauge,
    undecided: Gauge,
    ended: Gauge,
    equal: Gauge,
}

impl Told {
    pub(super) fn new(changefeed: &str) -> Arc<Self> {
        let of = |name| gauge!(name, "namespace" => KEYSPACE, "changefeed" => changefeed.to_owned());
        Arc::new(Self {
            different: of(VERIFY_DIFFERENT),
            undecided: of(VERIFY_UNDECIDED),
            ended: of(VERIFY_ENDED),
            equal: of(VERIFY_EQUAL),
        })
    }

    /// A comparison came to its end. A table or a column that the target lacks counts as a row.
    #[expect(clippy::cast_precision_loss, reason = "counts and seconds for people")]
    pub(super) fn tell(&self, report: &Report) {
        let differences = report.tables.iter().map(|table| table.differences + u64::from(table.lacking));
        let undecided = report.tables.iter().map(|table| table.undecided);
        let now = WallTime::now().millis() as f64 / 1000.0;
        self.different.set(differences.sum::<u64>() as f64);
        self.undecided.set(undecided.sum::<u64>() as f64);
        self.ended.set(now);
        if report.outcome == Outcome::Equal {
            self.equal.set(now);
        }
    }
}
