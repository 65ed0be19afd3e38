//! `scylla align`

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, Var};
use clap::Args;
use multilevel_ot::{IGNORED, Space, bytes};
use scylla_core::assets::resolve;
use scylla_core::files;
use scylla_core::text::Tokenizer;
use scylla_core::train::{AlignContext, AlignLoss, AnswerLogits};
use serde_json::{Map, Value, json};
use toml::Table;

use super::{print_json, print_text, with_download};
use crate::context::{AlignerContext, Spaces, tokenizer_at};
use crate::experiment::Override;
use crate::{Error, Registry, Result};

#[derive(Args)]
pub(super) struct Align {
    /// Aligner: multilevel-ot, uld, alm, gold, mined, dskd, x-token, ce
    #[arg(long)]
    aligner: String,
    /// paper or reference-code, for those that have both
    #[arg(long)]
    mode: Option<String>,
    /// Safetensors with `student_logits` and `teacher_logits` f32 [B, S, V] and `student_labels` and `teacher_labels` i64 [B, S]
    /// (-100 where ignored); some aligners also need `.._hidden` [B, S, H], `.._tokens` i64 [B, S] and `.._head` [V, H]
    #[arg(long)]
    input: PathBuf,
    /// A setting of the aligner, or dtype=f32|f64, student_vocab and teacher_vocab (columns that belong to tokens)
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Safetensors to write: `grad_student_logits` of the total, [B, S, V]
    #[arg(long)]
    output: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// The student's tokenizer: `default`, a directory, a GGUF file, or a hub id
    #[arg(long)]
    student_tokenizer: Option<String>,
    /// The teacher's tokenizer
    #[arg(long)]
    teacher_tokenizer: Option<String>,
}

/// What is set beside the aligner's own settings.
struct Own {
    dtype: DType,
    vocab: [Option<usize>; 2],
}

impl Own {
    fn take(table: &mut Table) -> Result<Self> {
        let wrong = |key: &str, value: &toml::Value, known: &str| {
            Err(Error::Experiment(format!(
                "{key} {value}: expected {known}"
            )))
        };
        let dtype = match table.remove("dtype") {
            None => DType::F32,
            Some(value) => match value.as_str() {
                Some("f32") => DType::F32,
                Some("f64") => DType::F64,
                _ => return wrong("dtype", &value, "f32 or f64"),
            },
        };
        let mut vocab = [None; 2];
        for (key, vocab) in ["student_vocab", "teacher_vocab"].iter().zip(&mut vocab) {
            if let Some(value) = table.remove(*key) {
                let number = value.as_integer().and_then(|v| usize::try_from(v).ok());
                match number {
                    Some(number) => *vocab = Some(number),
                    None => return wrong(key, &value, "a number of tokens"),
                }
            }
        }
        Ok(Self { dtype, vocab })
    }
}

/// The tensors of a case.
struct Case<'a> {
    path: &'a Path,
    tensors: HashMap<String, Tensor>,
    dtype: DType,
}

impl<'a> Case<'a> {
    fn read(path: &'a Path, dtype: DType) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)
            .map_err(|e| Error::file(path, format!("not a whole safetensors file: {e}")))?;
        Ok(Self {
            path,
            tensors,
            dtype,
        })
    }

    fn bad(&self, name: &str, message: String) -> Error {
        Error::file(self.path, format!("tensor `{name}`: {message}"))
    }

    /// A tensor of floating-point numbers in this case's precision.
    fn float(&self, name: &str, rank: usize) -> Result<Option<Tensor>> {
        let Some(tensor) = self.tensors.get(name) else {
            return Ok(None);
        };
        if !tensor.dtype().is_float() || tensor.rank() != rank {
            let found = format!("{:?} {:?}", tensor.dtype(), tensor.dims());
            return Err(self.bad(
                name,
                format!("expected numbers of rank {rank}, found {found}"),
            ));
        }
        Ok(Some(tensor.to_dtype(self.dtype)?))
    }

