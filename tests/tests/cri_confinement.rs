//! What confines a container: identity, namespaces, devices, and images that try to get around it.

use anyhow::{Context, Result, ensure};
use bulkhead_cri_api::v1::*;
use bulkhead_tests::cri::refused;
use bulkhead_tests::request::{
    Pod, container, number, pod_security, resources, security, shell, sleeper,
};
use bulkhead_tests::{Node, suite};
use tonic::Code;

suite! {
    kernel_starts_no_program_for_a_container,
    user_that_means_no_change_is_refused,
    supplemental_groups_are_merged_or_strict,
    status_shows_the_groups_in_effect,
    ambient_capabilities_reach_a_user,
    a_container_has_its_limits_umask_and_oom_score,
    hosts_file_and_hostname_file_name_the_pod,
    pid_namespace_of_a_target_is_joined,
    pid_target_that_does_not_run_in_the_pod_is_refused,
    pid_namespace_may_be_the_pods_for_some_containers_only,
    unknown_policy_is_refused_by_name,
    devices_of_every_kernel_are_given,
    devices_of_the_host_are_refused_by_name,
    device_nodes_are_the_containers_own,
    privileged_container_opens_every_device_but_the_pods_disks,
    privileged_container_needs_a_privileged_pod,
    files_given_to_a_container_are_no_way_to_its_neighbours,
    descriptors_of_the_runtime_do_not_leak,
    program_of_the_runtime_cannot_be_written,
    working_directory_stays_in_the_root,
    exec_in_a_directory_that_was_exchanged_stays_in_the_root,
    directory_as_program_is_refused_by_name,
    links_of_an_image_stay_in_its_root,
    devices_of_an_image_cannot_be_opened,
    null_of_an_image_does_not_unmask,
    linked_kernel_directories_are_refused_by_name,
    passwd_that_is_no_file_is_refused_by_name,
}

fn supplemental_groups_are_merged_or_strict(node: &Node) -> Result<()> {
    let pod = node.pod("groups")?;
    let image = node.base()?;
    let with_user = node.image("test/config:1")?;
    let line = "echo $(id -u) $(id -g) $(id -G | tr ' ' '\\n' | sort -n -u)";
    let (merge, strict) = (
        SupplementalGroupsPolicy::Merge,
        SupplementalGroupsPolicy::Strict,
    );
    // The image's user is app:staff, and video lists app.
    let cases = [
        ("merge", &image, Some(1000), merge, "1000 1000 9 44 50 1000"),
        ("strict", &image, Some(1000), strict, "1000 1000 9 1000"),
        ("image", &with_user, None, merge, "1000 50 9 44 50"),
        ("image-strict", &with_user, None, strict, "1000 50 9 50"),
    ];
    for (name, image, user, policy, wanted) in cases {
        let mut config = shell(name, image, line);
        let asked = security(&mut config);
        asked.run_as_user = user.and_then(number);
        asked.supplemental_groups = vec![9];
        asked.set_supplemental_groups_policy(policy);
        let said = pod.run_to_end(&config)?.stdout();
        ensure!(said.trim() == wanted, "{name}: {said:?}, not {wanted:?}");
    }
    Ok(())
}

fn status_shows_the_groups_in_effect(node: &Node) -> Result<()> {
    let pod = node.pod("user-status")?;
    let mut config = sleeper("sleeper", &node.base()?);
    security(&mut config).run_as_user = number(1000);
    security(&mut config).supplemental_groups = vec![9];
    let id = pod.start(&config)?;
    let user = node.cri()?.container(&id)?.user.and_then(|user| user.linux);
    let mut user = user.context("no user")?;
    user.supplemental_groups.sort_unstable();
    ensure!(user.supplemental_groups == [9, 44, 50, 1000], "{user:?}");
    // A further process is no different.
    let line = "id -G | tr ' ' '\\n' | sort -n -u | tr '\\n' ' '";
    let said = node.cri()?.shell(&id, line)?;
    ensure!(said.trim() == "9 44 50 1000", "{said:?}");
    Ok(())
}

