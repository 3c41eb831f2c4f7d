//! Durations as people write them: `45m`, `1h30m`, `500ms`.

use std::fmt;
use std::time::Duration;

use serde::de::{Error as _, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A duration whose text form is a sequence of numbers with units: `1h30m`, `1.5s`, `500ms`.
/// A bare integer is read as nanoseconds, which is how older documents store it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct HumanDuration(pub Duration);

impl HumanDuration {
    /// So many seconds.
    #[must_use]
    pub const fn from_secs(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    /// Reads the text form. `None` when it is not a duration, is negative or does not fit.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        if text == "0" {
            return Some(Self::default());
        }
        let mut rest = text;
        let mut nanos = 0f64;
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
            let (number, tail) = rest.split_at(digits);
            let unit_end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
            let (unit, tail) = tail.split_at(unit_end);
            let scale = match unit {
                "ns" => 1.0,
                "us" | "µs" => 1e3,
                "ms" => 1e6,
                "s" => 1e9,
                "m" => 60e9,
                "h" => 3_600e9,
                _ => return None,
            };
            nanos += number.parse::<f64>().ok()? * scale;
            rest = tail;
        }
        // Beyond some centuries the arithmetic would lose its meaning.
        if text.is_empty() || !nanos.is_finite() || nanos > 1.8e19 {
            return None;
        }
        Duration::try_from_secs_f64(nanos / 1e9).ok().map(Self)
    }
}

impl fmt::Display for HumanDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total = self.0.as_secs();
        let nanos = self.0.subsec_nanos();
        if total == 0 && nanos > 0 {
            return match nanos {
                n if n % 1_000_000 == 0 => write!(f, "{}ms", n / 1_000_000),
                n if n % 1_000 == 0 => write!(f, "{}us", n / 1_000),
                n => write!(f, "{n}ns"),
            };
        }
        let (hours, minutes, seconds) = (total / 3600, total / 60 % 60, total % 60);
        if hours > 0 {
            write!(f, "{hours}h")?;
        }
        if hours > 0 || minutes > 0 {
            write!(f, "{minutes}m")?;
        }
        if nanos == 0 {
            write!(f, "{seconds}s")
        } else {
            let fraction = format!("{nanos:09}");
            write!(f, "{seconds}.{}s", fraction.trim_end_matches('0'))
        }
    }
}

impl Serialize for HumanDuration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for HumanDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl Visitor<'_> for Either {
            type Value = HumanDuration;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a duration such as \"45m\", \"1h30m\" or \"500ms\"")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<HumanDuration, E> {
                HumanDuration::parse(text).ok_or_else(|| {
                    E::custom(format!("{text:?} is not a duration; write for example \"45m\" or \"500ms\""))
                })
            }

            fn visit_u64<E: serde::de::Error>(self, nanos: u64) -> Result<HumanDuration, E> {
                Ok(HumanDuration(Duration::from_nanos(nanos)))
            }

            fn visit_i64<E: serde::de::Error>(self, nanos: i64) -> Result<HumanDuration, E> {
                u64::try_from(nanos)
                    .map(|n| HumanDuration(Duration::from_nanos(n)))
                    .map_err(|_| E::custom("a duration cannot be negative"))
            }
        }
        deserializer.deserialize_any(Either).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_and_write_the_same_text() {
        for text in ["45m0s", "1h30m0s", "500ms", "24h0m0s", "2s", "1.5s", "250us", "0s"] {
            assert_eq!(HumanDuration::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(HumanDuration::parse("1.5h").unwrap(), HumanDuration::from_secs(5400));
        assert_eq!(HumanDuration::parse("45m").unwrap().to_string(), "45m0s");
        for bad in ["", "5", "1d", "-5m", "5 m", "m", "5x", "1e400h", "99999999999999999999h"] {
            assert_eq!(HumanDuration::parse(bad), None, "{bad}");
        }
    }

    #[test]
    // behaviour: api-A-6
    fn a_request_has_durations_as_text_or_as_nanoseconds_and_nothing_else() {
        let read =
            |json: &str| serde_json::from_str::<HumanDuration>(json).map_err(|error| error.to_string());
        assert_eq!(read("\"1h30m\""), Ok(HumanDuration::from_secs(5400)));
        assert_eq!(read("5400000000000"), read("\"1h30m\""));
        assert_eq!(serde_json::to_string(&HumanDuration::from_secs(5400)).unwrap(), "\"1h30m0s\"");
        assert_eq!(read("0"), Ok(HumanDuration::default()));
        for text in ["1h30m", "500ms", "1.5s", "250us"] {
            let duration = HumanDuration::parse(text).unwrap();
            assert_eq!(read(&serde_json::to_string(&duration).unwrap()), Ok(duration), "{text}");
        }
        for bad in
            ["\"1d\"", "\"\"", "\"soon\"", "-1", "1.5", "null", "true", "{}", "[1]", "18446744073709551616"]
        {
            assert!(read(bad).is_err(), "{bad}");
        }
        assert!(read("\"1d\"").unwrap_err().contains("45m"), "it says what to write");
        assert!(read("{}").unwrap_err().contains("a duration such as"), "an empty table is none");
    }
}
