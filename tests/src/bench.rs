//! A tiny target with random drafts of every kind beside it.

use std::path::PathBuf;
use std::sync::Arc;

use safetensors::Dtype;
use scylla_core::engine::{Output, Request};
use scylla_core::model::{Executor, LoadOptions, Loaded, ModelFiles, WeightForm, load_on};
use scylla_core::plugin::{DraftModel, TargetModel, Verifier};
use scylla_core::tree::Budget;
use scylla_draft::network::{self, DraftHost, DraftLm};
use scylla_draft::tree::{TreeDraft, TreeSettings};
use serde_json::json;

use crate::{Tiny, TinyDraft, decode_prompts, on_device, write_hf};

/// A small vocabulary, so that random drafts are accepted now and then; layers enough for three taps.
pub const TINY: Tiny = Tiny {
    family: "llama",
    window: None,
    vocab: 13,
    hidden: 32,
    ffn: 48,
    layers: 7,
    heads: 2,
    kv_heads: 1,
    head_dim: 16,
    tied: false,
    seed: 0,
};

/// A target and random drafts of every kind beside it.
pub struct Bench {
    dir: tempfile::TempDir,
    /// The target.
    pub target: Loaded,
}

/// Names of the drafts.
pub const NETWORKS: [&str; 7] = [
    "eagle2",
    "eagle3",
    "speculators",
    "hass",
    "scylla",
    "draft-lm",
    "eagle3.1",
];

impl Bench {
    /// On the CPU kernels.
    pub fn new(tiny: Tiny, threads: usize) -> Self {
        let options = LoadOptions {
            threads,
            ..LoadOptions::default()
        };
        Self::on(tiny, options.executor())
    }

    /// The same with the target's weights in a form, beside which caches hold half precision unless it is f32.
    pub fn held(tiny: Tiny, threads: usize, weights: WeightForm) -> Self {
        let options = LoadOptions {
            threads,
            weights,
            ..LoadOptions::default()
        };
        let mut bench = Self::on(tiny, options.executor());
        let files = ModelFiles::open(&bench.path("target")).expect("opens");
        let executor = Arc::clone(&bench.target.executor);
        bench.target = load_on(&files, &options, executor).expect("loads");
        bench
    }

    /// On candle's tensors on the CPU.
    pub fn on_device(tiny: Tiny) -> Self {
        Self::on(tiny, on_device())
    }

    /// On any executor.
    pub fn on(tiny: Tiny, executor: Arc<dyn Executor>) -> Self {
        let dir = tempfile::tempdir().expect("dir");
        let target = dir.path().join("target");
        std::fs::create_dir(&target).expect("directory");
        write_hf(&tiny, &target, Dtype::F32, 1);
        let other = Tiny {
            seed: tiny.seed + 1,
            layers: 1,
            ..tiny
        };
        let lm = dir.path().join("draft-lm");
        std::fs::create_dir(&lm).expect("directory");
        write_hf(&other, &lm, Dtype::F32, 1);
        let write = |name: &str, family: &str, config| {
            TinyDraft::new(&tiny, family, config, tiny.seed).write(&dir.path().join(name));
        };
        write("eagle2", "eagle", json!({}));
        write("hass", "eagle", json!({}));
        write("eagle3", "eagle3", json!({}));
        write(
            "speculators",
            "speculators",
            json!({"norm_before_residual": true}),
        );
        write("scylla", "scylla", json!({}));
        let newer = json!({"fc_norm": true, "norm_before_fc": true, "norm_output": true});
        write("eagle3.1", "eagle3", newer);
        let files = ModelFiles::open(&target).expect("opens");
        Self {
            target: load_on(&files, &LoadOptions::default(), executor).expect("loads"),
            dir,
        }
    }

    /// Another model where the target is computed.
    pub fn load(&self, files: &ModelFiles) -> Box<dyn TargetModel> {
        let executor = Arc::clone(&self.target.executor);
        load_on(files, &LoadOptions::default(), executor)
            .expect("loads")
            .model
    }

    /// Where one of its models lies.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The target as drafts are made for it, with a truncated head or without.
    pub fn host(&self, head: Option<&[u32]>) -> DraftHost {
        DraftHost {
            head: head.map(Into::into),
            ..DraftHost::of(&self.target)
        }
    }

    /// A draft by name.
    pub fn draft(&self, name: &str, tree: &TreeSettings, head: Option<&[u32]>) -> TreeDraft {
        let (dir, host) = (self.path(name), self.host(head));
        match name {
            "eagle2" => TreeDraft::new(network::eagle(&dir, &host).expect(name), tree),
            "hass" => TreeDraft::new(network::hass(&dir, &host).expect(name), tree),
            "scylla" => TreeDraft::new(network::scylla(&dir, &host).expect(name), tree),
            "draft-lm" => {
                let files = ModelFiles::open(&dir).expect("opens");
                let vocab = host.target.vocab;
                let network = DraftLm::new(self.load(&files), 0, vocab, vocab);
                TreeDraft::new(network.expect(name), tree)
            }
            _ => TreeDraft::new(network::eagle3(&dir, None, &host).expect(name), tree),
        }
        .expect(name)
    }

    /// Decodes prompts that are alike in all else, `like.1` side by side.
    pub fn decode(
        &mut self,
        draft: Option<&mut dyn DraftModel>,
        rule: &'static dyn Verifier,
        budget: Budget,
        prompts: &[Vec<u32>],
        (like, batch): (&Request, usize),
    ) -> Vec<Output> {
        let like = Request {
            rule: Some(Arc::new(rule)),
            budget,
            ..like.clone()
        };
        decode_prompts(self.target.model.as_mut(), draft, &like, prompts, batch)
    }
}
