//! Experiment files: one TOML file says everything, and any field can be overridden on the command line.

use std::path::{Path, PathBuf};

use scylla_core::engine::Options;
use scylla_core::files::read_text;
use scylla_core::model::WeightForm;
use scylla_core::plugin::BudgetPolicy;
use scylla_core::policy::{AdaptiveBudget, BudgetTable, FixedBudget, NoDrafting};
use scylla_core::sampling::Sampling;
use scylla_core::tree::Budget;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::prompts::PromptSpec;
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
    pub prompts: PromptSpec,
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
            model: DEFAULT_TARGET.into(),
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

/// How much is drafted: limits of the trees, and who chooses within them. Where no limit is given the machine's costs
/// decide (`auto`); limits that are given are the budget (`fixed`), unless a policy is named beside them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "GivenBudget")]
pub struct BudgetSpec {
    /// Nodes verified, root included.
    pub total: usize,
    /// Children per node.
    pub width: usize,
    /// Expansion steps after level 0.
    pub depth: usize,
    /// Who chooses.
    #[serde(skip_serializing_if = "PolicyKind::is_fixed")]
    pub policy: PolicyKind,
    /// For `table`: budgets by batch. They take the place of the limits above.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub table: Vec<TableRow>,
}

/// A budget as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GivenBudget {
    total: Option<usize>,
    width: Option<usize>,
    depth: Option<usize>,
    policy: Option<PolicyKind>,
    #[serde(default)]
    table: Vec<TableRow>,
}

impl From<GivenBudget> for BudgetSpec {
    fn from(given: GivenBudget) -> Self {
        let usual = Self::default();
        let limited = given.total.or(given.width).or(given.depth).is_some();
        Self {
            total: given.total.unwrap_or(usual.total),
            width: given.width.unwrap_or(usual.width),
            depth: given.depth.unwrap_or(usual.depth),
            policy: given
                .policy
                .unwrap_or(match limited || !given.table.is_empty() {
                    true => PolicyKind::Fixed,
                    false => usual.policy,
                }),
            table: given.table,
        }
    }
}

/// Who chooses the budget of a step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PolicyKind {
    /// The limits are the budget.
    #[default]
    Fixed,
    /// As `adaptive`, by costs that were measured once on this machine and are kept: at one request at a time the same
    /// tokens again, whatever the clock says.
    Auto,
    /// What pays by measured costs and recent acceptance, within the limits.
    Adaptive,
    /// A table of budgets by batch.
    Table,
    /// Nothing is drafted.
    Off,
}

impl PolicyKind {
    fn is_fixed(&self) -> bool {
        *self == Self::Fixed
    }
}

/// The budget for batches from a size on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableRow {
    /// The smallest batch.
    pub batch: usize,
    /// Nodes verified, root included.
    pub total: usize,
    /// Children per node.
    pub width: usize,
    /// Expansion steps after level 0.
    pub depth: usize,
}

impl Default for BudgetSpec {
    fn default() -> Self {
        Self {
            policy: PolicyKind::Auto,
            ..Budget::chain(8).into()
        }
    }
}

impl From<Budget> for BudgetSpec {
    fn from(b: Budget) -> Self {
        Self {
            total: b.total,
            width: b.width,
            depth: b.depth,
            policy: PolicyKind::Fixed,
            table: Vec::new(),
        }
    }
}

impl BudgetSpec {
    fn by_batch(&self) -> Result<BudgetTable> {
        let row = |r: &TableRow| {
            let budget = Budget {
                total: r.total,
                width: r.width,
                depth: r.depth,
            };
            (r.batch, budget)
        };
        Ok(BudgetTable::new(self.table.iter().map(row).collect())?)
    }

    /// What a request may draft at most.
    pub fn limits(&self) -> Budget {
        match self.policy {
            PolicyKind::Off => Budget::OFF,
            PolicyKind::Table => self.by_batch().map_or(Budget::OFF, |table| table.most()),
            PolicyKind::Fixed | PolicyKind::Auto | PolicyKind::Adaptive => Budget {
                total: self.total,
                width: self.width,
                depth: self.depth,
            },
        }
    }

