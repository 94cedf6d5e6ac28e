//! The command line.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bulkhead_cri_api::v1::PodSandboxFilter;
use bulkhead_tests::node::{BASE, WEB};
use bulkhead_tests::request::{resources, shell, sleeper};
use bulkhead_tests::{Node, log, suite};
use rustix::process::{Pid, Signal, kill_process};

suite! {
    run_gives_the_containers_output_and_exit_status,
    run_takes_the_images_command,
    run_brings_up_a_server_of_its_own,
    run_says_where_the_time_went,
    run_is_removed_by_ctrl_c,
    run_says_that_memory_was_short,
    run_of_a_missing_command_says_so,
    run_of_an_unknown_image_names_it,
    ps_lists_pods_and_containers,
    logs_gives_what_a_container_has_written,
    logs_follows_a_container_to_its_end,
    exec_has_the_callers_streams_and_gives_the_exit_status,
    exec_has_the_callers_terminal,
    exec_that_is_interrupted_ends,
    attach_shows_a_container_to_its_end,
    stats_shows_what_pods_and_containers_use,
    console_shows_what_the_guests_kernel_says,
    images_lists_images,
    run_shows_on_a_terminal_how_a_pull_comes_along,
    doctor_finds_that_pods_can_run,
    doctor_names_what_is_missing_and_what_to_do,
    wrong_configuration_is_named,
}

/// `bulkhead` with arguments, its temporary files in a directory of the test's own.
fn bulkhead(node: &Node, arguments: &[&str]) -> Result<(Command, PathBuf)> {
    let temporary = node.scratch().join("temporary");
    fs::create_dir_all(&temporary)?;
    let mut command = Command::new(node.programs().join("bulkhead"));
    command.args(arguments).env("TMPDIR", &temporary);
    command.stdin(Stdio::null());
    Ok((command, temporary))
}

/// Runs it to its end; it must leave no temporary file.
fn output(node: &Node, arguments: &[&str]) -> Result<Output> {
    let (mut command, temporary) = bulkhead(node, arguments)?;
    let output = command.output()?;
    let left: Vec<_> = fs::read_dir(&temporary)?.flatten().collect();
    ensure!(left.is_empty(), "{arguments:?} leaves {left:?}");
    Ok(output)
}

/// The shared server's socket as an argument.
fn socket(node: &Node) -> Result<String> {
    Ok(format!("--socket={}", node.server()?.socket().display()))
}

fn run_gives_the_containers_output_and_exit_status(node: &Node) -> Result<()> {
    let line = "echo out; echo err >&2; uname -r; exit 42";
    let image = node.registry.name(BASE);
    let done = output(
        node,
        &["run", &socket(node)?, &image, "--", "/bin/sh", "-c", line],
    )?;
    let stdout = String::from_utf8_lossy(&done.stdout);
    let stderr = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.code() == Some(42), "{:?} {stderr}", done.status);
    ensure!(
        stdout.starts_with("out\n") && stdout.lines().count() == 2,
        "{stdout}"
    );
    ensure!(stderr.ends_with("err\n"), "{stderr}");
    let left = node.cri()?.pod_ids(PodSandboxFilter::default())?;
    ensure!(left.is_empty(), "pods {left:?} are left");
    Ok(())
}

fn run_takes_the_images_command(node: &Node) -> Result<()> {
    let image = node.registry.name("test/config:1");
    let done = output(node, &["run", &socket(node)?, &image])?;
    ensure!(done.stdout == b"entrypoint cmd\n", "{done:?}");
    let done = output(node, &["run", &socket(node)?, &image, "--", "own"])?;
    ensure!(done.stdout == b"entrypoint own\n", "{done:?}");
    ensure!(done.status.success(), "{done:?}");
    Ok(())
}

fn run_brings_up_a_server_of_its_own(node: &Node) -> Result<()> {
    let config = private_config(node)?;
    let image = node.registry.name(BASE);
    let done = output(node, &["run", &config, &image, "--", "cat", "/data/kept"])?;
    ensure!(done.status.success(), "{done:?}");
    ensure!(done.stdout == b"layer 1\n", "{done:?}");
    Ok(())
}

