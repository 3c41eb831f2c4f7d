//! One span of a table and what is known of it.

use heartbeatpb::{
    BlockStage, BlockState, ComponentState, DispatcherConfig, DispatcherId, Mode, NodeId, SchemaId,
    TableSpan, TableSpanStatus, Ts,
};

/// The replication record of one span (spec/scheduling.md §4).
#[derive(Clone, Debug, PartialEq)]
pub struct SpanReplica {
    /// Id of this placement.
    pub id: DispatcherId,
    /// Schema of its table.
    pub schema: SchemaId,
    /// Key range.
    pub span: TableSpan,
    /// Node that runs it or is to run it.
    pub node: Option<NodeId>,
    /// Last reported checkpoint; the start ts before.
    pub checkpoint: Ts,
    /// Last reported state.
    pub state: ComponentState,
    /// Blocking event that it was last seen in.
    pub block: Option<BlockState>,
}

impl SpanReplica {
    /// A span that nobody runs, to start after `start_ts`.
    #[must_use]
    pub fn absent(id: DispatcherId, schema: SchemaId, span: TableSpan, start_ts: Ts) -> Self {
        Self {
            id,
            schema,
            span,
            node: None,
            checkpoint: start_ts,
            state: ComponentState::Initializing,
            block: None,
        }
    }

    /// Folds a report in. The checkpoint is monotone; the state is taken even when the checkpoint lags, so that
    /// a terminal state is never missed.
    pub fn observe(&mut self, status: &TableSpanStatus) {
        self.checkpoint = self.checkpoint.max(status.checkpoint);
        self.state = status.state;
    }

    /// How a dispatcher for this span is to be created now (spec/maintainer.md §2.1): after its checkpoint, or
    /// at its blocking event, and never below the committed checkpoint of the changefeed.
    #[must_use]
    pub fn create_config(&self, committed: Ts, mode: Mode) -> DispatcherConfig {
        let mut start_ts = self.checkpoint;
        let mut skip_dml_at_start = false;
        let in_flight = self.block.as_ref().filter(|block| {
            block.is_blocked
                && matches!(block.stage, BlockStage::Waiting | BlockStage::Writing)
                && block.key.commit_ts > Ts::ZERO
        });
        if let Some(block) = in_flight {
            let ts = block.key.commit_ts;
            if block.key.is_sync_point {
                start_ts = start_ts.max(ts);
            } else {
                start_ts = start_ts.max(ts.before());
                skip_dml_at_start = start_ts.after() == ts;
            }
        }
        if committed > start_ts {
            start_ts = committed;
            skip_dml_at_start = false;
        }
        DispatcherConfig {
            span: self.span.clone(),
            start_ts,
            dispatcher: self.id,
            schema: self.schema,
            mode,
            skip_dml_at_start,
        }
    }
}

#[cfg(test)]
mod tests {
    use heartbeatpb::{BarrierKey, TableId};

    use super::*;

    fn span(checkpoint: u64, block: Option<(u64, bool)>) -> SpanReplica {
        let mut span = SpanReplica::absent(
            DispatcherId::new(1, 1),
            SchemaId(1),
            TableSpan::whole(TableId(7)),
            Ts(checkpoint),
        );
        span.block = block.map(|(ts, is_sync_point)| BlockState {
            is_blocked: true,
            key: BarrierKey { commit_ts: Ts(ts), is_sync_point },
            blocked: None,
            dropped: None,
            added: vec![],
            schema_changes: vec![],
            stage: BlockStage::Waiting,
            routes: vec![],
        });
        span
    }

    #[test]
    fn a_create_request_starts_where_the_span_stands() {
        let start = |span: &SpanReplica, committed| {
            let config = span.create_config(Ts(committed), Mode::Default);
            (config.start_ts.0, config.skip_dml_at_start)
        };
        assert_eq!(start(&span(100, None), 0), (100, false));
        assert_eq!(start(&span(100, Some((150, true))), 0), (150, false), "a sync point is done at its ts");
        assert_eq!(
            start(&span(100, Some((150, false))), 0),
            (149, true),
            "a DDL is replayed, its rows are not"
        );
        assert_eq!(start(&span(100, Some((150, false))), 160), (160, false), "the committed checkpoint wins");
        assert_eq!(start(&span(100, None), 120), (120, false));
    }
}
