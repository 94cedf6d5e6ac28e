//! The RuntimeService.

use std::collections::HashMap;
use std::pin::Pin;
use std::time::Duration;

use bulkhead_cri_api::v1 as cri;
use bulkhead_cri_api::v1::runtime_service_server::RuntimeService;
use tonic::{Request, Response, Status};

use super::{edge, status, translate};
use crate::deadline::Deadline;
use crate::sandbox::{HANDLER, SandboxError, Sandboxes};

/// The version of the kubelet's runtime interface that `Version` has to name.
const KUBELET_API: &str = "0.1.0";
const RUNTIME_API: &str = "v1";

/// The RuntimeService over the pods.
pub struct Runtime {
    sandboxes: Sandboxes,
}

type Answer<T> = Result<Response<T>, Status>;
/// What `async_trait` makes of an `async fn`; the macros below are expanded after it.
type Pending<'a, T> = Pin<Box<dyn Future<Output = Answer<T>> + Send + 'a>>;
type Nothing<T> = tokio_stream::Empty<Result<T, Status>>;

impl Runtime {
    /// Serves these pods.
    pub fn new(sandboxes: Sandboxes) -> Self {
        Self { sandboxes }
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

macro_rules! not_yet_streams {
    ($($call:ident: $request:ident => $stream:ident of $response:ident, $name:literal;)*) => {
        $(
            type $stream = Nothing<cri::$response>;

            fn $call<'life, 'async_trait>(
                &'life self,
                _: Request<cri::$request>,
            ) -> Pending<'async_trait, Self::$stream>
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
        let host = std::sync::Arc::clone(self.sandboxes.host());
        let [runtime, network] = super::obstacles(&host).await;
        let conditions = vec![
            condition("RuntimeReady", "CannotRunPods", &runtime),
            condition("NetworkReady", "NetworkNotReady", &network),
        ];
        let handler = |name: &str| cri::RuntimeHandler {
            name: name.to_owned(),
            features: Some(cri::RuntimeHandlerFeatures {
                user_namespaces: true,
                ..Default::default()
            }),
        };
        let mut info = HashMap::new();
        if request.get_ref().verbose {
            let config = &self.sandboxes.host().config;
            let details = serde_json::json!({
                "root": config.root,
                "run": config.run,
                "network": host.network.kind(),
                "vm": {
                    "memoryMiB": config.vm.memory_mib,
                    "vcpus": config.vm.vcpus,
                    "scratchMiB": config.vm.scratch_mib,
                },
                "pods": self.sandboxes.list().len(),
            });
            info.insert("config".to_owned(), details.to_string());
        }
        Ok(Response::new(cri::StatusResponse {
            status: Some(cri::RuntimeStatus { conditions }),
            info,
            runtime_handlers: vec![handler(""), handler(HANDLER)],
            features: Some(cri::RuntimeFeatures::default()),
        }))
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
            response.info = translate::pod_info(&view, pod.usage().await);
        }
        Ok(Response::new(response))
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<cri::ListPodSandboxRequest>,
    ) -> Answer<cri::ListPodSandboxResponse> {
        let filter = request.into_inner().filter.unwrap_or_default();
        let pods = self.sandboxes.list();
        let pods = pods.iter().map(|view| translate::pod(view));
        Ok(Response::new(cri::ListPodSandboxResponse {
            items: pods
                .filter(|pod| translate::pod_passes(pod, &filter))
                .collect(),
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
        let mut containers = Vec::new();
        for view in self.sandboxes.list() {
            let of_pod = view.record().containers.values();
            let known = of_pod.filter(|container| container.is_known());
            let listed = known.map(|container| translate::container(&view, container));
            containers.extend(listed.filter(|one| translate::container_passes(one, &filter)));
        }
        Ok(Response::new(cri::ListContainersResponse { containers }))
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
        // No time limit of its own: the command may run as long as the client stays.
        let limit = match request.timeout {
            0 => Deadline::after(Duration::MAX),
            count => Deadline::after(seconds(count)),
        };
        let output = pod.exec(&id, &request.cmd, limit).await;
        answer(output.map(|output| cri::ExecSyncResponse {
            stdout: output.stdout,
            stderr: output.stderr,
            exit_code: output.code,
        }))
    }

    not_yet! {
        exec: ExecRequest => ExecResponse, "Exec";
        attach: AttachRequest => AttachResponse, "Attach";
        port_forward: PortForwardRequest => PortForwardResponse, "PortForward";
        container_stats: ContainerStatsRequest => ContainerStatsResponse, "ContainerStats";
        list_container_stats: ListContainerStatsRequest => ListContainerStatsResponse,
            "ListContainerStats";
        pod_sandbox_stats: PodSandboxStatsRequest => PodSandboxStatsResponse, "PodSandboxStats";
        list_pod_sandbox_stats: ListPodSandboxStatsRequest => ListPodSandboxStatsResponse,
            "ListPodSandboxStats";
        update_runtime_config: UpdateRuntimeConfigRequest => UpdateRuntimeConfigResponse,
            "UpdateRuntimeConfig";
        checkpoint_container: CheckpointContainerRequest => CheckpointContainerResponse,
            "CheckpointContainer";
        list_metric_descriptors: ListMetricDescriptorsRequest => ListMetricDescriptorsResponse,
            "ListMetricDescriptors";
        list_pod_sandbox_metrics: ListPodSandboxMetricsRequest => ListPodSandboxMetricsResponse,
            "ListPodSandboxMetrics";
    }

    not_yet_streams! {
        stream_pod_sandboxes: StreamPodSandboxesRequest
            => StreamPodSandboxesStream of StreamPodSandboxesResponse, "StreamPodSandboxes";
        stream_containers: StreamContainersRequest
            => StreamContainersStream of StreamContainersResponse, "StreamContainers";
        stream_container_stats: StreamContainerStatsRequest
            => StreamContainerStatsStream of StreamContainerStatsResponse, "StreamContainerStats";
        stream_pod_sandbox_stats: StreamPodSandboxStatsRequest
            => StreamPodSandboxStatsStream of StreamPodSandboxStatsResponse,
            "StreamPodSandboxStats";
        get_container_events: GetEventsRequest
            => GetContainerEventsStream of ContainerEventResponse, "GetContainerEvents";
        stream_pod_sandbox_metrics: StreamPodSandboxMetricsRequest
            => StreamPodSandboxMetricsStream of StreamPodSandboxMetricsResponse,
            "StreamPodSandboxMetrics";
    }
}

fn condition(kind: &str, reason: &str, holds: &Result<(), String>) -> cri::RuntimeCondition {
    let (reason, message) = match holds {
        Ok(()) => (String::new(), String::new()),
        Err(why) => (reason.to_owned(), why.clone()),
    };
    cri::RuntimeCondition {
        r#type: kind.to_owned(),
        status: holds.is_ok(),
        reason,
        message,
    }
}
