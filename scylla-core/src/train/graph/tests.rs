//! Every operation: its gradient in f64 against central differences, and the kernels against f64.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::*;
use crate::kernels::Pool;
use crate::model::{AttentionInput, Biases, LayerSpec, Rope};

/// Rows and columns of an input.
type Shape = (usize, usize);
/// A loss over the inputs: what is summed up, with the tape seeded.
type Loss<'a> = &'a dyn Fn(&mut Tape, &[Value]) -> Result<f64>;

struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64 * 2.0 - 1.0
    }

    fn values(&mut self, (rows, columns): Shape) -> Vec<f64> {
        // Numbers that f32 holds, so that both precisions begin with the same.
        (0..rows * columns)
            .map(|_| f64::from(self.next() as f32))
            .collect()
    }
}

fn wide() -> Compute {
    Compute::tensors(Device::Cpu, DType::F64)
}

fn kernels(threads: usize, form: ProductForm) -> Compute {
    Compute::Kernels(Products {
        pool: Arc::new(Pool::new(threads)),
        form,
    })
}

fn matrix(on: &Compute, values: &[f64], (rows, columns): Shape) -> Matrix {
    match on {
        Compute::Kernels(_) => Matrix::host(values.iter().map(|&v| v as f32).collect(), columns),
        Compute::Tensors { device, dtype, .. } => {
            let tensor = Tensor::from_slice(values, (rows, columns), device).expect("tensor");
            Matrix::device(tensor.to_dtype(*dtype).expect("dtype")).expect("matrix")
        }
    }
}

fn numbers(m: &Matrix) -> Vec<f64> {
    match m.tensor() {
        Ok(t) => t
            .to_dtype(DType::F64)
            .and_then(|t| t.flatten_all()?.to_vec1())
            .expect("values"),
        Err(_) => m
            .values()
            .expect("values")
            .iter()
            .map(|&v| f64::from(v))
            .collect(),
    }
}

/// The loss and the gradients of all inputs.
fn run(on: &Compute, inputs: &[(Shape, Vec<f64>)], loss: Loss<'_>) -> (f64, Vec<Vec<f64>>) {
    let mut tape = Tape::new(on);
    let leaf = |(shape, values): &(Shape, Vec<f64>)| tape.leaf(matrix(on, values, *shape));
    let leaves: Vec<Value> = inputs.iter().map(leaf).collect();
    let total = loss(&mut tape, &leaves).expect("forward");
    let mut gradients = tape.backward().expect("backward");
    let of = |(leaf, (shape, _)): (&Value, &(Shape, Vec<f64>))| match gradients.take(leaf) {
        Some(grad) => {
            assert_eq!((grad.rows(), grad.columns), *shape);
            numbers(&grad)
        }
        None => vec![0.0; shape.0 * shape.1],
    };
    (total, leaves.iter().zip(inputs).map(of).collect())
}

/// Sums values up by fixed factors, and seeds the tape with them.
fn weighed(tape: &mut Tape, y: &Value) -> Result<f64> {
    let shape = (y.rows(), y.columns());
    let factors = Random(99).values(shape);
    let seed = matrix(&tape.on.clone(), &factors, shape);
    tape.seed(y, seed)?;
    Ok(numbers(&y.matrix)
        .iter()
        .zip(&factors)
        .map(|(y, f)| y * f)
        .sum())
}

fn deviation(a: &[f64], b: &[f64]) -> f64 {
    let largest = b.iter().fold(0.0f64, |m, v| m.max(v.abs())).max(1e-6);
    a.iter()
        .zip(b)
        .fold(0.0f64, |m, (a, b)| m.max((a - b).abs()))
        / largest
}

/// Holds an operation's gradient in f64 against central differences, then candle's f32 and the kernels against f64.
fn check(name: &str, shapes: &[Shape], loss: Loss<'_>) {
    // Eight bits on either side of one product, or of a few.
    check_within(name, shapes, 4e-2, loss);
}

