//! The target's states of documents, computed once and kept: sharded safetensors with a listing, in bf16.
//!
//! Drafts can then be trained without the target's pass. What is kept is sized before anything is computed, and refused where
//! the disk would not hold it. A shard is written whole or not at all, so that a run that is broken off goes on behind its last.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use half::bf16;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use scylla_core::files;
use scylla_core::model::Shards;
use scylla_core::plugin::{Matrix, Tap};
use scylla_core::train::graph::PackedRows;
use scylla_draft::recipe::TopProbabilities;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::documents::{Counts, Document, Documents};
use super::packing::Lines;
use crate::session::Session;
use crate::{Error, Result};

const INDEX: &str = "features.json";
const LISTING: &str = "model.safetensors.index.json";
const VERSION: u32 = 1;

/// What a folder of features holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Index {
    /// Version of this form.
    pub version: u32,
    /// Sha256 of the target.
    pub target: String,
    /// Hash of the documents.
    pub data: String,
    /// Layers whose inputs are kept, and `final`, side by side in a row.
    pub taps: Vec<String>,
    /// H.
    pub hidden: usize,
    /// Most probable tokens kept of each row; 0: none.
    #[serde(default)]
    pub top: usize,
    /// Tokens of a piece at most.
    pub length: usize,
    /// Pieces of documents: name, tokens and shard of each.
    pub pieces: Vec<Piece>,
    /// Shards, in order.
    pub shards: usize,
    /// Shards that are written.
    pub written: usize,
}

/// A piece of a document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// The document's name.
    pub name: String,
    /// Tokens.
    pub tokens: usize,
    /// The shard it is in.
    pub shard: usize,
}

/// What a pass came to.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Kept {
    /// What became of the documents.
    #[serde(flatten)]
    pub counts: Counts,
    /// Bytes of all shards.
    pub bytes: u64,
    /// Shards.
    pub shards: usize,
    /// Of those, the ones that were there before.
    pub shards_before: usize,
    /// Seconds of this run.
    pub seconds: f64,
}

/// How a tap is written.
fn name_of(tap: Tap) -> String {
    match tap {
        Tap::Input(layer) => layer.to_string(),
        Tap::Final => "final".into(),
    }
}

fn tap_of(name: &str) -> Option<Tap> {
    match name {
        "final" => Some(Tap::Final),
        layer => layer.parse().ok().map(Tap::Input),
    }
}

/// Documents cut into pieces of at most `length` tokens.
fn cut(documents: &[Document], length: usize) -> Vec<Document> {
    let pieces = |d: &Document| -> Vec<Document> {
        let parts = d.tokens.chunks(length).zip(d.mask.chunks(length));
        let whole = parts.filter(|(tokens, _)| tokens.len() > 1);
        let piece = |(tokens, mask): (&[u32], &[bool])| Document {
            name: d.name.clone(),
            tokens: tokens.to_vec(),
            mask: mask.to_vec(),
        };
        whole.map(piece).collect()
    };
    documents.iter().flat_map(pieces).collect()
}

fn shard_name(shard: usize, of: usize) -> String {
    format!("model-{:05}-of-{of:05}.safetensors", shard + 1)
}

/// Free bytes of the disk that a folder is on, where the system tells.
pub(crate) fn free(dir: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        let found = rustix::fs::statvfs(dir).ok()?;
        Some(found.f_bavail * found.f_frsize)
    }
    #[cfg(not(unix))]
    {
        let _ = dir;
        None
    }
}

/// How features are kept.
pub struct How<'a> {
    /// The states.
    pub taps: &'a [Tap],
    /// Tokens of a piece at most.
    pub length: usize,
    /// Most probable tokens of the target that are kept of each row; 0: none.
    pub top: usize,
    /// Bytes of a shard, about.
    pub shard_bytes: u64,
}

