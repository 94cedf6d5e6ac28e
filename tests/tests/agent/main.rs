//! The guest agent alone: booted by the VMM, driven over its own interface.

// A test ends by a panic.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod guest;
mod terminal;

use bulkhead_agent_api::v1::{self as api, Stdio};
use guest::{Ask, Guest};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Code;

const CAPABILITIES: [&str; 6] = [
    "CAP_CHOWN",
    "CAP_KILL",
    "CAP_SETUID",
    "CAP_SETGID",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
];

/// A process as a server would ask for.
fn process(arguments: &[&str]) -> Value {
    json!({
        "user": {"uid": 0, "gid": 0},
        "args": arguments,
        "env": ["PATH=/bin"],
        "cwd": "/",
        "noNewPrivileges": true,
        "capabilities": {
            "bounding": CAPABILITIES,
            "effective": CAPABILITIES,
            "permitted": CAPABILITIES,
        },
    })
}

/// A container's specification as a server would send.
fn spec(arguments: &[&str]) -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": process(arguments),
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
        ],
        "linux": {
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "cgroup"}, {"type": "network"},
            ],
            "maskedPaths": ["/etc/secret", "/secrets", "/proc/not-there"],
            "readonlyPaths": ["/proc/sys", "/proc/irq"],
        },
    })
}

fn create(guest: &Guest, id: &str, spec: &Value) -> api::CreateContainerRequest {
    api::CreateContainerRequest {
        operation_id: guest.operation(),
        container_id: id.into(),
        spec: serde_json::to_vec(spec).unwrap(),
        image_serial: "image".into(),
        ..api::CreateContainerRequest::default()
    }
}

async fn start(guest: &mut Guest, id: &str) -> Result<(), tonic::Status> {
    let request = api::StartContainerRequest {
        operation_id: guest.operation(),
        container_id: id.into(),
    };
    guest.agent.start_container(request).await.map(drop)
}

async fn wait(guest: &mut Guest, id: &str, exec: &str) -> api::Exit {
    let request = api::WaitRequest {
        container_id: id.into(),
        exec_id: exec.into(),
    };
    guest
        .agent
        .wait(request)
        .await
        .unwrap()
        .into_inner()
        .exit
        .unwrap()
}

async fn remove(guest: &mut Guest, id: &str) {
    let request = api::RemoveContainerRequest {
        operation_id: guest.operation(),
        container_id: id.into(),
    };
    guest.agent.remove_container(request).await.unwrap();
}

async fn signal(guest: &mut Guest, id: &str, signal: u32, all: bool) {
    let request = api::SignalRequest {
        operation_id: guest.operation(),
        container_id: id.into(),
        exec_id: String::new(),
        signal,
        all,
    };
    guest.agent.signal(request).await.unwrap();
}

/// Runs a container to its end: standard output, standard error, exit.
async fn run(guest: &mut Guest, id: &str, spec: &Value) -> (String, String, api::Exit) {
    let request = create(guest, id, spec);
    guest.agent.create_container(request).await.unwrap();
    start(guest, id).await.unwrap();
    let output = guest.output(id, "", Stdio::Stdout).await;
    let errors = guest.output(id, "", Stdio::Stderr).await;
    let exit = wait(guest, id, "").await;
    remove(guest, id).await;
    (output, errors, exit)
}

/// Runs a shell script in a container to its end; its standard output.
async fn script(guest: &mut Guest, id: &str, script: &str) -> String {
    let (output, errors, exit) = run(guest, id, &spec(&["sh", "-c", script])).await;
    assert_eq!((exit.code, errors.as_str()), (0, ""), "{output}");
    output
}

