//! Which content codings a client takes: RFC 9110, section 12.5.3. Pure.

use http::{HeaderMap, header::ACCEPT_ENCODING};

/// Whether `coding` may be sent. What cannot be read is not taken.
pub(super) fn takes(headers: &HeaderMap, coding: &str) -> bool {
    let mut by_star = false;
    for line in headers.get_all(ACCEPT_ENCODING) {
        for item in line.to_str().unwrap_or_default().split(',') {
            let (name, weight) = item.split_once(';').unwrap_or((item, ""));
            let name = name.trim();
            let is_wanted = is_above_zero(weight.trim());
            // "gzip" was "x-gzip" once (section 8.4.1.3). A coding's own weight counts more than that of "*".
            if name.eq_ignore_ascii_case(coding) || coding == "gzip" && name.eq_ignore_ascii_case("x-gzip") {
                return is_wanted;
            }
            by_star |= name == "*" && is_wanted;
        }
    }
    by_star
}

fn is_above_zero(weight: &str) -> bool {
    let value = weight.split_once('=').filter(|(name, _)| name.trim().eq_ignore_ascii_case("q")).map(|(_, value)| value.trim());
    match value {
        None => weight.is_empty(),
        Some(value) => value.parse::<f32>().is_ok_and(|value| value > 0.0),
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
        assert_eq!(of(&["identity", "gzip;q=", "br;level=3"]), [false, false]);
    }
}
