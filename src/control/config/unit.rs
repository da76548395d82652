//! Durations and sizes as the file writes them. Pure.

use std::time::Duration;

/// In milliseconds, largest first.
const TIMES: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];
/// In bytes, largest first.
const SIZES: [(&str, u64); 5] = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

/// `None`: not a whole number and one of ms, s, m, h, d.
pub fn parse_duration(text: &str) -> Option<Duration> {
    parse(text, &TIMES).map(Duration::from_millis)
}

/// `None`: not a whole number and one of B, KiB, MiB, GiB, TiB.
pub fn parse_size(text: &str) -> Option<u64> {
    parse(text, &SIZES)
}

/// In the largest unit that loses nothing; to the millisecond, which is the finest that can be written.
pub fn show_duration(duration: Duration) -> String {
    match u64::try_from(duration.as_millis()) {
        Ok(0) => "0s".to_owned(),
        // As everybody writes it.
        Ok(60_000) => "60s".to_owned(),
        Ok(millis) => show(millis, &TIMES),
        Err(_) => format!("{}s", duration.as_secs()),
    }
}

/// In the largest unit that loses nothing.
pub fn show_size(bytes: u64) -> String {
    if bytes == 0 { "0B".to_owned() } else { show(bytes, &SIZES) }
}

/// Number and unit apart, for suggestions.
pub fn split(text: &str) -> Option<(u64, &str)> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at_checked(digits)?;
    Some((number.parse().ok()?, unit))
}

fn parse(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let (number, unit) = split(text)?;
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    number.checked_mul(*factor)
}

fn show(number: u64, units: &[(&str, u64)]) -> String {
    let exact = units.iter().find(|(_, factor)| number.is_multiple_of(*factor));
    match exact {
        Some((unit, factor)) => format!("{}{unit}", number / factor),
        None => number.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_what_the_design_writes() {
        assert_eq!(parse_duration("50ms"), Some(Duration::from_millis(50)));
        assert_eq!(parse_duration("30s"), Some(Duration::from_secs(30)));
        assert_eq!(parse_duration("2m"), Some(Duration::from_secs(120)));
        assert_eq!(parse_duration("1h"), Some(Duration::from_secs(3600)));
        assert_eq!(parse_size("8MiB"), Some(8 << 20));
        assert_eq!(parse_size("512B"), Some(512));
        for wrong in ["", "s", "5", "5 s", "-5s", "1.5s", "5S", "99999999999999999999s", "18446744073709551615d", "５s"] {
            assert_eq!(parse_duration(wrong), None, "{wrong}");
        }
        for wrong in ["", "5", "8MB", "8M", "8 MiB", "-1B", "18446744073709551615KiB"] {
            assert_eq!(parse_size(wrong), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_back(number in any::<u64>()) {
            prop_assert_eq!(parse_size(&show_size(number)), Some(number));
            let duration = Duration::from_millis(number);
            prop_assert_eq!(parse_duration(&show_duration(duration)), Some(duration));
        }

        #[test]
        fn never_panics(text in "([0-9]{0,22})?(.{0,6})") {
            let _ = (parse_duration(&text), parse_size(&text), split(&text));
        }
    }
}
