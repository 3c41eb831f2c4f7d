//! Statements for views, sequences and types.
//!
//! Types that tables need are made with the tables, so a new type alone is no statement; one that changes is changed at
//! the target only if it is there.

use super::message::{ObjectKind, ObjectShape};
use super::statement::{Obstacle, Script, if_true};
use crate::upstream::postgres::sql::{ident, literal, qualified};

impl ObjectShape {
    fn sql_name(&self) -> String {
        qualified(&self.schema, &self.name)
    }

    /// What `CREATE`, `ALTER` and `DROP` call it.
    fn word(&self) -> &'static str {
        match self.kind {
            ObjectKind::View => "VIEW",
            ObjectKind::Sequence => "SEQUENCE",
            ObjectKind::Domain => "DOMAIN",
            ObjectKind::Enum | ObjectKind::Composite | ObjectKind::Range => "TYPE",
        }
    }

    fn is_type(&self) -> bool {
        !matches!(self.kind, ObjectKind::View | ObjectKind::Sequence)
    }

    /// A condition: the target has it.
    fn is_there(&self) -> String {
        let name = literal(&self.sql_name());
        let function = if self.is_type() { "to_regtype" } else { "to_regclass" };
        format!("pg_catalog.{function}({name}) IS NOT NULL")
    }
}

/// The statements that make `after` of `before`; empty where there is nothing to do.
///
/// # Errors
/// When no statement does that to a type which the target may use.
pub(crate) fn change(
    before: Option<&ObjectShape>,
    after: Option<&ObjectShape>,
    wide: bool,
) -> Result<String, Obstacle> {
    match (before, after) {
        (None, Some(after)) => Ok(create(after)),
        (Some(before), None) => {
            let cascade = if wide { " CASCADE" } else { "" };
            Ok(format!("DROP {} IF EXISTS {}{cascade}", before.word(), before.sql_name()))
        }
        (Some(before), Some(after)) => alter(before, after),
        (None, None) => Ok(String::new()),
    }
}

fn create(shape: &ObjectShape) -> String {
    let name = shape.sql_name();
    match shape.kind {
        ObjectKind::View => {
            let options =
                if shape.options.is_empty() { String::new() } else { format!(" WITH ({})", shape.options) };
            format!("CREATE OR REPLACE VIEW {name}{options} AS {}", shape.definition.trim_end_matches(';'))
        }
        ObjectKind::Sequence => format!("CREATE SEQUENCE IF NOT EXISTS {name} {}", shape.definition),
        // Made with the first table that needs it.
        ObjectKind::Enum | ObjectKind::Domain | ObjectKind::Composite | ObjectKind::Range => String::new(),
    }
}

fn alter(before: &ObjectShape, after: &ObjectShape) -> Result<String, Obstacle> {
    let mut script = Script::default();
    let word = after.word();
    if before.schema != after.schema {
        let set = format!("ALTER {word} {} SET SCHEMA {}", before.sql_name(), ident(&after.schema));
        script.add(format_args!("{}", if_true(&before.is_there(), &set)));
    }
    let moved = ObjectShape { schema: after.schema.clone(), ..before.clone() };
    if before.name != after.name {
        let rename = format!("ALTER {word} {} RENAME TO {}", moved.sql_name(), ident(&after.name));
        script.add(format_args!("{}", if_true(&moved.is_there(), &rename)));
    }
    match after.kind {
        ObjectKind::View if (&before.definition, &before.options) != (&after.definition, &after.options) => {
            script.add(format_args!("{}", create(after)));
        }
        ObjectKind::Sequence if before.definition != after.definition => {
            let change = format!("ALTER SEQUENCE {} {}", after.sql_name(), after.definition);
            script.add(format_args!("{}", if_true(&after.is_there(), &change)));
        }
        ObjectKind::Enum => labels(before, after, &mut script),
        ObjectKind::Domain if before.definition == after.definition => domain(before, after, &mut script),
        ObjectKind::Domain | ObjectKind::Composite | ObjectKind::Range
            if before.definition != after.definition =>
        {
            return Err(Obstacle("its fields changed, which cannot be followed".to_owned()));
        }
        ObjectKind::View
        | ObjectKind::Sequence
        | ObjectKind::Domain
        | ObjectKind::Composite
        | ObjectKind::Range => {}
    }
    Ok(script.0)
}

fn labels(before: &ObjectShape, after: &ObjectShape, script: &mut Script) {
    let name = after.sql_name();
    if before.labels.len() == after.labels.len() {
        for (old, new) in before.labels.iter().zip(&after.labels).filter(|(old, new)| old != new) {
            let there = format!(
                "EXISTS (SELECT FROM pg_catalog.pg_enum WHERE enumtypid = pg_catalog.to_regtype({}) AND enumlabel = {})",
                literal(&name),
                literal(old)
            );
            let rename = format!("ALTER TYPE {name} RENAME VALUE {} TO {}", literal(old), literal(new));
            script.add(format_args!("{}", if_true(&there, &rename)));
        }
        return;
    }
    for (place, label) in after.labels.iter().enumerate() {
        if before.labels.contains(label) {
            continue;
        }
        let neighbour = match (place.checked_sub(1).and_then(|at| after.labels.get(at)), after.labels.get(1))
        {
            (Some(earlier), _) => format!(" AFTER {}", literal(earlier)),
            (None, Some(later)) => format!(" BEFORE {}", literal(later)),
            (None, None) => String::new(),
        };
        let add = format!("ALTER TYPE {name} ADD VALUE IF NOT EXISTS {}{neighbour}", literal(label));
        script.add(format_args!("{}", if_true(&after.is_there(), &add)));
    }
}

