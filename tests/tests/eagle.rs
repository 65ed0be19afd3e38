//! EAGLE-1 and EAGLE-3 against golden values: network outputs, trees node by node, whole greedy decodes.

use std::path::Path;
use std::sync::Arc;

use scylla_core::chance::Seeded;
use scylla_core::engine::Request as Asked;
use scylla_core::model::{Executor, LoadOptions, Loaded, ModelFiles, load_on};
use scylla_core::plugin::{Committed, DraftModel, Matrix, Request};
use scylla_core::sampling::Sampling;
use scylla_core::tree::{Budget, Tree};
use scylla_draft::network::{self, Body, DraftHost, Feature, Network, Nodes};
use scylla_draft::tree::{Scored, TreeDraft, TreeSettings};
use scylla_tests::{Tensors, decode_prompts, deviation, executors, golden, ids, whole};
use serde_json::Value;

const HIDDEN: f32 = 2e-3;
const LOGITS: f32 = 1e-3;

/// One golden draft with its target.
struct Case {
    target: Loaded,
    host: DraftHost,
    dir: std::path::PathBuf,
    values: Tensors,
    json: Value,
}

fn case(golden: &Path, draft: &str, target: &str, executor: &Arc<dyn Executor>) -> Case {
    let dir = golden.join("eagle").join(draft);
    let files = ModelFiles::open(&golden.join("models").join(target)).expect("target");
    let options = LoadOptions::default();
    let target = load_on(&files, &options, Arc::clone(executor)).expect("loads");
    let text = std::fs::read_to_string(dir.join("golden.json")).expect("golden.json");
    Case {
        host: DraftHost::of(&target),
        target,
        values: Tensors::read(&dir.join("golden.safetensors")),
        json: serde_json::from_str(&text).expect("json"),
        dir,
    }
}

/// Runs a generic body for both drafts on every executor.
macro_rules! check {
    ($test:literal, $body:ident) => {
        let Some(golden) = golden($test) else { return };
        for (name, executor) in executors() {
            eprintln!("{name}");
            let mut case = case(&golden, "eagle1-llama2-tiny", "llama2-tiny", &executor);
            let eagle = network::eagle(&case.dir, &case.host).expect("EAGLE-1");
            $body(&mut case, eagle);
            let mut case = self::case(&golden, "eagle3-llama3-tiny", "llama3-tiny", &executor);
            let eagle3 = network::eagle3(&case.dir, None, &case.host).expect("EAGLE-3");
            $body(&mut case, eagle3);
        }
    };
}

fn close(name: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    let off = deviation(found, expected);
    assert!(off <= tolerance, "{name}: off by {off}");
}

/// Features side by side as the taps' matrices, one per tap, where the draft is computed.
fn taps(host: &DraftHost, features: &[f32], width: usize, count: usize) -> Vec<Matrix> {
    let each = width / count;
    let tap = |i: usize| {
        let rows = features.chunks_exact(width);
        let values = rows.flat_map(|row| &row[i * each..(i + 1) * each]);
        let tap = Matrix::host(values.copied().collect(), each);
        host.executor.bring(tap).expect("brings")
    };
    (0..count).map(tap).collect()
}

fn outputs<B: Body>(case: &mut Case, mut network: Feature<B>) {
    let v = &case.values;
    let input = ids(&v.i64("forward.input_ids"));
    let (features, shape) = v.f32("forward.features");
    let (hidden, hidden_shape) = v.f32("forward.hidden");
    let (logits, logits_shape) = v.f32("forward.logits");
    let (h, columns) = (hidden_shape[1], logits_shape[1]);
    let count = network.taps().len();
    let mut found = Matrix::default();
    let all = |m: &Matrix| m.all().expect("values").into_owned();
    network.open(3).expect("open");
    for row in 0..shape[0] {
        let feature = &features[row * shape[1]..(row + 1) * shape[1]];
        let tokens: &[u32] = if row == 0 {
            &input[..2]
        } else {
            &input[row + 1..row + 2]
        };
        let taps = taps(&case.host, feature, shape[1], count);
        let committed = Committed {
            slot: 3,
            tokens,
            path: &[0],
            taps: &taps,
        };
        network.observe(&committed).expect("observe");
        network.start(&[3], &mut found).expect("start");
        let last = all(network.states(3).expect("open"));
        close(
            &format!("hidden {row}"),
            &last[..h],
            &hidden[row * h..(row + 1) * h],
            HIDDEN,
        );
        let expected = &logits[row * columns..(row + 1) * columns];
        close(&format!("logits {row}"), &all(&found), expected, LOGITS);
    }
    // The same rows in one forward.
    let mut whole = Matrix::default();
    network.open(1).expect("open");
    let path: Vec<usize> = (0..shape[0]).collect();
    let committed = Committed {
        slot: 1,
        tokens: &input,
        path: &path,
        taps: &taps(&case.host, &features, shape[1], count),
    };
    network.observe(&committed).expect("observe");
    network.start(&[1], &mut whole).expect("start");
    match found.is_on_device() {
        false => assert_eq!(all(&whole), all(&found), "rows together and one by one"),
        true => close("rows together", &all(&whole), &all(&found), 1e-4),
    }

    let (hidden, _) = v.f32("chain.hidden");
    let (logits, _) = v.f32("chain.logits");
    for (i, token) in ids(&v.i64("chain.tokens")).into_iter().enumerate() {
        let nodes = Nodes {
            slot: 3,
            tokens: &[token],
            parents: &[i.checked_sub(1)],
        };
        network.expand(&[nodes], &mut found).expect("expand");
        let states = all(network.states(3).expect("open"));
        let nodes = &states[h..];
        close(
            &format!("chain hidden {i}"),
            &nodes[i * h..],
            &hidden[i * h..(i + 1) * h],
            HIDDEN,
        );
        let expected = &logits[i * columns..(i + 1) * columns];
        close(&format!("chain logits {i}"), &all(&found), expected, LOGITS);
    }
}

