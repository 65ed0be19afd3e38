//! `config.json` of an exported checkpoint.

use scylla_core::model::RopeScaling;
use scylla_core::plugin::Tap;
use serde_json::{Map, Value, json};

use super::super::layout::SCYLLA;
use super::super::{Backbone, DraftConfig, Eagle3Config, default_taps};
use super::{Export, Format};
use scylla_core::{Error, Result};

/// The stretch of the rotary frequencies, as transformers says it.
fn rope_scaling(scaling: &RopeScaling) -> Result<Value> {
    Ok(match scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original,
        } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": *original as u64,
        }),
        RopeScaling::Yarn {
            factor,
            original,
            beta_fast,
            beta_slow,
            attention_factor,
            truncate,
        } => json!({
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": *original as u64,
            "beta_fast": beta_fast,
            "beta_slow": beta_slow,
            "attention_factor": attention_factor,
            "truncate": truncate,
        }),
        RopeScaling::Factors(_) => {
            return Err(Error::Unsupported(
                "a rope with a factor for each frequency cannot be said in config.json".into(),
            ));
        }
    })
}

/// Plain Llama fields, with the rotary positions in both spellings.
fn llama(c: &Backbone, what: &Export<'_>, dtype: &str) -> Result<Map<String, Value>> {
    let Some(layer) = c.layers.first() else {
        return Err(Error::Invalid("a draft of no layers".into()));
    };
    let scaling = rope_scaling(&layer.rope.scaling)?;
    let mut parameters = match &scaling {
        Value::Object(map) => map.clone(),
        _ => Map::from_iter([("rope_type".into(), json!("default"))]),
    };
    parameters.insert("rope_theta".into(), json!(layer.rope.theta));
    let fields = json!({
        "model_type": "llama",
        "hidden_size": c.hidden,
        "intermediate_size": layer.ffn,
        "num_hidden_layers": c.layers.len(),
        "num_attention_heads": layer.heads,
        "num_key_value_heads": layer.kv_heads,
        "head_dim": layer.head_dim,
        "hidden_act": "silu",
        // The nearest decimal: 1e-5 is not written as 9.99999974e-6.
        "rms_norm_eps": c.eps.to_string().parse::<f64>().unwrap_or(1e-6),
        "vocab_size": c.vocab,
        // SGLang refuses a draft whose context is shorter than its target's.
        "max_position_embeddings": c.context.max(what.target.context),
        "rope_theta": layer.rope.theta,
        "rope_scaling": scaling,
        "rope_parameters": parameters,
        "attention_bias": layer.biases.o,
        "mlp_bias": layer.biases.mlp,
        "tie_word_embeddings": false,
        "torch_dtype": dtype,
    });
    let mut fields = match fields {
        Value::Object(map) => map,
        _ => Map::new(),
    };
    if layer.biases.q != layer.biases.o {
        fields.insert("qkv_bias".into(), json!(layer.biases.q));
    }
    Ok(fields)
}