/// Computes and keeps the target's states of documents. `on_shard(done, all)` is told of each shard.
///
/// # Errors
/// If the disk would not hold them; if the folder holds features of another target, other data or other taps; if broken off
/// (the shards that are written are kept).
pub fn keep(
    session: &mut Session,
    documents: &Documents,
    how: &How<'_>,
    dir: &Path,
    stop: &AtomicBool,
    on_shard: &mut dyn FnMut(usize, usize),
) -> Result<Kept> {
    let begun = std::time::Instant::now();
    if how.top > session.known_tokens() {
        return Err(Error::Experiment(format!(
            "--top-k {}: the target has {} tokens",
            how.top,
            session.known_tokens()
        )));
    }
    let hidden = session.target.config.hidden;
    let pieces = cut(&documents.all, how.length);
    // A row: states, token and mask.
    let row = (how.taps.len() * hidden * 2 + 5 + how.top * 8) as u64;
    let total = pieces
        .iter()
        .map(|p| p.tokens.len() as u64 * row)
        .sum::<u64>();
    let mut index = Index {
        version: VERSION,
        target: session.target_hash()?.into(),
        data: documents.hash.clone(),
        taps: how.taps.iter().map(|&t| name_of(t)).collect(),
        hidden,
        top: how.top,
        length: how.length,
        pieces: Vec::with_capacity(pieces.len()),
        shards: 0,
        written: 0,
    };
    let mut filled = 0;
    for piece in &pieces {
        let bytes = piece.tokens.len() as u64 * row;
        if index.pieces.is_empty() || filled + bytes > how.shard_bytes {
            index.shards += 1;
            filled = 0;
        }
        filled += bytes;
        index.pieces.push(Piece {
            name: piece.name.clone(),
            tokens: piece.tokens.len(),
            shard: index.shards - 1,
        });
    }
    std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let before = resumed(dir, &index)?;
    index.written = before;
    let left = total * (index.shards - before) as u64 / index.shards.max(1) as u64;
    if let Some(free) = free(dir).filter(|free| *free < left + left / 50) {
        return Err(Error::file(
            dir,
            format!(
                "the features take {:.2} GB ({} rows of {row} bytes), of which {:.2} are to be written, and {:.2} are free; \
                 fewer documents (--tokens) or another disk",
                total as f64 / 1e9,
                total / row,
                left as f64 / 1e9,
                free as f64 / 1e9
            ),
        ));
    }
    write_index(dir, &index)?;
    on_shard(before, index.shards);
    let mut first = 0;
    for shard in 0..index.shards {
        let count = index.pieces[first..]
            .iter()
            .take_while(|p| p.shard == shard)
            .count();
        let own = first..first + count;
        first += count;
        if shard < before {
            continue;
        }
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Interrupted(format!(
                "; {shard} of {} shards are in {}, the same command goes on",
                index.shards,
                dir.display()
            )));
        }
        let path = dir.join(shard_name(shard, index.shards));
        write_shard(session, &pieces[own.clone()], own.start, how, &path)?;
        index.written = shard + 1;
        write_index(dir, &index)?;
        on_shard(index.written, index.shards);
    }
    write_listing(dir, &index)?;
    Ok(Kept {
        counts: documents.counts.clone(),
        bytes: total,
        shards: index.shards,
        shards_before: before,
        seconds: begun.elapsed().as_secs_f64(),
    })
}