#[test]
fn network_outputs_match() {
    check!("network_outputs_match", outputs);
}

/// Every golden draft on candle's tensors beside the kernels: states and logits of the golden rows.
#[test]
fn a_device_computes_what_the_kernels_compute() {
    let Some(golden) = golden("a_device_computes_what_the_kernels_compute") else {
        return;
    };
    for (draft, target) in [
        ("eagle1-llama2-tiny", "llama2-tiny"),
        ("eagle3-llama3-tiny", "llama3-tiny"),
    ] {
        let all = executors();
        let found = all.iter().map(|(name, executor)| {
            let case = case(&golden, draft, target, executor);
            let found = match draft.starts_with("eagle3") {
                false => rows_and_nodes(&case, network::eagle(&case.dir, &case.host).expect(draft)),
                true => {
                    let network = network::eagle3(&case.dir, None, &case.host);
                    rows_and_nodes(&case, network.expect(draft))
                }
            };
            (name, found)
        });
        let found: Vec<_> = found.collect();
        for (name, (states, logits)) in &found[1..] {
            let (expected_states, expected_logits) = &found[0].1;
            close(
                &format!("{draft} on {name}: states"),
                states,
                expected_states,
                1e-4,
            );
            close(
                &format!("{draft} on {name}: logits"),
                logits,
                expected_logits,
                1e-4,
            );
        }
    }
}

/// States and logits after the golden rows, and after three nodes of which two are siblings.
fn rows_and_nodes<B: Body>(case: &Case, mut network: Feature<B>) -> (Vec<f32>, Vec<f32>) {
    let v = &case.values;
    let input = ids(&v.i64("forward.input_ids"));
    let (features, shape) = v.f32("forward.features");
    let count = network.taps().len();
    let path: Vec<usize> = (0..shape[0]).collect();
    let committed = Committed {
        slot: 0,
        tokens: &input,
        path: &path,
        taps: &taps(&case.host, &features, shape[1], count),
    };
    network.open(0).expect("open");
    network.observe(&committed).expect("observe");
    let mut logits = Matrix::default();
    network.start(&[0], &mut logits).expect("start");
    let mut all = logits.all().expect("logits").into_owned();
    for (tokens, parents) in [(&[7, 11][..], &[None, None][..]), (&[13], &[Some(1)])] {
        let nodes = Nodes {
            slot: 0,
            tokens,
            parents,
        };
        network.expand(&[nodes], &mut logits).expect("expand");
        all.extend_from_slice(&logits.all().expect("logits"));
    }
    let states = network.states(0).expect("open");
    (states.all().expect("states").into_owned(), all)
}

fn numbers<T: TryFrom<i64>>(value: &Value) -> Vec<T> {
    let number = |v: &Value| {
        T::try_from(v.as_i64().expect("a number"))
            .ok()
            .expect("in range")
    };
    value
        .as_array()
        .expect("a list")
        .iter()
        .map(number)
        .collect()
}

fn budget(value: &Value) -> Budget {
    let size = |key: &str| value[key].as_u64().expect(key) as usize;
    Budget {
        total: size("total_tokens_including_root"),
        depth: size("depth"),
        width: size("top_k"),
    }
}

