//! Stores through their public side: their directories, and what they hold in memory.

#![expect(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::BytesMut;
use event::{Datum, ReplicaIdentity, RowOp, TableInfo, TupleWriter};
use heartbeatpb::{ChangefeedId, NodeId, SchemaId, TableId, Ts, WallTime};
use logservice::event_store::{Position, Scan, Store, StoreConfig, StoreWriter};
use logservice::{Error, LogConfig, LogService};
use messaging::{MessageCenter, MessagingConfig};

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

fn open(dir: &Path, memory_bytes: usize, disk_bytes: u64) -> (Arc<Store>, StoreWriter) {
    let config = StoreConfig { dir: dir.to_owned(), memory_bytes, disk_bytes };
    Store::open(ChangefeedId::fresh("t"), config, Ts(1), Arc::default()).unwrap()
}

fn put(writer: &mut StoreWriter, table: i64, value: u64) {
    let text = format!("{value:0>64}");
    let mut image = |out: &mut BytesMut| {
        let mut tuple = TupleWriter::new(out);
        tuple.push(Datum::Text(text.as_bytes()));
        tuple.finish();
    };
    writer.row(TableId(table), RowOp::Insert, None, Some(&mut image)).unwrap();
}

/// Transactions of one row each in table 1, until some are on disk.
async fn fill(writer: &mut StoreWriter, first_ts: u64) -> Result<(), Error> {
    writer.register_table(table(1));
    for commit_ts in first_ts..first_ts + 300 {
        writer.begin(Ts(commit_ts - 1));
        put(writer, 1, commit_ts);
        writer.commit(Ts(commit_ts), WallTime(1)).await?;
        writer.publish(Ts(commit_ts), WallTime(1));
    }
    Ok(())
}

/// Number of rows of a table, and the sum of their values.
fn read(store: &Store, table: i64) -> (u64, u64) {
    let (mut rows, mut sum, mut from) = (0, 0, Position::default());
    loop {
        let (batch, next) = match store.scan(TableId(table), from).unwrap() {
            Scan::Rows(batch, next) => (batch, next),
            Scan::OnDisk(chunk) => Store::load(&chunk).unwrap(),
            Scan::End => return (rows, sum),
        };
        for row in batch.iter() {
            let Some(Datum::Text(text)) = row.new.unwrap().get(0) else { panic!("a value") };
            rows += 1;
            sum += std::str::from_utf8(text).unwrap().parse::<u64>().unwrap();
        }
        from = next;
    }
}

/// Directories directly below `dir`.
fn dirs(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.is_dir()).collect()
}

#[tokio::test]
async fn two_stores_over_one_directory_leave_each_others_files_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (first, mut writer) = open(dir.path(), 4096, 1 << 30);
    fill(&mut writer, 10).await.unwrap();
    let (second, mut second_writer) = open(dir.path(), 4096, 1 << 30);
    fill(&mut second_writer, 1000).await.unwrap();
    assert!(first.stats().disk_bytes > 0 && second.stats().disk_bytes > 0);
    assert_eq!(read(&first, 1), (300, (10..310).sum()));
    // What the writer of a closed store still wants to write goes nowhere.
    first.close();
    let error = fill(&mut writer, 400).await.unwrap_err();
    assert!(matches!(error, Error::Closed { .. }), "{error}");
    drop((first, writer));
    assert_eq!(read(&second, 1), (300, (1000..1300).sum()));
    assert_eq!(dirs(dir.path()).len(), 1);
}

#[tokio::test]
async fn what_an_earlier_process_left_is_removed() {
    let root = tempfile::tempdir().unwrap();
    let left = |feed: &str| {
        let dir = root.path().join(feed).join("1-1");
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("live"), b"").unwrap();
        std::fs::write(dir.join("000000000001.seg"), b"rows").unwrap();
        // As stores wrote them that had no directory of their own.
        std::fs::write(root.path().join(feed).join("000000000001.seg"), b"rows").unwrap();
    };
    left("one");
    let live = root.path().join("two");
    let (store, mut writer) = open(&live, 4096, 1 << 30);
    fill(&mut writer, 10).await.unwrap();
    left("two");
    let center = MessageCenter::new(NodeId::from("one"), MessagingConfig::default());
    let config = LogConfig { dir: root.path().to_owned(), memory_bytes: 1 << 20, disk_bytes: 1 << 20 };
    let _log = LogService::new(center, config);
    assert_eq!(dirs(root.path()), std::slice::from_ref(&live));
    assert_eq!(dirs(&live).len(), 1);
    assert_eq!(read(&store, 1), (300, (10..310).sum()), "a live store keeps its files");
}

