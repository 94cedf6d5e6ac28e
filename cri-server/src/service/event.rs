//! `GetContainerEvents`.

use bulkhead_cri_api::v1 as cri;
use cri::ContainerEventType as Type;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::translate;
use crate::sandbox::{Event, Events, Lagged, Step};

/// Messages on their way to one client, at most; more wait in the common queue.
const UNDER_WAY: usize = 16;

/// A client's events.
pub type Stream = ReceiverStream<Result<cri::ContainerEventResponse, Status>>;

/// All events from now on, until the client leaves, the server ends, or the client has lost some.
pub fn subscribe(events: &Events) -> Stream {
    let mut events = events.subscribe();
    let (sender, messages) = mpsc::channel(UNDER_WAY);
    tokio::spawn(async move {
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                () = sender.closed() => return,
            };
            let last = match event {
                Ok(None) => return,
                Ok(Some(event)) => sender.send(Ok(message(&event))).await.is_err(),
                Err(Lagged(lost)) => {
                    let words = format!(
                        "{lost} events were lost, since they were not read fast enough; \
                         list the containers and subscribe again"
                    );
                    let _ = sender.send(Err(Status::data_loss(words))).await;
                    true
                }
            };
            if last {
                return;
            }
        }
    });
    ReceiverStream::new(messages)
}

fn message(event: &Event) -> cri::ContainerEventResponse {
    let containers = event.view.record().containers.values();
    let known = containers.filter(|container| container.is_known());
    let kind = match event.step {
        Step::Created => Type::ContainerCreatedEvent,
        Step::Started => Type::ContainerStartedEvent,
        Step::Stopped => Type::ContainerStoppedEvent,
        Step::Deleted => Type::ContainerDeletedEvent,
    };
    cri::ContainerEventResponse {
        container_id: event.id.clone(),
        container_event_type: kind.into(),
        created_at: event.at,
        pod_sandbox_status: Some(translate::pod_status(&event.view)),
        containers_statuses: known.map(translate::container_status).collect(),
    }
}
