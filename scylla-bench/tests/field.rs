//! Inputs on which tools of this kind fail in the field: each is done right, or refused with what was found and what to do.

mod common;

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value as Meta;
use common::{CHATML, Place};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use scylla_tests::{LETTERS, Tiny, write_gguf_with, write_hf, write_split_gguf};
use serde_json::{Value, json};

const IM_START: u64 = LETTERS as u64 + 1;
const IM_END: u64 = LETTERS as u64 + 2;

/// Ids of a text, letter by letter.
fn letters(text: &str) -> Vec<u64> {
    let id = |c: char| match c {
        ' ' => 94,
        '\n' => 95,
        c => c as u64 - '!' as u64,
    };
    text.chars().map(id).collect()
}

fn ids(value: &Value) -> Vec<u64> {
    serde_json::from_value(value.clone()).expect("ids")
}

fn generate<'a>(target: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let base = ["generate", "--json", "--target", target];
    let few = ["--set", "run.max_new_tokens=16"];
    [&base[..], &few, more].concat()
}

fn prompt_ids(place: &Place, target: &str, more: &[&str]) -> Vec<u64> {
    ids(&place.json(&generate(target, more))["prompt_ids"])
}

#[test]
fn a_tokenizer_neither_cuts_nor_fills_up_a_prompt() {
    let place = Place::new();
    place.talking("m", |[_, tokenizer, _]| {
        tokenizer["truncation"] = json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
        tokenizer["padding"] = json!({"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "!"});
    });
    let found = prompt_ids(
        &place,
        "m",
        &["--raw", "--prompt", "neither cut nor filled"],
    );
    assert_eq!(found, letters("neither cut nor filled"));
    place.talking("random", |[_, tokenizer, _]| {
        tokenizer["model"]["dropout"] = json!(0.1)
    });
    let message = place.refused(&generate("random", &["--raw", "--prompt", "x"]));
    assert!(message.contains("model.dropout"), "{message}");
}

#[test]
fn what_a_post_processor_puts_around_a_text_is_put_around_raw_prompts_alone() {
    let place = Place::new();
    let template = json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [LETTERS], "tokens": ["<|end|>"]}}});
    place.talking("m", |[_, tokenizer, _]| {
        tokenizer["post_processor"] = template
    });
    let bos = LETTERS as u64;
    let raw = |text: &str| prompt_ids(&place, "m", &["--raw", "--prompt", text]);
    assert_eq!(raw("ok"), [vec![bos], letters("ok")].concat());
    assert_eq!(
        raw("<|end|>ok"),
        [vec![bos], letters("ok")].concat(),
        "not doubled"
    );
    // The template alone decides of a conversation, as with transformers, and that is said.
    let out = place.run(&generate("m", &["--prompt", "ok"]));
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    let found: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert_eq!(ids(&found["prompt_ids"])[0], IM_START);
    assert!(said.contains("no BOS"), "{said}");
}

#[test]
fn tokens_that_only_the_tokenizer_configuration_lists_are_known() {
    let place = Place::new();
    let listed = |id: usize, content: &str| {
        json!({ id.to_string(): {"content": content, "special": true, "lstrip": false, "rstrip": false,
            "single_word": false, "normalized": false} })
    };
    // One id less of the letters, so that there is room for the token.
    place.talking("m", |[_, tokenizer, config]| {
        tokenizer["added_tokens"]
            .as_array_mut()
            .expect("list")
            .pop();
        config["added_tokens_decoder"] = listed(LETTERS + 2, "<|im_end|>");
    });
    let found = prompt_ids(&place, "m", &["--raw", "--prompt", "a<|im_end|>"]);
    assert_eq!(found, [letters("a"), vec![IM_END]].concat());
    place.talking("m", |[_, _, config]| {
        config["added_tokens_decoder"] = listed(5, "<|im_end|>")
    });
    let message = place.refused(&generate("m", &["--raw", "--prompt", "a"]));
    assert!(
        message.contains("<|im_end|>") && message.contains("the id 5"),
        "{message}"
    );
}

#[test]
fn special_tokens_in_a_text_are_special_unless_asked_otherwise() {
    let place = Place::new();
    place.talking("m", |_| {});
    let text = "x<|im_end|>\n<|im_start|>system";
    let spelt = letters(text);
    let before = [vec![IM_START], letters("user\n")].concat();
    let behind = [
        vec![IM_END],
        letters("\n"),
        vec![IM_START],
        letters("assistant\n"),
    ]
    .concat();
    let special = [
        letters("x"),
        vec![IM_END],
        letters("\n"),
        vec![IM_START],
        letters("system"),
    ]
    .concat();
    let ids = |more: &[&str]| prompt_ids(&place, "m", &[&["--prompt", text][..], more].concat());
    assert_eq!(ids(&[]), [&before[..], &special, &behind].concat());
    assert_eq!(ids(&["--literal"]), [&before[..], &spelt, &behind].concat());
    assert_eq!(ids(&["--raw"]), special);
    assert_eq!(ids(&["--raw", "--literal"]), spelt);
    // A text without any is the same either way.
    let plain = |more: &[&str]| {
        prompt_ids(
            &place,
            "m",
            &[&["--prompt", "abab  a b"][..], more].concat(),
        )
    };
    assert_eq!(plain(&[]), plain(&["--literal"]));
}

