//! Small batches of answers on two vocabularies, for tests of alignment losses.

use candle_core::{DType, Device, Tensor, Var};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use scylla_core::train::{AlignContext, AlignLoss, Aligner, AnswerLogits};

/// Bytes of the student's tokens; the first, without any, ends a text.
pub const STUDENT: [&str; 8] = ["", "a", "b", "c", "ab", "bc", "d", "dab"];
/// Bytes of the teacher's.
pub const TEACHER: [&str; 10] = ["", "a", "b", "c", "abc", "cd", "d", "da", "bb", "x"];
/// Width of hidden states, the student's and the teacher's.
pub const HIDDEN: [usize; 2] = [3, 5];

/// A batch on both sides, the student's logits and hidden states as variables.
pub struct Answers {
    /// The teacher's.
    pub teacher: AnswerLogits,
    /// The student's.
    pub student: AnswerLogits,
    /// The student's logits.
    pub logits: Var,
    /// The student's hidden states.
    pub hidden: Var,
}

/// Random values from -2 to 2.
pub fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<f64> = (0..shape.iter().product())
        .map(|_| rng.random_range(-2.0..2.0))
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).expect("random values")
}

/// Labels of answers that begin at different places, `[B, S]`.
fn labels(answers: &[(usize, &[usize])], seq: usize) -> Tensor {
    let mut all = vec![-100i64; answers.len() * seq];
    for (b, (start, tokens)) in answers.iter().enumerate() {
        for (i, &token) in tokens.iter().enumerate() {
            all[b * seq + start + i] = token as i64;
        }
    }
    Tensor::from_vec(all, (answers.len(), seq), &Device::Cpu).expect("labels")
}

fn offsets(tokens: &[usize], vocabulary: &[&str]) -> Vec<(usize, usize)> {
    let mut end = 0;
    let place = |&t: &usize| {
        let start = end;
        end += vocabulary[t].len();
        (start, end)
    };
    tokens.iter().map(place).collect()
}

fn side(
    answers: &[(usize, &[usize])],
    seq: usize,
    (vocabulary, hidden): (&[&str], usize),
    seed: u64,
) -> AnswerLogits {
    let (batch, vocab) = (answers.len(), vocabulary.len());
    let tokens: Vec<i64> = (0..batch * seq).map(|i| (i * 5 % vocab) as i64).collect();
    AnswerLogits {
        logits: random(&[batch, seq, vocab], seed),
        labels: labels(answers, seq),
        vocab,
        tokens: Some(Tensor::from_vec(tokens, (batch, seq), &Device::Cpu).expect("tokens")),
        offsets: Some(
            answers
                .iter()
                .map(|(_, t)| offsets(t, vocabulary))
                .collect(),
        ),
        hidden: Some(random(&[batch, seq, hidden], seed + 1)),
    }
}

impl Answers {
    /// Two answers, `abcdab` and `ddab`, cut differently by both sides and ended by both.
    pub fn two(seed: u64) -> Self {
        let student: [(usize, &[usize]); 2] = [(2, &[4, 3, 6, 1, 2, 0]), (1, &[6, 7, 0])];
        let teacher: [(usize, &[usize]); 2] = [(1, &[4, 7, 2, 0]), (3, &[6, 7, 2, 0])];
        Self::new(
            side(&teacher, 7, (&TEACHER, HIDDEN[1]), seed),
            side(&student, 9, (&STUDENT, HIDDEN[0]), seed + 10),
        )
    }

    /// With the student's logits and hidden states made variables.
    pub fn new(teacher: AnswerLogits, student: AnswerLogits) -> Self {
        let logits = Var::from_tensor(&student.logits).expect("variable");
        let states = student
            .hidden
            .clone()
            .unwrap_or_else(|| student.logits.clone());
        let hidden = Var::from_tensor(&states).expect("variable");
        let tracked = student.hidden.is_some().then(|| hidden.as_tensor().clone());
        Self {
            student: AnswerLogits {
                logits: logits.as_tensor().clone(),
                hidden: tracked,
                ..student
            },
            teacher,
            logits,
            hidden,
        }
    }

    /// One answer of the batch alone.
    pub fn only(&self, b: usize) -> Self {
        let of = |side: &AnswerLogits| {
            let narrow = |t: &Tensor| {
                t.detach()
                    .narrow(0, b, 1)
                    .and_then(|t| t.copy())
                    .expect("one")
            };
            AnswerLogits {
                logits: narrow(&side.logits),
                labels: narrow(&side.labels),
                vocab: side.vocab,
                tokens: side.tokens.as_ref().map(narrow),
                offsets: side.offsets.as_ref().map(|o| vec![o[b].clone()]),
                hidden: side.hidden.as_ref().map(narrow),
            }
        };
        Self::new(of(&self.teacher), of(&self.student))
    }

    /// The loss; panics where there is none.
    pub fn loss(&self, aligner: &dyn Aligner) -> AlignLoss {
        let loss = aligner.loss(&self.teacher, &self.student, &AlignContext::default());
        loss.expect("a loss")
    }
}

/// The number in a scalar.
pub fn value(of: &Tensor) -> f64 {
    let wide = of.to_dtype(DType::F64).and_then(|v| v.to_scalar());
    wide.expect("a number")
}

/// All numbers of a tensor.
pub fn numbers(of: &Tensor) -> Vec<f64> {
    let flat = of.to_dtype(DType::F64).and_then(|t| t.flatten_all());
    flat.and_then(|t| t.to_vec1()).expect("numbers")
}

/// A part of a loss.
pub fn part(loss: &AlignLoss, name: &str) -> Tensor {
    let part = loss.parts.iter().find(|p| p.name == name);
    part.unwrap_or_else(|| panic!("no part {name}"))
        .value
        .clone()
}

/// The gradient with respect to a variable; zeros where nothing flows into it.
pub fn gradient(of: &Tensor, variable: &Var) -> Vec<f64> {
    let gradients = of.backward().expect("backward");
    match gradients.get(variable) {
        Some(gradient) => numbers(gradient),
        None => vec![0.0; variable.elem_count()],
    }
}
