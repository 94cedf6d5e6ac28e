//! ExecSync: what it answers, what a command leaves behind, much output, little memory, many at
//! once.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_cri_api::v1::SupplementalGroupsPolicy;
use bulkhead_tests::cri::{Cri, refused};
use bulkhead_tests::request::{Pod, number, pod_security, resources, security, shell, sleeper};
use bulkhead_tests::usage::{MEMORY, Usage};
use bulkhead_tests::{Node, log, suite};
use tonic::Code;

suite! {
    exec_answers_output_and_exit_code,
    exec_is_killed_at_its_time_limit,
    exec_is_killed_with_its_children,
    exec_with_a_limit_below_zero_has_none,
    exec_runs_as_the_container_does,
    exec_has_no_groups_but_its_containers,
    exec_of_a_missing_command_fails,
    exec_needs_a_running_container,
    exec_is_killed_with_all_it_has_started,
    exec_of_a_client_that_vanishes_is_killed,
    exec_leaves_a_daemon_alone,
    exec_lasts_as_long_as_its_output_is_held,
    exec_output_is_cut_at_16_mib,
    much_output_at_once_leaves_no_memory_behind,
    exec_sees_the_cgroup_of_its_container,
    exec_works_in_a_container_that_is_full,
    execs_that_are_frozen_are_in_nobodys_way,
    exec_ends_with_its_container,
    exec_of_what_is_no_program_names_it,
    many_execs_run_at_once,
    execs_by_the_hundred_are_in_nobodys_way,
}

/// Looks again and again until the container's processes are as wanted.
fn processes_become(cri: &Cri, id: &str, pattern: &str, wanted: usize) -> Result<()> {
    let count = format!("ps -o args | grep -c '^{pattern}' || true");
    let mut found = String::new();
    for _ in 0..200 {
        found = cri.shell(id, &count)?;
        if found == wanted.to_string() {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(50));
    }
    anyhow::bail!("{found} processes {pattern:?}, not {wanted}")
}

fn exec_answers_output_and_exit_code(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("exec")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    let line = "echo out; echo err >&2; printf '\\377\\000'; exit 9";
    let reply = cri.exec_for(&id, &["/bin/sh", "-c", line], 0)?;
    ensure!(reply.stdout == b"out\n\xff\0", "{reply:?}");
    ensure!(reply.stderr == b"err\n", "{reply:?}");
    ensure!(reply.exit_code == 9, "{reply:?}");
    let reply = cri.exec_for(&id, &["/bin/true"], 30)?;
    ensure!(reply.exit_code == 0 && reply.stdout.is_empty(), "{reply:?}");
    let reply = cri.exec_for(&id, &["/bin/sh", "-c", "kill -9 $$"], 0)?;
    ensure!(reply.exit_code == 137, "{reply:?}");
    // One exec leaves nothing in the way of the next.
    for _ in 0..5 {
        ensure!(cri.shell(&id, "echo again")? == "again", "a later exec");
    }
    Ok(())
}

fn exec_is_killed_at_its_time_limit(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("exec-limit")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    refused(
        cri.exec_for(&id, &["sleep", "7654"], 1),
        &[Code::DeadlineExceeded],
    )?;
    let left = cri.shell(&id, "ps -o args | grep -c '^sleep 7654' || true")?;
    ensure!(left == "0", "{left} processes of the exec go on");
    Ok(())
}

fn exec_is_killed_with_its_children(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("exec-children")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    let line = "sleep 7654 & sleep 7654";
    let answer = cri.exec_for(&id, &["/bin/sh", "-c", line], 1);
    refused(answer, &[Code::DeadlineExceeded])?;
    let left = cri.shell(&id, "ps -o args | grep -c '^sleep 7654' || true")?;
    ensure!(left == "0", "{left} processes of the exec go on");
    Ok(())
}

fn exec_with_a_limit_below_zero_has_none(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("exec-negative")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    let reply = cri.exec_for(&id, &["/bin/sh", "-c", "sleep 1; echo done"], -1)?;
    ensure!(reply.stdout == b"done\n", "{reply:?}");
    Ok(())
}

fn exec_runs_as_the_container_does(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("exec-as")?;
    let mut config = sleeper("sleeper", &node.image("test/config:1")?);
    security(&mut config)
        .capabilities
        .get_or_insert_default()
        .drop_capabilities = vec!["ALL".to_owned()];
    let id = pod.start(&config)?;
    let said = cri.shell(
        &id,
        "id -u; id -g; pwd; echo $FROM_IMAGE; grep CapBnd /proc/self/status",
    )?;
    ensure!(
        said == "1000\n50\n/work/made\nimage\nCapBnd:\t0000000000000000",
        "{said:?}"
    );
    Ok(())
}

