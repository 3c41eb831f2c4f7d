//! What a program that listens to a cluster needs: messages from bytes, epochs, positions, error codes, and URIs that
//! may be shown.
//!
//! `cargo run -p heartbeatpb --example words`

use std::error::Error;

use heartbeatpb::config::mask_uri;
use heartbeatpb::wire::heartbeatpb as pb;
use heartbeatpb::{
    ChangefeedId, ComponentState, DispatcherId, HeartBeatRequest, MaintainerEpoch, Mode, NodeId, Owner,
    RunningError, TableSpanStatus, Ts, Watermark, codes,
};
use prost::Message as _;

fn heartbeat() -> HeartBeatRequest {
    let status = TableSpanStatus {
        id: DispatcherId::new(7, 1),
        state: ComponentState::Working,
        checkpoint: Ts(0x16_B374_D848),
        event_size_per_second: 2_048.0,
        mode: Mode::Default,
    };
    HeartBeatRequest {
        changefeed: ChangefeedId::fresh("orders"),
        watermark: Some(Watermark {
            checkpoint: status.checkpoint,
            resolved: status.checkpoint,
            seq: 3,
            last_synced: status.checkpoint,
        }),
        redo_watermark: None,
        statuses: vec![status],
        complete: false,
        error: None,
        trouble: None,
    }
}

fn decode(bytes: &[u8]) -> Result<HeartBeatRequest, Box<dyn Error>> {
    Ok(HeartBeatRequest::try_from(pb::HeartBeatRequest::decode(bytes)?)?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let sent = heartbeat();
    let bytes = pb::HeartBeatRequest::from(sent.clone()).encode_to_vec();
    let heard = decode(&bytes)?;
    println!("{} bytes are a heartbeat of {}: {}", bytes.len(), heard.changefeed, heard == sent);
    match decode(&bytes[..bytes.len() / 2]) {
        Err(error) => println!("half of them: {error}"),
        Ok(_) => return Err("half a message was taken for a whole one".into()),
    }

    // A receiver follows the newest owner only, whatever arrives in which order.
    let mut owner = Owner { node: NodeId::from("n1"), epoch: MaintainerEpoch::from_wire(4) };
    for (node, epoch) in [("n2", 3), ("n2", 5), ("n1", 4)] {
        let (node, epoch) = (NodeId::from(node), MaintainerEpoch::from_wire(epoch));
        let taken = owner.try_update(&node, epoch);
        println!(
            "{node} with epoch {}: {}",
            MaintainerEpoch::to_wire(epoch),
            if taken { "owns it now" } else { "refused" }
        );
    }

    for code in [codes::SINK_UNAVAILABLE, codes::TARGET_COLUMN_MISSING] {
        let error = RunningError {
            time: "2026-03-01T08:00:00Z".to_owned(),
            node: "n1".to_owned(),
            code: code.to_owned(),
            message: "…".to_owned(),
        };
        let what = if codes::needs_person(&error.code) { "call somebody" } else { "wait, it is tried again" };
        println!("{}: {what}", error.code);
    }
    println!("{}", mask_uri("postgres://me:secret@db.example.com/shop"));
    Ok(())
}
