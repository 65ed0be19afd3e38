//! Running a plan: trunks first, then branches, those that share data together.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use scylla_core::files;
use serde::Serialize;

use super::gather::read;
use super::{FORMAT, Plan, Planned, SUMMARY, Summary, Unit, VERSION};
use crate::session::Session;
use crate::train::{
    BEST, CHECKPOINT, Learner, METRICS, OnTold, Told, TrainExperiment, Trainer, branch, fork_name,
};
use crate::{Error, Result};

/// A run that could not be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Failed {
    /// Its name, or its trunk's.
    pub name: String,
    /// Why.
    pub reason: String,
}

/// What came of a sweep.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Swept {
    /// Every run that is done, before or now.
    pub runs: Vec<Summary>,
    /// Runs that were done before.
    pub skipped: usize,
    /// Runs that could not be done.
    pub failed: Vec<Failed>,
}

/// An experiment with its folder, and what its setting needs of it: of a trunk, the steps behind which branches leave.
#[derive(Clone)]
struct Job {
    name: String,
    experiment: TrainExperiment,
    dir: PathBuf,
    forks: Vec<u64>,
}

/// Runs what is not done of a plan, in a folder.
///
/// # Errors
/// If the folder holds other runs under the same names, or the user broke off (the same command goes on). What fails for one
/// run is in the result.
pub fn sweep(
    plan: &Plan,
    dir: &Path,
    session: &mut Session,
    stop: &AtomicBool,
    told: OnTold<'_>,
) -> Result<Swept> {
    for unit in &plan.units {
        let trunk = unit.trunk.iter().map(|t| &t.name);
        for name in unit.runs.iter().map(|run| &run.name).chain(trunk) {
            drop_unfinished(&dir.join(name))?;
        }
    }
    let mut done: Vec<Summary> = Vec::new();
    for run in plan.runs() {
        // What is wrong with a run of the grid is said before any other is paid for.
        let e = &run.experiment;
        let named = |error: Error| Error::Experiment(format!("{}: {error}", run.name));
        e.check_target(&session.target.model.shape())
            .map_err(named)?;
        if e.draft.start.is_none() {
            Learner::network(e, &session.target.config).map_err(named)?;
        }
        match e.draft.name.as_str() {
            "eagle3" => e.eagle3_loss().map(|_| ()),
            _ => e.eagle_loss().map(|_| ()),
        }
        .map_err(named)?;
        done.extend(finished(run, dir)?);
    }
    let skipped = done.len();
    let is_done = |run: &Planned, done: &[Summary]| done.iter().any(|s| s.name == run.name);
    let mut failed: Vec<Failed> = Vec::new();
    let trunks: Vec<Job> = plan
        .units
        .iter()
        .filter_map(|unit| trunk_job(unit, dir, &|run| is_done(run, &done)))
        .collect();
    for group in grouped(trunks) {
        let trained = |jobs: &[Job], session: &mut Session, told: OnTold<'_>| {
            train_trunks(jobs, session, stop, told)
        };
        failed.extend(together(&group, session, told, trained)?);
    }
    let mut branches: Vec<(Job, &Planned, Option<String>)> = Vec::new();
    for unit in &plan.units {
        let trunk = unit.trunk.as_ref().map(|t| t.name.clone());
        let broken = failed.iter().find(|f| Some(&f.name) == trunk.as_ref());
        for run in unit.runs.iter().filter(|run| !is_done(run, &done)) {
            if let Some(broken) = broken.filter(|_| run.start > 0) {
                let reason = format!("its trunk {} failed", broken.name);
                told(Told::Note(format!("{}: {reason}", run.name)));
                continue;
            }
            let job = Job {
                name: run.name.clone(),
                experiment: run.experiment.clone(),
                dir: dir.join(&run.name),
                forks: Vec::new(),
            };
            branches.push((job, run, trunk.clone().filter(|_| run.start > 0)));
        }
    }
    for group in grouped(branches.iter().map(|(job, ..)| job.clone()).collect()) {
        let mut fresh = Vec::new();
        let trained = |jobs: &[Job], session: &mut Session, told: OnTold<'_>| {
            let of = |job: &Job| branches.iter().find(|(other, ..)| other.name == job.name);
            let jobs: Vec<_> = jobs.iter().filter_map(of).collect();
            fresh.extend(train_branches(&jobs, dir, session, stop, told)?);
            Ok(())
        };
        failed.extend(together(&group, session, told, trained)?);
        done.extend(fresh);
    }
    for unit in &plan.units {
        tidy(unit, dir, &|run| is_done(run, &done))?;
    }
    // In the order of the grid, whichever was done first.
    let order = |s: &Summary| plan.runs().position(|run| run.name == s.name);
    done.sort_by_key(order);
    Ok(Swept {
        runs: done,
        skipped,
        failed,
    })
}

