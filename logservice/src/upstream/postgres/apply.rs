//! From decoded messages to the event store's writer: the hot path, synchronous.

use std::sync::Arc;

use bytes::BytesMut;
use event::RowOp;
use heartbeatpb::config::DdlPolicy;
use heartbeatpb::{Ts, WallTime};
use rustc_hash::FxHashMap;

use super::ddl::message::{self, Notice};
use super::pgoutput::{self, Message, OldImage, Relation, Relations, StreamCommit, StreamMessage, TupleData};
use super::shape::Shape;
use crate::event_store::StoreWriter;
use crate::{Error, TableFilter};

/// What a message asks the reader to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Step {
    /// Nothing.
    Nothing,
    /// A table was announced: its row comes next. [`Tables::newest`] names it.
    Announced,
    /// A row was written.
    Row,
    /// A transaction has begun; unwanted ones are in the store already.
    Begin { wanted: bool, commit_lsn: u64, time: WallTime, xid: u32 },
    /// A schema change, to be taken with [`Tables::take_notice`].
    Ddl,
    /// A truncation that is not applied, to be taken with [`Tables::take_withheld`].
    Withheld,
    /// The transaction is complete.
    Commit { end: Ts, time: WallTime },
    /// What comes belongs to a transaction that has not ended, until its block is complete.
    Block { xid: u32 },
    /// A message of such a block was kept.
    Kept(Heard),
    /// A transaction is complete that came before its end.
    StreamCommit(StreamCommit),
    /// A transaction that came before its end, or a subtransaction of it, was rolled back.
    StreamAbort { xid: u32, subxid: u32 },
    /// The server is alive.
    KeepAlive { end: u64, clock: i64, reply: bool },
}

/// What a kept message asks the reader to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Heard {
    /// More of it.
    More,
    /// Its transactions take more memory than they may.
    Full,
    /// There are too many subtransactions.
    TooMany,
}

/// Rows and transactions since the last look.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Counts {
    pub(crate) rows: u64,
    pub(crate) transactions: u64,
}

/// What is known about an announced table.
enum Announced {
    /// It is replicated.
    Known(Arc<Shape>),
    /// Nobody wants it.
    Unwanted,
    /// It is wanted but was not there when the reader began. No error yet: a partition is announced beside its
    /// root, and its rows come under the root's name.
    Unexpected { table: String },
}

/// The tables of a stream.
pub(crate) struct Tables {
    known: FxHashMap<u32, Arc<Shape>>,
    filter: Arc<TableFilter>,
    /// Schema changes come in the log.
    captured: bool,
    /// What is done about a table that loses its rows.
    truncation: DdlPolicy,
    /// Tables that lost their rows, and whose rows stay downstream.
    withheld: Vec<String>,
    /// Tables announced on this connection.
    announced: FxHashMap<u32, Announced>,
    /// Schema and name of the one that was announced last.
    newest: String,
    counts: Counts,
    notice: Option<Notice>,
    /// The open transaction is one that was passed before the reader began, most likely: its tables may have had other
    /// shapes.
    former: bool,
    /// What would be wrong if it was not.
    mismatch: Option<Error>,
}

impl Tables {
    /// Tables by their ids.
    pub(crate) fn new(
        known: FxHashMap<u32, Arc<Shape>>,
        filter: Arc<TableFilter>,
        captured: bool,
        truncation: DdlPolicy,
    ) -> Self {
        Self {
            known,
            filter,
            captured,
            truncation,
            withheld: Vec::new(),
            announced: FxHashMap::default(),
            newest: String::new(),
            counts: Counts::default(),
            notice: None,
            former: false,
            mismatch: None,
        }
    }

    /// Whether the transaction that begins was passed before the reader began, as far as can be told.
    pub(crate) fn begin(&mut self, former: bool) {
        (self.former, self.mismatch) = (former, None);
    }

    /// Whether the open transaction was passed before, as far as can be told.
    pub(crate) fn is_former(&self) -> bool {
        self.former
    }

    /// What a transaction that was not passed before has done to the tables without telling.
    pub(crate) fn take_mismatch(&mut self) -> Option<Error> {
        self.mismatch.take()
    }

    /// The schema change that was read last.
    pub(crate) fn take_notice(&mut self) -> Option<Notice> {
        self.notice.take()
    }

    /// Schema and name of the table that was announced last.
    pub(crate) fn newest(&self) -> &str {
        &self.newest
    }

