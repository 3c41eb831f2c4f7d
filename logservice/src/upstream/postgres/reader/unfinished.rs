//! Transactions that come before they end: kept until they do, each by itself.
//!
//! ```text
//!   block of 7 ──▶ spool of 7          commit of 7 ──▶ handled as if it came now, in the order of commits
//!   block of 9 ──▶ spool of 9          abort of 9  ──▶ forgotten
//!   abort of 7's subtransaction 8 ──▶ spool of 7 ends where 8 began
//! ```
//!
//! - **UF-1** What was rolled back is handled by nobody. A subtransaction begins with its first message, and what follows
//!   until it is rolled back belongs to it or to those inside it.
//! - **UF-2** Logical messages do not tell their subtransaction. Where one of ours may belong to one that was rolled back,
//!   the transaction is not handled from here: the server is asked to send it again when it has ended.

use rustc_hash::FxHashMap;

use super::super::apply::Heard;
use super::super::ddl::message;
use super::super::pgoutput::{self, Streamed};
use crate::Error;
use crate::event_store::Spool;

/// Most subtransactions that are known at the same time: some tens of megabytes.
const MOST_PARTS: usize = 1 << 20;

/// A transaction that has not ended.
#[derive(Debug)]
pub(super) struct Transaction {
    pub(super) spool: Spool,
    /// Subtransactions and where they begin, in that order.
    parts: Vec<(u32, u64)>,
    /// The same by their ids.
    begins: FxHashMap<u32, u64>,
    /// Where our logical messages are.
    notices: Vec<u64>,
    /// See UF-2.
    uncertain: bool,
}

impl Transaction {
    fn new(spool: Spool) -> Self {
        Self { spool, parts: Vec::new(), begins: FxHashMap::default(), notices: Vec::new(), uncertain: false }
    }

    /// Whether it cannot be told what of it was rolled back.
    pub(super) fn is_uncertain(&self) -> bool {
        self.uncertain
    }

    /// A subtransaction was rolled back. Answers how many are not known any more.
    fn roll_back(&mut self, subxid: u32) -> usize {
        let known = self.parts.len();
        if let Some(at) = self.begins.get(&subxid).copied() {
            while let Some((part, _)) = self.parts.pop_if(|(_, begin)| *begin >= at) {
                self.begins.remove(&part);
            }
            while self.notices.pop_if(|notice| *notice >= at).is_some() {}
            self.spool.truncate(at);
        }
        // One of them may have been its first message.
        self.uncertain |= !self.notices.is_empty();
        known - self.parts.len()
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Unfinished {
    transactions: FxHashMap<u32, Transaction>,
    /// The transaction whose block is open.
    block: Option<u32>,
    /// Bytes in memory.
    memory: usize,
    /// Bytes that there may be.
    most_memory: usize,
    /// Subtransactions.
    parts: usize,
}

impl Unfinished {
    pub(super) fn new(most_memory: usize) -> Self {
        Self { transactions: FxHashMap::default(), block: None, memory: 0, most_memory, parts: 0 }
    }

    /// Whether what comes belongs to a block.
    #[inline]
    pub(super) fn in_block(&self) -> bool {
        self.block.is_some()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.transactions.is_empty()
    }

    /// A block of a transaction begins.
    pub(super) fn begin(&mut self, xid: u32, spool: impl FnOnce() -> Spool) {
        self.transactions.entry(xid).or_insert_with(|| Transaction::new(spool()));
        self.block = Some(xid);
    }

    /// Takes a message of the open block.
    ///
    /// # Errors
    /// When it cannot be one.
    pub(super) fn hear(&mut self, content: &[u8]) -> Result<Heard, Error> {
        let open = self.block.and_then(|xid| Some((xid, self.transactions.get_mut(&xid)?)));
        let Some((top, transaction)) = open else { return Err(Error::protocol("a block of no transaction")) };
        let (xid, kind, rest) = match pgoutput::decode_streamed(content)? {
            Streamed::Message { xid, kind, rest } => (xid, kind, rest),
            Streamed::Stop => {
                self.block = None;
                return Ok(Heard::More);
            }
            Streamed::Other => return Ok(Heard::More),
        };
        let at = transaction.spool.end();
        match kind {
            b"M" if pgoutput::prefix_of(rest)? != message::PREFIX.as_bytes() => return Ok(Heard::More),
            b"M" => transaction.notices.push(at),
            _ => {}
        }
        if xid != top
            && transaction.parts.last().is_none_or(|(last, _)| *last != xid)
            && !transaction.begins.contains_key(&xid)
        {
            transaction.parts.push((xid, at));
            transaction.begins.insert(xid, at);
            self.parts += 1;
        }
        let before = transaction.spool.memory();
        transaction.spool.push([kind, rest])?;
        self.memory += transaction.spool.memory() - before;
        Ok(match () {
            () if self.parts > MOST_PARTS => Heard::TooMany,
            () if self.memory > self.most_memory => Heard::Full,
            () => Heard::More,
        })
    }

    /// The spool that has most in memory, which is about to be written out.
    pub(super) fn largest(&mut self) -> Option<&mut Spool> {
        let spools = self.transactions.values_mut().map(|transaction| &mut transaction.spool);
        let largest = spools.max_by_key(|spool| spool.memory())?;
        self.memory -= largest.memory();
        Some(largest)
    }

    /// A transaction, or a subtransaction of it with those inside, was rolled back.
    pub(super) fn roll_back(&mut self, xid: u32, subxid: u32) {
        if xid == subxid {
            drop(self.take(xid));
        } else if let Some(transaction) = self.transactions.get_mut(&xid) {
            let before = transaction.spool.memory();
            self.parts -= transaction.roll_back(subxid);
            self.memory -= before - transaction.spool.memory();
        }
    }

    /// A transaction has ended.
    pub(super) fn take(&mut self, xid: u32) -> Option<Transaction> {
        let transaction = self.transactions.remove(&xid)?;
        self.parts -= transaction.parts.len();
        self.memory -= transaction.spool.memory();
        Some(transaction)
    }
}

#[cfg(test)]
mod tests;
