//! `scylla inspect loss`

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::{DType, Device};
use clap::Args;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use scylla_core::assets::resolve;
use scylla_core::files;
use scylla_core::kernels::{ProductForm, Products};
use scylla_core::model::WeightForm;
use scylla_core::plugin::{Matrix, SlotRows, Step, Want};
use scylla_core::train::Named;
use scylla_core::train::graph::{Compute, PackedRows, Parameters, Tape};
use scylla_draft::checkpoint::{Checkpoint, DraftConfig, Layout};
use scylla_draft::recipe::{Batch, BatchLoss, Recipe, TrainHost, parameters};

use super::{ModelOptions, print_json, print_text, with_download};
use crate::experiment::Override;
use crate::train::{TrainExperiment, recipe_of};
use crate::{Error, Result, Session};

#[derive(Args)]
pub(super) struct Loss {
    /// The draft's target: `default`, a directory, a GGUF file, or a hub id
    #[arg(long, default_value = "default")]
    target: String,
    /// Draft by name, with the directory of its weights behind a colon
    #[arg(long, value_name = "NAME:DIR")]
    draft: String,
    /// Safetensors with `input_ids i64 [B, S]` and `loss_mask i64 [B, S]`; `features f32 [B, S, taps H]` and
    /// `target_logits f32 [B, S, V]` where they are not to be computed
    #[arg(long)]
    input: PathBuf,
    /// Safetensors to write: the gradient of each parameter, the states and the logits of the first step
    #[arg(long)]
    output: PathBuf,
    /// Settings as in a training experiment: train.unroll=7, loss.normalise=mask
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// f32 (the kernels) or f64 (the reference)
    #[arg(long, default_value = "f32")]
    dtype: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelOptions,
}

/// A batch as a file holds it.
struct Given {
    tokens: Vec<u32>,
    mask: Vec<bool>,
    rows: PackedRows,
    features: Option<(Vec<f32>, usize)>,
    logits: Option<(Vec<f32>, usize)>,
}