#[tokio::test]
async fn a_transaction_of_a_million_rows_passes_through_little_memory() {
    let dir = tempfile::tempdir().unwrap();
    let memory = 8 << 20;
    let (store, mut writer) = open(dir.path(), memory, 4 << 30);
    writer.register_table(table(1));
    let rows = 1_000_000;
    writer.begin(Ts(9));
    let mut most = 0;
    for value in 0..rows {
        put(&mut writer, 1, value);
        if value % 1000 == 0 {
            writer.room().await.unwrap();
            most = most.max(store.stats().memory_bytes);
        }
    }
    writer.commit(Ts(10), WallTime(1)).await.unwrap();
    writer.publish(Ts(10), WallTime(1));
    assert!(most > 1 << 20, "an open transaction counts");
    assert!(most <= memory, "{most} bytes in memory");
    assert_eq!(read(&store, 1), (rows, (0..rows).sum()));
    store.trim(TableId(1), Ts(10), None);
    assert_eq!((store.stats().memory_bytes, store.stats().disk_bytes), (0, 0));
}

#[tokio::test]
async fn a_transaction_over_very_many_tables_counts_against_memory_and_disk() {
    let dir = tempfile::tempdir().unwrap();
    let memory = 4 << 20;
    let (store, mut writer) = open(dir.path(), memory, 1 << 30);
    let (tables, rows) = (2_000, 100);
    for id in 1..=tables {
        writer.register_table(table(id));
    }
    writer.begin(Ts(9));
    let mut most = 0;
    for value in 0..rows {
        for id in 1..=tables {
            put(&mut writer, id, value);
        }
        writer.room().await.unwrap();
        most = most.max(store.stats().memory_bytes);
    }
    assert!(store.stats().disk_bytes > 8 << 20, "{:?}", store.stats());
    assert!((100_000..=memory).contains(&most), "{most} bytes in memory");
    writer.commit(Ts(10), WallTime(1)).await.unwrap();
    writer.publish(Ts(10), WallTime(1));
    for id in [1, 7, tables] {
        assert_eq!(read(&store, id), (rows, (0..rows).sum()));
    }
}

#[tokio::test]
async fn a_transaction_over_very_many_tables_that_the_disk_cannot_hold_is_a_named_error() {
    let dir = tempfile::tempdir().unwrap();
    let (_store, mut writer) = open(dir.path(), 1 << 20, 2 << 20);
    for id in 1..=200 {
        writer.register_table(table(id));
    }
    writer.begin(Ts(9));
    for value in 0..10_000 {
        for id in 1..=200 {
            put(&mut writer, id, value);
        }
        let room = tokio::time::timeout(std::time::Duration::from_secs(20), writer.room());
        if let Err(error) = room.await.expect("it hangs") {
            assert!(matches!(error, Error::TransactionTooLarge { .. }), "{error}");
            assert!(error.to_string().contains("event-store.disk-bytes"), "{error}");
            return;
        }
    }
    panic!("the store took it");
}

#[tokio::test]
async fn what_was_committed_and_not_published_makes_no_transaction_too_large() {
    let dir = tempfile::tempdir().unwrap();
    let (store, mut writer) = open(dir.path(), 1 << 20, 0);
    writer.register_table(table(1));
    let rows = 10_000;
    for commit_ts in [10, 20] {
        writer.begin(Ts(commit_ts - 1));
        for value in 0..rows {
            put(&mut writer, 1, value);
            if value % 1000 == 0 {
                writer.room().await.unwrap();
            }
        }
        writer.commit(Ts(commit_ts), WallTime(1)).await.unwrap();
    }
    writer.publish(Ts(20), WallTime(1));
    assert_eq!(read(&store, 1), (2 * rows, 2 * (0..rows).sum::<u64>()));
}