fn exec_has_no_groups_but_its_containers(node: &Node) -> Result<()> {
    let pod = node.pod("exec-groups")?;
    let mut config = sleeper("strict", &node.base()?);
    let asked = security(&mut config);
    asked.run_as_user = number(1000);
    asked.supplemental_groups = vec![9];
    asked.set_supplemental_groups_policy(SupplementalGroupsPolicy::Strict);
    let id = pod.start(&config)?;
    // The image's groups staff and video list the user.
    let line = "echo $(id -u) $(id -G | tr ' ' '\\n' | sort -n -u)";
    let seen = pod.cri.shell(&id, line)?;
    ensure!(seen == "1000 9 1000", "{seen}");
    Ok(())
}

fn exec_of_a_missing_command_fails(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("exec-missing")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    match cri.exec_for(&id, &["/no/such/command"], 0) {
        Ok(reply) => ensure!([126, 127].contains(&reply.exit_code), "{reply:?}"),
        Err(status) => ensure!(status.message().contains("/no/such/command"), "{status}"),
    }
    ensure!(
        cri.shell(&id, "echo fine")? == "fine",
        "the container after it"
    );
    Ok(())
}

fn exec_needs_a_running_container(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("exec-stopped")?;
    let created = pod.create(&sleeper("created", &node.base()?))?;
    let codes = [Code::FailedPrecondition];
    refused(cri.exec_for(&created, &["true"], 0), &codes)?;
    cri.start(&created)?;
    cri.stop(&created, 10)?;
    refused(cri.exec_for(&created, &["true"], 0), &codes)?;
    Ok(())
}

fn exec_is_killed_with_all_it_has_started(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("exec-tree")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    // Neither of its session nor of its process tree, and without its output.
    let line = "(setsid sleep 7601 >/dev/null 2>&1 &); sleep 7601 & sleep 7601";
    let answer = cri.exec_for(&id, &["/bin/sh", "-c", line], 2);
    refused(answer, &[Code::DeadlineExceeded])?;
    let left = cri.shell(&id, "ps -o args | grep -c '^sleep 7601' || true")?;
    ensure!(left == "0", "{left} processes of the exec go on");
    Ok(())
}

fn exec_of_a_client_that_vanishes_is_killed(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("exec-vanish")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    let line = "(setsid sleep 7602 &); touch /began; sleep 7602";
    cri.exec_and_vanish(&id, &["/bin/sh", "-c", line], Duration::from_secs(3))?;
    ensure!(cri.shell(&id, "ls /began")? == "/began", "it never began");
    processes_become(cri, &id, "sleep 7602", 0)
}

fn exec_leaves_a_daemon_alone(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("exec-daemon")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    cri.shell(&id, "setsid sleep 7603 >/dev/null 2>&1 &")?;
    for _ in 0..3 {
        processes_become(cri, &id, "sleep 7603", 1)?;
    }
    Ok(())
}

fn exec_lasts_as_long_as_its_output_is_held(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("exec-held")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    let line = "(sleep 2; echo late) & echo early; exit 4";
    let reply = cri.exec_for(&id, &["/bin/sh", "-c", line], 60)?;
    ensure!(reply.stdout == b"early\nlate\n", "{reply:?}");
    ensure!(reply.exit_code == 4, "{reply:?}");
    Ok(())
}

fn exec_output_is_cut_at_16_mib(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("exec-output")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    let line = "head -c 17000000 /dev/zero; head -c 17000000 /dev/zero >&2; exit 6";
    let reply = cri.exec_for(&id, &["/bin/sh", "-c", line], 0)?;
    let (out, err) = (reply.stdout.len(), reply.stderr.len());
    ensure!(out == 16 << 20 && err == 16 << 20, "{out} and {err} bytes");
    ensure!(reply.exit_code == 6, "exit code {}", reply.exit_code);
    Ok(())
}