/// Keeps states that others have computed: documents with theirs, read one by one. `next` gives a document and its states in
/// bf16, row by row.
///
/// # Errors
/// If the folder holds something already, or cannot be written.
pub(super) fn keep_given(
    target: &str,
    taps: &[Tap],
    hidden: usize,
    shard_bytes: u64,
    dir: &Path,
    next: &mut dyn FnMut() -> Result<Option<(Document, Vec<u8>)>>,
) -> Result<Kept> {
    let begun = std::time::Instant::now();
    std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let mut there = std::fs::read_dir(dir).map_err(Error::io(dir))?;
    if there.next().is_some() {
        return Err(Error::file(dir, "is not empty; choose another --output"));
    }
    let mut index = Index {
        version: VERSION,
        target: target.into(),
        data: String::new(),
        taps: taps.iter().map(|&t| name_of(t)).collect(),
        hidden,
        top: 0,
        length: 0,
        pieces: Vec::new(),
        shards: 0,
        written: 0,
    };
    let (mut counts, mut bytes, mut hash) = (Counts::default(), 0, Sha256::new());
    let (mut pieces, mut states): (Vec<Document>, Vec<Vec<u8>>) = (Vec::new(), Vec::new());
    // How many there are is known at the end: shards get their names then.
    let shard =
        |pieces: &mut Vec<Document>, states: &mut Vec<Vec<u8>>, index: &mut Index| -> Result<()> {
            if pieces.is_empty() {
                return Ok(());
            }
            let first = index.pieces.len() - pieces.len();
            write_pieces(
                pieces,
                states,
                &[],
                first,
                &dir.join(format!("shard-{}", index.shards)),
            )?;
            index.shards += 1;
            pieces.clear();
            states.clear();
            Ok(())
        };
    while let Some((document, rows)) = next()? {
        counts.read += 1;
        counts.written += 1;
        counts.tokens += document.tokens.len() as u64;
        counts.masked += document.mask.iter().filter(|&&m| m).count() as u64;
        document
            .tokens
            .iter()
            .for_each(|t| hash.update(t.to_le_bytes()));
        document
            .mask
            .iter()
            .for_each(|&m| hash.update([u8::from(m)]));
        bytes += rows.len() as u64;
        index.length = index.length.max(document.tokens.len());
        index.pieces.push(Piece {
            name: document.name.clone(),
            tokens: document.tokens.len(),
            shard: index.shards,
        });
        pieces.push(document);
        states.push(rows);
        if states.iter().map(|s| s.len() as u64).sum::<u64>() >= shard_bytes {
            shard(&mut pieces, &mut states, &mut index)?;
        }
    }
    shard(&mut pieces, &mut states, &mut index)?;
    for i in 0..index.shards {
        let (from, to) = (
            dir.join(format!("shard-{i}")),
            dir.join(shard_name(i, index.shards)),
        );
        std::fs::rename(&from, &to).map_err(Error::io(&from))?;
    }
    index.written = index.shards;
    index.data = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    write_listing(dir, &index)?;
    write_index(dir, &index)?;
    Ok(Kept {
        counts,
        bytes,
        shards: index.shards,
        shards_before: 0,
        seconds: begun.elapsed().as_secs_f64(),
    })
}

/// Shards that an earlier run has written.
fn resumed(dir: &Path, now: &Index) -> Result<usize> {
    let path = dir.join(INDEX);
    if !path.exists() {
        let entries = std::fs::read_dir(dir).map_err(Error::io(dir))?;
        let weights = |e: std::io::Result<std::fs::DirEntry>| {
            e.is_ok_and(|e| {
                e.path().extension().is_some_and(|x| x == "safetensors") || e.file_name() == LISTING
            })
        };
        if entries.into_iter().any(weights) {
            return Err(Error::file(
                dir,
                "holds safetensors that are no features; choose another --output",
            ));
        }
        return Ok(0);
    }
    let was = read_index(dir)?;
    let same = Index {
        written: was.written,
        ..now.clone()
    };
    match same == was {
        true => Ok(was.written),
        false => Err(Error::file(
            &path,
            "holds features of another target, other documents, taps or sizes; choose another --output",
        )),
    }
}

fn read_index(dir: &Path) -> Result<Index> {
    let path = dir.join(INDEX);
    let value = files::read_json(&path, "an index of features")?;
    let index: Index =
        serde_json::from_value(value).map_err(|e| Error::file(&path, e.to_string()))?;
    match index.version == VERSION {
        true => Ok(index),
        false => Err(Error::file(
            &path,
            format!("is of version {}, this is {VERSION}", index.version),
        )),
    }
}

fn write_index(dir: &Path, index: &Index) -> Result<()> {
    let text = serde_json::to_vec(index).map_err(|e| Error::Experiment(e.to_string()))?;
    Ok(files::write(&dir.join(INDEX), &text)?)
}

/// The listing by which the shards are found, as transformers writes it.
fn write_listing(dir: &Path, index: &Index) -> Result<()> {
    let mut map = BTreeMap::new();
    let kinds: &[&str] = match index.top {
        0 => &["tokens", "mask", "states"],
        _ => &["tokens", "mask", "states", "top", "p"],
    };
    for (i, piece) in index.pieces.iter().enumerate() {
        let file = shard_name(piece.shard, index.shards);
        for kind in kinds {
            map.insert(format!("{i}.{kind}"), file.clone());
        }
    }
    let text = serde_json::to_vec(&serde_json::json!({ "weight_map": map }))
        .map_err(|e| Error::Experiment(e.to_string()))?;
    Ok(files::write(&dir.join(LISTING), &text)?)
}

