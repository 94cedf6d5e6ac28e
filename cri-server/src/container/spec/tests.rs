use super::*;

use oci_spec::runtime::Process;

fn image() -> ImageDefaults {
    ImageDefaults {
        entrypoint: vec!["/entry".into()],
        cmd: vec!["serve".into()],
        env: vec!["COLOUR=red".into(), "PATH=/image".into()],
        working_dir: "/srv".into(),
        user: "www:web".into(),
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| word.to_string()).collect()
}

fn secured(security: cri::LinuxContainerSecurityContext) -> cri::ContainerConfig {
    cri::ContainerConfig {
        linux: Some(cri::LinuxContainerConfig {
            security_context: Some(security),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// One that may have privileged containers.
fn pod() -> cri::PodSandboxConfig {
    let security = cri::LinuxSandboxSecurityContext {
        privileged: true,
        ..Default::default()
    };
    pod_with(security)
}

fn pod_with(security: cri::LinuxSandboxSecurityContext) -> cri::PodSandboxConfig {
    cri::PodSandboxConfig {
        linux: Some(cri::LinuxPodSandboxConfig {
            security_context: Some(security),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn planned(container: &cri::ContainerConfig) -> Spec {
    plan(container, &pod(), &image()).unwrap().spec
}

fn process_of(container: &cri::ContainerConfig) -> Process {
    planned(container).process().clone().unwrap()
}

#[test]
fn command_and_args_replace_what_the_image_says() {
    let table: [(&[&str], &[&str], &[&str]); 4] = [
        (&[], &[], &["/entry", "serve"]),
        (&[], &["x"], &["/entry", "x"]),
        (&["/own"], &[], &["/own"]),
        (&["/own"], &["x"], &["/own", "x"]),
    ];
    for (command, args, expected) in table {
        let container = cri::ContainerConfig {
            command: words(command),
            args: words(args),
            ..Default::default()
        };
        assert_eq!(process_of(&container).args(), &Some(words(expected)));
    }
}

#[test]
fn without_any_program_the_container_is_refused() {
    let refused = plan(
        &cri::ContainerConfig::default(),
        &cri::PodSandboxConfig::default(),
        &ImageDefaults::default(),
    );
    assert!(matches!(
        refused,
        Err(SpecError::Invalid {
            field: "command",
            ..
        })
    ));
}

#[test]
fn the_containers_environment_wins_over_the_images() {
    let pod = cri::PodSandboxConfig {
        hostname: "web-0".into(),
        ..Default::default()
    };
    let container = cri::ContainerConfig {
        envs: vec![cri::KeyValue {
            key: "COLOUR".into(),
            value: "blue=green".into(),
        }],
        ..Default::default()
    };
    let spec = plan(&container, &pod, &image()).unwrap().spec;
    let expected = words(&["PATH=/image", "HOSTNAME=web-0", "COLOUR=blue=green"]);
    assert_eq!(spec.process().as_ref().unwrap().env(), &Some(expected));
}

#[test]
fn a_path_is_there_even_if_nobody_sets_one() {
    let container = cri::ContainerConfig {
        command: words(&["/x"]),
        ..Default::default()
    };
    let bare = ImageDefaults::default();
    let plan = plan(&container, &cri::PodSandboxConfig::default(), &bare).unwrap();
    let process = plan.spec.process().clone().unwrap();
    assert_eq!(
        process.env(),
        &Some(vec![format!("PATH={}", process::DEFAULT_PATH)])
    );
    assert_eq!(process.cwd(), std::path::Path::new("/"));
    assert_eq!(process.user().username(), &Some("0".to_owned()));
}

#[test]
fn users_keep_their_names_and_numbers_are_filled_in() {
    let number = |value| Some(cri::Int64Value { value });
    let user = |security| process_of(&secured(security)).user().clone();
    let of_image = user(cri::LinuxContainerSecurityContext::default());
    assert_eq!(of_image.username(), &Some("www:web".to_owned()));
    let numbers = user(cri::LinuxContainerSecurityContext {
        run_as_user: number(1000),
        run_as_group: number(2000),
        supplemental_groups: vec![5, 6],
        ..Default::default()
    });
    assert_eq!((numbers.uid(), numbers.gid()), (1000, 2000));
    assert_eq!(numbers.additional_gids(), &Some(vec![5, 6]));
    let name = user(cri::LinuxContainerSecurityContext {
        run_as_username: "mail".into(),
        ..Default::default()
    });
    assert_eq!(name.username(), &Some("mail".to_owned()));
}

#[test]
fn a_security_context_reaches_the_spec() {
    let spec = planned(&secured(cri::LinuxContainerSecurityContext {
        readonly_rootfs: true,
        no_new_privs: true,
        masked_paths: words(&["/proc/kcore"]),
        readonly_paths: words(&["/proc/sys"]),
        ..Default::default()
    }));
    let process = spec.process().clone().unwrap();
    assert_eq!(spec.root().as_ref().unwrap().readonly(), Some(true));
    assert_eq!(process.no_new_privileges(), Some(true));
    let linux = spec.linux().clone().unwrap();
    assert_eq!(linux.masked_paths(), &Some(words(&["/proc/kcore"])));
    assert_eq!(linux.readonly_paths(), &Some(words(&["/proc/sys"])));
}

#[test]
fn a_privileged_container_is_root_of_the_guest() {
    let spec = planned(&secured(cri::LinuxContainerSecurityContext {
        privileged: true,
        no_new_privs: true,
        masked_paths: words(&["/proc/kcore"]),
        ..Default::default()
    }));
    let process = spec.process().clone().unwrap();
    assert_eq!(process.no_new_privileges(), Some(false));
    let bounding = process.capabilities().clone().unwrap().bounding().clone();
    assert_eq!(bounding.unwrap().len(), 41);
    assert_eq!(
        spec.linux().clone().unwrap().masked_paths(),
        &Some(Vec::new())
    );
}

#[test]
fn a_seccomp_profile_reaches_the_spec() {
    let profile = |kind, reference: &str| {
        secured(cri::LinuxContainerSecurityContext {
            seccomp: Some(cri::SecurityProfile {
                profile_type: kind,
                localhost_ref: reference.into(),
            }),
            ..Default::default()
        })
    };
    let seccomp = |spec: &Spec| spec.linux().clone().unwrap().seccomp().clone();
    assert_eq!(seccomp(&planned(&cri::ContainerConfig::default())), None);
    let default = seccomp(&planned(&profile(0, ""))).unwrap();
    assert_eq!(default.default_errno_ret(), Some(1));
    assert_eq!(seccomp(&planned(&profile(1, ""))), None);
    let container = profile(2, "/a.json");
    let pod = cri::PodSandboxConfig::default();
    let mut plan = plan(&container, &pod, &image()).unwrap();
    let path = plan.profile.take().unwrap();
    assert_eq!(path, Path::new("/a.json"));
    assert!(plan.confine(&path, "{}").is_err());
    plan.confine(&path, r#"{"defaultAction": "SCMP_ACT_LOG"}"#)
        .unwrap();
    let action = seccomp(&plan.spec).unwrap().default_action();
    assert_eq!(action.to_string(), "SCMP_ACT_LOG");
}

#[test]
fn a_pid_namespace_is_made_unless_the_pod_shares_one() {
    let types = |mode: cri::NamespaceMode| {
        let spec = planned(&secured(cri::LinuxContainerSecurityContext {
            namespace_options: Some(cri::NamespaceOption {
                pid: mode.into(),
                ..Default::default()
            }),
            ..Default::default()
        }));
        let namespaces = spec.linux().clone().unwrap().namespaces().clone().unwrap();
        namespaces
            .iter()
            .map(LinuxNamespace::typ)
            .collect::<Vec<_>>()
    };
    assert!(types(cri::NamespaceMode::Container).contains(&LinuxNamespaceType::Pid));
    assert!(!types(cri::NamespaceMode::Pod).contains(&LinuxNamespaceType::Pid));
}

#[test]
fn what_a_vm_cannot_do_is_refused_by_name() {
    let refuse = |container: cri::ContainerConfig, word: &str| {
        let pod = cri::PodSandboxConfig::default();
        let refusal = plan(&container, &pod, &image()).unwrap_err().to_string();
        assert!(refusal.contains(word), "{refusal}");
    };
    let namespaces = |change: fn(&mut cri::NamespaceOption)| {
        let mut options = cri::NamespaceOption::default();
        change(&mut options);
        secured(cri::LinuxContainerSecurityContext {
            namespace_options: Some(options),
            ..Default::default()
        })
    };
    let node = cri::NamespaceMode::Node;
    refuse(
        namespaces(|o| o.set_network(cri::NamespaceMode::Node)),
        "hostNetwork",
    );
    refuse(
        namespaces(|o| o.set_pid(cri::NamespaceMode::Node)),
        "hostPID",
    );
    refuse(
        namespaces(|o| o.set_ipc(cri::NamespaceMode::Node)),
        "hostIPC",
    );
    let pod = cri::PodSandboxConfig {
        linux: Some(cri::LinuxPodSandboxConfig {
            security_context: Some(cri::LinuxSandboxSecurityContext {
                namespace_options: Some(cri::NamespaceOption {
                    network: node.into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    assert!(check_pod(&pod).is_err());
    let device = cri::ContainerConfig {
        devices: vec![cri::Device {
            host_path: "/dev/sda".into(),
            ..Default::default()
        }],
        ..Default::default()
    };
    refuse(device, "/dev/sda");
    let group = secured(cri::LinuxContainerSecurityContext {
        run_as_group: Some(cri::Int64Value { value: 1 }),
        ..Default::default()
    });
    refuse(group, "run_as_group");
    let privileged = secured(cri::LinuxContainerSecurityContext {
        privileged: true,
        ..Default::default()
    });
    refuse(privileged, "security_context.privileged");
    let labels = cri::SeLinuxOption {
        level: "s0".into(),
        ..Default::default()
    };
    let labelled = secured(cri::LinuxContainerSecurityContext {
        selinux_options: Some(labels.clone()),
        ..Default::default()
    });
    refuse(labelled, "selinux_options");
    let labelled = pod_with(cri::LinuxSandboxSecurityContext {
        selinux_options: Some(labels),
        ..Default::default()
    });
    assert!(check_pod(&labelled).is_err());
    let profile = secured(cri::LinuxContainerSecurityContext {
        apparmor: Some(cri::SecurityProfile {
            profile_type: cri::security_profile::ProfileType::Localhost.into(),
            localhost_ref: "mine".into(),
        }),
        ..Default::default()
    });
    refuse(profile, "no profile mine");
    #[allow(deprecated)]
    let old = secured(cri::LinuxContainerSecurityContext {
        apparmor_profile: "localhost/mine".into(),
        ..Default::default()
    });
    refuse(old, "apparmor_profile");
    let windows = cri::ContainerConfig {
        windows: Some(cri::WindowsContainerConfig::default()),
        ..Default::default()
    };
    refuse(windows, "windows");
    let injected = cri::ContainerConfig {
        cdi_devices: vec![cri::CdiDevice {
            name: "vendor/gpu=0".into(),
        }],
        ..Default::default()
    };
    refuse(injected, "vendor/gpu=0");
    let user = cri::UserNamespace {
        mode: cri::NamespaceMode::Pod.into(),
        ..Default::default()
    };
    let mapped = secured(cri::LinuxContainerSecurityContext {
        namespace_options: Some(cri::NamespaceOption {
            userns_options: Some(user),
            ..Default::default()
        }),
        ..Default::default()
    });
    refuse(mapped, "userns_options");
    let negative = secured(cri::LinuxContainerSecurityContext {
        run_as_user: Some(cri::Int64Value { value: -1 }),
        ..Default::default()
    });
    refuse(negative, "run_as_user");
}

#[test]
fn values_the_cri_does_not_know_are_refused_and_named() {
    let refusal = |security| {
        let refused = plan(&secured(security), &pod(), &image());
        refused.unwrap_err().to_string()
    };
    let policy = cri::LinuxContainerSecurityContext {
        supplemental_groups_policy: 9,
        ..Default::default()
    };
    assert!(refusal(policy).contains("supplemental_groups_policy"));
    let mode = cri::LinuxContainerSecurityContext {
        namespace_options: Some(cri::NamespaceOption {
            ipc: 9,
            ..Default::default()
        }),
        ..Default::default()
    };
    assert!(refusal(mode).contains("namespace_options.ipc"));
}

#[test]
fn kinds_the_cri_does_not_know_are_refused() {
    let profile = |profile_type: i32| cri::SecurityProfile {
        profile_type,
        ..Default::default()
    };
    let container = |container: cri::ContainerConfig| {
        let refusal = plan(&container, &pod(), &image()).unwrap_err().to_string();
        assert!(refusal.contains('9'), "{refusal}");
    };
    container(secured(cri::LinuxContainerSecurityContext {
        apparmor: Some(profile(9)),
        ..Default::default()
    }));
    container(cri::ContainerConfig {
        stop_signal: 99,
        ..Default::default()
    });
    container(cri::ContainerConfig {
        mounts: vec![cri::Mount {
            container_path: "/etc/hosts".into(),
            host_path: "/etc/hosts".into(),
            propagation: 9,
            ..Default::default()
        }],
        ..Default::default()
    });
    for security in [
        cri::LinuxSandboxSecurityContext {
            apparmor: Some(profile(9)),
            ..Default::default()
        },
        cri::LinuxSandboxSecurityContext {
            seccomp: Some(profile(9)),
            ..Default::default()
        },
        cri::LinuxSandboxSecurityContext {
            supplemental_groups_policy: 9,
            ..Default::default()
        },
    ] {
        let refusal = check_pod(&pod_with(security)).unwrap_err().to_string();
        assert!(refusal.contains('9'), "{refusal}");
    }
}

#[test]
fn a_target_has_a_name_and_is_no_pods() {
    let target = |id: &str| cri::NamespaceOption {
        pid: cri::NamespaceMode::Target.into(),
        target_id: id.into(),
        ..Default::default()
    };
    let container = |id| {
        secured(cri::LinuxContainerSecurityContext {
            namespace_options: Some(target(id)),
            ..Default::default()
        })
    };
    let planned = plan(&container("c1"), &pod(), &image()).unwrap();
    assert_eq!(planned.pid_target.as_deref(), Some("c1"));
    let refused = plan(&container(""), &pod(), &image()).unwrap_err();
    assert!(refused.to_string().contains("target_id"), "{refused}");
    let pod = pod_with(cri::LinuxSandboxSecurityContext {
        namespace_options: Some(target("c1")),
        ..Default::default()
    });
    assert!(check_pod(&pod).is_err());
}

#[test]
fn an_exec_runs_as_its_container_does() {
    let container = process_of(&cri::ContainerConfig::default());
    let process = exec_process(&container, &words(&["true"]), false).unwrap();
    assert_eq!(process.args(), &Some(words(&["true"])));
    assert_eq!(process.env(), container.env());
    assert_eq!(process.user(), container.user());
    assert!(exec_process(&container, &[], false).is_err());
}

#[test]
fn a_terminal_is_named_unless_the_container_says_how() {
    let mut container = cri::ContainerConfig {
        tty: true,
        ..Default::default()
    };
    let terminal = |process: &Process| -> Vec<String> {
        let variables = process.env().clone().unwrap();
        let named = |variable: &String| variable.starts_with("TERM=");
        variables.into_iter().filter(named).collect()
    };
    let process = process_of(&container);
    assert_eq!(process.terminal(), Some(true));
    assert_eq!(terminal(&process), ["TERM=xterm"]);
    let plain = exec_process(&process, &words(&["true"]), false).unwrap();
    assert_eq!(plain.terminal(), Some(false));
    container.envs = vec![cri::KeyValue {
        key: "TERM".into(),
        value: "linux".into(),
    }];
    let process = process_of(&container);
    assert_eq!(terminal(&process), ["TERM=linux"]);
    let exec = exec_process(&process, &words(&["true"]), true).unwrap();
    assert_eq!(terminal(&exec), ["TERM=linux"]);
    let without = process_of(&cri::ContainerConfig::default());
    let exec = exec_process(&without, &words(&["true"]), true).unwrap();
    assert_eq!(terminal(&exec), ["TERM=xterm"]);
}