fn much_output_at_once_leaves_no_memory_behind(node: &Node) -> Result<()> {
    const AT_ONCE: usize = 4;
    /// What the server may keep, in KiB: less than one of the outputs.
    const ROOM: u64 = 12 << 10;
    /// What the agent may keep of its buffers, in bytes; the rings alone are 2 MiB.
    const AGENTS_ROOM: u64 = 1 << 20;
    let cri = node.cri()?;
    let server = node.server()?;
    let pod = node.pod("exec-memory")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    cri.exec_for(&id, &["true"], 0)?;
    let round = || {
        thread::scope(|scope| {
            let run = || cri.exec_for(&id, &["head", "-c", "17000000", "/dev/zero"], 0);
            let begun: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(run)).collect();
            for exec in begun {
                let reply = exec.join().ok().context("a thread has panicked")?;
                let bytes = reply.context("ExecSync")?.stdout.len();
                ensure!(bytes == 16 << 20, "{bytes} bytes");
            }
            Ok(())
        })
    };
    let agents = || -> Result<Option<u64>> {
        let usage = Usage::settled(&pod)?;
        usage.map(|usage| usage.number(MEMORY)).transpose()
    };
    let (memory, before) = (server.memory()?, agents()?);
    round()?;
    let (mut now, mut looks) = (server.memory()?, 0);
    while now > memory + ROOM {
        ensure!(
            looks < 100,
            "the server has {now} KiB, and had {memory} KiB"
        );
        thread::sleep(Duration::from_millis(50));
        (now, looks) = (server.memory()?, looks + 1);
    }
    if let (Some(had), Some(has)) = (before, agents()?) {
        ensure!(
            has < had + AGENTS_ROOM,
            "the agent has {has} bytes, and had {had}"
        );
    }
    Ok(())
}

fn exec_sees_the_cgroup_of_its_container(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("exec-cgroup")?;
    let mut config = sleeper("sleeper", &node.base()?);
    resources(&mut config).memory_limit_in_bytes = 64 << 20;
    let id = pod.start(&config)?;
    let line = "cat /proc/self/cgroup /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)/memory.max";
    let seen = cri.shell(&id, line)?;
    ensure!(seen == format!("0::/\n{}", 64 << 20), "{seen:?}");
    Ok(())
}

fn exec_works_in_a_container_that_is_full(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("exec-full")?;
    let image = node.base()?;
    let mut config = sleeper("sleeper", &image);
    resources(&mut config).memory_limit_in_bytes = 48 << 20;
    let id = pod.start(&config)?;
    // Memory that cannot be reclaimed, short of the limit by what a few small processes need.
    cri.shell(&id, "head -c 40000000 /dev/zero > /dev/shm/fill")?;
    for _ in 0..5 {
        ensure!(
            cri.shell(&id, "echo fine")? == "fine",
            "an exec in what is left"
        );
    }
    let hog = "BEGIN { s = \"xxxxxxxx\"; while (1) s = s s }";
    let reply = cri.exec_for(&id, &["awk", hog], 0)?;
    ensure!(reply.exit_code == 137, "{reply:?}");
    ensure!(
        cri.shell(&id, "echo fine")? == "fine",
        "an exec after the kill"
    );
    // Nothing at all is left: the answer is that of a command that was killed, or says why there
    // is none.
    let neighbour = pod.start(&sleeper("neighbour", &image))?;
    let over = cri.exec_for(&id, &["/bin/sh", "-c", "cat /dev/zero > /dev/shm/more"], 0);
    ensure!(
        over.as_ref().map_or(true, |reply| reply.exit_code != 0),
        "{over:?}"
    );
    for _ in 0..3 {
        match cri.exec_for(&id, &["true"], 60) {
            Ok(reply) => ensure!(matches!(reply.exit_code, 0 | 137), "{reply:?}"),
            Err(status) if status.message().contains("memory") => {}
            Err(_) => return ends_for_memory(cri, &id),
        }
    }
    cri.shell(&neighbour, "rm /dev/shm/fill /dev/shm/more")?;
    for _ in 0..3 {
        match cri.exec_for(&id, &["true"], 0) {
            Ok(reply) if reply.exit_code == 0 => {}
            _ => return ends_for_memory(cri, &id),
        }
    }
    Ok(())
}

/// Where its first process was the one that was killed.
fn ends_for_memory(cri: &Cri, id: &str) -> Result<()> {
    let status = cri.wait(id)?;
    ensure!(status.reason == "OOMKilled", "{status:?}");
    Ok(())
}