fn ambient_capabilities_reach_a_user(node: &Node) -> Result<()> {
    let pod = node.pod("ambient")?;
    let line = "grep -E 'Cap(Eff|Amb)' /proc/self/status";
    let mut config = shell("ambient", &node.base()?, line);
    let asked = security(&mut config);
    asked.run_as_user = number(1000);
    asked.capabilities = Some(Capability {
        drop_capabilities: vec!["ALL".to_owned()],
        add_ambient_capabilities: vec!["NET_BIND_SERVICE".to_owned()],
        ..Capability::default()
    });
    let said = pod.run_to_end(&config)?.stdout();
    let wanted = "CapEff:\t0000000000000400\nCapAmb:\t0000000000000400\n";
    ensure!(said == wanted, "{said:?}");
    Ok(())
}

fn a_container_has_its_limits_umask_and_oom_score(node: &Node) -> Result<()> {
    let pod = node.pod("attributes")?;
    let line = "umask; ulimit -n; cat /proc/self/oom_score_adj; echo $PPID";
    let mut config = shell("attributes", &node.base()?, line);
    resources(&mut config).oom_score_adj = 500;
    let said = pod.run_to_end(&config)?.stdout();
    ensure!(said == "0022\n1048576\n500\n0\n", "{said:?}");
    Ok(())
}

fn hosts_file_and_hostname_file_name_the_pod(node: &Node) -> Result<()> {
    let mut config = node.pod_config("called")?;
    config.hostname = "web-8".to_owned();
    let pod = Pod::run(node.cri()?, config)?;
    let address = node.cri()?.pod_ip(&pod.id)?.to_string();
    let ended = pod.run_to_end(&shell(
        "files",
        &node.base()?,
        "cat /etc/hostname /etc/hosts",
    ))?;
    let said = ended.stdout();
    ensure!(said.starts_with("web-8\n"), "{said}");
    let line = said.lines().find(|line| line.starts_with(&address));
    let line = line.with_context(|| format!("no {address} in {said}"))?;
    ensure!(
        line.split_whitespace().any(|word| word == "web-8"),
        "{said}"
    );
    ensure!(said.contains("localhost"), "{said}");
    Ok(())
}

fn in_namespace(config: &mut ContainerConfig, mode: NamespaceMode, target: &str) {
    let options = &mut security(config).namespace_options;
    let options = options.get_or_insert_default();
    options.set_pid(mode);
    options.target_id = target.to_owned();
}

fn pid_namespace_of_a_target_is_joined(node: &Node) -> Result<()> {
    let pod = node.pod("target")?;
    let image = node.base()?;
    let target = pod.start(&shell("target", &image, "exec sleep 54321"))?;
    pod.start(&shell("other", &image, "exec sleep 12345"))?;
    let mut config = shell("debugger", &image, "ps -o pid,args");
    in_namespace(&mut config, NamespaceMode::Target, &target);
    let said = pod.run_to_end(&config)?.stdout();
    let first = said.lines().find(|line| line.trim().starts_with("1 "));
    ensure!(
        first.is_some_and(|line| line.contains("sleep 54321")),
        "{said}"
    );
    ensure!(!said.contains("sleep 12345"), "{said}");
    Ok(())
}

fn pid_target_that_does_not_run_in_the_pod_is_refused(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let (pod, other) = (node.pod("target")?, node.pod("other")?);
    let image = node.base()?;
    let elsewhere = other.start(&sleeper("sleeper", &image))?;
    let created = pod.create(&sleeper("created", &image))?;
    let ended = pod.start(&shell("ended", &image, "exit 0"))?;
    cri.wait(&ended)?;
    for target in [&elsewhere, &created, &ended, "", "0123456789abcdef"] {
        let mut config = sleeper("debugger", &image);
        in_namespace(&mut config, NamespaceMode::Target, target);
        let answer = cri.create(&pod.id, &config, &pod.config);
        let message = refused(answer, &[Code::InvalidArgument])?;
        ensure!(message.contains("target_id"), "{target}: {message}");
        ensure!(message.contains(target), "{target}: {message}");
    }
    Ok(())
}

fn pid_namespace_may_be_the_pods_for_some_containers_only(node: &Node) -> Result<()> {
    let pod = node.pod("mixed")?;
    let image = node.base()?;
    let with = |name: &str, line: &str, mode| {
        let mut config = shell(name, &image, line);
        in_namespace(&mut config, mode, "");
        config
    };
    let (shared, own) = (NamespaceMode::Pod, NamespaceMode::Container);
    pod.start(&with("first", "exec sleep 54321", shared))?;
    let said = pod
        .run_to_end(&with("second", "ps -o args", shared))?
        .stdout();
    ensure!(said.contains("sleep 54321"), "{said}");
    let ended = pod.run_to_end(&with("third", "echo $$; ps -o args", own))?;
    let said = ended.stdout();
    ensure!(said.starts_with("1\n") && !said.contains("sleep"), "{said}");
    Ok(())
}

