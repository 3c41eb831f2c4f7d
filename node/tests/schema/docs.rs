//! The tables of `docs/postgresql.md` say what the tests show: they are made from the lists below, and every line names the
//! tests that show it. `UPDATE_DOCS=1` writes them.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use testkit::PgServer;

use crate::matrix::STATEMENTS;

/// Statements, what becomes of them at the target, and what shows it: names of the matrix, or of tests beside it.
struct Line(&'static str, &'static str, &'static [&'static str]);

const LINES: &[Line] = &[
    Line(
        "`CREATE`, `ALTER … RENAME`, `DROP SCHEMA`",
        "the same; with `CASCADE` where the statement took other objects along",
        &["CREATE SCHEMA", "ALTER SCHEMA … RENAME", "DROP SCHEMA", "DROP SCHEMA … CASCADE"],
    ),
    Line(
        "`CREATE TABLE`, also `LIKE`, `AS` or in a function; `SELECT INTO`",
        "columns, defaults, identity and generated columns, constraints, indexes; not: owner, privileges, comments, \
         storage, triggers, policies, inheritance, defaults that call a function of the database or a sequence, foreign \
         keys to tables that are not replicated",
        &[
            "CREATE TABLE",
            "CREATE TABLE … IDENTITY",
            "CREATE TABLE … LIKE",
            "tables_that_are_made_with_their_rows_come_with_them",
            "CREATE TABLE … REFERENCES",
            "CREATE TABLE IF NOT EXISTS",
        ],
    ),
    Line(
        "`DROP TABLE`, `ALTER TABLE … RENAME`, `SET SCHEMA`",
        "the same; a table that gets a name which the filter does not want is renamed and followed no longer",
        &[
            "DROP TABLE",
            "DROP TABLE … CASCADE",
            "DROP TABLE with its serial",
            "RENAME TO",
            "SET SCHEMA",
            "a_table_that_gets_an_unwanted_name_is_renamed_and_not_followed_any_more",
        ],
    ),
    Line(
        "`TRUNCATE`",
        "the same, also of several tables and with `CASCADE`",
        &["TRUNCATE", "TRUNCATE … CASCADE", "TRUNCATE of several"],
    ),
    Line(
        "`ADD COLUMN`",
        "the same; rows that are there get the values that they got at the source. Values that differ from row to row \
         (`DEFAULT random()`, `serial`) stop the changefeed, unless the table is empty",
        &[
            "ADD COLUMN",
            "ADD COLUMN … DEFAULT",
            "ADD COLUMN … DEFAULT now()",
            "ADD COLUMN … GENERATED",
            "ADD COLUMN of an empty table, volatile default",
            "ADD COLUMN IF NOT EXISTS",
            "values_that_the_target_cannot_compute_stop_the_changefeed",
        ],
    ),
    Line(
        "`DROP`, `RENAME COLUMN`; `SET`, `DROP DEFAULT`, `NOT NULL`, `EXPRESSION`, `IDENTITY`",
        "the same",
        &[
            "DROP COLUMN",
            "DROP COLUMN … CASCADE",
            "DROP COLUMN … CASCADE with a view",
            "RENAME COLUMN",
            "SET DEFAULT",
            "DROP DEFAULT",
            "SET NOT NULL",
            "DROP NOT NULL",
            "DROP EXPRESSION",
            "SET GENERATED",
            "DROP IDENTITY",
            "ADD GENERATED",
        ],
    ),
    Line(
        "`ALTER COLUMN … TYPE`, also with `USING`",
        "the same. The expression is taken from the statement: one that is executed by a function, or beside other \
         statements in one text, stops the changefeed when it made new values of rows",
        &[
            "TYPE without a rewrite",
            "TYPE with a rewrite",
            "TYPE … USING",
            "TYPE of an empty table",
            "TYPE with a default",
            "USING with the same type",
            "a_new_type_whose_expression_is_hidden_in_a_function_stops_the_changefeed",
        ],
    ),
    Line(
        "`ADD`, `DROP`, `RENAME`, `VALIDATE`, `ALTER CONSTRAINT`",
        "the same",
        &[
            "ADD CHECK",
            "ADD CHECK … NOT VALID",
            "ADD UNIQUE",
            "ADD FOREIGN KEY",
            "ADD CONSTRAINT USING INDEX",
            "EXCLUDE",
            "DROP CONSTRAINT",
            "DROP CONSTRAINT of a column",
            "RENAME CONSTRAINT",
            "VALIDATE CONSTRAINT",
            "ALTER CONSTRAINT",
        ],
    ),
    Line(
        "`CREATE`, `DROP INDEX`, also `CONCURRENTLY`; `ALTER INDEX … RENAME`",
        "the same, but never concurrently",
        &[
            "CREATE INDEX",
            "CREATE UNIQUE INDEX",
            "CREATE INDEX CONCURRENTLY",
            "DROP INDEX",
            "DROP INDEX CONCURRENTLY",
            "ALTER INDEX … RENAME",
        ],
    ),
    Line("`REPLICA IDENTITY`", "nothing: the log changes, the target does not", &["REPLICA IDENTITY"]),
    Line(
        "`CREATE TABLE … PARTITION BY`, `PARTITION OF`; `ATTACH`, `DETACH PARTITION`; `DROP`, `TRUNCATE` of a partition",
        "the same where the target divides the table in the same way; otherwise see *Partitions*",
        &[
            "CREATE TABLE … PARTITION BY",
            "CREATE TABLE … PARTITION OF",
            "ADD COLUMN of partitions",
            "CREATE INDEX of partitions",
            "ATTACH PARTITION",
            "DETACH PARTITION",
            "DETACH PARTITION CONCURRENTLY",
            "DETACH and drop",
            "DROP TABLE of a partition",
            "DROP TABLE of partitions",
            "TRUNCATE of a partition",
            "truncating_one_partition_reaches_every_target",
        ],
    ),
    Line(
        "`CREATE`, `ALTER`, `DROP VIEW`",
        "the same; not: materialized views",
        &[
            "CREATE VIEW",
            "CREATE OR REPLACE VIEW",
            "ALTER VIEW … RENAME",
            "ALTER VIEW … SET SCHEMA",
            "DROP VIEW",
        ],
    ),
    Line(
        "`CREATE`, `ALTER`, `DROP SEQUENCE`",
        "the same; their values: see *Sequences*",
        &[
            "CREATE SEQUENCE",
            "ALTER SEQUENCE",
            "ALTER SEQUENCE … RENAME",
            "ALTER SEQUENCE … SET SCHEMA",
            "DROP SEQUENCE",
            "sequences_of_the_target_stand_where_those_of_the_source_do",
        ],
    ),
    Line(
        "`CREATE TYPE`, `CREATE DOMAIN`",
        "made with the first table that needs it",
        &["CREATE TYPE … AS ENUM with a table", "CREATE DOMAIN with a column"],
    ),
    Line(
        "`ALTER TYPE … ADD`, `RENAME VALUE`; `ADD`, `DROP`, `RENAME`, `ALTER ATTRIBUTE`; `RENAME`, `SET SCHEMA`; `ALTER \
         DOMAIN`; `DROP TYPE`",
        "the same, of every type that a replicated table has in it, and of those in schemas that the filter wants",
        &[
            "ADD VALUE",
            "RENAME VALUE",
            "ADD ATTRIBUTE",
            "ADD ATTRIBUTE of a new type",
            "RENAME ATTRIBUTE",
            "DROP ATTRIBUTE",
            "ALTER ATTRIBUTE … TYPE",
            "ALTER TYPE … RENAME",
            "ALTER TYPE … SET SCHEMA",
            "ALTER DOMAIN",
            "ALTER DOMAIN … RENAME CONSTRAINT",
            "VALIDATE CONSTRAINT of a domain",
            "DROP TYPE",
            "types_follow_their_tables_wherever_they_are",
            "a_table_of_a_type_gets_its_new_fields",
        ],
    ),
    Line(
        "temporary and unlogged tables",
        "nothing; one that is `SET LOGGED` while it is empty is a new table",
        &["TEMPORARY", "UNLOGGED", "SET LOGGED"],
    ),
    Line(
        "functions, triggers, rules, policies, extensions, roles, privileges, comments",
        "nothing",
        &["statements_about_anything_else_change_nothing_at_the_target"],
    ),
];

