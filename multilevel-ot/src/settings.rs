//! The settings of Multi-Level Optimal Transport.

use serde::Deserialize;

use crate::{Error, Result};

/// Which of the two losses that go by the name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The published formulas.
    #[default]
    Paper,
    /// What the authors' released code computes.
    ReferenceCode,
}

/// How the student's tokens are matched with the teacher's heaviest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Matching {
    /// In the order of the mass that the student gives them over the sequence.
    #[default]
    Rank,
    /// By the cheapest one-to-one assignment (Q*) over the student's heaviest.
    Assignment,
}

/// Which transport cost SD is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SinkhornForm {
    /// `<P, C>` after the fixed number of iterations, with the gradient through them.
    #[default]
    Fixed,
    /// `<P, C> + epsilon sum P log P` of the converged plan, whose gradient is the plan.
    Converged,
    /// The least cost of all plans: for answers of some tens of tokens.
    Exact,
}

/// Multi-Level Optimal Transport (arXiv:2412.14528): cross entropy, and beside it the difference (`had`), cross entropy (`sl`)
/// and Sinkhorn distance (`sd`) between probabilities of matched tokens, the `k` heaviest of each sequence.
///
/// `total = ce + alpha (had + beta sl + gamma sd)`. In paper mode parts are sums over a sequence's tokens, and those of a
/// batch the mean over its sequences. Where teacher and student have different numbers of tokens, the ranking, `had` and `sl`
/// take the first that both have, and `sd` is the transport between equal masses in all, as much as the smaller number.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "Given")]
pub struct MultiLevelOt {
    /// Published formulas, or released code.
    pub mode: Mode,
    /// Tokens compared. In paper mode at most what both vocabularies have.
    pub k: usize,
    /// Weight of all three beside the cross entropy.
    pub alpha: f64,
    /// Weight of `sl` among them.
    pub beta: f64,
    /// Weight of `sd` among them.
    pub gamma: f64,
    /// Weight of the entropy in `sd`.
    pub epsilon: f64,
    /// Sinkhorn iterations.
    pub iterations: usize,
    /// Temperature of the student's logits in `had`, `sl` and the ranking.
    pub student_temperature: f64,
    /// Temperature of the teacher's logits there.
    pub teacher_temperature: f64,
    /// Temperature of both in `sd`.
    pub sd_temperature: f64,
    /// How tokens are matched (paper mode).
    pub matching: Matching,
    /// How many of the student's heaviest tokens an assignment may choose from.
    pub candidates: usize,
    /// Which transport cost `sd` is (paper mode).
    pub sinkhorn: SinkhornForm,
    /// Distils all but the last of the student's labels.
    pub skip_student_eos: bool,
    /// Distils from all but the last of the teacher's labels.
    pub skip_teacher_eos: bool,
}

impl MultiLevelOt {
    /// The constants of the paper.
    pub fn paper() -> Self {
        Self {
            mode: Mode::Paper,
            k: 50,
            alpha: 0.15,
            beta: 0.1,
            gamma: 0.1,
            epsilon: 0.1,
            iterations: 20,
            student_temperature: 1.0,
            teacher_temperature: 1.0,
            sd_temperature: 2.0,
            matching: Matching::Rank,
            candidates: 200,
            sinkhorn: SinkhornForm::Fixed,
            skip_student_eos: false,
            skip_teacher_eos: false,
        }
    }

    /// The constants of the released code.
    pub fn reference_code() -> Self {
        Self {
            mode: Mode::ReferenceCode,
            alpha: 1.5,
            gamma: 1e-4,
            iterations: 10,
            ..Self::paper()
        }
    }

    /// # Errors
    /// On constants outside their range.
    pub fn check(&self) -> Result<()> {
        let positive = [
            ("epsilon", self.epsilon),
            ("student_temperature", self.student_temperature),
            ("teacher_temperature", self.teacher_temperature),
            ("sd_temperature", self.sd_temperature),
        ];
        for (name, value) in positive {
            if !(value > 0.0 && value.is_finite()) {
                return Err(Error::Invalid(format!(
                    "{name} {value} must be finite and above 0"
                )));
            }
        }
        for (name, value) in [
            ("alpha", self.alpha),
            ("beta", self.beta),
            ("gamma", self.gamma),
        ] {
            if !(value >= 0.0 && value.is_finite()) {
                return Err(Error::Invalid(format!(
                    "{name} {value} must be finite and not negative"
                )));
            }
        }
        if self.k == 0 {
            return Err(Error::Invalid("k must be at least 1".into()));
        }
        if self.matching == Matching::Assignment && self.candidates < self.k {
            return Err(Error::Invalid(format!(
                "{} candidates cannot be assigned to k = {} tokens",
                self.candidates, self.k
            )));
        }
        let published = |changed| match changed && self.mode == Mode::ReferenceCode {
            true => Err("the released code matches by rank and iterates a fixed number of times"),
            false => Ok(()),
        };
        published(self.matching != Matching::Rank || self.sinkhorn != SinkhornForm::Fixed)
            .map_err(|e| Error::Invalid(e.into()))?;
        Ok(())
    }
}

/// Settings as they stand in a file: those left out are the mode's own.
#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
struct Given {
    mode: Mode,
    k: Option<usize>,
    alpha: Option<f64>,
    /// The released code's name for `alpha`.
    distillation_weight: Option<f64>,
    beta: Option<f64>,
    gamma: Option<f64>,
    epsilon: Option<f64>,
    iterations: Option<usize>,
    student_temperature: Option<f64>,
    teacher_temperature: Option<f64>,
    sd_temperature: Option<f64>,
    matching: Option<Matching>,
    candidates: Option<usize>,
    sinkhorn: Option<SinkhornForm>,
    skip_student_eos: Option<bool>,
    skip_teacher_eos: Option<bool>,
}

impl TryFrom<Given> for MultiLevelOt {
    type Error = Error;

    fn try_from(g: Given) -> Result<Self> {
        let own = match g.mode {
            Mode::Paper => Self::paper(),
            Mode::ReferenceCode => Self::reference_code(),
        };
        if g.alpha.is_some() && g.distillation_weight.is_some_and(|w| Some(w) != g.alpha) {
            return Err(Error::Invalid(
                "alpha and distillation_weight are the same and differ".into(),
            ));
        }
        let settings = Self {
            mode: g.mode,
            k: g.k.unwrap_or(own.k),
            alpha: g.alpha.or(g.distillation_weight).unwrap_or(own.alpha),
            beta: g.beta.unwrap_or(own.beta),
            gamma: g.gamma.unwrap_or(own.gamma),
            epsilon: g.epsilon.unwrap_or(own.epsilon),
            iterations: g.iterations.unwrap_or(own.iterations),
            student_temperature: g.student_temperature.unwrap_or(own.student_temperature),
            teacher_temperature: g.teacher_temperature.unwrap_or(own.teacher_temperature),
            sd_temperature: g.sd_temperature.unwrap_or(own.sd_temperature),
            matching: g.matching.unwrap_or(own.matching),
            candidates: g
                .candidates
                .unwrap_or(own.candidates.max(4 * g.k.unwrap_or(own.k))),
            sinkhorn: g.sinkhorn.unwrap_or(own.sinkhorn),
            skip_student_eos: g.skip_student_eos.unwrap_or(own.skip_student_eos),
            skip_teacher_eos: g.skip_teacher_eos.unwrap_or(own.skip_teacher_eos),
        };
        settings.check()?;
        Ok(settings)
    }
}
