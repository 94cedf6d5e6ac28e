//! What is looked at, one function for each finding.

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::path::Path;

use kvm_ioctls::{Cap, Kvm};

use super::microguest::{self, Outcome};
use super::{Finding, Report};
use crate::cgroup::Hierarchy;
use crate::config::Artefacts;
use crate::network;

/// The oldest kernel that has what pods need, major and minor.
const OLDEST_KERNEL: (u32, u32) = (6, 1);

/// What the VMM asks of KVM, with KVM's names.
const CAPABILITIES: [(Cap, &str); 10] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
];

/// Tools that are called, and the Debian packages that bring them.
const TOOLS: [(&str, &str, &str); 2] = [
    ("mke2fs", "e2fsprogs", "makes the pods' scratch disks"),
    ("nft", "nftables", "translates the pods' addresses"),
];

/// Looks at this machine; `tests_too` grades what only the project's tests need as they need it.
/// Blocks for some seconds at worst.
pub fn examine(tests_too: bool) -> Report {
    let mut findings = vec![root(), kernel()];
    let device = kvm_device();
    let works = device.advice.is_none();
    findings.push(device);
    if works {
        findings.extend([kvm_interface(), micro_guest()]);
    }
    findings.push(cgroups());
    findings.push(artefacts());
    findings.extend(TOOLS.map(|(tool, package, purpose)| program(tool, package, purpose)));
    findings.push(pod_network());
    findings.push(bridged_answers());
    findings.extend(forwarding());
    findings.push(erofs(tests_too));
    findings.extend(nx_huge_pages());
    findings.extend(favordynmods());
    Report { findings }
}

/// What every VM is started from.
fn artefacts() -> Finding {
    let name = "VMM and guest";
    match Artefacts::find() {
        Ok(found) => Finding::good(name, found.vmm.display().to_string()),
        Err(missing) => Finding::failure(
            name,
            missing,
            "put bulkhead-vmm, vmlinux and initramfs beside bulkhead or into /usr/lib/bulkhead",
        ),
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn root() -> Finding {
    let name = "user";
    if is_root() {
        return Finding::good(name, "root");
    }
    Finding::failure(name, "not root", "run the server, and this check, as root")
}

fn kernel() -> Finding {
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let mut numbers = release
        .split(['.', '-', '+'])
        .map(|part| part.parse().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let (major, minor) = OLDEST_KERNEL;
    if version >= OLDEST_KERNEL {
        return Finding::good("kernel", format!("Linux {release}"));
    }
    let advice = format!("boot Linux {major}.{minor} or a newer one");
    Finding::failure("kernel", format!("Linux {release} is too old"), advice)
}

fn kvm_device() -> Finding {
    let name = "kvm device";
    let error = match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => return Finding::good(name, "/dev/kvm opens"),
        Err(error) => error,
    };
    let advice = match error.kind() {
        ErrorKind::PermissionDenied => "run as root, or join the group that owns /dev/kvm",
        ErrorKind::NotFound if !has_virtualisation() => {
            "switch virtualisation on in the firmware; on a virtual machine ask for nested \
             virtualisation, or take a bare one"
        }
        ErrorKind::NotFound => "load the module: modprobe kvm_intel, or modprobe kvm_amd",
        _ => "see the kernel's log: dmesg | grep -i kvm",
    };
    Finding::failure(name, format!("/dev/kvm: {error}"), advice)
}

/// Whether the processor shows Intel's or AMD's extension.
fn has_virtualisation() -> bool {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    text.lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| {
            line.split_whitespace()
                .any(|flag| flag == "vmx" || flag == "svm")
        })
}

fn kvm_interface() -> Finding {
    let name = "kvm interface";
    let advice = "use the kernel's own KVM; this one cannot serve Bulkhead's VMM";
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => return Finding::failure(name, error.to_string(), advice),
    };
    let version = kvm.get_api_version();
    // KVM's documentation: refuse to run where this is not 12.
    if version != 12 {
        return Finding::failure(name, format!("version {version} instead of 12"), advice);
    }
    let missing: Vec<&str> = CAPABILITIES
        .iter()
        .filter(|(capability, _)| !kvm.check_extension(*capability))
        .map(|(_, name)| *name)
        .collect();
    if missing.is_empty() {
        return Finding::good(
            name,
            format!("version 12, {} capabilities", CAPABILITIES.len()),
        );
    }
    Finding::failure(name, format!("lacks {}", missing.join(", ")), advice)
}

fn micro_guest() -> Finding {
    let name = "micro guest";
    let emulation = "this /dev/kvm is a software emulation that cannot boot kernels: \
                     use a machine with hardware virtualisation";
    match microguest::run() {
        Outcome::Passed { nanoseconds } if microguest::is_interpreted(nanoseconds) => {
            let found = format!("a turn of a loop takes {nanoseconds:.0} ns");
            Finding::failure(name, found, emulation)
        }
        Outcome::Passed { nanoseconds } => Finding::good(
            name,
            format!(
                "int3, xsave, xrstor, cmpxchg16b work; a turn of a loop takes {nanoseconds:.2} ns"
            ),
        ),
        Outcome::Failed {
            step,
            reason,
            nanoseconds,
        } => {
            let slow = nanoseconds.filter(|nanoseconds| microguest::is_interpreted(*nanoseconds));
            let speed = nanoseconds
                .map(|nanoseconds| format!("; a turn of a loop takes {nanoseconds:.2} ns"))
                .unwrap_or_default();
            let advice = match slow {
                Some(_) => emulation,
                None => {
                    "this /dev/kvm cannot boot kernels: use a machine with hardware virtualisation"
                }
            };
            Finding::failure(name, format!("fails at {step}: {reason}{speed}"), advice)
        }
        Outcome::Refused { reason } => {
            Finding::failure(name, reason, "see the kernel's log: dmesg | grep -i kvm")
        }
        Outcome::Hung => Finding::failure(name, "it hangs", emulation),
    }
}

