//! Which content codings a client takes: RFC 9110, section 12.5.3. Pure.

use http::{HeaderMap, header::ACCEPT_ENCODING};

use crate::model::rules::Coding;

/// Whether `coding` may be sent. What cannot be read is not taken.
pub(super) fn takes(headers: &HeaderMap, coding: &str) -> bool {
    weight(headers, coding) > 0.0
}

/// The one that the client likes best; among equals the first.
pub fn chosen(headers: &HeaderMap, codings: &[Coding]) -> Option<Coding> {
    let mut best: Option<(Coding, f32)> = None;
    for coding in codings {
        let weight = weight(headers, coding.name());
        if weight > best.map_or(0.0, |(_, weight)| weight) {
            best = Some((*coding, weight));
        }
    }
    best.map(|(coding, _)| coding)
}

/// From 0 to 1.
fn weight(headers: &HeaderMap, coding: &str) -> f32 {
    let mut by_star = 0.0;
    for line in headers.get_all(ACCEPT_ENCODING) {
        for item in line.to_str().unwrap_or_default().split(',') {
            let (name, weight) = item.split_once(';').unwrap_or((item, ""));
            let (name, weight) = (name.trim(), value(weight.trim()));
            // "gzip" was "x-gzip" once (section 8.4.1.3). A coding's own weight counts more than that of "*".
            if name.eq_ignore_ascii_case(coding) || coding == "gzip" && name.eq_ignore_ascii_case("x-gzip") {
                return weight;
            }
            if name == "*" {
                by_star = weight;
            }
        }
    }
    by_star
}

fn value(weight: &str) -> f32 {
    let value = weight.split_once('=').filter(|(name, _)| name.trim().eq_ignore_ascii_case("q")).map(|(_, value)| value.trim());
    match value {
        None if weight.is_empty() => 1.0,
        None => 0.0,
        Some(value) => value.parse::<f32>().ok().filter(|value| (0.0..=1.0).contains(value)).unwrap_or(0.0),
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn what_is_taken() {
        let of = |lines: &[&str]| {
            let mut headers = HeaderMap::new();
            for line in lines {
                headers.append(ACCEPT_ENCODING, HeaderValue::from_str(line).unwrap());
            }
            ["br", "gzip"].map(|coding| takes(&headers, coding))
        };
        assert_eq!(of(&[]), [false, false]);
        assert_eq!(of(&["gzip, deflate, br, zstd"]), [true, true]);
        assert_eq!(of(&["gzip;q=1.0", "BR ; q=0.2"]), [true, true]);
        assert_eq!(of(&["gzip;q=0, *"]), [true, false]);
        assert_eq!(of(&["*;q=0, gzip;q=0.001"]), [false, true]);
        assert_eq!(of(&["x-gzip"]), [false, true]);
        assert_eq!(of(&["identity", "gzip;q=", "br;level=3", "*;q=2"]), [false, false]);
    }

    #[test]
    fn the_clients_liking_goes_before_the_servers_order() {
        let of = |line: &'static str| {
            chosen(&HeaderMap::from_iter([(ACCEPT_ENCODING, HeaderValue::from_static(line))]), &[Coding::Brotli, Coding::Gzip])
        };
        assert_eq!(of("gzip, br"), Some(Coding::Brotli));
        assert_eq!(of("gzip;q=0.9, br;q=0.8"), Some(Coding::Gzip));
        assert_eq!(of("*"), Some(Coding::Brotli));
        assert_eq!(of("zstd, identity"), None);
    }
}
