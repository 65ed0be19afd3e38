//! Experiment files: one TOML file says everything, and any field can be overridden on the command line.

use std::path::{Path, PathBuf};

use scylla_core::model::WeightForm;
use scylla_core::sampling::Sampling;
use scylla_core::tree::Budget;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::{Error, Result};

/// The comparison that runs when no file is given.
pub const DEFAULT: &str = include_str!("../../assets/experiments/default.toml");

/// A whole experiment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
pub struct Experiment {
    /// The model being accelerated.
    pub target: Target,
    /// What proposes.
    pub draft: Named,
    /// The acceptance rule.
    pub verifier: VerifierSpec,
    /// The sampling transform.
    pub sampling: Sampling,
    /// Limits of the trees.
    pub budget: BudgetSpec,
    /// What is decoded.
    pub prompts: Prompts,
    /// How it is run.
    pub run: Run,
    /// Decoders compared in one interleaved run: each a table of overrides of this experiment. Without any, the
    /// experiment itself is the one decoder. Plain decoding always runs beside them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub compare: Vec<Table>,
}

/// The target and how it is held.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Target {
    /// `default`, a path, or a hub id.
    pub model: String,
    /// Form of the weights.
    pub weights: WeightForm,
    /// Positions a slot can hold; 0 takes the model's context, at most 8192.
    pub context: usize,
}

impl Default for Target {
    fn default() -> Self {
        Self {
            model: "default".into(),
            weights: WeightForm::AsIs,
            context: 0,
        }
    }
}

/// A draft by name, with its settings beside it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Named {
    /// Its name in the registry.
    pub name: String,
    /// Directory of its weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dir: Option<PathBuf>,
    /// Its own settings.
    #[serde(flatten)]
    pub settings: Table,
}

impl Default for Named {
    fn default() -> Self {
        Self {
            name: crate::registry::PLAIN.into(),
            dir: None,
            settings: Table::new(),
        }
    }
}

/// A rule by name, with its settings beside it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VerifierSpec {
    /// Its name in the registry, or `auto`.
    pub name: String,
    /// Accepts combinations that are not exact.
    pub lossy: bool,
    /// Its own settings.
    #[serde(flatten)]
    pub settings: Table,
}

impl Default for VerifierSpec {
    fn default() -> Self {
        Self {
            name: crate::registry::AUTO.into(),
            lossy: false,
            settings: Table::new(),
        }
    }
}

/// Limits of the trees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BudgetSpec {
    /// Nodes verified, root included.
    pub total: usize,
    /// Children per node.
    pub width: usize,
    /// Expansion steps after level 0.
    pub depth: usize,
}

impl Default for BudgetSpec {
    fn default() -> Self {
        Budget::chain(8).into()
    }
}

impl From<Budget> for BudgetSpec {
    fn from(b: Budget) -> Self {
        Self {
            total: b.total,
            width: b.width,
            depth: b.depth,
        }
    }
}

impl From<BudgetSpec> for Budget {
    fn from(b: BudgetSpec) -> Self {
        Self {
            total: b.total,
            width: b.width,
            depth: b.depth,
        }
    }
}

/// What is decoded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Prompts {
    /// `core`, the set that comes with the project, or a JSONL file.
    pub set: String,
    /// `dev`, `test` or `all`.
    pub part: String,
    /// Prompts per task; 0 takes all.
    pub per_task: usize,
    /// Tasks (categories); empty takes all.
    pub tasks: Vec<String>,
    /// Whether prompts are taken as they are, without the chat template.
    pub raw: bool,
}

impl Default for Prompts {
    fn default() -> Self {
        Self {
            set: crate::prompts::CORE.into(),
            part: "test".into(),
            per_task: 0,
            tasks: Vec::new(),
            raw: false,
        }
    }
}

