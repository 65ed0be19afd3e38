//! The default model: its tokenizer and greedy text against llama.cpp, and losslessness on real prompts.
//!
//! `fixtures/make_llamacpp_fixtures.py` makes the reference files.

use std::path::Path;

use candle_core::{Device, Tensor};
use multilevel_ot::bytes::{groups, token_offsets};
use multilevel_ot::{MultiLevelOt, Projection};
use scylla_core::engine::{Output, Request};
use scylla_core::model::{LoadOptions, ModelFiles, WeightForm, load};
use scylla_core::plugin::{DraftModel, SlotRows, Step, TargetModel, Want};
use scylla_core::text::{Message, Tokenizer};
use scylla_core::train::AnswerLogits;
use scylla_core::tree::Budget;
use scylla_draft::Ngram;
use scylla_tests::answers::{Answers, gradient};
use scylla_tests::{decode_prompts, default_model, whole, write_sentencepiece_gguf};
use serde::Deserialize;

#[derive(Deserialize)]
struct Texts {
    cases: Vec<TextCase>,
}

#[derive(Deserialize)]
struct TextCase {
    text: String,
    ids: Vec<u32>,
}

#[derive(Deserialize)]
struct Continuations {
    cases: Vec<Continuation>,
}

#[derive(Deserialize)]
struct Continuation {
    prompt: String,
    prompt_ids: Vec<u32>,
    ids: Vec<u32>,
    margins: Vec<f64>,
}

fn fixture<T: for<'a> Deserialize<'a>>(name: &str) -> T {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(name);
    let text = std::fs::read_to_string(&path).expect("fixture");
    serde_json::from_str(&text).expect("fixture")
}

fn tokenizer(path: &Path) -> Tokenizer {
    Tokenizer::of_model(&ModelFiles::open(path).expect("opens"))
        .expect("reads")
        .expect("has one")
}

fn target(path: &Path, weights: WeightForm) -> Box<dyn TargetModel> {
    let options = LoadOptions {
        weights,
        context: 2048,
        ..LoadOptions::default()
    };
    load(&ModelFiles::open(path).expect("opens"), &options)
        .expect("loads")
        .model
}

#[test]
fn tokenisation_equals_llama_cpp() {
    let Some(path) = default_model("tokenisation_equals_llama_cpp") else {
        return;
    };
    let tokenizer = tokenizer(&path);
    let texts: Texts = fixture("smollm2_tokenization.json");
    assert!(texts.cases.len() >= 150);
    for case in &texts.cases {
        assert_eq!(
            tokenizer.encode(&case.text).expect("encodes"),
            case.ids,
            "{:?}",
            case.text
        );
    }
}

#[test]
fn text_grows_in_whole_characters_and_equals_the_whole() {
    let Some(path) = default_model("text_grows_in_whole_characters") else {
        return;
    };
    let tokenizer = tokenizer(&path);
    let texts: Texts = fixture("smollm2_tokenization.json");
    for case in &texts.cases {
        let mut stream = tokenizer.stream();
        let mut grown = String::new();
        for &id in &case.ids {
            stream.push(id, &mut grown);
            assert!(
                !grown.ends_with('\u{FFFD}') || case.text.contains('\u{FFFD}'),
                "{:?}",
                case.text
            );
        }
        assert_eq!(grown, tokenizer.decode(&case.ids));
        // Special tokens have no text, and this vocabulary lacks a few control characters.
        let plain = !case.text.contains("<|")
            && !case
                .text
                .chars()
                .any(|c| c.is_control() && !"\n\r\t".contains(c));
        if plain
            && !case
                .ids
                .iter()
                .any(|&id| tokenizer.token_bytes(id).is_none())
        {
            assert_eq!(grown, case.text);
        }
    }
}

