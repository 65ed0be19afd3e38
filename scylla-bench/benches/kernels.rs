//! What is not a product with a weight, each kernel beside its limit, both measured in turn; then prefill against candle's
//! matrix product (the gemm crate).
//!
//! Attention's limit is `max(bytes / bandwidth, multiply-adds / peak)`, keys and values from memory. Kernels that work row
//! by row find their data in the caches: their limit is the time to copy as many bytes there.
//!
//! `cargo bench --bench kernels [-- WORDS]` runs the lines that hold all the words; `SCYLLA_THREADS` sets the threads.

mod common;

use std::hint::black_box;

use candle_core::{Device, Tensor};
use common::{asked_for, best, median, memory, pool, read_rate, seconds};
use scylla_core::kernels::{
    AttentionRow, CacheForm, KvLayer, Linear, Operand, Pool, Scratch, Weight, add_rms_norm,
    attention, multiply_adds, rope, swiglu,
};
use scylla_core::sampling::{argmax, top_log_probabilities};

const CONTEXT: usize = 512;
const REPEATS: usize = 40;

fn values(n: usize) -> Vec<f32> {
    (0..n)
        .map(|i| ((i * 7919) % 1009) as f32 / 504.5 - 1.0)
        .collect()
}

/// Attention of m rows behind 512 tokens, on enough layers that none is in the caches when its turn comes.
fn of_attention(pool: &Pool) {
    let models = [
        ("1.1B", 32, 4, 64),
        ("SmolLM2", 9, 3, 64),
        ("Qwen2.5-0.5B", 14, 2, 64),
        ("Llama 8B", 32, 8, 128),
    ];
    let forms = [CacheForm::F16, CacheForm::F32];
    let all = models.iter().flat_map(|m| forms.map(|form| (*m, form)));
    for ((model, heads, kv_heads, e), form) in all {
        let title = format!("attention, {model}, {form:?}");
        if !asked_for(&title) {
            continue;
        }
        let bytes = 2 * kv_heads * CONTEXT * e * form.bytes();
        let layers = (64usize << 20).div_ceil(bytes);
        let caches: Vec<KvLayer> = (0..layers)
            .map(|_| {
                let mut cache = KvLayer::new(form, kv_heads, e, CONTEXT + 64);
                let row = values(kv_heads * e);
                (0..CONTEXT + 64).for_each(|p| cache.write(p, &row, &row));
                cache
            })
            .collect();
        let data = memory();
        let mut line = format!("{title:<34}");
        for m in [1, 2, 4, 8, 16, 32] {
            let q = values(m * heads * e);
            let mut out = vec![0.0; q.len()];
            let rate = read_rate(pool, &data);
            let peak = multiply_adds(pool, Operand::F32);
            let times = caches.iter().map(|cache| {
                let row = |i| AttentionRow {
                    cache,
                    first: 0,
                    contiguous: CONTEXT + 1 + i,
                    scattered: &[],
                };
                seconds(|| attention(pool, &q, m, &row, heads, &mut out))
            });
            let time = median(times.collect());
            let work = (2 * m * heads * CONTEXT * e) as f64;
            let limit = (bytes as f64 / rate).max(work / peak);
            line += &format!("  {m}: {:.3} ({:.2})", time * 1e3, time / limit);
        }
        println!("{line}");
    }
}

/// A kernel that works on `bytes` bytes row by row.
fn row_by_row(title: &str, bytes: usize, mut body: impl FnMut()) {
    if !asked_for(title) {
        return;
    }
    let (from, mut to) = (vec![1u8; bytes / 2], vec![0u8; bytes / 2]);
    let (mut times, mut copies) = (Vec::new(), Vec::new());
    for _ in 0..REPEATS {
        times.push(seconds(&mut body));
        copies.push(seconds(|| {
            black_box(&mut to).copy_from_slice(black_box(&from))
        }));
    }
    let (time, copy) = (median(times), median(copies));
    println!("{title:<34}  {:.4} ({:.2})", time * 1e3, time / copy);
}

