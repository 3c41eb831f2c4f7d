//! What of the tables leaves the source, where that is not all of them: what a person wants, and what is published.

use std::fmt;

use heartbeatpb::config::PublishRule;
use serde::{Deserialize, Serialize};

use crate::{Error, TableFilter};

/// What a person wants of the tables that he names: `filter.publish` of the configuration.
#[derive(Clone, Default)]
pub struct PublishRules {
    rules: Vec<(TableFilter, TablePart)>,
}

impl PublishRules {
    /// Compiles the entries.
    ///
    /// # Errors
    /// Names the first matcher that is malformed.
    pub fn new(rules: &[PublishRule], case_sensitive: bool) -> Result<Self, Error> {
        let compile = |rule: &PublishRule| {
            let part = TablePart {
                columns: (!rule.columns.is_empty()).then(|| rule.columns.clone()),
                condition: (!rule.condition.is_empty()).then(|| rule.condition.clone()),
            };
            Ok((TableFilter::new(&rule.matcher, case_sensitive)?, part))
        };
        Ok(Self { rules: rules.iter().map(compile).collect::<Result<_, Error>>()? })
    }

    /// Whether all of every table is wanted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// How many entries there are.
    pub(crate) fn len(&self) -> usize {
        self.rules.len()
    }

    /// The entry that holds for a table, the first that fits, and what it wants.
    pub(crate) fn of(&self, schema: &str, name: &str) -> Option<(usize, &TablePart)> {
        let mut rules = self.rules.iter().enumerate();
        rules.find(|(_, (tables, _))| tables.matches(schema, name)).map(|(at, (_, part))| (at, part))
    }
}

/// What of a table is replicated. `Debug` hides the condition.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct TablePart {
    /// Only these columns.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub columns: Option<Vec<String>>,
    /// Only rows for which this expression is true. Of a table that is published, it is as the server prints it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub condition: Option<String>,
}

impl TablePart {
    /// Whether a column belongs to it.
    pub(crate) fn has(&self, column: &str) -> bool {
        self.columns.as_ref().is_none_or(|columns| columns.iter().any(|name| name == column))
    }

    /// The condition for a statement, in parentheses. The text may end in a comment.
    pub(crate) fn sql_condition(&self) -> Option<String> {
        self.condition.as_ref().map(|condition| format!("({condition}\n)"))
    }
}

impl fmt::Debug for TablePart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TablePart")
            .field("columns", &self.columns)
            .field("condition", &self.condition.is_some())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_entry_that_fits_holds_and_conditions_are_not_shown() {
        let rule = |matcher: &str, columns: &[&str], condition: &str| PublishRule {
            matcher: vec![matcher.to_owned()],
            columns: columns.iter().map(|name| (*name).to_owned()).collect(),
            condition: condition.to_owned(),
        };
        let rules = PublishRules::new(
            &[
                rule("shop.orders", &["id"], ""),
                rule("shop.*", &[], "secret > 1 -- why"),
                rule("*.*", &[], ""),
            ],
            false,
        )
        .expect("rules");
        let (at, part) = rules.of("shop", "Orders").expect("an entry");
        assert_eq!((at, part.has("id"), part.has("v"), part.sql_condition()), (0, true, false, None));
        let (at, part) = rules.of("shop", "lines").expect("an entry");
        assert_eq!(
            (at, part.has("v"), part.sql_condition().as_deref()),
            (1, true, Some("(secret > 1 -- why\n)"))
        );
        assert!(!format!("{part:?}").contains("secret"));
        assert_eq!(rules.of("app", "t"), Some((2, &TablePart::default())));
        assert!(PublishRules::new(&[rule("a[", &[], "")], false).is_err());
        assert!(PublishRules::default().of("a", "b").is_none());
    }
}
