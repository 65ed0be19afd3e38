//! Laws of the alignment losses, and their gradients against differences.

use candle_core::{DType, Device, Tensor, Var};
use multilevel_ot::{
    Alm, Dskd, DskdSettings, Gold, GoldSettings, Matching, MinEd, MinEdSettings, Mode,
    MultiLevelOt, Projection, SinkhornForm, Space, Uld, Vocabulary, XToken, XTokenLoss,
    XTokenSettings,
};
use proptest::prelude::*;
use scylla_core::train::{AlignContext, Aligner, AnswerLogits};
use scylla_tests::answers::{
    Answers, HIDDEN, STUDENT, TEACHER, gradient, numbers, part, random, value,
};

fn vocabulary(tokens: &[&str]) -> Vocabulary {
    Vocabulary {
        bytes: tokens.iter().map(|t| t.as_bytes().to_vec()).collect(),
        ends: vec![0],
    }
}

fn projection() -> Projection {
    let to = vocabulary(&TEACHER);
    let single = |byte: &u8| {
        to.bytes
            .iter()
            .position(|b| b == &[*byte])
            .map(|id| id as u32)
    };
    let pieces = |bytes: &[u8]| bytes.iter().filter_map(single).collect();
    Projection::new(&vocabulary(&STUDENT), &to, pieces).expect("a projection")
}

fn paper(k: usize) -> MultiLevelOt {
    MultiLevelOt {
        k,
        candidates: 6,
        ..MultiLevelOt::paper()
    }
}

fn gold(settings: GoldSettings) -> Gold {
    let vocabularies = (vocabulary(&STUDENT), vocabulary(&TEACHER));
    Gold::new(settings, Some((&vocabularies.0, &vocabularies.1))).expect("settings")
}

fn dskd() -> Dskd {
    let space = |tokens: &[&str], hidden, seed| Space {
        head: random(&[tokens.len(), hidden], seed),
        embeddings: random(&[tokens.len(), hidden], seed + 1),
    };
    let (student, teacher) = (
        space(&STUDENT, HIDDEN[0], 70),
        space(&TEACHER, HIDDEN[1], 80),
    );
    Dskd::new(DskdSettings::default(), student, teacher).expect("settings")
}

/// Every aligner in every form that has formulas of its own.
fn all() -> Vec<(String, Box<dyn Aligner>)> {
    let mut all: Vec<(String, Box<dyn Aligner>)> = Vec::new();
    let mut add = |name: &str, aligner: Box<dyn Aligner>| all.push((name.into(), aligner));
    add("rank", Box::new(paper(4)));
    let hot = MultiLevelOt {
        student_temperature: 1.7,
        teacher_temperature: 0.6,
        sd_temperature: 3.0,
        ..paper(4)
    };
    add("rank at other temperatures", Box::new(hot));
    let assigned = MultiLevelOt {
        matching: Matching::Assignment,
        ..paper(4)
    };
    add("assignment", Box::new(assigned));
    let shorter = MultiLevelOt {
        skip_student_eos: true,
        skip_teacher_eos: true,
        ..paper(4)
    };
    add("rank, without ends", Box::new(shorter));
    let shorter = Uld {
        skip_student_eos: true,
        ..Uld::default()
    };
    add("uld, without end", Box::new(shorter));
    for sinkhorn in [SinkhornForm::Converged, SinkhornForm::Exact] {
        let form = MultiLevelOt {
            sinkhorn,
            ..paper(4)
        };
        add(&format!("{sinkhorn:?}"), Box::new(form));
    }
    let small = MultiLevelOt {
        epsilon: 2e-3,
        ..paper(4)
    };
    add("log domain", Box::new(small));
    let code = MultiLevelOt {
        k: 4,
        skip_student_eos: true,
        ..MultiLevelOt::reference_code()
    };
    add("reference-code", Box::new(code));
    let padded = MultiLevelOt {
        k: 9,
        ..MultiLevelOt::reference_code()
    };
    add("reference-code beyond the vocabulary", Box::new(padded));
    add("uld", Box::<Uld>::default());
    let uld = Uld {
        mode: Mode::ReferenceCode,
        student_temperature: 1.5,
        skip_teacher_eos: true,
        ..Uld::default()
    };
    add("uld, reference-code", Box::new(uld));
    let alm = Alm {
        temperature: 3.0,
        ..Alm::default()
    };
    add("alm", Box::new(alm));
    add("alm at its own temperature", Box::<Alm>::default());
    let own = GoldSettings {
        ce_weight: 0.5,
        student_temperature: 1.3,
        ..GoldSettings::default()
    };
    add("gold", Box::new(gold(own.clone())));
    for beta in [0.0, 0.5, 1.0] {
        let hybrid = GoldSettings {
            hybrid: true,
            beta,
            ..own.clone()
        };
        add(&format!("gold, hybrid at {beta}"), Box::new(gold(hybrid)));
    }
    for loss in [XTokenLoss::PKl, XTokenLoss::HKl] {
        let settings = XTokenSettings {
            loss,
            temperature: 1.4,
            topk: 7,
            ..XTokenSettings::default()
        };
        let aligner = XToken::new(settings, projection()).expect("settings");
        add(&format!("x-token {loss:?}"), Box::new(aligner));
    }
    let mined = MinEdSettings {
        temperature: 1.6,
        k: 4,
        ..MinEdSettings::default()
    };
    let mined = MinEd::new(mined, vocabulary(&STUDENT), vocabulary(&TEACHER));
    add("mined", Box::new(mined.expect("settings")));
    add("dskd", Box::new(dskd()));
    all
}

