//! What clients get done at the streaming server.

use bulkhead_cri_api::v1 as cri;
use tokio::io::copy_bidirectional_with_sizes;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tonic::Status;

use crate::sandbox::Pod;
use crate::streaming::{Forward, Task, Wanted};

/// Bytes of a forwarded connection on their way, each way.
const BUFFER: usize = 32 << 10;

/// A command in a container.
pub fn exec(pod: Pod, id: String, line: Vec<String>, wanted: Wanted) -> Task {
    let work = move |session| async move { pod.exec_for(&id, &line, wanted.tty, session).await };
    Task::Streams(wanted, Box::new(|session| Box::pin(work(session))))
}

/// A running container.
pub fn attach(pod: Pod, id: String, wanted: Wanted) -> Task {
    let work = move |session| async move { pod.attach_for(&id, session).await };
    Task::Streams(wanted, Box::new(|session| Box::pin(work(session))))
}

/// Ports of a pod.
pub fn forward(pod: Pod, ports: Vec<u16>) -> Task {
    let work = |connections| serve(pod, connections);
    Task::Forward(ports, Box::new(|connections| Box::pin(work(connections))))
}

/// The ports a request names, which clients that speak WebSocket do not name again.
pub fn ports(request: &cri::PortForwardRequest) -> Result<Vec<u16>, Status> {
    let ports = request.port.iter().map(|&port| {
        let named = u16::try_from(port).ok().filter(|&port| port > 0);
        named.ok_or_else(|| {
            Status::invalid_argument(format!("port {port} is not within 1 and 65535"))
        })
    });
    ports.collect()
}

/// What an exec or attach is asked for with, or why that makes no sense.
pub fn wanted(stdin: bool, stdout: bool, stderr: bool, tty: bool) -> Result<Wanted, Status> {
    if !(stdin || stdout || stderr) {
        let what = "one of stdin, stdout and stderr must be asked for";
        return Err(Status::invalid_argument(what));
    }
    if tty && stderr {
        let what = "a terminal has no stderr of its own: tty and stderr exclude each other";
        return Err(Status::invalid_argument(what));
    }
    Ok(Wanted {
        stdin,
        stdout,
        stderr,
        tty,
    })
}

/// Carries connections for as long as the client is there.
async fn serve(pod: Pod, mut connections: mpsc::Receiver<Forward>) {
    // Dropped, it ends them.
    let mut carried = JoinSet::new();
    loop {
        tokio::select! {
            connection = connections.recv() => match connection {
                Some(connection) => drop(carried.spawn(carry(pod.clone(), connection))),
                None => break,
            },
            Some(_) = carried.join_next() => {}
        }
    }
    while carried.join_next().await.is_some() {}
}

async fn carry(pod: Pod, mut connection: Forward) {
    match pod.forward(connection.port).await {
        Ok(mut guest) => {
            let (client, guest) = (&mut connection.data, &mut guest);
            let carried = copy_bidirectional_with_sizes(client, guest, BUFFER, BUFFER).await;
            if let Err(error) = carried {
                tracing::debug!(sandbox = %pod.id(), %error, "a forwarded connection broke off");
            }
        }
        Err(error) => {
            // The client may be gone.
            let _ = connection.error.send(error.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_is_refused() {
        assert!(wanted(false, false, false, true).is_err());
        assert!(wanted(true, true, true, true).is_err());
        assert!(wanted(false, true, true, false).is_ok());
        let request = |port: &[i32]| cri::PortForwardRequest {
            pod_sandbox_id: String::new(),
            port: port.to_vec(),
        };
        assert_eq!(ports(&request(&[80, 65535])).unwrap(), [80, 65535]);
        for port in [0, -1, 65536] {
            assert!(ports(&request(&[port])).is_err());
        }
    }
}
