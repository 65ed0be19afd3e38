//! `config.json` of a Hugging Face directory: what all families say alike.

use std::path::Path;

use serde_json::{Map, Value};

use super::{Described, Family, known, named, rope};
use crate::model::config::{ModelConfig, check_layers};
use crate::model::spec::{AttentionInput, Biases, LayerSpec};
use crate::{Error, Result};

/// Values of a JSON object by key; `null` is no value.
pub struct Fields<'a> {
    pub(super) map: &'a Map<String, Value>,
    pub(super) path: &'a Path,
    /// What stands before each key in messages.
    pub(super) prefix: String,
}

impl<'a> Fields<'a> {
    pub(super) fn of(json: &'a Value, path: &'a Path) -> Result<Self> {
        match json {
            Value::Object(map) => Ok(Self {
                map,
                path,
                prefix: String::new(),
            }),
            _ => Err(Error::file(
                path,
                "not a model configuration: no JSON object",
            )),
        }
    }
}

impl Fields<'_> {
    /// A value, where there is one.
    pub fn given(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// An error about a value.
    pub fn wrong(&self, key: &str, found: &Value, expected: &str) -> Error {
        Error::file(
            self.path,
            format!("`{}{key}` is {found}; expected {expected}", self.prefix),
        )
    }

    /// A number.
    ///
    /// # Errors
    /// If the value is another thing; so do the following.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        match self.given(key) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) => Ok(Some(number)),
                None => Err(self.wrong(key, value, "a number")),
            },
        }
    }

    /// A whole number that is not negative.
    pub fn size(&self, key: &str) -> Result<Option<usize>> {
        let wrong = || self.wrong(key, &self.map[key], "a size");
        match self.number(key)? {
            None => Ok(None),
            Some(v) if v >= 0.0 && v.fract() == 0.0 && v < 1e15 => Ok(Some(v as usize)),
            Some(_) => Err(wrong()),
        }
    }

    /// A whole number that must be there.
    pub fn need(&self, key: &str) -> Result<usize> {
        let missing = || Error::file(self.path, format!("key `{key}` is missing"));
        self.size(key)?.ok_or_else(missing)
    }

    /// A switch.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.given(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(self.wrong(key, other, "true or false")),
        }
    }

    /// A text.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.given(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(key, other, "a text")),
        }
    }

    /// The window of each layer, as transformers reads it: of the layers that `layer_types` says, else, where the family
    /// has windows unless told otherwise (`usual`) or the file says so (`use_sliding_window`), of those from the one on that
    /// the key `first` names (28 without it), or of all.
    ///
    /// # Errors
    /// If a value that is used is no size, or two contradict one another.
    pub fn windows(&self, usual: bool, first: Option<&str>) -> Result<Vec<Option<usize>>> {
        let context = self.need("max_position_embeddings")?;
        let layers = self.need("num_hidden_layers")?;
        let used = self.flag("use_sliding_window")?;
        let slides = match (self.kinds(layers)?, used.unwrap_or(usual)) {
            (Some(kinds), _) => kinds,
            (None, false) => vec![false; layers],
            (None, true) => {
                let first = match first {
                    Some(key) => self.size(key)?.unwrap_or(28),
                    None => 0,
                };
                (0..layers).map(|layer| layer >= first).collect()
            }
        };
        if !slides.contains(&true) {
            return Ok(vec![None; layers]);
        }
        if used == Some(false) {
            return Err(Error::file(
                self.path,
                "`use_sliding_window` is false beside `layer_types` with sliding_attention; keep the one that holds",
            ));
        }
        let window = match self.map.contains_key("sliding_window") {
            true => self.size("sliding_window")?,
            false => Some(4096), // the families' own
        };
        if window == Some(0) {
            return Err(self.wrong("sliding_window", &Value::from(0), "a size above 0"));
        }
        let window = window.filter(|&window| window < context);
        let of = |slides| window.filter(|_| slides);
        Ok(slides.into_iter().map(of).collect())
    }

    /// Which layers slide, where `layer_types` says it.
    fn kinds(&self, layers: usize) -> Result<Option<Vec<bool>>> {
        let kinds = match self.given("layer_types") {
            None => return Ok(None),
            Some(Value::Array(kinds)) => kinds,
            Some(other) => return Err(self.wrong("layer_types", other, "a list")),
        };
        let slides = |kind: &Value| match kind.as_str() {
            Some("full_attention") => Ok(false),
            Some("sliding_attention") => Ok(true),
            _ => Err(Error::Unsupported(format!(
                "{}: `layer_types` holds {kind}; supported: full_attention, sliding_attention",
                self.path.display(),
            ))),
        };
        if kinds.len() != layers {
            return Err(self.wrong(
                "layer_types",
                &Value::from(kinds.len()),
                "one kind for each of num_hidden_layers",
            ));
        }
        kinds.iter().map(slides).collect::<Result<_>>().map(Some)
    }
}

