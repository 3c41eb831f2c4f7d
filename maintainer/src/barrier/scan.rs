//! The periodic look at every event: what was lost is said again, what nobody waits for any more is over.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use heartbeatpb::{
    BarrierKey, BlockAction, DispatcherId, DispatcherStatus, InfluencedDispatchers, InfluencedTables, NodeId,
};

use super::event::{Event, Stage};
use super::{Barrier, RESEND, action};
use crate::placement::Placement;

impl Barrier {
    /// Repeats what has not been answered, in the order of events. Says what is to be sent to whom.
    pub(crate) fn scan(
        &mut self,
        placement: &mut Placement,
        now: Instant,
    ) -> BTreeMap<NodeId, Vec<DispatcherStatus>> {
        let mut out: BTreeMap<NodeId, Vec<DispatcherStatus>> = BTreeMap::new();
        let committed = placement.spans.committed();
        self.applied.retain(|key| key.commit_ts >= committed);
        self.ended.retain(|_, ts| *ts >= committed);
        self.apply_due(placement, now);
        let keys: Vec<BarrierKey> = self.events.keys().copied().collect();
        for key in keys {
            let Some(event) = self.events.get_mut(&key).filter(|event| event.blocking) else { continue };
            let pause = event.last_resend.is_some_and(|at| now.saturating_duration_since(at) < RESEND);
            if pause {
                continue;
            }
            event.last_resend = Some(now);
            match event.stage {
                Stage::Waiting => {
                    let passed = event.proven
                        || event.related(&placement.spans).iter().any(|span| event.was_passed_by(span))
                        || event.waits_for_ended(&self.ended);
                    if passed {
                        self.forward(key, placement, now);
                    } else if event.is_complete_without_gone(&placement.spans)
                        && let Some((node, writer)) = self.choose(key, None, placement, now)
                    {
                        let to = InfluencedDispatchers::Normal(vec![writer]);
                        out.entry(node).or_default().push(action(to, BlockAction::Write, key));
                    }
                }
                Stage::Selected { written: true, .. } => {}
                Stage::Selected { writer, written: false } => {
                    self.repeat_write(key, writer, placement, &mut out)
                }
                Stage::Advanced { writer } => {
                    event.close_gone(&placement.spans);
                    repeat_pass(event, writer, &self.me, placement, now, &mut out);
                }
            }
            self.finish(key, placement);
        }
        out
    }

    fn repeat_write(
        &mut self,
        key: BarrierKey,
        writer: Option<DispatcherId>,
        placement: &Placement,
        out: &mut BTreeMap<NodeId, Vec<DispatcherStatus>>,
    ) {
        let Some(event) = self.events.get_mut(&key) else { return };
        let runs = |id: &DispatcherId| placement.spans.is_trigger(*id) || placement.spans.is_replicating(*id);
        let writer = writer.filter(runs).or_else(|| {
            // The writer is gone: any other participant that runs can do it.
            let related = event.related(&placement.spans);
            let trigger = related.iter().map(|span| span.id).find(|id| placement.spans.is_trigger(*id));
            trigger.or_else(|| related.iter().map(|span| span.id).find(|id| runs(id)))
        });
        event.stage = Stage::Selected { writer, written: false };
        let Some(writer) = writer.filter(|_| heartbeatpb::Rule::WriteResend.holds()) else { return };
        if let Some(node) = self.node_of(writer, placement) {
            let to = InfluencedDispatchers::Normal(vec![writer]);
            out.entry(node).or_default().push(action(to, BlockAction::Write, key));
        }
    }
}

fn repeat_pass(
    event: &mut Event,
    writer: Option<DispatcherId>,
    me: &NodeId,
    placement: &Placement,
    now: Instant,
    out: &mut BTreeMap<NodeId, Vec<DispatcherStatus>>,
) {
    let mut tell = |node: NodeId, to: InfluencedDispatchers, key| {
        out.entry(node).or_default().push(action(to, BlockAction::Pass, key));
    };
    // Answers to the last broadcast are still coming in.
    let flowing = now.saturating_duration_since(event.last_status) < RESEND;
    if event.is_wide() && event.pass_sent && flowing {
        return;
    }
    event.pass_sent = true;
    match &event.influence {
        InfluencedTables::Normal(_) => {
            let mut by_node: BTreeMap<NodeId, Vec<DispatcherId>> = BTreeMap::new();
            for span in event.related(&placement.spans) {
                let node =
                    if placement.spans.is_trigger(span.id) { Some(me.clone()) } else { span.node.clone() };
                if let Some(node) = node {
                    by_node.entry(node).or_default().push(span.id);
                }
            }
            for (node, ids) in by_node {
                tell(node, InfluencedDispatchers::Normal(ids), event.key);
            }
        }
        InfluencedTables::Schema(schema) => {
            let mut nodes: BTreeSet<NodeId> =
                placement.spans.by_schema(*schema).filter_map(|span| span.node.clone()).collect();
            nodes.insert(me.clone());
            nodes.extend(writer.and_then(|id| placement.spans.get(id)).and_then(|span| span.node.clone()));
            for node in nodes {
                tell(node, InfluencedDispatchers::Schema { schema: *schema, except: None }, event.key);
            }
        }
        InfluencedTables::All => {
            for node in &placement.alive {
                tell(node.clone(), InfluencedDispatchers::All { except: None }, event.key);
            }
        }
    }
}