/// Runs a shell script as an exec; its output, both streams together, and exit code.
async fn exec(guest: &mut Guest, id: &str, exec: &str, script: &str) -> (String, i32) {
    let request = api::ExecRequest {
        operation_id: guest.operation(),
        container_id: id.into(),
        exec_id: exec.into(),
        process: serde_json::to_vec(&process(&["sh", "-c", script])).unwrap(),
        stdin: false,
    };
    guest.agent.exec(request).await.unwrap();
    let mut output = guest.output(id, exec, Stdio::Stdout).await;
    output += &guest.output(id, exec, Stdio::Stderr).await;
    let exit = wait(guest, id, exec).await;
    let request = api::RemoveExecRequest {
        operation_id: guest.operation(),
        container_id: id.into(),
        exec_id: exec.into(),
    };
    guest.agent.remove_exec(request).await.unwrap();
    (output, exit.code)
}

#[tokio::test]
async fn a_container_runs_and_its_streams_and_exit_code_arrive() {
    let mut guest = Guest::boot().await;
    guest.prepare().await;
    let program = spec(&["sh", "-c", "echo to out; echo to err >&2; exit 7"]);
    let (output, errors, exit) = run(&mut guest, "c1", &program).await;
    assert_eq!((output.as_str(), errors.as_str()), ("to out\n", "to err\n"));
    assert_eq!((exit.code, exit.oom_killed, exit.lost_bytes), (7, false, 0));
    assert!(exit.finished_at_nanoseconds > 1_700_000_000_000_000_000);
    guest.end().await;
}

#[tokio::test]
async fn a_container_sees_its_own_world_only() {
    let mut guest = Guest::boot().await;
    guest.prepare().await;
    let seen = script(
        &mut guest,
        "c1",
        "echo pid $$; hostname; cat /etc/resolv.conf; pwd; ls /sys/fs/cgroup | grep -c procs;
         cat /proc/self/cgroup; ls -d /run 2>/dev/null; ls /proc/self/fd | wc -l;
         touch /sys/x 2>/dev/null || echo sys ro; echo x 2>/dev/null > /proc/sys/kernel/hostname || echo proc ro;
         wc -c < /etc/secret; ls /secrets | wc -l; touch /written && echo root rw; grep -c NoNewPrivs:.1 /proc/self/status;
         grep CapEff /proc/self/status; grep Seccomp: /proc/self/status; ls /dev | wc -l",
    )
    .await;
    let lines: Vec<&str> = seen.lines().collect();
    let expected = ["pid 1", "pod-of-tests", "nameserver 192.0.2.1", "/"];
    assert_eq!(lines[..4], expected, "{seen}");
    for line in ["0::/", "sys ro", "proc ro", "root rw"] {
        assert!(lines.contains(&line), "{line}: {seen}");
    }
    assert!(seen.contains("CapEff:\t00000000080004e1"), "{seen}");
    assert!(seen.contains("Seccomp:\t2"), "{seen}");
    guest.end().await;
}

#[tokio::test]
async fn nobody_in_a_container_can_speak_vsock_or_open_the_pods_disks() {
    let mut guest = Guest::boot().await;
    guest.prepare().await;
    let seen = script(
        &mut guest,
        "c1",
        "mknod /disk b 254 0 && cat /disk 2>&1 | head -c 200; mknod /dev/disk b 254 0; cat /dev/disk 2>&1 | head -c 200",
    )
    .await;
    assert_eq!(seen.matches("Permission denied").count(), 2, "{seen}");
    guest.end().await;
}

#[tokio::test]
async fn devices_of_the_specification_are_nodes_but_never_the_pods_disks() {
    let mut guest = Guest::boot().await;
    guest.prepare().await;
    let line = "stat -c '%a %u %g %F' /dev/own /dev/queue; (: < /dev/own) && echo read; \
                (: > /dev/own) 2>/dev/null || echo read only";
    let mut program = spec(&["sh", "-c", line]);
    program["linux"]["devices"] = json!([
        {"path": "/dev/own", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640, "uid": 7},
        {"path": "/dev/queue", "type": "p", "gid": 8},
    ]);
    program["linux"]["resources"] = json!({"devices": [
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "r"},
    ]});
    let (output, errors, _) = run(&mut guest, "c1", &program).await;
    let expected = "640 7 0 character special file\n666 0 8 fifo\nread\nread only\n";
    assert_eq!((output.as_str(), errors.as_str()), (expected, ""));
    let disk = json!({"path": "/dev/disk", "type": "b", "major": 254, "minor": 0});
    let absent = json!({"path": "/dev/absent", "type": "c", "major": 4001, "minor": 0});
    for (device, why) in [(disk, "disk of the pod"), (absent, "does not exist")] {
        program["linux"]["devices"] = json!([device]);
        let request = create(&guest, "c2", &program);
        let status = guest.agent.create_container(request).await.unwrap_err();
        assert!(status.message().contains(why), "{status}");
    }
    guest.end().await;
}

