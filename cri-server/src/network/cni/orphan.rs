//! Plugins that outlive the server that called them: it was killed, and nobody told them.
//!
//! They are known by their environment, which what they have started has too. A plugin is called in
//! a process group of its own and not in a session of its own, so what has made itself a session,
//! as daemons do that a pod needs for longer, is left alone.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// How often is looked for them: they may start others meanwhile.
const ROUNDS: usize = 16;
/// How long the end of one is awaited.
const LIMIT: Timespec = Timespec {
    tv_sec: 5,
    tv_nsec: 0,
};

/// Kills the plugins that were called for a network namespace in `namespaces`, and waits until they
/// are gone. Reads the environment of every process; blocks.
pub fn end(namespaces: &Path) {
    for _ in 0..ROUNDS {
        let Ok(processes) = fs::read_dir("/proc") else {
            return;
        };
        let ids = processes.flatten().filter_map(|process| {
            let id: i32 = process.file_name().to_str()?.parse().ok()?;
            Pid::from_raw(id)
        });
        if ids.filter(|id| kill(*id, namespaces)).count() == 0 {
            return;
        }
    }
    tracing::error!(
        namespaces = %namespaces.display(),
        "CNI plugins that an earlier server has called go on: look for processes with CNI_NETNS"
    );
}

/// Ends the process if it is one of them; whether it is.
fn kill(id: Pid, namespaces: &Path) -> bool {
    // From here on the number means this process, or none.
    let Ok(process) = pidfd_open(id, PidfdFlags::empty()) else {
        return false;
    };
    let read = |file: &str| fs::read(format!("/proc/{id}/{file}")).unwrap_or_default();
    if !is_for(&read("environ"), namespaces) || is_daemon(&read("stat")) {
        return false;
    }
    tracing::warn!(pid = %id, "a CNI plugin that an earlier server has called is ended");
    if pidfd_send_signal(&process, Signal::KILL).is_ok() {
        let mut wait = [PollFd::new(&process, PollFlags::IN)];
        // It has ended, or hangs in the kernel, where nobody can end it.
        let _ = poll(&mut wait, Some(&LIMIT));
    }
    true
}

fn is_for(environment: &[u8], namespaces: &Path) -> bool {
    environment.split(|byte| *byte == 0).any(|variable| {
        let netns = variable.strip_prefix(b"CNI_NETNS=");
        netns.is_some_and(|path| Path::new(OsStr::from_bytes(path)).parent() == Some(namespaces))
    })
}

/// Whether fields 5 and 6 of `/proc/PID/stat`, group and session, are the same; the name before
/// them may hold anything.
fn is_daemon(stat: &[u8]) -> bool {
    let text = String::from_utf8_lossy(stat);
    let rest = text.rsplit(')').next().unwrap_or_default();
    let mut fields = rest.split_whitespace().skip(2);
    let group = fields.next();
    group.is_some() && group == fields.next()
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn plugins_of_an_earlier_server_are_ended_with_what_they_started_and_daemons_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let start = |netns: &str, group: bool, program: &[&str]| {
            let mut command = Command::new(program[0]);
            command.args(&program[1..]);
            if group {
                command.process_group(0);
            }
            command.env("CNI_NETNS", directory.path().join(netns));
            command.stdout(Stdio::null()).spawn().unwrap()
        };
        let mut ours = start("netns/a", true, &["sh", "-c", "sleep 1000 & wait"]);
        let mut daemon = start("netns/a", false, &["setsid", "sleep", "1000"]);
        let mut others = start("others/a", true, &["sleep", "1000"]);
        let stat = format!("/proc/{}/stat", daemon.id());
        while !is_daemon(&fs::read(&stat).unwrap()) {
            std::thread::yield_now();
        }
        end(&directory.path().join("netns"));
        assert!(!ours.wait().unwrap().success());
        for other in [&mut daemon, &mut others] {
            assert_eq!(other.try_wait().unwrap(), None);
            other.kill().unwrap();
            other.wait().unwrap();
        }
    }
}
