//! A drafting step allocates the same at any context: caches and buffers are kept, and nothing grows with the text.

use allocation_counter::{AllocationInfo, measure};
use safetensors::Dtype;
use scylla_core::chance::Seeded;
use scylla_core::model::{LoadOptions, ModelFiles, load};
use scylla_core::plugin::{Committed, DraftModel, Matrix, Request, SlotRows, Step, Want};
use scylla_core::sampling::Sampling;
use scylla_core::tree::Budget;
use scylla_draft::network::{self, DraftHost, DraftLm};
use scylla_draft::tree::{TreeDraft, TreeKind, TreeSettings};
use scylla_tests::{Tiny, TinyDraft, write_hf};
use serde_json::json;

const TINY: Tiny = Tiny {
    family: "llama",
    window: None,
    vocab: 97,
    hidden: 32,
    ffn: 48,
    layers: 7,
    heads: 2,
    kv_heads: 1,
    head_dim: 16,
    tied: false,
    seed: 0,
};

/// Shows `count` tokens, with features of the rows before the last.
fn show(draft: &mut TreeDraft, count: usize, first: bool) -> u32 {
    let rows = count - usize::from(first);
    let tokens: Vec<u32> = (0..count as u32).map(|i| i * 7 % 97).collect();
    let taps: Vec<Matrix> = draft
        .taps()
        .iter()
        .map(|_| {
            let values = (0..rows * TINY.hidden).map(|i| (i as f32 * 0.7).sin());
            Matrix::host(values.collect(), TINY.hidden)
        })
        .collect();
    let path: Vec<usize> = if taps.is_empty() {
        Vec::new()
    } else {
        (0..rows).collect()
    };
    let committed = Committed {
        slot: 0,
        tokens: &tokens,
        path: &path,
        taps: &taps,
    };
    draft.observe(&[committed]).expect("observe");
    tokens[count - 1]
}

/// Allocations of one cycle of the draft: three tokens become final, a tree is proposed.
fn cycle(draft: &mut TreeDraft, temperature: f64) -> AllocationInfo {
    let sampling = Sampling {
        temperature,
        ..Sampling::default()
    };
    measure(|| {
        let root = show(draft, 3, false);
        let request = Request {
            slot: 0,
            root,
            budget: Budget {
                total: 12,
                width: 3,
                depth: 3,
            },
            sampling: &sampling,
            chance: &mut Seeded::new(0, 0),
        };
        draft.propose(&mut [request]).expect("propose");
    })
}

#[test]
fn a_drafting_cycle_allocates_as_much_after_ten_tokens_as_after_two_hundred() {
    let dir = tempfile::tempdir().expect("dir");
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir(at("target")).expect("directory");
    write_hf(&TINY, &at("target"), Dtype::F32, 1);
    for (name, family) in [
        ("eagle2", "eagle"),
        ("eagle3", "eagle3"),
        ("scylla", "scylla"),
    ] {
        TinyDraft::new(&TINY, family, json!({}), 1).write(&at(name));
    }
    let options = LoadOptions {
        threads: 1,
        ..LoadOptions::default()
    };
    let open = || load(&ModelFiles::open(&at("target")).expect("opens"), &options).expect("loads");
    let target = open();
    let host = DraftHost::of(&target);
    // A shape that does not hang on what the networks say.
    let settings = TreeSettings {
        tree: TreeKind::Widths,
        ..TreeSettings::default()
    };
    let lm = DraftLm::new(open().model, 0, TINY.vocab, TINY.vocab).expect("draft-lm");
    let drafts = [
        TreeDraft::new(
            network::eagle(&at("eagle2"), &host).expect("eagle2"),
            &settings,
        ),
        TreeDraft::new(
            network::eagle3(&at("eagle3"), None, &host).expect("eagle3"),
            &settings,
        ),
        TreeDraft::new(
            network::scylla(&at("scylla"), &host).expect("scylla"),
            &settings,
        ),
        TreeDraft::new(lm, &settings),
    ];
    for (i, draft) in drafts.into_iter().enumerate() {
        let mut draft = draft.expect("settings");
        for temperature in [0.0, 1.0] {
            let mut after = |count: usize| {
                draft.open(0).expect("open");
                show(&mut draft, count, true);
                // The first cycles make the buffers.
                cycle(&mut draft, temperature);
                let found = cycle(&mut draft, temperature);
                draft.close(0);
                found
            };
            after(200); // and this one lets every buffer reach its size
            let (short, long) = (after(10), after(200));
            // The text's own record grows by doubling, and by four bytes a token: allow for one step of it.
            let allowed = short.bytes_total + 4 * 512;
            assert!(
                long.bytes_total <= allowed && long.count_total <= short.count_total + 2,
                "draft {i}: {short:?} after 10 tokens, {long:?} after 200"
            );
        }
    }
}

/// Logits that were handed back serve the next forward, and a forward allocates the same at any context.
#[test]
fn a_forward_of_the_target_allocates_neither_logits_nor_more_with_the_text() {
    let dir = tempfile::tempdir().expect("dir");
    let tiny = Tiny {
        vocab: 20_000,
        ..TINY
    };
    write_hf(&tiny, dir.path(), Dtype::F32, 1);
    let files = ModelFiles::open(dir.path()).expect("opens");
    let options = LoadOptions {
        threads: 1,
        ..LoadOptions::default()
    };
    for batch in [1, 3] {
        let mut model = load(&files, &options).expect("loads").model;
        (0..batch).for_each(|slot| model.open(slot).expect("open"));
        let mut forward = || {
            let rows = |slot| SlotRows {
                slot,
                tokens: &[5, 6, 7, 8],
                parents: &[None, Some(0), Some(0), Some(2)],
                want: Want::All,
            };
            let step = Step {
                slots: (0..batch).map(rows).collect(),
                taps: &[],
            };
            measure(|| {
                let found = model.forward(&step).expect("forward");
                (0..batch).for_each(|slot| model.commit(slot, &[0, 2, 3]).expect("commit"));
                model.recycle(found);
            })
        };
        forward(); // brings the buffers in place
        let early = forward();
        // One slot's logits would be as many bytes.
        assert!(
            early.bytes_total < 4 * 20_000 * 4,
            "{batch} slots: {early:?}"
        );
        (0..60).for_each(|_| {
            forward();
        });
        let late = forward();
        assert_eq!(
            (late.count_total, late.bytes_total),
            (early.count_total, early.bytes_total),
            "{batch} slots"
        );
    }
}
