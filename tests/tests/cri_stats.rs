//! Figures of pods and containers: exact where the guest tells them, and cheap to list.

use std::collections::{BTreeMap, BTreeSet};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_cri_api::v1::*;
use bulkhead_tests::cri::{labels, refused};
use bulkhead_tests::node::{BASE, is_reference};
use bulkhead_tests::registry::free_port;
use bulkhead_tests::request::{Pod, resources, shell, sleeper};
use bulkhead_tests::{Node, http, suite};
use tonic::Code;

suite! {
    figures_follow_what_a_container_does,
    filters_choose_containers_and_pods,
    pod_has_the_figures_of_its_network_and_containers,
    containers_that_do_not_run_have_no_figures,
    every_metric_described_is_served,
    streamed_lists_are_the_plain_ones,
    pod_whose_vm_is_stuck_is_left_out,
    metrics_of_the_server_are_served,
}

const MIB: u64 = 1 << 20;

fn stats(pod: &Pod<'_>, id: &str) -> Result<ContainerStats> {
    let request = ContainerStatsRequest {
        container_id: id.to_owned(),
    };
    let stats = pod.cri.container_stats(request)?.stats;
    stats.context("no stats")
}

fn pod_stats(pod: &Pod<'_>) -> Result<LinuxPodSandboxStats> {
    let request = PodSandboxStatsRequest {
        pod_sandbox_id: pod.id.clone(),
    };
    let stats = pod.cri.pod_sandbox_stats(request)?.stats;
    stats.and_then(|stats| stats.linux).context("no stats")
}

fn value(number: Option<UInt64Value>) -> u64 {
    number.map_or(0, |number| number.value)
}

fn figures_follow_what_a_container_does(node: &Node) -> Result<()> {
    let pod = node.pod("works")?;
    let line = "dd if=/dev/zero of=/big bs=1M count=8; mkdir /many; \
        for n in 1 2 3 4 5 6 7 8 9 10; do echo > /many/$n; done; \
        dd if=/dev/zero of=/dev/shm/held bs=1M count=20; sync; touch /done; \
        while :; do :; done";
    let mut config = shell("works", &node.base()?, line);
    resources(&mut config).memory_limit_in_bytes = 100 << 20;
    let id = pod.start(&config)?;
    pod.cri
        .shell(&id, "until [ -e /done ]; do sleep 0.1; done")?;
    let first = stats(&pod, &id)?;
    let attributes = first.attributes.clone().context("attributes")?;
    ensure!(attributes.id == id, "{attributes:?}");
    ensure!(attributes.metadata == config.metadata, "{attributes:?}");
    let memory = first.memory.context("memory")?;
    ensure!(value(memory.usage_bytes) >= 20 * MIB, "{memory:?}");
    let working_set = value(memory.working_set_bytes);
    ensure!(
        working_set >= 20 * MIB && working_set <= value(memory.usage_bytes),
        "{memory:?}"
    );
    ensure!(
        value(memory.available_bytes) == 100 * MIB - working_set,
        "{memory:?}"
    );
    ensure!(value(memory.page_faults) > 0, "{memory:?}");
    let used = |stats: &ContainerStats| {
        let cpu = stats.cpu.as_ref();
        cpu.map_or(0, |cpu| value(cpu.usage_core_nano_seconds))
    };
    ensure!(used(&first) > 0, "{first:?}");
    if !is_reference() {
        let layer = first.writable_layer.clone().context("writable layer")?;
        let (bytes, inodes) = (value(layer.used_bytes), value(layer.inodes_used));
        ensure!((8 * MIB..10 * MIB).contains(&bytes), "{layer:?}");
        // The files, their directory, and what the layer begins with.
        ensure!((13..24).contains(&inodes), "{layer:?}");
        let pressure = first.cpu.as_ref().and_then(|cpu| cpu.psi.as_ref());
        ensure!(pressure.is_some_and(|psi| psi.some.is_some()), "{first:?}");
        ensure!(first.io.is_some_and(|io| io.psi.is_some()), "{first:?}");
        let swap = first.swap.context("swap")?;
        ensure!(value(swap.swap_usage_bytes) == 0, "{swap:?}");
    }
    // The rate is known from the second look on, over at least a second.
    thread::sleep(Duration::from_millis(1100));
    let second = stats(&pod, &id)?;
    ensure!(used(&second) > used(&first), "{first:?} {second:?}");
    let rate = second.cpu.and_then(|cpu| cpu.usage_nano_cores);
    ensure!(is_reference() || value(rate) > 0, "{rate:?}");
    Ok(())
}

