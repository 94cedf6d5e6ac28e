//! How a pod's limits size its VM, and where the VM runs on the host.

use std::fs;

use anyhow::{Context, Result, ensure};
use bulkhead_cri_api::v1::*;
use bulkhead_tests::cri::{Answer, refused};
use bulkhead_tests::request::{CGROUP_PARENT, Pod, pod_resources, resources, shell, sleeper};
use bulkhead_tests::{Cri, Node, suite};
use tonic::Code;

suite! {
    containers_can_use_all_of_the_pods_memory_limit,
    vm_has_a_processor_for_each_of_the_pods_limit,
    pod_larger_than_the_machine_is_refused_by_name,
    container_larger_than_the_vm_is_refused_by_name,
    vm_runs_on_the_cpus_of_its_containers,
    cpus_can_be_had_and_changed_by_an_update_alone,
    cpus_that_cannot_be_had_are_refused_by_name,
    cpus_outlive_the_server,
}

const MIB: i64 = 1 << 20;

/// A container that sleeps, on these CPUs.
fn on(name: &str, image: &str, cpus: &str) -> ContainerConfig {
    let mut config = sleeper(name, image);
    resources(&mut config).cpuset_cpus = cpus.to_owned();
    config
}

fn update(cri: &Cri, id: &str, cpus: &str, mems: &str) -> Answer<()> {
    cri.update_container_resources(UpdateContainerResourcesRequest {
        container_id: id.to_owned(),
        linux: Some(LinuxContainerResources {
            cpuset_cpus: cpus.to_owned(),
            cpuset_mems: mems.to_owned(),
            ..LinuxContainerResources::default()
        }),
        ..UpdateContainerResourcesRequest::default()
    })?;
    Ok(())
}

fn group(pod: &str) -> String {
    format!("/sys/fs/cgroup{CGROUP_PARENT}/bulkhead-{pod}")
}

/// Checks that every thread of the pod's VMM may run on these CPUs, and on no others.
fn runs_on(pod: &str, cpus: &str) -> Result<()> {
    let group = group(pod);
    let threads = fs::read_to_string(format!("{group}/cgroup.threads"))?;
    ensure!(!threads.is_empty(), "nothing runs in {group}");
    for thread in threads.lines() {
        let status = fs::read_to_string(format!("/proc/{thread}/status"))?;
        let allowed = status
            .lines()
            .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))
            .context("no Cpus_allowed_list")?;
        ensure!(allowed.trim() == cpus, "{allowed}, not {cpus}: {status}");
    }
    Ok(())
}

fn containers_can_use_all_of_the_pods_memory_limit(node: &Node) -> Result<()> {
    // More than the 256 MiB of a pod without a limit.
    let limit = 320 * MIB;
    let mut config = node.pod_config("roomy")?;
    pod_resources(&mut config).memory_limit_in_bytes = limit;
    let pod = Pod::run(node.cri()?, config)?;
    let line = "tail /dev/zero; echo $?; cat /sys/fs/cgroup/memory.peak; \
                grep MemTotal: /proc/meminfo";
    let mut config = shell("hungry", &node.base()?, line);
    resources(&mut config).memory_limit_in_bytes = limit;
    let ended = pod.run_to_end(&config)?;
    let said = ended.stdout();
    let words: Vec<&str> = said.split_whitespace().collect();
    let [code, peak, _, total, _] = words[..] else {
        anyhow::bail!("{said:?} {:?}", ended.stderr());
    };
    ensure!(code == "137", "{said}");
    ensure!(ended.status.reason == "OOMKilled", "{:?}", ended.status);
    // It had what it may have, less what the kernel takes at once.
    let peak: i64 = peak.parse()?;
    ensure!((limit - 2 * MIB..=limit).contains(&peak), "{said}");
    let total: i64 = total.parse()?;
    ensure!(
        (limit..=limit + 80 * MIB).contains(&(total << 10)),
        "{said}"
    );
    Ok(())
}

fn vm_has_a_processor_for_each_of_the_pods_limit(node: &Node) -> Result<()> {
    let mut config = node.pod_config("busy")?;
    let limits = pod_resources(&mut config);
    (limits.cpu_quota, limits.cpu_period) = (150_000, 100_000);
    let pod = Pod::run(node.cri()?, config)?;
    let ended = pod.run_to_end(&shell("nproc", &node.base()?, "nproc"))?;
    ensure!(ended.stdout() == "2\n", "{:?}", ended.stdout());
    Ok(())
}

fn pod_larger_than_the_machine_is_refused_by_name(node: &Node) -> Result<()> {
    let mut config = node.pod_config("huge")?;
    pod_resources(&mut config).memory_limit_in_bytes = 1 << 50;
    let message = refused(node.cri()?.run_pod(&config), &[Code::InvalidArgument])?;
    let number = (1_i64 << 50).to_string();
    ensure!(
        message.contains("linux.resources.memory_limit_in_bytes") && message.contains(&number),
        "{message}"
    );
    let listed = node.cri()?.pod_ids(PodSandboxFilter::default())?;
    ensure!(listed.is_empty(), "{listed:?}");
    Ok(())
}

