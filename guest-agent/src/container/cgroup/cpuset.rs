//! Which processors and memory nodes: cpuset.cpus, cpuset.mems.

use super::Setting;
use crate::container::spec::Cpu;

pub(super) fn settings(cpu: &Cpu) -> Vec<Setting> {
    [("cpuset.cpus", &cpu.cpus), ("cpuset.mems", &cpu.mems)]
        .into_iter()
        .filter_map(|(file, list)| Some((file, list.as_deref()?)))
        .filter(|(_, list)| !list.is_empty())
        .map(|(file, list)| Setting::new(file, list))
        .collect()
}
