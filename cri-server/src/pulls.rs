//! How pulls come along, told to those who wait: a service of ours beside the CRI, which has no
//! word for it.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_cri_api::pulls::v1::pulls_server::{Pulls as Service, PullsServer};
use bulkhead_cri_api::pulls::v1::{FollowRequest, Layer, Step};
use tokio::sync::{broadcast, mpsc};
use tokio::time::{MissedTickBehavior, interval};
use tokio_stream::wrappers::BroadcastStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};

use crate::image::{Progress, ProgressSender};

/// Steps a slow follower may be behind before it misses some.
const BEHIND: usize = 32;
/// Steps of a pull that wait to be told.
const QUEUE: usize = 256;
/// How often followers are told.
const PACE: Duration = Duration::from_millis(100);

/// The pulls of one server. Clones are the same.
#[derive(Debug, Clone)]
pub struct Pulls {
    steps: broadcast::Sender<(Arc<str>, Step)>,
}

impl Pulls {
    /// No pulls yet.
    pub fn new() -> Self {
        Self {
            steps: broadcast::Sender::new(BEHIND),
        }
    }

    /// The service, to be served beside the CRI.
    pub fn server(&self) -> PullsServer<Self> {
        PullsServer::new(self.clone())
    }

    /// Where a pull of `image`, as the request names it, tells its progress. Needs a runtime; the
    /// task that passes it on ends when the sender is dropped.
    pub fn report(&self, image: &str) -> ProgressSender {
        let (sender, receiver) = mpsc::channel(QUEUE);
        tokio::spawn(tell(self.steps.clone(), image.into(), receiver));
        sender
    }
}

/// Gathers progress and tells it at a bearable pace, the last of it always.
async fn tell(
    steps: broadcast::Sender<(Arc<str>, Step)>,
    image: Arc<str>,
    mut progress: mpsc::Receiver<Progress>,
) {
    let mut pace = interval(PACE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut step = Step::default();
    let mut untold = false;
    loop {
        tokio::select! {
            progress = progress.recv() => match progress {
                Some(progress) => {
                    advance(&mut step, progress);
                    untold = true;
                }
                None => break,
            },
            _ = pace.tick(), if untold => {
                // Nobody may be listening.
                let _ = steps.send((Arc::clone(&image), step.clone()));
                untold = false;
            }
        }
    }
    let _ = steps.send((image, step));
}

fn advance(step: &mut Step, progress: Progress) {
    match progress {
        Progress::Layers(layers) => {
            step.layers = layers
                .into_iter()
                .map(|(digest, bytes)| Layer {
                    digest: digest.to_string(),
                    bytes,
                    fetched: 0,
                })
                .collect();
        }
        Progress::Fetched { layer, bytes } => {
            let digest = layer.to_string();
            // An image can have the same layer twice.
            for layer in step
                .layers
                .iter_mut()
                .filter(|layer| layer.digest == digest)
            {
                layer.fetched = bytes;
            }
        }
        Progress::Unpacked { layers } => {
            step.unpacked = u32::try_from(layers).unwrap_or(u32::MAX);
        }
        Progress::Disk => step.finishing = true,
    }
}

#[tonic::async_trait]
impl Service for Pulls {
    type FollowStream = Pin<Box<dyn Stream<Item = Result<Step, Status>> + Send>>;

    async fn follow(
        &self,
        request: Request<FollowRequest>,
    ) -> Result<Response<Self::FollowStream>, Status> {
        let wanted = request.into_inner().image;
        // One who was too slow goes on with the newest: each step tells all.
        let steps =
            BroadcastStream::new(self.steps.subscribe()).filter_map(move |told| match told {
                Ok((image, step)) if *image == *wanted => Some(Ok(step)),
                _ => None,
            });
        Ok(Response::new(Box::pin(steps)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Digest;

    #[tokio::test]
    async fn followers_hear_of_their_image_and_of_its_end() {
        let pulls = Pulls::new();
        let request = Request::new(FollowRequest {
            image: "a:1".to_owned(),
        });
        let mut steps = pulls.follow(request).await.unwrap().into_inner();
        let layer = Digest::of(b"x");
        let other = pulls.report("b:1");
        other.send(Progress::Disk).await.unwrap();
        drop(other);
        let report = pulls.report("a:1");
        report
            .send(Progress::Layers(vec![(layer, 7)]))
            .await
            .unwrap();
        report
            .send(Progress::Fetched { layer, bytes: 7 })
            .await
            .unwrap();
        report.send(Progress::Unpacked { layers: 1 }).await.unwrap();
        report.send(Progress::Disk).await.unwrap();
        drop(report);
        let last = loop {
            let step = steps.next().await.unwrap().unwrap();
            if step.finishing {
                break step;
            }
        };
        assert_eq!(last.layers.len(), 1);
        assert_eq!(
            (last.layers[0].bytes, last.layers[0].fetched, last.unpacked),
            (7, 7, 1)
        );
    }
}