#[test]
fn an_answer_ends_where_the_tokenizer_or_the_template_says() {
    let place = Place::new();
    let eos = |name: &str| ids(&place.json(&["inspect", "model", name, "--json"])["eos"]);
    // The configuration says another one each time.
    place.talking("tokenizer", |[config, ..]| {
        config["eos_token_id"] = json!(LETTERS)
    });
    assert_eq!(eos("tokenizer"), [LETTERS as u64, IM_END]);
    place.talking("template", |[config, _, tokenizer]| {
        config["eos_token_id"] = json!([LETTERS]);
        tokenizer["eos_token"] = json!("<|end|>");
    });
    assert_eq!(eos("template"), [LETTERS as u64, IM_END]);
    place.talking("neither", |[config, _, tokenizer]| {
        config["eos_token_id"] = json!(LETTERS);
        tokenizer["eos_token"] = json!("<|end|>");
        tokenizer["chat_template"] = json!("{% for m in messages %}{{ m.content }}\n{% endfor %}");
    });
    assert_eq!(eos("neither"), [LETTERS as u64]);
    // One that is not flagged special, and one of a template that is chosen by name.
    place.talking("ordinary", |[config, tokenizer, more]| {
        config["eos_token_id"] = json!(LETTERS);
        tokenizer["added_tokens"][2]["special"] = json!(false);
        more["eos_token"] = json!("<|end|>");
    });
    assert_eq!(eos("ordinary"), [LETTERS as u64, IM_END]);
    for (wrong, word) in [
        (json!("2"), "\"2\""),
        (json!([1, -5]), "-5"),
        (json!(5000), "outside the vocabulary"),
    ] {
        place.talking("wrong", |[config, ..]| config["eos_token_id"] = wrong);
        let message = place.refused(&generate("wrong", &["--prompt", "a"]));
        assert!(
            message.contains("eos_token_id") && message.contains(word),
            "{message}"
        );
    }
}

#[test]
fn a_template_is_chosen_by_name_and_told_the_date_that_is_asked_for() {
    let place = Place::new();
    place.talking("m", |[_, _, config]| {
        config["chat_template"] = json!([
            {"name": "other", "template": "other {{ messages[0].content }}"},
            {"name": "default", "template": "{{ strftime_now('%Y-%m-%d') }}"}
        ]);
    });
    let shown = |set: &[&str]| {
        let mut args = vec!["--prompt", "x"];
        set.iter().for_each(|s| args.extend(["--set", s]));
        prompt_ids(&place, "m", &args)
    };
    assert_eq!(shown(&["prompts.template=other"]), letters("other x"));
    assert_eq!(shown(&["prompts.date=2024-07-06"]), letters("2024-07-06"));
    assert_eq!(shown(&[]).len(), letters("2024-07-06").len());
    let message = place.refused(&generate(
        "m",
        &["--prompt", "x", "--set", "prompts.template=third"],
    ));
    assert!(
        message.contains("third") && message.contains("other, default"),
        "{message}"
    );
    // One that does not compile is told where it is needed.
    place.talking("m", |[_, _, config]| {
        config["chat_template"] = json!("{% for")
    });
    let message = place.refused(&generate("m", &["--prompt", "x"]));
    assert!(
        message.contains("chat template") && message.contains("--raw"),
        "{message}"
    );
    assert_eq!(
        prompt_ids(&place, "m", &["--raw", "--prompt", "x"]),
        letters("x")
    );
    // Without a default one a name is needed, and those there are are said.
    place.talking("m", |[_, _, config]| {
        config["chat_template"] = json!([{"name": "a", "template": "x"}])
    });
    let message = place.refused(&generate("m", &["--prompt", "x"]));
    assert!(
        message.contains("prompts.template=NAME") && message.ends_with("a\n"),
        "{message}"
    );
    assert_eq!(
        prompt_ids(
            &place,
            "m",
            &["--prompt", "x", "--set", "prompts.template=a"]
        ),
        letters("x")
    );
}

