//! Replicas of this proxy share a set's workers without a word between them: each works out from the same list of replicas which slots are
//! its own, and borrows what FPM says nobody uses. Pure.

/// What one replica may use of one endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    pub slots: u32,
    /// Kept connections are allowed. Not where there are more replicas than workers: one would hold what another waits for.
    pub leases: bool,
}

/// The shares of replica `own` (from 0) of `replicas`, endpoint by endpoint; `None`: the capacity is not known, so there is nothing to share.
///
/// The slots of the set are numbered through and dealt out in turn; `shift` differs from set to set, so that not always the same replica gets what is left over. So the parts differ by one slot at most, on each pod and in all. Where there are more
/// replicas than slots each still has one: `oversubscribed` says by how much that is too many.
pub fn split(capacities: &[Option<u32>], own: usize, replicas: usize, shift: usize) -> Vec<Option<Share>> {
    let replicas = replicas.max(1);
    let total: usize = capacities.iter().flatten().map(|c| *c as usize).sum();
    let leases = total >= replicas;
    let own = (own + shift) % replicas;
    let mut first = 0;
    let mut shares: Vec<Option<Share>> = capacities
        .iter()
        .map(|capacity| {
            let count = (*capacity)? as usize;
            let slots = owned(first + count, own, replicas) - owned(first, own, replicas);
            first += count;
            Some(Share { slots: u32::try_from(slots).unwrap_or(u32::MAX), leases })
        })
        .collect();
    if own >= total && total > 0 {
        // Number `own` does not exist: the one that it would be, counted round.
        let mut nth = own % total;
        for (share, capacity) in shares.iter_mut().zip(capacities) {
            let (Some(share), Some(capacity)) = (share, capacity) else { continue };
            if nth < *capacity as usize {
                share.slots = 1;
                break;
            }
            nth -= *capacity as usize;
        }
    }
    shares
}

/// How many of the numbers below `end` are `own` modulo `replicas`.
fn owned(end: usize, own: usize, replicas: usize) -> usize {
    (end + replicas - 1 - own) / replicas
}

/// Requests that may be sent to the set at once beyond its workers, because each replica keeps one slot.
pub fn oversubscribed(capacity: u32, replicas: usize) -> u32 {
    u32::try_from(replicas).unwrap_or(u32::MAX).saturating_sub(capacity)
}

/// What FPM says, and what we know, at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    pub capacity: u32,
    /// Workers that are not idle.
    pub active: u32,
    /// Connections that no worker has taken yet.
    pub listen_queue: u32,
    /// Slots that this replica has taken.
    pub own: u32,
}

/// What one replica borrows of one endpoint.
#[derive(Debug, Default)]
pub struct Borrowing {
    /// What the others use, in the mean of the last answers.
    others: Option<f64>,
    /// The part of a worker that was not left to them so far.
    owed: f64,
}

/// The weight of the last answer: after four of them a change is seen in full.
const LAST: f64 = 0.5;

impl Borrowing {
    /// How much may be borrowed until the next answer. What the others use is theirs: of a part of a worker they have the whole for that part of the
    /// time, for the rest one of theirs may have to wait in FPM's backlog until the next worker is free. That one is what borrowing costs: to leave a worker
    /// idle for it would cost more. Where more of theirs wait, or they want all of their share, they have it at once.
    pub fn seen(&mut self, share: u32, seen: Seen) -> u32 {
        let theirs = seen.capacity.saturating_sub(share);
        let wanted = seen.active.saturating_add(seen.listen_queue).saturating_sub(seen.own);
        let used = if seen.listen_queue > 0 { wanted.saturating_sub(1) } else { wanted };
        let mean = self.others.map_or(f64::from(used), |mean| mean + LAST * (f64::from(used) - mean));
        self.others = Some(mean);
        self.owed += mean;
        // Not above a u32: the mean of u32s.
        let mut others = self.owed as u32;
        self.owed -= f64::from(others);
        if seen.listen_queue > 1 || wanted >= theirs {
            others = others.max(wanted);
        }
        theirs.saturating_sub(others)
    }