/// Central differences of fourth order of the parts and the total, `[variable's values][parts]`.
fn differences(answers: &Answers, aligner: &dyn Aligner, variable: &Var) -> Vec<Vec<f64>> {
    let original = variable.as_tensor().copy().expect("copy");
    let at = |i: usize, step: f64| -> Vec<f64> {
        let mut moved = numbers(&original);
        moved[i] += step;
        let moved = Tensor::from_vec(moved, original.shape(), &Device::Cpu).expect("moved");
        variable.set(&moved).expect("set");
        let loss = answers.loss(aligner);
        let parts = loss.parts.iter().map(|p| value(&p.value));
        parts.chain([value(&loss.total)]).collect()
    };
    let h = 2e-4;
    let found = (0..original.elem_count()).map(|i| {
        let [a, b, c, d] = [at(i, h), at(i, -h), at(i, 2.0 * h), at(i, -2.0 * h)];
        (0..a.len())
            .map(|p| (8.0 * (a[p] - b[p]) - (c[p] - d[p])) / (12.0 * h))
            .collect()
    });
    let found = found.collect();
    variable.set(&original).expect("set");
    found
}

/// Of all parts; nothing flows into the variable from `detached` ones, which are targets there.
fn check_gradients(
    name: &str,
    answers: &Answers,
    aligner: &dyn Aligner,
    variable: &Var,
    detached: &[&str],
) {
    let mut expected = differences(answers, aligner, variable);
    let loss = answers.loss(aligner);
    for (at, part) in loss
        .parts
        .iter()
        .enumerate()
        .filter(|(_, p)| detached.contains(&p.name))
    {
        for of_value in &mut expected {
            let total = of_value.len() - 1;
            of_value[total] -= part.weight * of_value[at];
            of_value[at] = 0.0;
        }
    }
    let parts = loss.parts.iter().map(|p| (p.name, &p.value));
    for (at, (part, value)) in parts.chain([("total", &loss.total)]).enumerate() {
        let found = gradient(value, variable);
        let largest = expected.iter().fold(0.0f64, |m, e| m.max(e[at].abs()));
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let off = (found - expected[at]).abs();
            assert!(
                off <= 1e-6 * largest + 1e-11,
                "{name}, {part}, value {i}: {found} instead of {} (largest {largest})",
                expected[at]
            );
        }
        if largest > 0.0 && part == "total" && aligner.parameters().is_empty() {
            let known = loss.gradient.as_ref().expect("a gradient beside the loss");
            assert_eq!(numbers(known), found, "{name}");
        }
    }
}

#[test]
fn the_gradient_of_every_part_of_every_aligner_agrees_with_differences() {
    for (name, aligner) in all() {
        for seed in [1, 2] {
            let answers = Answers::two(seed);
            check_gradients(&name, &answers, aligner.as_ref(), &answers.logits, &[]);
        }
    }
}

