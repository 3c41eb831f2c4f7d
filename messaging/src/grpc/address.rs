//! Where a peer listens, and which of two nodes dials the other.

use std::cmp::Ordering;

use heartbeatpb::NodeId;

use crate::{SendError, SendErrorKind};

/// Address of a node: `host:port`, with or without `http://` or `https://` in front.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Address {
    text: String,
    secure: Option<bool>,
}

impl Address {
    /// Takes an address as it was registered; whether it can be used shows when it is dialled.
    pub(crate) fn new(text: &str) -> Self {
        let text = text.trim().trim_end_matches('/');
        let (rest, secure) = match (text.strip_prefix("https://"), text.strip_prefix("http://")) {
            (Some(rest), _) => (rest, Some(true)),
            (None, Some(rest)) => (rest, Some(false)),
            (None, None) => (text, None),
        };
        Self { text: rest.to_owned(), secure }
    }

    /// `host:port`.
    pub(crate) fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether the address itself says that TLS is spoken there.
    pub(crate) fn wants_tls(&self) -> bool {
        self.secure == Some(true)
    }

    /// Host, without the brackets of an IPv6 address.
    pub(crate) fn host(&self) -> &str {
        let host = self.text.rsplit_once(':').map_or(self.text.as_str(), |(host, _)| host);
        host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
    }

    /// Host and port.
    ///
    /// # Errors
    /// When the text is no `host:port`.
    pub(crate) fn host_port(&self) -> Result<(&str, u16), SendError> {
        let port = self.text.rsplit_once(':').and_then(|(_, port)| port.parse().ok());
        match port {
            Some(port) if !self.host().is_empty() => Ok((self.host(), port)),
            _ => {
                let reason = format!("{:?} is no host:port", self.text);
                Err(SendError::new(SendErrorKind::ConnectionFailed, reason))
            }
        }
    }
}

/// Whether the first of two nodes dials the second: the smaller address does, and among equal ones the smaller id.
pub(crate) fn dials(own: (&Address, &NodeId), peer: (&Address, &NodeId)) -> bool {
    let by_address = own.0.as_str().as_bytes().cmp(peer.0.as_str().as_bytes());
    by_address.then_with(|| own.1.as_str().cmp(peer.1.as_str())) == Ordering::Less
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scheme_says_only_whether_tls_is_spoken() {
        for (text, host_port, secure) in [
            ("node-1:8300", ("node-1", 8300), false),
            ("http://node-1:8300", ("node-1", 8300), false),
            (" https://node-1:8300/ ", ("node-1", 8300), true),
            ("[::1]:8300", ("::1", 8300), false),
        ] {
            let address = Address::new(text);
            assert_eq!(address.host_port().expect("usable"), host_port, "{text}");
            assert_eq!(address.wants_tls(), secure, "{text}");
        }
        assert_eq!(Address::new("https://a:1").as_str(), Address::new("a:1").as_str());
    }

    #[test]
    fn what_is_no_host_and_port_is_an_error() {
        for text in ["", "node", ":8300", "node:", "node:port", "node:70000", "[]:1"] {
            let error = Address::new(text).host_port().expect_err(text);
            assert_eq!(error.kind, SendErrorKind::ConnectionFailed);
        }
    }

    // behaviour: messaging-10
    #[test]
    fn exactly_one_of_two_nodes_dials_and_it_is_the_one_with_the_smaller_address() {
        let node = |address: &str, id: &str| (Address::new(address), NodeId::from(id));
        let cases = [
            (node("10.0.0.1:8300", "z"), node("10.0.0.2:8300", "a"), true),
            // Bytes are compared, not numbers.
            (node("10.0.0.10:8300", "a"), node("10.0.0.9:8300", "b"), true),
            (node("http://b:1", "a"), node("https://a:1", "b"), false),
            (node("same:1", "a"), node("same:1", "b"), true),
            (node("http://same:1", "b"), node("same:1", "a"), false),
        ];
        for (one, other, expected) in cases {
            assert_eq!(dials((&one.0, &one.1), (&other.0, &other.1)), expected);
            assert_eq!(dials((&other.0, &other.1), (&one.0, &one.1)), !expected);
        }
        let own = node("same:1", "a");
        assert!(!dials((&own.0, &own.1), (&own.0, &own.1)), "nobody dials itself");
    }
}
