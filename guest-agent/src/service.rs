//! The gRPC service: translation only.

use std::io::ErrorKind;
use std::sync::Arc;

use bulkhead_agent_api::v1::agent_server::Agent;
use bulkhead_agent_api::v1::{self as api, container_state};
use tonic::{Request, Response, Status};

use crate::container::{
    CgroupError, ContainerError, Exit, LaunchError, NewExec, Size, State, Target, Which, off, plan,
};
use crate::disk::DiskError;
use crate::network::NetworkError;
use crate::operations::Operations;
use crate::sandbox::{Sandbox, SandboxError, check_id, set_time};
use crate::{stats, usage};

/// Largest request: a specification and a container's files.
pub const MOST_REQUEST_BYTES: usize = 16 << 20;

/// The service.
#[derive(Debug)]
pub struct Service {
    boot_id: String,
    sandbox: Arc<Sandbox>,
    operations: Operations,
}

impl Service {
    /// Serves `sandbox`.
    pub fn new(boot_id: String, sandbox: Sandbox) -> Self {
        Self {
            boot_id,
            sandbox: Arc::new(sandbox),
            operations: Operations::default(),
        }
    }

    async fn once<T, W>(
        &self,
        call: &'static str,
        id: &str,
        work: impl FnOnce(Arc<Sandbox>) -> W,
    ) -> Result<Response<T>, Status>
    where
        T: prost::Message + Default,
        W: Future<Output = Result<T, SandboxError>> + Send + 'static,
    {
        let work = work(Arc::clone(&self.sandbox));
        let work = async move { work.await.map_err(|error| status(&error)) };
        self.operations
            .once(call, id, work)
            .await
            .map(Response::new)
    }
}

/// The one place where errors become gRPC codes.
fn status(error: &SandboxError) -> Status {
    use tonic::Code;
    let code = match error {
        SandboxError::Invalid(_) => Code::InvalidArgument,
        SandboxError::State(_) => Code::FailedPrecondition,
        // The pod's disk, which its containers have filled.
        SandboxError::Step { source, .. } if source.kind() == ErrorKind::StorageFull => {
            Code::ResourceExhausted
        }
        SandboxError::Step { .. } => Code::Internal,
        SandboxError::Stream(_) => Code::OutOfRange,
        SandboxError::Dial(_) => Code::Unavailable,
        SandboxError::Network(error) => match error {
            NetworkError::Invalid { .. } => Code::InvalidArgument,
            NetworkError::Missing { .. } => Code::FailedPrecondition,
            NetworkError::Refused { .. } => Code::Internal,
        },
        SandboxError::Disk(error) => match error {
            DiskError::Invalid(_) => Code::InvalidArgument,
            DiskError::Bind { .. } | DiskError::Other { .. } | DiskError::InUse { .. } => {
                Code::FailedPrecondition
            }
            DiskError::Missing(_) => Code::NotFound,
            DiskError::Step { .. } | DiskError::Gone => Code::Internal,
        },
        SandboxError::Container(error) => match error {
            // Not Unimplemented, which clients take for the call itself.
            ContainerError::Plan(_)
            | ContainerError::Cgroup(
                CgroupError::Invalid(_) | CgroupError::Unknown(_) | CgroupError::Value { .. },
            ) => Code::InvalidArgument,
            ContainerError::Start(_) | ContainerError::State(_) => Code::FailedPrecondition,
            ContainerError::NotFound(_) => Code::NotFound,
            ContainerError::Exists(_) => Code::AlreadyExists,
            ContainerError::Exhausted(_) | ContainerError::Launch(LaunchError::Full(_)) => {
                Code::ResourceExhausted
            }
            ContainerError::Cgroup(_) | ContainerError::Launch(_) | ContainerError::Internal(_) => {
                Code::Internal
            }
        },
    };
    Status::new(code, error.to_string())
}

fn refuse(error: impl Into<SandboxError>) -> Status {
    status(&error.into())
}

fn named(id: String) -> Option<String> {
    (!id.is_empty()).then_some(id)
}

