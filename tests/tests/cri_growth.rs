//! What comes and goes many times in a pod, and leaves its agent as it was. `cargo xtask soak` runs
//! these cases with larger counts.

use std::thread;

use anyhow::{Context, Result, ensure};
use bulkhead_cri_api::v1::*;
use bulkhead_tests::node::{counted, is_reference};
use bulkhead_tests::request::{Pod, shell, sleeper};
use bulkhead_tests::usage::{MEMORY, Usage};
use bulkhead_tests::{Node, suite};

suite! {
    failing_container_is_restarted_without_growth,
    execs_are_repeated_without_growth,
    refused_container_is_repeated_without_growth,
    last_line_of_every_short_lived_container_is_there,
    large_outputs_at_once_are_repeated_without_growth,
}

/// More answers than the agent remembers.
const ANSWERS: i64 = 300;

/// Has the agent answer so often that it forgets an answer for each new one: until then its memory
/// grows, as it should. A while longer it may grow by little and ever less, until what it remembers
/// lies where it stays; each case therefore begins with some of what it repeats.
fn fill_memory_of_answers(pod: &Pod<'_>, id: &str) -> Result<()> {
    if is_reference() {
        return Ok(());
    }
    for number in 0..ANSWERS {
        let shares = LinuxContainerResources {
            cpu_shares: 100 + number,
            ..LinuxContainerResources::default()
        };
        pod.cri
            .update_container_resources(UpdateContainerResourcesRequest {
                container_id: id.to_owned(),
                linux: Some(shares),
                ..UpdateContainerResourcesRequest::default()
            })?;
    }
    Ok(())
}

fn exec_works(pod: &Pod<'_>, id: &str) -> Result<()> {
    ensure!(pod.cri.shell(id, "echo fine")? == "fine", "an exec");
    Ok(())
}

fn failing_container_is_restarted_without_growth(node: &Node) -> Result<()> {
    let pod = node.pod("restarts")?;
    let image = node.base()?;
    let stays = pod.start(&sleeper("stays", &image))?;
    let attempt = |attempt: u32| -> Result<()> {
        let mut config = shell("fails", &image, "echo failing; exit 1");
        config.metadata.get_or_insert_default().attempt = attempt;
        let ended = pod.run_to_end(&config)?;
        ensure!(ended.status.exit_code == 1, "{:?}", ended.status);
        ensure!(ended.status.reason == "Error", "{:?}", ended.status);
        Ok(pod.cri.remove(&ended.status.id)?)
    };
    fill_memory_of_answers(&pod, &stays)?;
    let warm = counted(20);
    (0..warm).try_for_each(attempt)?;
    let before = Usage::settled(&pod)?;
    for number in warm..warm + counted(50) {
        attempt(number)?;
    }
    Usage::returns_to(&before, &pod)?;
    exec_works(&pod, &stays)
}

fn execs_are_repeated_without_growth(node: &Node) -> Result<()> {
    let pod = node.pod("execs")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    fill_memory_of_answers(&pod, &id)?;
    let first = Usage::settled(&pod)?;
    // What an exec leaves behind goes on, without a group of its own.
    pod.cri.shell(&id, "setsid sleep 7605 >/dev/null 2>&1 &")?;
    for _ in 0..counted(60) {
        exec_works(&pod, &id)?;
    }
    let before = Usage::settled(&pod)?;
    if let (Some(first), Some(before)) = (&first, &before) {
        let cgroups = |usage: &Usage| usage.number("cgroups");
        ensure!(
            cgroups(first)? == cgroups(before)?,
            "{first:?}, then {before:?}"
        );
    }
    for _ in 0..counted(100) {
        exec_works(&pod, &id)?;
    }
    Usage::returns_to(&before, &pod)
}

fn refused_container_is_repeated_without_growth(node: &Node) -> Result<()> {
    let pod = node.pod("refused")?;
    let image = node.base()?;
    let stays = pod.start(&sleeper("stays", &image))?;
    // Found out only inside, when all else of the container is made.
    let mut config = sleeper("nowhere", &image);
    config.working_dir = "/etc/passwd/below".to_owned();
    let refused = |times: u32| -> Result<()> {
        for _ in 0..times {
            ensure!(pod.create(&config).is_err(), "a file has nothing below");
        }
        Ok(())
    };
    fill_memory_of_answers(&pod, &stays)?;
    refused(counted(10))?;
    let before = Usage::settled(&pod)?;
    refused(counted(20))?;
    Usage::returns_to(&before, &pod)
}

fn last_line_of_every_short_lived_container_is_there(node: &Node) -> Result<()> {
    let pod = node.pod("short")?;
    let image = node.base()?;
    for number in 0..counted(200) {
        let mut config = shell(
            "short",
            &image,
            &format!("echo begin; printf 'end {number}' >&2"),
        );
        config.metadata.get_or_insert_default().attempt = number;
        config.log_path = format!("{number}.log");
        let ended = pod.run_to_end(&config)?;
        let said = (ended.stdout(), ended.stderr());
        ensure!(
            said == ("begin\n".to_owned(), format!("end {number}")),
            "{number}: {said:?}"
        );
        pod.cri.remove(&ended.status.id)?;
    }
    Ok(())
}

/// For some twenty rounds the agent takes a little more where its allocator finds no room between
/// what lives long: by ever fewer steps of up to 200 KiB, 400 in all. What is lost with an output is
/// lost in every round.
fn large_outputs_at_once_are_repeated_without_growth(node: &Node) -> Result<()> {
    const AT_ONCE: usize = 8;
    // Bytes; a quarter of one output.
    const ROOM: u64 = 1 << 20;
    let pod = node.pod("outputs")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    fill_memory_of_answers(&pod, &id)?;
    let command = ["head", "-c", "4194304", "/dev/zero"];
    let run = || pod.cri.exec_for(&id, &command, 0);
    let round = || {
        thread::scope(|scope| {
            let begun: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(run)).collect();
            for exec in begun {
                let reply = exec.join().ok().context("a thread has panicked")?;
                ensure!(reply?.stdout.len() == 4 << 20, "an output");
            }
            Ok(())
        })
    };
    let (mut first, mut all) = (None, Vec::new());
    for _ in 0..counted(6) {
        round()?;
        let Some(usage) = Usage::settled(&pod)? else {
            return Ok(());
        };
        let now = usage.number(MEMORY)?;
        all.push(now);
        let most = *first.get_or_insert(now) + ROOM;
        ensure!(now <= most, "bytes after each round: {all:?}");
    }
    Ok(())
}
