//! Pods with a user namespace (CRI `userns_options`): root in their containers is nobody in the guest.

use std::fs;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use bulkhead_cri_api::v1::*;
use bulkhead_tests::cri::refused;
use bulkhead_tests::http::fetch;
use bulkhead_tests::request::{Pod, container, number, pod_security, security, shell, sleeper};
use bulkhead_tests::{Node, suite};
use tonic::Code;

suite! {
    containers_have_the_ids_of_the_pods_ranges,
    ids_may_come_from_several_ranges,
    pid_namespace_of_a_target_is_joined,
    files_belong_to_the_containers_root,
    host_files_belong_to_whom_their_mounts_map,
    root_of_a_container_is_not_the_guests,
    capabilities_hold_for_the_pods_own_namespaces,
    containers_share_the_pods_namespaces,
    servers_are_reached_on_their_ports,
    figures_of_the_network_are_the_pods,
    execs_are_in_the_user_namespace_too,
    terminals_belong_to_the_user_in_the_namespace,
    sysctls_and_host_name_are_the_pods,
    users_beyond_the_ranges_are_refused_by_name,
    ranges_that_cannot_be_had_are_refused_by_name,
}

/// The first id of the guest, and how many.
const FIRST: u32 = 70_000;
const LENGTH: u32 = 65_536;

fn users(mode: NamespaceMode, host_id: u32, length: u32) -> UserNamespace {
    let ids = vec![IdMapping {
        host_id,
        container_id: 0,
        length,
    }];
    UserNamespace {
        mode: mode.into(),
        uids: ids.clone(),
        gids: ids,
    }
}

/// Has a pod, or one of its containers, in the user namespace.
fn mapped(options: &mut Option<NamespaceOption>) {
    let options = options.get_or_insert_default();
    options.userns_options = Some(users(NamespaceMode::Pod, FIRST, LENGTH));
}

fn pod<'a>(node: &'a Node, name: &str) -> Result<Pod<'a>> {
    let mut config = node.pod_config(name)?;
    mapped(&mut pod_security(&mut config).namespace_options);
    Pod::run(node.cri()?, config)
}

fn within(mut config: ContainerConfig) -> ContainerConfig {
    mapped(&mut security(&mut config).namespace_options);
    config
}

/// What a shell says in a container of the pod, which must succeed.
fn said(pod: &Pod<'_>, config: ContainerConfig) -> Result<String> {
    let ended = pod.run_to_end(&within(config))?;
    let output = (ended.stdout(), ended.stderr());
    ensure!(
        ended.status.exit_code == 0,
        "{:?}: {output:?}",
        ended.status
    );
    Ok(output.0)
}

fn granted(mut config: ContainerConfig, capability: &str) -> ContainerConfig {
    let capabilities = security(&mut config).capabilities.get_or_insert_default();
    capabilities.add_capabilities = vec![capability.to_owned()];
    config
}

fn containers_have_the_ids_of_the_pods_ranges(node: &Node) -> Result<()> {
    let pod = pod(node, "ranges")?;
    let line = "cat /proc/self/uid_map /proc/self/gid_map; id -u; id -g";
    let output = said(&pod, shell("ids", &node.base()?, line))?;
    let words: Vec<&str> = output.split_whitespace().collect();
    let (first, length) = (FIRST.to_string(), LENGTH.to_string());
    let map = ["0", &first, &length];
    ensure!(
        words == [&map[..], &map[..], &["0", "0"]].concat(),
        "{output}"
    );
    // The ids of a user of the image are those it has there.
    let mut app = shell(
        "app",
        &node.base()?,
        "id -u; touch /tmp/x; stat -c %u:%g /tmp/x",
    );
    security(&mut app).run_as_username = "app".to_owned();
    let output = said(&pod, app)?;
    ensure!(output == "1000\n1000:1000\n", "{output}");
    Ok(())
}

