//! The RuntimeService.

use std::pin::Pin;
use std::time::Duration;

use bulkhead_cri_api::v1 as cri;
use bulkhead_cri_api::v1::runtime_service_server::RuntimeService;
use tonic::{Request, Response, Status};

use super::list::{self, Parts, in_parts};
use super::{edge, event, readiness, status, stream, translate};
use crate::deadline::Deadline;
use crate::sandbox::{Container, HANDLER, SandboxError, Sandboxes, View};
use crate::stats::{self, Stats};
use crate::streaming::{Kind, Streaming, Task};

/// The version of the kubelet's runtime interface that `Version` has to name.
const KUBELET_API: &str = "0.1.0";
const RUNTIME_API: &str = "v1";

/// The RuntimeService over the pods.
pub struct Runtime {
    sandboxes: Sandboxes,
    stats: Stats,
    streaming: Streaming,
}

type Answer<T> = Result<Response<T>, Status>;
/// What `async_trait` makes of an `async fn`; the macros below are expanded after it.
type Pending<'a, T> = Pin<Box<dyn Future<Output = Answer<T>> + Send + 'a>>;

impl Runtime {
    /// Serves these pods, and what goes over streams by way of `streaming`.
    pub fn new(sandboxes: Sandboxes, streaming: Streaming) -> Self {
        Self {
            stats: Stats::new(sandboxes.clone()),
            sandboxes,
            streaming,
        }
    }

    fn url(&self, kind: Kind, task: Task) -> Result<String, Status> {
        let url = self.streaming.url(kind, task);
        url.map_err(|error| Status::resource_exhausted(error.to_string()))
    }

    async fn container_figures(
        &self,
        filter: &cri::ContainerStatsFilter,
    ) -> Vec<cri::ContainerStats> {
        let wanted = |view: &View, one: &Container| list::stats_of_container(view, one, filter);
        self.stats.containers(wanted).await
    }

    async fn pod_figures(&self, filter: &cri::PodSandboxStatsFilter) -> Vec<cri::PodSandboxStats> {
        self.stats
            .pods(|view| list::stats_of_pod(view, filter))
            .await
    }

    fn pod(&self, id: &str) -> Result<crate::sandbox::Pod, Status> {
        let missing = || {
            status::of_sandbox(&SandboxError::NotFound {
                kind: "pod sandbox",
                id: id.to_owned(),
            })
        };
        self.sandboxes.pod(id).ok_or_else(missing)
    }

    fn container(&self, id: &str) -> Result<(crate::sandbox::Pod, String), Status> {
        let missing = || status::of_sandbox(&SandboxError::no_container(id));
        self.sandboxes.container(id).ok_or_else(missing)
    }
}

fn answer<T>(result: Result<T, SandboxError>) -> Answer<T> {
    result
        .map(Response::new)
        .map_err(|error| status::of_sandbox(&error))
}

fn config<T>(config: Option<T>) -> Result<T, Status> {
    config.ok_or_else(|| Status::invalid_argument("config is missing"))
}

/// Seconds from a client; negative ones count as none.
fn seconds(count: i64) -> Duration {
    Duration::from_secs(u64::try_from(count).unwrap_or(0))
}

macro_rules! not_yet {
    ($($call:ident: $request:ident => $response:ident, $name:literal;)*) => {
        $(
            fn $call<'life, 'async_trait>(
                &'life self,
                _: Request<cri::$request>,
            ) -> Pending<'async_trait, cri::$response>
            where
                'life: 'async_trait,
                Self: 'async_trait,
            {
                Box::pin(async {
                    Err(Status::unimplemented(concat!($name, " is not implemented")))
                })
            }
        )*
    };
}

#[tonic::async_trait]
impl RuntimeService for Runtime {
    async fn version(&self, _: Request<cri::VersionRequest>) -> Answer<cri::VersionResponse> {
        Ok(Response::new(cri::VersionResponse {
            version: KUBELET_API.to_owned(),
            runtime_name: HANDLER.to_owned(),
            runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
            runtime_api_version: RUNTIME_API.to_owned(),
        }))
    }

    async fn status(&self, request: Request<cri::StatusRequest>) -> Answer<cri::StatusResponse> {
        let verbose = request.get_ref().verbose;
        Ok(Response::new(readiness::of(&self.sandboxes, verbose).await))
    }

    async fn runtime_config(
        &self,
        _: Request<cri::RuntimeConfigRequest>,
    ) -> Answer<cri::RuntimeConfigResponse> {
        Ok(Response::new(cri::RuntimeConfigResponse {
            linux: Some(cri::LinuxRuntimeConfiguration {
                cgroup_driver: cri::CgroupDriver::Cgroupfs.into(),
            }),
        }))
    }