/// The same, with what the kernels' gradients may differ by where products are of bf16, as a share of the largest.
fn check_within(name: &str, shapes: &[Shape], rounded: f64, loss: Loss<'_>) {
    let mut random = Random(7);
    let inputs: Vec<(Shape, Vec<f64>)> = shapes.iter().map(|&s| (s, random.values(s))).collect();
    let (total, gradients) = run(&wide(), &inputs, loss);
    for (i, (shape, values)) in inputs.iter().enumerate() {
        let (mut differences, mut found) = (Vec::new(), Vec::new());
        // Of many values some, the last among them.
        for at in (0..values.len()).rev().step_by(values.len().div_ceil(12)) {
            found.push(gradients[i][at]);
            let moved = |by: f64| {
                let mut inputs = inputs.clone();
                inputs[i].1[at] += by;
                run(&wide(), &inputs, loss).0
            };
            // Of fourth order, so that the step may be large enough for the digits of the sum.
            let (h, near) = (1e-3, |h: f64| moved(h) - moved(-h));
            differences.push((8.0 * near(h) - near(2.0 * h)) / (12.0 * h));
        }
        let found = deviation(&found, &differences);
        assert!(
            found < 1e-6,
            "{name}: input {i} {shape:?}: gradient off by {found}"
        );
    }
    let close = |on: &Compute, bound: f64| {
        let (single, single_gradients) = run(on, &inputs, loss);
        assert!(
            (single - total).abs() < bound * total.abs().max(1.0),
            "{name}, {}: {single} for {total}",
            on.name()
        );
        for (i, (a, b)) in single_gradients.iter().zip(&gradients).enumerate() {
            let found = deviation(a, b);
            assert!(
                found < bound,
                "{name}, {}: input {i} off by {found}",
                on.name()
            );
        }
        single_gradients
    };
    close(&Compute::tensors(Device::Cpu, DType::F32), 2e-5);
    let one = close(&kernels(1, ProductForm::F32), 2e-5);
    assert_eq!(
        one,
        close(&kernels(3, ProductForm::F32), 2e-5),
        "{name}: by the number of threads"
    );
    close(&kernels(2, ProductForm::Bf16), rounded);
}

fn spec(heads: usize, kv_heads: usize, window: Option<usize>) -> LayerSpec {
    LayerSpec {
        hidden: 6,
        ffn: 5,
        heads,
        kv_heads,
        head_dim: 4,
        eps: 1e-5,
        biases: Biases {
            o: true,
            mlp: true,
            ..Biases::QKV
        },
        qk_norm: true,
        window,
        rope: Rope::plain(100.0),
        input: AttentionInput::Normed,
    }
}

fn rows() -> PackedRows {
    PackedRows::new(2, 5, vec![0..2, 2..5, 5..9, 9..10]).expect("rows")
}

#[test]
fn products() {
    check("linear", &[(5, 7), (3, 7)], &|tape, v| {
        let y = linear(tape, &v[0], &v[1], None, None)?;
        weighed(tape, &y)
    });
    check(
        "linear with bias and residual",
        &[(9, 4), (20, 4), (1, 20), (9, 20)],
        &|tape, v| {
            let y = linear(tape, &v[0], &v[1], Some(&v[2]), Some(&v[3]))?;
            weighed(tape, &y)
        },
    );
    check(
        "a weight that is used twice",
        &[(5, 4), (4, 4)],
        &|tape, v| {
            let y = linear(tape, &v[0], &v[1], None, None)?;
            let z = linear(tape, &y, &v[1], None, Some(&y))?;
            weighed(tape, &z)
        },
    );
}

#[test]
fn norms() {
    check("rms_norm", &[(70, 6), (1, 6)], &|tape, v| {
        let y = rms_norm(tape, &v[0], &v[1], 1e-5)?;
        weighed(tape, &y)
    });
    check("rms_norm of heads", &[(3, 12), (1, 4)], &|tape, v| {
        let y = rms_norm(tape, &v[0], &v[1], 1e-2)?;
        weighed(tape, &y)
    });
}

