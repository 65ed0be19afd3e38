//! How the learning rate moves: warm-up, then constant, cosine, linear or a cooldown at the end.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How the rate moves after the warm-up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// It stays.
    #[default]
    Constant,
    /// Half a wave of the cosine, down to the floor at the last step.
    Cosine,
    /// A line down to the floor at the last step.
    Linear,
    /// It stays, and falls in a line to the floor over the last `cooldown` steps: what is trained before may be continued.
    Cooldown,
}

/// A schedule over steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Schedule {
    /// How the rate moves.
    pub shape: Shape,
    /// Steps over which it rises in a line.
    pub warmup: u64,
    /// Steps over which it falls, for `cooldown`.
    pub cooldown: u64,
    /// What it falls to, as a share.
    pub floor: f64,
}

impl Default for Schedule {
    fn default() -> Self {
        Self {
            shape: Shape::Constant,
            warmup: 0,
            cooldown: 0,
            floor: 0.0,
        }
    }
}

impl Schedule {
    /// Checks that it fits so many steps.
    ///
    /// # Errors
    /// Names what does not.
    pub fn check(&self, steps: u64) -> Result<()> {
        if !(0.0..=1.0).contains(&self.floor) {
            return Err(Error::Invalid(format!(
                "schedule.floor {}: expected 0 to 1",
                self.floor
            )));
        }
        if self.shape != Shape::Cooldown && self.cooldown > 0 {
            return Err(Error::Invalid(
                "schedule.cooldown is given, and schedule.shape is not cooldown".into(),
            ));
        }
        if self.warmup.saturating_add(self.cooldown) > steps {
            return Err(Error::Invalid(format!(
                "schedule.warmup {} and schedule.cooldown {} in {steps} steps",
                self.warmup, self.cooldown
            )));
        }
        Ok(())
    }

    /// What the learning rate is multiplied by in step `step` (from 0) of `steps`.
    pub fn factor(&self, step: u64, steps: u64) -> f64 {
        if step < self.warmup {
            return (step + 1) as f64 / self.warmup as f64;
        }
        // 0 at the first step after the warm-up, 1 behind the last.
        let part = |first: u64| {
            let all = steps.saturating_sub(first).max(1);
            (step.saturating_sub(first) as f64 / all as f64).min(1.0)
        };
        let fallen = |share: f64| self.floor + (1.0 - self.floor) * share;
        match self.shape {
            Shape::Constant => 1.0,
            Shape::Linear => fallen(1.0 - part(self.warmup)),
            Shape::Cosine => fallen(0.5 + 0.5 * (std::f64::consts::PI * part(self.warmup)).cos()),
            Shape::Cooldown => fallen(1.0 - part(steps.saturating_sub(self.cooldown))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(shape: Shape, warmup: u64, cooldown: u64) -> Schedule {
        Schedule {
            shape,
            warmup,
            cooldown,
            floor: 0.1,
        }
    }

    #[test]
    fn rates_rise_stay_and_fall_as_their_names_say() {
        let steps = 100;
        for shape in [
            Shape::Constant,
            Shape::Cosine,
            Shape::Linear,
            Shape::Cooldown,
        ] {
            let s = of(shape, 10, if shape == Shape::Cooldown { 20 } else { 0 });
            s.check(steps).expect("fits");
            let f: Vec<f64> = (0..steps).map(|i| s.factor(i, steps)).collect();
            assert!(
                (f[0] - 0.1).abs() < 1e-12 && f[9] == 1.0 && f[10] == 1.0,
                "{shape:?} {f:?}"
            );
            assert!(
                f[10..].windows(2).all(|w| w[1] <= w[0]) && f.iter().all(|v| *v >= 0.1 - 1e-12)
            );
            let last = f[99];
            match shape {
                Shape::Constant => assert_eq!(last, 1.0),
                Shape::Cooldown => assert!(
                    f[80] == 1.0 && f[79] == 1.0 && (f[90] - 0.55).abs() < 1e-12 && last < 0.15
                ),
                _ => assert!(last < 0.12 && (f[55] - 0.55).abs() < 1e-12),
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(of(Shape::Constant, 101, 0).check(100).is_err());
        assert!(of(Shape::Cooldown, 60, 50).check(100).is_err());
        assert!(of(Shape::Linear, 0, 5).check(100).is_err());
        assert!(
            Schedule {
                floor: 1.5,
                ..Default::default()
            }
            .check(10)
            .is_err()
        );
    }
}
