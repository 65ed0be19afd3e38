//! Families of models: what their files say, turned into the shape that executors run. One small file each.
//!
//! What all of them share is read here: sizes, rope and norms of a `config.json` ([`Fields`]) or of GGUF metadata. A
//! family adds what its layers have beside that, and says where its tensors' names differ.

mod gguf;
mod hf;
pub(super) mod known;
mod llama;
mod mistral;
mod qwen2;
mod qwen3;
mod rope;

use std::path::Path;

pub use hf::{Fields, config_of};

use super::config::ModelConfig;
use super::files::Gguf;
use super::spec::LayerSpec;
use crate::files::parse_json;
use crate::{Error, Result};

/// A family of models.
///
/// ```
/// use scylla_core::model::{Family, Fields, LayerSpec};
///
/// /// Llama's layers with a window of `sight` positions in every second one, and blocks instead of layers.
/// struct Toy;
///
/// impl Family for Toy {
///     fn name(&self) -> &'static str {
///         "toy"
///     }
///     fn keys(&self) -> &'static [&'static str] {
///         &["sight"]
///     }
///     fn layers_of_hf(&self, fields: &Fields<'_>, layers: &mut [LayerSpec]) -> scylla_core::Result<()> {
///         let sight = fields.size("sight")?;
///         layers.iter_mut().skip(1).step_by(2).for_each(|layer| layer.window = sight);
///         Ok(())
///     }
///     fn hf_name(&self, name: &str) -> String {
///         name.replace("model.layers", "blocks")
///     }
/// }
///
/// assert_eq!(Toy.hf_name("model.layers.3.mlp.up_proj.weight"), "blocks.3.mlp.up_proj.weight");
/// ```
pub trait Family: Sync {
    /// What files call it: `model_type` in a `config.json`, `general.architecture` in a GGUF file.
    fn name(&self) -> &'static str;

    /// Keys of `config.json` that [`Family::layers_of_hf`] reads.
    fn keys(&self) -> &'static [&'static str] {
        &[]
    }

    /// Gives the layers, which have the common sizes, what `config.json` says of them beside.
    ///
    /// # Errors
    /// Names the key that is wrong, or not supported.
    fn layers_of_hf(&self, fields: &Fields<'_>, layers: &mut [LayerSpec]) -> Result<()>;

    /// Whether GGUF files call their architecture by its name.
    fn has_gguf(&self) -> bool {
        true
    }

    /// The same from GGUF metadata. Biases and a window are there already, by tensor and key.
    ///
    /// # Errors
    /// Names the key that is wrong, or not supported.
    fn layers_of_gguf(&self, _: &Gguf, _: &mut [LayerSpec]) -> Result<()> {
        Ok(())
    }

    /// A tensor's name in a Hugging Face directory; `name` is the one that Llama uses.
    fn hf_name(&self, name: &str) -> String {
        name.into()
    }

    /// A tensor's name in a GGUF file.
    fn gguf_name(&self, name: &str) -> String {
        usual_gguf_name(name)
    }

    /// Whether GGUF files hold its rows of q and k in interleaved rotary pairs.
    fn is_interleaved(&self) -> bool {
        false
    }
}

/// A shape, and what its file says that was passed over, for the user to know.
pub type Described = (ModelConfig, Vec<String>);

/// The families that are built in.
pub fn families() -> Vec<&'static dyn Family> {
    vec![
        &llama::Llama,
        &mistral::Mistral,
        &qwen2::Qwen2,
        &qwen3::Qwen3,
    ]
}

/// The family of a name among some.
fn named<'f>(
    name: &str,
    what: &str,
    families: &[&'f dyn Family],
    path: &Path,
) -> Result<&'f dyn Family> {
    let found = families.iter().find(|family| family.name() == name);
    found.copied().ok_or_else(|| {
        let known: Vec<&str> = families.iter().map(|f| f.name()).collect();
        let known = known.join(", ");
        Error::Unsupported(format!(
            "{}: {what} `{name}`; supported: {known}",
            path.display()
        ))
    })
}

/// Reads a Hugging Face `config.json`; with its shape the family that it names.
///
/// # Errors
/// Names the key that is missing, wrong, or changes the model in a way that is not supported.
pub(super) fn of_hf<'f>(
    text: &str,
    path: &Path,
    families: &[&'f dyn Family],
) -> Result<(Described, &'f dyn Family)> {
    let json = parse_json(text, path, "a model configuration")?;
    hf::config(&Fields::of(&json, path)?, families, &[])
}

/// The same of a model whose weights are not there.
///
/// # Errors
/// As [`of_hf`].
pub fn of_config(json: &serde_json::Value, path: &Path) -> Result<Described> {
    Ok(hf::config(&Fields::of(json, path)?, &families(), &[])?.0)
}

/// The same of a draft's, whose layer may be described in `transformer_layer_config`, and which may say what only drafts
/// have.
///
/// # Errors
/// As [`of_hf`].
pub fn of_draft(json: &serde_json::Value, path: &Path) -> Result<Described> {
    let families = families();
    let fields = Fields::of(json, path)?;
    let Some(nested) = json.get("transformer_layer_config") else {
        return Ok(hf::config(&fields, &families, known::DRAFT_KEYS)?.0);
    };
    let mut notes = hf::unread(&fields, known::DRAFT_KEYS)?;
    let ((config, more), _) = hf::config(&Fields::of(nested, path)?, &families, &[])?;
    notes.extend(more);
    Ok((config, notes))
}

/// Reads the shape of a GGUF file; with it the family.
///
/// # Errors
/// As [`of_hf`].
pub(super) fn of_gguf<'f>(
    gguf: &Gguf,
    families: &[&'f dyn Family],
) -> Result<(Described, &'f dyn Family)> {
    gguf::config(gguf, families)
}

/// Refuses a window of a family whose layers do not all have it.
fn refuse_window(gguf: &Gguf, layers: &[LayerSpec]) -> Result<()> {
    match layers.iter().find_map(|layer| layer.window) {
        Some(window) => Err(Error::Unsupported(format!(
            "{}: metadata `attention.sliding_window` is {window}; which layers have it, a GGUF file does not say",
            gguf.path.display()
        ))),
        None => Ok(()),
    }
}

/// GGUF's name for a tensor that Hugging Face names as Llama does.
fn usual_gguf_name(name: &str) -> String {
    let top = [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("lm_head.weight", "output.weight"),
    ];
    if let Some((_, theirs)) = top.iter().find(|(ours, _)| *ours == name) {
        return (*theirs).into();
    }
    let mut theirs = name.replace("model.layers.", "blk.");
    for (ours, short) in [
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ] {
        theirs = theirs.replace(ours, short);
    }
    theirs
}
