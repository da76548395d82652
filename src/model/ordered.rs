//! The routes of a site in the file's order, with an index of their prefixes: what one request costs does not grow with the table.

use std::{ops::Deref, sync::Arc};

use super::site::{Pattern, Route};

#[derive(Debug, Default)]
pub struct Ordered {
    routes: Vec<Arc<Route>>,
    /// Sorted.
    prefixes: Vec<Prefix>,
    /// The places of expressions, which only trying decides.
    others: Vec<usize>,
}

#[derive(Debug)]
struct Prefix {
    prefix: String,
    /// Where its routes stand, ascending.
    places: Vec<usize>,
    /// The longest other prefix that this one begins with.
    shorter: Option<usize>,
}

impl From<Vec<Arc<Route>>> for Ordered {
    fn from(routes: Vec<Arc<Route>>) -> Self {
        let (mut named, mut others) = (Vec::new(), Vec::new());
        for (place, route) in routes.iter().enumerate() {
            match &route.pattern {
                Pattern::Prefix(prefix) => named.push((prefix.clone(), place)),
                Pattern::Any | Pattern::Exact(_) | Pattern::Regex(_) => others.push(place),
            }
        }
        named.sort_unstable();
        let mut ordered = Ordered { routes, prefixes: Vec::new(), others };
        for (prefix, place) in named {
            if let Some(last) = ordered.prefixes.last_mut().filter(|last| last.prefix == prefix) {
                last.places.push(place);
                continue;
            }
            let shorter = ordered.begins(ordered.prefixes.len().checked_sub(1), prefix.as_bytes());
            ordered.prefixes.push(Prefix { prefix, places: vec![place], shorter });
        }
        ordered
    }
}

impl Ordered {
    /// The longest prefix that `path` begins with, `from` being the last in order that is not behind `path`: whatever lies between a prefix of `path` and
    /// `path` begins with that prefix too, so the way leads by `shorter` alone.
    fn begins(&self, from: Option<usize>, path: &[u8]) -> Option<usize> {
        let mut at = from;
        while let Some(prefix) = at.and_then(|at| self.prefixes.get(at)) {
            if path.starts_with(prefix.prefix.as_bytes()) {
                break;
            }
            at = prefix.shorter;
        }
        at
    }

    /// In the file's order the routes that may be for `path`: those whose prefix it begins with, and every expression.
    pub fn candidates(&self, path: &[u8]) -> impl Iterator<Item = &Arc<Route>> {
        let behind = self.prefixes.partition_point(|prefix| prefix.prefix.as_bytes() <= path);
        let longest = self.begins(behind.checked_sub(1), path);
        let mut next = 0;
        std::iter::from_fn(move || {
            let first = |places: &[usize]| places.get(places.partition_point(|place| *place < next)).copied();
            let of_prefixes = std::iter::successors(longest.and_then(|at| self.prefixes.get(at)), |prefix| {
                prefix.shorter.and_then(|at| self.prefixes.get(at))
            });
            let place = of_prefixes.filter_map(|prefix| first(&prefix.places)).chain(first(&self.others)).min()?;
            next = place + 1;
            self.routes.get(place)
        })
    }
}

impl Deref for Ordered {
    type Target = [Arc<Route>];

    fn deref(&self) -> &Self::Target {
        &self.routes
    }
}