fn filters_choose_containers_and_pods(node: &Node) -> Result<()> {
    let image = node.base()?;
    let mut pods = Vec::new();
    let mut ids = Vec::new();
    for name in ["one", "two"] {
        let mut config = node.pod_config(name)?;
        config.labels = labels(&[("pod", name)]);
        let pod = Pod::run(node.cri()?, config)?;
        for kind in ["a", "b"] {
            let mut config = sleeper(&format!("{name}-{kind}"), &image);
            config.labels = labels(&[("kind", kind)]);
            ids.push(pod.start(&config)?);
        }
        pods.push(pod);
    }
    let list = |filter: ContainerStatsFilter| -> Result<BTreeSet<String>> {
        let request = ListContainerStatsRequest {
            filter: Some(filter),
        };
        let stats = node.cri()?.list_container_stats(request)?.stats;
        let ids = stats.into_iter().filter_map(|stats| stats.attributes);
        Ok(ids.map(|attributes| attributes.id).collect())
    };
    let set = |of: &[usize]| {
        of.iter()
            .map(|&at| ids[at].clone())
            .collect::<BTreeSet<_>>()
    };
    let all = ContainerStatsFilter::default();
    ensure!(list(all.clone())? == set(&[0, 1, 2, 3]));
    let by_id = ContainerStatsFilter {
        id: ids[2].clone(),
        ..all.clone()
    };
    ensure!(list(by_id)? == set(&[2]));
    let of_pod = ContainerStatsFilter {
        pod_sandbox_id: pods[1].id.clone(),
        ..all.clone()
    };
    ensure!(list(of_pod.clone())? == set(&[2, 3]));
    let both = ContainerStatsFilter {
        label_selector: labels(&[("kind", "b")]),
        ..of_pod
    };
    ensure!(list(both)? == set(&[3]));
    let list = |filter: PodSandboxStatsFilter| -> Result<Vec<String>> {
        let request = ListPodSandboxStatsRequest {
            filter: Some(filter),
        };
        let stats = node.cri()?.list_pod_sandbox_stats(request)?.stats;
        let ids = stats.into_iter().filter_map(|stats| stats.attributes);
        Ok(ids.map(|attributes| attributes.id).collect())
    };
    ensure!(list(PodSandboxStatsFilter::default())?.len() == 2);
    let labelled = PodSandboxStatsFilter {
        label_selector: labels(&[("pod", "two")]),
        ..PodSandboxStatsFilter::default()
    };
    ensure!(list(labelled)? == [pods[1].id.clone()]);
    let by_id = PodSandboxStatsFilter {
        id: pods[0].id.clone(),
        ..PodSandboxStatsFilter::default()
    };
    ensure!(list(by_id)? == [pods[0].id.clone()]);
    pods[0].cri.stop_pod(&pods[0].id)?;
    ensure!(list(PodSandboxStatsFilter::default())? == [pods[1].id.clone()]);
    Ok(())
}

fn pod_has_the_figures_of_its_network_and_containers(node: &Node) -> Result<()> {
    let pod = node.pod("serves")?;
    let image = node.base()?;
    let line = "head -c 3000000 /dev/zero > /tmp/page; exec httpd -f -p 80 -h /tmp";
    let id = pod.start(&shell("web", &image, line))?;
    let before = pod_stats(&pod)?;
    let address = std::net::SocketAddr::new(pod.cri.pod_ip(&pod.id)?, 80);
    let page = bulkhead_tests::http::get(address, "/page")?;
    ensure!(page.len() >= 3_000_000, "{} bytes", page.len());
    let after = pod_stats(&pod)?;
    let interface = |stats: &LinuxPodSandboxStats| {
        let network = stats.network.clone();
        network.and_then(|network| network.default_interface)
    };
    let (first, last) = (interface(&before), interface(&after));
    let (first, last) = (first.context("network")?, last.context("network")?);
    ensure!(last.name == "eth0", "{last:?}");
    // The guest sends: its figures, not those of the host's end.
    let sent = value(last.tx_bytes) - value(first.tx_bytes);
    let received = value(last.rx_bytes) - value(first.rx_bytes);
    ensure!((3_000_000..4_000_000).contains(&sent), "{first:?} {last:?}");
    ensure!((100..1_000_000).contains(&received), "{first:?} {last:?}");
    let tasks = after
        .process
        .map_or(0, |process| value(process.process_count));
    ensure!((1..20).contains(&tasks), "{tasks} tasks");
    let containers: Vec<_> = after
        .containers
        .iter()
        .filter_map(|one| one.attributes.as_ref())
        .collect();
    ensure!(
        containers.len() == 1 && containers[0].id == id,
        "{containers:?}"
    );
    // The pod's are those of its cgroup on the host, where the VM is.
    let of_pod = after.memory.map_or(0, |memory| value(memory.usage_bytes));
    let container = after.containers[0]
        .memory
        .map_or(0, |memory| value(memory.usage_bytes));
    ensure!(of_pod > container && container > 0, "{of_pod} {container}");
    ensure!(
        after
            .cpu
            .is_some_and(|cpu| value(cpu.usage_core_nano_seconds) > 0)
    );
    Ok(())
}

