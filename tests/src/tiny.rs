//! Random tiny models, written as Hugging Face directories and as GGUF files.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// The shape of a tiny model.
#[derive(Debug, Clone, Copy)]
pub struct Tiny {
    /// `llama`, `llama-bias` (biases everywhere), `mistral`, `qwen2` or `qwen3`.
    pub family: &'static str,
    /// Positions that Mistral's layers see, and Qwen's from the second on; llama has no window.
    pub window: Option<usize>,
    /// V.
    pub vocab: usize,
    /// H, a multiple of 32 so that every weight form fits.
    pub hidden: usize,
    /// I.
    pub ffn: usize,
    /// L.
    pub layers: usize,
    /// A.
    pub heads: usize,
    /// K.
    pub kv_heads: usize,
    /// E.
    pub head_dim: usize,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Seed of the weights.
    pub seed: u64,
}

impl Default for Tiny {
    fn default() -> Self {
        Self {
            family: "llama",
            window: None,
            vocab: 97,
            hidden: 64,
            ffn: 96,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            tied: false,
            seed: 0,
        }
    }
}

impl Tiny {
    /// Names and shapes of the weights, Hugging Face style.
    fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (h, q, kv) = (
            self.hidden,
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
        );
        let mut all = vec![
            ("model.embed_tokens.weight".to_string(), vec![self.vocab, h]),
            ("model.norm.weight".to_string(), vec![h]),
        ];
        if !self.tied {
            all.push(("lm_head.weight".into(), vec![self.vocab, h]));
        }
        for i in 0..self.layers {
            let mut add = |name: &str, shape: Vec<usize>| {
                all.push((format!("model.layers.{i}.{name}"), shape))
            };
            add("input_layernorm.weight", vec![h]);
            add("post_attention_layernorm.weight", vec![h]);
            for (name, n) in [("q", q), ("k", kv), ("v", kv)] {
                add(&format!("self_attn.{name}_proj.weight"), vec![n, h]);
                if ["qwen2", "llama-bias"].contains(&self.family) {
                    add(&format!("self_attn.{name}_proj.bias"), vec![n]);
                }
            }
            if self.family == "qwen3" {
                add("self_attn.q_norm.weight", vec![self.head_dim]);
                add("self_attn.k_norm.weight", vec![self.head_dim]);
            }
            add("self_attn.o_proj.weight", vec![h, q]);
            add("mlp.gate_proj.weight", vec![self.ffn, h]);
            add("mlp.up_proj.weight", vec![self.ffn, h]);
            add("mlp.down_proj.weight", vec![h, self.ffn]);
            if self.family == "llama-bias" {
                add("self_attn.o_proj.bias", vec![h]);
                add("mlp.gate_proj.bias", vec![self.ffn]);
                add("mlp.up_proj.bias", vec![self.ffn]);
                add("mlp.down_proj.bias", vec![h]);
            }
        }
        all
    }

    /// The weights. Large enough that greedy text does not settle on one token.
    fn weights(&self) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        let mut rng = StdRng::seed_from_u64(self.seed);
        self.shapes()
            .into_iter()
            .map(|(name, shape)| {
                let count = shape.iter().product();
                let scale = 2.5 / (*shape.last().expect("a shape") as f32).sqrt();
                let values = (0..count).map(|_| {
                    let v: f32 = rng.random_range(-1.0..1.0);
                    if name.contains("norm") {
                        1.0 + 0.1 * v
                    } else {
                        v * scale
                    }
                });
                let values = values.collect();
                (name, shape, values)
            })
            .collect()
    }

    /// What files call its family.
    fn model_type(&self) -> &'static str {
        self.family.strip_suffix("-bias").unwrap_or(self.family)
    }

    fn config(&self) -> serde_json::Value {
        let mut config = serde_json::json!({
            "model_type": self.model_type(),
            "sliding_window": self.window,
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "max_position_embeddings": 256,
            "tie_word_embeddings": self.tied,
            "eos_token_id": [2, 3],
        });
        if self.family == "llama-bias" {
            config["attention_bias"] = true.into();
            config["mlp_bias"] = true.into();
        }
        if self.family.starts_with("qwen") && self.window.is_some() {
            config["use_sliding_window"] = true.into();
            config["max_window_layers"] = 1.into();
        }
        config
    }
}

