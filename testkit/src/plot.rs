//! Pictures of what the benchmarks measure: lines over marks on a logarithmic scale, and bars.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result};

/// Writes a picture into a file.
///
/// # Errors
/// When the file cannot be written; the error names it.
pub fn save(path: &Path, svg: String) -> Result<()> {
    std::fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))
}

/// Size of every picture, and what is left free for texts.
const WIDTH: f64 = 960.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 390.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 50.0;
/// Height of a picture with lines.
const HEIGHT: f64 = 560.0;
/// Height of a bar and its distance to the next one.
const BAR: f64 = 26.0;
/// Readable beside each other, also for those who see few colours.
const COLOURS: [&str; 10] = [
    "#1b6ca8", "#d1495b", "#2e8b57", "#b8860b", "#6a4c93", "#008b8b", "#8b4513", "#444444", "#c71585",
    "#708090",
];

/// A line of a [`Chart`].
#[derive(Clone, Debug)]
pub struct Line {
    /// Stands in the legend; a line without a name has none there.
    pub name: String,
    /// Number of a colour; they come again after ten.
    pub colour: usize,
    /// Drawn dashed.
    pub dashed: bool,
    /// Place and value; values are larger than zero.
    pub points: Vec<(f64, f64)>,
}

/// Lines over places, with a logarithmic scale of values.
#[derive(Clone, Debug)]
pub struct Chart<'a> {
    /// Stands above.
    pub title: &'a str,
    /// Stands below.
    pub places: &'a str,
    /// Places that have a name.
    pub marks: Vec<(f64, String)>,
    /// Names a value that is a power of ten, by its exponent.
    pub value: fn(f64) -> String,
    /// What is drawn.
    pub lines: Vec<Line>,
}

/// Least and most of some numbers; one apart when they are all the same.
fn range(numbers: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) =
        numbers.fold((f64::MAX, f64::MIN), |(low, high), number| (low.min(number), high.max(number)));
    if low < high {
        (low, high)
    } else if low > high {
        (0.0, 1.0)
    } else {
        (low, low + 1.0)
    }
}

fn begin(title: &str, height: f64) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"22\" font-size=\"15\">{title}</text>\n"
    )
}

fn colour(number: usize) -> &'static str {
    COLOURS[number % COLOURS.len()]
}

impl Chart<'_> {
    /// The picture, as SVG.
    #[must_use]
    pub fn svg(&self) -> String {
        let points = || self.lines.iter().flat_map(|line| &line.points);
        let (x_low, x_high) = range(points().map(|(place, _)| *place));
        let (y_low, y_high) = range(points().map(|(_, value)| value.log10()));
        let (y_low, y_high) = (y_low.floor(), y_high.ceil());
        let x = |place: f64| LEFT + (place - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT);
        let y = |power: f64| {
            HEIGHT - BOTTOM - (power - y_low) / (y_high - y_low).max(1.0) * (HEIGHT - TOP - BOTTOM)
        };
        let mut out = begin(self.title, HEIGHT);
        let mut power = y_low;
        while power <= y_high {
            let at = y(power);
            let _ = writeln!(
                out,
                "<line x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#dddddd\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                WIDTH - RIGHT,
                LEFT - 6.0,
                at + 4.0,
                (self.value)(power)
            );
            power += 1.0;
        }
        for (place, name) in &self.marks {
            let at = x(*place);
            let _ = writeln!(
                out,
                "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{:.1}\" stroke=\"#dddddd\"/>\
                 <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{name}</text>",
                HEIGHT - BOTTOM,
                HEIGHT - BOTTOM + 18.0
            );
        }
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            (LEFT + WIDTH - RIGHT) / 2.0,
            HEIGHT - 12.0,
            self.places
        );
        let mut row = TOP + 12.0;
        for line in &self.lines {
            let points: Vec<(f64, f64)> =
                line.points.iter().map(|(place, value)| (x(*place), y(value.log10()))).collect();
            draw(&mut out, line, &points);
            if !line.name.is_empty() {
                legend(&mut out, line, row);
                row += 18.0;
            }
        }
        out.push_str("</svg>\n");
        out
    }
}

