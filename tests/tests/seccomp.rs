//! Which system calls containers may make.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use bulkhead_cri_api::v1::*;
use bulkhead_tests::cri::refused;
use bulkhead_tests::node::WEB;
use bulkhead_tests::request::{
    Ended, Pod, container, number, pod_security, security, shell, sleeper,
};
use bulkhead_tests::{Node, suite};
use security_profile::ProfileType;
use tonic::Code;

suite! {
    without_a_profile_containers_are_not_confined,
    default_list_forbids_what_reaches_out,
    default_list_leaves_what_programs_use,
    default_list_grows_with_capabilities,
    filters_leave_users_and_capabilities_as_they_are,
    privileged_containers_are_not_confined,
    profile_of_the_node_is_applied,
    profile_holds_for_execs,
    profile_can_kill,
    profile_of_a_thousand_rules_is_applied,
    profile_need_not_allow_what_the_runtime_does,
    profiles_by_word_are_known,
    profiles_that_cannot_be_used_are_refused_by_name,
    programs_of_32_bits_run_under_the_default_list,
}

/// Prints what calls come to: 0, or the error's number. The first leaves the layout of memory as it
/// is from now on, which only an unconfined process may do.
const PROBE: &str = r#"
sub try {
    my ($name, $number, @arguments) = @_;
    print "$name ", (syscall($number, @arguments) < 0 ? $! + 0 : 0), "\n";
}
try("personality", 135, 0x40000);
try("ask-personality", 135, 0xffffffff);
try("unshare-user", 272, 0x10000000);
try("clone-user", 56, 0x10000000, 0, 0, 0, 0) if $ARGV[0] eq "default";
try("clone3", 435, 0, 0);
try("keyctl", 250, 0, 0, 0, 0, 0);
try("bpf", 321, 0, 0, 0);
try("kexec", 246, 0, 0, 0, 0);
try("userfaultfd", 323, 0);
try("later-than-all", 999);
"#;

fn probe(pod: &Pod, node: &Node, name: &str, change: fn(&mut ContainerConfig)) -> Result<Ended> {
    let image = node.image(WEB)?;
    let mut config = container(name, &image, &["/usr/bin/perl", "-e", PROBE, name]);
    change(&mut config);
    pod.run_to_end(&config)
}

/// Has a container ask for a profile.
fn confine(config: &mut ContainerConfig, kind: ProfileType, reference: &str) {
    security(config).seccomp = Some(SecurityProfile {
        profile_type: kind.into(),
        localhost_ref: reference.to_owned(),
    });
}

fn confine_by_default(config: &mut ContainerConfig) {
    confine(config, ProfileType::RuntimeDefault, "");
}

/// A profile on the node, to be asked for by its path.
fn profile(node: &Node, name: &str, text: &str) -> Result<PathBuf> {
    let path = node.scratch().join(format!("{name}.json"));
    fs::write(&path, text)?;
    Ok(path)
}

/// A shell's line under a profile.
fn confined(node: &Node, name: &str, profile: &Path, line: &str) -> Result<ContainerConfig> {
    let mut config = shell(name, &node.base()?, line);
    let path = profile.display().to_string();
    confine(&mut config, ProfileType::Localhost, &path);
    Ok(config)
}

