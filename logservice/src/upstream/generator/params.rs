//! What a generator URI says.

use heartbeatpb::config::Uri;

use super::catalog::KINDS;
use crate::Error;

/// Which workload.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Bank,
    Wide,
    Skewed,
    Tables,
}

impl Kind {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Kind::Bank => "bank",
            Kind::Wide => "wide",
            Kind::Skewed => "skewed",
            Kind::Tables => "tables",
        }
    }

    /// Parameters beside `seed`, `rate` and `transactions`, with default, least and most value.
    const fn params(self) -> &'static [(&'static str, u64, u64, u64)] {
        match self {
            Kind::Bank => &[
                ("tables", 4, 1, 100_000),
                ("accounts", 100, 1, 10_000_000),
                ("history", 10_000, 0, u64::MAX),
                ("cards", 100, 1, 1_000_000),
                ("rekey-every", 10, 0, u64::MAX),
                ("ddl-every", 0, 0, u64::MAX),
            ],
            Kind::Wide => &[
                ("tables", 1, 1, 100_000),
                ("rows", 1_000, 1, 10_000_000),
                ("value-bytes", 8_000, 0, 16 << 20),
            ],
            Kind::Skewed => &[
                ("keys", 10_000, 1, 100_000_000),
                ("rows-per-txn", 1, 1, 100_000),
                ("value-bytes", 100, 0, 1 << 20),
            ],
            Kind::Tables => &[("tables", 1_000, 1, 10_000_000), ("history", 100_000, 0, u64::MAX)],
        }
    }
}

/// The parameters of a generator, defaults filled in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Params {
    pub(super) kind: Kind,
    pub(super) seed: u64,
    /// Transactions per second; 0 is as fast as possible.
    pub(super) rate: u64,
    /// Transactions after which nothing more happens.
    pub(super) transactions: u64,
    /// Kinds of schema changes, a bit for each of [`KINDS`]; 0: a column of one table comes and goes.
    pub(super) ddl: u64,
    values: Vec<(&'static str, u64)>,
}

fn wrong(reason: impl Into<String>) -> Error {
    Error::UpstreamUri { reason: reason.into() }
}

/// Reads a list such as `create,drop`, or `all`.
fn kinds(list: &str) -> Result<u64, Error> {
    if list == "all" {
        return Ok((1 << KINDS.len()) - 1);
    }
    let bit = |name: &str| {
        KINDS.iter().position(|(known, _)| *known == name).map(|bit| 1 << bit).ok_or_else(|| {
            let names: Vec<&str> = KINDS.iter().map(|(name, _)| *name).collect();
            wrong(format!("parameter ddl is all, or some of {}, with commas between them", names.join(", ")))
        })
    };
    list.split(',').try_fold(0, |mask, name| Ok(mask | bit(name)?))
}

impl Params {
    /// Reads `generator://bank?seed=1&rate=1000&…`.
    pub(super) fn parse(uri: &str) -> Result<Self, Error> {
        let uri = Uri::parse(uri).map_err(wrong)?;
        if uri.scheme != "generator" {
            return Err(wrong("its scheme is not generator"));
        }
        let kind = match (uri.hosts.as_slice(), uri.path.as_str()) {
            ([(host, None)], "" | "/") => match host.as_str() {
                "bank" => Some(Kind::Bank),
                "wide" => Some(Kind::Wide),
                "skewed" => Some(Kind::Skewed),
                "tables" => Some(Kind::Tables),
                _ => None,
            },
            _ => None,
        };
        let kind = kind.ok_or_else(|| wrong("a generator is one of bank, wide, skewed, tables"))?;
        let values = kind.params().iter().map(|&(name, default, _, _)| (name, default)).collect();
        let mut params = Self { kind, seed: 1, rate: 1000, transactions: u64::MAX, ddl: 0, values };
        for (name, value) in &uri.params {
            let number = || {
                value.parse::<u64>().map_err(|_| wrong(format!("parameter {name} must be a whole number")))
            };
            match name.as_str() {
                "seed" => params.seed = number()?,
                "rate" => params.rate = number()?,
                "transactions" => params.transactions = number()?,
                "ddl" if kind == Kind::Bank => params.ddl = kinds(value)?,
                name => params.set(name, number()?)?,
            }
        }
        if kind == Kind::Bank && params.get("tables") * params.get("accounts") < 2 {
            return Err(wrong("a bank needs at least two accounts"));
        }
        if params.ddl > 0 && params.get("ddl-every") == 0 {
            return Err(wrong(
                "parameter ddl needs ddl-every, the number of transactions between two statements",
            ));
        }
        Ok(params)
    }

    fn set(&mut self, name: &str, value: u64) -> Result<(), Error> {
        let known = self.kind.params();
        let Some(at) = known.iter().position(|(known, ..)| *known == name) else {
            let names: Vec<&str> = known.iter().map(|(name, ..)| *name).collect();
            let kind = self.kind.name();
            let given: String = name.chars().take(32).collect();
            return Err(wrong(format!(
                "generator {kind} has no parameter {given:?}; it has seed, rate, transactions, {}",
                names.join(", ")
            )));
        };
        let (name, _, least, most) = known[at];
        if value < least || value > most {
            return Err(wrong(format!("parameter {name} must lie between {least} and {most}")));
        }
        self.values[at].1 = value;
        Ok(())
    }

    /// The value of one of the workload's own parameters.
    pub(super) fn get(&self, name: &str) -> u64 {
        self.values.iter().find(|(known, _)| *known == name).map_or(0, |(_, value)| *value)
    }

    /// What the content of the stream depends on: everything but the speed and the end.
    pub(super) fn fingerprint(&self) -> u64 {
        let mut hash = super::mix(self.seed, self.kind as u64, 0);
        for (at, (_, value)) in self.values.iter().enumerate() {
            hash = super::mix(hash, *value, at as u64 + 1);
        }
        if self.ddl > 0 {
            hash = super::mix(hash, self.ddl, 0);
        }
        hash
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_have_defaults_limits_and_known_names() {
        let params = Params::parse("generator://bank?seed=7&rate=0&accounts=10").unwrap();
        assert_eq!((params.seed, params.rate, params.get("accounts"), params.get("tables")), (7, 0, 10, 4));
        for (uri, word) in [
            ("generator://casino", "bank"),
            ("generator://bank/x", "bank"),
            ("generator://bank?acounts=1", "acounts"),
            ("generator://bank?tables=0", "tables"),
            ("generator://bank?tables=1&accounts=1", "two accounts"),
            ("generator://wide?seed=x", "seed"),
            ("generator://skewed?tables=3", "tables"),
            ("generator://bank?ddl=create,burn&ddl-every=5", "truncate"),
            ("generator://bank?ddl=all", "ddl-every"),
            ("generator://wide?ddl=all", "ddl"),
        ] {
            let error = Params::parse(uri).unwrap_err().to_string();
            assert!(error.contains(word), "{uri}: {error}");
        }
    }

    #[test]
    fn speed_and_length_do_not_change_what_the_stream_is() {
        let print = |uri: &str| Params::parse(uri).unwrap().fingerprint();
        assert_eq!(print("generator://bank?rate=1"), print("generator://bank?rate=2&transactions=5"));
        assert_ne!(print("generator://bank?seed=1"), print("generator://bank?seed=2"));
        assert_ne!(print("generator://bank?tables=1"), print("generator://bank?tables=2"));
        let with = |ddl: &str| print(&format!("generator://bank?ddl-every=9{ddl}"));
        assert_ne!(with("&ddl=create"), with("&ddl=create,drop"));
        assert_ne!(with("&ddl=create"), with(""));
    }
}
