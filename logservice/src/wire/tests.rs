//! Every message survives its byte form, and no bytes make the decoder panic.

use bytes::BytesMut;
use event::{Blocks, CopyFormat, CopyPart, CopyRight, Datum, ReplicaIdentity, RowOp, encode_tuple, put_row};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::*;
use crate::crew::{CopyOrder, CopyReport, OrderId, OrderState};

fn changefeed() -> impl Strategy<Value = ChangefeedId> {
    (any::<(u64, u64)>(), "[a-z]{0,8}", "\\PC{0,4}").prop_map(|((high, low), name, keyspace)| ChangefeedId {
        gid: Gid::new(high, low),
        name: name.as_str().into(),
        keyspace: keyspace.as_str().into(),
    })
}

fn dispatcher() -> impl Strategy<Value = DispatcherId> {
    (any::<u64>(), 1..u64::MAX).prop_map(|(high, low)| DispatcherId::new(high, low))
}

fn gid() -> impl Strategy<Value = Gid> {
    any::<(u64, u64)>().prop_map(|(high, low)| Gid::new(high, low))
}

fn ts() -> impl Strategy<Value = Ts> {
    any::<u64>().prop_map(Ts)
}

fn head() -> impl Strategy<Value = EventHead> {
    (gid(), dispatcher(), any::<u64>(), any::<u64>())
        .prop_map(|(changefeed, dispatcher, epoch, seq)| EventHead { changefeed, dispatcher, epoch, seq })
}

fn copied() -> impl Strategy<Value = Option<Position>> {
    option::of((ts(), any::<u64>()).prop_map(|(commit_ts, rows)| Position { commit_ts, rows }))
}

fn progress() -> impl Strategy<Value = DispatcherProgress> {
    (dispatcher(), any::<u64>(), ts(), copied()).prop_map(|(dispatcher, epoch, checkpoint, copied)| {
        DispatcherProgress { dispatcher, epoch, checkpoint, copied }
    })
}

fn span() -> impl Strategy<Value = TableSpan> {
    (any::<u32>(), any::<i64>(), vec(any::<u8>(), 0..9), vec(any::<u8>(), 0..9)).prop_map(
        |(keyspace_id, table, start, end)| TableSpan { keyspace_id, table: TableId(table), start, end },
    )
}

fn to_event_service() -> impl Strategy<Value = ToEventService> {
    prop_oneof![
        (changefeed(), dispatcher(), span(), ts()).prop_map(|(changefeed, dispatcher, span, start_ts)| {
            ToEventService::Register { changefeed, dispatcher, span, start_ts }
        }),
        (changefeed(), dispatcher(), any::<u64>(), ts(), copied()).prop_map(
            |(changefeed, dispatcher, epoch, start_ts, copied)| ToEventService::Reset {
                changefeed,
                dispatcher,
                epoch,
                start_ts,
                copied
            }
        ),
        (changefeed(), dispatcher())
            .prop_map(|(changefeed, dispatcher)| ToEventService::Remove { changefeed, dispatcher }),
        (changefeed(), vec(progress(), 0..5))
            .prop_map(|(changefeed, progress)| ToEventService::Heartbeat { changefeed, progress }),
        (changefeed(), any::<[u64; 4]>()).prop_map(|(changefeed, [opening, received, freed, window])| {
            ToEventService::Credit { changefeed, opening, received, freed, window }
        }),
    ]
}

fn table() -> impl Strategy<Value = Arc<TableInfo>> {
    (any::<i64>(), "\\PC{0,6}", ts()).prop_map(|(id, name, version)| {
        Arc::new(TableInfo {
            id: TableId(id),
            schema_id: SchemaId(1),
            schema: "public".to_owned(),
            name,
            version,
            columns: Vec::new(),
            keys: Vec::new(),
            identity: ReplicaIdentity::Full,
        })
    })
}

fn batch() -> impl Strategy<Value = RowBatch> {
    // A gap of one is a whole batch; with larger ones it is a part of a table.
    (table(), vec((0u64..9, 0u32..4), 0..5), any::<i64>(), 1u64..4).prop_map(|(table, txns, time, gap)| {
        let (mut rows, mut commit_ts) = (BytesMut::new(), 1);
        let mut numbers = Vec::new();
        let mut marks = Vec::new();
        for (step, count) in txns {
            commit_ts += step;
            for n in 0..count {
                numbers.push(step + u64::from(n) * gap);
                let image = encode_tuple([Datum::Null, Datum::Text(&n.to_be_bytes()), Datum::Unchanged]);
                let mut new = |out: &mut BytesMut| out.extend_from_slice(&image);
                put_row(&mut rows, RowOp::Insert, None, Some(&mut new));
            }
            marks.push(TxnMark {
                commit_ts: Ts(commit_ts),
                start_ts: Ts(commit_ts - 1),
                commit_time: WallTime(time),
                rows: count,
                first_row: step + u64::from(count.saturating_sub(1)) * (gap - 1),
            });
        }
        match gap {
            1 => RowBatch::new(table, marks, rows.freeze()).unwrap(),
            _ => RowBatch::numbered(table, marks, rows.freeze(), &numbers).unwrap(),
        }
    })
}

