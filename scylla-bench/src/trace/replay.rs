//! Decoding again from a trace, without target and draft.

use scylla_core::chance::Seeded;
use scylla_core::engine::{Walk, walk_each};
use scylla_core::plugin::{Drafting, Outlook, Request};
use scylla_core::policy::{Acceptance, Costs};
use scylla_core::sampling::Sampling;
use scylla_core::tree::{Budget, Drawing};
use scylla_draft::tree::{TreeKind, TreeSettings, regrow};
use serde::{Deserialize, Serialize};
use toml::Table;

use super::{Header, Limits, Reader};
use crate::context::parse;
use crate::experiment::{BudgetSpec, Override, PolicyKind, VerifierSpec};
use crate::stats::AlphaCounts;
use crate::{Error, Registry, Result};

/// What a trace is replayed with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Replay {
    /// Limits of the trees, and who chooses within them; those recorded where nothing is said.
    pub budget: BudgetSpec,
    /// The tree of the draft, whose weights are those recorded.
    pub draft: TreeSettings,
    /// The rule.
    pub verifier: VerifierSpec,
    /// Of the run, the limit of new tokens alone.
    pub run: Limit,
}

/// The limit of new tokens.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limit {
    /// At most as many as were recorded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_new_tokens: Option<usize>,
}

impl Default for Replay {
    fn default() -> Self {
        Self {
            budget: Budget::OFF.into(),
            draft: TreeSettings::default(),
            verifier: VerifierSpec::default(),
            run: Limit::default(),
        }
    }
}

/// What a replay found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Replayed {
    /// Mean tokens per cycle, bonus included.
    pub tau: f64,
    /// Acceptance by depth given the depth above.
    pub alpha: Vec<Option<f64>>,
    /// Tokens of all answers.
    pub tokens: u64,
    /// Cycles.
    pub count: u64,
    /// Texts, each a turn of a prompt.
    pub texts: u64,
    /// The draft that was recorded.
    pub draft: String,
    /// Its target.
    pub target: String,
    /// The largest budget recorded.
    pub recorded: Limits,
    /// What was replayed.
    pub budget: BudgetSpec,
}

/// A refusal that says what stands in the way.
fn cannot(what: &str, why: impl std::fmt::Display) -> Error {
    Error::Experiment(format!("{what} cannot be replayed: {why}"))
}

impl Replay {
    /// Settings for a trace, from overrides as users write them.
    ///
    /// # Errors
    /// If one is not understood.
    pub fn of(header: &Header, overrides: &[Override]) -> Result<Self> {
        let recorded = Self {
            budget: Budget::from(header.budget).into(),
            ..Self::default()
        };
        let whole = |e: toml::ser::Error| Error::Experiment(e.to_string());
        let mut table = Table::try_from(&recorded).map_err(whole)?;
        for one in overrides {
            one.clone().apply(&mut table);
        }
        for key in ["sampling", "target", "prompts"] {
            if table.contains_key(key) {
                return Err(cannot(
                    key,
                    "the trace holds the greedy text of one target, as it was recorded",
                ));
            }
        }
        if let Some(Some(draft)) = table.get("draft").map(toml::Value::as_table) {
            for key in ["name", "dir", "weights", "taps", "head", "head_size"] {
                if draft.contains_key(key) {
                    return Err(cannot(
                        &format!("draft.{key}"),
                        "another draft proposes other tokens; record a trace of it",
                    ));
                }
            }
        }
        parse("replay", table)
    }

