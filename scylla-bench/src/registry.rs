//! Drafts, rules and aligners by name. A new method is one file in its crate and one line here.

use std::sync::Arc;

use scylla_core::plugin::{DraftModel, Rules, Verifier};
use scylla_core::sampling::Sampling;
use scylla_core::train::Aligner;
use scylla_core::tree::Drawing;
use scylla_verify::Auto;

use crate::Result;
use crate::context::{AlignerContext, DraftContext};

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
    ) -> Result<Arc<dyn Verifier>> {
        // What a draft declares of its trees does not matter to this choice.
        let fitting = || Auto.choose(Drawing::Deterministic, width, sampling);
        let fitting = (name == AUTO).then(fitting);
        let name = fitting.as_ref().map_or(name, |rule| rule.name());
        match self.rules.iter().find(|(n, _)| n == name) {
            Some((_, make)) => make(settings).map(Arc::from),
            None => {
                let known = std::iter::once(AUTO).chain(self.rule_names());
                Err(scylla_core::Error::unknown("rule", name, known).into())
            }
        }
    }
}
