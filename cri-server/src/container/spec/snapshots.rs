//! Whole requests and the whole of what the guest is told for them, in the files of `snapshots/`.
//!
//! After a change that is meant: `BULKHEAD_RENEW_SNAPSHOTS=1 cargo test -p bulkhead snapshots`, and
//! read what it has changed.

use std::fs;
use std::path::Path as FilePath;

use serde_json::{Value, json};

use super::*;

const RENEW: &str = "BULKHEAD_RENEW_SNAPSHOTS";
/// Lines shown around a difference.
const CONTEXT: usize = 3;

/// Holds a plan against the file `name`.
fn hold(name: &str, plan: &Plan) {
    let path = FilePath::new(env!("CARGO_MANIFEST_DIR"))
        .join("src/container/spec/snapshots")
        .join(format!("{name}.json"));
    let now = text(plan);
    if std::env::var_os(RENEW).is_some() {
        fs::write(&path, &now).unwrap();
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        now == kept,
        "{}, set {RENEW}=1 if this is meant:\n{}",
        path.display(),
        difference(&kept, &now)
    );
}

fn text(plan: &Plan) -> String {
    let mut spec = serde_json::to_value(&plan.spec).unwrap();
    // Sets in the specification's crate, which come in any order.
    if let Some(sets) = spec.pointer_mut("/process/capabilities") {
        for names in sets.as_object_mut().unwrap().values_mut() {
            let names = names.as_array_mut().unwrap();
            names.sort_by_key(Value::to_string);
        }
    }
    let files = plan.files.iter().map(|file| {
        json!({
            "host_path": file.host_path,
            "container_path": file.container_path,
            "read_only": file.read_only,
        })
    });
    let whole = json!({
        "spec": spec,
        "files": files.collect::<Vec<_>>(),
        "profile": plan.profile,
        "strict_groups": plan.strict_groups,
        "pid_target": plan.pid_target,
    });
    format!("{whole:#}\n")
}

/// The lines that differ, with those around them.
fn difference(before: &str, after: &str) -> String {
    let (before, after): (Vec<_>, Vec<_>) = (before.lines().collect(), after.lines().collect());
    let equal = |(a, b): &(&&str, &&str)| a == b;
    let start = before.iter().zip(&after).take_while(equal).count();
    let rest = before[start..]
        .iter()
        .rev()
        .zip(after[start..].iter().rev());
    let end = rest.take_while(equal).count();
    let mut lines = Vec::new();
    let mut show = |sign: &str, part: &[&str]| {
        lines.extend(part.iter().map(|line| format!("{sign} {line}")));
    };
    let ended = before.len() - end;
    show(" ", &before[start.saturating_sub(CONTEXT)..start]);
    show("-", &before[start..ended]);
    show("+", &after[start..after.len() - end]);
    show(" ", &before[ended..before.len().min(ended + CONTEXT)]);
    lines.join("\n")
}

#[test]
fn a_difference_is_shown_by_its_lines() {
    let shown = difference("a\nb\nc\nd\ne\nf", "a\nb\nc\nX\nY\ne\nf");
    assert_eq!(shown, "  a\n  b\n  c\n- d\n+ X\n+ Y\n  e\n  f");
}

fn image() -> ImageDefaults {
    ImageDefaults {
        entrypoint: vec!["/entry".into()],
        cmd: vec!["serve".into()],
        env: vec!["COLOUR=red".into(), "PATH=/image".into()],
        working_dir: "/srv".into(),
        user: "www:web".into(),
    }
}

#[test]
fn a_container_that_asks_for_nothing() {
    let container = cri::ContainerConfig::default();
    let pod = cri::PodSandboxConfig::default();
    hold("plain", &plan(&container, &pod, &image()).unwrap());
}

