//! What steps cost: a table of a machine, a device and a target, read from CSV.

use std::collections::BTreeMap;
use std::path::Path;

use scylla_core::files::read_text;
use serde::{Deserialize, Serialize};

use super::roofline::Shapes;
use crate::rows::{at_line, rows};
use crate::stats::median;
use crate::{Error, Result};

/// A part of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum What {
    /// The target's forward.
    Forward,
    /// A level of a draft with a network.
    Draft,
    /// All else: accepting, committing, telling the draft; with a draft also what proposing takes beside its levels.
    Between,
}

/// A measurement.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// The part.
    pub what: What,
    /// Sequences side by side.
    pub batch: usize,
    /// Rows of each: nodes verified, root included, of a forward and between; nodes that a level goes on from, of a draft.
    pub rows: usize,
    /// Committed positions of each.
    pub context: usize,
    /// Layers of the draft; 0 where there is none.
    pub layers: usize,
    /// Seconds that it takes.
    pub seconds: f64,
}

/// The columns.
pub(super) const HEADER: &str = "what,batch,rows,context,layers,seconds";

/// What the comment line begins with that says the target's shapes.
pub(super) const SHAPES: &str = "target: ";

/// Sizes: context, batch, rows.
pub(super) type Sizes = [f64; 3];

/// What parts cost by their sizes. Where a forward was measured several times the least counts, which is what a quiet machine takes;
/// of all else, which are differences of times, the median.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CostTable {
    parts: BTreeMap<(What, usize), Vec<(Sizes, f64)>>,
    /// What the file says of where it was measured: its comment lines.
    pub about: Vec<String>,
}

/// A value between points, in proportion; below the first as the first, beyond the last as between the last two, not falling.
fn along(points: &[(f64, f64)], at: f64) -> Option<f64> {
    let (&(first, low), &(last, high)) = (points.first()?, points.last()?);
    if at <= first {
        return Some(low);
    }
    if at >= last {
        let slope = match points {
            [.., (x, y), _] => (high - y) / (last - x),
            _ => 0.0,
        };
        return Some(high + slope.max(0.0) * (at - last));
    }
    let after = points.partition_point(|p| p.0 < at);
    let ((x0, y0), (x1, y1)) = (points[after - 1], points[after]);
    Some(y0 + (y1 - y0) * (at - x0) / (x1 - x0))
}

/// The same over several sizes, the first outermost; points are in order.
fn within(points: &[(Sizes, f64)], at: Sizes, axis: usize) -> Option<f64> {
    if axis == at.len() {
        return points.first().map(|p| p.1);
    }
    let groups = points.chunk_by(|a, b| a.0[axis] == b.0[axis]);
    let groups: Option<Vec<(f64, f64)>> = groups
        .map(|group| Some((group[0].0[axis], within(group, at, axis + 1)?)))
        .collect();
    along(&groups?, at[axis])
}

impl CostTable {
    /// Of measurements.
    pub fn new(costs: &[Cost], about: Vec<String>) -> Self {
        let mut all: BTreeMap<(What, usize), BTreeMap<[usize; 3], Vec<f64>>> = BTreeMap::new();
        for cost in costs {
            let sizes = [cost.context, cost.batch, cost.rows];
            let of = all.entry((cost.what, cost.layers)).or_default();
            of.entry(sizes).or_default().push(cost.seconds);
        }
        let one = |what: What, seconds: Vec<f64>| match what {
            What::Forward => seconds.into_iter().fold(f64::INFINITY, f64::min),
            What::Draft | What::Between => median(&seconds),
        };
        let parts = all.into_iter().map(|(part, of)| {
            let of = of.into_iter();
            let of = of.map(|(sizes, seconds)| (sizes.map(|s| s as f64), one(part.0, seconds)));
            (part, of.collect())
        });
        Self {
            parts: parts.collect(),
            about,
        }
    }