    fn ids(&self, name: &str) -> Result<Option<Tensor>> {
        let Some(tensor) = self.tensors.get(name) else {
            return Ok(None);
        };
        if tensor.dtype() != DType::I64 || tensor.rank() != 2 {
            let found = format!("{:?} {:?}", tensor.dtype(), tensor.dims());
            return Err(self.bad(name, format!("expected I64 [B, S], found {found}")));
        }
        Ok(Some(tensor.clone()))
    }

    fn side(&self, name: &str, vocab: Option<usize>) -> Result<AnswerLogits> {
        let missing = |what: &str| self.bad(&format!("{name}_{what}"), "is missing".into());
        let logits = self.float(&format!("{name}_logits"), 3)?;
        let logits = logits.ok_or_else(|| missing("logits"))?;
        let labels = self.ids(&format!("{name}_labels"))?;
        Ok(AnswerLogits {
            vocab: vocab.unwrap_or(logits.dim(2)?),
            logits,
            labels: labels.ok_or_else(|| missing("labels"))?,
            tokens: self.ids(&format!("{name}_tokens"))?,
            offsets: None,
            hidden: self.float(&format!("{name}_hidden"), 3)?,
        })
    }

    /// The student's and the teacher's heads, where there are both; embeddings are the heads where there are none.
    fn spaces(&self) -> Result<Option<(Space, Space)>> {
        let space = |name: &str| -> Result<Option<Space>> {
            let Some(head) = self.float(&format!("{name}_head"), 2)? else {
                return Ok(None);
            };
            let embeddings = self.float(&format!("{name}_embeddings"), 2)?;
            Ok(Some(Space {
                embeddings: embeddings.unwrap_or_else(|| head.clone()),
                head,
            }))
        };
        Ok(space("student")?.zip(space("teacher")?))
    }
}

fn tokenizer(spec: &str) -> Result<Tokenizer> {
    tokenizer_at(&with_download(|p| Ok(resolve(spec, p)?))?)
}

/// Answer tokens of each sequence.
fn answers(side: &AnswerLogits) -> Result<Vec<Vec<u32>>> {
    let labels: Vec<Vec<i64>> = side.labels.to_vec2()?;
    // The first position is predicted by no row.
    let answer = |row: Vec<i64>| {
        let labelled = row.into_iter().skip(1).filter(|&l| l != IGNORED);
        labelled
            .map(|l| u32::try_from(l).unwrap_or(u32::MAX))
            .collect()
    };
    Ok(labels.into_iter().map(answer).collect())
}

/// Gives both sides the places of their answers' tokens.
fn place(
    student: &mut AnswerLogits,
    teacher: &mut AnswerLogits,
    tokenizers: &(Tokenizer, Tokenizer),
) -> Result<()> {
    let (own, others) = (answers(student)?, answers(teacher)?);
    let mut offsets = (Vec::new(), Vec::new());
    for (b, (own, other)) in own.iter().zip(&others).enumerate() {
        let found = bytes::token_offsets((&tokenizers.0, own), (&tokenizers.1, other))
            .map_err(|e| Error::Experiment(format!("answer {b}: {e}")))?;
        offsets.0.push(found.0);
        offsets.1.push(found.1);
    }
    (student.offsets, teacher.offsets) = (Some(offsets.0), Some(offsets.1));
    Ok(())
}

fn number(of: &Tensor) -> Result<f64> {
    Ok(of.to_dtype(DType::F64)?.to_scalar::<f64>()?)
}

fn norm(of: Option<&Tensor>) -> Result<f64> {
    match of {
        Some(gradient) => Ok(number(&gradient.to_dtype(DType::F64)?.sqr()?.sum_all()?)?.sqrt()),
        None => Ok(0.0),
    }
}

/// Writes the gradient of the student's logits.
fn keep(path: &Path, gradient: Tensor) -> Result<()> {
    let tensors = HashMap::from([("grad_student_logits", gradient)]);
    let bytes =
        safetensors::serialize(tensors, None).map_err(|e| Error::file(path, e.to_string()))?;
    Ok(files::write(path, &bytes)?)
}

