//! Which nodes of a list are there.

use super::*;

fn list(entries: &[(&str, &str)]) -> BTreeMap<NodeId, String> {
    entries.iter().map(|(id, address)| (NodeId::from(*id), (*address).to_owned())).collect()
}

fn present(arrivals: &mut Arrivals, entries: &[(&str, &str)]) -> Vec<String> {
    arrivals
        .present(&list(entries))
        .iter()
        .map(|(id, address)| format!("{id}@{}", address.as_str()))
        .collect()
}

// behaviour: messaging-13b
#[test]
fn of_two_nodes_at_one_address_the_one_that_came_later_is_there() {
    let mut arrivals = Arrivals::default();
    assert_eq!(present(&mut arrivals, &[("z", "h:1"), ("x", "h:2")]), ["x@h:2", "z@h:1"]);
    // It started again: the old registration lasts as long as its lease.
    let both = [("a", "http://h:1"), ("x", "h:2"), ("z", "h:1")];
    for _ in 0..3 {
        assert_eq!(present(&mut arrivals, &both), ["a@h:1", "x@h:2"]);
    }
    assert_eq!(present(&mut arrivals, &[("a", "h:1"), ("x", "h:2")]), ["a@h:1", "x@h:2"]);
    // The old one is registered again, at an address of its own.
    assert_eq!(present(&mut arrivals, &[("a", "h:1"), ("z", "h:3")]), ["a@h:1", "z@h:3"]);
    // A node moves to where another one was.
    assert_eq!(present(&mut arrivals, &[("a", "h:1"), ("z", "h:1")]), ["z@h:1"]);
}

#[test]
fn nodes_of_one_address_that_come_together_are_all_there() {
    let mut arrivals = Arrivals::default();
    assert_eq!(present(&mut arrivals, &[("a", "h:1"), ("b", "h:1")]), ["a@h:1", "b@h:1"]);
}

#[test]
fn the_path_is_that_of_the_protocol_file() {
    let name = <MessageService as tonic::server::NamedService>::NAME;
    assert_eq!(PATH, format!("/{name}/streamMessages"));
    let descriptors = heartbeatpb::wire::DESCRIPTORS;
    for word in ["MessageService", "streamMessages"] {
        assert!(descriptors.windows(word.len()).any(|window| window == word.as_bytes()), "{word}");
    }
}