/// How it is run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Run {
    /// Seed of the random streams.
    pub seed: u64,
    /// How often everything is repeated; medians and spreads are over repeats.
    pub repeats: usize,
    /// Threads on a CPU; 0 takes the number of cores.
    pub threads: usize,
    /// `cpu`, `cuda` or `cuda:n`.
    pub device: String,
    /// Limit of new tokens per turn.
    pub max_new_tokens: usize,
    /// Sequences decoded side by side.
    pub batch: usize,
    /// Decodes past EOS.
    pub ignore_eos: bool,
    /// Texts that end a sequence.
    pub stop: Vec<String>,
    /// Where results go; empty takes the next free `runs/bench-NNN`.
    pub output: PathBuf,
}

impl Default for Run {
    fn default() -> Self {
        Self {
            seed: 0,
            repeats: 3,
            threads: 0,
            device: "cpu".into(),
            max_new_tokens: 128,
            batch: 1,
            ignore_eos: false,
            stop: Vec::new(),
            output: PathBuf::new(),
        }
    }
}

impl Experiment {
    /// Reads an experiment file (or the default one) and applies `KEY=VALUE` overrides.
    pub fn load(file: Option<&Path>, overrides: &[String]) -> Result<Self> {
        let (text, path) = match file {
            Some(path) => (
                std::fs::read_to_string(path).map_err(Error::io(path))?,
                path,
            ),
            None => (DEFAULT.to_string(), Path::new("the default experiment")),
        };
        let table: Table = text
            .parse()
            .map_err(|e| Error::file(path, format!("not TOML: {e}")))?;
        Self::from_table(table, overrides)
    }

    /// An experiment of overrides alone.
    pub fn from_overrides(overrides: &[String]) -> Result<Self> {
        Self::from_table(Table::new(), overrides)
    }

    fn from_table(mut table: Table, overrides: &[String]) -> Result<Self> {
        for text in overrides {
            set(&mut table, text)?;
        }
        let experiment = Self::deserialize(table)
            .map_err(|e| Error::Experiment(e.to_string().trim().replace('\n', " ")))?;
        experiment.check()?;
        Ok(experiment)
    }

    /// Checks what can be known without a model.
    pub fn check(&self) -> Result<()> {
        let bad = |message: String| Err(Error::Experiment(message));
        self.sampling.check()?;
        Budget::from(self.budget).check()?;
        if self.run.batch == 0 || self.run.repeats == 0 || self.run.max_new_tokens == 0 {
            return bad(format!(
                "run.batch {}, run.repeats {} and run.max_new_tokens {} must each be at least 1",
                self.run.batch, self.run.repeats, self.run.max_new_tokens
            ));
        }
        if self.run.batch > 256 {
            return bad(format!("run.batch {} is above 256", self.run.batch));
        }
        if !["dev", "test", "all"].contains(&self.prompts.part.as_str()) {
            return Err(scylla_core::Error::unknown(
                "part of a prompt set",
                &self.prompts.part,
                ["dev", "test", "all"],
            )
            .into());
        }
        Ok(())
    }

    /// The decoders to compare: this experiment with each table of overrides, plain decoding first.
    pub fn decoders(&self) -> Result<Vec<Self>> {
        let mut base = self.clone();
        base.compare.clear();
        let plain = Self {
            draft: Named::default(),
            budget: Budget::OFF.into(),
            ..base.clone()
        };
        let whole = |e: toml::ser::Error| Error::Experiment(e.to_string());
        let mut decoders = vec![plain];
        if self.compare.is_empty() && self.draft.name != crate::registry::PLAIN {
            decoders.push(base.clone());
        }
        for overrides in &self.compare {
            if let Some(key) = overrides
                .keys()
                .find(|k| !["draft", "verifier", "budget"].contains(&k.as_str()))
            {
                return Err(Error::Experiment(format!(
                    "[[compare]] may set draft, verifier and budget, not `{key}`"
                )));
            }
            let mut table = Table::try_from(&base).map_err(whole)?;
            merge(&mut table, overrides.clone());
            decoders.push(Self::from_table(table, &[])?);
        }
        Ok(decoders)
    }

