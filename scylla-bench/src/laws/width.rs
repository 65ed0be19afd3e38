//! The third law: how many nodes a cycle should verify at a batch size, from shapes and a machine's balance of arithmetic and
//! memory; and how the time of a step grows with the batch.

use nalgebra::{DMatrix, DVector};
use serde::{Deserialize, Serialize};

/// A target and a machine, as far as a roofline needs them.
///
/// A step that verifies `k` nodes of each of `b` sequences does `b k a1 + b k^2 a2` operations, with `a1 = 2 P` (and
/// `4 L h s` for attention over a context of `s` positions) and `a2 = 4 L h` for attention inside the tree, and reads
/// `W + b C` bytes. Where operations over bytes equal the machine's own ratio both finish together:
/// `k = -p + sqrt(p^2 + q + r / b)` with `p = a1 / 2 a2`, `q = I C / a2`, `r = I W / a2`, the form of the published law
/// (Scylla, arXiv:2505.07858).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Roofline {
    /// P: weights that a row is multiplied with.
    pub parameters: f64,
    /// L.
    pub layers: f64,
    /// h: width of the attention's queries, heads times head size.
    pub hidden: f64,
    /// s: positions of context that attention goes over, 0 to leave that term out.
    pub context: f64,
    /// W: bytes of the weights.
    pub weight_bytes: f64,
    /// C: bytes of a sequence's cache.
    pub cache_bytes: f64,
    /// I: operations a second over bytes a second, at their peaks.
    pub intensity: f64,
}

/// `k = -p + sqrt(p^2 + q + r / b)`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct WidthLaw {
    /// In nodes.
    pub p: f64,
    /// In nodes squared.
    pub q: f64,
    /// In nodes squared, times sequences.
    pub r: f64,
}

impl WidthLaw {
    /// A law as it is published: `k = scale sqrt(1 + share / b) - p`.
    pub fn published(scale: f64, share: f64, p: f64) -> Self {
        Self {
            p,
            q: scale * scale - p * p,
            r: share * scale * scale,
        }
    }

    /// Nodes that a sequence should verify at batch `b`.
    pub fn width(&self, batch: f64) -> f64 {
        // As a quotient: p and the root are large and nearly equal.
        let more = self.q + self.r / batch;
        more / (self.p + (self.p * self.p + more).sqrt())
    }
}

impl Roofline {
    /// Operations of a node, and of a pair of nodes of a sequence.
    fn operations(&self) -> (f64, f64) {
        let of_pair = 4.0 * self.layers * self.hidden;
        (2.0 * self.parameters + of_pair * self.context, of_pair)
    }

    /// The law that follows.
    pub fn law(&self) -> WidthLaw {
        let (node, pair) = self.operations();
        WidthLaw {
            p: node / (2.0 * pair),
            q: self.intensity * self.cache_bytes / pair,
            r: self.intensity * self.weight_bytes / pair,
        }
    }

    /// The machine's intensity and the cache's bytes that a law would have needed to come of this target: what its constants
    /// imply.
    pub fn implied(&self, law: &WidthLaw) -> Self {
        let (_, pair) = self.operations();
        let intensity = law.r * pair / self.weight_bytes;
        Self {
            intensity,
            cache_bytes: law.q * pair / intensity,
            ..*self
        }
    }
}

/// `y = intercept + slope x`, by least squares.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// At x = 0.
    pub intercept: f64,
    /// By x.
    pub slope: f64,
    /// Share of the variance of y that it explains.
    pub r2: f64,
}

impl Line {
    /// Through points (x, y). `None` where there are not two different x.
    pub fn fit(points: &[(f64, f64)]) -> Option<Self> {
        if points.len() < 2 {
            return None;
        }
        let x = DMatrix::from_fn(points.len(), 2, |i, j| [1.0, points[i].0][j]);
        let y = DVector::from_fn(points.len(), |i, _| points[i].1);
        let svd = x.clone().svd(true, true);
        if svd.rank(1e-12 * svd.singular_values.max()) < 2 {
            return None;
        }
        let beta = svd.solve(&y, 0.0).ok()?;
        let left = (&y - x * &beta).norm_squared();
        let all = y.add_scalar(-y.mean()).norm_squared();
        Some(Self {
            intercept: beta[0],
            slope: beta[1],
            r2: 1.0 - left / all,
        })
    }
}

/// How throughput grows with the batch: by the time of a step, or as a logarithm.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Throughput {
    /// Seconds of a step as a line over the batch: weights are read once, and each sequence adds its own.
    pub step: Line,
    /// Tokens a second as a line over log2 of the batch, as published.
    pub logarithm: Line,
    /// Share of the variance of tokens a second that each explains.
    pub r2: [f64; 2],
}