fn run_says_where_the_time_went(node: &Node) -> Result<()> {
    let image = node.base()?;
    let done = output(
        node,
        &["run", "--timings", &socket(node)?, &image, "--", "true"],
    )?;
    ensure!(done.status.success(), "{done:?}");
    let said = String::from_utf8_lossy(&done.stderr);
    let parts: Vec<_> = said
        .lines()
        .filter_map(|line| line.split(' ').next())
        .collect();
    ensure!(
        parts == ["image", "pod", "create", "start", "run", "remove"],
        "{said}"
    );
    ensure!(said.contains("guest "), "{said}");
    Ok(())
}

fn run_shows_on_a_terminal_how_a_pull_comes_along(node: &Node) -> Result<()> {
    let config = private_config(node)?;
    let image = node.registry.name(WEB);
    let line = format!(
        "{} run {config} {image} -- /usr/bin/perl -e 0",
        node.programs().join("bulkhead").display()
    );
    // Gives it a terminal and copies what that shows.
    let done = Command::new("script")
        .args(["--quiet", "--return", "--command", &line, "/dev/null"])
        .env("TERM", "xterm")
        .stdin(Stdio::null())
        .output()?;
    let shown = String::from_utf8_lossy(&done.stdout);
    ensure!(done.status.success(), "{done:?}");
    ensure!(shown.contains(&format!("Pulling {image}")), "{shown}");
    let bar = |line: &str| line.contains('█') && line.contains(" of ") && line.contains("MiB");
    ensure!(shown.lines().any(bar), "{shown}");
    Ok(())
}

fn run_is_removed_by_ctrl_c(node: &Node) -> Result<()> {
    let image = node.registry.name(BASE);
    for server in [socket(node)?, private_config(node)?] {
        let line = "trap 'exit 5' TERM; echo up; while :; do sleep 0.2; done";
        let arguments = ["run", &server, &image, "--", "/bin/sh", "-c", line];
        let (mut command, temporary) = bulkhead(node, &arguments)?;
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut stdout = BufReader::new(child.stdout.take().context("no pipe")?);
        let mut first = String::new();
        stdout.read_line(&mut first)?;
        ensure!(first == "up\n", "{first:?}");
        let pid = Pid::from_raw(child.id().cast_signed()).context("no process")?;
        kill_process(pid, Signal::INT)?;
        let status = child.wait()?;
        ensure!(status.code() == Some(5), "{server}: {status}");
        let left: Vec<_> = fs::read_dir(&temporary)?.flatten().collect();
        ensure!(left.is_empty(), "{left:?} is left");
    }
    let left = node.cri()?.pod_ids(PodSandboxFilter::default())?;
    ensure!(left.is_empty(), "pods {left:?} are left");
    Ok(())
}

fn run_says_that_memory_was_short(node: &Node) -> Result<()> {
    let (server, image) = (socket(node)?, node.registry.name(BASE));
    let done = output(
        node,
        &[
            "run",
            "--memory",
            "20M",
            &server,
            &image,
            "--",
            "tail",
            "/dev/zero",
        ],
    )?;
    let stderr = String::from_utf8_lossy(&done.stderr);
    ensure!(
        done.status.code() == Some(137),
        "{:?} {stderr}",
        done.status
    );
    ensure!(stderr.contains("OOMKilled"), "{stderr}");
    Ok(())
}

fn run_of_a_missing_command_says_so(node: &Node) -> Result<()> {
    let image = node.registry.name(BASE);
    let done = output(
        node,
        &["run", &socket(node)?, &image, "--", "/no/such/command"],
    )?;
    let stderr = String::from_utf8_lossy(&done.stderr);
    ensure!(
        done.status.code() == Some(127),
        "{:?} {stderr}",
        done.status
    );
    ensure!(stderr.contains("/no/such/command"), "{stderr}");
    Ok(())
}

