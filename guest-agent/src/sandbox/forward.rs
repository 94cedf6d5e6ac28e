//! Connections to ports of the pod, joined with streams to the host (CRI `PortForward`).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_agent_api::{Greeting, Purpose, Secret};
use tokio::io::{AsyncWriteExt, BufReader, copy_buf};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::Notify;

use super::{Sandbox, SandboxError};
use crate::container::apart::Apart;
use crate::container::{ContainerError, LaunchError, off};
use crate::dial::{self, Stream};

/// Most connections of a pod at once.
pub(super) const MOST: usize = 1024;
/// How long a program may take to have a connection: only a full backlog takes any time.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often a host that has ended its side is looked after.
const LOOK: Duration = Duration::from_secs(1);
/// Bytes on their way, each way.
const BUFFER: usize = 32 << 10;

impl Sandbox {
    /// Connects to a port of the pod's loopback, and dials the host for it.
    pub async fn forward(&self, port: u16, token: u64) -> Result<(), SandboxError> {
        let place = Arc::clone(&self.forwards).try_acquire_owned();
        let place = place.map_err(|_| {
            let what = format!("{MOST} connections are forwarded to the pod already");
            ContainerError::Exhausted(what)
        })?;
        let apart = self
            .prepared
            .get()
            .and_then(|prepared| prepared.apart.clone());
        let program = connect(apart, port).await?;
        let greeting = Greeting {
            purpose: Purpose::Forward,
            secret: Secret::NONE,
            token,
            offset: 0,
        };
        let host = self.dialer.open(greeting).await;
        let host = host.map_err(SandboxError::Dial)?;
        tokio::spawn(async move {
            // However it ends, both ends are closed then.
            let _ = relay(host, program).await;
            drop(place);
        });
        Ok(())
    }
}

/// A program may listen for one family only.
async fn connect(apart: Option<Arc<Apart>>, port: u16) -> Result<TcpStream, SandboxError> {
    let mut refusal = None;
    for address in [
        IpAddr::from(Ipv4Addr::LOCALHOST),
        Ipv6Addr::LOCALHOST.into(),
    ] {
        let inside = apart.clone();
        let tried = async {
            let socket = off(move || socket(inside.as_deref(), address)).await??;
            let connected = socket.connect(SocketAddr::new(address, port));
            let connected = tokio::time::timeout(PATIENCE, connected).await;
            let connected = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            connected.map_err(|source| SandboxError::Step {
                what: format!("connect to port {port} of the pod"),
                source,
            })
        };
        match tried.await {
            Ok(program) => return Ok(program),
            // What is wrong with the first says more.
            Err(error) => refusal = refusal.or(Some(error)),
        }
    }
    let words = refusal.map(|error| error.to_string());
    Err(SandboxError::State(words.unwrap_or_default()))
}

/// A socket of the pod's network. Blocks.
fn socket(apart: Option<&Apart>, address: IpAddr) -> Result<TcpSocket, SandboxError> {
    let make = || {
        let socket = match address {
            IpAddr::V4(_) => TcpSocket::new_v4(),
            IpAddr::V6(_) => TcpSocket::new_v6(),
        };
        socket.map_err(|source| LaunchError::Step {
            what: "make a socket of the pod",
            source,
        })
    };
    let made = match apart {
        Some(apart) => apart.inside(make),
        None => make(),
    };
    Ok(made?)
}

/// Carries bytes until both sides have ended, or one is gone.
async fn relay(mut host: Stream, mut program: TcpStream) -> io::Result<()> {
    let (from_host, mut to_host) = host.split();
    let (from_program, mut to_program) = program.split();
    let answered = Notify::new();
    let there = async {
        let mut from_host = BufReader::with_capacity(BUFFER, from_host);
        copy_buf(&mut from_host, &mut to_program).await?;
        // A host that is gone is not to be answered: what it began is given up.
        dial::still_open(from_host.get_ref().as_ref())?;
        to_program.shutdown().await?;
        loop {
            tokio::select! {
                () = answered.notified() => return Ok(()),
                () = tokio::time::sleep(LOOK) => dial::still_open(from_host.get_ref().as_ref())?,
            }
        }
    };
    let back = async {
        let mut from_program = BufReader::with_capacity(BUFFER, from_program);
        copy_buf(&mut from_program, &mut to_host).await?;
        to_host.shutdown().await?;
        answered.notify_one();
        Ok(())
    };
    tokio::try_join!(there, back).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn each_side_ends_by_itself() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let program = connect(None, port).await.unwrap();
        let (mut accepted, _) = listener.accept().await.unwrap();
        let (mut host, guest) = Stream::pair().unwrap();
        let relayed = tokio::spawn(relay(guest, program));

        host.write_all(b"question").await.unwrap();
        host.shutdown().await.unwrap();
        let mut heard = String::new();
        accepted.read_to_string(&mut heard).await.unwrap();
        assert_eq!(heard, "question");
        accepted.write_all(b"answer").await.unwrap();
        drop(accepted);
        heard.clear();
        host.read_to_string(&mut heard).await.unwrap();
        assert_eq!(heard, "answer");
        relayed.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_port_nobody_listens_on_is_named() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let refusal = connect(None, port).await.unwrap_err();
        assert!(matches!(refusal, SandboxError::State(_)), "{refusal:?}");
        assert!(
            refusal.to_string().contains(&format!("port {port}")),
            "{refusal}"
        );
    }
}
