//! The demo, on a machine that can run pods: a real image from a real registry as a pod in a
//! virtual machine, through the CRI.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use bulkhead_cri_api::v1::VersionRequest;
use bulkhead_tests::node::WEB;
use bulkhead_tests::request::{Pod, container};
use bulkhead_tests::{Node, http};

fn main() -> Result<()> {
    say("a registry with the image, and `bulkhead serve`");
    let node = Node::open("demo")?;
    let done = show(&node);
    if done.is_err() {
        eprintln!("{}", node.server()?.log_tail());
    }
    done?;
    say("all is removed: pod, server, registry");
    node.close()
}

fn show(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let version = cri.version(VersionRequest::default())?;
    print(
        "server",
        &format!("{} {}", version.runtime_name, version.runtime_version),
    );

    say("PullImage: a Debian with lighttpd");
    let image = node.image(WEB)?;
    let known = cri.image(&image)?.context("the image is not there")?;
    print("image", &image);
    print("id", &known.id);

    say("RunPodSandbox, CreateContainer, StartContainer");
    let pod = Pod::run(cri, node.pod_config("web")?)?;
    let config = container("lighttpd", &image, &[]);
    let id = pod.start(&config)?;
    let address = cri.pod_ip(&pod.id)?;
    print("pod", &pod.id);
    print("address", &address.to_string());

    say("its kernel is not the host's");
    print("guest's kernel", &cri.output(&id, &["uname", "-r"])?);
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    print("host's kernel", host.trim());

    say(&format!(
        "the page at http://{address}/, fetched from the host"
    ));
    println!("{}", http::fetch(SocketAddr::new(address, 80))?.trim());

    say("the container's log");
    // The web server writes its line some seconds after it has answered.
    let mut lines = String::new();
    for _ in 0..400 {
        lines = std::fs::read_to_string(pod.log_path(&config))?;
        if lines.contains("GET / ") {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    println!("{}", lines.trim());

    say("ExecSync: ps");
    println!("{}", cri.output(&id, &["ps", "-o", "pid,user,args"])?);

    say("StopPodSandbox, RemovePodSandbox");
    cri.stop_pod(&pod.id)?;
    cri.remove_pod(&pod.id)?;
    Ok(())
}

fn say(what: &str) {
    println!("\n== {what}");
}

fn print(name: &str, value: &str) {
    println!("{name:<16}{value}");
}
