//! A small owner: wants every key of one table to be written by somebody, moves and joins spans, directs barriers.

use super::*;

#[derive(Clone, Debug)]
pub(super) enum Down {
    Schedule(ScheduleDispatcherRequest),
    Merge(MergeDispatcherRequest),
    Reply(HeartBeatResponse),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Standing {
    Creating,
    Running,
    Removing,
}

#[derive(Clone, Debug)]
struct Span {
    span: TableSpan,
    checkpoint: u64,
    standing: Standing,
}

#[derive(Clone, Debug)]
struct Joining {
    sources: Vec<DispatcherId>,
    target: DispatcherId,
    /// Sources that ended meanwhile.
    gone: BTreeSet<DispatcherId>,
}

#[derive(Debug)]
pub(super) struct Model {
    pub(super) feed: ChangefeedId,
    pub(super) node: NodeId,
    pub(super) epoch: u64,
    /// What it has published: survives it.
    pub(super) checkpoint: u64,
    spans: BTreeMap<DispatcherId, Span>,
    joining: Option<Joining>,
    watermark: Option<Watermark>,
    /// Who waits at a barrier.
    waiting: BTreeMap<u64, BTreeSet<DispatcherId>>,
    writer: BTreeMap<u64, DispatcherId>,
    done: BTreeSet<u64>,
    next_id: u64,
}

impl Model {
    pub(super) fn new(feed: ChangefeedId) -> Self {
        let mut model = Self {
            feed,
            node: a(),
            epoch: 1,
            checkpoint: START,
            spans: BTreeMap::new(),
            joining: None,
            watermark: None,
            waiting: BTreeMap::new(),
            writer: BTreeMap::new(),
            done: BTreeSet::new(),
            next_id: 0,
        };
        for (start, end) in [("", "g"), ("g", "p"), ("p", "")] {
            model.create(TableSpan { start: start.into(), end: end.into(), ..whole() }, START);
        }
        model
    }

    fn fresh(&mut self) -> DispatcherId {
        self.next_id += 1;
        id(self.next_id)
    }

    fn create(&mut self, span: TableSpan, checkpoint: u64) {
        let id = self.fresh();
        self.spans.insert(id, Span { span, checkpoint, standing: Standing::Creating });
    }

    fn occupied(&self, id: DispatcherId) -> bool {
        self.joining.as_ref().is_some_and(|joining| joining.sources.contains(&id))
    }

    /// Something new: a span goes, two are joined, or everything is said again.
    pub(super) fn act(&mut self, pick: usize, calm: bool, down: &mut BTreeMap<NodeId, VecDeque<Down>>) {
        let running: Vec<DispatcherId> = self
            .spans
            .iter()
            .filter(|(id, span)| span.standing == Standing::Running && !self.occupied(**id))
            .map(|(id, _)| *id)
            .collect();
        match pick % 6 {
            // Perhaps a source of a merge.
            0 if !calm => {
                let n = pick / 6 % self.spans.len().max(1);
                if let Some(span) = self.spans.values_mut().nth(n)
                    && span.standing == Standing::Running
                {
                    span.standing = Standing::Removing;
                }
            }
            1 | 2 if self.joining.is_none() => {
                let mut sorted = running;
                sorted.sort_by_key(|id| self.spans[id].span.clone());
                let pairs: Vec<_> = sorted
                    .windows(2)
                    .filter(|pair| self.spans[&pair[0]].span.is_followed_by(&self.spans[&pair[1]].span))
                    .map(<[DispatcherId]>::to_vec)
                    .collect();
                if let Some(sources) = pairs.get(pick / 6 % pairs.len().max(1)).cloned() {
                    let target = self.fresh();
                    self.joining = Some(Joining { sources, target, gone: BTreeSet::new() });
                }
            }
            3 if pick.is_multiple_of(5) && !calm => {
                // A part is divided: first it ends.
                if let Some(id) = running.first()
                    && let Some(span) = self.spans.get_mut(id)
                {
                    span.standing = Standing::Removing;
                }
            }
            _ => {}
        }
        self.repeat(down);
    }

    /// Says everything again that has had no visible effect.
    pub(super) fn repeat(&mut self, down: &mut BTreeMap<NodeId, VecDeque<Down>>) {
        self.decide();
        let mut out = Vec::new();
        for (id, span) in &self.spans {
            let action = match span.standing {
                Standing::Creating => ScheduleAction::Create,
                Standing::Removing => ScheduleAction::Remove,
                Standing::Running => continue,
            };
            out.push(self.schedule(*id, &span.span, span.checkpoint, action));
        }
        if let Some(joining) = &self.joining {
            out.push(Down::Merge(MergeDispatcherRequest {
                changefeed: self.feed.clone(),
                sources: joining.sources.clone(),
                merged: joining.target,
                mode: Mode::Default,
                epoch: epoch(self.epoch),
            }));
        }
        for (ts, waiting) in &self.waiting {
            if self.done.contains(ts) {
                out.extend(waiting.iter().map(|id| self.reply(*id, act(BlockAction::Pass, *ts))));
            } else if let Some(writer) = self.writer.get(ts) {
                out.push(self.reply(*writer, act(BlockAction::Write, *ts)));
            }
        }
        down.entry(self.node.clone()).or_default().extend(out);
    }