#[tokio::test]
async fn user_groups_and_directory_are_those_of_the_specification() {
    let mut guest = Guest::boot().await;
    guest.prepare().await;
    let mut program = spec(&[
        "sh",
        "-c",
        "id -u; id -g; id -G; pwd; echo $HOME; echo again > /dev/stdout; umask",
    ]);
    program["process"]["user"] =
        json!({"uid": 1000, "gid": 1000, "additionalGids": [5, 6], "umask": 0o77});
    program["process"]["cwd"] = "/home/user/made".into();
    let (output, errors, exit) = run(&mut guest, "c1", &program).await;
    let expected = "1000\n1000\n1000 5 6\n/home/user/made\n/home/user\nagain\n0077\n";
    assert_eq!(
        (output.as_str(), errors.as_str(), exit.code),
        (expected, "", 0)
    );
    program["process"]["user"] = json!({"uid": 0, "gid": 0, "username": "user:logs"});
    program["process"]["args"] = json!(["id", "-G"]);
    let request = create(&guest, "c2", &program);
    let made = guest
        .agent
        .create_container(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (made.uid, made.gid, made.supplementary_gids),
        (1000, 40, vec![40])
    );
    start(&mut guest, "c2").await.unwrap();
    assert_eq!(guest.output("c2", "", Stdio::Stdout).await, "40\n");
    guest.end().await;
}

#[tokio::test]
async fn the_scratch_disk_fills_its_device_and_keeps_each_container_its_own_changes() {
    let mut guest = Guest::boot().await;
    guest.prepare().await;
    let space = "df -m / | tail -n1 | awk '{ print ($2 > 200) }'; touch /etc/mine; ls /etc/mine";
    assert_eq!(script(&mut guest, "c1", space).await, "1\n/etc/mine\n");
    let seen = script(&mut guest, "c2", "ls /etc/mine 2>&1 || echo absent").await;
    assert!(seen.ends_with("absent\n"), "{seen}");
    guest.end().await;
}

#[tokio::test]
async fn a_program_that_cannot_run_is_named_with_the_reason() {
    let mut guest = Guest::boot().await;
    guest.prepare().await;
    for (id, program, words) in [
        (
            "c1",
            "/bin/nothing",
            "cannot execute /bin/nothing: No such file",
        ),
        (
            "c2",
            "nothing",
            "nothing: executable file not found in $PATH",
        ),
        (
            "c3",
            "/etc/passwd",
            "cannot execute /etc/passwd: Permission denied",
        ),
        (
            "c4",
            "/bin/no-program",
            "cannot execute /bin/no-program: Exec format error",
        ),
    ] {
        let request = create(&guest, id, &spec(&[program]));
        guest.agent.create_container(request).await.unwrap();
        let status = start(&mut guest, id).await.unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert!(status.message().contains(words), "{}", status.message());
        assert_eq!(wait(&mut guest, id, "").await.code, 128);
        remove(&mut guest, id).await;
    }
    guest.end().await;
}

