//! How often, and how many at once: 429 for who asks for more than its part.
//!
//! Counted by sketches of fixed size (count-min), however many clients there are: a key counts for another one only where they share a cell in each of four rows, of 65,536 cells
//! for rates: with 10,000 keys in one interval that is one key in two thousand.

use crate::{
    error::{Error, Kind},
    http::variables::{Place, Variables},
    model::rules::{Counters, Limit, Rate},
};

/// A place among those at once, kept until the request is over.
pub type Held = pingora_limits::inflight::Guard;

/// A request whose key is empty (a cookie that is not there) is not counted.
///
/// # Errors
/// 429.
pub fn check(limit: &Limit, variables: &Variables<'_>) -> Result<Option<Held>, Error> {
    let key = variables.fill(&limit.by, Place::Body);
    if key.is_empty() {
        return Ok(None);
    }
    let Counters { short, long, at_once } = &*limit.counters;
    if let (Some(rate), Some(short), Some(long)) = (&limit.rate, short, long) {
        // Looked at first: who is refused does not spend what it has.
        if short.observe(&key, 0) >= burst(rate, 1, limit.burst)
            || long.observe(&key, 0) >= burst(rate, rate.long(limit.burst), limit.burst)
        {
            let why = format!("{:?} asks for more than {} in {:?}", limit.by.source, rate.count, rate.per);
            return Err(Error::new(Kind::TooOften, why).retry_after(rate.per / rate.count.max(1)));
        }
        short.observe(&key, 1);
        long.observe(&key, 1);
    }
    let (Some(most), Some(at_once)) = (limit.concurrent, at_once) else { return Ok(None) };
    let (place, now) = at_once.incr(&key, 1);
    if now > isize::try_from(most).unwrap_or(isize::MAX) {
        return Err(Error::new(Kind::TooManyAtOnce, format!("{:?} has {most} requests under way", limit.by.source)));
    }
    Ok(Some(place))
}

/// What may come in so many of the rate's intervals.
fn burst(rate: &Rate, intervals: u32, burst: u32) -> isize {
    let most = u64::from(rate.count) * u64::from(intervals) + u64::from(burst);
    isize::try_from(most).unwrap_or(isize::MAX)
}