/// Keys that are read for every family.
const READ: &[&str] = &[
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "max_position_embeddings",
    "tie_word_embeddings",
    "hidden_act",
    "use_sliding_window",
    "layer_types",
    "quantization_config",
];

/// Reads a configuration; `more` are keys that are read elsewhere.
pub(super) fn config<'f>(
    fields: &Fields<'_>,
    families: &[&'f dyn Family],
    more: &[&str],
) -> Result<(Described, &'f dyn Family)> {
    let path = fields.path;
    refuse_quantised(fields)?;
    let model_type = fields.text("model_type")?.unwrap_or_default();
    let family = named(model_type, "model_type", families, path)?;
    let act = fields.text("hidden_act")?.unwrap_or("silu");
    // Two names for one function.
    if !["silu", "swish"].contains(&act) {
        return Err(Error::Unsupported(format!(
            "{}: hidden_act `{act}`; supported: silu",
            path.display()
        )));
    }
    let notes = unread(fields, &[more, family.keys()].concat())?;
    let heads = fields.need("num_attention_heads")?;
    let hidden = fields.need("hidden_size")?;
    let eps = fields.number("rms_norm_eps")?.unwrap_or(1e-6) as f32;
    let layer = LayerSpec {
        hidden,
        ffn: fields.need("intermediate_size")?,
        heads,
        kv_heads: fields.size("num_key_value_heads")?.unwrap_or(heads),
        head_dim: match fields.size("head_dim")? {
            Some(size) => size,
            None => hidden.checked_div(heads).unwrap_or(0),
        },
        eps,
        biases: Biases::default(),
        qk_norm: false,
        window: None,
        rope: rope::of_hf(fields)?,
        input: AttentionInput::Normed,
    };
    let count = fields.need("num_hidden_layers")?;
    check_layers(count, path)?;
    let mut config = ModelConfig {
        architecture: model_type.to_string(),
        vocab: fields.need("vocab_size")?,
        hidden,
        context: fields.need("max_position_embeddings")?,
        tied: fields.flag("tie_word_embeddings")?.unwrap_or(false),
        norm_eps: eps,
        layers: vec![layer; count],
    };
    family.layers_of_hf(fields, &mut config.layers)?;
    config.check(path)?;
    Ok(((config, notes), family))
}

/// A `config.json` that describes a shape, for models whose files hold none (GGUF).
///
/// # Errors
/// If it is one that such a file, read again, would not describe: a rope that is stretched, a window, biases of some products alone.
pub fn config_of(config: &ModelConfig) -> Result<Value> {
    let path = Path::new("config.json");
    let Some(layer) = config.layers.first() else {
        return Err(Error::Invalid("a model without a layer".into()));
    };
    let family = &*config.architecture;
    let class = match family {
        "llama" => "LlamaForCausalLM",
        "mistral" => "MistralForCausalLM",
        "qwen2" => "Qwen2ForCausalLM",
        "qwen3" => "Qwen3ForCausalLM",
        other => other,
    };
    // In the fewest digits that give the same f32 again.
    let eps: f64 = config.norm_eps.to_string().parse().unwrap_or(1e-6);
    let mut json = serde_json::json!({
        "architectures": [class],
        "model_type": family,
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "intermediate_size": layer.ffn,
        "num_hidden_layers": config.layers.len(),
        "num_attention_heads": layer.heads,
        "num_key_value_heads": layer.kv_heads,
        "head_dim": layer.head_dim,
        "max_position_embeddings": config.context,
        "rms_norm_eps": eps,
        "rope_theta": layer.rope.theta,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied,
        "torch_dtype": "float32",
    });
    if layer.biases.o {
        json["attention_bias"] = true.into();
    }
    if layer.biases.mlp {
        json["mlp_bias"] = true.into();
    }
    match super::of_config(&json, path) {
        Ok((again, _)) if again == *config => Ok(json),
        Ok(_) => Err(Error::Unsupported(
            "its layers have what a config.json written here would not say (a stretched rope, a window, or biases of some products)".into(),
        )),
        Err(e) => Err(e),
    }
}

