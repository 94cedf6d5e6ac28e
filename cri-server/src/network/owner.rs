//! The one owner of what the host's network has of ours: bridge, translation, leases and the
//! host's ends of the pods' links. A thread with a runtime of its own, since it touches files;
//! it ends when the last sender is gone.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use tokio::sync::{mpsc, oneshot};

use super::bridge::{self, Bridge, Plan};
use super::error::NetworkError;
use super::flows;
use super::forwarding;
use super::guard::Guard;
use super::link::{Links, Pair};
use super::nat::{self, Way};
use super::pool::Pool;
use super::ports::{self, HostPort, HostPorts};
use super::subnets::{self, Subnets};

/// Requests that may wait for the owner before senders wait.
const QUEUE: usize = 64;

type Reply<T> = oneshot::Sender<Result<T, NetworkError>>;

enum Request {
    Attach {
        wanted: Wanted,
        reply: Reply<Attachment>,
    },
    Detach {
        sandbox: String,
        reply: Reply<()>,
    },
    Tell {
        networks: subnets::Pair,
        reply: Reply<Option<Subnets>>,
    },
}

/// What a sandbox is to have.
#[derive(Debug)]
pub struct Wanted {
    pub sandbox: String,
    /// The pod's namespace and name, for people.
    pub pod: String,
    /// Name of its link.
    pub link: &'static str,
    /// Where the link goes.
    pub namespace: OwnedFd,
    pub ports: Vec<HostPort>,
}

/// A pod's place on the bridge.
#[derive(Debug, Clone)]
pub struct Attachment {
    /// The name of the bridge.
    pub bridge: String,
    pub address: Ipv4Addr,
    pub subnets: Subnets,
    pub mac: [u8; 6],
    pub mtu: u32,
}

impl Attachment {
    /// What its guest may send.
    pub fn guard(&self) -> Guard {
        Guard {
            mac: self.mac,
            v4: self.address,
            v6: self.subnets.beside(self.address),
        }
    }
}

/// Sends to the owner.
#[derive(Debug, Clone)]
pub struct Owner {
    requests: mpsc::Sender<Request>,
}

impl Owner {
    /// Starts the thread. A bridge that no lease needs any more is removed.
    pub async fn start(plan: Plan, pool: Pool, ports: HostPorts) -> Result<Self, NetworkError> {
        let (requests, receiver) = mpsc::channel(QUEUE);
        let (reply, started) = oneshot::channel();
        std::thread::Builder::new()
            .name("network".to_owned())
            .spawn(move || run(plan, pool, ports, receiver, reply))
            .map_err(|source| NetworkError::Netlink {
                step: "start the network's thread".to_owned(),
                source,
            })?;
        started.await.map_err(|_| NetworkError::Ended)??;
        Ok(Self { requests })
    }

    /// Gives the sandbox addresses, ports of the host and a link in its namespace. What an
    /// interrupted attempt left is replaced; after a failure [`Self::detach`] takes back what was
    /// done.
    pub async fn attach(&self, wanted: Wanted) -> Result<Attachment, NetworkError> {
        self.ask(|reply| Request::Attach { wanted, reply }).await
    }

    /// Remembers the networks that the kubelet gives this node, for the next bridge. Answers
    /// those of the bridge there is, if it has others.
    pub async fn tell(&self, networks: subnets::Pair) -> Result<Option<Subnets>, NetworkError> {
        self.ask(|reply| Request::Tell { networks, reply }).await
    }

    /// Takes both back, and the bridge when this was the last; nothing when there is nothing.
    pub async fn detach(&self, sandbox: &str) -> Result<(), NetworkError> {
        let sandbox = sandbox.to_owned();
        self.ask(|reply| Request::Detach { sandbox, reply }).await
    }

    async fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T, NetworkError> {
        let (reply, answer) = oneshot::channel();
        self.requests
            .send(request(reply))
            .await
            .map_err(|_| NetworkError::Ended)?;
        answer.await.map_err(|_| NetworkError::Ended)?
    }
}

