//! What a student is worth: its scores on answers that it does not learn from, and of answers of its own.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use scylla_core::files::{self, read_json};
use scylla_core::model::{LoadOptions, parse_device};
use scylla_core::train::graph::{Head, Tape};
use scylla_core::{Decoder, Target};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::cache::form;
use super::pairs::{Pair, packed};
use super::rows::Rows;
use super::score::{AnswerScore, Said, Scores, expected, of_answer};
use super::student::still;
use super::tables::tables_of;
use super::teacher::chosen;
use super::trainer::Distiller;
use crate::data::documents::hex;
use crate::{Error, Result};

/// Version of such files.
const EXPECTS: u32 = 1;

/// A teacher's next bytes as they are kept.
#[derive(Serialize, Deserialize)]
struct Expects {
    /// What they are the bytes of.
    of: String,
    /// By answer, and where in its bytes.
    answers: Vec<BTreeMap<usize, u8>>,
}

impl Distiller {
    /// What the student is worth on answers that it does not learn from.
    ///
    /// # Errors
    /// If a pass fails.
    pub fn evaluate(&mut self) -> Result<Scores> {
        Ok(self.evaluate_each()?.0)
    }

    /// The same, and answer by answer.
    ///
    /// # Errors
    /// As [`Distiller::evaluate`].
    pub fn evaluate_each(&mut self) -> Result<(Scores, Vec<AnswerScore>)> {
        self.evaluated(&AtomicBool::new(false))
    }

    pub(super) fn evaluated(&mut self, stop: &AtomicBool) -> Result<(Scores, Vec<AnswerScore>)> {
        let pairs = std::mem::take(&mut self.watched.all);
        let found = self.scored(&pairs, stop);
        self.watched.all = pairs;
        found
    }

