//! The ends of containers, containers that behave badly, and those that a server has lost sight of:
//! the pod is as it was.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_cri_api::v1::*;
use bulkhead_tests::cri::refused;
use bulkhead_tests::node::{BASE, WEB};
use bulkhead_tests::request::{Pod, container, pod_security, resources, security, shell, sleeper};
use bulkhead_tests::usage::Usage;
use bulkhead_tests::{Cri, Node, log, suite};
use tonic::Code;

suite! {
    created_container_is_stopped_without_effect,
    signals_give_their_exit_code,
    orphans_end_with_their_container,
    container_whose_output_a_neighbour_holds_ends,
    container_that_does_not_start_in_time_never_runs,
    zombies_of_execs_are_reaped,
    container_that_kills_all_it_can_harms_nobody,
    container_without_stdio_runs_to_its_end,
    fork_bomb_leaves_its_neighbours_alone,
    memory_hog_leaves_its_neighbours_alone,
    file_that_is_filled_leaves_room_for_neighbours,
    deep_directories_are_removed_with_their_container,
    files_that_cannot_be_changed_are_removed_with_their_container,
    container_whose_start_was_not_answered_can_be_removed,
    program_started_behind_a_dead_servers_back_is_taken_up,
    container_whose_log_is_gone_is_followed_all_the_same,
}

fn exec_works(cri: &Cri, id: &str) -> Result<()> {
    ensure!(cri.shell(id, "echo fine")? == "fine", "an exec");
    Ok(())
}

fn created_container_is_stopped_without_effect(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("unstarted")?;
    let id = pod.create(&sleeper("unstarted", &node.base()?))?;
    cri.stop(&id, 10)?;
    let state = cri.container(&id)?.state();
    ensure!(state == ContainerState::ContainerCreated, "{state:?}");
    cri.start(&id)?;
    exec_works(cri, &id)?;
    cri.remove(&id)?;
    Ok(())
}

fn signals_give_their_exit_code(node: &Node) -> Result<()> {
    let pod = node.pod("signals")?;
    let image = node.base()?;
    // A child's end by a signal is its parent's to tell; the shell tells it the usual way.
    for (signal, wanted) in [("TERM", 143), ("KILL", 137), ("SEGV", 139)] {
        let line = format!("sh -c 'kill -{signal} $$'; exit $?");
        let config = shell(&signal.to_lowercase(), &image, &line);
        let status = pod.run_to_end(&config)?.status;
        ensure!(status.exit_code == wanted, "{signal}: {status:?}");
        ensure!(status.reason == "Error", "{signal}: {status:?}");
    }
    let id = pod.start(&container("killed", &image, &["sleep", "1000"]))?;
    pod.cri.stop(&id, 0)?;
    let status = pod.cri.container(&id)?;
    ensure!(
        status.exit_code == 137 && status.reason == "Error",
        "{status:?}"
    );
    ensure!(
        status.created_at <= status.started_at && status.started_at <= status.finished_at,
        "{status:?}"
    );
    Ok(())
}

fn orphans_end_with_their_container(node: &Node) -> Result<()> {
    // In one PID namespace the end of a container's process does not take the others with it.
    let (pod, watcher) = watched(node, node.cri()?, "orphans")?;
    let line = "setsid sh -c 'sleep 7654 & sleep 7654' & sleep 1; exit 0";
    let config = shared(shell("parent", &node.base()?, line));
    let status = pod.run_to_end(&config)?.status;
    ensure!(status.exit_code == 0, "{status:?}");
    let left = count(pod.cri, &watcher, "sleep 7654")?;
    ensure!(left == "0", "{left} processes of an ended container go on");
    Ok(())
}

/// What prints the number of the process with this command line.
fn process_of(command: &str) -> String {
    format!("ps -o pid,args | sed -n 's|^ *\\([0-9]*\\) {command}$|\\1|p'")
}

fn container_whose_output_a_neighbour_holds_ends(node: &Node) -> Result<()> {
    let (pod, _) = watched(node, node.cri()?, "held")?;
    let image = node.base()?;
    let line = "echo whole; printf 'no newline'; exec sleep 7654";
    let config = shared(shell("writer", &image, line));
    let writer = pod.start(&config)?;
    log::wait_for(&pod.log_path(&config), "whole\n")?;
    let line = format!(
        "exec 3>/proc/$({})/fd/1; echo held; sleep 1000",
        process_of("sleep 7654")
    );
    let holder = shared(shell("holder", &image, &line));
    let neighbour = pod.start(&holder)?;
    log::wait_for(&pod.log_path(&holder), "held\n")?;
    pod.cri.stop(&writer, 0)?;
    let status = pod.cri.container(&writer)?;
    ensure!(status.exit_code == 137, "{status:?}");
    let written = log::read(&pod.log_path(&config))?;
    let last = written.last().context("an empty log")?;
    ensure!(last.text == b"no newline" && !last.complete, "{written:?}");
    pod.cri.remove(&writer)?;
    exec_works(pod.cri, &neighbour)
}