    fn schedule(&self, id: DispatcherId, span: &TableSpan, start: u64, action: ScheduleAction) -> Down {
        let mut config = config(id.low, 1, start);
        config.span = span.clone();
        Down::Schedule(ScheduleDispatcherRequest {
            changefeed: self.feed.clone(),
            config,
            action,
            operator: OperatorType::Add,
            epoch: epoch(self.epoch),
        })
    }

    fn reply(&self, id: DispatcherId, status: DispatcherStatus) -> Down {
        let influenced = Some(InfluencedDispatchers::Normal(vec![id]));
        Down::Reply(HeartBeatResponse {
            changefeed: self.feed.clone(),
            mode: Mode::Default,
            statuses: vec![DispatcherStatus { influenced, ..status }],
            epoch: epoch(self.epoch),
        })
    }

    /// Chooses writers of barriers that everybody has reached, and forgets those that are behind.
    fn decide(&mut self) {
        for ts in self.waiting.keys().copied().collect::<Vec<_>>() {
            // Whoever has passed it passed something that was executed.
            if self.checkpoint >= ts || self.spans.values().any(|span| span.checkpoint >= ts) {
                self.done.insert(ts);
            }
            let here = |id: &DispatcherId| {
                self.spans.contains_key(id) || self.joining.as_ref().is_some_and(|j| j.target == *id)
            };
            let reported: Vec<DispatcherId> =
                self.waiting[&ts].iter().copied().filter(|id| here(id)).collect();
            if self.writer.get(&ts).is_some_and(|writer| !here(writer)) {
                self.writer.remove(&ts);
            }
            let spans: Vec<&TableSpan> =
                reported.iter().filter_map(|id| self.spans.get(id)).map(|span| &span.span).collect();
            if !self.writer.contains_key(&ts)
                && holes(&spans).is_empty()
                && let Some(first) = reported.first()
            {
                self.writer.insert(ts, *first);
            }
        }
    }

    pub(super) fn on_block(
        &mut self,
        request: &BlockStatusRequest,
        down: &mut BTreeMap<NodeId, VecDeque<Down>>,
    ) {
        for status in &request.statuses {
            let ts = status.state.key.commit_ts.0;
            match status.state.stage {
                BlockStage::Waiting => {
                    self.waiting.entry(ts).or_default().insert(status.id);
                    let ack = self.reply(status.id, ack(ts));
                    down.entry(self.node.clone()).or_default().push_back(ack);
                }
                BlockStage::Done => {
                    self.done.insert(ts);
                    if let Some(waiting) = self.waiting.get_mut(&ts) {
                        waiting.remove(&status.id);
                    }
                }
                BlockStage::None | BlockStage::Writing => {
                    let ack = self.reply(status.id, ack(ts));
                    down.entry(self.node.clone()).or_default().push_back(ack);
                }
            }
        }
    }

    pub(super) fn on_beat(&mut self, beat: &HeartBeatRequest, down: &mut BTreeMap<NodeId, VecDeque<Down>>) {
        for status in &beat.statuses {
            self.on_status(status, down);
        }
        if let Some(watermark) = beat.watermark
            && self.watermark.is_none_or(|last| last.seq <= watermark.seq)
        {
            self.watermark = Some(watermark);
        }
        let Some(watermark) = self.watermark else { return };
        // Spans that run are in the watermark; all others hold the checkpoint where they are.
        let others = self.spans.values().filter(|span| span.standing != Standing::Running);
        let gone = self.joining.iter().flat_map(|joining| joining.gone.iter());
        let held = others.chain(gone.filter_map(|id| self.spans.get(id))).map(|span| span.checkpoint).min();
        let reached = held.unwrap_or(u64::MAX).min(watermark.checkpoint.0);
        if reached < u64::MAX {
            self.checkpoint = self.checkpoint.max(reached);
        }
    }

    fn on_status(&mut self, status: &TableSpanStatus, down: &mut BTreeMap<NodeId, VecDeque<Down>>) {
        let ended = status.state == ComponentState::Stopped;
        if self.joining.as_ref().is_some_and(|joining| joining.target == status.id) {
            if status.state == ComponentState::Working || ended {
                self.finish(status);
            }
            return;
        }
        let occupied = self.occupied(status.id);
        let Some(span) = self.spans.get_mut(&status.id) else {
            if status.state == ComponentState::Working {
                let remove = self.schedule(status.id, &whole(), 0, ScheduleAction::Remove);
                down.entry(self.node.clone()).or_default().push_back(remove);
            }
            return;
        };
        span.checkpoint = span.checkpoint.max(status.checkpoint.0);
        if ended && occupied {
            self.joining.iter_mut().for_each(|joining| {
                joining.gone.insert(status.id);
            });
        } else if ended {
            self.replace(status.id);
        } else if status.state == ComponentState::Working && span.standing == Standing::Creating {
            span.standing = Standing::Running;
        }
    }

