//! The figures of a cgroup v2 group (Documentation/admin-guide/cgroup-v2.rst). The agent reads its
//! containers' and the server the pods' alike.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use crate::v1::{CpuStats, GroupStats, IoStats, MemoryStats, Pressure, Stall};

/// What the group in `directory` has used. Of one that does not exist everything is absent.
/// Blocks.
pub fn read(directory: &Path) -> GroupStats {
    from(|file| fs::read_to_string(directory.join(file)).ok())
}

fn from(file: impl Fn(&str) -> Option<String>) -> GroupStats {
    let number = |name: &str| file(name)?.trim().parse().ok();
    let table = |name: &str| Some(Table::of(&file(name)?));
    let pressure = |name: &str| Some(pressure(&file(name)?));
    GroupStats {
        cpu: table("cpu.stat").map(|stat| CpuStats {
            microseconds: stat.get("usage_usec"),
            user_microseconds: stat.get("user_usec"),
            system_microseconds: stat.get("system_usec"),
            periods: stat.get("nr_periods"),
            throttled_periods: stat.get("nr_throttled"),
            throttled_microseconds: stat.get("throttled_usec"),
        }),
        memory: number("memory.current").map(|current| {
            let stat = table("memory.stat").unwrap_or_default();
            let events = table("memory.events").unwrap_or_default();
            MemoryStats {
                current,
                peak: number("memory.peak").unwrap_or(0),
                limit: number("memory.max"),
                anonymous: stat.get("anon"),
                file: stat.get("file"),
                inactive_file: stat.get("inactive_file"),
                mapped_file: stat.get("file_mapped"),
                kernel: stat.get("kernel"),
                page_faults: stat.get("pgfault"),
                major_page_faults: stat.get("pgmajfault"),
                limit_hits: events.get("max"),
                oom_kills: events.get("oom_kill"),
                swap: number("memory.swap.current"),
                swap_limit: number("memory.swap.max"),
            }
        }),
        io: file("io.stat").map(|stat| io(&stat)),
        tasks: number("pids.current"),
        tasks_limit: number("pids.max"),
        cpu_pressure: pressure("cpu.pressure"),
        memory_pressure: pressure("memory.pressure"),
        io_pressure: pressure("io.pressure"),
    }
}

/// A "flat keyed" file: a name and a number in each line.
#[derive(Default)]
struct Table(HashMap<String, u64>);

impl Table {
    fn of(text: &str) -> Self {
        let pairs = text.lines().filter_map(|line| line.split_once(' '));
        let numbers = pairs.filter_map(|(name, value)| Some((name.into(), value.parse().ok()?)));
        Self(numbers.collect())
    }

    fn get(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }
}

/// A "nested keyed" file: a device and `name=number` words in each line.
fn io(text: &str) -> IoStats {
    let mut sum = IoStats::default();
    for word in text.split_whitespace() {
        let Some((name, value)) = word.split_once('=') else {
            continue;
        };
        let field = match name {
            "rbytes" => &mut sum.read_bytes,
            "wbytes" => &mut sum.written_bytes,
            "rios" => &mut sum.reads,
            "wios" => &mut sum.writes,
            _ => continue,
        };
        *field = field.saturating_add(value.parse().unwrap_or(0));
    }
    sum
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and the same for `full`.
fn pressure(text: &str) -> Pressure {
    let stall = |kind: &str| {
        let mut lines = text.lines();
        let line = lines.find_map(|line| line.strip_prefix(kind))?;
        let mut stall = Stall::default();
        for (name, value) in line
            .split_whitespace()
            .filter_map(|word| word.split_once('='))
        {
            match name {
                "avg10" => stall.average_10 = value.parse().unwrap_or(0.0),
                "avg60" => stall.average_60 = value.parse().unwrap_or(0.0),
                "avg300" => stall.average_300 = value.parse().unwrap_or(0.0),
                "total" => stall.microseconds = value.parse().unwrap_or(0),
                _ => {}
            }
        }
        Some(stall)
    };
    Pressure {
        some: stall("some "),
        full: stall("full "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_from_the_kernels_files() {
        let stats = from(|file| {
            let text = match file {
                "cpu.stat" => "usage_usec 70\nuser_usec 40\nsystem_usec 30\nnr_throttled 2\n",
                "memory.current" => "4096\n",
                "memory.max" => "max\n",
                "memory.stat" => "anon 1024\nfile 2048\nkernel 256\ninactive_file 512\npgfault 9\n",
                "memory.events" => "max 3\noom_kill 1\n",
                "memory.swap.max" => "0\n",
                "io.stat" => "254:0 rbytes=10 wbytes=1 rios=2 wios=3 dbytes=4\n254:16 rbytes=5\n",
                "pids.current" => "6\n",
                "memory.pressure" => "some avg10=1.50 avg60=0.20 avg300=0.00 total=77\n",
                _ => return None,
            };
            Some(text.to_owned())
        });
        let cpu = stats.cpu.unwrap();
        assert_eq!((cpu.microseconds, cpu.throttled_periods), (70, 2));
        let memory = stats.memory.unwrap();
        assert_eq!((memory.current, memory.limit), (4096, None));
        assert_eq!((memory.anonymous, memory.inactive_file), (1024, 512));
        assert_eq!(memory.kernel, 256);
        assert_eq!((memory.limit_hits, memory.oom_kills), (3, 1));
        assert_eq!((memory.swap, memory.swap_limit), (None, Some(0)));
        let io = stats.io.unwrap();
        assert_eq!((io.read_bytes, io.written_bytes, io.writes), (15, 1, 3));
        assert_eq!((stats.tasks, stats.tasks_limit), (Some(6), None));
        let some = stats.memory_pressure.unwrap().some.unwrap();
        assert_eq!((some.microseconds, some.average_10), (77, 1.5));
        assert!(stats.cpu_pressure.is_none());
    }
}
