//! Limits through the CRI: what a container is made with, what is changed later, what happens at
//! the limit.

use std::fs;

use anyhow::{Context, Result, ensure};
use bulkhead_cri_api::v1::*;
use bulkhead_tests::cri::{Answer, refused};
use bulkhead_tests::node::is_reference;
use bulkhead_tests::request::{
    CGROUP_PARENT, Pod, container, pod_resources, resources, shell, sleeper,
};
use bulkhead_tests::{Cri, Node, suite};
use tonic::Code;

suite! {
    limits_are_in_the_cgroup,
    files_of_the_cgroup_are_written,
    files_outside_the_cgroup_are_refused_by_name,
    limits_without_sense_are_refused_by_name,
    huge_pages_are_refused_by_name,
    update_changes_only_what_it_names,
    update_of_a_created_container_holds_when_it_runs,
    update_that_fails_changes_nothing,
    update_of_an_exited_container_is_refused,
    update_of_an_unknown_container_is_not_found,
    updates_outlive_the_server,
    oom_score_is_set_and_changed,
    memory_limit_kills,
    child_killed_at_the_limit_is_reported,
    group_kill_takes_the_whole_container,
    pods_memory_limit_holds_for_all_its_containers,
    pod_update_changes_guest_and_host,
    memory_beyond_the_vm_is_refused_with_the_number,
}

const MIB: i64 = 1 << 20;

fn limits(change: impl FnOnce(&mut LinuxContainerResources)) -> LinuxContainerResources {
    let mut limits = LinuxContainerResources::default();
    change(&mut limits);
    limits
}

fn memory(mebibytes: i64) -> LinuxContainerResources {
    limits(|limits| limits.memory_limit_in_bytes = mebibytes * MIB)
}

fn unified(pairs: &[(&str, &str)]) -> LinuxContainerResources {
    limits(|limits| limits.unified = bulkhead_tests::cri::labels(pairs))
}

fn update(cri: &Cri, id: &str, limits: &LinuxContainerResources) -> Answer<()> {
    cri.update_container_resources(UpdateContainerResourcesRequest {
        container_id: id.to_owned(),
        linux: Some(limits.clone()),
        ..UpdateContainerResourcesRequest::default()
    })?;
    Ok(())
}

fn update_pod(cri: &Cri, id: &str, limits: &LinuxContainerResources) -> Answer<()> {
    cri.update_pod_sandbox_resources(UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: id.to_owned(),
        overhead: None,
        resources: Some(limits.clone()),
    })?;
    Ok(())
}

/// Files of a running container's cgroup, a line each.
fn files(cri: &Cri, id: &str, names: &[&str]) -> Result<Vec<String>> {
    let line = format!("cd /sys/fs/cgroup; cat {}", names.join(" "));
    let said = cri.shell(id, &line)?;
    Ok(said.lines().map(str::to_owned).collect())
}

fn reported(cri: &Cri, id: &str) -> Result<LinuxContainerResources> {
    let resources = cri.container(id)?.resources;
    resources
        .and_then(|resources| resources.linux)
        .context("the status has no resources")
}

/// Creates a container with these limits, which must be refused.
fn refused_with(pod: &Pod<'_>, image: &str, limits: LinuxContainerResources) -> Result<String> {
    let mut config = sleeper("refused", image);
    *resources(&mut config) = limits;
    let created = pod.cri.create(&pod.id, &config, &pod.config);
    refused(created, &[Code::InvalidArgument])
}

