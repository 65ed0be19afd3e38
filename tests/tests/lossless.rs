//! Speculative decoding gives what plain decoding gives, for random models, prompts, trees and batches.

use std::ops::ControlFlow;

use proptest::prelude::*;
use safetensors::Dtype;
use scylla_core::Result;
use scylla_core::chance::Seeded;
use scylla_core::engine::{
    Engine, Event, Finish, Options, Output, Parts, Request as Asked, decode,
};
use scylla_core::model::{LoadOptions, ModelFiles, WeightForm, load_on};
use scylla_core::plugin::{
    Chance, Committed, DraftModel, Request, SlotRows, Step, TargetModel, Verifier, Want,
};
use scylla_core::sampling::Sampling;
use scylla_core::tree::{Budget, Drawing, Tree};
use scylla_draft::Ngram;
use scylla_tests::{
    NEAR_TIE, Tiny, decode_prompts, deviation, on_device, parting, refusal, whole, write_hf,
};
use scylla_verify::{Chain, Greedy};

/// Where a model runs: the kernels on so many threads, or candle's tensors on a device.
#[derive(Debug, Clone, Copy)]
enum Place {
    Kernels(usize),
    Device,
}

fn model(tiny: &Tiny, weights: WeightForm, place: Place) -> Box<dyn TargetModel> {
    let dir = tempfile::tempdir().expect("dir");
    write_hf(tiny, dir.path(), Dtype::F32, 1);
    let files = ModelFiles::open(dir.path()).expect("opens");
    let options = LoadOptions {
        weights,
        threads: match place {
            Place::Kernels(threads) => threads,
            Place::Device => 0,
        },
        ..LoadOptions::default()
    };
    let executor = match place {
        Place::Kernels(_) => options.executor(),
        Place::Device => on_device(),
    };
    load_on(&files, &options, executor).expect("loads").model
}

/// A place and a form that texts are compared in there. Beside bf16 and blocks a device rounds activations to 8 bits, which
/// makes much of a difference in the last place: tokens change places there that are not nearly as probable.
fn places() -> impl Strategy<Value = (Place, WeightForm)> {
    let kernels = prop::sample::select(vec![
        WeightForm::F32,
        WeightForm::Bf16,
        WeightForm::Q8_0,
        WeightForm::Q4,
    ]);
    prop_oneof![
        2 => (1usize..4, kernels).prop_map(|(threads, form)| (Place::Kernels(threads), form)),
        1 => Just((Place::Device, WeightForm::F32)),
    ]
}

/// Texts are the same, bit for bit on the kernels; on a device they may part at a near tie.
fn same_text(
    model: &mut dyn TargetModel,
    place: Place,
    prompt: &[u32],
    one: &[u32],
    other: &[u32],
) -> std::result::Result<(), TestCaseError> {
    match place {
        Place::Kernels(_) => prop_assert_eq!(one, other),
        Place::Device => {
            let apart = parting(model, prompt, one, other);
            prop_assert!(apart.is_none_or(|apart| apart < NEAR_TIE), "{:?}", apart);
        }
    }
    Ok(())
}

/// Requests with this rule and budget, which are greedy where nothing else is said.
fn asked(rule: impl Verifier + 'static, budget: Budget) -> Asked {
    Asked {
        rule: Some(std::sync::Arc::new(rule)),
        budget,
        ..Asked::default()
    }
}

/// Proposes random trees that know the future: every other child continues plain decoding, so that long and
/// branching paths are accepted.
struct Oracle {
    futures: Vec<Vec<u32>>,
    seen: Vec<Vec<u32>>,
    random: Seeded,
    vocab: usize,
}