/// Refuses keys that are not known and may change the model; returns a word on the others.
pub(super) fn unread(fields: &Fields<'_>, more: &[&str]) -> Result<Vec<String>> {
    let ignored = |key: &str| known::HF_KEYS.iter().any(|(k, _)| *k == key);
    let known = |key: &str| READ.contains(&key) || ignored(key) || more.contains(&key);
    let mut passed_over = Vec::new();
    for (key, value) in fields.map.iter().filter(|(key, _)| !known(key)) {
        if !known::harmless(key, value) {
            return Err(Error::Unsupported(format!(
                "{}: `{key}` is {value}, which may change the model and is not known here; if it changes nothing, take it out of the file",
                fields.path.display()
            )));
        }
        if !known::neutral(key, value) && !DESCRIBES.iter().any(|word| key.contains(word)) {
            passed_over.push(format!("`{key}`"));
        }
    }
    Ok(match passed_over.is_empty() {
        true => Vec::new(),
        false => vec![format!(
            "{}: not known here and passed over: {}",
            fields.path.display(),
            passed_over.join(", ")
        )],
    })
}

/// Words of keys that describe the file or settings of generation: nothing need be said of them.
const DESCRIBES: &[&str] = &[
    "version",
    "name",
    "path",
    "token",
    "model",
    "label",
    "beam",
    "penalty",
    "length",
    "top_",
    "temperature",
    "unsloth",
    "dropout",
    "pdrop",
    "return",
    "output",
    "auto_map",
    "task",
    "sample",
    "ngram",
    "prefix",
];