#[test]
fn activations_and_rows_side_by_side() {
    check("swiglu", &[(3, 19), (3, 19)], &|tape, v| {
        let y = swiglu(tape, &v[0], &v[1])?;
        weighed(tape, &y)
    });
    check("columns", &[(3, 7)], &|tape, v| {
        let (a, b) = (columns(tape, &v[0], 2..5)?, columns(tape, &v[0], 4..7)?);
        let y = beside(tape, &a, &b)?;
        weighed(tape, &y)
    });
    check("beside", &[(3, 4), (3, 2)], &|tape, v| {
        let y = beside(tape, &v[0], &v[1])?;
        weighed(tape, &y)
    });
}

#[test]
fn rows_of_a_table_and_a_head_that_is_one() {
    check("embedding", &[(5, 3)], &|tape, v| {
        let y = embedding(tape, &v[0], &[4, 0, 4, 2])?;
        weighed(tape, &y)
    });
    // Half the square of each logit, whose gradient is the logit.
    let squares = |logits: &mut Matrix| Ok(numbers(logits).iter().map(|v| v * v / 2.0).sum());
    check("a loss under a head", &[(4, 3), (5, 3)], &|tape, v| {
        let head = Head::trained(&v[1]);
        let first = under_head(tape, &v[0], &head, &[1, 3], squares)?;
        Ok(first + under_head(tape, &v[0], &head, &[0, 3], squares)?)
    });
    check("a table that is the head", &[(5, 3)], &|tape, v| {
        let x = embedding(tape, &v[0], &[1, 4, 1])?;
        under_head(tape, &x, &Head::trained(&v[0]), &[0, 1, 2], squares)
    });
    let mut tape = Tape::new(&wide());
    let table = tape.leaf(matrix(&wide(), &[0.0; 6], (2, 3)));
    assert!(embedding(&mut tape, &table, &[2]).is_err());
}

#[test]
fn rotations() {
    check("rotary", &[(6, 8)], &|tape, v| {
        let positions = [0, 1, 2, 0, 7, 3];
        let angles = Angles::new(&tape.on, &Rope::plain(50.0), 4, &positions)?;
        let y = rotary(tape, &v[0], &angles)?;
        weighed(tape, &y)
    });
}

#[test]
fn attentions() {
    for (heads, kv_heads, window) in [(1, 1, None), (4, 2, None), (2, 1, Some(2))] {
        let spec = spec(heads, kv_heads, window);
        let (q, kv) = (spec.q_width(), spec.kv_width());
        for steps in 1..4 {
            let mut shapes = vec![(10, q)];
            shapes.resize(1 + 2 * steps, (10, kv));
            check(
                &format!("attention of {heads} heads, {steps} steps"),
                &shapes,
                &|tape, v| {
                    let steps: Vec<(Value, Value)> = v[1..]
                        .chunks(2)
                        .map(|s| (s[0].clone(), s[1].clone()))
                        .collect();
                    let y = attention(tape, &v[0], &steps, &rows(), &spec)?;
                    weighed(tape, &y)
                },
            );
        }
    }
}

/// Longer than a block of rows, with documents of every length.
#[test]
fn attention_over_many_rows_is_that_of_f64() {
    let spec = spec(4, 2, None);
    let rows =
        PackedRows::new(2, 400, vec![0..1, 1..130, 130..399, 399..400, 400..800]).expect("rows");
    let mut random = Random(3);
    let shapes = [
        (800, spec.q_width()),
        (800, spec.kv_width()),
        (800, spec.kv_width()),
    ];
    let inputs: Vec<(Shape, Vec<f64>)> = shapes.map(|s| (s, random.values(s))).into();
    let loss: Loss<'_> = &|tape, v| {
        let y = attention(tape, &v[0], &[(v[1].clone(), v[2].clone())], &rows, &spec)?;
        weighed(tape, &y)
    };
    let (total, gradients) = run(&wide(), &inputs, loss);
    for (form, bound) in [(ProductForm::F32, 2e-5), (ProductForm::Bf16, 4e-2)] {
        let one = run(&kernels(1, form), &inputs, loss);
        assert_eq!(one, run(&kernels(3, form), &inputs, loss));
        assert!(
            (one.0 - total).abs() < bound * total.abs().max(10.0),
            "{} {total}",
            one.0
        );
        for (a, b) in one.1.iter().zip(&gradients) {
            assert!(deviation(a, b) < bound, "{form:?} {}", deviation(a, b));
        }
    }
}

