//! Rows of one sequence on several threads. What comes of them does not depend on how many there are.

/// Values that are worth another thread.
const WORTH: usize = 1 << 18;

/// Threads for each sequence of a batch whose sequences share the cores, for so many values of one.
pub(crate) fn threads(batch: usize, values: usize) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (cores / batch.max(1)).clamp(1, values / WORTH + 1)
}

/// Gives each of some rows, which rise, to `each` with its own `width` values of a gradient, where there is one, and scratch memory of
/// its thread; what it makes of them, in order.
pub(crate) fn by_row<F: Send, S, T: Send>(
    rows: &[usize],
    width: usize,
    gradient: Option<&mut [F]>,
    threads: usize,
    scratch: impl Fn() -> S + Sync,
    each: impl Fn(&mut S, usize, Option<&mut [F]>) -> T + Sync,
) -> Vec<T> {
    by_start(rows, width, gradient, threads, scratch, |s, row, own| {
        each(s, row, own.map(|own| &mut own[..width]))
    })
}

/// The same of parts of several rows, that begin at `starts`: each has the values from its start to that of the next.
pub(crate) fn by_start<F: Send, S, T: Send>(
    starts: &[usize],
    width: usize,
    gradient: Option<&mut [F]>,
    threads: usize,
    scratch: impl Fn() -> S + Sync,
    each: impl Fn(&mut S, usize, Option<&mut [F]>) -> T + Sync,
) -> Vec<T> {
    // Parts `first` on, whose gradients begin at row `base`.
    let run = |first: usize, count: usize, base: usize, mut own: Option<&mut [F]>| -> Vec<T> {
        let mut scratch = scratch();
        let one = |part: usize| {
            let out = own.as_deref_mut().map(|own| {
                let next = starts.get(part + 1).map(|next| (next - base) * width);
                let end = next.unwrap_or(own.len()).min(own.len());
                &mut own[(starts[part] - base) * width..end]
            });
            each(&mut scratch, part, out)
        };
        (first..first + count).map(one).collect()
    };
    let size = starts.len().div_ceil(threads.max(1)).max(1);
    if size >= starts.len() {
        return run(0, starts.len(), 0, gradient);
    }
    std::thread::scope(|scope| {
        let (mut rest, mut base) = (gradient, 0);
        let mut running = Vec::new();
        for first in (0..starts.len()).step_by(size) {
            let count = size.min(starts.len() - first);
            let (own, begins) = (rest.take(), base);
            let own = match (own, starts.get(first + count)) {
                (Some(all), Some(&next)) => {
                    let (own, behind) = all.split_at_mut((next - base) * width);
                    (rest, base) = (Some(behind), next);
                    Some(own)
                }
                (own, next) => {
                    base = next.copied().unwrap_or(base);
                    own
                }
            };
            let run = &run;
            running.push(scope.spawn(move || run(first, count, begins, own)));
        }
        let joined = running.into_iter().flat_map(|one| match one.join() {
            Ok(found) => found,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        joined.collect()
    })
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor, Var};
    use scylla_core::train::{AlignContext, Aligner, AnswerLogits};

    use super::*;
    use crate::vocabulary::tests::vocabulary;
    use crate::{
        Alm, CrossEntropy, Gold, GoldSettings, MinEd, MinEdSettings, MultiLevelOt, Projection, Uld,
        XToken, XTokenLoss, XTokenSettings,
    };

    /// Answers of `rows` tokens over a vocabulary, the same `batch` times. Every `apart`th token has the bytes of so many.
    fn answers(
        batch: usize,
        rows: usize,
        vocab: usize,
        apart: usize,
        seed: u64,
    ) -> (Var, AnswerLogits) {
        let mut state = seed;
        let mut draw = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 40) as f32 / (1u64 << 22) as f32
        };
        let one: Vec<f32> = (0..rows * vocab).map(|_| draw()).collect();
        let labels: Vec<i64> = (0..rows as i64).map(|i| (i * 37) % vocab as i64).collect();
        let logits = Var::from_vec(one.repeat(batch), (batch, rows, vocab), &Device::Cpu);
        let logits = logits.expect("logits");
        let labels = Tensor::from_vec(labels.repeat(batch), (batch, rows), &Device::Cpu);
        let offsets = |i: usize| {
            let end = |i: usize| i / apart * apart;
            (end(i), end(i + 1))
        };
        let offsets: Vec<(usize, usize)> = (0..rows - 1).map(offsets).collect();
        let said = AnswerLogits {
            logits: logits.as_tensor().clone(),
            labels: labels.expect("labels"),
            vocab,
            tokens: None,
            offsets: Some(vec![offsets; batch]),
            hidden: None,
        };
        (logits, said)
    }

    #[test]
    fn a_sequence_alone_has_all_threads_and_the_same_loss_to_the_bit() {
        let (rows, vocab) = (401, 1500);
        let names: Vec<String> = (0..vocab).map(|i| format!("{i}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let (own, other) = (vocabulary(&names), vocabulary(&names[..vocab / 2]));
        let projection =
            Projection::new(&own, &other, |bytes| vec![u32::from(bytes[0]) % 10]).expect("fits");
        let x_token = |loss| {
            let settings = XTokenSettings {
                loss,
                topk: 100,
                ..XTokenSettings::default()
            };
            XToken::new(settings, projection.clone()).expect("settings")
        };
        let gold = |hybrid| {
            let settings = GoldSettings {
                hybrid,
                ce_weight: 0.5,
                ..GoldSettings::default()
            };
            Gold::new(settings, Some((&own, &other))).expect("settings")
        };
        let mined = MinEd::new(MinEdSettings::default(), own.clone(), other.clone());
        let aligners: [Box<dyn Aligner>; 9] = [
            Box::new(CrossEntropy::default()),
            Box::new(Uld::default()),
            Box::new(MultiLevelOt::paper()),
            Box::new(mined.expect("settings")),
            Box::new(Alm::default()),
            Box::new(gold(false)),
            Box::new(gold(true)),
            Box::new(x_token(XTokenLoss::PKl)),
            Box::new(x_token(XTokenLoss::HKl)),
        ];
        for aligner in &aligners {
            let of = |batch: usize| {
                let (_, teacher) = answers(batch, rows, vocab / 2, 2, 5);
                let (_, student) = answers(batch, rows, vocab, 1, 9);
                let context = AlignContext::default();
                let loss = aligner.loss(&teacher, &student, &context).expect("a loss");
                let gradient = loss.gradient.expect("a gradient").flatten_all();
                let gradient: Vec<f32> = gradient.and_then(|g| g.to_vec1()).expect("values");
                (loss.total.to_scalar::<f32>().expect("a number"), gradient)
            };
            // As many sequences as cores or more: each has one thread.
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            let batch = cores.next_power_of_two().max(2);
            let (alone, together) = (of(1), of(batch));
            assert_eq!(alone.0, together.0);
            let same = |(a, b): (&f32, &f32)| *a == *b * batch as f32;
            assert!(alone.1.iter().zip(&together.1).all(same));
        }
    }

    #[test]
    fn each_row_gets_its_own_values_whatever_the_number_of_threads() {
        let rows = [0, 2, 3, 7, 8];
        for threads in 1..8 {
            let mut gradient = vec![0usize; 30];
            let found = by_row(
                &rows,
                3,
                Some(&mut gradient),
                threads,
                || 0,
                |seen, row, out| {
                    *seen += 1;
                    out.expect("a gradient").fill(row + 1);
                    (row, *seen > 0)
                },
            );
            assert_eq!(found, [0, 1, 2, 3, 4].map(|row| (row, true)));
            for (at, value) in gradient.chunks(3).enumerate() {
                let expected = rows.iter().position(|&r| r == at).map_or(0, |row| row + 1);
                assert_eq!(value, [expected; 3], "{threads} threads, row {at}");
            }
            let none: Vec<usize> = by_row(
                &rows,
                3,
                None::<&mut [u8]>,
                threads,
                || (),
                |(), row, out| {
                    assert!(out.is_none());
                    row
                },
            );
            assert_eq!(none, [0, 1, 2, 3, 4]);
        }
        assert!(by_row(&[], 3, None::<&mut [u8]>, 4, || (), |(), row, _| row).is_empty());
        assert_eq!(threads(1, 10), 1);
        assert_eq!(threads(usize::MAX, 1 << 30), 1);
    }
}