/// Types, and whether a primary key of them divides a table.
const TYPES: &[(&[&str], bool)] = &[
    (&["boolean", "smallint", "integer", "bigint", "oid", "numeric"], true),
    (&["real", "double precision", "money"], false),
    (&["date", "time", "timestamp", "timestamptz"], true),
    (&["timetz", "interval"], false),
    (&["text", "varchar", "char", "name", "\"char\""], true),
    (&["uuid", "bytea", "bit", "varbit"], true),
    (&["json", "jsonb", "jsonpath", "xml", "tsvector", "tsquery"], false),
    (&["inet", "cidr", "macaddr", "macaddr8"], false),
    (&["point", "line", "lseg", "box", "path", "polygon", "circle"], false),
    (
        &[
            "int4range",
            "int8range",
            "numrange",
            "tsrange",
            "tstzrange",
            "daterange",
            "int4multirange",
            "int8multirange",
            "nummultirange",
            "tsmultirange",
            "tstzmultirange",
            "datemultirange",
        ],
        false,
    ),
    (
        &[
            "pg_lsn",
            "txid_snapshot",
            "pg_snapshot",
            "xid",
            "xid8",
            "cid",
            "tid",
            "regtype",
            "regclass",
            "int2vector",
            "oidvector",
            "refcursor",
        ],
        false,
    ),
];