fn compared(rows: &[(usize, usize)]) -> Vec<Compared> {
    let row = |(i, &(row, goal)): (usize, &(usize, usize))| Compared {
        row,
        goal,
        weight: 0.3 + i as f64 * 0.1,
    };
    rows.iter().enumerate().map(row).collect()
}

/// The gradient is of the weighted sum, and sums are returned unweighted: one row at a time.
fn each_row(
    rows: &[(usize, usize)],
    mut loss: impl FnMut(&[Compared]) -> Result<f64>,
) -> Result<f64> {
    let mut total = 0.0;
    for row in compared(rows) {
        total += row.weight * loss(&[row])?;
    }
    Ok(total)
}

#[test]
fn losses() {
    let pairs = [(0, 1), (2, 2), (3, 0), (4, 1)];
    check(
        "cross entropy with a trained head",
        &[(5, 6), (21, 6)],
        &|tape, v| {
            let mut random = Random(11);
            let (on, states) = (tape.on.clone(), random.values((3, 4)));
            let teacher = Head::frozen(&on, matrix(&on, &random.values((21, 4)), (21, 4)))?;
            let states = matrix(&on, &states, (3, 4));
            let head = Head::trained(&v[1]);
            let teacher = Teacher::States(&states, &teacher);
            each_row(&pairs, |row| {
                Ok(cross_entropy(tape, &v[0], &head, &teacher, row)?.sum)
            })
        },
    );
    check("cross entropy with a frozen head", &[(5, 6)], &|tape, v| {
        let mut random = Random(12);
        let (on, head) = (tape.on.clone(), random.values((21, 6)));
        let head = Head::frozen(&on, matrix(&on, &head, (21, 6)))?;
        let p: Vec<f64> = random
            .values((3, 21))
            .iter()
            .map(|v| v.abs() / 21.0)
            .collect();
        let p = matrix(&on, &p, (3, 21));
        let teacher = Teacher::Probabilities(&p);
        each_row(&pairs, |row| {
            Ok(cross_entropy(tape, &v[0], &head, &teacher, row)?.sum)
        })
    });
    let none = Mix { ce: 0.0, ..Mix::CE };
    for mix in [
        Mix { kl: 1.0, ..none },
        Mix { tv: 1.0, ..none },
        Mix { lk: 1.0, ..none },
        Mix {
            ce: 0.1,
            tv: 0.9,
            lk: 0.2,
            ..none
        },
    ] {
        // Where p and q are nearly one, the slope of total variation and of LK turns with what products round.
        check_within(&format!("{mix:?}"), &[(5, 6), (21, 6)], 0.5, &|tape, v| {
            let mut random = Random(14);
            let (on, states) = (tape.on.clone(), random.values((3, 4)));
            let teacher = Head::frozen(&on, matrix(&on, &random.values((21, 4)), (21, 4)))?;
            let states = matrix(&on, &states, (3, 4));
            let head = Head::trained(&v[1]);
            let teacher = Teacher::States(&states, &teacher);
            each_row(&pairs, |row| {
                Ok(divergence(tape, &v[0], &head, &teacher, &mix, row)?.sum)
            })
        });
    }
    check("smooth_l1", &[(5, 7)], &|tape, v| {
        let on = tape.on.clone();
        // No difference lies near the kink.
        let goals: Vec<f64> = Random(13)
            .values((3, 7))
            .iter()
            .map(|v| if *v > 0.0 { v + 3.0 } else { v * 0.1 })
            .collect();
        let goals = matrix(&on, &goals, (3, 7));
        each_row(&pairs, |row| smooth_l1(tape, &v[0], &goals, row))
    });
}