impl Align {
    pub(super) fn run(self, registry: &Registry) -> Result<()> {
        let mut settings = Table::new();
        for text in &self.set {
            Override::parse(text)?.apply(&mut settings);
        }
        if let Some(mode) = &self.mode {
            settings.insert("mode".into(), toml::Value::String(mode.clone()));
        }
        let own = Own::take(&mut settings)?;
        let case = Case::read(&self.input, own.dtype)?;
        let mut teacher = case.side("teacher", own.vocab[1])?;
        let mut student = case.side("student", own.vocab[0])?;
        let logits = Var::from_tensor(&student.logits)?;
        student.logits = logits.as_tensor().clone();
        let tokenizers = match (&self.student_tokenizer, &self.teacher_tokenizer) {
            (Some(student), Some(teacher)) => Some((tokenizer(student)?, tokenizer(teacher)?)),
            (None, None) => None,
            _ => {
                return Err(Error::Experiment(
                    "--student-tokenizer and --teacher-tokenizer go together".into(),
                ));
            }
        };
        let spaces = case.spaces()?;
        let context = AlignerContext {
            tokenizers,
            spaces: spaces.map(|both| Box::new(move || Ok(both.clone())) as Spaces),
        };
        let aligner = registry.make_aligner(&self.aligner, &context, settings)?;
        if aligner.needs().offsets {
            let Some(tokenizers) = &context.tokenizers else {
                return Err(Error::Experiment(format!(
                    "aligner `{}` needs the bytes of both sides' tokens: --student-tokenizer and --teacher-tokenizer",
                    self.aligner
                )));
            };
            place(&mut student, &mut teacher, tokenizers)?;
        }
        let loss = aligner.loss(&teacher, &student, &AlignContext::default())?;
        let gradient = match &loss.gradient {
            Some(gradient) => gradient.clone(),
            None => {
                let found = loss.total.backward()?;
                let none = || logits.zeros_like();
                found.get(&logits).cloned().map_or_else(none, Ok)?
            }
        };
        // What was computed is told even where its gradient cannot be kept.
        let total = norm(Some(&gradient))?;
        let kept = match &self.output {
            Some(path) => keep(path, gradient),
            None => Ok(()),
        };
        self.show(&loss, total, &logits)?;
        kept
    }

    /// Prints a loss and its parts; `norm_of_total` is that of its gradient.
    fn show(&self, loss: &AlignLoss, norm_of_total: f64, logits: &Var) -> Result<()> {
        let (mut parts, mut weights, mut norms) = (Map::new(), Map::new(), Map::new());
        for part in &loss.parts {
            let gradients = part.value.backward()?;
            let weighted = part.weight * norm(gradients.get(logits))?;
            parts.insert(part.name.into(), json!(number(&part.value)?));
            weights.insert(part.name.into(), json!(part.weight));
            norms.insert(part.name.into(), json!(weighted));
        }
        norms.insert("total".into(), json!(norm_of_total));
        let total = number(&loss.total)?;
        let notes: Map<String, Value> = (loss.notes.iter())
            .map(|(name, value)| (name.to_string(), json!(value)))
            .collect();
        if self.json {
            return print_json(&json!({
                "aligner": self.aligner,
                "total": total,
                "parts": parts,
                "weights": weights,
                "gradient_norms": norms,
                "notes": notes,
            }));
        }
        let mut text = format!(
            "{:<10}{:>16}{:>12}{:>18}\n",
            "part", "value", "weight", "weighted gradient"
        );
        let show = |v: &Value| v.as_f64().unwrap_or(f64::NAN);
        for (name, value) in &parts {
            let (weight, norm) = (show(&weights[name]), show(&norms[name]));
            text += &format!("{name:<10}{:>16.6}{weight:>12}{norm:>18.3e}\n", show(value));
        }
        text += &format!(
            "{:<10}{total:>16.6}{:>12}{:>18.3e}\n",
            "total",
            "",
            show(&norms["total"])
        );
        for (name, value) in &notes {
            text += &format!("{name}: {value}\n");
        }
        print_text(&text)
    }
}
