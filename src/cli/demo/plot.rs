//! The rehearsal as a picture (SVG): how long each request took and which set answered it, over time, with what was done to the proxy.

use std::{
    fmt::Write as _,
    time::{Duration, Instant},
};

use super::ledger::{Colour, End, Entry, Kind, Ledger};

const WIDTH: f64 = 1100.0;
const LEFT: f64 = 70.0;
const BARS_TOP: f64 = 92.0;
const BAR: f64 = 13.0;
const LANES: usize = 3;
const PLOT_TOP: f64 = BARS_TOP + LANES as f64 * (BAR + 3.0) + 44.0;
const PLOT_HEIGHT: f64 = 250.0;
const BOTTOM: f64 = PLOT_TOP + PLOT_HEIGHT;
/// Thousands of points would be nothing but a large file: of each span and set the worst request, and the one in the middle.
const SPAN: Duration = Duration::from_millis(100);
/// Milliseconds, on a scale of powers of ten.
const LOWEST: f64 = 0.1;
const HIGHEST: f64 = 10_000.0;

/// Something that was done to the proxy.
#[derive(Debug)]
pub struct Mark {
    pub at: Instant,
    pub what: &'static str,
}

fn paint(colour: Colour) -> &'static str {
    match colour {
        Colour::Blue => "#2563c9",
        Colour::Green => "#17803d",
    }
}

pub fn svg(ledger: &Ledger, marks: &[Mark]) -> String {
    let seconds = |at: Instant| at.saturating_duration_since(ledger.began()).as_secs_f64();
    let last = ledger.entries().iter().map(|entry| seconds(entry.ended)).chain(marks.iter().map(|mark| seconds(mark.at)));
    let length = last.fold(1.0, f64::max);
    let x = |at: Instant| LEFT + (WIDTH - LEFT - 20.0) * seconds(at) / length;
    let failed = ledger.entries().iter().filter(|entry| !matches!(entry.end, End::Answered(_))).count();
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{}\" fill=\"#fff\"/>\n<text x=\"{LEFT}\" y=\"22\" font-size=\"15\" font-weight=\"bold\">{} requests, {failed} failed</text>\n",
        BOTTOM + 46.0,
        BOTTOM + 46.0,
        ledger.entries().len()
    );
    for (n, colour) in [Colour::Blue, Colour::Green].into_iter().enumerate() {
        let at = LEFT + 260.0 + n as f64 * 150.0;
        let _ = writeln!(
            out,
            "<circle cx=\"{at}\" cy=\"18\" r=\"4\" fill=\"{}\"/><text x=\"{}\" y=\"22\">answered by {}</text>",
            paint(colour),
            at + 9.0,
            colour.name()
        );
    }
    done(&mut out, ledger, marks, x);
    slow(&mut out, ledger, x);
    fast(&mut out, ledger, x, seconds);
    for second in (0..=length as u64).step_by(2) {
        let at = LEFT + (WIDTH - LEFT - 20.0) * second as f64 / length;
        let _ = writeln!(out, "<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{second} s</text>", BOTTOM + 18.0);
    }
    out + "</svg>\n"
}

/// Lines from top to bottom; a swap is as wide as it took until its old set had drained.
fn done(out: &mut String, ledger: &Ledger, marks: &[Mark], x: impl Fn(Instant) -> f64) {
    let top = BARS_TOP - 26.0;
    for turn in &ledger.turns {
        let (from, to) = (x(turn.started), x(turn.returned.unwrap_or(turn.started)));
        let _ = writeln!(
            out,
            "<rect x=\"{from:.1}\" y=\"{top}\" width=\"{:.1}\" height=\"{}\" fill=\"{}\" opacity=\"0.13\"/>\
             <text x=\"{from:.1}\" y=\"{}\">swap to {}</text>",
            (to - from).max(1.0),
            BOTTOM - top,
            paint(turn.to),
            top - 6.0,
            turn.to.name()
        );
    }
    // Labels that would lie on one another take turns above.
    let (mut right, mut level) = (f64::NEG_INFINITY, 0.0);
    for mark in marks {
        let at = x(mark.at);
        level = if at < right { 14.0 - level } else { 0.0 };
        right = at + 110.0;
        let anchor = if at > WIDTH - 60.0 { "end" } else { "start" };
        let _ = writeln!(
            out,
            "<line x1=\"{at:.1}\" y1=\"{top}\" x2=\"{at:.1}\" y2=\"{BOTTOM}\" stroke=\"#555\" stroke-dasharray=\"4 3\"/>\
             <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{}</text>",
            top - 20.0 - level,
            mark.what
        );
    }
}

/// A bar for each request that takes long: one that was sent before a swap ends on the set that it was sent to.
fn slow(out: &mut String, ledger: &Ledger, x: impl Fn(Instant) -> f64) {
    let _ = writeln!(
        out,
        "<text x=\"{LEFT}\" y=\"{}\" font-weight=\"bold\">requests of 1.5 s, each from its first byte to its last</text>",
        BARS_TOP - 8.0
    );
    for (n, entry) in ledger.entries().iter().filter(|entry| entry.kind == Kind::Slow).enumerate() {
        let y = BARS_TOP + (n % LANES) as f64 * (BAR + 3.0);
        let (from, to) = (x(entry.sent), x(entry.ended));
        let fill = if let End::Answered(colour) = entry.end { paint(colour) } else { "#c00" };
        let _ =
            writeln!(out, "<rect x=\"{from:.1}\" y=\"{y}\" width=\"{:.1}\" height=\"{BAR}\" rx=\"2\" fill=\"{fill}\"/>", to - from);
    }
}

