//! States that vLLM has computed for the speculators library: a file `hs_{i}.safetensors` for each sample, with `hidden_states`
//! `[S, layers, H]`, `token_ids` `[S]`, and perhaps `loss_mask` `[S]`.
//!
//! A layer's id is the one whose input it is; the last, the target's number of layers, is the last output before the final norm,
//! which is applied here: drafts learn from what comes behind it.

use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use scylla_core::model::{ModelFiles, WeightForm, Weights};
use scylla_core::plugin::Tap;

use super::documents::Document;
use super::features::{Kept, keep_given};
use crate::session::Session;
use crate::{Error, Result};

/// The files of a folder, by their numbers.
fn files_of(dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let number = name
            .strip_prefix("hs_")
            .and_then(|n| n.strip_suffix(".safetensors"));
        if let Some(number) = number.and_then(|n| n.parse().ok()) {
            found.push((number, path.clone()));
        }
    }
    found.sort();
    match found.is_empty() {
        true => Err(Error::file(dir, "holds no hs_{i}.safetensors")),
        false => Ok(found),
    }
}

/// A tensor's values as f32.
fn floats(view: &TensorView<'_>) -> Option<Vec<f32>> {
    let data = view.data();
    Some(match view.dtype() {
        Dtype::F32 => data
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect(),
        Dtype::BF16 => data
            .as_chunks::<2>()
            .0
            .iter()
            .map(|b| bf16::from_le_bytes(*b).to_f32())
            .collect(),
        Dtype::F16 => data
            .as_chunks::<2>()
            .0
            .iter()
            .map(|b| f16::from_le_bytes(*b).to_f32())
            .collect(),
        _ => return None,
    })
}

/// A tensor's values as whole numbers.
fn numbers(view: &TensorView<'_>) -> Option<Vec<i64>> {
    let data = view.data();
    Some(match view.dtype() {
        Dtype::I64 => data
            .as_chunks::<8>()
            .0
            .iter()
            .map(|b| i64::from_le_bytes(*b))
            .collect(),
        Dtype::I32 => data
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| i32::from_le_bytes(*b).into())
            .collect(),
        Dtype::U8 | Dtype::BOOL => data.iter().map(|&b| b.into()).collect(),
        _ => return None,
    })
}

/// What a sample's states are read with.
struct Sizes {
    layers: usize,
    hidden: usize,
    vocab: usize,
    eps: f32,
    /// Weights of the target's final norm.
    norm: Vec<f32>,
}

/// A sample: its document, and states in bf16, the last layer's normed.
fn sample(path: &Path, name: String, sizes: &Sizes) -> Result<(Document, Vec<u8>)> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let bad = |what: String| Error::file(path, what);
    let file = SafeTensors::deserialize(&bytes).map_err(|e| bad(format!("not whole: {e}")))?;
    let tensor = |name: &str| {
        file.tensor(name)
            .map_err(|_| bad(format!("no tensor `{name}`")))
    };
    let (states, ids) = (tensor("hidden_states")?, tensor("token_ids")?);
    let n = ids.shape().iter().product::<usize>();
    let expected = [n, sizes.layers, sizes.hidden];
    if states.shape() != expected || ids.shape().len() != 1 || n < 2 {
        return Err(bad(format!(
            "hidden_states {:?} and token_ids {:?}; expected {expected:?} for the layers named and this target, of two tokens at least",
            states.shape(),
            ids.shape()
        )));
    }
    let token = |id: &i64| {
        u32::try_from(*id)
            .ok()
            .filter(|&id| (id as usize) < sizes.vocab)
    };
    let found = numbers(&ids).ok_or_else(|| bad(format!("token_ids of type {:?}", ids.dtype())))?;
    let tokens: Option<Vec<u32>> = found.iter().map(token).collect();
    let tokens =
        tokens.ok_or_else(|| bad(format!("a token outside the vocabulary of {}", sizes.vocab)))?;
    let mask = match file.tensor("loss_mask") {
        Err(_) => vec![true; n],
        Ok(view) => match numbers(&view).filter(|m| m.len() == n) {
            Some(mask) => mask.iter().map(|&m| m != 0).collect(),
            None => {
                return Err(bad(format!(
                    "loss_mask {:?} of type {:?}",
                    view.shape(),
                    view.dtype()
                )));
            }
        },
    };
    let Some(mut values) = floats(&states) else {
        return Err(bad(format!(
            "hidden_states of type {:?}; expected bf16, f16 or f32",
            states.dtype()
        )));
    };
    let h = sizes.hidden;
    for row in values.chunks_mut(sizes.layers * h) {
        let last = &mut row[(sizes.layers - 1) * h..];
        let mean = last.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / h as f64;
        let scale = (1.0 / (mean + f64::from(sizes.eps)).sqrt()) as f32;
        last.iter_mut()
            .zip(&sizes.norm)
            .for_each(|(v, w)| *v *= scale * w);
    }
    if !values.iter().all(|v| v.is_finite()) {
        return Err(bad("a state that is no number".into()));
    }
    let rows = values
        .iter()
        .flat_map(|v| bf16::from_f32(*v).to_le_bytes())
        .collect();
    Ok((Document { name, tokens, mask }, rows))
}

/// Takes over a folder of such files for a target, so that drafts train on it as on [`super::features::keep`]'s.
///
/// # Errors
/// If the layers do not end with the target's last output, or a file is not of this form and this target.
pub fn import(
    session: &Session,
    dir: &Path,
    layers: &[usize],
    shard_bytes: u64,
    output: &Path,
) -> Result<Kept> {
    let config = &session.target.config;
    let count = config.layers.len();
    let rising = layers.windows(2).all(|w| w[0] < w[1]);
    if !rising || layers.last() != Some(&count) {
        return Err(Error::Experiment(format!(
            "--layers {layers:?}: expected rising ids that end with {count}, the target's last output, as in 2,{},{},{count}",
            count / 2,
            count.saturating_sub(3)
        )));
    }
    let files = ModelFiles::open(&session.path)?;
    let norm = files
        .weights(WeightForm::AsIs)
        .vector("model.norm.weight", config.hidden)?;
    let sizes = Sizes {
        layers: layers.len(),
        hidden: config.hidden,
        vocab: config.vocab,
        eps: config.norm_eps,
        norm,
    };
    let mut taps: Vec<Tap> = layers[..layers.len() - 1]
        .iter()
        .map(|&l| Tap::Input(l))
        .collect();
    taps.push(Tap::Final);
    let mut samples = files_of(dir)?.into_iter();
    let next = &mut || match samples.next() {
        None => Ok(None),
        Some((number, path)) => sample(&path, format!("hs_{number}"), &sizes).map(Some),
    };
    keep_given(
        session.target_hash()?,
        &taps,
        config.hidden,
        shard_bytes,
        output,
        next,
    )
}