fn limits_are_in_the_cgroup(node: &Node) -> Result<()> {
    let pod = node.pod("limits")?;
    let line = "cd /sys/fs/cgroup; cat memory.max cpu.max cpu.weight";
    let mut config = shell("limits", &node.base()?, line);
    *resources(&mut config) = LinuxContainerResources {
        cpu_period: 50_000,
        cpu_quota: 25_000,
        cpu_shares: 1024,
        memory_limit_in_bytes: 48 * MIB,
        hugepage_limits: vec![HugepageLimit {
            page_size: "2MB".to_owned(),
            limit: 0,
        }],
        ..LinuxContainerResources::default()
    };
    let ended = pod.run_to_end(&config)?;
    // 1024 shares are weight 39: 1 + (shares - 2) * 9999 / 262142.
    let wanted = format!("{}\n25000 50000\n39\n", 48 * MIB);
    let said = (ended.stdout(), ended.stderr());
    ensure!(said.0 == wanted, "{said:?}");
    Ok(())
}

fn files_of_the_cgroup_are_written(node: &Node) -> Result<()> {
    let pod = node.pod("unified")?;
    let mut config = sleeper("unified", &node.base()?);
    let asked = [
        ("memory.min", "4194304"),
        ("memory.low", "8388608"),
        ("memory.high", "33554432"),
        ("memory.swap.max", "0"),
        ("memory.oom.group", "1"),
        ("pids.max", "77"),
    ];
    *resources(&mut config) = unified(&asked);
    let id = pod.start(&config)?;
    let values = files(pod.cri, &id, &asked.map(|(name, _)| name))?;
    let wanted = asked.map(|(_, value)| value);
    ensure!(values == wanted, "{values:?}");
    Ok(())
}

fn files_outside_the_cgroup_are_refused_by_name(node: &Node) -> Result<()> {
    let pod = node.pod("outside")?;
    let image = node.base()?;
    let names = [
        "memory.fun",
        "fun.max",
        "cgroup.procs",
        "memory.current",
        "../cgroup.freeze",
    ];
    for name in names {
        let message = refused_with(&pod, &image, unified(&[(name, "1")]))?;
        ensure!(message.contains(name), "{name}: {message}");
    }
    let message = refused_with(&pod, &image, unified(&[("memory.max", "much")]))?;
    ensure!(
        message.contains("memory.max") && message.contains("much"),
        "{message}"
    );
    // Nothing of the refused ones is left in the way.
    pod.start(&sleeper("refused", &image))?;
    Ok(())
}

fn limits_without_sense_are_refused_by_name(node: &Node) -> Result<()> {
    let pod = node.pod("senseless")?;
    let image = node.base()?;
    type Set = fn(&mut LinuxContainerResources);
    let cases: [(&str, Set); 4] = [
        ("cpu_period", |limits| limits.cpu_period = 10),
        ("cpu_quota", |limits| limits.cpu_quota = 10),
        ("oom_score_adj", |limits| limits.oom_score_adj = 5000),
        ("memory_swap_limit_in_bytes", |limits| {
            limits.memory_limit_in_bytes = 2 * MIB;
            limits.memory_swap_limit_in_bytes = MIB;
        }),
    ];
    for (field, set) in cases {
        let message = refused_with(&pod, &image, limits(set))?;
        ensure!(message.contains(field), "{field}: {message}");
    }
    Ok(())
}

fn huge_pages_are_refused_by_name(node: &Node) -> Result<()> {
    let pod = node.pod("huge")?;
    let image = node.base()?;
    let id = pod.start(&sleeper("small", &image))?;
    let pages = |size: &str, limit: u64| {
        limits(|limits| {
            limits.hugepage_limits = vec![HugepageLimit {
                page_size: size.to_owned(),
                limit,
            }];
        })
    };
    let asked = [
        (pages("2MB", 4 << 20), "hugepage_limits", "2MB"),
        (pages("1GB", 1 << 30), "hugepage_limits", "1GB"),
        (
            unified(&[("hugetlb.2MB.max", "4194304")]),
            "unified",
            "hugetlb.2MB.max",
        ),
        (
            unified(&[("hugetlb.1GB.rsvd.max", "1073741824")]),
            "unified",
            "hugetlb.1GB.rsvd.max",
        ),
    ];
    for (limits, field, what) in asked {
        let answers = [
            refused_with(&pod, &image, limits.clone())?,
            refused(update(pod.cri, &id, &limits), &[Code::InvalidArgument])?,
            refused(
                update_pod(pod.cri, &pod.id, &limits),
                &[Code::InvalidArgument],
            )?,
        ];
        for message in answers {
            ensure!(
                message.contains(field) && message.contains(what),
                "{message}"
            );
        }
    }
    // None of them is what the kubelet asks for where a container wants none.
    update(pod.cri, &id, &pages("2MB", 0))?;
    Ok(())
}

