//! The formats that are read from outside, each with files that are right and a way to read one.

use std::path::Path;

use candle_core::quantized::GgmlDType;
use rand::RngExt;
use rand::SeedableRng;
use rand::rngs::StdRng;
use safetensors::Dtype;
use scylla_bench::data::conversations;
use scylla_bench::experiment::{DEFAULT, Experiment};
use scylla_core::model::{LoadOptions, ModelFiles, load};
use scylla_core::text::{ChatTemplate, Message, Tokenizer};
use scylla_tests::{Tiny, write_gguf, write_hf, write_sentencepiece_gguf};
use serde_json::{Value, json};

use super::mutate;

/// Names of the formats.
pub(crate) const FORMATS: [&str; 7] = [
    "gguf",
    "safetensors",
    "config.json",
    "tokenizer.json",
    "chat-template",
    "experiment",
    "prompt-set",
];

/// Writes and reads files of one format in a folder of its own.
pub(crate) struct Reader {
    name: &'static str,
    dir: tempfile::TempDir,
    /// Files that are right.
    pub(crate) seeds: Vec<Vec<u8>>,
    words: &'static [&'static str],
    /// The same as JSON, where they are.
    values: Vec<Value>,
}

const TINY: Tiny = Tiny {
    family: "llama",
    window: None,
    vocab: 40,
    hidden: 32,
    ffn: 32,
    layers: 1,
    heads: 2,
    kv_heads: 1,
    head_dim: 16,
    tied: true,
    seed: 1,
};

/// A byte-level tokenizer of few tokens with all that is read of one.
fn tokenizer() -> Value {
    let letters = "abcdefghij \u{120}\u{10a}".chars().filter(|c| *c != ' ');
    let vocab: serde_json::Map<String, Value> = letters
        .chain(['k'])
        .enumerate()
        .map(|(i, c)| (c.to_string(), i.into()))
        .chain([("ab".to_string(), 20.into())])
        .collect();
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "a"},
        "added_tokens": [
            {"id": 21, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": true, "normalized": false, "special": true},
            {"id": 22, "content": "</s>", "single_word": false, "lstrip": true, "rstrip": false, "normalized": false, "special": true}
        ],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": "x+"}, "content": "a"}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "[^\\r\\n\\p{L}]?\\p{L}+|\\s+"}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}
        ]},
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [21], "tokens": ["<s>"]}}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": "a", "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": [["a", "b"]]}
    })
}

/// A trie of 1 unit, and no text.
const CHARSMAP: &str = "BAAAAAAAAAAA";

/// A SentencePiece-style one, by unigram.
fn unigram() -> Value {
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARSMAP},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": true},
        "post_processor": null,
        "decoder": {"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": true},
        "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": false, "vocab": [["<unk>", 0.0], ["\u{2581}a", -1.0], ["b", -2.0], ["ab", -1.5]]}
    })
}

const TEMPLATES: [&str; 4] = [
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{{- bos_token }}{%- set ns = namespace(n=0, t='') %}{%- for message in messages if message.role != 'system' -%}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{%- endif %}{% generation %}{{ message.content | trim ~ eos_token }}{% endgeneration %}{%- set ns.n = ns.n + 1 %}{%- endfor %}{{ strftime_now('%d %b %Y') }}",
    "{%- macro show(x, n=2) -%}{{ x | tojson(indent=n) }}{%- endmacro %}{% if tools is not none %}{{ tools | tojson }}{% endif %}{{ show({'a': [1, 2.5, none, true], 'b': 'x' * 3}) }}{{ messages[0]['content'].split('e') | join(', ') }}{{ range(3) | list }}",
    "{# c #}{% set x = [1, 2] + [3] %}{% for a in x recursive %}{{ loop.index }}{% else %}none{% endfor %}{{ 'abc'[::-1] | upper | replace('A', 'b') | indent(4) }}{{ {'k': 'v'}.items() | list }}{% raw %}{{ }}{% endraw %}",
];

