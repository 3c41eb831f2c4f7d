//! The stream in the store against the state that is expected.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;

use event::{Datum, DdlEvent, DdlKind, RowOp, Tuple};
use heartbeatpb::{InfluencedTables, SchemaId, TableId};

use super::*;
use crate::TableFilter;
use crate::event_store::{Position, Scan, Store, StoreConfig};

const URIS: [&str; 5] = [
    "generator://bank?tables=3&accounts=11&history=20&cards=5&rekey-every=3&ddl-every=50&rate=0",
    "generator://bank?tables=2&accounts=6&cards=3&history=9&ddl=all&ddl-every=7&rate=0",
    "generator://wide?rows=20&value-bytes=100&rate=0",
    "generator://skewed?keys=50&rows-per-txn=3&rate=0",
    "generator://tables?tables=30&history=40&rate=0",
];

fn spec(uri: &str, start: u64, initial_copy: bool) -> FeedSpec {
    FeedSpec {
        changefeed: ChangefeedId::fresh("generated"),
        epoch: None,
        start_ts: Ts(start),
        upstream_uri: uri.to_owned(),
        filter: Arc::new(TableFilter::new(&["*.*"], false).unwrap()),
        publish: Arc::default(),
        force_replicate: false,
        ignore_ineligible: false,
        initial_copy,
        copy_parallel: 1,
        copy_part_bytes: 64 << 20,
        streaming: true,
        copy_target: None,
        copy_crew: None,
        entrance: None,
        ddl: heartbeatpb::config::DdlConfig::default(),
    }
}

/// Tables as a consumer of the store builds them.
#[derive(Default, Clone, Debug, PartialEq, Eq)]
struct Consumer {
    tables: BTreeMap<TableId, BTreeMap<Vec<u8>, Vec<Option<String>>>>,
    columns: BTreeMap<TableId, Vec<String>>,
    /// Schema changes that the table trigger gets.
    changes: Vec<Arc<DdlEvent>>,
}

fn values(tuple: Tuple<'_>) -> Vec<Option<Option<String>>> {
    tuple
        .iter()
        .map(|value| match value {
            Datum::Null => Some(None),
            Datum::Unchanged => None,
            Datum::Text(text) => Some(Some(String::from_utf8(text.to_vec()).unwrap())),
        })
        .collect()
}

fn first(tuple: Tuple<'_>) -> Vec<u8> {
    match tuple.get(0) {
        Some(Datum::Text(text)) => text.to_vec(),
        other => panic!("no key: {other:?}"),
    }
}

impl Consumer {
    /// Applies what the store has of a table behind `from`, up to `to`.
    fn read(&mut self, store: &Store, table: TableId, from: Ts, to: Ts) {
        let mut from = Position::after(from);
        loop {
            let (batch, next) = match store.scan(table, from).unwrap() {
                Scan::Rows(batch, next) => (batch, next),
                Scan::OnDisk(chunk) => Store::load(&chunk).unwrap(),
                Scan::End => break,
            };
            self.reshape(&batch.table);
            let rows = self.tables.entry(table).or_default();
            for row in batch.iter().filter(|row| row.txn.commit_ts <= to) {
                match row.op {
                    RowOp::CopyStart | RowOp::Truncate => rows.clear(),
                    RowOp::Delete => {
                        assert!(rows.remove(&first(row.old.unwrap())).is_some(), "a deleted row was there");
                    }
                    RowOp::Insert | RowOp::Update => {
                        let new = row.new.unwrap();
                        let before = rows.remove(&row.old.map_or_else(|| first(new), first));
                        assert_eq!(before.is_some(), row.op == RowOp::Update, "an updated row was there");
                        let before = before.unwrap_or_else(|| vec![None; new.len()]);
                        let merged = values(new)
                            .into_iter()
                            .zip(before)
                            .map(|(new, old)| new.unwrap_or(old))
                            .collect();
                        rows.insert(first(new), merged);
                    }
                }
            }
            from = next;
        }
        if let Some(shape) = store.table_at(table, to) {
            self.reshape(&shape);
        }
    }

    fn reshape(&mut self, table: &event::TableInfo) {
        let names: Vec<String> = table.columns.iter().map(|column| column.name.clone()).collect();
        let rows = self.tables.entry(table.id).or_default();
        if self.columns.get(&table.id) != Some(&names) {
            for row in rows.values_mut() {
                row.resize(names.len(), None);
            }
            self.columns.insert(table.id, names);
        }
    }
}