/// Adds a tensor to a model's weights.
fn add_tensor(place: &Place, model: &str, name: &str, values: &[f32]) {
    let path = place.path(&format!("{model}/model.safetensors"));
    let bytes = std::fs::read(&path).expect("read");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let new: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F32, vec![values.len()], &new).expect("view");
    let all = file.iter().chain([(name, view)]);
    let written = safetensors::serialize(all, None).expect("serialize");
    std::fs::write(&path, written).expect("write");
}

#[test]
fn a_tensor_that_would_be_left_out_is_refused_by_name() {
    let place = Place::new();
    for name in [
        "model.layers.0.self_attn.o_proj.bias",
        "model.layers.1.self_attn.q_norm.weight",
        "score.weight",
    ] {
        place.talking("m", |_| {});
        add_tensor(&place, "m", name, &[0.5; 64]);
        let message = place.refused(&generate("m", &["--prompt-ids", "1"]));
        assert!(
            message.contains(name) && message.contains("left out"),
            "{message}"
        );
    }
    place.talking("m", |_| {});
    add_tensor(
        &place,
        "m",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        &[1.0; 8],
    );
    place.json(&generate("m", &["--prompt-ids", "1"]));
    place.talking("m", |_| {});
    add_tensor(
        &place,
        "m",
        "model.layers.0.self_attn.q_proj.qweight",
        &[1.0; 8],
    );
    let message = place.refused(&generate("m", &["--prompt-ids", "1"]));
    assert!(message.contains("quantised"), "{message}");
}

#[test]
fn quantised_and_foreign_weights_are_named_with_what_to_do() {
    let place = Place::new();
    let refused = |edit: &dyn Fn(&Place)| {
        place.talking("m", |_| {});
        edit(&place);
        let message = place.refused(&generate("m", &["--prompt", "x"]));
        std::fs::remove_dir_all(place.path("m")).expect("remove");
        assert!(!message.contains("stack backtrace"), "{message}");
        message
    };
    let rename = |from: &'static str, to: &'static str| {
        move |p: &Place| {
            std::fs::rename(p.path(&format!("m/{from}")), p.path(&format!("m/{to}")))
                .expect("rename")
        }
    };
    let config = |more: Value| move |p: &Place| p.talking("m", |[c, ..]| *c = merged(c, &more));
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n";
    for (message, words) in [
        (
            refused(&config(
                json!({"quantization_config": {"quant_method": "awq"}}),
            )),
            vec!["awq", "config.json", "GGUF"],
        ),
        (
            refused(&config(
                json!({"quantization_config": {"quant_method": "fp8"}}),
            )),
            vec!["fp8"],
        ),
        (
            refused(&config(json!({"vocab_size": "100"}))),
            vec!["vocab_size", "\"100\""],
        ),
        (
            refused(&rename("model.safetensors", "pytorch_model.bin")),
            vec!["pytorch_model.bin", "save_pretrained"],
        ),
        (
            refused(&rename("model.safetensors", "consolidated.safetensors")),
            vec!["consolidated.safetensors"],
        ),
        (
            refused(&rename("tokenizer.json", "tokenizer.model")),
            vec!["tokenizer.model", "AutoTokenizer"],
        ),
        (
            refused(&rename("config.json", "adapter_config.json")),
            vec!["adapter", "merge"],
        ),
        (
            refused(&|p| std::fs::write(p.path("m/model.safetensors"), pointer).expect("write")),
            vec!["Git LFS pointer", "git lfs pull"],
        ),
        (
            refused(&|p| std::fs::write(p.path("m/config.json"), pointer).expect("write")),
            vec!["config.json", "Git LFS pointer"],
        ),
        (
            refused(&|p| std::fs::write(p.path("m/model.safetensors"), "junk").expect("write")),
            vec!["model.safetensors", "not a whole safetensors file"],
        ),
    ] {
        for word in words {
            assert!(message.contains(word), "no `{word}` in: {message}");
        }
    }
    // What says nothing, and a byte order mark, are no reason to refuse.
    place.talking("m", |[c, ..]| {
        *c = merged(
            c,
            &json!({"attention_bias": null, "rope_scaling": null, "head_dim": 16.0}),
        )
    });
    let text = std::fs::read(place.path("m/config.json")).expect("read");
    std::fs::write(
        place.path("m/config.json"),
        [b"\xEF\xBB\xBF", &text[..]].concat(),
    )
    .expect("write");
    place.json(&generate("m", &["--prompt", "x"]));
}

fn merged(base: &Value, more: &Value) -> Value {
    let mut all = base.clone();
    for (key, value) in more.as_object().into_iter().flatten() {
        all[key] = value.clone();
    }
    all
}