fn ids_may_come_from_several_ranges(node: &Node) -> Result<()> {
    let range = |host_id, container_id, length| IdMapping {
        host_id,
        container_id,
        length,
    };
    // Root, the others, and a lone one far off: not in order, and with a hole.
    let ranges = vec![
        range(200_000, 500, 2_000),
        range(90_000, 0, 10),
        range(70_000, 65_534, 1),
    ];
    let ids = UserNamespace {
        mode: NamespaceMode::Pod.into(),
        uids: ranges.clone(),
        gids: ranges,
    };
    let with = |options: &mut Option<NamespaceOption>| {
        options.get_or_insert_default().userns_options = Some(ids.clone());
    };
    let mut config = node.pod_config("several")?;
    with(&mut pod_security(&mut config).namespace_options);
    let pod = Pod::run(node.cri()?, config)?;
    // The image's files of app (1000), and of a group that no range has (50 is staff).
    let line = "cat /proc/self/uid_map; stat -c '%u:%g' / /home/app; \
                touch /x && chown 65534:1000 /x && stat -c '%u:%g' /x; chown 0:50 /x || echo none";
    let mut config = shell("several", &node.base()?, line);
    with(&mut security(&mut config).namespace_options);
    let ended = pod.run_to_end(&config)?;
    let said = ended.stdout();
    let words: Vec<&str> = said.split_whitespace().collect();
    let map = "500 200000 2000 0 90000 10 65534 70000 1";
    let rest = "0:0 1000:1000 65534:1000 none";
    ensure!(
        words.join(" ") == format!("{map} {rest}"),
        "{said} {}",
        ended.stderr()
    );
    let mut config = shell(
        "app",
        &node.base()?,
        "id -u; touch /home/app/x && echo made",
    );
    with(&mut security(&mut config).namespace_options);
    security(&mut config).run_as_user = number(1000);
    security(&mut config).run_as_group = number(1000);
    security(&mut config).set_supplemental_groups_policy(SupplementalGroupsPolicy::Strict);
    let said = pod.run_to_end(&config)?.stdout();
    ensure!(said == "1000\nmade\n", "{said}");
    Ok(())
}

fn pid_namespace_of_a_target_is_joined(node: &Node) -> Result<()> {
    let pod = pod(node, "target")?;
    let image = node.base()?;
    let target = pod.start(&within(shell("target", &image, "exec sleep 54321")))?;
    pod.start(&within(shell("other", &image, "exec sleep 12345")))?;
    // The target's root is this container's, too, so that it may look.
    let line = "ps -o pid,args; cat /proc/1/root/etc/passwd > /dev/null && echo looked";
    let mut config = within(granted(shell("debugger", &image, line), "SYS_PTRACE"));
    let options = security(&mut config).namespace_options.as_mut();
    let options = options.context("no options")?;
    options.set_pid(NamespaceMode::Target);
    options.target_id = target.clone();
    let said = pod.run_to_end(&config)?.stdout();
    let first = said.lines().find(|line| line.trim().starts_with("1 "));
    ensure!(
        first.is_some_and(|line| line.contains("sleep 54321")),
        "{said}"
    );
    ensure!(!said.contains("sleep 12345"), "{said}");
    ensure!(said.ends_with("looked\n"), "{said}");
    Ok(())
}

fn files_belong_to_the_containers_root(node: &Node) -> Result<()> {
    let pod = pod(node, "files")?;
    let line = "cd /; touch made etc/passwd; mkdir new; chown 1000:50 new; \
                echo more >> /etc/group; echo '1.1.1.1 x' >> /etc/hosts; touch /dev/shm/made; \
                stat -c '%n %u %g %a' / etc etc/passwd home/app tmp made new dev dev/shm/made \
                  etc/hosts /work/here";
    let mut config = shell("files", &node.base()?, line);
    config.working_dir = "/work/here".to_owned();
    let output = said(&pod, config)?;
    let wanted = "/ 0 0 755\netc 0 0 755\netc/passwd 0 0 644\nhome/app 1000 1000 755\n\
                  tmp 0 0 1777\nmade 0 0 644\nnew 1000 50 755\ndev 0 0 755\n\
                  dev/shm/made 0 0 644\netc/hosts 0 0 644\n/work/here 0 0 755\n";
    ensure!(output == wanted, "{output}");
    Ok(())
}

