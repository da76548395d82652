//! What each site has done between two moments, for a page that a person reads: rates and percentiles, by the same buckets as `/metrics` has.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    BUCKETS, Metrics,
    shard::{Histogram, lock},
};

/// Of one site, since the start or between two moments.
#[derive(Clone, Debug, Default)]
pub struct SiteTotals {
    /// Answers from 500 to 599.
    pub server_errors: u64,
    duration: Histogram,
}

impl SiteTotals {
    pub fn since(&self, before: &SiteTotals) -> SiteTotals {
        let mut duration = self.duration.clone();
        for (mine, theirs) in duration.counts.iter_mut().zip(before.duration.counts) {
            *mine = mine.saturating_sub(theirs);
        }
        SiteTotals { server_errors: self.server_errors.saturating_sub(before.server_errors), duration }
    }

    pub fn requests(&self) -> u64 {
        self.duration.counts.iter().sum()
    }

    /// Seconds within which this part (0 to 1) of the requests has ended, on a line through its bucket as Prometheus' `histogram_quantile` has it; beyond the last
    /// bucket that one's bound. `None`: there were no requests.
    pub fn quantile(&self, part: f64) -> Option<f64> {
        let rank = part * self.requests() as f64;
        let (mut below, mut lower) = (0.0, 0.0);
        for (bound, count) in BUCKETS.iter().zip(self.duration.counts) {
            let count = count as f64;
            if count > 0.0 && below + count >= rank {
                return Some(lower + (bound - lower) * ((rank - below) / count));
            }
            (below, lower) = (below + count, *bound);
        }
        (self.requests() > 0).then_some(lower)
    }
}

impl Metrics {
    /// Since the start, by site; "" is what was refused before its site was known.
    pub fn sites(&self) -> BTreeMap<Arc<str>, SiteTotals> {
        let mut sites = BTreeMap::<Arc<str>, SiteTotals>::new();
        for shard in &self.shards {
            for (site, cell) in &lock(&shard.counts).sites.values {
                let totals = sites.entry(site.clone()).or_default();
                totals.duration.merge(&cell.duration);
                let failed = cell.requests.iter().filter(|((code, ..), _)| (500..600).contains(code));
                totals.server_errors += failed.map(|(_, n)| n).sum::<u64>();
            }
        }
        sites
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn between_two_moments_only_what_came_then_counts() {
        let metrics = Metrics::new(2);
        let request = |worker: usize, code, seconds| metrics.shard(worker).request("a", code, "php", "blue", seconds);
        (0..100).for_each(|_| request(0, 500, 50.0));
        let before = metrics.sites();
        (0..90).for_each(|n| request(n % 2, 200, 0.002));
        (0..10).for_each(|_| request(0, 503, 0.2));
        let site = metrics.sites()["a"].since(&before["a"]);
        assert_eq!((site.requests(), site.server_errors), (100, 10));
        // 50 of the 90 between 1 and 2.5 ms; the 95th and 99th between 100 and 250.
        let quantiles = [0.5, 0.95, 0.99].map(|part| (site.quantile(part).unwrap() * 10_000.0).round() / 10.0);
        assert_eq!(quantiles, [1.8, 175.0, 235.0]);
        assert_eq!(before["a"].since(&before["a"]).quantile(0.5), None);
        request(0, 200, 1000.0);
        assert_eq!(SiteTotals::default().quantile(1.0), None);
    }

    #[test]
    fn beyond_the_last_bucket_it_is_that_ones_bound() {
        let metrics = Metrics::new(1);
        metrics.shard(0).request("a", 200, "", "", 1000.0);
        assert_eq!(metrics.sites()["a"].quantile(0.5), BUCKETS.last().copied());
    }
}