/// Plain decoding and speculation far beyond the window, and another text than without one.
#[test]
fn a_windowed_model_runs_past_its_window_and_a_long_prompt_is_told_what_to_set() {
    let place = Place::new();
    let text = |more: &[&str]| {
        let args = [
            &["--prompt-ids", "1,2,3,1,2", "--ignore-eos"],
            &["--set", "run.max_new_tokens=120"][..],
            more,
        ];
        place.json(&generate("m", &args.concat()))["ids"].clone()
    };
    place.talking("m", |_| {});
    let whole = text(&[]);
    place.talking("m", |[c, ..]| {
        *c = merged(c, &json!({"model_type": "mistral", "sliding_window": 32}))
    });
    let plain = text(&[]);
    assert_eq!(plain, text(&["--draft", "ngram"]));
    assert_ne!(plain, whole, "the window is looked through");
    place.talking("m", |_| {});
    let long = vec!["1"; 40].join(",");
    let message = place.refused(&generate(
        "m",
        &["--prompt-ids", &long, "--set", "target.context=40"],
    ));
    for word in [
        "40 tokens",
        "context of 40",
        "target.context=N, at most 256",
    ] {
        assert!(message.contains(word), "no `{word}` in: {message}");
    }
}

#[test]
fn gguf_files_are_read_as_llama_cpp_reads_them() {
    let place = Place::new();
    let tiny = Tiny::default();
    let answer = |name: &str, more: &[(&str, Meta)]| {
        let path = place.path(name);
        write_gguf_with(&tiny, path.as_ref(), GgmlDType::F32, more);
        ids(&place.json(&generate(
            &path,
            &["--prompt-ids", "1,2,3,4,5,6", "--ignore-eos"],
        ))["ids"])
    };
    let linear = ("llama.rope.scaling.type", Meta::String("linear".into()));
    let plain = answer("plain.gguf", &[]);
    let typed = answer(
        "typed.gguf",
        &[
            linear.clone(),
            ("llama.rope.scaling.factor", Meta::F32(4.0)),
        ],
    );
    assert_ne!(plain, typed);
    assert_eq!(
        answer(
            "factor.gguf",
            &[("llama.rope.scaling.factor", Meta::F32(4.0))]
        ),
        typed
    );
    assert_eq!(
        answer("old.gguf", &[("llama.rope.scale_linear", Meta::F32(4.0))]),
        typed
    );
    let neutral = [
        ("llama.expert_count", Meta::U32(0)),
        ("llama.rope.dimension_count", Meta::U32(16)),
        ("llama.vocab_size", Meta::U32(97)),
        ("llama.attention.causal", Meta::Bool(true)),
        ("general.favourite", Meta::String("x".into())),
    ];
    assert_eq!(answer("neutral.gguf", &neutral), plain);
    let split = write_split_gguf(&tiny, place.dir.path(), GgmlDType::F32);
    let split = split.to_string_lossy();
    let found = place.json(&generate(
        &split,
        &["--prompt-ids", "1,2,3,4,5,6", "--ignore-eos"],
    ));
    assert_eq!(ids(&found["ids"]), plain);

    let refused = |more: &[(&str, Meta)]| {
        write_gguf_with(&tiny, place.path("r.gguf").as_ref(), GgmlDType::F32, more);
        place.refused(&generate("r.gguf", &["--prompt-ids", "1"]))
    };
    for (key, value) in [
        ("llama.rope.scaling.factor", Meta::F32(0.0)),
        ("llama.rope.scaling.factor", Meta::F32(f32::NAN)),
        ("llama.rope.scale_linear", Meta::F32(-1.0)),
        ("llama.rope.scaling.factor", Meta::String("4".into())),
        ("llama.rope.dimension_count", Meta::U32(8)),
        ("llama.rope.freq_base", Meta::F32(0.0)),
        ("llama.attention.value_length", Meta::U32(8)),
        ("llama.attention.causal", Meta::Bool(false)),
        ("llama.attention.head_count_kv", Meta::String("2".into())),
        ("llama.expert_count", Meta::U32(8)),
        ("llama.attn_logit_softcapping", Meta::F32(50.0)),
        ("llama.vocab_size", Meta::U32(98)),
        ("general.alignment", Meta::U32(0)),
        ("general.alignment", Meta::U32(24)),
        ("general.type", Meta::String("adapter".into())),
        ("split.count", Meta::U16(3)),
    ] {
        let message = refused(&[(key, value)]);
        assert!(
            message.contains(key) && message.contains("r.gguf"),
            "{key}: {message}"
        );
    }
    let rope = |kind: &str| refused(&[("llama.rope.scaling.type", Meta::String(kind.into()))]);
    assert!(rope("yarn").contains("llama.rope.scaling.factor"));
    assert!(rope("longrope").contains("longrope"));
    std::fs::remove_file(place.path("model-00002-of-00002.gguf")).expect("remove");
    let message = place.refused(&generate(&split, &["--prompt-ids", "1"]));
    assert!(
        message.contains("one of 2 files") && message.contains("00002-of-00002"),
        "{message}"
    );
    let bytes = std::fs::read(place.path("plain.gguf")).expect("read");
    for (change, word) in [
        (&|b: &mut Vec<u8>| b[4..8].reverse() as _, "big-endian"),
        (&|b: &mut Vec<u8>| b[0] = b'X', "begins with"),
        (&|b: &mut Vec<u8>| b[4] = 9, "version 9"),
        (&|b: &mut Vec<u8>| b.truncate(3000), "truncated"),
    ] as [(&dyn Fn(&mut Vec<u8>), &str); 4]
    {
        let mut other = bytes.clone();
        change(&mut other);
        std::fs::write(place.path("r.gguf"), other).expect("write");
        let message = place.refused(&generate("r.gguf", &["--prompt-ids", "1"]));
        assert!(message.contains(word), "{word}: {message}");
    }
}

