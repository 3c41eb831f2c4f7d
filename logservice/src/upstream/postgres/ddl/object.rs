//! Statements for views, sequences and types.
//!
//! Types that tables need are made with the tables, so a new type alone is no statement; one that changes is changed at
//! the target only if it is there.

use super::message::{FieldShape, ObjectKind, ObjectShape};
use super::statement::{Obstacle, Script, create_type, do_block, if_true, refusal};
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

/// The statements that make `after` of `before`; empty where there is nothing to do. `types` are those that its fields
/// need.
///
/// # Errors
/// When no statement does that to a type which the target may use.
pub(crate) fn change(
    before: Option<&ObjectShape>,
    after: Option<&ObjectShape>,
    types: &[event::TypeDefinition],
    wide: bool,
) -> Result<String, Obstacle> {
    match (before, after) {
        (None, Some(after)) => Ok(create(after)),
        (Some(before), None) => {
            let cascade = if wide { " CASCADE" } else { "" };
            Ok(format!("DROP {} IF EXISTS {}{cascade}", before.word(), before.sql_name()))
        }
        (Some(before), Some(after)) => alter(before, after, types),
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

fn alter(
    before: &ObjectShape,
    after: &ObjectShape,
    types: &[event::TypeDefinition],
) -> Result<String, Obstacle> {
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
        ObjectKind::Composite if before.fields != after.fields || before.definition != after.definition => {
            match (&before.fields, &after.fields) {
                (Some(old), Some(new)) => fields(after, old, new, types, &mut script),
                // Noted by an earlier version, which did not tell one field from another.
                _ => return Err(Obstacle("its fields changed, and what they were is not known".to_owned())),
            }
        }
        ObjectKind::Domain | ObjectKind::Range if before.definition != after.definition => {
            return Err(Obstacle("what it is made of changed, which cannot be followed".to_owned()));
        }
        ObjectKind::View
        | ObjectKind::Sequence
        | ObjectKind::Domain
        | ObjectKind::Composite
        | ObjectKind::Range => {}
    }
    Ok(script.0)
}

/// The target may have the type already, with labels of its own.
fn labels(before: &ObjectShape, after: &ObjectShape, script: &mut Script) {
    let name = after.sql_name();
    let has = |label: &str| {
        format!(
            "EXISTS (SELECT FROM pg_catalog.pg_enum WHERE enumtypid = pg_catalog.to_regtype({}) AND enumlabel = {})",
            literal(&name),
            literal(label)
        )
    };
    if before.labels.len() == after.labels.len() {
        for (old, new) in before.labels.iter().zip(&after.labels).filter(|(old, new)| old != new) {
            let rename = format!("ALTER TYPE {name} RENAME VALUE {} TO {}", literal(old), literal(new));
            let both = refusal(&format!(
                "type {name} of the target has both labels {old:?} and {new:?}, so the one cannot be renamed to the other; \
                 rename one of them there and resume"
            ));
            script.add(format_args!(
                "{}",
                if_true(&has(old), &format!("IF {} THEN {both} END IF; {rename}", has(new)))
            ));
        }
        return;
    }
    for (place, label) in after.labels.iter().enumerate() {
        if before.labels.contains(label) {
            continue;
        }
        let add = format!("ALTER TYPE {name} ADD VALUE IF NOT EXISTS {}", literal(label));
        let neighbour = match (place.checked_sub(1).and_then(|at| after.labels.get(at)), after.labels.get(1))
        {
            (Some(earlier), _) => Some((earlier, "AFTER")),
            (None, later) => later.map(|later| (later, "BEFORE")),
        };
        let add = match neighbour {
            Some((other, side)) => {
                format!("IF {} THEN {add} {side} {}; ELSE {add}; END IF", has(other), literal(other))
            }
            None => add,
        };
        script.add(format_args!("{}", if_true(&after.is_there(), &add)));
    }
}

/// From the fields of a composite type to other ones. Rows keep theirs, in the same order: a field that came has no value
/// in them.
fn fields(
    shape: &ObjectShape,
    old: &[FieldShape],
    new: &[FieldShape],
    types: &[event::TypeDefinition],
    script: &mut Script,
) {
    let name = shape.sql_name();
    let of = |fields: &'_ [FieldShape], number: i16| fields.iter().find(|f| f.number == number).cloned();
    let has = |field: &str| {
        format!(
            "EXISTS (SELECT FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.typrelid = a.attrelid \
             WHERE t.oid = pg_catalog.to_regtype({}) AND a.attname = {} AND NOT a.attisdropped)",
            literal(&name),
            literal(field)
        )
    };
    let mut body = String::new();
    for gone in old.iter().filter(|field| of(new, field.number).is_none()) {
        body.push_str(&format!("ALTER TYPE {name} DROP ATTRIBUTE IF EXISTS {}; ", ident(&gone.name)));
    }
    for field in new {
        let typed = || {
            let collation = field.collation.as_ref().map(|c| format!(" COLLATE {c}")).unwrap_or_default();
            format!("{}{collation}", field.sql)
        };
        let (quoted, Some(earlier)) = (ident(&field.name), of(old, field.number)) else {
            let add = format!("ALTER TYPE {name} ADD ATTRIBUTE {} {}", ident(&field.name), typed());
            body.push_str(&format!("IF NOT {} THEN {add}; END IF; ", has(&field.name)));
            continue;
        };
        if earlier.name != field.name {
            let rename = format!("ALTER TYPE {name} RENAME ATTRIBUTE {} TO {quoted}", ident(&earlier.name));
            body.push_str(&format!("IF {} THEN {rename}; END IF; ", has(&earlier.name)));
        }
        // A type that was renamed is the same one.
        let kind = |field: &FieldShape| (field.type_oid, field.type_mod, field.collation.clone());
        if kind(&earlier) != kind(field) {
            body.push_str(&format!("ALTER TYPE {name} ALTER ATTRIBUTE {quoted} TYPE {}; ", typed()));
        }
    }
    if body.is_empty() {
        return;
    }
    for definition in types {
        script.add(format_args!("{}", create_type(definition)));
    }
    script.add(format_args!("{}", do_block(&format!("IF {} THEN {body}END IF;", shape.is_there()))));
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
        let statements = change(before.as_ref(), after.as_ref(), &[], false);
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
                DO 'BEGIN IF pg_catalog.to_regtype(''"app"."o"'') IS NOT NULL THEN IF EXISTS (SELECT FROM pg_catalog.pg_enum WHERE enumtypid = pg_catalog.to_regtype(''"app"."o"'') AND enumlabel = ''a'') THEN ALTER TYPE "app"."o" ADD VALUE IF NOT EXISTS ''0'' BEFORE ''a''; ELSE ALTER TYPE "app"."o" ADD VALUE IF NOT EXISTS ''0''; END IF; END IF; END';
                DO 'BEGIN IF pg_catalog.to_regtype(''"app"."o"'') IS NOT NULL THEN IF EXISTS (SELECT FROM pg_catalog.pg_enum WHERE enumtypid = pg_catalog.to_regtype(''"app"."o"'') AND enumlabel = ''a'') THEN ALTER TYPE "app"."o" ADD VALUE IF NOT EXISTS ''b'' AFTER ''a''; ELSE ALTER TYPE "app"."o" ADD VALUE IF NOT EXISTS ''b''; END IF; END IF; END'"#]],
        );
        check(
            with(&["a", "c"]),
            with(&["a", "d"]),
            expect![[
                r#"DO 'BEGIN IF EXISTS (SELECT FROM pg_catalog.pg_enum WHERE enumtypid = pg_catalog.to_regtype(''"app"."o"'') AND enumlabel = ''c'') THEN IF EXISTS (SELECT FROM pg_catalog.pg_enum WHERE enumtypid = pg_catalog.to_regtype(''"app"."o"'') AND enumlabel = ''d'') THEN RAISE EXCEPTION USING ERRCODE = ''MR001'', MESSAGE = ''type "app"."o" of the target has both labels "c" and "d", so the one cannot be renamed to the other; rename one of them there and resume''; END IF; ALTER TYPE "app"."o" RENAME VALUE ''c'' TO ''d''; END IF; END'"#
            ]],
        );
    }

    #[test]
    fn a_domain_and_the_fields_of_a_composite_type_follow() {
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
        let fields = |fields: Value| {
            Some(shape("composite", json!({ "definition": fields.to_string(), "fields": fields })))
        };
        let field = |number: i16, name: &str, sql: &str| json!({ "number": number, "name": name, "type": sql.len(), "mod": -1, "sql": sql, "collation": null });
        check(
            fields(json!([field(1, "a", "integer"), field(2, "b", "text"), field(3, "c", "date")])),
            fields(json!([field(1, "a", "bigint"), field(3, "d", "date"), field(4, "e", "numeric")])),
            expect![[
                r#"DO 'BEGIN IF pg_catalog.to_regtype(''"app"."o"'') IS NOT NULL THEN ALTER TYPE "app"."o" DROP ATTRIBUTE IF EXISTS "b"; ALTER TYPE "app"."o" ALTER ATTRIBUTE "a" TYPE bigint; IF EXISTS (SELECT FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.typrelid = a.attrelid WHERE t.oid = pg_catalog.to_regtype(''"app"."o"'') AND a.attname = ''c'' AND NOT a.attisdropped) THEN ALTER TYPE "app"."o" RENAME ATTRIBUTE "c" TO "d"; END IF; IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.typrelid = a.attrelid WHERE t.oid = pg_catalog.to_regtype(''"app"."o"'') AND a.attname = ''e'' AND NOT a.attisdropped) THEN ALTER TYPE "app"."o" ADD ATTRIBUTE "e" numeric; END IF; END IF; END'"#
            ]],
        );
        let unknown = |fields: &str| Some(shape("composite", json!({ "definition": fields })));
        check(
            unknown("a int"),
            unknown("a int, b int"),
            expect!["obstacle: its fields changed, and what they were is not known"],
        );
    }
}