fn containers_that_do_not_run_have_no_figures(node: &Node) -> Result<()> {
    let pod = node.pod("idle")?;
    let image = node.base()?;
    let created = pod.create(&sleeper("created", &image))?;
    let ended = pod.run_to_end(&shell("ended", &image, "true"))?.status.id;
    for id in [created, ended] {
        let stats = stats(&pod, &id)?;
        let attributes = stats.attributes.context("attributes")?;
        ensure!(attributes.id == id, "{attributes:?}");
        ensure!(stats.cpu.is_none() && stats.memory.is_none());
    }
    let list = pod
        .cri
        .list_container_stats(ListContainerStatsRequest::default())?;
    ensure!(list.stats.is_empty(), "{list:?}");
    let unknown = ContainerStatsRequest {
        container_id: "0123".into(),
    };
    refused(pod.cri.container_stats(unknown), &[Code::NotFound])?;
    pod.cri.stop_pod(&pod.id)?;
    let stopped = PodSandboxStatsRequest {
        pod_sandbox_id: pod.id.clone(),
    };
    refused(
        pod.cri.pod_sandbox_stats(stopped),
        &[Code::FailedPrecondition],
    )?;
    Ok(())
}

fn every_metric_described_is_served(node: &Node) -> Result<()> {
    let pod = node.pod("measured")?;
    let id = pod.start(&shell(
        "writes",
        &node.base()?,
        "echo x > /x; sync; exec sleep 1000",
    ))?;
    let cri = pod.cri;
    let described = cri.list_metric_descriptors(ListMetricDescriptorsRequest {})?;
    let keys: BTreeMap<_, _> = described
        .descriptors
        .into_iter()
        .map(|one| (one.name, one.label_keys))
        .collect();
    let request = ListPodSandboxMetricsRequest {};
    let metrics = cri.list_pod_sandbox_metrics(request)?.pod_metrics;
    ensure!(
        metrics.len() == 1 && metrics[0].pod_sandbox_id == pod.id,
        "{metrics:?}"
    );
    let of_container = &metrics[0].container_metrics;
    ensure!(
        of_container.len() == 1 && of_container[0].container_id == id,
        "{of_container:?}"
    );
    let all = metrics[0].metrics.iter().chain(&of_container[0].metrics);
    let mut served = BTreeSet::new();
    for metric in all {
        let keys = keys
            .get(&metric.name)
            .with_context(|| metric.name.clone())?;
        ensure!(keys.len() == metric.label_values.len(), "{metric:?}");
        let label = |key: &str| {
            let at = keys.iter().position(|name| name == key);
            at.map_or("", |at| &metric.label_values[at])
        };
        ensure!(
            label("pod") == "measured" && !label("namespace").is_empty(),
            "{metric:?}"
        );
        served.insert(&metric.name);
    }
    let missing: Vec<_> = keys.keys().filter(|name| !served.contains(name)).collect();
    ensure!(missing.is_empty(), "{missing:?}");
    let named = of_container[0]
        .metrics
        .iter()
        .all(|metric| metric.label_values.contains(&"writes".to_owned()));
    ensure!(named, "{of_container:?}");
    Ok(())
}

