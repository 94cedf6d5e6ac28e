//! From a record to a guest that answers, and back.

use std::os::unix::fs::DirBuilderExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_agent_api::v1;
use bulkhead_cri_api::v1 as cri;
use bulkhead_vmm_api::{Control, Launch, MAX_QUEUE_PAIRS, OpenDevice};
use std::os::fd::OwnedFd;
use tokio::sync::mpsc;
use tracing::{Instrument, info_span};

use super::host::{self, Host};
use super::record::Record;
use super::size::{Machine, Size};
use super::state::PodState;
use super::undo::{Step, Undo, UndoList};
use super::{SandboxError, dns, limit, scratch};
use crate::cgroup::PodCgroup;
use crate::container::users;
use crate::deadline::Deadline;
use crate::guest::{Guest, GuestError};
use crate::network::{PodNetwork, Tap};
use crate::vm::{self, Ended, Vm, tail};

/// Every VM has a vsock device of its own, so they may all have the same address.
const GUEST_CID: u32 = 3;
/// What the kernel is told besides its devices: to be quiet, to end the VM when it panics, and to
/// take entropy from the CPU as the agent brings the host's later.
const COMMAND_LINE: &str = "console=ttyS0 quiet loglevel=4 panic=-1 reboot=k random.trust_cpu=on";
/// How long the end of killed processes is awaited.
const CGROUP_END: Duration = Duration::from_secs(10);
/// How far a boot had come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The VMM runs; nothing was heard of the guest.
    Kernel,
    /// The guest has dialled.
    Agent,
    /// The agent has said who it is.
    Prepare,
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Kernel => "before its agent called the host",
            Self::Agent => "after its agent called the host, before it said who it is",
            Self::Prepare => "while its agent prepared the sandbox",
        })
    }
}

/// How long the parts of a pod's start took, in microseconds.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct Phases {
    /// On the host, until the VMM was started.
    pub host_us: u64,
    /// The network, as a part of that.
    pub network_us: u64,
    /// From then until the guest's agent answered.
    pub guest_us: u64,
    /// The agent's preparations.
    pub prepare_us: u64,
}

impl Phases {
    /// Each part by its name, none within another.
    pub fn parts(&self) -> [(&'static str, u64); 4] {
        let host = self.host_us.saturating_sub(self.network_us);
        [
            ("network", self.network_us),
            ("host", host),
            ("guest", self.guest_us),
            ("prepare", self.prepare_us),
        ]
    }
}

/// A pod whose guest answers.
#[derive(Debug)]
pub struct Live {
    /// The VM.
    pub vm: Vm,
    /// Its agent.
    pub guest: Arc<Guest>,
    /// How long its start took, if this server has started it.
    pub phases: Option<Phases>,
}

/// A pod's record together with the machine, for what changes both.
pub struct Ground<'a> {
    /// The machine.
    pub host: &'a Host,
    /// The pod.
    pub record: &'a mut Record,
}

