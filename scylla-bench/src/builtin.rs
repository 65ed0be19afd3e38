//! What the registry knows without being told: the drafts, rules and aligners of this project.

use scylla_core::plugin::{DraftModel, Verifier};
use scylla_draft::{Hybrid, Ngram, Suffix};
use scylla_verify::{
    Block, Chain, DeterministicTree, Greedy, KSeq, RrsWithoutReplacement, SpecInfer, Traversal,
    Typical,
};
use serde::Deserialize;
use toml::Table;

use crate::context::{DraftContext, parse};
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
            Ok(Box::new(s.suffix()?))
        });
        registry.draft("hybrid", hybrid);
        for name in drafts::NETWORKS {
            registry.draft(name, move |context, settings| {
                Ok(Box::new(drafts::with_network(name, context, settings)?))
            });
        }
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

impl SuffixSettings {
    fn suffix(&self) -> Result<Suffix> {
        Ok(Suffix::new(self.shortest, self.per_match)?)
    }
}

/// `hybrid`: a suffix draft's settings and its own beside those of a draft with a network, which `network` names.
fn hybrid(context: &DraftContext<'_>, mut settings: Table) -> Result<Box<dyn DraftModel>> {
    let repeats = drafts::take(&mut settings, &["shortest", "per_match"]);
    let repeats: SuffixSettings = parse("draft", repeats)?;
    let own: HybridSettings = parse("draft", drafts::take(&mut settings, &["network", "sure"]))?;
    let name = match &own.network {
        Some(name) => name,
        None => drafts::network_of(context)?,
    };
    let network = drafts::with_network(name, context, settings)?;
    Ok(Box::new(Hybrid::new(repeats.suffix()?, network, own.sure)?))
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct HybridSettings {
    network: Option<String>,
    sure: f64,
}

impl Default for HybridSettings {
    fn default() -> Self {
        Self {
            network: None,
            sure: 0.6,
        }
    }
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