#[test]
fn gradients_of_dskd_reach_the_hidden_states_and_the_projectors() {
    let (answers, aligner) = (Answers::two(3), dskd());
    assert_eq!(aligner.parameters().len(), 6);
    check_gradients("hidden states", &answers, &aligner, &answers.hidden, &[]);
    for (_, parameter) in aligner.parameters() {
        check_gradients("projector", &answers, &aligner, &parameter, &["t2s_kd"]);
    }
}

#[test]
fn the_total_is_the_weighted_sum_of_the_parts() {
    for (name, aligner) in all() {
        let loss = Answers::two(4).loss(aligner.as_ref());
        let sum: f64 = loss.parts.iter().map(|p| p.weight * value(&p.value)).sum();
        assert!((sum - value(&loss.total)).abs() < 1e-12, "{name}");
    }
}

/// What the released code ranks and averages over the batch is not a mean of sequences' losses.
fn by_sequence(name: &str) -> bool {
    !name.contains("reference-code")
}

#[test]
fn the_loss_of_a_batch_is_the_mean_of_its_sequences_losses() {
    for (name, aligner) in all().into_iter().filter(|(n, _)| by_sequence(n)) {
        let both = Answers::two(5);
        let total = |a: &Answers| value(&a.loss(aligner.as_ref()).total);
        let mean = (total(&both.only(0)) + total(&both.only(1))) / 2.0;
        assert!((total(&both) - mean).abs() < 1e-12, "{name}");
    }
}

#[test]
fn nothing_flows_outside_the_answer_nor_into_the_teacher() {
    for (name, aligner) in all() {
        let answers = Answers::two(6);
        let teacher = Var::from_tensor(&answers.teacher.logits).expect("variable");
        let tracked = AnswerLogits {
            logits: teacher.as_tensor().clone(),
            ..answers.teacher.clone()
        };
        let loss = aligner.loss(&tracked, &answers.student, &AlignContext::default());
        let gradients = loss.expect("a loss").total.backward().expect("backward");
        let into_teacher = gradients.get(&teacher).map(numbers).unwrap_or_default();
        assert!(into_teacher.iter().all(|&g| g == 0.0), "{name}");
        let own = numbers(gradients.get(&answers.logits).expect("of the student"));
        // Rows that predict answers: of the first 1 to 6, of the second 0 to 2.
        let answer = |b: usize, s: usize| if b == 0 { (1..7).contains(&s) } else { s < 3 };
        for (row, values) in own.chunks_exact(STUDENT.len()).enumerate() {
            let zero = values.iter().all(|&g| g == 0.0);
            assert_eq!(zero, !answer(row / 9, row % 9), "{name}, row {row}");
        }
    }
}

/// Columns of the logits, labels and tokens under new ids.
fn renamed(side: &AnswerLogits, to: &[usize]) -> AnswerLogits {
    let mut from = vec![0u32; to.len()];
    to.iter()
        .enumerate()
        .for_each(|(old, &new)| from[new] = old as u32);
    let columns = Tensor::new(from, &Device::Cpu).expect("ids");
    let labels: Vec<i64> = side
        .labels
        .flatten_all()
        .and_then(|l| l.to_vec1())
        .expect("labels");
    let new = labels
        .iter()
        .map(|&l| if l < 0 { l } else { to[l as usize] as i64 });
    AnswerLogits {
        logits: side
            .logits
            .detach()
            .index_select(&columns, 2)
            .expect("columns"),
        labels: Tensor::from_vec(new.collect::<Vec<_>>(), side.labels.shape(), &Device::Cpu)
            .expect("labels"),
        ..side.clone()
    }
}

#[test]
fn names_of_tokens_do_not_matter() {
    let answers = Answers::two(7);
    let other = Answers::new(
        renamed(&answers.teacher, &[3, 8, 0, 5, 9, 1, 2, 7, 6, 4]),
        renamed(&answers.student, &[7, 2, 5, 0, 1, 6, 4, 3]),
    );
    // Those that know tokens by their bytes are given other vocabularies with other names.
    let blind = ["gold", "x-token", "mined", "dskd"];
    for (name, aligner) in all() {
        if blind.iter().any(|b| name.starts_with(b)) && name != "gold" {
            continue;
        }
        let off = value(&answers.loss(aligner.as_ref()).total)
            - value(&other.loss(aligner.as_ref()).total);
        assert!(off.abs() < 1e-12, "{name}: {off}");
    }
}