impl Loss {
    fn read(&self) -> Result<Given> {
        let bytes = std::fs::read(&self.input).map_err(Error::io(&self.input))?;
        let bad = |message: String| Error::file(&self.input, message);
        let file = SafeTensors::deserialize(&bytes)
            .map_err(|e| bad(format!("not a whole safetensors file: {e}")))?;
        let view = |name: &str, dtype: Dtype, rank: usize| -> Result<Option<TensorView<'_>>> {
            let Ok(view) = file.tensor(name) else {
                return Ok(None);
            };
            match view.dtype() == dtype
                && view.shape().len() == rank
                && view.shape().iter().all(|&n| n > 0)
            {
                true => Ok(Some(view)),
                false => Err(bad(format!(
                    "tensor `{name}`: expected {dtype:?} of rank {rank}, found {:?} {:?}",
                    view.dtype(),
                    view.shape()
                ))),
            }
        };
        let whole = |v: &TensorView<'_>| -> Vec<i64> {
            v.data()
                .as_chunks()
                .0
                .iter()
                .map(|b| i64::from_le_bytes(*b))
                .collect()
        };
        let needed = |name: &str| -> Result<(Vec<i64>, Vec<usize>)> {
            let found = view(name, Dtype::I64, 2)?
                .ok_or_else(|| bad(format!("tensor `{name}` is missing")))?;
            Ok((whole(&found), found.shape().to_vec()))
        };
        let ((ids, shape), (mask, of_mask)) = (needed("input_ids")?, needed("loss_mask")?);
        let (batch, length) = (shape[0], shape[1]);
        if of_mask != shape {
            return Err(bad(format!(
                "loss_mask is {of_mask:?}, input_ids {shape:?}"
            )));
        }
        let wide = |name: &str| -> Result<Option<(Vec<f32>, usize)>> {
            let Some(found) = view(name, Dtype::F32, 3)? else {
                return Ok(None);
            };
            if found.shape()[..2] != shape {
                return Err(bad(format!(
                    "{name} is {:?}, input_ids {shape:?}",
                    found.shape()
                )));
            }
            let values = found
                .data()
                .as_chunks()
                .0
                .iter()
                .map(|b| f32::from_le_bytes(*b))
                .collect();
            Ok(Some((values, found.shape()[2])))
        };
        let id = |&t: &i64| u32::try_from(t).map_err(|_| bad(format!("token {t} is no id")));
        Ok(Given {
            tokens: ids.iter().map(id).collect::<Result<_>>()?,
            mask: mask.iter().map(|&m| m != 0).collect(),
            rows: PackedRows::lines(batch, length)?,
            features: wide("features")?,
            logits: wide("target_logits")?,
        })
    }

    /// Settings under `train.` or `loss.` are those of the loss.
    fn experiment(&self, name: &str) -> Result<TrainExperiment> {
        let mut overrides = self.model.overrides();
        for one in &self.set {
            let renamed = one
                .strip_prefix("train.")
                .map(|rest| format!("loss.{rest}"));
            overrides.push(Override::parse(renamed.as_deref().unwrap_or(one))?);
        }
        overrides.push(Override::new("target.model", self.target.clone()));
        overrides.push(Override::new("draft.name", name));
        let mut table = toml::Table::new();
        // One stage of nothing: only the loss is looked at.
        let stage = "[[stage]]\nname = \"\"\nsteps = 1\ndata.files = [\"-\"]\n";
        table.extend(
            stage
                .parse::<toml::Table>()
                .map_err(|e| Error::Experiment(e.to_string()))?,
        );
        TrainExperiment::from_table(table, &overrides)
    }

    fn compute(&self, session: &Session) -> Result<Compute> {
        match self.dtype.as_str() {
            "f64" => Ok(Compute::tensors(Device::Cpu, DType::F64)),
            "f32" => match (
                session.options.device.is_cpu(),
                session.target.executor.pool(),
            ) {
                (true, Some(pool)) => Ok(Compute::Kernels(Products {
                    pool: std::sync::Arc::clone(pool),
                    form: ProductForm::F32,
                })),
                _ => Ok(Compute::tensors(session.options.device.clone(), DType::F32)),
            },
            other => Err(scylla_core::Error::unknown("dtype", other, ["f32", "f64"]).into()),
        }
    }

    pub(super) fn run(self) -> Result<()> {
        let Some((name, dir)) = self.draft.split_once(':') else {
            return Err(Error::Experiment(format!(
                "--draft `{}`: expected NAME:DIR",
                self.draft
            )));
        };
        let given = self.read()?;
        let experiment = self.experiment(name)?;
        let mut session = with_download(|p| Session::open(&experiment.serving(), p))?;
        let dir = with_download(|p| Ok(resolve(dir, p)?))?;
        let layouts = Layout::of_name(name, "draft with a loss")?;
        let shape = session.target.model.shape();
        let checkpoint = Checkpoint::open(&dir, layouts, &shape, WeightForm::AsIs)?;
        let ids = match &checkpoint.config {
            DraftConfig::Eagle3(_) => {
                let ids = checkpoint.draft_ids(session.known_tokens())?;
                Some(ids.targets())
            }
            _ => None,
        };
        let mut quiet = experiment.clone();
        if ids.is_none() && !quiet.loss.contains_key("noise") {
            // What is inspected is repeated: features without noise, unless it is asked for.
            quiet.loss.insert("noise".into(), 0.0.into());
        }
        let on = self.compute(&session)?;
        let recipe = recipe_of(&quiet, &checkpoint.config, ids.as_deref(), &session, &on)?;
        let taps = self.states(&given, &mut session, recipe.as_ref())?;
        // Where they are as good as a state; others are learned from as they are.
        let logits = given.logits.clone().filter(|_| recipe.spared() > 0);
        let logits = logits.map(|(values, columns)| Matrix::host(values, columns));
        let host = TrainHost::new(&on, &session.target.tokens)?;
        let named = parameters(&checkpoint, &on)?;
        let batch = Batch {
            rows: &given.rows,
            tokens: &given.tokens,
            mask: &given.mask,
            taps: &taps,
            logits: logits.as_ref(),
            top: None,
            seed: experiment.run.seed,
            beyond: true,
        };
        let (loss, grads) = {
            let mut tape = Tape::new(&on);
            let mut used = Parameters::new(&named);
            let loss = recipe.loss(&mut tape, &mut used, &host, &batch)?;
            let mut gradients = tape.backward()?;
            (loss, used.gradients(&on, &mut gradients)?)
        };
        if loss.steps.iter().all(|s| s.count == 0) {
            return Err(Error::file(
                &self.input,
                "no row counts: loss_mask is empty, or no goal is in the draft's vocabulary",
            ));
        }
        let outputs = recipe.forward(&mut Parameters::new(&named), &host, &batch)?;
        self.write(&checkpoint, &grads, &outputs, &given.rows)?;
        self.print(&loss)
    }

    /// The states that the recipe learns from: those of the file, or the target's.
    fn states(
        &self,
        given: &Given,
        session: &mut Session,
        recipe: &dyn Recipe,
    ) -> Result<Vec<Matrix>> {
        let taps = &recipe.taps()[..];
        let h = session.target.config.hidden;
        let m = given.rows.count();
        if let Some((values, width)) = &given.features {
            let count = width / h;
            let least = taps.len() - given.logits.as_ref().map_or(0, |_| recipe.spared());
            if count * h != *width || !(least..=taps.len()).contains(&count) {
                return Err(Error::file(
                    &self.input,
                    format!(
                        "features of {width} values a row; expected {least} or {} states of {h}",
                        taps.len()
                    ),
                ));
            }
            let part = |i: usize| {
                let row = |r: usize| values[r * width + i * h..r * width + (i + 1) * h].to_vec();
                Matrix::host((0..m).flat_map(row).collect(), h)
            };
            return Ok((0..count).map(part).collect());
        }
        let model = &mut session.target.model;
        let mut lines: Vec<Vec<Matrix>> = Vec::new();
        for (line, tokens) in given.tokens.chunks(given.rows.length).enumerate() {
            model.open(line)?;
            let mut forward = model.forward(&Step {
                slots: vec![SlotRows {
                    slot: line,
                    tokens,
                    parents: &[],
                    want: Want::None,
                }],
                taps,
            })?;
            lines.push(forward.taps.remove(0));
            model.close(line);
        }
        let joined = |tap: usize| -> Result<Matrix> {
            let mut values = Vec::new();
            for line in &lines {
                values.extend_from_slice(&line[tap].all()?);
            }
            Ok(Matrix::host(values, h))
        };
        (0..taps.len()).map(joined).collect()
    }

    fn write(
        &self,
        of: &Checkpoint,
        grads: &Named,
        (hidden, logits): &(Matrix, Matrix),
        rows: &PackedRows,
    ) -> Result<()> {
        let wide = self.dtype == "f64";
        let bytes = |m: &Matrix| -> Result<Vec<u8>> {
            Ok(match m.tensor() {
                Ok(t) if wide => {
                    let values: Vec<f64> = t.flatten_all()?.to_vec1()?;
                    values.iter().flat_map(|v| v.to_le_bytes()).collect()
                }
                _ => m.all()?.iter().flat_map(|v| v.to_le_bytes()).collect(),
            })
        };
        let dtype = if wide { Dtype::F64 } else { Dtype::F32 };
        let mut held: BTreeMap<String, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
        let shapes: BTreeMap<String, Vec<usize>> = of
            .entries()
            .into_iter()
            .map(|e| (e.name, e.shape))
            .collect();
        for (name, grad) in grads {
            let shape = shapes
                .get(name)
                .cloned()
                .unwrap_or_else(|| vec![grad.rows(), grad.columns]);
            held.insert(format!("grad.{name}"), (shape, bytes(grad)?));
        }
        for (name, m) in [("hidden", hidden), ("logits", logits)] {
            held.insert(
                name.into(),
                (vec![rows.batch, rows.length, m.columns], bytes(m)?),
            );
        }
        let failed = |e: safetensors::SafeTensorError| Error::file(&self.output, e.to_string());
        let mut views = Vec::with_capacity(held.len());
        for (name, (shape, bytes)) in &held {
            views.push((
                name.as_str(),
                TensorView::new(dtype, shape.clone(), bytes).map_err(failed)?,
            ));
        }
        let whole = safetensors::serialize(views, None).map_err(failed)?;
        Ok(files::write(&self.output, &whole)?)
    }

    fn print(&self, loss: &BatchLoss) -> Result<()> {
        let parts: BTreeMap<&str, f64> = loss.parts.iter().copied().collect();
        if self.json {
            let mut all = serde_json::json!({
                "total": loss.total,
                "total_by_mask": loss.total_by_mask,
                "steps": loss.steps,
            });
            if !parts.is_empty() {
                all["parts"] = serde_json::json!(parts);
            }
            return print_json(&all);
        }
        let mut text = format!(
            "total {}\nby the rows that count {}\n",
            loss.total, loss.total_by_mask
        );
        for (name, value) in parts {
            text += &format!("{name} {value}\n");
        }
        for (i, step) in loss.steps.iter().enumerate() {
            text += &format!(
                "step {i}: loss {}, accuracy {:.4}, {} rows\n",
                step.loss, step.accuracy, step.count
            );
        }
        print_text(&text)
    }
}
