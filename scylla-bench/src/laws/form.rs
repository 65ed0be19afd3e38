//! Forms that a law may have. Each is linear in its coefficients once its exponents are set.

use std::collections::BTreeMap;

/// How a measure grows with tokens and layers. `r` is the ratio to a reference: the middle of the tokens that were fitted, one
/// layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// c + a ln r: the published laws, with base and unit free.
    Log,
    /// The same with a term for the product of both logarithms.
    Interaction,
    /// A_inf - a r^-b, written as c + s (1 - r^-b) / b, which has the logarithm as its limit and s as its slope at the reference.
    Saturating,
    /// c r^p.
    Power,
}

impl std::fmt::Display for Form {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Log => "log",
            Self::Interaction => "interaction",
            Self::Saturating => "saturating",
            Self::Power => "power",
        })
    }
}

/// Where a law is asked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct At {
    /// Index among the model's families.
    pub(super) family: usize,
    /// T.
    pub(super) tokens: f64,
    /// D.
    pub(super) layers: f64,
}

/// What stands in for one of tokens and layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Axis {
    /// It does not vary.
    Absent,
    /// Two values tell a slope, and no exponent.
    Line,
    /// It may bend.
    Curve,
}

/// A form over what varies.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Model {
    pub(super) form: Form,
    /// A level each; what tokens and layers bring is common.
    pub(super) families: Vec<String>,
    pub(super) tokens: Axis,
    pub(super) layers: Axis,
    /// The reference of tokens.
    pub(super) middle: f64,
}

/// Exponents that are looked at.
const BENDS: [f64; 14] = [
    0.05, 0.08, 0.12, 0.17, 0.23, 0.3, 0.38, 0.47, 0.58, 0.7, 0.85, 1.05, 1.3, 1.7,
];
const LAYER_BENDS: [f64; 6] = [0.1, 0.3, 0.6, 1.0, 1.6, 2.5];
const POWERS: [f64; 17] = [
    -0.1, -0.05, -0.02, 0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4, 0.6, 0.9,
];
const LAYER_POWERS: [f64; 9] = [-0.3, -0.1, -0.04, 0.0, 0.04, 0.1, 0.2, 0.4, 0.8];

/// (1 - r^-b) / b.
fn bend(log_ratio: f64, b: f64) -> f64 {
    -(-b * log_ratio).exp_m1() / b
}

impl Model {
    /// Values that each exponent may have, ascending; what lies between them is looked at where the best of them is.
    pub(super) fn grids(&self) -> Vec<&'static [f64]> {
        let (tokens, layers): (&[f64], &[f64]) = match self.form {
            Form::Log | Form::Interaction => return Vec::new(),
            Form::Saturating => (&BENDS, &LAYER_BENDS),
            Form::Power => (&POWERS, &LAYER_POWERS),
        };
        let has = |axis: Axis| match self.form {
            Form::Power => axis != Axis::Absent,
            _ => axis == Axis::Curve,
        };
        let mut grids = Vec::new();
        grids.extend(has(self.tokens).then_some(tokens));
        grids.extend(has(self.layers).then_some(layers));
        grids
    }

    /// The exponents of tokens and layers among those of the model.
    fn split(&self, exponents: &[f64]) -> (Option<f64>, Option<f64>) {
        let mut exponents = exponents.iter().copied();
        let mut next = |axis: Axis| match self.form {
            Form::Power if axis != Axis::Absent => exponents.next(),
            Form::Saturating if axis == Axis::Curve => exponents.next(),
            _ => None,
        };
        let tokens = next(self.tokens);
        (tokens, next(self.layers))
    }

    /// Coefficients.
    pub(super) fn width(&self) -> usize {
        let slopes = [self.tokens, self.layers].map(|axis| usize::from(axis != Axis::Absent));
        self.families.len()
            + match self.form {
                Form::Power => 0,
                Form::Interaction => 3,
                _ => slopes[0] + slopes[1],
            }
    }

    /// What each coefficient is multiplied by, `[width]`.
    pub(super) fn row(&self, at: At, exponents: &[f64]) -> Vec<f64> {
        let (tokens, layers) = ((at.tokens / self.middle).ln(), at.layers.ln());
        let (of_tokens, of_layers) = self.split(exponents);
        let level = match self.form {
            Form::Power => {
                (of_tokens.unwrap_or(0.0) * tokens + of_layers.unwrap_or(0.0) * layers).exp()
            }
            _ => 1.0,
        };
        let mut row = vec![0.0; self.families.len()];
        if let Some(own) = row.get_mut(at.family) {
            *own = level;
        }
        if self.form == Form::Power {
            return row;
        }
        let curve = |log: f64, exponent: Option<f64>| exponent.map_or(log, |b| bend(log, b));
        if self.tokens != Axis::Absent {
            row.push(curve(tokens, of_tokens));
        }
        if self.layers != Axis::Absent {
            row.push(curve(layers, of_layers));
        }
        if self.form == Form::Interaction {
            row.push(tokens * layers);
        }
        row
    }

    /// The coefficients as they are written about: with tokens and layers counted singly.
    ///
    /// `c` (`c.FAMILY` where there are several) is the value at one token and one layer, of a saturating law the limit `A_inf`;
    /// `a_tokens` and `a_layers` what an e-fold of them brings, of a saturating law the factor before `T^-b_tokens`.
    pub(super) fn parameters(&self, beta: &[f64], exponents: &[f64]) -> BTreeMap<String, f64> {
        let mut all = BTreeMap::new();
        let (of_tokens, of_layers) = self.split(exponents);
        let middle = self.middle.ln();
        let (levels, slopes) = beta.split_at(self.families.len());
        let mut slopes = slopes.iter().copied();
        let power = self.form == Form::Power;
        let mut next = |axis: Axis| (axis != Axis::Absent && !power).then(|| slopes.next());
        let (tokens, layers) = (next(self.tokens).flatten(), next(self.layers).flatten());
        let both = (self.form == Form::Interaction)
            .then(|| slopes.next())
            .flatten();
        // What the levels take over.
        let mut shift = 0.0;
        let mut scale = 1.0;
        let mut put = |name: &str, value: f64| all.insert(name.to_string(), value);
        match (tokens, of_tokens) {
            (Some(slope), Some(b)) => {
                shift += slope / b;
                put("a_tokens", slope / b * (b * middle).exp());
                put("b_tokens", b);
            }
            (Some(slope), None) => {
                shift -= slope * middle;
                put("a_tokens", slope);
                put("a_tokens_log10", slope * std::f64::consts::LN_10);
            }
            (None, Some(p)) => {
                scale *= (-p * middle).exp();
                put("p_tokens", p);
            }
            (None, None) => {}
        }
        match (layers, of_layers) {
            (Some(slope), Some(e)) => {
                shift += slope / e;
                put("a_layers", slope / e);
                put("b_layers", e);
            }
            (Some(slope), None) => {
                // Of the product's term what belongs to the middle.
                let slope = slope - both.unwrap_or(0.0) * middle;
                put("a_layers", slope);
                put("a_layers_log10", slope * std::f64::consts::LN_10);
            }
            (None, Some(q)) => {
                put("p_layers", q);
            }
            (None, None) => {}
        }
        if let Some(both) = both {
            put("a_both", both);
        }
        for (family, level) in self.families.iter().zip(levels) {
            let name = match self.families.len() {
                1 => "c".to_string(),
                _ => format!("c.{family}"),
            };
            put(&name, level * scale + shift);
        }
        all
    }
}
