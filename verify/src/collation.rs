//! Whether two servers put the values of a column into the same order; pure.

/// What says in which order a server puts texts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Collation {
    /// `c` is the C library, `i` ICU, `b` PostgreSQL itself.
    pub(crate) provider: String,
    /// As the provider calls it.
    pub(crate) locale: Option<String>,
    /// What was added to the locale's own rules.
    pub(crate) rules: Option<String>,
    /// Whether only equal bytes are equal.
    pub(crate) is_deterministic: bool,
    /// What the provider says now, not when the collation was made.
    pub(crate) version: Option<String>,
    /// What the C library is given.
    pub(crate) encoding: String,
}

/// In which order a server puts the values of a column.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Order {
    /// As every PostgreSQL server does: numbers, dates, texts by their bytes.
    Everywhere,
    /// As every server does that has the same collation.
    Collated(Collation),
    /// Perhaps as no other server does.
    Own,
}

impl Order {
    /// Of a type that has one order, or of a text with its collation (PostgreSQL manual, "Collation Support").
    pub(crate) fn of(is_plain: bool, collation: Option<Collation>) -> Self {
        let Some(mut collation) = collation else {
            return if is_plain { Self::Everywhere } else { Self::Own };
        };
        let Some(locale) = collation.locale.take() else { return Self::Own };
        // The C library takes all spellings of one locale.
        let spelled = |locale: String| locale.replace("UTF-8", "utf8").replace("UTF8", "utf8");
        let locale = if collation.provider == "c" { spelled(locale) } else { locale };
        let is_bytes = match collation.provider.as_str() {
            "c" => ["C", "POSIX"].contains(&locale.as_str()),
            "b" => true,
            _ => false,
        };
        if is_bytes {
            return Self::Everywhere;
        }
        // By code points, and PostgreSQL knows no versions of that.
        let is_code_points = collation.provider == "c" && locale.starts_with("C.");
        if collation.version.is_none() && !is_code_points {
            return Self::Own;
        }
        if is_code_points {
            collation.version = None;
        }
        Self::Collated(Collation { locale: Some(locale), ..collation })
    }

    /// Whether ranges of one end are ranges of the other.
    ///
    /// Nothing is missed and nothing is called different if this is wrong, as it is when somebody has changed a collation
    /// behind the back of an index. Each range ends where the next begins, so that every row of the source is in one of them
    /// and every row of the target, whose order is another one, in one at least; two ranges are the same only if they have the
    /// same rows, and of two that are not, each row that only one has is looked at by its key at both ends. It would cost
    /// time, and a range of which the target shows many times as many rows is not decided.
    pub(crate) fn is_that_of(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Everywhere, Self::Everywhere) => true,
            (Self::Collated(one), Self::Collated(two)) => one == two,
            (Self::Everywhere | Self::Collated(_) | Self::Own, _) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn collation(provider: &str, locale: &str, version: Option<&str>) -> Collation {
        Collation {
            provider: provider.to_owned(),
            locale: Some(locale.to_owned()),
            rules: None,
            is_deterministic: true,
            version: version.map(str::to_owned),
            encoding: "UTF8".to_owned(),
        }
    }

    fn order(provider: &str, locale: &str, version: Option<&str>) -> Order {
        Order::of(false, Some(collation(provider, locale, version)))
    }

    #[test]
    fn bytes_and_what_is_no_text_have_one_order_everywhere() {
        assert_eq!(Order::of(true, None), Order::Everywhere);
        assert_eq!(Order::of(false, None), Order::Own, "an enum, a type of somebody");
        for (provider, locale) in
            [("c", "C"), ("c", "POSIX"), ("b", "C"), ("b", "C.UTF-8"), ("b", "PG_UNICODE_FAST")]
        {
            assert_eq!(order(provider, locale, Some("1")), Order::Everywhere, "{provider} {locale}");
        }
        assert!(Order::Everywhere.is_that_of(&order("c", "C", None)));
        assert!(!Order::Own.is_that_of(&Order::Own));
    }

    #[test]
    fn the_same_collation_is_the_same_order_and_everything_in_it_matters() {
        let one = collation("i", "en", Some("153.120"));
        let is_alike = |two: Collation| {
            let (one, two) = (Order::of(false, Some(one.clone())), Order::of(false, Some(two)));
            assert_eq!(one.is_that_of(&two), two.is_that_of(&one));
            one.is_that_of(&two)
        };
        assert!(is_alike(one.clone()));
        assert!(!is_alike(Collation { provider: "c".to_owned(), ..one.clone() }));
        assert!(!is_alike(Collation { locale: Some("sv".to_owned()), ..one.clone() }));
        assert!(!is_alike(Collation { rules: Some("& V << w".to_owned()), ..one.clone() }));
        assert!(!is_alike(Collation { is_deterministic: false, ..one.clone() }));
        assert!(!is_alike(Collation { version: Some("153.112".to_owned()), ..one.clone() }));
        assert!(!is_alike(Collation { encoding: "LATIN1".to_owned(), ..one.clone() }));
        assert!(!is_alike(Collation {
            locale: Some("C".to_owned()),
            provider: "c".to_owned(),
            ..one.clone()
        }));
    }

    #[test]
    fn a_collation_of_which_no_version_is_known_may_be_another_one() {
        let unknown = order("c", "en_US.utf8", None);
        assert!(!unknown.is_that_of(&unknown));
        let known = order("c", "en_US.UTF-8", Some("2.36"));
        assert!(known.is_that_of(&order("c", "en_US.utf8", Some("2.36"))), "other letters");
        assert!(!known.is_that_of(&order("c", "en_US.utf8", Some("2.41"))));
        // Code points have no versions, whatever is said of the library around them.
        assert!(order("c", "C.UTF-8", None).is_that_of(&order("c", "C.utf8", Some("2.36"))));
        assert!(!order("c", "C.UTF-8", None).is_that_of(&Order::Everywhere), "not in every encoding");
    }

    /// Where a row is in the order of an end, and which rows of an end are in a range.
    fn within(
        rows: &BTreeSet<usize>,
        rank: &[usize],
        after: Option<usize>,
        upto: Option<usize>,
    ) -> BTreeSet<usize> {
        let is_in = |row: &usize| {
            after.is_none_or(|bound| rank[*row] > rank[bound])
                && upto.is_none_or(|bound| rank[*row] <= rank[bound])
        };
        rows.iter().copied().filter(is_in).collect()
    }

    proptest! {
        /// What is said beside [`Order::is_that_of`]: with any order at the target, each row that only one end has is in a
        /// range whose rows are not the same at both.
        #[test]
        fn no_row_is_missed_when_the_orders_are_not_alike(
            here in prop::collection::btree_set(0..30_usize, 0..30),
            there in prop::collection::btree_set(0..30_usize, 0..30),
            rank in Just((0..30_usize).collect::<Vec<_>>()).prop_shuffle(),
            size in 1..8_usize,
        ) {
            let ordered: Vec<usize> = here.iter().copied().collect();
            let plain: Vec<usize> = (0..30).collect();
            let mut bounds: Vec<Option<usize>> = ordered.chunks_exact(size).map(|part| part.last().copied()).collect();
            bounds.push(None);
            let (mut after, mut found) = (None, BTreeSet::new());
            for upto in bounds {
                let (one, two) = (within(&here, &plain, after, upto), within(&there, &rank, after, upto));
                found.extend(one.symmetric_difference(&two).copied());
                after = upto;
            }
            // Those that are in different ranges are looked at too, and are the same then.
            prop_assert!(here.symmetric_difference(&there).all(|row| found.contains(row)));
        }
    }
}