/// Runs a reader until the store has everything up to `until`; returns what it emitted behind `checkpoint`.
async fn read(
    uri: &str,
    start: u64,
    checkpoint: u64,
    copy: bool,
    until: Ts,
    consumer: &mut Consumer,
) -> Arc<ReaderProgress> {
    let generator = Generator::new(uri).unwrap();
    let spec = spec(uri, start, copy);
    let dir = tempfile::tempdir().unwrap();
    let config = StoreConfig { dir: dir.path().join("store"), memory_bytes: 64 << 20, disk_bytes: 64 << 20 };
    let (store, writer) =
        Store::open(spec.changefeed.clone(), config, Ts(checkpoint), Arc::default()).unwrap();
    let (_persisted, watch) = watch::channel(Ts(checkpoint));
    let (progress, shutdown) = (Arc::new(ReaderProgress::default()), CancellationToken::new());
    let start = ReaderStart { start_ts: Ts(start), checkpoint: Ts(checkpoint) };
    let run =
        generator.run_reader(spec.clone(), start, writer, watch, Arc::clone(&progress), shutdown.clone());
    let wait = async {
        while store.resolved().0 < until {
            tokio::task::yield_now().await;
        }
        shutdown.cancel();
    };
    let (result, ()) = tokio::join!(run, wait);
    result.unwrap();
    let mut tables: BTreeSet<TableId> =
        generator.tables(&spec).await.unwrap().iter().map(|table| table.info.id).collect();
    tables.extend(expected_state(uri, until).unwrap().values().map(|table| table.info.id));
    for table in tables {
        consumer.read(&store, table, Ts(checkpoint), until);
    }
    let changes = store.ddls(TableId::DDL, Ts(checkpoint));
    consumer.changes.extend(changes.into_iter().filter(|ddl| ddl.commit_ts <= until));
    progress
}

fn expected(uri: &str, ts: Ts) -> BTreeMap<TableId, BTreeMap<Vec<u8>, Vec<Option<String>>>> {
    let rows =
        |rows: Rows| rows.into_values().map(|row| (row[0].clone().unwrap().into_bytes(), row)).collect();
    expected_state(uri, ts).unwrap().into_values().map(|table| (table.info.id, rows(table.rows))).collect()
}

fn equal(consumer: &Consumer, uri: &str, ts: Ts) {
    for (id, rows) in expected(uri, ts) {
        assert_eq!(consumer.tables.get(&id).cloned().unwrap_or_default(), rows, "{uri}, table {id}, at {ts}");
    }
}

#[tokio::test]
async fn the_stream_leads_to_the_expected_state_with_and_without_a_copy() {
    for uri in URIS {
        for copy in [true, false] {
            let until = Feed::ts(333);
            let mut consumer = Consumer::default();
            let progress = read(&format!("{uri}&transactions=333"), 16, 16, copy, until, &mut consumer).await;
            equal(&consumer, uri, until);
            assert_eq!(progress.transactions.load(Ordering::Relaxed), 333);
        }
    }
}

#[tokio::test]
async fn a_reader_that_starts_again_at_a_checkpoint_continues_the_same_stream() {
    for uri in URIS {
        let mut whole = Consumer::default();
        read(uri, 16, 16, true, Feed::ts(300), &mut whole).await;
        let mut parts = Consumer::default();
        // Between transactions, at one, and just behind a schema change.
        let stops = [Ts(24), Feed::ts(70), Ts(Feed::ts(99).0 + 3), Feed::ddl_ts(150), Feed::ts(300)];
        let mut checkpoint = Ts(16);
        for stop in stops {
            read(uri, 16, checkpoint.0, true, stop, &mut parts).await;
            checkpoint = stop;
        }
        let last = |consumer: &Consumer| {
            let there: BTreeSet<TableId> = expected(uri, Feed::ts(300)).into_keys().collect();
            let there = consumer.tables.clone().into_iter().filter(|(id, _)| there.contains(id));
            there.collect::<BTreeMap<_, _>>()
        };
        assert_eq!(last(&parts), last(&whole), "{uri}");
        let undated = |consumer: &Consumer| {
            let undated =
                |ddl: &Arc<DdlEvent>| DdlEvent { commit_time: Default::default(), ..(**ddl).clone() };
            consumer.changes.iter().map(undated).collect::<Vec<_>>()
        };
        assert_eq!(undated(&parts), undated(&whole), "{uri}");
        equal(&parts, uri, Feed::ts(300));
    }
}

#[tokio::test]
async fn a_changefeed_that_starts_late_copies_the_state_there() {
    for uri in URIS {
        let start = Feed::ts(120).0;
        let mut consumer = Consumer::default();
        let progress = read(uri, start, start, true, Feed::ts(200), &mut consumer).await;
        equal(&consumer, uri, Feed::ts(200));
        assert!(progress.copy_rows.load(Ordering::Relaxed) > 0);
    }
}