    async fn update_runtime_config(
        &self,
        request: Request<cri::UpdateRuntimeConfigRequest>,
    ) -> Answer<cri::UpdateRuntimeConfigResponse> {
        let config = request.into_inner().runtime_config.unwrap_or_default();
        let network = config.network_config.unwrap_or_default();
        let told = self.sandboxes.host().network.tell(&network.pod_cidr).await;
        answer(
            told.map(|()| cri::UpdateRuntimeConfigResponse {})
                .map_err(SandboxError::from),
        )
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<cri::RunPodSandboxRequest>,
    ) -> Answer<cri::RunPodSandboxResponse> {
        let deadline = edge::deadline(request.metadata());
        let request = request.into_inner();
        let config = config(request.config)?;
        let id = self
            .sandboxes
            .run(config, request.runtime_handler, deadline);
        answer(
            id.await
                .map(|pod_sandbox_id| cri::RunPodSandboxResponse { pod_sandbox_id }),
        )
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<cri::StopPodSandboxRequest>,
    ) -> Answer<cri::StopPodSandboxResponse> {
        // An unknown pod is as good as stopped.
        if let Some(pod) = self.sandboxes.pod(&request.get_ref().pod_sandbox_id) {
            answer(pod.stop().await)?;
        }
        Ok(Response::new(cri::StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<cri::RemovePodSandboxRequest>,
    ) -> Answer<cri::RemovePodSandboxResponse> {
        // An unknown pod is as good as removed.
        if let Some(pod) = self.sandboxes.pod(&request.get_ref().pod_sandbox_id) {
            answer(pod.remove().await)?;
        }
        Ok(Response::new(cri::RemovePodSandboxResponse {}))
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<cri::PodSandboxStatusRequest>,
    ) -> Answer<cri::PodSandboxStatusResponse> {
        let request = request.into_inner();
        let pod = self.pod(&request.pod_sandbox_id)?;
        let view = pod.view();
        let containers = view.record().containers.values();
        let known = containers.filter(|container| container.is_known());
        let mut response = cri::PodSandboxStatusResponse {
            status: Some(translate::pod_status(&view)),
            containers_statuses: known.map(translate::container_status).collect(),
            timestamp: crate::sandbox::now(),
            ..Default::default()
        };
        if request.verbose {
            let network = &self.sandboxes.host().network;
            let cni = network.details(&view.record().id).await;
            let interfaces = pod.interfaces().await;
            response.info = translate::pod_info(&view, cni, pod.usage().await, &interfaces);
            let console = pod.console(self.sandboxes.host()).await;
            // Each value is JSON: clients put it into a document as it is.
            let console = console.map(serde_json::Value::String);
            let console = console.map(|text| ("console".to_owned(), text.to_string()));
            response.info.extend(console);
        }
        Ok(Response::new(response))
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<cri::ListPodSandboxRequest>,
    ) -> Answer<cri::ListPodSandboxResponse> {
        let filter = request.into_inner().filter.unwrap_or_default();
        Ok(Response::new(cri::ListPodSandboxResponse {
            items: list::pods(&self.sandboxes, &filter),
        }))
    }

    async fn create_container(
        &self,
        request: Request<cri::CreateContainerRequest>,
    ) -> Answer<cri::CreateContainerResponse> {
        let deadline = edge::deadline(request.metadata());
        let request = request.into_inner();
        let config = config(request.config)?;
        let pod = self.pod(&request.pod_sandbox_id)?;
        let id = pod.create_container(config, deadline).await;
        answer(id.map(|container_id| cri::CreateContainerResponse { container_id }))
    }

    async fn start_container(
        &self,
        request: Request<cri::StartContainerRequest>,
    ) -> Answer<cri::StartContainerResponse> {
        let deadline = edge::deadline(request.metadata());
        let (pod, id) = self.container(&request.get_ref().container_id)?;
        let started = pod.start_container(id, deadline).await;
        answer(started.map(|()| cri::StartContainerResponse {}))
    }

    async fn stop_container(
        &self,
        request: Request<cri::StopContainerRequest>,
    ) -> Answer<cri::StopContainerResponse> {
        let request = request.into_inner();
        // An unknown container is as good as stopped.
        if let Some((pod, id)) = self.sandboxes.container(&request.container_id) {
            answer(pod.stop_container(&id, seconds(request.timeout)).await)?;
        }
        Ok(Response::new(cri::StopContainerResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<cri::RemoveContainerRequest>,
    ) -> Answer<cri::RemoveContainerResponse> {
        // An unknown container is as good as removed.
        if let Some((pod, id)) = self.sandboxes.container(&request.get_ref().container_id) {
            answer(pod.remove_container(&id).await)?;
        }
        Ok(Response::new(cri::RemoveContainerResponse {}))
    }

    async fn list_containers(
        &self,
        request: Request<cri::ListContainersRequest>,
    ) -> Answer<cri::ListContainersResponse> {
        let filter = request.into_inner().filter.unwrap_or_default();
        Ok(Response::new(cri::ListContainersResponse {
            containers: list::containers(&self.sandboxes, &filter),
        }))
    }

    async fn container_status(
        &self,
        request: Request<cri::ContainerStatusRequest>,
    ) -> Answer<cri::ContainerStatusResponse> {
        let request = request.into_inner();
        let (pod, id) = self.container(&request.container_id)?;
        let view = pod.view();
        let container = view.record().containers.get(&id);
        let missing = || status::of_sandbox(&SandboxError::no_container(&id));
        let container = container.ok_or_else(missing)?;
        let mut response = cri::ContainerStatusResponse {
            status: Some(translate::container_status(container)),
            ..Default::default()
        };
        if request.verbose {
            response.info = translate::container_info(&view, container);
        }
        Ok(Response::new(response))
    }

    async fn update_container_resources(
        &self,
        request: Request<cri::UpdateContainerResourcesRequest>,
    ) -> Answer<cri::UpdateContainerResourcesResponse> {
        let deadline = edge::deadline(request.metadata());
        let request = request.into_inner();
        let (pod, id) = self.container(&request.container_id)?;
        let asked = request.linux.unwrap_or_default();
        let updated = pod.update_container(id, asked, deadline).await;
        answer(updated.map(|()| cri::UpdateContainerResourcesResponse {}))
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<cri::UpdatePodSandboxResourcesRequest>,
    ) -> Answer<cri::UpdatePodSandboxResourcesResponse> {
        let deadline = edge::deadline(request.metadata());
        let request = request.into_inner();
        let pod = self.pod(&request.pod_sandbox_id)?;
        let overhead = request.overhead.unwrap_or_default();
        let resources = request.resources.unwrap_or_default();
        let updated = pod.update(overhead, resources, deadline).await;
        answer(updated.map(|()| cri::UpdatePodSandboxResourcesResponse {}))
    }

    async fn reopen_container_log(
        &self,
        request: Request<cri::ReopenContainerLogRequest>,
    ) -> Answer<cri::ReopenContainerLogResponse> {
        let (pod, id) = self.container(&request.get_ref().container_id)?;
        let reopened = pod.reopen_log(id).await;
        answer(reopened.map(|()| cri::ReopenContainerLogResponse {}))
    }

    async fn exec_sync(
        &self,
        request: Request<cri::ExecSyncRequest>,
    ) -> Answer<cri::ExecSyncResponse> {
        let request = request.into_inner();
        let (pod, id) = self.container(&request.container_id)?;
        let limit = match request.timeout {
            1.. => Deadline::after(seconds(request.timeout)),
            // None of its own, as for containerd: the command may run as long as the client stays.
            _ => Deadline::after(Duration::MAX),
        };
        let output = pod.exec(&id, &request.cmd, limit).await;
        answer(output.map(|output| cri::ExecSyncResponse {
            stdout: output.stdout,
            stderr: output.stderr,
            exit_code: output.code,
        }))
    }

    async fn exec(&self, request: Request<cri::ExecRequest>) -> Answer<cri::ExecResponse> {
        let request = request.into_inner();
        let cri::ExecRequest {
            stdin,
            stdout,
            stderr,
            tty,
            ..
        } = request;
        let wanted = stream::wanted(stdin, stdout, stderr, tty)?;
        let (pod, id) = self.container(&request.container_id)?;
        answer(pod.check_exec(&id, &request.cmd))?;
        let url = self.url(Kind::Exec, stream::exec(pod, id, request.cmd, wanted))?;
        Ok(Response::new(cri::ExecResponse { url }))
    }

    async fn attach(&self, request: Request<cri::AttachRequest>) -> Answer<cri::AttachResponse> {
        let request = request.into_inner();
        let cri::AttachRequest {
            stdin,
            stdout,
            stderr,
            tty,
            ..
        } = request;
        let wanted = stream::wanted(stdin, stdout, stderr, tty)?;
        let (pod, id) = self.container(&request.container_id)?;
        answer(pod.check_attach(&id))?;
        let url = self.url(Kind::Attach, stream::attach(pod, id, wanted))?;
        Ok(Response::new(cri::AttachResponse { url }))
    }

    async fn port_forward(
        &self,
        request: Request<cri::PortForwardRequest>,
    ) -> Answer<cri::PortForwardResponse> {
        let request = request.into_inner();
        let ports = stream::ports(&request)?;
        let pod = self.pod(&request.pod_sandbox_id)?;
        answer(pod.check_forward())?;
        let url = self.url(Kind::PortForward, stream::forward(pod, ports))?;
        Ok(Response::new(cri::PortForwardResponse { url }))
    }

    not_yet! {
        checkpoint_container: CheckpointContainerRequest => CheckpointContainerResponse,
            "CheckpointContainer";
    }

    type GetContainerEventsStream = event::Stream;

    async fn get_container_events(
        &self,
        _: Request<cri::GetEventsRequest>,
    ) -> Answer<Self::GetContainerEventsStream> {
        let events = &self.sandboxes.host().events;
        Ok(Response::new(event::subscribe(events)))
    }

    async fn container_stats(
        &self,
        request: Request<cri::ContainerStatsRequest>,
    ) -> Answer<cri::ContainerStatsResponse> {
        let (pod, id) = self.container(&request.get_ref().container_id)?;
        let stats = self.stats.container(&pod, &id).await;
        answer(stats.map(|stats| cri::ContainerStatsResponse { stats: Some(stats) }))
    }

    async fn list_container_stats(
        &self,
        request: Request<cri::ListContainerStatsRequest>,
    ) -> Answer<cri::ListContainerStatsResponse> {
        let filter = request.into_inner().filter.unwrap_or_default();
        let stats = self.container_figures(&filter).await;
        Ok(Response::new(cri::ListContainerStatsResponse { stats }))
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<cri::PodSandboxStatsRequest>,
    ) -> Answer<cri::PodSandboxStatsResponse> {
        let pod = self.pod(&request.get_ref().pod_sandbox_id)?;
        let stats = self.stats.pod(&pod).await;
        answer(stats.map(|stats| cri::PodSandboxStatsResponse { stats: Some(stats) }))
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<cri::ListPodSandboxStatsRequest>,
    ) -> Answer<cri::ListPodSandboxStatsResponse> {
        let filter = request.into_inner().filter.unwrap_or_default();
        let stats = self.pod_figures(&filter).await;
        Ok(Response::new(cri::ListPodSandboxStatsResponse { stats }))
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<cri::ListMetricDescriptorsRequest>,
    ) -> Answer<cri::ListMetricDescriptorsResponse> {
        Ok(Response::new(cri::ListMetricDescriptorsResponse {
            descriptors: stats::descriptors(),
        }))
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<cri::ListPodSandboxMetricsRequest>,
    ) -> Answer<cri::ListPodSandboxMetricsResponse> {
        let pod_metrics = self.stats.metrics().await;
        Ok(Response::new(cri::ListPodSandboxMetricsResponse {
            pod_metrics,
        }))
    }

    type StreamPodSandboxesStream = Parts<cri::StreamPodSandboxesResponse>;

    async fn stream_pod_sandboxes(
        &self,
        request: Request<cri::StreamPodSandboxesRequest>,
    ) -> Answer<Self::StreamPodSandboxesStream> {
        let filter = request.into_inner().filter.unwrap_or_default();
        Ok(in_parts(
            list::pods(&self.sandboxes, &filter),
            |pod_sandboxes| cri::StreamPodSandboxesResponse { pod_sandboxes },
        ))
    }

    type StreamContainersStream = Parts<cri::StreamContainersResponse>;

    async fn stream_containers(
        &self,
        request: Request<cri::StreamContainersRequest>,
    ) -> Answer<Self::StreamContainersStream> {
        let filter = request.into_inner().filter.unwrap_or_default();
        Ok(in_parts(
            list::containers(&self.sandboxes, &filter),
            |containers| cri::StreamContainersResponse { containers },
        ))
    }

    type StreamContainerStatsStream = Parts<cri::StreamContainerStatsResponse>;

    async fn stream_container_stats(
        &self,
        request: Request<cri::StreamContainerStatsRequest>,
    ) -> Answer<Self::StreamContainerStatsStream> {
        let filter = request.into_inner().filter.unwrap_or_default();
        let stats = self.container_figures(&filter).await;
        Ok(in_parts(stats, |container_stats| {
            cri::StreamContainerStatsResponse { container_stats }
        }))
    }

    type StreamPodSandboxStatsStream = Parts<cri::StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<cri::StreamPodSandboxStatsRequest>,
    ) -> Answer<Self::StreamPodSandboxStatsStream> {
        let filter = request.into_inner().filter.unwrap_or_default();
        let stats = self.pod_figures(&filter).await;
        Ok(in_parts(stats, |pod_sandbox_stats| {
            cri::StreamPodSandboxStatsResponse { pod_sandbox_stats }
        }))
    }

    type StreamPodSandboxMetricsStream = Parts<cri::StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<cri::StreamPodSandboxMetricsRequest>,
    ) -> Answer<Self::StreamPodSandboxMetricsStream> {
        let metrics = self.stats.metrics().await;
        Ok(in_parts(metrics, |pod_sandbox_metrics| {
            cri::StreamPodSandboxMetricsResponse {
                pod_sandbox_metrics,
            }
        }))
    }
}
