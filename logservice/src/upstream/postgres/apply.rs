//! From decoded messages to the event store's writer: the hot path, synchronous.

use std::sync::Arc;

use bytes::BytesMut;
use event::RowOp;
use heartbeatpb::{Ts, WallTime};
use rustc_hash::FxHashMap;

use super::pgoutput::{self, Message, OldImage, Relation, StreamMessage, TupleData};
use super::shape::Shape;
use crate::event_store::StoreWriter;
use crate::{Error, TableFilter};

/// What a message asks the reader to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Step {
    /// Nothing.
    Nothing,
    /// A row was written.
    Row,
    /// A transaction has begun; unwanted ones are in the store already.
    Begin { wanted: bool },
    /// The transaction is complete.
    Commit { end: Ts, time: WallTime },
    /// The server is alive.
    KeepAlive { end: u64, clock: i64, reply: bool },
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
    /// Tables announced on this connection.
    announced: FxHashMap<u32, Announced>,
    counts: Counts,
}

impl Tables {
    /// Tables by their ids.
    pub(crate) fn new(known: FxHashMap<u32, Arc<Shape>>, filter: Arc<TableFilter>) -> Self {
        Self { known, filter, announced: FxHashMap::default(), counts: Counts::default() }
    }

    /// Counts since the last call.
    pub(crate) fn take_counts(&mut self) -> Counts {
        std::mem::take(&mut self.counts)
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
        match pgoutput::decode(content)? {
            Message::Insert { relation, new } => self.insert(relation, new, open, writer),
            Message::Update { relation, old, new } => self.update(relation, old, new, open, writer),
            Message::Delete { relation, old } => self.delete(relation, old, open, writer),
            Message::Begin { commit_lsn } => {
                if open.is_some() {
                    return Err(Error::protocol("a transaction begins inside another"));
                }
                let wanted = commit_lsn >= resume.0;
                if wanted {
                    writer.begin(Ts(commit_lsn));
                    self.counts.transactions += 1;
                }
                Ok(Step::Begin { wanted })
            }
            Message::Commit { end_lsn, time } => match open {
                Some(_) => Ok(Step::Commit { end: Ts(end_lsn), time: WallTime(time) }),
                None => Err(Error::protocol("a commit without a transaction")),
            },
            Message::Relation(relation) => self.announce(&relation).map(|()| Step::Nothing),
            Message::Truncate { relations } => {
                for relation in relations.iter() {
                    if let Some(shape) = wanted(&self.announced, relation, open)? {
                        writer.row(shape.info.id, RowOp::Truncate, None, None)?;
                        self.counts.rows += 1;
                    }
                }
                Ok(Step::Row)
            }
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

    fn announce(&mut self, relation: &Relation) -> Result<(), Error> {
        let announced = match self.known.get(&relation.id) {
            Some(shape) => {
                shape.verify(relation)?;
                Announced::Known(Arc::clone(shape))
            }
            None if self.filter.matches(&relation.schema, &relation.name) => {
                Announced::Unexpected { table: format!("{}.{}", relation.schema, relation.name) }
            }
            None => Announced::Unwanted,
        };
        self.announced.insert(relation.id, announced);
        Ok(())
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