impl DraftModel for Oracle {
    fn drawing(&self, _: &Sampling) -> Drawing {
        Drawing::Deterministic
    }
    fn open(&mut self, slot: usize) -> Result<()> {
        self.seen.resize(self.seen.len().max(slot + 1), Vec::new());
        self.seen[slot].clear();
        Ok(())
    }
    fn close(&mut self, _: usize) {}
    fn observe(&mut self, committed: &[Committed<'_>]) -> Result<()> {
        for c in committed {
            self.seen[c.slot].extend_from_slice(c.tokens);
        }
        Ok(())
    }
    fn propose(&mut self, requests: &mut [Request<'_>]) -> Result<Vec<Tree>> {
        let mut trees = Vec::new();
        for r in requests {
            let seen = &self.seen[r.slot];
            let future = self
                .futures
                .iter()
                .find(|f| f.starts_with(seen))
                .map_or(&[][..], |f| &f[seen.len()..]);
            let mut tree = Tree::root(r.root);
            let mut depths = vec![0];
            while tree.len() < r.budget.total {
                let parent = self.random.pick(&vec![1.0; tree.len()])?;
                let depth = depths[parent];
                if depth >= r.budget.levels() || tree.children(parent).count() >= r.budget.width {
                    if self.random.coin(0.2) {
                        break;
                    }
                    continue;
                }
                let known = future.get(depth).copied().filter(|_| self.random.coin(0.6));
                let token = known.unwrap_or(self.random.pick(&vec![1.0; self.vocab])? as u32);
                tree.push(parent, token);
                depths.push(depth + 1);
            }
            trees.push(tree);
        }
        Ok(trees)
    }
}

fn tiny() -> impl Strategy<Value = Tiny> {
    let shape = prop::sample::select(vec![(4, 2, 16), (4, 4, 8), (6, 2, 16), (3, 1, 32)]);
    let family = prop::sample::select(vec![
        ("llama", None),
        ("llama-bias", None),
        ("qwen2", None),
        ("qwen3", None),
        ("mistral", Some(5)),
        ("mistral", Some(20)),
        ("qwen3", Some(11)),
    ]);
    (family, shape, any::<bool>(), 0u64..1000, 1usize..4).prop_map(
        |((family, window), (heads, kv_heads, head_dim), tied, seed, layers)| Tiny {
            family,
            window,
            heads,
            kv_heads,
            head_dim,
            tied,
            seed,
            layers,
            ..Tiny::default()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn greedy_speculation_equals_plain_decoding(
        tiny in tiny(),
        prompts in prop::collection::vec(prop::collection::vec(0u32..97, 1..40), 1..5),
        budget in (2usize..24, 1usize..5, 0usize..7),
        batch in 1usize..4,
        (place, form) in places(),
        seed in 0u64..100,
    ) {
        let mut target = model(&tiny, form, place);
        let plain = Asked { max_new_tokens: 24, ..asked(Greedy, Budget::OFF) };
        let plain = whole(decode_prompts(target.as_mut(), None, &plain, &prompts, 1));
        prop_assert!(plain.iter().all(|o| o.tau() == Some(1.0) && o.finish == Finish::Length));

        let futures: Vec<Vec<u32>> =
            prompts.iter().zip(&plain).map(|(p, o)| [p.as_slice(), &o.ids].concat()).collect();
        let budget = Budget { total: budget.0, width: budget.1, depth: budget.2 };
        let mut oracle = Oracle { futures, seen: Vec::new(), random: Seeded::new(seed, 0), vocab: tiny.vocab };
        let like = Asked { max_new_tokens: 24, ..asked(Greedy, budget) };
        let found = whole(decode_prompts(target.as_mut(), Some(&mut oracle), &like, &prompts, batch));
        for ((prompt, a), b) in prompts.iter().zip(&plain).zip(&found) {
            same_text(target.as_mut(), place, prompt, &a.ids, &b.ids)?;
            prop_assert_eq!(b.cycles.iter().map(|c| c.committed).sum::<usize>() + 1, b.ids.len());
            prop_assert!(b.cycles.iter().all(|c| c.nodes <= budget.total && c.committed <= c.accepted + 1));
        }
        let mut ngram = Ngram::new(1, 3).expect("ngram");
        let found = whole(decode_prompts(target.as_mut(), Some(&mut ngram), &like, &prompts, batch));
        for ((prompt, a), b) in prompts.iter().zip(&plain).zip(&found) {
            same_text(target.as_mut(), place, prompt, &a.ids, &b.ids)?;
        }
    }

    #[test]
    fn a_ragged_batch_equals_one_by_one_bit_for_bit(
        tiny in tiny(),
        prompts in prop::collection::vec(prop::collection::vec(0u32..97, 1..50), 2..6),
        (place, form) in places(),
    ) {
        let (alone, off) = match place {
            Place::Kernels(_) => (Place::Kernels(1), 0.0),
            Place::Device => (Place::Device, 1e-3),
        };
        let mut together = model(&tiny, form, place);
        let mut alone = model(&tiny, form, alone);
        let taps = [scylla_core::plugin::Tap::Input(1), scylla_core::plugin::Tap::Final];
        for slot in 0..prompts.len() {
            together.open(slot).expect("open");
        }
        let rows = |slot: usize, p: &'static [u32]| SlotRows { slot, tokens: p, parents: &[], want: Want::All };
        let leaked: Vec<&'static [u32]> = prompts.iter().map(|p| &*p.clone().leak()).collect();
        let step = Step { slots: leaked.iter().enumerate().map(|(i, p)| rows(i, p)).collect(), taps: &taps };
        let all = together.forward(&step).expect("forward");
        for (i, p) in leaked.iter().enumerate() {
            alone.open(0).expect("open");
            let one = alone.forward(&Step { slots: vec![rows(0, p)], taps: &taps }).expect("forward");
            alone.close(0);
            let pairs = one.taps[0].iter().zip(&all.taps[i]);
            for (a, b) in pairs.chain([(&one.logits[0], &all.logits[i])]) {
                let (a, b) = (a.all().expect("values"), b.all().expect("values"));
                prop_assert!(deviation(&a, &b) <= off, "{place:?}: off by {}", deviation(&a, &b));
            }
        }
    }

    #[test]
    fn sampled_text_does_not_depend_on_the_batch(
        seed in 0u64..100,
        prompts in prop::collection::vec(prop::collection::vec(0u32..97, 1..20), 2..5),
        temperature in 0.3f64..1.5,
    ) {
        let mut target = model(&Tiny { seed, ..Tiny::default() }, WeightForm::F32, Place::Kernels(2));
        let sampling = Sampling { temperature, top_p: 0.9, ..Sampling::default() };
        let like = Asked { sampling, seed, max_new_tokens: 16, ..asked(Chain, Budget::chain(4)) };
        let mut once = |batch| {
            let mut ngram = Ngram::new(1, 3).expect("ngram");
            let outputs = whole(decode_prompts(target.as_mut(), Some(&mut ngram), &like, &prompts, batch));
            outputs.into_iter().map(|o| o.ids).collect::<Vec<_>>()
        };
        prop_assert_eq!(once(1), once(3));
    }
}

#[test]
fn sequences_end_at_eos_at_the_limit_and_at_the_context() {
    let mut target = model(&Tiny::default(), WeightForm::F32, Place::Kernels(1));
    let prompt = vec![5, 6, 7];
    let prompts = [prompt.clone()];
    let like = Asked {
        max_new_tokens: 30,
        ..asked(Greedy, Budget::OFF)
    };
    let plain = whole(decode_prompts(target.as_mut(), None, &like, &prompts, 1)).remove(0);
    let eos = plain.ids[12];
    let first = plain.ids.iter().position(|&t| t == eos).expect("occurs");
    let mut oracle = Oracle {
        futures: vec![[prompt.as_slice(), &plain.ids].concat()],
        seen: Vec::new(),
        random: Seeded::new(1, 0),
        vocab: 97,
    };
    let budget = Budget {
        total: 16,
        width: 2,
        depth: 6,
    };
    let like = Asked {
        eos: vec![eos],
        budget,
        ..like
    };
    let draft: Option<&mut dyn DraftModel> = Some(&mut oracle);
    let cut = whole(decode_prompts(target.as_mut(), draft, &like, &prompts, 1)).remove(0);
    assert_eq!(cut.ids, plain.ids[..=first]);
    assert_eq!(cut.finish, Finish::Eos);
    assert!(cut.cycles.last().is_none_or(|c| c.cut));

    // The context of the tiny models is 256.
    let long = [(0..250).map(|i| i % 97).collect::<Vec<u32>>()];
    let mut ngram = Ngram::new(1, 3).expect("ngram");
    let like = Asked {
        max_new_tokens: 100,
        ..asked(Greedy, Budget::chain(8))
    };
    let draft: Option<&mut dyn DraftModel> = Some(&mut ngram);
    let full = whole(decode_prompts(target.as_mut(), draft, &like, &long, 1)).remove(0);
    assert_eq!((full.ids.len(), full.finish), (6, Finish::Context));
    let plain = whole(decode_prompts(target.as_mut(), None, &like, &long, 1)).remove(0);
    assert_eq!(full.ids, plain.ids);
}

#[test]
fn breaking_off_keeps_what_was_decoded_and_frees_the_slots() {
    let mut target = model(&Tiny::default(), WeightForm::F32, Place::Kernels(1));
    let options = Options {
        batch: 2,
        ..Options::default()
    };
    let mut engine = Engine::new(Parts::plain(&mut target, Greedy), options).expect("an engine");
    let request = |prompt: &[u32]| Asked {
        prompt: prompt.to_vec(),
        max_new_tokens: 50,
        ..Asked::default()
    };
    let requests = vec![request(&[1, 2]), request(&[3]), request(&[4])];
    let mut told = 0;
    let outputs: Vec<Output> = decode(&mut engine, requests, &mut |event: &Event| {
        told += usize::from(matches!(event, Event::Tokens { .. }));
        match told >= 10 {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    });
    assert_eq!(outputs.len(), 3);
    assert!(outputs.iter().all(|o| o.finish == Finish::Interrupted));
    assert!(!outputs[0].ids.is_empty() && outputs[2].ids.is_empty());
    drop(engine);
    target.open(0).expect("slot 0 is free again");
    target.open(1).expect("slot 1 is free again");
}

#[test]
fn a_rule_that_is_not_exact_for_the_draft_is_refused_naming_both() {
    let mut target = model(&Tiny::default(), WeightForm::F32, Place::Kernels(1));
    let mut ngram = Ngram::new(1, 3).expect("ngram");
    let wide = Budget {
        total: 8,
        width: 2,
        depth: 2,
    };
    let sampled = |like: Asked| Asked {
        sampling: Sampling {
            temperature: 1.0,
            ..Sampling::default()
        },
        max_new_tokens: 8,
        ..like
    };
    let prompts = [vec![1, 2, 1, 2, 1]];
    let mut run = |like: &Asked| {
        let draft: Option<&mut dyn DraftModel> = Some(&mut ngram);
        decode_prompts(target.as_mut(), draft, like, &prompts, 1)
    };
    let error = refusal(&run(&sampled(asked(Chain, wide))));
    assert!(
        error.contains("`chain`") && error.contains("`under test`") && error.contains("lossy"),
        "{error}"
    );
    let greedy = sampled(asked(Greedy, wide));
    let error = refusal(&run(&greedy));
    assert!(error.contains("`greedy`"), "{error}");
    let lossy = Asked {
        lossy: true,
        ..greedy
    };
    whole(run(&lossy));
}

#[test]
fn settings_and_prompts_out_of_range_are_refused() {
    let mut target = model(&Tiny::default(), WeightForm::F32, Place::Kernels(1));
    let mut refused = |prompt: Vec<u32>, like: Asked| {
        let outputs = decode_prompts(target.as_mut(), None, &like, &[prompt], 1);
        let ended = (outputs[0].finish, &outputs[0].ids[..]);
        assert_eq!(ended, (Finish::Failed, &[][..]));
        refusal(&outputs)
    };
    let ok = Asked::default;
    assert!(refused(vec![], ok()).contains("prompt is empty"));
    assert!(refused(vec![1; 256], ok()).contains("256 tokens"));
    assert!(refused(vec![97], ok()).contains("vocabulary of 97"));
    let none = Asked {
        max_new_tokens: 0,
        ..ok()
    };
    assert!(refused(vec![1], none).contains("max_new_tokens 0"));
    let stops = Asked {
        stops: vec!["a".into()],
        ..ok()
    };
    assert!(refused(vec![1], stops).contains("tokenizer"));
    let cold = Asked {
        sampling: Sampling {
            temperature: -0.5,
            ..Sampling::default()
        },
        ..ok()
    };
    assert!(refused(vec![1], cold).contains("temperature is -0.5"));
    let budget = Asked {
        budget: Budget {
            total: 5000,
            ..Budget::OFF
        },
        ..ok()
    };
    assert!(refused(vec![1], budget).contains("budget total 5000"));
    for (options, wanted) in [
        (
            Options {
                batch: 0,
                ..Options::default()
            },
            "batch 0",
        ),
        (
            Options {
                prompt_rows: 0,
                ..Options::default()
            },
            "prompt_rows 0",
        ),
    ] {
        let engine = Engine::new(Parts::plain(&mut target, Greedy), options);
        let error = engine.map(|_| ()).expect_err("refused").to_string();
        assert!(error.contains(wanted), "{error}");
    }
}
