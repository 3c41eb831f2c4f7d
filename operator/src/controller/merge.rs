//! Admission of a merge: all of its operators or none.

use heartbeatpb::{DispatcherId, NodeId, TableSpan};
use replica::SpanReplica;

use super::{Context, Controller};
use crate::span::{MergeSpans, OccupySpan};

/// Sources that can be joined.
struct Joint {
    target: SpanReplica,
    node: NodeId,
    /// Whether the target was known before: a node remembers a merge that another maintainer began.
    restored: bool,
}

impl Controller {
    /// Joins `sources`, in the order of their keys, into `target`: a fresh id, or that of a span which is on its
    /// way to the node of the sources with exactly their keys (a merge that is continued).
    ///
    /// Refused, with no effect of any kind, when the controller is quiesced, when there are fewer than two
    /// sources, when they do not follow each other, are not of one schema, are not all run by one living node, or
    /// when somebody has one of them.
    pub fn merge(&mut self, sources: &[DispatcherId], target: DispatcherId, cx: &mut Context<'_>) -> bool {
        let ids = || sources.iter().chain([&target]).copied();
        if !ids().all(|id| self.is_allowed(id) && !self.contains(id)) {
            return false;
        }
        let Some(joint) = joint(sources, target, cx) else { return false };
        if !joint.restored && !cx.spans.add_scheduling(joint.target, joint.node.clone()) {
            return false;
        }
        for source in sources {
            self.push(Box::new(OccupySpan::new(*source, target)), cx);
        }
        self.push(Box::new(MergeSpans::new(target, sources.to_vec(), joint.node)), cx);
        true
    }

    /// Gives a merge up: its sources go on, its target is dropped. Says whether there was one.
    pub fn cancel_merge(&mut self, target: DispatcherId, cx: &mut Context<'_>) -> bool {
        let found = self.get(target).is_some_and(|operator| operator.kind() == crate::Kind::Merge);
        if found {
            self.cancel(target, cx);
        }
        found
    }
}

/// What the sources become, when they can be joined.
fn joint(sources: &[DispatcherId], target: DispatcherId, cx: &Context<'_>) -> Option<Joint> {
    let spans: Vec<&SpanReplica> = sources.iter().map(|id| cx.spans.get(*id)).collect::<Option<_>>()?;
    let (first, last) = (spans.first()?, spans.last()?);
    let node = first.node.clone().filter(|node| cx.alive.contains(node))?;
    let together = sources.iter().all(|id| cx.spans.is_replicating(*id))
        && spans.iter().all(|span| span.node.as_ref() == Some(&node) && span.schema == first.schema)
        && spans.windows(2).all(|pair| pair[0].span.is_followed_by(&pair[1].span));
    if spans.len() < 2 || !together || target.is_zero() {
        return None;
    }
    let range = TableSpan { end: last.span.end.clone(), ..first.span.clone() };
    let known = cx.spans.get(target);
    if let Some(known) = known {
        let fits = known.span == range
            && known.node.as_ref() == Some(&node)
            && cx.spans.standing(target) == Some(replica::Standing::Scheduling);
        return fits.then(|| Joint { target: known.clone(), node, restored: true });
    }
    let checkpoint = spans.iter().map(|span| span.checkpoint).min()?;
    let mut replica = SpanReplica::absent(target, first.schema, range, checkpoint);
    replica.splittable = first.splittable;
    Some(Joint { target: replica, node, restored: false })
}
