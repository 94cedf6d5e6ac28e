//! What went through the interfaces so far (proc_pid_net(5), `dev`).

use std::fs;

use bulkhead_agent_api::v1::InterfaceStats;

/// The interfaces of this thread's network namespace, but for the loopback. Blocks.
pub fn figures() -> Vec<InterfaceStats> {
    let text = fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default();
    text.lines().filter_map(interface).collect()
}

/// A line: a name, eight numbers of what was received, and eight of what was sent.
fn interface(line: &str) -> Option<InterfaceStats> {
    let (name, numbers) = line.split_once(':')?;
    let name = name.trim();
    if name == "lo" {
        return None;
    }
    let numbers: Vec<u64> = numbers
        .split_whitespace()
        .map_while(|word| word.parse().ok())
        .collect();
    let &[bytes, packets, errors, dropped, _, _, _, _, ref sent @ ..] = numbers.as_slice() else {
        return None;
    };
    let &[sent_bytes, sent_packets, sent_errors, sent_dropped, ..] = sent else {
        return None;
    };
    Some(InterfaceStats {
        name: name.to_owned(),
        received_bytes: bytes,
        received_packets: packets,
        received_errors: errors,
        received_dropped: dropped,
        sent_bytes,
        sent_packets,
        sent_errors,
        sent_dropped,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_from_the_kernels_table() {
        let header = "Inter-|   Receive                |  Transmit";
        assert_eq!(interface(header), None);
        let columns = " face |bytes    packets errs drop fifo frame compressed multicast|bytes";
        assert_eq!(interface(columns), None);
        assert_eq!(interface("    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0"), None);
        let eth0 = interface("  eth0:1500 3 1 2 0 0 0 0 900 4 5 6 0 0 0 0").unwrap();
        assert_eq!(eth0.name, "eth0");
        assert_eq!((eth0.received_bytes, eth0.received_errors), (1500, 1));
        assert_eq!((eth0.sent_bytes, eth0.sent_dropped), (900, 6));
    }
}
