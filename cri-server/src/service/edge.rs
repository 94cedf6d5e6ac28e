//! The time limit of a call, made where it enters.

use std::time::Duration;

use tonic::metadata::MetadataMap;

use crate::deadline::Deadline;

/// For a call whose client names no limit: what the kubelet grants the longest ones.
const DEFAULT: Duration = Duration::from_secs(240);

/// The deadline of a call with these headers.
pub fn deadline(metadata: &MetadataMap) -> Deadline {
    let asked = metadata.get("grpc-timeout");
    let asked = asked.and_then(|value| value.to_str().ok()).and_then(parse);
    Deadline::after(asked.map_or(DEFAULT, |asked| asked.min(DEFAULT)))
}

/// The gRPC protocol's `Timeout`: up to eight digits and a unit.
fn parse(text: &str) -> Option<Duration> {
    let unit = text.chars().last()?;
    let digits = text.strip_suffix(unit)?;
    if digits.len() > 8 {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        'H' => Some(Duration::from_secs(count * 3600)),
        'M' => Some(Duration::from_secs(count * 60)),
        'S' => Some(Duration::from_secs(count)),
        'm' => Some(Duration::from_millis(count)),
        'u' => Some(Duration::from_micros(count)),
        'n' => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_in_every_unit() {
        assert_eq!(parse("2M"), Some(Duration::from_secs(120)));
        assert_eq!(parse("119997m"), Some(Duration::from_millis(119_997)));
        assert_eq!(
            parse("99999999H"),
            Some(Duration::from_secs(99_999_999 * 3600))
        );
        assert_eq!(parse("5é"), None);
        assert_eq!(parse("123456789S"), None);
        assert_eq!(parse(""), None);
    }
}
