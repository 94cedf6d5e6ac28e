//! What containers and commands write: logs, and all of it.

use std::fs;

use anyhow::{Context, Result, ensure};
use bulkhead_cri_api::v1::*;
use bulkhead_tests::cri::refused;
use bulkhead_tests::log;
use bulkhead_tests::request::{shell, sleeper};
use bulkhead_tests::{Node, suite};
use tonic::Code;

suite! {
    log_has_both_streams,
    log_splits_long_lines,
    log_keeps_the_last_bytes,
    log_is_reopened_after_a_rename,
    log_is_dropped_without_a_path,
    large_output_arrives_whole,
    large_output_of_an_exec_arrives_whole,
}

fn log_has_both_streams(node: &Node) -> Result<()> {
    let pod = node.pod("streams")?;
    let line =
        "echo out 1; echo err 1 >&2; echo; echo '  spaces  '; printf 'a\\tb\\n'; echo err 2 >&2";
    let ended = pod.run_to_end(&shell("both", &node.base()?, line))?;
    ensure!(
        ended.stdout() == "out 1\n\n  spaces  \na\tb\n",
        "{:?}",
        ended.stdout()
    );
    ensure!(ended.stderr() == "err 1\nerr 2\n", "{:?}", ended.stderr());
    ensure!(
        ended.log.iter().all(|line| line.complete),
        "{:?}",
        ended.log
    );
    let times: Vec<_> = ended.log.iter().map(|line| line.time.clone()).collect();
    ensure!(times.iter().all(|time| time.len() >= 20), "{times:?}");
    Ok(())
}

fn log_splits_long_lines(node: &Node) -> Result<()> {
    let pod = node.pod("long")?;
    // 40,000 bytes in one line: two full parts and a rest.
    let line = "head -c 40000 /dev/zero | tr '\\0' x; echo; echo short";
    let ended = pod.run_to_end(&shell("long", &node.base()?, line))?;
    let shape: Vec<_> = ended
        .log
        .iter()
        .map(|line| (line.text.len(), line.complete))
        .collect();
    let (last, parts) = shape.split_last().context("an empty log")?;
    ensure!(*last == (5, true), "{shape:?}");
    let (end, parts) = parts.split_last().context("one line")?;
    ensure!(end.1 && parts.iter().all(|part| !part.1), "{shape:?}");
    ensure!(parts.len() >= 2, "{shape:?}");
    ensure!(
        ended.stdout() == format!("{}\nshort\n", "x".repeat(40_000)),
        "{shape:?}"
    );
    Ok(())
}

fn log_keeps_the_last_bytes(node: &Node) -> Result<()> {
    let pod = node.pod("last")?;
    let ended = pod.run_to_end(&shell(
        "last",
        &node.base()?,
        "echo whole; printf 'no newline'",
    ))?;
    let texts: Vec<_> = ended
        .log
        .iter()
        .map(|line| String::from_utf8_lossy(&line.text))
        .collect();
    ensure!(texts == ["whole", "no newline"], "{texts:?}");
    Ok(())
}

fn log_is_reopened_after_a_rename(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("rotated")?;
    let line = "echo before; while [ ! -e /go ]; do sleep 0.1; done; echo after; sleep 1000";
    let config = shell("rotated", &node.base()?, line);
    let id = pod.create(&config)?;
    let request = || ReopenContainerLogRequest {
        container_id: id.clone(),
    };
    let refusal = cri.reopen_container_log(request());
    refused(refusal, &[Code::FailedPrecondition])?;
    cri.start(&id)?;
    let (path, old) = (
        pod.log_path(&config),
        pod.log_path(&config).with_extension("old"),
    );
    log::wait_for(&path, "before\n")?;
    fs::rename(&path, &old)?;
    cri.reopen_container_log(request())?;
    ensure!(path.exists(), "no new log when the call has returned");
    cri.shell(&id, "touch /go")?;
    log::wait_for(&path, "after\n")?;
    log::wait_for(&old, "before\n")?;
    Ok(())
}

fn log_is_dropped_without_a_path(node: &Node) -> Result<()> {
    let pod = node.pod("logless")?;
    let mut config = shell(
        "logless",
        &node.base()?,
        "head -c 1000000 /dev/zero; exit 5",
    );
    config.log_path = String::new();
    let id = pod.start(&config)?;
    let status = node.cri()?.wait(&id)?;
    ensure!(status.exit_code == 5, "{status:?}");
    let left: Vec<_> = fs::read_dir(&pod.config.log_directory)?.flatten().collect();
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

/// Lines of a container that writes more than any buffer on the way holds.
const LINES: usize = 40_000;

/// What `seq` prints of them.
fn numbers() -> String {
    (1..=LINES).map(|number| format!("{number}\n")).collect()
}

fn large_output_arrives_whole(node: &Node) -> Result<()> {
    let pod = node.pod("large")?;
    let command = format!("seq {LINES}; seq {LINES} >&2");
    let ended = pod.run_to_end(&shell("large", &node.base()?, &command))?;
    for (name, said) in [("stdout", ended.stdout()), ("stderr", ended.stderr())] {
        ensure!(said == numbers(), "{name}: {} bytes", said.len());
    }
    Ok(())
}

fn large_output_of_an_exec_arrives_whole(node: &Node) -> Result<()> {
    let pod = node.pod("large-exec")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    let said = node.cri()?.shell(&id, &format!("seq {LINES}"))?;
    ensure!(said == numbers().trim_end(), "{} bytes", said.len());
    Ok(())
}