#[test]
fn values_of_the_command_line_pass_through_as_they_are() {
    let place = Place::new();
    for name in ["it's", "a \"b\"", "e\u{301}", "a#b=c"] {
        place.talking(name, |_| {});
        place.json(&generate(
            name,
            &["--prompt", "x", "--seed", "18446744073709551615"],
        ));
    }
    let message = place.refused(&generate("a \"b\"", &["--prompt", "x", "--rule", "a\"b"]));
    assert!(message.contains("unknown rule `a\"b`"), "{message}");
}

#[test]
fn a_prompt_file_is_its_text_without_mark_and_last_line_end() {
    let place = Place::new();
    place.talking("m", |_| {});
    for (bytes, text) in [
        (&b"\xEF\xBB\xBFHi\r\n"[..], "Hi"),
        (b"Hi\n\n", "Hi\n"),
        (b"Hi", "Hi"),
    ] {
        std::fs::write(place.path("p.txt"), bytes).expect("write");
        let found = prompt_ids(&place, "m", &["--raw", "--prompt-file", "p.txt"]);
        assert_eq!(found, letters(text));
    }
    std::fs::write(place.path("p.txt"), b"\xFF\xFEH\0").expect("write");
    assert!(
        place
            .refused(&generate("m", &["--prompt-file", "p.txt"]))
            .contains("UTF-16")
    );
}

#[test]
fn rules_that_do_not_sample_are_refused_without_a_draft_too() {
    let place = Place::new();
    place.talking("m", |_| {});
    for draft in ["plain", "ngram"] {
        let args = [
            "--prompt",
            "x",
            "--rule",
            "greedy",
            "--temperature",
            "0.8",
            "--draft",
            draft,
        ];
        let message = place.refused(&generate("m", &args));
        assert!(
            message.contains("`greedy`") && message.contains("0.8") && message.contains("lossy"),
            "{message}"
        );
    }
}

/// A prompt set over the talking model.
fn prompts(place: &Place, rows: &[Value]) -> Vec<&'static str> {
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    std::fs::write(place.path("set.jsonl"), lines.join("\n")).expect("write");
    vec![
        "bench",
        "--threads",
        "1",
        "--set",
        "target.model=m",
        "--set",
        "prompts.set=set.jsonl",
        "--set",
        "prompts.part=all",
        "--set",
        "prompts.per_task=0",
        "--set",
        "run.ignore_eos=true",
        "--set",
        "run.output=out",
        "--set",
        "compare=[{draft={name=\"ngram\"}}]",
    ]
}

