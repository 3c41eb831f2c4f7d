//! Golden bytes of the binary messages, and bytes that are none.

use heartbeatpb::{DecodeError, DispatcherId, Gid, Ts};
use messaging::binary::{
    BatchResolved, BinaryMessage, CongestionControl, DispatcherHeartbeat, DispatcherHeartbeatResponse,
    DispatcherProgress, DispatcherServed, FeedMemory, Handshake, NotReusable, Ready, Resolved, ServedState,
    SpanMemory, SyncPoint,
};
use proptest::prelude::*;

const ID: DispatcherId = DispatcherId::new(0x1112_1314_1516_1718, 0x0102_0304_0506_0708);
/// Low half and then high half, both little-endian.
const ID_HEX: &str = "0807060504030201 1817161514131211";
const FEED: Gid = Gid::new(2, 1);
const FEED_HEX: &str = "0100000000000000 0200000000000000";

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).expect("ascii"), 16).expect("hex"))
        .collect()
}

fn encoded<M: BinaryMessage>(message: &M) -> Vec<u8> {
    let mut out = Vec::new();
    message.encode(&mut out);
    out
}

fn check<M: BinaryMessage + PartialEq + std::fmt::Debug>(message: &M, golden: &str) {
    let golden = hex(golden);
    assert_eq!(encoded(message), golden, "{}", M::NAME);
    assert_eq!(&M::decode(&golden).expect("golden bytes"), message);
    for length in 0..golden.len() {
        // A list of complete messages is also complete after each of them.
        let whole_prefix = M::NAME == BatchResolved::NAME && length % 56 == 0;
        assert_eq!(M::decode(&golden[..length]).is_ok(), whole_prefix, "{} cut at {length}", M::NAME);
    }
}

// behaviour: messaging-17
#[test]
fn messages_about_one_stream_have_their_golden_bytes() {
    check(
        &Handshake { resolved: Ts(1), seq: 1, epoch: 3, dispatcher: ID, table_info: b"{}".as_slice().into() },
        &format!(
            "da7a6a6a 0007 0000 000000000000002a 0000000000000001 0000000000000001 0000000000000003 {ID_HEX} 7b7d"
        ),
    );
    check(&Ready { dispatcher: ID }, &format!("da7a6a6a 0006 0001 0000000000000010 {ID_HEX}"));
    check(&NotReusable { dispatcher: ID }, &format!("da7a6a6a 0008 0000 0000000000000010 {ID_HEX}"));
    check(
        &SyncPoint { seq: 7, epoch: 8, commit_ts: Ts(9), dispatcher: ID },
        &format!(
            "da7a6a6a 0005 0001 0000000000000028 0000000000000007 0000000000000008 0000000000000009 {ID_HEX}"
        ),
    );
}

// behaviour: messaging-17
#[test]
fn resolved_messages_have_their_golden_bytes_alone_and_in_a_batch() {
    let resolved = Resolved { resolved: Ts(0x0203), epoch: 4, seq: 5, dispatcher: ID };
    let golden = format!(
        "da7a6a6a 0003 0001 0000000000000028 0000000000000203 0000000000000004 0000000000000005 {ID_HEX}"
    );
    check(&resolved, &golden);
    check(&BatchResolved(vec![resolved, resolved]), &format!("{golden}{golden}"));
    check(&BatchResolved::default(), "");
}

// behaviour: messaging-17
#[test]
fn heartbeats_have_their_golden_bytes_and_the_first_version_is_understood() {
    let progress = DispatcherProgress { dispatcher: ID, checkpoint: Ts(5), epoch: 6 };
    check(
        &DispatcherHeartbeat { cluster_id: 1, dispatchers: vec![progress] },
        &format!(
            "da7a6a6a 000b 0002 000000000000002d 0000000000000001 00000001 01 {ID_HEX} 0000000000000005 0000000000000006"
        ),
    );
    let first = hex(&format!(
        "da7a6a6a 000b 0001 0000000000000024 0000000000000001 00000001 {ID_HEX} 0000000000000005"
    ));
    let expected = DispatcherProgress { epoch: 0, ..progress };
    assert_eq!(DispatcherHeartbeat::decode(&first).expect("version 1").dispatchers, vec![expected]);

    let served = |state| DispatcherServed { dispatcher: ID, state };
    check(
        &DispatcherHeartbeatResponse {
            cluster_id: 2,
            dispatchers: vec![served(ServedState::Normal), served(ServedState::Removed)],
        },
        &format!("da7a6a6a 000c 0001 000000000000002e 0000000000000002 00000002 {ID_HEX} 00 {ID_HEX} 01"),
    );
}

fn memory(release_count: u32) -> CongestionControl {
    CongestionControl {
        cluster_id: 1,
        changefeeds: vec![FeedMemory {
            changefeed: FEED,
            available: 9,
            usage_ratio: 0.5,
            release_count,
            dispatchers: vec![SpanMemory { dispatcher: ID, available: 7 }],
        }],
    }
}

