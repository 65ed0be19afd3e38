//! The summary as a table on the terminal.

use crate::bench::{Row, Summary};
use crate::experiment::PolicyKind;
use crate::stats::{Interval, Quantiles, Spread};

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

fn interval(value: Option<Interval>) -> String {
    match value {
        Some(i) => format!("{:.2} ({:.2}-{:.2})", i.value, i.low, i.high),
        None => "-".into(),
    }
}

fn quantiles(value: Option<Quantiles>) -> String {
    match value {
        Some(q) => format!("{:.1} {:.1} {:.1}", q.median, q.p95, q.p99),
        None => "-".into(),
    }
}

/// The draft with what it may propose, and who chooses that.
fn name(row: &Row) -> String {
    if row.draft == crate::registry::PLAIN {
        return "plain".into();
    }
    let b = &row.budget;
    let limits = b.limits();
    let policy = match b.policy {
        PolicyKind::Fixed => String::new(),
        PolicyKind::Auto => return format!("{} auto", row.draft),
        other => format!(" {other:?}").to_lowercase(),
    };
    format!(
        "{} {}/{}/{}{policy}",
        row.draft, limits.total, limits.width, limits.depth
    )
}

/// What users of a batch see, one line per batch and decoder.
fn by_batch(rows: &[Row]) -> String {
    let head = [
        "batch",
        "draft total/width/depth",
        "tau",
        "tokens/s with prompts (min-max)",
        "speed-up of decoding (95 %)",
        "first token, ms: median p95 p99",
        "a token, ms: median p95 p99",
    ];
    let mut lines = vec![head.map(String::from).to_vec()];
    let last = rows.last().map(|row| row.task.clone());
    for row in rows.iter().filter(|row| Some(&row.task) == last.as_ref()) {
        lines.push(vec![
            match row.rate > 0.0 {
                true => format!("{} at {}/s", row.batch, row.rate),
                false => row.batch.to_string(),
            },
            name(row),
            row.tau.map_or("-".into(), |t| format!("{t:.2}")),
            spread(row.throughput, 1),
            interval(row.speedup_interval),
            quantiles(row.first_token_ms),
            quantiles(row.token_ms),
        ]);
    }
    aligned(&lines, 2)
}

fn cells(row: &Row) -> Vec<String> {
    let alpha: Vec<String> = row
        .alpha
        .iter()
        .take(3)
        .map(|a| a.map_or("-".into(), |a| format!("{a:.2}")))
        .collect();
    let share = |v: f64| format!("{:.1}", v * 100.0);
    vec![
        row.task.clone(),
        name(row),
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
        interval(row.speedup_interval),
        share(row.time_share.propose),
        share(row.time_share.forward),
        share(row.time_share.accept),
        share(row.time_share.commit),
        row.identical
            .map_or("-".into(), |(same, all)| format!("{same}/{all}")),
    ]
}

/// What budgets that nobody gave went by, and what they came to, one line per batch and decoder.
fn chosen(rows: &[Row]) -> String {
    let last = rows.last().map(|row| row.task.clone());
    let mut out = String::new();
    for row in rows.iter().filter(|row| Some(&row.task) == last.as_ref()) {
        let (Some(times), Some(nodes)) = (&row.times, row.nodes) else {
            continue;
        };
        let most = row.budget.limits().total;
        let ratios: Vec<String> = [2, 4, 8, 16]
            .into_iter()
            .filter(|&rows| rows <= most)
            .map(|rows| format!("{rows} rows {:.2} x", times.ratio(rows)))
            .collect();
        out.push_str(&format!(
            "\n{}{}: {nodes:.2} nodes a cycle, of at most {most}, as this machine's costs call for (of one row: {})\n",
            name(row),
            match row.batch {
                1 => String::new(),
                batch => format!(", batch {batch}"),
            },
            ratios.join(", "),
        ));
    }
    out
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
        "speed-up (95 %)",
        "propose%",
        "forward%",
        "accept%",
        "commit%",
        "= plain",
    ];
    let mut lines = vec![head.map(String::from).to_vec()];
    let mut before: Option<(&str, usize)> = None;
    let several = summary
        .rows
        .iter()
        .any(|row| row.batch > 1 || row.rate > 0.0);
    for row in &summary.rows {
        let here = (row.task.as_str(), row.batch);
        if before.is_some_and(|before| before != here) {
            lines.push(Vec::new());
        }
        before = Some(here);
        let mut cells = cells(row);
        if several {
            cells[0] = format!("{} x {}", row.batch, row.task);
        }
        lines.push(cells);
    }
    let mut out = aligned(&lines, 3);
    if several {
        out.push('\n');
        out.push_str(&by_batch(&summary.rows));
    }
    out.push_str(&chosen(&summary.rows));
    let e = &summary.environment;
    let mib = |b: u64| b as f64 / (1 << 20) as f64;
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
    out.push_str("tau counts the bonus token (plain = 1.00); speeds are medians over repeats of decoding alone, prefill apart; speed-ups are paired by prompt, with the middle 95 % over resampled prompts\n");
    out
}
