//! What a distillation is: one file.

use std::path::{Path, PathBuf};

use scylla_core::train::{AdamWSettings, Schedule};
use serde::{Deserialize, Serialize};
use toml::Table;

use crate::data::documents::DataSpec;
use crate::experiment::{Override, Target, said, table_of};
use crate::train::RunSpec;
use crate::{Error, Result};

/// A student, its teacher, the texts, and how it learns.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DistillExperiment {
    /// The teacher, which stays as it is.
    pub teacher: Target,
    /// The student.
    pub student: StudentSpec,
    /// The loss: its name, and its settings beside it.
    pub aligner: Table,
    /// Texts and conversations.
    pub data: DataSpec,
    /// How they become answers.
    pub pairs: PairSpec,
    /// What the teacher says, kept on disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheSpec>,
    /// Batches and steps.
    pub train: DistillSpec,
    /// The optimizer.
    pub optimizer: AdamWSettings,
    /// The learning rate's way.
    pub schedule: Schedule,
    /// How the student is checked.
    pub evaluate: Watch,
    /// Where it runs.
    pub run: RunSpec,
}

/// The student: a model, or the shape of a new one with random weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StudentSpec {
    /// A Hugging Face folder (without safetensors in it the weights are random), a GGUF file, a hub id or `default`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<PathBuf>,
    /// In its place, the folder of a new student's tokenizer (`tokenizer.json`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<PathBuf>,
    /// L of a new student, a Llama whose head is its embedding.
    pub layers: usize,
    /// H.
    pub hidden: usize,
    /// Inner size of the feed-forward part; 0: 8/3 H in whole 32s.
    pub ffn: usize,
    /// A.
    pub heads: usize,
    /// K; 0: A.
    pub kv_heads: usize,
    /// Positions.
    pub context: usize,
    /// Rows of its embedding; 0: as many as its tokenizer has tokens.
    pub vocab: usize,
}

impl Default for StudentSpec {
    fn default() -> Self {
        Self {
            model: None,
            tokenizer: None,
            layers: 4,
            hidden: 256,
            ffn: 0,
            heads: 4,
            kv_heads: 0,
            context: 2048,
            vocab: 0,
        }
    }
}

/// How texts and conversations become answers that both sides read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PairSpec {
    /// Bytes of the pieces that texts are cut into.
    pub bytes: usize,
    /// Pieces of a text at most, the first; 0: all.
    pub pieces: usize,
    /// Tokens of prompt and answer at most, on either side; what is longer is left out.
    pub longest: usize,
    /// Other conversations, with their answers, that stand before the teacher's question; the student's has none.
    pub shots: usize,
    /// The date that chat templates are told: one that does not move on while a run is broken off.
    pub date: String,
}

impl Default for PairSpec {
    fn default() -> Self {
        Self {
            bytes: 1024,
            pieces: 0,
            longest: 1024,
            shots: 0,
            date: "2026-01-01".into(),
        }
    }
}

/// What the teacher says of all answers, computed once and kept: for several runs over the same answers, or several times over.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheSpec {
    /// Where.
    pub dir: PathBuf,
    /// Most probable tokens that are kept of each row; all others share the mass that is left. 0: the teacher's final states are
    /// kept in their place, from which its head says each row whole, for any loss.
    #[serde(default = "usual_top_k")]
    pub top_k: usize,
}

fn usual_top_k() -> usize {
    64
}

/// Batches and steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DistillSpec {
    /// Answers of a step.
    pub batch: usize,
    /// Of them, those whose logits exist at a time: one a thread is enough. Of losses over a batch as a whole it is all of them.
    pub together: usize,
    /// Optimizer steps.
    pub steps: u64,
    /// `auto`, `f32` or `bf16`: what products are computed in.
    pub products: String,
    /// Steps from one checkpoint to the next; 0: with each evaluation.
    pub checkpoint: u64,
}

impl Default for DistillSpec {
    fn default() -> Self {
        Self {
            batch: 8,
            together: 2,
            steps: 1000,
            products: "auto".into(),
            checkpoint: 0,
        }
    }
}

/// How a student is checked while it learns: on the dev part of the same files, or on files of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Watch {
    /// Steps from one evaluation to the next; 0: only at the end.
    pub every: u64,
    /// `dev`, or `test` to report on: students are chosen by dev.
    pub part: String,
    /// Answers at most.
    pub count: usize,
    /// Of them, pieces of a text, so that there are some of many texts; 0: as many as are learned from.
    pub pieces: usize,
    /// New tokens of the student's own answers at most, where right ones are known; 0: it is not asked for any.
    pub max_new_tokens: usize,
    /// Files to check on, in place of the dev part; what was learned from is left out.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<PathBuf>,
}