fn refuse_quantised(fields: &Fields<'_>) -> Result<()> {
    let Some(found) = fields.given("quantization_config") else {
        return Ok(());
    };
    let method = ["quant_method", "quant_algo", "quant_type"]
        .iter()
        .find_map(|key| found.get(key)?.as_str())
        .unwrap_or("a method it does not name");
    Err(Error::Unsupported(format!(
        "{}: weights quantised by {method} (quantization_config); take the model they were made from and choose --weights q8_0 or q4, \
         or a GGUF file of it",
        fields.path.display()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::family::{families, of_hf};
    use crate::model::rope::Rope;
    use proptest::prelude::*;

    fn json(extra: &str) -> String {
        format!(
            r#"{{"model_type":"llama","vocab_size":10,"hidden_size":8,"intermediate_size":16,"num_hidden_layers":1,
            "num_attention_heads":2,"max_position_embeddings":64{extra}}}"#
        )
    }

    fn described(text: &str) -> Result<Described> {
        of_hf(text, Path::new("config.json"), &families()).map(|found| found.0)
    }

    fn read(extra: &str) -> Result<ModelConfig> {
        described(&json(extra)).map(|found| found.0)
    }

    #[test]
    fn defaults_follow_the_heads() {
        let c = read("").expect("config");
        let layer = &c.layers[0];
        assert_eq!((layer.kv_heads, layer.head_dim), (2, 4));
        assert_eq!(layer.rope, Rope::plain(10000.0));
        assert!(layer.biases == Biases::default() && !c.tied);
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        for (extra, word) in [
            (
                r#","rope_scaling":{"rope_type":"yarn","factor":4.0,"mrope":1}"#,
                "mrope",
            ),
            (
                r#","rope_scaling":{"rope_type":"yarn","beta_fast":1,"beta_slow":2}"#,
                "beta_fast",
            ),
            (
                r#","rope_scaling":{"type":"dynamic","factor":4.0}"#,
                "dynamic",
            ),
            (r#","rope_scaling":{"rope_type":"longrope"}"#, "longrope"),
            (
                r#","rope_scaling":{"rope_type":"linear"}"#,
                "rope_scaling.factor",
            ),
            (
                r#","rope_scaling":{"rope_type":"linear","factor":0}"#,
                "rope_scaling.factor",
            ),
            (
                r#","rope_scaling":{"rope_type":"linear","factor":"2"}"#,
                "rope_scaling.factor",
            ),
            (r#","rope_scaling":{"factor":2}"#, "rope_scaling.factor"),
            (
                r#","rope_scaling":{"rope_type":"default","factor":2}"#,
                "rope_scaling.factor",
            ),
            (
                r#","rope_scaling":{"rope_type":"default","mrope_section":[1,1]}"#,
                "mrope_section",
            ),
            (
                r#","rope_scaling":{"rope_type":"linear","type":"yarn","factor":2}"#,
                "yarn",
            ),
            (r#","rope_scaling":"linear""#, "rope_scaling"),
            (
                r#","rope_parameters":{"rope_type":"linear","factor":2},"rope_scaling":{"type":"linear","factor":4}"#,
                "same",
            ),
            (
                r#","rope_theta":1e4,"rope_parameters":{"rope_theta":1e6}"#,
                "same",
            ),
            (
                r#","rope_parameters":{"full_attention":{"rope_theta":1e6},"sliding_attention":{"rope_theta":1e4}}"#,
                "sliding_attention",
            ),
            (
                r#","rope_parameters":{"full_attention":{"rope_type":"dynamic","factor":2}}"#,
                "grows",
            ),
            (r#","partial_rotary_factor":0.5"#, "partial_rotary_factor"),
            (
                r#","rope_parameters":{"partial_rotary_factor":0.25}"#,
                "partial_rotary_factor",
            ),
            (r#","rope_theta":0"#, "rope base 0"),
            (r#","rope_interleaved":true"#, "rope_interleaved"),
            (r#","no_rope_layers":[1]"#, "no_rope_layers"),
            (
                r#","layer_types":["chunked_attention"]"#,
                "chunked_attention",
            ),
            (
                r#","layer_types":["full_attention","full_attention"]"#,
                "layer_types",
            ),
            (r#","hidden_act":"gelu""#, "gelu"),
            (r#","mlp_bias":1"#, "mlp_bias"),
            (r#","num_key_value_heads":3"#, "3 kv heads"),
            (r#","head_dim":0"#, "head size 0"),
            (r#","logit_scale":0.0625"#, "logit_scale"),
            (
                r#","final_logit_softcapping":30.0"#,
                "final_logit_softcapping",
            ),
            (r#","residual_multiplier":0.22"#, "residual_multiplier"),
            (r#","num_local_experts":8"#, "num_local_experts"),
            (r#","use_qk_norm":true"#, "use_qk_norm"),
            (r#","is_causal":false"#, "is_causal"),
            (r#","attention_multiplier":1.0"#, "attention_multiplier"),
            (r#","norm_output":true"#, "norm_output"),
            (r#","vocab_size":"10""#, "vocab_size"),
            (r#","attention_bias":"no""#, "attention_bias"),
            (
                r#","quantization_config":{"quant_method":"gptq","bits":4}"#,
                "gptq",
            ),
            (r#","quantization_config":{"quant_algo":"FP8"}"#, "FP8"),
        ] {
            let error = read(extra).expect_err(extra).to_string();
            assert!(error.contains(word), "{extra}: {error}");
            assert!(error.contains("config.json"), "{error}");
        }
        let gpt2 = json("").replace("\"llama\"", "\"gpt2\"");
        let error = described(&gpt2).expect_err("gpt2").to_string();
        assert!(error.contains("gpt2") && error.contains("qwen2"), "{error}");
    }

    #[test]
    fn what_says_nothing_new_is_read() {
        let plain = read("").expect("plain");
        for extra in [
            r#","attention_bias":null,"tie_word_embeddings":null,"head_dim":null,"rope_scaling":null"#,
            r#","mlp_bias":null,"sliding_window":null,"quantization_config":null,"layer_types":null"#,
            r#","rope_interleaved":false,"partial_rotary_factor":1.0,"residual_multiplier":1,"num_local_experts":0"#,
            r#","logit_scale":1.0,"final_logit_softcapping":null,"rope_scaling":{"rope_type":"default"}"#,
            r#","rope_parameters":{"full_attention":{"rope_theta":10000.0,"rope_type":"default"}}"#,
            r#","hidden_act":"swish","num_attention_heads":2.0,"torch_dtype":"bfloat16","layer_types":["full_attention"]"#,
            r#","is_causal":true,"attention_dropout":0.1,"resid_pdrop":0.1,"transformers_version":"5.0","pretraining_tp":2"#,
        ] {
            assert_eq!(read(extra).expect(extra), plain, "{extra}");
        }
        let (_, notes) = described(&json(r#","favourite_colour":"blue""#)).expect("read");
        assert!(notes[0].contains("favourite_colour"), "{notes:?}");
    }

    #[test]
    fn windows_are_those_of_the_family_and_its_layers() {
        let window = |extra: &str| read(extra).expect(extra).layers[0].window;
        assert_eq!(
            window(r#","use_sliding_window":true,"sliding_window":16"#),
            Some(16)
        );
        assert_eq!(
            window(r#","use_sliding_window":true,"sliding_window":64"#),
            None
        );
        assert_eq!(
            window(r#","use_sliding_window":false,"sliding_window":16"#),
            None
        );
        assert_eq!(
            window(r#","sliding_window":16,"layer_types":["full_attention"]"#),
            None
        );
        assert_eq!(
            window(r#","sliding_window":16,"layer_types":["sliding_attention"]"#),
            Some(16)
        );
        let mistral = |extra: &str| {
            let text = json(extra)
                .replace("llama", "mistral")
                .replace(":64", ":9000");
            described(&text).expect(extra).0.layers[0].window
        };
        assert_eq!(mistral(""), Some(4096), "the family's own");
        assert_eq!(mistral(r#","sliding_window":null"#), None);
        assert_eq!(mistral(r#","sliding_window":100"#), Some(100));
    }

    #[test]
    fn every_spelling_of_a_rope_says_the_same() {
        let expected = read(r#","rope_theta":5e5,"rope_scaling":{"type":"linear","factor":2.0}"#)
            .expect("older");
        for other in [
            r#","rope_theta":5e5,"rope_scaling":{"rope_type":"linear","factor":2}"#,
            r#","rope_parameters":{"rope_type":"linear","rope_theta":5e5,"factor":2.0}"#,
            r#","rope_theta":5e5,"rope_parameters":{"rope_type":"linear","factor":2.0}"#,
            r#","rope_parameters":{"full_attention":{"rope_type":"linear","rope_theta":5e5,"factor":2.0}}"#,
            r#","rope_scaling":{"type":"linear","factor":2.0},"rope_parameters":{"rope_type":"linear","rope_theta":5e5,"factor":2.0}"#,
            r#","rope_theta":5e5,"rope_scaling":{"type":"linear","factor":2.0},
               "rope_parameters":{"rope_type":"linear","rope_theta":5e5,"factor":2.0}"#,
        ] {
            assert_eq!(read(other).expect(other), expected, "{other}");
        }
        let llama3 = r#"{"rope_type":"llama3","factor":8,"low_freq_factor":1,"high_freq_factor":4"#;
        let inside = read(&format!(
            r#","rope_scaling":{llama3},"original_max_position_embeddings":32}}"#
        ));
        let outside = read(&format!(
            r#","original_max_position_embeddings":32,"rope_scaling":{llama3}}}"#
        ));
        assert_eq!(inside.expect("inside"), outside.expect("outside"));
        let flat = llama3.replace("4", "1");
        let error = read(&format!(
            r#","rope_scaling":{flat},"original_max_position_embeddings":32}}"#
        ));
        assert!(
            error
                .expect_err("refused")
                .to_string()
                .contains("high_freq_factor")
        );
    }

    /// Values as configurations hold them.
    fn values() -> impl Strategy<Value = Value> {
        prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            prop_oneof![Just(0.0), Just(1.0), Just(0.5), -10.0..1e6].prop_map(Value::from),
            "[a-z]{0,8}".prop_map(Value::from),
            Just(serde_json::json!([])),
            Just(serde_json::json!([1, "x"])),
            Just(serde_json::json!({"a": 1})),
        ]
    }

    proptest! {
        #[test]
        fn a_key_is_followed_refused_or_told(
            first in "(attn|rope|norm|head|hidden|logit|layer|favourite|x|use|model|no)",
            second in "(scale|bias|size|softcap|colour|window|version|_rope|factor|dropout|types)",
            value in values(),
        ) {
            let key = format!("{first}_{second}");
            prop_assume!(!READ.contains(&key.as_str()) && !["attention_bias", "mlp_bias"].contains(&key.as_str())); // they are followed, and have tests of their own
            let plain = read("").expect("plain");
            let found = described(&json(&format!(r#","{key}":{value}"#)));
            match found {
                // Refused by name.
                Err(e) => prop_assert!(e.to_string().contains(&key), "{key}: {e}"),
                Ok((config, notes)) => {
                    prop_assert_eq!(config, plain.clone());
                    let told = notes.iter().any(|n| n.contains(&key)) || DESCRIBES.iter().any(|w| key.contains(w));
                    prop_assert!(known::neutral(&key, &value) || told, "{key} = {value} was passed over");
                    // What names a part of the mathematics is never only told.
                    prop_assert!(known::harmless(&key, &value), "{key} = {value}");
                }
            }
        }
    }
}
