//! A container's output and its end, followed for as long as it runs.

use std::sync::Arc;
use std::time::Duration;

use bulkhead_agent_api::v1;
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use super::boot::Live;
use super::owner::Event;
use crate::container::log::{Log, Stream};
use crate::container::output;
use crate::deadline::Deadline;
use crate::guest::GuestError;

/// A wait that ends when the container does.
const FOREVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Between attempts to reach a guest that has lost its connection.
const RETRY: Duration = Duration::from_millis(100);

/// A container's output on its way out of the guest.
pub(super) struct Streams {
    stdout: (UnixStream, u64),
    /// None of a terminal, whose output is one.
    stderr: Option<(UnixStream, u64)>,
}

impl Streams {
    /// Opens those of a container, from the first byte that no server has acknowledged.
    pub(super) async fn open(
        live: &Live,
        id: &str,
        terminal: bool,
        deadline: Deadline,
    ) -> Result<Self, GuestError> {
        let open = |stream| {
            let stdio = output::stdio(stream);
            live.guest.open_stream(id, "", stdio, 0, deadline)
        };
        let stderr = async {
            match terminal {
                true => Ok(None),
                false => open(Stream::Stderr).await.map(Some),
            }
        };
        let (stdout, stderr) = tokio::try_join!(open(Stream::Stdout), stderr)?;
        Ok(Self { stdout, stderr })
    }

    /// Writes the log to its end and reports the container's.
    pub(super) async fn follow(
        self,
        live: Arc<Live>,
        id: String,
        log: Log,
        report: mpsc::Sender<Event>,
    ) {
        let (stdout, stderr) = (self.stdout, self.stderr);
        let errors = async {
            if let Some((stderr, offset)) = stderr {
                output::write_log(stderr, Stream::Stderr, offset, log.clone()).await;
            }
        };
        let written = async {
            tokio::join!(
                output::write_log(stdout.0, Stream::Stdout, stdout.1, log.clone()),
                errors,
            )
        };
        let (exit, _) = tokio::join!(end(&live, &id), written);
        // The owner may be gone, and the pod with it.
        let _ = report.send(Event::Exited { id, exit }).await;
    }
}

/// Waits for a container's end, through lost connections, until its VM ends.
async fn end(live: &Live, id: &str) -> Result<v1::Exit, String> {
    loop {
        let request = v1::WaitRequest {
            container_id: id.to_owned(),
            exec_id: String::new(),
        };
        let answer = tokio::select! {
            answer = live.guest.wait(request, Deadline::after(FOREVER)) => answer,
            ended = live.vm.wait() => return Err(ended.reason),
        };
        match answer {
            Ok(response) => {
                let nothing = || "the guest did not say how the container ended".to_owned();
                return response.exit.ok_or_else(nothing);
            }
            Err(error) if error.lost() => tokio::time::sleep(RETRY).await,
            Err(error) => return Err(error.to_string()),
        }
    }
}
