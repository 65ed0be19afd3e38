//! Drafts that were not trained, or not measured, as laws see them.

use serde::Serialize;

use super::choose::{Choice, Planned, choose};
use super::table::CostTable;
use super::training::experiment;
use super::trees::{Drafted, from_rates};
use crate::laws::{Band, Laws, Query};
use crate::{Error, Result};

/// Laws, and what steps cost where they are asked for.
#[derive(Clone, Copy)]
pub struct Prospects<'a> {
    /// What runs have.
    pub laws: &'a Laws,
    /// What steps cost.
    pub table: &'a CostTable,
    /// Of what the candidates of a node catch together, the share of each by rank.
    pub ranks: &'a [f64],
    /// Committed positions of each sequence.
    pub context: usize,
}

/// What a run of training would bring.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct More {
    /// Why it is told.
    pub what: &'static str,
    /// The recipe.
    pub family: String,
    /// D.
    pub layers: usize,
    /// T.
    pub tokens: f64,
    /// What to draft with then.
    pub choice: Choice,
}

impl More {
    fn new(what: &'static str, query: &Query, choice: Choice) -> Self {
        Self {
            what,
            family: query.family.clone(),
            layers: query.layers,
            tokens: query.tokens,
            choice,
        }
    }

    /// The run.
    pub fn query(&self) -> Query {
        Query {
            family: self.family.clone(),
            layers: self.layers,
            tokens: self.tokens,
        }
    }
}

impl Prospects<'_> {
    /// The trees of a run that a law speaks of: its rates by depth, shared out by rank, in a band as wide as tau's.
    ///
    /// # Errors
    /// If no law tells it, or acceptance by depth is not known.
    pub fn drafted(&self, query: &Query) -> Result<Drafted> {
        let said = self.laws.predict(query)?;
        if said.alpha.is_empty() {
            return Err(Error::Experiment(format!(
                "the laws know no acceptance by depth of {}: they were fitted to a table of tau alone; --alpha says it",
                query.family
            )));
        }
        let shared = |band: &Band| {
            let rate = |share: &f64| Band::exactly(band.value * share);
            self.ranks.iter().map(rate).collect()
        };
        let by_depth: Vec<Vec<Band>> = said.alpha.iter().map(shared).collect();
        let mut shapes = from_rates(&by_depth);
        // As much lower and higher as tau is; no tree brings more than its levels.
        let gain = (said.tau - 1.0).max(1e-9);
        let (low, high) = ((said.low - 1.0) / gain, (said.high - 1.0) / gain);
        for shape in &mut shapes {
            let (more, most) = (shape.tau.value - 1.0, shape.budget.levels() as f64);
            shape.tau.low = 1.0 + (more * low).min(more);
            shape.tau.high = 1.0 + (more * high).min(most).max(more);
        }
        Ok(Drafted {
            name: query.family.clone(),
            layers: query.layers,
            tokens: Some(query.tokens),
            shapes,
        })
    }

    /// Every family and depth of the laws' runs, at their most tokens; and the names of those whose depth the costs do not know.
    ///
    /// # Errors
    /// If a law does not tell one, or the costs know none.
    pub fn largest(&self) -> Result<(Vec<Drafted>, Vec<String>)> {
        let mut all: Vec<Query> = Vec::new();
        for p in self.laws.points().iter().filter(|p| !p.holdout) {
            let same = |q: &&mut Query| q.family == p.family && q.layers == p.layers;
            match all.iter_mut().find(same) {
                Some(known) => known.tokens = known.tokens.max(p.tokens),
                None => all.push(Query {
                    family: p.family.clone(),
                    layers: p.layers,
                    tokens: p.tokens,
                }),
            }
        }
        let known = |q: &Query| self.table.draft(q.layers, 1, 1.0, self.context).is_some();
        let (kept, others): (Vec<Query>, Vec<Query>) = all.into_iter().partition(known);
        let name = |q: &Query| format!("{} D {}", q.family, q.layers);
        let others: Vec<String> = others.iter().map(name).collect();
        if kept.is_empty() {
            return Err(Error::Experiment(format!(
                "the costs hold no draft as deep as {}: measure one with scylla plan --measure COSTS.csv --draft NAME:DIR",
                others.join(", ")
            )));
        }
        let kept: Result<Vec<Drafted>> = kept.iter().map(|q| self.drafted(q)).collect();
        Ok((kept?, others))
    }

    fn at(&self, query: &Query, batch: usize) -> Result<Choice> {
        let drafted = self.drafted(query)?;
        let planned = choose(self.table, &[drafted], &[batch], self.context)?;
        let none = || Error::Experiment("no batch".into());
        planned.choices.into_iter().next().ok_or_else(none)
    }

    /// What ten times the tokens, or a layer more, would bring where drafting pays most; what laws and costs do not tell is left
    /// out.
    pub fn more(&self, planned: &Planned) -> Vec<More> {
        let gain = |c: &&Choice| c.tokens_per_s.value / c.plain_tokens_per_s;
        let best = planned.choices.iter().filter(|c| c.draft.is_some());
        let best = best.max_by(|a, b| gain(a).total_cmp(&gain(b)));
        let of = |best: &Choice| Some((best.draft.clone()?, best.layers, best.tokens?, best.batch));
        let Some((family, layers, tokens, batch)) = best.and_then(of) else {
            return Vec::new();
        };
        let others = [
            ("ten times the tokens", layers, 10.0 * tokens),
            ("one layer more", layers + 1, tokens),
        ];
        let asked = others.into_iter().filter_map(|(what, layers, tokens)| {
            let query = Query {
                family: family.clone(),
                layers,
                tokens,
            };
            Some(More::new(what, &query, self.at(&query, batch).ok()?))
        });
        asked.collect()
    }

    /// The run that is expected to be fastest of those that can be trained in so many hours, by family, layers and tokens a second
    /// of training, at a batch.
    ///
    /// # Errors
    /// If none is faster than plain decoding, or none is known to laws, costs and recipes.
    pub fn best(&self, rates: &[(String, usize, f64)], hours: f64, batch: usize) -> Result<More> {
        let (mut best, mut refused): (Option<More>, _) = (None, None);
        for (family, layers, rate) in rates {
            let query = Query {
                family: family.clone(),
                layers: *layers,
                tokens: (hours * 3600.0 * rate).max(1.0),
            };
            let speed = |c: &Choice| c.tokens_per_s.value;
            match experiment(&query).and_then(|_| self.at(&query, batch)) {
                Err(e) => refused = Some(e),
                Ok(choice) if choice.draft.is_none() => {}
                Ok(choice) => {
                    let slower = |known: &More| speed(&known.choice) < speed(&choice);
                    if best.as_ref().is_none_or(slower) {
                        best = Some(More::new("to train", &query, choice));
                    }
                }
            }
        }
        let none = || {
            Error::Experiment(format!(
                "no run of {hours} hours is expected to be faster than plain decoding at batch {batch}"
            ))
        };
        best.ok_or_else(|| refused.unwrap_or_else(none))
    }
}
