//! What a model's files may say without being followed: the one list of keys and tensors that are ignored, with the
//! reason for each. Everything else is applied, or refused by name.

use serde_json::Value;

/// Keys of `config.json` that change nothing here.
pub(in crate::model) const HF_KEYS: &[(&str, &str)] = &[
    ("architectures", "the family is named by model_type"),
    ("torch_dtype", "the file says each tensor's own type"),
    ("dtype", "the file says each tensor's own type"),
    ("bos_token_id", "prompts come from tokenizer and template"),
    ("eos_token_id", "read with the ends of sequences"),
    ("pad_token_id", "nothing is padded"),
    ("attention_dropout", "training only"),
    ("initializer_range", "training only"),
    ("use_cache", "there always is one"),
    ("pretraining_tp", "another order of the same sums"),
    (
        "max_window_layers",
        "read by the families whose windows begin there",
    ),
    ("is_llama_config", "a name"),
    ("attn_implementation", "the same mathematics"),
    ("_attn_implementation", "the same mathematics"),
    ("_attn_implementation_autoset", "the same mathematics"),
    ("_attn_implementation_internal", "the same mathematics"),
    ("_flash_attn_2_enabled", "the same mathematics"),
    (
        "original_max_position_embeddings",
        "read with the rope where its type needs it",
    ),
    ("num_labels", "classifiers only"),
    ("classifier_dropout", "classifiers only"),
    ("classifier_activation", "classifiers only"),
];

/// Keys of a draft's `config.json` that are read where drafts are, or say what layout the file has.
pub(in crate::model) const DRAFT_KEYS: &[&str] = &[
    "bias",
    "draft_vocab_size",
    "target_hidden_size",
    "norm_before_residual",
    "norm_before_fc",
    "norm_output",
    "fc_norm",
    "input_norm_first",
    "recur_before_norm",
    "num_aux_hidden_states",
    "eagle_aux_hidden_state_layer_ids",
    "eagle_config",
    "target_sha256",
    "transformer_layer_config",
    "speculators_model_type",
    "speculators_version",
    "speculators_config",
];

/// Tensors of a Hugging Face directory that change nothing, by what their names end with.
pub(in crate::model) const HF_TENSORS: &[(&str, &str)] = &[
    (
        "rotary_emb.inv_freq",
        "follows from the configuration's rope, as which it was computed",
    ),
    ("self_attn.bias", "a causal mask of old files"),
    ("self_attn.masked_bias", "a causal mask of old files"),
];

/// Tensors of a GGUF file that change nothing, by what their names end with.
pub(in crate::model) const GGUF_TENSORS: &[(&str, &str)] = &[(
    ".attn_rot_embd",
    "follows from the metadata's rope, as which it was computed",
)];

/// Keys of GGUF metadata, behind the architecture, that change nothing.
pub(in crate::model) const GGUF_KEYS: &[(&str, &str)] = &[
    ("rope.scaling.finetuned", "says how the model was made"),
    ("tensor_data_layout", "says how the file was made"),
];

/// Beginnings of GGUF metadata keys that describe the file, or are read where the tokenizer is.
pub(in crate::model) const GGUF_PREFIXES: &[&str] =
    &["general.", "tokenizer.", "split.", "quantize."];

/// Words of keys that name a part of the mathematics.
const MATHEMATICAL: &[&str] = &[
    "rope",
    "rotary",
    "norm",
    "bias",
    "scal",
    "multiplier",
    "softcap",
    "cap",
    "window",
    "attn",
    "attention",
    "expert",
    "moe",
    "router",
    "residual",
    "logit",
    "position",
    "sink",
    "sparse",
    "layer",
    "head",
    "embed",
    "parallel",
    "quant",
    "clip",
    "clamp",
    "gate",
    "lora",
    "alibi",
    "conv",
    "ssm",
    "mamba",
    "hidden",
    "activation",
    "mlp",
    "kv",
    "factor",
    "temperature_tuning",
    "causal",
    "decoder",
    "chunk",
    "compress",
    "indexer",
    "mtp",
    "nextn",
    "vision",
    "audio",
];

/// Whether a key that is not known may be passed over with a word: what it says is nothing, or it names no part of
/// the mathematics.
pub(in crate::model) fn harmless(key: &str, value: &Value) -> bool {
    neutral(key, value) || {
        let key = key.to_lowercase();
        !MATHEMATICAL.iter().any(|word| key.contains(word))
            || ["dropout", "pdrop"].iter().any(|end| key.ends_with(end))
    }
}

/// Whether a value says "as usual": nothing, no, none of them; of a factor, one.
pub(in crate::model) fn neutral(key: &str, value: &Value) -> bool {
    let has = |words: &[&str]| words.iter().any(|w| key.contains(w));
    if has(&["causal", "use_rope"]) {
        return value.is_null() || value == true;
    }
    // Usual is one over the root of a head's size, which no number says.
    if has(&[
        "attention.scale",
        "attention_multiplier",
        "attn_scale",
        "attention_scale",
    ]) {
        return value.is_null();
    }
    let factor = ["scal", "multiplier", "factor"]
        .iter()
        .any(|w| key.contains(w));
    match value {
        Value::Null => true,
        Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(n) => n.as_f64() == Some(if factor { 1.0 } else { 0.0 }),
        Value::String(s) => s.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}