    /// The file that says the same.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string_pretty(self).map_err(|e| Error::Experiment(e.to_string()))
    }
}

/// Lays `over` on `table`, table by table.
fn merge(table: &mut Table, over: Table) {
    for (key, value) in over {
        match (table.get_mut(&key), value) {
            (Some(Value::Table(inner)), Value::Table(over)) => merge(inner, over),
            (_, value) => {
                table.insert(key, value);
            }
        }
    }
}

/// Applies one `a.b=value`; the value is TOML where it parses as such, else a text.
pub(crate) fn set(table: &mut Table, text: &str) -> Result<()> {
    let form = || Error::Experiment(format!("override `{text}` is not of the form key=value"));
    let (path, value) = text.split_once('=').ok_or_else(form)?;
    let value = value.trim();
    let parsed = format!("v = {value}")
        .parse::<Table>()
        .ok()
        .and_then(|mut t| t.remove("v"));
    let mut value = parsed.unwrap_or_else(|| Value::String(value.into()));
    let keys: Vec<&str> = path.trim().split('.').collect();
    if keys.iter().any(|k| k.is_empty()) {
        return Err(form());
    }
    for key in keys.into_iter().rev() {
        value = Value::Table(Table::from_iter([(key.to_string(), value)]));
    }
    if let Value::Table(over) = value {
        merge(table, over);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(overrides: &[&str]) -> Result<Experiment> {
        let overrides: Vec<String> = overrides.iter().map(|s| s.to_string()).collect();
        Experiment::from_overrides(&overrides)
    }

    #[test]
    fn overrides_reach_every_depth_and_type() {
        let e = load(&[
            "draft.name=ngram",
            "draft.longest=5",
            "budget.total=60",
            "sampling.temperature=0.7",
            "run.stop=[\"a\"]",
        ])
        .expect("valid");
        assert_eq!(e.draft.name, "ngram");
        assert_eq!(e.draft.settings["longest"], Value::Integer(5));
        assert_eq!((e.budget.total, e.sampling.temperature), (60, 0.7));
        assert_eq!(e.run.stop, ["a"]);
    }

    #[test]
    fn what_is_misspelt_or_out_of_range_is_named() {
        for (set, word) in [
            ("run.repaets=3", "repaets"),
            ("run.batch=0", "run.batch 0"),
            ("sampling.temperature=-1", "temperature is -1"),
            ("budget.total=0", "budget total 0"),
            ("prompts.part=train", "dev, test, all"),
            ("target.weights=q3", "q3"),
            ("nonsense", "key=value"),
            ("=3", "key=value"),
        ] {
            let error = load(&[set])
                .err()
                .unwrap_or_else(|| panic!("{set} passed"))
                .to_string();
            assert!(error.contains(word), "{set}: {error}");
        }
    }

    #[test]
    fn the_default_experiment_compares_and_survives_a_round_trip() {
        let e = Experiment::load(None, &[]).expect("default");
        let decoders = e.decoders().expect("decoders");
        assert!(decoders.len() >= 2 && decoders[0].draft.name == "plain");
        let again: Table = e.to_toml().expect("toml").parse().expect("parses");
        assert_eq!(Experiment::from_table(again, &[]).expect("same"), e);
    }

    #[test]
    fn a_comparison_overrides_decoders_only() {
        let mut e = load(&["draft.name=ngram"]).expect("valid");
        e.compare = vec!["run.repeats = 9".parse().expect("toml")];
        assert!(
            e.decoders()
                .expect_err("refused")
                .to_string()
                .contains("run")
        );
        e.compare = vec!["draft.longest = 3\nbudget.total = 4".parse().expect("toml")];
        let decoders = e.decoders().expect("decoders");
        assert_eq!(decoders[1].budget.total, 4);
        assert_eq!(decoders[1].draft.name, "ngram");
    }
}
