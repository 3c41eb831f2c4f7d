//! Pairs of shapes, and the statements between them.

use expect_test::{Expect, expect};
use serde_json::{Value, json};

use super::super::message::{ConstraintShape, IndexShape, tests::table};
use super::super::statement::create;
use super::*;

fn notice(more: Value) -> Notice {
    let mut message =
        json!({ "version": 1, "class": "table", "object": 5, "tag": "ALTER TABLE", "path": "app, public" });
    for (key, value) in more.as_object().into_iter().flatten() {
        message[key] = value.clone();
    }
    Notice::read(message.to_string().as_bytes()).expect("notice")
}

fn check(before: &TableShape, after: &TableShape, more: Value, expected: Expect) {
    let result = alter(before, after, &notice(more), &[], &|id| id == 5);
    expected.assert_eq(&match result {
        Ok(statements) => statements,
        Err(Obstacle(text)) => format!("obstacle: {text}"),
    });
}

#[test]
fn columns_are_told_apart_by_their_numbers() {
    let before = table(&[(1, "id", "integer"), (2, "a", "text"), (3, "gone", "text")]);
    let after = table(&[(1, "id", "bigint"), (2, "b", "text"), (4, "a", "date")]);
    let mut after = after;
    after.columns[0].type_oid = 20;
    after.columns[2].not_null = true;
    check(
        &before,
        &after,
        json!({}),
        expect![[r#"
        ALTER TABLE "app"."t" DROP COLUMN IF EXISTS "gone";
        ALTER TABLE "app"."t" RENAME COLUMN "a" TO "b";
        ALTER TABLE "app"."t" ALTER COLUMN "id" DROP DEFAULT, ALTER COLUMN "id" TYPE bigint;
        ALTER TABLE "app"."t" ADD COLUMN IF NOT EXISTS "a" date NOT NULL"#]],
    );
}

#[test]
fn a_table_moves_and_is_renamed() {
    let before = table(&[(1, "id", "integer")]);
    let mut after = before.clone();
    (after.schema_oid, after.schema, after.name) = (8, "new \"s\"".to_owned(), "t2".to_owned());
    check(
        &before,
        &after,
        json!({}),
        expect![[r#"
        ALTER TABLE "app"."t" SET SCHEMA "new ""s""";
        ALTER TABLE "new ""s"""."t" RENAME TO "t2""#]],
    );
    let mut after = before.clone();
    after.schema = "renamed".to_owned();
    check(&before, &after, json!({}), expect![""]);
}

#[test]
fn rows_that_are_older_than_a_column_get_the_value_that_they_got() {
    let before = table(&[(1, "id", "integer")]);
    let mut after = table(&[(1, "id", "integer"), (2, "at", "timestamp with time zone")]);
    after.columns[1].default = Some("now()".to_owned());
    after.columns[1].missing = Some("2026-01-02 03:04:05+00".to_owned());
    check(
        &before,
        &after,
        json!({}),
        expect![[r#"
        ALTER TABLE "app"."t" ADD COLUMN IF NOT EXISTS "at" timestamp with time zone DEFAULT '2026-01-02 03:04:05+00'::timestamp with time zone;
        ALTER TABLE "app"."t" ALTER COLUMN "at" SET DEFAULT now()"#]],
    );
    after.columns[1].missing = None;
    after.columns[1].default = Some("random()".to_owned());
    check(
        &before,
        &after,
        json!({ "rewritten": 2, "rows": true }),
        expect![[
            r#"obstacle: the rows that it had got values in the new column "at" which the target cannot compute in the same way; add the column without a default, fill it with UPDATE, and set the default then"#
        ]],
    );
    check(
        &before,
        &after,
        json!({ "rewritten": 2, "rows": false }),
        expect![[
            r#"ALTER TABLE "app"."t" ADD COLUMN IF NOT EXISTS "at" timestamp with time zone DEFAULT random()"#
        ]],
    );
}

#[test]
fn new_values_are_made_as_the_statement_made_them_or_not_at_all() {
    let before = table(&[(1, "id", "integer"), (2, "n", "text")]);
    let mut after = table(&[(1, "id", "integer"), (2, "n", "integer")]);
    after.columns[1].type_oid = 25;
    let query = "alter table t alter n type integer using length(n)";
    check(
        &before,
        &after,
        json!({ "rewritten": 4, "rows": true, "query": query }),
        expect![[r#"
        SET LOCAL search_path = "app", "public";
        ALTER TABLE "app"."t" ALTER COLUMN "n" DROP DEFAULT, ALTER COLUMN "n" TYPE integer USING length(n)"#]],
    );
    check(
        &before,
        &before,
        json!({ "rewritten": 4, "rows": true, "query": "alter table t alter n type text using n || '!'" }),
        expect![[r#"
        SET LOCAL search_path = "app", "public";
        ALTER TABLE "app"."t" ALTER COLUMN "n" DROP DEFAULT, ALTER COLUMN "n" TYPE text USING n || '!'"#]],
    );
    check(
        &before,
        &after,
        json!({ "rewritten": 4, "rows": true, "query": "select migrate()" }),
        expect![
            "obstacle: it was written anew with a new type of a column, and the text of the session does not tell how the values were made, since it is not one ALTER TABLE of this table alone"
        ],
    );
    check(
        &before,
        &after,
        json!({ "rewritten": 4, "rows": false }),
        expect![[
            r#"ALTER TABLE "app"."t" ALTER COLUMN "n" DROP DEFAULT, ALTER COLUMN "n" TYPE integer USING "n"::text::integer"#
        ]],
    );
}

#[test]
fn constraints_and_indexes_come_go_and_are_renamed() {
    let constraint = |oid: u32, name: &str, kind: char, definition: &str, refers: u32| ConstraintShape {
        oid,
        name: name.to_owned(),
        kind,
        definition: definition.to_owned(),
        refers,
        validated: true,
        deferrable: false,
        deferred: false,
        inherited: false,
    };
    let index = |oid: u32, name: &str| IndexShape {
        oid,
        name: name.to_owned(),
        primary: false,
        unique: false,
        replica: false,
        immediate: true,
        exclusion: false,
        plain: true,
        nulls_not_distinct: false,
        key: vec![1],
        constraint: false,
        definition: "btree (id)".to_owned(),
    };
    let mut before = table(&[(1, "id", "integer")]);
    before.constraints =
        vec![constraint(1, "c", 'c', "CHECK ((id > 0))", 0), constraint(2, "d", 'c', "CHECK ((id > 1))", 0)];
    before.indexes = vec![index(11, "i"), index(12, "j")];
    let mut after = table(&[(1, "id", "integer")]);
    after.constraints = vec![
        constraint(2, "e", 'c', "CHECK ((id > 1))", 0),
        constraint(3, "f", 'f', "FOREIGN KEY (id) REFERENCES app.u(id)", 5),
        constraint(4, "g", 'f', "FOREIGN KEY (id) REFERENCES app.v(id)", 6),
    ];
    after.indexes = vec![index(12, "k"), index(13, "l")];
    check(
        &before,
        &after,
        json!({}),
        expect![[r#"
        ALTER TABLE "app"."t" DROP CONSTRAINT IF EXISTS "c";
        DROP INDEX IF EXISTS "app"."i";
        DO 'BEGIN IF EXISTS (SELECT FROM pg_catalog.pg_constraint WHERE conrelid = pg_catalog.to_regclass(''"app"."t"'') AND conname = ''d'') THEN ALTER TABLE "app"."t" RENAME CONSTRAINT "d" TO "e"; END IF; END';
        ALTER INDEX IF EXISTS "app"."j" RENAME TO "k";
        CREATE INDEX IF NOT EXISTS "l" ON "app"."t" USING btree (id);
        ALTER TABLE "app"."t" ADD CONSTRAINT "f" FOREIGN KEY (id) REFERENCES app.u(id)"#]],
    );
    // REINDEX gives an index another id.
    let mut again = before.clone();
    again.indexes[0].oid = 21;
    check(&before, &again, json!({}), expect![""]);
}

#[test]
fn a_table_is_created_with_what_belongs_to_it() {
    let mut shape = table(&[(1, "id", "integer"), (2, "twice", "integer"), (3, "note", "text")]);
    shape.columns[0].identity = "a".to_owned();
    shape.columns[0].not_null = true;
    shape.columns[1].generated = "s".to_owned();
    shape.columns[1].default = Some("id * 2".to_owned());
    shape.columns[2].collation = Some("pg_catalog.\"C\"".to_owned());
    shape.columns[2].default = Some("'it''s'::text".to_owned());
    shape.partition_key = Some("RANGE (id)".to_owned());
    expect![[r#"CREATE TABLE IF NOT EXISTS "app"."t" ("id" integer GENERATED ALWAYS AS IDENTITY NOT NULL, "twice" integer GENERATED ALWAYS AS (id * 2) STORED, "note" text COLLATE pg_catalog."C" DEFAULT 'it''s'::text) PARTITION BY RANGE (id)"#]]
        .assert_eq(&create(&shape, &[], &|_| true));
}

#[test]
fn constants_and_search_paths_are_recognised() {
    for constant in ["7", "(-1)", "'f(x)'::text", "true", "'{}'::jsonb", "NULL::text"] {
        assert!(is_constant(constant), "{constant}");
    }
    for call in ["now()", "CURRENT_TIMESTAMP", "nextval('x'::regclass)", "\"F\"(1)", "ARRAY[f(1)]"] {
        assert!(!is_constant(call), "{call}");
    }
    assert_eq!(safe_path("\"$user\", public"), "\"$user\", \"public\"");
    assert_eq!(safe_path("a, \"b, \"\"c\""), "\"a\", \"b, \"\"c\"");
    assert_eq!(safe_path(""), "''");
}