fn container_that_does_not_start_in_time_never_runs(node: &Node) -> Result<()> {
    let (pod, watcher) = watched(node, node.cri()?, "late")?;
    let config = shared(container("late", &node.base()?, &["sleep", "7654"]));
    let late = pod.create(&config)?;
    // The process that waits to be the program.
    let held = process_of("/proc/self/exe stage");
    let stop = format!("kill -STOP $({held})");
    pod.cri.shell(&watcher, &stop)?;
    ensure!(
        pod.cri.start(&late).is_err(),
        "a stopped process has started"
    );
    let go_on = format!("held=$({held}) && kill -CONT $held; sleep 1; ps -o args");
    let processes = pod.cri.shell(&watcher, &go_on)?;
    ensure!(!processes.contains("sleep 7654"), "{processes}");
    let state = pod.cri.container(&late)?.state();
    ensure!(state == ContainerState::ContainerExited, "{state:?}");
    pod.cri.remove(&late)?;
    exec_works(pod.cri, &watcher)
}

fn zombies_of_execs_are_reaped(node: &Node) -> Result<()> {
    let pod = node.pod("zombies")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    exec_works(pod.cri, &id)?;
    let before = Usage::settled(&pod)?;
    // Each leaves children whose parent has ended.
    for _ in 0..10 {
        pod.cri
            .shell(&id, "for i in 1 2 3; do (sleep 0.1 &) ; done")?;
    }
    Usage::returns_to(&before, &pod)
}

fn container_that_kills_all_it_can_harms_nobody(node: &Node) -> Result<()> {
    let pod = node.pod("killer")?;
    let image = node.base()?;
    let neighbour = pod.start(&sleeper("neighbour", &image))?;
    let line = "kill -9 $PPID; kill -9 1; kill -9 -1; echo alive; exit 0";
    let ended = pod.run_to_end(&shell("killer", &image, line))?;
    ensure!(ended.stdout() == "alive\n", "{:?}", ended.stderr());
    exec_works(pod.cri, &neighbour)
}

fn container_without_stdio_runs_to_its_end(node: &Node) -> Result<()> {
    let pod = node.pod("mute")?;
    let line = "exec <&- >&- 2>&-; sleep 1; exit 4";
    let config = shell("mute", &node.base()?, line);
    let ended = pod.run_to_end(&config)?;
    ensure!(ended.status.exit_code == 4, "{:?}", ended.status);
    // Input that nobody reads is in nobody's way.
    let mut config = shell("deaf", &node.base()?, "sleep 1; exit 5");
    config.stdin = true;
    let ended = pod.run_to_end(&config)?;
    ensure!(ended.status.exit_code == 5, "{:?}", ended.status);
    Ok(())
}

fn fork_bomb_leaves_its_neighbours_alone(node: &Node) -> Result<()> {
    let pod = node.pod("bomb")?;
    let image = node.base()?;
    let neighbour = pod.start(&sleeper("neighbour", &image))?;
    let line = "bomb() { bomb & bomb & sleep 1000; }; bomb; sleep 1000";
    let mut config = shell("bomb", &image, line);
    resources(&mut config).memory_limit_in_bytes = 64 << 20;
    let id = pod.start(&config)?;
    for _ in 0..5 {
        exec_works(pod.cri, &neighbour)?;
    }
    pod.cri.stop(&id, 0)?;
    let status = pod.cri.container(&id)?;
    ensure!(status.exit_code == 137, "{status:?}");
    pod.start(&sleeper("later", &image))?;
    exec_works(pod.cri, &neighbour)
}

fn memory_hog_leaves_its_neighbours_alone(node: &Node) -> Result<()> {
    let pod = node.pod("hog")?;
    let image = node.base()?;
    let neighbour = pod.start(&sleeper("neighbour", &image))?;
    // No limit of its own: it meets that of the machine.
    let hog = container("hog", &image, &["tail", "/dev/zero"]);
    let status = pod.run_to_end(&hog)?.status;
    ensure!(status.exit_code == 137, "{status:?}");
    ensure!(status.reason == "OOMKilled", "{status:?}");
    exec_works(pod.cri, &neighbour)
}

/// A container in the pod's PID namespace.
fn shared(mut config: ContainerConfig) -> ContainerConfig {
    let options = &mut security(&mut config).namespace_options;
    options.get_or_insert_default().pid = NamespaceMode::Pod.into();
    config
}