#[tokio::test]
async fn an_exec_joins_the_container() {
    let mut guest = Guest::boot().await;
    guest.prepare().await;
    let request = create(
        &guest,
        "c1",
        &spec(&["sh", "-c", "echo here > /mark; exec sleep 1000"]),
    );
    guest.agent.create_container(request).await.unwrap();
    start(&mut guest, "c1").await.unwrap();
    let joined = "while ! test -s /mark; do sleep 0.1; done; cat /mark; cat /proc/1/comm;
                  grep Seccomp: /proc/self/status; cat /proc/self/cgroup; exit 3";
    let (output, code) = exec(&mut guest, "c1", "e1", joined).await;
    assert_eq!(
        (output.as_str(), code),
        ("here\nsleep\nSeccomp:\t2\n0::/\n", 3)
    );
    signal(&mut guest, "c1", 9, true).await;
    assert_eq!(wait(&mut guest, "c1", "").await.code, 137);
    remove(&mut guest, "c1").await;
    guest.end().await;
}

#[tokio::test]
async fn memory_beyond_the_limit_is_an_oom_kill() {
    let mut guest = Guest::boot().await;
    guest.prepare().await;
    let mut program = spec(&["awk", "BEGIN { s = \"xxxxxxxx\"; while (1) s = s s }"]);
    program["linux"]["resources"] = json!({"memory": {"limit": 32 << 20, "swap": 32 << 20}, "pids": {"limit": 50}, "cpu": {"shares": 512}});
    let (_, _, exit) = run(&mut guest, "c1", &program).await;
    assert_eq!((exit.code, exit.oom_killed), (137, true));
    guest.end().await;
}

#[tokio::test]
async fn output_survives_the_loss_of_every_stream() {
    let mut guest = Guest::boot().await;
    guest.prepare().await;
    let request = create(&guest, "c1", &spec(&["sh", "-c", "seq 1 300000"]));
    guest.agent.create_container(request).await.unwrap();
    start(&mut guest, "c1").await.unwrap();
    let mut all = Vec::new();
    let mut buffer = vec![0; 50_000];
    for _ in 0..4 {
        let offset = all.len() as u64;
        let (greeting, mut stream) = guest.stream("c1", "", Stdio::Stdout, offset).await;
        assert_eq!(greeting.offset, offset);
        for _ in 0..3 {
            let length = stream.read(&mut buffer).await.unwrap();
            all.extend_from_slice(&buffer[..length]);
        }
        // Written, but the acknowledgement is lost with the server.
        guest.commands.send(Ask::Cut).await.map_err(drop).unwrap();
        drop(stream);
        while guest.agent.identify(api::IdentifyRequest {}).await.is_err() {}
    }
    let (_, stream) = guest
        .stream("c1", "", Stdio::Stdout, all.len() as u64)
        .await;
    let offset = all.len();
    let mut stream = stream;
    loop {
        let length = stream.read(&mut buffer).await.unwrap();
        if length == 0 {
            break;
        }
        all.extend_from_slice(&buffer[..length]);
        stream
            .write_all(&(all.len() as u64).to_le_bytes())
            .await
            .unwrap();
    }
    assert!(all.len() > offset);
    let expected: String = (1..=300_000).map(|number| format!("{number}\n")).collect();
    assert!(all == expected.as_bytes(), "{} bytes", all.len());
    let _ = guest.output("c1", "", Stdio::Stderr).await;
    let exit = wait(&mut guest, "c1", "").await;
    assert_eq!((exit.code, exit.lost_bytes), (0, 0));
    guest.end().await;
}

#[tokio::test]
async fn stdin_reaches_the_process_and_ends() {
    let mut guest = Guest::boot().await;
    guest.prepare().await;
    let mut request = create(&guest, "c1", &spec(&["cat"]));
    request.stdin = true;
    guest.agent.create_container(request).await.unwrap();
    start(&mut guest, "c1").await.unwrap();
    let (_, mut stdin) = guest.stream("c1", "", Stdio::Stdin, 0).await;
    stdin.write_all(b"typed\n").await.unwrap();
    stdin.shutdown().await.unwrap();
    assert_eq!(guest.output("c1", "", Stdio::Stdout).await, "typed\n");
    let _ = guest.output("c1", "", Stdio::Stderr).await;
    assert_eq!(wait(&mut guest, "c1", "").await.code, 0);
    guest.end().await;
}

