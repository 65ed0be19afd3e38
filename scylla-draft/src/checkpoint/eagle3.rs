//! EAGLE-3's own matters: the draft vocabulary and the layers it taps.

use safetensors::Dtype;
use scylla_core::plugin::{Tap, TargetShape};
use scylla_core::{Error, Result};
use serde_json::Value;

use super::{Checkpoint, DraftConfig, Eagle3Config, MapForm};
use crate::network::Ids;

/// The layers whose inputs EAGLE-3 reads of a target of `n` layers: 2, n/2 and n-3.
///
/// # Errors
/// If they coincide or do not rise, as in targets of up to 6 layers.
pub fn default_taps(n: usize) -> Result<[usize; 3]> {
    let taps = [2, n / 2, n.saturating_sub(3)];
    match taps[0] < taps[1] && taps[1] < taps[2] {
        true => Ok(taps),
        false => Err(Error::Invalid(format!(
            "a target of {n} layers is too shallow for EAGLE-3's default taps (the inputs of layers 2, n/2 and n-3 are {taps:?}); \
             give three layers (draft.taps)"
        ))),
    }
}

/// Layer inputs that a configuration names: vLLM's top-level key counts inputs, SGLang's nested one counts outputs,
/// of which -1 is the embedding.
pub(super) fn configured_taps(json: &Value) -> Result<Option<Vec<usize>>> {
    let key = "eagle_aux_hidden_state_layer_ids";
    let nested = json.get("eagle_config").and_then(|c| c.get(key));
    let given = |value: Option<&Value>| value.filter(|v| !v.is_null()).cloned();
    let (list, shift) = match (given(json.get(key)), given(nested)) {
        (Some(inputs), _) => (inputs, 0),
        (None, Some(outputs)) => (outputs, 1),
        (None, None) => return Ok(None),
    };
    let layer = |v: &Value| usize::try_from(v.as_i64()?.checked_add(shift)?).ok();
    let layers = list.as_array().map(|ids| ids.iter().map(layer).collect());
    match layers.flatten() {
        Some(layers) => Ok(Some(layers)),
        None => Err(Error::Invalid(format!(
            "`{key}` is {list}; expected a list of layers"
        ))),
    }
}

/// `d2t` offsets of ascending target ids: `d2t[i] = target[i] - i`.
pub fn offsets_of(targets: &[u32]) -> Vec<i64> {
    let offset = |(i, &target): (usize, &u32)| i64::from(target) - i as i64;
    targets.iter().enumerate().map(offset).collect()
}

impl Eagle3Config {
    /// The taps it reads: `layers` where given, else what its configuration says, else the default.
    ///
    /// # Errors
    /// If they are not as many as it was made for, do not rise, or lie beyond the target's layers.
    pub fn taps(&self, layers: Option<&[usize]>, target: &TargetShape) -> Result<Vec<Tap>> {
        let layers = match (layers, &self.taps) {
            (Some(layers), _) => layers.to_vec(),
            (None, Some(layers)) => layers.clone(),
            (None, None) => default_taps(target.layers)?.to_vec(),
        };
        let rising = layers.windows(2).all(|w| w[0] < w[1]);
        let count = self.tap_count;
        if layers.len() != count || !rising || layers.iter().any(|&l| l > target.layers) {
            return Err(Error::Invalid(format!(
                "taps {layers:?}: expected {count} different layer inputs in rising order, of 0..={}",
                target.layers
            )));
        }
        Ok(layers.into_iter().map(Tap::Input).collect())
    }
}

impl Checkpoint {
    /// The taps an EAGLE-3 network reads, as [`Eagle3Config::taps`]; other networks read the final state.
    ///
    /// # Errors
    /// As [`Eagle3Config::taps`].
    pub fn taps(&self, layers: Option<&[usize]>, target: &TargetShape) -> Result<Vec<Tap>> {
        match &self.config {
            DraftConfig::Eagle3(c) => c.taps(layers, target),
            _ => Ok(vec![Tap::Final]),
        }
    }

    /// The draft vocabulary of an EAGLE-3 checkpoint, by `d2t`, or by the tokens that `t2d` marks where it stands alone.
    ///
    /// # Errors
    /// If an offset leads outside the target's vocabulary, two lead to one token, or `t2d` says otherwise.
    pub fn draft_ids(&self, known: usize) -> Result<Ids> {
        let (count, vocab) = (self.config.draft_vocab(), self.config.backbone().vocab);
        let marked = match self.has("t2d") {
            true => {
                let (_, bytes) = self.stored("t2d", &[vocab])?;
                // Of whatever width.
                let each = (bytes.len() / vocab).max(1);
                let marks = bytes
                    .chunks(each)
                    .map(|v| u8::from(v.iter().any(|&b| b != 0)));
                Some(marks.collect::<Vec<u8>>())
            }
            false => None,
        };
        let marks = |marked: &[u8]| -> Vec<u32> {
            let all = marked.iter().zip(0u32..).filter(|(b, _)| **b != 0);
            all.map(|(_, token)| token).collect()
        };
        let targets = match (self.has("d2t"), &marked) {
            (true, _) => self.mapped()?,
            (false, Some(marked)) => marks(marked),
            (false, None) => return Ok(Ids::same(count, known)),
        };
        if let Some(marked) = marked {
            let marks = marks(&marked);
            let expected = format!("true for exactly the {count} tokens of the draft's vocabulary");
            if marks.len() != count {
                return Err(self.wrong("t2d", expected, format!("{} true", marks.len())));
            }
            if let Some(token) = targets.iter().find(|t| marks.binary_search(t).is_err()) {
                return Err(self.wrong("t2d", expected, format!("false for token {token}")));
            }
        }
        Ids::mapped(targets, vocab)
            .map_err(|e| self.wrong("d2t", "a different token for each id".into(), e.to_string()))
    }

    /// The target id of each draft id, by `d2t`.
    fn mapped(&self) -> Result<Vec<u32>> {
        let vocab = self.config.backbone().vocab;
        let target = |(i, offset): (usize, i64)| {
            let first = match self.map {
                MapForm::Offsets => i as i64,
                MapForm::Ids => 0,
            };
            let target = first
                .checked_add(offset)
                .and_then(|t| u32::try_from(t).ok());
            target.filter(|&t| (t as usize) < vocab).ok_or_else(|| {
                let expected = format!("offsets that lead into 0..{vocab}");
                self.wrong("d2t", expected, format!("{offset} at draft id {i}"))
            })
        };
        self.offsets()?
            .into_iter()
            .enumerate()
            .map(target)
            .collect()
    }

    /// The values of `d2t`, of whatever width.
    pub(super) fn offsets(&self) -> Result<Vec<i64>> {
        let (dtype, bytes) = self.stored("d2t", &[self.config.draft_vocab()])?;
        Ok(match dtype {
            Dtype::I16 => bytes
                .as_chunks()
                .0
                .iter()
                .map(|b| i16::from_le_bytes(*b).into())
                .collect(),
            Dtype::I32 => bytes
                .as_chunks()
                .0
                .iter()
                .map(|b| i32::from_le_bytes(*b).into())
                .collect(),
            _ => bytes
                .as_chunks()
                .0
                .iter()
                .map(|b| i64::from_le_bytes(*b))
                .collect(),
        })
    }
}
