//! Leases: connections kept between requests, one pool a worker.
//!
//! A kept connection holds a worker of FPM, so it is leased, not kept: it ends after so many requests, so much age or a
//! short idle time. The pool does no I/O but to look whether an idle connection is still quiet; it is generic over what travels
//! with a connection (`T`, the slot), which is given back by its drop.

use std::{collections::BTreeMap, time::Duration};

use tokio::time::Instant;

use super::exchange::Conn;

/// When a kept connection ends.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    pub requests: u32,
    pub age: Duration,
    pub idle: Duration,
}

struct Lease<T> {
    conn: Conn,
    slot: T,
    expires: Instant,
}

/// The leases of one worker by endpoint. Bounded by the slots, which are taken before a connection is made.
pub struct Pool<T> {
    leases: BTreeMap<u64, Vec<Lease<T>>>,
    /// Endpoints in the order in which a lease was parked last, so that the warmest is found first.
    recent: Vec<u64>,
    parked: usize,
}

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Pool { leases: BTreeMap::default(), recent: Vec::new(), parked: 0 }
    }
}

impl<T> Pool<T> {
    /// Whether `conn` may serve another request under `terms`.
    pub fn fits(conn: &Conn, terms: &Terms, now: Instant) -> bool {
        conn.requests < terms.requests && now.saturating_duration_since(conn.opened) < terms.age
    }

    pub fn park(&mut self, endpoint: u64, conn: Conn, slot: T, terms: &Terms) {
        let expires = (conn.idle_since + terms.idle).min(conn.opened + terms.age);
        self.leases.entry(endpoint).or_default().push(Lease { conn, slot, expires });
        if self.recent.last() != Some(&endpoint) {
            self.recent.retain(|id| *id != endpoint);
            self.recent.push(endpoint);
        }
        self.parked += 1;
    }

    /// The endpoint with the warmest lease among those that `wanted` accepts.
    pub fn warmest(&self, mut wanted: impl FnMut(u64) -> bool) -> Option<u64> {
        if self.parked == 0 {
            return None;
        }
        self.recent.iter().rev().copied().find(|id| self.leases.get(id).is_some_and(|l| !l.is_empty()) && wanted(*id))
    }

    /// The lease parked last for `endpoint`: the others grow old and end.
    pub fn take(&mut self, endpoint: u64) -> Option<(Conn, T)> {
        let lease = self.leases.get_mut(&endpoint)?.pop()?;
        self.parked -= 1;
        Some((lease.conn, lease.slot))
    }

    /// The lease parked first, for one who needs the slot and not the connection.
    pub fn take_oldest(&mut self, endpoint: u64) -> Option<(Conn, T)> {
        let list = self.leases.get_mut(&endpoint)?;
        if list.is_empty() {
            return None;
        }
        let lease = list.remove(0);
        self.parked -= 1;
        Some((lease.conn, lease.slot))
    }

    /// Takes out what is over and what FPM has closed; says when to look again. Endpoints without a lease are forgotten: the map is
    /// bounded by the slots, however many endpoints reloads bring.
    pub fn sweep(&mut self, now: Instant, mut ended: impl FnMut(Conn, T)) -> Option<Instant> {
        let mut next = None;
        self.leases.retain(|_, list| {
            let mut index = 0;
            while let Some(lease) = list.get(index) {
                if lease.expires <= now || !lease.conn.is_quiet() {
                    let lease = list.remove(index);
                    self.parked -= 1;
                    ended(lease.conn, lease.slot);
                } else {
                    next = Some(next.map_or(lease.expires, |n: Instant| n.min(lease.expires)));
                    index += 1;
                }
            }
            !list.is_empty()
        });
        self.recent.retain(|id| self.leases.contains_key(id));
        next
    }

    pub fn is_empty(&self) -> bool {
        self.parked == 0
    }
}