fn unknown_policy_is_refused_by_name(node: &Node) -> Result<()> {
    let pod = node.pod("unknown")?;
    let mut config = sleeper("unknown", &node.base()?);
    security(&mut config).supplemental_groups_policy = 9;
    let answer = node.cri()?.create(&pod.id, &config, &pod.config);
    let message = refused(answer, &[Code::InvalidArgument])?;
    ensure!(message.contains("supplemental_groups_policy"), "{message}");
    Ok(())
}

fn device(path: &str, permissions: &str) -> Device {
    Device {
        container_path: path.to_owned(),
        host_path: path.to_owned(),
        permissions: permissions.to_owned(),
    }
}

fn devices_of_every_kernel_are_given(node: &Node) -> Result<()> {
    let pod = node.pod("fuse")?;
    let line = "ls /dev/fuse /dev/net/tun; (: < /dev/net/tun) && echo read; \
        (: > /dev/net/tun) || echo not written; (: <> /dev/fuse) && echo both";
    let mut config = shell("fuse", &node.base()?, line);
    config.devices = vec![device("/dev/fuse", "rw"), device("/dev/net/tun", "r")];
    let ended = pod.run_to_end(&config)?;
    let wanted = "/dev/fuse\n/dev/net/tun\nread\nnot written\nboth\n";
    ensure!(
        ended.stdout() == wanted,
        "{:?} {:?}",
        ended.stdout(),
        ended.stderr()
    );
    // One that did not ask cannot make itself the node.
    let line = "mknod /tmp/fuse c 10 229; mknod /dev/fuse c 10 229; \
        for node in /tmp/fuse /dev/fuse; do (: < $node) || echo closed; done";
    let ended = pod.run_to_end(&shell("no-fuse", &node.base()?, line))?;
    ensure!(ended.stdout() == "closed\nclosed\n", "{:?}", ended.stdout());
    Ok(())
}

fn devices_of_the_host_are_refused_by_name(node: &Node) -> Result<()> {
    let pod = node.pod("devices")?;
    let mut config = sleeper("kvm", &node.base()?);
    config.devices = vec![device("/dev/kvm", "rw")];
    let answer = node.cri()?.create(&pod.id, &config, &pod.config);
    let message = refused(answer, &[Code::InvalidArgument])?;
    ensure!(message.contains("/dev/kvm"), "{message}");
    Ok(())
}

fn device_nodes_are_the_containers_own(node: &Node) -> Result<()> {
    let pod = node.pod("nodes")?;
    let image = node.base()?;
    let mut config = shell(
        "one",
        &image,
        "chmod 600 /dev/null /dev/zero && chown 7 /dev/null; chmod 600 /proc/kallsyms || echo kept; sleep 1000",
    );
    security(&mut config).masked_paths = vec!["/proc/kallsyms".to_owned()];
    let one = pod.start(&config)?;
    let line = "until [ $(stat -c %u /dev/null) = 7 ]; do sleep 0.1; done; stat -c %a%u /dev/null";
    let said = node.cri()?.shell(&one, line)?;
    ensure!(said == "6007", "{said}");
    let line = "stat -c %a%u /dev/null /dev/zero";
    let said = pod.run_to_end(&shell("two", &image, line))?.stdout();
    ensure!(said == "6660\n6660\n", "{said}");
    Ok(())
}

fn files_given_to_a_container_are_no_way_to_its_neighbours(node: &Node) -> Result<()> {
    let pod = node.pod("files")?;
    let image = node.base()?;
    let neighbour = pod.start(&sleeper("neighbour", &image))?;
    let mut config = sleeper("hostile", &image);
    let capabilities = security(&mut config).capabilities.get_or_insert_default();
    capabilities.add_capabilities = vec!["SYS_ADMIN".into()];
    let hostile = pod.start(&config)?;
    let line = "mount -o remount,ro /etc/resolv.conf; ! echo x >> /etc/resolv.conf";
    pod.cri.shell(&hostile, line)?;
    pod.cri
        .shell(&neighbour, "echo y > /y; echo z >> /etc/resolv.conf")?;
    let ended = pod.run_to_end(&shell("later", &image, "echo w > /w; echo fine"))?;
    ensure!(ended.stdout() == "fine\n", "{}", ended.stderr());
    pod.cri.remove(&ended.status.id)?;
    Ok(pod.cri.remove(&hostile)?)
}

