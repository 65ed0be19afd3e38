//! Random decisions: the generator that decodes, and the branching that proves.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::kernels::probability;
use crate::plugin::Chance;
use crate::{Error, Result};

/// A generator keyed by seed, sequence and position: what a sequence draws does not depend on its batch mates.
pub struct Seeded {
    seed: u64,
    sequence: u64,
    rng: StdRng,
}

impl Seeded {
    /// The stream of one sequence.
    pub fn new(seed: u64, sequence: u64) -> Self {
        let mut chance = Self {
            seed,
            sequence,
            rng: StdRng::from_seed([0; 32]),
        };
        chance.at(0);
        chance
    }

    /// Restarts the stream for the decisions made at a position.
    pub fn at(&mut self, position: usize) {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&self.seed.to_le_bytes());
        key[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        key[16..24].copy_from_slice(&(position as u64).to_le_bytes());
        self.rng = StdRng::from_seed(key);
    }
}

impl Chance for Seeded {
    fn coin(&mut self, p: f64) -> bool {
        // 53 random bits in [0, 1): p = 1 always, p = 0 never.
        self.rng.random::<f64>() < p
    }

    fn pick(&mut self, weights: &[f64]) -> Result<usize> {
        let at = self.rng.random::<f64>() * total(weights)?;
        // A positive total has a positive weight.
        Ok(probability::place(weights, at).unwrap_or(0))
    }
}

/// The sum of weights, checked.
fn total(weights: &[f64]) -> Result<f64> {
    let (total, least) = probability::sum_and_least(weights);
    if total > 0.0 && total.is_finite() && least >= 0.0 {
        return Ok(total);
    }
    Err(Error::Invalid(
        match weights.iter().find(|w| !(**w >= 0.0 && w.is_finite())) {
            Some(w) => format!("a probability weight is {w}"),
            None => "no token has positive probability".into(),
        },
    ))
}

/// One branch of an enumeration: replays decisions already taken, then takes the first outcome of each new one.
#[derive(Default)]
struct Branch {
    /// Outcome taken at each decision, and the probabilities of all of them.
    taken: Vec<(usize, Vec<f64>)>,
    next: usize,
}

impl Branch {
    fn decide(&mut self, weights: impl FnOnce() -> Vec<f64>) -> usize {
        if self.next == self.taken.len() {
            let weights = weights();
            let first = weights.iter().position(|&w| w > 0.0).unwrap_or(0);
            self.taken.push((first, weights));
        }
        self.next += 1;
        self.taken[self.next - 1].0
    }

    /// Moves to the next branch; false when all were visited.
    fn advance(&mut self) -> bool {
        self.next = 0;
        while let Some((taken, weights)) = self.taken.last_mut() {
            if let Some(more) = weights[*taken + 1..].iter().position(|&w| w > 0.0) {
                *taken += 1 + more;
                return true;
            }
            self.taken.pop();
        }
        false
    }

    fn probability(&self) -> f64 {
        self.taken
            .iter()
            .map(|(taken, weights)| weights[*taken])
            .product()
    }
}

impl Chance for Branch {
    fn coin(&mut self, p: f64) -> bool {
        let p = p.clamp(0.0, 1.0);
        self.decide(|| vec![1.0 - p, p]) == 1
    }

    fn pick(&mut self, weights: &[f64]) -> Result<usize> {
        let total = total(weights)?;
        Ok(self.decide(|| weights.iter().map(|w| w / total).collect()))
    }
}

/// Runs `body` once for every way its random decisions can fall, and hands each result its probability.
pub fn enumerate<T>(
    mut body: impl FnMut(&mut dyn Chance) -> Result<T>,
    mut each: impl FnMut(f64, T),
) -> Result<()> {
    let mut branch = Branch::default();
    loop {
        let result = body(&mut branch)?;
        each(branch.probability(), result);
        if !branch.advance() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn enumeration_visits_every_outcome_with_its_probability() {
        let mut law = std::collections::BTreeMap::new();
        enumerate(
            |chance| {
                let first = chance.pick(&[1.0, 0.0, 3.0])?;
                Ok(if first == 2 && chance.coin(0.25) {
                    9
                } else {
                    first
                })
            },
            |p, outcome| *law.entry(outcome).or_insert(0.0) += p,
        )
        .expect("enumerate");
        assert_eq!(
            law.into_iter().collect::<Vec<_>>(),
            [(0, 0.25), (2, 0.5625), (9, 0.1875)]
        );
    }

    #[test]
    fn a_stream_depends_on_seed_sequence_and_position_alone() {
        let draw = |seed, sequence, position| {
            let mut c = Seeded::new(seed, sequence);
            c.at(position);
            (0..8)
                .map(|_| c.pick(&[1.0; 100]).expect("pick"))
                .collect::<Vec<_>>()
        };
        assert_eq!(draw(1, 2, 3), draw(1, 2, 3));
        for other in [draw(0, 2, 3), draw(1, 0, 3), draw(1, 2, 0)] {
            assert_ne!(draw(1, 2, 3), other);
        }
    }

    #[test]
    fn picks_follow_the_weights() {
        let mut c = Seeded::new(7, 0);
        let mut counts = [0usize; 3];
        for _ in 0..30_000 {
            counts[c.pick(&[0.2, 0.0, 0.8]).expect("pick")] += 1;
        }
        assert_eq!(counts[1], 0);
        // Five standard deviations of a binomial.
        assert!((counts[0] as f64 - 6000.0).abs() < 5.0 * (30_000.0f64 * 0.16).sqrt());
        assert!(c.coin(1.0) && !c.coin(0.0));
    }

    #[test]
    fn impossible_weights_are_refused() {
        let mut c = Seeded::new(0, 0);
        for weights in [
            &[0.0, 0.0][..],
            &[],
            &[f64::NAN],
            &[-1.0, 2.0],
            &[f64::INFINITY],
        ] {
            assert!(c.pick(weights).is_err());
        }
    }
}
