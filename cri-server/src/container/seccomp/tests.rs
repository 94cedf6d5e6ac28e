use super::*;

use oci_spec::runtime::{Capability, LinuxSeccompAction, LinuxSyscall};

fn profile(kind: ProfileType, reference: &str) -> cri::LinuxContainerSecurityContext {
    cri::LinuxContainerSecurityContext {
        seccomp: Some(cri::SecurityProfile {
            profile_type: kind.into(),
            localhost_ref: reference.to_owned(),
        }),
        ..Default::default()
    }
}

#[allow(deprecated)]
fn word(word: &str) -> cri::LinuxContainerSecurityContext {
    cri::LinuxContainerSecurityContext {
        seccomp_profile_path: word.to_owned(),
        ..Default::default()
    }
}

#[test]
fn a_profile_is_asked_for_in_either_form() {
    let file = || Asked::File("/var/lib/kubelet/seccomp/a.json".into());
    let path = "/var/lib/kubelet/seccomp/a.json";
    for (security, expected) in [
        (
            cri::LinuxContainerSecurityContext::default(),
            Asked::Unconfined,
        ),
        (profile(ProfileType::Unconfined, ""), Asked::Unconfined),
        (profile(ProfileType::RuntimeDefault, ""), Asked::Default),
        (profile(ProfileType::Localhost, path), file()),
        (
            profile(ProfileType::Localhost, &format!("localhost/{path}")),
            file(),
        ),
        (word("unconfined"), Asked::Unconfined),
        (word("runtime/default"), Asked::Default),
        (word("docker/default"), Asked::Default),
        (word(&format!("localhost/{path}")), file()),
    ] {
        assert_eq!(asked(&security).unwrap(), expected, "{security:?}");
    }
}

#[test]
fn the_newer_form_wins_and_a_privileged_container_is_unconfined() {
    let both = cri::LinuxContainerSecurityContext {
        seccomp: profile(ProfileType::Unconfined, "").seccomp,
        ..word("runtime/default")
    };
    assert_eq!(asked(&both).unwrap(), Asked::Unconfined);
    let mut privileged = profile(ProfileType::Localhost, "nowhere");
    privileged.privileged = true;
    assert_eq!(asked(&privileged).unwrap(), Asked::Unconfined);
}

#[test]
fn a_profile_that_cannot_be_meant_is_refused_by_name() {
    for (security, named) in [
        (profile(ProfileType::Localhost, ""), "absolute"),
        (profile(ProfileType::Localhost, "a.json"), "a.json"),
        (word("localhost/a.json"), "localhost/a.json"),
        (word("none"), "none"),
    ] {
        let refused = asked(&security).unwrap_err().to_string();
        assert!(refused.contains(named), "{refused}");
        assert!(refused.contains(FIELD), "{refused}");
    }
    let mut strange = profile(ProfileType::Localhost, "/x");
    strange.seccomp.get_or_insert_default().profile_type = 7;
    assert!(asked(&strange).unwrap_err().to_string().contains('7'));
}

#[test]
fn only_a_small_regular_file_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("profile.json");
    std::fs::write(&path, "{}").unwrap();
    assert_eq!(read(&path).unwrap(), "{}");
    let refuse = |path: &Path, why: &str| {
        let refused = read(path).unwrap_err().to_string();
        assert!(refused.contains(&*path.to_string_lossy()), "{refused}");
        assert!(refused.contains(why), "{refused}");
    };
    refuse(directory.path(), "regular file");
    refuse(&directory.path().join("absent"), "No such file");
    std::fs::write(&path, [0xff, 0xfe]).unwrap();
    refuse(&path, "UTF-8");
    std::fs::write(&path, vec![b' '; LARGEST as usize + 1]).unwrap();
    refuse(&path, "1 MiB");
}

