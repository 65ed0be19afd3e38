//! What a run has shown until now: acceptance by depth, and the time that steps take.

use std::collections::{BTreeMap, VecDeque};

use crate::engine::Step;
use crate::tree::Tree;

/// How trees fared by depth, the older the less.
#[derive(Debug, Clone)]
pub struct Acceptance {
    /// What a cycle still counts after the next one.
    keeps: f64,
    levels: Vec<Level>,
}

/// Sums over cycles, of one depth.
#[derive(Debug, Clone, Copy, Default)]
struct Level {
    /// Cycles whose budget reached this deep.
    allowed: f64,
    /// Nodes that were drafted there.
    nodes: f64,
    /// Cycles in which a node there was accepted.
    accepted: f64,
}

impl Default for Acceptance {
    fn default() -> Self {
        Self::remembering(30.0)
    }
}

impl Acceptance {
    /// One that remembers about so many cycles.
    pub fn remembering(cycles: f64) -> Self {
        Self {
            keeps: 1.0 - 1.0 / cycles.max(1.0),
            levels: Vec::new(),
        }
    }

    /// Counts a cycle whose budget reached `levels` deep.
    pub fn add(&mut self, levels: usize, tree: &Tree, accepted: usize) {
        let mut nodes = vec![0usize; levels];
        for depth in tree.depths().into_iter().filter(|&depth| depth > 0) {
            if let Some(nodes) = nodes.get_mut(depth - 1) {
                *nodes += 1;
            }
        }
        if self.levels.len() < levels {
            self.levels.resize(levels, Level::default());
        }
        for (depth, level) in self.levels.iter_mut().enumerate() {
            // Depths that were not allowed fade, so that what is believed of them does not stay for ever.
            let (allowed, nodes) = (f64::from(u8::from(depth < levels)), nodes.get(depth));
            *level = Level {
                allowed: level.allowed * self.keeps + allowed,
                nodes: level.nodes * self.keeps + nodes.map_or(0.0, |&n| n as f64),
                accepted: level.accepted * self.keeps + f64::from(u8::from(accepted > depth)),
            };
        }
    }

    /// Expected nodes at a depth and probability that one of them is accepted, of a cycle whose budget reaches so deep:
    /// what was seen, and `prior` as if it had been seen in `weight` cycles.
    pub fn at(&self, depth: usize, prior: (f64, f64), weight: f64) -> (f64, f64) {
        let l = self.levels.get(depth).copied().unwrap_or_default();
        let mean = |sum: f64, prior: f64| (sum + weight * prior) / (l.allowed + weight);
        (mean(l.nodes, prior.0), mean(l.accepted, prior.1))
    }
}

/// Time by size of the work, as measured lately.
#[derive(Debug, Clone, Default)]
pub struct Curve {
    /// By size: the latest measurements, and the step of the last.
    points: BTreeMap<usize, (VecDeque<f64>, u64)>,
}

/// Measurements kept of one size; their median is what counts.
const KEPT: usize = 9;
/// Steps after which a size that did not occur again is forgotten, so that one bad measurement does not count for ever.
const FORGOTTEN: u64 = 512;

impl Curve {
    /// Adds a measurement, in milliseconds.
    pub fn add(&mut self, size: usize, ms: f64, step: u64) {
        let (times, last) = self.points.entry(size).or_default();
        times.push_back(ms);
        if times.len() > KEPT {
            times.pop_front();
        }
        *last = step;
        // One size is always left to go by.
        self.points.retain(|_, (_, last)| *last + FORGOTTEN > step);
    }

    /// Expected milliseconds. Between sizes that were measured in proportion; beyond them it is taken to cost what the
    /// nearest does, so that what was never tried looks worth a try. `None` before the first measurement.
    pub fn at(&self, size: usize) -> Option<f64> {
        let below = self.points.range(..=size).next_back();
        let above = self.points.range(size..).next();
        let middle = |(_, (times, _)): (&usize, &(VecDeque<f64>, u64))| median(times);
        match (below, above) {
            (None, None) => None,
            (Some(one), None) | (None, Some(one)) => Some(middle(one)),
            (Some(below), Some(above)) if below.0 == above.0 => Some(middle(below)),
            (Some(below), Some(above)) => {
                let share = (size - below.0) as f64 / (above.0 - below.0) as f64;
                let (low, high) = (middle(below), middle(above));
                Some(low + (high - low).max(0.0) * share)
            }
        }
    }
}

