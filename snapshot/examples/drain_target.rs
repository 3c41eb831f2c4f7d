//! One writer is told which node is to be emptied, in any order; a reader in another thread looks all the time and
//! never sees an older value after a newer one: `cargo run -p snapshot --example drain_target`.

use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use snapshot::{Publisher, Versioned};

/// Within an epoch a target can only be cleared.
#[derive(Debug)]
struct Target {
    epoch: u64,
    node: Option<&'static str>,
}

impl Versioned for Target {
    type Version = (u64, bool);

    fn version(&self) -> (u64, bool) {
        (self.epoch, self.node.is_none())
    }
}

fn main() {
    let mut publisher = Publisher::new(Target { epoch: 0, node: None });
    let mut view = publisher.view();
    let (seen, news) = mpsc::channel();
    let reader = thread::spawn(move || {
        let (start, mut looks, mut last) = (Instant::now(), 0u64, (0, true));
        while last.0 < 3 || looks < 100_000 {
            let target = view.load();
            if target.version() != last {
                assert!(target.version() > last, "a view never goes back");
                last = target.version();
                let node = target.node.unwrap_or("nobody");
                if seen.send(format!("epoch {}: {node}", target.epoch)).is_err() {
                    break;
                }
            }
            looks += 1;
        }
        println!("{looks} looks, {} ns each", start.elapsed().as_nanos() / u128::from(looks));
    });
    let told = [
        (1, Some("n2"), "the first request"),
        (1, Some("n3"), "another node at the same epoch"),
        (1, None, "cleared"),
        (1, Some("n2"), "set again at an epoch that was cleared"),
        (0, Some("n9"), "a request from long ago"),
        (3, Some("n4"), "a newer request"),
    ];
    for (epoch, node, what) in told {
        if publisher.publish(Target { epoch, node }) {
            let seen = news.recv().unwrap_or_else(|_| "nothing: the reader ended".to_owned());
            println!("{what}: published; the reader sees {seen}");
        } else {
            println!("{what}: refused");
        }
    }
    if reader.join().is_err() {
        println!("the reader failed");
    }
}
