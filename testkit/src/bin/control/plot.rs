//! The costs against the number of spans, both axes logarithmic, as a picture.

use testkit::plot::{Chart, Line};

use crate::clock::float;
use crate::report::{Cost, Unit, grouped};

/// Costs by spans; a naive version is drawn dashed, in the colour of ours.
pub(crate) fn svg(costs: &[Cost]) -> String {
    let costs: Vec<&Cost> = costs
        .iter()
        .filter(|cost| cost.of == "spans" && cost.unit == Unit::Nanoseconds && cost.points.len() > 1)
        .collect();
    let mut marks: Vec<u64> = costs.iter().flat_map(|cost| &cost.points).map(|point| point.at).collect();
    marks.sort_unstable();
    marks.dedup();
    let mut lines = Vec::new();
    for (colour, cost) in costs.iter().enumerate() {
        let ours = cost.points.iter().map(|p| (float(p.at).log10(), p.ours)).collect();
        let naive = cost.points.iter().filter_map(|p| Some((float(p.at).log10(), p.naive?))).collect();
        lines.push(Line { name: cost.name.to_owned(), colour, dashed: false, points: ours });
        lines.push(Line { name: String::new(), colour, dashed: true, points: naive });
    }
    let chart = Chart {
        title: "Cost in the control plane, by spans of one changefeed (dashed: naive version)",
        places: "spans",
        marks: marks.into_iter().map(|mark| (float(mark).log10(), grouped(mark))).collect(),
        value: time,
        lines,
    };
    chart.svg()
}

/// A power of ten of nanoseconds.
fn time(decade: f64) -> String {
    let (unit, base) = match decade {
        d if d >= 9.0 => ("s", 9.0),
        d if d >= 6.0 => ("ms", 6.0),
        d if d >= 3.0 => ("µs", 3.0),
        _ => ("ns", 0.0),
    };
    format!("{:.0} {unit}", 10f64.powf(decade - base))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Growth, Point};

    #[test]
    fn a_cost_becomes_a_line_with_its_name_and_a_dashed_one() {
        let points = vec![
            Point { at: 10_000, ours: 100.0, naive: Some(1e4) },
            Point { at: 1_000_000, ours: 120.0, naive: Some(1e6) },
        ];
        let cost = Cost {
            name: "look",
            unit: Unit::Nanoseconds,
            of: "spans",
            naive: "scan",
            points,
            growth: Growth::Flat(1.5),
        };
        let svg = svg(&[cost]);
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert!(svg.contains("look") && svg.contains("1,000,000") && svg.contains("100 ns"));
        assert!(!svg.contains("NaN"));
    }
}
