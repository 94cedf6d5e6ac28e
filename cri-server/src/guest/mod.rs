//! The client of the agent inside a pod's guest.
//!
//! The guest dials; what it says is untrusted. Calls go over the newest control stream, so they
//! work again when the agent has dialled anew.

mod door;

use std::future::Future;
use std::sync::Arc;

use bulkhead_agent_api::v1::agent_client::AgentClient;
use bulkhead_agent_api::v1::{self, Stdio};
use bulkhead_agent_api::{Purpose, Secret};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, mpsc};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

use crate::deadline::{Deadline, Passed};
use door::Door;

/// The largest message that is taken from an agent, in bytes.
const LARGEST_MESSAGE: usize = 4 << 20;

/// Streams that are being opened at once, at most: fewer than may be undecided, so that none is
/// refused.
const OPENINGS: usize = 8;

/// Why an agent did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// It answered with an error.
    #[error("The guest could not {call}: {}", status.message())]
    Refused {
        /// What it was asked to do.
        call: &'static str,
        /// Its answer.
        status: Status,
    },
    /// It did not answer in time.
    #[error("The guest did not {0} in time")]
    Late(&'static str),
    /// It speaks another version.
    #[error("The guest's agent speaks version {theirs}, this server version {ours}")]
    Version {
        /// The agent's version.
        theirs: u32,
        /// This server's version.
        ours: u32,
    },
}

impl GuestError {
    /// The agent's code, where it answered.
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Refused { status, .. } => Some(status.code()),
            _ => None,
        }
    }

    /// Whether the call never reached the agent or its answer never reached us.
    pub fn lost(&self) -> bool {
        matches!(
            self.code(),
            Some(Code::Unavailable | Code::Unknown | Code::Cancelled)
        )
    }
}

/// The agent of one guest.
#[derive(Debug)]
pub struct Guest {
    client: AgentClient<Channel>,
    door: Arc<Door>,
    openings: Semaphore,
}

impl Guest {
    /// Takes the streams that the guest dials. `secret` is this boot's; while `sealed` is false,
    /// an agent that does not know it yet is given it.
    pub fn new(secret: Secret, sealed: bool, streams: mpsc::Receiver<UnixStream>) -> Self {
        let door = Arc::new(Door::new(secret, sealed));
        tokio::spawn(door::keep(Arc::downgrade(&door), streams));
        let connector = {
            let door = Arc::clone(&door);
            tower::service_fn(move |_: tonic::transport::Uri| {
                let door = Arc::clone(&door);
                async move { Ok::<_, std::io::Error>(TokioIo::new(door.control().await)) }
            })
        };
        let channel = Endpoint::from_static("http://guest").connect_with_connector_lazy(connector);
        let client = AgentClient::new(channel).max_decoding_message_size(LARGEST_MESSAGE);
        Self {
            client,
            door,
            openings: Semaphore::new(OPENINGS),
        }
    }

    /// Waits for the agent's first call and makes sure of its version. From then on nobody is
    /// given the secret any more.
    pub async fn identify(&self, deadline: Deadline) -> Result<v1::IdentifyResponse, GuestError> {
        let mut client = self.client.clone();
        let call = client.identify(v1::IdentifyRequest {});
        let identity = answer("identify itself", deadline, call).await?;
        if identity.version != bulkhead_agent_api::VERSION {
            return Err(GuestError::Version {
                theirs: identity.version,
                ours: bulkhead_agent_api::VERSION,
            });
        }
        self.door.seal();
        Ok(identity)
    }

    /// Whether the guest has dialled at all.
    pub fn has_dialled(&self) -> bool {
        self.door.has_dialled()
    }

    /// Opens one end of a process's output or input. Returns the stream and the offset of its
    /// first byte.
    pub async fn open_stream(
        &self,
        container_id: &str,
        exec_id: &str,
        stdio: Stdio,
        offset: u64,
        deadline: Deadline,
    ) -> Result<(UnixStream, u64), GuestError> {
        let purpose = match stdio {
            Stdio::Stdin => Purpose::Input,
            _ => Purpose::Output,
        };
        let request = |token| v1::OpenStreamRequest {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            stdio: stdio.into(),
            token,
            offset,
        };
        let call = "open a stream";
        let opened = self.dialled(call, purpose, deadline, async |mut client, token| {
            client.open_stream(request(token)).await.map(drop)
        });
        let (stream, first) = opened.await?;
        if first < offset {
            return Err(GuestError::Refused {
                call,
                status: Status::data_loss(format!(
                    "offset {offset} was asked for and {first} came"
                )),
            });
        }
        Ok((stream, first))
    }