    /// From a file with the header `what,batch,rows,context,layers,seconds`; lines that begin with `#` say where it was measured.
    /// In such a file a last line that was cut off is left out.
    ///
    /// # Errors
    /// With the line, if it is none, or holds no forward.
    pub fn read(path: &Path) -> Result<Self> {
        let text = read_text(path)?;
        let (costs, about) = costs(path, &text)?;
        let table = Self::new(&costs, about);
        match table.parts.contains_key(&(What::Forward, 0)) {
            true => Ok(table),
            false => Err(Error::file(
                path,
                "holds no forward: lines of forward,BATCH,ROWS,CONTEXT,0,SECONDS are meant",
            )),
        }
    }

    /// Depths of drafts that it knows.
    pub fn layers(&self) -> Vec<usize> {
        let draft = |&(what, layers): &(What, usize)| (what == What::Draft).then_some(layers);
        self.parts.keys().filter_map(draft).collect()
    }

    /// Batches whose forwards it knows.
    pub fn batches(&self) -> Vec<usize> {
        let points = self.parts.get(&(What::Forward, 0));
        let points = points.map_or(&[][..], |p| p);
        let mut all: Vec<usize> = points.iter().map(|(sizes, _)| sizes[1] as usize).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Forwards that were measured: context, batch and rows, and their least seconds.
    pub(super) fn forwards(&self) -> impl Iterator<Item = (Sizes, f64)> + '_ {
        self.parts
            .get(&(What::Forward, 0))
            .into_iter()
            .flatten()
            .copied()
    }

    /// Shapes of the target, where the file says them.
    pub fn shapes(&self) -> Option<Shapes> {
        let said = self.about.iter().find_map(|line| line.strip_prefix(SHAPES));
        said.and_then(|json| serde_json::from_str(json).ok())
    }

    fn of(&self, what: What, layers: usize, at: Sizes) -> Option<f64> {
        if let Some(points) = self.parts.get(&(what, layers)) {
            return within(points, at, 0);
        }
        // Between and beyond depths that are known, in proportion; one alone tells nothing of another.
        let known = self.parts.iter().filter(|((w, l), _)| *w == what && *l > 0);
        let known: Option<Vec<(f64, f64)>> = known
            .map(|((_, l), points)| Some((*l as f64, within(points, at, 0)?)))
            .collect();
        let known = known.filter(|k| k.len() > 1)?;
        along(&known, layers as f64)
    }

    /// Seconds of a forward of `rows` rows for each of `batch` sequences.
    pub fn forward(&self, batch: usize, rows: f64, context: usize) -> Option<f64> {
        self.of(What::Forward, 0, [context as f64, batch as f64, rows])
    }

    /// Seconds of a level of a draft of `layers` layers. `None` where that depth is not known.
    pub fn draft(&self, layers: usize, batch: usize, rows: f64, context: usize) -> Option<f64> {
        self.of(What::Draft, layers, [context as f64, batch as f64, rows])
    }

    /// Seconds of all else in a cycle; of a depth that was not measured as of any, and 0 where nothing was.
    pub fn between(&self, layers: usize, batch: usize, rows: f64, context: usize) -> f64 {
        let at = [context as f64, batch as f64, rows];
        let own = self.of(What::Between, layers, at);
        let any = || {
            let mut others = self.parts.iter().filter(|((w, _), _)| *w == What::Between);
            others.find_map(|(_, points)| within(points, at, 0))
        };
        own.or_else(any).unwrap_or(0.0)
    }
}

