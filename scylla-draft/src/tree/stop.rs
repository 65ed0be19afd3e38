//! When to stop drafting: another level pays only if the tokens it is expected to add take the decoder longer than the
//! level takes the draft.

use std::time::Instant;

use super::Growth;

/// Mean with forgetting.
#[derive(Debug, Clone, Copy, Default)]
struct Mean(Option<f64>);

impl Mean {
    fn add(&mut self, value: f64) {
        self.0 = Some(self.0.map_or(value, |mean| mean + 0.1 * (value - mean)));
    }
}

/// Measures cycles and levels, and weighs one against the other.
#[derive(Debug, Default)]
pub struct EarlyStop {
    /// Seconds of a cycle, and of one drafted level.
    cycle: Mean,
    level: Mean,
    /// Tokens all slots commit in a cycle.
    tokens: Mean,
    committed: usize,
    begun: Option<Instant>,
    /// When the last level was handed to the network.
    handed: Option<Instant>,
    /// Path probability of the last level's frontiers, all slots together.
    mass: f64,
    cycles: usize,
}

/// Of so many cycles one is drafted to its end whatever the estimate, so that an outlier is not believed for ever.
const PROBE: usize = 32;

impl EarlyStop {
    /// Tokens became final.
    pub fn committed(&mut self, tokens: usize) {
        self.committed += tokens;
    }

    /// Something else than a cycle comes between, such as a prompt: the cycle it falls into is not measured.
    pub fn interrupt(&mut self) {
        self.begun = None;
    }

    /// A proposal begins.
    pub fn begin(&mut self) {
        let now = Instant::now();
        if let Some(begun) = self.begun {
            self.cycle.add((now - begun).as_secs_f64());
            self.tokens.add(self.committed as f64);
        }
        self.committed = 0;
        self.begun = Some(now);
        self.handed = None;
        self.mass = 0.0;
        self.cycles += 1;
    }

    /// Whether to draft another level. The expected gain is the path probability of the frontiers times the share of
    /// it that the last level kept.
    pub fn pays(&mut self, growths: &[Growth]) -> bool {
        let now = Instant::now();
        if let Some(handed) = self.handed {
            self.level.add((now - handed).as_secs_f64());
        }
        self.handed = Some(now);
        let score = |g: &Growth| g.frontier.iter().map(|&n| g.scores[n].exp()).sum::<f64>();
        let mass: f64 = growths.iter().map(score).sum();
        let before = match std::mem::replace(&mut self.mass, mass) {
            0.0 => growths.iter().filter(|g| g.level > 0).count() as f64,
            before => before,
        };
        let kept = (mass / before.max(1e-12)).min(1.0);
        self.cycles.is_multiple_of(PROBE) || self.weigh(mass * kept)
    }

    /// Whether `gain` tokens take the decoder longer than a level takes; yes as long as nothing was measured.
    fn weigh(&self, gain: f64) -> bool {
        match (self.cycle.0, self.level.0, self.tokens.0) {
            (Some(cycle), Some(level), Some(tokens)) if tokens > 0.0 => {
                gain * cycle / tokens >= level
            }
            _ => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_pays_when_its_tokens_take_longer_to_decode_than_it_takes() {
        let mut stop = EarlyStop::default();
        assert!(stop.weigh(0.0), "nothing was measured yet");
        stop.cycle.add(0.010);
        stop.tokens.add(2.0);
        stop.level.add(0.001);
        // A token takes 5 ms, so a level of 1 ms pays from 0.2 tokens on.
        assert!(stop.weigh(0.21) && !stop.weigh(0.19));
    }
}
