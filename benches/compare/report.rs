//! The figures as a page in Markdown and as bars in SVG.

use std::{collections::BTreeMap, fmt::Write as _, process::Command};

use super::{
    Options, Sample, State,
    peers::{self, Peer},
    rows::{Judged, Row},
    tables,
};

pub fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut all: Vec<f64> = values.collect();
    all.sort_by(f64::total_cmp);
    (!all.is_empty()).then(|| all[(all.len() - 1) / 2])
}

pub fn line(sample: &Sample) -> String {
    let seen = &sample.seen;
    match sample.idle {
        Some((bytes, cpu)) => format!("{:<10} {bytes:>8.0} bytes a connection, {cpu:.2}% of a core while idle", sample.peer.name()),
        None => format!(
            "{:<10} {:>8.2} us  {:>7.0}/s  p50 {:>6} p99 {:>6} p999 {:>6} worst {:>7} us  fewest {:.2}  rss {:>4} MiB  errors {}{}{}",
            sample.peer.name(),
            sample.cpu_us,
            sample.rate,
            seen.p50_us,
            seen.p99_us,
            seen.p999_us,
            seen.max_us,
            seen.fewest,
            sample.rss >> 20,
            seen.errors,
            if seen.resumed > 0 { format!("  resumed {}", seen.resumed) } else { String::new() },
            seen.why.as_ref().map_or_else(String::new, |why| format!(" ({why})"))
        ),
    }
}

/// What a proxy has done in a row: medians over the rounds.
struct Found {
    value: f64,
    by_round: Vec<f64>,
    errors: u64,
    cpu: f64,
    rate: f64,
    times: [f64; 4],
    fewest: f64,
    rss: f64,
    idle_cpu: Option<f64>,
}

fn figure(row: &Row, sample: &Sample) -> f64 {
    match row.judged {
        Judged::Cpu => sample.cpu_us,
        Judged::Rate => sample.rate,
        Judged::P99 => sample.seen.p99_us as f64,
        Judged::Memory => sample.idle.map_or(f64::NAN, |idle| idle.0),
    }
}

fn found(state: &State, row: &Row, peer: Peer) -> Option<Found> {
    let mine: Vec<&Sample> = state.samples.iter().filter(|s| s.row == row.id && s.peer == peer).collect();
    let of = |figure: &dyn Fn(&Sample) -> f64| median(mine.iter().map(|s| figure(s)));
    Some(Found {
        value: of(&|s| figure(row, s))?,
        by_round: mine.iter().map(|s| figure(row, s)).collect(),
        errors: mine.iter().map(|s| s.seen.errors).sum(),
        cpu: of(&|s| s.cpu_us)?,
        rate: of(&|s| s.rate)?,
        times: [
            of(&|s| s.seen.p50_us as f64)?,
            of(&|s| s.seen.p99_us as f64)?,
            of(&|s| s.seen.p999_us as f64)?,
            // The worst of all rounds, not their middle.
            mine.iter().map(|s| s.seen.max_us as f64).fold(0.0, f64::max),
        ],
        fewest: mine.iter().map(|s| s.seen.fewest).fold(f64::INFINITY, f64::min),
        rss: of(&|s| s.rss as f64)?,
        idle_cpu: of(&|s| s.idle.map_or(f64::NAN, |idle| idle.1)),
    })
}

/// How Slackwater stands in a row.
pub struct Verdict {
    pub best: Peer,
    /// Over the best peer; for memory the bytes themselves.
    pub ratio: f64,
    pub spread: (f64, f64),
    pub word: &'static str,
}