    /// A span has ended: its keys get somebody else, now and then two.
    fn replace(&mut self, id: DispatcherId) {
        let Some(gone) = self.spans.remove(&id) else { return };
        let middle = vec![b'a' + u8::try_from(self.next_id % 26).expect("small")];
        let divides = self.next_id.is_multiple_of(3)
            && middle > gone.span.start
            && (gone.span.end.is_empty() || middle < gone.span.end);
        if divides {
            let (left, right) = (
                TableSpan { end: middle.clone(), ..gone.span.clone() },
                TableSpan { start: middle, ..gone.span },
            );
            self.create(left, gone.checkpoint);
            self.create(right, gone.checkpoint);
        } else {
            self.create(gone.span, gone.checkpoint);
        }
    }

    /// A merge is done, or cannot be.
    fn finish(&mut self, status: &TableSpanStatus) {
        let Some(joining) = self.joining.take() else { return };
        if status.state == ComponentState::Working {
            let ends = (joining.sources.first(), joining.sources.last());
            let (Some(first), Some(last)) = ends else { return };
            let end = self.spans[last].span.end.clone();
            let span = TableSpan { end, ..self.spans[first].span.clone() };
            joining.sources.iter().for_each(|id| {
                self.spans.remove(id);
            });
            let checkpoint = status.checkpoint.0;
            self.spans.insert(joining.target, Span { span, checkpoint, standing: Standing::Running });
        } else {
            joining.gone.iter().for_each(|id| self.replace(*id));
        }
    }

    /// Another owner, perhaps on another node. It knows what was published and nothing more.
    pub(super) fn succeed(&mut self, moves: bool) {
        self.epoch += 1;
        if moves {
            self.node = if self.node == a() { b() } else { a() };
        }
        self.spans.clear();
        self.joining = None;
        self.watermark = None;
        self.waiting.clear();
        self.writer.clear();
        self.done.clear();
    }

    /// What runs, and holes where nothing does.
    pub(super) fn on_bootstrapped(&mut self, response: &heartbeatpb::MaintainerBootstrapResponse) {
        let removed: BTreeSet<DispatcherId> = response
            .operators
            .iter()
            .filter(|request| request.action == ScheduleAction::Remove)
            .map(|request| request.config.dispatcher)
            .collect();
        let listed: BTreeMap<DispatcherId, _> = response.spans.iter().map(|span| (span.id, span)).collect();
        let mut left = BTreeSet::new();
        for merge in &response.merges {
            let target = &listed[&merge.merged];
            if matches!(target.state, ComponentState::Preparing | ComponentState::MergeReady) {
                left.insert(merge.merged);
                self.joining = Some(Joining {
                    sources: merge.sources.clone(),
                    target: merge.merged,
                    gone: BTreeSet::new(),
                });
            } else {
                left.extend(merge.sources.iter().copied());
            }
        }
        for span in response.spans.iter().filter(|span| !left.contains(&span.id)) {
            let going = removed.contains(&span.id) || span.state == ComponentState::Stopped;
            let standing = if going {
                Standing::Removing
            } else if span.state == ComponentState::Initializing {
                Standing::Creating
            } else {
                Standing::Running
            };
            let checkpoint = span.checkpoint.0;
            self.spans.insert(span.id, Span { span: span.span.clone(), checkpoint, standing });
            if let Some(block) = &span.block {
                let ts = block.key.commit_ts.0;
                self.waiting.entry(ts).or_default().insert(span.id);
                if block.stage == BlockStage::Writing {
                    self.writer.insert(ts, span.id);
                }
            }
        }
        let known: Vec<TableSpan> = self.spans.values().map(|span| span.span.clone()).collect();
        for hole in holes(&known.iter().collect::<Vec<_>>()) {
            self.create(hole, self.checkpoint);
        }
    }

    pub(super) fn is_settled(&self) -> bool {
        let running = |span: &Span| span.standing == Standing::Running;
        let spans: Vec<&TableSpan> = self.spans.values().map(|span| &span.span).collect();
        self.joining.is_none() && self.spans.values().all(running) && holes(&spans).is_empty()
    }
}

fn whole() -> TableSpan {
    TableSpan::whole(TableId(1))
}

/// Parts of the table that no span covers.
fn holes(spans: &[&TableSpan]) -> Vec<TableSpan> {
    let mut sorted = spans.to_vec();
    sorted.sort();
    let mut found = Vec::new();
    let mut covered: Vec<u8> = Vec::new();
    for span in sorted {
        if span.start > covered {
            found.push(TableSpan { start: covered.clone(), end: span.start.clone(), ..whole() });
        }
        if span.end.is_empty() {
            return found;
        }
        covered = covered.max(span.end.clone());
    }
    found.push(TableSpan { start: covered, ..whole() });
    found
}