/// The whole configuration; `biased` says whether an `fc.bias` is written, `dtype` the type of most values.
pub(super) fn config(
    what: &Export<'_>,
    biased: bool,
    dtype: &str,
    notes: &mut Vec<String>,
) -> Result<Value> {
    let from = &what.checkpoint.config;
    let c = from.backbone();
    let plain = llama(c, what, dtype)?;
    if c.layers.iter().any(|l| l.biases.q) {
        notes.push(
            "q, k and v have biases (qkv_bias): SGLang's EAGLE-3 loads none, vLLM's may not".into(),
        );
    }
    let mut all = Map::new();
    let mut set = |key: &str, value: Value| {
        all.insert(key.into(), value);
    };
    if let Some(hash) = what.target_sha256 {
        set("target_sha256", json!(hash));
    }
    match what.format {
        Format::Eagle => {
            // SGLang takes the first name; vLLM the first that it knows.
            let names: &[&str] = match biased {
                true => &["LlamaForCausalLMEagle", "LlamaForCausalLM"],
                false => &["LlamaForCausalLM"],
            };
            set("architectures", json!(names));
            all.extend(plain);
            // The engines read `bias` as one of the attention, and `fc`'s from the keys.
            all.insert("bias".into(), json!(false));
        }
        Format::Eagle3 => {
            set("architectures", json!(["LlamaForCausalLMEagle3"]));
            all.extend(plain);
            eagle3_fields(what, &mut all, notes);
        }
        Format::Scylla => {
            set("architectures", json!([SCYLLA]));
            all.extend(plain);
            if let DraftConfig::Scylla(c) = from {
                all.insert("input_norm_first".into(), json!(c.input_norm_first));
                all.insert("recur_before_norm".into(), json!(c.recur_before_norm));
            }
        }
        Format::Speculators => {
            // No `model_type` here: vLLM takes the file for a speculators one only without it.
            set("architectures", json!(["Eagle3Speculator"]));
            set("speculators_model_type", json!("eagle3"));
            set("speculators_version", json!("0.9.0"));
            let proposal = json!({
                "proposal_type": "greedy",
                "speculative_tokens": what.speculative_tokens,
                "verifier_accept_k": 1,
                "accept_tolerance": 0.0,
            });
            let (name, architecture) = what.verifier;
            let speculators = json!({
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [proposal],
                "verifier": {"name_or_path": name, "architectures": [architecture]},
            });
            set("speculators_config", speculators);
            let mut layer = plain;
            layer.insert("architectures".into(), json!(["LlamaForCausalLM"]));
            set("torch_dtype", json!(dtype));
            set("tie_word_embeddings", json!(false));
            set("transformer_layer_config", Value::Object(layer));
            eagle3_fields(what, &mut all, notes);
        }
    }
    Ok(Value::Object(all))
}

/// What an EAGLE-3 configuration says beside its layer.
fn eagle3_fields(what: &Export<'_>, all: &mut Map<String, Value>, notes: &mut Vec<String>) {
    let DraftConfig::Eagle3(c) = &what.checkpoint.config else {
        return;
    };
    let &Eagle3Config {
        norm_before_residual,
        norm_before_fc,
        fc_norm,
        norm_output,
        ..
    } = c;
    let mut set = |key: &str, value: Value| {
        all.insert(key.into(), value);
    };
    set("draft_vocab_size", json!(c.draft_vocab));
    set("norm_before_residual", json!(norm_before_residual));
    if norm_before_residual {
        notes.push(
            "norm_before_residual is true: vLLM and speculators follow it, SGLang does not".into(),
        );
    }
    if c.backbone.layers.len() > 1 {
        notes.push(
            "several layers: vLLM and speculators norm what enters the later ones by input_layernorm, as here; SGLang by a hidden_norm, \
             which this network has not, and would draft worse"
                .into(),
        );
    }
    for (key, flag) in [
        ("fc_norm", fc_norm),
        ("norm_output", norm_output),
        ("norm_before_fc", norm_before_fc),
    ] {
        if flag {
            set(key, json!(true));
        }
    }
    if what.target.hidden != c.backbone.hidden {
        set("target_hidden_size", json!(what.target.hidden));
    }
    let input = |tap: &Tap| match tap {
        Tap::Input(layer) => *layer,
        Tap::Final => what.target.layers.len(),
    };
    let layers: Vec<usize> = what.taps.iter().map(input).collect();
    let usual = default_taps(what.target.layers.len()).is_ok_and(|usual| layers == usual);
    if !usual {
        // vLLM counts layer inputs, SGLang layer outputs.
        let key = "eagle_aux_hidden_state_layer_ids";
        let outputs: Vec<i64> = layers.iter().map(|&l| l as i64 - 1).collect();
        set(key, json!(layers));
        set("num_aux_hidden_states", json!(layers.len()));
        set("eagle_config", json!({ key: outputs }));
    }
}