#[test]
fn a_container_that_asks_for_all_it_can() {
    let options = cri::NamespaceOption {
        pid: cri::NamespaceMode::Target.into(),
        target_id: "c1".into(),
        ..Default::default()
    };
    let security = cri::LinuxContainerSecurityContext {
        capabilities: Some(cri::Capability {
            add_capabilities: vec!["NET_ADMIN".into()],
            drop_capabilities: vec!["ALL".into()],
            add_ambient_capabilities: vec!["NET_ADMIN".into()],
        }),
        namespace_options: Some(options),
        run_as_user: Some(cri::Int64Value { value: 1000 }),
        run_as_group: Some(cri::Int64Value { value: 2000 }),
        readonly_rootfs: true,
        supplemental_groups: vec![5, 6],
        supplemental_groups_policy: cri::SupplementalGroupsPolicy::Strict.into(),
        no_new_privs: true,
        masked_paths: vec!["/proc/kcore".into()],
        readonly_paths: vec!["/proc/sys".into()],
        seccomp: Some(cri::SecurityProfile {
            profile_type: cri::security_profile::ProfileType::Localhost.into(),
            localhost_ref: "/var/lib/kubelet/seccomp/a.json".into(),
        }),
        ..Default::default()
    };
    let limits = cri::LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 50_000,
        cpu_shares: 512,
        memory_limit_in_bytes: 64 << 20,
        memory_swap_limit_in_bytes: 64 << 20,
        oom_score_adj: 500,
        cpuset_cpus: "0-1".into(),
        cpuset_mems: "0".into(),
        unified: [("memory.high".into(), "33554432".into())].into(),
        ..Default::default()
    };
    let container = cri::ContainerConfig {
        command: vec!["/own".into()],
        args: vec!["one".into(), "two".into()],
        working_dir: "/work".into(),
        envs: vec![cri::KeyValue {
            key: "COLOUR".into(),
            value: "blue=green".into(),
        }],
        mounts: vec![cri::Mount {
            container_path: "/etc/hosts".into(),
            host_path: "/var/lib/kubelet/pods/p/etc-hosts".into(),
            readonly: true,
            ..Default::default()
        }],
        devices: vec![cri::Device {
            host_path: "/dev/fuse".into(),
            container_path: "/dev/fuse".into(),
            permissions: "rw".into(),
        }],
        tty: true,
        linux: Some(cri::LinuxContainerConfig {
            resources: Some(limits),
            security_context: Some(security),
        }),
        ..Default::default()
    };
    let pod = cri::PodSandboxConfig {
        hostname: "web-0".into(),
        ..Default::default()
    };
    let mut plan = plan(&container, &pod, &image()).unwrap();
    let path = plan.profile.clone().unwrap();
    let profile = r#"{"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1,
        "architectures": ["SCMP_ARCH_X86_64"], "flags": ["SECCOMP_FILTER_FLAG_LOG"],
        "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": 3, "op": "SCMP_CMP_EQ"}]}]}"#;
    plan.confine(&path, profile).unwrap();
    hold("full", &plan);
}

#[test]
fn a_container_that_is_privileged() {
    let security = cri::LinuxContainerSecurityContext {
        privileged: true,
        // What does not hold for it.
        no_new_privs: true,
        masked_paths: vec!["/proc/kcore".into()],
        readonly_paths: vec!["/proc/sys".into()],
        seccomp: Some(cri::SecurityProfile::default()),
        ..Default::default()
    };
    let container = cri::ContainerConfig {
        linux: Some(cri::LinuxContainerConfig {
            security_context: Some(security),
            ..Default::default()
        }),
        ..Default::default()
    };
    let linux = cri::LinuxPodSandboxConfig {
        security_context: Some(cri::LinuxSandboxSecurityContext {
            privileged: true,
            ..Default::default()
        }),
        ..Default::default()
    };
    let pod = cri::PodSandboxConfig {
        linux: Some(linux),
        ..Default::default()
    };
    hold("privileged", &plan(&container, &pod, &image()).unwrap());
}
