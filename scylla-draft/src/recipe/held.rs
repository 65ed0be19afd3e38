//! Between what is trained and what is decoded with: named parameters as a checkpoint's tensors, and back.

use std::collections::BTreeMap;

use half::bf16;
use safetensors::Dtype;
use scylla_core::model::Weights;
use scylla_core::train::Named;
use scylla_core::train::graph::Compute;
use scylla_core::{Error, Result};

use crate::checkpoint::{
    Checkpoint, DraftConfig, Entry, HeldTensor, Precision, entries, offsets_of,
};
use crate::network::Ids;

/// What does not train: the target's embedding, and maps of the vocabulary.
const FROZEN: [&str; 3] = ["embed_tokens.weight", "d2t", "t2d"];

/// The keys of a network that train.
pub(super) fn trained(config: &DraftConfig, has: &dyn Fn(&str) -> bool) -> Vec<Entry> {
    let mut all = entries(config, has);
    all.retain(|e| !FROZEN.contains(&&*e.name));
    all
}

/// Rows and columns of a parameter: a vector is one row.
pub(super) fn shape_of(entry: &Entry) -> (usize, usize) {
    match entry.shape[..] {
        [n, k] => (n, k),
        _ => (1, entry.shape.iter().product()),
    }
}

/// The parameters of a checkpoint that train, in f32 where a graph computes.
///
/// # Errors
/// If a tensor cannot be read.
pub fn parameters(from: &Checkpoint, on: &Compute) -> Result<Named> {
    let mut named = Named::new();
    for entry in trained(&from.config, &|name| from.has(name)) {
        if entry.optional && !from.has(&entry.name) {
            continue;
        }
        let (rows, columns) = shape_of(&entry);
        let values = match entry.shape.len() {
            2 => from.find(&entry.name, &entry.shape)?.weight()?.to_f32(),
            _ => from.vector(&entry.name, columns)?,
        };
        debug_assert_eq!(values.len(), rows * columns);
        named.insert(entry.name, on.matrix(values, columns)?);
    }
    Ok(named)
}

/// Parameters as the tensors of a checkpoint, rounded to bf16 unless f32 is asked for; with the maps of a draft vocabulary.
///
/// # Errors
/// If a parameter of the network is missing, or has another shape.
pub fn held(
    named: &Named,
    config: &DraftConfig,
    ids: Option<&Ids>,
    precision: Precision,
) -> Result<BTreeMap<String, HeldTensor>> {
    let mut all = BTreeMap::new();
    for entry in trained(config, &|name| named.contains_key(name)) {
        let Some(m) = named.get(&entry.name) else {
            match entry.optional {
                true => continue,
                false => return Err(Error::Invalid(format!("no parameter `{}`", entry.name))),
            }
        };
        if (m.rows(), m.columns) != shape_of(&entry) {
            return Err(Error::Invalid(format!(
                "parameter `{}` is {} x {}; its network has {:?}",
                entry.name,
                m.rows(),
                m.columns,
                entry.shape
            )));
        }
        let values = m.all()?;
        let (dtype, bytes): (Dtype, Vec<u8>) = match precision {
            Precision::Bf16 => {
                let rounded = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes());
                (Dtype::BF16, rounded.collect())
            }
            _ => (
                Dtype::F32,
                values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            ),
        };
        let shape = entry.shape;
        all.insert(
            entry.name,
            HeldTensor {
                dtype,
                shape,
                bytes,
            },
        );
    }
    let vocab = config.backbone().vocab;
    let (DraftConfig::Eagle3(c), Some(ids)) = (config, ids) else {
        return Ok(all);
    };
    if c.draft_vocab == vocab {
        return Ok(all);
    }
    let targets = ids.targets();
    let mut marked = vec![0u8; vocab];
    targets.iter().for_each(|&t| marked[t as usize] = 1);
    let offsets = offsets_of(&targets)
        .into_iter()
        .flat_map(i64::to_le_bytes)
        .collect();
    let map = |dtype, n, bytes| HeldTensor {
        dtype,
        shape: vec![n],
        bytes,
    };
    all.insert("d2t".into(), map(Dtype::I64, targets.len(), offsets));
    all.insert("t2d".into(), map(Dtype::BOOL, vocab, marked));
    Ok(all)
}
