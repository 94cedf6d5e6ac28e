//! What a container has written, and what it goes on to write.

use std::path::Path;
use std::time::Duration;

use bulkhead_cri_api::v1::ContainerState;
use tokio::time::{MissedTickBehavior, interval};

use super::client::Client;
use super::failure::Failure;
use super::log::Log;

/// How often it is seen whether the container has ended.
const LOOK: Duration = Duration::from_millis(500);

/// Copies the log of container `id`, and with `follow` goes on until the container has ended.
pub async fn logs(client: &Client, id: &str, follow: bool) -> Result<u8, Failure> {
    let status = client.container(id).await?;
    if status.log_path.is_empty() {
        let words = format!("container {id} has no log: it was created without a log path");
        return Err(Failure::own(words));
    }
    let cannot = |error| {
        let words = format!("cannot read the log {}: {error}", status.log_path);
        Failure::own(words)
    };
    let path = Path::new(&status.log_path);
    if !follow {
        std::fs::metadata(path).map_err(cannot)?;
    }
    let mut log = Log::open(path).map_err(cannot)?;
    if !follow {
        return ended(log.show());
    }
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let over = tokio::select! {
            changed = log.changed() => {
                changed.map_err(cannot)?;
                false
            }
            _ = look.tick() => {
                // Its log is whole before its end is told.
                match client.container(&status.id).await {
                    Ok(status) => status.state() == ContainerState::ContainerExited,
                    // Removed at its end, perhaps: what it wrote last is shown all the same.
                    Err(failure) => {
                        return match log.show() {
                            Err(end) => end,
                            Ok(()) => Err(failure),
                        };
                    }
                }
            }
        };
        if let Err(end) = log.show() {
            return end;
        }
        if over {
            return Ok(0);
        }
    }
}

fn ended(shown: Result<(), Result<u8, Failure>>) -> Result<u8, Failure> {
    shown.map_or_else(|end| end, |()| Ok(0))
}
