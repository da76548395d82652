//! Until when somebody waits for the answer, as a trusted proxy says with `X-Request-Timeout`. Pure.
//!
//! No RFC has such a header. It is read as it is mostly written: seconds, `2` or `0.5`, or with a unit, `1500ms` or `2s`; counted
//! from the head of the request. What cannot be read is as if it were not there: the queue has its own time-out.

use std::time::Duration;

use http::HeaderMap;

use crate::model::names::X_REQUEST_TIMEOUT;

/// Longer than any request.
const AT_MOST: f64 = 86_400.0;

/// The time that is left from the head of the request on; `None`: not told. The shortest, where it is told more than once.
pub fn patience(headers: &HeaderMap) -> Option<Duration> {
    headers.get_all(X_REQUEST_TIMEOUT).iter().filter_map(|value| parse(value.to_str().ok()?)).min()
}

fn parse(text: &str) -> Option<Duration> {
    let text = text.trim();
    let (number, unit) = match (text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(number), _) => (number, 0.001),
        (_, Some(number)) => (number, 1.0),
        _ => (text, 1.0),
    };
    // Not what else a float may look like: "inf", "1e9", "-0".
    let plain = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let seconds = number.parse::<f64>().ok().filter(|_| plain)? * unit;
    (seconds <= AT_MOST).then(|| Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_with_or_without_a_unit() {
        let told = |text: &str| parse(text).map(|d| d.as_millis());
        assert_eq!([told("2"), told("0.5"), told(" 1500ms "), told("3s"), told("0")], [2000, 500, 1500, 3000, 0].map(Some));
        for text in ["", "s", "ms", "-1", "1e3", "inf", "nan", "2 s", "1m", "99999999999999999999", ".", "1..2"] {
            assert_eq!(told(text), None, "{text:?}");
        }
    }

    #[test]
    fn the_shortest_counts() {
        let mut headers = HeaderMap::new();
        assert_eq!(patience(&headers), None);
        for value in ["9", "2s", "what"] {
            headers.append(X_REQUEST_TIMEOUT, value.parse().unwrap());
        }
        assert_eq!(patience(&headers), Some(Duration::from_secs(2)));
    }
}
