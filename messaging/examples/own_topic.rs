//! Two nodes in one process that talk over a topic of their own.
//!
//! ```sh
//! cargo run -p messaging --example own_topic
//! ```

use heartbeatpb::DecodeError;
use messaging::testing::Network;
use messaging::{MessageCenter, MessagingConfig, StreamClass, Topic, WireMessage};

/// A topic is a type, so that it can carry one type of message only.
enum Greetings {}

impl Topic for Greetings {
    const NAME: &'static str = "greetings";
    const CLASS: StreamClass = StreamClass::Command;
    type Message = Greeting;
}

#[derive(Clone, Debug)]
struct Greeting(String);

impl WireMessage for Greeting {
    fn io_type(&self) -> i32 {
        // Numbers below this one belong to the shared protocol.
        messaging::codec::io_type::FIRST_OWN
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.0.as_bytes());
    }

    fn decode(_: i32, bytes: &[u8]) -> Result<Self, DecodeError> {
        let text = std::str::from_utf8(bytes).map_err(|_| DecodeError::Malformed { message: "Greeting" })?;
        Ok(Self(text.to_owned()))
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let network = Network::new(42);
    let [north, south] = ["north", "south"].map(|name| {
        let center = MessageCenter::new(name.into(), MessagingConfig::default());
        network.join(&center);
        center
    });
    let mut inbox = south.register::<Greetings>(16);
    for receiver in [south.node(), &"west".into()] {
        match north.send::<Greetings>(receiver, Greeting("good morning".to_owned())) {
            Ok(()) => println!("queued for {receiver}"),
            Err(error) => println!("not sent to {receiver}: {error}"),
        }
    }
    if let Some(inbound) = inbox.recv().await {
        println!("{} says {:?} to {}", inbound.from, inbound.message.0, south.node());
    }
}
