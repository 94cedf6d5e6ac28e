//! What a virtual machine is for: pods share nothing with the host and with each other.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use bulkhead_cri_api::v1::*;
use bulkhead_tests::node::WEB;
use bulkhead_tests::request::{Pod, container, pod_security, security, shell, sleeper};
use bulkhead_tests::{Node, suite};

suite! {
    pods_have_a_kernel_of_their_own,
    pods_have_booted_on_their_own,
    containers_of_a_pod_share_its_kernel,
    processes_of_a_pod_are_not_the_hosts,
    guest_has_the_memory_it_was_given,
    vsock_is_refused_in_every_container,
    vmm_is_confined,
    guest_shows_no_disks_and_no_host_devices,
    disks_cannot_be_opened_by_a_node_of_ones_own,
}

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

fn pods_have_a_kernel_of_their_own(node: &Node) -> Result<()> {
    let pod = node.pod("kernel")?;
    let ended = pod.run_to_end(&shell(
        "uname",
        &node.base()?,
        "uname -r; cat /proc/version",
    ))?;
    let said = ended.stdout();
    let (release, version) = said.split_once('\n').context("two lines")?;
    let host = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    ensure!(
        !release.is_empty() && release != host.trim(),
        "both run {release}"
    );
    ensure!(
        version != fs::read_to_string("/proc/version")?,
        "both are {version}"
    );
    Ok(())
}

fn pods_have_booted_on_their_own(node: &Node) -> Result<()> {
    let image = node.base()?;
    let mut ids = BTreeSet::from([fs::read_to_string(BOOT_ID)?]);
    for name in ["one", "two"] {
        let pod = node.pod(name)?;
        let said = pod
            .run_to_end(&container("id", &image, &["cat", BOOT_ID]))?
            .stdout();
        ensure!(said.len() == 37, "{said:?}");
        ensure!(ids.insert(said), "{name} has the boot id of another");
    }
    Ok(())
}

fn containers_of_a_pod_share_its_kernel(node: &Node) -> Result<()> {
    let pod = node.pod("kernel")?;
    let image = node.base()?;
    let said = |name: &str| -> Result<String> {
        Ok(pod
            .run_to_end(&container(name, &image, &["cat", BOOT_ID]))?
            .stdout())
    };
    let (one, two) = (said("one")?, said("two")?);
    ensure!(one == two, "{one} and {two}");
    Ok(())
}

fn processes_of_a_pod_are_not_the_hosts(node: &Node) -> Result<()> {
    let before = vmms()?;
    let pod = node.pod("processes")?;
    let id = pod.start(&container("sleep", &node.base()?, &["sleep", "987654321"]))?;
    let seen = node
        .cri()?
        .shell(&id, "cat /proc/1/cmdline | tr '\\0' ' '")?;
    ensure!(seen.contains("sleep 987654321"), "{seen}");
    for process in processes()? {
        let command = fs::read(process.join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command);
        ensure!(
            !command.contains("987654321"),
            "{}: {command}",
            process.display()
        );
    }
    let new = vmms()?.difference(&before).count();
    ensure!(new == 1, "{new} VMMs for one pod");
    Ok(())
}

fn guest_has_the_memory_it_was_given(node: &Node) -> Result<()> {
    let pod = node.pod("memory")?;
    let line = "sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo; nproc";
    let said = pod
        .run_to_end(&shell("meminfo", &node.base()?, line))?
        .stdout();
    let (memory, processors) = said.trim().split_once('\n').context("two lines")?;
    let kib: u64 = memory.parse()?;
    // 256 MiB is the default; the kernel keeps some for itself.
    ensure!((192 << 10..=256 << 10).contains(&kib), "{kib} KiB");
    ensure!(processors == "1", "{processors} processors");
    Ok(())
}

