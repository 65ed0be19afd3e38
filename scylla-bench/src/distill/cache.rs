//! What the teacher says, kept: the most probable tokens of each row, that of the answer, and the mass of all others, so that runs over the same answers
//! need its pass once. Or its final states alone, from which its head says each row whole, as without a cache.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use scylla_core::draw::top;
use scylla_core::files::{self, read_json};
use scylla_core::model::Shards;
use scylla_core::plugin::Matrix;
use scylla_core::train::graph::Compute;
use serde::{Deserialize, Serialize};

use super::experiment::CacheSpec;
use super::pairs::Pair;
use super::teacher::{Teacher, chosen};
use crate::data::features::free;
use crate::{Error, Result};

/// Answers of a shard.
const SHARD: usize = 64;
const VERSION: u32 = 1;

/// What a folder holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Index {
    version: u32,
    teacher: String,
    /// In what form its weights were, and what its head was computed with.
    form: String,
    /// Hash of the teacher's tokens.
    answers: String,
    top_k: usize,
    /// Size of hidden states that are kept too; 0: none are.
    hidden: usize,
    /// Columns, and those of them that are tokens.
    columns: usize,
    known: usize,
    /// Rows of each answer.
    rows: Vec<usize>,
    /// Shards that are written.
    written: usize,
}

impl Index {
    fn shards(&self) -> usize {
        self.rows.len().div_ceil(SHARD)
    }

    /// Bytes of so many rows.
    fn bytes(&self, rows: usize) -> u64 {
        let tail = if self.top_k > 0 { 4 } else { 0 };
        (rows * (self.top_k * 8 + tail + self.hidden * 4)) as u64
    }
}

/// Kept words of a teacher.
pub(super) struct Cache {
    index: Index,
    shards: Shards,
}

fn shard_path(dir: &Path, shard: usize) -> PathBuf {
    dir.join(format!("said-{shard:05}.safetensors"))
}

/// In what form a teacher's weights are, and what its head is computed with.
pub(super) fn form(teacher: &Teacher, on: &Compute) -> String {
    format!("{}, {}", teacher.loaded().forms.join("+"), on.name())
}

/// Rows before each token of an answer, and behind its last: what a loss gets.
fn rows_of(pair: &Pair, begin: usize) -> Vec<usize> {
    let answer = &pair.teacher.answer;
    (answer.start - 1..answer.end)
        .map(|at| begin + at)
        .collect()
}