impl Ground<'_> {
    /// Makes everything the pod needs and waits for its guest. What was made stays in the
    /// record's list of steps, also after a failure.
    pub async fn boot(&mut self, deadline: Deadline) -> Result<Live, SandboxError> {
        let begun = Instant::now();
        let id = self.record.id.clone();
        let machine = blocking(Machine::look).await?;
        let size = Size::of(&self.record.config, &self.host.config.vm, machine)?;
        self.before(Step::RunDirectory).await?;
        let run = self.host.run_directory(&id);
        blocking(move || make_directory(&run)).await?;

        self.before(Step::Network).await?;
        // One for each vCPU, so that none waits for another to send.
        let queues = usize::from(size.vcpus).min(MAX_QUEUE_PAIRS);
        let config = &self.record.config;
        let joining = Instant::now();
        let joined = self.host.network.set_up(&id, config, queues);
        let (network, taps) = joined.instrument(info_span!("network")).await?;
        let network_us = microseconds(joining.elapsed());

        self.before(Step::Cgroup).await?;
        let cgroup = self.host.cgroup(&id, &self.record.config)?;
        let limits = limit::on_host(&self.record.config);
        let cgroup = blocking(move || {
            cgroup.create()?;
            cgroup.limit(&limits)?;
            Ok(cgroup)
        })
        .await?;

        self.before(Step::Scratch).await?;
        let templates = self.host.templates();
        let path = self.host.scratch(&id);
        let bound = self.host.config.vm.scratch_mib;
        let disk = blocking(move || Ok(scratch::make(&templates, &path, bound)?));
        let disk = disk.instrument(info_span!("scratch")).await?;

        self.record.memory_mib = Some(size.memory_mib);
        self.before(Step::Vmm).await?;
        let launch = self.launch(size, &network, taps, disk.into(), cgroup);
        let launch = launch.await?;
        let (sender, streams) = mpsc::channel(vm::WAITING_STREAMS);
        let files = self.host.vm_files(&id);
        let launched = Instant::now();
        let launching = Vm::launch(launch, files, bulkhead_agent_api::PORT, sender);
        let vm = launching.instrument(info_span!("vmm")).await?;
        let guest = Arc::new(Guest::new(self.record.secret, false, streams));
        let mut live = Live {
            vm,
            guest,
            phases: None,
        };

        let limit = deadline.at_most(self.host.config.vm.boot_timeout());
        let greeting = live.guest.identify(limit);
        let stage = || match live.guest.has_dialled() {
            false => Stage::Kernel,
            true => Stage::Agent,
        };
        let greeted = live.or_died(greeting, stage);
        let identity = greeted.instrument(info_span!("guest")).await?;
        let answered = Instant::now();
        let request = self.prepare(&network)?;
        let prepared = live.guest.prepare(request, limit);
        let prepared = live.or_died(prepared, || Stage::Prepare);
        prepared.instrument(info_span!("prepare")).await?;
        let phases = Phases {
            host_us: microseconds(launched - begun),
            network_us,
            guest_us: microseconds(answered - launched),
            prepare_us: microseconds(answered.elapsed()),
        };
        live.phases = Some(phases);
        self.host.metrics.started(&phases);
        tracing::info!(
            sandbox = %id, kernel = %identity.kernel_release, agent = %identity.agent_version,
            memory_mib = size.memory_mib, vcpus = size.vcpus,
            host_us = phases.host_us, network_us,
            guest_us = phases.guest_us, prepare_us = phases.prepare_us,
            "the guest is ready"
        );

        self.record.state = PodState::Ready {
            vmm: live.vm.process().clone(),
            agent: identity.boot_id,
            network,
        };
        self.host.records.save(self.record).await?;
        Ok(live)
    }

    /// Takes back everything the record's steps name.
    pub async fn tear_down(&mut self) -> Result<(), SandboxError> {
        let mut steps = self.record.steps.clone();
        steps.unwind(self).await
    }

    async fn before(&mut self, step: Step) -> Result<(), SandboxError> {
        let mut steps = self.record.steps.clone();
        steps.before(step, self).await
    }

    async fn launch(
        &self,
        size: Size,
        network: &PodNetwork,
        taps: Vec<Tap>,
        scratch: OwnedFd,
        cgroup: PodCgroup,
    ) -> Result<Launch, SandboxError> {
        let artefacts = self.host.artefacts().map_err(SandboxError::Unavailable)?;
        let files = self.host.vm_files(&self.record.id);
        let (control, exit_record, messages, cgroup_procs) = blocking(move || {
            let control = Control::listen(&files.control).map_err(at(&files.control))?;
            let exit_record = empty_file(&files.exit_record)?;
            let messages = empty_file(&files.messages)?;
            Ok((control, exit_record, messages, cgroup.procs()?))
        })
        .await?;
        let length = u64::from(self.host.config.vm.scratch_mib) << 20;
        let disk = OpenDevice::disk(scratch::SERIAL, false, vec![(scratch, 0, length)]);
        let cards = network.interfaces.iter().zip(taps);
        let cards = cards.map(|(interface, tap)| {
            let mtu = u16::try_from(interface.mtu).unwrap_or(u16::MAX);
            OpenDevice::net(tap, interface.mac, mtu)
        });
        Ok(Launch {
            program: artefacts.vmm,
            id: self.record.id.clone(),
            kvm: artefacts.kvm,
            kernel: artefacts.kernel,
            initramfs: Some(artefacts.initramfs),
            command_line: COMMAND_LINE.to_owned(),
            memory_mib: size.memory_mib,
            vcpus: size.vcpus,
            guest_cid: GUEST_CID,
            control,
            exit_record,
            console: None,
            devices: std::iter::once(disk).chain(cards).collect(),
            cgroup_procs: Some(cgroup_procs),
            messages: Some(messages),
        })
    }

    fn prepare(&self, network: &PodNetwork) -> Result<v1::PrepareRequest, SandboxError> {
        let config = &self.record.config;
        let linux = config.linux.clone().unwrap_or_default();
        let security = linux.security_context.unwrap_or_default();
        let namespaces = security.namespace_options.unwrap_or_default();
        let (users, groups) = users::ranges(Some(&namespaces))?;
        let entropy = host::random()?;
        Ok(v1::PrepareRequest {
            operation_id: "prepare".to_owned(),
            hostname: self.record.hostname.clone(),
            interfaces: network.interfaces.iter().map(interface).collect(),
            resolv_conf: dns::resolv_conf(config.dns_config.as_ref(), &network.dns),
            sysctls: network.sysctls_under(linux.sysctls),
            wall_clock_nanoseconds: host::now(),
            entropy: entropy.to_vec(),
            scratch_serial: scratch::SERIAL.to_owned(),
            shm_bytes: 0,
            shared_pid_namespace: namespaces.pid() == cri::NamespaceMode::Pod,
            resources: limit::in_guest(config)?,
            users: users.into_iter().map(id_mapping).collect(),
            groups: groups.into_iter().map(id_mapping).collect(),
        })
    }
}