fn streamed_lists_are_the_plain_ones(node: &Node) -> Result<()> {
    let pod = node.pod("streamed")?;
    let id = pod.start(&sleeper("sleeps", &node.base()?))?;
    let cri = pod.cri;
    let pods = cri.all(cri.stream_pod_sandboxes(StreamPodSandboxesRequest::default())?)?;
    let pods: Vec<_> = pods
        .into_iter()
        .flat_map(|part| part.pod_sandboxes)
        .collect();
    ensure!(
        pods == cri
            .list_pod_sandbox(ListPodSandboxRequest::default())?
            .items
    );
    let containers = cri.all(cri.stream_containers(StreamContainersRequest::default())?)?;
    let containers: Vec<_> = containers
        .into_iter()
        .flat_map(|part| part.containers)
        .collect();
    ensure!(
        containers.len() == 1 && containers[0].id == id,
        "{containers:?}"
    );
    ensure!(
        containers
            == cri
                .list_containers(ListContainersRequest::default())?
                .containers
    );
    let stats = cri.stream_container_stats(StreamContainerStatsRequest::default())?;
    let stats: Vec<_> = cri
        .all(stats)?
        .into_iter()
        .flat_map(|part| part.container_stats)
        .collect();
    ensure!(stats.len() == 1 && stats[0].memory.is_some(), "{stats:?}");
    let stats = cri.stream_pod_sandbox_stats(StreamPodSandboxStatsRequest::default())?;
    let stats: Vec<_> = cri
        .all(stats)?
        .into_iter()
        .flat_map(|part| part.pod_sandbox_stats)
        .collect();
    ensure!(stats.len() == 1 && stats[0].linux.is_some(), "{stats:?}");
    let metrics = cri.stream_pod_sandbox_metrics(StreamPodSandboxMetricsRequest {})?;
    let metrics: Vec<_> = cri
        .all(metrics)?
        .into_iter()
        .flat_map(|part| part.pod_sandbox_metrics)
        .collect();
    ensure!(
        metrics.len() == 1 && !metrics[0].metrics.is_empty(),
        "{metrics:?}"
    );
    Ok(())
}

fn pod_whose_vm_is_stuck_is_left_out(node: &Node) -> Result<()> {
    let image = node.base()?;
    let (stuck, fine) = (node.pod("stuck")?, node.pod("fine")?);
    stuck.start(&sleeper("stuck", &image))?;
    let id = fine.start(&sleeper("fine", &image))?;
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: stuck.id.clone(),
        verbose: true,
    };
    let info = stuck.cri.pod_sandbox_status(request)?.info;
    let info: serde_json::Value = serde_json::from_str(info.get("info").context("info")?)?;
    let pid = info["state"]["vmm"]["pid"]
        .as_i64()
        .context("the VMM's pid")?;
    let signal = |name: &str| -> Result<()> {
        let done = std::process::Command::new("kill")
            .args([name, &pid.to_string()])
            .status()?;
        ensure!(done.success(), "kill {name} {pid}");
        Ok(())
    };
    signal("-STOP")?;
    let listed = fine
        .cri
        .list_container_stats(ListContainerStatsRequest::default());
    signal("-CONT")?;
    let ids: Vec<_> = listed?
        .stats
        .into_iter()
        .filter_map(|stats| stats.attributes)
        .collect();
    ensure!(ids.len() == 1 && ids[0].id == id, "{ids:?}");
    Ok(())
}

fn metrics_of_the_server_are_served(node: &Node) -> Result<()> {
    let address = free_port()?;
    let mut plan = node.plan("metrics");
    plan.settings = format!("metrics.address = \"{address}\"");
    let server = plan.start()?;
    let image = node.image_on(&server.cri, BASE)?;
    let pod = Pod::run(&server.cri, node.pod_config("metrics")?)?;
    pod.start(&sleeper("runs", &image))?;
    let unknown = CheckpointContainerRequest::default();
    refused(
        server.cri.checkpoint_container(unknown),
        &[Code::Unimplemented],
    )?;
    let text = http::get(address, "/metrics")?;
    let value = |name: &str| -> Result<f64> {
        let mut lines = text.lines();
        let line = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(line
            .with_context(|| format!("no {name} in\n{text}"))?
            .parse()?)
    };
    for (name, wanted) in [
        ("bulkhead_pods{state=\"ready\"}", 1.0),
        ("bulkhead_containers{state=\"running\"}", 1.0),
        (
            "bulkhead_call_seconds_count{method=\"RunPodSandbox\",code=\"0\"}",
            1.0,
        ),
        (
            "bulkhead_call_seconds_count{method=\"unimplemented\",code=\"12\"}",
            1.0,
        ),
        ("bulkhead_pod_start_seconds_count{phase=\"guest\"}", 1.0),
        ("bulkhead_pod_start_seconds_count{phase=\"network\"}", 1.0),
    ] {
        ensure!(value(name)? == wanted, "{name} is {}", value(name)?);
    }
    ensure!(value("bulkhead_pods_memory_bytes")? > MIB as f64, "{text}");
    ensure!(value("bulkhead_images_bytes")? > MIB as f64, "{text}");
    let log = server.log_tail();
    let ready = log.lines().find(|line| line.contains("the guest is ready"));
    let ready = ready.with_context(|| format!("no such line in\n{log}"))?;
    let places = [
        "call{method=\"RunPodSandbox\"}",
        &format!("boot{{sandbox={}}}", pod.id),
        "guest_us=",
    ];
    ensure!(places.iter().all(|place| ready.contains(place)), "{ready}");
    server.stop()
}
