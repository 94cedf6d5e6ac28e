//! What is wrong with a request is told by the code and by its name, and is not left half done.

use anyhow::{Result, ensure};
use bulkhead_cri_api::v1::*;
use bulkhead_tests::cri::refused;
use bulkhead_tests::request::{
    Pod, container, number, pod_security, resources, security, shell, sleeper,
};
use bulkhead_tests::{Node, suite};
use tonic::Code;

suite! {
    pods_values_without_sense_are_refused_by_name,
    names_cannot_add_lines_to_the_pods_files,
    root_itself_cannot_be_masked,
    full_cgroup_is_named,
    container_whose_target_has_ended_is_not_started,
}

fn sysctl(config: &mut PodSandboxConfig, name: &str, value: &str) {
    let linux = config.linux.get_or_insert_default();
    linux.sysctls.insert(name.to_owned(), value.to_owned());
}

fn pods_values_without_sense_are_refused_by_name(node: &Node) -> Result<()> {
    type Set = fn(&mut PodSandboxConfig);
    let cases: [(&str, Set); 9] = [
        ("hostname", |pod| pod.hostname = "h".repeat(65)),
        ("run_as_user", |pod| {
            pod_security(pod).run_as_user = number(-1);
        }),
        ("supplemental_groups", |pod| {
            pod_security(pod).supplemental_groups = vec![-5];
        }),
        ("kernel.msgmax", |pod| sysctl(pod, "kernel.msgmax", "")),
        ("kernel.msgmax", |pod| sysctl(pod, "kernel.msgmax", "1\n2")),
        ("kernel.msgmax", |pod| sysctl(pod, "kernel.msgmax", "many")),
        ("net.core", |pod| sysctl(pod, "net.core", "1")),
        ("net.core.somaxconn.x", |pod| {
            sysctl(pod, "net.core.somaxconn.x", "1");
        }),
        ("kernel.ostype", |pod| sysctl(pod, "kernel.ostype", "Other")),
    ];
    for (field, set) in cases {
        let mut config = node.pod_config("senseless")?;
        set(&mut config);
        let answer = node.cri()?.run_pod(&config);
        let message = refused(answer, &[Code::InvalidArgument])?;
        ensure!(message.contains(field), "{field}: {message}");
    }
    // What is the longest and has a tab is no fault.
    let mut config = node.pod_config("sense")?;
    config.hostname = "h".repeat(64);
    sysctl(&mut config, "net.ipv4.ip_local_port_range", "1024\t65000");
    let pod = Pod::run(node.cri()?, config)?;
    let line = "hostname; cat /proc/sys/net/ipv4/ip_local_port_range";
    let seen = pod
        .run_to_end(&shell("seen", &node.base()?, line))?
        .stdout();
    ensure!(
        seen == format!("{}\n1024\t65000\n", "h".repeat(64)),
        "{seen}"
    );
    Ok(())
}

fn names_cannot_add_lines_to_the_pods_files(node: &Node) -> Result<()> {
    let dns = |servers: &str, searches: &str, options: &str| DnsConfig {
        servers: vec![servers.to_owned()],
        searches: vec![searches.to_owned()],
        options: vec![options.to_owned()],
    };
    let cases = [
        ("dns_config.servers", dns("1.1.1.1\nsearch evil", "a", "b")),
        ("dns_config.searches", dns("1.1.1.1", "a\0", "b")),
        ("dns_config.options", dns("1.1.1.1", "a", "b\nnameserver x")),
    ];
    for (field, dns) in cases {
        let mut config = node.pod_config("lines")?;
        config.dns_config = Some(dns);
        let answer = node.cri()?.run_pod(&config);
        let message = refused(answer, &[Code::InvalidArgument])?;
        ensure!(message.contains(field), "{message}");
    }
    for hostname in ["web\n6.6.6.6 bank", "web bank", "web\0"] {
        let mut config = node.pod_config("lines")?;
        config.hostname = hostname.to_owned();
        let answer = node.cri()?.run_pod(&config);
        let message = refused(answer, &[Code::InvalidArgument])?;
        ensure!(message.contains("hostname"), "{message}");
    }
    Ok(())
}

fn root_itself_cannot_be_masked(node: &Node) -> Result<()> {
    let pod = node.pod("root-masks")?;
    let image = node.base()?;
    type Set = fn(&mut LinuxContainerSecurityContext, &str);
    let fields: [(&str, Set); 2] = [
        ("masked_paths", |asked, path| {
            asked.masked_paths = vec!["/proc/kcore".to_owned(), path.to_owned()];
        }),
        ("readonly_paths", |asked, path| {
            asked.readonly_paths = vec![path.to_owned()];
        }),
    ];
    for (field, set) in fields {
        for path in ["/", "//.", "/proc/.."] {
            let mut config = sleeper("masked", &image);
            set(security(&mut config), path);
            let answer = pod.cri.create(&pod.id, &config, &pod.config);
            let message = refused(answer, &[Code::InvalidArgument])?;
            ensure!(
                message.contains(field) && message.contains(path),
                "{message}"
            );
        }
        // A link of the kernel's that leads there.
        let mut config = sleeper("linked", &image);
        set(security(&mut config), "/proc/self/cwd/..");
        let answer = pod.cri.create(&pod.id, &config, &pod.config);
        ensure!(answer.is_err(), "{field}: {answer:?}");
    }
    Ok(())
}

fn full_cgroup_is_named(node: &Node) -> Result<()> {
    let pod = node.pod("full")?;
    let image = node.base()?;
    let few = |name: &str, most: &str| {
        let mut config = container(name, &image, &["/bin/sleep", "1000000"]);
        let files = &mut resources(&mut config).unified;
        files.insert("pids.max".to_owned(), most.to_owned());
        config
    };
    // One is there, and the process that becomes the command comes in by two.
    let id = pod.start(&few("few", "2"))?;
    let answer = pod.cri.exec_for(&id, &["true"], 0);
    let message = refused(answer, &[Code::ResourceExhausted])?;
    ensure!(message.contains("pids.max"), "{message}");
    let answer = pod.cri.create(&pod.id, &few("none", "1"), &pod.config);
    let message = refused(answer, &[Code::ResourceExhausted])?;
    ensure!(message.contains("pids.max"), "{message}");
    let ended = pod.run_to_end(&shell("next", &image, "echo fine"))?;
    ensure!(ended.stdout() == "fine\n", "{}", ended.stderr());
    Ok(())
}

fn container_whose_target_has_ended_is_not_started(node: &Node) -> Result<()> {
    let pod = node.pod("target-ended")?;
    let image = node.base()?;
    let target = pod.start(&sleeper("target", &image))?;
    let mut config = sleeper("debugger", &image);
    let options = &mut security(&mut config).namespace_options;
    let options = options.get_or_insert_default();
    options.set_pid(NamespaceMode::Target);
    options.target_id = target.clone();
    let id = pod.create(&config)?;
    pod.cri.stop(&target, 0)?;
    let message = refused(pod.cri.start(&id), &[Code::FailedPrecondition])?;
    ensure!(message.contains("PID namespace"), "{message}");
    let status = pod.cri.container(&id)?;
    ensure!(
        status.state() == ContainerState::ContainerExited,
        "{status:?}"
    );
    pod.cri.remove(&id)?;
    Ok(())
}