#[test]
fn losses_over_many_rows_are_those_of_single_rows_and_of_f64() {
    let (m, h, v) = (600, 16, 300);
    let mut random = Random(5);
    let inputs = vec![
        ((m, h), random.values((m, h))),
        ((v, h), random.values((v, h))),
    ];
    let states = random.values((m, h));
    let rows: Vec<Compared> = (0..m)
        .filter(|r| r % 3 != 1)
        .map(|row| Compared {
            row,
            goal: m - 1 - row,
            weight: 0.01,
        })
        .collect();
    let loss: Loss<'_> = &|tape, leaves| {
        let on = tape.on.clone();
        let head = Head::frozen(&on, matrix(&on, &inputs[1].1, (v, h)))?;
        let states = matrix(&on, &states, (m, h));
        let teacher = Teacher::States(&states, &head);
        Ok(cross_entropy(
            tape,
            &leaves[0],
            &Head::trained(&leaves[1]),
            &teacher,
            &rows,
        )?
        .sum)
    };
    let (total, gradients) = run(&wide(), &inputs, loss);
    for on in [
        Compute::tensors(Device::Cpu, DType::F32),
        kernels(2, ProductForm::F32),
    ] {
        let (found, of) = run(&on, &inputs, loss);
        assert!((found - total).abs() < 1e-5 * total, "{found} {total}");
        assert!(
            of.iter()
                .zip(&gradients)
                .all(|(a, b)| deviation(a, b) < 2e-5)
        );
    }
}

#[test]
fn a_teachers_rows_are_the_softmax_among_the_listed() {
    let mut random = Random(21);
    let (states, weight) = (random.values((300, 8)), random.values((40, 8)));
    let listed = [3, 4, 39];
    let of = |on: &Compute| {
        let head = Head::frozen(on, matrix(on, &weight, (40, 8))).expect("head");
        probabilities(on, &matrix(on, &states, (300, 8)), &head, &listed).expect("rows")
    };
    let (best, p) = of(&wide());
    let (single, q) = of(&kernels(2, ProductForm::F32));
    assert_eq!(best, single);
    let (p, q) = (numbers(&p), numbers(&q));
    assert!(deviation(&q, &p) < 1e-5);
    assert!(
        p.chunks(3)
            .all(|row| (row.iter().sum::<f64>() - 1.0).abs() < 1e-12)
    );
    let logit =
        |r: usize, c: usize| -> f64 { (0..8).map(|i| states[r * 8 + i] * weight[c * 8 + i]).sum() };
    for r in [0, 255, 256, 299] {
        assert!((p[r * 3] / p[r * 3 + 1] - (logit(r, 3) - logit(r, 4)).exp()).abs() < 1e-9);
        assert!((0..40).all(|c| logit(r, c) <= logit(r, best[r] as usize)));
    }
}

/// A whole layer with every part that a spec may have, three steps of it.
#[test]
fn layers() {
    let spec = LayerSpec {
        input: AttentionInput::Beside(8),
        ..spec(4, 2, Some(3))
    };
    let second = LayerSpec {
        input: AttentionInput::Normed,
        ..spec.clone()
    };
    let layers = vec![("a".to_string(), spec), ("b".to_string(), second)];
    let tensors: Vec<(String, Vec<usize>)> =
        layers.iter().flat_map(|(p, s)| s.tensors(p)).collect();
    let mut shapes: Vec<Shape> = vec![(10, 6), (10, 8)];
    shapes.extend(tensors.iter().map(|(_, s)| match s[..] {
        [n, k] => (n, k),
        _ => (1, s[0]),
    }));
    let stack = GraphStack::new(layers).expect("stack");
    // Six layers deep, roundings add up: what is left to see is that nothing is wrong in kind.
    check_within("layers over three steps", &shapes, 0.3, &|tape, v| {
        let mut parameters = Parameters::default();
        for ((name, _), leaf) in tensors.iter().zip(&v[2..]) {
            parameters.set(name, leaf.clone());
        }
        let mut cache = StepCache::default();
        let mut x = v[0].clone();
        for _ in 0..3 {
            x = stack.forward(tape, &mut parameters, &rows(), &mut cache, &x, Some(&v[1]))?;
        }
        weighed(tape, &x)
    });
}