fn domain(before: &ObjectShape, after: &ObjectShape, script: &mut Script) {
    let start = format!("ALTER DOMAIN {}", after.sql_name());
    let mut actions = Vec::new();
    for (name, check) in &before.checks {
        if after.checks.get(name) != Some(check) {
            actions.push(format!("DROP CONSTRAINT IF EXISTS {}", ident(name)));
        }
    }
    for (name, check) in &after.checks {
        if before.checks.get(name) != Some(check) {
            actions.push(format!("ADD CONSTRAINT {} {check}", ident(name)));
        }
    }
    if before.default != after.default {
        actions.push(match &after.default {
            Some(default) => format!("SET DEFAULT {default}"),
            None => "DROP DEFAULT".to_owned(),
        });
    }
    if before.not_null != after.not_null {
        actions.push(if after.not_null { "SET NOT NULL" } else { "DROP NOT NULL" }.to_owned());
    }
    for action in actions {
        script.add(format_args!("{}", if_true(&after.is_there(), &format!("{start} {action}"))));
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};
    use serde_json::{Value, json};

    use super::*;

    fn shape(kind: &str, more: Value) -> ObjectShape {
        let mut shape = json!({ "schema": "app", "name": "o", "kind": kind, "definition": "" });
        for (key, value) in more.as_object().into_iter().flatten() {
            shape[key] = value.clone();
        }
        serde_json::from_value(shape).expect("shape")
    }

    fn check(before: Option<ObjectShape>, after: Option<ObjectShape>, expected: Expect) {
        let statements = change(before.as_ref(), after.as_ref(), false);
        expected.assert_eq(&statements.unwrap_or_else(|Obstacle(why)| format!("obstacle: {why}")));
    }

    #[test]
    fn views_and_sequences_are_made_changed_and_dropped() {
        let view = shape("view", json!({ "definition": " SELECT 1;", "options": "security_barrier=true" }));
        check(
            None,
            Some(view.clone()),
            expect![[r#"CREATE OR REPLACE VIEW "app"."o" WITH (security_barrier=true) AS  SELECT 1"#]],
        );
        check(Some(view), None, expect![[r#"DROP VIEW IF EXISTS "app"."o""#]]);
        let sequence = shape("sequence", json!({ "definition": "AS bigint" }));
        check(
            None,
            Some(sequence.clone()),
            expect![[r#"CREATE SEQUENCE IF NOT EXISTS "app"."o" AS bigint"#]],
        );
        let renamed = ObjectShape { name: "p".to_owned(), ..sequence.clone() };
        check(
            Some(sequence),
            Some(renamed),
            expect![[
                r#"DO 'BEGIN IF pg_catalog.to_regclass(''"app"."o"'') IS NOT NULL THEN ALTER SEQUENCE "app"."o" RENAME TO "p"; END IF; END'"#
            ]],
        );
    }

    #[test]
    fn labels_are_added_at_their_places_and_renamed() {
        let with = |labels: &[&str]| Some(shape("enum", json!({ "labels": labels })));
        check(None, with(&["a"]), expect![""]);
        check(
            with(&["a", "c"]),
            with(&["0", "a", "b", "c"]),
            expect![[r#"
            DO 'BEGIN IF pg_catalog.to_regtype(''"app"."o"'') IS NOT NULL THEN ALTER TYPE "app"."o" ADD VALUE IF NOT EXISTS ''0'' BEFORE ''a''; END IF; END';
            DO 'BEGIN IF pg_catalog.to_regtype(''"app"."o"'') IS NOT NULL THEN ALTER TYPE "app"."o" ADD VALUE IF NOT EXISTS ''b'' AFTER ''a''; END IF; END'"#]],
        );
        check(
            with(&["a", "c"]),
            with(&["a", "d"]),
            expect![[
                r#"DO 'BEGIN IF EXISTS (SELECT FROM pg_catalog.pg_enum WHERE enumtypid = pg_catalog.to_regtype(''"app"."o"'') AND enumlabel = ''c'') THEN ALTER TYPE "app"."o" RENAME VALUE ''c'' TO ''d''; END IF; END'"#
            ]],
        );
    }

    #[test]
    fn a_domain_follows_and_a_composite_type_does_not() {
        let plain = shape("domain", json!({ "definition": "integer" }));
        let strict = shape(
            "domain",
            json!({ "definition": "integer", "not_null": true, "checks": { "c": "CHECK ((VALUE > 0))" } }),
        );
        check(
            Some(plain),
            Some(strict),
            expect![[r#"
            DO 'BEGIN IF pg_catalog.to_regtype(''"app"."o"'') IS NOT NULL THEN ALTER DOMAIN "app"."o" ADD CONSTRAINT "c" CHECK ((VALUE > 0)); END IF; END';
            DO 'BEGIN IF pg_catalog.to_regtype(''"app"."o"'') IS NOT NULL THEN ALTER DOMAIN "app"."o" SET NOT NULL; END IF; END'"#]],
        );
        let fields = |fields: &str| Some(shape("composite", json!({ "definition": fields })));
        check(
            fields("a int"),
            fields("a int, b int"),
            expect!["obstacle: its fields changed, which cannot be followed"],
        );
    }
}