/// One answer of `tokens` tokens on logits of both sides.
fn plain(teacher: Tensor, student: Tensor) -> Answers {
    let side = |logits: Tensor| {
        let (batch, seq, vocab) = logits.dims3().expect("[B, S, V]");
        let mut labels = vec![1i64; batch * seq];
        labels.iter_mut().step_by(seq).for_each(|l| *l = -100);
        AnswerLogits {
            labels: Tensor::from_vec(labels, (batch, seq), &Device::Cpu).expect("labels"),
            logits,
            vocab,
            tokens: None,
            offsets: Some(vec![(0..seq - 1).map(|i| (i, i + 1)).collect(); batch]),
            hidden: None,
        }
    };
    Answers::new(side(teacher), side(student))
}

#[test]
fn equal_logits_are_no_distance_apart_to_the_bit() {
    for dtype in [DType::F32, DType::F64] {
        let logits = random(&[2, 6, 40], 11).to_dtype(dtype).expect("narrowed");
        let answers = plain(logits.clone(), logits);
        for hot in [0.5, 1.0, 2.0, 3.0] {
            let multilevel = MultiLevelOt {
                student_temperature: hot,
                teacher_temperature: hot,
                ..paper(5)
            };
            let uld = Uld {
                student_temperature: hot,
                teacher_temperature: hot,
                ..Uld::default()
            };
            assert_eq!(value(&part(&answers.loss(&multilevel), "had")), 0.0);
            assert_eq!(value(&part(&answers.loss(&uld), "uld")), 0.0);
        }
        let gold = Gold::new(GoldSettings::default(), None).expect("settings");
        assert_eq!(value(&part(&answers.loss(&gold), "uld")), 0.0);
    }
}

#[test]
fn uniform_distributions_are_as_far_apart_as_their_sizes() {
    for (n, m) in [(3usize, 5usize), (8, 2), (4, 4), (2, 50)] {
        let flat = |v| Tensor::zeros((1, 4, v), DType::F64, &Device::Cpu).expect("zeros");
        let loss = plain(flat(n), flat(m)).loss(&Uld::default());
        let expected = 2.0 * (1.0 - n.min(m) as f64 / n.max(m) as f64);
        assert!((value(&part(&loss, "uld")) - expected).abs() < 1e-12);
    }
}

#[test]
fn gold_is_uld_on_text_that_both_cut_alike() {
    let answers = plain(random(&[1, 6, 9], 21), random(&[1, 6, 7], 22));
    let gold = Gold::new(GoldSettings::default(), None).expect("settings");
    let (gold, uld) = (answers.loss(&gold), answers.loss(&Uld::default()));
    let of = |loss| value(&part(loss, "uld"));
    assert!((of(&gold) - of(&uld)).abs() < 1e-14);
}

/// The least HAD of all one-to-one matchings, by trying them.
fn least(p: &[Vec<f64>], q: &[Vec<f64>], i: usize, used: u32) -> f64 {
    let vocab = p[0].len();
    if i == vocab {
        return 0.0;
    }
    let cost = |j: usize| -> f64 { p.iter().zip(q).map(|(p, q)| (p[i] - q[j]).abs()).sum() };
    let free = (0..vocab).filter(|j| used & (1 << j) == 0);
    free.map(|j| cost(j) + least(p, q, i + 1, used | (1 << j)))
        .fold(f64::INFINITY, f64::min)
}

