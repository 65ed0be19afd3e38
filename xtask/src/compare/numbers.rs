//! Medians, spreads, intervals and how they are shown.

use std::fmt;

use serde_json::{Value, json};

/// Repeated measurements of one thing.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Sample(Vec<f64>);

impl Sample {
    pub(crate) fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// Value by value over another sample of the same rounds.
    pub(crate) fn over(&self, other: &Self) -> Self {
        let pairs = self.0.iter().zip(&other.0);
        Self(pairs.map(|(a, b)| a / b).collect())
    }

    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted
    }

    /// The middle value; of an even number, the mean of the middle two; NaN of none.
    pub(crate) fn median(&self) -> f64 {
        let sorted = self.sorted();
        match sorted.len() {
            0 => f64::NAN,
            n => (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0,
        }
    }

    /// NaN of none.
    pub(crate) fn largest(&self) -> f64 {
        self.sorted().last().copied().unwrap_or(f64::NAN)
    }

    pub(crate) fn json(&self) -> Value {
        let sorted = self.sorted();
        json!({ "median": self.median(), "min": sorted.first(), "max": sorted.last(), "rounds": self.0 })
    }
}

/// A value and what it lies between, to three or four figures.
fn show(f: &mut fmt::Formatter<'_>, value: f64, low: f64, high: f64) -> fmt::Result {
    let digits = match value {
        m if m >= 100.0 => 0,
        m if m >= 10.0 => 1,
        _ => 2,
    };
    write!(f, "{value:.digits$} ({low:.digits$}-{high:.digits$})")
}

impl fmt::Display for Sample {
    /// `median (smallest-largest)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sorted = self.sorted();
        match (sorted.first(), sorted.last()) {
            (Some(&min), Some(&max)) => show(f, self.median(), min, max),
            _ => f.write_str("-"),
        }
    }
}

/// What was found of some units, and the 95 % interval over which units those happened to be.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Interval {
    pub(crate) value: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

/// Times that units are drawn anew.
const RESAMPLES: usize = 2000;

impl Interval {
    /// The percentile bootstrap: a statistic of `units` units, told by their indices, and of as many drawn with
    /// replacement, again and again. The same every time.
    pub(crate) fn bootstrap(units: usize, of: impl Fn(&[usize]) -> f64) -> Self {
        let mut chosen: Vec<usize> = (0..units).collect();
        let value = of(&chosen);
        let mut generator = SplitMix64(0);
        let mut found: Vec<f64> = (0..RESAMPLES)
            .map(|_| {
                chosen.fill_with(|| generator.below(units));
                of(&chosen)
            })
            .collect();
        found.sort_by(f64::total_cmp);
        let beyond = RESAMPLES / 40;
        Self {
            value,
            low: found[beyond],
            high: found[RESAMPLES - 1 - beyond],
        }
    }

    pub(super) fn json(&self) -> Value {
        json!({ "value": self.value, "low": self.low, "high": self.high, "level": 0.95, "resamples": RESAMPLES })
    }
}

impl fmt::Display for Interval {
    /// `value (low-high)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.value.is_nan() {
            true => f.write_str("-"),
            false => show(f, self.value, self.low, self.high),
        }
    }
}

/// What a claim stands on.
pub(super) enum Evidence {
    /// Its value is the median.
    Rounds(Sample),
    Prompts(Interval),
}

impl Evidence {
    pub(super) fn value(&self) -> f64 {
        match self {
            Self::Rounds(sample) => sample.median(),
            Self::Prompts(interval) => interval.value,
        }
    }

    pub(super) fn json(&self) -> Value {
        match self {
            Self::Rounds(sample) => sample.json(),
            Self::Prompts(interval) => interval.json(),
        }
    }
}

impl From<&Sample> for Evidence {
    fn from(sample: &Sample) -> Self {
        Self::Rounds(sample.clone())
    }
}

impl From<Interval> for Evidence {
    fn from(interval: Interval) -> Self {
        Self::Prompts(interval)
    }
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rounds(sample) => sample.fmt(f),
            Self::Prompts(interval) => interval.fmt(f),
        }
    }
}

/// A small generator of random numbers (Steele, Lea and Flood 2014).
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below a bound; 0 where there is none.
    fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next()) * bound as u128) >> 64) as usize
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
        assert!(Sample::default().median().is_nan() && Sample::default().largest().is_nan());
        assert_eq!(a.largest(), 9.0);
    }

    #[test]
    fn the_generator_is_the_published_one() {
        let mut generator = SplitMix64(1_234_567);
        assert_eq!(generator.next(), 6_457_827_717_110_365_317);
        assert_eq!(generator.next(), 3_203_168_211_198_807_973);
        assert!((0..1000).all(|_| generator.below(7) < 7));
        assert_eq!(generator.below(0), 0);
    }

    fn mean(values: &[f64]) -> Interval {
        Interval::bootstrap(values.len(), |chosen| {
            chosen.iter().map(|&i| values[i]).sum::<f64>() / chosen.len() as f64
        })
    }

    #[test]
    fn intervals_are_the_same_every_time() {
        let values: Vec<f64> = (0..30).map(|i| f64::from(i * i % 17)).collect();
        assert_eq!(mean(&values), mean(&values));
        assert_eq!(mean(&[1.5; 9]).to_string(), "1.50 (1.50-1.50)");
        assert_eq!(mean(&[]).to_string(), "-");
    }

    /// The mean of 40 numbers from 0 to 1 misses one half by more than the interval tells in one of 20 cases, or in a few
    /// more, as so few numbers know their spread roughly; and the interval is about as wide as the normal distribution has it.
    #[test]
    fn intervals_cover_a_known_mean() {
        let mut generator = SplitMix64(7);
        let unit = 2f64.powi(-64);
        let (mut covered, mut width) = (0, 0.0);
        for _ in 0..200 {
            let values: Vec<f64> = (0..40).map(|_| generator.next() as f64 * unit).collect();
            let found = mean(&values);
            assert!(found.low <= found.value && found.value <= found.high);
            covered += usize::from(found.low <= 0.5 && 0.5 <= found.high);
            width += (found.high - found.low) / 200.0;
        }
        assert!((176..=198).contains(&covered), "{covered} of 200");
        let normal = 2.0 * 1.96 / (12f64 * 40.0).sqrt();
        assert!((width / normal - 1.0).abs() < 0.06, "{width} for {normal}");
    }
}