/// The matrix of values that a whole node replicates.
const VALUES: &str = include_str!("../node/types.rs");
/// Where tests beside the matrix are.
const TESTS: [&str; 5] = [
    include_str!("refused.rs"),
    include_str!("partition.rs"),
    include_str!("sequences.rs"),
    include_str!("user_types.rs"),
    include_str!("matrix.rs"),
];

fn page() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/postgresql.md")
}

/// Puts a table between its marks, or compares what is there with it.
fn keep(mark: &str, table: &str) {
    // Two tests write one page.
    static PAGE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one_at_a_time = PAGE.lock();
    let text = std::fs::read_to_string(page()).unwrap();
    let (begin, end) =
        (format!("<!-- {mark}: made by node/tests/schema/docs.rs -->\n"), format!("<!-- {mark} end -->"));
    let (before, rest) = text.split_once(&begin).unwrap_or_else(|| panic!("no {begin}"));
    let (old, after) = rest.split_once(&end).unwrap_or_else(|| panic!("no {end}"));
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(page(), format!("{before}{begin}{table}{end}{after}")).unwrap();
    } else {
        assert_eq!(
            old, table,
            "docs/postgresql.md differs: UPDATE_DOCS=1 cargo test -p node --test schema docs"
        );
    }
}

#[test]
fn the_page_says_of_statements_what_the_tests_show() {
    let mut table = "| statement | at the target |\n|---|---|\n".to_owned();
    for Line(statement, target, _) in LINES {
        writeln!(table, "| {statement} | {target} |").unwrap();
    }
    keep("statements", &table);
    let shown = |name: &str| {
        STATEMENTS.iter().any(|(about, _)| *about == name)
            || TESTS.iter().any(|file| file.contains(&format!("async fn {name}()")))
    };
    for Line(statement, _, names) in LINES {
        assert!(!names.is_empty(), "nothing shows {statement}");
        names.iter().for_each(|name| assert!(shown(name), "{statement}: there is no {name}"));
    }
    for (about, sql) in STATEMENTS.iter().filter(|(about, _)| about.starts_with(char::is_uppercase)) {
        let lines = LINES.iter().filter(|Line(_, _, names)| names.contains(about)).count();
        assert_eq!(lines, 1, "{about} ({sql}) belongs to one line of the page");
    }
}

