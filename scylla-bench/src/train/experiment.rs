//! Experiment files of training.

use std::path::{Path, PathBuf};

use scylla_core::kernels::ProductForm;
use scylla_core::plugin::TargetShape;
use scylla_core::train::{AdamWSettings, Schedule};
use scylla_core::tree::Budget;
use scylla_draft::recipe::{Eagle3Loss, EagleLoss};
use scylla_draft::tree::TreeSettings;
use serde::{Deserialize, Serialize};
use toml::Table;

use crate::context::parse;
use crate::data::documents::DataSpec;
use crate::experiment::{BudgetSpec, Experiment, Override, Run, Target, said, table_of};
use crate::prompts::PromptSpec;
use crate::{Error, Result};

/// A training run: one draft for one target, in one stage or several.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainExperiment {
    /// The target, which stays as it is.
    pub target: Target,
    /// The network.
    pub draft: TrainDraft,
    /// Settings of its recipe's loss.
    pub loss: Table,
    /// Batches.
    pub train: TrainSpec,
    /// One after the other: data and optimizer of each.
    pub stage: Vec<Stage>,
    /// How it is checked.
    pub evaluate: EvaluateSpec,
    /// Where it runs.
    pub run: RunSpec,
}

/// The network that is trained, by its name, with its shape beside it (`layers`, `vocab`, `ffn`, `heads`, `kv_heads`, `taps`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TrainDraft {
    /// `eagle2`, `eagle3`, `hass` or `scylla`.
    pub name: String,
    /// A draft to begin with, in place of random parameters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start: Option<PathBuf>,
    /// Its shape.
    #[serde(flatten)]
    pub shape: Table,
}

impl Default for TrainDraft {
    fn default() -> Self {
        Self {
            name: "eagle3".into(),
            start: None,
            shape: Table::new(),
        }
    }
}

/// Batches, and what they are computed in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainSpec {
    /// Rows of a line.
    pub length: usize,
    /// Lines of a batch.
    pub batch: usize,
    /// Batches whose gradients are added up for one step.
    pub accumulate: usize,
    /// `auto` (bf16 where the processor or the GPU multiplies it), `f32` or `bf16`: what products are computed in. Parameters
    /// and sums are f32 either way.
    pub products: String,
    /// Steps from one checkpoint to the next; 0: with each evaluation.
    pub checkpoint: u64,
}

impl Default for TrainSpec {
    fn default() -> Self {
        Self {
            length: 512,
            batch: 4,
            accumulate: 1,
            products: "auto".into(),
            checkpoint: 0,
        }
    }
}

/// A stage: what is trained on, and how.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Stage {
    /// Its name, as records print it.
    pub name: String,
    /// Steps; 0: as many as `tokens` take.
    pub steps: u64,
    /// T: tokens to train on, repeated where the data holds fewer.
    pub tokens: u64,
    /// What is trained on.
    pub data: DataSpec,
    /// The optimizer; it begins anew with each stage.
    pub optimizer: AdamWSettings,
    /// The learning rate's way.
    pub schedule: Schedule,
}

/// How a draft is checked while it is trained: on dev prompts, with the tree that will serve.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvaluateSpec {
    /// Steps from one evaluation to the next; 0: only at the end of a stage.
    pub every: u64,
    /// Which prompts.
    pub prompts: PromptSpec,
    /// Prompts at most; 0: all.
    pub count: usize,
    /// Limit of new tokens.
    pub max_new_tokens: usize,
    /// Limits of the trees.
    pub budget: BudgetSpec,
    /// The kind of tree.
    pub tree: TreeSettings,
    /// Answers decoded side by side.
    pub batch: usize,
}

impl Default for EvaluateSpec {
    fn default() -> Self {
        Self {
            every: 200,
            prompts: PromptSpec {
                part: "dev".into(),
                ..PromptSpec::default()
            },
            count: 0,
            max_new_tokens: 96,
            budget: Budget {
                total: 20,
                width: 5,
                depth: 4,
            }
            .into(),
            tree: TreeSettings::default(),
            batch: 8,
        }
    }
}