#[test]
fn prompts_that_cannot_be_decoded_are_counted_and_the_rest_is_run() {
    let place = Place::new();
    place.talking("m", |_| {});
    let long = "x".repeat(300);
    let mut args = prompts(
        &place,
        &[
            json!({"id": "a", "prompt": "hello"}),
            json!({"id": "long", "prompt": long}),
            json!({"id": "later", "turns": ["hello", long]}),
            json!({"id": "b", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}),
        ],
    );
    for batch in ["1", "3"] {
        let batch = format!("run.batch={batch}");
        let more = [
            "--json",
            "--set",
            "run.repeats=2",
            "--set",
            "run.max_new_tokens=8",
            "--set",
            &batch,
        ];
        let out = place.run(&[&args[..], &more].concat());
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{said}");
        let found: Value = serde_json::from_slice(&out.stdout).expect("JSON");
        let skipped: Vec<(&str, u64)> = (found["skipped"].as_array().expect("list").iter())
            .map(|s| {
                (
                    s["prompt"].as_str().expect("id"),
                    s["turn"].as_u64().expect("turn"),
                )
            })
            .collect();
        assert_eq!(skipped, [("long", 0), ("later", 1)]);
        assert!(
            said.contains("`long`") && said.contains("`later`, turn 2"),
            "{said}"
        );
        for row in found["rows"].as_array().expect("rows") {
            assert_eq!((&row["prompts"], &row["tokens"]), (&json!(3), &json!(24)));
        }
    }
    args = prompts(&place, &[json!({"id": "long", "prompt": long})]);
    let message = place.refused(&[&args[..], &["--json"]].concat());
    assert!(
        message.contains("none of the 1 prompts") && message.contains("`long`"),
        "{message}"
    );
    // What is misread is worse than what is not read.
    std::fs::write(
        place.path("set.jsonl"),
        "{\"id\": 1, \"prompt\": \"x\"}\n{\"text\": \"x\"}\n",
    )
    .expect("write");
    assert!(
        place
            .refused(&args)
            .contains("line 2: needs a prompt: expected `turns`")
    );
}

#[test]
fn a_bench_compares_with_the_targets_own_law_whatever_a_drafts_rule() {
    let place = Place::new();
    place.talking("m", |_| {});
    let args = prompts(&place, &[json!({"id": "a", "prompt": "hello"})]);
    let more = [
        "--json",
        "--set",
        "run.repeats=1",
        "--set",
        "run.max_new_tokens=8",
        "--set",
        "sampling.temperature=0.8",
        "--set",
        "verifier.name=typical",
        "--set",
        "verifier.lossy=true",
    ];
    let found = place.json(&[&args[..], &more].concat());
    assert_eq!(
        (&found["rows"][0]["draft"], &found["rows"][0]["rule"]),
        (&json!("plain"), &json!("chain"))
    );
    assert_eq!(found["rows"][1]["rule"], "typical");
    // A decoder that is not exact is refused before the others have run.
    let more = [
        "--json",
        "--set",
        "sampling.temperature=0.8",
        "--set",
        "verifier.name=greedy",
    ];
    assert!(
        place
            .refused(&[&args[..], &more].concat())
            .contains("`greedy`")
    );
}