/// A pod with one PID namespace for all, and a container in it that sees the others' processes.
fn watched<'a>(node: &Node, cri: &'a Cri, name: &str) -> Result<(Pod<'a>, String)> {
    let mut config = node.pod_config(name)?;
    let namespaces = &mut pod_security(&mut config).namespace_options;
    namespaces.get_or_insert_default().pid = NamespaceMode::Pod.into();
    let pod = Pod::run(cri, config)?;
    let image = node.image_on(cri, BASE)?;
    let watcher = pod.start(&shared(sleeper("watcher", &image)))?;
    Ok((pod, watcher))
}

/// Makes a container that runs `line` and begins to start it, which takes longer than the client
/// waits. Answers the container and its process, which is stopped.
fn start_unanswered(pod: &Pod<'_>, watcher: &str, name: &str, line: &str) -> Result<(String, u32)> {
    let image = pod.cri.container(watcher)?.image.context("no image")?.image;
    let id = pod.create(&shared(shell(name, &image, line)))?;
    let held = "ps -o pid,args | sed -n 's/^ *\\([0-9]*\\) .* stage$/\\1/p'";
    let held = pod.cri.shell(watcher, held)?;
    let process = held.parse().with_context(|| format!("held: {held:?}"))?;
    pod.cri.shell(watcher, &format!("kill -STOP {process}"))?;
    pod.cri.start_and_vanish(&id, Duration::from_secs(2))?;
    // Whoever serves the pod has given the start up, too.
    let container_id = id.clone();
    let request = ReopenContainerLogRequest { container_id };
    refused(
        pod.cri.reopen_container_log(request),
        &[Code::FailedPrecondition],
    )?;
    let state = pod.cri.container(&id)?.state();
    ensure!(state == ContainerState::ContainerCreated, "{state:?}");
    Ok((id, process))
}

/// How many processes run with these arguments.
fn count(cri: &Cri, watcher: &str, arguments: &str) -> Result<String> {
    let line = format!("ps -o args | grep -c '^{arguments}' || true");
    cri.shell(watcher, &line)
}

fn container_whose_start_was_not_answered_can_be_removed(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let (pod, watcher) = watched(node, cri, "unanswered")?;
    let begin = |name: &str, seconds: &str| -> Result<String> {
        let program = format!("exec sleep {seconds}");
        let (id, process) = start_unanswered(&pod, &watcher, name, &program)?;
        let go = format!(
            "kill -CONT {process}; until ps -o args | grep -q '^sleep {seconds}'; do sleep 0.1; done"
        );
        cri.shell(&watcher, &go)?;
        Ok(id)
    };
    let stopped = begin("stopped", "7001")?;
    cri.stop(&stopped, 0)?;
    let status = cri.container(&stopped)?;
    ensure!(
        status.state() == ContainerState::ContainerExited && status.exit_code == 137,
        "{status:?}"
    );
    cri.remove(&stopped)?;
    let removed = begin("removed", "7002")?;
    cri.remove(&removed)?;
    let (held, _) = start_unanswered(&pod, &watcher, "held", "exec sleep 7003")?;
    cri.remove(&held)?;
    let left = count(cri, &watcher, "sleep 700")?;
    ensure!(left == "0", "{left} programs of removed containers run");
    // The start of one that has not begun may be asked for again.
    let (again, process) = start_unanswered(&pod, &watcher, "again", "exit 3")?;
    cri.shell(&watcher, &format!("kill -CONT {process}"))?;
    cri.start(&again)?;
    let status = cri.wait(&again)?;
    ensure!(status.exit_code == 3, "{status:?}");
    Ok(())
}

fn program_started_behind_a_dead_servers_back_is_taken_up(node: &Node) -> Result<()> {
    let first = node.plan("behind").start()?;
    let (pod, watcher) = watched(node, &first.cri, "behind")?;
    let line = "echo begun; exec sleep 7004";
    let (running, one) = start_unanswered(&pod, &watcher, "running", line)?;
    let go =
        format!("kill -CONT {one}; until ps -o args | grep -q '^sleep 7004'; do sleep 0.1; done");
    pod.cri.shell(&watcher, &go)?;
    let (ended, two) = start_unanswered(&pod, &watcher, "ended", "exit 7")?;
    let go = format!("kill -CONT {two}; while [ -e /proc/{two} ]; do sleep 0.1; done");
    pod.cri.shell(&watcher, &go)?;
    let log = pod.log_path(&shell("running", "", ""));
    first.kill()?;
    let second = node.plan("behind").start()?;
    let cri = &second.cri;
    let status = cri.container(&running)?;
    ensure!(
        status.state() == ContainerState::ContainerRunning && status.started_at > 0,
        "{status:?}"
    );
    log::wait_for(&log, "begun\n")?;
    let status = cri.wait(&ended)?;
    ensure!(status.exit_code == 7, "{status:?}");
    cri.stop(&running, 0)?;
    let status = cri.container(&running)?;
    ensure!(status.exit_code == 137, "{status:?}");
    second.stop()
}

