//! The one owner of what the host's network has of ours: bridge, translation, leases and the
//! host's ends of the pods' links. A thread with a runtime of its own, since it touches files;
//! it ends when the last sender is gone.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use tokio::sync::{mpsc, oneshot};

use super::bridge::{self, Plan};
use super::error::NetworkError;
use super::link::{Links, Pair};
use super::pool::Pool;
use super::prefix::Ipv4Prefix;

/// Requests that may wait for the owner before senders wait.
const QUEUE: usize = 64;

type Reply<T> = oneshot::Sender<Result<T, NetworkError>>;

enum Request {
    Attach {
        sandbox: String,
        pod_link: &'static str,
        namespace: OwnedFd,
        reply: Reply<Attachment>,
    },
    Detach {
        sandbox: String,
        reply: Reply<()>,
    },
}

/// A pod's place on the bridge.
#[derive(Debug, Clone)]
pub struct Attachment {
    pub address: Ipv4Addr,
    pub pool: Ipv4Prefix,
    pub mac: [u8; 6],
    pub mtu: u32,
}

/// Sends to the owner.
#[derive(Debug, Clone)]
pub struct Owner {
    requests: mpsc::Sender<Request>,
}

impl Owner {
    /// Starts the thread. A bridge that no lease needs any more is removed.
    pub async fn start(plan: Plan, pool: Pool) -> Result<Self, NetworkError> {
        let (requests, receiver) = mpsc::channel(QUEUE);
        let (reply, started) = oneshot::channel();
        std::thread::Builder::new()
            .name("network".to_owned())
            .spawn(move || run(plan, pool, receiver, reply))
            .map_err(|source| NetworkError::Netlink {
                step: "start the network's thread".to_owned(),
                source,
            })?;
        started.await.map_err(|_| NetworkError::Ended)??;
        Ok(Self { requests })
    }

    /// Gives the sandbox an address and puts a link into its namespace. What an interrupted
    /// attempt left is replaced.
    pub async fn attach(
        &self,
        sandbox: &str,
        pod_link: &'static str,
        namespace: OwnedFd,
    ) -> Result<Attachment, NetworkError> {
        let sandbox = sandbox.to_owned();
        self.ask(|reply| Request::Attach {
            sandbox,
            pod_link,
            namespace,
            reply,
        })
        .await
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

fn run(plan: Plan, pool: Pool, mut requests: mpsc::Receiver<Request>, started: Reply<()>) {
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
        let mut host = match Host::open(plan, pool).await {
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
                Request::Attach {
                    sandbox,
                    pod_link,
                    namespace,
                    reply,
                } => {
                    let _ = reply.send(host.attach(&sandbox, pod_link, namespace).await);
                }
                Request::Detach { sandbox, reply } => {
                    let _ = reply.send(host.detach(&sandbox).await);
                }
            }
        }
    });
}

struct Host {
    plan: Plan,
    pool: Pool,
    links: Links,
    /// The bridge this server has made or completed, with the index it then had.
    bridge: Option<bridge::Bridge>,
}

impl Host {
    async fn open(plan: Plan, pool: Pool) -> Result<Self, NetworkError> {
        let links = Links::open()?;
        if pool.is_empty() {
            plan.remove(&links).await?;
        }
        Ok(Self {
            plan,
            pool,
            links,
            bridge: None,
        })
    }

    async fn attach(
        &mut self,
        sandbox: &str,
        pod_link: &'static str,
        namespace: OwnedFd,
    ) -> Result<Attachment, NetworkError> {
        let bridge = self.bridge().await?;
        let address = self.pool.claim(bridge.pool, sandbox)?;
        let host = host_link(sandbox);
        if let Some(left) = self.links.find(&host).await? {
            self.links.remove(&left).await?;
        }
        let attachment = Attachment {
            address,
            pool: bridge.pool,
            mac: bridge::mac(address),
            mtu: bridge.link.mtu,
        };
        self.links
            .add_pair(Pair {
                host: &host,
                bridge: bridge.link.index,
                pod: pod_link,
                namespace,
                mac: attachment.mac,
                mtu: attachment.mtu,
            })
            .await?;
        Ok(attachment)
    }

    async fn detach(&mut self, sandbox: &str) -> Result<(), NetworkError> {
        if let Some(link) = self.links.find(&host_link(sandbox)).await? {
            self.links.remove(&link).await?;
        }
        self.pool.release(sandbox)?;
        if self.pool.is_empty() {
            self.bridge = None;
            self.plan.remove(&self.links).await?;
        }
        Ok(())
    }

    /// The bridge as it was, or a new one where somebody removed it.
    async fn bridge(&mut self) -> Result<bridge::Bridge, NetworkError> {
        if let Some(bridge) = &self.bridge {
            let there = self.links.find(&bridge.link.name).await?;
            if there.is_some_and(|link| link.index == bridge.link.index) {
                return Ok(bridge.clone());
            }
        }
        let bridge = self.plan.ensure(&self.links).await?;
        self.bridge = Some(bridge.clone());
        Ok(bridge)
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