impl Cache {
    /// Opens what was kept of these answers, and computes what is missing. `on_shard(done, all)` is told of each shard.
    ///
    /// # Errors
    /// If the folder holds what another teacher said, or what was said of other answers; if the disk would not hold it; if broken
    /// off (the shards that are written are kept).
    pub(super) fn open(
        spec: &CacheSpec,
        (teacher, on): (&mut Teacher, &Compute),
        pairs: &[Pair],
        answers: &str,
        hidden: bool,
        stop: &AtomicBool,
        on_shard: &mut dyn FnMut(usize, usize),
    ) -> Result<Self> {
        let dir = &spec.dir;
        let columns = teacher.loaded().config.vocab;
        let mut index = Index {
            version: VERSION,
            teacher: teacher.hash.clone(),
            form: form(teacher, on),
            answers: answers.into(),
            top_k: spec.top_k.min(teacher.known()),
            hidden: if hidden || spec.top_k == 0 {
                teacher.loaded().config.hidden
            } else {
                0
            },
            columns,
            known: teacher.known(),
            rows: pairs.iter().map(|p| p.teacher.answer.len() + 1).collect(),
            written: 0,
        };
        std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let listing = dir.join("said.json");
        if listing.exists() {
            let was = resumed(&listing, &index)?;
            // States that are there are no harm.
            (index.written, index.hidden) = (was.written, was.hidden);
        }
        let left: usize = index.rows[(index.written * SHARD).min(index.rows.len())..]
            .iter()
            .sum();
        let bytes = index.bytes(left);
        if let Some(free) = free(dir).filter(|free| *free < bytes + bytes / 50) {
            return Err(Error::file(
                dir,
                format!(
                    "what the teacher says takes {:.2} GB more, and {:.2} are free; a smaller cache.top_k, fewer texts, or another disk",
                    bytes as f64 / 1e9,
                    free as f64 / 1e9
                ),
            ));
        }
        for shard in index.written..index.shards() {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::Interrupted(format!(
                    "; {shard} of {} shards are in {}, the same command goes on",
                    index.shards(),
                    dir.display()
                )));
            }
            let first = shard * SHARD;
            let some = &pairs[first..(first + SHARD).min(pairs.len())];
            write_shard(&index, (teacher, on), first, some, &shard_path(dir, shard))?;
            index.written = shard + 1;
            write_index(&listing, &index)?;
            on_shard(index.written, index.shards());
        }
        let paths: Vec<PathBuf> = (0..index.shards()).map(|s| shard_path(dir, s)).collect();
        Ok(Self {
            shards: Shards::open_files(&paths)?,
            index,
        })
    }

    /// Logits of an answer's rows `[tokens + 1, V]`: the kept ones, and the mass of all others in equal parts; and its hidden states,
    /// where they were kept.
    ///
    /// # Errors
    /// If a shard cannot be read any more.
    pub(super) fn said(&self, answer: usize) -> Result<(Matrix, Option<Matrix>)> {
        let Index {
            top_k,
            hidden,
            columns,
            known,
            ..
        } = self.index;
        let rows = self.index.rows[answer];
        let ids = self.stored(&format!("{answer}.ids"), &[rows, top_k])?;
        let logs = self.stored(&format!("{answer}.logs"), &[rows, top_k])?;
        let tail = self.stored(&format!("{answer}.tail"), &[rows])?;
        let mut logits = vec![0.0f32; rows * columns];
        let kept = ids.chunks_exact(top_k).zip(logs.chunks_exact(top_k));
        for ((row, &tail), (ids, logs)) in logits.chunks_exact_mut(columns).zip(&tail).zip(kept) {
            let others = (known - top_k).max(1) as f32;
            row.fill(f32::from_bits(tail) - others.ln());
            for (&id, &log) in ids.iter().zip(logs) {
                let place = row.get_mut(id as usize);
                let none = || {
                    Error::file(
                        self.shards.path(),
                        format!("token {id} is none of {columns}"),
                    )
                };
                *place.ok_or_else(none)? = f32::from_bits(log);
            }
        }
        let states = match hidden {
            0 => None,
            _ => Some(self.states(answer)?),
        };
        Ok((Matrix::host(logits, columns), states))
    }

    /// Whether states alone are kept, and no row's words.
    pub(super) fn is_states(&self) -> bool {
        self.index.top_k == 0
    }

    /// Hidden states of an answer's rows `[tokens + 1, H]`, where they are kept.
    ///
    /// # Errors
    /// If a shard cannot be read any more.
    pub(super) fn states(&self, answer: usize) -> Result<Matrix> {
        let (rows, width) = (self.index.rows[answer], self.index.hidden);
        let bits = self.stored(&format!("{answer}.hidden"), &[rows, width])?;
        let values = bits.into_iter().map(f32::from_bits).collect();
        Ok(Matrix::host(values, width))
    }

    /// Words of four bytes, as they are stored.
    fn stored(&self, name: &str, shape: &[usize]) -> Result<Vec<u32>> {
        let (_, bytes) = self.shards.stored(name, shape)?;
        let words = bytes.as_chunks::<4>().0.iter();
        Ok(words.map(|w| u32::from_le_bytes(*w)).collect())
    }
}