fn vsock_is_refused_in_every_container(node: &Node) -> Result<()> {
    type Choose = fn(&mut LinuxContainerSecurityContext);
    let mut config = node.pod_config("vsock")?;
    pod_security(&mut config).privileged = true;
    let pod = Pod::run(node.cri()?, config)?;
    let image = node.image(WEB)?;
    let unconfined = || SecurityProfile {
        profile_type: security_profile::ProfileType::Unconfined.into(),
        localhost_ref: String::new(),
    };
    let cases: [(&str, Choose); 4] = [
        ("nil-profile", |_| {}),
        ("runtime-default", |user| {
            user.seccomp = Some(SecurityProfile::default())
        }),
        ("unconfined", |_| {}),
        ("privileged", |user| user.privileged = true),
    ];
    // AF_VSOCK is 40. A socket of another family shows that sockets as such can be made.
    let script = "use Socket; \
        print socket(my $a, AF_UNIX, SOCK_STREAM, 0) ? qq(unix\\n) : qq(no unix: $!\\n); \
        print socket(my $b, 40, SOCK_STREAM, 0) ? qq(vsock\\n) : qq(refused\\n);";
    for (name, choose) in cases {
        let mut config = container(name, &image, &["/usr/bin/perl", "-e", script]);
        choose(security(&mut config));
        if name == "unconfined" {
            security(&mut config).seccomp = Some(unconfined());
        }
        let ended = pod.run_to_end(&config)?;
        ensure!(
            ended.stdout() == "unix\nrefused\n",
            "{name}: {:?} {:?}",
            ended.stdout(),
            ended.stderr()
        );
    }
    // Nor is the way in by an exec open.
    let id = pod.start(&sleeper("sleeper", &image))?;
    let said = node.cri()?.output(&id, &["/usr/bin/perl", "-e", script])?;
    ensure!(said == "unix\nrefused", "{said:?}");
    Ok(())
}

fn vmm_is_confined(node: &Node) -> Result<()> {
    let before = vmms()?;
    node.pod("jail")?;
    let after = vmms()?;
    let vmm = after.difference(&before).next().context("no VMM")?;
    let status = fs::read_to_string(vmm.join("status"))?;
    let has = |wanted: &str| {
        status
            .lines()
            .any(|line| line.split_whitespace().eq(wanted.split_whitespace()))
    };
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        ensure!(has(&format!("{set}: 0000000000000000")), "{set}: {status}");
    }
    ensure!(has("NoNewPrivs: 1"), "{status}");
    for kind in ["mnt", "net", "ipc", "uts"] {
        let of = |process: &Path| fs::read_link(process.join("ns").join(kind));
        ensure!(
            of(vmm)? != of(Path::new("/proc/self"))?,
            "the host's {kind} namespace"
        );
    }
    let root: Vec<_> = fs::read_dir(vmm.join("root"))?.flatten().collect();
    ensure!(root.is_empty(), "its root directory holds {root:?}");
    Ok(())
}

fn guest_shows_no_disks_and_no_host_devices(node: &Node) -> Result<()> {
    let pod = node.pod("devices")?;
    let said = pod
        .run_to_end(&shell("ls", &node.base()?, "ls /dev"))?
        .stdout();
    let devices: BTreeSet<_> = said.lines().collect();
    for wanted in [
        "null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts", "shm", "fd",
    ] {
        ensure!(devices.contains(wanted), "no {wanted} in {devices:?}");
    }
    let odd = devices.iter().find(|name| {
        ["vd", "vsock", "kvm", "mem", "kmsg", "port", "fuse"]
            .iter()
            .any(|odd| name.starts_with(odd))
    });
    ensure!(odd.is_none(), "{odd:?} in {devices:?}");
    Ok(())
}

fn disks_cannot_be_opened_by_a_node_of_ones_own(node: &Node) -> Result<()> {
    let pod = node.pod("mknod")?;
    // Every block device the guest has, by the numbers it tells.
    let line = "while read major minor rest; do \
        [ \"$major\" -gt 0 ] 2>/dev/null || continue; \
        mknod /tmp/disk b $major $minor && head -c 1 /tmp/disk > /dev/null && echo opened $major $minor; \
        rm -f /tmp/disk; done < /proc/partitions; echo done";
    let ended = pod.run_to_end(&shell("mknod", &node.base()?, line))?;
    ensure!(ended.stdout() == "done\n", "{:?}", ended.stdout());
    Ok(())
}

/// Directories of all processes.
fn processes() -> Result<Vec<PathBuf>> {
    let named = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let entries = fs::read_dir("/proc")?.flatten().map(|entry| entry.path());
    Ok(entries.filter(named).collect())
}

/// Directories of the VMMs' processes.
fn vmms() -> Result<BTreeSet<PathBuf>> {
    let is_vmm = |process: &PathBuf| {
        let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
        name.starts_with("bulkhead-vmm")
    };
    Ok(processes()?.into_iter().filter(is_vmm).collect())
}