fn of_rows() {
    let (m, h, ffn, vocab) = (8, 2048, 5632, 49152);
    let (mut x, y, w) = (values(m * h), vec![1e-6; m * h], vec![1.0; h]);
    let mut out = vec![0.0; m * h];
    row_by_row("residual and norm, 8 x 2048", m * h * 16, || {
        add_rms_norm(&mut x, &y, &w, 1e-5, &mut out);
    });
    let (gate_up, mut inner) = (values(m * 2 * ffn), vec![0.0; m * ffn]);
    row_by_row("SwiGLU, 8 x 5632", m * ffn * 12, || {
        swiglu(&gate_up, ffn, &mut inner)
    });
    let (mut heads, cos, sin) = (values(36 * 64), vec![0.6; 32], vec![0.8; 32]);
    row_by_row("RoPE, 36 heads of 64", 36 * 64 * 8, || {
        rope(&mut heads, &cos, &sin);
    });
    let table = Weight::f32(&values(1024 * h), h)
        .to_q8_0()
        .expect("whole blocks");
    row_by_row("embedding, 8 rows of Q8_0", m * h * 5, || {
        for (i, out) in out.chunks_exact_mut(h).enumerate() {
            table.row(i * 100, out);
        }
    });
    let logits = values(vocab);
    row_by_row("largest logit of 49152", vocab * 4, || {
        let _ = black_box(argmax(&logits));
    });
    row_by_row("log-probabilities, top 10 of 49152", vocab * 4, || {
        let _ = black_box(top_log_probabilities(&logits, vocab, 10));
    });
}

/// 512 rows through one layer.
fn of_prefill(pool: &Pool) {
    let m = 512;
    for (model, n, k) in [
        ("1.1B gate and up", 11264, 2048),
        ("SmolLM2 gate and up", 3072, 576),
        ("SmolLM2 down", 576, 1536),
    ] {
        let title = format!("prefill, {model}");
        if !asked_for(&title) {
            continue;
        }
        let (w, x) = (values(n * k), values(m * k));
        let wide = Weight::f32(&w, k);
        let layers = [
            (
                "q8_0",
                wide.to_q8_0().expect("whole blocks"),
                Operand::Eight,
            ),
            ("q4", wide.to_q4().expect("whole blocks"), Operand::Four),
            ("bf16", wide.to_bf16(), Operand::Bf16),
            ("f32", wide, Operand::F32),
        ]
        .map(|(form, w, operand)| (form, Linear::new(w, None), operand));
        let tensor = |values: &[f32], shape| {
            Tensor::from_slice(values, shape, &Device::Cpu).expect("tensor")
        };
        let (tw, tx) = (
            tensor(&w, (n, k)).t().expect("transpose"),
            tensor(&x, (m, k)),
        );
        let mut scratch = Scratch::default();
        let mut out = vec![0.0; m * n];
        let mut times = vec![Vec::new(); layers.len() + 1];
        let mut peaks = vec![Vec::new(); layers.len()];
        for _ in 0..9 {
            for (i, (_, layer, operand)) in layers.iter().enumerate() {
                let run = || {
                    layer
                        .forward(pool, &x, &mut scratch, &mut out)
                        .expect("forward")
                };
                times[i].push(seconds(run));
                peaks[i].push(multiply_adds(pool, *operand));
            }
            times[layers.len()].push(seconds(|| {
                black_box(tx.matmul(&tw).expect("product"));
            }));
        }
        let times: Vec<f64> = times.into_iter().map(median).collect();
        let mut line = format!("{title:<34}");
        for (i, (form, ..)) in layers.iter().enumerate() {
            let limit = (m * n * k) as f64 / best(&peaks[i]);
            line += &format!("  {form}: {:.2} ({:.2})", times[i] * 1e3, times[i] / limit);
        }
        println!(
            "{line}  candle f32, its own threads: {:.2}",
            times[layers.len()] * 1e3
        );
    }
}

fn main() {
    let pool = pool();
    println!("{} threads; time in ms (times the limit)", pool.threads());
    of_attention(&pool);
    of_rows();
    of_prefill(&pool);
}
