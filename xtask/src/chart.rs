//! Charts as SVG, small and legible on light and dark pages.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

/// One line of a chart.
pub(crate) struct Series {
    pub(crate) name: String,
    /// x, y, and half the height of its error bar.
    pub(crate) points: Vec<(f64, f64, f64)>,
}

/// What a chart says beside its lines.
pub(crate) struct Axes<'a> {
    pub(crate) title: &'a str,
    pub(crate) x: &'a str,
    pub(crate) y: &'a str,
    /// Whether equal distances on x are equal ratios.
    pub(crate) ratios: bool,
}

/// Colours that can be told apart with most kinds of colour vision (Okabe and Ito).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(90, 90, 90),
];

/// The smallest and largest of values, a little apart.
fn range(values: impl Iterator<Item = f64>, margin: f64) -> (f64, f64) {
    let (low, high) = values
        .filter(|v| v.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| {
            (a.min(v), b.max(v))
        });
    let room = (high - low).max(1e-9) * margin;
    (low - room, high + room)
}

/// A number of tokens, or any other, as people write it.
fn short(x: f64) -> String {
    match x {
        x if x >= 999_500.0 => format!("{}M", (x / 1e5).round() / 10.0),
        x if x >= 999.5 => format!("{}k", (x / 1e3).round()),
        x => format!("{}", (x * 100.0).round() / 100.0),
    }
}

/// Lines with points and error bars.
pub(crate) fn lines(path: &Path, axes: &Axes<'_>, series: &[Series]) -> Result<()> {
    let all = || series.iter().flat_map(|s| &s.points);
    let place = |x: f64| if axes.ratios { x.log2() } else { x };
    if all().next().is_none() {
        return Ok(());
    }
    let (left, right) = range(all().map(|p| place(p.0)), 0.04);
    let ends = all().flat_map(|p| [p.1 - p.2, p.1 + p.2]);
    let (low, high) = range(ends, 0.06);
    let name = |x: &f64| short(if axes.ratios { x.exp2() } else { *x });
    let drawn = || -> Result<(), Box<dyn std::error::Error>> {
        let area = SVGBackend::new(path, (760, 440)).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(axes.title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(42)
            .y_label_area_size(54)
            .build_cartesian_2d(left..right, low..high)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.12))
            .x_desc(axes.x)
            .y_desc(axes.y)
            .x_label_formatter(&name)
            .y_label_formatter(&|y| format!("{y:.2}"))
            .draw()?;
        for (i, s) in series.iter().enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            let points = || s.points.iter().map(|&(x, y, e)| (place(x), y, e));
            chart
                .draw_series(LineSeries::new(
                    points().map(|(x, y, _)| (x, y)),
                    colour.stroke_width(2),
                ))?
                .label(&s.name)
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2))
                });
            let bar =
                |(x, y, e)| ErrorBar::new_vertical(x, y - e, y, y + e, colour.stroke_width(1), 6);
            chart.draw_series(points().filter(|p| p.2 > 0.0).map(bar))?;
            let dot = |(x, y, _)| Circle::new((x, y), 3, colour.filled());
            chart.draw_series(points().map(dot))?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.2))
            .draw()?;
        area.present()?;
        Ok(())
    };
    drawn().map_err(|e| anyhow!("{}: {e}", path.display()))
}