/// Tokens, parents, depths and scores of a golden tree.
fn assert_tree(name: &str, found: &Scored, expected: &Value, scores: &str) {
    let values = expected[scores].as_array().expect("scores");
    assert_eq!(values.len() + 1, found.scores.len(), "{name}");
    for (value, score) in values.iter().zip(&found.scores[1..]) {
        let off = (value.as_f64().expect("a score") - score).abs();
        assert!(off < f64::from(LOGITS), "{name}: a score is off by {off}");
    }
    let found = &found.tree;
    let parents: Vec<i64> = found.parents.iter().map(|&p| p as i64).collect();
    assert_eq!(
        found.tokens,
        numbers::<u32>(&expected["draft_tokens"]),
        "{name}"
    );
    assert_eq!(
        parents[1..],
        numbers::<i64>(&expected["parents"])[1..],
        "{name}"
    );
    assert_eq!(
        found.depths(),
        numbers::<usize>(&expected["relative_positions"]),
        "{name}"
    );
}

fn trees<B: Body + 'static>(case: &mut Case, network: Feature<B>) {
    let mut draft = TreeDraft::new(network, &TreeSettings::default()).expect("draft");
    let count = draft.taps().len();
    let cases = case.json["trees"].as_array().expect("trees").clone();
    assert_eq!(cases.len(), 8);
    let mut together: Vec<(usize, Tree)> = Vec::new();
    for (slot, tree) in cases.iter().enumerate() {
        let key = tree["key"].as_str().expect("key");
        let (features, shape) = case.values.f32(&format!("{key}.features"));
        let input = ids(&case.values.i64(&format!("{key}.input_ids")));
        draft.open(slot).expect("open");
        let path: Vec<usize> = (0..shape[0]).collect();
        let committed = Committed {
            slot,
            tokens: &input,
            path: &path,
            taps: &taps(&case.host, &features, shape[1], count),
        };
        draft.observe(&[committed]).expect("observe");
        let sampling = Sampling::default();
        let mut chance = Seeded::new(0, 0);
        let request = Request {
            slot,
            root: input[input.len() - 1],
            budget: budget(tree),
            sampling: &sampling,
            chance: &mut chance,
        };
        let found = draft
            .propose_scored(&mut [request])
            .expect("propose")
            .remove(0);
        assert_tree(key, &found, tree, "cumulative_log_probs");
        together.push((slot, found.tree));
    }
    // All of them again, in one call.
    let sampling = Sampling::default();
    let mut chances: Vec<Seeded> = (0..8).map(|i| Seeded::new(0, i)).collect();
    let mut requests: Vec<Request<'_>> = together
        .iter()
        .zip(&mut chances)
        .map(|((slot, tree), chance)| Request {
            slot: *slot,
            root: tree.tokens[0],
            budget: budget(&cases[*slot]),
            sampling: &sampling,
            chance,
        })
        .collect();
    let found = draft.propose(&mut requests).expect("propose");
    for ((slot, alone), found) in together.iter().zip(found) {
        assert_eq!(*alone, found, "slot {slot} in a batch");
    }
}

#[test]
fn trees_match_node_by_node() {
    check!("trees_match_node_by_node", trees);
}

fn decodes<B: Body + 'static>(case: &mut Case, network: Feature<B>) {
    let mut draft = TreeDraft::new(network, &TreeSettings::default()).expect("draft");
    let expected = case.json["greedy_tree_decode"]
        .as_array()
        .expect("decodes")
        .clone();
    for decode_case in &expected {
        let all = numbers::<u32>(&decode_case["new_tokens_untruncated"]);
        let accepted = numbers::<usize>(&decode_case["accepted_lengths"]);
        let budget = budget(decode_case);
        // Room behind the last golden cycle, so that the limit cuts no tree of it.
        let like = Asked {
            max_new_tokens: all.len() + 2 * budget.levels(),
            budget,
            ..Asked::default()
        };
        let prompts = [numbers(&decode_case["prompt"])];
        let target = case.target.model.as_mut();
        let outputs = decode_prompts(target, Some(&mut draft), &like, &prompts, 1);
        let output = whole(outputs).remove(0);
        assert_eq!(output.ids[..all.len()], all, "{}", case.dir.display());
        let found: Vec<usize> = output.cycles.iter().map(|c| c.accepted).collect();
        assert_eq!(found[..accepted.len()], accepted, "{}", case.dir.display());
    }
}

#[test]
fn greedy_decodes_accept_what_the_reference_accepts_cycle_by_cycle() {
    check!("greedy_decodes_accept_what_the_reference_accepts", decodes);
}
