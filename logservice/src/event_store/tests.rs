//! The store against a plain list of rows.

use super::*;
use event::{Datum, DdlEvent, DdlKind, ReplicaIdentity, RowOp, TupleWriter};
use heartbeatpb::{InfluencedTables, SchemaId};
use proptest::prelude::*;

fn table(id: i64) -> Arc<TableInfo> {
    Arc::new(TableInfo {
        id: TableId(id),
        schema_id: SchemaId(1),
        schema: "public".to_owned(),
        name: format!("t{id}"),
        version: Ts(1),
        columns: Vec::new(),
        keys: Vec::new(),
        identity: ReplicaIdentity::Full,
    })
}

fn open(memory_bytes: usize, disk_bytes: u64) -> (tempfile::TempDir, Arc<Store>, StoreWriter) {
    let dir = tempfile::tempdir().unwrap();
    let config = StoreConfig { dir: dir.path().join("store"), memory_bytes, disk_bytes };
    let (store, writer) = Store::open(ChangefeedId::fresh("t"), config, Ts(1), Arc::default()).unwrap();
    (dir, store, writer)
}

fn put(writer: &mut StoreWriter, table: TableId, value: u64) {
    let text = format!("{value:0>64}");
    let mut image = |out: &mut bytes::BytesMut| {
        let mut tuple = TupleWriter::new(out);
        tuple.push(Datum::Text(text.as_bytes()));
        tuple.finish();
    };
    writer.row(table, RowOp::Insert, None, Some(&mut image)).unwrap();
}