impl Throughput {
    /// From (batch, tokens a second) of plain decoding. `None` where there are not two different batches.
    pub fn fit(points: &[(f64, f64)]) -> Option<Self> {
        let of = |f: &dyn Fn(f64, f64) -> (f64, f64)| -> Vec<(f64, f64)> {
            points.iter().map(|&(b, speed)| f(b, speed)).collect()
        };
        let step = Line::fit(&of(&|b, speed| (b, b / speed)))?;
        let logarithm = Line::fit(&of(&|b, speed| (b.log2(), speed)))?;
        let mean = points.iter().map(|p| p.1).sum::<f64>() / points.len() as f64;
        let all: f64 = points.iter().map(|p| (p.1 - mean).powi(2)).sum();
        let explained = |said: &dyn Fn(f64) -> f64| {
            let left: f64 = points.iter().map(|&(b, y)| (y - said(b)).powi(2)).sum();
            1.0 - left / all
        };
        let by_step = |b: f64| b / (step.intercept + step.slope * b);
        let by_logarithm = |b: f64| logarithm.intercept + logarithm.slope * b.log2();
        Some(Self {
            step,
            logarithm,
            r2: [explained(&by_step), explained(&by_logarithm)],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Table 5 of arXiv:2505.07858: Qwen2.5-72B on four H800, plain decoding, tokens a second by batch.
    const TABLE_5: [(f64, f64); 9] = [
        (1.0, 60.0),
        (2.0, 118.0),
        (4.0, 224.0),
        (8.0, 428.0),
        (16.0, 750.0),
        (32.0, 1239.0),
        (40.0, 1406.0),
        (48.0, 1553.0),
        (64.0, 1763.0),
    ];

    /// Qwen2.5-72B with 10,000 positions, in bf16: 80 layers, 64 heads and 8 kv heads of 128.
    fn qwen(intensity: f64) -> Roofline {
        Roofline {
            parameters: 72.7e9,
            layers: 80.0,
            hidden: 8192.0,
            context: 0.0,
            weight_bytes: 2.0 * 72.7e9,
            cache_bytes: 2.0 * 2.0 * 80.0 * 8.0 * 128.0 * 10_000.0,
            intensity,
        }
    }

    #[test]
    fn the_time_of_a_step_explains_the_published_table_better_than_its_logarithm() {
        let fit = Throughput::fit(&TABLE_5).expect("nine batches");
        assert!((fit.step.intercept * 1e3 - 16.34).abs() < 0.01, "{fit:?}");
        assert!((fit.step.slope * 1e3 - 0.3065).abs() < 1e-3, "{fit:?}");
        assert!(fit.step.r2 > 0.999, "{fit:?}");
        assert!(fit.r2[0] > 0.999 && fit.r2[0] > fit.r2[1], "{fit:?}");
    }

    #[test]
    fn the_algebra_gives_the_published_p_and_not_the_other_constants() {
        let published = WidthLaw::published(27_904.0, 0.034, 27_897.0);
        // About 7 + 474 / b.
        assert!((published.width(1.0) - (7.0 + 474.0)).abs() < 6.0);
        assert!((published.width(1e9) - 7.0).abs() < 0.1);
        let target = qwen(295.0);
        let law = target.law();
        assert!((law.p / published.p - 1.0).abs() < 0.01, "{law:?}");
        // What the others imply: half as much again as an H800's peaks have, and a smaller cache than these shapes.
        let implied = target.implied(&published);
        assert!((implied.intensity - 474.0).abs() < 10.0, "{implied:?}");
        let ratio = |of: &Roofline| of.weight_bytes / of.cache_bytes;
        assert!((ratio(&implied) - 68.0).abs() < 1.0, "{}", ratio(&implied));
        assert!((ratio(&target) - 44.0).abs() < 1.0, "{}", ratio(&target));
        let q = law.q / published.q;
        assert!((q - 1.0).abs() > 0.04, "{q}");
        assert!((law.r / published.r - 0.62).abs() < 0.02, "{law:?}");
    }

    #[test]
    fn at_the_width_of_the_law_operations_over_bytes_are_the_machines() {
        for batch in [1.0, 3.0, 32.0] {
            for context in [0.0, 500.0] {
                let target = Roofline {
                    context,
                    ..qwen(200.0)
                };
                let k = target.law().width(batch);
                let (node, pair) = target.operations();
                let operations = batch * k * node + batch * k * k * pair;
                let bytes = target.weight_bytes + batch * target.cache_bytes;
                // One root is read in any case: the published form counts operations of all nodes.
                assert!(
                    (operations / bytes / 200.0 - 1.0).abs() < 1e-9,
                    "{batch} {context}"
                );
            }
        }
    }

    #[test]
    fn a_line_needs_two_places() {
        let line = Line::fit(&[(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]).expect("a line");
        assert!((line.intercept - 1.0).abs() < 1e-12 && (line.slope - 2.0).abs() < 1e-12);
        assert_eq!(Line::fit(&[(1.0, 1.0), (1.0, 3.0)]), None);
        assert_eq!(Line::fit(&[(1.0, 1.0)]), None);
        assert_eq!(Line::fit(&[]), None);
    }
}