fn update_changes_only_what_it_names(node: &Node) -> Result<()> {
    let pod = node.pod("update")?;
    let cri = pod.cri;
    let mut config = sleeper("updated", &node.base()?);
    let made = LinuxContainerResources {
        cpu_period: 50_000,
        cpu_quota: 25_000,
        cpu_shares: 1024,
        memory_limit_in_bytes: 48 * MIB,
        ..LinuxContainerResources::default()
    };
    *resources(&mut config) = made.clone();
    let id = pod.start(&config)?;
    let expect = |cpu: &str, weight: &str, memory: i64| -> Result<()> {
        let now = files(cri, &id, &["cpu.max", "cpu.weight", "memory.max"])?;
        let memory = (memory * MIB).to_string();
        ensure!(now == [cpu, weight, &memory], "{now:?}");
        Ok(())
    };
    expect("25000 50000", "39", 48)?;
    update(cri, &id, &limits(|limits| limits.cpu_quota = 10_000))?;
    expect("10000 50000", "39", 48)?;
    update(cri, &id, &memory(64))?;
    expect("10000 50000", "39", 64)?;
    update(cri, &id, &limits(|limits| limits.cpu_shares = 2048))?;
    update(cri, &id, &LinuxContainerResources::default())?;
    expect("10000 50000", "79", 64)?;
    if is_reference() {
        // containerd 1.6 reports no limits.
        return Ok(());
    }
    let wanted = LinuxContainerResources {
        cpu_quota: 10_000,
        cpu_shares: 2048,
        memory_limit_in_bytes: 64 * MIB,
        ..made
    };
    let status = reported(cri, &id)?;
    ensure!(status == wanted, "{status:?}");
    Ok(())
}

fn update_of_a_created_container_holds_when_it_runs(node: &Node) -> Result<()> {
    let pod = node.pod("created")?;
    let mut config = sleeper("created", &node.base()?);
    *resources(&mut config) = memory(32);
    let id = pod.create(&config)?;
    update(pod.cri, &id, &memory(40))?;
    pod.cri.start(&id)?;
    let now = files(pod.cri, &id, &["memory.max"])?;
    ensure!(now == [(40 * MIB).to_string()], "{now:?}");
    Ok(())
}

fn update_that_fails_changes_nothing(node: &Node) -> Result<()> {
    let pod = node.pod("fails")?;
    let cri = pod.cri;
    let mut config = sleeper("failing", &node.base()?);
    *resources(&mut config) = memory(48);
    let id = pod.start(&config)?;
    let mut asked = unified(&[("memory.fun", "1")]);
    asked.memory_limit_in_bytes = 64 * MIB;
    asked.cpu_quota = 20_000;
    let message = refused(update(cri, &id, &asked), &[Code::InvalidArgument])?;
    ensure!(message.contains("memory.fun"), "{message}");
    let now = files(cri, &id, &["memory.max", "cpu.max"])?;
    let wanted = [(48 * MIB).to_string(), "max 100000".to_owned()];
    ensure!(now == wanted, "{now:?}");
    let status = reported(cri, &id)?;
    ensure!(status == memory(48), "{status:?}");
    Ok(())
}

fn update_of_an_exited_container_is_refused(node: &Node) -> Result<()> {
    let pod = node.pod("exited")?;
    let id = pod.start(&shell("exited", &node.base()?, "exit 0"))?;
    pod.cri.wait(&id)?;
    let answer = update(pod.cri, &id, &memory(64));
    let message = refused(answer, &[Code::FailedPrecondition])?;
    ensure!(message.contains("exited"), "{message}");
    Ok(())
}