impl Default for Watch {
    fn default() -> Self {
        Self {
            every: 100,
            part: "dev".into(),
            count: 64,
            pieces: 0,
            max_new_tokens: 64,
            files: Vec::new(),
        }
    }
}

impl DistillExperiment {
    /// Reads an experiment file and applies overrides.
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
            one.clone().apply(&mut table);
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
        let s = &self.student;
        match (&s.model, &s.tokenizer) {
            (None, None) => {
                return bad(
                    "student.model names no model, nor student.tokenizer the folder of a new student's tokenizer"
                        .into(),
                );
            }
            (Some(_), Some(_)) => {
                return bad(
                    "student.model and student.tokenizer are both given: one of them".into(),
                );
            }
            (Some(_), None)
                if *s
                    != (StudentSpec {
                        model: s.model.clone(),
                        ..StudentSpec::default()
                    }) =>
            {
                return bad("student.model names a model, whose shape is its own: no other settings of [student] beside it".into());
            }
            _ => {}
        }
        if s.heads == 0 || !s.hidden.is_multiple_of(2 * s.heads) {
            return bad(format!(
                "student.hidden {} in {} heads: expected an even number of values each",
                s.hidden, s.heads
            ));
        }
        self.aligner_name()?;
        self.data.check()?;
        if self.data.features.is_some() {
            return bad(
                "data.features are a target's states; texts are distilled (data.files)".into(),
            );
        }
        if self.data.whole || self.run.tensorboard {
            return bad("data.whole and run.tensorboard mean nothing here: answers are learned from, and metrics.jsonl has all numbers".into());
        }
        self.date()?;
        let checked_elsewhere = !self.evaluate.files.is_empty();
        if checked_elsewhere && self.evaluate.part != "dev" {
            return bad(
                "evaluate.part is a part of data.files; evaluate.files are taken whole".into(),
            );
        }
        if !(self.data.part == "train" || self.data.part == "all" && checked_elsewhere) {
            return bad(format!(
                "data.part `{}`: a student learns from train and is checked on dev, or learns from all with evaluate.files beside",
                self.data.part
            ));
        }
        if self.pairs.bytes < 16 || self.pairs.longest < 8 {
            return bad(format!(
                "pairs.bytes {} must be at least 16, pairs.longest {} at least 8",
                self.pairs.bytes, self.pairs.longest
            ));
        }
        let t = &self.train;
        if t.batch == 0 || t.together == 0 || t.steps == 0 {
            return bad(format!(
                "train.batch {}, train.together {} and train.steps {} must each be at least 1",
                t.batch, t.together, t.steps
            ));
        }
        self.form()?;
        self.optimizer.check()?;
        self.schedule.check(t.steps)?;
        let watch = &self.evaluate;
        if watch.count == 0 {
            return bad("evaluate.count 0: expected at least 1".into());
        }
        if !["dev", "test"].contains(&&*watch.part) {
            let known = ["dev", "test"];
            return Err(scylla_core::Error::unknown("part to check on", &watch.part, known).into());
        }
        Ok(())
    }

    /// The date that chat templates are told.
    ///
    /// # Errors
    /// If it is none.
    pub fn date(&self) -> Result<jiff::civil::DateTime> {
        let text = self.pairs.date.trim();
        let bad = |e| Error::Experiment(format!("pairs.date `{text}`: {e}; expected 2026-07-26"));
        text.parse().map_err(bad)
    }

    /// Name of the aligner, and its settings.
    ///
    /// # Errors
    /// If it has none.
    pub fn aligner_name(&self) -> Result<(String, Table)> {
        let mut settings = self.aligner.clone();
        match settings.remove("name") {
            Some(toml::Value::String(name)) => Ok((name, settings)),
            _ => Err(Error::Experiment(
                "[aligner] has no name: name = \"multilevel-ot\", say".into(),
            )),
        }
    }

    /// What products are asked to be computed in; `None` leaves the choice to the machine.
    ///
    /// # Errors
    /// If the name is unknown.
    pub fn form(&self) -> Result<Option<scylla_core::kernels::ProductForm>> {
        crate::train::product_form(&self.train.products)
    }

    /// The file that says the same.
    ///
    /// # Errors
    /// If it cannot be written as TOML.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string_pretty(self).map_err(|e| Error::Experiment(e.to_string()))
    }
}