fn run(
    plan: Plan,
    pool: Pool,
    ports: HostPorts,
    mut requests: mpsc::Receiver<Request>,
    started: Reply<()>,
) {
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(source) => {
            let step = "start the network's runtime".to_owned();
            let _ = started.send(Err(NetworkError::Netlink { step, source }));
            return;
        }
    };
    runtime.block_on(async move {
        let mut host = match Host::open(plan, pool, ports).await {
            Ok(host) => host,
            Err(error) => {
                let _ = started.send(Err(error));
                return;
            }
        };
        let _ = started.send(Ok(()));
        // An answer nobody waits for is no loss: what was done is found again by its name.
        while let Some(request) = requests.recv().await {
            match request {
                Request::Attach { wanted, reply } => {
                    let _ = reply.send(host.attach(wanted).await);
                }
                Request::Detach { sandbox, reply } => {
                    let _ = reply.send(host.detach(&sandbox).await);
                }
                Request::Tell { networks, reply } => {
                    let _ = reply.send(host.tell(networks).await);
                }
            }
        }
    });
}

struct Host {
    plan: Plan,
    pool: Pool,
    ports: HostPorts,
    links: Links,
    /// The bridge this server has made or completed, with its translation and the index it then
    /// had.
    bridge: Option<Bridge>,
}

impl Host {
    async fn open(plan: Plan, pool: Pool, ports: HostPorts) -> Result<Self, NetworkError> {
        let links = Links::open()?;
        if pool.is_empty() {
            plan.remove(&links).await?;
        }
        let host = Self {
            plan,
            pool,
            ports,
            links,
            bridge: None,
        };
        if let Err(error) = host.complete().await {
            tracing::error!(%error, "pods of an earlier server may lack their translation");
        }
        Ok(host)
    }

    /// Sets the translation of pods that run, where somebody has removed it meanwhile.
    async fn complete(&self) -> Result<(), NetworkError> {
        match self.plan.existing(&self.links).await? {
            Some(Bridge { link, subnets }) if !nat::is_set(&link.name) => {
                nat::set(&link.name, subnets, &self.ways(subnets, None)).await
            }
            _ => Ok(()),
        }
    }

    async fn attach(&mut self, wanted: Wanted) -> Result<Attachment, NetworkError> {
        let known = self.known().await?;
        let fresh = known.is_none();
        let bridge = match known {
            Some(bridge) => bridge,
            None => self.plan.ensure(&self.links).await?,
        };
        let sandbox = &wanted.sandbox;
        let subnets = bridge.subnets;
        if subnets.v6.is_none()
            && let Some(port) = wanted.ports.iter().find(|port| port.is_ipv6())
        {
            let why = format!(
                "{port} is of IPv6, which pods do not have: this host has switched it off, or the \
                 bridge's MTU is below 1280 (network.mtu)"
            );
            return Err(NetworkError::HostPort(why));
        }
        let address = self.pool.claim(subnets.v4, sandbox)?;
        let had = self.ports.has(sandbox);
        self.claim(&wanted).await?;
        let has = !wanted.ports.is_empty();
        if fresh || had || has || !nat::is_set(&bridge.link.name) {
            nat::set(&bridge.link.name, subnets, &self.ways(subnets, None)).await?;
        }
        forget(&wanted.ports);
        self.bridge = Some(bridge.clone());
        let host = host_link(sandbox);
        if let Some(left) = self.links.find(&host).await? {
            self.links.remove(&left).await?;
        }
        let attachment = Attachment {
            bridge: bridge.link.name.clone(),
            address,
            subnets,
            mac: bridge::mac(address),
            mtu: bridge.link.mtu,
        };
        self.links
            .add_pair(Pair {
                host: &host,
                bridge: bridge.link.index,
                pod: wanted.link,
                namespace: wanted.namespace,
                mac: attachment.mac,
                mtu: attachment.mtu,
            })
            .await?;
        if has {
            // The rules that guard the loopback are there.
            forwarding::route_loopback(&bridge.link.name)?;
        }
        // The way of a pod to itself by a port of the host, or a service.
        if let Some(port) = self.links.find(&host).await? {
            self.links.set_hairpin(&port).await?;
        }
        Ok(attachment)
    }