    /// The tables of a truncation that is not applied.
    pub(crate) fn take_withheld(&mut self) -> Vec<String> {
        std::mem::take(&mut self.withheld)
    }

    /// The shape of a table that is replicated.
    pub(crate) fn known(&self, relation: u32) -> Option<&Arc<Shape>> {
        self.known.get(&relation)
    }

    /// A table has another shape, or is not replicated any more. If the server sees a difference, it announces the table
    /// before its next row.
    pub(crate) fn change(&mut self, relation: u32, shape: Option<Arc<Shape>>) {
        let announced = match &shape {
            Some(shape) => Announced::Known(Arc::clone(shape)),
            None => Announced::Unwanted,
        };
        if let Some(known) = self.announced.get_mut(&relation) {
            *known = announced;
        }
        match shape {
            Some(shape) => drop(self.known.insert(relation, shape)),
            None => drop(self.known.remove(&relation)),
        }
    }

    /// Counts since the last call.
    pub(crate) fn take_counts(&mut self) -> Counts {
        std::mem::take(&mut self.counts)
    }

    /// A transaction begins, at the position of its commit record. Those before `resume` are not wanted.
    pub(crate) fn begin_at(
        &mut self,
        (commit_lsn, time, xid): (u64, i64, u32),
        resume: Ts,
        writer: &mut StoreWriter,
    ) -> Step {
        let wanted = commit_lsn >= resume.0;
        if wanted {
            writer.begin(Ts(commit_lsn));
            self.counts.transactions += 1;
        }
        Step::Begin { wanted, commit_lsn, time: WallTime(time), xid }
    }

    /// Handles the content of one CopyData message. `open` says whether a transaction is open and wanted;
    /// transactions that began to commit before `resume` are not.
    #[inline]
    pub(crate) fn handle(
        &mut self,
        body: &[u8],
        resume: Ts,
        open: Option<bool>,
        writer: &mut StoreWriter,
    ) -> Result<Step, Error> {
        let content = match pgoutput::decode_stream(body)? {
            StreamMessage::Data { content } => content,
            StreamMessage::KeepAlive { end, clock, reply } => {
                return Ok(Step::KeepAlive { end, clock, reply });
            }
        };
        self.apply(content, resume, open, writer)
    }

    /// Handles a message of a transaction, or one between them.
    #[inline]
    pub(crate) fn apply(
        &mut self,
        content: &[u8],
        resume: Ts,
        open: Option<bool>,
        writer: &mut StoreWriter,
    ) -> Result<Step, Error> {
        match pgoutput::decode(content)? {
            Message::Insert { relation, new } => self.insert(relation, new, open, writer),
            Message::Update { relation, old, new } => self.update(relation, old, new, open, writer),
            Message::Delete { relation, old } => self.delete(relation, old, open, writer),
            Message::Begin { commit_lsn, time, xid } => {
                between(open)?;
                Ok(self.begin_at((commit_lsn, time, xid), resume, writer))
            }
            Message::Commit { end_lsn, time } => match open {
                Some(_) => Ok(Step::Commit { end: Ts(end_lsn), time: WallTime(time) }),
                None => Err(Error::protocol("a commit without a transaction")),
            },
            Message::Relation(relation) => self.announce(&relation).map(|()| Step::Announced),
            Message::Truncate { relations } => self.truncate(relations, open, writer),
            Message::Logical { prefix, content } => {
                if open != Some(true) || prefix != message::PREFIX.as_bytes() {
                    return Ok(Step::Nothing);
                }
                self.notice = Some(Notice::read(content)?);
                Ok(Step::Ddl)
            }
            Message::StreamStart { xid } => between(open).map(|()| Step::Block { xid }),
            Message::StreamCommit(commit) => between(open).map(|()| Step::StreamCommit(commit)),
            Message::StreamAbort { xid, subxid } => between(open).map(|()| Step::StreamAbort { xid, subxid }),
            Message::Other => Ok(Step::Nothing),
        }
    }

    fn insert(
        &mut self,
        relation: u32,
        new: TupleData<'_>,
        open: Option<bool>,
        writer: &mut StoreWriter,
    ) -> Result<Step, Error> {
        let Some(shape) = wanted(&self.announced, relation, open)? else { return Ok(Step::Nothing) };
        shape.expect(new)?;
        shape.expect_whole(new)?;
        let mut put_new = |out: &mut BytesMut| shape.put_new(new, None, out);
        writer.row(shape.info.id, RowOp::Insert, None, Some(&mut put_new))?;
        self.counts.rows += 1;
        Ok(Step::Row)
    }

