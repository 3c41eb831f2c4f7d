//! Rows that were not the same at both ends: wrong, or on their way?

use std::collections::BTreeMap;

use crate::part::RowId;
use crate::report::Kind;

/// How often a row has to be seen to differ while it does not change.
const STRIKES: u32 = 2;
/// How often a row is looked at that never stands still.
const ROUNDS: u32 = 20;

/// The hashes of rows of one identity, and how often each is there: one, once, where there is a key.
pub(crate) type Hashes = BTreeMap<String, u64>;

/// What one end shows.
pub(crate) type View = BTreeMap<RowId, Hashes>;

/// Puts rows as they were read into a view.
pub(crate) fn view(rows: Vec<(RowId, String, u64)>) -> View {
    let mut view = View::new();
    for (id, hash, count) in rows {
        *view.entry(id).or_default().entry(hash).or_default() += count;
    }
    view
}

/// The rows that two views do not show alike.
pub(crate) fn differing(source: &View, target: &View) -> Vec<RowId> {
    let only_there = target.keys().filter(|id| !source.contains_key(*id));
    let mut all: Vec<RowId> = source
        .iter()
        .filter(|(id, hashes)| target.get(*id) != Some(hashes))
        .map(|(id, _)| id.clone())
        .collect();
    all.extend(only_there.cloned());
    all
}

/// One row that is looked at again.
#[derive(Clone, Default, Debug)]
struct Suspect {
    strikes: u32,
    rounds: u32,
    /// It changed in the last round.
    is_hot: bool,
    /// What the target showed that the source had shown in the same round, while the row changed.
    followed: Option<Option<Hashes>>,
}

/// What became of suspects in a round.
#[derive(Default, Debug, PartialEq, Eq)]
pub(crate) struct Verdicts {
    /// They differ.
    pub(crate) different: Vec<(RowId, Kind)>,
    /// They never stood still.
    pub(crate) undecided: Vec<RowId>,
}

/// Rows about which is not decided yet.
#[derive(Default, Debug)]
pub(crate) struct Suspects {
    open: BTreeMap<RowId, Suspect>,
}

impl Suspects {
    pub(crate) fn new(rows: Vec<RowId>) -> Self {
        Self { open: rows.into_iter().map(|id| (id, Suspect::default())).collect() }
    }

    /// Whom to look at.
    pub(crate) fn open(&self) -> impl Iterator<Item = &RowId> {
        self.open.keys()
    }

    pub(crate) fn len(&self) -> usize {
        self.open.len()
    }

    /// Rows that changed in the last round.
    pub(crate) fn hot(&self) -> impl Iterator<Item = &RowId> {
        self.open.iter().filter(|(_, suspect)| suspect.is_hot).map(|(id, _)| id)
    }

    /// A round: the source before, the target once it had everything up to then, and the source again; and what the
    /// source showed of hot rows between.
    ///
    /// A row that never stands still is the same when the target shows in two rounds what the source has shown in them,
    /// and not the same state both times: a target that stands still may meet a source that goes to and fro.
    pub(crate) fn look(&mut self, before: &View, between: &[View], target: &View, after: &View) -> Verdicts {
        let mut verdicts = Verdicts::default();
        self.open.retain(|id, suspect| {
            let (was, is, there) = (before.get(id), after.get(id), target.get(id));
            suspect.rounds += 1;
            let between = || between.iter().map(|view| view.get(id));
            suspect.is_hot = was != is || (suspect.is_hot && between().any(|seen| seen != was));
            if suspect.is_hot {
                suspect.strikes = 0;
                if [was, is].into_iter().chain(between()).any(|seen| seen == there) {
                    let there = there.cloned();
                    if suspect.followed.as_ref().is_some_and(|earlier| *earlier != there) {
                        return false;
                    }
                    suspect.followed = Some(there);
                }
            } else if there == was {
                return false;
            } else {
                suspect.strikes += 1;
                if suspect.strikes >= STRIKES {
                    verdicts.different.push((id.clone(), kind(was, there)));
                    return false;
                }
            }
            if suspect.rounds >= ROUNDS {
                verdicts.undecided.push(id.clone());
                return false;
            }
            true
        });
        verdicts
    }
}

