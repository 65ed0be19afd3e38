//! Medians, spreads and how they are shown.

use std::fmt;

use serde_json::{Value, json};

/// Repeated measurements of one thing.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Sample(Vec<f64>);

impl Sample {
    pub(super) fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// Value by value over another sample of the same rounds.
    pub(super) fn over(&self, other: &Self) -> Self {
        let pairs = self.0.iter().zip(&other.0);
        Self(pairs.map(|(a, b)| a / b).collect())
    }

    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted
    }

    /// The middle value; of an even number, the mean of the middle two; NaN of none.
    pub(super) fn median(&self) -> f64 {
        let sorted = self.sorted();
        match sorted.len() {
            0 => f64::NAN,
            n => (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0,
        }
    }

    pub(super) fn json(&self) -> Value {
        let sorted = self.sorted();
        json!({ "median": self.median(), "min": sorted.first(), "max": sorted.last(), "rounds": self.0 })
    }
}

impl fmt::Display for Sample {
    /// `median (smallest-largest)` to three or four figures.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sorted = self.sorted();
        let (Some(&min), Some(&max)) = (sorted.first(), sorted.last()) else {
            return f.write_str("-");
        };
        let digits = match self.median() {
            m if m >= 100.0 => 0,
            m if m >= 10.0 => 1,
            _ => 2,
        };
        let median = self.median();
        write!(f, "{median:.digits$} ({min:.digits$}-{max:.digits$})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_taken_round_by_round() {
        let (a, b) = (Sample(vec![2.0, 6.0, 9.0]), Sample(vec![1.0, 2.0, 9.0]));
        assert_eq!(a.over(&b), Sample(vec![2.0, 3.0, 1.0]));
        assert_eq!(a.over(&b).median(), 2.0);
        assert_eq!(a.over(&b).to_string(), "2.00 (1.00-3.00)");
        assert_eq!(Sample(vec![1.0, 4.0]).median(), 2.5);
        assert!(Sample::default().median().is_nan());
    }
}
