//! Signals by their names in the CRI and in images.

use bulkhead_cri_api::v1 as cri;

/// What a container is stopped with when nobody says.
const TERM: u32 = 15;
/// The first and the last real-time signal, as the C library shows them.
const RTMIN: u32 = 34;
const RTMAX: u32 = 64;

/// Linux on x86_64 (signal(7)).
const NUMBERS: [(&str, u32); 34] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
];

/// The signal that asks a container to stop: the request's, else the image's, else TERM.
pub fn stop(asked: cri::Signal, image: Option<&str>) -> u32 {
    let asked = asked.as_str_name().strip_prefix("SIGNAL_");
    let asked = asked.and_then(|name| number(&name.replace("PLUS", "+").replace("MINUS", "-")));
    asked.or_else(|| image.and_then(number)).unwrap_or(TERM)
}

/// The number of `SIGTERM`, `TERM`, `15` or `SIGRTMIN+3`.
fn number(name: &str) -> Option<u32> {
    if let Ok(number) = name.parse() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let upper = name.to_ascii_uppercase();
    let plain = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(offset) = plain.strip_prefix("RTMIN") {
        let offset: u32 = offset.strip_prefix('+').map_or(Ok(0), str::parse).ok()?;
        return RTMIN.checked_add(offset).filter(|&number| number <= RTMAX);
    }
    if let Some(offset) = plain.strip_prefix("RTMAX") {
        let offset: u32 = offset.strip_prefix('-').map_or(Ok(0), str::parse).ok()?;
        return RTMAX.checked_sub(offset).filter(|&number| number >= RTMIN);
    }
    let mut known = NUMBERS.iter();
    known
        .find(|(known, _)| *known == plain)
        .map(|(_, number)| *number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_of_the_cri_has_a_number() {
        for value in 1..=65 {
            let signal = cri::Signal::try_from(value).unwrap();
            let name = signal.as_str_name();
            assert!(
                stop(signal, Some("KILL")) != 9 || name == "SIGNAL_SIGKILL",
                "{name}"
            );
        }
    }

    #[test]
    fn the_request_comes_before_the_image() {
        let default = cri::Signal::RuntimeDefault;
        let named = |name: &str| {
            let values = (0..=65).filter_map(|value| cri::Signal::try_from(value).ok());
            values
                .into_iter()
                .find(|s| s.as_str_name() == name)
                .unwrap()
        };
        assert_eq!(stop(named("SIGNAL_SIGUSR1"), Some("SIGQUIT")), 10);
        assert_eq!(stop(named("SIGNAL_SIGRTMAXMINUS1"), None), 63);
        assert_eq!(stop(default, Some("SIGQUIT")), 3);
        assert_eq!(stop(default, Some("SIGRTMIN+3")), 37);
        assert_eq!(stop(default, Some("28")), 28);
        assert_eq!(stop(default, Some("0")), 15);
        assert_eq!(stop(default, Some("nonsense")), 15);
        assert_eq!(stop(default, None), 15);
    }
}
