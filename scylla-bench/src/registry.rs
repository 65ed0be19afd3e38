//! Drafts, rules and aligners by name. A new method is one file in its crate and one line here.

use std::path::PathBuf;

use scylla_core::plugin::{DraftModel, TargetShape, Verifier};
use scylla_core::sampling::Sampling;
use scylla_core::train::Aligner;
use scylla_draft::{Ngram, Suffix};
use scylla_verify::{
    Block, Chain, DeterministicTree, Greedy, KSeq, RrsWithoutReplacement, SpecInfer, Traversal,
    Typical,
};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::aligners::{self, AlignerContext};
use crate::{Error, Result, Session, drafts};

/// What a draft may want to know when it is made.
pub struct DraftContext<'a> {
    /// Sizes of the target.
    pub target: TargetShape,
    /// The draft's weights, where some were given: a directory, a file, or a hub id.
    pub dir: Option<PathBuf>,
    /// The loaded target.
    pub session: &'a Session,
}

impl DraftContext<'_> {
    /// Sha256 of the target, computed when first asked for.
    ///
    /// # Errors
    /// If its files cannot be read any more.
    pub fn target_hash(&self) -> Result<&str> {
        self.session.target_hash()
    }
}

type MakeDraft =
    dyn Fn(&DraftContext<'_>, toml::Table) -> Result<Box<dyn DraftModel>> + Send + Sync;
type MakeRule = dyn Fn(toml::Table) -> Result<Box<dyn Verifier>> + Send + Sync;
type MakeAligner = dyn Fn(&AlignerContext, toml::Table) -> Result<Box<dyn Aligner>> + Send + Sync;

/// Everything that can be named in an experiment.
pub struct Registry {
    drafts: Vec<(String, Box<MakeDraft>)>,
    rules: Vec<(String, Box<MakeRule>)>,
    aligners: Vec<(String, Box<MakeAligner>)>,
}

/// Name of plain decoding, wherever a draft is named.
pub const PLAIN: &str = "plain";

/// Name of the rule that fits sampling and budget: `greedy` at temperature 0, else `chain` for a width of 1, and
/// `traversal` for trees.
pub const AUTO: &str = "auto";

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

/// Reads the settings that stand beside a name in an experiment.
pub fn parse<T: DeserializeOwned>(what: &str, settings: toml::Table) -> Result<T> {
    T::deserialize(settings).map_err(|e| Error::Experiment(format!("[{what}]: {}", e.message())))
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

impl Registry {
    /// A registry that knows nothing.
    pub fn empty() -> Self {
        Self {
            drafts: Vec::new(),
            rules: Vec::new(),
            aligners: Vec::new(),
        }
    }

    /// Registers a draft under a name; a later one of the same name replaces it.
    pub fn draft(
        &mut self,
        name: &str,
        make: impl Fn(&DraftContext<'_>, toml::Table) -> Result<Box<dyn DraftModel>>
        + Send
        + Sync
        + 'static,
    ) {
        self.drafts.retain(|(n, _)| n != name);
        self.drafts.push((name.into(), Box::new(make)));
    }

    /// Registers a rule under a name; a later one of the same name replaces it.
    pub fn rule(
        &mut self,
        name: &str,
        make: impl Fn(toml::Table) -> Result<Box<dyn Verifier>> + Send + Sync + 'static,
    ) {
        self.rules.retain(|(n, _)| n != name);
        self.rules.push((name.into(), Box::new(make)));
    }

    /// Registers an aligner under a name; a later one of the same name replaces it.
    pub fn aligner(
        &mut self,
        name: &str,
        make: impl Fn(&AlignerContext, toml::Table) -> Result<Box<dyn Aligner>> + Send + Sync + 'static,
    ) {
        self.aligners.retain(|(n, _)| n != name);
        self.aligners.push((name.into(), Box::new(make)));
    }

    /// Names of the aligners.
    pub fn aligner_names(&self) -> Vec<&str> {
        self.aligners.iter().map(|(n, _)| n.as_str()).collect()
    }

    /// Makes an aligner.
    pub fn make_aligner(
        &self,
        name: &str,
        context: &AlignerContext,
        settings: toml::Table,
    ) -> Result<Box<dyn Aligner>> {
        match self.aligners.iter().find(|(n, _)| n == name) {
            Some((_, make)) => make(context, settings),
            None => Err(scylla_core::Error::unknown("aligner", name, self.aligner_names()).into()),
        }
    }

    /// Names of the drafts, plain decoding first.
    pub fn draft_names(&self) -> Vec<&str> {
        std::iter::once(PLAIN)
            .chain(self.drafts.iter().map(|(n, _)| n.as_str()))
            .collect()
    }

    /// Names of the rules.
    pub fn rule_names(&self) -> Vec<&str> {
        self.rules.iter().map(|(n, _)| n.as_str()).collect()
    }

    /// Makes a draft; `None` for plain decoding.
    pub fn make_draft(
        &self,
        name: &str,
        context: &DraftContext<'_>,
        settings: toml::Table,
    ) -> Result<Option<Box<dyn DraftModel>>> {
        if name == PLAIN {
            return Ok(None);
        }
        match self.drafts.iter().find(|(n, _)| n == name) {
            Some((_, make)) => make(context, settings).map(Some),
            None => Err(scylla_core::Error::unknown("draft", name, self.draft_names()).into()),
        }
    }

    /// Makes a rule; sampling and the budget's width decide what [`AUTO`] means.
    pub fn make_rule(
        &self,
        name: &str,
        sampling: &Sampling,
        width: usize,
        settings: toml::Table,
    ) -> Result<Box<dyn Verifier>> {
        let name = match name {
            AUTO if sampling.is_greedy() => "greedy",
            AUTO if width <= 1 => "chain",
            AUTO => "traversal",
            name => name,
        };
        match self.rules.iter().find(|(n, _)| n == name) {
            Some((_, make)) => make(settings),
            None => {
                let known = std::iter::once(AUTO).chain(self.rule_names());
                Err(scylla_core::Error::unknown("rule", name, known).into())
            }
        }
    }
}