pub fn verdict(state: &State, row: &Row) -> Option<Verdict> {
    let mine = found(state, row, Peer::Slackwater)?;
    let higher_is_better = row.judged == Judged::Rate;
    let others: BTreeMap<Peer, Found> = peers::ALL[1..]
        .iter()
        .filter(|peer| row.against.is_none_or(|only| only == **peer))
        .filter_map(|peer| Some((*peer, found(state, row, *peer).filter(|found| found.errors == 0)?)))
        .collect();
    let better = |a: &f64, b: &f64| if higher_is_better { b.total_cmp(a) } else { a.total_cmp(b) };
    let (best, theirs) = others.iter().min_by(|a, b| better(&a.1.value, &b.1.value))?;
    let pairs: Vec<f64> = mine.by_round.iter().zip(&theirs.by_round).map(|(a, b)| a / b).collect();
    let (ratio, spread) = match row.judged {
        Judged::Memory => (mine.value, (min(&mine.by_round), max(&mine.by_round))),
        _ => (mine.value / theirs.value, (min(&pairs), max(&pairs))),
    };
    let reached = |bound: f64| if higher_is_better { ratio >= bound } else { ratio <= bound };
    let word = match mine.errors {
        0 if reached(row.goal) => "goal",
        0 if reached(row.line) => "line",
        0 => "**missed**",
        _ => "**void: errors**",
    };
    Some(Verdict { best: *best, ratio, spread, word })
}

