//! Plans that training is part of: when it has paid for itself, and which run to make in the time that there is.

use serde::Serialize;
use toml::{Table, Value};

use super::choose::Choice;
use crate::laws::Query;
use crate::{Error, Result};

/// Recipes that laws are fitted to, by family: those of `cargo xtask grid`.
const RECIPES: [(&str, &str); 4] = [
    (
        "scylla",
        include_str!("../../../assets/experiments/grid/scylla.toml"),
    ),
    (
        "eagle2",
        include_str!("../../../assets/experiments/grid/eagle2.toml"),
    ),
    (
        "eagle3",
        include_str!("../../../assets/experiments/grid/eagle3.toml"),
    ),
    (
        "hass",
        include_str!("../../../assets/experiments/grid/hass.toml"),
    ),
];

/// After how many generated tokens a draft has saved the time that its training took.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct BreakEven {
    /// Sequences side by side.
    pub batch: usize,
    /// Tokens; `None` where it never does.
    pub tokens: Option<f64>,
    /// With tau at the upper end of its band.
    pub low: Option<f64>,
    /// With tau at the lower end.
    pub high: Option<f64>,
}

/// For seconds of training on the machine that decodes, or the same in money.
pub fn break_even(choice: &Choice, seconds: f64) -> BreakEven {
    let saved = |speed: f64| {
        let each = 1.0 / choice.plain_tokens_per_s - 1.0 / speed;
        (each > 0.0).then(|| seconds / each)
    };
    let speed = choice.tokens_per_s;
    BreakEven {
        batch: choice.batch,
        tokens: saved(speed.value),
        low: saved(speed.high),
        high: saved(speed.low),
    }
}

/// The experiment that trains a run: the recipe of its family, with its layers, tokens and a cooldown over their last fifth.
///
/// # Errors
/// If no recipe of the family is known.
pub fn experiment(query: &Query) -> Result<String> {
    let recipe = RECIPES.iter().find(|(family, _)| *family == query.family);
    let Some((_, recipe)) = recipe else {
        let known: Vec<&str> = RECIPES.iter().map(|r| r.0).collect();
        return Err(Error::Experiment(format!(
            "no recipe of the family {}: known are {}",
            query.family,
            known.join(", ")
        )));
    };
    let broken = || Error::Experiment(format!("the recipe of {} is broken", query.family));
    let mut table: Table = recipe.parse().map_err(|_| broken())?;
    let whole = |value: f64| Value::Integer(value as i64);
    let rows = |table: &Table| {
        let train = table.get("train")?.as_table()?;
        Some((train.get("length")?.as_integer()? * train.get("batch")?.as_integer()?) as f64)
    };
    let step = rows(&table).ok_or_else(broken)?;
    let steps = (query.tokens / step).floor().max(1.0);
    let draft = table.get_mut("draft").and_then(Value::as_table_mut);
    let draft = draft.ok_or_else(broken)?;
    if query.layers != 1 || draft.contains_key("layers") {
        draft.insert("layers".into(), whole(query.layers as f64));
    }
    let stage = table.get_mut("stage").and_then(Value::as_array_mut);
    let stage = stage
        .and_then(|s| s.first_mut()?.as_table_mut())
        .ok_or_else(broken)?;
    stage.insert("tokens".into(), whole(steps * step));
    let schedule = stage.get_mut("schedule").and_then(Value::as_table_mut);
    let schedule = schedule.ok_or_else(broken)?;
    schedule.insert("cooldown".into(), whole((steps / 5.0).round().max(1.0)));
    toml::to_string(&table).map_err(|e| Error::Experiment(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::super::choose::Speed;
    use super::*;
    use crate::train::TrainExperiment;

    #[test]
    fn every_family_has_an_experiment_that_is_read() {
        for (family, _) in RECIPES {
            let query = Query {
                family: family.into(),
                layers: 1,
                tokens: 1_000_000.0,
            };
            let text = experiment(&query).expect("an experiment");
            let table: Table = text.parse().expect("TOML");
            let found = TrainExperiment::from_table(table, &[]).expect("an experiment");
            let stage = &found.stage[0];
            assert_eq!(stage.tokens, 976 * 1024, "{family}");
        }
        let unknown = Query {
            family: "medusa".into(),
            layers: 1,
            tokens: 1e6,
        };
        assert!(
            experiment(&unknown)
                .expect_err("none")
                .to_string()
                .contains("medusa")
        );
    }

    #[test]
    fn training_has_paid_when_what_was_saved_is_what_it_took() {
        let choice = Choice {
            batch: 1,
            draft: Some("eagle3".into()),
            layers: 1,
            tokens: None,
            budget: scylla_core::tree::Budget::chain(1),
            tau: 1.5,
            tokens_per_s: Speed {
                value: 125.0,
                low: 90.0,
                high: 200.0,
            },
            plain_tokens_per_s: 100.0,
        };
        let found = break_even(&choice, 3600.0);
        // Two milliseconds a token.
        assert!((found.tokens.expect("sometime") / 1.8e6 - 1.0).abs() < 1e-9);
        assert!((found.low.expect("sometime") / 7.2e5 - 1.0).abs() < 1e-9);
        assert_eq!(found.high, None);
    }
}
