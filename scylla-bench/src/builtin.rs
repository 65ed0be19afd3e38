//! What the registry knows without being told: the drafts, rules and aligners of this project.

use scylla_core::plugin::Verifier;
use scylla_draft::{Ngram, Suffix};
use scylla_verify::{
    Block, Chain, DeterministicTree, Greedy, KSeq, RrsWithoutReplacement, SpecInfer, Traversal,
    Typical,
};
use serde::Deserialize;

use crate::context::parse;
use crate::registry::Registry;
use crate::{Error, Result, aligners, drafts};

impl Default for Registry {
    fn default() -> Self {
        let mut registry = Self::empty();
        registry.draft("ngram", |_, settings| {
            let s: NgramSettings = parse("draft", settings)?;
            Ok(Box::new(Ngram::new(s.shortest, s.longest)?))
        });
        registry.draft("suffix", |_, settings| {
            let s: SuffixSettings = parse("draft", settings)?;
            Ok(Box::new(Suffix::new(s.shortest, s.per_match)?))
        });
        registry.draft("draft-lm", drafts::draft_lm);
        registry.draft("eagle2", drafts::eagle2);
        registry.draft("eagle3", drafts::eagle3);
        registry.draft("hass", drafts::hass);
        registry.draft("scylla", drafts::scylla);
        registry.rule("greedy", |settings| no_settings(settings, Greedy));
        registry.rule("chain", |settings| no_settings(settings, Chain));
        registry.rule("block", |settings| no_settings(settings, Block));
        registry.rule("deterministic-tree", |settings| {
            no_settings(settings, DeterministicTree)
        });
        registry.rule("rrs-without-replacement", |settings| {
            no_settings(settings, RrsWithoutReplacement)
        });
        registry.rule("specinfer", |settings| no_settings(settings, SpecInfer));
        registry.rule("k-seq", |settings| no_settings(settings, KSeq));
        registry.rule("traversal", |settings| no_settings(settings, Traversal));
        registry.rule("typical", |settings| {
            let s: TypicalSettings = parse("verifier", settings)?;
            Ok(Box::new(Typical::new(s.epsilon, s.delta)?))
        });
        aligners::register(&mut registry);
        registry
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct NgramSettings {
    shortest: usize,
    longest: usize,
}

impl Default for NgramSettings {
    fn default() -> Self {
        Self {
            shortest: 2,
            longest: 4,
        }
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct SuffixSettings {
    shortest: usize,
    per_match: f64,
}

impl Default for SuffixSettings {
    fn default() -> Self {
        Self {
            shortest: 2,
            per_match: 4.0,
        }
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct TypicalSettings {
    epsilon: f64,
    delta: f64,
}

impl Default for TypicalSettings {
    fn default() -> Self {
        let Typical { epsilon, delta } = Typical::default();
        Self { epsilon, delta }
    }
}

fn no_settings<V: Verifier + 'static>(settings: toml::Table, rule: V) -> Result<Box<dyn Verifier>> {
    match settings.keys().next() {
        Some(key) => Err(Error::Experiment(format!(
            "[verifier]: rule `{}` has no setting `{key}`",
            rule.name()
        ))),
        None => Ok(Box::new(rule)),
    }
}
