//! Figures that the benchmarks print: medians, and how busy the machine was.

use std::fs;

/// The one in the middle by a number; of an even count the later one, of none the default.
pub fn median<T: Copy + Default>(all: &[T], by: impl Fn(&T) -> f64) -> T {
    let mut sorted = all.to_vec();
    sorted.sort_by(|one, other| by(one).total_cmp(&by(other)));
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

/// Processes that wanted the processor over the last minute, for people.
#[must_use]
pub fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().unwrap_or("?").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_one_in_the_middle() {
        let by = |value: &f64| *value;
        assert_eq!(median(&[3.0, 1.0, 2.0], by).to_bits(), 2f64.to_bits());
        assert_eq!(median(&[1.0, 4.0], by).to_bits(), 4f64.to_bits());
        assert_eq!(median(&[], by).to_bits(), 0f64.to_bits());
    }
}