fn median(times: &VecDeque<f64>) -> f64 {
    let mut sorted: Vec<f64> = times.iter().copied().collect();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

/// Forwards that are remembered, and after how many more one counts half.
const REMEMBERED: usize = 512;
const HALF: f64 = 150.0;

/// Time of forwards by rows, as a line through those of lately. Times on a shared machine differ by a third from one step to
/// the next: what one more row costs shows only over many of them.
#[derive(Debug, Clone, Default)]
pub struct Line {
    /// Rows, milliseconds and step.
    seen: VecDeque<(f64, f64, u64)>,
}

impl Line {
    /// Adds a measurement.
    pub fn add(&mut self, rows: usize, ms: f64, step: u64) {
        self.seen.push_back((rows as f64, ms, step));
        if self.seen.len() > REMEMBERED {
            self.seen.pop_front();
        }
    }

    /// Milliseconds of no rows and of each more, for forwards of `low` to `high` rows: the best line through those of about
    /// that size, the older the less, without what lies far off. Rows are taken to cost nothing until some were seen to.
    /// `None` before the first.
    pub fn fit(&self, low: f64, high: f64) -> Option<(f64, f64)> {
        let last = self.seen.back()?.2;
        let about = |rows: f64| (low / 2.0..=high * 2.0).contains(&rows);
        let mut near: Vec<(f64, f64, f64)> = self
            .seen
            .iter()
            .filter(|(rows, ..)| about(*rows))
            .map(|&(rows, ms, step)| (rows, ms, 0.5f64.powf((last - step.min(last)) as f64 / HALF)))
            .collect();
        let spread = ((high - low) / 2.0).powi(2);
        let mut line = through(&near, spread)?;
        let mut off: Vec<f64> = near
            .iter()
            .map(|(x, y, _)| (y - line.0 - line.1 * x).abs())
            .collect();
        off.sort_by(f64::total_cmp);
        let most = 3.0 * off[off.len() / 2];
        near.retain(|(x, y, _)| (y - line.0 - line.1 * x).abs() <= most);
        if let Some(again) = through(&near, spread) {
            line = again;
        }
        Some(line)
    }
}

/// The line of least squares through weighted points; a slope is believed as far as it was seen.
fn through(points: &[(f64, f64, f64)], spread: f64) -> Option<(f64, f64)> {
    let total: f64 = points.iter().map(|p| p.2).sum();
    if total <= 0.0 {
        return None;
    }
    let mean =
        |of: fn(&(f64, f64, f64)) -> f64| points.iter().map(|p| p.2 * of(p)).sum::<f64>() / total;
    let (x, y) = (mean(|p| p.0), mean(|p| p.1));
    let sums = points.iter().fold((0.0, 0.0), |(xx, xy), p| {
        (
            xx + p.2 * (p.0 - x).powi(2),
            xy + p.2 * (p.0 - x) * (p.1 - y),
        )
    });
    let slope = match sums.0 + 0.5 * spread {
        0.0 => 0.0,
        whole => (sums.1 / whole).max(0.0),
    };
    Some((y - slope * x, slope))
}

/// What steps cost, by phase.
#[derive(Debug, Clone, Default)]
pub struct Costs {
    /// The target's forward by rows, those of prompts included.
    pub forward: Line,
    /// Proposing by the levels that were allowed, for all requests of a step together.
    pub propose: Curve,
    /// The rule, keeping rows and text, and what the draft learns, by requests.
    pub others: Curve,
}

impl Costs {
    /// Learns from a step.
    pub fn add(&mut self, step: &Step) {
        let rows = step.rows + step.prompt_rows;
        if rows > 0 {
            self.forward.add(rows, step.ms.forward, step.step);
        }
        if step.batch > 0 {
            self.propose.add(step.levels, step.proposing_ms, step.step);
        }
        if step.batch > 0 && step.prompts == 0 {
            let learning = step.ms.propose - step.proposing_ms;
            let others = learning + step.ms.accept + step.ms.commit;
            self.others.add(step.batch, others, step.step);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acceptance_is_of_cycles_that_reached_the_depth() {
        let mut seen = Acceptance::remembering(1e9);
        let chain = |n: usize| Tree::chain(0, &vec![1; n]);
        seen.add(2, &chain(2), 1);
        seen.add(2, &chain(0), 0);
        seen.add(1, &chain(1), 1);
        let (nodes, accepted) = seen.at(0, (0.0, 0.0), 0.0);
        assert!((nodes - 2.0 / 3.0).abs() < 1e-6 && (accepted - 2.0 / 3.0).abs() < 1e-6);
        let (nodes, accepted) = seen.at(1, (0.0, 0.0), 0.0);
        assert!((nodes - 0.5).abs() < 1e-6 && accepted == 0.0);
        assert_eq!(
            seen.at(2, (0.5, 0.25), 1.0),
            (0.5, 0.25),
            "nothing seen: the prior"
        );
    }

    #[test]
    fn a_line_is_found_in_noise_and_forgets_what_is_long_ago() {
        let mut line = Line::default();
        assert_eq!(line.fit(1.0, 4.0), None);
        for step in 0..400u64 {
            // Of one row before, and twice as slow since; every tenth was held up.
            let rows = 1 + (step * 7 % 5) as usize;
            let slow = if step < 200 { 0.5 } else { 1.0 };
            let noise = 1.0 + 0.2 * ((step * 13 % 11) as f64 / 5.0 - 1.0);
            let held = if step % 10 == 3 { 5.0 } else { 1.0 };
            line.add(rows, (2.0 + 0.5 * rows as f64) * slow * noise * held, step);
        }
        line.add(500, 400.0, 400); // of another size
        let (none, each) = line.fit(1.0, 5.0).expect("a line");
        let five = none + 5.0 * each;
        assert!(
            (3.2..4.8).contains(&five) && (0.25..0.65).contains(&each),
            "{none} {each}"
        );
        let mut one = Line::default();
        one.add(1, 3.0, 0);
        assert_eq!(
            one.fit(1.0, 8.0),
            Some((3.0, 0.0)),
            "nothing is known of more rows"
        );
    }

    #[test]
    fn a_curve_is_the_median_between_what_was_measured_and_flat_beyond() {
        let mut curve = Curve::default();
        assert_eq!(curve.at(3), None);
        for ms in [1.0, 50.0, 1.0] {
            curve.add(1, ms, 1);
        }
        curve.add(5, 3.0, 2);
        let found: Vec<f64> = [1, 3, 5, 9].iter().filter_map(|&n| curve.at(n)).collect();
        assert_eq!(found, [1.0, 2.0, 3.0, 3.0]);
        curve.add(1, 1.0, 600);
        assert_eq!(curve.at(5), Some(1.0), "what five took is forgotten");
    }
}
