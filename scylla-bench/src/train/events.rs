//! A run's scalars as TensorBoard reads them.

use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use syntaxdot_summary::SummaryWriter;

use super::run::Metrics;
use crate::{Error, Result};

/// An event file in a run's folder; a run that goes on begins another, and TensorBoard reads them as one.
pub(super) struct Events {
    to: SummaryWriter<BufWriter<File>>,
    dir: PathBuf,
}

impl Events {
    pub(super) fn new(dir: &Path) -> Result<Self> {
        let to = SummaryWriter::from_prefix(dir.join("events")).map_err(Error::io(dir))?;
        let dir = dir.to_path_buf();
        Ok(Self { to, dir })
    }

    /// Writes a step.
    pub(super) fn add(&mut self, m: &Metrics) -> Result<()> {
        let mut scalars = vec![
            ("loss/total".to_string(), m.loss),
            ("optimizer/grad_norm".into(), m.grad_norm),
            ("optimizer/lr".into(), m.lr),
        ];
        for (i, step) in m.steps.iter().enumerate() {
            scalars.push((format!("loss/step_{i}"), step.loss));
            scalars.push((format!("accuracy/step_{i}"), step.accuracy));
        }
        scalars.extend(m.parts.iter().map(|(name, v)| (format!("loss/{name}"), *v)));
        if let Some(times) = m.times {
            scalars.push(("speed/tokens_per_s".into(), times.tokens_per_s));
        }
        if let Some(tau) = m.tau {
            scalars.push(("tau/real".into(), tau.real));
            scalars.push(("tau/simulated".into(), tau.simulated));
        }
        let step = i64::try_from(m.step).unwrap_or(i64::MAX);
        for (name, value) in scalars {
            let written = self.to.write_scalar(name, step, value as f32);
            written.map_err(Error::io(&self.dir))?;
        }
        Ok(())
    }
}