/// Removes files that a run was killed in the middle of writing; they get their names when they are whole.
fn drop_unfinished(folder: &Path) -> Result<()> {
    for dir in [folder.to_path_buf(), folder.join(BEST)] {
        let Ok(entries) = std::fs::read_dir(&dir) else {
            continue;
        };
        for entry in entries {
            let path = entry.map_err(Error::io(&dir))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(".tmp") && path.is_file() {
                std::fs::remove_file(&path).map_err(Error::io(&path))?;
            }
        }
    }
    Ok(())
}

/// The result of a run that is done.
fn finished(run: &Planned, dir: &Path) -> Result<Option<Summary>> {
    let folder = dir.join(&run.name);
    let Some(summary) = read(&folder.join(SUMMARY))? else {
        return Ok(None);
    };
    let path = folder.join("experiment.toml");
    let table = files::read_text(&path)?
        .parse()
        .map_err(|e| Error::file(&path, format!("not TOML: {e}")))?;
    let mut was = TrainExperiment::from_table(table, &[])?;
    was.run.threads = run.experiment.run.threads;
    match was == run.experiment {
        true => Ok(Some(summary)),
        false => Err(Error::file(
            &path,
            "is another run than this grid has under that name; take another --output",
        )),
    }
}

/// The trunk of a unit, where a branch that is not done still needs it.
fn trunk_job(unit: &Unit, dir: &Path, is_done: &dyn Fn(&Planned) -> bool) -> Option<Job> {
    let trunk = unit.trunk.as_ref()?;
    let folder = dir.join(&trunk.name);
    let left = unit
        .runs
        .iter()
        .filter(|run| run.start > 0 && !is_done(run));
    let begun = |run: &&Planned| dir.join(&run.name).join(CHECKPOINT).exists();
    let mut forks: Vec<u64> = left
        .filter(|run| !begun(run) && !folder.join(fork_name(run.start)).exists())
        .map(|run| run.start)
        .collect();
    forks.sort_unstable();
    forks.dedup();
    // A trunk that begins anew has to come by every branch that is not begun.
    let behind = forks.first().copied().unwrap_or(u64::MAX);
    let later = |run: &&Planned| folder.join(fork_name(run.start)).exists() && run.start > behind;
    let again = unit
        .runs
        .iter()
        .filter(|run| !is_done(run) && !begun(run) && run.start > 0);
    forks.extend(again.filter(later).map(|run| run.start));
    forks.sort_unstable();
    let last = *forks.last()?;
    let mut experiment = trunk.experiment.clone();
    // As far as it is needed now.
    experiment.stage[0].steps = last;
    Some(Job {
        name: trunk.name.clone(),
        experiment,
        dir: folder,
        forks,
    })
}

/// Jobs that can share one pass of the target, side by side.
fn grouped(jobs: Vec<Job>) -> Vec<Vec<Job>> {
    let mut groups: Vec<Vec<Job>> = Vec::new();
    for job in jobs {
        let fits = |group: &&mut Vec<Job>| {
            let first = &group[0];
            first.experiment.shares_with(&job.experiment).is_ok() && first.forks == job.forks
        };
        match groups.iter_mut().find(fits) {
            Some(group) => group.push(job),
            None => groups.push(vec![job]),
        }
    }
    groups
}

