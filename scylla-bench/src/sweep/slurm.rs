//! The same grid as a Slurm array.

use super::Plan;

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:+".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.into(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}

/// An array script whose tasks are `command` (program and arguments) with `--task N`: one for each setting, all its budgets,
/// since these share a trunk. `log` is where tasks write.
pub fn script(plan: &Plan, command: &[String], log: &str) -> String {
    let words: Vec<String> = command.iter().map(|word| quoted(word)).collect();
    let last = plan.units.len().saturating_sub(1);
    let mut text = format!(
        "#!/bin/bash\n#SBATCH --job-name=scylla-sweep\n#SBATCH --array=0-{last}\n#SBATCH --output={log}\n\
         # What a cluster wants beside this (partition, time, gpus) goes here, or on sbatch's command line.\n"
    );
    for (i, unit) in plan.units.iter().enumerate() {
        let names: Vec<&str> = unit.runs.iter().map(|run| &*run.name).collect();
        text += &format!("# {i}: {}\n", names.join(" "));
    }
    text + &format!("exec {} --task \"$SLURM_ARRAY_TASK_ID\"\n", words.join(" "))
}