/// Every visible row of a table as (commit ts, row number, value).
fn read_all(store: &Store, table: TableId, mut from: Position) -> Vec<(u64, u64, u64)> {
    let mut rows = Vec::new();
    loop {
        let (batch, next) = match store.scan(table, from).unwrap() {
            Scan::Rows(batch, next) => (batch, next),
            Scan::OnDisk(chunk) => Store::load(&chunk).unwrap(),
            Scan::End => return rows,
        };
        for row in batch.iter() {
            let Some(Datum::Text(text)) = row.new.unwrap().get(0) else { panic!("a value") };
            let value = std::str::from_utf8(text).unwrap().parse().unwrap();
            rows.push((row.txn.commit_ts.0, row.row_number, value));
        }
        from = next;
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
}

#[test]
fn rows_become_visible_with_a_publish_and_not_before() {
    let (_dir, store, mut writer) = open(1 << 20, 1 << 30);
    writer.register_table(table(7));
    block_on(async {
        writer.begin(Ts(9));
        put(&mut writer, TableId(7), 1);
        writer.commit(Ts(10), WallTime(1)).await.unwrap();
        assert!(read_all(&store, TableId(7), Position::default()).is_empty());
        writer.publish(Ts(10), WallTime(1));
    });
    assert_eq!(read_all(&store, TableId(7), Position::default()), [(10, 0, 1)]);
    assert_eq!(store.resolved().0, Ts(10));
}

#[test]
fn an_aborted_transaction_leaves_nothing() {
    let (_dir, store, mut writer) = open(1 << 20, 1 << 30);
    writer.register_table(table(7));
    block_on(async {
        writer.begin(Ts(9));
        for n in 0..10_000 {
            put(&mut writer, TableId(7), n);
        }
        writer.abort();
        writer.begin(Ts(9));
        put(&mut writer, TableId(7), 42);
        writer.commit(Ts(10), WallTime(1)).await.unwrap();
        writer.publish(Ts(10), WallTime(1));
    });
    assert_eq!(read_all(&store, TableId(7), Position::default()), [(10, 0, 42)]);
}

#[test]
fn a_large_transaction_keeps_memory_bounded_and_comes_back_from_disk() {
    let (_dir, store, mut writer) = open(1 << 20, 1 << 30);
    writer.register_table(table(7));
    let rows = 100_000u64;
    block_on(async {
        writer.begin(Ts(9));
        for n in 0..rows {
            put(&mut writer, TableId(7), n);
            if n % 1000 == 0 {
                writer.room().await.unwrap();
                assert!(writer.open_bytes_for_test() <= (1 << 20) + CHUNK_BYTES);
            }
        }
        writer.commit(Ts(10), WallTime(1)).await.unwrap();
        writer.publish(Ts(10), WallTime(1));
    });
    let expected: Vec<_> = (0..rows).map(|n| (10, n, n)).collect();
    assert!(read_all(&store, TableId(7), Position::default()) == expected);
    assert!(store.stats().disk_bytes > 1 << 20);
    store.trim(TableId(7), Ts(10), None);
    assert_eq!((store.stats().disk_bytes, store.stats().memory_bytes), (0, 0));
}

#[test]
fn a_full_store_holds_the_writer_until_something_is_trimmed() {
    let (_dir, store, mut writer) = open(CHUNK_BYTES, CHUNK_BYTES as u64);
    writer.register_table(table(7));
    let done = block_on(async {
        let filling = async {
            for n in 0..200u64 {
                writer.begin(Ts(2 * n + 1));
                for _ in 0..100 {
                    put(&mut writer, TableId(7), n);
                }
                writer.commit(Ts(2 * n + 2), WallTime(1)).await.unwrap();
                writer.publish(Ts(2 * n + 2), WallTime(1));
                writer.room().await.unwrap();
            }
        };
        tokio::pin!(filling);
        let full = tokio::time::timeout(std::time::Duration::from_millis(500), &mut filling).await;
        assert!(full.is_err(), "the writer must wait");
        let freeing = async {
            loop {
                store.trim(TableId(7), store.resolved().0, None);
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            () = &mut filling => true,
            () = freeing => false,
            () = tokio::time::sleep(std::time::Duration::from_secs(60)) => false,
        }
    });
    assert!(done);
}

#[test]
fn a_scan_below_what_was_trimmed_is_an_error() {
    let (_dir, store, mut writer) = open(1 << 20, 1 << 30);
    writer.register_table(table(7));
    block_on(async {
        for ts in [10, 20] {
            writer.begin(Ts(ts - 1));
            put(&mut writer, TableId(7), ts);
            writer.commit(Ts(ts), WallTime(1)).await.unwrap();
            writer.publish(Ts(ts), WallTime(1));
        }
    });
    store.trim(TableId(7), Ts(10), None);
    assert!(matches!(store.scan(TableId(7), Position::after(Ts(5))), Err(Error::OutOfRange { .. })));
    assert_eq!(read_all(&store, TableId(7), Position::after(Ts(10))), [(20, 0, 20)]);
}

#[test]
fn copied_rows_are_visible_while_the_copy_runs_and_come_before_streamed_ones() {
    let (_dir, store, mut writer) = open(1 << 20, 1 << 30);
    let mut copy = writer.copy_writer(table(7), Ts(100), Ts(99), WallTime(1));
    for n in 0..30_000u64 {
        let text = n.to_string();
        copy.row(&mut |out| {
            let mut tuple = TupleWriter::new(out);
            tuple.push(Datum::Text(text.as_bytes()));
            tuple.finish();
        });
    }
    let Scan::Rows(first, _) = store.scan(TableId(7), Position::after(Ts(1))).unwrap() else {
        panic!("rows")
    };
    assert_eq!(first.iter().next().unwrap().op, RowOp::CopyStart);
    assert_eq!(store.resolved().0, Ts(1));
    copy.finish();
    writer.register_table(table(7));
    block_on(async {
        writer.publish(Ts(100), WallTime(1));
        writer.begin(Ts(100));
        put(&mut writer, TableId(7), 5);
        writer.commit(Ts(101), WallTime(1)).await.unwrap();
        writer.publish(Ts(101), WallTime(1));
    });
    let rows = read_all(&store, TableId(7), Position { commit_ts: Ts(100), rows: 1 });
    assert_eq!(rows.len(), 30_001);
    assert_eq!(rows.last(), Some(&(101, 0, 5)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Any interleaving of transactions, publishes, spills and trims gives back exactly the rows, in order.
    #[test]
    fn a_scan_from_any_place_gives_exactly_the_rows_after_it(
        txns in prop::collection::vec((prop::collection::vec((0i64..3, 1usize..40), 1..5), any::<bool>()), 1..30),
        start in 0usize..200,
        memory in 4_096usize..65_536,
    ) {
        let (_dir, store, mut writer) = open(memory, 1 << 30);
        for id in 0..3 {
            writer.register_table(table(id + 1));
        }
        let mut expected: Vec<Vec<(u64, u64, u64)>> = vec![Vec::new(); 3];
        block_on(async {
            let mut ts = 10;
            let mut value = 0;
            for (parts, publish) in &txns {
                ts += 10;
                writer.begin(Ts(ts - 1));
                let mut numbers = [0u64; 3];
                for (id, count) in parts {
                    let at = usize::try_from(*id).unwrap();
                    for _ in 0..*count {
                        value += 1;
                        put(&mut writer, TableId(id + 1), value);
                        expected[at].push((ts, numbers[at], value));
                        numbers[at] += 1;
                    }
                }
                writer.commit(Ts(ts), WallTime(1)).await.unwrap();
                if *publish {
                    writer.publish(Ts(ts), WallTime(1));
                    writer.room().await.unwrap();
                }
            }
            writer.publish(Ts(ts), WallTime(1));
            writer.room().await.unwrap();
        });
        for (at, rows) in expected.iter().enumerate() {
            let id = TableId(i64::try_from(at).unwrap() + 1);
            prop_assert_eq!(&read_all(&store, id, Position::default()), rows);
            if let Some((ts, number, _)) = rows.get(start) {
                let from = Position { commit_ts: Ts(*ts), rows: *number };
                prop_assert_eq!(&read_all(&store, id, from)[..], &rows[start..]);
            }
        }
    }
}

#[test]
fn a_transaction_that_changes_a_table_keeps_the_old_shape_for_its_earlier_rows() {
    let (_dir, store, mut writer) = open(1 << 20, 1 << 30);
    writer.register_table(table(7));
    block_on(async {
        writer.begin(Ts(9));
        put(&mut writer, TableId(7), 1);
        let changed = TableInfo { name: "renamed".to_owned(), ..(*table(7)).clone() };
        writer.register_table(Arc::new(changed));
        put(&mut writer, TableId(7), 2);
        writer.commit(Ts(10), WallTime(1)).await.unwrap();
        writer.publish(Ts(10), WallTime(1));
    });
    assert_eq!(read_all(&store, TableId(7), Position::default()), [(10, 0, 1), (10, 1, 2)]);
    let mut names = Vec::new();
    let mut from = Position::default();
    while let Scan::Rows(batch, next) = store.scan(TableId(7), from).unwrap() {
        names.push(batch.table.name.clone());
        from = next;
    }
    assert_eq!(names, ["t7", "renamed"]);
}

#[test]
fn many_small_publishes_stay_within_the_memory() {
    let (_dir, store, mut writer) = open(10_000, 1 << 30);
    writer.register_table(table(7));
    block_on(async {
        for ts in 10..1000 {
            writer.begin(Ts(ts - 1));
            put(&mut writer, TableId(7), ts);
            writer.commit(Ts(ts), WallTime(1)).await.unwrap();
            writer.publish(Ts(ts), WallTime(1));
            assert!(store.stats().memory_bytes < 11_000, "{:?}", store.stats());
        }
    });
    assert_eq!(read_all(&store, TableId(7), Position::default()).len(), 990);
}

#[test]
fn a_long_backlog_of_small_transactions_leaves_little_in_memory() {
    let (_dir, store, mut writer) = open(100_000, 1 << 30);
    writer.register_table(table(7));
    writer.register_table(table(8));
    let rows = 20_000;
    block_on(async {
        for n in 0..rows {
            let ts = 10 + 2 * n;
            writer.begin(Ts(ts - 1));
            put(&mut writer, TableId(7), n);
            put(&mut writer, TableId(8), n);
            writer.commit(Ts(ts), WallTime(1)).await.unwrap();
            writer.publish(Ts(ts), WallTime(1));
        }
    });
    let held = store.state.lock().index_bytes;
    assert!(held < 200_000, "{held} bytes are kept for {rows} transactions");
    for id in [7, 8] {
        let expected: Vec<_> = (0..rows).map(|n| (10 + 2 * n, 0, n)).collect();
        assert!(read_all(&store, TableId(id), Position::default()) == expected);
        store.trim(TableId(id), Ts(10 + 2 * rows), None);
    }
    let state = store.state.lock();
    assert_eq!((state.memory_bytes, state.index_bytes, state.disk_bytes), (0, 0, 0));
}

#[test]
fn a_transaction_that_the_disk_quota_cannot_hold_is_an_error_and_not_a_wait() {
    let (_dir, _store, mut writer) = open(1 << 20, 4 << 20);
    writer.register_table(table(7));
    let error = block_on(async {
        writer.begin(Ts(9));
        for n in 0..200_000 {
            put(&mut writer, TableId(7), n);
            if n % 1000 == 0
                && let Err(error) = writer.room().await
            {
                return error;
            }
        }
        panic!("the store took it");
    });
    assert!(matches!(error, Error::TransactionTooLarge { quota, .. } if quota == 4 << 20), "{error}");
}

#[test]
fn a_damaged_or_cut_file_is_a_named_error_and_never_rows() {
    for cut in [false, true] {
        let (_dir, store, mut writer) = open(4_096, 1 << 30);
        writer.register_table(table(7));
        block_on(async {
            for ts in 10..100 {
                writer.begin(Ts(ts - 1));
                put(&mut writer, TableId(7), ts);
                writer.commit(Ts(ts), WallTime(1)).await.unwrap();
                writer.publish(Ts(ts), WallTime(1));
            }
        });
        let Scan::OnDisk(chunk) = store.scan(TableId(7), Position::default()).unwrap() else {
            panic!("a chunk on disk")
        };
        Store::load(&chunk).unwrap();
        let mut bytes = std::fs::read(chunk.path.as_path()).unwrap();
        if cut {
            bytes.truncate(bytes.len() / 2);
        } else {
            // A digit of a value: the rows would still be rows.
            let digit = bytes.iter_mut().rev().find(|byte| **byte == b'0').unwrap();
            *digit = b'1';
        }
        std::fs::write(chunk.path.as_path(), bytes).unwrap();
        let error = Store::load(&chunk).unwrap_err();
        assert!(matches!(error, Error::StoreDamaged { .. }), "{error}");
    }
}

fn change(commit_ts: u64, blocked: Option<InfluencedTables>) -> DdlEvent {
    DdlEvent {
        commit_time: WallTime(1),
        schema_id: SchemaId(1),
        table_id: TableId(7),
        schema: "public".to_owned(),
        table: "t7".to_owned(),
        query: "ALTER TABLE t7".to_owned(),
        blocked,
        ..DdlEvent::new(DdlKind::Other, Ts(commit_ts))
    }
}

/// Whoever gets a schema change executes it or waits for the others: so it goes to those who take part, the table
/// trigger only if it does, and everybody at one that concerns everything.
#[test]
fn a_schema_change_is_visible_to_those_who_take_part_in_it_and_to_nobody_else() {
    let (_dir, store, mut writer) = open(1 << 20, 1 << 30);
    let other = Arc::new(TableInfo { schema_id: SchemaId(2), ..(*table(8)).clone() });
    writer.register_table(table(7));
    writer.register_table(other);
    let (own, everything) = (SchemaId(1), InfluencedTables::All);
    let changes = [
        (10, None),
        (20, Some(InfluencedTables::Normal(vec![TableId(7)]))),
        (30, Some(InfluencedTables::Normal(vec![TableId::DDL]))),
        (40, Some(InfluencedTables::Normal(vec![TableId(8), TableId::DDL]))),
        (50, Some(InfluencedTables::Schema(own))),
        (60, Some(everything)),
    ];
    for (commit_ts, blocked) in changes {
        block_on(async {
            writer.begin(Ts(commit_ts - 1));
            writer.ddl(change(commit_ts, blocked));
            writer.commit(Ts(commit_ts), WallTime(1)).await.unwrap();
        });
    }
    writer.publish(Ts(70), WallTime(1));
    let seen = |table: TableId| {
        let mut after = Ts::ZERO;
        std::iter::from_fn(|| {
            let ddl = store.next(table, Position::after(Ts(70)), after).unwrap().ddl;
            after = ddl?.commit_ts;
            Some(after.0)
        })
        .collect::<Vec<_>>()
    };
    assert_eq!(seen(TableId(7)), [10, 20, 50, 60]);
    assert_eq!(seen(TableId(8)), [40, 60], "of another schema");
    assert_eq!(seen(TableId::DDL), [30, 40, 50, 60]);
    // Nothing was told of this table yet; its dispatcher knows its schema.
    assert_eq!(seen(TableId(9)), [50, 60]);
    // The trigger has passed everything; a dispatcher that begins again may still need the last change of each kind.
    store.trim(TableId::DDL, Ts(70), None);
    assert_eq!(seen(TableId(7)), [10, 20, 60], "who is at the later one has passed the earlier one");
}

#[test]
fn two_schema_changes_at_one_commit_ts_are_refused() {
    let (_dir, store, mut writer) = open(1 << 20, 1 << 30);
    writer.register_table(table(7));
    let mut commit = |commit_ts: u64, changes: &[u64]| {
        writer.begin(Ts(commit_ts - 1));
        for at in changes {
            writer.ddl(change(*at, Some(InfluencedTables::Normal(vec![TableId(7)]))));
        }
        let result = block_on(writer.commit(Ts(commit_ts), WallTime(1)));
        writer.publish(Ts(commit_ts), WallTime(1));
        result.map_err(|error| (error.code(), error.is_retryable()))
    };
    let refused = Err(("CDC:ErrSchemaChangeUnsupported", false));
    assert_eq!(commit(10, &[10]), Ok(()));
    assert_eq!(commit(20, &[20, 20]), refused, "in one transaction");
    assert_eq!(commit(20, &[20]), Ok(()), "nothing is left of what was refused");
    assert_eq!(commit(20, &[20]), refused, "in two transactions");
    assert_eq!(commit(30, &[25]), refused, "not where its transaction is");
    assert_eq!(store.ddls(TableId(7), Ts::ZERO).len(), 2);
}