    /// Who chooses; of `auto`, who does before the machine's costs are known ([`crate::Session::settle`]).
    ///
    /// # Errors
    /// If a table is asked for that is none.
    pub fn policy(&self) -> Result<Box<dyn BudgetPolicy>> {
        Ok(match self.policy {
            // Until a session knows what steps cost here, nothing goes by the clock.
            PolicyKind::Fixed | PolicyKind::Auto => Box::new(FixedBudget),
            PolicyKind::Adaptive => Box::new(AdaptiveBudget::default()),
            PolicyKind::Table => Box::new(self.by_batch()?),
            PolicyKind::Off => Box::new(NoDrafting),
        })
    }

    /// Checks ranges, and that a table is there where one is asked for, and only there.
    ///
    /// # Errors
    /// Names what is wrong.
    pub fn check(&self) -> Result<()> {
        if self.policy == PolicyKind::Table {
            self.by_batch()?;
        } else if !self.table.is_empty() {
            return Err(Error::Experiment(
                "budget.table is given, and budget.policy is not table".into(),
            ));
        }
        Ok(self.limits().check()?)
    }
}

/// How it is run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Run {
    /// Seed of the random streams. TOML has no whole numbers from 2^63 on; such a one stands as a text.
    #[serde(with = "wide")]
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
    /// Several of them, compared one after the other; empty takes `batch` alone.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub batches: Vec<usize>,
    /// Conversations for each slot of one of several batches, at least.
    pub per_slot: usize,
    /// Conversations that begin in a second, at random times; 0: another begins when one ends.
    pub rate: f64,
    /// Rows of prompts that run in one step.
    pub prompt_rows: usize,
    /// MiB for caches of sequences; 0 sets no limit.
    pub cache_mib: usize,
    /// Sequences whose rows are kept for prompts that begin alike.
    pub kept: usize,
    /// Decodes past EOS.
    pub ignore_eos: bool,
    /// Texts that end a sequence.
    pub stop: Vec<String>,
    /// What is recorded beside cycles and steps.
    #[serde(skip_serializing_if = "TraceKind::is_light")]
    pub trace: TraceKind,
    /// Where results go; empty takes the next free `runs/bench-NNN`.
    pub output: PathBuf,
}

/// What is recorded of a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum TraceKind {
    /// Cycles and steps.
    #[default]
    Light,
    /// Also what each draft could have proposed at every place of the target's own text ([`crate::trace`]).
    Dense,
}

impl TraceKind {
    fn is_light(&self) -> bool {
        *self == Self::Light
    }
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
            batches: Vec::new(),
            per_slot: 2,
            rate: 0.0,
            prompt_rows: 128,
            cache_mib: 0,
            kept: 0,
            ignore_eos: false,
            stop: Vec::new(),
            trace: TraceKind::Light,
            output: PathBuf::new(),
        }
    }
}

impl Run {
    /// The batches that are compared.
    pub fn batches(&self) -> Vec<usize> {
        match self.batches.is_empty() {
            true => vec![self.batch],
            false => self.batches.clone(),
        }
    }

    /// How an engine is run for a batch of this size.
    pub fn options(&self, batch: usize) -> Options {
        Options {
            batch,
            prompt_rows: self.prompt_rows,
            memory: (self.cache_mib > 0).then_some(self.cache_mib << 20),
            kept: self.kept,
        }
    }
}

/// What an experiment calls the default model.
const DEFAULT_TARGET: &str = "default";

/// Whether a decoder of a comparison has a draft that is shipped: one with weights, whose folder is not named.
fn is_shipped(decoder: &Table) -> bool {
    let draft = decoder.get("draft").and_then(|draft| draft.as_table());
    let name = |draft: &Table| draft.get("name")?.as_str().map(str::to_string);
    draft.is_some_and(|draft| {
        let named = name(draft).unwrap_or_default();
        !draft.contains_key("dir") && ["eagle3", "hybrid", "scylla"].contains(&&*named)
    })
}