fn kind(source: Option<&Hashes>, target: Option<&Hashes>) -> Kind {
    let count = |rows: Option<&Hashes>| rows.map_or(0, |rows| rows.values().sum::<u64>());
    match count(source).cmp(&count(target)) {
        std::cmp::Ordering::Greater => Kind::Missing,
        std::cmp::Ordering::Less => Kind::Extra,
        std::cmp::Ordering::Equal => Kind::Other,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn row(id: &str, hash: &str) -> (RowId, String, u64) {
        (vec![id.to_owned()], hash.to_owned(), 1)
    }

    fn one(hash: &str) -> View {
        view(vec![row("k", hash)])
    }

    #[test]
    fn a_row_that_arrives_is_no_difference() {
        let mut suspects = Suspects::new(differing(&one("new"), &one("old")));
        assert_eq!(suspects.look(&one("new"), &[], &one("new"), &one("new")), Verdicts::default());
        assert_eq!(suspects.len(), 0);
    }

    #[test]
    fn a_row_that_stands_still_and_differs_twice_is_a_difference() {
        let mut suspects = Suspects::new(vec![vec!["k".to_owned()]]);
        assert_eq!(
            suspects.look(&one("a"), &[], &one("b"), &one("a")),
            Verdicts::default(),
            "to and fro is possible"
        );
        let verdicts = suspects.look(&one("a"), &[], &one("b"), &one("a"));
        assert_eq!(verdicts.different, [(vec!["k".to_owned()], Kind::Other)]);
        let mut missing = Suspects::new(vec![vec!["k".to_owned()]]);
        missing.look(&one("a"), &[], &View::new(), &one("a"));
        assert_eq!(missing.look(&one("a"), &[], &View::new(), &one("a")).different[0].1, Kind::Missing);
        let mut extra = Suspects::new(vec![vec!["k".to_owned()]]);
        extra.look(&View::new(), &[], &one("a"), &View::new());
        assert_eq!(extra.look(&View::new(), &[], &one("a"), &View::new()).different[0].1, Kind::Extra);
    }

    #[test]
    fn a_change_between_begins_anew() {
        let mut suspects = Suspects::new(vec![vec!["k".to_owned()]]);
        suspects.look(&one("a"), &[], &one("x"), &one("a"));
        suspects.look(&one("a"), &[], &one("x"), &one("b"));
        assert_eq!(suspects.look(&one("b"), &[], &one("x"), &one("b")), Verdicts::default());
        assert_eq!(suspects.look(&one("b"), &[], &one("x"), &one("b")).different.len(), 1);
    }

    #[test]
    fn a_row_that_never_stands_still_is_undecided() {
        let mut suspects = Suspects::new(vec![vec!["k".to_owned()]]);
        let rounds = (1..).find(|round| {
            let (before, after) = (one(&format!("{round}")), one(&format!("{}", round + 1)));
            !suspects.look(&before, &[], &one("x"), &after).undecided.is_empty()
        });
        assert_eq!(rounds, Some(ROUNDS));
        assert_eq!(suspects.len(), 0);
    }

    #[test]
    fn a_row_that_never_stands_still_is_the_same_when_the_target_goes_along() {
        let mut suspects = Suspects::new(vec![vec!["k".to_owned()]]);
        assert_eq!(suspects.hot().count(), 0);
        assert_eq!(suspects.look(&one("1"), &[], &one("2"), &one("4")), Verdicts::default());
        assert_eq!(suspects.hot().count(), 1, "nobody knows whether the source has shown 2");
        suspects.look(&one("5"), &[one("6"), one("7")], &one("6"), &one("8"));
        assert_eq!(suspects.len(), 1, "once may be chance");
        suspects.look(&one("9"), &[one("10")], &one("10"), &one("11"));
        assert_eq!(suspects.len(), 0);
    }

    #[test]
    fn a_target_that_stands_still_is_not_the_same_as_a_source_that_goes_to_and_fro() {
        let mut suspects = Suspects::new(vec![vec!["k".to_owned()]]);
        for round in 1..=ROUNDS {
            let verdicts = suspects.look(&one("a"), &[one("b"), View::new()], &one("a"), &one("b"));
            assert_eq!(verdicts.undecided.len(), usize::from(round == ROUNDS));
        }
        // As a row that comes and goes at the source only.
        let mut suspects = Suspects::new(vec![vec!["k".to_owned()]]);
        for _ in 1..ROUNDS {
            assert_eq!(
                suspects.look(&one("a"), &[View::new()], &View::new(), &one("b")),
                Verdicts::default()
            );
        }
        assert_eq!(suspects.len(), 1);
    }

    #[test]
    fn rows_without_a_key_are_counted() {
        let (twice, once) = (view(vec![row("h", "h"), row("h", "h")]), view(vec![row("h", "h")]));
        assert_eq!(differing(&twice, &once).len(), 1);
        let mut suspects = Suspects::new(differing(&twice, &once));
        suspects.look(&twice, &[], &once, &twice);
        assert_eq!(suspects.look(&twice, &[], &once, &twice).different[0].1, Kind::Missing);
    }

    proptest! {
        /// VF-2: whatever the source goes through, a target that shows at each look what the source was at some moment
        /// of that round is never called different, unless the source went to and fro in two rounds in a row.
        #[test]
        fn a_target_that_follows_is_never_a_difference(states in prop::collection::vec((0..3_u8, any::<prop::sample::Index>()), 3..60)) {
            let mut suspects = Suspects::new(vec![vec!["k".to_owned()]]);
            let value = |state: u8| if state == 0 { View::new() } else { one(&state.to_string()) };
            let mut to_and_fro = 0;
            for round in states.windows(3).step_by(2) {
                let (before, between, after) = (round[0].0, round[1].0, round[2].0);
                let shown = [before, between, after][round[1].1.index(3)];
                to_and_fro = if before == after && shown != before { to_and_fro + 1 } else { 0 };
                let verdicts = suspects.look(&value(before), &[], &value(shown), &value(after));
                prop_assert!(verdicts.different.is_empty() || to_and_fro >= STRIKES);
                if suspects.len() == 0 { break; }
            }
        }
    }
}