/// Rows that run together, at most.
const TOGETHER: usize = 2048;

/// States of the first pieces, as many as run together: for each a matrix for each tap.
fn states_of(session: &mut Session, pieces: &[Document], taps: &[Tap]) -> Result<Vec<Vec<Matrix>>> {
    let (mut tokens, mut documents) = (Vec::new(), Vec::new());
    for piece in pieces {
        if !tokens.is_empty() && tokens.len() + piece.tokens.len() > TOGETHER {
            break;
        }
        documents.push(tokens.len()..tokens.len() + piece.tokens.len());
        tokens.extend_from_slice(&piece.tokens);
    }
    let counts: Vec<usize> = documents.iter().map(|d| d.len()).collect();
    let rows = PackedRows::new(1, tokens.len(), documents)?;
    let mut all = vec![Vec::with_capacity(taps.len()); counts.len()];
    for state in session.target.model.states(&tokens, &rows, taps)? {
        for (own, part) in all.iter_mut().zip(state.split(&counts)?) {
            own.push(part);
        }
    }
    Ok(all)
}

fn write_shard(
    session: &mut Session,
    pieces: &[Document],
    first: usize,
    how: &How<'_>,
    path: &Path,
) -> Result<()> {
    // What the target says follows from its final state.
    let mut taps = how.taps.to_vec();
    if how.top > 0 && !taps.contains(&Tap::Final) {
        taps.push(Tap::Final);
    }
    let last = taps.iter().position(|t| *t == Tap::Final);
    let mut tops = Vec::new();
    let mut rows = Vec::with_capacity(pieces.len());
    let mut known = Vec::new().into_iter();
    for (i, piece) in pieces.iter().enumerate() {
        let n = piece.tokens.len();
        if known.len() == 0 {
            known = states_of(session, &pieces[i..], &taps)?.into_iter();
        }
        let states = known.next().unwrap_or_default();
        if let Some(last) = last
            .and_then(|last| states.get(last))
            .filter(|_| how.top > 0)
        {
            tops.push(top_of(session, last, how.top)?);
        }
        let states = &states[..how.taps.len().min(states.len())];
        let states = states
            .iter()
            .map(Matrix::all)
            .collect::<scylla_core::Result<Vec<_>>>()?;
        let mut bytes =
            Vec::with_capacity(n * states.iter().map(|s| s.len()).sum::<usize>() / n.max(1) * 2);
        for row in 0..n {
            for state in &states {
                let h = state.len() / n;
                let values = state[row * h..(row + 1) * h].iter();
                bytes.extend(values.flat_map(|v| bf16::from_f32(*v).to_le_bytes()));
            }
        }
        rows.push(bytes);
    }
    write_pieces(pieces, &rows, &tops, first, path)
}

/// The target's most probable tokens after each row of its final states.
fn top_of(session: &Session, states: &Matrix, k: usize) -> Result<TopProbabilities> {
    let known = session.known_tokens();
    let mut found = TopProbabilities {
        k,
        ..TopProbabilities::default()
    };
    // A few rows at a time: logits are wide.
    for first in (0..states.rows()).step_by(64) {
        let rows: Vec<usize> = (first..states.rows().min(first + 64)).collect();
        let (mut part, mut logits) = (Matrix::default(), Matrix::default());
        part.append(&[states], &rows)?;
        session.target.tokens.head.multiply(&part, &mut logits)?;
        let top = logits.top_log_probabilities(known, k)?;
        for row in 0..rows.len() {
            for &(id, log) in top.row(row) {
                found.ids.push(id as u32);
                found.p.push(log.exp() as f32);
            }
        }
    }
    Ok(found)
}

