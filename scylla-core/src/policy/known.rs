//! What a step costs on a machine, known before the first.

use serde::{Deserialize, Serialize};

/// Milliseconds of a step, as they were measured on a machine beforehand. More is taken never to cost less.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StepTimes {
    /// Of the target's forward, by rows, ascending.
    pub forward: Vec<(usize, f64)>,
    /// Of proposing for one request, by the levels that are allowed, ascending.
    pub propose: Vec<(usize, f64)>,
    /// How many times as long it takes for so many requests, whose levels drafts run side by side, ascending; as long where nothing
    /// is said.
    #[serde(default)]
    pub several: Vec<(usize, f64)>,
    /// Of all else, of each request: the rule, keeping rows and text, and what the draft learns.
    pub others: f64,
}

impl StepTimes {
    /// Whether they can be gone by: some forward was measured, sizes rise, times are numbers above zero.
    pub fn is_sound(&self) -> bool {
        let rises = |of: &[(usize, f64)]| of.windows(2).all(|w| w[0].0 < w[1].0);
        let time = |ms: f64| ms.is_finite() && ms >= 0.0;
        let forward = &self.forward;
        !forward.is_empty()
            && rises(forward)
            && rises(&self.propose)
            && rises(&self.several)
            && self
                .several
                .iter()
                .all(|&(_, times)| time(times) && times >= 1.0)
            && forward.iter().all(|&(_, ms)| time(ms) && ms > 0.0)
            && self.propose.iter().all(|&(_, ms)| time(ms))
            && time(self.others)
    }

    /// Of a step of so many requests and rows, the deepest budget of which has so many levels.
    pub fn of(&self, requests: usize, rows: f64, levels: usize) -> f64 {
        let others = self.others * requests as f64;
        let propose = along(&self.propose, levels as f64) * self.times(requests);
        along(&self.forward, rows) + propose + others
    }

    /// How many times as long as for one request it takes to propose for so many.
    fn times(&self, requests: usize) -> f64 {
        along(&self.several, requests as f64).max(1.0)
    }

    /// What a level of drafting behind the first takes of each of so many requests, on average over those that were measured.
    pub fn level(&self, requests: usize) -> f64 {
        let share = self.times(requests) / requests.max(1) as f64;
        let mut levels = self.propose.iter().filter(|(levels, _)| *levels > 0);
        match (levels.next(), levels.next_back()) {
            (Some(first), Some(last)) => {
                share * (last.1 - first.1).max(0.0) / (last.0 - first.0) as f64
            }
            _ => 0.0,
        }
    }

    /// What a forward of so many rows costs over one of one row.
    pub fn ratio(&self, rows: usize) -> f64 {
        along(&self.forward, rows as f64) / along(&self.forward, 1.0)
    }
}

/// The time of a size: between measured ones in proportion, below the first as the first, and beyond the last as between the
/// last two. 0 where nothing was measured.
fn along(points: &[(usize, f64)], at: f64) -> f64 {
    let Some(&(first, mut low)) = points.first() else {
        return 0.0;
    };
    let (mut from, mut slope) = (first as f64, 0.0);
    for &(size, ms) in &points[1..] {
        if at <= from {
            break;
        }
        let size = size as f64;
        let high = ms.max(low);
        slope = (high - low) / (size - from);
        if at <= size {
            return low + slope * (at - from);
        }
        (from, low) = (size, high);
    }
    low + slope * (at - from).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_lie_between_what_was_measured_and_go_on_beyond() {
        let times = StepTimes {
            forward: vec![(1, 2.0), (3, 4.0), (5, 3.0), (9, 8.0)],
            propose: vec![(0, 0.0), (2, 1.0)],
            several: Vec::new(),
            others: 0.5,
        };
        assert!(times.is_sound());
        // Five rows were measured to cost less than three: they are taken to cost as much.
        for (rows, levels, ms) in [
            (0.5, 0, 2.5),
            (1.0, 0, 2.5),
            (2.0, 0, 3.5),
            (4.0, 0, 4.5),
            (7.0, 1, 7.0),
            (11.0, 4, 12.5),
        ] {
            assert_eq!(
                times.of(1, rows, levels),
                ms,
                "{rows} rows, {levels} levels"
            );
        }
        assert_eq!(times.of(3, 3.0, 0), 5.5);
        assert_eq!(times.ratio(9), 4.0);
        assert_eq!(times.level(1), 0.0, "one level was measured");
        let levels = StepTimes {
            propose: vec![(0, 0.0), (1, 1.0), (2, 1.5), (5, 3.0)],
            ..times.clone()
        };
        assert_eq!(levels.level(1), 0.5);
        let several = StepTimes {
            several: vec![(1, 1.0), (5, 2.0)],
            ..levels.clone()
        };
        assert!(several.is_sound());
        // Three take 1.5 times as long as one to propose two levels, 1.5 ms: half a level each.
        assert_eq!(several.of(3, 3.0, 2), 4.0 + 2.25 + 1.5);
        assert_eq!((several.level(1), several.level(3)), (0.5, 0.25));
        assert_eq!(levels.level(3), 0.5 / 3.0);
        assert!(!StepTimes::default().is_sound());
        let broken = StepTimes {
            forward: vec![(1, f64::NAN)],
            ..StepTimes::default()
        };
        assert!(!broken.is_sound());
    }
}