fn update_of_an_unknown_container_is_not_found(node: &Node) -> Result<()> {
    let answer = update(node.cri()?, "0123456789abcdef", &memory(64));
    refused(answer, &[Code::NotFound])?;
    Ok(())
}

fn updates_outlive_the_server(node: &Node) -> Result<()> {
    let server = node.plan("restarted").start()?;
    let image = node.image_on(&server.cri, bulkhead_tests::node::BASE)?;
    let config = node.pod_config("restarted")?;
    let (id, wanted) = {
        let pod = Pod::run(&server.cri, config)?;
        let id = pod.start(&sleeper("kept", &image))?;
        update(&server.cri, &id, &memory(64))?;
        (id, memory(64))
    };
    // As by SIGKILL.
    drop(server);
    let server = node.plan("restarted").start()?;
    let status = reported(&server.cri, &id)?;
    ensure!(status == wanted, "{status:?}");
    let more = limits(|limits| limits.cpu_quota = 30_000);
    update(&server.cri, &id, &more)?;
    let now = files(&server.cri, &id, &["memory.max", "cpu.max"])?;
    let wanted = [(64 * MIB).to_string(), "30000 100000".to_owned()];
    ensure!(now == wanted, "{now:?}");
    server.stop()
}

fn oom_score_is_set_and_changed(node: &Node) -> Result<()> {
    let pod = node.pod("score")?;
    let cri = pod.cri;
    let mut config = sleeper("score", &node.base()?);
    resources(&mut config).oom_score_adj = 500;
    let id = pod.start(&config)?;
    let scores = || {
        let files = ["cat", "/proc/1/oom_score_adj", "/proc/self/oom_score_adj"];
        cri.output(&id, &files)
    };
    let made = scores()?;
    ensure!(made == "500\n500", "{made:?}");
    update(cri, &id, &limits(|limits| limits.oom_score_adj = 700))?;
    // Later processes have it as well.
    let changed = scores()?;
    ensure!(changed == "700\n700", "{changed:?}");
    Ok(())
}

fn memory_limit_kills(node: &Node) -> Result<()> {
    let pod = node.pod("hungry")?;
    // The only process reads a file without lines into memory.
    let mut config = container("hungry", &node.base()?, &["tail", "/dev/zero"]);
    *resources(&mut config) = memory(16);
    let status = pod.run_to_end(&config)?.status;
    ensure!(status.exit_code == 137, "{status:?}");
    ensure!(status.reason == "OOMKilled", "{status:?}");
    Ok(())
}

fn child_killed_at_the_limit_is_reported(node: &Node) -> Result<()> {
    let pod = node.pod("child")?;
    let line = "tail /dev/zero; echo the child ended with $?; sleep 1; exit 3";
    let mut config = shell("child", &node.base()?, line);
    *resources(&mut config) = memory(16);
    let ended = pod.run_to_end(&config)?;
    ensure!(
        ended.stdout() == "the child ended with 137\n",
        "{:?}",
        ended.stdout()
    );
    // The code is that of the container's own process, the reason that of its trouble.
    ensure!(ended.status.exit_code == 3, "{:?}", ended.status);
    ensure!(ended.status.reason == "OOMKilled", "{:?}", ended.status);
    Ok(())
}

fn group_kill_takes_the_whole_container(node: &Node) -> Result<()> {
    let pod = node.pod("group")?;
    let line = "tail /dev/zero; echo still here";
    let mut config = shell("group", &node.base()?, line);
    *resources(&mut config) = unified(&[("memory.oom.group", "1")]);
    resources(&mut config).memory_limit_in_bytes = 16 * MIB;
    let ended = pod.run_to_end(&config)?;
    ensure!(ended.stdout().is_empty(), "{:?}", ended.stdout());
    ensure!(ended.status.exit_code == 137, "{:?}", ended.status);
    ensure!(ended.status.reason == "OOMKilled", "{:?}", ended.status);
    Ok(())
}