/// Writes pieces with their states `[n, taps H]` in bf16, row by row, as one shard.
fn write_pieces(
    pieces: &[Document],
    states: &[Vec<u8>],
    tops: &[TopProbabilities],
    first: usize,
    path: &Path,
) -> Result<()> {
    let mut held: Vec<(String, Dtype, Vec<usize>, &[u8])> = Vec::new();
    let ids: Vec<(Vec<u8>, Vec<u8>)> = pieces
        .iter()
        .map(|piece| {
            let ids = piece.tokens.iter().flat_map(|&t| (t as i32).to_le_bytes());
            (
                ids.collect(),
                piece.mask.iter().map(|&m| u8::from(m)).collect(),
            )
        })
        .collect();
    let top_bytes: Vec<(Vec<u8>, Vec<u8>)> = tops
        .iter()
        .map(|top| {
            let ids = top.ids.iter().flat_map(|&id| (id as i32).to_le_bytes());
            (
                ids.collect(),
                top.p.iter().flat_map(|p| p.to_le_bytes()).collect(),
            )
        })
        .collect();
    for (i, ((piece, bytes), (ids, mask))) in pieces.iter().zip(states).zip(&ids).enumerate() {
        let (number, n) = (first + i, piece.tokens.len());
        let width = bytes.len() / 2 / n.max(1);
        held.push((format!("{number}.tokens"), Dtype::I32, vec![n], ids));
        held.push((format!("{number}.mask"), Dtype::U8, vec![n], mask));
        if let (Some(top), Some((top_ids, top_p))) = (tops.get(i), top_bytes.get(i)) {
            held.push((format!("{number}.top"), Dtype::I32, vec![n, top.k], top_ids));
            held.push((format!("{number}.p"), Dtype::F32, vec![n, top.k], top_p));
        }
        held.push((
            format!("{number}.states"),
            Dtype::BF16,
            vec![n, width],
            bytes,
        ));
    }
    let failed = |e: safetensors::SafeTensorError| Error::file(path, e.to_string());
    let mut views = Vec::with_capacity(held.len());
    for (name, dtype, shape, bytes) in &held {
        views.push((
            name.as_str(),
            TensorView::new(*dtype, shape.clone(), bytes).map_err(failed)?,
        ));
    }
    let bytes = safetensors::serialize(views, None).map_err(failed)?;
    Ok(files::write(path, &bytes)?)
}

/// Features that were kept: documents with the target's states of each.
pub struct Features {
    /// The documents.
    pub documents: Documents,
    /// The states.
    pub taps: Vec<Tap>,
    hidden: usize,
    top: usize,
    shards: Shards,
    dir: PathBuf,
}

impl Features {
    /// Opens a folder of features of a target.
    ///
    /// # Errors
    /// If it is not whole, or they are another target's.
    pub fn open(dir: &Path, target: &str) -> Result<Self> {
        let index = read_index(dir)?;
        if index.written != index.shards {
            return Err(Error::file(
                dir,
                format!(
                    "{} of {} shards are written: `scylla data features` goes on",
                    index.written, index.shards
                ),
            ));
        }
        if index.target != target {
            return Err(Error::file(
                dir,
                format!(
                    "the features are those of the target with sha256 {}; this one has {target}",
                    index.target
                ),
            ));
        }
        let taps: Option<Vec<Tap>> = index.taps.iter().map(|t| tap_of(t)).collect();
        let taps =
            taps.ok_or_else(|| Error::file(&dir.join(INDEX), format!("taps {:?}", index.taps)))?;
        let shards = Shards::open(dir)?;
        let mut documents = Documents {
            hash: index.data.clone(),
            ..Documents::default()
        };
        for (i, piece) in index.pieces.iter().enumerate() {
            let (dtype, ids) = shards.stored(&format!("{i}.tokens"), &[piece.tokens])?;
            let (_, mask) = shards.stored(&format!("{i}.mask"), &[piece.tokens])?;
            let ids: Vec<u32> = ids
                .as_chunks()
                .0
                .iter()
                .map(|b| i32::from_le_bytes(*b) as u32)
                .collect();
            if dtype != Dtype::I32 || ids.len() != piece.tokens || mask.len() != piece.tokens {
                return Err(Error::file(
                    dir,
                    format!("piece {i} is not as its index says"),
                ));
            }
            let mask: Vec<bool> = mask.iter().map(|&m| m != 0).collect();
            documents.counts.read += 1;
            documents.counts.written += 1;
            documents.counts.tokens += ids.len() as u64;
            documents.counts.masked += mask.iter().filter(|&&m| m).count() as u64;
            documents.all.push(Document {
                name: piece.name.clone(),
                tokens: ids,
                mask,
            });
        }
        Ok(Self {
            documents,
            taps,
            hidden: index.hidden,
            top: index.top,
            shards,
            dir: dir.to_path_buf(),
        })
    }

