//! A client of the CRI, blocking, with a time limit on every call.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bulkhead_cri_api::v1::image_service_client::ImageServiceClient;
use bulkhead_cri_api::v1::runtime_service_client::RuntimeServiceClient;
use bulkhead_cri_api::v1::*;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};

/// Longest time a call may take. The bed emulates its processors, so this is generous.
const CALL_LIMIT: Duration = Duration::from_secs(180);
/// Longest time a container may take to reach a state that it reaches by itself.
const STATE_LIMIT: Duration = Duration::from_secs(120);
/// Between two looks at a container's state.
const STATE_PAUSE: Duration = Duration::from_millis(50);

/// What a call answers: the reply, or the gRPC status a client would see.
pub type Answer<T> = std::result::Result<T, Status>;

/// A connection to one CRI socket.
pub struct Cri {
    runtime: Runtime,
    channel: Channel,
}

macro_rules! runtime_calls {
    ($($(#[$doc:meta])* $name:ident($request:ty) -> $reply:ty;)*) => { $(
        $(#[$doc])*
        pub fn $name(&self, request: $request) -> Answer<$reply> {
            let mut client = RuntimeServiceClient::new(self.channel.clone())
                .max_decoding_message_size(MESSAGE_LIMIT);
            self.runtime
                .block_on(client.$name(limited(request)))
                .map(tonic::Response::into_inner)
        }
    )* };
}

macro_rules! image_calls {
    ($($(#[$doc:meta])* $name:ident($request:ty) -> $reply:ty;)*) => { $(
        $(#[$doc])*
        pub fn $name(&self, request: $request) -> Answer<$reply> {
            let mut client = ImageServiceClient::new(self.channel.clone());
            self.runtime
                .block_on(client.$name(limited(request)))
                .map(tonic::Response::into_inner)
        }
    )* };
}

/// Two full outputs of an ExecSync and some room.
const MESSAGE_LIMIT: usize = 40 << 20;

fn limited<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(CALL_LIMIT);
    request
}

impl Cri {
    /// Connects when the first call is made.
    pub fn new(socket: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let endpoint = Endpoint::try_from(format!("unix://{}", socket.display()))?;
        let _entered = runtime.enter();
        let channel = endpoint.connect_lazy();
        drop(_entered);
        Ok(Self { runtime, channel })
    }

    runtime_calls! {
        /// `Version`.
        version(VersionRequest) -> VersionResponse;
        /// `Status`.
        status(StatusRequest) -> StatusResponse;
        /// `RuntimeConfig`.
        runtime_config(RuntimeConfigRequest) -> RuntimeConfigResponse;
        /// `RunPodSandbox`.
        run_pod_sandbox(RunPodSandboxRequest) -> RunPodSandboxResponse;
        /// `StopPodSandbox`.
        stop_pod_sandbox(StopPodSandboxRequest) -> StopPodSandboxResponse;
        /// `RemovePodSandbox`.
        remove_pod_sandbox(RemovePodSandboxRequest) -> RemovePodSandboxResponse;
        /// `PodSandboxStatus`.
        pod_sandbox_status(PodSandboxStatusRequest) -> PodSandboxStatusResponse;
        /// `ListPodSandbox`.
        list_pod_sandbox(ListPodSandboxRequest) -> ListPodSandboxResponse;
        /// `CreateContainer`.
        create_container(CreateContainerRequest) -> CreateContainerResponse;
        /// `StartContainer`.
        start_container(StartContainerRequest) -> StartContainerResponse;
        /// `StopContainer`.
        stop_container(StopContainerRequest) -> StopContainerResponse;
        /// `RemoveContainer`.
        remove_container(RemoveContainerRequest) -> RemoveContainerResponse;
        /// `ContainerStatus`.
        container_status(ContainerStatusRequest) -> ContainerStatusResponse;
        /// `ListContainers`.
        list_containers(ListContainersRequest) -> ListContainersResponse;
        /// `ExecSync`.
        exec_sync(ExecSyncRequest) -> ExecSyncResponse;
        /// `UpdateContainerResources`.
        update_container_resources(UpdateContainerResourcesRequest)
            -> UpdateContainerResourcesResponse;
        /// `UpdatePodSandboxResources`.
        update_pod_sandbox_resources(UpdatePodSandboxResourcesRequest)
            -> UpdatePodSandboxResourcesResponse;
        /// `Exec`.
        exec(ExecRequest) -> ExecResponse;
        /// `Attach`.
        attach(AttachRequest) -> AttachResponse;
        /// `PortForward`.
        port_forward(PortForwardRequest) -> PortForwardResponse;
        /// `CheckpointContainer`.
        checkpoint_container(CheckpointContainerRequest) -> CheckpointContainerResponse;
        /// `ReopenContainerLog`.
        reopen_container_log(ReopenContainerLogRequest) -> ReopenContainerLogResponse;
        /// `ContainerStats`.
        container_stats(ContainerStatsRequest) -> ContainerStatsResponse;
        /// `ListContainerStats`.
        list_container_stats(ListContainerStatsRequest) -> ListContainerStatsResponse;
        /// `PodSandboxStats`.
        pod_sandbox_stats(PodSandboxStatsRequest) -> PodSandboxStatsResponse;
        /// `ListPodSandboxStats`.
        list_pod_sandbox_stats(ListPodSandboxStatsRequest) -> ListPodSandboxStatsResponse;
        /// `ListMetricDescriptors`.
        list_metric_descriptors(ListMetricDescriptorsRequest) -> ListMetricDescriptorsResponse;
        /// `ListPodSandboxMetrics`.
        list_pod_sandbox_metrics(ListPodSandboxMetricsRequest) -> ListPodSandboxMetricsResponse;
        /// `UpdateRuntimeConfig`.
        update_runtime_config(UpdateRuntimeConfigRequest) -> UpdateRuntimeConfigResponse;
        /// `StreamPodSandboxes`.
        stream_pod_sandboxes(StreamPodSandboxesRequest) -> Streaming<StreamPodSandboxesResponse>;
        /// `StreamContainers`.
        stream_containers(StreamContainersRequest) -> Streaming<StreamContainersResponse>;
        /// `StreamContainerStats`.
        stream_container_stats(StreamContainerStatsRequest)
            -> Streaming<StreamContainerStatsResponse>;
        /// `StreamPodSandboxStats`.
        stream_pod_sandbox_stats(StreamPodSandboxStatsRequest)
            -> Streaming<StreamPodSandboxStatsResponse>;
        /// `StreamPodSandboxMetrics`.
        stream_pod_sandbox_metrics(StreamPodSandboxMetricsRequest)
            -> Streaming<StreamPodSandboxMetricsResponse>;
        /// `GetContainerEvents`.
        get_container_events(GetEventsRequest) -> Streaming<ContainerEventResponse>;
    }

    image_calls! {
        /// `PullImage`.
        pull_image(PullImageRequest) -> PullImageResponse;
        /// `ListImages`.
        list_images(ListImagesRequest) -> ListImagesResponse;
        /// `ImageStatus`.
        image_status(ImageStatusRequest) -> ImageStatusResponse;
        /// `RemoveImage`.
        remove_image(RemoveImageRequest) -> RemoveImageResponse;
        /// `ImageFsInfo`.
        image_fs_info(ImageFsInfoRequest) -> ImageFsInfoResponse;
    }

    /// The next message of a stream; nothing at its end.
    pub fn next<T>(&self, stream: &mut Streaming<T>) -> Answer<Option<T>> {
        self.runtime.block_on(stream.message())
    }

    /// All messages of a stream, to its end.
    pub fn all<T>(&self, mut stream: Streaming<T>) -> Answer<Vec<T>> {
        let mut messages = Vec::new();
        while let Some(message) = self.next(&mut stream)? {
            messages.push(message);
        }
        Ok(messages)
    }

    /// Runs a pod of the default handler and answers its id.
    pub fn run_pod(&self, config: &PodSandboxConfig) -> Answer<String> {
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: String::new(),
        };
        Ok(self.run_pod_sandbox(request)?.pod_sandbox_id)
    }

    /// Tells the addresses of the node's pods, as a kubelet does.
    pub fn tell_pod_cidr(&self, pod_cidr: &str) -> Answer<()> {
        let network_config = Some(NetworkConfig {
            pod_cidr: pod_cidr.to_owned(),
        });
        self.update_runtime_config(UpdateRuntimeConfigRequest {
            runtime_config: Some(RuntimeConfig { network_config }),
        })?;
        Ok(())
    }

    /// Stops a pod.
    pub fn stop_pod(&self, id: &str) -> Answer<()> {
        let pod_sandbox_id = id.to_owned();
        self.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id })?;
        Ok(())
    }

    /// Removes a pod.
    pub fn remove_pod(&self, id: &str) -> Answer<()> {
        let pod_sandbox_id = id.to_owned();
        self.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id })?;
        Ok(())
    }

    /// A pod's status.
    pub fn pod(&self, id: &str) -> Answer<PodSandboxStatus> {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: id.to_owned(),
            verbose: false,
        };
        let reply = self.pod_sandbox_status(request)?;
        reply
            .status
            .ok_or_else(|| Status::data_loss("a reply without status"))
    }

    /// A pod's main address.
    pub fn pod_ip(&self, id: &str) -> Result<std::net::IpAddr> {
        let network = self.pod(id)?.network.unwrap_or_default();
        network
            .ip
            .parse()
            .with_context(|| format!("pod address {:?}", network.ip))
    }

    /// Ids of the pods that match.
    pub fn pod_ids(&self, filter: PodSandboxFilter) -> Answer<Vec<String>> {
        let filter = Some(filter);
        let reply = self.list_pod_sandbox(ListPodSandboxRequest { filter })?;
        Ok(reply.items.into_iter().map(|pod| pod.id).collect())
    }

    /// Creates a container and answers its id.
    pub fn create(
        &self,
        pod: &str,
        config: &ContainerConfig,
        pod_config: &PodSandboxConfig,
    ) -> Answer<String> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(config.clone()),
            sandbox_config: Some(pod_config.clone()),
        };
        Ok(self.create_container(request)?.container_id)
    }

    /// Starts a container.
    pub fn start(&self, id: &str) -> Answer<()> {
        let container_id = id.to_owned();
        self.start_container(StartContainerRequest { container_id })?;
        Ok(())
    }

    /// Stops a container, with `timeout` in seconds before it is killed.
    pub fn stop(&self, id: &str, timeout: i64) -> Answer<()> {
        let container_id = id.to_owned();
        self.stop_container(StopContainerRequest {
            container_id,
            timeout,
        })?;
        Ok(())
    }

    /// Removes a container.
    pub fn remove(&self, id: &str) -> Answer<()> {
        let container_id = id.to_owned();
        self.remove_container(RemoveContainerRequest { container_id })?;
        Ok(())
    }

    /// A container's status.
    pub fn container(&self, id: &str) -> Answer<ContainerStatus> {
        let request = ContainerStatusRequest {
            container_id: id.to_owned(),
            verbose: false,
        };
        let reply = self.container_status(request)?;
        reply
            .status
            .ok_or_else(|| Status::data_loss("a reply without status"))
    }

    /// Ids of the containers that match.
    pub fn container_ids(&self, filter: ContainerFilter) -> Answer<Vec<String>> {
        let filter = Some(filter);
        let reply = self.list_containers(ListContainersRequest { filter })?;
        Ok(reply.containers.into_iter().map(|found| found.id).collect())
    }

    /// Waits until a container has exited and answers its status then.
    pub fn wait(&self, id: &str) -> Result<ContainerStatus> {
        let begun = Instant::now();
        loop {
            let status = self.container(id)?;
            if status.state() == ContainerState::ContainerExited {
                return Ok(status);
            }
            if begun.elapsed() > STATE_LIMIT {
                bail!("container {id} is still {:?}", status.state());
            }
            std::thread::sleep(STATE_PAUSE);
        }
    }

    /// Runs a command in a container to its end, with `timeout` in seconds.
    pub fn exec_for(&self, id: &str, command: &[&str], timeout: i64) -> Answer<ExecSyncResponse> {
        self.exec_sync(ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            timeout,
        })
    }

    /// Begins to run a command in a container, and goes away after `patience`.
    pub fn exec_and_vanish(&self, id: &str, command: &[&str], patience: Duration) -> Result<()> {
        let request = limited(ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            timeout: 0,
        });
        let mut client = RuntimeServiceClient::new(self.channel.clone());
        let call = async { tokio::time::timeout(patience, client.exec_sync(request)).await };
        match self.runtime.block_on(call) {
            Ok(answer) => bail!("the command has ended: {answer:?}"),
            Err(_) => Ok(()),
        }
    }

    /// Starts a container, and goes away after `patience`; the server is told of it beforehand.
    pub fn start_and_vanish(&self, id: &str, patience: Duration) -> Result<()> {
        let mut request = Request::new(StartContainerRequest {
            container_id: id.to_owned(),
        });
        request.set_timeout(patience);
        let mut client = RuntimeServiceClient::new(self.channel.clone());
        match self.runtime.block_on(client.start_container(request)) {
            Ok(_) => bail!("the container was started in time"),
            Err(status) if [Code::DeadlineExceeded, Code::Cancelled].contains(&status.code()) => {
                Ok(())
            }
            Err(status) => Err(status.into()),
        }
    }

    /// Runs a command that must succeed, and answers its standard output without the last newline.
    pub fn output(&self, id: &str, command: &[&str]) -> Result<String> {
        let reply = self.exec_for(id, command, 0)?;
        let stdout = String::from_utf8_lossy(&reply.stdout);
        if reply.exit_code != 0 {
            let stderr = String::from_utf8_lossy(&reply.stderr);
            bail!(
                "{command:?}: exit code {}, {stdout}{stderr}",
                reply.exit_code
            );
        }
        Ok(stdout.trim_end_matches('\n').to_owned())
    }

    /// As [`Cri::output`], for a line of shell.
    pub fn shell(&self, id: &str, line: &str) -> Result<String> {
        self.output(id, &["/bin/sh", "-c", line])
    }

    /// Pulls an image and answers the reference the server gives it.
    pub fn pull(&self, name: &str) -> Answer<String> {
        let request = PullImageRequest {
            image: Some(image_spec(name)),
            auth: None,
            sandbox_config: None,
        };
        Ok(self.pull_image(request)?.image_ref)
    }

    /// An image, if it is on the node.
    pub fn image(&self, name: &str) -> Answer<Option<Image>> {
        let request = ImageStatusRequest {
            image: Some(image_spec(name)),
            verbose: false,
        };
        Ok(self.image_status(request)?.image)
    }

    /// Images that match a name, or all.
    pub fn images(&self, name: Option<&str>) -> Answer<Vec<Image>> {
        let filter = name.map(|name| ImageFilter {
            image: Some(image_spec(name)),
        });
        Ok(self.list_images(ListImagesRequest { filter })?.images)
    }

    /// Removes an image.
    pub fn remove_image_named(&self, name: &str) -> Answer<()> {
        let image = Some(image_spec(name));
        self.remove_image(RemoveImageRequest { image })?;
        Ok(())
    }

    /// A condition of the server's Status.
    pub fn condition(&self, kind: &str) -> Result<RuntimeCondition> {
        let status = self.status(StatusRequest { verbose: false })?.status;
        let conditions = status.unwrap_or_default().conditions;
        let found = conditions
            .into_iter()
            .find(|condition| condition.r#type == kind);
        found.with_context(|| format!("Status has no condition {kind}"))
    }
}

/// An image named as a user would.
pub fn image_spec(name: &str) -> ImageSpec {
    ImageSpec {
        image: name.to_owned(),
        ..ImageSpec::default()
    }
}

/// A label selector, or labels.
pub fn labels(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    let owned = |&(key, value): &(&str, &str)| (key.to_owned(), value.to_owned());
    pairs.iter().map(owned).collect()
}

/// Expects a call to fail with one of the given codes and answers the message. The reference has
/// no code for most of its errors, and one for many.
pub fn refused<T>(answer: Answer<T>, codes: &[Code]) -> Result<String> {
    let Err(status) = answer else {
        bail!("the call succeeded, but should be refused with {codes:?}");
    };
    let code = status.code();
    let vague =
        crate::node::is_reference() && [Code::Unknown, Code::FailedPrecondition].contains(&code);
    if !vague && !codes.contains(&code) {
        bail!("refused with {status}, but should be with {codes:?}");
    }
    Ok(status.message().to_owned())
}