fn execs_that_are_frozen_are_in_nobodys_way(node: &Node) -> Result<()> {
    /// More than the agent has threads.
    const STILL: usize = 12;
    let cri = node.cri()?;
    let mut config = node.pod_config("exec-frozen")?;
    pod_security(&mut config).privileged = true;
    let pod = Pod::run(cri, config)?;
    let image = node.base()?;
    // The group of each, as soon as that is there.
    let line = "echo freezing; while :; do for group in /sys/fs/cgroup/exec-*; do \
                echo 1 > $group/cgroup.freeze; done 2> /dev/null; done";
    let mut config = shell("frozen", &image, line);
    security(&mut config).privileged = true;
    let frozen = pod.start(&config)?;
    let neighbour = pod.start(&sleeper("neighbour", &image))?;
    log::wait_for(&pod.log_path(&config), "freezing\n")?;
    thread::scope(|scope| {
        let run = || cri.exec_for(&frozen, &["sleep", "7606"], 0);
        let still: Vec<_> = (0..STILL).map(|_| scope.spawn(run)).collect();
        // Long enough for all of them to have come.
        for _ in 0..10 {
            ensure!(cri.shell(&neighbour, "echo fine")? == "fine", "an exec");
        }
        let ended = still.iter().filter(|exec| exec.is_finished()).count();
        ensure!(ended == 0, "{ended} frozen execs have ended");
        cri.stop(&frozen, 0)?;
        for exec in still {
            let answer = exec.join().ok().context("a thread has panicked")?;
            let ran = answer.as_ref().is_ok_and(|reply| reply.exit_code == 0);
            ensure!(!ran, "{answer:?}");
        }
        Ok(())
    })
}

fn exec_ends_with_its_container(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("exec-ends")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    thread::scope(|scope| {
        let exec = scope.spawn(|| cri.exec_for(&id, &["sleep", "7604"], 0));
        processes_become(cri, &id, "sleep 7604", 1)?;
        cri.stop(&id, 0)?;
        let ended = exec.join().ok().context("the thread has panicked")?;
        let reply = ended.context("ExecSync")?;
        ensure!(reply.exit_code == 137, "{reply:?}");
        Ok(())
    })
}

fn exec_of_what_is_no_program_names_it(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("exec-no-program")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    for program in ["/no/such/program", "no-such-program", "/etc", "/etc/passwd"] {
        let answer = cri.exec_for(&id, &[program], 0);
        let message = refused(answer, &[Code::FailedPrecondition])?;
        ensure!(message.contains(program), "{message}");
    }
    Ok(())
}

fn many_execs_run_at_once(node: &Node) -> Result<()> {
    const COUNT: usize = 50;
    let cri = node.cri()?;
    let pod = node.pod("exec-many")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    thread::scope(|scope| {
        let run = |number: usize| {
            let line = format!("echo {number}; exit {number}");
            cri.exec_for(&id, &["/bin/sh", "-c", &line], 0)
        };
        let begun: Vec<_> = (0..COUNT)
            .map(|number| scope.spawn(move || run(number)))
            .collect();
        for (number, exec) in begun.into_iter().enumerate() {
            let reply = exec.join().ok().context("a thread has panicked")?;
            let reply = reply.with_context(|| format!("exec {number}"))?;
            ensure!(
                reply.stdout == format!("{number}\n").as_bytes(),
                "{reply:?}"
            );
            ensure!(reply.exit_code == i32::try_from(number)?, "{reply:?}");
        }
        Ok(())
    })
}

fn execs_by_the_hundred_are_in_nobodys_way(node: &Node) -> Result<()> {
    const COUNT: usize = 240;
    let cri = node.cri()?;
    let pod = node.pod("exec-hundreds")?;
    let image = node.base()?;
    let (id, neighbour) = (
        pod.start(&sleeper("sleeper", &image))?,
        pod.start(&sleeper("neighbour", &image))?,
    );
    thread::scope(|scope| {
        let run = || cri.exec_for(&id, &["sleep", "7654"], 0);
        let begun: Vec<_> = (0..COUNT).map(|_| scope.spawn(run)).collect();
        let all = processes_become(cri, &id, "sleep 7654", COUNT);
        let fine = cri.shell(&neighbour, "echo fine");
        // Ends them, whatever has been found.
        cri.stop(&id, 0)?;
        for exec in begun {
            let reply = exec.join().ok().context("a thread has panicked")?;
            let code = reply.context("ExecSync")?.exit_code;
            ensure!(code == 137, "exit code {code}");
        }
        all?;
        ensure!(fine? == "fine", "an exec in a neighbour");
        Ok(())
    })
}