fn container_whose_log_is_gone_is_followed_all_the_same(node: &Node) -> Result<()> {
    let first = node.plan("logless").start()?;
    let pod = Pod::run(&first.cri, node.pod_config("logless")?)?;
    let image = node.image_on(&first.cri, BASE)?;
    let (stopped, ended) = (sleeper("stopped", &image), sleeper("ended", &image));
    let (stopped, ended) = (pod.start(&stopped)?, pod.start(&ended)?);
    let directory = PathBuf::from(&pod.config.log_directory);
    let path = directory.join("stopped.log");
    first.kill()?;
    fs::rename(&directory, directory.with_extension("aside"))?;
    fs::write(&directory, "in its place\n")?;
    let second = node.plan("logless").start()?;
    let cri = &second.cri;
    cri.stop(&ended, 10)?;
    let status = cri.container(&ended)?;
    ensure!(
        status.state() == ContainerState::ContainerExited && status.exit_code == 0,
        "{status:?}"
    );
    // The log comes back with its directory.
    fs::remove_file(&directory)?;
    let container_id = stopped.clone();
    cri.reopen_container_log(ReopenContainerLogRequest { container_id })?;
    cri.shell(&stopped, "echo here > /proc/1/fd/1")?;
    log::wait_for(&path, "here\n")?;
    cri.stop(&stopped, 0)?;
    let status = cri.container(&stopped)?;
    ensure!(status.exit_code == 137, "{status:?}");
    second.stop()
}

fn file_that_is_filled_leaves_room_for_neighbours(node: &Node) -> Result<()> {
    let pod = node.pod("filler")?;
    let image = node.base()?;
    let line = "cat /dev/zero > /etc/hosts; echo full";
    let ended = pod.run_to_end(&shell("filler", &image, line))?;
    ensure!(ended.stdout() == "full\n", "{:?}", ended.status);
    let full = ended.stderr().contains("No space left on device");
    ensure!(full, "{}", ended.stderr());
    let neighbour = pod.start(&sleeper("neighbour", &image))?;
    pod.cri.remove(&ended.status.id)?;
    exec_works(pod.cri, &neighbour)
}

fn files_that_cannot_be_changed_are_removed_with_their_container(node: &Node) -> Result<()> {
    let mut config = node.pod_config("fixed")?;
    pod_security(&mut config).privileged = true;
    let pod = Pod::run(node.cri()?, config)?;
    // FS_IOC_SETFLAGS: what cannot be changed, and what can only be added to; files and directories.
    let program = "mkdir $_ for qw(/a /a/b /c); \
        for (['/a/f', 0x10], ['/c/f', 0x20], ['/a/b', 0x10], ['/a', 0x10], ['/c', 0x20]) { \
            my ($path, $flags) = @$_; \
            if (!-d $path) { open(my $new, '>', $path) or die $! } \
            open(my $file, '<', $path) or die $!; \
            ioctl($file, 0x40086602, pack('l!', $flags)) or die \"$path: $!\" } \
        die 'it can be changed' if unlink('/a/f') or unlink('/c/f'); print 'fixed';";
    let image = node.image(WEB)?;
    let mut config = container("fixed", &image, &["/usr/bin/perl", "-e", program]);
    security(&mut config).privileged = true;
    let ended = pod.run_to_end(&config)?;
    ensure!(ended.stdout() == "fixed", "{}", ended.stderr());
    Ok(pod.cri.remove(&ended.status.id)?)
}

fn deep_directories_are_removed_with_their_container(node: &Node) -> Result<()> {
    let pod = node.pod("deep")?;
    let image = node.base()?;
    // More levels than a process usually has descriptors.
    let line = "levels=$(printf 'd/%.0s' $(seq 100)); for i in $(seq 11); do \
                mkdir -p $levels && cd $levels || exit; done; echo made";
    let config = shell("deep", &image, line);
    let id = pod.start(&config)?;
    pod.cri.wait(&id)?;
    log::wait_for(&pod.log_path(&config), "made\n")?;
    let neighbour = pod.start(&sleeper("neighbour", &image))?;
    pod.cri.remove(&id)?;
    exec_works(pod.cri, &neighbour)
}
