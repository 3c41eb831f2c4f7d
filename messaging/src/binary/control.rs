//! Memory that a receiver has left, so that the event service does not send more.

use std::collections::BTreeMap;

use heartbeatpb::{DecodeError, DispatcherId, Gid};

use super::frame::{
    BinaryMessage, EventKind, ID_BYTES, Reader, frame, put_count, put_dispatcher, put_id, put_u64,
};

/// Memory left for one dispatcher.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SpanMemory {
    /// The dispatcher.
    pub dispatcher: DispatcherId,
    /// Bytes.
    pub available: u64,
}

/// Memory left for one changefeed.
#[derive(Clone, PartialEq, Debug)]
pub struct FeedMemory {
    /// The changefeed.
    pub changefeed: Gid,
    /// Bytes.
    pub available: u64,
    /// Used part of its quota; 0 from a sender of version 1.
    pub usage_ratio: f64,
    /// How often the receiver had to release memory by force; 0 from a sender that does not say.
    pub release_count: u32,
    /// Its dispatchers.
    pub dispatchers: Vec<SpanMemory>,
}

/// Collector to event service: memory left.
#[derive(Clone, PartialEq, Debug)]
pub struct CongestionControl {
    /// Cluster of the sender.
    pub cluster_id: u64,
    /// Memory by changefeed.
    pub changefeeds: Vec<FeedMemory>,
}

impl BinaryMessage for CongestionControl {
    const NAME: &'static str = "CongestionControl";

    fn encode(&self, out: &mut Vec<u8>) {
        frame(out, EventKind::CongestionControl, 2, |out| {
            put_u64(out, self.cluster_id);
            put_count(out, self.changefeeds.len());
            for feed in &self.changefeeds {
                put_id(out, feed.changefeed.high, feed.changefeed.low);
                put_u64(out, feed.available);
                put_u64(out, feed.usage_ratio.to_bits());
                put_count(out, feed.dispatchers.len());
                for span in &feed.dispatchers {
                    put_dispatcher(out, span.dispatcher);
                    put_u64(out, span.available);
                }
            }
            // The trailer is left out when it would say nothing, as a sender without it does.
            let released: Vec<_> = self.changefeeds.iter().filter(|feed| feed.release_count > 0).collect();
            if !released.is_empty() {
                put_count(out, released.len());
                for feed in released {
                    put_id(out, feed.changefeed.high, feed.changefeed.low);
                    out.extend_from_slice(&feed.release_count.to_be_bytes());
                }
            }
        });
    }

    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let (version, mut payload, _) = Reader::open(bytes, EventKind::CongestionControl, Self::NAME)?;
        let feed_bytes = match version {
            1 => ID_BYTES + 8 + 4,
            2 => ID_BYTES + 8 + 8 + 4,
            _ => return Err(payload.unusable("version")),
        };
        let cluster_id = payload.u64()?;
        let count = payload.count(feed_bytes)?;
        let mut changefeeds = Vec::with_capacity(count);
        for _ in 0..count {
            changefeeds.push(read_feed(&mut payload, version)?);
        }
        if version == 2 && !payload.is_empty() {
            read_trailer(payload, &mut changefeeds)?;
        }
        Ok(Self { cluster_id, changefeeds })
    }
}

fn read_feed(payload: &mut Reader<'_>, version: u16) -> Result<FeedMemory, DecodeError> {
    let changefeed = payload.gid()?;
    let available = payload.u64()?;
    let usage_ratio = if version == 2 { f64::from_bits(payload.u64()?) } else { 0.0 };
    if !usage_ratio.is_finite() {
        return Err(payload.unusable("usage ratio"));
    }
    let count = payload.count(ID_BYTES + 8)?;
    let mut dispatchers = Vec::with_capacity(count);
    for _ in 0..count {
        dispatchers.push(SpanMemory { dispatcher: payload.dispatcher()?, available: payload.u64()? });
    }
    Ok(FeedMemory { changefeed, available, usage_ratio, release_count: 0, dispatchers })
}

fn read_trailer(mut payload: Reader<'_>, changefeeds: &mut [FeedMemory]) -> Result<(), DecodeError> {
    let count = payload.count(ID_BYTES + 4)?;
    if payload.remaining() != count * (ID_BYTES + 4) {
        return Err(payload.unusable("trailer"));
    }
    let mut by_id: BTreeMap<Gid, &mut FeedMemory> =
        changefeeds.iter_mut().map(|feed| (feed.changefeed, feed)).collect();
    for _ in 0..count {
        let (changefeed, released) = (payload.gid()?, payload.u32()?);
        if let Some(feed) = by_id.get_mut(&changefeed) {
            feed.release_count = released;
        }
    }
    Ok(())
}
