//! What the containers of a pod share and what stays each one's own: mounts, message queues,
//! processes, security.

use std::fs;

use anyhow::{Result, ensure};
use bulkhead_cri_api::v1::*;
use bulkhead_tests::cri::refused;
use bulkhead_tests::node::WEB;
use bulkhead_tests::request::{Pod, container, number, pod_security, security, shell, sleeper};
use bulkhead_tests::{Node, suite};
use tonic::Code;

suite! {
    mounts_of_a_container_stay_its_own,
    host_files_are_copied_with_their_modes,
    mounts_do_not_cross_to_the_host,
    queues_are_the_pods,
    namespaces_that_are_no_pods_are_refused_by_name,
    security_of_a_pod_is_not_its_containers,
}

/// A file of the host that a case may mount.
fn host_file(node: &Node, name: &str, text: &str) -> Result<String> {
    let path = node.scratch().join(name);
    fs::write(&path, text)?;
    Ok(path.display().to_string())
}

fn mount(host: &str, inside: &str, propagation: MountPropagation) -> Mount {
    Mount {
        host_path: host.to_owned(),
        container_path: inside.to_owned(),
        propagation: propagation.into(),
        ..Mount::default()
    }
}

fn mounts_of_a_container_stay_its_own(node: &Node) -> Result<()> {
    let mut config = node.pod_config("mounts")?;
    pod_security(&mut config).privileged = true;
    let pod = Pod::run(node.cri()?, config)?;
    let image = node.base()?;
    // Of one image, whose directories are the same.
    let other = pod.start(&sleeper("other", &image))?;
    let mut config = sleeper("mounting", &image);
    security(&mut config).privileged = true;
    let mounting = pod.start(&config)?;
    let line = "mount -t tmpfs none /www && mount --make-rshared / && echo mine > /www/note && \
                mkdir /www/sub && mount -t tmpfs none /www/sub && mount --bind /www /data && \
                cat /data/note";
    ensure!(pod.cri.shell(&mounting, line)? == "mine", "no mount");
    let seen = pod.cri.shell(
        &other,
        "ls /www /data; grep -c ' /www' /proc/self/mountinfo || true",
    )?;
    ensure!(seen.ends_with("\n0"), "{seen}");
    ensure!(
        seen.contains("index.html") && !seen.contains("note"),
        "{seen}"
    );
    let later = pod.run_to_end(&shell("later", &image, "ls /www"))?;
    ensure!(later.stdout() == "index.html\n", "{}", later.stdout());
    Ok(())
}

fn host_files_are_copied_with_their_modes(node: &Node) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let pod = node.pod("copies")?;
    let text = "of the host\n";
    let (plain, frozen) = (
        host_file(node, "plain", text)?,
        host_file(node, "frozen", text)?,
    );
    fs::set_permissions(&plain, fs::Permissions::from_mode(0o640))?;
    std::os::unix::fs::chown(&plain, Some(1234), Some(2000))?;
    let line = "cat /etc/plain /made/deep/frozen; stat -c '%a %u:%g' /etc/plain; \
                echo x >> /etc/plain && echo written; \
                echo x >> /made/deep/frozen || echo refused";
    let mut config = shell("copies", &node.base()?, line);
    let private = MountPropagation::PropagationPrivate;
    config.mounts = vec![
        mount(&plain, "/etc/plain", private),
        Mount {
            readonly: true,
            recursive_read_only: true,
            selinux_relabel: true,
            ..mount(&frozen, "/made/deep/frozen", private)
        },
    ];
    let ended = pod.run_to_end(&config)?;
    let wanted = "of the host\nof the host\n640 1234:2000\nwritten\nrefused\n";
    ensure!(
        ended.stdout() == wanted,
        "{} {}",
        ended.stdout(),
        ended.stderr()
    );
    ensure!(fs::read_to_string(&frozen)? == text, "the read-only file");
    Ok(())
}

fn mounts_do_not_cross_to_the_host(node: &Node) -> Result<()> {
    let pod = node.pod("propagation")?;
    let image = node.base()?;
    let file = host_file(node, "note", "first\n")?;
    for propagation in [
        MountPropagation::PropagationPrivate,
        MountPropagation::PropagationHostToContainer,
    ] {
        let mut config = sleeper(propagation.as_str_name(), &image);
        config.mounts = vec![mount(&file, "/etc/note", propagation)];
        let id = pod.start(&config)?;
        let seen = pod.cri.shell(&id, "cat /etc/note")?;
        ensure!(seen == "first", "{propagation:?}: {seen}");
    }
    let mut config = sleeper("both-ways", &image);
    let both = MountPropagation::PropagationBidirectional;
    config.mounts = vec![mount(&file, "/etc/note", both)];
    let answer = pod.cri.create(&pod.id, &config, &pod.config);
    let message = refused(answer, &[Code::InvalidArgument])?;
    ensure!(
        message.contains("Bidirectional") && message.contains("/etc/note"),
        "{message}"
    );
    Ok(())
}