/// The table of an experiment file.
pub(crate) fn table_of(path: &Path) -> Result<Table> {
    read_text(path)?
        .parse()
        .map_err(|e| Error::file(path, format!("not TOML: {e}")))
}

/// The experiment that a table says.
pub(crate) fn said<T: serde::de::DeserializeOwned>(table: Table) -> Result<T> {
    T::deserialize(table).map_err(|e| Error::Experiment(e.to_string().trim().replace('\n', " ")))
}

impl Experiment {
    /// Reads an experiment file (or the default one) and applies overrides. Of the default one the shipped drafts are left out
    /// where the target is not the default model, which they are for.
    ///
    /// # Errors
    /// If the file cannot be read, or says what is not understood.
    pub fn load(file: Option<&Path>, overrides: &[Override]) -> Result<Self> {
        let (text, path) = match file {
            Some(path) => (read_text(path)?, path),
            None => (DEFAULT.to_string(), Path::new("the default experiment")),
        };
        let table: Table = text
            .parse()
            .map_err(|e| Error::file(path, format!("not TOML: {e}")))?;
        let mut experiment = Self::from_table(table, overrides)?;
        if file.is_none() && experiment.target.model != DEFAULT_TARGET {
            let before = experiment.compare.len();
            experiment.compare.retain(|decoder| !is_shipped(decoder));
            if experiment.compare.len() < before {
                crate::cli::warn(
                    "the shipped drafts are for the default model, and are left out of the default comparison",
                );
            }
        }
        Ok(experiment)
    }

    /// An experiment of overrides alone.
    ///
    /// # Errors
    /// If one of them is not understood.
    pub fn from_overrides(overrides: &[Override]) -> Result<Self> {
        Self::from_table(Table::new(), overrides)
    }

    fn from_table(mut table: Table, overrides: &[Override]) -> Result<Self> {
        for one in overrides {
            one.clone().apply(&mut table);
        }
        let experiment: Self = said(table)?;
        experiment.check()?;
        Ok(experiment)
    }