fn host_files_belong_to_whom_their_mounts_map(node: &Node) -> Result<()> {
    use std::os::unix::fs::{PermissionsExt, chown};
    let pod = pod(node, "mounts")?;
    let users = users(NamespaceMode::Pod, FIRST, LENGTH);
    let mount = |name: &str, owner: (u32, u32), mapped: bool| -> Result<Mount> {
        let path = node.scratch().join(format!("mounted-{name}"));
        fs::write(&path, "of the host\n")?;
        chown(&path, Some(owner.0), Some(owner.1))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644))?;
        let ids = |ids: &[IdMapping]| match mapped {
            true => ids.to_vec(),
            false => Vec::new(),
        };
        Ok(Mount {
            host_path: path.display().to_string(),
            container_path: format!("/in/{name}"),
            uid_mappings: ids(&users.uids),
            gid_mappings: ids(&users.gids),
            ..Mount::default()
        })
    };
    // The last one belongs to the container's root without any mapping of the mount.
    let line = "cd /in; stat -c '%n %u:%g' mapped roots beyond plain own; \
                for f in mapped roots beyond plain own; do \
                  echo x > $f && echo wrote $f; done 2> /dev/null";
    let mut config = shell("mounts", &node.base()?, line);
    config.mounts = vec![
        mount("mapped", (1000, 2000), true)?,
        mount("roots", (0, 0), true)?,
        mount("beyond", (LENGTH, LENGTH), true)?,
        mount("plain", (0, 0), false)?,
        mount("own", (FIRST, FIRST + 50), false)?,
    ];
    let output = said(&pod, config.clone())?;
    let wanted = "mapped 1000:2000\nroots 0:0\nbeyond 65534:65534\nplain 65534:65534\n\
                  own 0:50\nwrote mapped\nwrote roots\nwrote own\n";
    ensure!(output == wanted, "{output}");
    for mount in &config.mounts {
        let name = mount.container_path.trim_start_matches("/in/");
        let written = fs::read_to_string(&mount.host_path)? == "x\n";
        let may = wanted.contains(&format!("wrote {name}\n"));
        ensure!(written == may, "{name} on the host: {written}");
    }
    Ok(())
}

fn root_of_a_container_is_not_the_guests(node: &Node) -> Result<()> {
    let mut config = node.pod_config("nobody")?;
    let asked = pod_security(&mut config);
    asked.privileged = true;
    mapped(&mut asked.namespace_options);
    let pod = Pod::run(node.cri()?, config)?;
    // With every capability, and nothing read-only.
    let line = "for f in vm/drop_caches kernel/panic kernel/core_pattern; do \
                  echo 1 > /proc/sys/$f; done 2>&1 | grep -c denied; \
                mknod /node c 1 3 2>&1 | grep -c permitted; \
                mkdir /m && mount -t tmpfs none /m && echo mounted";
    let mut config = shell("root", &node.base()?, line);
    security(&mut config).privileged = true;
    let output = said(&pod, config)?;
    ensure!(output == "3\n1\nmounted\n", "{output}");
    Ok(())
}

fn capabilities_hold_for_the_pods_own_namespaces(node: &Node) -> Result<()> {
    let pod = pod(node, "capable")?;
    let image = node.base()?;
    let line = "mkdir /m && mount -t tmpfs none /m && stat -c %u /m && hostname other && hostname";
    let mounts = said(&pod, granted(shell("mounts", &image, line), "SYS_ADMIN"))?;
    ensure!(mounts == "0\nother\n", "{mounts}");
    let line = "ip link set lo mtu 1234 && ip link show lo | grep -c 'mtu 1234'";
    let network = said(&pod, granted(shell("network", &image, line), "NET_ADMIN"))?;
    ensure!(network == "1\n", "{network}");
    let line = "mkdir /m; mount -t tmpfs none /m; echo $?; ip link set lo mtu 1500; echo $?";
    let none = said(&pod, shell("none", &image, line))?;
    let refused: Vec<&str> = none.lines().collect();
    ensure!(refused.len() == 2 && !refused.contains(&"0"), "{none}");
    Ok(())
}

