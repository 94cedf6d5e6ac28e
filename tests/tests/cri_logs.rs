//! Logs where something is in their way: servers that are killed, disks that are full.

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use bulkhead_cri_api::v1::*;
use bulkhead_tests::log::{self, Stream};
use bulkhead_tests::node::{BASE, Scratch};
use bulkhead_tests::request::{Pod, shell};
use bulkhead_tests::{Node, suite};

suite! {
    no_byte_is_lost_or_repeated_when_servers_are_killed,
    what_a_full_disk_does_not_take_is_counted,
    container_waits_for_a_full_disk_where_it_is_told_to,
    directory_that_vanishes_is_made_anew,
}

/// Numbers that a container writes to both streams, in batches.
const BATCHES: usize = 400;
const BATCH: usize = 50;

fn no_byte_is_lost_or_repeated_when_servers_are_killed(node: &Node) -> Result<()> {
    let mut server = node.plan("killed").start()?;
    let image = node.image_on(&server.cri, BASE)?;
    let pod = Pod::run(&server.cri, node.pod_config("killed")?)?;
    let line = format!(
        "for batch in $(seq 0 {}); do seq $((batch * {BATCH} + 1)) $((batch * {BATCH} + {BATCH})) | \
         tee /dev/stderr; sleep 0.02; done",
        BATCHES - 1
    );
    let config = shell("writer", &image, &line);
    let (id, path) = (pod.start(&config)?, pod.log_path(&config));
    let rotated = path.with_extension("rotated");
    for round in 0..4_u64 {
        std::thread::sleep(Duration::from_millis(700 + 130 * round));
        let rotates = round == 2;
        if rotates {
            fs::rename(&path, &rotated)?;
        }
        server.kill()?;
        server = node.plan("killed").start()?;
        if rotates {
            let container_id = id.clone();
            let request = ReopenContainerLogRequest { container_id };
            server.cri.reopen_container_log(request)?;
        }
    }
    let status = server.cri.wait(&id)?;
    ensure!(
        status.exit_code == 0 && status.message.is_empty(),
        "{status:?}"
    );
    let mut lines = log::read(&rotated)?;
    lines.extend(log::read(&path)?);
    let wanted: Vec<String> = (1..=BATCHES * BATCH)
        .map(|number| number.to_string())
        .collect();
    for stream in [Stream::Stdout, Stream::Stderr] {
        let said = log::text(&lines, stream);
        let said: Vec<&str> = said.lines().collect();
        let differs = (0..wanted.len().max(said.len()))
            .find(|&at| said.get(at).copied() != wanted.get(at).map(String::as_str));
        ensure!(
            differs.is_none(),
            "{stream:?} has {} lines; at {differs:?} stands {:?}",
            said.len(),
            differs.and_then(|at| said.get(at.saturating_sub(2)..said.len().min(at + 3)))
        );
    }
    server.stop()
}

/// Bytes that are more than the log's disk of 1 MiB takes.
const TOO_MUCH: usize = 3 << 20;

/// A pod whose logs are on a disk of their own.
fn logging_to<'a>(
    server: &'a bulkhead_tests::Server,
    node: &Node,
    disk: &Scratch,
) -> Result<Pod<'a>> {
    let mut config = node.pod_config("full")?;
    config.log_directory = disk.path().display().to_string();
    Pod::run(&server.cri, config)
}

fn what_a_full_disk_does_not_take_is_counted(node: &Node) -> Result<()> {
    let server = node.plan("full").start()?;
    let image = node.image_on(&server.cri, BASE)?;
    let disk = Scratch::mount("full-log", "size=1m")?;
    let pod = logging_to(&server, node, &disk)?;
    let config = shell(
        "full",
        &image,
        &format!("yes | head -c {TOO_MUCH}; sleep 1"),
    );
    let id = pod.start(&config)?;
    let status = server.cri.wait(&id)?;
    let lost = status
        .message
        .split(' ')
        .next()
        .and_then(|word| word.parse::<usize>().ok());
    let kept = log::text(&log::read(&pod.log_path(&config))?, Stream::Stdout).len();
    ensure!(
        lost.is_some_and(|lost| lost + kept == TOO_MUCH),
        "{kept} bytes kept; {status:?}"
    );
    server.stop()
}

fn container_waits_for_a_full_disk_where_it_is_told_to(node: &Node) -> Result<()> {
    let mut plan = node.plan("waits");
    plan.settings = "log.when_full = \"wait\"".to_owned();
    let server = plan.start()?;
    let image = node.image_on(&server.cri, BASE)?;
    let disk = Scratch::mount("waiting-log", "size=1m")?;
    let pod = logging_to(&server, node, &disk)?;
    let config = shell(
        "waits",
        &image,
        &format!("yes | head -c {TOO_MUCH}; sleep 1"),
    );
    let id = pod.start(&config)?;
    // Longer than output is otherwise kept.
    std::thread::sleep(Duration::from_secs(15));
    let status = server.cri.container(&id)?;
    ensure!(
        status.state() == ContainerState::ContainerRunning,
        "{status:?}"
    );
    let remounted = std::process::Command::new("mount")
        .args(["-o", "remount,size=300m"])
        .arg(disk.path())
        .status()?;
    ensure!(remounted.success(), "{remounted}");
    let status = server.cri.wait(&id)?;
    ensure!(
        status.exit_code == 0 && status.message.is_empty(),
        "{status:?}"
    );
    let kept = log::text(&log::read(&pod.log_path(&config))?, Stream::Stdout).len();
    ensure!(kept == TOO_MUCH, "{kept} bytes kept");
    server.stop()
}

fn directory_that_vanishes_is_made_anew(node: &Node) -> Result<()> {
    let pod = node.pod("vanishes")?;
    let until = |file| format!("while [ ! -e {file} ]; do sleep 0.1; done");
    let line = format!(
        "echo before; {}; echo unseen; {}; echo after; exit 4",
        until("/go"),
        until("/again")
    );
    let config = shell("vanishes", &node.base()?, &line);
    let (id, path) = (pod.start(&config)?, pod.log_path(&config));
    log::wait_for(&path, "before\n")?;
    fs::remove_dir_all(&pod.config.log_directory)?;
    pod.cri.shell(&id, "touch /go")?;
    let container_id = id.clone();
    let request = ReopenContainerLogRequest { container_id };
    pod.cri.reopen_container_log(request)?;
    pod.cri.shell(&id, "touch /again")?;
    let status = pod.cri.wait(&id)?;
    ensure!(status.exit_code == 4, "{status:?}");
    let said = log::text(&log::read(&path)?, Stream::Stdout);
    ensure!(said.ends_with("after\n"), "{said:?}");
    Ok(())
}