/// The built-in types of the matrix of values, as the page calls them.
fn tested() -> Vec<String> {
    let matrix = VALUES.split_once("const MATRIX").unwrap().1.split_once("\n];").unwrap().0;
    let mut names: Vec<String> = Vec::new();
    for line in matrix.lines() {
        let text = line.trim_start();
        let indent = line.len() - text.len();
        let quoted = match (indent, text.strip_prefix('(').unwrap_or(text).strip_prefix('"')) {
            (4 | 8, Some(quoted)) if indent == 4 || text.starts_with('"') => quoted,
            _ => continue,
        };
        let name = quoted.replace("\\\"", "\u{1}");
        let name = name.split('"').next().unwrap().replace('\u{1}', "\"");
        let plain = name.split(['(', '[']).next().unwrap().replace(" day to second", "");
        let plain = match plain.as_str() {
            "bool" => "boolean".to_owned(),
            "bpchar" => "char".to_owned(),
            _ => plain,
        };
        let own = plain.contains('.') || plain == "plain";
        if !own && !names.contains(&plain) {
            names.push(plain);
        }
    }
    names
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_says_of_types_what_the_tests_and_the_upstream_say() {
    let mut table = "| types | in a primary key, divides a table |\n|---|---|\n".to_owned();
    for (types, divides) in TYPES {
        let names: Vec<String> = types.iter().map(|name| format!("`{name}`")).collect();
        writeln!(table, "| {} | {} |", names.join(", "), if *divides { "yes" } else { "no" }).unwrap();
    }
    keep("types", &table);
    let mut listed: Vec<&str> = TYPES.iter().flat_map(|(types, _)| types.iter().copied()).collect();
    let mut tested = tested();
    listed.sort_unstable();
    tested.sort_unstable();
    assert_eq!(tested, listed, "left: the matrix of values; right: the page");

    let server = PgServer::start().await.unwrap();
    let client = server.client("postgres").await.unwrap();
    let mut expected = Vec::new();
    for (at, (name, divides)) in
        TYPES.iter().flat_map(|(types, divides)| types.iter().map(move |name| (name, divides))).enumerate()
    {
        // Some types cannot be compared, so they are in no key.
        let made = client.batch_execute(&format!("CREATE TABLE t{at} (k {name} PRIMARY KEY)")).await;
        assert!(made.is_ok() || !divides, "{name}: {made:?}");
        if made.is_ok() {
            expected.push((format!("t{at}"), *name, *divides));
        }
    }
    assert!(expected.iter().filter(|(_, _, divides)| !divides).count() > 10, "most can be in a key");
    let uri = server.uri("postgres");
    let config = heartbeatpb::config::ReplicaConfig::default();
    let spec = logservice::upstream::FeedSpec {
        changefeed: heartbeatpb::ChangefeedId::fresh("types"),
        epoch: None,
        start_ts: heartbeatpb::Ts::ZERO,
        upstream_uri: uri.clone(),
        filter: std::sync::Arc::new(logservice::TableFilter::new(&["*.*"], false).unwrap()),
        publish: std::sync::Arc::default(),
        force_replicate: false,
        ignore_ineligible: false,
        initial_copy: false,
        copy_parallel: 1,
        copy_part_bytes: 1 << 20,
        streaming: true,
        copy_target: None,
        copy_crew: None,
        entrance: None,
        ddl: config.ddl,
    };
    let tables = logservice::upstream::open(&uri).unwrap().tables(&spec).await.unwrap();
    let mut wrong = Vec::new();
    for (table, name, divides) in expected {
        let found = tables.iter().find(|source| source.info.name == table).unwrap();
        if found.splittable != divides {
            wrong.push((name, found.splittable));
        }
    }
    assert!(wrong.is_empty(), "types, and whether a key of them divides a table: {wrong:?}");
}