fn containers_share_the_pods_namespaces(node: &Node) -> Result<()> {
    let mut config = node.pod_config("shared")?;
    let options = &mut pod_security(&mut config).namespace_options;
    mapped(options);
    options.get_or_insert_default().pid = NamespaceMode::Pod.into();
    let pod = Pod::run(node.cri()?, config)?;
    let image = node.base()?;
    let start = |name: &str| -> Result<String> {
        let mut config = within(sleeper(name, &image));
        let options = &mut security(&mut config).namespace_options;
        options.get_or_insert_default().pid = NamespaceMode::Pod.into();
        pod.start(&config)
    };
    let (one, two) = (start("one")?, start("two")?);
    let line = "for n in user net ipc uts pid mnt; do readlink /proc/self/ns/$n; done";
    let look = |id: &str| -> Result<Vec<String>> {
        let output = pod.cri.shell(id, line)?;
        Ok(output.lines().map(str::to_owned).collect())
    };
    let (one, two) = (look(&one)?, look(&two)?);
    ensure!(one.len() == 6 && one[..5] == two[..5], "{one:?} {two:?}");
    ensure!(one[5] != two[5], "{one:?} {two:?}");
    Ok(())
}

fn servers_are_reached_on_their_ports(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = pod(node, "web")?;
    pod.start(&within(container(
        "lighttpd",
        &node.image("demo/web:1")?,
        &[],
    )))?;
    let address = cri.pod_ip(&pod.id)?;
    let page = fetch(SocketAddr::new(address, 80))?;
    ensure!(page.contains("Served by lighttpd from a pod."), "{page}");
    let line = "ip -o -4 addr show eth0; ip route; ip -o addr show lo";
    let output = said(&pod, shell("look", &node.base()?, line))?;
    let wanted = [&format!("inet {address}/"), "default via ", "127.0.0.1/8"];
    ensure!(wanted.iter().all(|word| output.contains(*word)), "{output}");
    Ok(())
}

fn figures_of_the_network_are_the_pods(node: &Node) -> Result<()> {
    let pod = pod(node, "figures")?;
    let id = pod.start(&within(sleeper("asks", &node.base()?)))?;
    let gateway = "$(ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p')";
    let line = format!("wget -q -T 2 -O - http://{gateway}:1/ || true");
    pod.cri.shell(&id, &line)?;
    let request = PodSandboxStatsRequest {
        pod_sandbox_id: pod.id.clone(),
    };
    let stats = pod.cri.pod_sandbox_stats(request)?.stats;
    let network = stats.and_then(|stats| stats.linux?.network);
    let interface = network.and_then(|network| network.default_interface);
    let interface = interface.context("no interface")?;
    let sent = interface.tx_bytes.map_or(0, |bytes| bytes.value);
    ensure!(interface.name == "eth0" && sent > 0, "{interface:?}");
    Ok(())
}

fn execs_are_in_the_user_namespace_too(node: &Node) -> Result<()> {
    let pod = pod(node, "execs")?;
    let image = node.base()?;
    let id = pod.start(&within(sleeper("sleeper", &image)))?;
    let line = "id -u; for n in user net ipc uts mnt; do \
                  [ $(readlink /proc/self/ns/$n) = $(readlink /proc/1/ns/$n) ] || echo $n; done; \
                touch /by-exec; stat -c %u /by-exec; echo out > /dev/stdout; \
                kill -0 1 && echo reached";
    let output = pod.cri.shell(&id, line)?;
    ensure!(output == "0\n0\nout\nreached", "{output}");
    let mut app = sleeper("app", &image);
    security(&mut app).run_as_user = number(1000);
    let app = pod.start(&within(app))?;
    let output = pod.cri.shell(&app, "id -u; echo out > /dev/stdout")?;
    ensure!(output == "1000\nout", "{output}");
    pod.cri.stop(&id, 5)?;
    Ok(())
}