    /// Whether the target's most probable tokens are kept.
    pub fn says(&self) -> bool {
        self.top > 0
    }

    /// The target's most probable tokens after each row of packed lines, where they are kept.
    ///
    /// # Errors
    /// If a shard cannot be read.
    pub fn top(&self, lines: &Lines) -> Result<Option<TopProbabilities>> {
        let k = self.top;
        if k == 0 {
            return Ok(None);
        }
        let mut found = TopProbabilities {
            k,
            ..TopProbabilities::default()
        };
        let pieces = lines.of.iter().zip(&lines.from);
        for (range, (&document, &from)) in lines.rows.documents.iter().zip(pieces) {
            if document == usize::MAX {
                found.ids.resize(found.ids.len() + range.len() * k, 0);
                found.p.resize(found.p.len() + range.len() * k, 0.0);
                continue;
            }
            let n = self.documents.all[document].tokens.len();
            let (kind, ids) = self.shards.stored(&format!("{document}.top"), &[n, k])?;
            let (of, p) = self.shards.stored(&format!("{document}.p"), &[n, k])?;
            if (kind, of) != (Dtype::I32, Dtype::F32) {
                return Err(Error::file(
                    &self.dir,
                    format!(
                        "tokens {kind:?} and probabilities {of:?} of piece {document}; expected I32 and F32"
                    ),
                ));
            }
            let own = from * k * 4..(from + range.len()) * k * 4;
            let ids = ids[own.clone()].as_chunks().0.iter();
            found.ids.extend(ids.map(|b| i32::from_le_bytes(*b) as u32));
            let p = p[own].as_chunks().0.iter();
            found.p.extend(p.map(|b| f32::from_le_bytes(*b)));
        }
        Ok(Some(found))
    }

    /// States of packed lines, one matrix for each of the taps asked for.
    ///
    /// # Errors
    /// If a tap is not kept, or a shard cannot be read.
    pub fn states(&self, lines: &Lines, taps: &[Tap]) -> Result<Vec<Matrix>> {
        let h = self.hidden;
        let place = |tap: &Tap| {
            self.taps.iter().position(|t| t == tap).ok_or_else(|| {
                Error::file(
                    &self.dir,
                    format!("keeps no state {tap:?}; it keeps {:?}", self.taps),
                )
            })
        };
        let places = taps.iter().map(place).collect::<Result<Vec<_>>>()?;
        let width = self.taps.len() * h;
        let mut values: Vec<Vec<f32>> =
            vec![Vec::with_capacity(lines.tokens.len() * h); taps.len()];
        for (range, (&document, &from)) in lines
            .rows
            .documents
            .iter()
            .zip(lines.of.iter().zip(&lines.from))
        {
            if document == usize::MAX {
                values
                    .iter_mut()
                    .for_each(|v| v.resize(v.len() + range.len() * h, 0.0));
                continue;
            }
            let n = self.documents.all[document].tokens.len();
            let (kind, bytes) = self
                .shards
                .stored(&format!("{document}.states"), &[n, width])?;
            if kind != Dtype::BF16 {
                return Err(Error::file(
                    &self.dir,
                    format!("states of piece {document} are {kind:?}; expected BF16"),
                ));
            }
            for row in from..from + range.len() {
                for (values, place) in values.iter_mut().zip(&places) {
                    let at = (row * width + place * h) * 2;
                    let row = bytes[at..at + h * 2].as_chunks().0.iter();
                    values.extend(row.map(|b| bf16::from_le_bytes(*b).to_f32()));
                }
            }
        }
        Ok(values.into_iter().map(|v| Matrix::host(v, h)).collect())
    }
}