fn container_larger_than_the_vm_is_refused_by_name(node: &Node) -> Result<()> {
    let pod = node.pod("plain")?;
    let image = node.base()?;
    let much = 512 * MIB;
    let vm = 256 * MIB;
    let mut by_field = sleeper("refused", &image);
    resources(&mut by_field).memory_limit_in_bytes = much;
    let mut by_file = sleeper("refused", &image);
    let file = ("memory.max".to_owned(), much.to_string());
    resources(&mut by_file).unified = [file].into();
    for (field, config) in [("memory_limit_in_bytes", by_field), ("memory.max", by_file)] {
        let created = pod.cri.create(&pod.id, &config, &pod.config);
        let message = refused(created, &[Code::InvalidArgument])?;
        let wanted = [field, &much.to_string(), &vm.to_string(), "linux.resources"];
        ensure!(
            wanted.iter().all(|word| message.contains(word)),
            "{message}"
        );
    }
    // Nothing of the refused ones is left in the way.
    let mut fits = sleeper("refused", &image);
    resources(&mut fits).memory_limit_in_bytes = vm;
    let id = pod.start(&fits).context("a limit of the VM's size")?;
    let now = pod.cri.shell(&id, "cat /sys/fs/cgroup/memory.max")?;
    ensure!(now == vm.to_string(), "{now}");
    Ok(())
}

fn vm_runs_on_the_cpus_of_its_containers(node: &Node) -> Result<()> {
    let pod = node.pod("placed")?;
    let image = node.base()?;
    runs_on(&pod.id, "0-1")?;
    let one = pod.start(&on("one", &image, "1"))?;
    runs_on(&pod.id, "1")?;
    // One that does not mind runs where the others do.
    pod.start(&sleeper("any", &image))?;
    runs_on(&pod.id, "1")?;
    let mut brief = shell("brief", &image, "exit 0");
    resources(&mut brief).cpuset_cpus = "0".to_owned();
    let brief = pod.create(&brief)?;
    runs_on(&pod.id, "0-1")?;
    // One that has exited needs no CPU.
    pod.cri.start(&brief)?;
    pod.cri.wait(&brief)?;
    runs_on(&pod.id, "1")?;
    pod.cri.stop(&one, 0)?;
    runs_on(&pod.id, "0-1")?;
    // Nor does one that never ran and is gone.
    let never = pod.create(&on("never", &image, "0"))?;
    runs_on(&pod.id, "0")?;
    pod.cri.remove(&never)?;
    runs_on(&pod.id, "0-1")?;
    Ok(())
}

fn cpus_can_be_had_and_changed_by_an_update_alone(node: &Node) -> Result<()> {
    let pod = node.pod("replaced")?;
    let image = node.base()?;
    let id = pod.start(&sleeper("placed", &image))?;
    update(pod.cri, &id, "0", "0")?;
    runs_on(&pod.id, "0")?;
    update(pod.cri, &id, "1", "")?;
    runs_on(&pod.id, "1")?;
    let mems = fs::read_to_string(format!("{}/cpuset.mems", group(&pod.id)))?;
    ensure!(mems.trim() == "0", "{mems}");
    let other = pod.create(&sleeper("other", &image))?;
    update(pod.cri, &other, "0", "")?;
    runs_on(&pod.id, "0-1")?;
    let status = pod.cri.container(&id)?.resources.unwrap_or_default();
    let linux = status.linux.unwrap_or_default();
    let reported = (linux.cpuset_cpus.as_str(), linux.cpuset_mems.as_str());
    ensure!(reported == ("1", "0"), "{reported:?}");
    // The guest has CPUs of its own, and all of them.
    let seen = pod
        .cri
        .shell(&id, "cat /sys/fs/cgroup/cpuset.cpus.effective")?;
    ensure!(seen == "0", "{seen}");
    Ok(())
}

fn cpus_that_cannot_be_had_are_refused_by_name(node: &Node) -> Result<()> {
    let pod = node.pod("misplaced")?;
    let image = node.base()?;
    let id = pod.start(&on("placed", &image, "1"))?;
    let answers = [
        ("cpuset_cpus", "8000", update(pod.cri, &id, "8000", "")),
        ("cpuset_cpus", "1-", update(pod.cri, &id, "1-", "")),
        ("cpuset_mems", "63", update(pod.cri, &id, "0", "63")),
    ];
    for (field, number, answer) in answers {
        let message = refused(answer, &[Code::InvalidArgument])?;
        ensure!(
            message.contains(field) && message.contains(number),
            "{message}"
        );
        runs_on(&pod.id, "1")?;
    }
    let config = on("refused", &image, "8000");
    let created = pod.cri.create(&pod.id, &config, &pod.config);
    let message = refused(created, &[Code::InvalidArgument])?;
    ensure!(message.contains("cpuset_cpus"), "{message}");
    runs_on(&pod.id, "1")?;
    let status = pod.cri.container(&id)?.resources.unwrap_or_default();
    ensure!(
        status.linux.unwrap_or_default().cpuset_cpus == "1",
        "changed"
    );
    let mut config = node.pod_config("pinned")?;
    pod_resources(&mut config).cpuset_cpus = "1".to_owned();
    let message = refused(pod.cri.run_pod(&config), &[Code::InvalidArgument])?;
    ensure!(message.contains("linux.resources.cpuset_cpus"), "{message}");
    Ok(())
}

fn cpus_outlive_the_server(node: &Node) -> Result<()> {
    let server = node.plan("restarted").start()?;
    let image = node.image_on(&server.cri, bulkhead_tests::node::BASE)?;
    let config = node.pod_config("restarted")?;
    let (pod, one) = {
        let pod = Pod::run(&server.cri, config)?;
        let one = pod.start(&on("one", &image, "1"))?;
        pod.start(&on("nought", &image, "0"))?;
        (pod.id.clone(), one)
    };
    runs_on(&pod, "0-1")?;
    // As by SIGKILL.
    drop(server);
    runs_on(&pod, "0-1")?;
    let server = node.plan("restarted").start()?;
    server.cri.stop(&one, 0)?;
    runs_on(&pod, "0")?;
    server.stop()
}