#[cfg(target_os = "linux")]
#[test]
fn a_run_that_is_told_to_end_keeps_what_it_has_measured() {
    let place = Place::new();
    place.talking("m", |_| {});
    let rows: Vec<Value> = (0..40)
        .map(|i| json!({"id": i, "prompt": format!("hello {i}")}))
        .collect();
    let args = prompts(&place, &rows);
    for signal in ["-TERM", "-INT", "-HUP"] {
        let more = ["--set", "run.repeats=30", "--set", "run.max_new_tokens=150"];
        let mut child = place
            .command(&[&args[..], &more].concat())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("starts");
        // Its first line says that a tenth is done.
        let mut lines = BufReader::new(child.stderr.take().expect("pipe")).lines();
        let first = lines.next().expect("a line").expect("UTF-8");
        assert!(first.starts_with("decoding"), "{first}");
        let sent = Command::new("kill")
            .args([signal, &child.id().to_string()])
            .status();
        assert!(sent.expect("kill").success());
        let status = child.wait().expect("ends");
        assert_eq!(status.code(), Some(130), "{signal}");
        let mut text = String::new();
        child
            .stdout
            .take()
            .expect("pipe")
            .read_to_string(&mut text)
            .expect("UTF-8");
        assert!(text.contains("tokens/s"), "{signal}: {text}");
        for file in ["summary.json", "cycles.jsonl", "experiment.toml"] {
            let path = place.dir.path().join("out").join(file);
            assert!(
                std::fs::metadata(&path).is_ok_and(|m| m.len() > 0),
                "{signal}: {file}"
            );
        }
        std::fs::remove_dir_all(place.path("out")).expect("remove");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_summary_that_cannot_be_written_is_printed_all_the_same() {
    let place = Place::new();
    place.talking("m", |_| {});
    let rows: Vec<Value> = (0..20)
        .map(|i| json!({"id": i, "prompt": format!("hello {i}")}))
        .collect();
    let args = prompts(&place, &rows);
    let more = [
        "--json",
        "--set",
        "run.repeats=1",
        "--set",
        "run.max_new_tokens=50",
    ];
    // Files may not grow beyond 8 KiB, and the signal that says so is ignored.
    let out = Command::new("bash")
        .args([
            "-c",
            "ulimit -f 8; trap '' XFSZ; exec \"$0\" \"$@\"",
            env!("CARGO_BIN_EXE_scylla"),
        ])
        .args([&args[..], &more].concat())
        .current_dir(place.dir.path())
        .output()
        .expect("starts");
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(
        said.contains("cycles.jsonl") && said.contains("not kept"),
        "{said}"
    );
    let found: Value = serde_json::from_slice(&out.stdout).expect("the summary");
    assert_eq!(found["rows"][0]["prompts"], 20);
    // The smaller files are there.
    assert!(place.dir.path().join("out/experiment.toml").is_file());
    assert!(!place.dir.path().join("out/cycles.jsonl").exists());
}

#[cfg(unix)]
#[test]
fn a_reader_that_leaves_ends_the_program_quietly() {
    let place = Place::new();
    place.talking("m", |_| {});
    let args = [
        "generate",
        "--target",
        "m",
        "--prompt",
        "Hi",
        "--max-new-tokens",
        "200",
        "--ignore-eos",
    ];
    // It has left before the first word.
    let (reader, writer) = std::io::pipe().expect("pipe");
    drop(reader);
    let out = place
        .command(&args)
        .stdout(writer)
        .output()
        .expect("starts");
    assert!(
        out.status.success() && out.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    for args in [&args[..], &["prove", "--help"], &["inspect", "model", "m"]] {
        let full = std::fs::OpenOptions::new()
            .write(true)
            .open("/dev/full")
            .expect("/dev/full");
        let out = place.command(args).stdout(full).output().expect("starts");
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!said.contains("panicked"), "{args:?}: {said}");
        if args[1] != "--help" {
            assert_eq!(out.status.code(), Some(1), "{args:?}: {said}");
            assert!(said.contains("No space left"), "{said}");
        }
        // Nobody to tell is no reason to panic either.
        let full = std::fs::OpenOptions::new()
            .write(true)
            .open("/dev/full")
            .expect("/dev/full");
        let status = place
            .command(args)
            .stderr(full)
            .stdout(Stdio::null())
            .status()
            .expect("starts");
        assert!(
            status.code().is_some_and(|code| code < 100),
            "{args:?}: {status}"
        );
    }
}

#[cfg(unix)]
#[test]
fn files_get_the_permissions_of_the_umask() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new();
    place.talking("m", |_| {});
    let args = prompts(&place, &[json!({"id": "a", "prompt": "hello"})]);
    for (umask, mode) in [("022", 0o644), ("077", 0o600), ("002", 0o664)] {
        let status = Command::new("sh")
            .args([
                "-c",
                &format!("umask {umask}; exec \"$0\" \"$@\""),
                env!("CARGO_BIN_EXE_scylla"),
            ])
            .args(
                [
                    &args[..],
                    &["--set", "run.repeats=1", "--set", "run.max_new_tokens=2"],
                ]
                .concat(),
            )
            .current_dir(place.dir.path())
            .env("SCYLLA_CACHE", place.path("cache"))
            .output()
            .expect("starts");
        assert!(status.status.success());
        for file in ["summary.json", "cycles.jsonl", "experiment.toml"] {
            let found = std::fs::metadata(place.dir.path().join("out").join(file)).expect("there");
            assert_eq!(
                found.permissions().mode() & 0o777,
                mode,
                "{file} under {umask}"
            );
        }
        std::fs::remove_dir_all(place.path("out")).expect("remove");
    }
}

#[cfg(unix)]
#[test]
fn an_output_may_be_a_link_or_a_pipe() {
    let place = Place::new();
    place.talking("m", |_| {});
    std::fs::write(place.path("text"), "hello").expect("write");
    let args = |output: &'static str| {
        [
            "inspect",
            "frequencies",
            "--model",
            "m",
            "--text",
            "text",
            "--output",
            output,
        ]
    };
    std::os::unix::fs::symlink("real", place.path("link")).expect("link");
    assert!(place.run(&args("link")).status.success());
    assert!(
        std::fs::symlink_metadata(place.path("link"))
            .expect("there")
            .is_symlink()
    );
    let real = std::fs::read_to_string(place.path("real")).expect("written");
    // Its standard output is a pipe here.
    let out = place.run(&args("/dev/stdout"));
    assert_eq!(String::from_utf8_lossy(&out.stdout), real);
    let fifo = place.path("fifo");
    assert!(
        Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .expect("mkfifo")
            .success()
    );
    let mut child = place
        .command(&args("fifo"))
        .stderr(Stdio::null())
        .spawn()
        .expect("starts");
    let lines = BufReader::new(std::fs::File::open(&fifo).expect("opens")).lines();
    assert_eq!(lines.map_while(Result::ok).count(), real.lines().count());
    assert!(child.wait().expect("ends").success());
}