    fn scored(&mut self, pairs: &[Pair], stop: &AtomicBool) -> Result<(Scores, Vec<AnswerScore>)> {
        let mut found = Vec::with_capacity(pairs.len());
        let threads = self.threads();
        let mut expects = std::mem::take(&mut self.expects);
        if expects.is_empty() {
            expects = self.kept_expects(pairs).unwrap_or_default();
        }
        let asked = expects.len() == pairs.len();
        let mut named = still(&self.named);
        let mut tape = Tape::new(&self.on);
        // Packed once for all answers.
        let head = tables_of(&self.student, &self.named)?[1].clone();
        let head = Head::frozen(&self.on, head)?;
        let vocab = self.student.known();
        for (i, some) in pairs.chunks(self.experiment.train.batch).enumerate() {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::Interrupted(format!(
                    " while the student was evaluated behind step {}; --resume goes on",
                    self.state.step
                )));
            }
            let some: Vec<&Pair> = some.iter().collect();
            if !asked {
                let read = self.teacher.read(&some)?;
                for (pair, &begin) in some.iter().zip(&read.begins) {
                    let rows = Rows::before(&pair.teacher, begin);
                    let logits = self.teacher.logits(&self.on, &read.states, &rows)?;
                    let (values, width) = (logits.all()?, logits.columns);
                    let (said, offsets) = (pair.teacher.said(), &pair.offsets.1);
                    let rows = (&values[..], width);
                    expects.push(expected(said, offsets, &self.bytes[1], rows, threads));
                }
            }
            let (rows, tokens, begins) = packed(some.iter().map(|p| &p.student))?;
            let language = &self.student.language;
            let states = language.states(&mut tape, &mut named, &rows, &tokens)?;
            for (j, (pair, &begin)) in some.iter().zip(&begins).enumerate() {
                let rows = chosen(&states.matrix, &Rows::before(&pair.student, begin))?;
                let logits = head.logits(&self.on, &rows)?;
                let (values, width) = (logits.all()?, logits.columns);
                let said = pair.student.said();
                let rows = (&values[..], width);
                let own = expected(said, &pair.offsets.0, &self.bytes[0], rows, threads);
                let both = (&own, &expects[i * self.experiment.train.batch + j]);
                found.push(of_answer(pair, (&values, width, vocab), both, threads));
            }
        }
        if !asked {
            self.keep_expects(pairs, &expects);
        }
        self.expects = expects;
        for (one, said) in found.iter_mut().zip(self.said(pairs)?) {
            one.said = said;
        }
        Ok((Scores::over(&found), found))
    }

    /// Where the teacher's next bytes of the answers that are watched are kept, beside what it says of others, and what they are the bytes
    /// of: the teacher, its tokens and their bytes, and where those count as the answer's, which hangs on the student's as well.
    fn expects_at(&self, pairs: &[Pair]) -> Option<(PathBuf, String)> {
        let spec = self.experiment.cache.as_ref()?;
        let mut places = Sha256::new_with_prefix(self.bytes[1].hashed());
        for pair in pairs {
            let offsets = pair.offsets.1.iter();
            let words = offsets.flat_map(|&(from, to)| [from as u64, to as u64]);
            words.for_each(|word| places.update(word.to_le_bytes()));
        }
        let of = format!(
            "{EXPECTS} {} {} {} {}",
            self.teacher.hash,
            form(&self.teacher, &self.on),
            self.watched.taught,
            hex(places)
        );
        let name = &hex(Sha256::new_with_prefix(&of))[..16];
        Some((spec.dir.join(format!("next-bytes-{name}.json")), of))
    }

    /// What was kept; nothing where it is none of these answers, or cannot be read: then it is made again.
    fn kept_expects(&self, pairs: &[Pair]) -> Option<Vec<BTreeMap<usize, u8>>> {
        let (path, of) = self.expects_at(pairs)?;
        let kept = read_json(&path, "a teacher's next bytes").ok()?;
        let kept: Expects = serde_json::from_value(kept).ok()?;
        (kept.of == of && kept.answers.len() == pairs.len()).then_some(kept.answers)
    }

    /// Keeps it where there is room: without it the teacher is asked again.
    fn keep_expects(&self, pairs: &[Pair], answers: &[BTreeMap<usize, u8>]) {
        let Some((path, of)) = self.expects_at(pairs) else {
            return;
        };
        let kept = Expects {
            of,
            answers: answers.to_vec(),
        };
        if let (Ok(text), Some(dir)) = (serde_json::to_string(&kept), path.parent())
            && std::fs::create_dir_all(dir).is_ok()
        {
            let _ = files::write(&path, text.as_bytes());
        }
    }

    /// What the student says itself, decoded as the model that it is exported as, where right answers are known.
    fn said(&self, pairs: &[Pair]) -> Result<Vec<Option<Said>>> {
        let most = self.experiment.evaluate.max_new_tokens;
        let mut all = vec![None; pairs.len()];
        let asked: Vec<usize> = (0..pairs.len())
            .filter(|&i| !pairs[i].right.is_empty())
            .collect();
        if asked.is_empty() || most == 0 {
            return Ok(all);
        }
        let dir = tempfile::tempdir().map_err(Error::io(&std::env::temp_dir()))?;
        self.student.export(&self.named, dir.path())?;
        let options = LoadOptions {
            threads: self.experiment.run.threads,
            device: parse_device(&self.experiment.run.device)?,
            context: self.student.shape().context,
            ..LoadOptions::default()
        };
        let target = Target::open(&dir.path().to_string_lossy(), &options)?;
        let mut decoder = Decoder::new(target, None, scylla_verify::Auto)?;
        let request = |&i: &usize| {
            let student = &pairs[i].student;
            let prompt = student.tokens[..student.answer.start].to_vec();
            let mut request = decoder.request_of(prompt);
            request.max_new_tokens = most;
            request
        };
        let requests = asked.iter().map(request).collect();
        let outputs = decoder.answer_all(requests);
        if let Some(failed) = outputs.iter().find_map(|o| o.failed.clone()) {
            return Err(Error::Experiment(format!(
                "the student's own answer: {failed}"
            )));
        }
        for (output, i) in outputs.iter().zip(asked) {
            all[i] = Some(Said::of(&output.text, &pairs[i].right));
        }
        Ok(all)
    }
}
