//! How a pod's limits size its VM, and where the VM runs on the host.

use anyhow::{Context, Result, ensure};
use bulkhead_cri_api::v1::*;
use bulkhead_tests::cri::refused;
use bulkhead_tests::request::{Pod, pod_resources, resources, shell, sleeper};
use bulkhead_tests::{Node, suite};
use tonic::Code;

suite! {
    containers_can_use_all_of_the_pods_memory_limit,
    vm_has_a_processor_for_each_of_the_pods_limit,
    pod_larger_than_the_machine_is_refused_by_name,
    container_larger_than_the_vm_is_refused_by_name,
}

const MIB: i64 = 1 << 20;

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