#[test]
fn the_hash_of_a_model_is_of_what_is_loaded_and_is_remembered_until_a_file_changes() {
    let place = Place::new();
    let hash = || {
        place.json(&["inspect", "model", "model", "--json"])["sha256"]
            .as_str()
            .expect("hash")
            .to_string()
    };
    // Not of just now, so that it may be remembered.
    let age = |file: &str| {
        let file = std::fs::File::options()
            .append(true)
            .open(place.path(file))
            .expect("opens");
        let then = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
        file.set_modified(then).expect("set");
    };
    let first = hash();
    // A file that nothing refers to, so large that it would be seen to be read.
    let foreign =
        std::fs::File::create(place.path("model/consolidated.safetensors")).expect("create");
    foreign.set_len(1 << 36).expect("sparse");
    assert_eq!(hash(), first);
    ["model/config.json", "model/model.safetensors"]
        .iter()
        .for_each(|file| age(file));
    assert_eq!(hash(), first);
    let remembered: Vec<_> = std::fs::read_dir(place.path("cache/hashes"))
        .expect("there")
        .flatten()
        .collect();
    assert_eq!(remembered.len(), 1);
    // It is used: another answer there is given back.
    let path = remembered[0].path();
    let text = std::fs::read_to_string(&path).expect("read");
    std::fs::write(&path, text.replace(&first, "made-up")).expect("write");
    assert_eq!(hash(), "made-up");
    // And no more when a file has changed, if only in its time.
    let mut bytes = std::fs::read(place.path("model/model.safetensors")).expect("read");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(place.path("model/model.safetensors"), bytes).expect("write");
    age("model/model.safetensors");
    let changed = hash();
    assert!(changed != first && changed != "made-up");
    // What is broken there is no obstacle.
    std::fs::write(&path, "{").expect("write");
    assert_eq!(hash(), changed);
    // A start that shows no hash leaves none.
    std::fs::remove_dir_all(place.path("cache")).expect("remove");
    place.json(&generate("model", &["--prompt-ids", "1"]));
    assert!(!place.dir.path().join("cache").exists());
}

#[test]
fn tokenizers_of_target_and_draft_are_compared_wherever_they_may_differ() {
    let place = Place::new();
    place.talking("m", |_| {});
    place.talking("same", |_| {});
    let args = |draft: &'static str| {
        generate(
            "m",
            &["--prompt-ids", "1,2", "--ignore-eos", "--draft", draft],
        )
    };
    let said = |draft: &'static str| {
        let out = place.run(&args(draft));
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
        String::from_utf8_lossy(&out.stderr).into_owned()
    };
    assert!(!said("draft-lm:same").contains("warning"));
    place.talking("special", |[_, tokenizer, config]| {
        tokenizer["added_tokens"][2]["content"] = json!("<|eot|>");
        config["chat_template"] = json!(CHATML.replace("im_end", "eot"));
        config["eos_token"] = json!("<|eot|>");
    });
    let message = place.refused(&args("draft-lm:special"));
    for word in [
        "another tokenizer",
        "<|eot|>",
        "<|im_end|>",
        &IM_END.to_string(),
    ] {
        assert!(message.contains(word), "no `{word}` in: {message}");
    }
    place.talking("ordinary", |[_, tokenizer, _]| {
        tokenizer["added_tokens"][0]["special"] = json!(false)
    });
    assert!(
        place
            .refused(&args("draft-lm:ordinary"))
            .contains("<|end|>")
    );
    place.talking("without", |_| {});
    std::fs::remove_file(place.path("without/tokenizer.json")).expect("remove");
    let message = said("draft-lm:without");
    assert!(
        message.contains("warning") && message.contains("draft model has no tokenizer"),
        "{message}"
    );
}

#[test]
fn device_weights_are_held_as_asked() {
    use std::sync::Arc;

    use scylla_core::model::{LoadOptions, ModelFiles, OnDevice, WeightForm, load_on};
    let dir = tempfile::tempdir().expect("dir");
    write_hf(&Tiny::default(), dir.path(), Dtype::BF16, 1);
    let files = ModelFiles::open(dir.path()).expect("opens");
    let load = |weights| {
        let options = LoadOptions {
            weights,
            ..LoadOptions::default()
        };
        let device = OnDevice::new(options.device.clone());
        load_on(&files, &options, Arc::new(device)).map(|loaded| loaded.forms)
    };
    // Beside blocks the embedding's values are held, whose rows are looked up.
    for (form, held) in [
        (WeightForm::AsIs, &["bf16"][..]),
        (WeightForm::F32, &["f32"]),
        (WeightForm::Bf16, &["bf16"]),
        (WeightForm::Q8_0, &["q8_0", "f32"]),
        (WeightForm::Q4, &["q4_1", "f32"]),
    ] {
        assert_eq!(load(form).expect("loads"), held);
    }
}