/// Where a training run computes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunSpec {
    /// Seed of parameters, of the order of data, and of noise.
    pub seed: u64,
    /// Threads on a CPU; 0 takes the number of cores.
    pub threads: usize,
    /// `cpu`, `cuda` or `cuda:n`.
    pub device: String,
    /// Whether scalars are also written as TensorBoard's event files, into the run's folder.
    #[serde(skip_serializing_if = "is_false")]
    pub tensorboard: bool,
    /// Whether metrics and summary say times and memory. Without them the same run leaves the same bytes.
    #[serde(skip_serializing_if = "is_true")]
    pub times: bool,
}

fn is_true(flag: &bool) -> bool {
    *flag
}

fn is_false(flag: &bool) -> bool {
    !*flag
}

impl Default for RunSpec {
    fn default() -> Self {
        Self {
            seed: 0,
            threads: 0,
            device: "cpu".into(),
            tensorboard: false,
            times: true,
        }
    }
}

/// What products are asked to be computed in, by name; `None` leaves the choice to the machine.
///
/// # Errors
/// If the name is unknown.
pub(crate) fn product_form(name: &str) -> Result<Option<ProductForm>> {
    let known = ["auto", "f32", "bf16"];
    match name {
        "auto" => Ok(None),
        "f32" => Ok(Some(ProductForm::F32)),
        "bf16" => Ok(Some(ProductForm::Bf16)),
        other => Err(scylla_core::Error::unknown("train.products", other, known).into()),
    }
}

impl TrainExperiment {
    /// Reads an experiment file and applies overrides. `stage.KEY` of an override is laid on every stage.
    ///
    /// # Errors
    /// If the file cannot be read, or says what is not understood.
    pub fn load(path: &Path, overrides: &[Override]) -> Result<Self> {
        Self::from_table(table_of(path)?, overrides)
    }

    /// An experiment of a table.
    ///
    /// # Errors
    /// If it says what is not understood.
    pub fn from_table(mut table: Table, overrides: &[Override]) -> Result<Self> {
        for one in overrides {
            one.clone().apply_to_lists(&mut table);
        }
        let experiment: Self = said(table)?;
        experiment.check()?;
        Ok(experiment)
    }

    /// Checks what can be known without a file or a model.
    ///
    /// # Errors
    /// Names what is wrong.
    pub fn check(&self) -> Result<()> {
        let bad = |message: String| Err(Error::Experiment(message));
        let t = &self.train;
        if !(2..=1 << 16).contains(&t.length) || t.batch == 0 || t.accumulate == 0 {
            return bad(format!(
                "train.length {} must be 2 to 65536, train.batch {} and train.accumulate {} at least 1",
                t.length, t.batch, t.accumulate
            ));
        }
        self.form()?;
        if self.stage.is_empty() {
            return bad("there is no [[stage]]: data, steps and optimizer of one at least".into());
        }
        let mut names: Vec<&str> = Vec::new();
        for (i, stage) in self.stage.iter().enumerate() {
            let place =
                |e: Error| Error::Experiment(format!("stage {} ({}): {e}", i + 1, stage.name));
            stage.data.check().map_err(place)?;
            stage.optimizer.check().map_err(|e| place(e.into()))?;
            if (stage.steps == 0) == (stage.tokens == 0) {
                return bad(format!(
                    "stage {} ({}): give steps or tokens, one of them",
                    i + 1,
                    stage.name
                ));
            }
            let steps = self.steps(stage);
            stage.schedule.check(steps).map_err(|e| place(e.into()))?;
            if names.contains(&stage.name.as_str()) {
                return bad(format!("two stages of the name `{}`", stage.name));
            }
            names.push(&stage.name);
        }
        let e = &self.evaluate;
        if e.max_new_tokens < 2 || !(1..=256).contains(&e.batch) {
            return bad(format!(
                "evaluate.max_new_tokens {} must be at least 2, evaluate.batch {} 1 to 256",
                e.max_new_tokens, e.batch
            ));
        }
        if e.prompts.part == "test" {
            return bad(
                "evaluate.prompts.part is test: drafts are chosen by dev, and reported on test"
                    .into(),
            );
        }
        if e.prompts.part == "all" && e.prompts.set == crate::prompts::CORE {
            return bad(
                "evaluate.prompts.part is all: it holds the test prompts; drafts are chosen by dev"
                    .into(),
            );
        }
        self.serving().check()
    }

