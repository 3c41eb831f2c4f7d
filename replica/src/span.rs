//! One span of a table and what is known of it.

use heartbeatpb::{
    BlockStage, BlockState, ComponentState, DispatcherConfig, DispatcherId, Mode, NodeId, SchemaId, TableId,
    TableSpan, TableSpanStatus, Ts,
};

/// Spans that are balanced against each other.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum GroupId {
    /// Spans that are a whole table.
    Default,
    /// The parts of one table.
    Table(TableId),
}

impl GroupId {
    /// The group of a range.
    #[must_use]
    pub fn of(span: &TableSpan) -> Self {
        if span.is_whole() { Self::Default } else { Self::Table(span.table) }
    }
}

impl std::fmt::Display for GroupId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::Table(table) => write!(f, "table-{table}"),
        }
    }
}

/// Whether a dispatcher in this state is gone for good.
#[must_use]
pub const fn is_terminal(state: ComponentState) -> bool {
    matches!(state, ComponentState::Stopped | ComponentState::Removed)
}

/// The replication record of one span (scheduling §4). Only its [`crate::SpanSet`] changes it.
#[derive(Clone, Debug, PartialEq)]
pub struct SpanReplica {
    /// Id; survives moves.
    pub id: DispatcherId,
    /// Schema of its table.
    pub schema: SchemaId,
    /// Key range.
    pub span: TableSpan,
    /// Whether its table may be divided into key ranges.
    pub splittable: bool,
    /// Node that runs it or is to run it.
    pub node: Option<NodeId>,
    /// Last reported checkpoint; the start ts before.
    pub checkpoint: Ts,
    /// Last reported state.
    pub state: ComponentState,
    /// Blocking event that it was last seen in; most have none.
    pub block: Option<Box<BlockState>>,
}

impl SpanReplica {
    /// A span that nobody runs, to start after `start_ts`.
    #[must_use]
    pub fn absent(id: DispatcherId, schema: SchemaId, span: TableSpan, start_ts: Ts) -> Self {
        Self {
            id,
            schema,
            span,
            splittable: false,
            node: None,
            checkpoint: start_ts,
            state: ComponentState::Initializing,
            block: None,
        }
    }

    /// The group that it is balanced in.
    #[must_use]
    pub fn group(&self) -> GroupId {
        GroupId::of(&self.span)
    }

    /// Folds a report in. The checkpoint never goes back; a report that is behind is old news, unless it says
    /// that the dispatcher is gone: that is final, and comes with checkpoint zero from a node that does not know
    /// the dispatcher.
    pub fn observe(&mut self, status: &TableSpanStatus) {
        if status.checkpoint >= self.checkpoint || is_terminal(status.state) {
            self.state = status.state;
        }
        if status.checkpoint != Ts::MAX {
            self.checkpoint = self.checkpoint.max(status.checkpoint);
        }
    }

    /// The span has flushed everything up to `ts`, as its report about a blocking event implies.
    pub fn raise(&mut self, ts: Ts) {
        self.checkpoint = self.checkpoint.max(ts);
        if !is_terminal(self.state) {
            self.state = ComponentState::Working;
        }
    }

    /// How a dispatcher for this span is to be created now (scheduling §4.5): after its checkpoint, or
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
    use heartbeatpb::BarrierKey;

    use super::*;

    fn span(checkpoint: u64, block: Option<(u64, bool, BlockStage)>) -> SpanReplica {
        let mut span = SpanReplica::absent(
            DispatcherId::new(1, 1),
            SchemaId(1),
            TableSpan::whole(TableId(7)),
            Ts(checkpoint),
        );
        let block = block.map(|(ts, is_sync_point, stage)| BlockState {
            is_blocked: true,
            key: BarrierKey { commit_ts: Ts(ts), is_sync_point },
            blocked: None,
            dropped: None,
            added: vec![],
            schema_changes: vec![],
            stage,
            routes: vec![],
        });
        span.block = block.map(Box::new);
        span
    }

    fn status(state: ComponentState, checkpoint: u64) -> TableSpanStatus {
        TableSpanStatus {
            id: DispatcherId::new(1, 1),
            state,
            checkpoint: Ts(checkpoint),
            event_size_per_second: 0.0,
            mode: Mode::Default,
        }
    }

    // behaviour: scheduling-58, scheduling-59
    #[test]
    fn a_create_request_starts_where_the_span_stands() {
        use BlockStage::{Done, Waiting, Writing};
        let start = |span: &SpanReplica, committed| {
            let config = span.create_config(Ts(committed), Mode::Default);
            assert_eq!((config.dispatcher, config.schema), (span.id, span.schema));
            (config.start_ts.0, config.skip_dml_at_start)
        };
        assert_eq!(start(&span(10, None), 0), (10, false), "plain");
        assert_eq!(start(&span(10, None), 20), (20, false), "the committed checkpoint wins");
        assert_eq!(
            start(&span(9, Some((10, true, Waiting))), 0),
            (10, false),
            "a sync point is done at its ts"
        );
        assert_eq!(start(&span(10, Some((30, true, Waiting))), 20), (30, false), "above the committed one");
        assert_eq!(start(&span(20, Some((10, true, Done))), 0), (20, false), "a finished one says nothing");
        assert_eq!(
            start(&span(9, Some((10, false, Waiting))), 0),
            (9, true),
            "the DDL is replayed, not its rows"
        );
        assert_eq!(start(&span(9, Some((10, false, Waiting))), 10), (10, false), "a stale DDL");
        assert_eq!(
            start(&span(9, Some((10, false, Writing))), 11),
            (11, false),
            "a stale DDL that was written"
        );
    }

    // behaviour: scheduling-56
    #[test]
    fn the_checkpoint_never_goes_back_and_a_terminal_state_is_never_missed() {
        let mut span = span(10, None);
        span.observe(&status(ComponentState::Working, 9));
        assert_eq!((span.checkpoint, span.state), (Ts(10), ComponentState::Initializing), "old news");
        span.observe(&status(ComponentState::Working, 11));
        assert_eq!((span.checkpoint, span.state), (Ts(11), ComponentState::Working));
        span.observe(&status(ComponentState::Stopped, 0));
        assert_eq!((span.checkpoint, span.state), (Ts(11), ComponentState::Stopped));
        span.raise(Ts(20));
        assert_eq!(
            (span.checkpoint, span.state),
            (Ts(20), ComponentState::Stopped),
            "raising revives nobody"
        );
        span.observe(&status(ComponentState::Working, u64::MAX));
        assert_eq!(span.checkpoint, Ts(20), "no constraint is no checkpoint");
    }
}
