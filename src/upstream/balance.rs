//! Which endpoint. Pure: it sees loads and gives an index.

/// What is known of one endpoint at the moment of the choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    pub used: u32,
    /// `None`: not known; then `used` alone is compared.
    pub capacity: Option<u32>,
    pub usable: bool,
    pub free: bool,
}

/// Among so many every endpoint is looked at; above, a sample: the best of a few is nearly as good as the best of all and
/// costs the same however many there are (Mitzenmacher, "The power of two choices").
const LOOK_AT_ALL: usize = 16;
const SAMPLE: usize = 4;

/// Is `a` less busy than `b`, by share of its workers?
fn less(a: Load, b: Load) -> bool {
    let share = |l: Load| u64::from(l.capacity.unwrap_or(1).max(1));
    u64::from(a.used) * share(b) < u64::from(b.used) * share(a)
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
        Load { used, capacity: Some(capacity), usable: true, free: used < capacity }
    }

    #[test]
    fn compares_shares_not_counts() {
        let loads = [load(3, 4), load(4, 16)];
        for seed in 0..4 {
            assert_eq!(least_busy(2, seed, |i| loads[i]), Some(1));
        }
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