#[test]
fn a_files_profile_is_the_specifications() {
    let path = Path::new("/profiles/a.json");
    let parsed = parse(
        path,
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "archMap": [], "comment": "passed over",
            "defaultErrnoRet": 1, "defaultErrno": "EPERM", "architectures": [], "flags": [],
            "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5,
                          "errno": "EIO", "args": [], "comment": "", "includes": {},
                          "excludes": null}]}"#,
    );
    let parsed = parsed.unwrap();
    assert_eq!(parsed.default_action(), LinuxSeccompAction::ScmpActAllow);
    let rules = parsed.syscalls().clone().unwrap();
    assert_eq!(rules[0].errno_ret(), Some(5));
    for (text, why) in [
        ("{", "EOF"),
        ("[]", "invalid type"),
        ("{}", "defaultAction"),
        (r#"{"defaultAction": "SCMP_ACT_FLY"}"#, "SCMP_ACT_FLY"),
        (
            r#"{"defaultAction": "SCMP_ACT_ALLOW", "archMap": [{}]}"#,
            "archMap",
        ),
        (
            r#"{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [
                {"names": ["bpf"], "action": "SCMP_ACT_ALLOW",
                 "includes": {"caps": ["CAP_BPF"]}}]}"#,
            "includes",
        ),
        (
            r#"{"defaultAction": "SCMP_ACT_ALLOW", "defaultAction": "SCMP_ACT_ERRNO"}"#,
            "duplicate field `defaultAction`",
        ),
        (
            r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscals": []}"#,
            "\"syscals\"",
        ),
        (
            r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
                {"names": ["bpf"], "action": "SCMP_ACT_ERRNO", "errno": "EIO"}]}"#,
            "errno",
        ),
        (
            r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
                {"names": ["bpf"], "action": "SCMP_ACT_ERRNO", "arg": []}]}"#,
            "\"arg\"",
        ),
        (
            r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
                {"names": ["bpf"], "names": ["kill"], "action": "SCMP_ACT_ERRNO"}]}"#,
            "duplicate field `names`",
        ),
        (
            r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
                {"names": ["kill"], "action": "SCMP_ACT_ERRNO", "args": [
                    {"index": 1, "value": 9, "valuetwo": 1, "op": "SCMP_CMP_EQ"}]}]}"#,
            "\"valuetwo\"",
        ),
    ] {
        let refused = parse(path, text).unwrap_err().to_string();
        assert!(refused.contains("/profiles/a.json"), "{refused}");
        assert!(refused.contains(why), "{refused}");
    }
}

/// The rules about a call in the default list.
fn rules(name: &str, capabilities: &[Capability]) -> Vec<LinuxSyscall> {
    let bounding = capabilities.iter().copied().collect();
    let all = default_profile(&bounding)
        .unwrap()
        .syscalls()
        .clone()
        .unwrap();
    all.into_iter()
        .filter(|rule| rule.names().iter().any(|known| known == name))
        .collect()
}

#[test]
fn the_default_list_has_what_capabilities_permit() {
    let allowed = |name, capabilities: &[Capability]| {
        let always = |rule: &LinuxSyscall| {
            rule.action() == LinuxSeccompAction::ScmpActAllow && rule.args().is_none()
        };
        rules(name, capabilities).iter().any(always)
    };
    assert!(allowed("read", &[]) && allowed("ptrace", &[]));
    for name in [
        "keyctl",
        "add_key",
        "kexec_load",
        "userfaultfd",
        "swapon",
        "pivot_root",
        "io_uring_setup",
    ] {
        assert!(!allowed(name, &[Capability::SysAdmin]), "{name}");
    }
    for (name, capability) in [
        ("mount", Capability::SysAdmin),
        ("unshare", Capability::SysAdmin),
        ("clone", Capability::SysAdmin),
        ("clone3", Capability::SysAdmin),
        ("chroot", Capability::SysChroot),
        ("clock_settime", Capability::SysTime),
        ("finit_module", Capability::SysModule),
        ("syslog", Capability::Syslog),
        ("bpf", Capability::Bpf),
        ("perf_event_open", Capability::Perfmon),
        ("reboot", Capability::SysBoot),
    ] {
        assert!(allowed(name, &[capability]), "{name}");
        assert!(!allowed(name, &[Capability::Chown]), "{name}");
    }
}

#[test]
fn the_default_list_makes_no_namespaces_without_the_capability() {
    let clone = rules("clone", &[]);
    let condition = clone[0].args().clone().unwrap()[0];
    assert_eq!(
        (condition.value(), condition.value_two()),
        (0x7e02_0000, Some(0))
    );
    let clone3 = rules("clone3", &[]);
    assert_eq!(clone3[0].errno_ret(), Some(38));
    assert!(
        rules("clone3", &[Capability::SysAdmin])[0]
            .errno_ret()
            .is_none()
    );
}