fn privileged_pod<'a>(node: &'a Node, name: &str) -> Result<Pod<'a>> {
    let mut config = node.pod_config(name)?;
    pod_security(&mut config).privileged = true;
    Pod::run(node.cri()?, config)
}

fn privileged_container_opens_every_device_but_the_pods_disks(node: &Node) -> Result<()> {
    let pod = privileged_pod(node, "privileged")?;
    // It may make any mount open devices; that does not help it to the disks.
    let line = "ls /dev/fuse /dev/loop-control; (: < /dev/loop-control) && echo opened; \
        mount -t tmpfs -o dev tmpfs /tmp; mknod /tmp/zero c 1 5 && head -c 1 /tmp/zero | wc -c; \
        ls /dev | grep -c ^vd; \
        while read major minor rest; do \
        [ \"$major\" -gt 0 ] 2>/dev/null || continue; \
        for node in /tmp/disk /dev/disk; do \
        mknod $node b $major $minor && head -c 1 $node > /dev/null && echo opened $major $minor; \
        rm -f $node; done; done < /proc/partitions; echo done";
    let mut config = shell("privileged", &node.base()?, line);
    security(&mut config).privileged = true;
    let ended = pod.run_to_end(&config)?;
    let wanted = "/dev/fuse\n/dev/loop-control\nopened\n1\n0\ndone\n";
    ensure!(
        ended.stdout() == wanted,
        "{:?} {:?}",
        ended.stdout(),
        ended.stderr()
    );
    Ok(())
}

fn privileged_container_needs_a_privileged_pod(node: &Node) -> Result<()> {
    let pod = node.pod("unprivileged")?;
    let mut config = sleeper("privileged", &node.base()?);
    security(&mut config).privileged = true;
    match node.cri()?.create(&pod.id, &config, &pod.config) {
        Ok(id) => anyhow::bail!("{id} is privileged in a pod that is not"),
        Err(status) => ensure!(status.message().contains("privileged"), "{status}"),
    }
    Ok(())
}

fn descriptors_of_the_runtime_do_not_leak(node: &Node) -> Result<()> {
    let pod = node.pod("descriptors")?;
    let line = "for descriptor in /proc/$$/fd/*; do echo ${descriptor##*/}; done; sleep 1000";
    let config = container("shell", &node.base()?, &["/suid/bash", "-c", line]);
    let id = pod.start(&config)?;
    let line = "for descriptor in /proc/$$/fd/*; do echo ${descriptor##*/}; done";
    let said = node.cri()?.output(&id, &["/suid/bash", "-c", line])?;
    // 3 is the directory itself while it is read.
    let plain = |said: &str| said.lines().all(|number| "0123".contains(number));
    ensure!(plain(&said) && said.starts_with("0\n1\n2"), "{said:?}");
    let own = node.cri()?.shell(&id, "ls /proc/1/fd")?;
    ensure!(own == "0\n1\n2", "{own:?}");
    Ok(())
}

/// What CreateContainer or StartContainer says against it.
fn refusal(pod: &Pod<'_>, config: &ContainerConfig) -> Result<String> {
    let status = match pod.cri.create(&pod.id, config, &pod.config) {
        Err(status) => status,
        Ok(id) => match pod.cri.start(&id) {
            Err(status) => status,
            Ok(()) => anyhow::bail!("{:?} runs", config.metadata),
        },
    };
    Ok(status.message().to_owned())
}