fn cgroups() -> Finding {
    match Hierarchy::detect() {
        Ok(_) => Finding::good("cgroups", "v2 with cpu, memory, pids"),
        Err(error) => {
            let error = error.to_string();
            // The module's sentences end with what to do.
            let (found, advice) = error
                .split_once("; ")
                .unwrap_or((&error, "mount cgroup v2"));
            Finding::failure("cgroups", found, advice)
        }
    }
}

fn program(tool: &'static str, package: &str, purpose: &str) -> Finding {
    let places = [
        "/usr/sbin",
        "/usr/bin",
        "/sbin",
        "/bin",
        "/usr/local/sbin",
        "/usr/local/bin",
    ];
    match places
        .iter()
        .map(|place| Path::new(place).join(tool))
        .find(|path| path.exists())
    {
        Some(path) => Finding::good(tool, path.display().to_string()),
        None => Finding::failure(
            tool,
            format!("is missing; it {purpose}"),
            format!("install it: apt install {package}"),
        ),
    }
}

fn pod_network() -> Finding {
    let name = "pod network";
    if !is_root() {
        return Finding::warning(
            name,
            "not tried, which takes root",
            "run this check as root",
        );
    }
    match network::trial() {
        Ok(()) => Finding::good(name, "bridge, veth, tun, mirred and nftables work"),
        Err(reason) => Finding::failure(
            name,
            reason,
            "load the modules: modprobe -a bridge veth tun sch_ingress cls_u32 act_mirred nf_tables",
        ),
    }
}

/// Whether frames between ports of a bridge pass the host's translation, as answers of services must.
fn bridged_answers() -> Finding {
    let name = "bridged answers";
    let on = fs::read_to_string("/proc/sys/net/bridge/bridge-nf-call-iptables");
    if on.is_ok_and(|on| on.trim() == "1") {
        return Finding::good(name, "br_netfilter shows them to the host's rules");
    }
    Finding::warning(
        name,
        "the host's rules do not see them",
        "with kube-proxy and CNI's bridge plugin, so that pods reach services of their own node: \
         modprobe br_netfilter && sysctl -w net.bridge.bridge-nf-call-iptables=1",
    )
}

/// Whether other firewalls of this host let the embedded bridge's pods through; nothing where CNI
/// plugins see to that.
fn forwarding() -> Option<Finding> {
    let name = "forwarding";
    if !is_root() || network::Config::default().cni.is_dir() {
        return None;
    }
    let closed = network::closed_firewalls();
    if closed.is_empty() {
        return Some(Finding::good(name, "no firewall is in the pods' way"));
    }
    Some(Finding::warning(
        name,
        format!("{} drops what it has no rule for", closed.join(", ")),
        "pods on the embedded bridge reach only this host and each other, until they are let through: \
         iptables -I FORWARD -i bulkhead+ -j ACCEPT && iptables -I FORWARD -o bulkhead+ -m conntrack \
         --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT; or in that table of nft, iifname and oifname \
         \"bulkhead*\"",
    ))
}

/// Guests mount images, not the host; only the tests of the image store do it here.
fn erofs(needed: bool) -> Finding {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let modules = fs::read_to_string(format!("/lib/modules/{release}/modules.dep"));
    let there = known.split_whitespace().any(|word| word == "erofs")
        || modules.unwrap_or_default().contains("/erofs.ko");
    if there {
        return Finding::good("erofs", "this kernel can look into images");
    }
    let advice = "pods do not need it; to look into an image, boot a kernel with CONFIG_EROFS_FS";
    let grade = if needed {
        Finding::failure
    } else {
        Finding::warning
    };
    grade(
        "erofs",
        "this kernel cannot look into images".to_owned(),
        advice.to_owned(),
    )
}

fn nx_huge_pages() -> Option<Finding> {
    let value = fs::read_to_string("/sys/module/kvm/parameters/nx_huge_pages").ok()?;
    let name = "kvm.nx_huge_pages";
    Some(match value.trim() {
        "Y" | "1" | "force" => Finding::warning(
            name,
            "on: a worker thread is made for every VM, which delays its start",
            "it guards against guests that stop the host (iTLB multihit); where guests may be \
             trusted that far, boot with kvm.nx_huge_pages=never",
        ),
        _ => Finding::good(name, "off: VMs start without a worker thread"),
    })
}

fn favordynmods() -> Option<Finding> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let options = mounts.lines().find_map(|line| {
        let (_, kind) = line.split_once(" - cgroup2 ")?;
        line.split_whitespace()
            .nth(4)
            .filter(|place| *place == "/sys/fs/cgroup")?;
        Some(kind)
    })?;
    let name = "cgroup favordynmods";
    Some(if options.contains("favordynmods") {
        Finding::good(name, "on: processes enter cgroups without delay")
    } else {
        Finding::warning(
            name,
            "off: a process that enters a cgroup may wait some milliseconds",
            "mount -o remount,favordynmods /sys/fs/cgroup",
        )
    })
}
