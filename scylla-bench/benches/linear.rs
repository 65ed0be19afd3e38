//! Linear layers of m rows beside their limit, `max(bytes / bandwidth, multiply-adds / peak)`, peaks measured in the same
//! run and interleaved with the layers: bandwidth by reading memory, multiply-adds (of f32, of bf16, or of
//! weights of eight and of four bits with bytes) on registers alone. Each product reads another copy of its weight, so that weights come from memory.
//!
//! `cargo bench --bench linear [-- WORDS]` runs the lines that hold all the words; `SCYLLA_THREADS` sets the threads. Medians, not criterion's estimates: a layer takes
//! tens of microseconds, and what counts is its ratio to a limit that drifts with the machine.

mod common;

use common::{asked_for, best, median, memory, pool, read_rate, seconds};
use scylla_core::kernels::{Linear, Operand, Scratch, Weight, multiply_adds};

type Reform = fn(Weight) -> Weight;

fn main() {
    let pool = pool();
    let data = memory();
    let forms: [(&str, Operand, Reform); 4] = [
        ("q8_0", Operand::Eight, |w| {
            w.to_q8_0().expect("whole blocks")
        }),
        ("q4", Operand::Four, |w| w.to_q4().expect("whole blocks")),
        ("bf16", Operand::Bf16, |w| w.to_bf16()),
        ("f32", Operand::F32, |w| w),
    ];
    println!("{} threads; time in ms (times the limit)", pool.threads());
    for (model, n, k) in [
        ("1.1B qkv", 2560, 2048),
        ("1.1B gate and up", 11264, 2048),
        ("1.1B down", 2048, 5632),
        ("SmolLM2 gate and up", 3072, 576),
        ("SmolLM2 down", 576, 1536),
        ("SmolLM2 head", 49152, 576),
        ("Qwen2.5-0.5B gate and up", 9728, 896),
    ] {
        let values: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.73).sin()).collect();
        let all: Vec<u32> = (0..n as u32).collect();
        for (form, operand, reform) in forms {
            let title = format!("{model:<25}{n:>6} x {k:<5}{form:<5}");
            if !asked_for(&title) {
                continue;
            }
            let weight = reform(Weight::f32(&values, k));
            let bytes = weight.bytes();
            let copies = (192usize << 20).div_ceil(bytes).clamp(3, 64);
            let layers: Vec<Linear> = (0..copies)
                .map(|_| Linear::new(weight.rows(&all), None).settled())
                .collect();
            let mut scratch = Scratch::default();
            let x: Vec<f32> = (0..32 * k).map(|i| (i as f32 * 0.37).cos()).collect();
            let mut out = vec![0.0; 32 * n];
            let mut peaks = Vec::new();
            let mut rates = Vec::new();
            let mut line = title;
            for m in [1, 2, 4, 8, 16, 32] {
                rates.push(read_rate(&pool, &data));
                peaks.push(multiply_adds(&pool, operand));
                let times = layers.iter().map(|layer| {
                    let (x, out) = (&x[..m * k], &mut out[..m * n]);
                    seconds(|| layer.forward(&pool, x, &mut scratch, out).expect("forward"))
                });
                let time = median(times.collect());
                let limit = (bytes as f64 / best(&rates)).max((m * n * k) as f64 / best(&peaks));
                line.push_str(&format!("  {m}: {:.3} ({:.2})", time * 1e3, time / limit));
            }
            let (rate, peak) = (best(&rates), best(&peaks));
            println!("{line}  [{:.0} GB/s, {:.0} G/s]", rate / 1e9, peak / 1e9);
        }
    }
}