const PROMPTS: &str = r#"{"id": 1, "category": "a", "turns": ["x", "y"], "system": "s"}
{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]}
{"id": "k", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
{"task_id": "HumanEval/0", "prompt": "def f():"}
{"question": "how many?", "answer": "4"}
{"instruction": "a", "input": "b", "output": "c"}
"#;

impl Reader {
    /// A reader of the format of this name.
    pub(crate) fn new(name: &str) -> Option<Self> {
        let name = FORMATS.iter().find(|f| **f == name)?;
        let dir = tempfile::tempdir().expect("a folder");
        let at = |file: &str| dir.path().join(file);
        let read = |file: &str| std::fs::read(at(file)).expect("a seed");
        let (mut seeds, mut values, mut words): (Vec<Vec<u8>>, Vec<Value>, &[&str]) =
            Default::default();
        write_hf(&TINY, dir.path(), Dtype::F32, 1);
        match *name {
            "gguf" => {
                for dtype in [GgmlDType::F32, GgmlDType::Q4_1, GgmlDType::Q8_0] {
                    write_gguf(&TINY, &at("x.gguf"), dtype);
                    seeds.push(read("x.gguf"));
                }
                write_sentencepiece_gguf(&at("x.gguf"));
                seeds.push(read("x.gguf"));
                words = &[
                    "llama.rope.scaling.type",
                    "general.alignment",
                    "split.count",
                    "qwen2",
                    "tokenizer.ggml.merges",
                ];
            }
            "safetensors" => {
                seeds.push(read("model.safetensors"));
                words = &[
                    "\"F8_E4M3\"",
                    "\"I64\"",
                    "[0,0]",
                    "4294967296",
                    "model.norm.weight",
                    "data_offsets",
                ];
            }
            "config.json" => {
                let mut config: Value = serde_json::from_slice(&read("config.json")).expect("JSON");
                values.push(config.clone());
                config["rope_scaling"] = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
                values.push(config.clone());
                config["rope_scaling"] = Value::Null;
                config["rope_parameters"] = json!({"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}});
                config["layer_types"] = json!(["full_attention"]);
                config["sliding_window"] = json!(16);
                values.push(config);
            }
            "tokenizer.json" => values.extend([tokenizer(), unigram()]),
            "chat-template" => {
                seeds.extend(TEMPLATES.map(|t| t.as_bytes().to_vec()));
                words = &[
                    "{% for i in range(99999) %}",
                    "{% endfor %}",
                    "{{ x * 99999 }}",
                    "~",
                    "**",
                    "{%- set ns.t = ns.t ~ ns.t %}",
                    "| tojson",
                    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
                    "'x' * 99999",
                    "| indent(999999)",
                    "{% raw %}",
                    "loop(x)",
                    "-1",
                    "[::0]",
                    "| batch(99999)",
                    "{% include 'chat' %}",
                    "{% extends 'chat' %}",
                    "{% import 'chat' as x %}",
                    "{% block b %}",
                ];
            }
            "experiment" => {
                seeds.push(DEFAULT.as_bytes().to_vec());
                let whole = Experiment::load(None, &[])
                    .and_then(|e| e.to_toml())
                    .expect("TOML");
                seeds.push(whole.into_bytes());
                words = &[
                    "[[compare]]",
                    "[run]",
                    "seed = 18446744073709551615",
                    "\"\"\"",
                    "nan",
                    "inf",
                    "a.b.c = 1",
                    "draft = {",
                ];
            }
            _ => {
                seeds.push(PROMPTS.as_bytes().to_vec());
                let rows: Vec<&str> = PROMPTS.lines().collect();
                seeds.push(format!("[{}]", rows.join(",")).into_bytes());
                values.extend(
                    rows.iter()
                        .map(|r| serde_json::from_str::<Value>(r).expect("JSON")),
                );
                words = &[
                    "\u{FEFF}",
                    "\"messages\"",
                    "\"images\"",
                    "[[[[[[[[",
                    "null",
                    "\r\n",
                ];
            }
        }
        seeds.extend(values.iter().map(|v| v.to_string().into_bytes()));
        Some(Self {
            name,
            dir,
            seeds,
            words,
            values,
        })
    }

    /// The input of a number; the same of the same number and seed.
    pub(crate) fn input(&self, number: u64, seed: u64) -> Vec<u8> {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&number.to_le_bytes());
        key[8..16].copy_from_slice(&seed.to_le_bytes());
        key[16..24].copy_from_slice(&(self.name.len() as u64).to_le_bytes());
        let mut rng = StdRng::from_seed(key);
        // JSON is mostly changed as such: what does not parse tests the parser alone.
        if !self.values.is_empty() && rng.random_range(0..4) > 0 {
            let from = &self.values[rng.random_range(0..self.values.len())];
            return mutate::value(&mut rng, from).to_string().into_bytes();
        }
        mutate::bytes(&mut rng, &self.seeds, self.words)
    }

    /// Writes an input and reads it as the program would; true if it was taken.
    pub(crate) fn read(&self, input: &[u8]) -> bool {
        let at = |file: &str| self.dir.path().join(file);
        let write = |file: &str| std::fs::write(at(file), input).expect("written");
        match self.name {
            "gguf" => {
                write("x.gguf");
                model(&at("x.gguf"))
            }
            "safetensors" => {
                write("model.safetensors");
                model(self.dir.path())
            }
            "config.json" => {
                write("config.json");
                model(self.dir.path())
            }
            "tokenizer.json" => {
                write("tokenizer.json");
                let Ok(tokenizer) = Tokenizer::from_dir(self.dir.path()) else {
                    return false;
                };
                let encoded = tokenizer.encode("ab abc\n <s>x\u{e9} aaaa</s>");
                encoded.is_ok_and(|ids| {
                    tokenizer.decode(&ids);
                    true
                })
            }
            "chat-template" => {
                let source = String::from_utf8_lossy(input);
                let specials =
                    ["bos_token", "eos_token"].map(|k| (k.to_string(), "<s>".to_string()));
                let message = |role, content: &str| Message {
                    role,
                    content: content.into(),
                };
                let talk = [
                    message("user", "some text, then more"),
                    message("assistant", "yes"),
                    message("user", "{{ 1 }}"),
                ];
                ChatTemplate::new(&source, specials.to_vec()).is_ok_and(|t| t.render(&talk).is_ok())
            }
            "experiment" => {
                write("x.toml");
                let found = Experiment::load(Some(&at("x.toml")), &[]);
                found.is_ok_and(|e| e.decoders().is_ok() && e.to_toml().is_ok())
            }
            _ => {
                write("x.jsonl");
                conversations::read(&at("x.jsonl")).is_ok()
            }
        }
    }
}

/// Opens a model, loads it, and reads its tokenizer.
fn model(path: &Path) -> bool {
    let Ok(files) = ModelFiles::open(path) else {
        return false;
    };
    let options = LoadOptions {
        threads: 1,
        ..LoadOptions::default()
    };
    let loaded = load(&files, &options);
    let tokenizer = Tokenizer::of_model(&files);
    loaded.is_ok() && tokenizer.is_ok()
}
