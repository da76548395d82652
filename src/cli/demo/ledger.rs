//! What was sent, when, and what came of it; and whether that is what should have come of it.

use std::{fmt, time::Instant};

const COLOURS_SHOWN: usize = 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colour {
    Blue,
    Green,
}

impl Colour {
    pub fn name(self) -> &'static str {
        match self {
            Colour::Blue => "blue",
            Colour::Green => "green",
        }
    }

    pub fn parse(name: &str) -> Option<Colour> {
        [Colour::Blue, Colour::Green].into_iter().find(|colour| colour.name() == name)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Get,
    Post,
    Slow,
}

impl Kind {
    pub const ALL: [Kind; 3] = [Kind::Get, Kind::Post, Kind::Slow];

    pub fn name(self) -> &'static str {
        match self {
            Kind::Get => "GET",
            Kind::Post => "POST",
            Kind::Slow => "slow",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    Answered(Colour),
    /// An answer, but not the right one, or no connection.
    Failed(String),
    /// The connection ended between the request and the end of its answer.
    Cut(String),
}

#[derive(Clone, Debug)]
pub struct Entry {
    pub id: String,
    pub kind: Kind,
    pub sent: Instant,
    pub ended: Instant,
    pub end: End,
}

#[derive(Clone, Copy, Debug)]
pub struct Turn {
    pub to: Colour,
    pub started: Instant,
    /// `None` as long as the swap has not returned.
    pub returned: Option<Instant>,
}

#[derive(Debug)]
pub struct Ledger {
    began: Instant,
    /// Counted when sent; the entry comes when the request has ended.
    sent: [usize; 3],
    entries: Vec<Entry>,
    pub turns: Vec<Turn>,
}

impl Ledger {
    pub fn new(began: Instant) -> Ledger {
        Ledger { began, sent: [0; 3], entries: Vec::new(), turns: Vec::new() }
    }

    pub fn began(&self) -> Instant {
        self.began
    }

    /// What has ended.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    pub fn sent(&mut self, kind: Kind) {
        self.sent[kind as usize] += 1;
    }

    pub fn ended(&mut self, entry: Entry) {
        self.entries.push(entry);
    }

    /// Whoever is in force when a request is sent may answer it, and whoever has been turned to before it ended.
    fn may_answer(&self, colour: Colour, sent: Instant, ended: Instant) -> bool {
        let base =
            self.turns.iter().rev().find(|turn| turn.returned.is_some_and(|at| at <= sent)).map_or(Colour::Blue, |turn| turn.to);
        let meanwhile = |turn: &&Turn| turn.started < ended && turn.returned.is_none_or(|at| at > sent);
        base == colour || self.turns.iter().filter(meanwhile).any(|turn| turn.to == colour)
    }

    /// A line for every request that did not end as it should have; of those that the wrong colour answered, the first ones.
    pub fn wrong(&self) -> Vec<String> {
        let line = |entry: &Entry, what: fmt::Arguments| {
            let at = entry.sent.saturating_duration_since(self.began).as_secs_f64();
            let age = entry.ended.saturating_duration_since(entry.sent).as_secs_f64();
            format!("{} {} sent at {at:.3} s, after {age:.3} s: {what}", entry.kind.name(), entry.id)
        };
        let mut wrong = Vec::new();
        let mut colours = 0;
        for entry in &self.entries {
            match &entry.end {
                End::Answered(colour) if self.may_answer(*colour, entry.sent, entry.ended) => {}
                End::Answered(colour) => {
                    colours += 1;
                    if colours <= COLOURS_SHOWN {
                        wrong.push(line(entry, format_args!("wrong colour: answered by {}", colour.name())));
                    }
                }
                End::Failed(why) => wrong.push(line(entry, format_args!("failed: {why}"))),
                End::Cut(why) => wrong.push(line(entry, format_args!("cut: {why}"))),
            }
        }
        if colours > COLOURS_SHOWN {
            wrong.push(format!("and {} more answered by the wrong colour", colours - COLOURS_SHOWN));
        }
        for kind in Kind::ALL {
            let open = self.sent[kind as usize].saturating_sub(self.entries.iter().filter(|entry| entry.kind == kind).count());
            if open > 0 {
                wrong.push(format!("{}: {open} sent that never ended", kind.name()));
            }
        }
        wrong
    }

    /// A load that asked for nothing, or saw one colour only, has proved nothing.
    pub fn by(&self, colour: Colour) -> usize {
        self.entries.iter().filter(|entry| entry.end == End::Answered(colour)).count()
    }

    pub fn table(&self) -> String {
        let mut out = format!("{:10}{:>8}{:>8}{:>8}{:>8}{:>8}\n", "requests", "sent", "blue", "green", "failed", "cut");
        let mut total = [0; 5];
        for kind in Kind::ALL {
            let mut row = [self.sent[kind as usize], 0, 0, 0, 0];
            for entry in self.entries.iter().filter(|entry| entry.kind == kind) {
                row[match entry.end {
                    End::Answered(Colour::Blue) => 1,
                    End::Answered(Colour::Green) => 2,
                    End::Failed(_) => 3,
                    End::Cut(_) => 4,
                }] += 1;
            }
            out += &line(kind.name(), row);
            total.iter_mut().zip(row).for_each(|(sum, number)| *sum += number);
        }
        out + &line("all", total)
    }
}

fn line(name: &str, [sent, blue, green, failed, cut]: [usize; 5]) -> String {
    format!("{name:10}{sent:>8}{blue:>8}{green:>8}{failed:>8}{cut:>8}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_request_sent_after_a_swap_returned_belongs_to_the_new_colour() {
        let began = Instant::now();
        let at = |ms| began + Duration::from_millis(ms);
        let mut ledger = Ledger::new(began);
        ledger.turns.push(Turn { to: Colour::Green, started: at(10), returned: Some(at(20)) });
        for (colour, sent, ended, right) in [
            (Colour::Blue, 0, 5, true),
            (Colour::Green, 0, 5, false),
            (Colour::Blue, 0, 15, true),
            (Colour::Green, 0, 15, true),
            (Colour::Blue, 15, 30, true),
            (Colour::Green, 20, 30, true),
            (Colour::Blue, 20, 30, false),
        ] {
            assert_eq!(ledger.may_answer(colour, at(sent), at(ended)), right, "{colour:?} {sent} {ended}");
        }
    }

    #[test]
    fn whatever_did_not_end_well_is_listed() {
        let began = Instant::now();
        let mut ledger = Ledger::new(began);
        for end in [End::Answered(Colour::Blue), End::Answered(Colour::Green), End::Failed("502".into()), End::Cut("eof".into())] {
            ledger.sent(Kind::Post);
            ledger.ended(Entry { id: "p1".into(), kind: Kind::Post, sent: began, ended: began, end });
        }
        ledger.sent(Kind::Slow);
        let wrong = ledger.wrong();
        assert_eq!(wrong.len(), 4, "{wrong:?}");
        assert!(ledger.table().contains("POST             4       1       1       1       1\n"), "{}", ledger.table());
    }
}