    /// Checks what can be known without a model.
    pub fn check(&self) -> Result<()> {
        let bad = |message: String| Err(Error::Experiment(message));
        self.sampling.check()?;
        self.prompts.date()?;
        self.budget.check()?;
        if self.run.batch == 0 || self.run.repeats == 0 || self.run.max_new_tokens == 0 {
            return bad(format!(
                "run.batch {}, run.repeats {} and run.max_new_tokens {} must each be at least 1",
                self.run.batch, self.run.repeats, self.run.max_new_tokens
            ));
        }
        let run = &self.run;
        let batches = run.batches.iter().chain([&run.batch]);
        if let Some(batch) = batches.into_iter().find(|b| !(1..=256).contains(*b)) {
            return bad(format!("a batch of {batch}: it must be 1 to 256"));
        }
        if run.prompt_rows == 0 || run.kept > 256 {
            return bad(format!(
                "run.prompt_rows {} must be at least 1, and run.kept {} at most 256",
                run.prompt_rows, run.kept
            ));
        }
        if run.cache_mib > 1 << 30 {
            return bad(format!("run.cache_mib {} is above 2^30", run.cache_mib));
        }
        if !(run.rate.is_finite() && run.rate >= 0.0) {
            return bad(format!(
                "run.rate {} must be a number of conversations a second, 0 for none",
                run.rate
            ));
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
        // A rule belongs to a draft: what is compared with is the target's own law.
        let plain = Self {
            draft: Named::default(),
            budget: Budget::OFF.into(),
            verifier: VerifierSpec::default(),
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
            let given = overrides.get("budget").and_then(Value::as_table);
            if given.is_some_and(|b| !b.is_empty() && !b.contains_key("policy"))
                && let Some(budget) = table.get_mut("budget").and_then(Value::as_table_mut)
                && self.budget.policy == PolicyKind::Auto
            {
                budget.remove("policy"); // limits of its own are its budget
            }
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

/// One field of an experiment and the value it gets. The value travels as it is, never as text that is parsed again.
#[derive(Debug, Clone, PartialEq)]
pub struct Override {
    keys: Vec<String>,
    value: Value,
}

impl Override {
    /// A field by its path, as `run.seed`.
    pub fn new(path: &str, value: impl Into<Value>) -> Self {
        Self {
            keys: path.split('.').map(str::to_string).collect(),
            value: value.into(),
        }
    }

    /// A field that is a whole number.
    pub fn number(path: &str, value: u64) -> Self {
        Self::new(path, wide::value(value))
    }

    /// `a.b=value`, as users write it; the value is TOML where it parses as such, else a text.
    ///
    /// # Errors
    /// If it is not of that form.
    pub fn parse(text: &str) -> Result<Self> {
        let form = || Error::Experiment(format!("override `{text}` is not of the form key=value"));
        let (path, value) = text.split_once('=').ok_or_else(form)?;
        let value = value.trim();
        let parsed = format!("v = {value}")
            .parse::<Table>()
            .ok()
            .filter(|t| t.len() == 1)
            .and_then(|mut t| t.remove("v"));
        let found = Self::new(path.trim(), parsed.unwrap_or_else(|| value.into()));
        match found.keys.iter().any(String::is_empty) {
            true => Err(form()),
            false => Ok(found),
        }
    }

    /// Those of `--set`.
    ///
    /// # Errors
    /// If one is not of the form key=value.
    pub fn parse_all(texts: &[String]) -> Result<Vec<Self>> {
        texts.iter().map(|text| Self::parse(text)).collect()
    }

    /// Lays the value on a table; where its first key names a list of tables, on each of them.
    pub(crate) fn apply_to_lists(self, table: &mut Table) {
        let Some((first, rest)) = self.keys.split_first() else {
            return;
        };
        match table.get_mut(first) {
            Some(Value::Array(all)) if !rest.is_empty() => {
                for one in all.iter_mut().filter_map(Value::as_table_mut) {
                    let keys = rest.to_vec();
                    let value = self.value.clone();
                    Self { keys, value }.apply(one);
                }
            }
            _ => self.apply(table),
        }
    }

    /// Lays the value on a table.
    pub(crate) fn apply(self, table: &mut Table) {
        let mut value = self.value;
        for key in self.keys.into_iter().rev() {
            value = Value::Table(Table::from_iter([(key, value)]));
        }
        if let Value::Table(over) = value {
            merge(table, over);
        }
    }
}

/// Whole numbers of 64 bits in TOML, whose own have 63 and a sign.
mod wide {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use toml::Value;

    pub(super) fn value(number: u64) -> Value {
        match i64::try_from(number) {
            Ok(number) => Value::Integer(number),
            Err(_) => Value::String(number.to_string()),
        }
    }

    pub(super) fn serialize<S: Serializer>(number: &u64, to: S) -> Result<S::Ok, S::Error> {
        value(*number).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
        let found = Value::deserialize(from)?;
        let number = match &found {
            Value::Integer(number) => u64::try_from(*number).ok(),
            Value::String(text) => text.trim().parse().ok(),
            _ => None,
        };
        number.ok_or_else(|| {
            D::Error::custom(format!(
                "{found} is no whole number of 64 bits without sign"
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn load(overrides: &[&str]) -> Result<Experiment> {
        let parse = |s: &&str| Override::parse(s);
        Experiment::from_overrides(&overrides.iter().map(parse).collect::<Result<Vec<_>>>()?)
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
    fn a_budget_that_is_given_is_kept_and_any_other_is_chosen() {
        let policy = |overrides: &[&str]| load(overrides).map(|e| e.budget.policy).ok();
        assert_eq!(policy(&[]), Some(PolicyKind::Auto));
        assert_eq!(policy(&["draft.name=ngram"]), Some(PolicyKind::Auto));
        for key in ["total=4", "width=1", "depth=2"] {
            let set = format!("budget.{key}");
            assert_eq!(policy(&[&set]), Some(PolicyKind::Fixed), "{set}");
            let with = |kind: &str| policy(&[&set, &format!("budget.policy={kind}")]);
            assert_eq!(with("auto"), Some(PolicyKind::Auto));
            assert_eq!(with("adaptive"), Some(PolicyKind::Adaptive));
        }
        assert_eq!(
            policy(&["budget.table=[{batch=1,total=2,width=1,depth=0}]"]),
            None
        );
        // Decoders that are compared: each has its own, or the experiment's.
        let found = load(&[
            "compare=[{draft={name='ngram'}},{draft={name='ngram'},budget={total=4,depth=2}}]",
        ]);
        let decoders = found.and_then(|e| e.decoders()).expect("valid");
        let policies: Vec<PolicyKind> = decoders.iter().map(|d| d.budget.policy).collect();
        assert_eq!(
            policies,
            [PolicyKind::Fixed, PolicyKind::Auto, PolicyKind::Fixed]
        );
        // What was resolved gives the same again.
        let again: Table = decoders[1]
            .to_toml()
            .expect("TOML")
            .parse()
            .expect("parses");
        assert_eq!(
            Experiment::from_table(again, &[]).expect("valid").budget,
            decoders[1].budget
        );
    }

    #[test]
    fn values_pass_through_as_they_are() {
        for text in [
            "it's",
            "a\"b",
            "e\u{301}",
            "a\\b",
            "x\ny = 1",
            "[run]",
            "1",
            "true",
            "\u{1F600}",
            "# no",
        ] {
            let e = Experiment::from_overrides(&[Override::new("target.model", text)]).expect(text);
            assert_eq!(e.target.model, text);
            let again: Table = e.to_toml().expect("toml").parse().expect("parses");
            assert_eq!(Experiment::from_table(again, &[]).expect("same"), e);
        }
        for text in [
            "it's",
            "a\"b",
            "e\u{301}",
            "C:\\models\\x",
            "a b # c",
            "x\nrun.seed = 1",
        ] {
            let e = load(&[&format!("target.model={text}")]).expect(text);
            assert_eq!(e.target.model, text, "a value that is no TOML is a text");
        }
        for seed in [0, 7, i64::MAX as u64, 1 << 63, u64::MAX] {
            let e =
                Experiment::from_overrides(&[Override::number("run.seed", seed)]).expect("a seed");
            assert_eq!(e.run.seed, seed);
            let again: Table = e.to_toml().expect("toml").parse().expect("parses");
            assert_eq!(
                Experiment::from_table(again, &[]).expect("same").run.seed,
                seed
            );
            assert_eq!(
                load(&[&format!("run.seed={seed}")]).expect("set").run.seed,
                seed
            );
        }
        assert!(
            load(&["run.seed=-1"]).is_err() && load(&["run.seed=18446744073709551616"]).is_err()
        );
    }

    proptest! {
        /// The law of values: what goes in comes out, of the file too.
        #[test]
        fn any_text_and_any_seed_pass_through(text in any::<String>(), seed in any::<u64>()) {
            let given = [Override::new("target.model", text.clone()), Override::number("run.seed", seed)];
            let e = Experiment::from_overrides(&given).expect("valid");
            prop_assert_eq!((&e.target.model, e.run.seed), (&text, seed));
            let again: Table = e.to_toml().expect("toml").parse().expect("parses");
            prop_assert_eq!(Experiment::from_table(again, &[]).expect("same"), e);
        }
    }

    #[test]
    fn plain_decoding_does_not_inherit_a_drafts_rule() {
        let e = load(&[
            "draft.name=ngram",
            "verifier.name=typical",
            "verifier.lossy=true",
        ])
        .expect("valid");
        let decoders = e.decoders().expect("decoders");
        assert_eq!(
            (&*decoders[0].verifier.name, decoders[0].verifier.lossy),
            ("auto", false)
        );
        assert_eq!(
            (&*decoders[1].verifier.name, decoders[1].verifier.lossy),
            ("typical", true)
        );
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
            ("prompts.date=yesterday", "prompts.date"),
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
        let other = Override::parse("target.model=other").expect("valid");
        let other = Experiment::load(None, &[other]).expect("another target");
        assert_eq!(other.compare.len(), 2);
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
