//! Every instruction set of this processor computes what portable Rust does, and a row among others what it does alone: this
//! test runs itself again under each of them.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use candle_core::quantized::GgmlDType;
use scylla_core::kernels::{
    AttentionRow, CacheForm, InstructionSet, KvLayer, Linear, Pool, Scratch, Weight, attention,
    rms_norm, swiglu,
};

/// Names of levels, as `SCYLLA_SIMD` takes them; those that a processor lacks fall to the next lower one.
const LEVELS: [&str; 8] = [
    "portable", "avx2", "avx-vnni", "avx512", "vnni", "neon", "dotprod", "",
];

/// Where a run of this test for one level leaves its values.
const OUT: &str = "SCYLLA_LEVEL_OUT";

/// What runs programs like this one, and its arguments.
const RUNNER: &str = "SCYLLA_TEST_RUNNER";

/// Numbers like a layer's, the same everywhere.
fn values(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..count).map(|_| next() + next() + next()).collect()
}

/// Q8_0 as foreign files may have it: -128 among the weights, beside 127.
fn foreign_q8_0(n: usize, k: usize) -> Weight {
    let mut bytes = Vec::new();
    for block in 0..n * k / 32 {
        bytes.extend(half::f16::from_f32(0.01 + block as f32 * 1e-5).to_le_bytes());
        let quant = |i: usize| match (block + i) % 3 {
            0 => -128i8,
            1 => 127,
            _ => (i * 37 + block) as i8,
        };
        bytes.extend((0..32).map(|i| quant(i) as u8));
    }
    Weight::from_gguf(GgmlDType::Q8_0, &bytes, n, k).expect("Q8_0")
}

/// Q4_0 whose weights and activations are as large as they can be, all of one sign: what fills narrow sums.
fn full_q4_0(n: usize, k: usize) -> Weight {
    let mut bytes = Vec::new();
    for block in 0..n * k / 32 {
        bytes.extend(half::f16::from_f32(0.01).to_le_bytes());
        bytes.extend([[0xffu8, 0x00][block / 3 % 2]; 16]);
    }
    Weight::from_gguf(GgmlDType::Q4_0, &bytes, n, k).expect("Q4_0")
}

/// A result, and how far from it another level's may be.
type Named = (String, Vec<f32>, f32);

fn products(all: &mut Vec<Named>) {
    let pool = Pool::new(2);
    let mut scratch = Scratch::default();
    for (n, k) in [(1, 32), (17, 96), (50, 320), (33, 1056)] {
        let wide = Weight::f32(&values(n * k, 3), k);
        let forms = [
            ("bf16", wide.to_bf16()),
            ("q8_0", wide.to_q8_0().expect("blocks")),
            ("foreign q8_0", foreign_q8_0(n, k)),
            ("q4", wide.to_q4().expect("blocks")),
            ("full q4_0", full_q4_0(n, k)),
            ("f32", wide),
        ];
        for (form, weight) in forms {
            let linear = Linear::new(weight, None);
            for m in [1, 2, 3, 5, 8, 11, 16, 23] {
                let mut x = values(m * k, 5 + m as u32);
                if form.starts_with("full") {
                    let sign = |i: usize| [127.0, -127.0][i / 32 % 2];
                    x.iter_mut().enumerate().for_each(|(i, x)| *x = sign(i));
                }
                if m == 5 {
                    x[2 * k + 7] = f32::NAN;
                    x[3 * k + 9] = f32::INFINITY;
                }
                let mut out = vec![0.0; m * n];
                linear
                    .forward(&pool, &x, &mut scratch, &mut out)
                    .expect("a product");
                // A row's result does not depend on its company, to the bit.
                let mut alone = vec![0.0; n];
                for (x, out) in x.chunks_exact(k).zip(out.chunks_exact(n)) {
                    linear
                        .forward(&pool, x, &mut scratch, &mut alone)
                        .expect("a product");
                    let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || a.is_nan();
                    assert!(alone.iter().zip(out).all(same), "{form}, one of {m} rows");
                }
                let largest = out.iter().filter(|v| v.is_finite());
                let largest = largest.fold(0.0f32, |a, v| a.max(v.abs()));
                // A sum of k products, in f32, in the same order; some levels round once where others do twice.
                let near = (k as f32).sqrt() * 4.0 * f32::EPSILON * largest.max(1.0);
                all.push((format!("{form} {n} x {k}, {m} rows"), out, near));
            }
        }
    }
}