fn pods_memory_limit_holds_for_all_its_containers(node: &Node) -> Result<()> {
    let mut config = node.pod_config("bounded")?;
    *pod_resources(&mut config) = memory(64);
    let pod = Pod::run(node.cri()?, config)?;
    let image = node.base()?;
    let mut neighbour = sleeper("neighbour", &image);
    *resources(&mut neighbour) = memory(32);
    let neighbour = pod.start(&neighbour)?;
    let mut hungry = container("hungry", &image, &["tail", "/dev/zero"]);
    *resources(&mut hungry) = memory(128);
    let status = pod.run_to_end(&hungry)?.status;
    ensure!(status.reason == "OOMKilled", "{status:?}");
    ensure!(
        pod.cri.shell(&neighbour, "echo fine")? == "fine",
        "the neighbour"
    );
    // One that states no limit does not live on what the others are limited to.
    let line = "awk 'BEGIN { s = \"x\"; while (length(s) < 60000000) s = s s; print length(s) }'";
    let ended = pod.run_to_end(&shell("free", &image, line))?;
    ensure!(ended.stdout() == "67108864\n", "{:?}", ended.status);
    Ok(())
}

fn pod_update_changes_guest_and_host(node: &Node) -> Result<()> {
    let pod = node.pod("resized")?;
    let cri = pod.cri;
    let host = |name: &str| -> Result<String> {
        let group = format!("/sys/fs/cgroup{CGROUP_PARENT}/bulkhead-{}", pod.id);
        Ok(fs::read_to_string(format!("{group}/{name}"))?
            .trim_end()
            .to_owned())
    };
    let asked = limits(|limits| {
        limits.cpu_quota = 150_000;
        limits.cpu_shares = 1024;
        limits.memory_limit_in_bytes = 64 * MIB;
    });
    update_pod(cri, &pod.id, &asked)?;
    let now = (host("cpu.max")?, host("cpu.weight")?);
    ensure!(
        now == ("150000 100000".to_owned(), "39".to_owned()),
        "{now:?}"
    );
    // Leaves the rest.
    update_pod(cri, &pod.id, &limits(|limits| limits.cpu_period = 50_000))?;
    ensure!(host("cpu.max")? == "150000 50000", "{:?}", host("cpu.max"));
    update_pod(cri, &pod.id, &limits(|limits| limits.cpu_quota = -1))?;
    ensure!(host("cpu.max")? == "max 50000", "{:?}", host("cpu.max"));
    let mut hungry = container("hungry", &node.base()?, &["tail", "/dev/zero"]);
    *resources(&mut hungry) = memory(128);
    let status = pod.run_to_end(&hungry)?.status;
    ensure!(status.reason == "OOMKilled", "{status:?}");
    let unknown = update_pod(cri, "0123456789abcdef", &asked);
    refused(unknown, &[Code::NotFound])?;
    cri.stop_pod(&pod.id)?;
    let stopped = update_pod(cri, &pod.id, &asked);
    refused(stopped, &[Code::FailedPrecondition])?;
    Ok(())
}

fn memory_beyond_the_vm_is_refused_with_the_number(node: &Node) -> Result<()> {
    let pod = node.pod("beyond")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    let (much, number) = (memory(1 << 20), (1_i64 << 40).to_string());
    let codes = [Code::InvalidArgument];
    let answers = [
        update(pod.cri, &id, &much),
        update_pod(pod.cri, &pod.id, &much),
    ];
    for answer in answers {
        let message = refused(answer, &codes)?;
        ensure!(
            message.contains("memory_limit_in_bytes") && message.contains(&number),
            "{message}"
        );
    }
    let now = files(pod.cri, &id, &["memory.max"])?;
    ensure!(now == ["max"], "{now:?}");
    Ok(())
}
