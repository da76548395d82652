//! Which part of each set this replica may use: from the same list of replicas each works out the same parts.

use std::{
    collections::BTreeSet,
    net::{IpAddr, UdpSocket},
};

use super::Reconciler;
use crate::{
    control::replicas::{self, Place},
    model::settings::Listen,
    upstream::{
        Snapshot,
        dispatch::now_ms,
        shares::{self, Share},
    },
};

impl Reconciler {
    /// Deals out the slots of every set, as the replicas are known now.
    pub(super) fn share_endpoints(&self, snapshot: &Snapshot) {
        let place = self.place();
        let before = std::mem::replace(&mut self.control.told().replicas, place);
        if place != before
            && let Some(Place { own, all, is_listed }) = place
        {
            tracing::info!(
                replica = own + 1,
                replicas = all,
                is_listed,
                "the workers of each set are shared with the other replicas"
            );
        }
        // An endpoint of several sets is dealt out once.
        let mut dealt = BTreeSet::new();
        let sets = snapshot.upstreams.values().flat_map(|upstream| upstream.sets.values());
        for (nth, set) in sets.enumerate() {
            let mut endpoints: Vec<_> =
                set.endpoints.iter().filter(|endpoint| !endpoint.is_leaving() && dealt.insert(endpoint.id)).collect();
            endpoints.sort_by(|a, b| a.address.cmp(&b.address));
            let Some(Place { own, all, .. }) = place.filter(|place| place.all > 1) else {
                for endpoint in endpoints.iter().filter(|endpoint| endpoint.is_shared_by_replicas()) {
                    endpoint.set_share(None, true);
                }
                continue;
            };
            let capacities: Vec<_> = endpoints.iter().map(|endpoint| endpoint.capacity()).collect();
            let mut shares = shares::split(&capacities, own, all, nth);
            // Its part may be of pods alone that are not usable now: then one slot of one that is.
            let now = now_ms();
            let usable: Vec<usize> = (0..endpoints.len()).filter(|at| endpoints[*at].is_usable(now)).collect();
            let has_none = usable.iter().all(|at| shares[*at].is_some_and(|share| share.slots == 0));
            if has_none && let Some(share) = usable.get(own % usable.len().max(1)).and_then(|at| shares[*at].as_mut()) {
                *share = Share { slots: 1, leases: false };
            }
            for (endpoint, share) in endpoints.iter().zip(shares) {
                endpoint.set_share(share.map(|share| share.slots), share.is_none_or(|share| share.leases));
            }
        }
    }

    /// `None`: nobody says which replicas there are.
    pub(super) fn place(&self) -> Option<Place> {
        let service = self.config.settings.kubernetes.as_ref()?.self_service.as_ref()?;
        let slices = self.known.get(service)?.listed()?;
        Some(replicas::place(slices, |ip| is_own(&self.config.settings.listen, ip)))
    }
}

/// Whether `ip` is this pod's: an address that it listens on or, where it listens on any, one that it could.
fn is_own(listen: &Listen, ip: IpAddr) -> bool {
    let on_any = listen.http.iter().any(|address| address.ip().is_unspecified());
    listen.http.iter().any(|address| address.ip() == ip) || on_any && UdpSocket::bind((ip, 0)).is_ok()
}
