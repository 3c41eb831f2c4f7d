//! Rows that are too large for parameters, in every kind of statement, with and without the privilege to stage them.

use std::sync::Arc;

use event::{ReplicaIdentity, TableInfo};

use crate::harness::{Rig, Rows, Running, table};

/// Bytes of a large value: more than the rows of a transaction have.
const LARGE: usize = 9 << 20;
/// So many columns of numbers fit a page, and their texts do not.
const WIDE: usize = 1000;

/// A text of [`LARGE`] bytes and a few more that mean something in `COPY`, in arrays or in strings.
fn large(letter: &str) -> String {
    format!("\\N\t{}\n{{\"',NULL}}\\\\", letter.repeat(LARGE))
}

/// As [`Rig::expect`], without the large texts themselves.
async fn expect(rig: &Rig, table: &str, expected: &[&str]) {
    let sql = format!(
        "SELECT concat_ws('|', id, replace(v, repeat(letter, {LARGE}), letter || '…'), note) \
         FROM (SELECT *, substr(v, 10, 1) AS letter FROM {table}) AS t ORDER BY id, v"
    );
    let rows = rig.target.query(&sql, &[]).await.expect("rows");
    let rows: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(rows, expected, "{table}");
}

fn short(letter: &str) -> String {
    format!("\\N\t{letter}…\n{{\"',NULL}}\\\\")
}

async fn apply(rig: &Rig, sink: &Running) {
    let columns: &[(&str, &str)] = &[("id", "integer"), ("v", "text"), ("note", "text")];
    let (a, b, c) = (large("a"), large("b"), large("c"));
    let keyed = Arc::new(table(1, "keyed", columns, &[0], &[]));
    let loose = TableInfo { identity: ReplicaIdentity::Full, ..table(2, "loose", columns, &[], &[]) };
    let loose = Arc::new(loose);
    for table in [&keyed, &loose] {
        sink.table(table).await.expect("created");
    }
    sink.write(
        Rows::of(&keyed)
            .insert(10, &["1", &a, "\\N"])
            .insert(10, &["2", "small", "x"])
            .insert(10, &["3", &b, ""])
            // The value is left alone, and the key changes.
            .update_from(11, &["3", "\\U", "\\U"], &["4", "\\U", "moved"])
            .update(12, &["1", &c, "\\U"])
            .insert(13, &["5", &c, "\\N"])
            .delete(14, &["5", "\\U", "\\U"])
            .build(),
    );
    sink.flush().await;
    let (row_a, row_b, row_c) = (short("a"), short("b"), short("c"));
    expect(rig, "keyed", &[&format!("1|{row_c}"), "2|small|x", &format!("4|{row_b}|moved")]).await;

    sink.write(
        Rows::of(&loose)
            .insert(20, &["1", &a, "\\N"])
            .insert(20, &["1", &a, "\\N"])
            .update_from(21, &["1", &a, "\\N"], &["1", &b, "new"])
            .insert(22, &["2", &c, "gone"])
            .delete(23, &["2", &c, "gone"])
            .build(),
    );
    sink.flush().await;
    expect(rig, "loose", &[&format!("1|{row_a}"), &format!("1|{row_b}|new")]).await;
    // A row that is not there is written as a whole.
    rig.exec("DELETE FROM loose").await;
    sink.write(Rows::of(&loose).update_from(30, &["1", &a, "\\N"], &["7", &c, "again"]).build());
    sink.flush().await;
    expect(rig, "loose", &[&format!("7|{row_c}|again")]).await;
}

#[tokio::test]
async fn large_rows_are_staged_and_arrive_as_they_are() {
    let rig = Rig::new().await;
    // Tells which tables are made, also to a session like the sink's.
    rig.exec(
        "CREATE TABLE made (name text); \
         CREATE FUNCTION tell() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN \
           INSERT INTO public.made SELECT object_identity FROM pg_event_trigger_ddl_commands(); END $$; \
         CREATE EVENT TRIGGER tell ON ddl_command_end WHEN TAG IN ('CREATE TABLE') EXECUTE FUNCTION tell(); \
         ALTER EVENT TRIGGER tell ENABLE ALWAYS",
    )
    .await;
    let sink = rig.sink("worker-count=2").await;
    apply(&rig, &sink).await;
    let sql = "SELECT count(*) FROM made WHERE name = 'pg_temp.millrace_values'";
    let staged: i64 = rig.target.query_one(sql, &[]).await.expect("count").get(0);
    assert!(staged >= 5, "{staged} statements had their rows staged");
    let left = "SELECT count(*) FROM pg_class WHERE relname = 'millrace_values'";
    assert_eq!(rig.target.query_one(left, &[]).await.expect("count").get::<_, i64>(0), 0, "nothing is left");

    let mut columns: Vec<(String, &str)> = (0..WIDE).map(|i| (format!("n{i}"), "integer")).collect();
    columns.push(("v".to_owned(), "text"));
    let columns: Vec<(&str, &str)> = columns.iter().map(|(name, sql)| (name.as_str(), *sql)).collect();
    let wide = Arc::new(table(3, "wide", &columns, &[0], &[]));
    sink.table(&wide).await.expect("created");
    let value = large("w");
    let mut row = vec!["1000000000"; WIDE];
    row.push(&value);
    sink.write(Rows::of(&wide).insert(40, &row).build());
    sink.flush().await;
    let last = format!("SELECT n{} FROM wide WHERE octet_length(v) = {}", WIDE - 1, value.len());
    assert_eq!(rig.target.query_one(&last, &[]).await.expect("the row").get::<_, i32>(0), 1_000_000_000);
    sink.stop().await.expect("stops");
}

#[tokio::test]
async fn without_the_privilege_for_temporary_tables_large_rows_arrive_all_the_same() {
    let rig = Rig::new().await;
    rig.exec(
        "REVOKE TEMPORARY ON DATABASE dst FROM PUBLIC; CREATE ROLE plain LOGIN PASSWORD 'plain'; \
         GRANT CREATE ON DATABASE dst TO plain; GRANT CREATE ON SCHEMA public TO plain",
    )
    .await;
    let uri = rig.server.uri_as("plain", "plain", "dst");
    let uri = format!("{uri}?sslmode=disable&worker-count=2&session-replication-role=origin");
    let sink = Running::open(&uri, &rig.changefeed).await.expect("the sink opens");
    apply(&rig, &sink).await;
    sink.stop().await.expect("stops");
}
