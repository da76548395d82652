//! The figures as a table in Markdown and as a plot in SVG.

use std::{fmt::Write as _, time::Duration};

use super::{LaneStep, SCRIPTS, Step, peers};

pub fn line(step: &Step) -> String {
    format!(
        "{:>4}% {:<24} goodput {:.2}  p50 {:>5} ms  p99 {:>5} ms  503 {:>4}  gave up {:>4}  failed {:>3}  executions {:>4}, for nobody {:>4}, begun late {:>4}  FPM's queue {:>3}",
        step.percent,
        step.peer,
        step.goodput / step.capacity,
        ms(step.p50_ms),
        ms(step.p99_ms),
        step.refused,
        step.gave_up,
        step.failed,
        step.executions,
        step.dead,
        step.late,
        step.listen_queue
    )
}

pub fn table(steps: &[Step], lanes: &[LaneStep], time: Duration) -> String {
    let mut out = String::new();
    for script in SCRIPTS {
        let mine: Vec<&Step> = steps.iter().filter(|step| step.script == script.name).collect();
        let Some(first) = mine.first() else { continue };
        let _ = writeln!(
            out,
            "\n{}: {:.0} requests a second is 100%; {} s each.\n",
            capital(script.what),
            first.capacity,
            time.as_secs()
        );
        out += "| load | proxy | goodput of capacity | p50 ms | p99 ms | 503 | gave up | failed | executions | for nobody | begun after their client had left | FPM's listen queue, most |\n";
        out += "|---|---|---|---|---|---|---|---|---|---|---|---|\n";
        for step in mine {
            let _ = writeln!(
                out,
                "| {}% | {} | {:.2} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
                step.percent,
                step.peer,
                step.goodput / step.capacity,
                ms(step.p50_ms),
                ms(step.p99_ms),
                step.refused,
                step.gave_up,
                step.failed,
                step.executions,
                step.dead,
                step.late,
                step.listen_queue
            );
        }
        for peer in peers::ALL {
            let of = |percent: Option<u32>| {
                let mine = steps.iter().filter(|s| s.script == script.name && s.peer == peer.name());
                mine.filter(|s| percent.is_none_or(|p| s.percent == p)).map(|s| s.goodput).fold(0.0, f64::max)
            };
            let _ = writeln!(out, "\n{}: {:.2} of its peak at 300%.", peer.name(), of(Some(300)) / of(None));
        }
    }
    if !lanes.is_empty() {
        out += "\nA lane with a reserve of 25%, ten requests a second of 50 ms (100 on the slow pod), alone and beside a route whose requests of 400 ms (800) come three times as fast as both pods can do them:\n\n";
        out += "| | beside the slow route | answered | not answered | p50 ms | p99 ms |\n|---|---|---|---|---|---|\n";
        for step in lanes {
            let beside = if step.saturated { "saturated" } else { "idle" };
            let _ = writeln!(
                out,
                "| {} | {beside} | {} | {} | {} | {} |",
                step.peer,
                step.answered,
                step.not_answered,
                ms(step.p50_ms),
                ms(step.p99_ms)
            );
        }
    }
    out
}

/// A dash where nobody was answered.
fn ms(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.0}"))
}

fn capital(text: &str) -> String {
    text[..1].to_uppercase() + &text[1..]
}

const WIDTH: f64 = 300.0;
const HEIGHT: f64 = 190.0;
const GAP: f64 = 70.0;
const TOP: f64 = 60.0;

/// One panel a column of the table and script: load to the right, the figure upwards, one line a proxy.
pub fn plot(steps: &[Step]) -> String {
    type Figure = (&'static str, f64, fn(&Step) -> f64);
    let figures: [Figure; 3] = [
        ("goodput of capacity", 1.1, |s| s.goodput / s.capacity),
        ("p99 of what was answered, s", 2.0, |s| s.p99_ms.unwrap_or(f64::NAN) / 1e3),
        ("executions for nobody, of all", 1.0, |s| s.dead as f64 / (s.executions.max(1)) as f64),
    ];
    let columns = figures.len() as f64;
    let (width, height) = (GAP + columns * (WIDTH + GAP), TOP + SCRIPTS.len() as f64 * (HEIGHT + GAP));
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\n"
    );
    for (n, peer) in peers::ALL.iter().enumerate() {
        let x = GAP + n as f64 * 200.0;
        let _ = writeln!(
            out,
            "<rect x=\"{x}\" y=\"14\" width=\"14\" height=\"4\" fill=\"{}\"/><text x=\"{}\" y=\"20\">{}</text>",
            peer.colour(),
            x + 20.0,
            peer.name()
        );
    }
    for (row, script) in SCRIPTS.iter().enumerate() {
        for (column, (title, most, figure)) in figures.iter().enumerate() {
            let (left, top) = (GAP + column as f64 * (WIDTH + GAP), TOP + row as f64 * (HEIGHT + GAP));
            let x = |percent: u32| left + WIDTH * f64::from(percent) / 500.0;
            let y = |value: f64| top + HEIGHT * (1.0 - (value / most).clamp(0.0, 1.0));
            let _ = writeln!(out, "<text x=\"{left}\" y=\"{}\" font-weight=\"bold\">{}: {title}</text>", top - 8.0, script.name);
            let _ = writeln!(
                out,
                "<rect x=\"{left}\" y=\"{top}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"none\" stroke=\"#999\"/>"
            );
            for tick in [0.0, 0.5, 1.0] {
                let value = most * tick;
                let _ = writeln!(out, "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{value:.2}</text>", left - 6.0, y(value) + 4.0);
            }
            for percent in [100, 200, 300, 400, 500] {
                let _ = writeln!(
                    out,
                    "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{percent}%</text>",
                    x(percent),
                    top + HEIGHT + 16.0
                );
            }
            for peer in peers::ALL {
                let mine = steps.iter().filter(|s| s.script == script.name && s.peer == peer.name() && figure(s).is_finite());
                let points: Vec<String> = mine.map(|s| format!("{:.1},{:.1}", x(s.percent), y(figure(s)))).collect();
                let _ = writeln!(
                    out,
                    "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"2.5\"/>",
                    points.join(" "),
                    peer.colour()
                );
            }
        }
    }
    out + "</svg>\n"
}