/// Trains jobs side by side; where that fails, each alone, so that one run's trouble stays its own.
fn together(
    group: &[Job],
    session: &mut Session,
    told: OnTold<'_>,
    mut train: impl FnMut(&[Job], &mut Session, OnTold<'_>) -> Result<()>,
) -> Result<Vec<Failed>> {
    let mut failed = Vec::new();
    let mut alone = |job: &Job, error: Error| match error {
        Error::Interrupted(_) => Err(Error::Interrupted(
            "; the same command goes on there".into(),
        )),
        e => {
            failed.push(Failed {
                name: job.name.clone(),
                reason: e.to_string(),
            });
            Ok(())
        }
    };
    match (train(group, session, told), group) {
        (Ok(()), _) => {}
        (Err(e), [one]) => alone(one, e)?,
        (Err(e @ Error::Interrupted(_)), _) => alone(&group[0], e)?,
        (Err(e), _) => {
            told(Told::Note(format!("{e}; now one by one")));
            for job in group {
                if let Err(e) = train(std::slice::from_ref(job), session, told) {
                    alone(job, e)?;
                }
            }
        }
    }
    for f in &failed {
        told(Told::Note(format!("{} failed: {}", f.name, f.reason)));
    }
    Ok(failed)
}

fn train_trunks(
    jobs: &[Job],
    session: &mut Session,
    stop: &AtomicBool,
    told: OnTold<'_>,
) -> Result<()> {
    for job in jobs {
        let checkpoint = job.dir.join(CHECKPOINT);
        if !checkpoint.exists() {
            continue;
        }
        // A grid may have grown: the trunk goes on, or begins anew where it is beyond what is asked of it now.
        let at = branch(session, &job.dir, &checkpoint, &job.experiment, &job.dir)?;
        if job.forks.first().is_some_and(|&first| at > first) {
            begin_anew(&job.dir)?;
        }
    }
    let experiments: Vec<_> = jobs
        .iter()
        .map(|j| (j.experiment.clone(), j.dir.clone()))
        .collect();
    let mut trainer = Trainer::new(session, &experiments, true, stop, told)?;
    trainer.trunk(&jobs[0].forks, stop, told)
}

/// Removes a trunk's state, and what was kept aside of it.
fn begin_anew(dir: &Path) -> Result<()> {
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name == CHECKPOINT || name == METRICS || name.starts_with("fork-") {
            std::fs::remove_file(&path).map_err(Error::io(&path))?;
        }
    }
    Ok(())
}

fn train_branches(
    jobs: &[&(Job, &Planned, Option<String>)],
    dir: &Path,
    session: &mut Session,
    stop: &AtomicBool,
    told: OnTold<'_>,
) -> Result<Vec<Summary>> {
    for (job, run, trunk) in jobs {
        if let Some(trunk) = trunk
            .as_ref()
            .filter(|_| !job.dir.join(CHECKPOINT).exists())
        {
            let trunk = dir.join(trunk);
            let from = trunk.join(fork_name(run.start));
            branch(session, &trunk, &from, &job.experiment, &job.dir)?;
        }
    }
    let experiments: Vec<_> = jobs
        .iter()
        .map(|(j, ..)| (j.experiment.clone(), j.dir.clone()))
        .collect();
    let mut trainer = Trainer::new(session, &experiments, true, stop, told)?;
    let report = trainer.run(stop, told)?;
    let mut all = Vec::new();
    for (i, (job, run, trunk)) in jobs.iter().enumerate() {
        let outcome = &report.runs[i];
        let summary = Summary {
            format: FORMAT.into(),
            version: VERSION,
            name: run.name.clone(),
            family: run.experiment.draft.name.clone(),
            layers: trainer.networks()[i].backbone().layers.len(),
            tokens: outcome.tokens,
            seed: run.experiment.run.seed,
            trunk: trunk.clone().map(|name| (name, run.start)),
            settings: run.settings.clone(),
            steps: outcome.steps,
            loss: outcome.loss,
            tau: outcome.last,
            prompts: trainer.by_prompt()[i].to_vec(),
            environment: report.environment.clone(),
        };
        let text =
            serde_json::to_vec_pretty(&summary).map_err(|e| Error::Experiment(e.to_string()))?;
        files::write(&job.dir.join(SUMMARY), &text)?;
        all.push(summary);
    }
    Ok(all)
}

/// Removes what nothing goes on from any more: checkpoints of runs that are done, and states of a trunk whose branch is done.
fn tidy(unit: &Unit, dir: &Path, is_done: &dyn Fn(&Planned) -> bool) -> Result<()> {
    let remove = |path: PathBuf| match std::fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(&path)(e)),
        _ => Ok(()),
    };
    for run in unit.runs.iter().filter(|run| is_done(run)) {
        remove(dir.join(&run.name).join(CHECKPOINT))?;
        let shared = |other: &Planned| other.start == run.start && !is_done(other);
        if let Some(trunk) = unit
            .trunk
            .as_ref()
            .filter(|_| !unit.runs.iter().any(shared))
        {
            remove(dir.join(&trunk.name).join(fork_name(run.start)))?;
        }
    }
    Ok(())
}