/// Shards that are there already of what is asked for.
fn resumed(listing: &Path, index: &Index) -> Result<Index> {
    let mut was: Index =
        serde_json::from_value(read_json(listing, "a list of what a teacher said")?)
            .map_err(|e| Error::file(listing, e.to_string()))?;
    let differs = [
        ("what another teacher said", was.teacher != index.teacher),
        (
            "what it said in another form, or computed otherwise",
            was.form != index.form,
        ),
        (
            "what was said of other answers, or by another tokenizer",
            was.answers != index.answers || was.rows != index.rows,
        ),
        (
            "another number of tokens a row",
            was.top_k != index.top_k || was.columns != index.columns || was.known != index.known,
        ),
        ("no hidden states", was.hidden < index.hidden),
        ("a form of another version", was.version != index.version),
    ];
    match differs.iter().find(|(_, differs)| *differs) {
        Some((what, _)) => Err(Error::file(
            listing,
            format!("holds {what}; another cache.dir begins anew"),
        )),
        None => {
            was.written = was.written.min(index.shards());
            Ok(was)
        }
    }
}

fn write_index(listing: &Path, index: &Index) -> Result<()> {
    let text = serde_json::to_string(index).map_err(|e| Error::file(listing, e.to_string()))?;
    Ok(files::write(listing, text.as_bytes())?)
}

/// Answers whose rows run together.
const TOGETHER: usize = 8;

fn write_shard(
    index: &Index,
    (teacher, on): (&mut Teacher, &Compute),
    first: usize,
    pairs: &[Pair],
    path: &Path,
) -> Result<()> {
    let mut held: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    let k = index.top_k;
    for (i, some) in pairs.chunks(TOGETHER).enumerate() {
        let some: Vec<&Pair> = some.iter().collect();
        let read = teacher.read(&some)?;
        for (j, (pair, &begin)) in some.iter().zip(&read.begins).enumerate() {
            let rows = rows_of(pair, begin);
            let answer = first + i * TOGETHER + j;
            if index.hidden > 0 {
                let states = chosen(&read.states, &rows)?;
                let bytes = states.all()?.iter().flat_map(|v| v.to_le_bytes()).collect();
                let shape = vec![rows.len(), index.hidden];
                held.push((format!("{answer}.hidden"), Dtype::F32, shape, bytes));
            }
            if k == 0 {
                continue;
            }
            let logits = teacher.logits(on, &read.states, &rows)?;
            let (values, n) = (logits.all()?, rows.len());
            let (mut ids, mut logs, mut tails) = (Vec::new(), Vec::new(), Vec::new());
            let said = pair.teacher.said().iter().map(|&t| Some(t as usize));
            for (row, said) in values.chunks_exact(index.columns).zip(said.chain([None])) {
                let row = &row[..index.known];
                let mut best = top(row, k);
                // The answer's own token is kept, whatever else is said.
                if let Some(said) = said.filter(|said| !best.contains(said)) {
                    best.pop();
                    best.push(said);
                }
                let most = best.first().map_or(0.0, |&b| row[b]);
                let sum = |values: &mut dyn Iterator<Item = f32>| -> f64 {
                    values.map(|v| f64::from(v - most).exp()).sum()
                };
                let all = sum(&mut row.iter().copied());
                let kept = sum(&mut best.iter().map(|&b| row[b]));
                // Of the mass of the others no less than rounding leaves.
                let tail = ((all - kept) / all).max(1e-30).ln();
                tails.extend((tail as f32).to_le_bytes());
                for b in best {
                    ids.extend((b as u32).to_le_bytes());
                    let log = f64::from(row[b] - most) - all.ln();
                    logs.extend((log as f32).to_le_bytes());
                }
            }
            held.push((format!("{answer}.ids"), Dtype::U32, vec![n, k], ids));
            held.push((format!("{answer}.logs"), Dtype::F32, vec![n, k], logs));
            held.push((format!("{answer}.tail"), Dtype::F32, vec![n], tails));
        }
    }
    let bad = |e: safetensors::SafeTensorError| Error::file(path, e.to_string());
    let mut views = Vec::with_capacity(held.len());
    for (name, dtype, shape, bytes) in &held {
        let view = TensorView::new(*dtype, shape.clone(), bytes).map_err(bad)?;
        views.push((name.clone(), view));
    }
    let bytes = safetensors::serialize(views, None).map_err(bad)?;
    Ok(files::write(path, &bytes)?)
}