fn softmaxes(logits: &Tensor) -> Vec<Vec<f64>> {
    let (_, seq, vocab) = logits.dims3().expect("[1, S, V]");
    let rows = numbers(logits);
    let softmax = |x: &[f64]| {
        let total: f64 = x.iter().map(|x| x.exp()).sum();
        x.iter().map(|x| x.exp() / total).collect()
    };
    rows.chunks_exact(vocab)
        .take(seq - 1)
        .map(softmax)
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn on_one_token_and_all_of_the_vocabulary_had_is_uld(vocab in 2usize..20, seed in any::<u64>()) {
        let answers = plain(random(&[1, 2, vocab], seed), random(&[1, 2, vocab], seed ^ 1));
        let had = value(&part(&answers.loss(&paper(vocab)), "had"));
        let uld = value(&part(&answers.loss(&Uld::default()), "uld"));
        prop_assert!((had - uld).abs() < 1e-12);
    }

    #[test]
    fn had_is_at_most_two_a_token_and_sd_is_not_negative(vocab in 5usize..30, tokens in 1usize..8, more in 0usize..4, seed in any::<u64>()) {
        let answers = plain(random(&[1, tokens + more + 1, vocab], seed), random(&[1, tokens + 1, vocab + 3], seed ^ 1));
        for matching in [Matching::Rank, Matching::Assignment] {
            let loss = answers.loss(&MultiLevelOt { matching, ..paper(5) });
            let had = value(&part(&loss, "had"));
            prop_assert!((0.0..=2.0 * tokens as f64).contains(&had), "{had}");
            prop_assert!(value(&part(&loss, "sd")) >= 0.0);
        }
    }

    #[test]
    fn the_assignment_is_the_least_had_of_all_matchings(vocab in 2usize..8, tokens in 1usize..5, seed in any::<u64>()) {
        let answers = plain(random(&[1, tokens + 1, vocab], seed), random(&[1, tokens + 1, vocab], seed ^ 1));
        let assigned = MultiLevelOt { matching: Matching::Assignment, candidates: vocab, ..paper(vocab) };
        let loss = answers.loss(&assigned);
        let found = value(&part(&loss, "had"));
        let best = least(&softmaxes(&answers.teacher.logits), &softmaxes(answers.logits.as_tensor()), 0, 0);
        prop_assert!((found - best).abs() < 1e-9, "{found} {best}");
        let ranked = value(&part(&answers.loss(&paper(vocab)), "had"));
        prop_assert!(found <= ranked + 1e-9);
        prop_assert_eq!(&loss.notes, &[("assignment_gap", 0.0)]);
    }

    #[test]
    fn fewer_candidates_lose_no_more_than_the_gap(seed in any::<u64>(), candidates in 3usize..30) {
        let answers = plain(random(&[1, 5, 40], seed), random(&[1, 5, 30], seed ^ 1));
        let of = |candidates| {
            let aligner = MultiLevelOt { matching: Matching::Assignment, candidates, ..paper(3) };
            let loss = answers.loss(&aligner);
            (value(&part(&loss, "had")), loss.notes[0].1)
        };
        let ((few, gap), (best, none)) = (of(candidates), of(30));
        prop_assert!(best <= few + 1e-9 && few - best <= gap + 1e-9, "{few} {best} {gap}");
        prop_assert_eq!(none, 0.0);
    }
}

#[test]
fn columns_of_a_padded_vocabulary_take_no_part() {
    let answers = Answers::two(8);
    let padded = |side: &AnswerLogits| {
        let (batch, seq, _) = side.logits.dims3().expect("[B, S, V]");
        // The largest logits of all.
        let more = Tensor::full(50f64, (batch, seq, 3), &Device::Cpu).expect("columns");
        AnswerLogits {
            logits: Tensor::cat(&[&side.logits.detach(), &more], 2).expect("padded"),
            ..side.clone()
        }
    };
    let wide = Answers::new(padded(&answers.teacher), padded(&answers.student));
    for (name, aligner) in all() {
        let (loss, other) = (answers.loss(aligner.as_ref()), wide.loss(aligner.as_ref()));
        assert!(
            (value(&loss.total) - value(&other.total)).abs() < 1e-12,
            "{name}"
        );
        let (own, other) = (
            gradient(&loss.total, &answers.logits),
            gradient(&other.total, &wide.logits),
        );
        for (own, other) in own.chunks_exact(8).zip(other.chunks_exact(11)) {
            assert!(
                own.iter().zip(other).all(|(a, b)| (a - b).abs() < 1e-12),
                "{name}"
            );
            assert_eq!(other[8..], [0.0; 3], "{name}");
        }
    }
}

/// Labels of one sequence all ignored.
fn silenced(side: &AnswerLogits, b: usize) -> AnswerLogits {
    let (batch, seq) = side.labels.dims2().expect("[B, S]");
    let mut labels: Vec<i64> = side
        .labels
        .flatten_all()
        .and_then(|l| l.to_vec1())
        .expect("labels");
    labels[b * seq..(b + 1) * seq].fill(-100);
    let mut offsets = side.offsets.clone().expect("offsets");
    offsets[b].clear();
    AnswerLogits {
        labels: Tensor::from_vec(labels, (batch, seq), &Device::Cpu).expect("labels"),
        offsets: Some(offsets),
        ..side.clone()
    }
}