#[test]
fn the_chat_template_gives_the_models_own_form() {
    let Some(path) = default_model("the_chat_template") else {
        return;
    };
    let tokenizer = tokenizer(&path);
    let message = Message {
        role: "user",
        content: "Hi".into(),
    };
    let text = tokenizer
        .template()
        .expect("template")
        .render(&[message])
        .expect("renders");
    assert_eq!(
        text,
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
    let ids = tokenizer.encode(&text).expect("encodes");
    assert_eq!((ids[0], tokenizer.eos()), (1, &[2][..]));
}

/// Compares greedy text with a reference; where it first differs, the reference's margin must be below what
/// `allowed` says for that prefix. Returns the number of continuations that are equal to the end.
fn check_greedy(
    fixture_name: &str,
    form: WeightForm,
    allowed: &mut dyn FnMut(&[u32]) -> f64,
) -> Option<usize> {
    let path = default_model(fixture_name)?;
    let tokenizer = tokenizer(&path);
    let mut model = target(&path, form);
    let reference: Continuations = fixture(fixture_name);
    let mut whole = 0;
    for case in &reference.cases {
        assert_eq!(
            tokenizer.encode(&case.prompt).expect("encodes"),
            case.prompt_ids
        );
        let settings = Request {
            max_new_tokens: case.ids.len(),
            eos: vec![2],
            ..Request::default()
        };
        let found = run(model.as_mut(), None, &case.prompt_ids, &settings).ids;
        let same = found
            .iter()
            .zip(&case.ids)
            .take_while(|(a, b)| a == b)
            .count();
        if same == case.ids.len() {
            whole += 1;
            continue;
        }
        let prefix = [&case.prompt_ids[..], &case.ids[..same]].concat();
        let (margin, allowed) = (case.margins[same], allowed(&prefix));
        println!(
            "differs at token {same} of {}, margin {margin:.3} (allowed {allowed:.3})",
            case.ids.len()
        );
        assert!(
            margin < allowed,
            "margin {margin} at token {same} of {:?}",
            case.prompt
        );
    }
    println!(
        "{whole} of {} continuations are equal to the end",
        reference.cases.len()
    );
    Some(whole)
}

/// With f32 weights both engines only sum in another order: the text is that of llama.cpp on the widened file.
#[test]
fn greedy_text_of_f32_weights_is_that_of_llama_cpp() {
    let whole = check_greedy(
        "smollm2_greedy_llamacpp_f32.json",
        WeightForm::F32,
        &mut |_| 0.01,
    );
    assert!(whole.is_none_or(|whole| whole >= 8));
}

/// As the file stores them, both engines round activations to 8 bits, each in its own order. A difference is a near
/// tie where the margin is below twice the deviation that this rounding causes on the same prefix.
#[test]
fn greedy_text_of_the_quantised_file_agrees_with_llama_cpp_up_to_near_ties() {
    let Some(path) = default_model("greedy_text_of_the_quantised_file") else {
        return;
    };
    let mut models = [
        target(&path, WeightForm::AsIs),
        target(&path, WeightForm::F32),
    ];
    let mut allowed = |prefix: &[u32]| {
        let [as_is, wide] = models.each_mut().map(|model| {
            model.open(0).expect("open");
            let rows = SlotRows {
                slot: 0,
                tokens: prefix,
                parents: &[],
                want: Want::Last,
            };
            let found = model
                .forward(&Step {
                    slots: vec![rows],
                    taps: &[],
                })
                .expect("forward");
            model.close(0);
            found.logits[0].row(0).expect("row").into_owned()
        });
        2.0 * f64::from(scylla_tests::deviation(&as_is, &wide))
    };
    check_greedy(
        "smollm2_greedy_llamacpp.json",
        WeightForm::AsIs,
        &mut allowed,
    );
}

fn run(
    target: &mut dyn TargetModel,
    draft: Option<&mut dyn DraftModel>,
    prompt: &[u32],
    like: &Request,
) -> Output {
    let like = Request {
        budget: Budget {
            total: 12,
            width: 2,
            depth: 6,
        },
        ..like.clone()
    };
    whole(decode_prompts(target, draft, &like, &[prompt.to_vec()], 1)).remove(0)
}

const PROMPTS: [&str; 4] = [
    "Repeat this list and then sort it: apple, pear, apple, fig, plum, pear, fig, apple.",
    "Fix the bug:\ndef add(a, b):\n    return a - b\n\ndef sub(a, b):\n    return a - b\n",
    "Summarise: The river floods each spring. When the river floods, the fields are covered with mud. The mud makes the fields fertile.",
    "Translate to French: Good morning, how are you? Good evening, how are you?",
];

/// Exact equality holds in every form, as a row's result does not depend on the rows beside it.
#[test]
fn greedy_speculation_equals_plain_decoding_on_real_text() {
    let Some(path) = default_model("greedy_speculation_equals_plain_decoding") else {
        return;
    };
    let tokenizer = tokenizer(&path);
    for form in [
        WeightForm::F32,
        WeightForm::Bf16,
        WeightForm::AsIs,
        WeightForm::Q8_0,
        WeightForm::Q4,
    ] {
        let mut model = target(&path, form);
        let mut accepted = 0;
        for text in PROMPTS {
            let message = Message {
                role: "user",
                content: text.into(),
            };
            let prompt = tokenizer
                .template()
                .expect("template")
                .render(&[message])
                .expect("renders");
            let prompt = tokenizer.encode(&prompt).expect("encodes");
            let settings = Request {
                max_new_tokens: 48,
                eos: vec![2],
                ..Request::default()
            };
            let plain = run(model.as_mut(), None, &prompt, &settings);
            let mut ngram = Ngram::new(2, 4).expect("ngram");
            let speculative = run(model.as_mut(), Some(&mut ngram), &prompt, &settings);
            assert_eq!(speculative.ids, plain.ids, "{form} {text:?}");
            accepted += speculative.cycles.iter().map(|c| c.accepted).sum::<usize>();
        }
        assert!(
            accepted > 10,
            "{form}: only {accepted} drafted tokens were accepted, the test shows little"
        );
    }
}

#[test]
fn logits_of_a_tree_are_bit_for_bit_those_of_plain_decoding() {
    let Some(path) = default_model("logits_of_a_tree") else {
        return;
    };
    let mut model = target(&path, WeightForm::AsIs);
    let prompt: Vec<u32> = (0..40).map(|i| 1000 + 37 * i).collect();
    //  root 0 -> 1 -> 3, root 0 -> 2 -> 4
    let (tokens, parents) = (
        [500, 600, 700, 800, 900],
        [None, Some(0), Some(0), Some(1), Some(2)],
    );
    let forward = |model: &mut dyn TargetModel, tokens: &[u32], parents: &[Option<usize>]| {
        let rows = SlotRows {
            slot: 0,
            tokens,
            parents,
            want: Want::All,
        };
        let found = model
            .forward(&Step {
                slots: vec![rows],
                taps: &[],
            })
            .expect("forward");
        found.logits[0].clone()
    };
    model.open(0).expect("open");
    forward(model.as_mut(), &prompt, &[]);
    model
        .commit(0, &(0..40).collect::<Vec<_>>())
        .expect("commit");
    let tree = forward(model.as_mut(), &tokens, &parents);
    for path in [[0usize, 1, 3], [0, 2, 4]] {
        for (depth, &node) in path.iter().enumerate() {
            // One token at a time, as plain decoding does.
            model.close(0);
            model.open(0).expect("open");
            forward(model.as_mut(), &prompt, &[]);
            model
                .commit(0, &(0..40).collect::<Vec<_>>())
                .expect("commit");
            let mut last = None;
            for &n in &path[..=depth] {
                last = Some(forward(model.as_mut(), &[tokens[n]], &[]));
                model.commit(0, &[0]).expect("commit");
            }
            let last = last.expect("a token");
            assert_eq!(
                last.row(0).expect("row"),
                tree.row(node).expect("row"),
                "node {node}"
            );
        }
    }
}

#[test]
fn its_tokenizer_is_written_as_a_folder_that_reads_alike() {
    let Some(path) = default_model("a tokenizer is written") else {
        return;
    };
    let dir = tempfile::tempdir().expect("dir");
    let tokenizer = tokenizer(&path);
    tokenizer.write(dir.path()).expect("written");
    let again = Tokenizer::from_dir(dir.path()).expect("read");
    for text in [
        "It's 1234 \u{e9}t\u{e9}\n\n  fn main() {}",
        "<|im_start|>user",
        "",
    ] {
        assert_eq!(
            again.encode(text).expect("encodes"),
            tokenizer.encode(text).expect("encodes"),
            "{text:?}"
        );
    }
    let talk = [Message::user("Who are you?"), Message::assistant("I.")];
    let said = |of: &Tokenizer| {
        let template = of.template().expect("a template");
        template.render(&talk[..1]).expect("rendered")
    };
    assert_eq!(said(&again), said(&tokenizer));
    let generation = std::fs::read_to_string(dir.path().join("generation_config.json"));
    let generation: serde_json::Value =
        serde_json::from_str(&generation.expect("ends")).expect("JSON");
    assert_eq!(
        generation["eos_token_id"],
        serde_json::json!(tokenizer.eos())
    );
}

/// A small SentencePiece tokenizer.
fn sentencepiece(dir: &Path) -> Tokenizer {
    let path = dir.join("sentencepiece.gguf");
    write_sentencepiece_gguf(&path);
    tokenizer(&path)
}

#[test]
fn answers_of_a_byte_level_and_a_sentencepiece_tokenizer_group_by_bytes() {
    let Some(path) = default_model("answers group by bytes") else {
        return;
    };
    let dir = tempfile::tempdir().expect("dir");
    let (byte_level, pieces) = (tokenizer(&path), sentencepiece(dir.path()));
    // Characters that both split, one that only one side splits, and what neither knows.
    for text in [
        "the cat and the caterer",
        "th\u{e9} \u{1F600}\u{1F642} in\n  \u{4e2d}",
        "a",
    ] {
        let mut own = byte_level.encode_plain(text).expect("encodes");
        own.push(byte_level.eos()[0]);
        // With the BOS that its file asks for, and the space that SentencePiece puts first.
        let mut other = pieces.encode(text).expect("encodes");
        assert!(pieces.token_bytes(other[0]).is_none());
        other.push(2);
        let (s, t) = token_offsets((&byte_level, &own), (&pieces, &other)).expect("one answer");
        let lengths = |o: &[(usize, usize)]| o.iter().map(|(a, b)| b - a).collect::<Vec<_>>();
        let found = groups(&lengths(&s), &lengths(&t)).expect("one text");
        let covered = |o: &[(usize, usize)]| (o[0].0, o[o.len() - 1].1);
        for group in &found {
            assert_eq!(
                covered(&s[group.student.clone()]),
                covered(&t[group.teacher.clone()])
            );
        }
        assert_eq!(covered(&s), (0, text.len()));
        let ends = found.last().expect("a group");
        assert_eq!((ends.student.len(), ends.teacher.len()), (1, 1), "{text:?}");
        assert!(found.len() > 1);
    }
    let (own, other) = (
        byte_level.encode_plain("cat").expect("encodes"),
        pieces.encode("cats").expect("encodes"),
    );
    assert!(token_offsets((&byte_level, &own), (&pieces, &other)).is_err());
}

#[test]
fn a_projection_between_real_tokenizers_sums_to_one() {
    let Some(path) = default_model("a projection between tokenizers") else {
        return;
    };
    let dir = tempfile::tempdir().expect("dir");
    let (byte_level, pieces) = (tokenizer(&path), sentencepiece(dir.path()));
    let map = Projection::between(&byte_level, &pieces).expect("a projection");
    assert_eq!(map.len(), byte_level.size());
    let spelled = |t: &Tokenizer, id: u32| t.token_bytes(id).unwrap_or_default().to_vec();
    let mut exact = 0;
    for id in 0..byte_level.size() as u32 {
        let entries = map.get(id as usize);
        if entries.is_empty() {
            assert!(byte_level.token_bytes(id).is_none(), "{id}");
            continue;
        }
        let sum: f32 = entries.iter().map(|(_, w)| w).sum();
        assert!(
            (sum - 1.0).abs() < 1e-5 && entries.len() <= 4,
            "{id}: {entries:?}"
        );
        let first = spelled(&pieces, entries[0].0);
        if first == spelled(&byte_level, id) {
            assert_eq!(entries, [(entries[0].0, 1.0)]);
            exact += 1;
        }
    }
    // The bytes that are tokens here, and words that both have.
    assert!(exact >= 200, "{exact}");
    let the = byte_level.encode_plain(" the").expect("encodes");
    assert_eq!(spelled(&pieces, map.get(the[0] as usize)[0].0), b" the");
}

/// Logits of the default model over an answer, after a prompt.
fn answer_logits(path: &Path, prompt: &str, answer: &str) -> AnswerLogits {
    let tokenizer = tokenizer(path);
    let mut tokens = tokenizer.encode(prompt).expect("encodes");
    let before = tokens.len();
    tokens.extend(tokenizer.encode_plain(answer).expect("encodes"));
    let mut model = target(path, WeightForm::AsIs);
    model.open(0).expect("opens");
    let step = Step {
        slots: vec![SlotRows {
            slot: 0,
            tokens: &tokens,
            parents: &[],
            want: Want::All,
        }],
        taps: &[],
    };
    let forward = model.forward(&step).expect("forward");
    let (rows, vocab) = (tokens.len(), forward.logits[0].columns);
    let logits = forward.logits[0].all().expect("logits").into_owned();
    let label = |(i, &t): (usize, &u32)| if i < before { -100 } else { i64::from(t) };
    let labels: Vec<i64> = tokens.iter().enumerate().map(label).collect();
    AnswerLogits {
        logits: Tensor::from_vec(logits, (1, rows, vocab), &Device::Cpu).expect("logits"),
        labels: Tensor::from_vec(labels, (1, rows), &Device::Cpu).expect("labels"),
        vocab,
        tokens: None,
        offsets: None,
        hidden: None,
    }
}

#[test]
fn on_real_logits_too_the_released_code_is_hardly_more_than_cross_entropy_and_had() {
    let Some(path) = default_model("gradients on real logits") else {
        return;
    };
    let answer = "Paris has been the capital of France since the tenth century, with short interruptions, \
        and lies on the river Seine in the north of the country.";
    // The teacher is told what it is about, the student is not.
    let prompt = "Question: Which city is the capital of France, since when, and where does it lie?\nAnswer: ";
    let answers = Answers::new(
        answer_logits(&path, prompt, answer),
        answer_logits(&path, "\n", answer),
    );
    let mut shares = Vec::new();
    for (name, aligner) in [
        ("paper", MultiLevelOt::paper()),
        ("released code", MultiLevelOt::reference_code()),
    ] {
        let loss = answers.loss(&aligner);
        let norm = |g: Vec<f64>| g.iter().map(|g| g * g).sum::<f64>().sqrt();
        let of = |p: &scylla_core::train::Part| {
            (p.name, p.weight * norm(gradient(&p.value, &answers.logits)))
        };
        let norms: Vec<(&str, f64)> = loss.parts.iter().map(of).collect();
        println!("weighted gradients on real logits, {name}: {norms:?}");
        let [_, had, sl, sd] = [0, 1, 2, 3].map(|i| norms[i].1);
        shares.push((sl / had, sd / had));
    }
    let [(sl, sd), (released_sl, released_sd)] = shares[..] else {
        panic!("two modes");
    };
    assert!(sl > 1e-2 && sd > 1e-3, "{shares:?}");
    assert!(released_sl < 1e-2 && released_sd < 1e-2, "{shares:?}");
}
