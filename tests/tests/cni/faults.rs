//! Plugins that fail, and a server that is killed while they work.

use anyhow::{Context, Result, ensure};
use bulkhead_cri_api::v1::PodSandboxFilter;
use bulkhead_tests::Node;
use bulkhead_tests::cri::refused;
use bulkhead_tests::leak::Machine;
use bulkhead_tests::request::Pod;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tonic::Code;

use crate::{bridge, end, home, leases, remove_bridges, run, script, server};

pub fn promise_that_is_not_kept_fails_the_pod(node: &Node) -> Result<()> {
    let text = r#"[ "$CNI_COMMAND" = ADD ] || exit 0
        nsenter --net="$CNI_NETNS" ip link add eth0 type dummy >&2
        echo '{"cniVersion": "1.0.0", "ips": [{"address": "10.5.5.5/24"}, {"address": "fd05::5/64"}]}'"#;
    script(node, "promise", "promise", text)?;
    let server = server(node, "promise", json!([{"type": "promise"}]))?;
    let before = Machine::look_at(&server)?;
    let answer = server.cri.run_pod(&node.pod_config("promise")?);
    let message = refused(answer, &[Code::Internal])?;
    ensure!(message.contains("10.5.5.5/24, fd05::5/64"), "{message}");
    before.settles_again_at(&server)?;
    end(server)
}

pub fn plugin_that_fails_is_told_in_its_words(node: &Node) -> Result<()> {
    let plugins = json!([bridge(node, "fails", "10.89.0.0/24"), {"type": "fails"}]);
    script(node, "fails", "fails", "exit 0")?;
    let server = server(node, "fails", plugins)?;
    let before = Machine::look_at(&server)?;
    for (text, words) in [
        (
            r#"echo '{"code": 11, "msg": "try later"}'; exit 1"#,
            "try later",
        ),
        ("echo no uplink >&2; exit 1", "no uplink"),
        ("echo garbage", "garbage"),
        ("kill -9 $$", "signal: 9"),
        ("echo '{\"cniVersion\": \"1.0.0\"}'", "no address"),
    ] {
        let text = format!("[ \"$CNI_COMMAND\" = ADD ] || exit 0\n{text}");
        script(node, "fails", "fails", &text)?;
        let answer = server.cri.run_pod(&node.pod_config("fails")?);
        let message = refused(answer, &[Code::Internal])?;
        ensure!(
            message.contains(words) && message.contains("fails"),
            "{message}"
        );
        ensure!(
            leases(node, "fails").is_empty(),
            "{:?}",
            leases(node, "fails")
        );
    }
    remove_bridges()?;
    before.settles_again_at(&server)?;
    end(server)
}

pub fn addresses_are_given_back_after_the_server_was_killed(node: &Node) -> Result<()> {
    let first = server(
        node,
        "killed",
        json!([bridge(node, "killed", "10.90.0.0/24")]),
    )?;
    let pod = Pod::run(&first.cri, node.pod_config("killed")?)?.id;
    ensure!(leases(node, "killed").len() == 1, "a lease");
    first.kill()?;
    let mut plan = node.plan("killed");
    plan.cni = Some(json!({"cniVersion": "1.0.0", "name": "other", "plugins": [
        {"type": "ptp", "ipam": {"type": "static"}}]}));
    let second = plan.start()?;
    second.cri.remove_pod(&pod)?;
    ensure!(
        leases(node, "killed").is_empty(),
        "{:?}",
        leases(node, "killed")
    );
    end(second)
}

