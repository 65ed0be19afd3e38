//! The summary as a table on the terminal.

use crate::bench::{Row, Summary};
use crate::stats::Spread;

/// Renders columns of text, the first left-aligned, the others right-aligned.
fn aligned(rows: &[Vec<String>], left: usize) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| {
        rows.iter()
            .filter_map(|r| r.get(c))
            .map(|t| t.chars().count())
            .max()
    };
    let widths: Vec<usize> = (0..columns).map(|c| width(c).unwrap_or(0)).collect();
    let mut out = String::new();
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(c, (text, &w))| {
                if c < left {
                    format!("{text:<w$}")
                } else {
                    format!("{text:>w$}")
                }
            })
            .collect();
        out.push_str(cells.join("  ").trim_end());
        out.push('\n');
    }
    out
}

fn spread(value: Option<Spread>, digits: usize) -> String {
    match value {
        Some(s) => format!(
            "{:.digits$} ({:.digits$}-{:.digits$})",
            s.median, s.min, s.max
        ),
        None => "-".into(),
    }
}

fn cells(row: &Row) -> Vec<String> {
    let name = match row.draft == crate::registry::PLAIN {
        true => "plain".into(),
        false => format!(
            "{} {}/{}/{}",
            row.draft, row.budget.total, row.budget.width, row.budget.depth
        ),
    };
    let alpha: Vec<String> = row
        .alpha
        .iter()
        .take(3)
        .map(|a| a.map_or("-".into(), |a| format!("{a:.2}")))
        .collect();
    let share = |v: f64| format!("{:.1}", v * 100.0);
    vec![
        row.task.clone(),
        name,
        row.rule.clone(),
        row.prompts.to_string(),
        row.tokens.to_string(),
        row.tau.map_or("-".into(), |t| format!("{t:.2}")),
        if alpha.is_empty() {
            "-".into()
        } else {
            alpha.join(" ")
        },
        spread(row.tokens_per_s, 1),
        spread(row.speedup, 2),
        share(row.time_share.propose),
        share(row.time_share.forward),
        share(row.time_share.accept),
        share(row.time_share.commit),
        row.identical
            .map_or("-".into(), |(same, all)| format!("{same}/{all}")),
    ]
}

/// The whole summary.
pub(crate) fn summary(summary: &Summary) -> String {
    let head = [
        "task",
        "draft total/width/depth",
        "rule",
        "prompts",
        "tokens",
        "tau",
        "alpha 1-3",
        "tokens/s (min-max)",
        "speed-up (min-max)",
        "propose%",
        "forward%",
        "accept%",
        "commit%",
        "= plain",
    ];
    let mut lines = vec![head.map(String::from).to_vec()];
    let mut task = "";
    for row in &summary.rows {
        if !task.is_empty() && task != row.task {
            lines.push(Vec::new());
        }
        task = &row.task;
        lines.push(cells(row));
    }
    let e = &summary.environment;
    let mib = |b: u64| b as f64 / (1 << 20) as f64;
    let mut out = aligned(&lines, 3);
    out.push_str(&format!(
        "\n{} | {} threads | {} {} | weights {} | commit {} | target {}\n",
        e.cpu,
        e.threads,
        e.device,
        e.simd,
        e.dtypes.join("+"),
        e.commit,
        &e.target_hash[..12.min(e.target_hash.len())]
    ));
    let m = &summary.memory;
    if let (Some(peak), Some(ratio)) = (m.peak_bytes, m.ratio) {
        out.push_str(&format!(
            "peak resident {:.0} MiB = {ratio:.2} x (weights {:.0} MiB + cache {:.0} MiB)\n",
            mib(peak),
            mib(m.weight_bytes),
            mib(m.cache_bytes)
        ));
    }
    out.push_str("tau counts the bonus token (plain = 1.00); speeds are medians over repeats of decoding alone, prefill apart\n");
    out
}
