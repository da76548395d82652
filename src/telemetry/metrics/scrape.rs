//! Everything at one moment, as OpenMetrics has it: one row below the definition of each family.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, PoisonError, atomic::Ordering},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet},
    metrics::MetricType,
};

use super::{
    shard::{Histogram, RequestRow, lock},
    *,
};

/// Everything at one moment, in the order it is told.
#[derive(Default)]
pub(super) struct Scrape {
    requests: BTreeMap<(Arc<str>, RequestRow), u64>,
    durations: BTreeMap<Arc<str>, Histogram>,
    errors: BTreeMap<&'static str, u64>,
    shed: BTreeMap<&'static str, u64>,
    attempts: BTreeMap<(Arc<str>, Arc<str>, &'static str), u64>,
    queue_waits: BTreeMap<Arc<str>, Histogram>,
    expired: BTreeMap<(Arc<str>, &'static str), u64>,
    connections: u64,
    accepted: u64,
    reloads: Vec<(&'static str, u64)>,
    swaps: Vec<(&'static str, u64)>,
    emptied: BySet,
    ejections: BySet,
    gauges: Gauges,
    process: process::Usage,
}

impl Metrics {
    pub(super) fn fold(&self) -> Scrape {
        let source = self.source.read().unwrap_or_else(PoisonError::into_inner);
        let mut scrape = Scrape {
            gauges: source.as_ref().map(|ask| ask()).unwrap_or_default(),
            reloads: lock(&self.reloads).clone(),
            swaps: lock(&self.swaps).clone(),
            emptied: lock(&self.emptied).clone(),
            process: process::Usage::now(),
            ..Scrape::default()
        };
        // What has never happened is told as 0: no rate would see the first time else.
        for upstream in &scrape.gauges.upstreams {
            for set in &upstream.sets {
                for by_set in [&mut scrape.emptied, &mut scrape.ejections] {
                    by_set.entry((Arc::clone(&upstream.name), Arc::clone(&set.name))).or_default();
                }
            }
        }
        for shard in &self.shards {
            // Closed first: the other order could show a connection as closed that was never opened.
            let closed = shard.closed.load(Ordering::Acquire);
            let opened = shard.opened.load(Ordering::Acquire);
            scrape.connections += opened.saturating_sub(closed);
            scrape.accepted += opened;
            let counts = lock(&shard.counts);
            for (site, cell) in &counts.sites.values {
                scrape.durations.entry(Arc::clone(site)).or_default().merge(&cell.duration);
                for (row, n) in &cell.requests {
                    *scrape.requests.entry((Arc::clone(site), row.clone())).or_default() += n;
                }
            }
            for (upstream, cell) in &counts.upstreams.values {
                for (set, n) in &cell.ejections {
                    *scrape.ejections.entry((Arc::clone(upstream), Arc::clone(set))).or_default() += n;
                }
                scrape.queue_waits.entry(Arc::clone(upstream)).or_default().merge(&cell.queue_wait);
                for (reason, n) in &cell.expired {
                    *scrape.expired.entry((Arc::clone(upstream), reason)).or_default() += n;
                }
                for ((set, result), n) in &cell.attempts {
                    *scrape.attempts.entry((Arc::clone(upstream), Arc::clone(set), result)).or_default() += n;
                }
            }
            for (cause, n) in &counts.errors {
                *scrape.errors.entry(cause).or_default() += n;
            }
            for (reason, n) in &counts.shed {
                *scrape.shed.entry(reason).or_default() += n;
            }
        }
        scrape
    }
}

impl fmt::Debug for Scrape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scrape")
    }
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for definition in METRICS {
            // OpenMetrics names a counter's family without the suffix, and the encoder adds it.
            let (name, kind) = match definition.kind {
                Kind::Counter => (definition.name.trim_end_matches("_total"), MetricType::Counter),
                Kind::Gauge => (definition.name, MetricType::Gauge),
                Kind::Histogram => (definition.name, MetricType::Histogram),
            };
            let help = definition.help;
            let encoder = encoder.encode_descriptor(name, help, None, kind)?;
            self.rows(&mut Rows { definition, encoder })?;
        }
        Ok(())
    }
}

impl Scrape {
    fn rows(&self, out: &mut Rows<'_>) -> fmt::Result {
        match out.definition.name {
            name if name == REQUESTS.name => {
                for ((site, (code, upstream, set)), n) in &self.requests {
                    let mut digits = itoa::Buffer::new();
                    let code = if *code == 0 { OTHER } else { digits.format(*code) };
                    out.counter(&[site, code, upstream, set], *n)?;
                }
                Ok(())
            }
            name if name == DURATION.name => self.durations.iter().try_for_each(|(site, h)| out.histogram(&[site], h)),
            name if name == ERRORS.name => self.errors.iter().try_for_each(|(cause, n)| out.counter(&[cause], *n)),
            name if name == SHED.name => self.shed.iter().try_for_each(|(reason, n)| out.counter(&[reason], *n)),
            name if name == CONNECTIONS.name => out.gauge(&[], self.connections),
            name if name == ACCEPTED.name => out.counter(&[], self.accepted),
            name if name == ATTEMPTS.name => {
                self.attempts.iter().try_for_each(|((upstream, set, result), n)| out.counter(&[upstream, set, result], *n))
            }
            name if name == QUEUE_WAIT.name => self.queue_waits.iter().try_for_each(|(upstream, h)| out.histogram(&[upstream], h)),
            name if name == EXPIRED.name => {
                self.expired.iter().try_for_each(|((upstream, reason), n)| out.counter(&[&**upstream, reason], *n))
            }
            name if name == QUEUE_DEPTH.name => self.gauges.upstreams.iter().try_for_each(|u| out.gauge(&[&u.name], u.queued)),
            name if name == PHASE.name => {
                let phase = self.gauges.phase;
                PHASES.iter().try_for_each(|known| out.gauge(&[known], u64::from(*known == phase)))
            }
            name if name == GENERATION.name => out.gauge(&[], self.gauges.generation),
            name if name == RELOADS.name => self.reloads.iter().try_for_each(|(outcome, n)| out.counter(&[outcome], *n)),
            name if name == SWAPS.name => self.swaps.iter().try_for_each(|(outcome, n)| out.counter(&[outcome], *n)),
            name if name == EMPTIED.name => {
                self.emptied.iter().try_for_each(|((upstream, set), n)| out.counter(&[&**upstream, &**set], *n))
            }
            name if name == BUFFER_MEMORY.name => out.gauge(&[], self.gauges.buffer_memory_bytes),
            name if name == BUFFER_DISK.name => out.gauge(&[], self.gauges.buffer_disk_bytes),
            name if name == LOG_LOST.name => out.counter(&[], self.gauges.access_log_lost),
            name if name == OWN_LOG_LOST.name => out.counter(&[], self.gauges.log_lost),
            name if name == CONNECTIONS_MAX.name => out.gauge(&[], self.gauges.connections_max),
            name if name == MEMORY_LIMIT.name => out.gauge(&[], self.gauges.buffer_memory_limit_bytes),
            name if name == DISK_LIMIT.name => out.gauge(&[], self.gauges.buffer_disk_limit_bytes),
            name if name == RELOAD_GOOD.name => out.gauge(&[], u64::from(!self.gauges.reload_refused)),
            name if name == RELOADED.name => self.gauges.reloaded.map_or(Ok(()), |at| out.gauge(&[], at)),
            name if name == READY.name => out.gauge(&[], u64::from(self.gauges.ready)),
            name if name == EJECTIONS.name => {
                self.ejections.iter().try_for_each(|((upstream, set), n)| out.counter(&[&**upstream, &**set], *n))
            }
            name if name == STARTED.name => self.process.started.map_or(Ok(()), |at| out.fraction(&[], at)),
            name if name == CPU.name => self.process.cpu.map_or(Ok(()), |seconds| out.seconds(&[], seconds)),
            name if name == RESIDENT.name => self.process.resident.map_or(Ok(()), |bytes| out.gauge(&[], bytes)),
            name if name == OPEN_FDS.name => self.process.descriptors.map_or(Ok(()), |n| out.gauge(&[], n)),
            name if name == MAX_FDS.name => self.process.most_descriptors.map_or(Ok(()), |n| out.gauge(&[], n)),
            name if name == TRACES_LOST.name => out.counter(&[], self.gauges.traces_lost),
            name if name == CERTIFICATE.name => {
                for (file, expiry) in &self.gauges.certificates {
                    out.gauge(&[file], *expiry)?;
                }
                Ok(())
            }
            name if name == BUILD.name => out.gauge(&[env!("CARGO_PKG_VERSION")], 1),
            name => self.set_rows(name, out),
        }
    }

