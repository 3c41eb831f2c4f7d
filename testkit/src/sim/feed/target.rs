//! The downstream of a changefeed: sessions of dispatchers, and what becomes of what they write.

use std::collections::{BTreeSet, VecDeque};

use event::DdlEvent;
use heartbeatpb::{DispatcherId, NodeId};
use sink::Flushed;

use super::{Change, Feed};
use crate::Random;

/// What was wrong: the invariant, and how it was broken.
pub(in crate::sim) type Wrong = Vec<(&'static str, String)>;

/// A dispatcher at a sink, from its opening to its closing.
pub(in crate::sim) struct Session {
    node: NodeId,
    pub(super) sink: u64,
    table: i64,
    open: bool,
    /// The database refused something of it.
    failed: bool,
    last_due: u64,
    pending: VecDeque<Pending>,
}

/// A batch on its way into the database: what was sent may get there although its process may not write any more.
struct Pending {
    starts: u64,
    sent: bool,
    due: u64,
    changes: Vec<Change>,
    flushed: Flushed,
}

impl Feed {
    /// Opens a dispatcher at a sink; answers after which commit ts it has to start, and whether that is just before
    /// a schema change that was executed: the dispatcher sees it again, so that the others can pass it with it.
    pub(in crate::sim) fn open(
        &mut self,
        number: u64,
        (node, sink, dispatcher): (NodeId, u64, DispatcherId),
        table: i64,
        start: u64,
    ) -> (u64, bool) {
        let session = Session {
            node: node.clone(),
            sink,
            table,
            open: true,
            failed: false,
            last_due: 0,
            pending: VecDeque::new(),
        };
        if let Some(before) = self.by_holder.insert((node, sink, dispatcher), number)
            && let Some(before) = self.sessions.get_mut(&before)
        {
            before.open = false;
        }
        self.sessions.insert(number, session);
        let executed = self.tables.get(&table).map_or(0, |table| table.executed);
        if executed > start { (executed - 1, true) } else { (start, false) }
    }

    /// Closes one dispatcher at a sink. What it has written goes on its way.
    pub(in crate::sim) fn close(&mut self, holder: &(NodeId, u64, DispatcherId)) {
        if let Some(session) = self.by_holder.remove(holder).and_then(|n| self.sessions.get_mut(&n)) {
            session.open = false;
        }
        self.sessions.retain(|_, session| session.open || !session.pending.is_empty());
    }

    /// Takes rows of a dispatcher; false when it is not open.
    pub(in crate::sim) fn write(
        &mut self,
        holder: &(NodeId, u64, DispatcherId),
        (starts, due): (u64, u64),
        changes: Vec<Change>,
        flushed: Flushed,
    ) -> bool {
        let Some(session) = self.by_holder.get(holder).and_then(|n| self.sessions.get_mut(n)) else {
            return false;
        };
        if session.failed {
            // What is sent behind something that was refused is refused too, as on one connection.
            return true;
        }
        session.last_due = session.last_due.max(due);
        let due = session.last_due;
        session.pending.push_back(Pending { starts, sent: false, due, changes, flushed });
        true
    }

    /// Whether the target has refused something of a sink.
    pub(in crate::sim) fn has_refused(&self, sink: u64) -> bool {
        self.sessions.values().any(|session| session.sink == sink && session.failed)
    }

    /// Whether all rows of a dispatcher are durable; `None` when some were refused.
    pub(in crate::sim) fn is_durable(&self, holder: &(NodeId, u64, DispatcherId)) -> Option<bool> {
        let session = self.by_holder.get(holder).and_then(|n| self.sessions.get(n))?;
        (!session.failed && self.may_write(holder.1)).then_some(session.pending.is_empty())
    }

    /// Sends what can be sent and writes what is due; answers who has to be told.
    pub(in crate::sim) fn apply_due(
        &mut self,
        now: u64,
        refused: &impl Fn(&NodeId) -> bool,
        permitted: &impl Fn(&NodeId) -> bool,
        wrong: &mut Wrong,
    ) -> Vec<Flushed> {
        let mut done = Vec::new();
        let writers = &self.writers;
        let sends = |session: &&mut Session| writers.may_write(session.sink) && permitted(&session.node);
        for session in self.sessions.values_mut().filter(sends) {
            let waits = session.pending.iter_mut().filter(|pending| !pending.sent);
            waits.take_while(|pending| pending.starts <= now).for_each(|pending| pending.sent = true);
        }
        let numbers: Vec<u64> = self.sessions.keys().copied().collect();
        for number in numbers {
            while let Some(session) = self.sessions.get_mut(&number) {
                if session.pending.front().is_none_or(|pending| !pending.sent || pending.due > now) {
                    break;
                }
                if refused(&session.node) {
                    session.pending.clear();
                    session.failed = true;
                    break;
                }
                let Some(pending) = session.pending.pop_front() else { break };
                let table = session.table;
                self.apply(number, table, &pending.changes, wrong);
                done.push(pending.flushed);
            }
        }
        self.sessions.retain(|_, session| session.open || !session.pending.is_empty());
        done
    }

    fn apply(&mut self, session: u64, id: i64, changes: &[Change], wrong: &mut Wrong) {
        let Some(table) = self.tables.get_mut(&id) else {
            wrong.push(("ROWS", format!("rows of table {id}, which never was")));
            return;
        };
        for change in changes {
            let (ts, key) = (change.ts, change.key);
            let (writer, before) = table.writers.entry(key).or_insert_with(|| (session, BTreeSet::new()));
            if *writer != session {
                if before.contains(&session) {
                    wrong.push((
                        "ONE-WRITER",
                        format!("key {key} of table {id} is written by session {session} after session {writer} took it over"),
                    ));
                }
                before.insert(*writer);
                *writer = session;
            }
            if table.applied.get(&key).is_some_and(|applied| *applied >= ts) {
                continue;
            }
            if !table.exists || ts < table.executed {
                wrong.push((
                    "DDL-ORDER",
                    format!(
                        "the change of key {key} at {ts} reaches table {id} behind its schema change at {}",
                        table.executed
                    ),
                ));
            }
            table.applied.insert(key, ts);
            self.outstanding.remove(&(ts, id, key));
            self.rows_written += 1;
        }
    }

    /// Executes a schema change at its place.
    pub(in crate::sim) fn execute(&mut self, ddl: &DdlEvent, wrong: &mut Wrong) {
        let ts = ddl.commit_ts.0;
        if !self.executed.insert(ts) {
            return;
        }
        let live: Vec<i64> =
            self.tables.values().filter(|table| table.lives_at(ts - 1)).map(|table| table.id).collect();
        for id in self.influenced(ddl, &live) {
            let Some(table) = self.tables.get_mut(&id) else { continue };
            table.executed = table.executed.max(ts);
            let missing = self.outstanding.iter().take_while(|(at, ..)| *at < ts).find(|(_, t, _)| *t == id);
            if let Some((at, _, key)) = missing {
                wrong.push((
                    "DDL-ORDER",
                    format!(
                        "the schema change at {ts} runs before the change of key {key} of table {id} at {at}"
                    ),
                ));
            }
            if let Some((key, at)) = table.applied.iter().find(|(_, at)| **at > ts) {
                wrong.push((
                    "DDL-ORDER",
                    format!(
                        "the schema change at {ts} runs after the change of key {key} of table {id} at {at}"
                    ),
                ));
            }
        }
        if let Some(table) = self.tables.get_mut(&ddl.table_id.0) {
            table.executed = table.executed.max(ts);
        }
        for added in &ddl.added {
            if let Some(table) = self.tables.get_mut(&added.table.0) {
                table.exists = true;
            }
        }
        for table in self.tables.values_mut().filter(|table| table.died == Some(ts)) {
            table.exists = false;
        }
        self.outstanding.remove(&(ts, 0, 0));
    }

    /// A process is gone, and with it its sessions.
    pub(in crate::sim) fn bury(&mut self, node: &NodeId, random: &mut Random, wrong: &mut Wrong) {
        self.end_sessions(|session: &Session| session.node == *node, random, wrong);
        self.by_holder.retain(|(n, ..), _| n != node);
        if self.reader.as_ref().is_some_and(|reader| reader.node == *node) {
            self.reader = None;
        }
    }

    /// A sink has ended, and with it its sessions: nothing of it reaches the target any more.
    pub(in crate::sim) fn retire(
        &mut self,
        sink: u64,
        refused: bool,
        random: &mut Random,
        wrong: &mut Wrong,
    ) {
        for session in self.sessions.values_mut().filter(|session| refused && session.sink == sink) {
            session.pending.clear();
        }
        self.remove_writer(sink, random, wrong);
    }

    /// Whether something of a sink is on its way.
    pub(super) fn has_pending(&self, sink: u64) -> bool {
        let sent = |session: &Session| session.pending.front().is_some_and(|pending| pending.sent);
        self.sessions.values().any(|session| session.sink == sink && sent(session))
    }

    /// Of what a session had sent, a first part may still be committed.
    pub(super) fn end_sessions(
        &mut self,
        which: impl Fn(&Session) -> bool,
        random: &mut Random,
        wrong: &mut Wrong,
    ) {
        let ended: Vec<u64> =
            self.sessions.iter().filter(|(_, session)| which(session)).map(|(number, _)| *number).collect();
        for number in ended {
            let Some(session) = self.sessions.remove(&number) else { continue };
            let table = session.table;
            let sent = session.pending.iter().take_while(|pending| pending.sent).count();
            let survive = usize::try_from(random.between(0, sent as u64)).unwrap_or(0);
            for pending in session.pending.into_iter().take(survive) {
                self.apply(number, table, &pending.changes, wrong);
            }
        }
    }

    /// What is different at the two ends once everything should have arrived.
    pub(in crate::sim) fn difference(&self) -> Option<String> {
        if let Some((ts, table, key)) = self.outstanding.first() {
            return Some(format!("the change of table {table} key {key} at {ts} is not there"));
        }
        for table in self.tables.values() {
            if table.exists != table.died.is_none() {
                return Some(format!("table {} exists downstream: {}", table.id, table.exists));
            }
            if table.exists && table.applied != table.newest {
                return Some(format!("table {} differs", table.id));
            }
        }
        None
    }
}
