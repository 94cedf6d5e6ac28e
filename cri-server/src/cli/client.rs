//! A connection to a server's CRI socket.

use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use bulkhead_cri_api::pulls::v1::pulls_client::PullsClient;
use bulkhead_cri_api::v1::image_service_client::ImageServiceClient;
use bulkhead_cri_api::v1::runtime_service_client::RuntimeServiceClient;
use bulkhead_cri_api::v1::{
    ContainerStatus, ContainerStatusRequest, PodSandboxStatusRequest, StatusRequest,
    VersionRequest, VersionResponse,
};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use super::failure::Failure;

/// What the interface's own clients allow, in bytes.
const LARGEST_MESSAGE: usize = 16 << 20;
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// The clients of one server. Clones share the connection.
#[derive(Clone)]
pub struct Client {
    pub runtime: RuntimeServiceClient<Channel>,
    pub images: ImageServiceClient<Channel>,
    pub pulls: PullsClient<Channel>,
}

/// Why there is no connection.
pub enum NoServer {
    /// Nobody serves the socket.
    Absent,
    /// Somebody may, yet not for us.
    Failed(Failure),
}

impl Client {
    /// Connects to the socket, and makes sure that something answers.
    pub async fn connect(socket: &Path) -> Result<Self, NoServer> {
        let shown = socket.display();
        // Once by hand: the channel would hide why.
        if let Err(error) = UnixStream::connect(socket).await {
            return Err(match error.kind() {
                ErrorKind::NotFound | ErrorKind::ConnectionRefused => NoServer::Absent,
                ErrorKind::PermissionDenied => NoServer::Failed(Failure::own(format!(
                    "may not use {shown}: run this as root (sudo)"
                ))),
                _ => NoServer::Failed(Failure::own(format!("cannot connect to {shown}: {error}"))),
            });
        }
        let path = socket.to_owned();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The address is needed for its form only.
        let channel = Endpoint::from_static("http://localhost")
            .connect_timeout(CONNECT_LIMIT)
            .connect_with_connector(connector)
            .await
            .map_err(|error| {
                NoServer::Failed(Failure::own(format!("cannot connect to {shown}: {error}")))
            })?;
        let client = Self {
            runtime: RuntimeServiceClient::new(channel.clone())
                .max_decoding_message_size(LARGEST_MESSAGE),
            images: ImageServiceClient::new(channel.clone())
                .max_decoding_message_size(LARGEST_MESSAGE),
            pulls: PullsClient::new(channel),
        };
        client.version().await.map_err(NoServer::Failed)?;
        Ok(client)
    }

    /// Connects to the socket; that nobody serves it is a failure, too.
    pub async fn require(socket: &Path) -> Result<Self, Failure> {
        Self::connect(socket).await.map_err(|error| match error {
            NoServer::Failed(failure) => failure,
            NoServer::Absent => Failure::own(format!(
                "no server answers at {}: start one with `bulkhead serve`, or name its socket \
                 with --socket",
                socket.display()
            )),
        })
    }

    /// Who answers.
    pub async fn version(&self) -> Result<VersionResponse, Failure> {
        let request = VersionRequest {
            version: "v1".to_owned(),
        };
        let answer = self.runtime.clone().version(request).await;
        Ok(answer
            .map_err(|status| Failure::call("ask the server's version", &status))?
            .into_inner())
    }

    /// A container's status.
    pub async fn container(&self, id: &str) -> Result<ContainerStatus, Failure> {
        let request = ContainerStatusRequest {
            container_id: id.to_owned(),
            verbose: false,
        };
        let answer = self.runtime.clone().container_status(request).await;
        let answer = answer.map_err(|status| Failure::call("look after the container", &status))?;
        Ok(answer.into_inner().status.unwrap_or_default())
    }

    /// Whether a container has a terminal, which it alone decides.
    pub async fn has_terminal(&self, id: &str) -> Result<bool, Failure> {
        let request = ContainerStatusRequest {
            container_id: id.to_owned(),
            verbose: true,
        };
        let answer = self.runtime.clone().container_status(request).await;
        let answer = answer.map_err(|status| Failure::call("look after the container", &status))?;
        let info = answer.into_inner().info.remove("info").unwrap_or_default();
        let info: serde_json::Value = serde_json::from_str(&info).unwrap_or_default();
        Ok(info["process"]["terminal"].as_bool().unwrap_or_default())
    }

    /// The end of what a pod's kernel has written to its console. It comes from the guest, so it is
    /// made harmless for terminals.
    pub async fn console(&self, pod: &str) -> Result<String, Failure> {
        let console = self.pod_info(pod, "console").await?;
        let console = console.and_then(|text| serde_json::from_str::<String>(&text).ok());
        let console = console.ok_or_else(|| {
            let words = "the server no longer has the console of a pod that was stopped";
            Failure::own(format!("cannot show the console: {words}"))
        })?;
        Ok(harmless(&console))
    }

    /// What the server says of a pod for those who look closely, by its name: JSON.
    pub async fn pod_info(&self, pod: &str, name: &str) -> Result<Option<String>, Failure> {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: pod.to_owned(),
            verbose: true,
        };
        let answer = self.runtime.clone().pod_sandbox_status(request).await;
        let answer = answer.map_err(|status| Failure::call("look after the pod", &status))?;
        Ok(answer.into_inner().info.remove(name))
    }

    /// Fails with the server's reason when it cannot run pods.
    pub async fn require_readiness(&self) -> Result<(), Failure> {
        let answer = self
            .runtime
            .clone()
            .status(StatusRequest { verbose: false })
            .await;
        let status = answer
            .map_err(|status| Failure::call("ask the server's status", &status))?
            .into_inner()
            .status
            .unwrap_or_default();
        match status.conditions.iter().find(|condition| !condition.status) {
            None => Ok(()),
            Some(condition) => Err(Failure::own(format!(
                "the server cannot run pods ({}): {}; `bulkhead doctor` says more",
                condition.r#type,
                if condition.message.is_empty() {
                    &condition.reason
                } else {
                    &condition.message
                },
            ))),
        }
    }
}

/// Text without what would move a terminal's cursor or change its state.
fn harmless(text: &str) -> String {
    let letters = text.chars().filter(|letter| *letter != '\r');
    letters
        .map(|letter| match letter {
            '\n' | '\t' => letter,
            letter if letter.is_control() => '?',
            letter => letter,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_write_to_the_terminal_what_it_likes() {
        assert_eq!(harmless("a\tb\r\n\x1b[2Jc\u{9b}d"), "a\tb\n?[2Jc?d");
    }
}