    /// Nothing is needed, or nothing is known.
    pub fn forget(&mut self) {
        *self = Borrowing::default();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn slots(capacities: &[Option<u32>], own: usize, replicas: usize, shift: usize) -> Vec<u32> {
        split(capacities, own, replicas, shift).into_iter().map(|share| share.map_or(0, |s| s.slots)).collect()
    }

    proptest! {
        #[test]
        fn every_slot_has_one_owner(pods in prop::collection::vec(1_u32..40, 1..12), replicas in 1_usize..20, shift in 0_usize..5) {
            let capacities: Vec<_> = pods.iter().copied().map(Some).collect();
            let total: u32 = pods.iter().sum();
            let shares: Vec<Vec<u32>> = (0..replicas).map(|own| slots(&capacities, own, replicas, shift)).collect();
            let sums: Vec<u32> = shares.iter().map(|s| s.iter().sum()).collect();
            if total as usize >= replicas {
                for (pod, capacity) in pods.iter().enumerate() {
                    prop_assert_eq!(shares.iter().map(|s| s[pod]).sum::<u32>(), *capacity);
                }
                prop_assert!(sums.iter().max().unwrap() - sums.iter().min().unwrap() <= 1);
            } else {
                prop_assert!(sums.iter().all(|sum| *sum == 1));
                prop_assert_eq!(sums.iter().sum::<u32>() - total, oversubscribed(total, replicas));
            }
        }
    }

    #[test]
    fn parts_differ_by_one_and_what_is_not_known_is_not_shared() {
        assert_eq!([0, 1, 2].map(|own| slots(&[Some(4), Some(4)], own, 3, 0)), [[2, 1], [1, 2], [1, 1]]);
        assert_eq!(split(&[None, Some(2)], 0, 2, 0), [None, Some(Share { slots: 1, leases: true })]);
        // Six replicas on four workers: each has one, and nobody keeps a connection.
        let six: Vec<_> = (0..6).map(|own| slots(&[Some(4)], own, 6, 0)).collect();
        assert_eq!(six, vec![vec![1]; 6]);
        assert!(!split(&[Some(4)], 5, 6, 0)[0].unwrap().leases);
    }

    #[test]
    fn what_nobody_uses_is_borrowed_and_given_back_when_it_is_wanted() {
        let mut borrowing = Borrowing::default();
        let seen = |active, listen_queue, own| Seen { capacity: 8, active, listen_queue, own };
        assert_eq!(borrowing.seen(4, seen(4, 0, 4)), 4, "the others are idle");
        assert_eq!(borrowing.seen(4, seen(8, 0, 8)), 4);
        // One of theirs waits: that is the price. Two wait: they have them, and all when they want all.
        assert_eq!(borrowing.seen(4, seen(8, 1, 8)), 4);
        assert_eq!(borrowing.seen(4, seen(8, 2, 8)), 2);
        assert_eq!(borrowing.seen(4, seen(8, 1, 5)), 0);
        // And without a queue within four answers, which is less than a second.
        let mut others = Borrowing::default();
        others.seen(4, seen(8, 0, 8));
        let after: Vec<u32> = (0..4).map(|_| others.seen(4, seen(8, 0, 4))).collect();
        assert_eq!(after.last(), Some(&0), "{after:?}");
        // They use half a worker: every other answer leaves them one.
        let mut half = Borrowing::default();
        let borrowed: Vec<u32> =
            [(8, 8), (8, 7)].repeat(20).into_iter().map(|(active, own)| half.seen(4, seen(active, 0, own))).collect();
        let mean = f64::from(borrowed[20..].iter().sum::<u32>()) / 20.0;
        assert!((3.4..=3.6).contains(&mean) && borrowed.iter().all(|n| *n >= 3), "{borrowed:?}");
    }
}
