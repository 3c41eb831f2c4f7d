//! Makes a failing plan small: leaves out what is not needed for the failure.

use super::plan::Plan;
use super::run::{Outcome, run};
use super::wire::Faults;

/// The smallest plan found that breaks the same invariant, and how it ends. `None` when the plan does not fail.
#[must_use]
pub fn shrink(plan: &Plan) -> Option<(Plan, Outcome)> {
    let mut outcome = run(plan, false);
    let mut best = plan.clone();
    let invariant = invariant(outcome.violation.as_ref()?);
    // Time decides much: what comes out of one attempt is tried again.
    loop {
        let smaller = candidates(&best).into_iter().find_map(|candidate| {
            let outcome = run(&candidate, false);
            let same = outcome.violation.as_ref().is_some_and(|found| self::invariant(found) == invariant);
            same.then_some((candidate, outcome))
        });
        match smaller {
            Some(found) => (best, outcome) = found,
            None => return Some((best, outcome)),
        }
    }
}

fn invariant(violation: &str) -> String {
    violation.split(':').next().unwrap_or_default().to_owned()
}

/// Plans that are smaller than this one, the smallest first.
fn candidates(plan: &Plan) -> Vec<Plan> {
    let mut out = Vec::new();
    let mut push = |candidate: Plan| {
        if candidate != *plan {
            out.push(candidate);
        }
    };
    push(Plan { feeds: 1, ..plan.clone() });
    push(Plan { tables: 1, ..plan.clone() });
    push(Plan { tables: (plan.tables - 1).max(1), ..plan.clone() });
    push(Plan { uncertain: 0, ..plan.clone() });
    push(Plan { machines: (plan.machines - 1).max(1), ..plan.clone() });
    let half = plan.events.len() / 2;
    push(Plan { events: plan.events[..half].to_vec(), ..plan.clone() });
    push(Plan { events: plan.events[half..].to_vec(), ..plan.clone() });
    for n in 0..plan.events.len() {
        let mut events = plan.events.clone();
        events.remove(n);
        push(Plan { events, ..plan.clone() });
    }
    let faults = plan.faults;
    for faults in [
        Faults { delay: 1, ..Faults::default() },
        Faults { loss: 0, ..faults },
        Faults { duplication: 0, ..faults },
        Faults { disorder: 0, ..faults },
        Faults { delay: 1, ..faults },
    ] {
        push(Plan { faults, ..plan.clone() });
    }
    let last = plan.events.last().map_or(0, |(at, _)| at + 500);
    push(Plan { chaos: last.clamp(1_000, plan.chaos.max(1_000)), ..plan.clone() });
    out
}
