//! Whole forwards of m rows behind 512 tokens, on random weights of well-known shapes: time, c(m) = time over that of one
//! row, and the share that is not a linear layer. The linear layers are run alone, on the same weights, in turn with the
//! whole, and bandwidth is measured between them.
//!
//! `cargo bench --bench shapes [-- WORDS]` runs the lines that hold all the words; `SCYLLA_THREADS` sets the threads.

mod common;

use std::sync::Arc;

use common::{asked_for, median, memory, read_rate, seconds};
use scylla_core::kernels::{Linear, Pool, Scratch};
use scylla_core::model::{
    Cpu, CpuStack, Executor, Forms, LayerWeights, ModelConfig, Stack, StackRows, TokenLayers,
    WeightForm, Weights,
};
use scylla_core::plugin::Matrix;
use scylla_tests::{RandomWeights, llama_shape};

const CONTEXT: usize = 512;
const REPEATS: usize = 15;

/// A model.
struct Model {
    on: Cpu,
    stack: CpuStack,
    tokens: TokenLayers,
    /// The head again, as a product among the others.
    head: Linear,
    norm: Matrix,
    scratch: Scratch,
    logits: Matrix,
    normed: Matrix,
}

impl Model {
    fn rows(m: usize) -> StackRows<'static> {
        StackRows {
            slot: 0,
            count: m,
            parents: &[],
        }
    }

    /// Layers, final norm and head; the rows are dropped again.
    fn forward(&mut self, x: &mut Matrix) {
        let m = x.rows();
        let run = self
            .stack
            .forward(&[Self::rows(m)], x, None, &mut |_, _| {});
        run.expect("forward");
        let norm = self.on.rms_norm(x, &self.norm, 1e-5, &mut self.normed);
        norm.expect("norm");
        let head = self.tokens.head.multiply(&self.normed, &mut self.logits);
        head.expect("head");
        self.stack.commit(0, &[]).expect("drop the rows");
    }

    /// The linear layers alone.
    fn linears(&mut self, x: &[f32], m: usize, out: &mut Vec<f32>) {
        let layers = self.stack.layers().iter().flat_map(LayerWeights::linears);
        let pool = self.stack.pool();
        for linear in layers.chain([&self.head]) {
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
        ("1.1B", llama_shape(22, 2048, 5632, (32, 4), 32000, true)),
        (
            "SmolLM2-135M",
            llama_shape(30, 576, 1536, (9, 3), 49152, true),
        ),
        (
            "Qwen2.5-0.5B",
            llama_shape(24, 896, 4864, (14, 2), 151936, true),
        ),
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
    let from = RandomWeights::new(form);
    let on = Cpu::new(Arc::clone(pool));
    let layer = |spec| LayerWeights::read(&from, "", spec).expect("random");
    let layers: Vec<LayerWeights> = config.layers.iter().map(layer).collect();
    let tokens = TokenLayers::read(&on, &from, config).expect("random");
    let h = config.hidden;
    let head = from.matrix("lm_head.weight", config.vocab, h);
    let mut forms = Forms::new();
    let stack = CpuStack::new(layers, CONTEXT + 64, Arc::clone(pool));
    let norms = stack.count(&mut forms);
    tokens.count(&mut forms);
    let bytes = forms.values().sum::<usize>() + norms;
    let mut model = Model {
        stack,
        tokens,
        head: Linear::new(head.expect("random"), None).settled(),
        norm: Matrix::host(vec![1.0; h], h),
        scratch: Scratch::default(),
        logits: Matrix::default(),
        normed: Matrix::default(),
        on,
    };
    let values = |n: usize| -> Vec<f32> { (0..n).map(|i| (i as f32 * 0.73).sin()).collect() };
    model.stack.open(0).expect("open");
    let prefill = seconds(|| {
        let mut at = 0;
        while at < CONTEXT {
            let mut x = Matrix::host(values(128 * h), h);
            let rows = [Model::rows(128)];
            model
                .stack
                .forward(&rows, &mut x, None, &mut |_, _| {})
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
    let widest = h.max(config.layers[0].ffn);
    let input = values(32 * widest);
    let mut out = Vec::new();
    model.linears(&input, 32, &mut out); // brings its buffers in place
    for _ in 0..REPEATS {
        for (i, &m) in sizes.iter().enumerate() {
            rate = rate.max(read_rate(pool, &data));
            let mut x = Matrix::host(input[..m * h].to_vec(), h);
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
