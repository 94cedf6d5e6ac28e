//! A container's output, followed for as long as it runs, and what comes back at its end.

use std::sync::Arc;
use std::time::Duration;

use bulkhead_agent_api::v1;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use super::boot::{Live, blocking};
use super::host::Host;
use super::owner::Event;
use super::record::Container;
use crate::container::attach::Outlet;
use crate::container::file::Copied;
use crate::container::log::{Log, Offsets, Stream};
use crate::container::{file, output};
use crate::deadline::Deadline;
use crate::guest::GuestError;

/// A wait that ends when the container does.
const FOREVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// How long a guest may take to tell what a container has written.
const ASKING: Duration = Duration::from_secs(10);
/// Attempts to open the output of a container that runs already, and the time between them.
const OPENINGS: usize = 3;
const REOPENING: Duration = Duration::from_secs(1);
/// How long output may last after the guest has told the end, which it tells when all output is
/// fetched or was given up. The log is written meanwhile, and its disk may be slow.
const LAST_OUTPUT: Duration = Duration::from_secs(60);
/// Between attempts to reach a guest that has lost its connection.
const RETRY: Duration = Duration::from_millis(100);

/// A container's output on its way out of the guest.
pub(super) struct Streams {
    /// None where it was given up.
    stdout: Option<(UnixStream, u64)>,
    /// None of a terminal, whose output is one.
    stderr: Option<(UnixStream, u64)>,
    /// Files of the host that the container may write.
    copies: Vec<Copied>,
}

impl Streams {
    /// Opens those of a container, from `offsets` on, or the first byte that no server has
    /// acknowledged if that comes later.
    pub(super) async fn open(
        live: &Live,
        id: &str,
        terminal: bool,
        offsets: Offsets,
        copies: Vec<Copied>,
        deadline: Deadline,
    ) -> Result<Self, GuestError> {
        let open = |stream| {
            let offset = match stream {
                Stream::Stdout => offsets.stdout,
                Stream::Stderr => offsets.stderr,
            };
            let stdio = output::stdio(stream);
            live.guest.open_stream(id, "", stdio, offset, deadline)
        };
        let stderr = async {
            match terminal {
                true => Ok(None),
                false => open(Stream::Stderr).await.map(Some),
            }
        };
        let (stdout, stderr) = tokio::try_join!(open(Stream::Stdout), stderr)?;
        Ok(Self {
            stdout: Some(stdout),
            stderr,
            copies,
        })
    }

    /// Opens those of a container that runs already, and does without them in the end: nothing may
    /// keep its end from being known.
    pub(super) async fn open_again(
        live: &Live,
        id: &str,
        terminal: bool,
        offsets: Offsets,
        copies: Vec<Copied>,
    ) -> Self {
        for _ in 0..OPENINGS {
            let limit = Deadline::after(ASKING);
            match Self::open(live, id, terminal, offsets, copies.clone(), limit).await {
                Ok(streams) => return streams,
                Err(error) => {
                    tracing::warn!(container = %id, %error, "a container's output is not to be had");
                }
            }
            tokio::time::sleep(REOPENING).await;
        }
        tracing::error!(container = %id, "a container's output is given up");
        Self {
            stdout: None,
            stderr: None,
            copies,
        }
    }

    /// Writes the log to its end and reports the container's.
    pub(super) async fn follow(
        self,
        live: Arc<Live>,
        id: String,
        outlet: Outlet,
        report: mpsc::Sender<Event>,
    ) {
        let write = async |opened, stream| {
            if let Some((source, offset)) = opened {
                output::write_log(source, stream, offset, outlet.clone()).await;
            }
        };
        let written = async {
            tokio::join!(
                write(self.stdout, Stream::Stdout),
                write(self.stderr, Stream::Stderr),
            )
        };
        // Dropped when the end is told.
        let (told, telling) = oneshot::channel::<()>();
        let exit = async {
            let exit = end(&live, &id).await;
            drop(told);
            exit
        };
        let late = async {
            let _ = telling.await;
            tokio::time::sleep(LAST_OUTPUT).await;
        };
        let written = async {
            tokio::select! {
                _ = written => {}
                () = late => tracing::error!(
                    container = %id,
                    "the guest does not end the output of a container that has ended; it is no \
                     longer read"
                ),
            }
        };
        let (exit, ()) = tokio::join!(exit, written);
        if exit.is_ok() && !self.copies.is_empty() {
            bring_back(&live, &id, self.copies).await;
        }
        let exit = exit.map(|exit| v1::Exit {
            lost_bytes: exit.lost_bytes.saturating_add(outlet.lost()),
            ..exit
        });
        // Those who watch are told of the end when the last copy is dropped.
        drop(outlet);
        // The owner may be gone, and the pod with it.
        let _ = report.send(Event::Exited { id, exit }).await;
    }
}

/// Where the output of a container goes, and its input comes from.
pub(super) fn outlet(host: &Host, live: &Live, container: &Container, log: Log) -> Outlet {
    let outlet = Outlet::new(log, host.config.log.when_full);
    match container.config.stdin || container.config.tty {
        true => outlet.with_input(&live.guest, &container.id),
        false => outlet,
    }
}

/// Writes what an ended container has made of the host's files into them: its termination message
/// above all, which the kubelet reads when it learns of the end (CRI `ContainerConfig.mounts`).
async fn bring_back(live: &Live, id: &str, copies: Vec<Copied>) {
    let request = v1::ChangedFilesRequest {
        container_id: id.to_owned(),
    };
    let call = live.guest.changed_files(request, Deadline::after(ASKING));
    let changed = tokio::select! {
        answer = call => answer,
        _ = live.vm.wait() => return,
    };
    let changed = match changed {
        Ok(changed) => changed,
        Err(error) => {
            tracing::warn!(container = %id, %error, "what was written to files does not come back");
            return;
        }
    };
    let id = id.to_owned();
    let written = blocking(move || {
        for copied in &copies {
            let path = &copied.container_path;
            let come = changed.files.iter().find(|file| file.path == *path);
            let missing = changed
                .left_out
                .iter()
                .find(|missing| missing.path == *path);
            let written = match (come, missing) {
                (Some(come), _) => file::write_back(copied, &come.content),
                (None, Some(missing)) => Err(file::left_out(copied, missing.reason())),
                (None, None) => Ok(()),
            };
            if let Err(error) = written {
                tracing::warn!(container = %id, "{error}");
            }
        }
        Ok(())
    });
    // It cannot fail but by a panic, which is told elsewhere.
    let _ = written.await;
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