fn influenced() -> impl Strategy<Value = Option<InfluencedTables>> {
    option::of(prop_oneof![
        Just(InfluencedTables::All),
        any::<i64>().prop_map(|id| InfluencedTables::Schema(SchemaId(id))),
        vec(any::<i64>().prop_map(TableId), 0..4).prop_map(InfluencedTables::Normal),
    ])
}

fn ddl() -> impl Strategy<Value = DdlEvent> {
    let numbers = (ts(), ts(), any::<i64>(), 0usize..7, any::<[i64; 2]>());
    let texts = ["\\PC{0,6}", "\\PC{0,6}", "\\PC{0,30}"];
    let tables = (option::of(table()), influenced(), influenced());
    let lists = (vec(any::<(i64, i64, bool)>(), 0..3), vec(any::<[i64; 3]>(), 0..3));
    (numbers, texts, tables, lists, any::<bool>(), option::of("\\PC{0,9}")).prop_map(
        |((commit_ts, start_ts, time, kind, ids), texts, tables, (added, changes), not_sync, error)| {
            let [schema, table, query] = texts;
            DdlEvent {
                commit_ts,
                start_ts,
                commit_time: WallTime(time),
                kind: DDL_KINDS[kind],
                schema_id: SchemaId(ids[0]),
                table_id: TableId(ids[1]),
                schema,
                table,
                query,
                table_info: tables.0,
                blocked: tables.1,
                dropped: tables.2,
                added: added
                    .into_iter()
                    .map(|(table, schema, splittable)| AddedTable {
                        table: TableId(table),
                        schema: SchemaId(schema),
                        splittable,
                    })
                    .collect(),
                schema_changes: changes
                    .into_iter()
                    .map(|[table, old, new]| SchemaChange {
                        table: TableId(table),
                        old: SchemaId(old),
                        new: SchemaId(new),
                    })
                    .collect(),
                not_sync,
                error,
            }
        },
    )
}

fn to_event_collector() -> impl Strategy<Value = ToEventCollector> {
    prop_oneof![
        (gid(), dispatcher())
            .prop_map(|(changefeed, dispatcher)| ToEventCollector::Ready { changefeed, dispatcher }),
        (gid(), dispatcher())
            .prop_map(|(changefeed, dispatcher)| ToEventCollector::NotRegistered { changefeed, dispatcher }),
        (head(), ts(), option::of(table())).prop_map(|(head, start_ts, table)| ToEventCollector::Handshake {
            head,
            start_ts,
            table
        }),
        (head(), batch())
            .prop_map(|(head, batch)| ToEventCollector::Rows { head, batch: SharedBatch(batch) }),
        (head(), any::<(u64, u64)>(), vec(any::<u8>(), 0..9)).prop_map(|(head, (total, offset), bytes)| {
            ToEventCollector::Piece { head, total, offset, bytes: bytes.into() }
        }),
        (head(), ddl()).prop_map(|(head, ddl)| ToEventCollector::Ddl { head, ddl: Arc::new(ddl) }),
        (vec((head(), ts()), 0..5), any::<i64>()).prop_map(|(entries, time)| ToEventCollector::Resolved {
            entries: entries.into(),
            time: WallTime(time)
        }),
        (gid(), dispatcher(), "\\PC{0,9}", "\\PC{0,9}").prop_map(
            |(changefeed, dispatcher, code, message)| {
                ToEventCollector::Failed { changefeed, dispatcher, code, message }
            }
        ),
    ]
}

fn copy_part() -> impl Strategy<Value = CopyPart> {
    let blocks = any::<(u32, u32)>().prop_map(|(from, to)| Blocks { from, to });
    (vec(any::<u8>(), 0..9), vec(any::<u8>(), 0..9), option::of(blocks))
        .prop_map(|(start, end, blocks)| CopyPart { start, end, blocks })
}

fn order_id() -> impl Strategy<Value = OrderId> {
    any::<(u64, u64)>().prop_map(|(run, number)| OrderId { run, number })
}

