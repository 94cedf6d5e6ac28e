//! Pods through the CRI: life, lists, what they are made with.

use anyhow::{Context, Result, ensure};
use bulkhead_cri_api::v1::*;
use bulkhead_tests::cri::{labels, refused};
use bulkhead_tests::request::{self, Pod, pod_security, shell, sleeper};
use bulkhead_tests::{Node, suite};
use tonic::Code;

suite! {
    version_answers_as_clients_expect,
    status_reports_runtime_and_network_ready,
    runtime_config_names_the_cgroup_driver,
    pod_runs_stops_and_is_removed,
    stop_and_remove_may_be_repeated,
    unknown_pod_may_be_stopped_and_removed,
    removing_a_running_pod_removes_its_containers,
    stopping_a_pod_ends_its_containers,
    pods_are_filtered_by_id_state_and_labels,
    name_in_use_is_refused,
    unknown_handler_is_refused,
    unknown_pod_is_not_found,
    pod_without_metadata_is_refused,
    hostname_is_the_pods,
    dns_configuration_reaches_containers,
    sysctls_apply_to_the_pod,
    unknown_sysctl_is_refused_by_name,
    containers_share_the_pods_network_and_ipc,
    pid_namespace_is_the_containers_own,
    pid_namespace_is_shared_when_asked_for,
    host_namespaces_are_refused_by_name,
    verbose_answers_are_json,
    calls_that_are_not_there_answer_unimplemented,
}

fn version_answers_as_clients_expect(node: &Node) -> Result<()> {
    let version = node.cri()?.version(VersionRequest::default())?;
    ensure!(version.version == "0.1.0", "{version:?}");
    ensure!(version.runtime_api_version == "v1", "{version:?}");
    ensure!(!version.runtime_name.is_empty(), "{version:?}");
    // The kubelet reads it as a semantic version: digits before the first two dots.
    let numbers = version
        .runtime_version
        .trim_start_matches('v')
        .splitn(3, '.');
    let digits = |part: &str| part.starts_with(|first: char| first.is_ascii_digit());
    ensure!(
        numbers.clone().count() == 3 && numbers.clone().all(digits),
        "{version:?}"
    );
    Ok(())
}

fn status_reports_runtime_and_network_ready(node: &Node) -> Result<()> {
    for kind in ["RuntimeReady", "NetworkReady"] {
        let condition = node.cri()?.condition(kind)?;
        ensure!(condition.status, "{condition:?}");
    }
    Ok(())
}

fn runtime_config_names_the_cgroup_driver(node: &Node) -> Result<()> {
    let reply = node.cri()?.runtime_config(RuntimeConfigRequest {})?;
    let linux = reply.linux.context("no Linux part")?;
    ensure!(linux.cgroup_driver() == CgroupDriver::Cgroupfs, "{linux:?}");
    Ok(())
}