    /// Ports of the host are one server's, too.
    async fn claim(&mut self, wanted: &Wanted) -> Result<(), NetworkError> {
        if wanted.ports.is_empty() {
            return self.ports.claim(&wanted.sandbox, &wanted.pod, &[]);
        }
        let _lock = bridge::lock()?;
        for root in self.plan.others(&self.links).await? {
            ports::refuse_held(&root, &wanted.ports)?;
        }
        self.ports
            .claim(&wanted.sandbox, &wanted.pod, &wanted.ports)
    }

    async fn detach(&mut self, sandbox: &str) -> Result<(), NetworkError> {
        if let Some(link) = self.links.find(&host_link(sandbox)).await? {
            self.links.remove(&link).await?;
        }
        if self.ports.has(sandbox) {
            // With the last pod all rules go.
            if !self.pool.is_only(sandbox)
                && let Some(bridge) = self.plan.existing(&self.links).await?
            {
                let ways = self.ways(bridge.subnets, Some(sandbox));
                nat::set(&bridge.link.name, bridge.subnets, &ways).await?;
            }
        }
        let ports = self.ports.of(sandbox).to_vec();
        self.ports.release(sandbox)?;
        self.pool.release(sandbox)?;
        if self.pool.is_empty() {
            self.bridge = None;
            self.plan.remove(&self.links).await?;
        }
        forget(&ports);
        Ok(())
    }

    async fn tell(&mut self, networks: subnets::Pair) -> Result<Option<Subnets>, NetworkError> {
        self.plan.choice.tell(networks)?;
        let wanted = self.plan.choice.wanted();
        let bridge = self.plan.existing(&self.links).await?;
        Ok(bridge.map(|bridge| bridge.subnets).filter(|there| {
            wanted.v4.is_some_and(|v4| v4 != there.v4)
                || wanted.v6.is_some_and(|v6| Some(v6) != there.v6)
        }))
    }

    /// The bridge this server has set up, unless somebody removed it.
    async fn known(&self) -> Result<Option<Bridge>, NetworkError> {
        let Some(bridge) = &self.bridge else {
            return Ok(None);
        };
        let there = self.links.find(&bridge.link.name).await?;
        let same = there.is_some_and(|link| link.index == bridge.link.index);
        Ok(same.then(|| bridge.clone()))
    }

    /// Where ports of the host lead to, those of one sandbox aside.
    fn ways(&self, subnets: Subnets, aside: Option<&str>) -> Vec<Way> {
        let ports = self.ports.all();
        let ports = ports.filter(|(sandbox, _)| aside != Some(*sandbox));
        let ways = ports.filter_map(|(sandbox, port)| {
            let v4 = self.pool.of(sandbox)?;
            Some(Way {
                port,
                v4,
                v6: subnets.beside(v4),
            })
        });
        ways.collect()
    }
}

/// Lets clients of these ports reach who has them now. Without it those of UDP that keep their own
/// port wait for the kernel to forget: no reason to have no pod.
fn forget(ports: &[HostPort]) {
    if let Err(error) = flows::forget(ports) {
        tracing::warn!(
            %error,
            "the kernel's connection tracking cannot be read (module nf_conntrack_netlink): clients \
             that keep sending to a port of the host by UDP may not reach its new pod"
        );
    }
}

/// The name of the host's end of a sandbox's link: at most 15 bytes, the same every time.
pub fn host_link(sandbox: &str) -> String {
    use sha2::Digest;
    let digest = sha2::Sha256::digest(sandbox.as_bytes());
    let mut name = String::from("bh");
    for byte in digest.iter().take(6) {
        name.push_str(&format!("{byte:02x}"));
    }
    name
}