pub(crate) fn to_bytes(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => values
            .iter()
            .flat_map(|v| half::bf16::from_f32(*v).to_le_bytes())
            .collect(),
        Dtype::F16 => values
            .iter()
            .flat_map(|v| half::f16::from_f32(*v).to_le_bytes())
            .collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

/// Writes a Hugging Face directory in one or more shards.
pub fn write_hf(tiny: &Tiny, dir: &Path, dtype: Dtype, shards: usize) {
    let config = tiny.config().to_string();
    std::fs::write(dir.join("config.json"), config).expect("config");
    let weights = tiny.weights();
    let mut listing = HashMap::new();
    for shard in 0..shards {
        let file = match shards {
            1 => "model.safetensors".to_string(),
            n => format!("model-{:05}-of-{n:05}.safetensors", shard + 1),
        };
        let mine: Vec<(&String, &Vec<usize>, Vec<u8>)> = weights
            .iter()
            .enumerate()
            .filter(|(i, _)| i % shards == shard)
            .map(|(_, (name, shape, values))| (name, shape, to_bytes(values, dtype)))
            .collect();
        let views = mine.iter().map(|(name, shape, bytes)| {
            listing.insert((*name).clone(), file.clone());
            (
                *name,
                TensorView::new(dtype, (*shape).clone(), bytes).expect("view"),
            )
        });
        let bytes = safetensors::serialize(views, None).expect("serialize");
        std::fs::write(dir.join(&file), bytes).expect("weights");
    }
    if shards > 1 {
        let listing = serde_json::json!({ "weight_map": listing });
        std::fs::write(
            dir.join("model.safetensors.index.json"),
            listing.to_string(),
        )
        .expect("listing");
    }
}

/// Writes a GGUF file; matrices in `dtype`, Llama q and k rows in GGUF's interleaved order.
pub fn write_gguf(tiny: &Tiny, path: &Path, dtype: GgmlDType) {
    write_gguf_with(tiny, path, dtype, &[]);
}

/// The same with more metadata, or other values of some.
pub fn write_gguf_with(tiny: &Tiny, path: &Path, dtype: GgmlDType, more: &[(&str, Value)]) {
    let (metadata, tensors) = gguf(tiny, dtype, more);
    write(path, &metadata, &tensors);
}

/// The same in two files, the tensors shared out; returns the first.
pub fn write_split_gguf(tiny: &Tiny, dir: &Path, dtype: GgmlDType) -> PathBuf {
    let (metadata, tensors) = gguf(tiny, dtype, &[]);
    let (left, right) = tensors.split_at(tensors.len() / 2);
    let at = |i: usize| dir.join(format!("model-{i:05}-of-00002.gguf"));
    for (no, part) in [left, right].into_iter().enumerate() {
        let mut split = if no == 0 {
            metadata.clone()
        } else {
            Vec::new()
        };
        split.extend([
            ("split.no".to_string(), Value::U16(no as u16)),
            ("split.count".to_string(), Value::U16(2)),
            (
                "split.tensors.count".to_string(),
                Value::I32(tensors.len() as i32),
            ),
        ]);
        write(&at(no + 1), &split, part);
    }
    at(1)
}

type Metadata = Vec<(String, Value)>;

fn gguf(
    tiny: &Tiny,
    dtype: GgmlDType,
    more: &[(&str, Value)],
) -> (Metadata, Vec<(String, QTensor)>) {
    let tensors: Vec<(String, QTensor)> = tiny
        .weights()
        .into_iter()
        .map(|(name, shape, values)| {
            let heads = match () {
                () if tiny.model_type() != "llama" => None,
                () if name.contains("q_proj.bias") => Some(tiny.heads),
                () if name.contains("k_proj.bias") => Some(tiny.kv_heads),
                () if name.contains("q_proj.weight") => Some(tiny.heads),
                () if name.contains("k_proj.weight") => Some(tiny.kv_heads),
                () => None,
            };
            let values = match heads {
                Some(heads) => {
                    let columns = shape.get(1).copied().unwrap_or(1);
                    interleaved(&values, shape[0], columns, heads)
                }
                None => values,
            };
            let tensor = Tensor::from_vec(values, shape.clone(), &Device::Cpu).expect("tensor");
            let form = if shape.len() == 2 {
                dtype
            } else {
                GgmlDType::F32
            };
            (
                gguf_name(&name),
                QTensor::quantize(&tensor, form).expect("quantize"),
            )
        })
        .collect();
    let arch = tiny.model_type();
    let size = |name: &str, v: usize| (format!("{arch}.{name}"), Value::U32(v as u32));
    let mut metadata = vec![
        (
            "general.architecture".to_string(),
            Value::String(arch.into()),
        ),
        (
            "tokenizer.ggml.model".to_string(),
            Value::String("no_vocab".into()),
        ),
        size("embedding_length", tiny.hidden),
        size("feed_forward_length", tiny.ffn),
        size("block_count", tiny.layers),
        size("attention.head_count", tiny.heads),
        size("attention.head_count_kv", tiny.kv_heads),
        size("attention.key_length", tiny.head_dim),
        size("context_length", 256),
        (
            format!("{arch}.attention.layer_norm_rms_epsilon"),
            Value::F32(1e-5),
        ),
        (format!("{arch}.rope.freq_base"), Value::F32(10000.0)),
    ];
    for (key, value) in more {
        metadata.retain(|(known, _)| known != key);
        metadata.push((key.to_string(), value.clone()));
    }
    (metadata, tensors)
}

fn write(path: &Path, metadata: &[(String, Value)], tensors: &[(String, QTensor)]) {
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let mut file = std::fs::File::create(path).expect("create");
    gguf_file::write(&mut file, &metadata, &tensors).expect("write");
}

/// Split rotary pairs (i, i + E/2) to interleaved ones (2i, 2i + 1).
fn interleaved(values: &[f32], rows: usize, columns: usize, heads: usize) -> Vec<f32> {
    let e = rows / heads;
    let mut out = Vec::with_capacity(values.len());
    for row in 0..rows {
        let (head, at) = (row / e, row % e);
        let from = head * e + at / 2 + at % 2 * (e / 2);
        out.extend_from_slice(&values[from * columns..(from + 1) * columns]);
    }
    out
}

fn gguf_name(name: &str) -> String {
    let mut name = name.replace("model.layers.", "blk.");
    for (a, b) in [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("input_layernorm", "attn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ] {
        name = name.replace(a, b);
    }
    name
}

/// Tokens that [`byte_level_tokenizer`] has before its special ones.
pub const LETTERS: usize = 97;

/// A `tokenizer.json` over printable ASCII, space and line end, byte by byte but for one merge (`ab`), with these special
/// tokens behind.
pub fn byte_level_tokenizer(special: &[&str]) -> serde_json::Value {
    let mut vocab = serde_json::Map::new();
    for (i, byte) in (b'!'..=b'~').enumerate() {
        vocab.insert((byte as char).to_string(), i.into());
    }
    for (i, token) in ["\u{120}", "\u{10a}", "ab"].iter().enumerate() {
        vocab.insert(token.to_string(), (94 + i).into());
    }
    let added = special.iter().enumerate().map(|(i, token)| {
        serde_json::json!({"id": LETTERS + i, "content": token, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
    });
    serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added.collect::<Vec<_>>(), "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [["a", "b"]]}
    })
}

/// The same characters in the opposite order, with merges of frequent pairs behind them, and the special tokens last: another
/// tokenization of the same texts. Returns the file and how many tokens it has.
pub fn pair_tokenizer(special: &[&str]) -> (serde_json::Value, usize) {
    let mut file = byte_level_tokenizer(&[]);
    let mut tokens: Vec<String> = (b'!'..=b'~').map(|b| (b as char).to_string()).collect();
    tokens.extend(["\u{120}".to_string(), "\u{10a}".into()]);
    tokens.reverse();
    let mut merges = Vec::new();
    for pair in [
        "t h",
        "i n",
        "e r",
        "o n",
        "r e",
        "s t",
        "a n",
        "th e",
        "in g",
        "\u{120} the",
        "\u{120} \u{120}",
        "/ /",
        "l e",
        "o r",
    ] {
        let (a, b) = pair.split_once(' ').expect("two parts");
        merges.push(serde_json::json!([a, b]));
        tokens.push(format!("{a}{b}"));
    }
    let vocab = tokens.iter().enumerate();
    let vocab: serde_json::Map<String, serde_json::Value> =
        vocab.map(|(i, t)| (t.clone(), i.into())).collect();
    let count = vocab.len();
    file["model"]["vocab"] = vocab.into();
    file["model"]["merges"] = merges.into();
    let added = special.iter().enumerate().map(|(i, token)| {
        serde_json::json!({"id": count + i, "content": token, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
    });
    file["added_tokens"] = added.collect::<Vec<_>>().into();
    (file, count + special.len())
}

/// Writes the tiny model that was trained on this project's own files (`fixtures/make_letters_model.py`), with its tokenizer:
/// 7 layers of 64, 97 tokens, context 512. What it says is to be learned, unlike what random models say.
pub fn write_letters(dir: &Path) {
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": LETTERS, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 512, "tie_word_embeddings": false,
        "hidden_act": "silu", "torch_dtype": "bfloat16", "attention_bias": false, "mlp_bias": false
    });
    let weights = include_bytes!("../fixtures/letters.safetensors");
    for (name, bytes) in [
        ("config.json", config.to_string().as_bytes()),
        (
            "tokenizer.json",
            byte_level_tokenizer(&[]).to_string().as_bytes(),
        ),
        ("model.safetensors", weights),
    ] {
        std::fs::write(dir.join(name), bytes).expect("written");
    }
}

/// Writes a GGUF file that holds only a small SentencePiece tokenizer beside a model's shape.
pub fn write_sentencepiece_gguf(path: &Path) {
    let mut tokens: Vec<(String, f32, i32)> = vec![
        ("<unk>".into(), 0.0, 2),
        ("<s>".into(), 0.0, 3),
        ("</s>".into(), 0.0, 3),
    ];
    tokens.extend((0..=255).map(|b| (format!("<0x{b:02X}>"), 0.0, 6)));
    // Longer pieces merge later: the score is minus the rank.
    let pieces = [
        "\u{2581}t",
        "he",
        "\u{2581}the",
        "in",
        "\u{2581}a",
        "nd",
        "\u{2581}and",
        "re",
        "\u{2581}in",
        "er",
        "ca",
        "\u{2581}ca",
        "\u{2581}cat",
    ];
    tokens.extend(
        pieces
            .iter()
            .enumerate()
            .map(|(i, p)| (p.to_string(), -(i as f32), 1)),
    );
    let letters = "\u{2581}thecaindrosl.é".chars();
    tokens.extend(
        letters
            .enumerate()
            .map(|(i, c)| (c.to_string(), -100.0 - i as f32, 1)),
    );
    let list =
        |f: &dyn Fn(&(String, f32, i32)) -> Value| Value::Array(tokens.iter().map(f).collect());
    let metadata = vec![
        (
            "general.architecture".to_string(),
            Value::String("llama".into()),
        ),
        ("tokenizer.ggml.model".into(), Value::String("llama".into())),
        (
            "tokenizer.ggml.tokens".into(),
            list(&|t| Value::String(t.0.clone())),
        ),
        ("tokenizer.ggml.scores".into(), list(&|t| Value::F32(t.1))),
        (
            "tokenizer.ggml.token_type".into(),
            list(&|t| Value::I32(t.2)),
        ),
        ("tokenizer.ggml.bos_token_id".into(), Value::U32(1)),
        ("tokenizer.ggml.eos_token_id".into(), Value::U32(2)),
        ("tokenizer.ggml.unknown_token_id".into(), Value::U32(0)),
        ("llama.embedding_length".into(), Value::U32(32)),
        ("llama.feed_forward_length".into(), Value::U32(32)),
        ("llama.block_count".into(), Value::U32(1)),
        ("llama.attention.head_count".into(), Value::U32(1)),
        ("llama.context_length".into(), Value::U32(64)),
        (
            "llama.attention.layer_norm_rms_epsilon".into(),
            Value::F32(1e-5),
        ),
    ];
    let table =
        Tensor::zeros((tokens.len(), 32), candle_core::DType::F32, &Device::Cpu).expect("zeros");
    let table = QTensor::quantize(&table, GgmlDType::F32).expect("f32");
    write(path, &metadata, &[("token_embd.weight".to_string(), table)]);
}
