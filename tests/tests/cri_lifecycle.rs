//! The ends of containers, and containers that behave badly: the pod is as it was.

use anyhow::{Context, Result, ensure};
use bulkhead_cri_api::v1::*;
use bulkhead_tests::request::{Pod, container, pod_security, resources, shell, sleeper};
use bulkhead_tests::usage::Usage;
use bulkhead_tests::{Cri, Node, suite};

suite! {
    created_container_is_stopped_without_effect,
    signals_give_their_exit_code,
    orphans_end_with_their_container,
    zombies_of_execs_are_reaped,
    container_that_kills_all_it_can_harms_nobody,
    container_without_stdio_runs_to_its_end,
    fork_bomb_leaves_its_neighbours_alone,
    memory_hog_leaves_its_neighbours_alone,
}

fn exec_works(cri: &Cri, id: &str) -> Result<()> {
    ensure!(cri.shell(id, "echo fine")? == "fine", "an exec");
    Ok(())
}

fn created_container_is_stopped_without_effect(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("unstarted")?;
    let id = pod.create(&sleeper("unstarted", &node.base()?))?;
    cri.stop(&id, 10)?;
    let state = cri.container(&id)?.state();
    ensure!(state == ContainerState::ContainerCreated, "{state:?}");
    cri.start(&id)?;
    exec_works(cri, &id)?;
    cri.remove(&id)?;
    Ok(())
}

fn signals_give_their_exit_code(node: &Node) -> Result<()> {
    let pod = node.pod("signals")?;
    let image = node.base()?;
    // A child's end by a signal is its parent's to tell; the shell tells it the usual way.
    for (signal, wanted) in [("TERM", 143), ("KILL", 137), ("SEGV", 139)] {
        let line = format!("sh -c 'kill -{signal} $$'; exit $?");
        let config = shell(&signal.to_lowercase(), &image, &line);
        let status = pod.run_to_end(&config)?.status;
        ensure!(status.exit_code == wanted, "{signal}: {status:?}");
        ensure!(status.reason == "Error", "{signal}: {status:?}");
    }
    let id = pod.start(&container("killed", &image, &["sleep", "1000"]))?;
    pod.cri.stop(&id, 0)?;
    let status = pod.cri.container(&id)?;
    ensure!(
        status.exit_code == 137 && status.reason == "Error",
        "{status:?}"
    );
    ensure!(
        status.created_at <= status.started_at && status.started_at <= status.finished_at,
        "{status:?}"
    );
    Ok(())
}

fn orphans_end_with_their_container(node: &Node) -> Result<()> {
    let mut config = node.pod_config("orphans")?;
    // In one PID namespace the end of a container's process does not take the others with it.
    let namespaces = pod_security(&mut config).namespace_options.as_mut();
    namespaces.context("no namespaces")?.pid = NamespaceMode::Pod.into();
    let pod = Pod::run(node.cri()?, config)?;
    let image = node.base()?;
    let shared = |mut config: ContainerConfig| {
        let security = bulkhead_tests::request::security(&mut config);
        let options = security.namespace_options.get_or_insert_default();
        options.pid = NamespaceMode::Pod.into();
        config
    };
    let watcher = pod.start(&shared(sleeper("watcher", &image)))?;
    let line = "setsid sh -c 'sleep 7654 & sleep 7654' & sleep 1; exit 0";
    let config = shared(shell("parent", &image, line));
    let status = pod.run_to_end(&config)?.status;
    ensure!(status.exit_code == 0, "{status:?}");
    let count = "ps -o args | grep -c '^sleep 7654' || true";
    let left = pod.cri.shell(&watcher, count)?;
    ensure!(left == "0", "{left} processes of an ended container go on");
    Ok(())
}

fn zombies_of_execs_are_reaped(node: &Node) -> Result<()> {
    let pod = node.pod("zombies")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    exec_works(pod.cri, &id)?;
    let before = Usage::settled(&pod)?;
    // Each leaves children whose parent has ended.
    for _ in 0..10 {
        pod.cri
            .shell(&id, "for i in 1 2 3; do (sleep 0.1 &) ; done")?;
    }
    Usage::returns_to(&before, &pod)
}

fn container_that_kills_all_it_can_harms_nobody(node: &Node) -> Result<()> {
    let pod = node.pod("killer")?;
    let image = node.base()?;
    let neighbour = pod.start(&sleeper("neighbour", &image))?;
    let line = "kill -9 $PPID; kill -9 1; kill -9 -1; echo alive; exit 0";
    let ended = pod.run_to_end(&shell("killer", &image, line))?;
    ensure!(ended.stdout() == "alive\n", "{:?}", ended.stderr());
    exec_works(pod.cri, &neighbour)
}

fn container_without_stdio_runs_to_its_end(node: &Node) -> Result<()> {
    let pod = node.pod("mute")?;
    let line = "exec <&- >&- 2>&-; sleep 1; exit 4";
    let config = shell("mute", &node.base()?, line);
    let ended = pod.run_to_end(&config)?;
    ensure!(ended.status.exit_code == 4, "{:?}", ended.status);
    // Input that nobody reads is in nobody's way.
    let mut config = shell("deaf", &node.base()?, "sleep 1; exit 5");
    config.stdin = true;
    let ended = pod.run_to_end(&config)?;
    ensure!(ended.status.exit_code == 5, "{:?}", ended.status);
    Ok(())
}

fn fork_bomb_leaves_its_neighbours_alone(node: &Node) -> Result<()> {
    let pod = node.pod("bomb")?;
    let image = node.base()?;
    let neighbour = pod.start(&sleeper("neighbour", &image))?;
    let line = "bomb() { bomb & bomb & sleep 1000; }; bomb; sleep 1000";
    let mut config = shell("bomb", &image, line);
    resources(&mut config).memory_limit_in_bytes = 64 << 20;
    let id = pod.start(&config)?;
    for _ in 0..5 {
        exec_works(pod.cri, &neighbour)?;
    }
    pod.cri.stop(&id, 0)?;
    let status = pod.cri.container(&id)?;
    ensure!(status.exit_code == 137, "{status:?}");
    pod.start(&sleeper("later", &image))?;
    exec_works(pod.cri, &neighbour)
}

fn memory_hog_leaves_its_neighbours_alone(node: &Node) -> Result<()> {
    let pod = node.pod("hog")?;
    let image = node.base()?;
    let neighbour = pod.start(&sleeper("neighbour", &image))?;
    // No limit of its own: it meets that of the machine.
    let hog = container("hog", &image, &["tail", "/dev/zero"]);
    let status = pod.run_to_end(&hog)?.status;
    ensure!(status.exit_code == 137, "{status:?}");
    ensure!(status.reason == "OOMKilled", "{status:?}");
    exec_works(pod.cri, &neighbour)
}
