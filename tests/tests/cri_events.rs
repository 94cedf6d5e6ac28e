//! What happens to pods and containers, as it is told to subscribers.

use anyhow::{Context, Result, ensure};
use bulkhead_cri_api::v1::*;
use bulkhead_tests::request::{Pod, container, shell, sleeper};
use bulkhead_tests::{Node, suite};
use tonic::Streaming;

suite! {
    every_step_is_told_in_order_to_every_subscriber,
    container_that_cannot_start_is_told_to_have_stopped,
    subscriptions_end_with_the_server,
}

type Events = Streaming<ContainerEventResponse>;

fn subscribe(node: &Node) -> Result<Events> {
    Ok(node.cri()?.get_container_events(GetEventsRequest {})?)
}

/// The next event, and what it is told of: the id and the step.
fn next(
    node: &Node,
    events: &mut Events,
) -> Result<(String, ContainerEventType, ContainerEventResponse)> {
    let event = node.cri()?.next(events)?.context("the stream has ended")?;
    let step = event.container_event_type();
    Ok((event.container_id.clone(), step, event))
}

fn every_step_is_told_in_order_to_every_subscriber(node: &Node) -> Result<()> {
    use ContainerEventType::*;
    let mut subscribers = [subscribe(node)?, subscribe(node)?];
    let pod = node.pod("told")?;
    let image = node.base()?;
    let stays = pod.start(&sleeper("stays", &image))?;
    let ends = pod.run_to_end(&shell("ends", &image, "exit 7"))?.status.id;
    pod.cri.remove(&ends)?;
    pod.cri.stop_pod(&pod.id)?;
    pod.cri.remove_pod(&pod.id)?;
    let expected = [
        (&pod.id, ContainerCreatedEvent),
        (&pod.id, ContainerStartedEvent),
        (&stays, ContainerCreatedEvent),
        (&stays, ContainerStartedEvent),
        (&ends, ContainerCreatedEvent),
        (&ends, ContainerStartedEvent),
        (&ends, ContainerStoppedEvent),
        (&ends, ContainerDeletedEvent),
        (&stays, ContainerStoppedEvent),
        (&pod.id, ContainerStoppedEvent),
        (&stays, ContainerDeletedEvent),
        (&pod.id, ContainerDeletedEvent),
    ];
    for events in &mut subscribers {
        let mut last = 0;
        for (id, step) in expected {
            let (told, kind, event) = next(node, events)?;
            ensure!(
                (&told, kind) == (id, step),
                "{told} {kind:?} instead of {id} {step:?}"
            );
            ensure!(event.created_at >= last, "{event:?}");
            last = event.created_at;
            let of_pod = event.pod_sandbox_status.context("the pod's status")?;
            ensure!(of_pod.id == pod.id, "{of_pod:?}");
            if (id, step) == (&ends, ContainerStoppedEvent) {
                let mut statuses = event.containers_statuses.iter();
                let status = statuses.find(|status| status.id == ends);
                let status = status.context("the container's status")?;
                ensure!(
                    status.state() == ContainerState::ContainerExited,
                    "{status:?}"
                );
                ensure!(status.exit_code == 7, "{status:?}");
            }
        }
    }
    Ok(())
}

fn container_that_cannot_start_is_told_to_have_stopped(node: &Node) -> Result<()> {
    use ContainerEventType::*;
    let pod = node.pod("cannot")?;
    let mut events = subscribe(node)?;
    let id = pod.create(&container("absent", &node.base()?, &["/absent"]))?;
    ensure!(pod.cri.start(&id).is_err());
    for step in [ContainerCreatedEvent, ContainerStoppedEvent] {
        let (told, kind, _) = next(node, &mut events)?;
        ensure!((&told, kind) == (&id, step), "{told} {kind:?}");
    }
    Ok(())
}

fn subscriptions_end_with_the_server(node: &Node) -> Result<()> {
    let server = node.plan("ending").start()?;
    let cri = &server.cri;
    let mut events = cri.get_container_events(GetEventsRequest {})?;
    let mut config = node.pod_config("ending")?;
    config.metadata.get_or_insert_default().uid = "ending".into();
    let pod = Pod::run(cri, config)?;
    cri.remove_pod(&pod.id)?;
    let mut told = 0;
    let pid = server.pid().to_string();
    let done = std::process::Command::new("kill")
        .args(["-TERM", &pid])
        .status()?;
    ensure!(done.success(), "kill {pid}");
    while cri.next(&mut events)?.is_some() {
        told += 1;
    }
    ensure!(told == 4, "{told} events");
    Ok(())
}
