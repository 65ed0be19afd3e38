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

/// Values of one draft (or other method) by group, each with the ends of its interval.
pub(crate) struct Bars {
    pub(crate) name: String,
    /// Value, lower and upper end; `None` where it was not measured.
    pub(crate) values: Vec<Option<[f64; 3]>>,
}

/// Bars side by side in groups, with intervals, and a line at 1.
pub(crate) fn bars(
    path: &Path,
    title: &str,
    y: &str,
    groups: &[String],
    all: &[Bars],
) -> Result<()> {
    let ends = all.iter().flat_map(|b| b.values.iter().flatten());
    let high = ends
        .map(|v| v[0].max(v[2]))
        .filter(|v| v.is_finite())
        .fold(1.0, f64::max);
    let drawn = || -> Result<(), Box<dyn std::error::Error>> {
        let area = SVGBackend::new(path, (860, 380)).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 17))
            .margin(12)
            .x_label_area_size(30)
            .y_label_area_size(50)
            .build_cartesian_2d(-0.5..groups.len() as f64 - 0.5, 0.0..high * 1.18)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.12))
            .x_labels(groups.len() * 2 + 1)
            .x_label_formatter(&|x| match x.fract() == 0.0 && *x >= 0.0 {
                true => groups.get(*x as usize).cloned().unwrap_or_default(),
                false => String::new(),
            })
            .y_desc(y)
            .y_label_formatter(&|y| format!("{y:.1}"))
            .draw()?;
        let width = 0.84 / all.len().max(1) as f64;
        for (i, bars) in all.iter().enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            let left = |group: usize| group as f64 - 0.42 + i as f64 * width;
            let values = || {
                let known = |(group, v): (usize, &Option<[f64; 3]>)| Some((group, (*v)?));
                bars.values.iter().enumerate().filter_map(known)
            };
            let bar = |(group, v): (usize, [f64; 3])| {
                let x = left(group);
                Rectangle::new([(x, 0.0), (x + width * 0.92, v[0])], colour.filled())
            };
            chart
                .draw_series(values().map(bar))?
                .label(&bars.name)
                .legend(move |(x, y)| {
                    Rectangle::new([(x, y - 5), (x + 12, y + 5)], colour.filled())
                });
            let interval = |(group, v): (usize, [f64; 3])| {
                let x = left(group) + width * 0.46;
                ErrorBar::new_vertical(x, v[1], v[0], v[2], BLACK.mix(0.6).stroke_width(1), 4)
            };
            chart.draw_series(values().filter(|(_, v)| v[1] < v[2]).map(interval))?;
        }
        let ends = [(-0.5, 1.0), (groups.len() as f64 - 0.5, 1.0)];
        chart.draw_series(LineSeries::new(ends, BLACK.stroke_width(1)))?;
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperMiddle)
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.2))
            .draw()?;
        area.present()?;
        Ok(())
    };
    drawn().map_err(|e| anyhow!("{}: {e}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_people_write_them() {
        let said = [0.25, 3.0, 32_768.0, 999_999.0, 4_194_304.0].map(short);
        assert_eq!(said, ["0.25", "3", "33k", "1M", "4.2M"]);
    }

    #[test]
    fn charts_hold_every_series_and_group() {
        let dir = std::env::temp_dir().join(format!("scylla-chart-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("folder");
        let axes = Axes {
            title: "tau",
            x: "tokens",
            y: "tau",
            ratios: true,
        };
        let one = |name: &str, y: f64| Series {
            name: name.into(),
            points: vec![(32.0, y, 0.1), (64.0, y + 0.1, 0.0)],
        };
        let path = dir.join("lines.svg");
        lines(&path, &axes, &[one("first", 1.2), one("second", 1.4)]).expect("drawn");
        let text = std::fs::read_to_string(&path).expect("read");
        assert!(text.contains("first") && text.contains("second"));
        let groups = ["chat", "code"].map(String::from);
        let values = vec![Some([1.2, 1.1, 1.3]), None];
        let name = "suffix".to_string();
        let path = dir.join("bars.svg");
        bars(&path, "speed", "x", &groups, &[Bars { name, values }]).expect("drawn");
        let text = std::fs::read_to_string(&path).expect("read");
        assert!(["chat", "code", "suffix"].iter().all(|w| text.contains(w)));
        std::fs::remove_dir_all(dir).expect("removed");
    }
}