fn exit(exit: Exit) -> api::Exit {
    api::Exit {
        code: exit.code,
        finished_at_nanoseconds: exit.finished_at,
        oom_killed: exit.oom_killed,
        lost_bytes: exit.lost_bytes,
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Agent for Service {
    async fn identify(&self, _: Request<api::IdentifyRequest>) -> Answer<api::IdentifyResponse> {
        let kernel = rustix::system::uname();
        Ok(Response::new(api::IdentifyResponse {
            version: bulkhead_agent_api::VERSION,
            boot_id: self.boot_id.clone(),
            kernel_release: kernel.release().to_string_lossy().into_owned(),
            agent_version: env!("CARGO_PKG_VERSION").into(),
        }))
    }

    async fn prepare(&self, request: Request<api::PrepareRequest>) -> Answer<api::PrepareResponse> {
        let request = request.into_inner();
        let id = request.operation_id.clone();
        self.once("Prepare", &id, |sandbox| async move {
            sandbox.prepare(request).await?;
            Ok(api::PrepareResponse {})
        })
        .await
    }

    async fn set_time(
        &self,
        request: Request<api::SetTimeRequest>,
    ) -> Answer<api::SetTimeResponse> {
        set_time(request.into_inner().wall_clock_nanoseconds).map_err(refuse)?;
        Ok(Response::new(api::SetTimeResponse {}))
    }

    async fn attach_disk(
        &self,
        request: Request<api::AttachDiskRequest>,
    ) -> Answer<api::AttachDiskResponse> {
        let request = request.into_inner();
        self.once("AttachDisk", &request.operation_id, |sandbox| async move {
            sandbox
                .disks()
                .attach(request.window, request.serial)
                .await?;
            Ok(api::AttachDiskResponse {})
        })
        .await
    }

    async fn detach_disk(
        &self,
        request: Request<api::DetachDiskRequest>,
    ) -> Answer<api::DetachDiskResponse> {
        let request = request.into_inner();
        self.once("DetachDisk", &request.operation_id, |sandbox| async move {
            sandbox
                .disks()
                .detach(request.window, request.serial)
                .await?;
            Ok(api::DetachDiskResponse {})
        })
        .await
    }

    async fn create_container(
        &self,
        request: Request<api::CreateContainerRequest>,
    ) -> Answer<api::CreateContainerResponse> {
        let request = request.into_inner();
        let id = request.operation_id.clone();
        self.once("CreateContainer", &id, |sandbox| async move {
            let created = sandbox.create(request).await?;
            Ok(api::CreateContainerResponse {
                pid: created.pid.unsigned_abs(),
                uid: created.uid,
                gid: created.gid,
                supplementary_gids: created.groups,
            })
        })
        .await
    }

    async fn start_container(
        &self,
        request: Request<api::StartContainerRequest>,
    ) -> Answer<api::StartContainerResponse> {
        let request = request.into_inner();
        self.once(
            "StartContainer",
            &request.operation_id,
            |sandbox| async move {
                let started = sandbox.container(&request.container_id)?.start().await?;
                Ok(api::StartContainerResponse {
                    started_at_nanoseconds: started,
                })
            },
        )
        .await
    }

    async fn signal(&self, request: Request<api::SignalRequest>) -> Answer<api::SignalResponse> {
        let request = request.into_inner();
        let signal = i32::try_from(request.signal).unwrap_or(0);
        if !(1..=64).contains(&signal) {
            let what = format!("signal {} does not exist", request.signal);
            return Err(Status::invalid_argument(what));
        }
        let target = match (request.all, named(request.exec_id)) {
            (true, None) => Target::All,
            (true, Some(_)) => {
                return Err(Status::invalid_argument(
                    "all and exec_id exclude each other",
                ));
            }
            (false, Some(exec)) => Target::Exec(exec),
            (false, None) => Target::Init,
        };
        self.once("Signal", &request.operation_id, |sandbox| async move {
            let container = sandbox.container(&request.container_id)?;
            container.signal(target, signal).await?;
            Ok(api::SignalResponse {})
        })
        .await
    }

    async fn wait(&self, request: Request<api::WaitRequest>) -> Answer<api::WaitResponse> {
        let request = request.into_inner();
        let container = self
            .sandbox
            .container(&request.container_id)
            .map_err(refuse)?;
        let ended = container
            .wait(named(request.exec_id))
            .await
            .map_err(refuse)?;
        Ok(Response::new(api::WaitResponse {
            exit: Some(exit(ended)),
        }))
    }

    async fn remove_container(
        &self,
        request: Request<api::RemoveContainerRequest>,
    ) -> Answer<api::RemoveContainerResponse> {
        let request = request.into_inner();
        self.once(
            "RemoveContainer",
            &request.operation_id,
            |sandbox| async move {
                sandbox.remove(&request.container_id).await?;
                Ok(api::RemoveContainerResponse {})
            },
        )
        .await
    }

    async fn update_resources(
        &self,
        request: Request<api::UpdateResourcesRequest>,
    ) -> Answer<api::UpdateResourcesResponse> {
        let request = request.into_inner();
        let id = request.operation_id.clone();
        self.once("UpdateResources", &id, |sandbox| async move {
            let (id, resources) = (&request.container_id, &request.resources);
            sandbox.update(id, resources, request.oom_score_adj).await?;
            Ok(api::UpdateResourcesResponse {})
        })
        .await
    }

    async fn list_containers(
        &self,
        _: Request<api::ListContainersRequest>,
    ) -> Answer<api::ListContainersResponse> {
        let mut containers = Vec::new();
        for (container_id, container) in self.sandbox.containers() {
            // One removed meanwhile is not in the list.
            let Ok((state, pid)) = container.state().await else {
                continue;
            };
            let mut listed = api::ContainerState {
                container_id,
                pid: pid.unsigned_abs(),
                ..api::ContainerState::default()
            };
            let (state, ended) = match state {
                State::Created => (container_state::State::Created, None),
                State::Running => (container_state::State::Running, None),
                State::Exited(ended) => (container_state::State::Exited, Some(exit(ended))),
            };
            listed.set_state(state);
            listed.exit = ended;
            containers.push(listed);
        }
        Ok(Response::new(api::ListContainersResponse { containers }))
    }

    async fn changed_files(
        &self,
        request: Request<api::ChangedFilesRequest>,
    ) -> Answer<api::ChangedFilesResponse> {
        let id = request.into_inner().container_id;
        let changed = self.sandbox.changed_files(&id).await.map_err(refuse)?;
        Ok(Response::new(changed))
    }

    async fn exec(&self, request: Request<api::ExecRequest>) -> Answer<api::ExecResponse> {
        let request = request.into_inner();
        check_id("exec id", &request.exec_id).map_err(refuse)?;
        self.once("Exec", &request.operation_id, |sandbox| async move {
            let process = plan::read_process(&request.process).map_err(ContainerError::from)?;
            let new = NewExec {
                id: request.exec_id,
                process,
                stdin: request.stdin,
            };
            let pid = sandbox.container(&request.container_id)?.exec(new).await?;
            Ok(api::ExecResponse {
                pid: pid.unsigned_abs(),
            })
        })
        .await
    }

    async fn remove_exec(
        &self,
        request: Request<api::RemoveExecRequest>,
    ) -> Answer<api::RemoveExecResponse> {
        let request = request.into_inner();
        self.once("RemoveExec", &request.operation_id, |sandbox| async move {
            let container = sandbox.container(&request.container_id)?;
            container.remove_exec(request.exec_id).await?;
            Ok(api::RemoveExecResponse {})
        })
        .await
    }

    async fn open_stream(
        &self,
        request: Request<api::OpenStreamRequest>,
    ) -> Answer<api::OpenStreamResponse> {
        let request = request.into_inner();
        let which = match request.stdio() {
            api::Stdio::Stdin => Which::Stdin,
            api::Stdio::Stdout => Which::Stdout,
            api::Stdio::Stderr => Which::Stderr,
            api::Stdio::Unspecified => {
                return Err(Status::invalid_argument("stdio must name a stream"));
            }
        };
        let container = self
            .sandbox
            .container(&request.container_id)
            .map_err(refuse)?;
        let endpoint = container
            .endpoint(named(request.exec_id), which)
            .await
            .map_err(refuse)?;
        let opened = self
            .sandbox
            .open(endpoint, request.token, request.offset)
            .await;
        opened.map_err(refuse)?;
        Ok(Response::new(api::OpenStreamResponse {}))
    }

    async fn forward(&self, request: Request<api::ForwardRequest>) -> Answer<api::ForwardResponse> {
        let api::ForwardRequest { port, token } = request.into_inner();
        let port = u16::try_from(port).unwrap_or(0);
        if port == 0 {
            return Err(Status::invalid_argument("a port is from 1 to 65535"));
        }
        self.sandbox.forward(port, token).await.map_err(refuse)?;
        Ok(Response::new(api::ForwardResponse {}))
    }

    async fn stats(&self, _: Request<api::StatsRequest>) -> Answer<api::StatsResponse> {
        Ok(Response::new(stats::look(&self.sandbox).await))
    }

    async fn usage(&self, _: Request<api::UsageRequest>) -> Answer<api::UsageResponse> {
        let usage = off(usage::look).await.map_err(refuse)?;
        Ok(Response::new(api::UsageResponse {
            descriptors: usage.descriptors,
            memory_bytes: usage.memory,
            mounts: usage.mounts,
            cgroups: usage.cgroups,
            processes: usage.processes,
            zombies: usage.zombies,
        }))
    }

    async fn resize(&self, request: Request<api::ResizeRequest>) -> Answer<api::ResizeResponse> {
        let request = request.into_inner();
        let size = Size::new(request.columns, request.rows).map_err(Status::invalid_argument)?;
        let container = self
            .sandbox
            .container(&request.container_id)
            .map_err(refuse)?;
        let resized = container.resize(named(request.exec_id), size).await;
        resized.map_err(refuse)?;
        Ok(Response::new(api::ResizeResponse {}))
    }

    async fn shutdown(
        &self,
        request: Request<api::ShutdownRequest>,
    ) -> Answer<api::ShutdownResponse> {
        let id = request.into_inner().operation_id;
        self.once("Shutdown", &id, |sandbox| async move {
            sandbox.shut_down().await?;
            Ok(api::ShutdownResponse {})
        })
        .await
    }
}
