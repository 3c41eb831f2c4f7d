//! Histories of barriers.

mod histories;
mod restored;
mod walk;

use heartbeatpb::{
    AddedTable, ChangefeedId, ComponentState, InfluencedTables, MaintainerEpoch, Mode, SchemaChange,
    SchemaId, TableId, TableSpan,
};
use replica::{SpanReplica, Standing};

use super::*;

/// A barrier, the spans that take part, and a clock. The maintainer and the table trigger, dispatcher 1, are on
/// `n1`; the span of table `t` is dispatcher `100 + t`.
struct Bench {
    barrier: Barrier,
    placement: Placement,
    now: Instant,
}

fn key(commit_ts: u64) -> BarrierKey {
    BarrierKey { commit_ts: Ts(commit_ts), is_sync_point: false }
}

/// Somebody waits at a schema change that concerns `blocked`.
fn waiting(commit_ts: u64, blocked: InfluencedTables) -> BlockState {
    BlockState {
        is_blocked: true,
        key: key(commit_ts),
        blocked: Some(blocked),
        dropped: None,
        added: Vec::new(),
        schema_changes: Vec::new(),
        stage: BlockStage::Waiting,
        routes: Vec::new(),
    }
}

/// Somebody has written or passed it.
fn done(commit_ts: u64) -> BlockState {
    let stage = BlockStage::Done;
    BlockState { blocked: None, stage, ..waiting(commit_ts, InfluencedTables::All) }
}

/// The table trigger has executed it alone.
fn executed(commit_ts: u64, added: &[i64]) -> BlockState {
    let (is_blocked, stage) = (false, BlockStage::None);
    let state = waiting(commit_ts, InfluencedTables::All);
    BlockState { is_blocked, stage, blocked: None, added: tables(added), ..state }
}

/// New tables of schema 1.
fn tables(added: &[i64]) -> Vec<AddedTable> {
    let table = |id: &i64| AddedTable { table: TableId(*id), schema: SchemaId(1), splittable: false };
    added.iter().map(table).collect()
}

fn normal(tables: &[i64]) -> InfluencedTables {
    InfluencedTables::Normal(tables.iter().map(|id| TableId(*id)).collect())
}

const TRIGGER: u64 = 1;

impl Bench {
    /// Tables as (table, schema, node), all replicating at 100, where the changefeed starts.
    fn new(spans: &[(i64, i64, &str)]) -> Self {
        let trigger = SpanReplica {
            node: Some("n1".into()),
            state: ComponentState::Working,
            ..SpanReplica::absent(
                DispatcherId::new(0, TRIGGER),
                SchemaId::DDL,
                TableSpan::whole(TableId::DDL),
                Ts(100),
            )
        };
        let mut next = 900;
        let ids = Box::new(move || {
            next += 1;
            DispatcherId::new(0, next)
        });
        let epoch = MaintainerEpoch::from_wire(5);
        let placement = Placement::new(ChangefeedId::fresh("t"), epoch, trigger, ids);
        let mut bench = Self { barrier: Barrier::new("n1".into(), Ts(100)), placement, now: Instant::now() };
        bench.placement.alive.extend(["n1".into(), "n2".into()]);
        for (table, schema, node) in spans {
            let whole = TableSpan::whole(TableId(*table));
            bench.add(100 + table.cast_unsigned(), *schema, whole, node);
        }
        bench
    }

    fn add(&mut self, id: u64, schema: i64, range: TableSpan, node: &str) {
        let span = SpanReplica::absent(DispatcherId::new(0, id), SchemaId(schema), range, Ts(100));
        assert!(self.placement.spans.add_replicating(span, node.into()));
    }

    /// A node reports; says what is answered and asked.
    fn report(&mut self, node: &str, statuses: &[(u64, BlockState)]) -> String {
        let statuses = statuses
            .iter()
            .map(|(id, state)| TableSpanBlockStatus {
                id: DispatcherId::new(0, *id),
                mode: Mode::Default,
                state: state.clone(),
            })
            .collect();
        let changefeed = ChangefeedId::fresh("t");
        let request = BlockStatusRequest { changefeed, mode: Mode::Default, statuses };
        let outcome = self.barrier.on_request(&node.into(), &request, &mut self.placement, self.now);
        let mut said = say(outcome.responses);
        for key in outcome.unusable {
            said = format!("{said} unusable {}", key.commit_ts);
        }
        said
    }

    /// Time passes; says what is sent.
    fn after(&mut self, millis: u64) -> String {
        self.now += Duration::from_millis(millis);
        say(self.barrier.scan(&mut self.placement, self.now))
    }

    fn count(&self, standing: Standing) -> usize {
        self.placement.spans.count(standing)
    }
}

fn say(responses: impl IntoIterator<Item = (NodeId, Vec<DispatcherStatus>)>) -> String {
    let of_node = |(node, statuses): (NodeId, Vec<DispatcherStatus>)| {
        let statuses: Vec<String> = statuses.iter().map(say_status).collect();
        format!("{node}: {}", statuses.join(", "))
    };
    let said: Vec<String> = responses.into_iter().map(of_node).collect();
    if said.is_empty() { "-".to_owned() } else { said.join("; ") }
}

fn say_status(status: &DispatcherStatus) -> String {
    let to = match &status.influenced {
        None => "nobody".to_owned(),
        Some(InfluencedDispatchers::Normal(ids)) => {
            ids.iter().map(|id| id.low.to_string()).collect::<Vec<_>>().join("+")
        }
        Some(InfluencedDispatchers::Schema { schema, .. }) => format!("schema {schema}"),
        Some(InfluencedDispatchers::All { .. }) => "all".to_owned(),
    };
    let what = match (status.ack, status.ignored, status.action) {
        (Some(key), None, None) => format!("ack {}", key.commit_ts),
        (None, Some(key), None) => format!("ignored {}", key.commit_ts),
        (None, None, Some((BlockAction::Write, key))) => format!("write {}", key.commit_ts),
        (None, None, Some((BlockAction::Pass, key))) => format!("pass {}", key.commit_ts),
        other => format!("{other:?}"),
    };
    format!("{what} to {to}")
}
