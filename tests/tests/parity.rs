//! The transformer against golden values of every family, on every executor.

use scylla_core::model::{ModelFiles, WeightForm};
use scylla_core::plugin::{SlotRows, Step, Tap, TargetModel, Want};
use scylla_tests::{Tensors, backends, deviation, golden, ids};

const LOGITS: f32 = 5e-4;
const HIDDEN: f32 = 2e-3;

/// Runs `body` for each family on each backend.
fn check(test: &str, body: impl Fn(&str, &mut dyn TargetModel, &Tensors, usize)) {
    let Some(dir) = golden(test) else { return };
    let models = ["llama2-tiny", "llama3-tiny", "qwen2-tiny"].map(|name| ("models", name));
    let families = [
        "qwen3-tiny",
        "qwen3-tied-tiny",
        "qwen2-yarn-tiny",
        "llama-bias-tiny",
        "mistral-window-tiny",
        "qwen2-window-tiny",
    ];
    let families = families.map(|name| ("families", name));
    for (folder, family) in models.into_iter().chain(families) {
        let dir = dir.join(folder).join(family);
        let files = ModelFiles::open(&dir).expect("opens");
        let values = Tensors::read(&dir.join("golden.safetensors"));
        for (backend, mut loaded) in backends(&files, WeightForm::AsIs) {
            let name = format!("{family}, {backend}");
            let layers = files.config.layers.len();
            body(&name, loaded.model.as_mut(), &values, layers);
        }
    }
}

fn rows<'a>(tokens: &'a [u32], parents: &'a [Option<usize>], want: Want<'a>) -> Step<'a> {
    Step {
        slots: vec![SlotRows {
            slot: 0,
            tokens,
            parents,
            want,
        }],
        taps: &[],
    }
}

#[test]
fn logits_of_chains_match() {
    check("logits_of_chains_match", |name, model, golden, _| {
        for n in [1, 17, 150] {
            let tokens = ids(&golden.i64(&format!("seq{n}.input_ids")));
            model.open(0).expect("open");
            let found = model
                .forward(&rows(&tokens, &[], Want::All))
                .expect("forward");
            let (expected, shape) = golden.f32(&format!("seq{n}.logits"));
            let off = deviation(&found.logits[0].all().expect("logits"), &expected);
            assert!(off < LOGITS, "{name}, {n} tokens: {off}");
            model.commit(0, &[]).expect("drop the rows");
            let listed = [n - 1, n / 2, 0];
            let some = model
                .forward(&rows(&tokens, &[], Want::Rows(&listed)))
                .expect("forward");
            model.close(0);
            assert_eq!(some.logits[0].rows(), 3, "{name}");
            for (i, row) in listed.into_iter().enumerate() {
                let expected = &expected[row * shape[1]..(row + 1) * shape[1]];
                let off = deviation(&some.logits[0].row(i).expect("row"), expected);
                assert!(off < LOGITS, "{name}, row {row} of {n}: {off}");
            }
        }
    });
}

#[test]
fn taps_match_layer_by_layer() {
    check(
        "taps_match_layer_by_layer",
        |name, model, golden, layers| {
            let tokens = ids(&golden.i64("seq17.input_ids"));
            let taps: Vec<Tap> = (0..=layers).map(Tap::Input).chain([Tap::Final]).collect();
            model.open(0).expect("open");
            let mut step = rows(&tokens, &[], Want::None);
            step.taps = &taps;
            let found = model.forward(&step).expect("forward");
            assert_eq!(found.logits[0].rows(), 0, "{name}: logits nobody asked for");
            for (i, tap) in found.taps[0].iter().enumerate() {
                let key = if i > layers {
                    "norm".into()
                } else {
                    i.to_string()
                };
                let key = format!("seq17.hidden.{key}");
                if !golden.has(&key) {
                    continue; // not every reference keeps the last output before the norm
                }
                let (expected, _) = golden.f32(&key);
                let deviation = deviation(&tap.all().expect("tap"), &expected);
                assert!(deviation < HIDDEN, "{name}, tap {key}: {deviation}");
            }
            model.close(0);
        },
    );
}

#[test]
fn greedy_continuations_match() {
    check("greedy_continuations_match", |name, model, golden, _| {
        let expected = ids(&golden.i64("greedy.tokens"));
        let mut tokens = ids(&golden.i64("greedy.prompt"));
        model.open(0).expect("open");
        let mut found = Vec::new();
        for _ in 0..expected.len() {
            let forward = model
                .forward(&rows(&tokens, &[], Want::Last))
                .expect("forward");
            model
                .commit(0, &(0..tokens.len()).collect::<Vec<_>>())
                .expect("commit");
            let next = forward.logits[0].argmax(&[0], usize::MAX).expect("argmax")[0];
            found.push(next);
            tokens = vec![next];
        }
        assert_eq!(found, expected, "{name}");
        model.close(0);
    });
}

#[test]
fn tree_nodes_match_and_a_committed_path_continues() {
    check("tree_nodes_match", |name, model, golden, _| {
        let prompt = ids(&golden.i64("tree.prompt"));
        let tokens = ids(&golden.i64("tree.tokens"));
        let parents: Vec<Option<usize>> = golden
            .i64("tree.parents")
            .iter()
            .map(|&p| usize::try_from(p).ok())
            .collect();
        model.open(0).expect("open");
        let first = model
            .forward(&rows(&prompt, &[], Want::All))
            .expect("forward");
        let (expected, _) = golden.f32("tree.prompt_logits");
        let off = deviation(&first.logits[0].all().expect("logits"), &expected);
        assert!(off < LOGITS, "{name}: {off}");
        model
            .commit(0, &(0..prompt.len()).collect::<Vec<_>>())
            .expect("commit");
        let tree = model
            .forward(&rows(&tokens, &parents, Want::All))
            .expect("forward");
        let (expected, _) = golden.f32("tree.logits");
        let found = tree.logits[0].all().expect("logits").into_owned();
        let off = deviation(&found, &expected);
        assert!(off < LOGITS, "{name}: {off}");
        // Keep the deepest path, run one more token after it, and compare with a fresh chain.
        let deepest = (0..tokens.len())
            .max_by_key(|&i| path(&parents, i).len())
            .expect("a node");
        let path = path(&parents, deepest);
        model.commit(0, &path).expect("commit");
        let after = model
            .forward(&rows(&[7], &[], Want::Last))
            .expect("forward");
        let mut chain = prompt.clone();
        chain.extend(path.iter().map(|&i| tokens[i]));
        chain.push(7);
        model.close(0);
        model.open(0).expect("open");
        let fresh = model
            .forward(&rows(&chain, &[], Want::Last))
            .expect("forward");
        let off = deviation(
            &after.logits[0].all().expect("logits"),
            &fresh.logits[0].all().expect("logits"),
        );
        assert!(off < LOGITS, "{name}: after the commit {off}");
        model.close(0);
    });
}

fn path(parents: &[Option<usize>], mut node: usize) -> Vec<usize> {
    let mut path = vec![node];
    while let Some(parent) = parents[node] {
        path.insert(0, parent);
        node = parent;
    }
    path
}