/// CVE-2019-5736: by the program of a process that the runtime keeps beside the container's.
fn program_of_the_runtime_cannot_be_written(node: &Node) -> Result<()> {
    let pod = node.pod("program")?;
    let image = node.base()?;
    let shared = |mut config: ContainerConfig| {
        in_namespace(&mut config, NamespaceMode::Pod, "");
        config
    };
    // Who may trace may look at any program.
    let mut config = shared(sleeper("attacker", &image));
    let capabilities = Capability {
        add_capabilities: vec!["SYS_PTRACE".into()],
        ..Capability::default()
    };
    security(&mut config).capabilities = Some(capabilities);
    let attacker = pod.start(&config)?;
    let held = pod.create(&shared(sleeper("held", &image)))?;
    // The pod's first process, one that is held before its program, and the shell itself.
    let line = "own=$(readlink /proc/self/exe); others=0
        for exe in /proc/[0-9]*/exe; do
        [ \"$(readlink $exe)\" = $own ] || others=$((others + 1))
        (echo x >> $exe) 2> /dev/null && echo written $exe
        (exec 3< $exe && echo x >> /proc/self/fd/3) 2> /dev/null && echo written through $exe
        done; [ $others -ge 2 ] && echo others";
    let said = pod.cri.shell(&attacker, line)?;
    ensure!(said == "others", "{said}");
    // Where the runtime begins an exec by a program of its own, that is what this runs.
    for _ in 0..3 {
        let _ = pod
            .cri
            .exec_for(&attacker, &["/proc/self/exe", "stage"], 10);
    }
    pod.cri.start(&held)?;
    for id in [&attacker, &held] {
        ensure!(pod.cri.shell(id, "echo fine")? == "fine", "an exec");
    }
    pod.start(&sleeper("later", &image))?;
    Ok(())
}

fn working_directory_stays_in_the_root(node: &Node) -> Result<()> {
    let pod = node.pod("away")?;
    let image = node.base()?;
    for directory in [
        "/proc/self/fd/3",
        "/proc/self/fd/7",
        "/proc/1/cwd",
        "/etc/passwd",
    ] {
        let mut config = shell(&directory.replace('/', "-")[1..], &image, "pwd");
        config.working_dir = directory.to_owned();
        let message = refusal(&pod, &config)?;
        ensure!(message.contains(directory), "{directory}: {message}");
    }
    for (name, directory) in [("up", "/data/../../../.."), ("link", "/work/away")] {
        let mut config = shell(
            name,
            &node.image("test/links:1")?,
            "/bin/pwd; ls /node/disk",
        );
        config.working_dir = directory.to_owned();
        let ended = pod.run_to_end(&config)?;
        ensure!(ended.stdout() == "/\n/node/disk\n", "{:?}", ended.stdout());
    }
    Ok(())
}

fn exec_in_a_directory_that_was_exchanged_stays_in_the_root(node: &Node) -> Result<()> {
    let pod = node.pod("exchanged")?;
    let line = "cd /; rmdir /place; while :; do for number in 3 4 5 6 7 8 9; do \
        rm -f /place; ln -s /proc/self/fd/$number /place; sleep 0.1; done; done";
    let mut config = shell("exchanging", &node.base()?, line);
    config.working_dir = "/place".to_owned();
    let id = pod.start(&config)?;
    let mut refusals = 0;
    for _ in 0..20 {
        match node.cri()?.exec_for(&id, &["/bin/pwd"], 0) {
            // The directory is still there, or went after it was entered and has no name.
            Ok(reply) => {
                let named = reply.stdout == b"/place\n";
                let nameless = reply.stdout.is_empty() && reply.exit_code == 1;
                ensure!(refusals == 0 && (named || nameless), "{reply:?}");
            }
            Err(status) => {
                ensure!(status.message().contains("/place"), "{status}");
                refusals += 1;
            }
        }
    }
    ensure!(refusals > 0, "the directory was never exchanged");
    Ok(())
}

fn directory_as_program_is_refused_by_name(node: &Node) -> Result<()> {
    let pod = node.pod("directory")?;
    let image = node.base()?;
    let message = refusal(&pod, &container("directory", &image, &["/data"]))?;
    ensure!(message.contains("/data"), "{message}");
    // The pod goes on.
    let ended = pod.run_to_end(&shell("next", &image, "echo fine"))?;
    ensure!(ended.stdout() == "fine\n", "{:?}", ended.stdout());
    Ok(())
}

fn links_of_an_image_stay_in_its_root(node: &Node) -> Result<()> {
    let pod = node.pod("links")?;
    let line = "id -u; cat /data/etc/hosts | grep -c localhost; grep -c CapEff /proc/self/status";
    let mut config = shell("links", &node.image("test/links:1")?, line);
    security(&mut config).run_as_username = "app".to_owned();
    let said = pod.run_to_end(&config)?.stdout();
    let lines: Vec<_> = said.lines().collect();
    ensure!(lines.first() == Some(&"1000"), "{said:?}");
    ensure!(lines.get(1).is_some_and(|count| *count != "0"), "{said:?}");
    ensure!(lines.get(2) == Some(&"1"), "{said:?}");
    Ok(())
}

fn devices_of_an_image_cannot_be_opened(node: &Node) -> Result<()> {
    let pod = node.pod("image-devices")?;
    let line = "head -c 1 /node/disk || echo closed; test -b /node/disk && echo a device";
    let config = shell("devices", &node.image("test/links:1")?, line);
    let said = pod.run_to_end(&config)?.stdout();
    ensure!(said == "closed\na device\n", "{said:?}");
    Ok(())
}

fn null_of_an_image_does_not_unmask(node: &Node) -> Result<()> {
    let pod = node.pod("swapped")?;
    let line = "stat -c %t%T /dev/null; wc -c < /proc/kallsyms; echo x > /proc/kallsyms; \
        cat /data/target; echo y > /dev/null; cat /data/target";
    let mut config = shell("swapped", &node.image("test/links:1")?, line);
    security(&mut config).masked_paths = vec!["/proc/kallsyms".to_owned()];
    let said = pod.run_to_end(&config)?.stdout();
    ensure!(said == "13\n0\nkept\nkept\n", "{said:?}");
    Ok(())
}

fn linked_kernel_directories_are_refused_by_name(node: &Node) -> Result<()> {
    let pod = node.pod("linked")?;
    for name in ["proc", "dev", "sys"] {
        let image = node.image(&format!("test/{name}-link:1"))?;
        let message = refusal(&pod, &sleeper(name, &image))?;
        ensure!(message.contains(&format!("/{name}")), "{message}");
        ensure!(message.contains("symbolic link"), "{message}");
    }
    // The pod goes on.
    let ended = pod.run_to_end(&shell("next", &node.base()?, "echo fine"))?;
    ensure!(ended.stdout() == "fine\n", "{:?}", ended.stdout());
    Ok(())
}

fn passwd_that_is_no_file_is_refused_by_name(node: &Node) -> Result<()> {
    let pod = node.pod("passwd")?;
    let cases = [
        ("fifo", "is a FIFO"),
        ("directory", "is a directory"),
        ("device", "is a device"),
        ("large", "2097152 bytes"),
    ];
    for (name, wanted) in cases {
        let image = node.image(&format!("test/passwd-{name}:1"))?;
        let message = refusal(&pod, &sleeper(name, &image))?;
        ensure!(message.contains("/etc/passwd"), "{name}: {message}");
        ensure!(message.contains(wanted), "{name}: {message}");
    }
    Ok(())
}

/// A dump's pipe would be served by root beside all containers.
fn kernel_starts_no_program_for_a_container(node: &Node) -> Result<()> {
    let pod = node.pod("dumps")?;
    let line = "echo 'echo > /proc/$1/root/owned' > /helper
        echo '|/proc/%P/root/bin/sh /proc/%P/root/helper %P' > /proc/sys/kernel/core_pattern
        cat /proc/sys/kernel/core_pattern
        sh -c 'ulimit -c unlimited; kill -SEGV $$'; sleep 2; ls /owned";
    let ended = pod.run_to_end(&shell("dumps", &node.base()?, line))?;
    ensure!(
        ended.stdout() == "|/proc/%P/root/bin/sh /proc/%P/root/helper %P\n",
        "{:?}",
        ended.stdout()
    );
    ensure!(
        ended.stderr().contains("No such file"),
        "{:?}",
        ended.stderr()
    );
    Ok(())
}

/// To the kernel 2^32 - 1 is no id but "leave it": root would stay root.
fn user_that_means_no_change_is_refused(node: &Node) -> Result<()> {
    let pod = node.pod("no-change")?;
    for user in ["4294967295", "2147483648", "0:4294967295"] {
        let mut config = sleeper("nobody", &node.base()?);
        security(&mut config).run_as_username = user.to_owned();
        let answer = pod.cri.create(&pod.id, &config, &pod.config);
        let message = refused(answer, &[Code::InvalidArgument])?;
        ensure!(
            message.contains("is more than 2147483647"),
            "{user}: {message}"
        );
    }
    Ok(())
}
