//! The words between a copy and those that write parts of it.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use event::{CopyFormat, CopyPart, CopyRight, TableInfo};
use heartbeatpb::{ChangefeedId, DecodeError, Ts, WallTime};
use messaging::{StreamClass, Topic, WireMessage};

use crate::wire;

/// Orders for the hands of a node.
#[derive(Debug)]
pub enum CopyOrderTopic {}

impl Topic for CopyOrderTopic {
    const NAME: &'static str = "copy-order";
    const CLASS: StreamClass = StreamClass::Command;
    type Message = CopyOrder;
}

/// Reports to the node that makes a copy.
#[derive(Debug)]
pub enum CopyReportTopic {}

impl Topic for CopyReportTopic {
    const NAME: &'static str = "copy-report";
    const CLASS: StreamClass = StreamClass::Command;
    type Message = CopyReport;
}

/// An order of one node; no two are the same.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct OrderId {
    /// Random, of a process.
    pub run: u64,
    /// Counts its orders.
    pub number: u64,
}

/// Write this part. Repeated until it is answered. `Debug` hides what may be secret, and row values.
#[derive(Clone, PartialEq, Eq)]
pub struct CopyOrder {
    /// Of which changefeed.
    pub changefeed: ChangefeedId,
    /// Which order.
    pub id: OrderId,
    /// Where its ends are, as the programs of the nodes tell each other.
    pub feed: Bytes,
    /// The target lets it write with this.
    pub right: CopyRight,
    /// The table.
    pub table: Arc<TableInfo>,
    /// The part of it.
    pub part: CopyPart,
    /// How its rows travel.
    pub format: CopyFormat,
    /// The upstream's name of the snapshot.
    pub snapshot: String,
    /// Position of the snapshot.
    pub at: Ts,
    /// When it was taken.
    pub time: WallTime,
    /// What the connection to the upstream calls itself.
    pub application: String,
    /// The statement that reads the part there.
    pub statement: String,
}

impl fmt::Debug for CopyOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CopyOrder")
            .field("changefeed", &self.changefeed)
            .field("id", &self.id)
            .field("table", &self.table.id)
            .field("part", &self.part)
            .finish_non_exhaustive()
    }
}

/// How an order is doing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum OrderState {
    /// It is being carried out.
    Running,
    /// The part is durable.
    Written {
        /// Its rows.
        rows: u64,
        /// What they took on their way. In bytes.
        bytes: u64,
    },
    /// It is not being carried out; the part may be durable all the same.
    Failed {
        /// Stable code.
        code: String,
        /// Text for people.
        message: String,
    },
}

/// What became of an order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CopyReport {
    /// Which order.
    pub id: OrderId,
    /// How it is doing.
    pub state: OrderState,
}

impl WireMessage for CopyOrder {
    fn io_type(&self) -> i32 {
        wire::crew::COPY_ORDER
    }

    fn encode(&self, out: &mut Vec<u8>) {
        wire::crew::put_order(self, out);
    }

    fn decode(io_type: i32, bytes: &[u8]) -> Result<Self, DecodeError> {
        if io_type != wire::crew::COPY_ORDER {
            return Err(DecodeError::UnknownType(io_type));
        }
        wire::crew::get_order(bytes).ok_or(DecodeError::Malformed { message: "CopyOrder" })
    }
}

impl WireMessage for CopyReport {
    fn io_type(&self) -> i32 {
        wire::crew::COPY_REPORT
    }

    fn encode(&self, out: &mut Vec<u8>) {
        wire::crew::put_report(self, out);
    }

    fn decode(io_type: i32, bytes: &[u8]) -> Result<Self, DecodeError> {
        if io_type != wire::crew::COPY_REPORT {
            return Err(DecodeError::UnknownType(io_type));
        }
        wire::crew::get_report(bytes).ok_or(DecodeError::Malformed { message: "CopyReport" })
    }
}
