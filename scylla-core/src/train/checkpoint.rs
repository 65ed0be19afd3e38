//! Checkpoints of a training run: named tensors and plain state in one file, written whole or not at all.
//!
//! It is a safetensors file: parameters as `parameter.NAME`, moments as `first.NAME` and `second.NAME`, all f32, and the
//! state as JSON in its metadata. What is read back is bit for bit what was written.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::graph::Compute;
use super::optimizer::{AdamW, Named};
use crate::plugin::Matrix;
use crate::{Error, Result, files};

const STATE: &str = "state";
const KINDS: [&str; 3] = ["parameter", "first", "second"];

/// Writes parameters, the optimizer's state, and whatever else the run is in the middle of.
///
/// # Errors
/// If values cannot be read, or the file cannot be written (a full disk leaves the one before as it was).
pub fn save(
    path: &Path,
    parameters: &Named,
    optimizer: &AdamW,
    state: &impl Serialize,
) -> Result<()> {
    let bad = |e: String| Error::file(path, e);
    let state = serde_json::to_string(&(optimizer.steps, state)).map_err(|e| bad(e.to_string()))?;
    let mut held: BTreeMap<String, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
    for (kind, named) in KINDS
        .iter()
        .zip([parameters, &optimizer.first, &optimizer.second])
    {
        for (name, m) in named {
            let bytes = m.all()?.iter().flat_map(|v| v.to_le_bytes()).collect();
            held.insert(format!("{kind}.{name}"), (vec![m.rows(), m.columns], bytes));
        }
    }
    let mut views = Vec::with_capacity(held.len());
    for (name, (shape, bytes)) in &held {
        let view =
            TensorView::new(Dtype::F32, shape.clone(), bytes).map_err(|e| bad(e.to_string()))?;
        views.push((name.clone(), view));
    }
    let metadata = [(STATE.to_string(), state)].into();
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(|e| bad(e.to_string()))?;
    files::write(path, &bytes)
}

/// Reads a checkpoint back to where it is computed.
///
/// # Errors
/// If the file is none, or not whole.
pub fn load<S: DeserializeOwned>(path: &Path, on: &Compute) -> Result<(Named, AdamW, S)> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let bad = |what: &str, e: String| Error::file(path, format!("{what}: {e}"));
    let broken = |e: safetensors::SafeTensorError| bad("not a whole checkpoint", e.to_string());
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(broken)?;
    let state = header.metadata().as_ref().and_then(|m| m.get(STATE));
    let Some(state) = state else {
        return Err(Error::file(
            path,
            "no checkpoint of a training run: it has no state",
        ));
    };
    let (steps, state): (u64, S) = serde_json::from_str(state)
        .map_err(|e| bad("the state of another version", e.to_string()))?;
    let file = SafeTensors::deserialize(&bytes).map_err(broken)?;
    let mut kinds = [const { Named::new() }; 3];
    for (name, view) in file.tensors() {
        let found = KINDS
            .iter()
            .position(|k| name.starts_with(&format!("{k}.")));
        let (Some(kind), Dtype::F32, [rows, columns]) = (found, view.dtype(), view.shape()) else {
            return Err(Error::file(
                path,
                format!("tensor `{name}` belongs to no checkpoint"),
            ));
        };
        let (values, _) = view.data().as_chunks::<4>();
        let values: Vec<f32> = values.iter().map(|b| f32::from_le_bytes(*b)).collect();
        if *rows == 0 || *columns == 0 {
            return Err(Error::file(path, format!("tensor `{name}` is empty")));
        }
        let own = name[KINDS[kind].len() + 1..].to_string();
        let matrix: Matrix = on.matrix(values, *columns)?;
        kinds[kind].insert(own, matrix);
    }
    let [parameters, first, second] = kinds;
    let same = |other: &Named| other.keys().eq(parameters.keys());
    match same(&first) && same(&second) && !parameters.is_empty() {
        true => Ok((
            parameters,
            AdamW {
                steps,
                first,
                second,
            },
            state,
        )),
        false => Err(Error::file(
            path,
            "parameters and moments are not of the same names",
        )),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn what_is_read_is_what_was_written_and_what_is_broken_is_refused() {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("checkpoint.safetensors");
        let on = Compute::tensors(Device::Cpu, DType::F32);
        let values = vec![1.0e-30, -0.0, f32::MIN_POSITIVE / 2.0, 3.3, 5.5, -1e30];
        let parameters: Named = [(
            "a.weight".to_string(),
            on.matrix(values.clone(), 3).expect("matrix"),
        )]
        .into();
        let mut adam = AdamW::new(&on, &parameters).expect("state");
        adam.steps = 77;
        save(&path, &parameters, &adam, &vec![1u64, u64::MAX]).expect("written");
        let (back, state, more): (Named, AdamW, Vec<u64>) = load(&path, &on).expect("read");
        let bits = |m: &Named| {
            m["a.weight"]
                .all()
                .expect("values")
                .iter()
                .map(|v| v.to_bits())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            bits(&back),
            values.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        );
        assert_eq!((state.steps, more), (77, vec![1, u64::MAX]));
        let whole = std::fs::read(&path).expect("bytes");
        for cut in [0, 8, whole.len() / 2, whole.len() - 1] {
            std::fs::write(&path, &whole[..cut]).expect("cut");
            assert!(
                load::<Vec<u64>>(&path, &on).is_err(),
                "{cut} of {} bytes",
                whole.len()
            );
        }
    }
}