fn run_of_an_unknown_image_names_it(node: &Node) -> Result<()> {
    let image = node.registry.name("test/none:1");
    let done = output(node, &["run", &socket(node)?, &image])?;
    let stderr = String::from_utf8_lossy(&done.stderr);
    ensure!(
        done.status.code() == Some(125),
        "{:?} {stderr}",
        done.status
    );
    ensure!(stderr.contains("test/none:1"), "{stderr}");
    Ok(())
}

fn ps_lists_pods_and_containers(node: &Node) -> Result<()> {
    let pod = node.pod("listed")?;
    let container = pod.start(&sleeper("sleeper", &node.base()?))?;
    let done = output(node, &["ps", &socket(node)?])?;
    let stdout = String::from_utf8_lossy(&done.stdout);
    ensure!(done.status.success(), "{done:?}");
    let row = stdout.lines().find(|line| line.contains("listed"));
    let row = row.with_context(|| stdout.clone().into_owned())?;
    for id in [&pod.id, &container] {
        let start = id.get(..12).context("a short id")?;
        ensure!(row.contains(start), "no {start} in {row}");
    }
    Ok(())
}

fn logs_gives_what_a_container_has_written(node: &Node) -> Result<()> {
    let pod = node.pod("wrote")?;
    let ended = pod.run_to_end(&shell("wrote", &node.base()?, "echo out; echo err >&2"))?;
    let done = output(node, &["logs", &socket(node)?, &ended.status.id])?;
    ensure!(done.status.success(), "{done:?}");
    ensure!(
        done.stdout == b"out\n" && done.stderr == b"err\n",
        "{done:?}"
    );
    let done = output(node, &["logs", &socket(node)?, "0123456789"])?;
    let said = String::from_utf8_lossy(&done.stderr);
    ensure!(
        done.status.code() == Some(125) && said.contains("0123456789"),
        "{done:?}"
    );
    let mut silent = sleeper("silent", &node.base()?);
    silent.log_path.clear();
    let silent = pod.start(&silent)?;
    let done = output(node, &["logs", &socket(node)?, &silent])?;
    let said = String::from_utf8_lossy(&done.stderr);
    ensure!(said.contains("no log"), "{done:?}");
    Ok(())
}

