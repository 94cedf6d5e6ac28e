//! What tells a guest that stands still from one that is slow.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

/// The threads of all VMMs: name, state, where in the kernel, and processor time now and a second
/// later; then the machine's interrupts between processors and from their timers. What cannot be
/// read is left out.
pub fn threads() -> String {
    let earlier = times();
    thread::sleep(Duration::from_secs(1));
    let later = times();
    let lines = earlier
        .iter()
        .zip(&later)
        .map(|(earlier, later)| format!("{earlier}\n{}{later}\n", " ".repeat(8)));
    lines.collect()
}

fn times() -> Vec<String> {
    let mut lines = Vec::new();
    for process in entries(Path::new("/proc")) {
        if word(&process.join("comm")) != "bulkhead-vmm" {
            continue;
        }
        for task in entries(&process.join("task")) {
            let stat = word(&task.join("stat"));
            // After the name, which may have blanks: the state, and 11 and 12 further on the time
            // in user and kernel mode (proc(5)).
            let fields: Vec<&str> = stat
                .rsplit(") ")
                .next()
                .unwrap_or_default()
                .split(' ')
                .collect();
            let field = |at: usize| fields.get(at).copied().unwrap_or("?");
            lines.push(format!(
                "{} {} {} {} user {} system {}",
                process.display(),
                word(&task.join("comm")),
                field(0),
                word(&task.join("wchan")),
                field(11),
                field(12),
            ));
        }
    }
    let interrupts = fs::read_to_string("/proc/interrupts").unwrap_or_default();
    let between = interrupts.lines().map(str::trim).filter(|line| {
        ["LOC:", "RES:", "CAL:"]
            .iter()
            .any(|name| line.starts_with(name))
    });
    lines.extend(between.map(str::to_owned));
    lines
}

fn word(path: &Path) -> String {
    fs::read_to_string(path)
        .unwrap_or_default()
        .trim()
        .to_owned()
}

fn entries(directory: &Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}