#[test]
fn money_is_neither_made_nor_lost() {
    let uri = "generator://bank?tables=4&accounts=25&seed=9";
    for n in [0, 1, 17, 500] {
        let state = expected_state(uri, Ts(Feed::ts(n).0 + 8)).unwrap();
        let balances = state.iter().filter(|((_, name), _)| name.starts_with("accounts_"));
        let sum: u64 = balances
            .flat_map(|(_, table)| table.rows.values())
            .map(|row| row[2].as_deref().unwrap().parse::<u64>().unwrap())
            .sum();
        assert_eq!(sum, 100 * bank::FIRST_BALANCE, "after {n} transactions");
        let transfers = &state[&("bank".to_owned(), "transfers".to_owned())].rows;
        assert_eq!(transfers.len() as u64, n);
    }
    assert!(expected_state(uri, Ts(16)).unwrap().values().all(|table| table.rows.is_empty()));
}

#[test]
fn a_seed_is_a_stream() {
    let at = Feed::ts(50);
    let state = |uri: &str| expected_state(uri, at).unwrap();
    assert_eq!(state("generator://wide?seed=5"), state("generator://wide?seed=5&rate=7"));
    assert_ne!(state("generator://wide?seed=5"), state("generator://wide?seed=6"));
}

#[tokio::test]
async fn the_filter_leaves_tables_out() {
    let uri = "generator://bank?rate=0&transactions=50";
    let generator = Generator::new(uri).unwrap();
    let mut spec = spec(uri, 16, true);
    spec.filter = Arc::new(TableFilter::new(&["bank.accounts_*"], false).unwrap());
    let tables = generator.tables(&spec).await.unwrap();
    assert_eq!(tables.len(), 4);
    assert!(tables.windows(2).all(|pair| pair[0].info.id < pair[1].info.id));
    assert_eq!(generator.check(&spec).await.unwrap().eligible, tables);
}

#[tokio::test]
async fn an_idle_stream_still_tells_where_it_is() {
    let uri = "generator://bank?rate=100000&transactions=3";
    let mut consumer = Consumer::default();
    let progress = read(uri, 16, 16, true, Feed::ts(3), &mut consumer).await;
    assert_eq!(progress.transactions.load(Ordering::Relaxed), 3);
    assert_eq!(progress.received.load(Ordering::Relaxed), Feed::ts(3).0);
    equal(&consumer, uri, Feed::ts(3));
}

#[test]
fn positions_are_consistent() {
    let feed = Feed { ddl_every: 10 };
    assert_eq!(Feed::transactions_at(BEGINNING), 0);
    assert_eq!(Feed::transactions_at(POPULATED), 0);
    for n in 1..100 {
        assert_eq!(Feed::transactions_at(Feed::ts(n)), n);
        assert_eq!(Feed::transactions_at(Feed::ts(n).before()), n - 1);
        for ts in Feed::ts(n - 1).0..Feed::ts(n).0 {
            let snapshot = Feed::snapshot_after(Ts(ts));
            assert!(snapshot > Ts(ts));
        }
    }
    assert_eq!((feed.ddls_at(Feed::ddl_ts(10)), feed.ddls_at(Feed::ddl_ts(10).before())), (1, 0));
    assert_eq!(feed.shape_since(Feed::ts(25)), Feed::ddl_ts(20));
}

/// Participants, tables that end, numbers of tables that begin and that change their schema.
fn influence(ddl: &DdlEvent) -> String {
    let tables = |tables: &Option<InfluencedTables>| match tables {
        None => "nobody".to_owned(),
        Some(InfluencedTables::All) => "all".to_owned(),
        Some(InfluencedTables::Schema(schema)) if *schema == ddl.schema_id => "its schema".to_owned(),
        Some(InfluencedTables::Schema(_)) => "another schema".to_owned(),
        Some(InfluencedTables::Normal(tables)) => {
            let name = |table: &TableId| match *table {
                TableId::DDL => "trigger".to_owned(),
                table if table == ddl.table_id => "table".to_owned(),
                other => format!("table {other}"),
            };
            tables.iter().map(name).collect::<Vec<_>>().join("+")
        }
    };
    let new = |added: &heartbeatpb::AddedTable| {
        let shape = ddl.table_info.as_ref().unwrap();
        assert_eq!((added.table, added.schema), (shape.id, shape.schema_id));
    };
    ddl.added.iter().for_each(new);
    let (added, moved) = (ddl.added.len(), ddl.schema_changes.len());
    format!("{} / {} / {added} / {moved}", tables(&ddl.blocked), tables(&ddl.dropped))
}