const NO_MKDIR: &str = r#"{"defaultAction": "SCMP_ACT_ALLOW",
    "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
    "syscalls": [{"names": ["mkdir", "mkdirat", "no_such_call"],
                  "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]}"#;

fn without_a_profile_containers_are_not_confined(node: &Node) -> Result<()> {
    let pod = node.pod("nothing")?;
    let unconfined = |config: &mut ContainerConfig| confine(config, ProfileType::Unconfined, "");
    for (name, change) in [
        ("nil", (|_| {}) as fn(&mut ContainerConfig)),
        ("unconfined", unconfined),
    ] {
        let said = probe(&pod, node, name, change)?.stdout();
        for line in ["personality 0", "unshare-user 0"] {
            ensure!(said.lines().any(|found| found == line), "{name}: {said}");
        }
    }
    Ok(())
}

fn default_list_forbids_what_reaches_out(node: &Node) -> Result<()> {
    let pod = node.pod("default")?;
    let said = probe(&pod, node, "default", confine_by_default)?.stdout();
    let expected = "personality 1\nask-personality 0\nunshare-user 1\nclone-user 1\nclone3 38\n\
        keyctl 1\nbpf 1\nkexec 1\nuserfaultfd 1\nlater-than-all 38\n";
    ensure!(said == expected, "{said}");
    Ok(())
}

fn default_list_leaves_what_programs_use(node: &Node) -> Result<()> {
    let pod = node.pod("default")?;
    let script = "use Socket; use POSIX; \
        socketpair(my $a, my $b, AF_UNIX, SOCK_STREAM, 0) or die; \
        socket(my $c, PF_INET, SOCK_DGRAM, 0) or die; \
        mkdir '/tmp/d' or die; rename '/tmp/d', '/tmp/e' or die; chown 1, 1, '/tmp/e' or die; \
        open(my $pipe, '-|', 'echo child') or die; print <$pipe>; close $pipe or die; \
        mkfifo('/tmp/fifo', 0600) or die; kill 0, $$ or die; print qq(fine\n);";
    let image = node.image(WEB)?;
    let mut config = container("perl", &image, &["/usr/bin/perl", "-e", script]);
    confine_by_default(&mut config);
    let ended = pod.run_to_end(&config)?;
    ensure!(
        ended.stdout() == "child\nfine\n",
        "{:?} {:?}",
        ended.stdout(),
        ended.stderr()
    );
    Ok(())
}

fn default_list_grows_with_capabilities(node: &Node) -> Result<()> {
    let pod = node.pod("capable")?;
    let line = "unshare -m true && echo namespace; mkdir -p /tmp/r/bin; \
        cp /bin/busybox /tmp/r/bin/; chroot /tmp/r /bin/busybox echo root";
    for (name, add, drop, expected) in [
        ("usual", None, None, "root\n"),
        (
            "admin",
            Some("SYS_ADMIN"),
            Some("SYS_CHROOT"),
            "namespace\n",
        ),
    ] {
        let mut config = shell(name, &node.base()?, line);
        confine_by_default(&mut config);
        security(&mut config).capabilities = Some(Capability {
            add_capabilities: add.into_iter().map(str::to_owned).collect(),
            drop_capabilities: drop.into_iter().map(str::to_owned).collect(),
            ..Capability::default()
        });
        let ended = pod.run_to_end(&config)?;
        ensure!(
            ended.stdout() == expected,
            "{name}: {:?} {:?}",
            ended.stdout(),
            ended.stderr()
        );
    }
    Ok(())
}

fn filters_leave_users_and_capabilities_as_they_are(node: &Node) -> Result<()> {
    let pod = node.pod("rights")?;
    // The set every engine grants; a user's program has none of it.
    let (usual, none) = ("00000000a80425fb", "0000000000000000");
    for (name, user, no_new_privs, held) in [
        ("root", 0, false, usual),
        ("root-no-new", 0, true, usual),
        ("user", 1000, false, none),
        ("user-no-new", 1000, true, none),
    ] {
        let line = "grep -E '^(Uid|CapPrm|CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status";
        let mut config = shell(name, &node.base()?, line);
        confine_by_default(&mut config);
        security(&mut config).run_as_user = number(user);
        security(&mut config).no_new_privs = no_new_privs;
        let said = pod.run_to_end(&config)?.stdout();
        let expected = format!(
            "Uid:\t{user}\t{user}\t{user}\t{user}\nCapPrm:\t{held}\nCapEff:\t{held}\n\
             CapBnd:\t{usual}\nNoNewPrivs:\t{}\nSeccomp:\t2\n",
            u8::from(no_new_privs)
        );
        ensure!(said == expected, "{name}: {said}");
    }
    Ok(())
}

fn privileged_containers_are_not_confined(node: &Node) -> Result<()> {
    let mut config = node.pod_config("privileged")?;
    pod_security(&mut config).privileged = true;
    let pod = Pod::run(node.cri()?, config)?;
    let privileged = |config: &mut ContainerConfig| {
        confine_by_default(config);
        security(config).privileged = true;
    };
    let said = probe(&pod, node, "privileged", privileged)?.stdout();
    ensure!(said.contains("\nunshare-user 0\n"), "{said}");
    Ok(())
}

fn profile_of_the_node_is_applied(node: &Node) -> Result<()> {
    let pod = node.pod("localhost")?;
    let path = profile(node, "no-mkdir", NO_MKDIR)?;
    let line = "mkdir /tmp/d; touch /tmp/f && echo touched";
    let ended = pod.run_to_end(&confined(node, "mkdir", &path, line)?)?;
    ensure!(ended.stdout() == "touched\n", "{:?}", ended.stdout());
    ensure!(
        ended.stderr().contains("not supported"),
        "{:?}",
        ended.stderr()
    );
    Ok(())
}

fn profile_holds_for_execs(node: &Node) -> Result<()> {
    let pod = node.pod("exec")?;
    let path = profile(node, "no-mkdir", NO_MKDIR)?;
    let mut config = sleeper("sleeper", &node.base()?);
    confine(
        &mut config,
        ProfileType::Localhost,
        &path.display().to_string(),
    );
    let id = pod.start(&config)?;
    // The profile is read once.
    fs::remove_file(&path)?;
    let reply = node.cri()?.exec_for(&id, &["mkdir", "/tmp/d"], 0)?;
    let stderr = String::from_utf8_lossy(&reply.stderr);
    ensure!(
        reply.exit_code == 1 && stderr.contains("not supported"),
        "{stderr}"
    );
    Ok(())
}

fn profile_can_kill(node: &Node) -> Result<()> {
    let pod = node.pod("kill")?;
    let text = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["mkdir"], "action": "SCMP_ACT_KILL_PROCESS"}]}"#;
    let path = profile(node, "kill", text)?;
    let config = confined(node, "mkdir", &path, "exec mkdir /tmp/d")?;
    let status = pod.run_to_end(&config)?.status;
    // SIGSYS is 31.
    ensure!(status.exit_code == 128 + 31, "{}", status.exit_code);
    Ok(())
}