/// Of the others: of each span the worst and the one in the middle, by the set that answered; every one that failed.
fn fast(out: &mut String, ledger: &Ledger, x: impl Fn(Instant) -> f64, seconds: impl Fn(Instant) -> f64) {
    let y = |ms: f64| BOTTOM - PLOT_HEIGHT * (ms.clamp(LOWEST, HIGHEST) / LOWEST).log10() / (HIGHEST / LOWEST).log10();
    let _ = writeln!(
        out,
        "<text x=\"{LEFT}\" y=\"{}\" font-weight=\"bold\">GET and POST: the slowest of each tenth of a second (dot) and the middle one (line)</text>",
        PLOT_TOP - 10.0
    );
    for (ms, label) in [(0.1, "0.1 ms"), (1.0, "1 ms"), (10.0, "10 ms"), (100.0, "100 ms"), (1_000.0, "1 s"), (10_000.0, "10 s")] {
        let _ = writeln!(
            out,
            "<line x1=\"{LEFT}\" y1=\"{0:.1}\" x2=\"{1}\" y2=\"{0:.1}\" stroke=\"#ddd\"/><text x=\"{2}\" y=\"{3:.1}\" text-anchor=\"end\">{label}</text>",
            y(ms),
            WIDTH - 20.0,
            LEFT - 8.0,
            y(ms) + 4.0
        );
    }
    let took = |entry: &Entry| entry.ended.saturating_duration_since(entry.sent).as_secs_f64() * 1000.0;
    for colour in [Colour::Blue, Colour::Green] {
        let mut answered: Vec<&Entry> =
            ledger.entries().iter().filter(|entry| entry.kind != Kind::Slow && entry.end == End::Answered(colour)).collect();
        answered.sort_by_key(|entry| entry.ended);
        let span = |entry: &&Entry| (seconds(entry.ended) / SPAN.as_secs_f64()) as u64;
        let mut line: Vec<String> = Vec::new();
        let mut before = None;
        for of_one in answered.chunk_by(|a, b| span(a) == span(b)) {
            let mut times: Vec<f64> = of_one.iter().map(|entry| took(entry)).collect();
            times.sort_by(f64::total_cmp);
            let (Some(first), Some(worst), Some(middle)) = (of_one.first(), times.last(), times.get(times.len() / 2)) else {
                continue;
            };
            // Where the set was not in use for a while the line has a gap.
            if before.is_some_and(|before| span(first) > before + 3) {
                polyline(out, &mut line, colour);
            }
            before = Some(span(first));
            let at = x(first.ended);
            let _ = writeln!(out, "<circle cx=\"{at:.1}\" cy=\"{:.1}\" r=\"2.4\" fill=\"{}\"/>", y(*worst), paint(colour));
            line.push(format!("{at:.1},{:.1}", y(*middle)));
        }
        polyline(out, &mut line, colour);
    }
    for entry in ledger.entries().iter().filter(|entry| !matches!(entry.end, End::Answered(_))) {
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" fill=\"#c00\" font-size=\"16\" font-weight=\"bold\" text-anchor=\"middle\">&#215;</text>",
            x(entry.ended),
            y(took(entry)) + 5.0
        );
    }
}

fn polyline(out: &mut String, points: &mut Vec<String>, colour: Colour) {
    if !points.is_empty() {
        let _ = writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"1.5\" opacity=\"0.7\"/>",
            points.join(" "),
            paint(colour)
        );
        points.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::demo::ledger::Turn;

    #[test]
    fn whatever_failed_is_seen_and_the_rest_is_thinned() {
        let began = Instant::now();
        let at = |ms: u64| began + Duration::from_millis(ms);
        let mut ledger = Ledger::new(began);
        let mut entry = |kind, sent: u64, took: u64, end| {
            ledger.ended(Entry { id: "x".into(), kind, sent: at(sent), ended: at(sent + took), end });
        };
        (0..10_000).for_each(|n| entry(Kind::Get, n, 1, End::Answered(if n < 5_000 { Colour::Blue } else { Colour::Green })));
        (0..3).for_each(|n| entry(Kind::Slow, n * 1_500, 1_500, End::Answered(Colour::Blue)));
        (0..7).for_each(|n| entry(Kind::Post, n, 3, End::Failed("502".into())));
        ledger.turns.push(Turn { to: Colour::Green, started: at(5_000), returned: Some(at(5_200)) });
        let picture = svg(&ledger, &[Mark { at: at(2_000), what: "reload" }]);
        assert!(picture.contains("10010 requests, 7 failed"));
        assert_eq!(picture.matches("&#215;").count(), 7);
        assert!(picture.contains(">swap to green<") && picture.contains(">reload<"));
        assert_eq!(picture.matches("rx=\"2\"").count(), 3, "a bar for each slow one");
        assert!((90..=110).contains(&picture.matches("r=\"2.4\"").count()), "a dot for each tenth of a second");
        assert!(picture.len() < 40_000 && picture.starts_with("<svg ") && picture.ends_with("</svg>\n"));
    }
}