    fn set_rows(&self, name: &str, out: &mut Rows<'_>) -> fmt::Result {
        for upstream in &self.gauges.upstreams {
            match name {
                name if name == REFUSED.name => out.gauge(&[&*upstream.name], u64::from(upstream.refused))?,
                name if name == OVERLOADED.name => out.gauge(&[&*upstream.name], u64::from(upstream.overloaded))?,
                _ => {}
            }
            for (lane, busy, waiting) in &upstream.lanes {
                match name {
                    name if name == LANE_BUSY.name => out.gauge(&[&*upstream.name, lane], *busy)?,
                    name if name == LANE_WAITING.name => out.gauge(&[&*upstream.name, lane], *waiting)?,
                    _ => {}
                }
            }
            for set in &upstream.sets {
                let labels = [&*upstream.name, &*set.name];
                match name {
                    name if name == CAPACITY.name => set.capacity.map_or(Ok(()), |n| out.gauge(&labels, n))?,
                    name if name == BUSY.name => out.gauge(&labels, set.busy)?,
                    name if name == PARKED.name => out.gauge(&labels, set.parked)?,
                    name if name == SATURATION.name => set.saturation.map_or(Ok(()), |part| out.fraction(&labels, part))?,
                    name if name == SHARE.name => set.share.map_or(Ok(()), |n| out.gauge(&labels, n))?,
                    name if name == USABLE.name => out.gauge(&labels, set.usable)?,
                    name if name == ENDPOINTS.name => {
                        set.states.iter().try_for_each(|(state, n)| out.gauge(&[&upstream.name, &set.name, state], *n))?;
                    }
                    name if name == KNOWN_AGE.name => set.known_age.map_or(Ok(()), |age| out.fraction(&labels, age))?,
                    name if name == ACTIVE.name => out.gauge(&labels, u64::from(set.active))?,
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

/// The rows of one family; label values stand in the order of the definition.
struct Rows<'a> {
    definition: &'static Definition,
    encoder: MetricEncoder<'a>,
}

impl Rows<'_> {
    fn row(&mut self, values: &[&str], write: impl FnOnce(&mut MetricEncoder<'_>) -> fmt::Result) -> fmt::Result {
        debug_assert_eq!(values.len(), self.definition.labels.len());
        if values.is_empty() {
            return write(&mut self.encoder);
        }
        let labels: Vec<(&str, &str)> = self.definition.labels.iter().copied().zip(values.iter().copied()).collect();
        write(&mut self.encoder.encode_family(&labels)?)
    }

    fn seconds(&mut self, labels: &[&str], value: f64) -> fmt::Result {
        self.row(labels, |row| row.encode_counter::<NoLabelSet, f64, f64>(&value, None))
    }

    fn counter(&mut self, labels: &[&str], value: u64) -> fmt::Result {
        self.row(labels, |row| row.encode_counter::<NoLabelSet, u64, f64>(&value, None))
    }

    fn gauge(&mut self, labels: &[&str], value: u64) -> fmt::Result {
        self.row(labels, |row| row.encode_gauge(&i64::try_from(value).unwrap_or(i64::MAX)))
    }

    fn fraction(&mut self, labels: &[&str], value: f64) -> fmt::Result {
        self.row(labels, |row| row.encode_gauge(&value))
    }

    fn histogram(&mut self, labels: &[&str], histogram: &Histogram) -> fmt::Result {
        let bounds = BUCKETS.into_iter().chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> = bounds.zip(histogram.counts).collect();
        let count = histogram.counts.iter().sum();
        self.row(labels, |row| row.encode_histogram::<NoLabelSet>(histogram.sum, count, &buckets, None))
    }
}
