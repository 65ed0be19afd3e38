//! Small changes of files that are right.

use rand::rngs::StdRng;
use rand::{Rng, RngExt};
use serde_json::{Map, Value, json};

/// Longest input.
const LONGEST: usize = 1 << 16;

/// Numbers at which things break.
const NUMBERS: [u64; 20] = [
    0,
    1,
    2,
    7,
    8,
    9,
    31,
    32,
    127,
    128,
    255,
    256,
    0x7FFF,
    0xFFFF,
    0x7FFF_FFFF,
    0x8000_0000,
    0xFFFF_FFFF,
    0x7FFF_FFFF_FFFF_FFFF,
    0x8000_0000_0000_0000,
    u64::MAX,
];

fn below(rng: &mut StdRng, n: usize) -> usize {
    rng.random_range(0..n.max(1))
}

fn one<'a, T>(rng: &mut StdRng, list: &'a [T]) -> &'a T {
    &list[below(rng, list.len())]
}

/// Changes bytes: of one of `seeds`, with pieces of the others and `words`.
pub(crate) fn bytes(rng: &mut StdRng, seeds: &[Vec<u8>], words: &[&str]) -> Vec<u8> {
    let mut out = one(rng, seeds).clone();
    // Few changes more often than many.
    for _ in 0..=below(rng, 6).min(below(rng, 6)) {
        let at = below(rng, out.len() + 1);
        let span = below(rng, 64).min(out.len() - at);
        match rng.random_range(0..10) {
            0 if at < out.len() => out[at] ^= 1 << rng.random_range(0..8),
            1 if at < out.len() => out[at] = rng.random(),
            2 => out.truncate(at),
            3 => drop(out.drain(at..at + span)),
            4 => {
                let piece = out[at..at + span].to_vec();
                let to = below(rng, out.len() + 1);
                out.splice(to..to, piece);
            }
            5 => {
                let other = one(rng, seeds);
                let from = below(rng, other.len() + 1);
                let piece = other[from..(from + span).min(other.len())].to_vec();
                out.splice(at..at + span, piece);
            }
            6 if !words.is_empty() => {
                let word = one(rng, words).as_bytes().to_vec();
                out.splice(at..at + span.min(8), word);
            }
            7 => {
                let piece: Vec<u8> = (0..span).map(|_| rng.random()).collect();
                out.splice(at..at, piece);
            }
            8 => {
                let many = out.get(at).copied().unwrap_or(b'(');
                let count = 1 << rng.random_range(0..14);
                out.splice(at..at, std::iter::repeat_n(many, count));
            }
            _ => {
                // A number where one may stand, of four or of eight bytes.
                let number = one(rng, &NUMBERS).to_le_bytes();
                let size = if rng.random() { 4 } else { 8 };
                if at + size <= out.len() {
                    out[at..at + size].copy_from_slice(&number[..size]);
                }
            }
        }
    }
    out.truncate(LONGEST);
    out
}

/// A value that may stand anywhere and fits nowhere.
fn odd(rng: &mut StdRng) -> Value {
    match rng.random_range(0..12) {
        0 => Value::Null,
        1 => json!(true),
        2 => json!([]),
        3 => json!({}),
        4 => json!(""),
        5 => json!("\u{FEFF}\u{0}é\u{1F600}"),
        6 => json!("x".repeat(1 << rng.random_range(0..12))),
        7 => json!(-1),
        8 => json!(1e308),
        9 => json!(-0.5),
        10 => {
            let mut deep = json!(0);
            for _ in 0..rng.random_range(1..100) {
                deep = json!([deep]);
            }
            deep
        }
        _ => json!(*one(rng, &NUMBERS)),
    }
}

/// Changes a JSON value at some of its places.
pub(crate) fn value(rng: &mut StdRng, from: &Value) -> Value {
    let mut out = from.clone();
    for _ in 0..=below(rng, 3).min(below(rng, 3)) {
        change(rng, &mut out, 0);
    }
    out
}

fn change(rng: &mut StdRng, at: &mut Value, depth: usize) {
    // Deeper more often than here.
    if depth < 12 && rng.random_range(0..4) > 0 {
        match at {
            Value::Array(list) if !list.is_empty() => {
                let i = below(rng, list.len());
                return change(rng, &mut list[i], depth + 1);
            }
            Value::Object(map) if !map.is_empty() => {
                let i = below(rng, map.len());
                if let Some((_, inner)) = map.iter_mut().nth(i) {
                    return change(rng, inner, depth + 1);
                }
            }
            _ => {}
        }
    }
    match at {
        Value::Array(list) if rng.random() => {
            let i = below(rng, list.len());
            match rng.random_range(0..3) {
                0 if !list.is_empty() => drop(list.remove(i)),
                1 if !list.is_empty() => list.push(list[i].clone()),
                _ => list.insert(i.min(list.len()), odd(rng)),
            }
        }
        Value::Object(map) if rng.random() => rename(rng, map),
        _ => *at = odd(rng),
    }
}

fn rename(rng: &mut StdRng, map: &mut Map<String, Value>) {
    let keys: Vec<String> = map.keys().cloned().collect();
    if keys.is_empty() {
        map.insert("x".into(), odd(rng));
        return;
    }
    let (key, other) = (one(rng, &keys).clone(), one(rng, &keys).clone());
    match rng.random_range(0..4) {
        0 => drop(map.remove(&key)),
        1 => {
            let value = map.get(&other).cloned().unwrap_or_default();
            map.insert(key, value);
        }
        2 => drop(map.insert(format!("{key}_{}", rng.next_u32() % 4), odd(rng))),
        _ => drop(map.insert(key, odd(rng))),
    }
}
