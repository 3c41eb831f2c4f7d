//! The lag over time as a picture, one for each fault, every round a line.

use std::fmt::Write as _;

use crate::report::Series;

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 46.0;
const BOTTOM: f64 = 40.0;
/// The scale begins here, in seconds: what is below is the distance of two beats.
const LOWEST: f64 = 0.03;

/// The picture of a fault; nothing when it was not run.
pub(crate) fn svg(series: &Series) -> Option<String> {
    let rounds = &series.rounds;
    // The first event of each round is at zero.
    let zero = |n: usize| rounds[n].marks.first().map_or(0.0, |(at, _)| *at);
    let times =
        || rounds.iter().enumerate().flat_map(|(n, r)| r.samples.iter().map(move |(at, _)| at - zero(n)));
    let (first, last) = (times().fold(f64::MAX, f64::min), times().fold(f64::MIN, f64::max));
    if first >= last {
        return None;
    }
    let most = rounds.iter().map(|round| round.highest).fold(10.0, f64::max);
    let x = |at: f64| LEFT + (at - first) / (last - first) * (WIDTH - LEFT - RIGHT);
    let y = |lag: f64| {
        let part = (lag.max(LOWEST) / LOWEST).ln() / (most / LOWEST).ln();
        HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)
    };
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"20\" font-size=\"15\">Lag while {}: {} rounds</text>\n",
        series.fault.what,
        rounds.len()
    );
    for lag in [0.1, 1.0, 10.0, 100.0] {
        if lag <= most {
            let at = y(lag);
            let _ = writeln!(
                out,
                "<line x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#dddddd\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{lag} s</text>",
                WIDTH - RIGHT,
                LEFT - 6.0,
                at + 4.0
            );
        }
    }
    let step = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]
        .into_iter()
        .find(|step| (last - first) / step <= 16.0)
        .unwrap_or(100.0);
    let mut tick = (first / step).ceil() * step;
    while tick <= last {
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{tick} s</text>",
            x(tick),
            HEIGHT - BOTTOM + 18.0
        );
        tick += step;
    }
    if let Some(round) = rounds.first() {
        for (at, what) in &round.marks {
            let at = x(at - zero(0));
            let _ = writeln!(
                out,
                "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{:.1}\" stroke=\"#d1495b\" stroke-dasharray=\"3 3\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" fill=\"#d1495b\" font-size=\"11\">{what}</text>",
                HEIGHT - BOTTOM,
                at + 3.0,
                TOP - 6.0
            );
        }
    }
    for (n, round) in rounds.iter().enumerate() {
        let path: Vec<String> =
            round.samples.iter().map(|(at, lag)| format!("{:.1},{:.1}", x(at - zero(n)), y(*lag))).collect();
        let _ = writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"#1b6ca8\" stroke-width=\"1.2\" stroke-opacity=\"0.55\"/>",
            path.join(" ")
        );
    }
    out.push_str("</svg>\n");
    Some(out)
}