impl Undo for Ground<'_> {
    type Error = SandboxError;

    async fn keep(&mut self, list: &UndoList) -> Result<(), SandboxError> {
        self.record.steps = list.clone();
        Ok(self.host.records.save(self.record).await?)
    }

    async fn undo(&mut self, step: Step) -> Result<(), SandboxError> {
        let id = self.record.id.clone();
        match step {
            Step::Vmm => {
                // It enters the pod's cgroup before it does anything else, so this finds it even
                // if its pid was never written down.
                let cgroup = self.host.cgroup(&id, &self.record.config)?;
                blocking(move || Ok(cgroup.kill()?)).await
            }
            Step::Scratch => {
                let path = self.host.scratch(&id);
                blocking(move || gone(std::fs::remove_file(&path)).map_err(at(&path))).await
            }
            Step::Cgroup => {
                let cgroup = self.host.cgroup(&id, &self.record.config)?;
                blocking(move || Ok(cgroup.remove(CGROUP_END)?)).await
            }
            Step::Network => Ok(self.host.network.tear_down(&id).await?),
            Step::RunDirectory => {
                let path = self.host.run_directory(&id);
                blocking(move || gone(std::fs::remove_dir_all(&path)).map_err(at(&path))).await
            }
        }
    }
}

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

impl Live {
    /// Awaits a call of the boot; when the VM ends, or the guest is late, the error says how far
    /// it had come and what its console showed.
    async fn or_died<T>(
        &self,
        call: impl Future<Output = Result<T, GuestError>>,
        stage: impl Fn() -> Stage,
    ) -> Result<T, SandboxError> {
        let ended = tokio::select! {
            answer = call => match answer {
                Ok(answer) => return Ok(answer),
                Err(GuestError::Late(_)) => None,
                // The connection breaks a moment before the VM's end is seen.
                Err(error) if error.lost() => {
                    let patience = Deadline::after(Duration::from_secs(2));
                    match patience.bound(self.vm.wait()).await {
                        Ok(ended) => Some(ended),
                        Err(_) => return Err(error.into()),
                    }
                }
                Err(error) => return Err(error.into()),
            },
            ended = self.vm.wait() => Some(ended),
        };
        match ended {
            Some(Ended {
                reason,
                console_tail,
            }) => Err(SandboxError::Died {
                stage: stage(),
                reason,
                console: tail(&console_tail),
            }),
            None => {
                let patience = Deadline::after(Duration::from_secs(2));
                let console = self
                    .vm
                    .console_tail("boot-stats".to_owned(), patience)
                    .await;
                Err(SandboxError::Slow {
                    stage: stage(),
                    console: tail(&console),
                })
            }
        }
    }
}

fn id_mapping(range: cri::IdMapping) -> v1::IdMapping {
    v1::IdMapping {
        container_id: range.container_id,
        host_id: range.host_id,
        length: range.length,
    }
}

fn interface(interface: &crate::network::Interface) -> v1::Interface {
    let bytes = |address: std::net::IpAddr| match address {
        std::net::IpAddr::V4(address) => address.octets().to_vec(),
        std::net::IpAddr::V6(address) => address.octets().to_vec(),
    };
    v1::Interface {
        name: interface.name.clone(),
        mac: interface.mac.to_vec(),
        mtu: interface.mtu,
        addresses: interface
            .addresses
            .iter()
            .map(|address| v1::Address {
                address: bytes(address.address),
                prefix_length: address.prefix.into(),
            })
            .collect(),
        exact_routes: interface.exact_routes,
        neighbours: interface
            .neighbours
            .iter()
            .map(|neighbour| v1::Neighbour {
                address: bytes(neighbour.address),
                mac: neighbour.mac.to_vec(),
            })
            .collect(),
        routes: interface
            .routes
            .iter()
            .map(|route| v1::Route {
                destination: bytes(route.destination),
                prefix_length: route.prefix.into(),
                gateway: route.gateway.map(bytes).unwrap_or_default(),
                metric: route.metric,
                mtu: route.mtu,
                advertised_mss: route.advertised_mss,
                scope: route.scope.into(),
                on_link: route.on_link,
                source: route.source.map(bytes).unwrap_or_default(),
            })
            .collect(),
    }
}

fn make_directory(path: &Path) -> Result<(), SandboxError> {
    let mut builder = std::fs::DirBuilder::new();
    let made = builder.recursive(true).mode(0o700).create(path);
    made.map_err(at(path))
}

fn empty_file(path: &Path) -> Result<OwnedFd, SandboxError> {
    let mut options = std::fs::OpenOptions::new();
    let opened = options
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path);
    opened.map(OwnedFd::from).map_err(at(path))
}

fn at(path: &Path) -> impl FnOnce(std::io::Error) -> SandboxError + use<> {
    let path = path.to_owned();
    move |source| SandboxError::File { path, source }
}

fn gone(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Runs what blocks off the async threads.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SandboxError> + Send + 'static,
) -> Result<T, SandboxError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(SandboxError::Broken(error.to_string())),
    }
}