    fn update(
        &mut self,
        relation: u32,
        old: Option<OldImage<'_>>,
        new: TupleData<'_>,
        open: Option<bool>,
        writer: &mut StoreWriter,
    ) -> Result<Step, Error> {
        let Some(shape) = wanted(&self.announced, relation, open)? else { return Ok(Step::Nothing) };
        shape.expect(new)?;
        let full = match old {
            Some(OldImage::Full(old)) => {
                shape.expect(old)?;
                Some(old)
            }
            Some(OldImage::Key(old)) => {
                shape.expect(old)?;
                None
            }
            None => None,
        };
        let mut put_new = |out: &mut BytesMut| shape.put_new(new, full, out);
        match old {
            Some(old) => {
                let mut put_old = |out: &mut BytesMut| shape.put_old(old, out);
                writer.row(shape.info.id, RowOp::Update, Some(&mut put_old), Some(&mut put_new))?;
            }
            None => writer.row(shape.info.id, RowOp::Update, None, Some(&mut put_new))?,
        }
        self.counts.rows += 1;
        Ok(Step::Row)
    }

    fn delete(
        &mut self,
        relation: u32,
        old: OldImage<'_>,
        open: Option<bool>,
        writer: &mut StoreWriter,
    ) -> Result<Step, Error> {
        let Some(shape) = wanted(&self.announced, relation, open)? else { return Ok(Step::Nothing) };
        let (OldImage::Key(image) | OldImage::Full(image)) = old;
        shape.expect(image)?;
        let mut put_old = |out: &mut BytesMut| shape.put_old(old, out);
        writer.row(shape.info.id, RowOp::Delete, Some(&mut put_old), None)?;
        self.counts.rows += 1;
        Ok(Step::Row)
    }

    fn truncate(
        &mut self,
        relations: Relations<'_>,
        open: Option<bool>,
        writer: &mut StoreWriter,
    ) -> Result<Step, Error> {
        for relation in relations.iter() {
            let Some(shape) = wanted(&self.announced, relation, open)? else { continue };
            match self.truncation {
                DdlPolicy::Apply => {
                    writer.row(shape.info.id, RowOp::Truncate, None, None)?;
                    self.counts.rows += 1;
                }
                DdlPolicy::Ignore | DdlPolicy::Fail => {
                    self.withheld.push(format!("{}.{}", shape.info.schema, shape.info.name));
                }
            }
        }
        Ok(if self.withheld.is_empty() { Step::Row } else { Step::Withheld })
    }

    fn announce(&mut self, relation: &Relation) -> Result<(), Error> {
        self.newest = format!("{}.{}", relation.schema, relation.name);
        let announced = match self.known.get(&relation.id) {
            Some(shape) => match shape.verify(relation, self.captured) {
                Ok(()) => Announced::Known(Arc::clone(shape)),
                // Before its next row behind the change it is announced again.
                Err(error) if self.former => {
                    self.mismatch = Some(error);
                    Announced::Unwanted
                }
                Err(error) => return Err(error),
            },
            // It was dropped since.
            None if self.former => Announced::Unwanted,
            None if self.filter.matches(&relation.schema, &relation.name) => {
                Announced::Unexpected { table: format!("{}.{}", relation.schema, relation.name) }
            }
            None => Announced::Unwanted,
        };
        self.announced.insert(relation.id, announced);
        Ok(())
    }
}

/// Transactions are not mixed with what belongs to none.
fn between(open: Option<bool>) -> Result<(), Error> {
    match open {
        None => Ok(()),
        Some(_) => Err(Error::protocol("a transaction begins or ends inside another")),
    }
}

/// The shape for a row; `None` when the row is not wanted.
#[inline]
fn wanted(
    announced: &FxHashMap<u32, Announced>,
    relation: u32,
    open: Option<bool>,
) -> Result<Option<&Arc<Shape>>, Error> {
    match open {
        Some(true) => {}
        Some(false) => return Ok(None),
        None => return Err(Error::protocol("a row outside a transaction")),
    }
    match announced.get(&relation) {
        Some(Announced::Known(shape)) => Ok(Some(shape)),
        Some(Announced::Unwanted) => Ok(None),
        Some(Announced::Unexpected { table }) => Err(Error::SchemaChange {
            table: table.clone(),
            change: "it is published but was not known when the reader began, or it has been dropped since; remove \
                     the changefeed and create it again"
                .to_owned(),
        }),
        None => Err(Error::protocol(format_args!("a row of relation {relation}, which was not announced"))),
    }
}