#[tokio::test]
async fn a_shared_pid_namespace_shows_the_pods_containers_to_each_other() {
    let mut guest = Guest::boot().await;
    guest
        .prepare_with(|request| request.shared_pid_namespace = true)
        .await;
    let sharing = |arguments: &[&str]| {
        let mut sharing = spec(arguments);
        sharing["linux"]["namespaces"] = json!([{"type": "mount"}]);
        sharing
    };
    let request = create(&guest, "c1", &sharing(&["sleep", "1000"]));
    guest.agent.create_container(request).await.unwrap();
    start(&mut guest, "c1").await.unwrap();
    let line = "ps; ls /proc/1/root 2>&1 | head -n1";
    let (seen, ..) = run(&mut guest, "c2", &sharing(&["sh", "-c", line])).await;
    assert!(
        seen.contains("sleep 1000") && seen.contains("pause"),
        "{seen}"
    );
    signal(&mut guest, "c1", 15, false).await;
    assert_eq!(wait(&mut guest, "c1", "").await.code, 143);
    guest.end().await;
}

#[tokio::test]
async fn repeated_operations_answer_the_same_and_wrong_requests_say_what_is_wrong() {
    let mut guest = Guest::boot().await;
    guest.prepare().await;
    let request = create(&guest, "c1", &spec(&["true"]));
    let first = guest.agent.create_container(request.clone()).await.unwrap();
    let again = guest.agent.create_container(request).await.unwrap();
    assert_eq!(first.into_inner(), again.into_inner());
    let twice = create(&guest, "c1", &spec(&["true"]));
    let status = guest.agent.create_container(twice).await.unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists);
    let mut wrong = create(&guest, "c2", &spec(&["true"]));
    wrong.image_serial = "absent".into();
    let status = guest.agent.create_container(wrong).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert!(status.message().contains("absent"), "{}", status.message());
    let mut hooked = spec(&["true"]);
    hooked["hooks"] = json!({"prestart": [{"path": "/bin/true"}]});
    let hooked = create(&guest, "c2", &hooked);
    let status = guest.agent.create_container(hooked).await.unwrap_err();
    assert!(status.message().contains("hooks"), "{}", status.message());
    remove(&mut guest, "c1").await;
    let request = api::ListContainersRequest {};
    let listed = guest.agent.list_containers(request).await.unwrap();
    assert!(listed.into_inner().containers.is_empty());
    guest.end().await;
}

#[tokio::test]
async fn a_disk_leaves_when_no_container_uses_it() {
    let mut guest = Guest::boot().await;
    guest.prepare().await;
    let home = tempfile::tempdir().unwrap();
    let other = guest::image(home.path());
    let window = guest.plug("other", &other, true).await;
    let mut request = api::AttachDiskRequest {
        operation_id: guest.operation(),
        window: window.into(),
        serial: "expected".into(),
    };
    let status = guest.agent.attach_disk(request.clone()).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(
        status.message().contains("\"other\""),
        "{}",
        status.message()
    );
    request.operation_id = guest.operation();
    request.serial = "other".into();
    guest.agent.attach_disk(request).await.unwrap();
    let mut container = create(&guest, "c1", &spec(&["true"]));
    container.image_serial = "other".into();
    guest.agent.create_container(container).await.unwrap();
    let mut detach = api::DetachDiskRequest {
        operation_id: guest.operation(),
        window: window.into(),
        serial: "other".into(),
    };
    let status = guest.agent.detach_disk(detach.clone()).await.unwrap_err();
    assert!(
        status.message().contains("in use by c1"),
        "{}",
        status.message()
    );
    remove(&mut guest, "c1").await;
    detach.operation_id = guest.operation();
    guest.agent.detach_disk(detach).await.unwrap();
    let (reply, answer) = tokio::sync::oneshot::channel();
    guest
        .commands
        .send(Ask::Detach(window, reply))
        .await
        .map_err(drop)
        .unwrap();
    answer.await.unwrap();
    assert_eq!(guest.plug("third", &other, true).await, window);
    guest.end().await;
}
