//! The best of all at each batch.

use scylla_core::tree::Budget;
use serde::Serialize;

use super::table::CostTable;
use super::trees::{Drafted, Shape};
use crate::{Error, Result};

/// Tokens a second of all sequences together.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Speed {
    /// Expected.
    pub value: f64,
    /// With tau at the lower end of its band.
    pub low: f64,
    /// At its upper end.
    pub high: f64,
}

/// What to draft with at a batch.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Choice {
    /// Sequences side by side.
    pub batch: usize,
    /// The draft; `None` where drafting does not pay.
    pub draft: Option<String>,
    /// Its layers.
    pub layers: usize,
    /// T of a draft that a law speaks of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<f64>,
    /// Limits of its trees; a root alone where drafting does not pay.
    pub budget: Budget,
    /// Mean tokens a cycle.
    pub tau: f64,
    /// Expected speed.
    pub tokens_per_s: Speed,
    /// That of plain decoding.
    pub plain_tokens_per_s: f64,
}

/// A choice for each batch.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Planned {
    /// In the order of the batches.
    pub choices: Vec<Choice>,
    /// The batch from which on nothing should be drafted; `None` where drafting pays at the largest that was asked for.
    pub off_from_batch: Option<usize>,
}

/// Seconds of a cycle.
fn cycle(
    table: &CostTable,
    draft: &Drafted,
    shape: &Shape,
    batch: usize,
    context: usize,
) -> Result<f64> {
    let unknown = |what: &str| {
        Error::Experiment(format!(
            "the costs hold no {what} of {} layers: they know {:?}; measure such a draft (scylla plan --measure), or two others",
            draft.layers,
            table.layers()
        ))
    };
    let forward = table.forward(batch, shape.nodes, context);
    let forward = forward.ok_or_else(|| unknown("forward"))?;
    let between = table.between(draft.layers, batch, shape.nodes, context);
    if draft.layers == 0 {
        return Ok(forward + between);
    }
    let level = |rows: usize| {
        let seconds = table.draft(draft.layers, batch, rows as f64, context);
        seconds.ok_or_else(|| unknown("draft"))
    };
    // The first level goes on from the root alone.
    let levels = shape.budget.levels();
    let below = match levels {
        0 | 1 => 0.0,
        _ => (levels - 1) as f64 * level(shape.budget.width)?,
    };
    Ok(forward + between + level(1)? + below)
}

/// What plain decoding does at a batch.
fn plain(table: &CostTable, batch: usize, context: usize) -> Result<Choice> {
    let root = table.forward(batch, 1.0, context);
    let root = root.ok_or_else(|| Error::Experiment("the costs hold no forward".into()))?;
    let speed = batch as f64 / (root + table.between(0, batch, 1.0, context));
    Ok(Choice {
        batch,
        draft: None,
        layers: 0,
        tokens: None,
        budget: Budget::OFF,
        tau: 1.0,
        tokens_per_s: Speed {
            value: speed,
            low: speed,
            high: speed,
        },
        plain_tokens_per_s: speed,
    })
}

/// What every draft does with each of its trees at a batch, behind plain decoding.
///
/// # Errors
/// If the table does not know what a draft costs.
pub fn every(
    table: &CostTable,
    drafts: &[Drafted],
    batch: usize,
    context: usize,
) -> Result<Vec<Choice>> {
    let plain = plain(table, batch, context)?;
    let mut all = vec![plain.clone()];
    for draft in drafts {
        for shape in &draft.shapes {
            let rate = batch as f64 / cycle(table, draft, shape, batch, context)?;
            all.push(Choice {
                draft: Some(draft.name.clone()),
                layers: draft.layers,
                tokens: draft.tokens,
                budget: shape.budget,
                tau: shape.tau.value,
                tokens_per_s: Speed {
                    value: rate * shape.tau.value,
                    low: rate * shape.tau.low,
                    high: rate * shape.tau.high,
                },
                ..plain
            });
        }
    }
    Ok(all)
}

