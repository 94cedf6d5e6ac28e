use super::*;
use serde_json::json;

fn places() -> Places {
    Places {
        cgroup: "/cgroup".into(),
        image: "/image".into(),
        scratch: "/scratch".into(),
        files: vec![("/etc/hosts".into(), "/files/0".into(), true)],
        shared_pids: false,
        mapping: None,
    }
}

fn planned(spec: &Value) -> Result<Plan, PlanError> {
    container(&read_spec(spec.to_string().as_bytes())?, &places())
}

/// What a widely used library takes for a container's specification, without a name of its own.
fn usual() -> Value {
    let mut spec = oci_spec::runtime::Spec::default();
    spec.set_hostname(None);
    serde_json::to_value(spec).unwrap()
}

#[test]
fn the_usual_specification_is_carried_out() {
    let plan = planned(&usual()).unwrap();
    assert_eq!(plan.program.arguments, ["sh"]);
    assert_eq!(
        plan.program.capabilities.bounding,
        1 << 29 | 1 << 5 | 1 << 10
    );
    assert_eq!(plan.program.limits, [(libc::RLIMIT_NOFILE, 1024, 1024)]);
    let Place::New { tree, .. } = plan.place else {
        unreachable!()
    };
    assert!(tree.read_only && tree.masked.contains(&"/proc/kcore".to_owned()));
    let of = |target: &str| {
        let at = tree.mounts.iter().position(|mount| mount.target == target);
        &tree.mounts[at.unwrap()].source
    };
    assert_eq!(*of("/dev"), Source::Devices);
    let shared = Source::Bind {
        path: "/dev/shm".into(),
        recursive: false,
    };
    assert_eq!(*of("/dev/shm"), shared);
    assert!(matches!(of("/etc/hosts"), Source::Bind { .. }));
    let with_devices = tree
        .mounts
        .iter()
        .filter(|mount| mount.options.attributes.set & crate::mount::NO_DEV == 0)
        .map(|mount| mount.target.as_str())
        .collect::<Vec<_>>();
    assert_eq!(with_devices, ["/dev/pts"]);
}

#[test]
fn what_is_not_carried_out_is_refused_by_its_name() {
    for (path, value) in [
        ("/hooks", json!({"poststop": [{"path": "/bin/x"}]})),
        (
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
        ),
        ("/linux/sysctl", json!({"kernel.msgmax": "1"})),
        ("/linux/uidMappings", json!([{"size": 1}])),
    ] {
        let mut spec = usual();
        let (parent, name) = path.rsplit_once('/').unwrap();
        spec.pointer_mut(parent).unwrap()[name] = value;
        let refused = planned(&spec).unwrap_err().to_string();
        let name = path.trim_start_matches('/').replace('/', ".");
        assert!(refused.starts_with(&name), "{refused}");
    }
}

#[test]
fn a_field_that_is_not_carried_out_may_stay_empty() {
    for (field, why) in refusal::REFUSED {
        let with = |value: Value| {
            let mut spec = usual();
            let path = format!("/{}", field.replace('.', "/"));
            let (parent, name) = path.rsplit_once('/').unwrap();
            spec.pointer_mut(parent).unwrap()[name] = value;
            planned(&spec)
        };
        let empty = json!(null);
        assert!(with(empty).is_ok(), "{field}");
        let refused = with(json!("something")).unwrap_err();
        assert_eq!(refused, PlanError::Refused { field, why });
    }
}

#[test]
fn an_execs_process_is_refused_as_a_containers() {
    let mut process = usual()["process"].take();
    assert!(read_process(process.to_string().as_bytes()).is_ok());
    process["ioPriority"] = json!({"class": "IOPRIO_CLASS_RT"});
    let refused = read_process(process.to_string().as_bytes()).unwrap_err();
    let (field, why) = ("process.ioPriority", "I/O priorities are not set");
    assert_eq!(refused, PlanError::Refused { field, why });
}

#[test]
fn values_without_sense_are_named() {
    for (path, value) in [
        ("/process/args", json!([])),
        ("/process/cwd", json!("relative")),
        ("/process/env", json!(["A=\u{0}"])),
        ("/process/capabilities/bounding", json!(["CAP_FLY"])),
        (
            "/process/rlimits",
            json!([{"type": "RLIMIT_FUN", "soft": 1, "hard": 1}]),
        ),
        ("/mounts", json!([{"destination": "/", "type": "tmpfs"}])),
        ("/linux/maskedPaths", json!(["/"])),
        ("/linux/readonlyPaths", json!(["/proc/kcore", "//."])),
        ("/mounts", json!([{"destination": "/a", "type": "nfs"}])),
        (
            "/mounts",
            json!([{"destination": "/a", "type": "bind", "source": "b"}]),
        ),
    ] {
        let mut spec = usual();
        let (parent, name) = path.rsplit_once('/').unwrap();
        spec.pointer_mut(parent).unwrap()[name] = value;
        let field = path.split('/').nth(1).unwrap();
        match planned(&spec) {
            Err(PlanError::Invalid { field: named, .. }) => {
                assert!(named.starts_with(field), "{path}: {named}");
            }
            other => panic!("{path}: {other:?}"),
        }
    }
}

#[test]
fn arguments_and_environment_have_room_for_a_mebibyte_together() {
    let with = |bytes: usize| {
        let mut spec = usual();
        spec["process"]["args"] = json!(["a"]);
        spec["process"]["env"] = json!(["x".repeat(bytes)]);
        planned(&spec)
    };
    assert!(with((1 << 20) - 1).is_ok());
    let refusal = with(1 << 20).unwrap_err().to_string();
    assert!(refusal.contains("1 MiB"), "{refusal}");
}
