//! Which endpoint. Pure: it sees loads and gives an index.

/// What is known of one endpoint at the moment of the choice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    pub used: u32,
    /// Its workers, fewer while it is new; the same for all where they are not known.
    pub weight: f64,
    pub usable: bool,
    pub free: bool,
}

/// Among so many every endpoint is looked at; above, a sample: the best of a few is nearly as good as the best of all and
/// costs the same however many there are (Mitzenmacher, "The power of two choices").
const LOOK_AT_ALL: usize = 16;
const SAMPLE: usize = 4;

/// What an endpoint counts for. One that is new (`warmth` below 1) counts for less, at least one worker: it gets as many requests at once as that, and
/// more only where all others are as busy; so nobody waits while a worker is free.
pub fn weight(workers: Option<u32>, warmth: f64) -> f64 {
    match workers {
        Some(workers) => (f64::from(workers) * warmth).max(1.0),
        None => warmth.max(0.1),
    }
}

/// Is `a` less busy than `b`, by share of its workers?
fn less(a: Load, b: Load) -> bool {
    f64::from(a.used) * b.weight < f64::from(b.used) * a.weight
}

/// The least busy usable endpoint with a free slot; `seed` breaks ties and picks the sample.
pub fn least_busy(count: usize, seed: usize, load: impl Fn(usize) -> Load) -> Option<usize> {
    let best_of = |indices: &mut dyn Iterator<Item = usize>| {
        let mut best: Option<(usize, Load)> = None;
        for index in indices {
            let candidate = load(index);
            if candidate.usable && candidate.free && best.is_none_or(|(_, b)| less(candidate, b)) {
                best = Some((index, candidate));
            }
        }
        best.map(|(index, _)| index)
    };
    if count > LOOK_AT_ALL {
        // Odd multiplier: a spread that needs no random numbers.
        let start = seed.wrapping_mul(0x9E37_79B9);
        let sampled = best_of(&mut (0..SAMPLE).map(|k| start.wrapping_add(k * (count / SAMPLE)) % count));
        if sampled.is_some() {
            return sampled;
        }
    }
    best_of(&mut (0..count).map(|k| seed.wrapping_add(k) % count))
}

/// The next usable endpoint with a free slot, in turn.
pub fn round_robin(count: usize, turn: usize, load: impl Fn(usize) -> Load) -> Option<usize> {
    (0..count).map(|k| turn.wrapping_add(k) % count).find(|index| {
        let load = load(*index);
        load.usable && load.free
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(used: u32, capacity: u32) -> Load {
        Load { used, weight: f64::from(capacity), usable: true, free: used < capacity }
    }

    #[test]
    fn compares_shares_not_counts() {
        let loads = [load(3, 4), load(4, 16)];
        for seed in 0..4 {
            assert_eq!(least_busy(2, seed, |i| loads[i]), Some(1));
        }
    }

    /// Two of eight workers each, of which the first came three of ten seconds ago: it counts as two workers and a bit.
    #[test]
    fn one_that_is_new_gets_less_and_is_not_left_idle_while_others_are_full() {
        let new = |used| Load { weight: weight(Some(8), 0.3), ..load(used, 8) };
        let taken = |loads: [Load; 2]| least_busy(2, 0, |i| loads[i]);
        assert_eq!(taken([new(0), load(1, 8)]), Some(0), "an idle one is asked first, however new");
        assert_eq!(taken([new(2), load(6, 8)]), Some(1));
        assert_eq!(taken([new(2), load(7, 8)]), Some(0));
        assert_eq!(taken([new(7), load(8, 8)]), Some(0));
        assert_eq!([weight(Some(8), 0.0), weight(Some(8), 1.0), weight(None, 1.0), weight(None, 0.0)], [1.0, 8.0, 1.0, 0.1]);
    }

    #[test]
    fn ties_go_round() {
        let loads = [load(0, 4), load(0, 4)];
        assert_eq!(least_busy(2, 0, |i| loads[i]), Some(0));
        assert_eq!(least_busy(2, 1, |i| loads[i]), Some(1));
    }

    #[test]
    fn passes_over_what_is_full_or_unusable() {
        let loads = [load(4, 4), Load { usable: false, ..load(0, 4) }, load(3, 4)];
        assert_eq!(least_busy(3, 0, |i| loads[i]), Some(2));
        assert_eq!(round_robin(3, 0, |i| loads[i]), Some(2));
        assert_eq!(least_busy(2, 0, |i| loads[i]), None);
    }

    #[test]
    fn a_large_set_finds_the_only_free_one() {
        for free in [0, 17, 99] {
            let got = least_busy(100, 7, |i| load(if i == free { 0 } else { 4 }, 4));
            assert_eq!(got, Some(free));
        }
    }
}