fn profile_of_a_thousand_rules_is_applied(node: &Node) -> Result<()> {
    let pod = node.pod("thousand")?;
    let rule = |at: u32| {
        let name = if at < 500 { "personality" } else { "mkdir" };
        let args = match at {
            0..500 => format!(
                r#"{{"index": 0, "value": {}, "op": "SCMP_CMP_EQ"}}"#,
                at + 4096
            ),
            _ => String::new(),
        };
        format!(
            r#"{{"names": ["{name}"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95,
                "args": [{args}]}}"#
        )
    };
    let rules: Vec<_> = (0..1000).map(rule).collect();
    let text = format!(
        r#"{{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{}]}}"#,
        rules.join(",")
    );
    let path = profile(node, "thousand", &text)?;
    let script = "for (4095, 4096, 4300, 4595, 4596) { \
        print syscall(135, $_) < 0 ? $! + 0 : 0, ' ' } print mkdir('/tmp/d') ? 0 : $! + 0;";
    let image = node.image(WEB)?;
    let mut config = container("perl", &image, &["/usr/bin/perl", "-e", script]);
    confine(
        &mut config,
        ProfileType::Localhost,
        &path.display().to_string(),
    );
    let said = pod.run_to_end(&config)?.stdout();
    ensure!(said == "0 95 95 95 0 95", "{said}");
    Ok(())
}

fn profile_need_not_allow_what_the_runtime_does(node: &Node) -> Result<()> {
    let pod = node.pod("strict")?;
    // What a static program that says a word calls, and not a call that changes users.
    let text = r#"{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"action": "SCMP_ACT_ALLOW",
        "names": ["execve", "brk", "arch_prctl", "set_tid_address", "set_robust_list", "rseq",
                  "prlimit64", "readlink", "readlinkat", "getrandom", "mprotect", "mmap",
                  "write", "writev", "fstat", "newfstatat", "exit_group"]}]}"#;
    let path = profile(node, "strict", text)?;
    for (name, user) in [("strict-root", 0), ("strict-user", 1000)] {
        let mut config = container(name, &node.base()?, &["/bin/echo", "word"]);
        confine(
            &mut config,
            ProfileType::Localhost,
            &path.display().to_string(),
        );
        security(&mut config).run_as_user = number(user);
        let ended = pod.run_to_end(&config)?;
        ensure!(
            ended.stdout() == "word\n",
            "{name}: {:?} {:?}",
            ended.status,
            ended.stderr()
        );
    }
    Ok(())
}

#[allow(deprecated)]
fn profiles_by_word_are_known(node: &Node) -> Result<()> {
    let pod = node.pod("word")?;
    let path = profile(node, "no-mkdir", NO_MKDIR)?;
    let localhost = format!("localhost/{}", path.display());
    for (name, word, expected) in [
        ("default", "runtime/default", "d\n"),
        ("localhost", localhost.as_str(), "n\n"),
        ("unconfined", "unconfined", "n\nd\n"),
    ] {
        let line = "unshare -U true 2> /dev/null && echo n; mkdir /tmp/d 2> /dev/null && echo d; :";
        let mut config = shell(name, &node.base()?, line);
        security(&mut config).seccomp_profile_path = word.to_owned();
        let said = pod.run_to_end(&config)?.stdout();
        ensure!(said == expected, "{name}: {said:?}");
    }
    Ok(())
}