fn logs_follows_a_container_to_its_end(node: &Node) -> Result<()> {
    let pod = node.pod("writes")?;
    let line = "echo first; until [ -e /go ]; do sleep 0.1; done; echo last";
    let id = pod.start(&shell("writes", &node.base()?, line))?;
    let (mut command, _) = bulkhead(node, &["logs", "-f", &socket(node)?, &id])?;
    let mut follower = command.stdout(Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(follower.stdout.take().context("stdout")?).lines();
    ensure!(lines.next().context("a line")?? == "first");
    pod.cri.shell(&id, "touch /go")?;
    ensure!(lines.next().context("a line")?? == "last");
    ensure!(lines.next().is_none(), "it goes on after the end");
    ensure!(follower.wait()?.success());
    Ok(())
}

fn exec_has_the_callers_streams_and_gives_the_exit_status(node: &Node) -> Result<()> {
    let id = node.pod("exec")?.start(&sleeper("main", &node.base()?))?;
    let line = "sha256sum; echo err >&2; exit 7";
    let arguments = ["exec", &socket(node)?, "-i", &id, "sh", "-c", line];
    let (mut command, _) = bulkhead(node, &arguments)?;
    command.stdin(Stdio::piped());
    let piped = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn()?;
    let mut stdin = child.stdin.take().context("stdin")?;
    // More than all buffers on the way hold.
    stdin.write_all(&vec![b'x'; 3 << 20])?;
    drop(stdin);
    let done = child.wait_with_output()?;
    let said = (done.stdout.as_slice(), done.stderr.as_slice());
    let sum = "3bea8a9a07c1e8dcaa4c1b816815c35a29b4fb585ba6ecc70ea44840a794cfb3  -\n";
    ensure!(said == (sum.as_bytes(), b"err\n"), "{done:?}");
    ensure!(done.status.code() == Some(7), "{done:?}");
    let missing = output(node, &["exec", &socket(node)?, &id, "/no/such/program"])?;
    let said = String::from_utf8_lossy(&missing.stderr);
    ensure!(said.contains("/no/such/program"), "{missing:?}");
    ensure!(missing.status.code() == Some(125), "{missing:?}");
    Ok(())
}

fn exec_has_the_callers_terminal(node: &Node) -> Result<()> {
    let id = node
        .pod("exec-tty")?
        .start(&sleeper("main", &node.base()?))?;
    let socket = socket(node)?;
    let program = node.programs().join("bulkhead");
    let line = format!(
        "stty rows 33 cols 77; {} exec {socket} -it {id} sh -c 'tty; sleep 1; stty size; exit 4'",
        program.display()
    );
    // script(1) gives it a terminal, and its exit status on.
    let done = Command::new("script")
        .args(["--quiet", "--return", "--command", &line, "/dev/null"])
        .stdin(Stdio::null())
        .output()?;
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    ensure!(
        said.contains("/dev/pts/") && said.contains("33 77"),
        "{done:?}"
    );
    ensure!(done.status.code() == Some(4), "{done:?}");
    Ok(())
}

fn exec_that_is_interrupted_ends(node: &Node) -> Result<()> {
    let id = node
        .pod("exec-lost")?
        .start(&sleeper("main", &node.base()?))?;
    let arguments = ["exec", &socket(node)?, &id, "sleep", "7105"];
    let (mut command, _) = bulkhead(node, &arguments)?;
    let mut child = command.spawn()?;
    let count = || {
        node.cri()?
            .shell(&id, "ps -o args | grep -c '^sleep 7105' || true")
    };
    let settles = |wanted: &str| -> Result<()> {
        for _ in 0..100 {
            if count()? == wanted {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        bail!("{} commands, not {wanted}", count()?)
    };
    settles("1")?;
    child.kill()?;
    child.wait()?;
    settles("0")
}

fn attach_shows_a_container_to_its_end(node: &Node) -> Result<()> {
    let pod = node.pod("attach")?;
    let line = "echo before; while read word; do echo \"got $word\"; done; echo after";
    let mut config = shell("main", &node.base()?, line);
    (config.stdin, config.stdin_once) = (true, true);
    let id = pod.start(&config)?;
    log::wait_for(&pod.log_path(&config), "before\n")?;
    let (mut watcher, _) = bulkhead(node, &["attach", &socket(node)?, &id])?;
    let watcher = watcher.stdout(Stdio::piped()).spawn()?;
    let (mut typist, _) = bulkhead(node, &["attach", &socket(node)?, "-i", &id])?;
    let piped = typist.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut typist = piped.spawn()?;
    // Both are there before anything is typed.
    std::thread::sleep(Duration::from_secs(2));
    typist
        .stdin
        .take()
        .context("stdin")?
        .write_all(b"one\ntwo\n")?;
    for child in [watcher, typist] {
        let done = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&done.stdout).into_owned();
        ensure!(said == "got one\ngot two\nafter\n", "{said:?}");
        ensure!(done.status.success(), "{done:?}");
    }
    ensure!(node.cri()?.wait(&id)?.exit_code == 0, "its end");
    Ok(())
}

fn stats_shows_what_pods_and_containers_use(node: &Node) -> Result<()> {
    let pod = node.pod("measured")?;
    let id = pod.start(&shell("busy", &node.base()?, "while :; do :; done"))?;
    let done = output(node, &["stats", &socket(node)?])?;
    let stdout = String::from_utf8_lossy(&done.stdout);
    ensure!(done.status.success(), "{done:?}");
    for start in [pod.id.get(..12), id.get(..12)] {
        let start = start.context("a short id")?;
        let row = stdout.lines().find(|line| line.starts_with(start));
        let row = row.with_context(|| format!("no {start}: {stdout}"))?;
        ensure!(row.contains(" %   ") && row.contains("iB"), "{row}");
    }
    ensure!(stdout.contains("measured/busy"), "{stdout}");
    Ok(())
}

fn console_shows_what_the_guests_kernel_says(node: &Node) -> Result<()> {
    let pod = node.pod("hog")?;
    let mut config = shell("hog", &node.base()?, "tail /dev/zero");
    resources(&mut config).memory_limit_in_bytes = 16 << 20;
    let ended = pod.run_to_end(&config)?.status;
    ensure!(ended.reason == "OOMKilled", "{ended:?}");
    let done = output(node, &["console", &socket(node)?, &pod.id])?;
    let said = String::from_utf8_lossy(&done.stdout);
    ensure!(said.contains("out of memory: Killed process"), "{done:?}");
    pod.cri.stop_pod(&pod.id)?;
    let done = output(node, &["console", &socket(node)?, &pod.id])?;
    let said = String::from_utf8_lossy(&done.stderr);
    ensure!(
        done.status.code() == Some(125) && said.contains("stopped"),
        "{done:?}"
    );
    Ok(())
}

fn images_lists_images(node: &Node) -> Result<()> {
    let name = node.base()?;
    let done = output(node, &["images", &socket(node)?])?;
    let stdout = String::from_utf8_lossy(&done.stdout);
    ensure!(done.status.success(), "{done:?}");
    ensure!(stdout.contains(&name), "{stdout}");
    Ok(())
}

fn doctor_finds_that_pods_can_run(node: &Node) -> Result<()> {
    let done = output(node, &["doctor"])?;
    let stdout = String::from_utf8_lossy(&done.stdout);
    ensure!(done.status.success(), "{:?} {stdout}", done.status);
    ensure!(stdout.to_lowercase().contains("kvm"), "{stdout}");
    Ok(())
}

/// On a machine that lacks nearly everything.
fn doctor_names_what_is_missing_and_what_to_do(node: &Node) -> Result<()> {
    let alone = node.scratch().join("alone");
    fs::create_dir_all(&alone)?;
    fs::copy(node.programs().join("bulkhead"), alone.join("bulkhead"))?;
    // The pods' own programs go with /usr/sbin.
    let line = "mount -t tmpfs none /dev && mount -t tmpfs none /sys/fs/cgroup &&
        mount -t tmpfs none /usr/sbin && exec \"$0\" doctor";
    let done = Command::new("unshare")
        .args(["--mount", "sh", "-c", line])
        .arg(alone.join("bulkhead"))
        .output()?;
    let stdout = String::from_utf8_lossy(&done.stdout);
    ensure!(done.status.code() == Some(1), "{done:?}");
    for (name, advice) in [
        ("kvm device", "load the module"),
        ("cgroups", "mount cgroup2"),
        ("VMM and guest", "put bulkhead-vmm, vmlinux and initramfs"),
        ("mke2fs", "apt install e2fsprogs"),
        ("nft", "apt install nftables"),
        ("pod network", "nf_tables"),
    ] {
        let mut lines = stdout.lines();
        let failure = format!("FAIL  {name}: ");
        let found = lines.any(|line| line.starts_with(&failure));
        let said = lines.next().unwrap_or_default();
        ensure!(found && said.contains(advice), "{name}: {stdout}");
    }
    ensure!(
        stdout.contains("Pods cannot run on this machine"),
        "{stdout}"
    );
    Ok(())
}

fn wrong_configuration_is_named(node: &Node) -> Result<()> {
    let path = node.scratch().join("wrong.toml");
    fs::write(&path, "[vm]\nmemory = 256\n")?;
    let path = path.display().to_string();
    let done = output(node, &["serve", "--config", &path])?;
    let stderr = String::from_utf8_lossy(&done.stderr);
    ensure!(!done.status.success(), "{stderr}");
    ensure!(
        stderr.contains(&path) && stderr.contains("memory"),
        "{stderr}"
    );
    Ok(())
}

/// A configuration under which no server runs, as an argument.
fn private_config(node: &Node) -> Result<String> {
    let path = node.scratch().join("private.toml");
    let registry = node.registry.address();
    let text = format!(
        "run = \"{0}/nobody\"\nnetwork.cni = \"{0}/none\"\n[registry.\"{registry}\"]\nplain_http = true\n",
        node.scratch().display()
    );
    fs::write(&path, text)?;
    Ok(format!("--config={}", path.display()))
}