pub fn server_killed_while_a_plugin_ran_leaves_nothing(node: &Node) -> Result<()> {
    let name = "halfway";
    let begun = home(node, name).join("begun");
    if begun.exists() {
        std::fs::remove_file(&begun)?;
    }
    let text = format!(
        "[ \"$CNI_COMMAND\" = ADD ] || exit 0\ntouch {}\nexec sleep 31",
        begun.display()
    );
    script(node, name, "halfway", &text)?;
    let plugins = json!([bridge(node, name, "10.80.0.0/24"), {"type": "halfway"}]);
    let first = server(node, name, plugins.clone())?;
    let config = node.pod_config(name)?;
    std::thread::scope(|scope| -> Result<()> {
        let caller = scope.spawn(|| first.cri.run_pod(&config));
        while !begun.exists() {
            ensure!(!caller.is_finished(), "the pod came to an end");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        ensure!(leases(node, name).len() == 1, "no lease yet");
        kill_process(
            Pid::from_raw(first.pid().cast_signed()).context("no pid")?,
            Signal::KILL,
        )?;
        Ok(())
    })?;
    first.kill()?;
    let second = server(node, name, plugins)?;
    // What is half made is undone while the server answers already.
    let mut pods = second.cri.pod_ids(PodSandboxFilter::default())?;
    for _ in 0..500 {
        if pods.is_empty() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
        pods = second.cri.pod_ids(PodSandboxFilter::default())?;
    }
    ensure!(pods.is_empty(), "{pods:?}");
    ensure!(leases(node, name).is_empty(), "{:?}", leases(node, name));
    let plugins = run("pgrep -f '[s]leep 31' || true")?;
    ensure!(plugins.is_empty(), "the first server's plugin goes on");
    end(second)
}

pub fn plugin_that_never_takes_back_keeps_no_pod(node: &Node) -> Result<()> {
    let name = "never";
    let text = r#"[ "$CNI_COMMAND" = DEL ] && { echo '{"code": 11, "msg": "not today"}'; exit 1; }
        echo "$config" | sed 's/.*"prevResult":\(.*\),"type":"never"}$/\1/'"#;
    script(node, name, name, text)?;
    let start = || {
        let mut plan = node.plan(name);
        plan.network = "cni_timeout_seconds = 20".to_owned();
        let plugins = json!([bridge(node, name, "10.79.0.0/24"), {"type": name}]);
        plan.cni = Some(json!({"cniVersion": "1.0.0", "name": name, "plugins": plugins}));
        plan.start()
    };
    let server = start()?;
    let cri = &server.cri;
    let pod = Pod::run(cri, node.pod_config(name)?)?.id;
    let logged = server.log_length();
    let message = refused(cri.stop_pod(&pod), &[Code::Internal])?;
    ensure!(message.contains("not today"), "{message}");
    // The other plugin has taken back what is its own.
    ensure!(leases(node, name).is_empty(), "{:?}", leases(node, name));
    while let Err(error) = cri.stop_pod(&pod) {
        refused(Err::<(), _>(error), &[Code::Internal])?;
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
    let log = server.log_since(logged);
    ensure!(log.contains("left something behind"), "{log}");
    cri.remove_pod(&pod)?;
    server.stop()?;
    // The next server asks again.
    let asked = home(node, name).join("asked");
    let text = format!("[ $CNI_COMMAND = DEL ] && touch {}", asked.display());
    script(node, name, name, &text)?;
    let server = start()?;
    ensure!(asked.exists(), "nobody was asked");
    end(server)
}

pub fn plugin_that_hangs_is_ended_and_its_pod_fails(node: &Node) -> Result<()> {
    let name = "hangs";
    // What it started hangs as well, and holds its output open.
    let text = "[ \"$CNI_COMMAND\" = ADD ] || exit 0\nsleep 32 & exec sleep 33";
    script(node, name, name, text)?;
    let mut plan = node.plan(name);
    plan.network = "cni_timeout_seconds = 5".to_owned();
    let plugins = json!([bridge(node, name, "10.78.0.0/24"), {"type": name}]);
    plan.cni = Some(json!({"cniVersion": "1.0.0", "name": name, "plugins": plugins}));
    let server = plan.start()?;
    let before = Machine::look_at(&server)?;
    let answer = server.cri.run_pod(&node.pod_config(name)?);
    let message = refused(answer, &[Code::Internal])?;
    ensure!(
        message.contains("plugin hangs failed at ADD") && message.contains("within 5 s"),
        "{message}"
    );
    ensure!(leases(node, name).is_empty(), "{:?}", leases(node, name));
    remove_bridges()?;
    before.settles_again_at(&server)?;
    end(server)
}