    /// Checks that a trace holds what is asked of it.
    fn check(&self, registry: &Registry, header: &Header) -> Result<()> {
        self.budget.check()?;
        let (asked, recorded) = (self.budget.limits(), header.budget);
        let within = [
            ("total", asked.total, recorded.total),
            ("width", asked.width, recorded.width),
            ("depth", asked.depth, recorded.depth),
        ];
        for (key, asked, recorded) in within {
            if asked > recorded {
                return Err(cannot(
                    &format!("budget.{key} = {asked}"),
                    format!(
                        "the trace was recorded with {key} {recorded}; record it with as much as will be asked"
                    ),
                ));
            }
        }
        let by_time = match self.budget.policy {
            PolicyKind::Adaptive => Some("adaptive"),
            PolicyKind::Auto => Some("auto"),
            _ => None,
        };
        if let Some(policy) = by_time {
            return Err(cannot(
                &format!("budget.policy = {policy}"),
                "it chooses by measured time, and a trace has none",
            ));
        }
        if self.draft.early_stop {
            return Err(cannot(
                "draft.early_stop",
                "it goes by the clock, and a trace has no time",
            ));
        }
        let sampling = Sampling::default();
        let name = &self.verifier.name;
        let settings = self.verifier.settings.clone();
        let rule = registry.make_rule(name, &sampling, asked.width, settings)?;
        if !rule.exact_for(Drawing::Deterministic, asked.width, &sampling) {
            return Err(cannot(
                &format!("rule `{}`", rule.name()),
                "it commits other text than the target's own, and what follows on that was not recorded",
            ));
        }
        Ok(())
    }
}

/// Decodes every text of a trace again; `told` hears of each cycle its text (from 0 on), its nodes and the drafted tokens
/// accepted.
///
/// On the CPU, where a row's result does not depend on its company, the cycles are those of decoding greedily with these
/// settings; on a device near ties may differ.
///
/// # Errors
/// If the settings ask for what cannot be replayed, or the trace is not sound, with the line.
pub fn replay(
    registry: &Registry,
    reader: &mut Reader,
    settings: &Replay,
    told: &mut dyn FnMut(usize, usize, usize),
) -> Result<Replayed> {
    settings.check(registry, reader.header())?;
    let fixed = !matches!(settings.draft.tree, TreeKind::Dynamic | TreeKind::Auto);
    let mut shape = settings.draft.shape()?;
    let mut policy = settings.budget.policy()?;
    let (mut alpha, mut tokens, mut count, mut texts) = (AlphaCounts::default(), 0, 0, 0);
    let sampling = Sampling {
        repetition_penalty: reader.header().repetition_penalty,
        ..Sampling::default()
    };
    let (mut chance, acceptance, costs) =
        (Seeded::new(0, 0), Acceptance::default(), Costs::default());
    while let Some(text) = reader.text()? {
        let limit = settings.run.max_new_tokens.unwrap_or(text.max_new_tokens);
        if limit > text.max_new_tokens || limit == 0 {
            return Err(cannot(
                &format!("run.max_new_tokens = {limit}"),
                format!(
                    "text `{}` was recorded with {}",
                    text.prompt, text.max_new_tokens
                ),
            ));
        }
        let answer = &text.answer[..limit.min(text.answer.len())];
        let along = Walk {
            text: answer,
            prompt: 0,
            budget: settings.budget.limits(),
            max_new_tokens: limit,
            context: text.context.saturating_sub(text.prompt_tokens),
        };
        let mut propose = |root: usize, most: Budget| {
            let request = Drafting {
                most,
                positions: text.prompt_tokens + root,
                acceptance: &acceptance,
            };
            let chosen = policy.budgets(&Outlook {
                requests: &[request],
                prompt_rows: 0,
                acceptance: &acceptance,
                costs: &costs,
            });
            let chosen = chosen.first().copied().unwrap_or(Budget::OFF);
            let budget = Budget {
                width: chosen.width.clamp(1, most.width),
                ..chosen.within(most.levels(), most.total)
            };
            let place = reader
                .place(root)
                .map_err(|e| scylla_core::Error::Invalid(e.to_string()))?;
            let mut request = Request {
                slot: 0,
                root: answer[root],
                budget,
                sampling: &sampling,
                chance: &mut chance,
            };
            Ok(regrow(&mut *shape, fixed, &place.candidates, &mut request)?.tree)
        };
        walk_each(&along, &mut propose, &mut |cycle, _| {
            told(texts as usize, cycle.nodes, cycle.accepted);
            alpha.add(&cycle);
            tokens += cycle.committed as u64;
            count += 1;
        })?;
        texts += 1;
    }
    let header = reader.header();
    Ok(Replayed {
        tau: match count {
            0 => 1.0,
            _ => tokens as f64 / count as f64,
        },
        alpha: alpha.rates(),
        tokens,
        count,
        texts,
        draft: header.draft.clone(),
        target: header.target.clone(),
        recorded: header.budget,
        budget: settings.budget.clone(),
    })
}