fn terminals_belong_to_the_user_in_the_namespace(node: &Node) -> Result<()> {
    let pod = pod(node, "terminal")?;
    let line = "stat -c '%u %g' $(tty); echo yes > /dev/tty; stat -c %u /dev/console";
    let mut config = shell("terminal", &node.base()?, line);
    config.tty = true;
    let output = said(&pod, config)?.replace('\r', "");
    ensure!(output == "0 5\nyes\n0\n", "{output:?}");
    Ok(())
}

fn sysctls_and_host_name_are_the_pods(node: &Node) -> Result<()> {
    let mut config = node.pod_config("named")?;
    config.hostname = "inner".to_owned();
    mapped(&mut pod_security(&mut config).namespace_options);
    let sysctls = [
        ("net.ipv4.ip_unprivileged_port_start", "77"),
        ("kernel.msgmax", "4321"),
        ("fs.mqueue.msg_max", "9"),
    ];
    config.linux.get_or_insert_default().sysctls = bulkhead_tests::cri::labels(&sysctls);
    let pod = Pod::run(node.cri()?, config.clone())?;
    let line = "hostname; cd /proc/sys; \
                cat net/ipv4/ip_unprivileged_port_start kernel/msgmax fs/mqueue/msg_max";
    let output = said(&pod, shell("look", &node.base()?, line))?;
    ensure!(output == "inner\n77\n4321\n9\n", "{output}");
    pod.cri.stop_pod(&pod.id)?;
    let metadata = config.metadata.get_or_insert_default();
    metadata.attempt += 1;
    let linux = config.linux.get_or_insert_default();
    linux.sysctls = bulkhead_tests::cri::labels(&[("net.no.such", "1")]);
    let message = refused(pod.cri.run_pod(&config), &[Code::InvalidArgument])?;
    ensure!(message.contains("net.no.such"), "{message}");
    Ok(())
}

fn users_beyond_the_ranges_are_refused_by_name(node: &Node) -> Result<()> {
    let pod = pod(node, "beyond")?;
    let mut config = within(sleeper("beyond", &node.base()?));
    security(&mut config).run_as_user = number(LENGTH.into());
    let created = pod.cri.create(&pod.id, &config, &pod.config);
    let message = refused(created, &[Code::InvalidArgument])?;
    ensure!(
        message.contains(&format!("user {LENGTH}")) && message.contains("user namespace"),
        "{message}"
    );
    // A container is where its pod is.
    let apart = sleeper("apart", &node.base()?);
    let created = pod.cri.create(&pod.id, &apart, &pod.config);
    let message = refused(created, &[Code::InvalidArgument])?;
    ensure!(message.contains("userns_options"), "{message}");
    pod.start(&within(sleeper("fits", &node.base()?)))
        .context("the same without")?;
    Ok(())
}

fn ranges_that_cannot_be_had_are_refused_by_name(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let mut overlapping = users(NamespaceMode::Pod, FIRST, LENGTH);
    overlapping.uids.extend(overlapping.uids.clone());
    let cases = [
        ("user namespace", overlapping),
        ("user namespace", users(NamespaceMode::Pod, FIRST, 0)),
        ("userns_options", users(NamespaceMode::Node, FIRST, LENGTH)),
        (
            "userns_options",
            users(NamespaceMode::Container, FIRST, LENGTH),
        ),
        ("userns_options", UserNamespace::default()),
    ];
    for (word, asked) in cases {
        let mut config = node.pod_config("impossible")?;
        let options = pod_security(&mut config)
            .namespace_options
            .get_or_insert_default();
        options.userns_options = Some(asked);
        let message = refused(cri.run_pod(&config), &[Code::InvalidArgument])?;
        ensure!(message.contains(word), "{message}");
    }
    Ok(())
}