fn min(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

fn max(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}

pub fn command(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    output.map_or_else(|_| String::new(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn number(row: &Row, value: f64) -> String {
    match row.judged {
        Judged::Cpu if value < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

pub fn page(state: &State, rows: &[Row], options: &Options) -> String {
    let model = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model =
        model.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default().trim_start_matches([' ', '\t', ':']);
    let mut out = format!(
        "# Benchmarks\n\n`benches/compare/run`, measured on {} ({} cores, {model}, {}): Slackwater beside {}.\n\n",
        state.measured,
        command("nproc", &[]),
        command("uname", &["-sr"]),
        peers::ALL[1..].iter().map(|peer| peer.version()).collect::<Vec<_>>().join("; "),
    );
    let _ = writeln!(
        out,
        "Equal settings, one worker each, all threads of a proxy on one core, clients and responder on the other, {} rounds of {} s in turns (row 6: one; row 7: five times as long). CPU is user and system time over the requests answered; \
         on loopback a sender also pays for its peer's softirq. Ratios are Slackwater's figure over that of the best peer (rates: higher is better; all else: lower), medians, with the range over the rounds. One error voids a row. \
         A dash: the proxy cannot do it (HAProxy serves no files but small ones from memory, Caddy keeps no FastCGI connection).\n\n![bars](img/benchmarks.svg)\n",
        options.rounds, options.seconds
    );
    out += "## How Slackwater stands\n\n| row | | judged by | Slackwater | Nginx | HAProxy | Caddy | ratio to the best | range | line | goal | reached |\n|---|---|---|---|---|---|---|---|---|---|---|---|\n";
    for row in rows {
        let Some(verdict) = verdict(state, row) else { continue };
        let judged = match row.judged {
            Judged::Cpu => "CPU, us",
            Judged::Rate => "requests/s",
            Judged::P99 => "p99, us",
            Judged::Memory => "bytes each",
        };
        let cells: Vec<String> = peers::ALL
            .iter()
            .map(|peer| match found(state, row, *peer) {
                None => "-".to_owned(),
                Some(found) if found.errors > 0 => format!("void ({} errors)", found.errors),
                Some(found) => number(row, found.value),
            })
            .collect();
        let (digits, against) = (if row.judged == Judged::Memory { 0 } else { 2 }, verdict.best.name());
        let _ = writeln!(
            out,
            "| {} | {} | {judged} | {} | {:.digits$} ({against}) | {:.digits$} to {:.digits$} | {} | {} | {} |",
            row.id,
            row.title,
            cells.join(" | "),
            verdict.ratio,
            verdict.spread.0,
            verdict.spread.1,
            row.line,
            row.goal,
            verdict.word
        );
    }
    if !state.counts.is_empty() {
        out += "\n## Counted, in row 1a\n\n| | system calls per request | instructions in user space per request | which calls |\n|---|---|---|---|\n";
        for (peer, counts) in &state.counts {
            let mut calls: Vec<_> = counts.calls.iter().collect();
            calls.sort_by(|a, b| b.1.total_cmp(a.1));
            let calls: Vec<String> = calls.iter().map(|(name, each)| format!("{name} {each:.2}")).collect();
            let _ = writeln!(
                out,
                "| {} | {:.2} | {} | {} |",
                peer.name(),
                counts.all_calls,
                counts.instructions.map_or_else(|| "-".to_owned(), |n| format!("{n:.0}")),
                calls.join(", ")
            );
        }
    }
    if !state.tables.is_empty() {
        let _ = write!(out, "\n## Row 8: tables, endpoints, swaps\n\n{}", tables::table(&state.tables));
    }
    out += "\n## Everything that was seen\n\nWorst: the longest that any client waited in any round. Fewest: answers of the client that got the fewest, over the mean.\n\n| row | proxy | CPU us | requests/s | p50 us | p99 us | p99.9 us | worst us | fewest | RSS MiB | errors |\n|---|---|---|---|---|---|---|---|---|---|---|\n";
    for row in rows {
        for peer in peers::ALL {
            let Some(found) = found(state, row, peer) else { continue };
            if row.judged == Judged::Memory {
                let _ = writeln!(
                    out,
                    "| {} | {} | {:.2}% of a core while idle | | | | | | | {:.0} | {} |",
                    row.id,
                    peer.name(),
                    found.idle_cpu.unwrap_or(f64::NAN),
                    found.rss / 1048576.0,
                    found.errors
                );
                continue;
            }
            let [p50, p99, p999, worst] = found.times;
            let _ = writeln!(
                out,
                "| {} | {} | {:.1} | {:.0} | {p50:.0} | {p99:.0} | {p999:.0} | {worst:.0} | {:.2} | {:.0} | {} |",
                row.id,
                peer.name(),
                found.cpu,
                found.rate,
                found.fewest,
                found.rss / 1048576.0,
                found.errors
            );
        }
    }
    out
}

const BAR: f64 = 9.0;
const LEFT: f64 = 330.0;
const WIDE: f64 = 480.0;

/// A group of bars for each row, in parts of the best peer.
pub fn plot(state: &State, rows: &[Row]) -> String {
    let shown: Vec<(&Row, Verdict)> = rows.iter().filter_map(|row| Some((row, verdict(state, row)?))).collect();
    let group = 4.0 * BAR + 12.0;
    let (width, height) = (LEFT + WIDE + 60.0, 60.0 + shown.len() as f64 * group);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"11\">\n<rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\n"
    );
    for (n, peer) in peers::ALL.iter().enumerate() {
        let x = LEFT + n as f64 * 110.0;
        let _ = writeln!(
            out,
            "<rect x=\"{x}\" y=\"12\" width=\"12\" height=\"8\" fill=\"{}\"/><text x=\"{}\" y=\"20\">{}</text>",
            peer.colour(),
            x + 18.0,
            peer.name()
        );
    }
    // Twice the best peer is the right edge.
    let scale = |ratio: f64| WIDE * (ratio / 2.0).min(1.0);
    let _ = writeln!(
        out,
        "<text x=\"{}\" y=\"40\" text-anchor=\"middle\">the best peer</text><line x1=\"{0}\" y1=\"46\" x2=\"{0}\" y2=\"{height}\" stroke=\"#999\" stroke-dasharray=\"3 3\"/>",
        LEFT + scale(1.0)
    );
    for (n, (row, verdict)) in shown.iter().enumerate() {
        let top = 52.0 + n as f64 * group;
        let what = match row.judged {
            Judged::Cpu => "CPU",
            Judged::Rate => "rate, higher is better",
            Judged::P99 => "p99",
            Judged::Memory => "memory",
        };
        let _ = writeln!(
            out,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{} ({what})</text>",
            LEFT - 8.0,
            top + 2.0 * BAR + 4.0,
            row.title
        );
        let Some(best) = found(state, row, verdict.best) else { continue };
        for (k, peer) in peers::ALL.iter().enumerate() {
            let Some(mine) = found(state, row, *peer).filter(|found| found.errors == 0) else { continue };
            let ratio = mine.value / best.value;
            let y = top + k as f64 * BAR;
            let _ = writeln!(
                out,
                "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{:.1}\" height=\"{}\" fill=\"{}\"/><text x=\"{:.1}\" y=\"{}\" font-size=\"8\">{ratio:.2}</text>",
                scale(ratio),
                BAR - 1.0,
                peer.colour(),
                LEFT + scale(ratio) + 3.0,
                y + BAR - 2.0
            );
        }
    }
    out + "</svg>\n"
}
