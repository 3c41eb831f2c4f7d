//! The costs against the number of spans, both axes logarithmic, as a picture.

use std::fmt::Write as _;

use crate::clock::float;
use crate::report::{Cost, Unit, grouped};

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 560.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 390.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 50.0;
/// Readable beside each other, also for those who see few colours.
const COLOURS: [&str; 10] = [
    "#1b6ca8", "#d1495b", "#2e8b57", "#b8860b", "#6a4c93", "#008b8b", "#8b4513", "#444444", "#c71585",
    "#708090",
];

/// Costs by spans; a naive version is drawn dashed, in the colour of ours.
pub(crate) fn svg(costs: &[Cost]) -> String {
    let costs: Vec<&Cost> = costs
        .iter()
        .filter(|cost| cost.of == "spans" && cost.unit == Unit::Nanoseconds && cost.points.len() > 1)
        .collect();
    let values = || costs.iter().flat_map(|cost| &cost.points);
    let spans = |point: &&crate::report::Point| float(point.at).log10();
    let times = || values().flat_map(|point| [Some(point.ours), point.naive]).flatten().map(f64::log10);
    let (x_low, x_high) =
        (values().map(|p| spans(&p)).fold(9.0, f64::min), values().map(|p| spans(&p)).fold(0.0, f64::max));
    let (y_low, y_high) = (times().fold(12.0, f64::min).floor(), times().fold(0.0, f64::max).ceil());
    let x =
        |at: f64| LEFT + (at.log10() - x_low) / (x_high - x_low).max(f64::EPSILON) * (WIDTH - LEFT - RIGHT);
    let y = |ns: f64| {
        HEIGHT - BOTTOM - (ns.log10() - y_low) / (y_high - y_low).max(f64::EPSILON) * (HEIGHT - TOP - BOTTOM)
    };

    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"22\" font-size=\"15\">Cost in the control plane, by spans of one changefeed \
         (dashed: naive version)</text>\n"
    );
    let mut decade = y_low;
    while decade <= y_high {
        let at = y(10f64.powf(decade));
        let _ = writeln!(
            out,
            "<line x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#dddddd\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            at + 4.0,
            time(decade)
        );
        decade += 1.0;
    }
    let mut marks: Vec<u64> = values().map(|point| point.at).collect();
    marks.sort_unstable();
    marks.dedup();
    for mark in marks {
        let at = x(float(mark));
        let _ = writeln!(
            out,
            "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{:.1}\" stroke=\"#dddddd\"/>\
             <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            HEIGHT - BOTTOM,
            HEIGHT - BOTTOM + 18.0,
            grouped(mark)
        );
    }
    let _ = writeln!(
        out,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">spans</text>",
        (LEFT + WIDTH - RIGHT) / 2.0,
        HEIGHT - 12.0
    );
    for (n, cost) in costs.iter().enumerate() {
        let colour = COLOURS[n % COLOURS.len()];
        let ours: Vec<(f64, f64)> = cost.points.iter().map(|p| (x(float(p.at)), y(p.ours))).collect();
        let naive: Vec<(f64, f64)> =
            cost.points.iter().filter_map(|p| Some((x(float(p.at)), y(p.naive?)))).collect();
        line(&mut out, &ours, colour, "");
        line(&mut out, &naive, colour, " stroke-dasharray=\"5 4\"");
        let row = TOP + 12.0 + 18.0 * float(n as u64);
        let from = WIDTH - RIGHT + 14.0;
        let _ = writeln!(
            out,
            "<line x1=\"{from}\" x2=\"{:.1}\" y1=\"{:.1}\" y2=\"{:.1}\" stroke=\"{colour}\" stroke-width=\"2\"/>\
             <text x=\"{:.1}\" y=\"{row:.1}\">{}</text>",
            from + 18.0,
            row - 4.0,
            row - 4.0,
            from + 24.0,
            cost.name
        );
    }
    out.push_str("</svg>\n");
    out
}

fn line(out: &mut String, points: &[(f64, f64)], colour: &str, dashes: &str) {
    let path: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    let _ = writeln!(
        out,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dashes}/>",
        path.join(" ")
    );
    for (x, y) in points {
        let _ = writeln!(out, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>");
    }
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
