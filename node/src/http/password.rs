//! Verifiers of passwords: `SCRAM-SHA-256$<iterations>:<salt>$<stored key>:<server key>`, the form in which PostgreSQL
//! keeps them, so that its own and those of its poolers can be used.
//!
//! With `salted = PBKDF2-HMAC-SHA256(password, salt, iterations)`, the server key is `HMAC(salted, "Server Key")`
//! (RFC 5802 §3, RFC 7677). A password is right when it gives that key.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls::SupportedCipherSuite;
use rustls::crypto::tls13::{Hkdf, OkmBlock};

/// Bytes of SHA-256, and of each key.
const KEY: usize = 32;
/// Longest password in bytes: the block of SHA-256, so that it is a key of HMAC as it is.
pub const LONGEST: usize = 64;
/// More iterations than this are a mistake, or an attempt to keep the node busy.
const MOST_ITERATIONS: u32 = 1_000_000;

/// What a password is checked against.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Verifier {
    iterations: u32,
    salt: Vec<u8>,
    server_key: Vec<u8>,
}

impl Verifier {
    /// Reads the text form.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.strip_prefix("SCRAM-SHA-256$")?.split('$');
        let (first, second) = (parts.next()?, parts.next()?);
        let (iterations, salt) = first.split_once(':')?;
        let (stored_key, server_key) = second.split_once(':')?;
        let iterations: u32 = iterations.parse().ok()?;
        let salt = STANDARD.decode(salt).ok()?;
        let [stored_key, server_key] = [stored_key, server_key].map(|key| STANDARD.decode(key));
        let server_key = server_key.ok()?;
        let fits = stored_key.is_ok_and(|key| key.len() == KEY) && server_key.len() == KEY;
        let fits = fits && (1..=MOST_ITERATIONS).contains(&iterations) && !salt.is_empty();
        (fits && parts.next().is_none()).then_some(Self { iterations, salt, server_key })
    }

    /// What no password fits.
    pub(super) fn nobody() -> Self {
        Self { iterations: 4096, salt: vec![0; 16], server_key: vec![0; KEY] }
    }

    /// Whether this is the password. Takes milliseconds.
    pub(super) fn admits(&self, password: &str) -> bool {
        let Some(mac) = mac().filter(|_| password.len() <= LONGEST) else { return false };
        let salted = stretch(mac, password.as_bytes(), &self.salt, self.iterations);
        same(sign(mac, &salted, b"Server Key").as_ref(), &self.server_key)
    }
}

/// Whether two texts are the same, in a time that does not tell where they differ.
pub(super) fn same(a: &[u8], b: &[u8]) -> bool {
    let differences = a.iter().zip(b).fold(0, |all, (a, b)| all | (a ^ b));
    std::hint::black_box(differences) == 0 && a.len() == b.len()
}

/// HMAC with SHA-256, of the library that does TLS.
fn mac() -> Option<&'static dyn Hkdf> {
    match rustls::crypto::ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256 {
        SupportedCipherSuite::Tls13(suite) => Some(suite.hkdf_provider),
        SupportedCipherSuite::Tls12(_) => None,
    }
}

/// `key` has at most [`LONGEST`] bytes.
fn sign(mac: &dyn Hkdf, key: &[u8], message: &[u8]) -> [u8; KEY] {
    let tag = mac.hmac_sign(&OkmBlock::new(key), message);
    let mut out = [0; KEY];
    out.copy_from_slice(&tag.as_ref()[..KEY]);
    out
}

/// PBKDF2 with one block (RFC 8018 §5.2).
fn stretch(mac: &dyn Hkdf, password: &[u8], salt: &[u8], iterations: u32) -> [u8; KEY] {
    let mut turn = sign(mac, password, &[salt, &[0, 0, 0, 1]].concat());
    let mut sum = turn;
    for _ in 1..iterations {
        turn = sign(mac, password, &turn);
        sum.iter_mut().zip(turn).for_each(|(sum, turn)| *sum ^= turn);
    }
    sum
}

/// The line of a user in the file of passwords.
///
/// # Errors
/// When the name or the password cannot be used.
pub fn line(user: &str, password: &str) -> Result<String, String> {
    if user.is_empty() || user.contains(':') || user.trim() != user || user.starts_with('#') {
        return Err(
            "a user's name is not empty, has no colon, no outer blanks, and begins with no #".to_owned()
        );
    }
    // Other characters have several spellings, which PostgreSQL makes one of.
    if password.is_empty() || password.len() > LONGEST || !password.bytes().all(|b| (0x20..0x7f).contains(&b))
    {
        return Err(format!("a password has 1 to {LONGEST} printable ASCII characters"));
    }
    Ok(format!("{user}:{}", postgres_protocol::password::scram_sha_256(password.as_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exchange_of_the_standard_is_reproduced() {
        // RFC 7677 §3: password "pencil"; its server signature proves the server key.
        let salt = STANDARD.decode("W22ZaJ0SNY7soEsUEjb6gQ==").unwrap();
        let mac = mac().unwrap();
        let salted = stretch(mac, b"pencil", &salt, 4096);
        let server_key = sign(mac, &salted, b"Server Key");
        let nonce = "rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0";
        let exchange = format!(
            "n=user,r=rOprNGfwEbeRWgbNEkqO,r={nonce},s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096,c=biws,r={nonce}"
        );
        let signature = sign(mac, &server_key, exchange.as_bytes());
        assert_eq!(STANDARD.encode(signature), "6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=");
    }

    #[test]
    fn a_verifier_admits_its_password_and_no_other() {
        let line = line("ann", "correct horse").unwrap();
        let verifier = Verifier::parse(line.strip_prefix("ann:").unwrap()).unwrap();
        assert!(verifier.admits("correct horse"));
        for other in ["", "correct horsf", "correct hors", "correct horse ", &"x".repeat(100)] {
            assert!(!verifier.admits(other), "{other}");
        }
        assert!(!Verifier::nobody().admits("correct horse"));
    }

    #[test]
    fn what_is_no_verifier_no_name_or_no_password_is_refused() {
        let right = line("ann", "x").unwrap();
        let right = right.strip_prefix("ann:").unwrap();
        for bad in [
            String::new(),
            "x".to_owned(),
            "SCRAM-SHA-256$".to_owned(),
            right.replace("4096", "0"),
            right.replace("4096", "4000000000"),
            right.replace("4096", "-1"),
            format!("{right}$x"),
            right.replace("SCRAM-SHA-256", "md5"),
            right[..right.len() - 4].to_owned(),
        ] {
            assert!(Verifier::parse(&bad).is_none(), "{bad}");
        }
        for (user, password) in [("", "x"), ("a:b", "x"), (" a", "x"), ("#a", "x"), ("a", ""), ("a", "ä")] {
            assert!(line(user, password).is_err(), "{user} {password}");
        }
        assert!(same(b"a", b"a") && !same(b"a", b"ab") && !same(b"a", b"b") && same(b"", b""));
    }
}