fn pod_runs_stops_and_is_removed(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let mut config = node.pod_config("life")?;
    config.labels = labels(&[("app", "web"), ("empty", "")]);
    config.annotations = labels(&[("note", "spaces and \"quotes\" ü")]);
    let pod = Pod::run(cri, config.clone())?;

    let status = cri.pod(&pod.id)?;
    ensure!(status.id == pod.id, "{status:?}");
    ensure!(
        status.state() == PodSandboxState::SandboxReady,
        "{status:?}"
    );
    ensure!(status.metadata == config.metadata, "{status:?}");
    ensure!(status.labels == config.labels, "{status:?}");
    ensure!(status.annotations == config.annotations, "{status:?}");
    // Seconds would pass an "is it set" and be read as 1970 by every client.
    ensure!(status.created_at > 1_000_000_000_000_000_000, "{status:?}");
    cri.pod_ip(&pod.id)?;

    cri.stop_pod(&pod.id)?;
    let status = cri.pod(&pod.id)?;
    ensure!(
        status.state() == PodSandboxState::SandboxNotready,
        "{status:?}"
    );
    ensure!(status.labels == config.labels, "{status:?}");

    cri.remove_pod(&pod.id)?;
    refused(cri.pod(&pod.id), &[Code::NotFound])?;
    let left = cri.pod_ids(PodSandboxFilter::default())?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

fn stop_and_remove_may_be_repeated(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("again")?;
    for _ in 0..2 {
        cri.stop_pod(&pod.id)?;
    }
    for _ in 0..2 {
        cri.remove_pod(&pod.id)?;
    }
    Ok(())
}

fn unknown_pod_may_be_stopped_and_removed(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("gone")?;
    cri.remove_pod(&pod.id)?;
    for id in [&*pod.id, "0123456789abcdef"] {
        cri.stop_pod(id)?;
        cri.remove_pod(id)?;
    }
    Ok(())
}

fn removing_a_running_pod_removes_its_containers(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("running")?;
    let container = pod.start(&sleeper("sleeper", &node.base()?))?;
    cri.remove_pod(&pod.id)?;
    refused(cri.pod(&pod.id), &[Code::NotFound])?;
    refused(cri.container(&container), &[Code::NotFound])?;
    Ok(())
}

fn stopping_a_pod_ends_its_containers(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("stopped")?;
    let image = node.base()?;
    let container = pod.start(&sleeper("sleeper", &image))?;
    cri.stop_pod(&pod.id)?;
    let status = cri.container(&container)?;
    ensure!(
        status.state() == ContainerState::ContainerExited,
        "{status:?}"
    );
    ensure!(status.finished_at >= status.started_at, "{status:?}");
    // A pod that is not ready takes no more containers.
    ensure!(
        pod.create(&sleeper("late", &image)).is_err(),
        "a stopped pod took a container"
    );
    Ok(())
}

fn pods_are_filtered_by_id_state_and_labels(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let run = |name: &str, pairs: &[(&str, &str)]| -> Result<String> {
        let mut config = node.pod_config(name)?;
        config.labels = labels(pairs);
        Ok(Pod::run(cri, config)?.id)
    };
    let one = run("one", &[("app", "web"), ("tier", "front")])?;
    let two = run("two", &[("app", "web")])?;
    cri.stop_pod(&two)?;

    let state = |state: PodSandboxState| {
        Some(PodSandboxStateValue {
            state: state.into(),
        })
    };
    let expect = |filter: PodSandboxFilter, wanted: &[&String]| -> Result<()> {
        let mut found = cri.pod_ids(filter.clone())?;
        let mut wanted: Vec<_> = wanted.iter().map(|&id| id.clone()).collect();
        found.sort();
        wanted.sort();
        ensure!(
            found == wanted,
            "{filter:?} gives {found:?}, not {wanted:?}"
        );
        Ok(())
    };
    let all = PodSandboxFilter::default();
    expect(all.clone(), &[&one, &two])?;
    expect(
        PodSandboxFilter {
            id: one.clone(),
            ..all.clone()
        },
        &[&one],
    )?;
    // Ids are random: a long enough start is as good as the whole.
    let start = one.get(..12).context("a short id")?.to_owned();
    expect(
        PodSandboxFilter {
            id: start,
            ..all.clone()
        },
        &[&one],
    )?;
    expect(
        PodSandboxFilter {
            id: "none".to_owned(),
            ..all.clone()
        },
        &[],
    )?;
    let ready = state(PodSandboxState::SandboxReady);
    expect(
        PodSandboxFilter {
            state: ready,
            ..all.clone()
        },
        &[&one],
    )?;
    let web = labels(&[("app", "web")]);
    let by_web = PodSandboxFilter {
        label_selector: web.clone(),
        ..all.clone()
    };
    expect(by_web, &[&one, &two])?;
    let both = labels(&[("app", "web"), ("tier", "front")]);
    expect(
        PodSandboxFilter {
            label_selector: both,
            ..all.clone()
        },
        &[&one],
    )?;
    let other = labels(&[("app", "we")]);
    expect(
        PodSandboxFilter {
            label_selector: other,
            ..all.clone()
        },
        &[],
    )?;
    let not_ready = state(PodSandboxState::SandboxNotready);
    let combined = PodSandboxFilter {
        state: not_ready,
        label_selector: web,
        ..all
    };
    expect(combined.clone(), &[&two])?;
    expect(
        PodSandboxFilter {
            id: one,
            ..combined
        },
        &[],
    )
}

fn name_in_use_is_refused(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("name")?;
    let message = refused(cri.run_pod(&pod.config), &[Code::AlreadyExists])?;
    ensure!(message.contains("name"), "{message}");
    let mut next = pod.config.clone();
    next.metadata.get_or_insert_default().attempt = 1;
    let next = Pod::run(cri, next)?;
    ensure!(next.id != pod.id, "two pods with the id {}", pod.id);
    // Once it is gone, its name is free.
    cri.remove_pod(&pod.id)?;
    Pod::run(cri, pod.config)?;
    Ok(())
}

fn unknown_handler_is_refused(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let request = RunPodSandboxRequest {
        config: Some(node.pod_config("handler")?),
        runtime_handler: "no-such-handler".to_owned(),
    };
    let answer = cri.run_pod_sandbox(request);
    let message = refused(answer, &[Code::InvalidArgument, Code::NotFound])?;
    ensure!(message.contains("no-such-handler"), "{message}");
    Ok(())
}

fn unknown_pod_is_not_found(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    refused(cri.pod("0123456789abcdef"), &[Code::NotFound])?;
    let container = sleeper("nowhere", &node.base()?);
    let config = node.pod_config("nowhere")?;
    refused(
        cri.create("0123456789abcdef", &container, &config),
        &[Code::NotFound],
    )?;
    Ok(())
}

fn pod_without_metadata_is_refused(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let config = PodSandboxConfig::default();
    refused(cri.run_pod(&config), &[Code::InvalidArgument])?;
    let none = RunPodSandboxRequest::default();
    refused(cri.run_pod_sandbox(none), &[Code::InvalidArgument])?;
    Ok(())
}

fn hostname_is_the_pods(node: &Node) -> Result<()> {
    let mut config = node.pod_config("named")?;
    config.hostname = "web-7".to_owned();
    let pod = Pod::run(node.cri()?, config)?;
    let ended = pod.run_to_end(&shell("names", &node.base()?, "hostname; echo $HOSTNAME"))?;
    ensure!(ended.stdout() == "web-7\nweb-7\n", "{:?}", ended.stdout());
    Ok(())
}

fn dns_configuration_reaches_containers(node: &Node) -> Result<()> {
    let mut config = node.pod_config("dns")?;
    config.dns_config = Some(DnsConfig {
        servers: vec!["10.96.0.10".to_owned(), "10.96.0.11".to_owned()],
        searches: vec![
            "tests.svc.cluster.local".to_owned(),
            "cluster.local".to_owned(),
        ],
        options: vec!["ndots:5".to_owned()],
    });
    let pod = Pod::run(node.cri()?, config)?;
    let ended = pod.run_to_end(&shell("resolver", &node.base()?, "cat /etc/resolv.conf"))?;
    let file = ended.stdout();
    let has = |wanted: &str| file.lines().any(|line| line.trim() == wanted);
    ensure!(
        has("nameserver 10.96.0.10") && has("nameserver 10.96.0.11"),
        "{file}"
    );
    ensure!(
        has("search tests.svc.cluster.local cluster.local"),
        "{file}"
    );
    ensure!(has("options ndots:5"), "{file}");
    Ok(())
}

fn sysctls_apply_to_the_pod(node: &Node) -> Result<()> {
    let mut config = node.pod_config("sysctls")?;
    let linux = config.linux.get_or_insert_default();
    linux.sysctls = labels(&[
        ("net.ipv4.ip_unprivileged_port_start", "81"),
        ("kernel.shm_rmid_forced", "1"),
    ]);
    let pod = Pod::run(node.cri()?, config)?;
    let line = "cd /proc/sys; cat net/ipv4/ip_unprivileged_port_start kernel/shm_rmid_forced";
    let ended = pod.run_to_end(&shell("reader", &node.base()?, line))?;
    ensure!(ended.stdout() == "81\n1\n", "{:?}", ended.stdout());
    Ok(())
}

fn unknown_sysctl_is_refused_by_name(node: &Node) -> Result<()> {
    let mut config = node.pod_config("sysctl")?;
    config.linux.get_or_insert_default().sysctls = labels(&[("net.no_such_sysctl", "1")]);
    match node.cri()?.run_pod(&config) {
        Ok(id) => anyhow::bail!("pod {id} runs with a sysctl that does not exist"),
        Err(status) => {
            let named = ["net.no_such_sysctl", "net/no_such_sysctl"];
            let message = status.message();
            ensure!(named.iter().any(|name| message.contains(name)), "{status}");
        }
    }
    Ok(())
}

fn containers_share_the_pods_network_and_ipc(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("shared")?;
    let image = node.base()?;
    pod.start(&shell(
        "server",
        &image,
        "echo shm > /dev/shm/note; exec httpd -f -p 127.0.0.1:80 -h /www",
    ))?;
    let client = pod.start(&sleeper("client", &image))?;
    let page =
        "for try in $(seq 100); do wget -q -O - http://127.0.0.1/ && exit; sleep 0.1; done; exit 1";
    ensure!(
        cri.shell(&client, page)? == "hello from the base image",
        "the other's page"
    );
    ensure!(
        cri.shell(&client, "cat /dev/shm/note")? == "shm",
        "the other's shared memory"
    );
    // Files are each container's own.
    cri.shell(&client, "echo mine > /data/mine")?;
    let ended = pod.run_to_end(&shell("third", &image, "ls /data/mine"))?;
    ensure!(
        ended.status.exit_code != 0,
        "another container's file: {}",
        ended.stdout()
    );
    Ok(())
}

fn pid_namespace_is_the_containers_own(node: &Node) -> Result<()> {
    let pod = node.pod("pids")?;
    let image = node.base()?;
    pod.start(&sleeper("first", &image))?;
    let ended = pod.run_to_end(&shell(
        "second",
        &image,
        "echo $$; ls -d /proc/[0-9]* | wc -l",
    ))?;
    // Its shell is process 1; with it run ls and wc at most.
    let said = ended.stdout();
    let (own, count) = said.split_once('\n').context("two lines")?;
    ensure!(own == "1", "{said}");
    ensure!(count.trim().parse::<u32>()? <= 4, "{said}");
    Ok(())
}

fn pid_namespace_is_shared_when_asked_for(node: &Node) -> Result<()> {
    let mut config = node.pod_config("one-pid-namespace")?;
    let shared = |options: &mut Option<NamespaceOption>| {
        options.get_or_insert_default().pid = NamespaceMode::Pod.into();
    };
    shared(&mut pod_security(&mut config).namespace_options);
    let pod = Pod::run(node.cri()?, config)?;
    let image = node.base()?;
    let with_shared = |mut container: ContainerConfig| {
        shared(&mut request::security(&mut container).namespace_options);
        container
    };
    pod.start(&with_shared(shell("first", &image, "exec sleep 54321")))?;
    let line = "echo $$; ps -o args";
    let ended = pod.run_to_end(&with_shared(shell("second", &image, line)))?;
    let said = ended.stdout();
    ensure!(said.contains("sleep 54321"), "{said}");
    ensure!(!said.starts_with("1\n"), "{said}");
    Ok(())
}

fn host_namespaces_are_refused_by_name(node: &Node) -> Result<()> {
    type Choose = fn(&mut NamespaceOption);
    let modes: [(&str, Choose); 3] = [
        ("network", |options| {
            options.network = NamespaceMode::Node.into()
        }),
        ("pid", |options| options.pid = NamespaceMode::Node.into()),
        ("ipc", |options| options.ipc = NamespaceMode::Node.into()),
    ];
    for (name, choose) in modes {
        let mut config = node.pod_config("host")?;
        choose(
            pod_security(&mut config)
                .namespace_options
                .get_or_insert_default(),
        );
        let message = refused(node.cri()?.run_pod(&config), &[Code::InvalidArgument])?;
        ensure!(message.to_lowercase().contains(name), "{name}: {message}");
    }
    Ok(())
}

/// Clients put each value into a document of theirs as it is.
fn verbose_answers_are_json(node: &Node) -> Result<()> {
    let pod = node.pod("verbose")?;
    let id = pod.start(&sleeper("verbose", &node.base()?))?;
    let of_pod = pod.cri.pod_sandbox_status(PodSandboxStatusRequest {
        pod_sandbox_id: pod.id.clone(),
        verbose: true,
    })?;
    let of_container = pod.cri.container_status(ContainerStatusRequest {
        container_id: id,
        verbose: true,
    })?;
    let of_server = pod.cri.status(StatusRequest { verbose: true })?;
    for info in [of_pod.info, of_container.info, of_server.info] {
        ensure!(!info.is_empty(), "no details");
        for (key, value) in info {
            let read = serde_json::from_str::<serde_json::Value>(&value);
            read.with_context(|| format!("{key}: {value}"))?;
        }
    }
    Ok(())
}

fn calls_that_are_not_there_answer_unimplemented(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    macro_rules! expect_unimplemented {
        ($($call:ident,)*) => { $(
            let answer = cri.$call(Default::default());
            refused(answer, &[Code::Unimplemented]).context(stringify!($call))?;
        )* };
    }
    expect_unimplemented! {
        checkpoint_container,
    }
    Ok(())
}