/// The best tree of the best draft at each batch, or none where plain decoding is as fast.
///
/// # Errors
/// If the table does not know what a draft costs.
pub fn choose(
    table: &CostTable,
    drafts: &[Drafted],
    batches: &[usize],
    context: usize,
) -> Result<Planned> {
    let mut choices = Vec::with_capacity(batches.len());
    for &batch in batches {
        let all = every(table, drafts, batch, context)?;
        let first =
            |best: Choice, one: Choice| match one.tokens_per_s.value > best.tokens_per_s.value {
                true => one,
                false => best,
            };
        choices.extend(all.into_iter().reduce(first));
    }
    let off = choices.iter().rev().take_while(|c| c.draft.is_none());
    let off_from_batch = off.last().map(|c| c.batch);
    Ok(Planned {
        choices,
        off_from_batch,
    })
}

#[cfg(test)]
mod tests {
    use super::super::table::{Cost, What};
    use super::super::trees::from_rates;
    use super::*;
    use crate::laws::Band;

    /// A machine whose forwards take a millisecond and a tenth of one more for each row of all but one.
    fn machine() -> CostTable {
        let mut costs = Vec::new();
        for batch in [1usize, 4, 16] {
            for rows in [1usize, 2, 4, 8, 16] {
                let all = (batch * rows) as f64;
                costs.push(Cost {
                    what: What::Forward,
                    batch,
                    rows,
                    context: 64,
                    layers: 0,
                    seconds: 1e-3 * (1.0 + 0.1 * (all - 1.0)),
                });
                costs.push(Cost {
                    what: What::Draft,
                    batch,
                    rows,
                    context: 64,
                    layers: 1,
                    seconds: 1e-4,
                });
            }
        }
        CostTable::new(&costs, Vec::new())
    }

    #[test]
    fn trees_shrink_as_the_batch_grows_until_drafting_does_not_pay() {
        let rate = |value: f64| vec![Band::exactly(value)];
        let shapes = from_rates(&[0.6; 6].map(rate));
        let draft = Drafted {
            name: "eagle3".into(),
            layers: 1,
            tokens: None,
            shapes,
        };
        let planned = choose(&machine(), &[draft], &[1, 2, 4, 8, 16], 64).expect("a plan");
        let totals: Vec<usize> = planned.choices.iter().map(|c| c.budget.total).collect();
        assert!(totals.windows(2).all(|w| w[0] >= w[1]), "{totals:?}");
        assert!(totals[0] == 3 && totals[4] == 1, "{totals:?}");
        let off = planned.off_from_batch.expect("off somewhere");
        assert!(
            planned
                .choices
                .iter()
                .all(|c| (c.batch >= off) == c.draft.is_none())
        );
        // At batch 1 by hand: a chain of g has 1 + 0.6 + .. tokens in 1 + 0.1 g + 0.1 g milliseconds.
        let tau = |g: i32| (0..=g).map(|i| 0.6f64.powi(i)).sum::<f64>();
        let by_hand = (1..=6).map(|g| tau(g) / (1.0 + 0.1 * f64::from(g) + 0.1 * f64::from(g)));
        let best = by_hand.fold(0.0, f64::max) * 1e3;
        let found = planned.choices[0].tokens_per_s.value;
        assert!((found - best).abs() < 1e-6 * best, "{found} for {best}");
    }

    #[test]
    fn a_draft_whose_depth_was_not_measured_is_refused() {
        let draft = Drafted {
            name: "scylla".into(),
            layers: 4,
            tokens: None,
            shapes: from_rates(&[vec![Band {
                value: 0.5,
                low: 0.4,
                high: 0.6,
            }]]),
        };
        let error = choose(&machine(), &[draft], &[1], 64).expect_err("not known");
        assert!(error.to_string().contains("4 layers"), "{error}");
    }
}