#[tokio::test]
async fn every_kind_of_statement_says_who_takes_part_and_what_becomes_of_the_tables() {
    let uri = "generator://bank?tables=2&accounts=4&cards=2&ddl=all&ddl-every=5&rate=0&seed=4";
    let mut consumer = Consumer::default();
    let until = Feed::ts(600);
    read(uri, 16, 16, true, until, &mut consumer).await;
    let mut seen: BTreeMap<DdlKind, BTreeSet<String>> = BTreeMap::new();
    for ddl in &consumer.changes {
        seen.entry(ddl.kind).or_default().insert(influence(ddl));
    }
    let expected = [
        (DdlKind::CreateSchema, vec!["trigger / nobody / 0 / 0"]),
        (DdlKind::DropSchema, vec!["its schema / its schema / 0 / 0"]),
        (DdlKind::CreateTable, vec!["trigger / nobody / 1 / 0"]),
        (DdlKind::DropTable, vec!["table+trigger / table / 0 / 0"]),
        (DdlKind::RenameTable, vec!["table+trigger / nobody / 0 / 0", "table+trigger / nobody / 0 / 1"]),
        (DdlKind::TruncateTable, vec!["table+trigger / table / 1 / 0"]),
        (DdlKind::Other, vec!["all / nobody / 0 / 0"]),
    ];
    let expected: BTreeMap<_, _> =
        expected.map(|(kind, said)| (kind, said.into_iter().map(str::to_owned).collect())).into();
    assert_eq!(seen, expected);
    let positions: Vec<Ts> = consumer.changes.iter().map(|ddl| ddl.commit_ts).collect();
    assert!(positions.windows(2).all(|pair| pair[0] < pair[1]), "each at a commit ts of its own");
    // An ALTER goes to its own table alone.
    let all = statements(uri, until).unwrap();
    let alters = all.iter().filter(|(_, query)| query.contains("COLUMN")).count();
    assert!(alters > 5);
    assert_eq!(all.len(), consumer.changes.len() + alters);
    assert!(consumer.changes.iter().all(|ddl| all.contains(&(ddl.commit_ts, ddl.query.clone()))));
    // A name that is used again has another table behind it, and a schema another id.
    let created = |ddl: &&Arc<DdlEvent>| ddl.kind == DdlKind::CreateTable;
    let mut ids: BTreeMap<(String, String), BTreeSet<TableId>> = BTreeMap::new();
    for ddl in consumer.changes.iter().filter(created) {
        ids.entry((ddl.schema.clone(), ddl.table.clone())).or_default().insert(ddl.table_id);
    }
    assert!(ids.values().any(|ids| ids.len() > 2), "{ids:?}");
    let schemas: BTreeSet<SchemaId> = consumer.changes.iter().map(|ddl| ddl.schema_id).collect();
    assert!(schemas.len() > 5, "{schemas:?}");
    equal(&consumer, uri, until);
}

#[tokio::test]
async fn a_rename_across_the_edge_of_the_filter_ends_the_table_or_is_an_error() {
    let uri = "generator://bank?tables=2&accounts=4&cards=2&ddl=move&ddl-every=5&rate=0";
    let generator = Generator::new(uri).unwrap();
    let workload = workload(&generator.params);
    let filter = TableFilter::new(&["stage_1.*"], false).unwrap();
    let mut seen = BTreeSet::new();
    for ddl in 1..=60 {
        let Some(step) = workload.ddl(ddl) else { continue };
        let before = |slot| workload.table(slot, ddl - 1, Ts(1));
        let after = |slot| workload.table(slot, ddl, Ts(1));
        let shapes = change::Shapes { before: &before, after: &after, filter: &filter };
        let change::Described { event, slots } = change::describe(step, Ts(9), now(), &shapes);
        let [(slot, wanted)] = slots.as_slice() else { panic!("one table") };
        assert!(wanted.is_none(), "no table is moved inside of a schema");
        match event {
            None => panic!("one of the names is wanted"),
            Some(event) if event.error.is_some() => {
                assert_eq!(before(*slot).unwrap().schema, "stage_2");
                assert_eq!(event.blocked, Some(InfluencedTables::Normal(vec![TableId::DDL])));
                seen.insert("error");
            }
            Some(event) => {
                assert_eq!(event.dropped, Some(InfluencedTables::Normal(vec![event.table_id])));
                assert!(event.schema_changes.is_empty());
                seen.insert("dropped");
            }
        }
    }
    assert_eq!(seen, BTreeSet::from(["dropped", "error"]));
}