fn dashes(line: &Line) -> &'static str {
    if line.dashed { " stroke-dasharray=\"5 4\"" } else { "" }
}

fn draw(out: &mut String, line: &Line, points: &[(f64, f64)]) {
    let path: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    let (colour, dashes) = (colour(line.colour), dashes(line));
    let _ = writeln!(
        out,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dashes}/>",
        path.join(" ")
    );
    for (x, y) in points {
        let _ = writeln!(out, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>");
    }
}

fn legend(out: &mut String, line: &Line, row: f64) {
    let from = WIDTH - RIGHT + 14.0;
    let _ = writeln!(
        out,
        "<line x1=\"{from}\" x2=\"{:.1}\" y1=\"{:.1}\" y2=\"{:.1}\" stroke=\"{}\" stroke-width=\"2\"{}/>\
         <text x=\"{:.1}\" y=\"{row:.1}\">{}</text>",
        from + 18.0,
        row - 4.0,
        row - 4.0,
        colour(line.colour),
        dashes(line),
        from + 24.0,
        line.name
    );
}

/// A bar of a picture.
#[derive(Clone, Debug)]
pub struct Bar {
    /// Stands before it.
    pub name: String,
    /// Its length.
    pub value: f64,
    /// Stands behind it.
    pub text: String,
    /// Number of a colour.
    pub colour: usize,
}

/// Bars below each other, as SVG.
#[must_use]
pub fn bars(title: &str, bars: &[Bar]) -> String {
    let height = TOP + bars.iter().map(|_| BAR).sum::<f64>() + 20.0;
    let most = bars.iter().map(|bar| bar.value).fold(f64::EPSILON, f64::max);
    let (from, longest) = (LEFT + 200.0, WIDTH - LEFT - 420.0);
    let mut out = begin(title, height);
    let mut row = TOP;
    for bar in bars {
        let length = bar.value.max(0.0) / most * longest;
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
             <rect x=\"{from}\" y=\"{:.1}\" width=\"{length:.1}\" height=\"{:.1}\" fill=\"{}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            from - 8.0,
            row + BAR / 2.0 + 4.0,
            bar.name,
            row + 3.0,
            BAR - 6.0,
            colour(bar.colour),
            from + length + 8.0,
            row + BAR / 2.0 + 4.0,
            bar.text
        );
        row += BAR;
    }
    out.push_str("</svg>\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_their_places_and_their_names() {
        let line = |name: &str, dashed, points: &[(f64, f64)]| Line {
            name: name.into(),
            colour: 1,
            dashed,
            points: points.to_vec(),
        };
        let chart = Chart {
            title: "two lines",
            places: "places",
            marks: vec![(0.0, "here".into()), (1.0, "there".into())],
            value: |power| format!("1e{power}"),
            lines: vec![line("one", false, &[(0.0, 10.0), (1.0, 1000.0)]), line("", true, &[(0.0, 100.0)])],
        };
        let svg = chart.svg();
        assert_eq!((svg.matches("<polyline").count(), svg.matches("5 4").count()), (2, 1));
        assert!(svg.contains("there") && svg.contains("1e3") && svg.contains(">one<"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        let nothing = Chart { lines: Vec::new(), marks: Vec::new(), ..chart }.svg();
        assert!(!nothing.contains("NaN") && !nothing.contains("inf"));
    }

    #[test]
    fn the_largest_bar_is_the_longest() {
        let bar = |name: &str, value| Bar { name: name.into(), value, text: format!("{value}"), colour: 0 };
        let svg = bars("bars", &[bar("small", 1.0), bar("large", 4.0)]);
        assert!(svg.contains("width=\"117.5\"") && svg.contains("width=\"470.0\""), "{svg}");
        assert!(bars("none", &[]).ends_with("</svg>\n"));
    }
}
