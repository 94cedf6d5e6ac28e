//! The guest's cgroups: its processors, its disks, and the end of all that is in one.

use anyhow::{Context, Result, ensure};
use bulkhead_cri_api::v1::*;
use bulkhead_tests::cri::refused;
use bulkhead_tests::request::{
    Pod, pod_resources, pod_security, resources, security, shell, sleeper,
};
use bulkhead_tests::{Node, log, suite};
use tonic::Code;

suite! {
    processors_are_those_of_the_cgroup,
    disks_are_limited_by_their_numbers,
    stop_ends_what_forks_faster_than_it_is_killed,
    groups_of_a_container_go_with_it_at_any_depth,
    exec_that_was_moved_ends_at_its_time_limit,
}

fn unified(config: &mut ContainerConfig, file: &str, value: &str) {
    let files = &mut resources(config).unified;
    files.insert(file.to_owned(), value.to_owned());
}

fn processors_are_those_of_the_cgroup(node: &Node) -> Result<()> {
    let mut config = node.pod_config("processors")?;
    let limits = pod_resources(&mut config);
    (limits.cpu_quota, limits.cpu_period) = (200_000, 100_000);
    let pod = Pod::run(node.cri()?, config)?;
    let image = node.base()?;
    let line = "cat /sys/fs/cgroup/cpuset.cpus /sys/fs/cgroup/cpuset.cpus.effective; \
                grep Cpus_allowed_list /proc/self/status | cut -f2; nproc";
    let mut config = shell("second", &image, line);
    unified(&mut config, "cpuset.cpus", "1");
    let seen = pod.run_to_end(&config)?.stdout();
    ensure!(seen == "1\n1\n1\n1\n", "{seen}");
    let seen = pod.run_to_end(&shell("all", &image, line))?.stdout();
    ensure!(seen == "\n0-1\n0-1\n2\n", "{seen}");
    let mut config = sleeper("senseless", &image);
    unified(&mut config, "cpuset.cpus", "second");
    let answer = pod.cri.create(&pod.id, &config, &pod.config);
    let message = refused(answer, &[Code::InvalidArgument])?;
    ensure!(
        message.contains("cpuset.cpus") && message.contains("second"),
        "{message}"
    );
    Ok(())
}

fn disks_are_limited_by_their_numbers(node: &Node) -> Result<()> {
    let pod = node.pod("disks")?;
    let image = node.base()?;
    let first = pod.run_to_end(&shell("numbers", &image, "cat /sys/block/vd*/dev | sort"))?;
    let numbers = first.stdout();
    let disk = numbers.lines().next().context("the guest has no disk")?;
    let mut config = shell("limited", &image, "cat /sys/fs/cgroup/io.max");
    unified(&mut config, "io.max", &format!("{disk} wbps=1048576"));
    let seen = pod.run_to_end(&config)?.stdout();
    let wanted = format!("{disk} rbps=max wbps=1048576 riops=max wiops=max\n");
    ensure!(seen == wanted, "{seen}");
    let cases = [
        ("io.max", "9:77 wbps=1"),
        ("io.max", "much"),
        ("io.weight", "100"),
    ];
    for (file, value) in cases {
        let mut config = sleeper("refused", &image);
        unified(&mut config, file, value);
        let answer = pod.cri.create(&pod.id, &config, &pod.config);
        let message = refused(answer, &[Code::InvalidArgument])?;
        ensure!(message.contains(file), "{file} {value}: {message}");
    }
    Ok(())
}

fn stop_ends_what_forks_faster_than_it_is_killed(node: &Node) -> Result<()> {
    let pod = node.pod("forking")?;
    let image = node.base()?;
    // In the pod's PID namespace, where the end of the first process ends no other.
    let shared = |mut config: ContainerConfig| {
        let options = &mut security(&mut config).namespace_options;
        options.get_or_insert_default().pid = NamespaceMode::Pod.into();
        config
    };
    let watcher = pod.start(&shared(sleeper("watcher", &image)))?;
    // Each of them is gone as soon as it has made the next: a look from outside always comes late.
    let line = "trap '' TERM; run() { run & exit; }; for chain in 1 2 3 4; do (run) & done; \
                exec sleep 6543";
    let mut config = shared(shell("forking", &image, line));
    unified(&mut config, "pids.max", "500");
    let id = pod.start(&config)?;
    let count = "ps -o args | grep -c '[r]un() {' || true";
    let forks = || Ok::<_, anyhow::Error>(pod.cri.shell(&watcher, count)? != "0");
    let mut looks = 0;
    while !forks()? {
        looks += 1;
        ensure!(looks < 20, "nothing forks");
    }
    pod.cri.stop(&id, 1)?;
    let status = pod.cri.wait(&id)?;
    ensure!(status.exit_code == 137, "{status:?}");
    ensure!(!forks()?, "processes of an ended container go on");
    Ok(())
}

fn groups_of_a_container_go_with_it_at_any_depth(node: &Node) -> Result<()> {
    let mut config = node.pod_config("groups")?;
    pod_security(&mut config).privileged = true;
    let pod = Pod::run(node.cri()?, config)?;
    let image = node.base()?;
    // Some at every level, and a process in the last.
    let line = "cd /sys/fs/cgroup && for level in $(seq 50); do \
                mkdir before down later && cd down || exit; done; echo $$ > cgroup.procs && echo made; \
                exec sleep 6545";
    let mut config = shell("deep", &image, line);
    security(&mut config).privileged = true;
    let neighbour = pod.start(&sleeper("neighbour", &image))?;
    let id = pod.start(&config)?;
    log::wait_for(&pod.log_path(&config), "made\n")?;
    pod.cri.stop(&id, 0)?;
    pod.cri.remove(&id)?;
    let said = pod.cri.shell(&neighbour, "echo fine")?;
    ensure!(said == "fine", "{said:?}");
    Ok(())
}

fn exec_that_was_moved_ends_at_its_time_limit(node: &Node) -> Result<()> {
    let mut config = node.pod_config("moved")?;
    pod_security(&mut config).privileged = true;
    let pod = Pod::run(node.cri()?, config)?;
    let line = "cd /sys/fs/cgroup && mkdir in; while :; do for p in $(cat exec-*/cgroup.procs); do \
                echo $p > in/cgroup.procs && echo moved; done; done 2>/dev/null";
    let mut config = shell("mover", &node.base()?, line);
    security(&mut config).privileged = true;
    let id = pod.start(&config)?;
    let answer = pod.cri.exec_for(&id, &["sleep", "6546"], 5);
    refused(answer, &[Code::DeadlineExceeded])?;
    let moved = log::text(&log::read(&pod.log_path(&config))?, log::Stream::Stdout);
    ensure!(moved.starts_with("moved\n"), "it was not moved");
    let left = pod
        .cri
        .shell(&id, "ps -o args | grep -c '^sleep 6546' || true")?;
    ensure!(left == "0", "{left} of it are left");
    Ok(())
}