    /// A connection to a port of the pod's loopback.
    pub async fn forward(&self, port: u16, deadline: Deadline) -> Result<UnixStream, GuestError> {
        let port = port.into();
        let call = "forward a connection";
        let opened = self.dialled(
            call,
            Purpose::Forward,
            deadline,
            async |mut client, token| {
                let request = v1::ForwardRequest { port, token };
                client.forward(request).await.map(drop)
            },
        );
        Ok(opened.await?.0)
    }

    /// Asks the agent to dial, and waits for the stream.
    async fn dialled(
        &self,
        call: &'static str,
        purpose: Purpose,
        deadline: Deadline,
        ask: impl AsyncFnOnce(AgentClient<Channel>, u64) -> Result<(), Status>,
    ) -> Result<(UnixStream, u64), GuestError> {
        let late = |Passed| GuestError::Late(call);
        // Never closed, so that only the time can run out.
        let _turn = deadline
            .bound(self.openings.acquire())
            .await
            .map_err(late)?;
        let (token, arrival) = self.door.expect(purpose);
        let asked = ask(self.client.clone(), token.number());
        let asked = deadline.bound(asked).await.map_err(late)?;
        asked.map_err(|status| GuestError::Refused { call, status })?;
        let arrived = deadline.bound(arrival).await.map_err(late)?;
        arrived.map_err(|_| GuestError::Late(call))
    }
}

macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident, $call:ident: $request:ident => $response:ident, $does:literal;)*) => {
        impl Guest {
            $(
                $(#[$doc])*
                pub async fn $name(
                    &self,
                    request: v1::$request,
                    deadline: Deadline,
                ) -> Result<v1::$response, GuestError> {
                    let mut client = self.client.clone();
                    answer($does, deadline, client.$call(request)).await
                }
            )*
        }
    };
}

calls! {
    /// Makes the sandbox ready.
    prepare, prepare: PrepareRequest => PrepareResponse, "prepare the sandbox";
    /// Sets the guest's clock.
    set_time, set_time: SetTimeRequest => SetTimeResponse, "set its clock";
    /// Binds a disk's driver.
    attach_disk, attach_disk: AttachDiskRequest => AttachDiskResponse, "attach a disk";
    /// Unbinds a disk's driver.
    detach_disk, detach_disk: DetachDiskRequest => DetachDiskResponse, "detach a disk";
    /// Makes a container.
    create_container, create_container: CreateContainerRequest => CreateContainerResponse,
        "create the container";
    /// Starts a container.
    start_container, start_container: StartContainerRequest => StartContainerResponse,
        "start the container";
    /// Sends a signal.
    signal, signal: SignalRequest => SignalResponse, "signal the container";
    /// Waits for an end.
    wait, wait: WaitRequest => WaitResponse, "wait for the container";
    /// Tells what an ended container has written to its files.
    changed_files, changed_files: ChangedFilesRequest => ChangedFilesResponse,
        "tell what the container has written";
    /// Removes a container.
    remove_container, remove_container: RemoveContainerRequest => RemoveContainerResponse,
        "remove the container";
    /// Lists the containers it knows.
    list_containers, list_containers: ListContainersRequest => ListContainersResponse,
        "list its containers";
    /// Changes limits.
    update_resources, update_resources: UpdateResourcesRequest => UpdateResourcesResponse,
        "change the limits";
    /// Tells what containers and network have used.
    stats, stats: StatsRequest => StatsResponse, "tell its containers' figures";
    /// Tells what the agent itself uses.
    usage, usage: UsageRequest => UsageResponse, "tell what it uses";
    /// Gives a terminal a size.
    resize, resize: ResizeRequest => ResizeResponse, "resize the terminal";
    /// Starts a process in a container.
    exec, exec: ExecRequest => ExecResponse, "run the command";
    /// Forgets an exec, killing it first.
    remove_exec, remove_exec: RemoveExecRequest => RemoveExecResponse, "end the command";
    /// Syncs and unmounts the disks.
    shutdown, shutdown: ShutdownRequest => ShutdownResponse, "shut down";
}

async fn answer<T>(
    call: &'static str,
    deadline: Deadline,
    work: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, GuestError> {
    match deadline.bound(work).await {
        Err(Passed) => Err(GuestError::Late(call)),
        Ok(Err(status)) => Err(GuestError::Refused { call, status }),
        Ok(Ok(response)) => Ok(response.into_inner()),
    }
}