/// A second version's payload up to its trailer.
fn memory_hex() -> String {
    format!(
        "0000000000000001 00000001 {FEED_HEX} 0000000000000009 3fe0000000000000 00000001 {ID_HEX} 0000000000000007"
    )
}

// behaviour: messaging-17
#[test]
fn congestion_control_has_its_golden_bytes_with_and_without_a_trailer() {
    let plain = format!("da7a6a6a 000a 0002 0000000000000048 {}", memory_hex());
    check(&memory(0), &plain);
    // Cutting the trailer off together with its length gives the message without it; see `check`.
    let with_trailer =
        hex(&format!("da7a6a6a 000a 0002 0000000000000060 {} 00000001 {FEED_HEX} 00000003", memory_hex()));
    assert_eq!(encoded(&memory(3)), with_trailer);
    assert_eq!(CongestionControl::decode(&with_trailer), Ok(memory(3)));

    let first = hex(&format!(
        "da7a6a6a 000a 0001 0000000000000040 0000000000000001 00000001 {FEED_HEX} 0000000000000009 00000001 {ID_HEX} 0000000000000007"
    ));
    let decoded = CongestionControl::decode(&first).expect("version 1");
    assert_eq!(decoded.changefeeds[0].usage_ratio.to_bits(), 0);
    assert_eq!(decoded.changefeeds[0].dispatchers, memory(0).changefeeds[0].dispatchers);
}

// behaviour: messaging-17
#[test]
fn a_trailer_of_the_wrong_length_is_refused() {
    let refused = Err(DecodeError::Unusable { message: "CongestionControl", field: "trailer" });
    let longer = hex(&format!(
        "da7a6a6a 000a 0002 0000000000000062 {} 00000001 {FEED_HEX} 00000003 0000",
        memory_hex()
    ));
    assert_eq!(CongestionControl::decode(&longer), refused);
    let shorter = hex(&format!("da7a6a6a 000a 0002 000000000000004c {} 00000001", memory_hex()));
    assert!(CongestionControl::decode(&shorter).is_err());
}

// behaviour: messaging-17
#[test]
fn a_wrong_header_is_refused_and_says_what_is_wrong() {
    let good = encoded(&Ready { dispatcher: ID });
    let with = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        Ready::decode(&bytes).expect_err("damaged").to_string()
    };
    assert_eq!(with(0, 0), "ReadyEvent has an unusable magic");
    assert_eq!(with(5, 3), "ReadyEvent has an unusable type");
    assert_eq!(with(7, 9), "ReadyEvent has an unusable version");
    assert_eq!(with(15, 0xff), "ReadyEvent has an unusable length");
    assert_eq!(with(8, 0xff), "ReadyEvent has an unusable length");
    assert_eq!(Ready::decode(&good[..15]), Err(DecodeError::Malformed { message: "ReadyEvent" }));
}

// behaviour: messaging-17
#[test]
fn an_absurd_count_is_refused_before_anything_is_allocated() {
    let absurd = hex("da7a6a6a 000b 0002 000000000000000c 0000000000000001 ffffffff");
    let refused = DecodeError::Unusable { message: "DispatcherHeartbeat", field: "count" };
    assert_eq!(DispatcherHeartbeat::decode(&absurd), Err(refused));
    let absurd = hex("da7a6a6a 000a 0002 000000000000000c 0000000000000001 ffffffff");
    assert!(CongestionControl::decode(&absurd).is_err());
    let absurd = hex("da7a6a6a 000c 0001 000000000000000c 0000000000000001 00000001");
    assert!(DispatcherHeartbeatResponse::decode(&absurd).is_err());
}

#[test]
fn a_zero_dispatcher_is_refused() {
    let zero = hex("da7a6a6a 0006 0001 0000000000000010 0000000000000000 0000000000000000");
    assert_eq!(
        Ready::decode(&zero),
        Err(DecodeError::Unusable { message: "ReadyEvent", field: "dispatcher id" })
    );
}

proptest! {
    // behaviour: messaging-17
    #[test]
    fn damaged_bytes_never_crash_a_decoder(at in 0usize..96, byte in any::<u8>(), cut in 0usize..97) {
        let heartbeat = DispatcherHeartbeat {
            cluster_id: 1,
            dispatchers: vec![DispatcherProgress { dispatcher: ID, checkpoint: Ts(5), epoch: 6 }; 2],
        };
        for mut bytes in [encoded(&memory(3)), encoded(&heartbeat)] {
            if let Some(place) = bytes.get_mut(at) {
                *place = byte;
            }
            bytes.truncate(cut);
            let _ = CongestionControl::decode(&bytes);
            let _ = DispatcherHeartbeat::decode(&bytes);
            let _ = DispatcherHeartbeatResponse::decode(&bytes);
            let _ = BatchResolved::decode(&bytes);
            let _ = Handshake::decode(&bytes);
        }
    }
}