fn profiles_that_cannot_be_used_are_refused_by_name(node: &Node) -> Result<()> {
    let pod = node.pod("refused")?;
    let mut cases = vec![
        ("absent", "/no/such/profile.json".to_owned(), "No such file"),
        ("relative", "profile.json".to_owned(), "absolute"),
        ("directory", "/etc".to_owned(), "regular file"),
        ("device", "/dev/zero".to_owned(), "regular file"),
    ];
    let large = format!("{{}}{}", " ".repeat(1 << 20));
    for (name, text, why) in [
        ("broken", "{\"defaultAction\": ", "EOF"),
        ("large", &large, "1 MiB"),
        ("empty", "{}", "defaultAction"),
        (
            "action",
            r#"{"defaultAction": "SCMP_ACT_FLY"}"#,
            "SCMP_ACT_FLY",
        ),
        (
            "notify",
            r#"{"defaultAction": "SCMP_ACT_NOTIFY"}"#,
            "SCMP_ACT_NOTIFY",
        ),
        (
            "listener",
            r#"{"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/x"}"#,
            "listenerPath",
        ),
        (
            "conditional",
            r#"{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["bpf"],
                "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_BPF"]}}]}"#,
            "includes",
        ),
        (
            "misspelt",
            r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscals": [{"names": ["bpf"],
                "action": "SCMP_ACT_ERRNO"}]}"#,
            "syscals",
        ),
        (
            "twice",
            r#"{"defaultAction": "SCMP_ACT_ERRNO", "defaultAction": "SCMP_ACT_ALLOW"}"#,
            "duplicate",
        ),
    ] {
        let path = profile(node, name, text)?.display().to_string();
        cases.push((name, path, why));
    }
    for (name, reference, why) in cases {
        let mut config = sleeper(name, &node.base()?);
        confine(&mut config, ProfileType::Localhost, &reference);
        let answer = pod.cri.create(&pod.id, &config, &pod.config);
        let message = refused(answer, &[Code::InvalidArgument])?;
        ensure!(message.contains(why), "{name}: {message}");
    }
    // What cannot be had is not left behind half made.
    let end = pod.run_to_end(&shell("after", &node.base()?, "echo on"))?;
    ensure!(end.stdout() == "on\n", "{:?}", end.stdout());
    Ok(())
}

/// A static program for i386: it writes a line, calls `number`, and exits with the error's number.
fn i386(number: u32) -> Vec<u8> {
    const BASE: u32 = 0x0804_8000;
    const HEADERS: u32 = 84;
    const LINE: &[u8] = b"32 bits\n";
    let set = |register: u8, value: u32| [&[0xb8 + register], &value.to_le_bytes()[..]].concat();
    let (eax, edx, ecx, ebx) = (0, 2, 1, 3);
    let call = vec![0xcd, 0x80];
    let code = |line: u32| {
        [
            // write(1, line, length)
            set(eax, 4),
            set(ebx, 1),
            set(ecx, line),
            set(edx, LINE.len() as u32),
            call.clone(),
            // number(0, …)
            set(eax, number),
            set(ebx, 0),
            call.clone(),
            // neg eax; mov ebx, eax; exit(ebx)
            vec![0xf7, 0xd8, 0x89, 0xc3],
            set(eax, 1),
            call.clone(),
        ]
        .concat()
    };
    let line = BASE + HEADERS + code(0).len() as u32;
    let code = code(line);
    let size = HEADERS + (code.len() + LINE.len()) as u32;
    // ELFCLASS32, little endian, ET_EXEC, EM_386; one segment to read and execute.
    let halves: [u16; 2] = [2, 3];
    let words = [1, BASE + HEADERS, 52, 0, 0];
    let sizes: [u16; 6] = [52, 32, 1, 0, 0, 0];
    let segment = [1, 0, BASE, BASE, size, size, 5, 4096];
    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend(halves.iter().flat_map(|half| half.to_le_bytes()));
    file.extend(words.iter().flat_map(|word: &u32| word.to_le_bytes()));
    file.extend(sizes.iter().flat_map(|half| half.to_le_bytes()));
    file.extend(segment.iter().flat_map(|word: &u32| word.to_le_bytes()));
    file.extend(code);
    file.extend(LINE);
    file
}

fn programs_of_32_bits_run_under_the_default_list(node: &Node) -> Result<()> {
    let pod = node.pod("i386")?;
    // What i386 numbers so: getuid32 is allowed and answers 0, keyctl is not allowed.
    for (name, number, expected) in [("getuid32", 199, 0), ("keyctl", 288, 1)] {
        let path = node.scratch().join(name);
        fs::write(&path, i386(number))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        let mut config = container(name, &node.base()?, &["/program"]);
        config.mounts.push(Mount {
            container_path: "/program".to_owned(),
            host_path: path.display().to_string(),
            readonly: true,
            ..Mount::default()
        });
        confine_by_default(&mut config);
        let ended = pod.run_to_end(&config)?;
        ensure!(ended.stdout() == "32 bits\n", "{name}: {:?}", ended.status);
        ensure!(
            ended.status.exit_code == expected,
            "{name}: {}",
            ended.status.exit_code
        );
    }
    Ok(())
}
