//! Schema changes of every influence, and what a restart around them finds.

use std::sync::Arc;

use event::{BlockEvent, DdlEvent, DdlKind, TableInfo};
use heartbeatpb::{
    AddedTable, DispatcherId, InfluencedTables, SchemaChange, SchemaId, TableId, TableSpan, Ts,
};

use crate::harness::{Rig, Rows, Running, table};

/// Table `id` called `name` in schema `s<schema>`, whose id is `schema`.
fn t(id: i64, name: &str, schema: i64, columns: &[(&str, &str)]) -> Arc<TableInfo> {
    let mut info = table(id, name, columns, &[0], &[]);
    info.schema = format!("s{schema}");
    info.schema_id = SchemaId(schema);
    info.version = Ts(1);
    Arc::new(info)
}

const COLUMNS: &[(&str, &str)] = &[("id", "integer"), ("v", "text")];

fn normal(tables: &[i64]) -> Option<InfluencedTables> {
    Some(InfluencedTables::Normal(tables.iter().map(|id| TableId(*id)).collect()))
}

fn ddl(ts: u64, kind: DdlKind, about: &TableInfo, query: &str) -> DdlEvent {
    DdlEvent {
        schema_id: about.schema_id,
        table_id: about.id,
        schema: about.schema.clone(),
        table: about.name.clone(),
        query: query.into(),
        ..DdlEvent::new(kind, Ts(ts))
    }
}

async fn run(sink: &Running, ddl: DdlEvent) {
    sink.sink.write_block_event(&BlockEvent::Ddl(Arc::new(ddl))).await.expect("executed");
}

/// Up to where a dispatcher that would begin at `start` takes no rows: behind the last schema change that was executed,
/// which itself it sees once more.
async fn begins(sink: &Running, table: i64, start: u64) -> u64 {
    let (id, span) = (DispatcherId::random(), TableSpan::whole(TableId(table)));
    let begins = sink.sink.open_dispatcher(id, &span, Ts(start)).await.expect("opens");
    begins.start_ts.0 + u64::from(begins.skip_dml_at_start)
}

impl Rig {
    async fn numbers(&self, sql: &str) -> Vec<i64> {
        self.target.query(sql, &[]).await.expect("read").iter().map(|row| row.get(0)).collect()
    }

    async fn exists(&self, table: &str) -> bool {
        let row = self.target.query_one("SELECT to_regclass($1) IS NOT NULL", &[&table]).await.expect("read");
        row.get(0)
    }
}

#[tokio::test]
async fn a_dropped_schema_ends_its_tables_for_every_restart_in_front_of_it() {
    let rig = Rig::new().await;
    let (one, two, other) = (t(1, "a", 1, COLUMNS), t(2, "b", 1, COLUMNS), t(3, "a", 2, COLUMNS));
    let sink = rig.sink("").await;
    for info in [&one, &two, &other] {
        sink.table(info).await.expect("opens");
    }
    let gone = Some(InfluencedTables::Schema(SchemaId(1)));
    let drop = DdlEvent {
        table_id: TableId::DDL,
        table: String::new(),
        blocked: gone.clone(),
        dropped: gone,
        ..ddl(50, DdlKind::DropSchema, &one, "DROP SCHEMA s1 CASCADE")
    };
    run(&sink, drop.clone()).await;
    sink.stop().await.expect("stopped");
    // The process died before anybody knew.
    let sink = rig.sink("").await;
    begins(&sink, 0, 20).await;
    assert_eq!(
        [begins(&sink, 1, 20).await, begins(&sink, 2, 60).await, begins(&sink, 3, 20).await],
        [50, 60, 20]
    );
    sink.table(&one).await.expect("nothing to do");
    assert!(!rig.exists("s1.a").await, "a table came back");
    rig.exec("CREATE SCHEMA s1; CREATE TABLE s1.mine (id int)").await;
    run(&sink, drop).await;
    assert!(rig.exists("s1.mine").await, "executed twice");
    let known = "SELECT DISTINCT table_id FROM millrace.progress ORDER BY 1";
    assert_eq!(rig.numbers(known).await, [3], "progress of tables that are gone");
    // The same name, and another table.
    let again = t(9, "a", 4, COLUMNS);
    let again = Arc::new(TableInfo { schema: "s1".into(), version: Ts(60), ..(*again).clone() });
    let create = DdlEvent {
        blocked: normal(&[0]),
        added: vec![AddedTable { table: TableId(9), schema: SchemaId(4), splittable: true }],
        table_info: Some(Arc::clone(&again)),
        ..ddl(60, DdlKind::CreateTable, &again, "CREATE TABLE s1.a (id integer PRIMARY KEY, v text)")
    };
    run(&sink, create).await;
    sink.table(&one).await.expect("nothing to do");
    sink.table(&again).await.expect("opens");
    sink.write(Rows::of(&again).insert(61, &["1", "new"]).build());
    sink.flush().await;
    rig.expect("s1.a", &["1|new"]).await;
    // What ended is kept as long as somebody may start in front of its end.
    let ended = "SELECT table_id FROM millrace.tables WHERE gone IS NOT NULL ORDER BY 1";
    begins(&sink, 0, 49).await;
    assert_eq!(rig.numbers(ended).await, [1, 2]);
    begins(&sink, 0, 50).await;
    assert_eq!(rig.numbers(ended).await, Vec::<i64>::new());
}