fn queues_are_the_pods(node: &Node) -> Result<()> {
    let (pod, other) = (node.pod("queues")?, node.pod("queues-2")?);
    let image = node.image(WEB)?;
    // mq_open(O_CREAT | O_RDWR) and mq_timedsend of x86-64.
    let perl = "my ($name, $text) = (\"jobs\", \"hello\"); \
                my $q = syscall(240, $name, 0102, 0600, 0); die \"open: $!\" if $q < 0; \
                die \"send: $!\" if syscall(242, $q, $text, 5, 0, 0); print \"sent\\n\"";
    let sent = pod.run_to_end(&container("sender", &image, &["perl", "-e", perl]))?;
    ensure!(sent.stdout() == "sent\n", "{}", sent.stderr());
    let line = "grep -c ' /dev/mqueue .* - mqueue ' /proc/self/mountinfo; cat /dev/mqueue/jobs";
    let look = |pod: &Pod<'_>| pod.run_to_end(&shell("looking", &image, line));
    let seen = look(&pod)?.stdout();
    ensure!(seen.starts_with("1\nQSIZE:5 "), "{seen}");
    let seen = look(&other)?;
    ensure!(
        seen.stdout() == "1\n" && seen.status.exit_code != 0,
        "another pod's: {}",
        seen.stdout()
    );
    Ok(())
}

fn namespaces_that_are_no_pods_are_refused_by_name(node: &Node) -> Result<()> {
    let pod = node.pod("odd-namespaces")?;
    let image = node.base()?;
    type Set = fn(&mut NamespaceOption, NamespaceMode);
    let kinds: [(&str, Set); 2] = [
        ("namespace_options.network", NamespaceOption::set_network),
        ("namespace_options.ipc", NamespaceOption::set_ipc),
    ];
    for (field, set) in kinds {
        for mode in [NamespaceMode::Container, NamespaceMode::Target] {
            let mut config = sleeper("refused", &image);
            let options = &mut security(&mut config).namespace_options;
            set(options.get_or_insert_default(), mode);
            let answer = pod.cri.create(&pod.id, &config, &pod.config);
            let message = refused(answer, &[Code::InvalidArgument])?;
            ensure!(
                message.contains(field) && message.contains(mode.as_str_name()),
                "{message}"
            );
            let mut config = node.pod_config("odd-pod")?;
            let options = &mut pod_security(&mut config).namespace_options;
            set(options.get_or_insert_default(), mode);
            let message = refused(pod.cri.run_pod(&config), &[Code::InvalidArgument])?;
            ensure!(message.contains(field), "{message}");
        }
    }
    Ok(())
}

#[allow(deprecated)]
fn security_of_a_pod_is_not_its_containers(node: &Node) -> Result<()> {
    let profile = host_file(
        node,
        "no-chmod.json",
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["chmod", "fchmod", "fchmodat"], "action": "SCMP_ACT_ERRNO"}]}"#,
    )?;
    let localhost = SecurityProfile {
        profile_type: security_profile::ProfileType::Localhost.into(),
        localhost_ref: profile.clone(),
    };
    let mut config = node.pod_config("pods-own")?;
    let asked = pod_security(&mut config);
    asked.run_as_user = number(1000);
    asked.run_as_group = number(50);
    asked.supplemental_groups = vec![9];
    asked.readonly_rootfs = true;
    asked.supplemental_groups_policy = SupplementalGroupsPolicy::Strict.into();
    asked.seccomp = Some(localhost.clone());
    asked.seccomp_profile_path = format!("localhost/{profile}");
    asked.apparmor = Some(SecurityProfile::default());
    let pod = Pod::run(node.cri()?, config)?;
    let image = node.base()?;
    let line = "echo $(id -u) $(id -g) $(id -G); echo x > /made && chmod 600 /made && echo done";
    let plain = pod.run_to_end(&shell("plain", &image, line))?;
    ensure!(
        plain.stdout() == "0 0 0\ndone\n",
        "{} {}",
        plain.stdout(),
        plain.stderr()
    );
    let mut config = shell("own", &image, line);
    security(&mut config).seccomp = Some(localhost);
    let own = pod.run_to_end(&config)?;
    ensure!(
        own.stdout() == "0 0 0\n" && own.stderr().contains("not permitted"),
        "{} {}",
        own.stdout(),
        own.stderr()
    );
    Ok(())
}
