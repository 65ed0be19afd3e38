//! Rotary positions: base, stretch, and the tables that executors rotate with.

use super::spec::LayerSpec;

/// How rotary frequencies are stretched for longer contexts.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Plain rotary positions.
    None,
    /// Positions divided by a factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama-3.1's stretch of the long wavelengths.
    Llama3 {
        /// Divisor of the lowest frequencies.
        factor: f64,
        /// Wavelengths above `original / low` are stretched whole.
        low_freq_factor: f64,
        /// Wavelengths below `original / high` are left alone.
        high_freq_factor: f64,
        /// Context the model was first trained with.
        original: f64,
    },
    /// YaRN (arXiv:2309.00071): frequencies that turn less than `beta_slow` times within the original context are divided by
    /// the factor, those that turn more than `beta_fast` times are left alone, and a ramp lies between.
    Yarn {
        /// The divisor.
        factor: f64,
        /// Context the model was first trained with.
        original: f64,
        /// Turns from which on a frequency is left alone.
        beta_fast: f64,
        /// Turns up to which a frequency is divided.
        beta_slow: f64,
        /// What cosines and sines, hence q and k each, are multiplied by.
        attention_factor: f64,
        /// Whether the ramp's ends are rounded outwards to whole pairs.
        truncate: bool,
    },
    /// A divisor per frequency, as GGUF's `rope_freqs.weight` stores Llama-3.1's stretch.
    Factors(Vec<f32>),
}

/// Rotary positions of a layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Their stretch.
    pub scaling: RopeScaling,
}

impl Rope {
    /// Plain rotary positions.
    pub fn plain(theta: f64) -> Self {
        Self {
            theta,
            scaling: RopeScaling::None,
        }
    }

    /// Tables of cosines and sines `[positions, E / 2]`, built in f64 and rounded once.
    pub fn tables(&self, head_dim: usize, positions: usize) -> (Vec<f32>, Vec<f32>) {
        let (cos, sin) = self.wide_tables(head_dim, positions);
        let rounded = |table: Vec<f64>| table.into_iter().map(|v| v as f32).collect();
        (rounded(cos), rounded(sin))
    }

    /// The same, not rounded.
    pub fn wide_tables(&self, head_dim: usize, positions: usize) -> (Vec<f64>, Vec<f64>) {
        let half = head_dim / 2;
        let plain = |i: usize| self.theta.powf(-((2 * i) as f64) / head_dim as f64);
        let frequencies: Vec<f64> = (0..half)
            .map(|i| self.stretched(plain(i), i, head_dim))
            .collect();
        let scale = match self.scaling {
            RopeScaling::Yarn {
                attention_factor, ..
            } => attention_factor,
            _ => 1.0,
        };
        let angles = (0..positions).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
        angles.map(|a| (a.cos() * scale, a.sin() * scale)).unzip()
    }

    fn stretched(&self, frequency: f64, index: usize, head_dim: usize) -> f64 {
        match &self.scaling {
            RopeScaling::None => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Factors(f) => frequency / f64::from(f.get(index).copied().unwrap_or(1.0)),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original,
            } => {
                let wavelength = 2.0 * std::f64::consts::PI / frequency;
                if wavelength < original / high {
                    frequency
                } else if wavelength > original / low {
                    frequency / factor
                } else {
                    let smooth = (original / wavelength - low) / (high - low);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
            &RopeScaling::Yarn {
                factor,
                original,
                beta_fast,
                beta_slow,
                truncate,
                ..
            } => {
                // The pair whose frequency turns so many times within the original context.
                let pair = |turns: f64| {
                    head_dim as f64 * (original / (turns * 2.0 * std::f64::consts::PI)).ln()
                        / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                low = low.max(0.0);
                high = high.min(head_dim as f64 - 1.0);
                if low == high {
                    high += 0.001; // as in the reference: no ramp of no width
                }
                let ramp = ((index as f64 - low) / (high - low)).clamp(0.0, 1.0);
                frequency / factor * ramp + frequency * (1.0 - ramp)
            }
        }
    }
}

/// YaRN's attention factor of a context stretched so many times, where a file gives none.
pub(super) fn yarn_attention_factor(factor: f64) -> f64 {
    match factor > 1.0 {
        true => 0.1 * factor.ln() + 1.0,
        false => 1.0,
    }
}

/// The ropes that occur in layers, each once with its head size, and which of them each layer rotates with.
pub(super) fn occurring<'s>(
    layers: impl Iterator<Item = &'s LayerSpec>,
) -> (Vec<(&'s Rope, usize)>, Vec<usize>) {
    let (mut ropes, mut of_layer) = (Vec::new(), Vec::new());
    for spec in layers {
        let rope = (&spec.rope, spec.head_dim);
        let known = ropes.iter().position(|r| *r == rope);
        of_layer.push(known.unwrap_or(ropes.len()));
        if known.is_none() {
            ropes.push(rope);
        }
    }
    (ropes, of_layer)
}
