//! What an aligner trains itself, and the tables of both sides that it reads.

use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Tensor, Var};
use multilevel_ot::Space;
use scylla_core::model::WeightMatrix;
use scylla_core::plugin::Matrix;
use scylla_core::train::Named;

use super::student::Student;
use super::teacher::Teacher;
use super::trainer::Distiller;
use crate::context::Spaces;
use crate::{Error, Result};

/// The student's embedding and head as tensors, where the aligner reads them: they follow the student.
pub(super) type Tables = Arc<OnceLock<[Var; 2]>>;

/// What stands before the name of what an aligner trains.
pub(super) const ALIGNER: &str = "aligner.";

impl Distiller {
    /// Lets the aligner's own parameters train beside the student's.
    pub(super) fn take_parameters(&mut self) -> Result<()> {
        for (name, var) in self.aligner.parameters() {
            let columns = var.dims().last().copied().unwrap_or(1);
            let values = var.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?;
            let matrix = self.on.matrix(values, columns)?;
            self.named.insert(format!("{ALIGNER}{name}"), matrix);
        }
        Ok(())
    }

    /// Gives the aligner what was learned: its parameters, and the student's embedding and head where it reads them.
    pub(super) fn tell_aligner(&self) -> Result<()> {
        let set = |var: &Var, from: &Matrix| -> Result<()> {
            let values = from.all()?.into_owned();
            let new = Tensor::from_vec(values, var.shape(), &Device::Cpu)?;
            Ok(var.set(&new.to_dtype(var.dtype())?)?)
        };
        for (name, var) in self.aligner.parameters() {
            if let Some(from) = self.named.get(&format!("{ALIGNER}{name}")) {
                set(&var, from)?;
            }
        }
        if let Some(tables) = self.tables.get() {
            for (var, from) in tables.iter().zip(tables_of(&self.student, &self.named)?) {
                set(var, from)?;
            }
        }
        Ok(())
    }
}

/// The student's embedding and head among its parameters.
pub(super) fn tables_of<'a>(student: &Student, named: &'a Named) -> Result<[&'a Matrix; 2]> {
    let head = match student.shape().tied {
        true => "model.embed_tokens.weight",
        false => "lm_head.weight",
    };
    let missing = || Error::Experiment("the student has no embedding".into());
    let one = |name: &str| named.get(name).ok_or_else(missing);
    Ok([one("model.embed_tokens.weight")?, one(head)?])
}

/// Heads and embeddings of both sides, should the aligner ask for them.
pub(super) fn spaces(
    student: &Student,
    named: &Named,
    teacher: &Teacher,
    tables: &Tables,
) -> Result<Spaces> {
    let own = tables_of(student, named)?.map(Matrix::clone);
    let (theirs, tables) = (teacher.tokens().clone(), Arc::clone(tables));
    let tensor = |m: &Matrix| -> Result<Tensor> {
        let shape = (m.rows(), m.columns);
        Ok(Tensor::from_vec(
            m.all()?.into_owned(),
            shape,
            &Device::Cpu,
        )?)
    };
    Ok(Box::new(move || {
        let vars = match tables.get() {
            Some(vars) => vars,
            None => {
                let var = |m: &Matrix| -> Result<Var> { Ok(Var::from_tensor(&tensor(m)?)?) };
                let vars = [var(&own[0])?, var(&own[1])?];
                tables.get_or_init(|| vars)
            }
        };
        let all: Vec<u32> = (0..theirs.vocab as u32).collect();
        let rows = |of: &Arc<dyn WeightMatrix>| -> Result<Tensor> {
            let mut m = Matrix::default();
            of.rows(&all, &mut m)?;
            tensor(&m)
        };
        Ok((
            Space {
                embeddings: vars[0].as_tensor().clone(),
                head: vars[1].as_tensor().clone(),
            },
            Space {
                embeddings: rows(&theirs.embedding)?,
                head: rows(&theirs.head)?,
            },
        ))
    }))
}