fn odd_widths(all: &mut Vec<Named>) {
    let pool = Pool::new(1);
    let mut scratch = Scratch::default();
    for (n, k) in [(5, 1), (19, 7), (40, 333)] {
        for (form, weight) in [
            ("f32", Weight::f32(&values(n * k, 1), k)),
            ("bf16", Weight::f32(&values(n * k, 1), k).to_bf16()),
        ] {
            let linear = Linear::new(weight, None);
            for m in [1, 4, 7] {
                let x = values(m * k, 2);
                let mut out = vec![0.0; m * n];
                linear
                    .forward(&pool, &x, &mut scratch, &mut out)
                    .expect("a product");
                let near = (k as f32).sqrt() * 8.0 * f32::EPSILON;
                all.push((format!("odd {form} {n} x {k}, {m} rows"), out, near));
            }
        }
    }
}

fn between(all: &mut Vec<Named>) {
    let pool = Pool::new(2);
    for (form, name) in [(CacheForm::F32, "f32"), (CacheForm::F16, "f16")] {
        let (heads, kv_heads, e, count) = (6, 2, 40, 77);
        let mut cache = KvLayer::new(form, kv_heads, e, 96);
        for position in 0..count {
            let key = values(kv_heads * e, position as u32);
            cache.write(
                position,
                &key,
                &values(kv_heads * e, 1000 + position as u32),
            );
        }
        for m in [1, 5, 13] {
            let q = values(m * heads * e, 17);
            let mut out = vec![0.0; q.len()];
            let scattered = [70, 72, 75];
            let row = |r: usize| AttentionRow {
                cache: &cache,
                first: r % 3,
                contiguous: 40 + r,
                scattered: &scattered[..r % 4],
            };
            attention(&pool, &q, m, &row, heads, &mut out);
            all.push((format!("attention {name}, {m} rows"), out, 2e-6));
        }
    }
    for h in [5, 16, 37, 576] {
        let x: Vec<f32> = values(3 * h, 9).iter().map(|v| v * 5.0).collect();
        let mut out = vec![0.0; 3 * h];
        rms_norm(&x, &values(h, 4), 1e-5, &mut out);
        all.push((format!("norm of {h}"), out, 4e-6));
        let x: Vec<f32> = values(2 * 3 * h, 9).iter().map(|v| v * 70.0).collect();
        let mut out = vec![0.0; 3 * h];
        swiglu(&x, h, &mut out);
        all.push((format!("SwiGLU of {h}"), out, 1e-3));
    }
}

fn computed() -> Vec<Named> {
    let mut all = Vec::new();
    products(&mut all);
    odd_widths(&mut all);
    between(&mut all);
    all
}

/// Runs this test alone under a level; returns its name and its values' bits.
fn under(level: &str, out: &Path) -> (String, Vec<u32>) {
    let this = std::env::current_exe().expect("this test");
    // An emulator, where these are instructions of another processor.
    let runner = std::env::var(RUNNER).unwrap_or_default();
    let mut words: Vec<&OsStr> = runner.split_ascii_whitespace().map(OsStr::new).collect();
    words.push(this.as_os_str());
    let mut command = Command::new(words[0]);
    command.args(&words[1..]);
    command.args(["--exact", "every_level_computes_what_the_portable_one_does"]);
    command.env(OUT, out).env_remove("SCYLLA_SIMD");
    if !level.is_empty() {
        command.env("SCYLLA_SIMD", level);
    }
    let done = command.output().expect("run");
    let said = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success(), "{level}: {said}");
    let text = std::fs::read_to_string(out).expect("values");
    let (name, bits) = text.split_once('\n').expect("a name");
    let bits = bits.split_ascii_whitespace();
    (
        name.into(),
        bits.map(|b| b.parse().expect("bits")).collect(),
    )
}

#[test]
fn every_level_computes_what_the_portable_one_does() {
    if let Some(out) = std::env::var_os(OUT) {
        let bits = computed().into_iter().flat_map(|(_, values, _)| values);
        let bits: Vec<String> = bits.map(|v| v.to_bits().to_string()).collect();
        let level = InstructionSet::detect();
        std::fs::write(out, format!("{level:?}\n{}", bits.join(" "))).expect("written");
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let out = dir.path().join("values");
    let (name, portable) = under("portable", &out);
    assert_eq!(name, "Portable");
    let all = computed();
    let mut seen = vec![name];
    for level in LEVELS {
        let (name, found) = under(level, &out);
        if seen.contains(&name) {
            continue;
        }
        assert_eq!(found.len(), portable.len());
        let (mut found, mut expected) = (found.into_iter(), portable.iter());
        for (title, values, near) in &all {
            for place in 0..values.len() {
                let pair = (found.next(), expected.next());
                let (Some(found), Some(&expected)) = pair else {
                    panic!("too few values");
                };
                let (found, expected) = (f32::from_bits(found), f32::from_bits(expected));
                let same = found == expected || found.is_nan() && expected.is_nan();
                assert!(
                    same || (found - expected).abs() <= near + 2e-6 * expected.abs(),
                    "{name}: {title}, value {place}: {found} for {expected}"
                );
            }
        }
        seen.push(name);
    }
    println!("levels compared: {}", seen.join(", "));
}
