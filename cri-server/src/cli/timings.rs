//! Where the time of a command went.

use std::fmt::Write;
use std::time::{Duration, Instant};

/// The parts of a command that are over, in their order.
pub struct Timings {
    since: Instant,
    parts: Vec<(&'static str, Duration, String)>,
}

impl Timings {
    /// The first part begins now.
    pub fn begin() -> Self {
        Self {
            since: Instant::now(),
            parts: Vec::new(),
        }
    }

    /// A part is over, and the next begins; `detail` says more of it.
    pub fn end(&mut self, part: &'static str, detail: String) {
        let now = Instant::now();
        self.parts.push((part, now - self.since, detail));
        self.since = now;
    }

    /// A line for each part.
    pub fn show(&self) -> String {
        let mut text = String::new();
        for (part, time, detail) in &self.parts {
            let line = format!("{part:<8}{:>10.1} ms  {detail}", milliseconds(*time));
            // A string takes everything.
            let _ = writeln!(text, "{}", line.trim_end());
        }
        text
    }
}

/// What a server says of a pod's start in its verbose status (`info`), in words.
pub fn of_start(info: &str) -> String {
    let info: serde_json::Value = serde_json::from_str(info).unwrap_or_default();
    let start = &info["start"];
    let part = |name: &str| start[name].as_u64().map(Duration::from_micros);
    let (Some(host), Some(network), Some(guest), Some(prepare)) = (
        part("host_us"),
        part("network_us"),
        part("guest_us"),
        part("prepare_us"),
    ) else {
        return String::new();
    };
    format!(
        "network {:.1}, host {:.1}, guest {:.1}, prepare {:.1}",
        milliseconds(network),
        milliseconds(host.saturating_sub(network)),
        milliseconds(guest),
        milliseconds(prepare)
    )
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_start_is_told_in_its_parts() {
        let info =
            r#"{"start":{"host_us":5000,"network_us":2000,"guest_us":80500,"prepare_us":900}}"#;
        let words = "network 2.0, host 3.0, guest 80.5, prepare 0.9";
        assert_eq!(of_start(info), words);
        assert_eq!(of_start(r#"{"start":null}"#), "");
        let mut timings = Timings::begin();
        timings.end("pod", words.to_owned());
        timings.end("run", String::new());
        let shown = timings.show();
        let lines: Vec<_> = shown.lines().collect();
        assert!(
            lines[0].starts_with("pod ") && lines[0].ends_with(words),
            "{shown}"
        );
        assert!(
            lines[1].starts_with("run ") && lines[1].ends_with(" ms"),
            "{shown}"
        );
    }
}