fn copy_order() -> impl Strategy<Value = CopyOrder> {
    let numbers = (any::<i64>(), ts(), any::<i64>(), any::<bool>());
    let texts = ["\\PC{0,9}", "\\PC{0,9}", "\\PC{0,30}"];
    (changefeed(), order_id(), vec(any::<u8>(), 0..30), table(), copy_part(), numbers, texts).prop_map(
        |(changefeed, id, feed, table, part, (right, at, time, is_binary), texts)| {
            let [snapshot, application, statement] = texts;
            CopyOrder {
                changefeed,
                id,
                feed: feed.into(),
                right: CopyRight(right),
                table,
                part,
                format: if is_binary { CopyFormat::Binary } else { CopyFormat::Text },
                snapshot,
                at,
                time: WallTime(time),
                application,
                statement,
            }
        },
    )
}

fn copy_report() -> impl Strategy<Value = CopyReport> {
    let state = prop_oneof![
        Just(OrderState::Running),
        any::<(u64, u64)>().prop_map(|(rows, bytes)| OrderState::Written { rows, bytes }),
        ("\\PC{0,9}", "\\PC{0,9}").prop_map(|(code, message)| OrderState::Failed { code, message }),
    ];
    (order_id(), state).prop_map(|(id, state)| CopyReport { id, state })
}

proptest! {
    #[test]
    fn an_order_and_a_report_read_back_as_they_were_and_not_when_they_are_cut(
        order in copy_order(),
        report in copy_report(),
    ) {
        let (mut bytes, mut answer) = (Vec::new(), Vec::new());
        crew::put_order(&order, &mut bytes);
        crew::put_report(&report, &mut answer);
        prop_assert_eq!(crew::get_order(&bytes), Some(order));
        prop_assert_eq!(crew::get_report(&answer), Some(report));
        for len in 0..bytes.len() {
            prop_assert_eq!(crew::get_order(&bytes[..len]), None);
        }
        for len in 0..answer.len() {
            prop_assert_eq!(crew::get_report(&answer[..len]), None);
        }
        bytes.push(0);
        answer.push(0);
        prop_assert_eq!((crew::get_order(&bytes), crew::get_report(&answer)), (None, None));
    }

    #[test]
    fn an_order_hides_what_may_be_secret(order in copy_order()) {
        let secret = "postgres://somebody:s3cr3t@host/db";
        let order = CopyOrder { feed: secret.into(), statement: secret.to_owned(), ..order };
        let shown = format!("{order:?}");
        prop_assert!(!shown.contains("s3cr3t"));
    }

    #[test]
    fn a_request_reads_back_as_it_was_and_not_when_it_is_cut(message in to_event_service()) {
        let mut bytes = Vec::new();
        put_to_event_service(&message, &mut bytes);
        prop_assert_eq!(get_to_event_service(&bytes), Some(message));
        for len in 0..bytes.len() {
            prop_assert_eq!(get_to_event_service(&bytes[..len]), None);
        }
        bytes.push(0);
        prop_assert_eq!(get_to_event_service(&bytes), None);
    }

    #[test]
    fn an_event_reads_back_as_it_was_and_not_when_it_is_cut(message in to_event_collector()) {
        let mut bytes = Vec::new();
        put_to_event_collector(&message, &mut bytes);
        prop_assert_eq!(get_to_event_collector(&bytes), Some(message));
        for len in 0..bytes.len() {
            prop_assert_eq!(get_to_event_collector(&bytes[..len]), None);
        }
        bytes.push(0);
        prop_assert_eq!(get_to_event_collector(&bytes), None);
    }

    #[test]
    fn rows_read_back_from_the_pieces_of_their_byte_form(head in head(), batch in batch()) {
        let mut bytes = Vec::new();
        let rows = put_rows(&head, &batch, &mut bytes);
        bytes.extend_from_slice(&rows);
        let bytes = Bytes::from(bytes);
        let (same, read) = get_rows(&bytes).expect("it was written here");
        prop_assert!(same == head && read.is_same(&batch));
        for len in 0..bytes.len() {
            prop_assert!(get_rows(&bytes.slice(..len)).is_none());
        }
    }

    #[test]
    fn random_bytes_are_refused_or_read_but_never_panic(kind in 0u8..10, bytes in vec(any::<u8>(), 0..300)) {
        let bytes: Vec<u8> = std::iter::once(kind).chain(bytes).collect();
        let _ = get_to_event_service(&bytes);
        let _ = get_to_event_collector(&bytes);
        let _ = (crew::get_order(&bytes), crew::get_report(&bytes));
    }

    #[test]
    fn a_damaged_event_never_panics_not_even_when_its_rows_are_read(
        message in to_event_collector(),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut bytes = Vec::new();
        put_to_event_collector(&message, &mut bytes);
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(ToEventCollector::Rows { batch: SharedBatch(batch), .. }) = get_to_event_collector(&bytes) {
            for row in batch.iter() {
                let _ = (row.old.map(|image| image.iter().count()), row.new.map(|image| image.iter().count()));
            }
        }
    }
}