/// Measurements, and comment lines.
pub(super) fn costs(path: &Path, text: &str) -> Result<(Vec<Cost>, Vec<String>)> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    // Lines that `measure` wrote all end: a last one that does not was cut off, be its number readable or not.
    let written = |line: &str| {
        line.strip_prefix("# ")
            .is_some_and(|l| l.starts_with(SHAPES))
    };
    let text = match text.lines().any(written) {
        true => &text[..text.rfind('\n').map_or(0, |end| end + 1)],
        false => text,
    };
    let about = text.lines().filter_map(|line| line.strip_prefix('#'));
    let about = about.map(|line| line.trim().to_string()).collect();
    let columns: Vec<&str> = HEADER.split(',').collect();
    let all: Vec<(u64, Cost)> = rows(path, text, &columns, HEADER)?;
    for (line, cost) in &all {
        let Cost {
            what,
            batch,
            rows,
            layers,
            seconds,
            ..
        } = *cost;
        let wrong = match what {
            _ if batch == 0 => Some("batch is 0".to_string()),
            _ if rows == 0 => Some("rows is 0".to_string()),
            What::Forward if seconds == 0.0 => Some("a forward of 0 seconds".into()),
            _ if !(seconds.is_finite() && seconds >= 0.0) => Some(format!("seconds is {seconds}")),
            What::Forward if layers != 0 => Some(format!(
                "layers is {layers}; a forward is the target's, with 0"
            )),
            What::Draft if layers == 0 => Some("layers is 0; a draft has one at least".into()),
            _ => None,
        };
        if let Some(wrong) = wrong {
            return Err(at_line(path, *line, wrong));
        }
    }
    Ok((all.into_iter().map(|(_, cost)| cost).collect(), about))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(what: What, batch: usize, rows: usize, layers: usize, ms: f64) -> Cost {
        Cost {
            what,
            batch,
            rows,
            context: 100,
            layers,
            seconds: ms / 1e3,
        }
    }

    #[test]
    fn between_measured_sizes_a_cost_is_in_proportion() {
        let costs = [
            cost(What::Forward, 1, 1, 0, 3.0),
            cost(What::Forward, 1, 1, 0, 9.0),
            cost(What::Forward, 1, 1, 0, 2.0),
            cost(What::Forward, 1, 5, 0, 4.0),
            cost(What::Forward, 4, 1, 0, 5.0),
            cost(What::Forward, 4, 5, 0, 15.0),
            cost(What::Draft, 1, 1, 1, 0.3),
            cost(What::Draft, 1, 1, 2, 0.4),
            cost(What::Between, 1, 1, 0, 0.1),
        ];
        let table = CostTable::new(&costs, Vec::new());
        let ms = |seconds: Option<f64>| seconds.expect("known") * 1e3;
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} for {b}");
        close(ms(table.forward(1, 1.0, 100)), 2.0);
        close(ms(table.forward(1, 3.0, 7)), 3.0);
        close(ms(table.forward(1, 9.0, 100)), 6.0);
        close(ms(table.forward(2, 3.0, 100)), 3.0 + 7.0 / 3.0);
        close(ms(table.draft(4, 1, 1.0, 100)), 0.6);
        close(table.between(3, 8, 2.0, 100) * 1e3, 0.1);
        assert_eq!(table.layers(), [1, 2]);
        assert_eq!(table.batches(), [1, 4]);
        let one = CostTable::new(&costs[..7], Vec::new());
        assert_eq!(one.draft(4, 1, 1.0, 100), None);
    }

    #[test]
    fn a_line_that_is_none_is_told_and_a_last_one_that_was_cut_off_is_left() {
        let path = Path::new("costs.csv");
        let read = |lines: &str| costs(path, &format!("# here\n# {SHAPES}{{}}\n{HEADER}\n{lines}"));
        let whole = read("forward,1,1,64,0,0.002\n").expect("read");
        let about = ["here".to_string(), format!("{SHAPES}{{}}")];
        assert_eq!((whole.0.len(), &*whole.1), (1, &about[..]));
        // Somebody else's need not end.
        let other = format!("# here\n{HEADER}\nforward,1,1,64,0,0.002\nforward,1,2,64,0,0.003");
        assert_eq!(costs(path, &other).expect("read").0.len(), 2);
        for cut in ["forward,1,2", "forward,1,2,64,0,0.00"] {
            let lines = format!("forward,1,1,64,0,0.002\n{cut}");
            assert_eq!(read(&lines).expect("read").0.len(), 1);
        }
        for (lines, expected) in [
            ("forward,1,2\nforward,1,1,64,0,0.002\n", "line 4"),
            ("forward,0,1,64,0,0.002\n", "line 4: batch is 0"),
            ("forward,1,1,64,2,0.002\n", "line 4: layers is 2"),
            ("draft,1,1,64,0,0.002\n", "line 4: layers is 0"),
            ("forward,1,1,64,0,-1\n", "line 4: seconds is -1"),
            (
                "backward,1,1,64,0,1\n",
                "line 4: unknown variant `backward`",
            ),
        ] {
            let error = read(lines).expect_err("no table").to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
