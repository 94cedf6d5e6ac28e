//! The addresses of pods: those of the next bridge, and how many there are.

use anyhow::{Result, ensure};
use bulkhead_tests::Node;
use bulkhead_tests::cri::refused;
use bulkhead_tests::leak::Machine;
use bulkhead_tests::request::Pod;
use tonic::Code;

use crate::addresses;

pub fn kubelets_pod_cidr_is_the_next_bridges(node: &Node) -> Result<()> {
    let server = node.plan("cidr").start()?;
    let cri = &server.cri;
    let before = Pod::run(cri, node.pod_config("before")?)?;
    cri.tell_pod_cidr("10.77.8.0/24,fd77:8::/64")?;
    let kept = Pod::run(cri, node.pod_config("kept")?)?;
    let address = cri.pod_ip(&kept.id)?;
    ensure!(!address.to_string().starts_with("10.77.8."), "{address}");
    for pod in [before, kept] {
        cri.remove_pod(&pod.id)?;
    }
    let after = Pod::run(cri, node.pod_config("after")?)?;
    let [four, six] = addresses(cri, &after.id)?;
    ensure!(four.to_string().starts_with("10.77.8."), "{four}");
    ensure!(six.to_string().starts_with("fd77:8::"), "{six}");
    for (cidr, why) in [("10.77.8.0", "10.77.8.0"), ("10.0.0.0/31", "no room")] {
        let message = refused(cri.tell_pod_cidr(cidr), &[Code::InvalidArgument])?;
        ensure!(message.contains(why), "{cidr}: {message}");
    }
    server.stop()
}

pub fn full_pool_is_refused_and_serves_again(node: &Node) -> Result<()> {
    let server = node.plan("full").start()?;
    let cri = &server.cri;
    cri.tell_pod_cidr("10.77.9.0/30")?;
    let only = Pod::run(cri, node.pod_config("only")?)?;
    let before = Machine::look_at(&server)?;
    let late = node.pod_config("late")?;
    let message = refused(cri.run_pod(&late), &[Code::ResourceExhausted])?;
    ensure!(message.contains("10.77.9.0/30"), "{message}");
    before.settles_again_at(&server)?;
    cri.remove_pod(&only.id)?;
    let again = Pod::run(cri, late)?;
    ensure!(
        cri.pod_ip(&again.id)?.to_string() == "10.77.9.2",
        "another address"
    );
    server.stop()
}
