//! What the agent itself takes of the guest: figures that must not grow with the containers and
//! execs that come and go.

use std::fs;

use crate::container::cgroup::POD;

/// The figures; what cannot be read is 0.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Open descriptors.
    pub descriptors: u32,
    /// Resident memory that is not backed by files, in bytes.
    pub memory: u64,
    /// Mounts in the agent's mount namespace.
    pub mounts: u32,
    /// Cgroups below the pod's.
    pub cgroups: u32,
    /// Processes that are not the kernel's, zombies among them.
    pub processes: u32,
    /// Those that have ended and nobody has waited for.
    pub zombies: u32,
}

/// Reads them. Blocks.
pub fn look() -> Usage {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let mut usage = Usage {
        // Without the one that this very reading takes.
        descriptors: count(fs::read_dir("/proc/self/fd").into_iter().flatten()).saturating_sub(1),
        memory: kibibytes(&read("/proc/self/status"), "RssAnon:") << 10,
        mounts: count(read("/proc/self/mountinfo").lines()),
        cgroups: descendants(&read(&format!("{POD}/cgroup.stat"))),
        ..Usage::default()
    };
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.chars().all(|c| c.is_ascii_digit()) {
            // One that has ended meanwhile is none.
            match state(&read(&format!("/proc/{name}/stat"))) {
                Some('Z') => {
                    (usage.processes, usage.zombies) = (usage.processes + 1, usage.zombies + 1)
                }
                Some(_) => usage.processes += 1,
                None => {}
            }
        }
    }
    usage
}

fn count(things: impl Iterator) -> u32 {
    u32::try_from(things.count()).unwrap_or(u32::MAX)
}

/// The value of a line of proc_pid_status(5).
fn kibibytes(status: &str, name: &str) -> u64 {
    let mut lines = status.lines();
    let value = lines.find_map(|line| line.strip_prefix(name));
    let word = value.and_then(|value| value.split_whitespace().next());
    word.and_then(|word| word.parse().ok()).unwrap_or(0)
}

fn descendants(stat: &str) -> u32 {
    let mut lines = stat.lines();
    let value = lines.find_map(|line| line.strip_prefix("nr_descendants "));
    value.and_then(|value| value.parse().ok()).unwrap_or(0)
}

/// The state of proc_pid_stat(5), `None` for a thread of the kernel. The name before it is the
/// process's own choice and may hold anything, parentheses too.
fn state(stat: &str) -> Option<char> {
    const PF_KTHREAD: u64 = 0x0020_0000;
    let (_, rest) = stat.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split(' ').collect();
    let flags: u64 = fields.get(6)?.parse().ok()?;
    let kernels = flags & PF_KTHREAD != 0;
    fields.first()?.chars().next().filter(|_| !kernels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_from_the_kernels_words() {
        assert_eq!(
            kibibytes("Name:\tx\nRssAnon:\t     120 kB\n", "RssAnon:"),
            120
        );
        assert_eq!(descendants("nr_descendants 3\nnr_dying_descendants 9\n"), 3);
        assert_eq!(state("7 (a) Z (b) S 1 7 7 0 -1 4194304 0"), Some('S'));
        assert_eq!(state("8 (x) Z 1 7 7 0 -1 4194308 0"), Some('Z'));
        assert_eq!(state("2 (kthreadd) S 0 0 0 0 -1 2129984 0"), None);
    }

    #[test]
    fn the_own_process_is_among_those_counted() {
        let usage = look();
        assert!(usage.descriptors >= 3 && usage.memory > 0 && usage.processes > 0);
        assert!(usage.mounts > 0, "{usage:?}");
    }
}
