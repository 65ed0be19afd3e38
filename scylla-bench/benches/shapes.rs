//! Whole forwards of m rows behind 512 tokens, on random weights of well-known shapes: time, c(m) = time over that of one
//! row, and the share that is not a linear layer. The linear layers are run alone, on the same weights, in turn with the
//! whole, and bandwidth is measured between them.
//!
//! `cargo bench --bench shapes [-- WORDS]` runs the lines that hold all the words; `SCYLLA_THREADS` sets the threads.

mod common;

use std::cell::Cell;
use std::sync::Arc;

use common::{asked_for, median, memory, read_rate, seconds};
use scylla_core::Result;
use scylla_core::kernels::{Linear, Pool, Scratch, Weight, rms_norm};
use scylla_core::model::{
    CpuStack, Ends, Layer, ModelConfig, RopeScaling, Rows, WeightForm, Weights,
};

const CONTEXT: usize = 512;
const REPEATS: usize = 15;

/// Weights without meaning: the time does not depend on what they say.
struct Random {
    form: WeightForm,
    state: Cell<u32>,
}

impl Random {
    fn values(&self, n: usize) -> Vec<f32> {
        let mut state = self.state.get();
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 8) as f32 / (1 << 24) as f32 - 0.5) * 0.05
        };
        let values = (0..n).map(next).collect();
        self.state.set(state);
        values
    }
}

impl Weights for Random {
    fn matrix(&self, _: &str, n: usize, k: usize) -> Result<Weight> {
        self.form.apply(Weight::f32(&self.values(n * k), k))
    }
    fn vector(&self, _: &str, n: usize) -> Result<Vec<f32>> {
        Ok(vec![1.0; n])
    }
}

fn shape(
    layers: usize,
    hidden: usize,
    ffn: usize,
    heads: (usize, usize),
    vocab: usize,
) -> ModelConfig {
    ModelConfig {
        architecture: "llama".into(),
        vocab,
        hidden,
        ffn,
        layers,
        heads: heads.0,
        kv_heads: heads.1,
        head_dim: hidden / heads.0,
        norm_eps: 1e-5,
        rope_theta: 1e4,
        rope_scaling: RopeScaling::None,
        window: None,
        context: 2048,
        tied: true,
        qkv_bias: false,
    }
}

/// A model.
struct Model {
    stack: CpuStack,
    ends: Ends,
    norm: Vec<f32>,
    scratch: Scratch,
    logits: Vec<f32>,
    normed: Vec<f32>,
}

impl Model {
    fn rows(m: usize) -> Rows<'static> {
        Rows {
            slot: 0,
            count: m,
            parents: &[],
        }
    }

    /// Layers, final norm and head; the rows are dropped again.
    fn forward(&mut self, x: &mut [f32]) {
        let m = x.len() / self.ends.hidden;
        let run = self.stack.forward(&[Self::rows(m)], x, None, |_, _| {});
        run.expect("forward");
        self.normed.resize(x.len(), 0.0);
        rms_norm(x, &self.norm, 1e-5, &mut self.normed);
        self.logits.resize(m * self.ends.vocab, 0.0);
        let (pool, head) = (self.stack.pool(), self.ends.head());
        head.forward(pool, &self.normed, &mut self.scratch, &mut self.logits)
            .expect("head");
        self.stack.commit(0, &[]).expect("drop the rows");
    }

    /// The linear layers alone.
    fn linears(&mut self, x: &[f32], m: usize, out: &mut Vec<f32>) {
        let layers = self.stack.layers().iter().flat_map(Layer::linears);
        let head: &Linear = self.ends.head();
        let pool = self.stack.pool();
        for linear in layers.chain([head]) {
            out.resize(m * linear.n, 0.0);
            let x = &x[..m * linear.k];
            linear
                .forward(pool, x, &mut self.scratch, out)
                .expect("forward");
        }
    }
}

fn main() {
    let pool = Arc::new(common::pool());
    println!(
        "{} threads, {CONTEXT} tokens in the cache; ms (c(m); share that is not linear layers)",
        pool.threads()
    );
    for (name, config) in [
        ("1.1B", shape(22, 2048, 5632, (32, 4), 32000)),
        ("SmolLM2-135M", shape(30, 576, 1536, (9, 3), 49152)),
        ("Qwen2.5-0.5B", shape(24, 896, 4864, (14, 2), 151936)),
    ] {
        for form in [
            WeightForm::Q8_0,
            WeightForm::Q4,
            WeightForm::Bf16,
            WeightForm::F32,
        ] {
            let title = format!("{name:<14}{form:<6}");
            if asked_for(&title) {
                println!("{title}{}", line(&config, form, &pool));
            }
        }
    }
}

fn line(config: &ModelConfig, form: WeightForm, pool: &Arc<Pool>) -> String {
    let from = Random {
        form,
        state: Cell::new(1),
    };
    let layer = |_| Layer::read(&from, "", config, config.hidden, true).expect("random");
    let layers: Vec<Layer> = (0..config.layers).map(layer).collect();
    let ends = Ends::read(&from, config).expect("random");
    let bytes = layers.iter().map(Layer::bytes).sum::<usize>() + ends.bytes();
    let mut model = Model {
        stack: CpuStack::new(config.clone(), layers, CONTEXT + 64, Arc::clone(pool)),
        ends,
        norm: vec![1.0; config.hidden],
        scratch: Scratch::default(),
        logits: Vec::new(),
        normed: Vec::new(),
    };
    model.stack.open(0).expect("open");
    let h = config.hidden;
    let prefill = seconds(|| {
        let mut at = 0;
        while at < CONTEXT {
            let mut x = from.values(128 * h);
            let rows = [Model::rows(128)];
            model
                .stack
                .forward(&rows, &mut x, None, |_, _| {})
                .expect("forward");
            let path: Vec<usize> = (0..128).collect();
            model.stack.commit(0, &path).expect("commit");
            at += 128;
        }
    });
    let data = memory();
    let sizes = [1usize, 2, 4, 8, 16, 32];
    let mut whole = vec![Vec::new(); sizes.len()];
    let mut alone = vec![Vec::new(); sizes.len()];
    let mut rate: f64 = 0.0;
    let widest = h.max(config.ffn);
    let input = from.values(32 * widest);
    let mut out = Vec::new();
    model.linears(&input, 32, &mut out); // brings its buffers in place
    for _ in 0..REPEATS {
        for (i, &m) in sizes.iter().enumerate() {
            rate = rate.max(read_rate(pool, &data));
            let mut x = input[..m * h].to_vec();
            whole[i].push(seconds(|| model.forward(&mut x)));
            alone[i].push(seconds(|| model.linears(&input, m, &mut out)));
        }
    }
    let whole: Vec<f64> = whole.into_iter().map(median).collect();
    let alone: Vec<f64> = alone.into_iter().map(median).collect();
    let mut line = String::new();
    for (i, &m) in sizes.iter().enumerate() {
        let (time, linear) = (whole[i], alone[i]);
        let share = 100.0 * (1.0 - linear / time);
        line += &format!(
            "  {m}: {:.2} ({:.2}; {share:.0} %)",
            time * 1e3,
            time / whole[0]
        );
    }
    let of_bandwidth = 100.0 * bytes as f64 / whole[0] / rate;
    line + &format!(
        "  [m = 1 reads {:.0} MB at {of_bandwidth:.0} % of {:.0} GB/s; {:.0} tokens/s of prefill without head]",
        bytes as f64 / 1e6,
        rate / 1e9,
        CONTEXT as f64 / prefill
    )
}