#[test]
fn an_empty_answer_adds_nothing_and_a_batch_of_them_is_refused() {
    let answers = Answers::two(9);
    let half = Answers::new(silenced(&answers.teacher, 1), silenced(&answers.student, 1));
    let none = silenced(&half.student, 0);
    for (name, aligner) in all() {
        let loss = half.loss(aligner.as_ref());
        assert!(value(&loss.total).is_finite(), "{name}");
        if by_sequence(&name) {
            let alone = value(&answers.only(0).loss(aligner.as_ref()).total);
            assert!((value(&loss.total) - alone / 2.0).abs() < 1e-12, "{name}");
        }
        let refused = aligner.loss(&answers.teacher, &none, &AlignContext::default());
        let error = refused.expect_err("refused").to_string();
        assert!(error.contains("no answer to learn from"), "{name}: {error}");
        // A teacher that wrote nothing leaves the cross entropy.
        let silent = Answers::new(silenced(&answers.teacher, 1), answers.student.clone());
        assert!(
            value(&silent.loss(aligner.as_ref()).total).is_finite(),
            "{name}"
        );
    }
}

#[test]
fn bad_input_is_refused_by_name() {
    let answers = Answers::two(10);
    let with = |logits: f64, at: usize, student: bool| {
        let side = if student {
            &answers.student
        } else {
            &answers.teacher
        };
        let mut values = numbers(&side.logits);
        values[at] = logits;
        let bad = AnswerLogits {
            logits: Tensor::from_vec(values, side.logits.shape(), &Device::Cpu).expect("logits"),
            ..side.clone()
        };
        match student {
            true => (answers.teacher.clone(), bad),
            false => (bad, answers.student.clone()),
        }
    };
    let refused = |name: &str,
                   aligner: &dyn Aligner,
                   (teacher, student): (AnswerLogits, AnswerLogits),
                   what: &str| {
        match aligner.loss(&teacher, &student, &AlignContext::default()) {
            Ok(loss) => panic!("{name}: {what}: a loss of {}", value(&loss.total)),
            Err(e) => assert!(e.to_string().contains(what), "{name}: {e}"),
        }
    };
    let relabelled = |label: i64| AnswerLogits {
        labels: answers
            .student
            .labels
            .ones_like()
            .and_then(|l| l.affine(label as f64, 0.0))
            .expect("labels"),
        ..answers.student.clone()
    };
    let short = AnswerLogits {
        labels: answers.student.labels.narrow(1, 0, 5).expect("fewer"),
        ..answers.student.clone()
    };
    for (name, aligner) in all() {
        let refused = |case, what: &str| refused(&name, aligner.as_ref(), case, what);
        // Row 2 of the first answer on either side.
        for bad in [f64::NAN, f64::INFINITY] {
            refused(with(bad, 2 * 8 + 3, true), "NaN");
            refused(with(bad, 2 * 10 + 3, false), "NaN");
        }
        refused((answers.teacher.clone(), relabelled(8)), "8");
        refused((answers.teacher.clone(), relabelled(-1)), "-1");
        refused((answers.teacher.clone(), short.clone()), "[2, 5]");
        refused((answers.only(0).teacher, answers.student.clone()), "texts");
    }
    let settings = |change: fn(&mut MultiLevelOt)| {
        let mut settings = paper(4);
        change(&mut settings);
        settings
    };
    let fine = || (answers.teacher.clone(), answers.student.clone());
    type Change = fn(&mut MultiLevelOt);
    let cases: [(Change, &str); 6] = [
        (|s| s.k = 9, "8 tokens of the smaller vocabulary"),
        (|s| s.k = 0, "k must be at least 1"),
        (|s| s.epsilon = 0.0, "epsilon 0"),
        (|s| s.student_temperature = -1.0, "student_temperature -1"),
        (|s| s.alpha = f64::NAN, "alpha NaN"),
        (
            |s| {
                s.matching = Matching::Assignment;
                s.candidates = 3;
            },
            "3 candidates",
        ),
    ];
    for (change, what) in cases {
        refused("settings", &settings(change), fine(), what);
    }
    let weightless = Uld {
        distillation_weight: f64::NAN,
        ..Uld::default()
    };
    refused("uld", &weightless, fine(), "weight of part `uld` is NaN");
    let bare = AnswerLogits {
        offsets: None,
        hidden: None,
        ..answers.student.clone()
    };
    for (name, aligner) in all() {
        let needs = aligner.needs();
        if needs.offsets || needs.hidden {
            refused(
                &name,
                aligner.as_ref(),
                (answers.teacher.clone(), bare.clone()),
                "needed",
            );
        }
    }
}