    /// Rows of a step.
    pub fn rows(&self) -> u64 {
        (self.train.length * self.train.batch * self.train.accumulate) as u64
    }

    /// Steps of a stage.
    pub fn steps(&self, stage: &Stage) -> u64 {
        match stage.steps {
            0 => stage.tokens.div_ceil(self.rows()),
            steps => steps,
        }
    }

    /// What products are asked to be computed in; `None` leaves the choice to the machine.
    pub fn form(&self) -> Result<Option<ProductForm>> {
        product_form(&self.train.products)
    }

    /// What checks a draft as an experiment serves it.
    pub fn checking(experiment: &Experiment) -> Self {
        Self {
            target: experiment.target.clone(),
            evaluate: EvaluateSpec {
                prompts: experiment.prompts.clone(),
                max_new_tokens: experiment.run.max_new_tokens,
                budget: experiment.budget.clone(),
                ..EvaluateSpec::default()
            },
            ..Self::default()
        }
    }

    /// The experiment that serves the draft as it is checked.
    pub fn serving(&self) -> Experiment {
        Experiment {
            target: self.target.clone(),
            budget: self.evaluate.budget.clone(),
            prompts: self.evaluate.prompts.clone(),
            run: Run {
                seed: self.run.seed,
                threads: self.run.threads,
                device: self.run.device.clone(),
                max_new_tokens: self.evaluate.max_new_tokens,
                ..Run::default()
            },
            ..Experiment::default()
        }
    }

    /// Settings of an EAGLE-1/2, HASS or Scylla loss.
    pub fn eagle_loss(&self) -> Result<EagleLoss> {
        let mut table = self.loss.clone();
        if self.draft.name == "hass" {
            let usual = Table::try_from(EagleLoss::hass());
            for (key, value) in usual.map_err(|e| Error::Experiment(e.to_string()))? {
                table.entry(key).or_insert(value);
            }
        }
        parse("loss", table)
    }

    /// Settings of an EAGLE-3 loss.
    pub fn eagle3_loss(&self) -> Result<Eagle3Loss> {
        parse("loss", self.loss.clone())
    }

    /// The file that says the same.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string_pretty(self).map_err(|e| Error::Experiment(e.to_string()))
    }

    /// Checks that lines fit a target.
    pub fn check_target(&self, shape: &TargetShape) -> Result<()> {
        match self.train.length <= shape.context {
            true => Ok(()),
            false => Err(Error::Experiment(format!(
                "train.length {} is more than the target's context of {}",
                self.train.length, shape.context
            ))),
        }
    }

    /// Whether two experiments can share one pass of the target: what differs may be draft, loss, optimizer and schedule.
    pub fn shares_with(&self, other: &Self) -> Result<()> {
        let differs = |what: &str| {
            Err(Error::Experiment(format!(
                "experiments that are trained side by side must have the same {what}"
            )))
        };
        if self.target != other.target {
            return differs("[target]");
        }
        if self.train != other.train {
            return differs("[train]");
        }
        if self.evaluate.prompts != other.evaluate.prompts
            || self.evaluate.max_new_tokens != other.evaluate.max_new_tokens
            || self.evaluate.every != other.evaluate.every
            || self.evaluate.count != other.evaluate.count
        {
            return differs("prompts and steps of [evaluate]");
        }
        if self.run != other.run {
            return differs("[run]");
        }
        let fed = |e: &Self| -> Vec<(DataSpec, u64, String)> {
            e.stage
                .iter()
                .map(|s| (s.data.clone(), e.steps(s), s.name.clone()))
                .collect()
        };
        match fed(self) == fed(other) {
            true => Ok(()),
            false => differs("data and steps of every [[stage]]"),
        }
    }
}
