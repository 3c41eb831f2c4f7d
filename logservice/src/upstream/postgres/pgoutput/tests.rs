//! Messages as they are on the wire, cut off and damaged.

use proptest::prelude::*;

use super::*;

fn tuple(values: &[Option<&str>]) -> Vec<u8> {
    let mut out = u16::try_from(values.len()).expect("few").to_be_bytes().to_vec();
    for value in values {
        match value {
            Some("<unchanged>") => out.push(b'u'),
            Some(text) => {
                out.push(b't');
                out.extend(u32::try_from(text.len()).expect("short").to_be_bytes());
                out.extend(text.as_bytes());
            }
            None => out.push(b'n'),
        }
    }
    out
}

fn update() -> Vec<u8> {
    let mut message = b"U\0\0\0\x07K".to_vec();
    message.extend(tuple(&[Some("1"), None]));
    message.push(b'N');
    message.extend(tuple(&[Some("2"), Some("<unchanged>")]));
    message
}

fn relation_message() -> Vec<u8> {
    b"R\0\0\0\x07app\0t\0d\0\x01\x01id\0\0\0\0\x17\xff\xff\xff\xff".to_vec()
}

#[test]
fn an_update_with_a_key_is_decoded_in_place() {
    let message = update();
    let Message::Update { relation: 7, old: Some(OldImage::Key(old)), new } =
        decode(&message).expect("decode")
    else {
        panic!("not an update")
    };
    assert_eq!(old.iter().collect::<Vec<_>>(), [Datum::Text(b"1"), Datum::Null]);
    assert_eq!(new.iter().collect::<Vec<_>>(), [Datum::Text(b"2"), Datum::Unchanged]);
}

#[test]
fn the_table_of_a_row_is_known_from_its_beginning() {
    let body: Vec<u8> = std::iter::once(b'w').chain([0; 24]).chain(update()).collect();
    assert_eq!(relation_of(&body), Some(7));
    assert_eq!(relation_of(&body[..30]), Some(7));
    assert_eq!(relation_of(&body[..29]), None);
    let body: Vec<u8> = std::iter::once(b'w').chain([0; 24]).chain(relation_message()).collect();
    assert_eq!(relation_of(&body), None);
}

#[test]
fn a_relation_is_decoded() {
    let Message::Relation(relation) = decode(&relation_message()).expect("decode") else {
        panic!("no relation")
    };
    assert_eq!((relation.schema.as_str(), relation.name.as_str(), relation.identity), ("app", "t", b'd'));
    assert_eq!(relation.columns[0].type_oid, 23);
    assert_eq!(relation.columns[0].type_mod, -1);
}

fn logical_message() -> Vec<u8> {
    b"M\x01\0\0\0\0\0\0\0\x09pre\0\0\0\0\x02ab".to_vec()
}

#[test]
fn a_logical_message_is_decoded_unless_it_belongs_to_no_transaction() {
    let mut message = logical_message();
    let Message::Logical { prefix, content } = decode(&message).expect("decode") else {
        panic!("no logical message")
    };
    assert_eq!((prefix, content), (&b"pre"[..], &b"ab"[..]));
    message[1] = 0;
    assert!(matches!(decode(&message), Ok(Message::Other)));
}

fn stream_commit() -> Vec<u8> {
    b"c\0\0\0\x05\0\0\0\0\0\0\0\x01\x02\0\0\0\0\0\0\x01\x30\0\0\0\0\0\0\0\x07".to_vec()
}

#[test]
fn transactions_before_their_ends_are_decoded() {
    assert!(matches!(decode(b"S\0\0\0\x05\x01"), Ok(Message::StreamStart { xid: 5 })));
    let aborted = decode(b"A\0\0\0\x05\0\0\0\x06");
    assert!(matches!(aborted, Ok(Message::StreamAbort { xid: 5, subxid: 6 })));
    let Ok(Message::StreamCommit(commit)) = decode(&stream_commit()) else { panic!("no commit") };
    let time = PG_EPOCH_MICROS + 7;
    assert_eq!(commit, StreamCommit { xid: 5, commit_lsn: 0x102, end_lsn: 0x130, time });
}

#[test]
fn a_message_of_a_block_is_one_without_its_id() {
    for (whole, kind) in [(update(), "U"), (relation_message(), "R"), (logical_message(), "M")] {
        let mut message = kind.as_bytes().to_vec();
        message.extend(6_u32.to_be_bytes());
        message.extend(&whole[1..]);
        let streamed = decode_streamed(&message).expect("decode");
        assert_eq!(streamed, Streamed::Message { xid: 6, kind: kind.as_bytes(), rest: &whole[1..] });
        for len in 0..5 {
            assert!(decode_streamed(&message[..len]).is_err(), "cut at {len}");
        }
    }
    assert_eq!(prefix_of(&logical_message()[1..]).expect("a prefix"), b"pre");
    assert!(prefix_of(&logical_message()[1..12]).is_err());
    assert!(matches!(decode_streamed(b"E"), Ok(Streamed::Stop)));
    assert!(matches!(decode_streamed(b"Oorigin"), Ok(Streamed::Other)));
    assert!(decode_streamed(b"B\0\0\0\0").is_err(), "nothing begins in a block");
}

#[test]
fn every_cut_and_every_addition_is_an_error() {
    for message in [update(), relation_message(), logical_message(), stream_commit()] {
        for len in 0..message.len() {
            assert!(decode(&message[..len]).is_err(), "cut at {len}");
        }
        let mut longer = message.clone();
        longer.push(0);
        assert!(decode(&longer).is_err());
    }
    assert!(decode(b"Z").is_err());
    assert!(decode(b"T\xff\xff\xff\xff\0").is_err());
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        drop(decode(&bytes));
        drop(decode_stream(&bytes));
        drop(decode_streamed(&bytes));
        drop(prefix_of(&bytes));
    }

    #[test]
    fn damaged_messages_never_panic(at in 0usize..64, with in any::<u8>(), which in any::<bool>()) {
        let mut message = if which { update() } else { relation_message() };
        let at = at % message.len();
        message[at] = with;
        if let Ok(Message::Update { new, .. }) = decode(&message) {
            prop_assert_eq!(new.iter().count(), new.columns());
        }
    }
}