#[tokio::test]
async fn behind_a_statement_that_concerns_all_tables_every_table_begins_there() {
    let rig = Rig::new().await;
    let sink = rig.sink("").await;
    let (one, two) = (t(1, "a", 1, COLUMNS), t(2, "b", 2, COLUMNS));
    for info in [&one, &two] {
        sink.table(info).await.expect("opens");
    }
    assert_eq!([begins(&sink, 1, 49).await, begins(&sink, 2, 49).await], [49, 49], "in front of it");
    let view = DdlEvent {
        table_id: TableId::DDL,
        table: String::new(),
        blocked: Some(InfluencedTables::All),
        ..ddl(50, DdlKind::Other, &one, "CREATE VIEW s1.v AS SELECT 1 AS n")
    };
    run(&sink, view.clone()).await;
    run(&sink, view).await;
    assert_eq!([begins(&sink, 1, 20).await, begins(&sink, 2, 20).await], [50, 50]);
    assert_eq!(begins(&sink, 0, 20).await, 20, "the table trigger meets everything again");
}

#[tokio::test]
async fn a_table_is_truncated_renamed_and_moved_once_and_keeps_or_loses_its_rows() {
    let rig = Rig::new().await;
    let sink = rig.sink("").await;
    let info = t(1, "a", 1, COLUMNS);
    sink.table(&info).await.expect("opens");
    sink.write(Rows::of(&info).insert(10, &["1", "old"]).build());
    sink.flush().await;
    let new = Arc::new(TableInfo { id: TableId(5), version: Ts(20), ..(*info).clone() });
    let truncate = DdlEvent {
        blocked: normal(&[1, 0]),
        dropped: normal(&[1]),
        added: vec![AddedTable { table: TableId(5), schema: SchemaId(1), splittable: true }],
        table_info: Some(Arc::clone(&new)),
        ..ddl(20, DdlKind::TruncateTable, &info, "TRUNCATE TABLE s1.a")
    };
    run(&sink, truncate.clone()).await;
    assert_eq!([begins(&sink, 1, 15).await, begins(&sink, 5, 20).await], [20, 20]);
    sink.table(&new).await.expect("opens");
    sink.write(Rows::of(&new).insert(21, &["2", "new"]).build());
    sink.flush().await;
    run(&sink, truncate).await;
    rig.expect("s1.a", &["2|new"]).await;
    // To a schema of which the sink has no table.
    let moved = Arc::new(TableInfo {
        schema: "s7".into(),
        schema_id: SchemaId(7),
        name: "a".into(),
        version: Ts(30),
        ..(*new).clone()
    });
    let change = SchemaChange { table: TableId(5), old: SchemaId(1), new: SchemaId(7) };
    let rename = DdlEvent {
        blocked: normal(&[5, 0]),
        schema_changes: vec![change],
        table_info: Some(Arc::clone(&moved)),
        ..ddl(30, DdlKind::RenameTable, &new, "ALTER TABLE s1.a SET SCHEMA s7")
    };
    run(&sink, rename.clone()).await;
    run(&sink, rename).await;
    sink.table(&new).await.expect("the old name is of the past");
    assert!(!rig.exists("s1.a").await);
    sink.table(&moved).await.expect("opens");
    sink.write(Rows::of(&moved).insert(31, &["3", "moved"]).build());
    sink.flush().await;
    rig.expect("s7.a", &["2|new", "3|moved"]).await;
    // It belongs to the other schema now.
    let gone = Some(InfluencedTables::Schema(SchemaId(1)));
    let drop = DdlEvent {
        blocked: gone.clone(),
        dropped: gone,
        ..ddl(40, DdlKind::DropSchema, &info, "DROP SCHEMA s1 CASCADE")
    };
    run(&sink, drop).await;
    assert_eq!(begins(&sink, 5, 35).await, 35);
    assert_eq!(sink.sink.forget_changefeed().await.map_err(|e| e.code()), Ok(()));
    assert_eq!(rig.numbers("SELECT table_id FROM millrace.tables").await, Vec::<i64>::new());
}

#[tokio::test]
async fn a_dispatcher_that_comes_back_with_a_shape_from_before_a_change_leaves_the_target_alone() {
    let rig = Rig::new().await;
    let (before, other) = (rig.sink("").await, rig.sink("").await);
    let info = t(1, "a", 1, COLUMNS);
    before.table(&info).await.expect("opens");
    before.write(Rows::of(&info).insert(50, &["1", "with the change"]).build());
    before.flush().await;
    // It stands in front of the change at 50, is lost, and begins again there while another node executes the change.
    assert_eq!(begins(&other, 1, 49).await, 49);
    let without = DdlEvent {
        blocked: normal(&[1]),
        ..ddl(50, DdlKind::AlterTable, &info, "ALTER TABLE s1.a DROP COLUMN v")
    };
    run(&before, without).await;
    other.table(&info).await.expect("its shape is of the past, and its next rows bring another one");
    let next = Arc::new(TableInfo { version: Ts(50), ..(*t(1, "a", 1, &[("id", "integer")])).clone() });
    other.sink.open_table(other.dispatcher, &next).await.expect("fits");
    other.write(Rows::of(&next).insert(51, &["2"]).build());
    other.flush().await;
    rig.expect("s1.a", &["1", "2"]).await;
}