#[test]
fn more_memory_than_the_gradient_is_hardly_taken() {
    let (teacher, student) = ([1, 129, 15_000], [1, 129, 10_000]);
    let single =
        |shape: &[usize], seed| random(shape, seed).to_dtype(DType::F32).expect("narrowed");
    let answers = plain(single(&teacher, 31), single(&student, 32));
    let logits = 4 * student.iter().product::<usize>() as u64;
    let aligners: [(&str, Box<dyn Aligner>); 3] = [
        ("rank", Box::new(MultiLevelOt::paper())),
        ("reference-code", Box::new(MultiLevelOt::reference_code())),
        ("uld", Box::<Uld>::default()),
    ];
    for (name, aligner) in aligners {
        let info = allocation_counter::measure(|| {
            let loss = answers.loss(aligner.as_ref());
            assert!(loss.gradient.is_some());
        });
        let times = info.bytes_max as f64 / logits as f64;
        assert!(times < 1.2, "{name}: {times} times the student's logits");
    }
}

/// Logits as a language model's: the logarithm of a power law over the tokens, with noise at each position.
fn zipf(shape: [usize; 3], seed: u64) -> Tensor {
    let noise = numbers(&random(&shape, seed));
    let rank = |i: usize| ((i % shape[2]) * 7919 % shape[2] + 1) as f64;
    let values = noise
        .iter()
        .enumerate()
        .map(|(i, n)| n - 1.2 * rank(i).ln());
    Tensor::from_vec(values.collect::<Vec<f64>>(), &shape[..], &Device::Cpu).expect("logits")
}

#[test]
fn the_released_code_is_hardly_more_than_cross_entropy_and_had() {
    let answers = plain(zipf([1, 33, 1009], 41), zipf([1, 33, 503], 42));
    let norms = |aligner: &MultiLevelOt| -> Vec<(&str, f64)> {
        let loss = answers.loss(aligner);
        let norm = |g: Vec<f64>| g.iter().map(|g| g * g).sum::<f64>().sqrt();
        let part = |p: &scylla_core::train::Part| {
            (p.name, p.weight * norm(gradient(&p.value, &answers.logits)))
        };
        loss.parts.iter().map(part).collect()
    };
    let (published, released) = (
        norms(&MultiLevelOt::paper()),
        norms(&MultiLevelOt::reference_code()),
    );
    println!(
        "weighted gradients on Zipf-like logits, paper: {published:?}, released code: {released:?}"
    );
    let of = |norms: &[(&str, f64)], name| {
        norms
            .iter()
            .find(|(n, _)| *n == name)
            .map_or(f64::NAN, |n| n.1)
    };
    for name in ["sl", "sd"] {
        let share = of(&released, name) / of(&released, "had");
        assert!(share < 1e-2, "{name} {share}");
        let share = of(&published, name) / of(&published, "had");
        assert!(share > 1e-2, "{name} {share}");
    }
}

#[test]
fn logits_in_half_precision_give_a_loss_in_single() {
    let answers = Answers::two(12);
    let half = |side: &AnswerLogits| AnswerLogits {
        logits: side
            .logits
            .detach()
            .to_dtype(DType::BF16)
            .expect("narrowed"),
        ..side.clone()
    };
    let halves = Answers::new(half(&answers.teacher), half(&answers.student));
    for (name, aligner) in all().into_iter().filter(|(n, _)| n != "dskd") {
        let (loss, single) = (
            halves.loss(aligner.as_ref()),
            answers.loss(aligner.as_ref()),
        );
        assert_eq!(loss.total.dtype(), DType::F32, "{name}");
        let (found, expected) = (value(&loss.total), value(&single.total));
        assert!(
            (found - expected).abs() < 0.05 * expected.abs(),
            "{name}: {found} {expected}"
        );
        let gradients = loss.total.backward().expect("backward");
        let gradient = gradients.get(&halves.logits).expect("of the logits");
        assert_eq!(gradient.dtype(), DType::BF16, "{name}");
    }
}
